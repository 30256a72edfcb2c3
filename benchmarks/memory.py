"""Peak memory of fine-tuning and of the attack in a process of its own, along three axes.

python benchmarks/memory.py --epochs 1 2 3 --steps 5 10 20 40 --images 5000 10000 20000

Fine-tuning for so many epochs and an attack of so many steps, both on the first number of images, and an attack on so
many images. The network is tiny, so that the images decide. Counted is what the process (on a GPU: the GPU) holds at
most beyond what it held before there were images: the images, float32, and all that is made of them. A peak never
falls, so what holds least comes first. Printed is JSON: for each axis pairs of a point and its peak, in multiples of
the images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.baselines import DELTA
from wdat_core import FinetuneConfig, Threat, finetune, wpgd

STATUS = Path("/proc/self/status")


def attack(device: torch.device, images: int, steps: int = 20) -> None:
    model, x, y = subject(device, images)
    wpgd(model, x, y, Threat(delta=DELTA), loss="ce", steps=steps, batch_size=64)


def train(device: torch.device, images: int, epochs: int) -> None:
    model, x, y = subject(device, images)
    config = FinetuneConfig(threat=Threat(delta=DELTA), steps=2, epochs=epochs, batch_size=64)
    finetune(model, (x, y), None, config, eval_batch_size=64)


def subject(device: torch.device, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A tiny network, and random images that are made in place."""
    torch.manual_seed(0)
    x = torch.empty(images, 3, 32, 32, device=device, memory_format=torch.channels_last).uniform_()
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)).to(device)
    return model, x, torch.randint(10, (images,), device=device)


def peak(device: torch.device) -> int:
    """The most bytes held until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # Linux, where getrusage also counts what the process held that started this one
        return held("VmHWM")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(name: str) -> int:
    """Bytes of this process as Linux counts them: now (VmRSS), at most until now (VmHWM), in no file (RssAnon)."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("epochs", "steps", "images"):
        parser.add_argument(f"--{axis}", type=int, nargs="+", required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args(arguments)
    device, few = given.device, given.images[0]
    attack(device, 128, steps=1)  # what the libraries take once
    train(device, 128, epochs=1)
    before = peak(device)

    def held(images: int, work: Callable[..., None], **options: int) -> float:
        work(device, images, **options)
        return round((peak(device) - before) / (images * 3 * 32 * 32 * 4), 3)

    found = {
        "epochs": [(epochs, held(few, train, epochs=epochs)) for epochs in given.epochs],
        "steps": [(steps, held(few, attack, steps=steps)) for steps in given.steps],
        "images": [(images, held(images, attack)) for images in given.images],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
