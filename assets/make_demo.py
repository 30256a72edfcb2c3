"""How the stand-ins and the embedded images came about, and how to make them again.

    python assets/make_demo.py images  --data data    the sheets of images and their labels, from CIFAR-10
    python assets/make_demo.py weights --data data    pre-training, into runs/demo/ (an hour on one core)
    python assets/make_demo.py record  --data data    those weights into assets/, their record into results/

The last two take the name of another stand-in by `--network`. Each step writes the digests in assets/SHA256SUMS anew.
`--data` is a folder for CIFAR-10 as torchvision keeps it; it is downloaded where it is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from companion import files
from companion.architectures import new_stand_in
from companion.bases import SCHEMA
from companion.data import cifar, floats
from companion.files import digest, write_sums
from companion.machine import core_digest, device_name, versions
from companion.records import write_record
from companion.settings import METRICS
from companion.values import pack, plain
from wdat_core import FinetuneConfig, Threat, evaluate, finetune

# The one trainer, from weights drawn anew: TRADES with averaged weights, or PGD. Nothing is measured along the way.
DEMO = FinetuneConfig(
    perturb="none",
    objective="trades",
    threat=Threat(p=math.inf),
    loss="ce",
    tau=0.1,
    beta=6.0,
    steps=5,
    step_ratio=2.0,
    epochs=24,
    batch_size=128,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    schedule="one_cycle",
    average=0.998,
    precision="bfloat16",
)
RECIPES = {
    "demo": DEMO,
    "small_trades": dataclasses.replace(DEMO, epochs=30),
    "small_pgd": dataclasses.replace(DEMO, epochs=30, objective="pgd", average=0.0),
}
PARTS = {"train": (True, 0, 4000), "val": (True, 4000, 5000), "test": (False, 0, 1000)}
PUBLISHED = [*(f"{n}.safetensors" for n in RECIPES), "images.json", *(f"images_{n}.webp" for n in PARTS), "paper.csv"]


def images(data: Path) -> None:
    """4,000 + 1,000 images of the training set and 1,000 of the test set, each part one lossless sheet, 50 in a row."""
    index = {}
    for name, (train, first, last) in PARTS.items():
        x, y = cifar(data, train)
        tiles = x[first:last].numpy().reshape(-1, 50, 3, 32, 32)
        sheet = np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 2)).reshape(-1, 50 * 32, 3)
        Image.fromarray(sheet).save(files.ASSETS / f"images_{name}.webp", lossless=True, quality=100, method=6)
        labels = "".join(str(int(c)) for c in y[first:last])
        index[name] = {"labels": labels, "digest": digest(sheet.tobytes())}
    (files.ASSETS / "images.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def weights(data: Path, name: str) -> None:
    """Pre-training on the 50,000 training images; nothing is selected on the test set, or on any other.

    It is kept every minute: stopped at any moment, the same command goes on from there.
    """
    x, y = cifar(data, train=True)
    config = RECIPES[name]
    torch.manual_seed(config.seed)
    model = new_stand_in(name)
    folder = files.RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    history = finetune(model, (floats(x), y), None, config, resume=folder / "run.checkpoint", progress=tqdm)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    made = {
        "config": plain(dataclasses.asdict(config)),
        "history": {"epochs": history.epochs, "best": history.best},
        "seconds": round(history.seconds, 1),
        "device": device_name(torch.device("cpu")),
        "core": core_digest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / "made.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


def record(data: Path, name: str) -> None:
    """The three accuracies on all 10,000 test images, and how the weights were made, as one record."""
    folder = files.RUNS / name
    made = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    model = new_stand_in(name)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    x, y = cifar(data, train=False)
    begin = time.perf_counter()
    scores = evaluate(model, floats(x), y, batch_size=128, progress=tqdm)
    shutil.copy(folder / "weights.safetensors", files.ASSETS / f"{name}.safetensors")
    content = (files.ASSETS / f"{name}.safetensors").read_bytes()
    parts = b"".join(t.numpy().tobytes() for t in (x, y))
    path = write_record(
        {
            "schema": SCHEMA,
            "kind": "pretrain",
            "network": {"name": name, "source": "pre-trained by this project", "digest": digest(content)},
            "data": {
                "source": "CIFAR-10",
                "digest": digest(parts),
                "train": 50_000,
                "val": 0,
                "test": len(y),
            },
            "config": made["config"],
            "metrics": {"after": {m: getattr(scores, m) for m in METRICS}},
            "correct": {"after": {m: pack(scores.correct[m]) for m in METRICS}},
            "history": made["history"],
            "seconds": {"pretrain": made["seconds"], "evaluate": round(time.perf_counter() - begin, 1)},
            "device": made["device"],
            "versions": versions(),
            "core": made["core"],
            "created": made["created"],
            "command": "python assets/make_demo.py weights" + f" --network {name}" * (name != "demo"),
        },
        files.RESULTS,
    )
    print(path.name, {m: f"{100 * getattr(scores, m):.2f} %" for m in METRICS})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("images", "weights", "record"))
    parser.add_argument("--network", choices=RECIPES, default="demo")
    parser.add_argument("--data", type=Path, default=files.ROOT / "data")
    arguments = parser.parse_args()
    if arguments.step == "images":
        images(arguments.data)
    else:
        {"weights": weights, "record": record}[arguments.step](arguments.data, arguments.network)
    write_sums(files.ASSETS, [name for name in PUBLISHED if (files.ASSETS / name).exists()])
