"""What the notebooks share: settings and their checks, data, runs, records, tables and plots.

This module imports the standard library alone at the top: a notebook's parameters are checked before torch is loaded.
The way from parameters to numbers is one: notebook parameters -> `Settings` -> `finetune_grid` -> records -> table.
"""

from __future__ import annotations

import base64
import copy
import csv
import dataclasses
import datetime
import difflib
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from wdat_core import Images
    from wdat_networks import Network

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
RESULTS = ROOT / "results"  # committed: what the book quotes
RUNS = ROOT / "runs"  # not committed: what this checkout computed

METRICS = {"clean": "Clean", "w_inf": "W∞", "w_2": "W₂"}

PAPER_NETWORKS: dict[str, dict[str, Any]] = {
    "Zhang2019Theoretically": {"paper": "Zhang et al. (2019)", "architecture": "WRN-34-10", "clean": 84.92},
    "Chen2024Data_WRN_34_10": {"paper": "Chen and Lee (2024)", "architecture": "WRN-34-10", "clean": 86.54},
    "Gowal2020Uncovering_28_10_extra": {"paper": "Gowal et al. (2020)", "architecture": "WRN-28-10", "clean": 89.48},
    "Cui2023Decoupled_WRN-28-10": {"paper": "Cui et al. (2023)", "architecture": "WRN-28-10", "clean": 92.16},
    "Wang2023Better_WRN-28-10": {"paper": "Wang et al. (2023)", "architecture": "WRN-28-10", "clean": 92.44},
}
# RobustBench's LICENSE: its weights are under the MIT licence, but for names that begin with one of these.
LICENCES = {
    "Hendrycks2019Using": "Apache-2.0",
    "Pang2020Boosting": "Apache-2.0",
    "Gowal2020Uncovering": "Apache-2.0",
    "Ding2020MMA": "CC-BY-NC-SA-4.0",
    "Rebuffi2021Fixing": "Apache-2.0",
    "Gowal2021Improving": "Apache-2.0",
}
STAND_INS = {"demo": (16, 64, 128)}  # name -> widths of wdat_networks.SmallResNet


class ParameterError(ValueError):
    """Something the user of a notebook can put right; a notebook shows the message, what and how, and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


# ---------------------------------------------------------------------------------------------------------------------
# Settings: from a notebook's parameters to one frozen, checked configuration
# ---------------------------------------------------------------------------------------------------------------------

PRESETS: dict[str, dict[str, Any]] = {
    # A laptop computes a column of Table 4 in a minute or two, without any download.
    "demo": {
        "network": "demo",
        "data": "embedded",
        "train_images": 4000,
        "val_images": 1000,
        "test_images": 1000,
        "epochs": 4,
        "batch_size": 512,
    },
    # Section 6 of the paper.
    "paper": {
        "network": "Zhang2019Theoretically",
        "data": "data",
        "train_images": 40_000,
        "val_images": 10_000,
        "test_images": 10_000,
        "epochs": 20,
        "batch_size": 512,
    },
}


@dataclass(frozen=True)
class Settings:
    """The parameters of a fine-tuning table; None takes the preset's value, for tau and eta both of the paper's."""

    preset: str = "demo"
    tau: float | None = None
    eta: float | None = None
    network: str | None = None
    data: str | None = None
    train_images: int | None = None
    val_images: int | None = None
    test_images: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    delta: float = 8 / 255
    beta: float = 6.0
    steps: int = 20
    consistency: str = "ce_detached"
    upsilon_from: str = "sample"
    precision: str = "float32"
    compiled: bool = False
    seed: int = 0
    device: str = "auto"
    models: str = "models"
    stop_after: float | None = None
    export: str | None = None

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Settings:
        """The settings that the variables of a notebook's namespace give, checked, with the preset filled in.

        Raises:
            ParameterError: a variable is no parameter of this notebook, has the wrong type, or an impossible value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        given = {}
        for name, value in namespace.items():
            if name.startswith("_") or name in ("In", "Out") or isinstance(value, types.ModuleType) or callable(value):
                continue
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise ParameterError(
                    f"unknown parameter {name!r}"
                    + (f": did you mean {near[0]!r}?" if near else "")
                    + f" Known are {', '.join(names)}"
                )
            given[name] = value
        return cls(**given).resolved()

    def resolved(self) -> Settings:
        """Checked, and with the preset's values where there was None."""
        _check("preset", self.preset, str, choices=tuple(PRESETS))
        preset = {k: v for k, v in PRESETS[self.preset].items() if getattr(self, k) is None}
        settings = dataclasses.replace(self, **preset)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("network", "data", "device", "models"):
            _check(name, getattr(self, name), str)
        if self.export is not None:
            _check("export", self.export, str)
        if self.stop_after is not None:
            _check("stop_after", self.stop_after, float, above=0)
        if self.tau is not None:
            _check("tau", self.tau, float, above=0)
        if self.eta is not None:
            _check("eta", self.eta, float, above=0, at_most=1)
        _check("delta", self.delta, float, above=0)
        _check("beta", self.beta, float, above=-math.ulp(0))
        for name in ("train_images", "val_images", "test_images", "epochs", "batch_size", "steps"):
            _check(name, getattr(self, name), int, above=0)
        _check("seed", self.seed, int, above=-1)
        _check("consistency", self.consistency, str, choices=("ce_detached", "ce", "kl"))
        _check("upsilon_from", self.upsilon_from, str, choices=("sample", "batch"))
        _check("precision", self.precision, str, choices=("float32", "bfloat16"))
        if not isinstance(self.compiled, bool):
            raise ParameterError(f"compiled must be True or False, not {self.compiled!r}")
        most = (
            {"train_images": 4000, "val_images": 1000, "test_images": 1000}
            if self.data == "embedded"
            else {"test_images": 10_000}
        )
        for name, limit in most.items():
            if getattr(self, name) > limit:
                raise ParameterError(
                    f"{name} is {getattr(self, name)}, and the {self.data!r} data has {limit}:"
                    " ask for fewer, or give the folder of CIFAR-10 as data"
                )
        if self.data != "embedded" and self.train_images + self.val_images > 50_000:  # type: ignore[operator]
            raise ParameterError(
                f"train_images and val_images are {self.train_images} and {self.val_images}, and CIFAR-10 has 50000"
                " training images for both together"
            )

    def grid(self) -> list[tuple[float, float]]:
        """The (tau, eta) of each column, in the paper's order."""
        taus = (0.1, 0.01) if self.tau is None else (self.tau,)
        etas = (0.1, 1.0) if self.eta is None else (self.eta,)
        return [(float(tau), float(eta)) for eta in etas for tau in taus]


def _check(
    name: str,
    value: Any,
    kind: Any,
    *,
    above: float = -math.inf,
    at_most: float = math.inf,
    choices: Sequence[str] = (),
) -> None:
    word = {int: "a whole number", float: "a number", str: "a text"}[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ParameterError(f"{name} must be {word}, not {value!r}")
    if choices and value not in choices:
        raise ParameterError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if kind is not str and not (above < value <= at_most and math.isfinite(value)):
        low = "at least 0" if above < 0 else f"above {above:g}"
        raise ParameterError(f"{name} must be {low}{f' and at most {at_most:g}' * (at_most < math.inf)}, not {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Data: the embedded images and CIFAR-10
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Training, validation and test images, each a pair (x, y) as wdat_core takes them, and where they come from."""

    train: Images
    val: Images
    test: Images
    source: str
    digest: str


def load_data(settings: Settings, device: torch.device | str = "cpu") -> Data:
    """The images that the settings name: the embedded ones, or CIFAR-10 split 40,000 / 10,000 by a fixed permutation.

    Raises:
        ParameterError: CIFAR-10 is not in the folder and cannot be put there, or a file is damaged.
    """
    import torch

    if settings.data == "embedded":
        parts = {name: embedded(name) for name in ("train", "val", "test")}
        source = "embedded CIFAR-10 images"
    else:
        folder = from_root(str(settings.data))
        x, y = cifar10(folder, train=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, val = order[: settings.train_images], order[len(order) - int(settings.val_images or 0) :]
        parts = {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": cifar10(folder, train=False)}
        source = "CIFAR-10"
    sizes = {"train": settings.train_images, "val": settings.val_images, "test": settings.test_images}
    parts = {name: (x[: sizes[name]], y[: sizes[name]]) for name, (x, y) in parts.items()}
    known = digest(b"".join(t.numpy().tobytes() for part in parts.values() for t in part))
    ready = {name: (floats(x).to(device), y.to(device)) for name, (x, y) in parts.items()}
    return Data(**ready, source=source, digest=known)


def floats(x: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) as floats in [0, 1], channels_last."""
    import torch

    return x.float().div_(255).contiguous(memory_format=torch.channels_last)


def embedded(part: str) -> tuple[Tensor, Tensor]:
    """The images of the repository: "train" (4,000), "val" and "test" (1,000 each); bytes (n, 3, 32, 32), labels (n,).

    Training and validation images are the first 5,000 of CIFAR-10's training set, test images the first 1,000 of its
    test set. Each file is one lossless sheet of tiles, 50 in a row.
    """
    import numpy as np
    import torch
    from PIL import Image

    path = ASSETS / f"images_{part}.webp"
    try:
        index = json.loads(verified(ASSETS, "images.json"))[part]
        sheet = np.asarray(Image.open(io.BytesIO(verified(ASSETS, path.name))).convert("RGB"))
        if digest(sheet.tobytes()) != index["digest"]:
            raise OSError("its pixels are not those that were stored")
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"{path} or images.json beside it is damaged or missing: restore both and SHA256SUMS from the repository"
            f" ({one_line(error)})"
        ) from error
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(tiles.copy()), torch.tensor([int(c) for c in index["labels"]])


def cifar10(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10 through torchvision: bytes (n, 3, 32, 32) and labels (n,); downloaded into the folder where it is not.

    Raises:
        ParameterError: it is not there and cannot be downloaded, or there is no room or no right to write.
    """
    import torch
    from torchvision.datasets import CIFAR10

    try:
        try:
            dataset = CIFAR10(str(folder), train)  # checks md5 sums before it unpickles
        except RuntimeError:  # files are missing or damaged
            _fetch_cifar10(folder)
            dataset = CIFAR10(str(folder), train)
    except Exception as error:  # urllib, tarfile, pickle and the file system each have their own
        raise ParameterError(
            f"CIFAR-10 is not in {folder} and could not be put there ({one_line(error)}): place"
            " cifar-10-python.tar.gz or the folder cifar-10-batches-py there, or use the embedded images (preset demo)"
        ) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def _fetch_cifar10(folder: Path) -> None:
    """The files of CIFAR-10 into the folder, each whole, from its archive there or downloaded.

    Torchvision writes the archive and what it unpacks under their final names at once, where an interruption leaves
    halves and a second process reads them.
    """
    from torchvision.datasets import CIFAR10

    batches, archive = folder / CIFAR10.base_folder, folder / CIFAR10.filename
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        if archive.exists():
            shutil.copy(archive, part)  # where its md5 sum is wrong, it is fetched anew
        CIFAR10(part, download=True)
        batches.mkdir(exist_ok=True)
        for file in (Path(part) / CIFAR10.base_folder).iterdir():
            file.replace(batches / file.name)


def from_root(path: str | Path) -> Path:
    """A path given to a notebook; relative ones start at the repository, wherever the notebook runs."""
    return ROOT / Path(path).expanduser()


def one_line(error: BaseException) -> str:
    """An error of another library on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def digest(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: first under another name, which no other process has.

    Raises:
        OSError: there is no room, or no right to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write SHA256SUMS, the digests of files in a folder, as `sha256sum --check` and `verified` read it."""
    lines = [f"{digest((folder / name).read_bytes())}  {name}\n" for name in sorted(names)]
    write_whole(folder / "SHA256SUMS", "".join(lines).encode())


def verified(folder: Path, name: str) -> bytes:
    """The content of a file that SHA256SUMS in its folder lists.

    Raises:
        OSError: it is missing, cannot be read, or is not what it was when its digest was taken.
    """
    content = (folder / name).read_bytes()
    listed = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
    if f"{digest(content)}  {name}" not in listed:
        raise OSError(f"{name} does not have the digest that SHA256SUMS beside it lists")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Runs and records
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = 1

# What a record of each kind has to have: fields (* is any), each with the pattern of a text, the range of a whole
# number, the least and the most of any other number, or None for whatever is there.
Rules = dict[str, str | range | tuple[float, float] | None]
_SHA256, _COUNT, _FRACTION, _AMOUNT = "[0-9a-f]{64}", range(1, 10**9), (0, 1), (0, sys.float_info.max)
_TEXT = r"[^<>\[\]|`\n]+"  # shown within Markdown: nothing in it may be markup
_EVERY: Rules = {
    "config.*": None,
    "seconds.*": _AMOUNT,
    "device": _TEXT,
    "versions.*": _TEXT,
    "versions.python": _TEXT,
    "versions.torch": _TEXT,
    "core": _SHA256,
    "created": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00",
    "command": f"(papermill|python) {_TEXT}",
}
_SUBJECT: Rules = {"network.name": r"[\w.-]+", "network.digest": _SHA256, "data.digest": _SHA256}
_SUBJECT |= {"network.source": _TEXT, "data.source": _TEXT}
_TRAINED: Rules = _EVERY | _SUBJECT | {"data.train": _COUNT, "data.val": range(10**9), "data.test": _COUNT}
_TRAINED |= {"history.best": _COUNT, "history.epochs.*.epoch": _COUNT, "history.epochs.*.loss": _AMOUNT}


def _scores(when: str) -> Rules:
    return {f"metrics.{when}.{m}": _FRACTION for m in METRICS} | {f"correct.{when}.{m}": ".+" for m in METRICS}


RULES: dict[str, Rules] = {
    "finetune": _TRAINED
    | _scores("before")
    | _scores("after")
    | {"seconds.baseline": _AMOUNT, "seconds.finetune": _AMOUNT, "seconds.evaluate": _AMOUNT}
    | {"history.upsilon.*": _AMOUNT, "history.epochs.*.clean": _FRACTION, "history.epochs.*.w_2": _FRACTION},
    "pretrain": _TRAINED | _scores("after"),
    "precision": _EVERY | _SUBJECT | {"data.test": _COUNT, "metrics.*": _FRACTION},
    "upsilon": _EVERY | _SUBJECT | {"data.train": _COUNT, "points.*": _AMOUNT},
    "reliability": _EVERY | {"figures.*": range(10**9), "figures.tests": _COUNT, "seconds.total": _AMOUNT},
    "benchmark": _EVERY
    | {"config.rounds": _COUNT, "seconds.total": _AMOUNT}
    | dict.fromkeys(("rows*", "growth*", "memory*", "throughput*")),
}
CONFIGS = {"finetune": "FinetuneConfig", "pretrain": "PretrainConfig", "upsilon": "FinetuneConfig"}  # of wdat_core
LATER = {"upsilon_from": "sample", "precision": "float32", "compiled": False}  # fields of a later version, as before
Record = dict[str, Any]


def finetune_grid(settings: Settings, perturb: str, *, notebook: str) -> list[Record]:
    """One record for each (tau, eta) of the settings: Algorithm 1 and the three accuracies before and after it.

    Every record is written to runs/ as soon as its column is done, and the network exported if the settings name a
    folder for it. The network is fine-tuned anew for each column. While a column is computed it is kept in runs/ every
    minute; the same settings go on from there, with the same result.

    Args:
        perturb: "whole" or "last_layer".
        notebook: the name of the notebook that computes it, for the command in the record.

    Raises:
        ParameterError: network or data are not to be had (see `load_network`, `load_data`), or the loaded network's
            clean accuracy is not the published one; or the time of `stop_after` is up, for this column.
    """
    from wdat_core import FinetuneConfig, Threat, evaluate, finetune
    from wdat_networks import check_export, export, load_network

    core = core_digest()
    device = pick_device(settings.device)
    network = load_network(str(settings.network), from_root(settings.models))
    if settings.export is not None:
        check_export(network.name, settings.export)
    data = load_data(settings, device)
    model = network.model.to(device)
    options: dict[str, Any] = {"delta": settings.delta, "steps": settings.steps}
    options |= {"precision": settings.precision, "compiled": settings.compiled}
    batch = 128 if device.type == "cpu" else 1024  # a CPU is faster on smaller batches
    begin = time.perf_counter()
    before = evaluate(model, *data.test, **options, batch_size=batch, progress=progress("baseline"))
    baseline_seconds = time.perf_counter() - begin
    _check_clean(network, before.clean, len(data.test[1]))
    records = []
    for tau, eta in settings.grid():
        label = f"tau {tau:g}, eta {eta:g}"
        config = FinetuneConfig(
            perturb=perturb,
            tau=tau,
            eta=eta,
            beta=float(settings.beta),
            threat=Threat(delta=float(settings.delta)),
            steps=settings.steps,
            epochs=int(settings.epochs or 0),
            batch_size=int(settings.batch_size or 0),
            consistency=settings.consistency,
            upsilon_from=settings.upsilon_from,
            precision=settings.precision,
            compiled=settings.compiled,
            seed=settings.seed,
        )
        tuned = copy.deepcopy(model)
        kept = RUNS / f"{digest(repr([config, batch, network.digest, data.digest, core]).encode())[:16]}.checkpoint"
        history = finetune(
            tuned,
            data.train,
            data.val,
            config,
            eval_batch_size=batch,
            resume=kept,
            stop_after=settings.stop_after,
            progress=progress(label),
        )
        if not history.finished:
            raise ParameterError(
                f"stopped after {settings.stop_after:g} seconds, as asked, with {len(history.epochs)} of"
                f" {config.epochs} epochs of {label} done: the same command goes on from there"
            )
        begin = time.perf_counter()
        after = evaluate(tuned, *data.test, **options, batch_size=batch, progress=progress(label))
        seconds = {
            "baseline": baseline_seconds,
            "finetune": history.seconds,
            "evaluate": time.perf_counter() - begin,
        }
        scores = {"before": before, "after": after}
        record = {
            "schema": SCHEMA,
            "kind": "finetune",
            **subject(network, data, "train", "val", "test"),
            "config": plain(dataclasses.asdict(config)),
            "metrics": {when: {m: getattr(s, m) for m in METRICS} for when, s in scores.items()},
            "correct": {when: {m: pack(s.correct[m]) for m in METRICS} for when, s in scores.items()},
            "history": {"epochs": history.epochs, "best": history.best, "upsilon": history.upsilon},
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            **provenance(device, _command(settings, notebook, tau, eta)),
        }
        write_record(record, RUNS)
        records.append(record)
        if settings.export is not None:
            print(f"exported to {export(tuned, record, settings.export)}")
        kept.unlink(missing_ok=True)
    return records


def subject(network: Network, data: Data, *parts: str) -> Record:
    """What a record is about: the network, and the parts of the data that were used."""
    return {
        "network": {"name": network.name, "source": network.source, "digest": network.digest},
        "data": {"source": data.source, "digest": data.digest, **{p: len(getattr(data, p)[1]) for p in parts}},
    }


def provenance(device: torch.device, command: str) -> Record:
    """Where, with what, when, and by which command a record is made."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "core": core_digest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _command(settings: Settings, notebook: str, tau: float, eta: float) -> str:
    """The papermill line that computes this column again; a folder for CIFAR-10 is called data, one of exports so."""
    defaults = {**dataclasses.asdict(Settings()), **PRESETS[settings.preset]}
    name = Path(str(settings.network)).name
    network = name if name == settings.network else f"exports/{name}"
    data = "embedded" if settings.data == "embedded" else "data"
    column = dataclasses.replace(settings, tau=tau, eta=eta, network=network, data=data)
    own = ("device", "models", "stop_after", "export")
    given = {k: v for k, v in dataclasses.asdict(column).items() if v != defaults[k] and k not in own}
    return " ".join(
        [
            f"papermill notebooks/{notebook}.ipynb out.ipynb",
            *(f"-p {k} {int(v) if isinstance(v, float) and v.is_integer() else v}" for k, v in given.items()),
        ]
    )


def _check_clean(network: Network, clean: float, images: int) -> None:
    """The clean accuracy is the published one, up to what a sample of that many images can differ (4 sigma)."""
    if network.name not in PAPER_NETWORKS:
        return
    published = PAPER_NETWORKS[network.name]["clean"] / 100
    allowed = 0.005 if images == 10_000 else 4 * math.sqrt(published * (1 - published) / images)
    if abs(clean - published) > allowed:
        raise ParameterError(
            f"{network.name} classifies {100 * clean:.2f} % of {images} clean test images correctly, and"
            f" {100 * published:.2f} % is published: these are not its weights, or not its images"
        )


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it: infinity as a text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return "inf" if value == math.inf else value


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU.

    Raises:
        ParameterError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ParameterError(f"device {name!r} is not to be had here: use auto or cpu ({one_line(error)})") from error
    return device


def device_name(device: torch.device) -> str:
    """The hardware in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{processor}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a number."""
    names = ("torch", "torchvision", "robustbench", "numpy")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), **found}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def core_digest() -> str:
    """The SHA-256 of wdat_core.py when it was first asked for, so that a record says which code made it."""
    return digest((ROOT / "wdat_core.py").read_bytes().replace(b"\r\n", b"\n"))


def pack(correct: Tensor) -> str:
    """Bools (n,) as text, eight to a byte."""
    import numpy as np

    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def unpack(text: str, n: int) -> Any:
    """What `pack` packed, as a numpy array of n floats 0 or 1."""
    import numpy as np

    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(float)


def write_record(record: Record, folder: Path) -> Path:
    """Write a record under the name its contents decide, whole or not at all.

    Raises:
        ParameterError: the folder cannot be written, or the disk is full.
    """
    path = folder / f"{record_stem(record)}-{protocol(record)[:8]}.json"
    try:
        write_whole(path, record_bytes(record))
    except OSError as error:
        message = f"the record {path} could not be written ({one_line(error)}): make room and run again"
        raise ParameterError(message) from error
    return path


def record_stem(record: Record) -> str:
    """Kind, network (of a benchmark: device), perturbation, tau, eta and seed, as they begin the name of a file."""
    config = record["config"]
    subject = record["network"]["name"] if "network" in record else re.sub(r"\W+", "_", record["device"])
    what = [record["kind"], subject, config.get("perturb", "")]
    what += [f"{key}{str(config[key]).removesuffix('.0')}" for key in ("tau", "eta", "seed") if key in config]
    return "-".join(filter(None, what))


def record_bytes(record: Record) -> bytes:
    """A record as it is stored: its last key is the digest of all the others, which `parse_record` takes off again."""
    return (json.dumps({**record, "digest": _seal(record)}, indent=1, allow_nan=False) + "\n").encode()


def _seal(record: Record) -> str:
    as_read = json.loads(json.dumps(record, allow_nan=False))  # where every key is a text
    return digest(json.dumps(as_read, sort_keys=True).encode())


def parse_record(content: bytes) -> Record:
    """A stored record that is as it was written, and all of whose fields can be what they say they are.

    Raises:
        ValueError: it is damaged, partial, edited or foreign.
    """
    try:
        record = json.loads(content)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("kind") not in RULES:
            raise ValueError(f"not a record of schema {SCHEMA}")
        if record.pop("digest", None) != _seal(record):
            raise ValueError("not as it was written: its digest is another")
        leaves = dict(_leaves(record))
        for field, rule in RULES[record["kind"]].items():
            found = {name: value for name, value in leaves.items() if fnmatch.fnmatchcase(name, field)}
            if not found:
                raise ValueError(f"{field} is missing")
            for name, value in found.items():
                if not _fits(value, rule):
                    raise ValueError(f"{name} cannot be {value!r}")
        _check_config(record)
        _check_bits(record)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a record of schema {SCHEMA} ({one_line(error)})") from error
    return record


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a record that holds nothing else, as ("metrics.after.clean", 0.637); positions count as names."""
    parts = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}
    if not parts:
        yield name, value
    for key, part in parts.items():
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


def _fits(value: Any, rule: str | range | tuple[float, float] | None) -> bool:
    if isinstance(rule, str):
        return isinstance(value, str) and re.fullmatch(rule, value) is not None
    if isinstance(rule, range):
        return type(value) is int and value in rule  # True is no number here
    return rule is None or (type(value) in (int, float) and rule[0] <= value <= rule[1])


def _check_config(record: Record) -> None:
    """The configuration is one that wdat_core would run."""
    import wdat_core

    if record["kind"] in CONFIGS:
        threat = {name: math.inf if value == "inf" else value for name, value in record["config"]["threat"].items()}
        getattr(wdat_core, CONFIGS[record["kind"]])(**{**record["config"], "threat": wdat_core.Threat(**threat)})


def _check_bits(record: Record) -> None:
    """Each accuracy is the mean of its images."""
    for when, packed in record.get("correct", {}).items():
        for metric, text in packed.items():
            n, value = record["data"]["test"], record["metrics"][when][metric]
            if len(base64.b64decode(text, validate=True)) != math.ceil(n / 8):
                raise ValueError(f"correct.{when}.{metric} is not of {n} images")
            if not math.isclose(unpack(text, n).mean(), value, abs_tol=1e-6):
                raise ValueError(f"metrics.{when}.{metric} is {value!r}, and {unpack(text, n).mean()} of its images")


def protocol(record: Record) -> str:
    """A digest of everything that decides a record's numbers but for tau, eta, the seed and rounding.

    A field that came with a later version counts only where it is not as before, so that older records stay comparable.
    """
    config = {k: v for k, v in record["config"].items() if k not in ("tau", "eta", "seed") and v != LATER.get(k, ...)}
    what = [record["kind"], record.get("network"), record.get("data"), config]
    return digest(json.dumps(what, sort_keys=True).encode())


def read_records(folder: Path = RESULTS, kind: str = "finetune") -> list[Record]:
    """The records of one kind in a folder. A damaged, partial or foreign file is named on stderr and skipped."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = parse_record(path.read_bytes())
        except (OSError, ValueError) as error:
            print(f"skipped {path.name}: {one_line(error)}", file=sys.stderr)
            continue
        if record["kind"] == kind:
            records.append(record)
    return records


def recorded_like(records: Sequence[Record], folder: Path = RESULTS) -> list[Record]:
    """The committed records of the same protocol: same network, data and configuration; any tau, eta and seed."""
    wanted = {protocol(r) for r in records}
    return [r for r in read_records(folder) if protocol(r) in wanted]


def recorded_otherwise(records: Sequence[Record], perturb: str, folder: Path = RESULTS) -> list[list[Record]]:
    """The committed fine-tuning records of other protocols than that of `records`, a list for each protocol."""
    ours = {protocol(r) for r in records}
    groups: dict[str, list[Record]] = {}
    for record in read_records(folder):
        if record["config"]["perturb"] == perturb and protocol(record) not in ours:
            groups.setdefault(protocol(record), []).append(record)
    return list(groups.values())


def progress(label: str) -> Callable[[str], None]:
    """What wdat_core's `progress` wants: shows a line in the terminal behind papermill and in a live notebook.

    The line replaces the one before, and the empty line at the end clears it: nothing stays in stored outputs.
    """
    try:
        descriptor = os.dup(sys.stderr.fileno())  # under ipykernel this is the process's own stderr
        terminal = os.fdopen(descriptor, "w") if os.isatty(descriptor) else None
    except (OSError, AttributeError, ValueError, io.UnsupportedOperation):
        terminal = None
    in_kernel = "ipykernel" in sys.modules

    def show(text: str) -> None:
        line = f"{label}: {text}" if text else ""
        if terminal:
            terminal.write(f"\r\033[K{line}")
            terminal.flush()
        if in_kernel:
            from IPython.display import clear_output, display

            clear_output(wait=bool(line))
            if line:
                display({"text/plain": line}, raw=True)

    return show


# ---------------------------------------------------------------------------------------------------------------------
# Evidence: the paper's numbers beside the records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An accuracy or a change of accuracy in per cent, with half the width of its 95 % interval (None: not known)."""

    value: float
    half: float | None = None

    def text(self, signed: bool = False) -> str:
        value = f"{self.value:{'+' if signed else ''}.2f}"
        return value if self.half is None else f"{value}\u00a0±\u00a0{self.half:.2f}"  # not to be broken


def paper_value(
    table: int, network: str, metric: str, tau: float | None = None, eta: float | None = None
) -> float | None:
    """A number of the paper's tables in per cent, or None where it has none (assets/paper.csv)."""
    for row in _paper_rows():
        cell = (int(row["table"]), row["network"], row["metric"])
        at = tuple(float(row[k]) if row[k] else None for k in ("tau", "eta"))
        if cell == (table, network, metric) and at == (tau, eta):
            return float(row["value"])
    return None


def _paper_rows() -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(verified(ASSETS, "paper.csv").decode())))
    except OSError as error:
        raise ParameterError(
            f"the paper's numbers are damaged or missing: restore {ASSETS / 'paper.csv'} and SHA256SUMS beside it from"
            f" the repository ({one_line(error)})"
        ) from error


def accuracy(records: Sequence[Record], when: str, metric: str) -> Estimate:
    """Mean over records that differ in the seed alone, with the interval of sampling test images."""
    return _estimate([_bits(r, when, metric) for r in records])


def change(records: Sequence[Record], metric: str) -> Estimate:
    """Accuracy after minus before on the same images, mean over seeds, with the interval of the paired differences."""
    return _estimate([_bits(r, "after", metric) - _bits(r, "before", metric) for r in records])


def _bits(record: Record, when: str, metric: str) -> Any:
    return unpack(record["correct"][when][metric], record["data"]["test"])


def _estimate(per_seed: Sequence[Any]) -> Estimate:
    import numpy as np

    values = 100 * np.mean(per_seed, axis=0)
    half = float(1.96 * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), half)


def columns_of(records: Sequence[Record]) -> dict[tuple[float, float], list[Record]]:
    """The records of each (tau, eta), in the paper's order."""
    columns: dict[tuple[float, float], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["config"]["eta"], -r["config"]["tau"], r["config"]["seed"])):
        columns.setdefault((record["config"]["tau"], record["config"]["eta"]), []).append(record)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Tables and plots, drawn from records alone
# ---------------------------------------------------------------------------------------------------------------------

PAPER, RECORDED, THIS_RUN = "#4d4d4d", "#0072b2", "#d55e00"  # Okabe and Ito's, told apart by every eye


def evidence(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of a fine-tuning table: for each metric the paper, what is recorded here, and this run.

    Each row has "metric", "source" ("paper", "recorded here", "this run"), "network", "before" (an Estimate) and, for
    each (tau, eta) of the run (of the recorded ones without a run), a pair of Estimates (accuracy, change), or None
    where there is no evidence.
    """
    grid = list(columns_of(records or recorded))
    name = next(row["network"] for row in _paper_rows() if int(row["table"]) == table)
    rows = []
    for metric in METRICS:
        base = paper_value(1, name, metric)
        cells: dict[tuple[float, float], tuple[Estimate, Estimate] | None] = {}
        for tau, eta in grid:
            value = paper_value(table, name, metric, tau, eta)
            known = value is not None and base is not None
            cells[tau, eta] = (Estimate(value), Estimate(value - base)) if known else None  # type: ignore[arg-type,operator]
        before = None if base is None else Estimate(base)
        rows.append({"metric": metric, "source": "paper", "network": name, "before": before, "cells": cells})
        for source, those in (("recorded here", recorded), ("this run", records)):
            if source == "this run" and not records:
                continue
            by_column = columns_of(those)
            cells = {
                column: (accuracy(by_column[column], "after", metric), change(by_column[column], metric))
                if column in by_column
                else None
                for column in grid
            }
            # Records of other seeds share the baseline: one is enough.
            before = accuracy(those[:1], "before", metric) if those else None
            network = those[0]["network"]["name"] if those else records[0]["network"]["name"]
            rows.append({"metric": metric, "source": source, "network": network, "before": before, "cells": cells})
    return rows


def show_table(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """The fine-tuning table as Markdown: accuracy in per cent, in brackets the change against the baseline."""
    from IPython.display import Markdown

    grid = list(columns_of(records or recorded))
    lines = [
        " | ".join(["| Accuracy, %", "evidence", "baseline", *(f"τ = {tau:g}, η = {eta:g}" for tau, eta in grid)])
        + " |",
        "|---" * (3 + len(grid)) + "|",
    ]
    for row in evidence(table, records, recorded):
        cells = [
            f"**{METRICS[row['metric']]}**" if row["source"] == "paper" else "",
            f"{row['source']}: {_short(row['network'])}",
            "–" if row["before"] is None else row["before"].text(),
        ]
        for cell in row["cells"].values():
            cells.append("–" if cell is None else f"{cell[0].value:.2f} ({cell[1].text(signed=True)})")
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def _short(network: str) -> str:
    """The paper's own words for one of its networks, the name of any other."""
    return PAPER_NETWORKS[network]["paper"] if network in PAPER_NETWORKS else network


def describe(records: Sequence[Record], title: str) -> Any:
    """What was run, in one paragraph of Markdown: network, images, training, device, time, versions, code."""
    from IPython.display import Markdown

    if not records:
        return Markdown(f"**{title}.** Nothing is recorded for these parameters yet.")
    r = records[0]
    config, data, seconds = r["config"], r["data"], [x["seconds"] for x in records]
    seeds = sorted({x["config"]["seed"] for x in records})
    stand_in = r["network"]["name"] in STAND_INS
    epochs = "epoch" if config["epochs"] == 1 else "epochs"
    others = "".join(f", `{k}={config[k]}`" for k, usual in LATER.items() if config.get(k, usual) != usual)
    return Markdown(
        f"**{title}.** Network `{r['network']['name']}` ({r['network']['source']}"
        f"{'; a stand-in, none of the paper’s networks' if stand_in else ''}), {data['source']}: {data['train']:,} for"
        f" training, {data['val']:,} for validation, {data['test']:,} for test. {config['epochs']} {epochs} at"
        f" batch size {config['batch_size']}, `perturb={config['perturb']}`,"
        f" `consistency={config['consistency']}`{others},"
        f" β = {config['beta']:g}, δ = {255 * config['threat']['delta']:.4g}/255, {config['steps']} steps,"
        f" seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. On {r['device']}:"
        f" {sum(s['finetune'] for s in seconds) / len(seconds):.0f} s of fine-tuning and"
        f" {sum(s['evaluate'] for s in seconds) / len(seconds):.0f} s of evaluation a column, in the mean;"
        f" {seconds[0]['baseline']:.0f} s for the baseline. torch {r['versions']['torch']}, Python"
        f" {r['versions']['python']}, core {r['core'][:8]}."
    )


def model_card(record: Record, base: str, weights: str, known: str) -> str:
    """The model card of an exported network, in Markdown: what it is, how it was made, its numbers and its limits.

    Args:
        record: of the fine-tuning.
        base: the stand-in or network of RobustBench whose architecture it has.
        weights: the file of its weights, with SHA-256 `known`.
    """
    own = base in STAND_INS
    licence = "MIT" if own else next((v for k, v in LICENCES.items() if base.startswith(k)), "MIT")
    network, data, config = record["network"], record["data"], record["config"]
    rows = [
        f"| {label} | {accuracy([record], 'before', m).text()} | {accuracy([record], 'after', m).text()}"
        f" | {change([record], m).text(signed=True)} |"
        for m, label in METRICS.items()
    ]
    load = (
        "from wdat_networks import load_network  # of the companion\n\n"
        'model = load_network("path/to/this/folder", "models").model'
        if own
        else "from robustbench.utils import load_model  # 1.1.1 wants a module autoattack: pyautoattack is one\n\n"
        f'model = load_model("{base}", model_dir="path/to/this/folder", dataset="cifar10", threat_model="Linf")'
    )
    return f"""# {base}, fine-tuned

A classifier of CIFAR-10: `{network["name"]}` after Algorithm 1 of *Wasserstein Distributional Adversarial Training for
Deep Neural Networks* (arXiv 2502.09352). Images (b, 3, 32, 32) with values in [0, 1] go in, 10 logits come out.

```python
{load}
```

AutoAttack takes it as it is, with images that are `contiguous()`.

## How it was made

{describe([record], "The run").data}

| | |
|---|---|
| command | `{record["command"]}` |
| started from | `{network["name"]}`, {network["source"]}; SHA-256 `{network["digest"]}` |
| images | {data["source"]}; SHA-256 `{data["digest"]}` |
| weights | `{weights}`; SHA-256 `{known}` |
| epoch kept | {record["history"]["best"]} of {config["epochs"]}, the best on validation images under W₂ |
| code | `wdat_core.py`; SHA-256 `{record["core"]}` |
| finished | {record["created"]} |

The configuration, seed included:

```json
{json.dumps(config, indent=1)}
```

## Accuracy

In per cent, on {data["test"]:,} test images that training did not see. ± is half of a 95 % interval of sampling those
images, for a change that of the paired differences. It does not hold what another seed of the training would change.

| attack | before | after | change |
|---|---|---|---|
{chr(10).join(rows)}

## Limits

An accuracy under attack is an upper bound: a stronger attack, AutoAttack among them, may find less. The numbers are
for images like those of CIFAR-10, for perturbations of at most {255 * config["threat"]["delta"]:.4g}/255 in the l_inf
norm (pointwise, W∞; in the mean, W₂), and say nothing of other images, sizes or norms. Nothing here is fit to protect
people or property.

## Licence

{licence}{"" if own else f", as RobustBench has it for the weights of {base}, from which these derive"}.
"""


def verdicts(table: int, recorded: Sequence[Record]) -> Any:
    """What the recorded runs say about each column of the paper, by rule, as Markdown.

    A change counts as "up" or "down" where its 95 % interval leaves out 0, else as "not visible". The spread is that of
    the seeds, each measured on the same test images.
    """
    from IPython.display import Markdown

    if not recorded:
        return Markdown("No verdict: nothing is recorded for these parameters yet.")
    rows = {(r["metric"], r["source"]): r["cells"] for r in evidence(table, [], recorded)}
    lines = ["| column | accuracy | paper | recorded here | seeds | verdict |", "|---|---|---|---|---|---|"]
    for column, records in columns_of(recorded).items():
        for metric in ("w_2", "w_inf"):
            paper, here = rows[metric, "paper"][column], change(records, metric)
            spread = [change([r], metric).value for r in records]
            seeds = "1" if len(spread) == 1 else f"{len(spread)}: {min(spread):+.2f} to {max(spread):+.2f}"
            visible = abs(here.value) > (here.half or 0)
            lines.append(
                f"| τ = {column[0]:g}, η = {column[1]:g} | {METRICS[metric]} |"
                f" {paper[1].text(signed=True) if paper else '–'} | {here.text(signed=True)} | {seeds} |"
                f" {('up' if here.value > 0 else 'down') if visible else 'not visible'} |"
            )
    return Markdown("\n".join(lines))


def agreement(records: Sequence[Record], recorded: Sequence[Record], *, before: float, after: float) -> Any:
    """Whether this run agrees with the recorded ones, as a line of Markdown; tolerances in percentage points.

    Another machine rounds otherwise. Without training that moves single images at the decision boundary (`before`);
    training amplifies it as another seed would (`after`).

    Raises:
        AssertionError: an accuracy differs by more.
    """
    from IPython.display import Markdown

    by_column = columns_of(recorded)
    compared = [r for r in records if (r["config"]["tau"], r["config"]["eta"]) in by_column]
    for r in compared:
        column = (r["config"]["tau"], r["config"]["eta"])
        for when, tolerance in (("before", before), ("after", after)):
            for metric in METRICS:
                here, there = (accuracy(those, when, metric).value for those in ([r], by_column[column]))
                assert abs(here - there) <= tolerance, (
                    f"{metric} {when} fine-tuning at tau {column[0]:g}, eta {column[1]:g}: {here:.2f} % in this run,"
                    f" {there:.2f} % recorded, further apart than {tolerance:g} points"
                )
    if not compared:
        return Markdown("Nothing is recorded for these parameters: there is nothing to compare this run with.")
    return Markdown(
        f"This run agrees with the recorded ones in {len(compared)} of {len(records)} columns: within {before:g}"
        f" points before fine-tuning and {after:g} points after it."
        " (Another machine rounds otherwise, which training amplifies.)"
    )


def plot_changes(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> Figure:
    """Change of each accuracy against the baseline, in points: the paper, recorded here and this run, by column."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    grid = list(columns_of(records or recorded))
    rows = evidence(table, records, recorded)
    styles = {"paper": (PAPER, "D", 0.22), "recorded here": (RECORDED, "o", 0.0), "this run": (THIS_RUN, "s", -0.22)}
    figure, axes = plt.subplots(1, 3, figsize=(10, 1.4 + 0.75 * len(grid)), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for row in (r for r in rows if r["metric"] == metric):
            colour, marker, shift = styles[row["source"]]
            points = [(i, cell[1]) for i, cell in enumerate(row["cells"].values()) if cell]
            if not points:
                continue
            axis.errorbar(
                [e.value for _, e in points],
                [len(grid) - 1 - i + shift for i, _ in points],
                xerr=[e.half or 0 for _, e in points],
                fmt=marker, color=colour, markersize=6, capsize=3, label=f"{row['source']}: {_short(row['network'])}",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(f"{METRICS[metric]} accuracy")
        axis.set_xlabel("change, percentage points")
        axis.set_yticks(range(len(grid)), [f"τ = {tau:g}, η = {eta:g}" for tau, eta in reversed(grid)])
        axis.set_ylim(-0.6, len(grid) - 0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # the caller shows it, once
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory, drawn from the records of benchmarks/speed.py
# ---------------------------------------------------------------------------------------------------------------------


UNITS = {
    "time relative to the baseline": "times as long",
    "times as fast as the baseline": "times as fast",
    "multiple of the baseline": "times their size",
}


ESTIMATES = {"sample": "a fresh 10 % (the paper)", "batch": "the latest minibatches"}


def verdict(row: dict[str, Any]) -> str:
    """Whether a row of a benchmark meets its target, or by how much it misses it; empty without a target or a value."""
    if row["met"] is None:
        return ""
    return "met" if row["met"] else f"missed by {abs(row['ratio'] - float(row['target'].split()[-1])):.2f}"


def missing(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What a benchmark could not measure, by reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["ratio"] is None:
            found.setdefault(row["reason"], []).append(f"{row['name']} against {row['baseline']}")
    return {reason: list(dict.fromkeys(names)) for reason, names in found.items()}


def describe_benchmark(record: Record) -> Any:
    """Where and with what a benchmark ran, in one paragraph of Markdown."""
    from IPython.display import Markdown

    libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return Markdown(
        f"**{record['device']}.** Recorded {record['created'][:10]} by `{record['command']}` in"
        f" {record['seconds']['total'] / 60:.0f} min, rounds: {record['config']['rounds']}, after a warm-up."
        f" {libraries}, core {record['core'][:8]}."
    )


def benchmark_table(record: Record) -> Any:
    """The ratios of a benchmark as Markdown, a table for each group, and what could not be measured."""
    from IPython.display import Markdown

    measured: dict[str, list[str]] = {}
    for row in record["rows"]:
        if row["ratio"] is None:
            continue
        remarks = [f"{row['images']:,} images, batches of {row['batch_size']}"]
        if row["baseline_accuracy"] is not None:
            remarks.append(f"accuracy {100 * row['accuracy']:.1f} % against {100 * row['baseline_accuracy']:.1f} %")
        remarks += [row["note"]] if row["note"] else []
        spread = f" ({row['low']:.2f} to {row['high']:.2f})" if row["rounds"] > 1 else ""
        cells = [_symbols(row["name"]), row["network"], _symbols(row["baseline"])]
        cells += [f"**{row['ratio']:.2f}** {UNITS[row['unit']]}{spread}"]
        cells += [f"{row['target']}: {verdict(row)}" if row["target"] else "–", "; ".join(remarks)]
        measured.setdefault(row["group"], []).append("| " + " | ".join(cells) + " |")
    blocks = []
    for group, lines in measured.items():
        head = f"| {group} | network | against | ratio (spread) | target | remarks |"
        blocks.append("\n".join([head, "|---" * 6 + "|", *lines]))
    for reason, names in missing(record["rows"]).items():
        blocks.append(f"Not measured: {_symbols('; '.join(names))}. Reason: {reason}.")
    return Markdown("\n\n".join(blocks))


def throughput_table(record: Record) -> Any:
    """What a GPU attains in absolute numbers, as Markdown."""
    from IPython.display import Markdown

    if not record["throughput"]:
        return Markdown("Images a second, operations a second and minutes of training are measured on a GPU alone.")
    columns = {
        "images_per_second": "images attacked a second",
        "tflop_per_second": "TFLOP/s",
        "attack_gib": "attack, GiB",
        "iteration_seconds": "iteration of Algorithm 1, s",
        "training_gib": "training, GiB",
        "projected_minutes": "the paper's fine-tuning, minutes (projected)",
    }
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, figures in record["throughput"].items():
        cells = [f"{figures[key]:g}" if key in figures else "–" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def growth_table(record: Record) -> Any:
    """The points of `plot_growth` as Markdown."""
    from IPython.display import Markdown

    lines = ["| by | seconds | peak memory / images |", "|---|---|---|"]
    for axis in ("images", "steps", "epochs"):
        cells = ["; ".join(f"{x:,}: {y:.2f}" for x, y in record[key].get(axis, [])) for key in ("growth", "memory")]
        lines.append(f"| {axis} | " + " | ".join(cell or "–" for cell in cells) + " |")
    return Markdown("\n".join(lines))


def plot_ratios(record: Record) -> Figure:
    """The ratios of a benchmark with spread and target: times above, speeds below; at 1 is the baseline."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    panels = {unit: [r for r in record["rows"] if r["unit"] == unit and r["ratio"] is not None] for unit in UNITS}
    del panels["multiple of the baseline"]
    styles = {
        True: {"color": RECORDED, "fmt": "o", "label": "target met"},
        False: {"color": THIS_RUN, "fmt": "s", "label": "target missed"},
        None: {"color": PAPER, "fmt": "D", "label": "no target"},
    }
    heights = [max(1, len(rows)) for rows in panels.values()]
    size = (10, 2 + 0.5 * sum(heights))
    figure, axes = plt.subplots(2, 1, figsize=size, height_ratios=heights, layout="constrained")
    for axis, (unit, rows) in zip(axes, panels.items(), strict=True):
        for met, style in styles.items():
            points = [(len(rows) - 1 - i, r) for i, r in enumerate(rows) if r["met"] is met]
            spread = [[r["ratio"] - r["low"] for _, r in points], [r["high"] - r["ratio"] for _, r in points]]
            places = {"x": [r["ratio"] for _, r in points], "y": [y for y, _ in points], "xerr": spread}
            axis.errorbar(**places, **style, markersize=7, capsize=3)
            targets = [(float(r["target"].split()[-1]), y) for y, r in points if r["target"]]
            axis.plot(*zip(*targets, strict=True) if targets else ([], []), "|", color="black", markersize=18)
        axis.axvline(1, color="black", linewidth=1)
        labels = [_symbols(f"{r['name']}\nagainst {r['baseline']} · {r['network']}") for r in rows]
        axis.set_yticks(range(len(rows)), reversed(labels), fontsize=9)
        axis.set_ylim(-0.6, max(1, len(rows)) - 0.4)
        axis.set_xlabel(f"{unit} (a tick is the target)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


def plot_growth(record: Record) -> Figure:
    """Seconds, with a line through the origin, and peak memory by images, steps and epochs."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
    titles = {"images": "attack, by images", "steps": "attack, by steps", "epochs": "fine-tuning, by epochs"}
    highest = max((peak for points in record["memory"].values() for _, peak in points), default=1)
    for (top, bottom), (name, title) in zip(axes.T, titles.items(), strict=True):
        seconds, peaks = record["growth"].get(name, []), record["memory"].get(name, [])
        if seconds:
            slope = sum(x * y for x, y in seconds) / sum(x * x for x, _ in seconds)
            end = 1.1 * max(x for x, _ in seconds)
            top.plot([0, end], [0, slope * end], color=PAPER, linewidth=1)
            top.plot(*zip(*seconds, strict=True), "o", color=RECORDED, markersize=7)
        if peaks:
            bottom.plot(*zip(*peaks, strict=True), "s", color=THIS_RUN, markersize=7)
        top.set(title=title, xlabel=name, xlim=(0, None), ylim=(0, None))
        bottom.set(xlabel=name, xlim=(0, None), ylim=(0, 1.2 * highest))
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory / images")
    plt.close(figure)
    return figure


def precision_table(record: Record) -> Any:
    """Accuracy under attack in each precision, and how far from float32, as Markdown."""
    from IPython.display import Markdown

    exact = record["metrics"]["float32"]
    columns = ["", *METRICS.values(), "most apart", f"{METRICS['w_inf']}, seen in float32", "W₂, seen in float32"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for way, scores in record["metrics"].items():
        apart = 100 * max(abs(scores[m] - exact[m]) for m in METRICS)
        cells = [way, *(f"{100 * scores[m]:.2f}" for m in METRICS)]
        cells.append("" if way == "float32" else f"{apart:.2f}: {'met' if apart <= 0.1 else 'missed'}")
        cells += [f"{100 * scores['in_float32'][m]:.2f}" for m in ("w_inf", "w_2")]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(
        f"\nAccuracy in per cent on {record['data']['test']:,} test images of {record['data']['source']}, network"
        f" `{record['network']['name']}`, on {record['device']}; core {record['core'][:8]}; `{record['command']}`."
        " The target is 0.1 points."
    )
    return Markdown("\n".join(lines))


def upsilon_table(records: Sequence[Record]) -> Any:
    """The relative errors of two estimates of Upsilon along fine-tuning runs, as Markdown."""
    from statistics import median

    from IPython.display import Markdown

    lines = ["| run | estimate | median error | greatest | passes it costs |", "|---|---|---|---|---|"]
    for record in records:
        points, config = record["points"], record["config"]
        for name, title in ESTIMATES.items():
            errors = [100 * abs(v / w - 1) for v, w in zip(points[name], points["whole"], strict=True)]
            cost = "none" if name == "batch" else f"{config['sample'] * record['data']['train']:,.0f} a minibatch"
            lines.append(f"| τ = {config['tau']:g} | {title} | {median(errors):.0f} % | {max(errors):.0f} % | {cost} |")
    lines += [
        f"\nτ = {r['config']['tau']:g}: {len(r['points']['whole'])} minibatches of {r['config']['epochs']} epoch(s),"
        f" {r['data']['train']:,} images of {r['data']['source']}, network `{r['network']['name']}`, on {r['device']};"
        f" core {r['core'][:8]}; `{r['command']}`."
        for r in records
    ]
    return Markdown("\n".join(lines))


def plot_upsilon(records: Sequence[Record]) -> Figure:
    """Upsilon of the whole training set and its two estimates along fine-tuning runs."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(1, len(records), figsize=(10, 3.6), sharey=True, squeeze=False, layout="constrained")
    styles = {"whole": ("black", "-", "whole training set"), "sample": (RECORDED, "o", ESTIMATES["sample"])}
    styles["batch"] = (THIS_RUN, "s", ESTIMATES["batch"])
    for axis, record in zip(axes[0], records, strict=True):
        for name, (colour, style, label) in styles.items():
            axis.plot(record["points"]["minibatch"], record["points"][name], style, color=colour, label=label)
        axis.set(title=f"τ = {record['config']['tau']:g}", xlabel="minibatch", yscale="log")
    axes[0, 0].set_ylabel("Υ")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


def promises() -> list[dict[str, str]]:
    """What the project promises: "promise", "tests" (file::name; ...) and "figure", with {names}."""
    with (ASSETS / "promises.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def promises_table(record: Record | None) -> Any:
    """Each promise with its tests, and with the figures of a reliability record where there is one, as Markdown."""
    from IPython.display import Markdown

    lines = ["| promise | tests | figures |", "|---|---|---|"]
    for row in promises():
        tests = "<br>".join(f"`{test.strip()}`" for test in row["tests"].split(";"))
        figure = row["figure"].format(**record["figures"]) if record else ""
        lines.append(f"| {row['promise']} | {tests} | {figure or '–'} |")
    if record:
        figures = record["figures"]
        lines.append(
            f"\n{figures['tests'] - figures['skipped']} tests passed, {figures['skipped']} skipped (no GPU here),"
            f" in {record['seconds']['total'] / 60:.0f} minutes on {record['device']}; core {record['core'][:8]}, torch"
            f" {record['versions']['torch']}; `{record['command']}`."
        )
    return Markdown("\n".join(lines))


def _symbols(text: str) -> str:
    """The names of the attacks as the page writes them."""
    return text.replace("W_2", "W₂").replace("W_inf", "W∞").replace("Upsilon", "Υ")
