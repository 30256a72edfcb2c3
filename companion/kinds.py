"""What a record of each kind holds: a class for each, which checks it. See records.py for the files."""

from __future__ import annotations

import base64
import math
import re
import sys
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from companion.settings import METRICS, STRONGER
from companion.values import (
    TEXT,
    Amount,
    Bits,
    ConfigField,
    Count,
    Distances,
    Fraction,
    Label,
    Scores,
    Seed,
    Sha256,
    Text,
    ThreatField,
    Whole,
    finetune_config,
    unpack,
)
from wdat_core import Threat

SCHEMA: Final = 1

# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    """Strict: a wrong type, a name that is not known and a number that is none are refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", arbitrary_types_allowed=True)


class NetworkPart(Part):
    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    source: Text
    digest: Sha256


class DataPart(Part):
    """The images of a run: how many of each part, None for a part that was not used."""

    source: Text
    digest: Sha256
    train: Count | None = None
    val: Whole | None = None
    test: Count | None = None
    autoattack: Count | None = None  # how many of the test images, from the first one on


class OfAttack(Part):
    threat: ThreatField
    precision: Text = "float32"
    compiled: bool = False
    loss: Text = "redlr"  # of the distributional attack


class AttackConfig(OfAttack):
    steps: Count


class EvaluateConfig(AttackConfig):
    batch_size: Count


class SensitivityConfig(OfAttack):
    samples: Count
    fraction: Fraction
    seed: Seed


class PrecisionConfig(Part):
    batch_size: Count
    steps: Count
    delta: Fraction


class FormerPretrainConfig(Part):
    """Of the trainer that pre-trained the first stand-ins, and that wdat_core had until version 0.2."""

    method: Literal["trades", "pgd"] | None = None  # None: TRADES, before there was another
    threat: ThreatField
    beta: Amount
    steps: Count
    step_ratio: Amount
    epochs: Count
    batch_size: Count
    rate: Amount
    warm_up: Fraction
    momentum: Fraction
    weight_decay: Amount
    average: Fraction
    augment: bool
    precision: Text
    compiled: bool = False
    seed: Seed


class BoundaryPart(Part):
    """Distances to the nearest misclassified image that `wdat_core.boundary` found, and which code found them where.

    `distance` has them of the images that accuracies "before" and "after", or of a part of the data, are of.
    """

    steps: Count
    core: Sha256
    device: Text
    distance: dict[str, Distances]


class ReliabilityConfig(Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Whole]


class BenchmarkConfig(Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | Text | list[Text]]

    rounds: Count


class History(Part):
    """`epochs`: a row for each epoch, see `wdat_core.History`; `start`: the same of the network before it."""

    epochs: Annotated[list[dict[str, Any]], Field(min_length=1)]
    best: Count
    upsilon: list[Amount] | None = None
    start: dict[str, Any] | None = None


def accuracy_name(threat: Threat) -> str:
    """The name in a history of the accuracy under a threat: "w_2", "w_inf", "w_4"."""
    return f"w_{threat.p:g}"


def images_of(record: Any, when: str) -> int:
    """How many images the accuracies "before" and "after", or those of a part of the data, are of."""
    return getattr(record.data, when, None) or record.data.test or 0


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


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


class Scored(OfNetwork):
    """With accuracies, and the images that each of them is the mean of."""

    metrics: Scores
    correct: Bits
    boundary: BoundaryPart | None = None

    @model_validator(mode="after")
    def _a_distance_for_each_image(self) -> Self:
        for when, text in self.boundary.distance.items() if self.boundary else ():
            if len(base64.b64decode(text)) != 4 * images_of(self, when):
                raise ValueError(f"boundary.distance.{when} is not of {images_of(self, when)} images")
        return self

    @model_validator(mode="after")
    def _bits_are_those_of_the_accuracies(self) -> Self:
        for when, packed in self.correct.items():
            for metric, text in packed.items():
                n, value = images_of(self, when), self.metrics.get(when, {}).get(metric)
                if value is None:
                    raise ValueError(f"metrics.{when}.{metric} is missing")
                if len(base64.b64decode(text, validate=True)) != math.ceil(n / 8):
                    raise ValueError(f"correct.{when}.{metric} is not of {n} images")
                if not math.isclose(mean := unpack(text, n).mean(), value, abs_tol=1e-6):
                    raise ValueError(f"metrics.{when}.{metric} is {value!r}, and {mean} of its images")
        return self


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for part in ("metrics", "correct") for name in names)


class Trained(Scored):
    """Of a training run: Algorithm 1, or the pre-training of a stand-in."""

    history: History

    needs = ("data.train", "data.val", "data.test", *_both(*(f"after.{m}" for m in METRICS)))

    @model_validator(mode="after")
    def _history_is_of_this_run(self) -> Self:
        rows = [(f"history.epochs.{i}", row, 1) for i, row in enumerate(self.history.epochs)]
        if self.history.start is not None:
            rows.append(("history.start", self.history.start, 0))
        for where, row, least in rows:
            for name in self._columns() if least else ("epoch",):
                if name not in row:
                    raise ValueError(f"{where}.{name} is missing")
            for name, value in row.items():
                most = 1 if name == "clean" or re.search(r"(^|_)w_(inf|\d)", name) else sys.float_info.max
                whole = name != "epoch" or (type(value) is int and value >= least)
                if type(value) not in (int, float) or not 0 <= value <= most or not whole:
                    raise ValueError(f"{where}.{name} cannot be {value!r}")
        return self

    def _columns(self) -> tuple[str, ...]:
        """What each epoch has a value of."""
        return ("epoch", "loss")


class FinetuneRecord(Trained):
    kind: Literal["finetune"]
    config: ConfigField

    needs = (
        *Trained.needs,
        *_both(*(f"before.{m}" for m in METRICS)),
        *("seconds.baseline", "seconds.finetune", "seconds.evaluate", "history.upsilon"),
    )

    def _columns(self) -> tuple[str, ...]:
        return ("epoch", "loss", "clean", accuracy_name(self.config.threat))


class PretrainRecord(Trained):
    kind: Literal["pretrain"]
    config: FormerPretrainConfig | ConfigField

    @model_validator(mode="before")
    @classmethod
    def _one_of_two_trainers(cls, value: dict[str, Any]) -> dict[str, Any]:
        config = value.get("config")
        if isinstance(config, dict):
            made = FormerPretrainConfig.model_validate if "rate" in config else finetune_config
            return {**value, "config": made(config)}
        return value


class EvaluateRecord(Scored):
    """Of a network as it is. `distance` is that of the attack in batches; `upsilon` of the attacked images."""

    kind: Literal["evaluate"]
    config: EvaluateConfig
    upsilon: Amount
    distance: Amount

    needs = ("seconds.evaluate",)

    @model_validator(mode="after")
    def _each_attack_was_made(self) -> Self:
        for part, scores in self.metrics.items():
            for metric in (*METRICS, "budget"):
                if metric not in scores or metric not in self.correct.get(part, {}):
                    raise ValueError(f"metrics.{part}.{metric} or its images are missing")
        if not self.metrics:
            raise ValueError("metrics is empty")
        return self


class StrongerRecord(Scored):
    kind: Literal["stronger"]
    config: AttackConfig

    needs = ("data.test", "seconds.total", *_both(*(f"{name}.accuracy" for name in STRONGER)))


class SensitivityRecord(OfNetwork):
    """Upsilon of the training set, `reference`, and of random parts of it."""

    kind: Literal["sensitivity"]
    config: SensitivityConfig
    reference: Amount
    estimates: Annotated[list[Amount], Field(min_length=1)]

    needs = ("data.train",)


class SpendRecord(OfNetwork):
    """For each image its label, the prediction before and after each attack, and how far each attack moved it."""

    kind: Literal["spend"]
    config: AttackConfig
    label: list[Label]
    prediction: dict[str, list[Label]]
    distance: dict[str, list[Amount]]

    needs = ("data.test", "prediction.x", "prediction.w_inf", "prediction.w_2", "distance.w_inf", "distance.w_2")

    @model_validator(mode="after")
    def _each_list_is_of_all_images(self) -> Self:
        lists: list[Any] = [self.label, *self.prediction.values(), *self.distance.values()]
        if any(len(values) != self.data.test for values in lists):
            raise ValueError(f"it does not have the label, predictions and distances of {self.data.test} images")
        return self


class PrecisionRecord(OfNetwork):
    kind: Literal["precision"]
    config: PrecisionConfig
    metrics: dict[str, dict[str, Fraction | dict[str, Fraction]]]

    needs = ("data.test",)


class UpsilonRecord(OfNetwork):
    kind: Literal["upsilon"]
    config: ConfigField
    points: Annotated[dict[str, list[Amount]], Field(min_length=1)]

    needs = ("data.train",)


class ReliabilityRecord(Record):
    kind: Literal["reliability"]
    config: ReliabilityConfig
    figures: dict[str, Whole]

    needs = ("figures.tests", "seconds.total")


class BenchmarkRecord(Record):
    """What benchmarks/speed.py measured; its tables are as it made them."""

    kind: Literal["benchmark"]
    config: BenchmarkConfig
    rows: list[dict[str, Any]]
    memory: dict[str, Any]
    growth: dict[str, Any]
    throughput: dict[str, Any]
    worst: dict[str, Any] = {}  # not in the first ones
    needs = ("seconds.total",)


KINDS: dict[str, type[Record]] = {
    "finetune": FinetuneRecord,
    "evaluate": EvaluateRecord,
    "sensitivity": SensitivityRecord,
    "spend": SpendRecord,
    "stronger": StrongerRecord,
    "pretrain": PretrainRecord,
    "precision": PrecisionRecord,
    "upsilon": UpsilonRecord,
    "reliability": ReliabilityRecord,
    "benchmark": BenchmarkRecord,
}
