"""Speed and memory of the attack and of Algorithm 1, as ratios to baselines that are timed in the same run; one record.

python make.py benchmark    all of it, with the peers in an environment of their own
python benchmarks/speed.py [--device auto] [--rounds 40] [--peers PYTHON] [--groups attack ...] [--out runs] [--quick]

How it is timed is in races.py: short laps of all contestants in random order, and a 95 % interval of each ratio.
It needs PyTorch and numpy; what else is missing here gives rows without a value that say why.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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

from benchmarks import card, malloc, peers, rest
from benchmarks import worst as worst_case
from benchmarks.baselines import (
    DELTA,
    STEPS,
    Subject,
    UnavailableError,
    attacked,
    demo,
    every_pass,
    passes_of,
    published_way,
    replay,
    wide,
)
from benchmarks.precision import WAYS
from benchmarks.races import (
    EXTENT,
    LEAST,
    ROUGH,
    SPEED,
    TIME,
    Contestant,
    Lap,
    Row,
    compare,
    contest,
    row_of,
    timed,
)
from companion import files
from companion.architectures import STAND_INS
from companion.bases import SCHEMA
from companion.machine import made_on, pick_device
from companion.performance import missing, verdict
from companion.records import write_record
from companion.settings import ParameterError
from wdat_core import FinetuneConfig, Threat, finetune

OTHER_WAYS = [way for way in WAYS if way != "float32"]


@dataclass(frozen=True)
class Plan:
    """Where, how often and on what everything is timed; the sizes are those for a CPU, where a lap takes about 1 s."""

    device: torch.device
    rounds: int  # at most
    peers: str  # a Python that has the peers
    steps: int = STEPS  # of our attacks
    images: int = 128
    batch_size: int = 64
    train_images: int = 128
    train_batch: int = 64
    larger: tuple[str, ...] = ("WRN-16-2",)
    larger_images: int = 16
    by_images: tuple[int, ...] = (64, 128, 256)
    by_steps: tuple[int, ...] = (5, 10, 20, 40)
    by_epochs: tuple[int, ...] = (1, 2, 3)
    memory_images: tuple[int, ...] = (5000, 10_000, 20_000)  # 60 MB and more: less would stay in malloc's heap
    ways: tuple[str, ...] = tuple(OTHER_WAYS)
    worst_images: int = 1000  # all the embedded test images
    worst_steps: tuple[int, ...] = (20, 40, 100)
    parts: int = 10  # of these images, for AutoAttack; with 0 it is left out
    stream: tuple[int, ...] = (50_000, 100_000, 200_000)


ON_A_GPU = {
    "images": 1000, "batch_size": 512, "train_images": 2048, "train_batch": 512,
    "larger": ("WRN-28-10", "WRN-34-10"), "larger_images": 512, "by_images": (250, 500, 1000),
}  # fmt: skip
QUICK = {
    "steps": 2, "images": 4, "batch_size": 2, "train_images": 4, "train_batch": 2, "larger": ("WRN-10-1",),
    "larger_images": 2, "by_images": (2, 4), "by_steps": (1, 2), "by_epochs": (1, 2), "memory_images": (500, 1000),
    "ways": (), "worst_images": 4, "worst_steps": (2, 3), "parts": 0, "stream": (1000, 2000),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Groups: each returns its part of the record
# ---------------------------------------------------------------------------------------------------------------------

REDLR = "W_2 attack, ReDLR"
W_2, W_INF = "W_2 attack, CE", "W_inf attack, CE"  # with CE no image is skipped
BARE, SAME = "bare passes", "the passes it makes, bare"
PUBLISHED = "published way, batches of 32"
ITERATION = "iteration of Algorithm 1"
WORST = "worst case, 40 steps"


def attack(plan: Plan) -> dict[str, Any]:
    """The attack on the demo network against bare passes."""
    subject, batch, device = demo(plan.images, plan.device), plan.batch_size, plan.device
    ours = partial(attacked, batch_size=batch, steps=plan.steps)
    own = passes_of(subject.model, lambda model: ours(dataclasses.replace(subject, model=model), loss="redlr"))
    contestants = {
        BARE: timed(partial(replay, subject, every_pass(len(subject.x), batch, plan.steps)), device),
        W_2: timed(partial(ours, subject), device),
        W_INF: timed(partial(ours, subject, p=math.inf), device),
        REDLR: timed(partial(ours, subject, loss="redlr"), device),
        SAME: timed(partial(replay, subject, own), device),
    }
    pairs = [(W_2, BARE), (W_INF, BARE), (REDLR, SAME)]
    done = contest(contestants, pairs, device, rounds=plan.rounds)
    about: dict[str, Any] = {
        "network": subject.name,
        "images": len(subject.x),
        "batch_size": batch,
        "precision": "float32",
    }
    rows = [compare(done, *pair, TIME, target=1.05, group="Attack: overhead", **about) for pair in pairs]
    saved = compare(done, REDLR, BARE, SPEED, target=1.4, group="Attack: speed", **about)
    robust = f"the target is for about 50 % robust accuracy, and this is {100 * saved['accuracy']:.0f} %"
    beyond = {}
    if device.type == "cpu":  # on a GPU the time is that of kernels
        bare = partial(replay, subject, every_pass(len(subject.x), batch, plan.steps))
        beyond = {f"{W_2} on {subject.name}": rest.where(partial(ours, subject), bare, min(plan.rounds, LEAST))}
    return {"rows": [*rows, saved | {"note": robust}], "rest": beyond}


def larger(plan: Plan) -> dict[str, Any]:
    """The attack on wider networks, where it can skip nothing, against bare passes."""
    rows = []
    for name in plan.larger:
        subject = wide(name, plan.larger_images, plan.device)
        n, batch = len(subject.x), min(plan.batch_size, plan.larger_images)
        contestants = {
            BARE: timed(partial(replay, subject, every_pass(n, batch, plan.steps)), plan.device),
            W_2: timed(partial(attacked, subject, batch, steps=plan.steps), plan.device),
        }
        done = contest(contestants, [(W_2, BARE)], plan.device, rounds=plan.rounds)
        about: dict[str, Any] = {"network": subject.name, "images": n, "batch_size": batch, "precision": "float32"}
        rows.append(compare(done, W_2, BARE, TIME, target=1.05, group="Attack: overhead", **about))
    return {"rows": rows}


def training(plan: Plan) -> dict[str, Any]:
    """Iterations of Algorithm 1 on the demo network against their bare passes."""
    subject, device, train = demo(plan.train_images, plan.device, "train"), plan.device, _algorithm_1(plan)
    own = passes_of(copy.deepcopy(subject.model), lambda model: train(dataclasses.replace(subject, model=model)))
    contestants = {
        ITERATION: timed(lambda: train(_fresh(subject)), device),
        SAME: timed(lambda: replay(_fresh(subject), own), device),
    }
    done = contest(contestants, [(ITERATION, SAME)], device, rounds=plan.rounds)
    about: dict[str, Any] = {
        "network": subject.name,
        "images": len(subject.x),
        "batch_size": plan.train_batch,
        "precision": "float32",
    }
    row = compare(done, ITERATION, SAME, TIME, target=1.05, group="Algorithm 1", **about)
    iterations = math.ceil(len(subject.x) / plan.train_batch)
    return {"rows": [row | {"note": f"{done.seconds(ITERATION) / iterations:.2g} s an iteration"}]}


def others(plan: Plan) -> dict[str, Any]:
    """The attack on the demo network against the published way and other libraries."""
    subject, batch, device = demo(plan.images, plan.device), plan.batch_size, plan.device
    n, ours = len(subject.x), partial(attacked, batch_size=batch, steps=plan.steps)
    versions: dict[str, str] = {}

    def peer(ask: Callable[[str], dict[str, Any]], name: str) -> Contestant:
        def lap() -> Lap:
            found = ask(name)
            versions[name] = found["version"]
            for_as_many = plan.steps * n / found["gradients"]
            return Lap(found["wall"] * for_as_many, found["cpu"] * for_as_many, found["accuracy"])

        return lap

    peer_attacks = {"foolbox": "foolbox LinfPGD", "torchattacks": "torchattacks PGD"}
    own_peer = "pyautoattack APGD-CE"
    pairs = [(REDLR, PUBLISHED), *((W_INF, title) for title in (*peer_attacks.values(), own_peer))]
    with peers.worker(plan.peers, subject, batch) as elsewhere:
        contestants = {
            REDLR: timed(partial(ours, subject, loss="redlr"), device),
            W_INF: timed(partial(ours, subject, p=math.inf), device),
            PUBLISHED: timed(lambda: published_way(subject, steps=plan.steps)[0], device),
            **{title: peer(elsewhere, name) for name, title in peer_attacks.items()},
            own_peer: peer(lambda name: peers.run(name, subject, batch), "pyautoattack"),
        }
        done = contest(contestants, pairs, device, within=ROUGH, rounds=plan.rounds)
    about: dict[str, Any] = {"network": subject.name, "images": n, "batch_size": batch, "precision": "float32"}
    rows = [compare(done, *pair, SPEED, group="Attack: speed", **about) for pair in pairs]
    apart = abs(rows[0]["accuracy"] - rows[0]["baseline_accuracy"]) * n
    if apart > 2.5:
        reason = f"{apart:.0f} images apart: not the same attack"
        rows[0] = row_of(REDLR, PUBLISHED, SPEED, None, reason=reason, group="Attack: speed", **about)
    rows[-1] |= {"note": "for as many gradients; it skips what was wrong before"}
    return {"rows": rows, "versions": versions}


def ways(plan: Plan) -> dict[str, Any]:
    """The attack and Algorithm 1 in other precisions and compiled; Algorithm 1 also with CE, and another estimate."""
    subject, batch, device = demo(plan.images, plan.device), plan.batch_size, plan.device
    trained, train = demo(plan.train_images, device, "train"), _algorithm_1(plan)

    def ours(**options: Any) -> Contestant:
        return timed(partial(attacked, subject, batch, loss="redlr", steps=plan.steps, **options), device)

    def iteration(**changes: Any) -> Contestant:
        return timed(lambda: train(_fresh(trained), **changes), device)

    looking = f"{ITERATION}, CE: no image skipped"
    batches = f"{ITERATION}, Upsilon from the batches"
    contestants = {
        REDLR: ours(),
        **{f"{REDLR}, {way}": unless_quick(plan, way, ours(**WAYS[way])) for way in OTHER_WAYS},
        ITERATION: iteration(),
        looking: iteration(loss="ce"),
        batches: iteration(upsilon_from="batch"),
        **{f"{ITERATION}, {way}": unless_quick(plan, way, iteration(**WAYS[way])) for way in OTHER_WAYS},
    }
    in_other_ways = [(f"{name}, {way}", name) for name in (REDLR, ITERATION) for way in OTHER_WAYS]
    pairs = [(ITERATION, looking), (batches, ITERATION), *in_other_ways]
    done = contest(contestants, pairs, device, within=ROUGH, rounds=plan.rounds)
    about: dict[str, Any] = {
        "network": trained.name,
        "images": len(trained.x),
        "batch_size": plan.train_batch,
        "precision": "float32",
    }
    rows = [compare(done, *pair, SPEED, group="Algorithm 1", **about) for pair in pairs[:2]]
    for name, baseline in in_other_ways:
        way, note = name.removeprefix(f"{baseline}, "), None
        if "compiled" in way and name in done.laps:
            first = max(0, done.warm_up[name] - done.seconds(name, "wall"))
            note = f"compiled in {first:.0f} s, outside the timing"
        if baseline == REDLR:
            about |= {"network": subject.name, "images": len(subject.x), "batch_size": batch}
        else:
            about |= {"network": trained.name, "images": len(trained.x), "batch_size": plan.train_batch}
        about |= {"precision": way, "note": note, "group": "Precision and compilation"}
        rows.append(compare(done, name, baseline, SPEED, **about))
    return {"rows": rows}


def _algorithm_1(plan: Plan) -> Callable[..., None]:
    """One epoch on a subject, in place; the changes are those of the configuration."""
    config = FinetuneConfig(threat=Threat(delta=DELTA), steps=plan.steps, epochs=1, batch_size=plan.train_batch)

    def train(subject: Subject, **changes: Any) -> None:
        changed = dataclasses.replace(config, **changes)
        finetune(subject.model, (subject.x, subject.y), None, changed, eval_batch_size=plan.batch_size)

    return train


def _fresh(subject: Subject) -> Subject:
    """With a network of its own, for training changes it."""
    return dataclasses.replace(subject, model=copy.deepcopy(subject.model))


def unless_quick(plan: Plan, way: str, contestant: Contestant) -> Contestant:
    """A contestant that a quick run leaves out: compiling takes minutes, and bfloat16 some processors emulate."""

    def left_out() -> Lap:
        raise UnavailableError("left out of a quick run")

    return contestant if way in plan.ways else left_out


def memory(plan: Plan) -> dict[str, Any]:
    """Peak memory of the attack and of fine-tuning as multiples of the images in float32, along three axes."""
    axes = {"epochs": plan.by_epochs, "steps": plan.by_steps, "images": plan.memory_images}
    words = [word for axis, points in axes.items() for word in (f"--{axis}", *map(str, points))]
    script = [sys.executable, str(Path(__file__).with_name("memory.py")), *words, "--device", str(plan.device)]
    environment = malloc.environment_without()
    done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8", env=environment)
    found = {} if done.returncode else json.loads(done.stdout)
    ratios = [found["images"][-1][1]] if found else []
    reason = None if found else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if found and ratios[0] < 1:  # the images are counted, after all
        found, ratios, reason = {}, [], "too few images to be seen beside what the libraries take"
    about: dict[str, Any] = {
        "network": "a linear one",
        "images": plan.memory_images[-1],
        "batch_size": 64,
        "precision": "float32",
    }
    about |= {"group": "Peak memory", "reason": reason}
    if ratios:
        about |= {"ratio": ratios[0], "met": ratios[0] <= 3.2}
    return {"rows": [row_of(f"{W_2}, with its images", "its images", EXTENT, 3.2, **about)], "memory": found}


def growth(plan: Plan) -> dict[str, Any]:
    """Seconds of the attack by images and by steps, of fine-tuning by epochs."""
    subject, batch = demo(max(plan.by_images), plan.device), plan.batch_size
    few = subject.first(min(plan.by_images))

    def train(epochs: int) -> None:
        config = FinetuneConfig(threat=Threat(delta=DELTA), steps=plan.steps, epochs=epochs, batch_size=batch)
        finetune(copy.deepcopy(few.model), (few.x, few.y), None, config, eval_batch_size=batch)

    axes: dict[str, dict[int, Callable[[], Any]]] = {
        "images": {n: partial(attacked, subject.first(n), batch, steps=plan.steps) for n in plan.by_images},
        "steps": {k: partial(attacked, few, batch, steps=k) for k in plan.by_steps},
        "epochs": {k: partial(train, k) for k in plan.by_epochs},
    }
    found = {}
    for axis, works in axes.items():
        contestants = {str(point): timed(work, plan.device) for point, work in works.items()}
        done = contest(contestants, [], plan.device, rounds=min(plan.rounds, 3))
        found[axis] = [[point, round(done.seconds(str(point)), 4)] for point in works]
    return {"growth": found}


def worst(plan: Plan) -> dict[str, Any]:
    """The worst case over the ball: its overhead, its strength beside its peers and AutoAttack, what a stream holds."""
    subject, batch, device = demo(plan.images, plan.device), plan.batch_size, plan.device
    find = partial(worst_case.bounded, batch_size=batch, steps=40)
    own = passes_of(subject.model, lambda model: find(dataclasses.replace(subject, model=model)))
    contestants = {WORST: timed(partial(find, subject), device), SAME: timed(partial(replay, subject, own), device)}
    done = contest(contestants, [(WORST, SAME)], device, rounds=plan.rounds)
    about: dict[str, Any] = {"network": subject.name, "images": len(subject.x), "batch_size": batch}
    about |= {"precision": "float32", "group": "Worst case: overhead"}
    row = compare(done, WORST, SAME, TIME, target=1.05, **about)
    strength, versions = worst_case.strength(plan.worst_images, batch, plan.worst_steps, device, plan.peers)
    rows = [row]
    for network in STAND_INS:
        rows += worst_case.beside_autoattack(demo(plan.worst_images, device, network=network), plan.parts)
    found = {"strength": strength, "stream": worst_case.streamed(plan.stream, device)}
    return {"rows": rows, "worst": found, "versions": versions}


def throughput(plan: Plan) -> dict[str, Any]:
    """What only a GPU can show."""
    return card.throughput(plan.device, plan.rounds)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

GROUPS = {
    group.__name__: group for group in (attack, larger, training, worst, others, ways, memory, growth, throughput)
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=40, help=f"at most; at least {LEAST}, which an interval needs")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that everything runs")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has foolbox and torchattacks")
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    if given.rounds < LEAST:
        parser.error(f"--rounds must be at least {LEAST}: with fewer there is no interval")
    try:
        torch.set_num_threads(1)  # two threads wait for each other in the processor's time
        device = pick_device(given.device)
        sizes: dict[str, Any] = QUICK if given.quick else ON_A_GPU if device.type == "cuda" else {}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what was compiled before this run does not count
            plan = Plan(device, given.rounds, given.peers, **sizes)
            record = run(plan, given.groups, command(given, parser.parse_args([])))
        config = {name: getattr(given, name) for name in ("rounds", "groups", "quick")} | {"malloc": malloc.words()}
        print("record:", write_record(record | {"config": config}, given.out))
    except (ParameterError, UnavailableError) as error:
        sys.exit(f"speed.py: {error}")


def run(plan: Plan, groups: Sequence[str], command: str) -> dict[str, Any]:
    """The groups one after the other, each shown when it is done; the record of them all."""
    begin, before = time.perf_counter(), os.times()
    record: dict[str, Any] = {"schema": SCHEMA, "kind": "benchmark", **made_on(plan.device, command)}
    record |= {"rows": [], "memory": {}, "growth": {}, "throughput": {}, "worst": {}, "rest": {}}
    for name in groups:
        part = GROUPS[name](plan)
        rows = part.pop("rows", [])
        record["rows"] += rows
        for key, found in part.items():
            record[key] |= found
        print(f"--- {name}, {time.perf_counter() - begin:.0f} s", *lines(rows), sep="\n", flush=True)
    after = os.times()
    seconds = {name: round(getattr(after, name) - getattr(before, name), 1) for name in ("user", "system")}
    return record | {"seconds": {"total": round(time.perf_counter() - begin, 1), **seconds}}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as the terminal shows them, then those without a value, by reason."""
    for row in rows:
        if row["ratio"] is None:
            continue
        spread = f" [{row['low']:.3g}, {row['high']:.3g}], {row['rounds']} rounds" if row["rounds"] else ""
        target = f"; {row['target']}: {verdict(row)}" if row["target"] else ""
        what = f"{row['name']} ({row['network']}) against {row['baseline']}"
        yield f"{row['ratio']:5.3f}  {what}: {row['unit']}{spread}{target}"
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
    malloc.start_again_with_it()
    main(sys.argv[1:])
