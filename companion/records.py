"""Records: one JSON file a run, written last and whole, checked when read (kinds.py says what is in one)."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pydantic import ValidationError

from companion import files
from companion.bases import SCHEMA, Begun, Record
from companion.files import digest, one_line, try_to_write, write_whole
from companion.kinds import KINDS, FinetuneRecord
from companion.settings import ParameterError
from companion.values import plain
from wdat_core import FinetuneConfig

if TYPE_CHECKING:
    from companion.data import Data
    from companion.networks import Network

# What FinetuneConfig had when the first records were written. Every field that came later counts in `protocol` only
# where it is not as by default, so that older records stay comparable.
FIRST_FIELDS = (
    *("perturb", "tau", "eta", "beta", "gamma", "threat", "steps", "step_ratio", "epochs", "batch_size", "sample"),
    *("seed", "consistency", "attack_label", "attack_mode", "update_mode", "random_start", "noise", "reinit"),
    *("augment", "momentum", "weight_decay", "schedule", "first_upsilon"),
)
S = TypeVar("S", bound=Record)
LATER = {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.name not in FIRST_FIELDS}


def subject(network: Network, data: Data, *parts: str) -> dict[str, Any]:
    """What a record is about: the network, and the parts of the data that were used."""
    return {
        "network": {"name": network.name, "source": network.source, "digest": network.digest},
        "data": {"source": data.source, "digest": data.digest(*parts), **{p: len(getattr(data, p)[1]) for p in parts}},
    }


def make_record(fields: Mapping[str, Any]) -> Record:
    """A record of the kind that the fields name, checked.

    Args:
        fields: as they are in the JSON; a configuration may also be the object itself.

    Raises:
        ValueError: a field is missing, unknown, of a wrong type or impossible. The message names it.
    """
    kind = fields.get("kind")
    if fields.get("schema") != SCHEMA or not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"not a record of schema {SCHEMA}")
    try:
        return KINDS[kind].model_validate(fields)
    except ValidationError as error:
        raise ValueError(_in_words(error)) from error


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong: which field, and what it cannot be."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "extra_forbidden":
        return f"{name} is not known"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}".removeprefix(": ")
    return f"{name} cannot be {first['input']!r:.100}"


def parse_record(content: bytes) -> Record:
    """A stored record that is as it was written, and all of whose fields can be what they say they are.

    Raises:
        ValueError: it is damaged, partial, edited or foreign.
    """
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError(f"not a record of schema {SCHEMA}")
        if fields.get("schema") == SCHEMA and fields.pop("digest", None) != _seal(fields):
            raise ValueError("not as it was written: its digest is another")
        return make_record(fields)
    except (TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a record of schema {SCHEMA} ({one_line(error)})") from error


def record_bytes(record: Record | Mapping[str, Any]) -> bytes:
    """A record as it is stored: its last key is the digest of all the others, which `parse_record` takes off again."""
    fields = record.stored() if isinstance(record, Record) else dict(record)
    return (json.dumps({**fields, "digest": _seal(fields)}, indent=1, allow_nan=False) + "\n").encode()


def _seal(fields: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(fields, allow_nan=False))  # where every key is a text
    return digest(json.dumps(as_read, sort_keys=True).encode())


def write_record(record: Record | Mapping[str, Any], folder: Path) -> Path:
    """Write a record under the name its contents decide, whole or not at all.

    Raises:
        ParameterError: the folder cannot be written, or the disk is full.
        ValueError: the record is not one, see `make_record`.
    """
    record = record if isinstance(record, Record) else make_record(record)
    path = folder / record_name(record)
    with _writing(path):
        write_whole(path, record_bytes(record))
    return path


def check_writable(folder: Path) -> None:
    """Before a record is computed that could not be kept.

    Raises:
        ParameterError: the folder cannot be written.
    """
    with _writing(folder):
        try_to_write(folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ParameterError(
            f"{path} could not be written ({one_line(error)}): make room, or the folder writable, and run again"
        ) from error


def record_name(record: Begun) -> str:
    """The name of a record's file: what it is of, and which protocol it followed."""
    return f"{record_stem(record)}-{protocol(record)[:8]}.json"


def record_stem(record: Begun) -> str:
    """Kind, network (of a benchmark: device), perturbation, tau, eta and seed, as they begin the name of a file."""
    about = record.network.name if record.network else re.sub(r"\W+", "_", getattr(record, "device", ""))
    config = _config_of(record)
    what = [record.kind, about, config.get("perturb", "")]
    what += [f"{key}{str(config[key]).removesuffix('.0')}" for key in ("tau", "eta", "seed") if key in config]
    return "-".join(filter(None, what))


def protocol(record: Begun) -> str:
    """A digest of everything that decides a record's numbers but for tau, eta, the seed and rounding.

    A field that came with a later version counts only where it is not as before, so that older records stay comparable.
    """
    config = {k: v for k, v in _config_of(record).items() if k not in ("tau", "eta", "seed")}
    config = {k: v for k, v in config.items() if v != _later(record.config).get(k, ...)}
    parts = (part and part.model_dump(exclude_unset=True) for part in (record.network, record.data))
    return digest(json.dumps([record.kind, *parts, config], sort_keys=True).encode())


def _later(config: Any) -> dict[str, Any]:
    """The fields of a configuration that the first records did not have, with what was meant then."""
    if isinstance(config, FinetuneConfig):
        return plain(LATER)  # as `_config_of` has it
    return {name: field.default for name, field in type(config).model_fields.items() if not field.is_required()}


def _config_of(record: Begun) -> dict[str, Any]:
    """A configuration as it is stored."""
    config = record.config
    if isinstance(config, FinetuneConfig):
        return plain(dataclasses.asdict(config))
    return config.model_dump(exclude_unset=True)


@overload
def read_records(folder: Path = ...) -> list[FinetuneRecord]: ...
@overload
def read_records(folder: Path = ..., kind: str = ...) -> list[Any]: ...
def read_records(folder: Path | None = None, kind: str = "finetune") -> list[Any]:
    """The records of one kind in a folder, results/ by default. A damaged, partial or foreign file is named on stderr
    and skipped."""
    records = []
    for path in sorted((folder or files.RESULTS).glob("*.json")):
        if path.name == "cores.json":  # no record: see cores.py
            continue
        try:
            record = parse_record(path.read_bytes())
        except (OSError, ValueError) as error:
            print(f"skipped {path.name}: {one_line(error)}", file=sys.stderr)
            continue
        if record.kind == kind:
            records.append(record)
    return records


def newest_last(records: Sequence[S]) -> list[S]:
    """By the date on which they were made."""
    return sorted(records, key=lambda record: record.created)


def recorded_like(records: Sequence[Record], folder: Path = files.RESULTS) -> list[Any]:
    """The committed records of the same protocol: same network, data and configuration; any tau, eta and seed."""
    wanted = {protocol(r) for r in records}
    return [r for r in read_records(folder) if protocol(r) in wanted]
