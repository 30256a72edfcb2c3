"""How far two estimates of Upsilon are from that of the whole training set, along a fine-tuning run; one record.

python benchmarks/upsilon.py --data data [--tau 0.01] [--epochs 2] [--every 8] [--device auto] [--out runs]

The run is Algorithm 1 with the paper's estimate, 10 % of the training set afresh at every minibatch. At every 8th
minibatch the sensitivity of the whole set is computed beside it, and the estimate that costs nothing: the mean over the
latest minibatches' own sensitivities.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from companion import files
from companion.bases import SCHEMA
from companion.data import load_data
from companion.machine import core_digest, made_on, pick_device
from companion.networks import load_network
from companion.records import subject, write_record
from companion.settings import Settings
from wdat_core import FinetuneConfig, Minibatch, finetune, sensitivity, wdat


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="folder of CIFAR-10, or embedded")
    parser.add_argument("--network", default="demo")
    parser.add_argument("--train-images", type=int, default=40_000)
    parser.add_argument("--tau", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    core_digest()  # of the code that runs, should the file be edited meanwhile
    settings = Settings(
        network=given.network, data=given.data, train_images=given.train_images, val_images=1, test_images=1
    ).resolved()
    device = pick_device(given.device)
    network = load_network(given.network, files.ROOT / settings.models)
    model = network.model.to(device)
    data = load_data(settings, device)
    batch = 128 if device.type == "cpu" else 1000
    config = FinetuneConfig(tau=given.tau, epochs=given.epochs, eta=1.0)
    begin = time.perf_counter()
    points = follow(model, data.train, config, batch, given.every)
    record = {
        "schema": SCHEMA,
        "kind": "upsilon",
        **subject(network, data, "train"),
        "config": config,
        "points": points,
        "seconds": {"total": round(time.perf_counter() - begin, 1)},
        **made_on(
            device,
            f"python benchmarks/upsilon.py --data {'embedded' if given.data == 'embedded' else 'data'}"
            f" --network {given.network} --train-images {given.train_images} --tau {given.tau:g}"
            f" --epochs {given.epochs} --every {given.every}",
        ),
    }
    print(write_record(record, given.out))


def follow(
    model: nn.Module, train: tuple[Tensor, Tensor], config: FinetuneConfig, batch: int, every: int
) -> dict[str, list[float]]:
    """The minibatches looked at and, at each, "whole", "sample" and "batch", three values of Upsilon.

    The configuration is that of Algorithm 1 with eta = 1, so that Upsilon is the estimate itself.
    """
    points: dict[str, list[float]] = {"minibatch": [], "whole": [], "sample": [], "batch": []}

    def watched(minibatch: Minibatch) -> Tensor:
        """The objective of Algorithm 1, and its estimates at the same weights and batch statistics."""
        seen = len(minibatch.memory.get("upsilon", []))
        due = seen % every == 0
        whole = sensitivity(model, *train, config.threat, batch_size=batch) if due else 0.0  # before `wdat` trains
        total = wdat(minibatch)
        if due:
            latest = torch.stack(minibatch.memory["recent"]).double()
            row = {"whole": whole, "minibatch": seen, "sample": minibatch.memory["upsilon"][-1].item()}
            row["batch"] = latest.square().mean().sqrt().item()
            for name, value in row.items():
                points[name].append(value)
            print(row, flush=True)
        return total

    watching = dataclasses.replace(config, objective=watched)
    finetune(model, train, None, watching, eval_batch_size=batch)
    return points


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
