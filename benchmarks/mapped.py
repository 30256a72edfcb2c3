"""W-PGD on images in a file, in a process of its own: how long it takes, and what the process holds in memory.

python benchmarks/mapped.py --images 1000000 --steps 5 [--folder FOLDER]

The images are made, 32 x 32 pixels in three colours, and the network is tiny, so that the disk decides. Printed is
JSON: how many bytes the images have, the most bytes that the process held in no file beyond what it held before there
were images, the memory of the machine, and seconds. Needs Linux, which says what of a process is in no file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.memory import held, subject
from wdat_core import Threat, WdatError, wpgd

AT_ONCE = 250


def attacked(images: int, steps: int, folder: str) -> dict[str, Any]:
    model, few, labels = subject(torch.device("cpu"), 2 * AT_ONCE)
    wpgd(model, few, labels, Threat(), loss="ce", steps=1, batch_size=AT_ONCE)  # what the libraries take once
    begin, before, most = time.perf_counter(), held("RssAnon"), 0
    file = Path(folder) / "images"
    x = torch.from_file(str(file), shared=True, size=images * 3 * 32 * 32).view(images, 3, 32, 32)
    y = torch.randint(10, (images,))
    for rows in torch.arange(images).split(AT_ONCE):
        x[rows[0] : rows[-1] + 1].uniform_()
    made = time.perf_counter()

    def watched(steps: Iterable[int]) -> Iterator[int]:
        nonlocal most
        for step in steps:
            yield step
            most = max(most, held("RssAnon"))

    how: dict[str, Any] = {"loss": "ce", "steps": steps, "batch_size": AT_ONCE, "progress": watched}
    attack = wpgd(model, x, y, Threat(), folder=folder, **how)
    most = max(most, held("RssAnon"))
    return {
        "images": images,
        "steps": steps,
        "bytes": x.numel() * x.itemsize,
        "held": most - before,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "distance": attack.distance,
        "seconds": {"images": round(made - begin, 1), "attack": round(time.perf_counter() - made, 1)},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on a disk with room for four times the images")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as folder:
        try:
            print(json.dumps(attacked(given.images, given.steps, folder)))
        except WdatError as error:
            sys.exit(f"mapped.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
