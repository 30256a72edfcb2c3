"""What records of every kind have, whatever was run. See kinds.py for each kind, and records.py for the files."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from companion.parts import DataPart, NetworkPart, Part
from companion.values import TEXT, Amount, Sha256, Text

SCHEMA: Final = 1


def images_of(record: Any, when: str) -> int:
    """How many images the accuracies "before" and "after", or those of a part of the data, are of."""
    return getattr(record.data, when, None) or record.data.test or 0


class Begun(Part):
    """What is known of a run before it starts, and tells it from other runs."""

    version: Literal[1] = Field(alias="schema")
    kind: str
    network: NetworkPart | None = None  # a benchmark has none of its own
    data: DataPart | None = None
    config: Any


class Record(Begun):
    """What a record of each kind has: what was run, where, with what, when, and by which command."""

    device: Text
    versions: dict[str, Text]
    core: Sha256
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    command: Annotated[str, StringConstraints(pattern=f"^(papermill|python) {TEXT}$")]
    seconds: dict[str, Amount]

    needs: ClassVar[tuple[str, ...]] = ()  # what the tables in it must hold, as "data.train"

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for needed in ("versions.python", "versions.torch", *self.needs):
            inside: Any = self
            for name in needed.split("."):
                inside = inside.get(name) if isinstance(inside, dict) else getattr(inside, name)
                if inside is None:
                    raise ValueError(f"{needed} is missing")
        return self

    def stored(self) -> dict[str, Any]:
        """The record as JSON can hold it: first what was run, then what was found, then where, when and how."""
        fields = self.model_dump(by_alias=True, exclude_unset=True)
        origin = ("seconds", "device", "versions", "core", "created", "command")
        return {**{k: v for k, v in fields.items() if k not in origin}, **{k: fields[k] for k in origin}}


class OfNetwork(Record):
    """A record of one network on some images."""

    network: NetworkPart
    data: DataPart
