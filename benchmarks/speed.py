"""Speed and memory of the attack and of Algorithm 1, as ratios to baselines that are timed in the same run; one record.

python make.py benchmark    all of it, with the peers in an environment of their own
python benchmarks/speed.py [--device auto] [--rounds 5] [--peers PYTHON] [--groups attack ...] [--out runs] [--quick]

After a warm-up, all contestants of a group run in turn, round after round; a row gives the median of the rounds' ratios
and their spread. It needs PyTorch and numpy; what else is missing here gives rows without a value that say why.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks import card, peers
from benchmarks.baselines import (
    DELTA,
    STEPS,
    UnavailableError,
    attacked,
    demo,
    every_pass,
    no_image_skipped,
    passes_of,
    published_way,
    replay,
    wide,
)
from benchmarks.precision import WAYS
from benchmarks.races import EXTENT, SPEED, TIME, Contestant, Lap, Race, Row, compare, contest, row_of, timed
from companion import files
from companion.machine import pick_device
from companion.performance import missing, verdict
from companion.records import SCHEMA, core_digest, device_name, versions, write_record
from companion.settings import ParameterError
from wdat_core import FinetuneConfig, Threat, finetune

OTHER_WAYS = [way for way in WAYS if way != "float32"]


@dataclass(frozen=True)
class Plan:
    """Where, how often and on what everything is timed; the sizes are those for a CPU."""

    device: torch.device
    rounds: int
    peers: str  # a Python that has the peers
    images: int = 512
    batch_size: int = 128  # the best for the device
    train_images: int = 2048
    train_batch: int = 512
    larger: tuple[str, ...] = ("WRN-16-2",)
    larger_images: int = 64
    by_images: tuple[int, ...] = (250, 500, 1000)
    by_steps: tuple[int, ...] = (5, 10, 20, 40)
    by_epochs: tuple[int, ...] = (1, 2, 3)
    memory_images: tuple[int, ...] = (5000, 10_000, 20_000)  # 60 MB and more: less would stay in malloc's heap
    compiled: bool = True


ON_A_GPU = {"images": 1000, "batch_size": 512, "larger": ("WRN-28-10", "WRN-34-10"), "larger_images": 512}
QUICK = {
    "images": 16, "batch_size": 8, "train_images": 16, "train_batch": 8, "larger": ("WRN-10-1",), "larger_images": 2,
    "by_images": (4, 8), "by_steps": (1, 2), "by_epochs": (1, 2), "memory_images": (500, 1000), "compiled": False,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Groups: each returns its part of the record
# ---------------------------------------------------------------------------------------------------------------------


def attack(plan: Plan) -> dict[str, Any]:
    """The attack on the demo network against bare passes, the published way, other libraries, and other precisions."""
    subject, batch, device = demo(plan.images, plan.device), plan.batch_size, plan.device
    n = len(subject.x)
    versions: dict[str, str] = {}

    def ours(**options: Any) -> Contestant:
        return timed(partial(attacked, subject, batch, **options), device)

    def peer(ask: Callable[[str], dict[str, Any]], name: str) -> Contestant:
        def lap() -> Lap:
            found = ask(name)
            versions[name] = found["version"]
            return Lap(found["seconds"] * STEPS * n / found["gradients"], found["accuracy"])

        return lap

    redlr = "W_2 attack, ReDLR"
    own = passes_of(
        subject.model, lambda model: attacked(dataclasses.replace(subject, model=model), batch, loss="redlr")
    )
    with peers.worker(plan.peers, subject, batch) as elsewhere:
        contestants = {
            "bare passes": timed(partial(replay, subject, every_pass(n, batch)), device),
            "W_2 attack, CE": ours(),
            "W_inf attack, CE": ours(p=math.inf),
            redlr: ours(loss="redlr"),
            "the passes it makes, bare": timed(partial(replay, subject, own), device),
            "published way, batches of 32": timed(lambda: published_way(subject)[0], device),
            "foolbox LinfPGD": peer(elsewhere, "foolbox"),
            "torchattacks PGD": peer(elsewhere, "torchattacks"),
            "pyautoattack APGD-CE": peer(lambda name: peers.run(name, subject, batch), "pyautoattack"),
            **{f"{redlr}, {way}": unless_quick(plan, way, ours(loss="redlr", **WAYS[way])) for way in OTHER_WAYS},
        }
        done = contest(contestants, plan.rounds)
    compared = partial(compare, done, network=subject.name, images=n, batch_size=batch)
    overhead = partial(compared, unit=TIME, target=1.05, group="Attack: overhead", precision="float32")
    speed = partial(compared, unit=SPEED, group="Attack: speed", precision="float32")
    published = speed(redlr, "published way, batches of 32")
    apart = abs(published["accuracy"] - published["baseline_accuracy"]) * n
    if apart > 2.5:
        published |= {
            **dict.fromkeys(("ratio", "low", "high")),
            "reason": f"{apart:.0f} images apart: not the same attack",
        }
    robust = f"the target is for about 50 % robust accuracy, and this is {100 * published['accuracy']:.0f} %"
    rows = [
        overhead("W_2 attack, CE", "bare passes"),
        overhead("W_inf attack, CE", "bare passes"),
        overhead(redlr, "the passes it makes, bare"),
        speed(redlr, "bare passes", target=1.4, note=robust),
        published,
        speed("W_inf attack, CE", "foolbox LinfPGD"),
        speed("W_inf attack, CE", "torchattacks PGD"),
        speed("W_inf attack, CE", "pyautoattack APGD-CE", note="for as many gradients; it skips what was wrong before"),
    ]
    return {"rows": rows + in_other_ways(done, redlr, compared), "versions": versions}


def larger(plan: Plan) -> dict[str, Any]:
    """The attack on wider networks, where it can skip nothing, against bare passes."""
    rows = []
    for name in plan.larger:
        subject = wide(name, plan.larger_images, plan.device)
        n, batch = len(subject.x), min(plan.batch_size, plan.larger_images)
        everything = every_pass(n, batch)
        done = contest(
            {
                "bare passes": timed(partial(replay, subject, everything), plan.device),
                "W_2 attack, CE": timed(partial(attacked, subject, batch), plan.device),
            },
            plan.rounds,
        )
        about = {"network": subject.name, "images": n, "batch_size": batch, "precision": "float32"}
        rows.append(
            compare(done, "W_2 attack, CE", "bare passes", TIME, target=1.05, group="Attack: overhead", **about)
        )
    return {"rows": rows}


def training(plan: Plan) -> dict[str, Any]:
    """One iteration of Algorithm 1 on the demo network against its bare passes, and in other ways."""
    subject, device = demo(plan.train_images, plan.device, "train"), plan.device
    iterations = math.ceil(len(subject.x) / plan.train_batch)
    config = FinetuneConfig(threat=Threat(delta=DELTA), steps=STEPS, epochs=1, batch_size=plan.train_batch)

    def fresh() -> nn.Module:
        return copy.deepcopy(subject.model)

    def train(model: nn.Module, **changes: Any) -> None:
        changed = dataclasses.replace(config, **changes)
        finetune(model, (subject.x, subject.y), None, changed, eval_batch_size=plan.batch_size)

    def epoch(**changes: Any) -> Contestant:
        return timed(lambda: train(fresh(), **changes), device)

    def looking_at_all() -> None:
        with no_image_skipped():
            train(fresh())

    own = passes_of(fresh(), train)
    name = "iteration of Algorithm 1"
    contestants = {
        name: epoch(),
        "the passes it makes, bare": timed(lambda: replay(dataclasses.replace(subject, model=fresh()), own), device),
        f"{name}, no image skipped": timed(looking_at_all, device),
        f"{name}, Upsilon from the batches": epoch(upsilon_from="batch"),
        **{f"{name}, {way}": unless_quick(plan, way, epoch(**WAYS[way])) for way in OTHER_WAYS},
    }
    done = contest(contestants, plan.rounds)
    compared = partial(compare, done, network=subject.name, images=len(subject.x), batch_size=plan.train_batch)
    own_rows = partial(compared, group="Algorithm 1", precision="float32")
    each = f"{done.seconds(name) / iterations:.2g} s an iteration"
    rows = [
        own_rows(name, "the passes it makes, bare", TIME, target=1.05, note=each),
        own_rows(name, f"{name}, no image skipped", SPEED),
        own_rows(f"{name}, Upsilon from the batches", name, SPEED),
    ]
    return {"rows": rows + in_other_ways(done, name, compared)}


def unless_quick(plan: Plan, way: str, contestant: Contestant) -> Contestant:
    """A contestant that a quick run leaves out where it would have to be compiled."""

    def left_out() -> Lap:
        raise UnavailableError("left out of a quick run")

    return contestant if plan.compiled or "compiled" not in way else left_out


def in_other_ways(done: Race, name: str, compared: Callable[..., Row]) -> list[Row]:
    """The rows of a contestant in other precisions, or compiled, against the same in float32."""
    rows = []
    for way in OTHER_WAYS:
        other = f"{name}, {way}"
        note = None
        if "compiled" in way and other in done.laps:
            note = f"compiled in {max(0, done.warm_up[other] - done.seconds(other)):.0f} s, outside the timing"
        rows.append(compared(other, name, SPEED, group="Precision and compilation", precision=way, note=note))
    return rows


def memory(plan: Plan) -> dict[str, Any]:
    """Peak memory of the attack and of fine-tuning as multiples of the images in float32, along three axes."""
    axes = {"epochs": plan.by_epochs, "steps": plan.by_steps, "images": plan.memory_images}
    words = [word for axis, points in axes.items() for word in (f"--{axis}", *map(str, points))]
    script = [sys.executable, str(Path(__file__).with_name("memory.py")), *words, "--device", str(plan.device)]
    done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8")
    found = {} if done.returncode else json.loads(done.stdout)
    ratios = [found["images"][-1][1]] if found else []
    reason = None if found else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if found and ratios[0] < 1:  # the images are counted, after all
        found, ratios, reason = {}, [], "too few images to be seen beside what the libraries take"
    about = {"network": "a linear one", "images": plan.memory_images[-1], "batch_size": 64, "precision": "float32"}
    about |= {"group": "Peak memory", "reason": reason}
    row = row_of("W_2 attack, CE, with its images", "its images", EXTENT, ratios, 3.2, **about)
    return {"rows": [row], "memory": found}


def growth(plan: Plan) -> dict[str, Any]:
    """Seconds of the attack by images and by steps, of fine-tuning by epochs."""
    subject, batch = demo(max(plan.by_images), plan.device), plan.batch_size
    few = subject.first(min(plan.by_images))

    def train(epochs: int) -> None:
        config = FinetuneConfig(threat=Threat(delta=DELTA), steps=STEPS, epochs=epochs, batch_size=batch)
        finetune(copy.deepcopy(few.model), (few.x, few.y), None, config, eval_batch_size=batch)

    axes: dict[str, dict[int, Callable[[], Any]]] = {
        "images": {n: partial(attacked, subject.first(n), batch) for n in plan.by_images},
        "steps": {k: partial(attacked, few, batch, steps=k) for k in plan.by_steps},
        "epochs": {k: partial(train, k) for k in plan.by_epochs},
    }
    found = {}
    for axis, works in axes.items():
        done = contest({str(point): timed(work, plan.device) for point, work in works.items()}, min(plan.rounds, 3))
        found[axis] = [[point, round(done.seconds(str(point)), 4)] for point in works]
    return {"growth": found}


def throughput(plan: Plan) -> dict[str, Any]:
    """What only a GPU can show."""
    return card.throughput(plan.device, plan.rounds)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

GROUPS = {group.__name__: group for group in (attack, larger, training, memory, growth, throughput)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that everything runs")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has foolbox and torchattacks")
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        device = pick_device(given.device)
        sizes: dict[str, Any] = QUICK if given.quick else ON_A_GPU if device.type == "cuda" else {}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what was compiled before this run does not count
            record = run(Plan(device, given.rounds, given.peers, **sizes), given.groups)
        config = {name: getattr(given, name) for name in ("rounds", "groups", "quick")}
        own = {"config": config, "command": command(given, parser.parse_args([]))}
        print("record:", write_record(record | own, given.out))
    except (ParameterError, UnavailableError) as error:
        sys.exit(f"speed.py: {error}")


def run(plan: Plan, groups: Sequence[str]) -> dict[str, Any]:
    """The groups one after the other, each shown when it is done; the record of them all."""
    begin = time.perf_counter()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "benchmark",
        "device": device_name(plan.device),
        "versions": versions(),
        "core": core_digest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [],
        **{key: {} for key in ("memory", "growth", "throughput")},
    }
    for name in groups:
        part = GROUPS[name](plan)
        rows = part.pop("rows", [])
        record["rows"] += rows
        for key, found in part.items():
            record[key] |= found
        print(f"--- {name}, {time.perf_counter() - begin:.0f} s", *lines(rows), sep="\n", flush=True)
    return record | {"seconds": {"total": round(time.perf_counter() - begin, 1)}}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as the terminal shows them, then those without a value, by reason."""
    for row in rows:
        if row["ratio"] is None:
            continue
        spread = f" [{row['low']:.3g} to {row['high']:.3g}]" if row["rounds"] > 1 else ""
        target = f"; {row['target']}: {verdict(row)}" if row["target"] else ""
        what = f"{row['name']} ({row['network']}) against {row['baseline']}"
        yield f"{row['ratio']:5.3g}  {what}: {row['unit']}{spread}{target}"
    for reason, names in missing(rows).items():
        yield f"    -  {'; '.join(names)}: {reason}"


def command(given: argparse.Namespace, usual: argparse.Namespace) -> str:
    """What runs this again; where the peers are, and where records go, is the machine's own matter."""
    words = []
    for name in ("device", "rounds"):
        if getattr(given, name) != getattr(usual, name):
            words += [f"--{name}", str(getattr(given, name))]
    words += ["--groups", *given.groups] if given.groups != usual.groups else []
    words += ["--quick"] if given.quick else []
    return shlex.join(["python", "benchmarks/speed.py", *words] if words else ["python", "make.py", "benchmark"])


if __name__ == "__main__":
    main(sys.argv[1:])
