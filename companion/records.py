"""Records: one JSON file a run, written last and whole, validated when read."""

from __future__ import annotations

import base64
import datetime
import fnmatch
import functools
import json
import math
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion import files
from companion.data import Data
from companion.files import digest, one_line, write_whole
from companion.settings import METRICS, STRONGER, ParameterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from companion.networks import Network

SCHEMA = 1
# What a record of each kind has to have: fields (* is any), each with the pattern of a text, the range of a whole
# number, the least and the most of any other number, or None for whatever is there. With a ? it may be missing.
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


_ATTACK: Rules = {"config.threat.delta": (0, 1), "config.steps": _COUNT, "config.precision": _TEXT}
_CURVES = (("test", "w_inf"), ("test", "w_2"), ("val", "w_inf"))
RULES: dict[str, Rules] = {
    "finetune": _TRAINED
    | _scores("before")
    | _scores("after")
    | {"seconds.baseline": _AMOUNT, "seconds.finetune": _AMOUNT, "seconds.evaluate": _AMOUNT}
    | {"history.upsilon.*": _AMOUNT, "history.epochs.*.clean": _FRACTION, "history.epochs.*.w_2": _FRACTION}
    | {f"history.{row}.{part}_{m}?": _FRACTION for row in ("start", "epochs.*") for part, m in _CURVES}
    | {f"history.{row}.{part}_upsilon?": _AMOUNT for row in ("start", "epochs.*") for part in ("test", "train")},
    "evaluate": _EVERY
    | _SUBJECT
    | _ATTACK
    | {"config.batch_size": _COUNT}
    | {"metrics.*": _FRACTION, "correct.*": ".+", "upsilon": _AMOUNT, "distance": _AMOUNT, "seconds.evaluate": _AMOUNT}
    | {f"metrics.*.{m}": _FRACTION for m in (*METRICS, "budget")},
    "sensitivity": _EVERY
    | _SUBJECT
    | {"config.threat.delta": (0, 1), "config.samples": _COUNT, "config.seed": range(2**63), "config.precision": _TEXT}
    | {"data.train": _COUNT, "reference": _AMOUNT, "estimates.*": _AMOUNT, "config.fraction": _FRACTION},
    "spend": _EVERY
    | _SUBJECT
    | _ATTACK
    | {"data.test": _COUNT, "label.*": range(1000), "distance.*": _AMOUNT}
    | {f"prediction.{name}.*": range(1000) for name in ("x", "w_inf", "w_2")},
    "stronger": _EVERY
    | _SUBJECT
    | {"config.threat.delta": (0, 1), "config.steps": _COUNT, "data.autoattack?": _COUNT, "data.test": _COUNT}
    | {"metrics.*.accuracy": _FRACTION, "correct.*.accuracy": ".+", "seconds.total": _AMOUNT}
    | {
        f"{part}.{name}.accuracy": rule
        for part, rule in (("metrics", _FRACTION), ("correct", ".+"))
        for name in STRONGER
    },
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


def subject(network: Network, data: Data, *parts: str) -> Record:
    """What a record is about: the network, and the parts of the data that were used."""
    return {
        "network": {"name": network.name, "source": network.source, "digest": network.digest},
        "data": {"source": data.source, "digest": data.digest(*parts), **{p: len(getattr(data, p)[1]) for p in parts}},
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


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it: infinity as a text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return "inf" if value == math.inf else value


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
    return digest((files.ROOT / "wdat_core.py").read_bytes().replace(b"\r\n", b"\n"))


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
    path = folder / record_name(record)
    try:
        write_whole(path, record_bytes(record))
    except OSError as error:
        message = f"the record {path} could not be written ({one_line(error)}): make room and run again"
        raise ParameterError(message) from error
    return path


def record_name(record: Record) -> str:
    """The name of a record's file: what it is of, and which protocol it followed."""
    return f"{record_stem(record)}-{protocol(record)[:8]}.json"


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
            pattern = field.removesuffix("?")
            found = {name: value for name, value in leaves.items() if fnmatch.fnmatchcase(name, pattern)}
            if not found and pattern == field:
                raise ValueError(f"{field} is missing")
            for name, value in found.items():
                if not _fits(value, rule):
                    raise ValueError(f"{name} cannot be {value!r}")
        if unfit := [
            k for k, v in leaves.items() if k.startswith("config.") and isinstance(v, str) and not _fits(v, _TEXT)
        ]:
            raise ValueError(f"{unfit[0]} cannot be {leaves[unfit[0]]!r}")
        _check_config(record)
        _check_bits(record)
        _check_lengths(record)
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
            n, value = images_of(record, when), record["metrics"][when][metric]
            if len(base64.b64decode(text, validate=True)) != math.ceil(n / 8):
                raise ValueError(f"correct.{when}.{metric} is not of {n} images")
            if not math.isclose(unpack(text, n).mean(), value, abs_tol=1e-6):
                raise ValueError(f"metrics.{when}.{metric} is {value!r}, and {unpack(text, n).mean()} of its images")


def _check_lengths(record: Record) -> None:
    """What is said of each image is said of all."""
    if record["kind"] == "spend":
        n = record["data"]["test"]
        lists = [record["label"], *record["prediction"].values(), *record["distance"].values()]
        if any(len(values) != n for values in lists) or not {"w_inf", "w_2"} <= record["distance"].keys():
            raise ValueError(f"it does not have the label, predictions and distances of {n} images")


def images_of(record: Record, when: str) -> int:
    """How many images the accuracies "before" and "after", or those of a part of the data, are of."""
    return record["data"].get(when, record["data"].get("test"))


def protocol(record: Record) -> str:
    """A digest of everything that decides a record's numbers but for tau, eta, the seed and rounding.

    A field that came with a later version counts only where it is not as before, so that older records stay comparable.
    """
    config = {k: v for k, v in record["config"].items() if k not in ("tau", "eta", "seed") and v != LATER.get(k, ...)}
    what = [record["kind"], record.get("network"), record.get("data"), config]
    return digest(json.dumps(what, sort_keys=True).encode())


def read_records(folder: Path = files.RESULTS, kind: str = "finetune") -> list[Record]:
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


def recorded_like(records: Sequence[Record], folder: Path = files.RESULTS) -> list[Record]:
    """The committed records of the same protocol: same network, data and configuration; any tau, eta and seed."""
    wanted = {protocol(r) for r in records}
    return [r for r in read_records(folder) if protocol(r) in wanted]
