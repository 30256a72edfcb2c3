"""From settings to records: the runs behind the tables and figures. See bench.py for the way that each of them goes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import wdat_core
from companion import processes
from companion.bench import Bench, begin, bench, check_clean, command, held, kept_at, measured, recorded
from companion.kinds import EvaluateRecord, FinetuneRecord
from companion.machine import core_digest, device_name
from companion.parts import AttackConfig, EvaluateConfig, SensitivityConfig
from companion.settings import CONTROLS, METRICS, OPEN_POINTS, STRONGER, ParameterError, Settings
from companion.values import accuracy_name, pack, pack_floats
from wdat_core import FinetuneConfig, Threat

SAMPLES, FRACTION = 10, 0.1  # of the training set, Figure 7.1

# ---------------------------------------------------------------------------------------------------------------------
# A network as it is
# ---------------------------------------------------------------------------------------------------------------------


def attack_each(settings: Sequence[Settings], part: str, *, notebook: str) -> list[Any]:
    """For each of the settings a record of the network as it is: clean, and under the attacks of Tables 1 and 2.

    Args:
        part: the images that are attacked, "test" or "train".
        notebook: the name of the notebook that computes it, for the command in the record.

    Raises:
        ParameterError: as `bench`; or the network's clean accuracy on test images is not the published one.
    """
    return [attacked(bench(one), part, command(one, notebook)) for one in settings]


def attacked(on: Bench, part: str, line: str) -> Any:
    """A record of kind "evaluate", of a part of the images; of test and validation images with distances."""
    size = int(on.settings.batch_size or 0)
    config = EvaluateConfig(steps=on.settings.steps, batch_size=size, **on.config)
    begun = begin("evaluate", on, (part,), config)
    known = held(begun, on)
    if known and (part == "train" or _is_found(known, on.settings)):
        return known
    steps = int(on.settings.found_steps or 0) if part != "train" else 0

    def measure() -> dict[str, Any]:
        images: wdat_core.Images = getattr(on.data, part)
        start, show = time.perf_counter(), on.progress(f"{part} images")
        correct = scores(on, images, show)
        if part == "test":
            check_clean(on, _mean(correct["clean"]), len(images[1]))
        if not correct["clean"].any():
            raise ParameterError(
                f"{on.network.name} classifies none of the {len(images[1])} {part} images correctly, so nothing is left"
                f" to attack: are their labels those that it was trained with? ({on.data.source})"
            )
        upsilon = on.sensitivity(images)
        correct["budget"], distance = on.budget(images, upsilon, show)
        return {
            "metrics": {part: {name: _mean(bits) for name, bits in correct.items()}},
            "correct": {part: {name: pack(bits) for name, bits in correct.items()}},
            **found(on, steps, part),
            "upsilon": upsilon,
            "distance": distance,
            "seconds": {"evaluate": round(time.perf_counter() - start, 1)},
        }

    return measured(begun, on, line, measure)


def found(on: Bench, steps: int, when: str, **known: str) -> dict[str, Any]:
    """How far each test image is from the nearest misclassified one, beside what is known; nothing for 0 steps.

    Args:
        when: what the network is called in the record: "test", "before", "after"; or "val", of validation images.
        known: packed distances of another network, by what it is called.
    """
    if not steps:
        return {}
    images = on.data.val if when == "val" else on.data.test
    return _boundary(on, steps, {**known, when: pack_floats(on.boundary(images, steps=steps).distance)})


def _boundary(on: Bench, steps: int, distance: dict[str, str]) -> dict[str, Any]:
    part = {"steps": steps, "core": core_digest(), "device": device_name(on.device), "distance": distance}
    return {"boundary": part}


def _is_found(record: Any, settings: Settings) -> bool:
    """Whether a record has the worst case, searched for at least as long as the settings want it."""
    return not settings.found_steps or bool(record.boundary and record.boundary.steps >= settings.found_steps)


def scores(on: Bench, images: wdat_core.Images, progress: Any = None) -> dict[str, Tensor]:
    """Which images are classified correctly, bool (n,), for each of `METRICS`."""
    shown = {} if progress is None else {"progress": progress}
    pointwise, distributional = (on.attack(images, p, **shown) for p in (math.inf, 2.0))
    return {"clean": pointwise.was_correct, "w_inf": pointwise.correct, "w_2": distributional.correct}


def _mean(bits: Tensor) -> float:
    return bits.sum().item() / len(bits)


def attack_harder(settings: Settings, *, notebook: str) -> Any:
    """A record of the network under the attacks of the tables, under those of `STRONGER`, and under AutoAttack.

    AutoAttack (Croce and Hein, 2020) is pointwise, and takes the first `settings.autoattack` test images only.

    Raises:
        ParameterError: as `bench`; or the network has two classes, for which there is no DLR.
    """
    on = bench(settings, classes=3)
    few = min(settings.autoattack, settings.test_images or 0)
    config = AttackConfig(steps=settings.steps, **on.config)
    begun = begin("stronger", on, ("test",), config, **({"autoattack": few} if few else {}))

    def measure() -> dict[str, Any]:
        correct = {name: _strongest(on, name) for name in STRONGER}
        if few:
            x, y = (part[:few] for part in on.data.test)
            correct["autoattack"] = autoattack(
                on.model, x, y, norm=settings.norm, delta=config.threat.delta, batch_size=on.at_once
            )
        return {
            "metrics": {name: {"accuracy": _mean(bits)} for name, bits in correct.items()},
            "correct": {name: {"accuracy": pack(bits)} for name, bits in correct.items()},
        }

    return recorded(begun, on, command(settings, notebook), measure)


def _strongest(on: Bench, name: str) -> Tensor:
    """Which test images are classified correctly under one attack of `STRONGER`, the best of its starts."""
    attack = STRONGER[name]
    found = [
        on.attack(
            on.data.test,
            attack.p,
            loss=attack.loss,
            steps=attack.steps or on.settings.steps,
            step_ratio=attack.step_ratio,
            random_start=float(attack.starts > 1),
            seed=seed,
            progress=on.progress(attack.words(on.settings.steps)),
        ).correct
        for seed in range(attack.starts)
    ]
    # The pointwise attacker takes for each image a start that works; the other has one budget for all images.
    return torch.stack(found).all(0) if attack.p == math.inf else min(found, key=lambda bits: int(bits.sum()))


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, norm: str, delta: float, batch_size: int) -> Tensor:
    """Whether each image is classified correctly after AutoAttack's standard version, bool (n,)."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm=norm, eps=delta, seed=0, device=x.device)
    accelerators = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(accelerators):  # it seeds the global generators
        attacked, _ = attack.run_standard_evaluation(x.contiguous(), y, batch_size=batch_size)
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in attacked.split(batch_size)]) == y


def estimates_each(settings: Sequence[Settings], *, notebook: str) -> list[Any]:
    """For each of the settings a record of Figure 7.1: Upsilon of the training set, and of ten random tenths of it."""
    return [_estimates(bench(one), notebook) for one in settings]


def _estimates(on: Bench, notebook: str) -> Any:
    """A record of kind "sensitivity"."""
    seed = on.settings.seed
    config = SensitivityConfig(samples=SAMPLES, fraction=FRACTION, seed=seed, **on.config)

    def measure() -> dict[str, Any]:
        x, y = on.data.train
        n, generator = len(y), torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(n, generator=generator)[: max(1, round(FRACTION * n))] for _ in range(SAMPLES)]
        found = [on.sensitivity((x[rows], y[rows])) for rows in (r.to(x.device) for r in [torch.arange(n), *drawn])]
        return {"reference": found[0], "estimates": found[1:]}

    return recorded(begin("sensitivity", on, ("train",), config), on, command(on.settings, notebook), measure)


def spend(settings: Settings, *, notebook: str) -> tuple[Any, dict[str, Tensor]]:
    """What each test image costs each attacker, as a record; and the images as they are and after, (n, c, h, w).

    Always computed, since no record holds the images.
    The record has for each image the label, the prediction before and after each attack, and how far, in the norm of
    the settings, each attack moved it. Unless `found_steps` is 0 it also has the nearest misclassified image found; the
    image itself, where nothing was found. The images are "x", "w_inf", "w_2" and "found".
    """
    on = bench(settings)
    (x, y), config = on.data.test, AttackConfig(steps=settings.steps, **on.config)
    pictures = {"x": x}

    def measure() -> dict[str, Any]:
        for name, p in (("w_inf", math.inf), ("w_2", 2.0)):
            pictures[name] = on.attack((x, y), p, progress=on.progress(name)).x_adv
        nearest, steps = {}, int(on.settings.found_steps or 0)
        if steps:
            found = on.boundary((x, y), steps=steps, keep=True)
            assert found.x_adv is not None
            pictures["found"] = found.x_adv
            nearest = _boundary(on, steps, {"test": pack_floats(found.distance)})
        far = {name: (pictures[name] - x).flatten(1).norm(settings.r, dim=1) for name in ("w_inf", "w_2")}
        return {
            "label": y.tolist(),
            "prediction": {name: _predict(on, images) for name, images in pictures.items()},
            "distance": {name: [round(d, 6) for d in distance.tolist()] for name, distance in far.items()},
            **nearest,
        }

    record = measured(begin("spend", on, ("test",), config), on, command(settings, notebook), measure)
    return record, {name: images.cpu() for name, images in pictures.items()}


def _predict(on: Bench, x: Tensor) -> list[int]:
    with torch.no_grad(), torch.autocast(on.device.type, torch.bfloat16, enabled=on.settings.precision == "bfloat16"):
        return [int(k) for part in x.split(on.at_once) for k in on.model(part).argmax(1)]


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def finetune_grid(
    settings: Settings, perturb: str, *, notebook: str, curves: bool = False, **changes: Any
) -> list[FinetuneRecord]:
    """One record for each (tau, eta) of the settings: Algorithm 1 and the three accuracies before and after it.

    Every record is written to runs/ as soon as its column is done, and the network exported if the settings name a
    folder for it. The network is fine-tuned anew for each column. While a column is computed it is kept in runs/ every
    minute; the same settings go on from there, with the same result.

    Args:
        perturb: "whole" or "last_layer".
        notebook: the name of the notebook that computes it, for the command in the record.
        curves: after every epoch also measure what Figures 7.2 to 7.4 show; `history.start` is the network before it.
        changes: fields of `FinetuneConfig` that are to be other than the settings or the defaults have them.

    Raises:
        ParameterError: as `bench`; or the loaded network's clean accuracy is not the published one; or the time of
            `stop_after` is up, for this column.
        WdatError: the training diverged in every column. Where it did in some of them, it is printed.
    """
    from companion.exports import check_export

    on = bench(settings)
    if settings.export is not None:
        check_export(on.network.name, settings.export, settings.dataset, settings.norm)
    _ = on.data.train, on.data.val  # images that are missing are named before an attack of hours
    before = attacked(on, "test", command(settings, notebook))
    records, left_out = [], []
    for tau, eta in settings.grid():
        fields: dict[str, Any] = {name: getattr(settings, name) for name in COPIED} | on.config | changes
        config = FinetuneConfig(perturb=perturb, tau=tau, eta=eta, **fields)
        try:
            records.append(_column(on, config, before, command(settings, notebook, tau=tau, eta=eta), curves))
        except wdat_core.WdatError as error:
            left_out.append(error)
            if not str(error).startswith(DIVERGED):
                raise
            print(f"A column is left out: {error}")
    if not records:
        raise left_out[0]
    return records


DIVERGED = "training diverged"  # begins what the core says of it
COPIED = ("beta", "steps", "epochs", "batch_size", "consistency", "upsilon_from", "seed")  # from settings to config


def _column(on: Bench, config: FinetuneConfig, before: EvaluateRecord, line: str, curves: bool) -> FinetuneRecord:
    """One run of Algorithm 1: read from runs/ or computed, and exported if the settings say so."""
    from companion.exports import export, is_exported

    settings = on.settings
    begun = begin("finetune", on, ("train", "val", "test"), config)
    known = held(begun, on)
    has_curves = bool(known and known.history.start)
    folder = settings.export
    exported = folder is None or processes.of_first(lambda: bool(known and is_exported(known, folder)))
    if known and _is_found(known, settings) and exported and (has_curves or not curves):
        return known
    ended = begin("diverged", on, ("train", "val", "test"), config)
    if not known and (before_now := held(ended, on)):
        raise wdat_core.WdatError(before_now.message)
    follow = curves or has_curves  # what was measured is not lost to a run for another purpose
    tuned = processes.shared_statistics(copy.deepcopy(on.model), on.device)
    kept = kept_at(begun, on, on.at_once, follow)
    start = time.perf_counter()
    try:
        record: Any = measured(begun, on, line, lambda: _trained(on, config, before, tuned, kept, follow))
    except wdat_core.WdatError as error:
        if str(error).startswith(DIVERGED):  # which is an outcome too
            outcome = {"message": str(error), "seconds": {"total": round(time.perf_counter() - start, 1)}}
            measured(ended, on, line, lambda: outcome)
            kept.unlink(missing_ok=True)  # from there it would end in the same way
        raise
    if settings.export is not None and processes.is_first():
        print(f"exported to {export(tuned, record, settings.export, settings.dataset, settings.norm)}")
    kept.unlink(missing_ok=True)
    return record


def _trained(
    on: Bench, config: FinetuneConfig, before: EvaluateRecord, tuned: nn.Module, kept: Any, follow: bool
) -> dict[str, Any]:
    """Fine-tunes the network `tuned` in place: the history, and the accuracies before and after."""
    label = f"{config.perturb}, tau {config.tau:g}, eta {config.eta:g}"
    history = wdat_core.finetune(
        tuned,
        on.data.train,
        on.data.val,
        config,
        eval_batch_size=on.at_once,
        resume=kept,
        stop_after=on.settings.stop_after,
        on_epoch=(lambda _, model: _along(on, model)) if follow else None,
        group=processes.group(),
        progress=on.progress(label),
    )
    if not history.finished:
        raise ParameterError(
            f"stopped after {on.settings.stop_after:g} seconds, as asked, with {len(history.epochs)} of"
            f" {config.epochs} epochs of {label} done: the same command goes on from there"
        )
    start = time.perf_counter()
    after = scores(on.with_model(tuned), on.data.test, on.progress(label))
    steps = int(on.settings.found_steps or 0)
    steps = before.boundary.steps if steps and before.boundary else steps  # as long as before, which may be longer
    known = {"before": before.boundary.distance["test"]} if before.boundary else {}
    rows: dict[str, Any] = {"epochs": history.epochs, "best": history.best, "upsilon": history.upsilon}
    return {
        "metrics": {
            "before": {m: before.metrics["test"][m] for m in METRICS},
            "after": {m: _mean(after[m]) for m in METRICS},
        },
        "correct": {
            "before": {m: before.correct["test"][m] for m in METRICS},
            "after": {m: pack(after[m]) for m in METRICS},
        },
        **found(on.with_model(tuned), steps, "after", **known),
        "history": rows | ({"start": _start(on, config)} if follow else {}),
        "seconds": {
            "baseline": before.seconds["evaluate"],
            "finetune": round(history.seconds, 1),
            "evaluate": round(time.perf_counter() - start, 1),
        },
    }


def _along(on: Bench, model: nn.Module) -> dict[str, float]:
    """What Figures 7.2 to 7.4 show of a network, beyond what `finetune` measures itself."""
    there = on.with_model(model)
    test, val = scores(there, on.data.test), there.attack(on.data.val, math.inf)
    found = {"test_w_inf": _mean(test["w_inf"]), "test_w_2": _mean(test["w_2"]), "val_w_inf": val.accuracy}
    return found | {f"{part}_upsilon": there.sensitivity(getattr(on.data, part)) for part in ("test", "train")}


def _start(on: Bench, config: FinetuneConfig) -> dict[str, float]:
    """The same of the network that the fine-tuning starts from, with what `finetune` measures after each epoch."""
    val = on.attack(on.data.val, config.threat.p, loss=on.loss)
    return {
        "epoch": 0,
        "clean": val.history["accuracy"][0],
        accuracy_name(config.threat): val.accuracy,
        **_along(on, on.model),
    }


def change_point(settings: Settings, *, notebook: str) -> list[FinetuneRecord]:
    """Two records: of the column of the settings as it is, and with one of the `OPEN_POINTS` or `CONTROLS` changed.

    The whole network is fine-tuned, but for "reinit", which is about the last layer alone. Arguments and errors are
    those of `finetune_grid`.
    """
    pointwise = {"threat": Threat(p=math.inf, r=settings.r, delta=settings.delta)}  # type: ignore[arg-type]
    usual = (OPEN_POINTS | CONTROLS)[settings.point][0]
    perturb = "last_layer" if settings.point == "reinit" else "whole"
    values = [usual] if settings.value == usual else [usual, settings.value]
    records = []
    for one in values:
        changes = {settings.point: one} if settings.point in OPEN_POINTS else pointwise if one == "pointwise" else {}
        as_is = settings.model_copy(update={"value": one})
        records += finetune_grid(as_is, perturb, notebook=notebook, **changes)
    return records
