"""The worst-case accuracy of more distances than memory holds: its time, and the memory that the process takes.

python benchmarks/histogram.py [--n 1000000000] [--folder FOLDER] [--p 2] [--delta 0.0314]

A file of n made distances, float32, is written into a temporary folder and removed in the end: 3 in 10 are 0, 1 in 100
is inf, the others are spread around 8/255. Timed is `companion.histogram.accuracy_between` alone, which reads the file
twice. Printed is JSON: n, the bytes of the file, seconds, by how many bytes the process grew at most, the interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.memory import held
from companion.histogram import accuracy_between
from wdat_core import Threat

CHUNK = 1 << 22  # distances at once


class Distances:
    """The float32 distances in a file, from the first one at each walk. A memmap's pages would count as memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[np.ndarray]:
        with self.path.open("rb") as file:
            while len(chunk := np.fromfile(file, np.float32, CHUNK)):
                yield chunk


def make(path: Path, n: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, n, CHUNK):
            size = min(CHUNK, n - start)
            distances = 8 / 255 * np.exp(random.standard_normal(size, np.float32))
            kind = random.random(size, np.float32)
            distances[kind < 0.3] = 0
            distances[kind > 0.99] = np.inf
            distances.astype(np.float32).tofile(file)


def measure(n: int, threat: Threat, folder: Path | None = None) -> dict[str, Any]:
    """What is printed."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "distances"
        make(path, n)
        chunks, before = Distances(path), held("VmRSS")
        begin = time.perf_counter()
        low, high = accuracy_between(chunks, threat)
        seconds = time.perf_counter() - begin
        figures = {"n": n, "bytes": path.stat().st_size, "seconds": round(seconds, 1)}
    # The peak also has in it what the distances were made in, so it is never too low.
    return figures | {"grew_by": held("VmHWM") - before, "low": low, "high": high, "p": threat.p, "delta": threat.delta}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10**9)
    parser.add_argument("--folder", type=Path, help="where the file is put meanwhile: 4 bytes a distance")
    parser.add_argument("--p", type=float, default=2.0)
    parser.add_argument("--delta", type=float, default=8 / 255)
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given.n, Threat(p=given.p, delta=given.delta), given.folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
