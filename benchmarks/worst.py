"""The worst case over the ball, `boundary`: how strong it is beside other minimum-norm attacks, and what it holds.

python benchmarks/worst.py --images 50000 100000 200000

So many made images, one batch after the other, through `boundary(keep=False)` in a process of its own. Printed is JSON:
pairs of a number of images and the bytes that the process (on a GPU: the GPU) holds at most beyond what it held before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.baselines import DELTA, Subject, UnavailableError, demo, gradients, passes_of
from benchmarks.malloc import environment_without
from benchmarks.memory import peak, subject
from benchmarks.races import POINTS, SPEED, Row, compare, relay, row_of
from companion.architectures import STAND_INS
from companion.files import one_line
from companion.runs import autoattack
from wdat_core import Boundary, Threat, boundary

OURS = "boundary"
PEERS = {"adv_lib": "adv-lib FMN", "foolbox_fmn": "foolbox LInfFMNAttack"}
BUDGETS = {"w_2_4": Threat(p=2, delta=4 / 255), "w_2_8": Threat(p=2, delta=8 / 255)}
BUDGETS |= {"w_inf_8": Threat(p=math.inf, delta=8 / 255)}
LONGEST, BATCH = 200, 250  # steps, and images at once, beside AutoAttack: the latter are what it takes by default
AT_ONCE = 500  # images of the stream


def bounded(subject: Subject, batch_size: int, steps: int) -> Boundary:
    return boundary(subject.model, subject.x, subject.y, steps=steps, batch_size=batch_size, keep=False)


def strength(
    images: int, batch_size: int, steps: Sequence[int], device: torch.device, python: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The accuracies that each attack leaves on each stand-in, by the gradients that an image may cost; versions.

    An image counts as found where what the attack returns is misclassified when it is run again.
    """
    rows, versions = [], {}
    for network in STAND_INS:
        on = demo(images, device, network=network)
        about: dict[str, Any] = {"network": on.name, "images": len(on.x)}
        with peers.worker(python, on, batch_size) as ask:
            for name in (OURS, *PEERS):
                row = {"attack": PEERS.get(name, name), **about, "steps": [], "gradients": [], "reason": None}
                row |= {budget: [] for budget in BUDGETS}
                try:
                    for k in steps:
                        found = ours(on, batch_size, k) if name == OURS else ask(name, steps=k)
                        row["steps"].append(k)
                        row["gradients"].append(round(found["gradients"] / len(on.x), 1))
                        distances = Boundary(torch.tensor(found["distance"], dtype=torch.float64))
                        for budget, threat in BUDGETS.items():
                            row[budget].append(distances.accuracy(threat))
                        if "version" in found:
                            versions[name.split("_fmn")[0]] = found["version"]
                except UnavailableError as error:
                    row["reason"] = str(error)
                rows.append(row)
    return rows, versions


def ours(on: Subject, batch_size: int, steps: int) -> dict[str, Any]:
    """As the answer of a peer."""
    found: list[Boundary] = []

    def attack(model: torch.nn.Module) -> None:
        found.append(bounded(Subject(on.name, model, on.x, on.y), batch_size, steps))

    passes = passes_of(on.model, attack)
    return {"gradients": gradients(passes), "distance": found[0].distance.tolist()}


def beside_autoattack(on: Subject, parts: int) -> list[Row]:
    """How many times as fast as AutoAttack's standard version, and how many points above it, pointwise at DELTA.

    AutoAttack takes minutes, so that each of these parts of the images is a round. It takes about as long for an image
    that it does not turn in a batch of 26 as in one of 250, so that small parts do not slow it down.
    """
    ours, theirs = f"worst case, {LONGEST} steps", "AutoAttack, standard"
    about: dict[str, Any] = {"network": on.name, "images": len(on.x), "batch_size": BATCH, "precision": "float32"}
    about |= {"group": "Worst case: beside AutoAttack"}
    pieces = [dataclasses.replace(on, x=on.x[i::parts], y=on.y[i::parts]) for i in range(parts)]
    works: dict[str, Callable[[Subject], float]] = {
        ours: lambda part: bounded(part, BATCH, LONGEST).accuracy(BUDGETS["w_inf_8"]),
        theirs: _after_autoattack,
    }
    try:
        if not pieces:
            raise UnavailableError("left out of a quick run")
        bounded(on.first(BATCH), BATCH, 5)  # the warm-up
        race = relay(works, pieces, on.x.device)
    except UnavailableError as error:
        about |= {"reason": str(error)}
        return [row_of(ours, theirs, SPEED, 10, **about), row_of(f"{ours}: accuracy", theirs, POINTS, 0.3, **about)]

    def overall(name: str) -> tuple[float, float]:
        right = sum((lap.accuracy or 0.0) * len(part.x) for lap, part in zip(race.laps[name], pieces, strict=True))
        return round(right) / len(on.x), round(sum(getattr(lap, race.clock) for lap in race.laps[name]), 1)

    (accuracy, seconds), (baseline_accuracy, baseline_seconds) = overall(ours), overall(theirs)
    both = {"accuracy": accuracy, "baseline_accuracy": baseline_accuracy}
    both |= {"seconds": seconds, "baseline_seconds": baseline_seconds}
    above = round(100 * (accuracy - baseline_accuracy), 4)
    faster = compare(race, ours, theirs, SPEED, target=10, **about)
    faster |= both | {"note": f"{seconds:.0f} s against {baseline_seconds:.0f} s"}
    about |= both | {"ratio": above, "met": above <= 0.3}
    return [faster, row_of(f"{ours}: accuracy", theirs, POINTS, 0.3, **about)]


def _after_autoattack(on: Subject) -> float:
    """The accuracy that AutoAttack leaves."""
    try:
        right = autoattack(on.model, on.x, on.y, norm="Linf", delta=DELTA, batch_size=BATCH)
    except ImportError as error:
        raise UnavailableError(f"pyautoattack is not installed ({one_line(error)})") from error
    return right.double().mean().item()


def streamed(points: Sequence[int], device: torch.device) -> list[list[int]]:
    """Pairs of a number of images and bytes; none where the process failed."""
    words = ["--images", *map(str, points), "--device", str(device)]
    script = [sys.executable, __file__, *words]
    done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8", env=environment_without())
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return [] if done.returncode else json.loads(done.stdout)


def stream(images: int, device: torch.device, model: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Made images in one and the same memory; the labels are the network's own answers, so that all are attacked."""
    x = torch.empty(AT_ONCE, 3, 32, 32, device=device)
    for done in range(0, images, AT_ONCE):
        batch = x[: images - done].uniform_()
        with torch.no_grad():
            yield batch, model(batch).argmax(1)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, *_ = subject(given.device, 1)
    find = partial(boundary, model.eval(), steps=2, keep=False, batch_size=AT_ONCE)
    find(stream(4 * AT_ONCE, given.device, model))  # what the libraries take once
    before, found = peak(given.device), []
    for images in sorted(given.images):  # a peak never falls
        assert len(find(stream(images, given.device, model)).distance) == images
        found.append([images, peak(given.device) - before])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
