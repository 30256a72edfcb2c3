"""A record as it is not: for tests of what draws on records. Nothing checks it; what it says need not be so."""

import dataclasses

from pydantic import BaseModel

from companion import files
from companion.records import parse_record


def recorded(pattern):
    """The first committed record whose file has such a name."""
    return parse_record(min(files.RESULTS.glob(pattern)).read_bytes())


def altered(record, config=None, history=None, **parts):
    """The record with other parts: of a configuration, a history or a part other fields, of a table other entries."""
    parts |= {name: fields for name, fields in (("config", config), ("history", history)) if fields}
    return record.model_copy(update={name: _altered(getattr(record, name), value) for name, value in parts.items()})


def _altered(old, value):
    if not isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(old):
        return dataclasses.replace(old, **value)
    return old.model_copy(update=value) if isinstance(old, BaseModel) else old | value
