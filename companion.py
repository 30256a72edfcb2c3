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
import functools
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Sequence
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
        folder = _from_root(str(settings.data))
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
        index = json.loads((ASSETS / "images.json").read_text(encoding="utf-8"))[part]
        sheet = np.asarray(Image.open(path).convert("RGB"))
        if digest(sheet.tobytes()) != index["digest"]:
            raise OSError("its pixels are not those that were stored")
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"{path} or images.json beside it is damaged or missing: restore both from the repository"
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
        dataset = CIFAR10(str(folder), train=train, download=True)  # checks md5 sums before it unpickles
    except Exception as error:  # urllib, tarfile, pickle and the file system each have their own
        raise ParameterError(
            f"CIFAR-10 is not in {folder} and could not be put there ({one_line(error)}): place"
            " cifar-10-python.tar.gz or the folder cifar-10-batches-py there, or use the embedded images (preset demo)"
        ) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def _from_root(path: str) -> Path:
    """A path given to a notebook; relative ones start at the repository, wherever the notebook runs."""
    return ROOT / Path(path).expanduser()


def one_line(error: BaseException) -> str:
    """An error of another library on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def digest(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Runs and records
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = 1
KEYS = {
    "schema", "kind", "network", "data", "config", "metrics", "correct", "history",
    "seconds", "device", "versions", "core", "created", "command",
}  # fmt: skip
LATER = {"upsilon_from": "sample", "precision": "float32", "compiled": False}  # fields of a later version, as before
Record = dict[str, Any]


def finetune_grid(settings: Settings, perturb: str, *, notebook: str) -> list[Record]:
    """One record for each (tau, eta) of the settings: Algorithm 1 and the three accuracies before and after it.

    Every record is written to runs/ as soon as its column is done. The network is fine-tuned anew for each column.

    Args:
        perturb: "whole" or "last_layer".
        notebook: the name of the notebook that computes it, for the command in the record.

    Raises:
        ParameterError: network or data are not to be had (see `load_network`, `load_data`), or the loaded network's
            clean accuracy is not the published one.
    """
    from wdat_core import FinetuneConfig, Threat, evaluate, finetune
    from wdat_networks import load_network

    core = core_digest()
    device = pick_device(settings.device)
    network = load_network(str(settings.network), _from_root(settings.models))
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
        begin = time.perf_counter()
        history = finetune(tuned, data.train, data.val, config, eval_batch_size=batch, progress=progress(label))
        middle = time.perf_counter()
        after = evaluate(tuned, *data.test, **options, batch_size=batch, progress=progress(label))
        seconds = {
            "baseline": baseline_seconds,
            "finetune": middle - begin,
            "evaluate": time.perf_counter() - middle,
        }
        scores = {"before": before, "after": after}
        record = {
            "schema": SCHEMA,
            "kind": "finetune",
            "network": {"name": network.name, "source": network.source, "digest": network.digest},
            "data": {
                "source": data.source,
                "digest": data.digest,
                **{part: len(getattr(data, part)[1]) for part in ("train", "val", "test")},
            },
            "config": plain(dataclasses.asdict(config)),
            "metrics": {when: {m: getattr(s, m) for m in METRICS} for when, s in scores.items()},
            "correct": {when: {m: pack(s.correct[m]) for m in METRICS} for when, s in scores.items()},
            "history": {"epochs": history.epochs, "best": history.best, "upsilon": history.upsilon},
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "device": device_name(device),
            "versions": versions(),
            "core": core,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": _command(settings, notebook, tau, eta),
        }
        write_record(record, RUNS)
        records.append(record)
    return records


def _command(settings: Settings, notebook: str, tau: float, eta: float) -> str:
    """The papermill line that computes this column again; a folder for CIFAR-10 is called data."""
    defaults = {**dataclasses.asdict(Settings()), **PRESETS[settings.preset]}
    column = dataclasses.replace(settings, tau=tau, eta=eta, data="embedded" if settings.data == "embedded" else "data")
    given = {k: v for k, v in dataclasses.asdict(column).items() if v != defaults[k] and k not in ("device", "models")}
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
    config = record["config"]
    what = [record["kind"], record["network"]["name"], config.get("perturb", "")]
    what += [f"{key}{config[key]:g}" for key in ("tau", "eta", "seed") if key in config]
    path = folder / f"{'-'.join(filter(None, what))}-{protocol(record)[:8]}.json"
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        message = f"the record {path} could not be written ({one_line(error)}): make room and run again"
        raise ParameterError(message) from error
    return path


def protocol(record: Record) -> str:
    """A digest of everything that decides a record's numbers but for tau, eta, the seed and rounding.

    A field that came with a later version counts only where it is not as before, so that older records stay comparable.
    """
    config = {k: v for k, v in record["config"].items() if k not in ("tau", "eta", "seed") and v != LATER.get(k, ...)}
    what = [record["kind"], record["network"], record["data"], config]
    return digest(json.dumps(what, sort_keys=True).encode())


def read_records(folder: Path = RESULTS, kind: str = "finetune") -> list[Record]:
    """The records of one kind in a folder. A damaged, partial or foreign file is named on stderr and skipped."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("schema") != SCHEMA or not set(record) >= KEYS:
                raise ValueError(f"not a record of schema {SCHEMA}")
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
    with (ASSETS / "paper.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
