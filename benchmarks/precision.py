"""Accuracy under attack in float32, in bfloat16 and compiled, on the full test set; one record.

What an attack in lower precision found is shown to the network in float32 as well ("in_float32").

python benchmarks/precision.py --data data [--network demo] [--device auto] [--out runs]
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from companion import files
from companion.bases import SCHEMA
from companion.data import load_data
from companion.machine import core_digest, made_on, pick_device
from companion.networks import load_network
from companion.records import subject, write_record
from companion.settings import Settings
from companion.terminal import progress
from wdat_core import Threat, wpgd

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "float32, compiled": {"compiled": True},
    "bfloat16, compiled": {"precision": "bfloat16", "compiled": True},
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="folder of CIFAR-10, or embedded")
    parser.add_argument("--network", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    core_digest()  # of the code that runs, should the file be edited meanwhile
    settings = Settings(
        network=given.network, data=given.data, train_images=1, val_images=1, test_images=given.images
    ).resolved()
    device = pick_device(given.device)
    network = load_network(given.network, files.ROOT / settings.models)
    model = network.model.to(device)
    data = load_data(settings, device)
    batch = 128 if device.type == "cpu" else 1000
    metrics: dict[str, Any] = {}
    seconds = {}
    for way, options in WAYS.items():
        begin = time.perf_counter()
        attacks = {
            name: wpgd(model, *data.test, threat, loss=loss, batch_size=batch, progress=progress(way), **options)
            for name, threat, loss in (("w_inf", Threat(p=math.inf), "ce"), ("w_2", Threat(), "redlr"))
        }
        seconds[way] = round(time.perf_counter() - begin, 1)
        metrics[way] = {"clean": attacks["w_2"].history["accuracy"][0]}
        metrics[way] |= {name: attack.accuracy for name, attack in attacks.items()}
        metrics[way]["in_float32"] = {
            name: accuracy(model, attack.x_adv, data.test[1], batch) for name, attack in attacks.items()
        }
        print(way, metrics[way], f"{seconds[way]} s", flush=True)
    record = {
        "schema": SCHEMA,
        "kind": "precision",
        **subject(network, data, "test"),
        "config": {"batch_size": batch, "steps": 20, "delta": 8 / 255},
        "metrics": metrics,
        "seconds": seconds,
        **made_on(
            device,
            f"python benchmarks/precision.py --data {'embedded' if given.data == 'embedded' else 'data'}"
            f" --network {given.network} --images {given.images}",
        ),
    }
    print(write_record(record, given.out))


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> float:
    """Fraction of the images that the network classifies correctly, as it is."""
    return sum(
        (model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(batch), y.split(batch), strict=True)
    ) / len(y)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
