"""Many processes, and sets larger than memory: one record.

python benchmarks/scale.py [--rounds 40] [--images 1000000] [--distances 1000000000] [--folder FOLDER] [--out runs]

First, each in a process of its own, W-PGD on made images in a file (mapped.py) and A_p of made distances in a file
(histogram.py); then a stream of as many images through `boundary` (worst.py).

Last, weak scaling: two processes with as many images each as one has, that share them as a group, against that one; and
against two that work side by side and share nothing, which is what the machine itself costs. Laps come in random order,
see races.py, and the wall clock counts. What of a lap the processes spend in messages to each other, and in waiting for
them, is measured beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import worst
from benchmarks.baselines import DELTA, demo
from benchmarks.races import LEAST, TIME, Contestant, Lap, compare, contest
from companion import files
from companion.bases import SCHEMA
from companion.machine import core_digest, made_on
from companion.records import write_record
from companion.scale import ALONE, APART, ATTACK, TOGETHER, TRAINING
from wdat_core import FinetuneConfig, Threat, finetune, wpgd

WORKS = {"attack": ATTACK, "training": TRAINING}
BATCH = 64


class Told(NamedTuple):
    """What a worker says of a lap."""

    talked: float  # seconds in messages
    messages: int
    sent: int  # bytes, what this process gave


# ---------------------------------------------------------------------------------------------------------------------
# What a process does
# ---------------------------------------------------------------------------------------------------------------------


def work(name: str, images: int, epochs: int, share: int, group: Any) -> Callable[[], Any]:
    """A lap: an attack on so many images, or epochs of Algorithm 1 in minibatches of BATCH images a process."""
    on = demo(images, torch.device("cpu"), "test" if name == "attack" else "train")
    if name == "attack":
        how: dict[str, Any] = {"loss": "redlr", "batch_size": BATCH, "group": group}
        return lambda: wpgd(on.model, on.x, on.y, Threat(delta=DELTA), **how)
    x, y = torch.cat([on.x] * share), torch.cat([on.y] * share)
    config = FinetuneConfig(threat=Threat(delta=DELTA), epochs=epochs, batch_size=BATCH * share)
    model = functools.partial(copy.deepcopy, on.model)
    return lambda: finetune(model(), (x, y), None, config, eval_batch_size=BATCH, group=group)


def worker(rank: int, folder: str, pipe: Any, images: int, epochs: int) -> None:
    """Does what it is told until it is told None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=2)
    every: Any = dist.group.WORLD
    ready = {
        (name, how): work(name, images, epochs, *((2, every) if how == TOGETHER else (1, None)))
        for name in WORKS
        for how in (APART, TOGETHER)
    }
    while asked := pipe.recv():
        with heard() as told:
            ready[asked]()
        pipe.send(told())
    dist.destroy_process_group()


@contextmanager
def heard() -> Any:
    """How long, how often and how much the process talks to the other one meanwhile."""
    names = ("all_reduce", "all_gather", "all_gather_object")
    before, seconds, sent = {name: getattr(dist, name) for name in names}, [], []

    def listening(name: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = before[name](*given, **options)
            seconds.append(time.perf_counter() - begin)
            own = given[0] if name == "all_reduce" else given[1]
            sent.append(own.nbytes if isinstance(own, torch.Tensor) else 0)
            return result

        return call

    for name in names:
        setattr(dist, name, listening(name))
    try:
        yield lambda: Told(sum(seconds), len(seconds), sum(sent))
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and figures
# ---------------------------------------------------------------------------------------------------------------------


def scaling(images: int, epochs: int, rounds: int) -> list[dict[str, Any]]:
    """Rows: the time of two processes over that of one, and over that of two that share nothing."""
    context, rows = mp.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(2)]
        given = [(rank, folder, pipes[rank][1], images, epochs) for rank in range(2)]
        there = [context.Process(target=worker, args=arguments) for arguments in given]
        for process, (_, its) in zip(there, pipes, strict=True):
            process.start()
            its.close()  # else nobody would see that the process is gone
        ends = [end for end, _ in pipes]

        def lap(name: str, how: str, told: list[list[Told]]) -> Lap:
            those = ends[:1] if how == ALONE else ends
            begin = time.perf_counter()
            for end in those:
                end.send((name, APART if how == ALONE else how))
            said = [end.recv() for end in those]
            wall = time.perf_counter() - begin
            told.append(said)
            return Lap(wall, wall)  # waiting counts

        for name, title in WORKS.items():
            said: dict[str, list[list[Told]]] = {how: [] for how in (ALONE, APART, TOGETHER)}
            laps: dict[str, Contestant] = {how: functools.partial(lap, name, how, said[how]) for how in said}
            pairs = [(TOGETHER, ALONE), (TOGETHER, APART)]
            done = contest(laps, pairs, torch.device("cpu"), rounds=rounds)
            about: dict[str, Any] = {
                "network": "demo",
                "images": images,
                "batch_size": BATCH,
                "precision": "float32",
                "group": title,
            }
            for pair in pairs:
                rows.append(compare(done, *pair, TIME, **about) | {"clock": "wall"})
            laps_together = done.laps[TOGETHER]
            each = list(zip(said[TOGETHER][-len(laps_together) :], laps_together, strict=True))  # less the warm-up
            shares = ([extreme(t.talked for t in both) / one.wall for both, one in each] for extreme in (min, max))
            last = said[TOGETHER][-1][0]
            rows[-2] |= {"talked": [round(statistics.median(s), 4) for s in shares]}
            rows[-2] |= {"messages": last.messages, "sent": last.sent}
        for end in ends:
            end.send(None)
        for process in there:
            process.join()
    return rows


def answered(script: str, *words: str) -> dict[str, Any]:
    """What a script beside this one prints, JSON; where it fails nothing is recorded."""
    line = [sys.executable, str(Path(__file__).with_name(script)), *words]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stderr.rstrip() or f"{script} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help=f"at most; at least {LEAST}, which an interval needs")
    parser.add_argument("--lap", type=int, default=128, help="images of a process in a lap")
    parser.add_argument("--epochs", type=int, default=5, help="of training in a lap, whose checks are timed too")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=5, help="of W-PGD on images in a file")
    parser.add_argument("--distances", type=int, default=1_000_000_000)
    parser.add_argument("--folder", default=None, help="on a disk with room for the images four times")
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    for name, value in vars(given).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if given.rounds < LEAST:
        parser.error(f"--rounds must be at least {LEAST}: with fewer there is no interval")
    if given.folder is not None and not Path(given.folder).is_dir():
        parser.error(f"--folder must be a folder that is there, not {given.folder}")
    core_digest()  # of the code that runs, should the file be edited meanwhile
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    begin, folder = time.perf_counter(), ["--folder", given.folder] * (given.folder is not None)
    points = [given.images // 20, given.images // 4, given.images]
    figures = {  # first what needs room on the disk, so that a disk that is full ends it at once
        "mapped": answered("mapped.py", "--images", str(given.images), "--steps", str(given.steps), *folder),
        "histogram": answered("histogram.py", "--n", str(given.distances), *folder),
        "stream": worst.streamed(points, torch.device("cpu")),
    }
    rows = scaling(given.lap, given.epochs, given.rounds)
    config = {name: getattr(given, name) for name in ("rounds", "lap", "epochs", "images", "steps", "distances")}
    line = " ".join(f"--{name} {value}" for name, value in config.items())
    record = {
        "schema": SCHEMA,
        "kind": "scale",
        "config": config,
        "rows": rows,
        "figures": figures,
    }
    record |= {"seconds": {"total": round(time.perf_counter() - begin, 1)}}
    record |= made_on(torch.device("cpu"), f"python benchmarks/scale.py {line}")
    print("record:", write_record(record, given.out))


if __name__ == "__main__":
    main(sys.argv[1:])
