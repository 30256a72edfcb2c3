"""From settings to records: the runs behind the tables and figures.

Compute or load: a run that runs/ already holds, with the same configuration, network, images, code, versions and
device, is read from there, unless the settings say `fresh`. Every other one is computed, and written when it is done.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion import files
from companion.data import Data, load_data
from companion.files import digest, from_root, one_line
from companion.records import (
    SCHEMA,
    Record,
    core_digest,
    device_name,
    make_record,
    pack,
    parse_record,
    plain,
    protocol,
    provenance,
    record_name,
    subject,
    versions,
    write_record,
)
from companion.settings import (
    CONTROLS,
    METRICS,
    NOTEBOOKS,
    OPEN_POINTS,
    PAPER_NETWORKS,
    PARAMETERS,
    PRESETS,
    STRONGER,
    ParameterError,
    Settings,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from companion.networks import Network
    from wdat_core import Images

SAMPLES, FRACTION = 10, 0.1  # of the training set, Figure 7.1


@dataclass(frozen=True)
class Bench:
    """What a run works on: the network on its device, the images there, and how it looks at them."""

    settings: Settings
    network: Network
    data: Data
    device: torch.device

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def at_once(self) -> int:
        """How many images the network sees at once where that decides nothing; a CPU is faster on smaller batches."""
        return 128 if self.device.type == "cpu" else 1024

    @property
    def how(self) -> dict[str, Any]:
        return {"precision": self.settings.precision, "compiled": self.settings.compiled}


def bench(settings: Settings) -> Bench:
    """Network, images and device of the settings.

    Raises:
        ParameterError: they are not to be had (see `load_network`, `load_data`, `pick_device`).
    """
    from companion.networks import load_network

    core_digest()  # of the code that runs, should the file be edited meanwhile
    device = pick_device(settings.device)
    network = load_network(str(settings.network), from_root(settings.models))
    network.model.to(device)
    return Bench(settings, network, load_data(settings, device), device)


def attack_each(settings: Sequence[Settings], part: str, *, notebook: str) -> list[Record]:
    """For each of the settings a record of the network as it is: clean, and under the attacks of Tables 1 and 2.

    Args:
        part: the images that are attacked, "test" or "train".
        notebook: the name of the notebook that computes it, for the command in the record.

    Raises:
        ParameterError: as `bench`; or the network's clean accuracy on test images is not the published one.
    """
    return [_attack(bench(one), part, notebook) for one in settings]


def _attack(on: Bench, part: str, notebook: str) -> Record:
    from wdat_core import Threat, evaluate, sensitivity, wpgd_budget

    settings = on.settings
    threat, steps, size = Threat(delta=float(settings.delta)), settings.steps, int(settings.batch_size or 0)
    config = {"threat": plain(dataclasses.asdict(threat)), "steps": steps, "batch_size": size, **on.how}
    record = _begin("evaluate", on, (part,), config)
    if held := _held(record, on):
        return held
    images: Images = getattr(on.data, part)
    show, begin = progress(f"{on.network.name}, {part} images"), time.perf_counter()
    scores = evaluate(
        on.model, *images, delta=threat.delta, steps=steps, batch_size=on.at_once, progress=show, **on.how
    )
    if part == "test":
        _check_clean(on.network, scores.clean, len(images[1]))
    upsilon = sensitivity(on.model, *images, threat, batch_size=on.at_once, **on.how)
    budget = wpgd_budget(
        on.model, *images, threat, upsilon=upsilon, steps=steps, batch_size=size, progress=show, **on.how
    )
    correct = {**scores.correct, "budget": budget.correct}
    record |= {
        "metrics": {part: {**{m: getattr(scores, m) for m in METRICS}, "budget": budget.accuracy}},
        "correct": {part: {name: pack(bits) for name, bits in correct.items()}},
        "upsilon": upsilon,
        "distance": budget.distance,
        "seconds": {"evaluate": round(time.perf_counter() - begin, 1)},
        **provenance(on.device, command(settings, notebook)),
    }
    return _written(record)


def finetune_grid(
    settings: Settings, perturb: str, *, notebook: str, curves: bool = False, **changes: Any
) -> list[Record]:
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
    """
    from companion.exports import check_export, export, is_exported
    from wdat_core import FinetuneConfig, Threat, evaluate, finetune

    on = bench(settings)
    if settings.export is not None:
        check_export(on.network.name, settings.export)
    before = _attack(on, "test", notebook)
    records = []
    for tau, eta in settings.grid():
        label = f"{perturb}, tau {tau:g}, eta {eta:g}"
        fields: dict[str, Any] = {
            "perturb": perturb,
            "tau": tau,
            "eta": eta,
            "beta": float(settings.beta),
            "threat": Threat(delta=float(settings.delta)),
            "steps": settings.steps,
            "epochs": int(settings.epochs or 0),
            "batch_size": int(settings.batch_size or 0),
            "consistency": settings.consistency,
            "upsilon_from": settings.upsilon_from,
            "seed": settings.seed,
        }
        config = FinetuneConfig(**fields | on.how | changes)
        record = _begin("finetune", on, ("train", "val", "test"), plain(dataclasses.asdict(config)))
        held = _held(record, on)
        has_curves = bool(held and "start" in held["history"])
        exported = settings.export is None or bool(held and is_exported(held, settings.export))
        if held and exported and (has_curves or not curves):
            records.append(held)
            continue
        follow = curves or has_curves  # what was measured is not lost to a run for another purpose
        tuned = copy.deepcopy(on.model)
        run = [record, on.at_once, follow, core_digest(), device_name(on.device), versions()]
        kept = files.RUNS / f"{digest(repr(run).encode())[:16]}.checkpoint"
        history = finetune(
            tuned,
            on.data.train,
            on.data.val,
            config,
            eval_batch_size=on.at_once,
            resume=kept,
            stop_after=settings.stop_after,
            on_epoch=(lambda _, model: _along(on, model)) if follow else None,
            progress=progress(label),
        )
        if not history.finished:
            raise ParameterError(
                f"stopped after {settings.stop_after:g} seconds, as asked, with {len(history.epochs)} of"
                f" {config.epochs} epochs of {label} done: the same command goes on from there"
            )
        begin = time.perf_counter()
        after = evaluate(
            tuned,
            *on.data.test,
            delta=settings.delta,
            steps=settings.steps,
            batch_size=on.at_once,
            progress=progress(label),
            **on.how,
        )
        seconds = {"baseline": before["seconds"]["evaluate"], "finetune": round(history.seconds, 1)}
        epochs: dict[str, Any] = {"epochs": history.epochs, "best": history.best, "upsilon": history.upsilon}
        record |= {
            "metrics": {
                "before": {m: before["metrics"]["test"][m] for m in METRICS},
                "after": {m: getattr(after, m) for m in METRICS},
            },
            "correct": {
                "before": {m: before["correct"]["test"][m] for m in METRICS},
                "after": {m: pack(after.correct[m]) for m in METRICS},
            },
            "history": epochs | ({"start": _start(on)} if follow else {}),
            "seconds": seconds | {"evaluate": round(time.perf_counter() - begin, 1)},
            **provenance(on.device, command(settings, notebook, tau=tau, eta=eta)),
        }
        records.append(_written(record))
        if settings.export is not None:
            print(f"exported to {export(tuned, records[-1], settings.export)}")
        kept.unlink(missing_ok=True)
    return records


def change_point(settings: Settings, *, notebook: str) -> list[Record]:
    """Two records: of the column of the settings as it is, and with one of the `OPEN_POINTS` or `CONTROLS` changed.

    The whole network is fine-tuned, but for "reinit", which is about the last layer alone. Arguments and errors are
    those of `finetune_grid`.
    """
    from wdat_core import Threat

    pointwise = {"threat": Threat(p=math.inf, delta=float(settings.delta))}
    usual = (OPEN_POINTS | CONTROLS)[settings.point][0]
    perturb = "last_layer" if settings.point == "reinit" else "whole"
    value = float(settings.value) if isinstance(usual, float) else settings.value
    values = [usual] if value == usual else [usual, value]
    records = []
    for one in values:
        changes = {settings.point: one} if settings.point in OPEN_POINTS else pointwise if one == "pointwise" else {}
        records += finetune_grid(dataclasses.replace(settings, value=one), perturb, notebook=notebook, **changes)
    return records


def _along(on: Bench, model: nn.Module) -> dict[str, float]:
    """What Figures 7.2 to 7.4 show of a network, beyond what `finetune` measures itself."""
    from wdat_core import Threat, evaluate, sensitivity, wpgd

    delta, steps = float(on.settings.delta), on.settings.steps
    test = evaluate(model, *on.data.test, delta=delta, steps=steps, batch_size=on.at_once, **on.how)
    point = wpgd(
        model, *on.data.val, Threat(p=math.inf, delta=delta), loss="ce", steps=steps, batch_size=on.at_once, **on.how
    )
    found = {"test_w_inf": test.w_inf, "test_w_2": test.w_2, "val_w_inf": point.accuracy}
    for part in ("test", "train"):
        images: Images = getattr(on.data, part)
        found[f"{part}_upsilon"] = sensitivity(model, *images, Threat(delta=delta), batch_size=on.at_once, **on.how)
    return found


def _start(on: Bench) -> dict[str, float]:
    """The same of the network that the fine-tuning starts from, with what `finetune` measures after each epoch."""
    from wdat_core import Threat, wpgd

    threat = Threat(delta=float(on.settings.delta))
    val = wpgd(on.model, *on.data.val, threat, steps=on.settings.steps, batch_size=on.at_once, **on.how)
    return {"epoch": 0, "clean": val.history["accuracy"][0], "w_2": val.accuracy, **_along(on, on.model)}


def attack_harder(settings: Settings, *, notebook: str) -> Record:
    """A record of the network under the attacks of the tables, under those of `STRONGER`, and under AutoAttack.

    AutoAttack (Croce and Hein, 2020) is pointwise, and takes the first `settings.autoattack` test images only.
    """
    import torch

    from wdat_core import Threat, wpgd

    on = bench(settings)
    (x, y), delta, few = on.data.test, float(settings.delta), min(settings.autoattack, settings.test_images or 0)
    config = {"threat": plain(dataclasses.asdict(Threat(delta=delta))), "steps": settings.steps, **on.how}
    record = _begin("stronger", on, ("test",), config)
    record["data"] |= {"autoattack": few} if few else {}
    if held := _held(record, on):
        return held
    begin, correct = time.perf_counter(), {}
    for name, attack in STRONGER.items():
        threat = Threat(p=attack.p, delta=delta)
        found = [
            wpgd(
                on.model,
                x,
                y,
                threat,
                loss=attack.loss,
                steps=attack.steps or settings.steps,
                step_ratio=attack.step_ratio,
                random_start=float(attack.starts > 1),
                seed=seed,
                batch_size=on.at_once,
                progress=progress(f"{on.network.name}, {attack.words(settings.steps)}"),
                **on.how,
            ).correct
            for seed in range(attack.starts)
        ]
        # The pointwise attacker takes for each image a start that works; the other has one budget for all images.
        correct[name] = torch.stack(found).all(0) if threat.p == math.inf else min(found, key=lambda c: int(c.sum()))
    if few:
        correct["autoattack"] = _autoattack(on, x[:few], y[:few])
    record |= {
        "metrics": {name: {"accuracy": bits.sum().item() / len(bits)} for name, bits in correct.items()},
        "correct": {name: {"accuracy": pack(bits)} for name, bits in correct.items()},
        "seconds": {"total": round(time.perf_counter() - begin, 1)},
        **provenance(on.device, command(settings, notebook)),
    }
    return _written(record)


def _autoattack(on: Bench, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified correctly after AutoAttack's standard version, bool (n,)."""
    import torch
    from pyautoattack import AutoAttack

    attack = AutoAttack(on.model, eps=float(on.settings.delta), seed=0, device=on.device)
    accelerators = [on.device] if on.device.type == "cuda" else []
    with torch.random.fork_rng(accelerators):  # it seeds the global generators
        attacked, _ = attack.run_standard_evaluation(x.contiguous(), y, batch_size=on.at_once)
    with torch.no_grad():
        return torch.cat([on.model(part).argmax(1) for part in attacked.split(on.at_once)]) == y


def estimates_each(settings: Sequence[Settings], *, notebook: str) -> list[Record]:
    """For each of the settings a record of Figure 7.1: Upsilon of the training set, and of ten random tenths of it."""
    import torch

    from wdat_core import Threat, sensitivity

    records = []
    for one in settings:
        on = bench(one)
        threat, n = Threat(delta=float(one.delta)), len(on.data.train[1])
        config = {"threat": plain(dataclasses.asdict(threat)), "samples": SAMPLES, "fraction": FRACTION}
        record = _begin("sensitivity", on, ("train",), {**config, "seed": one.seed, **on.how})
        if held := _held(record, on):
            records.append(held)
            continue
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(one.seed)
        drawn = [torch.randperm(n, generator=generator)[: max(1, round(FRACTION * n))] for _ in range(SAMPLES)]
        found = []
        for rows in [torch.arange(n), *drawn]:
            x, y = (part[rows.to(part.device)] for part in on.data.train)
            found.append(sensitivity(on.model, x, y, threat, batch_size=on.at_once, **on.how))
        record |= {
            "reference": found[0],
            "estimates": found[1:],
            "seconds": {"total": round(time.perf_counter() - begin, 1)},
            **provenance(on.device, command(one, notebook)),
        }
        records.append(_written(record))
    return records


def spend(settings: Settings, *, notebook: str) -> tuple[Record, dict[str, Tensor]]:
    """What each test image costs both attackers, as a record; and the images: "x", "w_inf" and "w_2", (n, 3, 32, 32).

    Always computed, since no record holds the images.
    The record has for each image the label, the prediction before and after each attack, and how far (l_inf) each
    attack moved it.
    """
    from wdat_core import Threat, wpgd

    on = bench(settings)
    (x, y), delta = on.data.test, float(settings.delta)
    threats = {"w_inf": (Threat(p=math.inf, delta=delta), "ce"), "w_2": (Threat(delta=delta), "redlr")}
    config = {"threat": plain(dataclasses.asdict(Threat(delta=delta))), "steps": settings.steps, **on.how}
    record, begin, pictures = _begin("spend", on, ("test",), config), time.perf_counter(), {"x": x}
    for name, (threat, loss) in threats.items():
        attack = wpgd(
            on.model,
            x,
            y,
            threat,
            loss=loss,
            steps=settings.steps,
            batch_size=on.at_once,
            progress=progress(name),
            **on.how,
        )
        pictures[name] = attack.x_adv
    record |= {
        "label": y.tolist(),
        "prediction": {name: _predict(on, images) for name, images in pictures.items()},
        "distance": {
            name: [round(d, 6) for d in (pictures[name] - x).abs().flatten(1).amax(1).tolist()] for name in threats
        },
        "seconds": {"total": round(time.perf_counter() - begin, 1)},
        **provenance(on.device, command(settings, notebook)),
    }
    return _written(record), {name: images.cpu() for name, images in pictures.items()}


def _predict(on: Bench, x: Tensor) -> list[int]:
    import torch

    with torch.no_grad(), torch.autocast(on.device.type, torch.bfloat16, enabled=on.settings.precision == "bfloat16"):
        return [int(k) for part in x.split(on.at_once) for k in on.model(part).argmax(1)]


def _written(fields: dict[str, Any]) -> Record:
    record = make_record(fields)
    write_record(record, files.RUNS)
    return record


def _begin(kind: str, on: Bench, parts: Sequence[str], config: dict[str, Any]) -> dict[str, Any]:
    """A record as far as it is known before the run."""
    return {"schema": SCHEMA, "kind": kind, **subject(on.network, on.data, *parts), "config": config}


def _held(record: dict[str, Any], on: Bench) -> Record | None:
    """The finished run in runs/ that this one would repeat, if there is one."""
    if on.settings.fresh:
        return None
    try:
        held = parse_record((files.RUNS / record_name(record)).read_bytes())
    except (OSError, ValueError):
        return None
    here = provenance(on.device, held["command"])
    same = protocol(held) == protocol(record) and all(
        getattr(held, key) == here[key] for key in ("core", "versions", "device")
    )
    return held if same else None


def command(settings: Settings, notebook: str, **column: Any) -> str:
    """The papermill line that repeats a record; a folder for CIFAR-10 is called data, one of exports so.

    Args:
        column: the tau and eta of the record, where the notebook takes them.
    """
    defaults = {**dataclasses.asdict(Settings()), **PRESETS[settings.preset]}
    if settings.preset == "paper":
        del defaults["network"]  # another one in other notebooks
    name = Path(str(settings.network)).name
    network = name if name == settings.network else f"exports/{name}"
    data = "embedded" if settings.data == "embedded" else "data"
    one = dataclasses.asdict(dataclasses.replace(settings, network=network, data=data, **column))
    own = ("device", "models", "stop_after", "export", "fresh")
    known = [k for k in PARAMETERS[NOTEBOOKS[notebook]] if k not in own]
    given = {k: one[k] for k in known if k not in defaults or one[k] != defaults[k]}
    return " ".join(
        [
            f"papermill notebooks/{notebook}.ipynb out.ipynb",
            *(f"-p {k} {int(v) if isinstance(v, float) and v.is_integer() else v}" for k, v in given.items()),
        ]
    )


def _check_clean(network: Network, clean: float, images: int) -> None:
    """The clean accuracy is the published one, up to what a sample of that many images can differ (4 sigma)."""
    if network.name not in PAPER_NETWORKS:
        return
    published = PAPER_NETWORKS[network.name]["clean"] / 100
    allowed = 0.005 if images == 10_000 else 4 * math.sqrt(published * (1 - published) / images)
    if abs(clean - published) > allowed:
        raise ParameterError(
            f"{network.name} classifies {100 * clean:.2f} % of {images} clean test images correctly, and"
            f" {100 * published:.2f} % is published: these are not its weights, or not its images"
        )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU.

    Raises:
        ParameterError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device has not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParameterError(f"device {name!r} is not to be had here: use auto or cpu ({one_line(error)})") from error
    return device


def progress(label: str) -> Callable[[str], None]:
    """What wdat_core's `progress` wants: shows a line in the terminal behind papermill and in a live notebook.

    The line replaces the one before, and the empty line at the end clears it: nothing stays in stored outputs.
    """
    try:
        descriptor = sys.stderr.fileno()  # under ipykernel this is the process's own stderr
        terminal = os.fdopen(os.dup(descriptor), "w") if os.isatty(descriptor) else None
    except (OSError, AttributeError, ValueError, io.UnsupportedOperation):
        terminal = None
    in_kernel = "ipykernel" in sys.modules

    def show(text: str) -> None:
        line = f"{label}: {text}" if text else ""
        if terminal:
            terminal.write(f"\r\033[K{line}")
            terminal.flush()
        if in_kernel:
            from IPython.display import clear_output, display

            clear_output(wait=bool(line))
            if line:
                display({"text/plain": line}, raw=True)

    return show
