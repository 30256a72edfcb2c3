"""What a record of each kind holds: a class for each, which checks it. See records.py for the files."""

from __future__ import annotations

import base64
import math
import re
import sys
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from companion.bases import OfNetwork, Record, images_of
from companion.parts import (
    AttackConfig,
    BenchmarkConfig,
    BoundaryPart,
    CertifiedConfig,
    ClusterConfig,
    ClusterFigures,
    EvaluateConfig,
    FirstOrderConfig,
    FirstOrderRow,
    FormerPretrainConfig,
    History,
    ObjectiveConfig,
    PrecisionConfig,
    ReliabilityConfig,
    ScaleConfig,
    SensitivityConfig,
)
from companion.settings import METRICS, STRONGER
from companion.values import (
    Amount,
    Bits,
    ConfigField,
    Distances,
    Fraction,
    Label,
    Scores,
    Text,
    Whole,
    accuracy_name,
    finetune_config,
    unpack,
    unpack_floats,
)


def _of_images(name: str, distances: str, n: int) -> None:
    if len(base64.b64decode(distances)) != 4 * n:
        raise ValueError(f"{name} is not of {n} images")


class Scored(OfNetwork):
    """With accuracies, and the images that each of them is the mean of."""

    metrics: Scores
    correct: Bits
    boundary: BoundaryPart | None = None

    @model_validator(mode="after")
    def _a_distance_for_each_image(self) -> Self:
        for when, text in self.boundary.distance.items() if self.boundary else ():
            _of_images(f"boundary.distance.{when}", text, images_of(self, when))
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
    def _best_is_one_of_the_epochs(self) -> Self:
        if not self.history.best <= len(self.history.epochs):
            raise ValueError(f"history.best is {self.history.best}, of {len(self.history.epochs)} epochs")
        return self

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


class DivergedRecord(OfNetwork):
    """Of a fine-tuning that has no accuracies, since a number was no longer finite; `message` says where it ended."""

    kind: Literal["diverged"]
    config: ConfigField
    message: Text

    needs = ("data.train", "data.val", "data.test", "seconds.total")


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
            if getattr(self.data, part, None) is None:
                raise ValueError(f"data.{part} is missing")
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


class ObjectiveRecord(OfNetwork):
    """Of a network trained further, with the distances of its validation and test images; accuracies follow."""

    kind: Literal["objective"]
    config: ObjectiveConfig
    history: History
    boundary: BoundaryPart

    needs = ("data.train", "data.val", "data.test", "seconds.train", "seconds.evaluate")

    @model_validator(mode="after")
    def _a_distance_for_each_image(self) -> Self:
        if self.boundary.distance.keys() != {"val", "test"}:
            raise ValueError("boundary.distance is not of the validation and the test images")
        for part, text in self.boundary.distance.items():
            _of_images(f"boundary.distance.{part}", text, images_of(self, part))
        return self


class SensitivityRecord(OfNetwork):
    """Upsilon of the training set, `reference`, and of random parts of it."""

    kind: Literal["sensitivity"]
    config: SensitivityConfig
    reference: Amount
    estimates: Annotated[list[Amount], Field(min_length=1)]

    needs = ("data.train",)


class FirstOrderRecord(OfNetwork):
    """The greatest mean loss that W-PGD reaches at several radii, beside what first order says."""

    kind: Literal["first_order"]
    config: FirstOrderConfig
    rows: Annotated[list[FirstOrderRow], Field(min_length=1)]

    needs = ("data.test", "seconds.total")

    @model_validator(mode="after")
    def _a_value_for_each_radius(self) -> Self:
        if any(len(row.values) != len(self.config.fractions) for row in self.rows):
            raise ValueError("a row does not have a value for each radius")
        return self


class SpendRecord(OfNetwork):
    """For each image its label, the prediction before and after each attack, and how far each attack moved it.

    Later ones have in `boundary` the distance to the nearest misclassified image found, "test"; and in `prediction`
    what that one is read as, "found".
    """

    kind: Literal["spend"]
    config: AttackConfig
    label: list[Label]
    prediction: dict[str, list[Label]]
    distance: dict[str, list[Amount]]
    boundary: BoundaryPart | None = None

    needs = ("data.test", "prediction.x", "prediction.w_inf", "prediction.w_2", "distance.w_inf", "distance.w_2")

    @model_validator(mode="after")
    def _each_list_is_of_all_images(self) -> Self:
        lists: list[Any] = [self.label, *self.prediction.values(), *self.distance.values()]
        if any(len(values) != self.data.test for values in lists):
            raise ValueError(f"it does not have the label, predictions and distances of {self.data.test} images")
        return self

    @model_validator(mode="after")
    def _what_was_found_is_of_all_images(self) -> Self:
        if ("found" in self.prediction) != (self.boundary is not None):
            raise ValueError("of boundary and prediction.found it has one without the other")
        if self.boundary:
            if self.boundary.distance.keys() != {"test"}:
                raise ValueError("boundary.distance is not of the test images alone")
            _of_images("boundary.distance.test", self.boundary.distance["test"], images_of(self, "test"))
        return self


class CertifiedRecord(OfNetwork):
    """For each image a distance below which it is proved that no image is misclassified; 0 where nothing is proved."""

    kind: Literal["certified"]
    config: CertifiedConfig
    distance: Distances

    needs = ("data.test", "seconds.total")

    @model_validator(mode="after")
    def _a_distance_for_each_image(self) -> Self:
        _of_images("distance", self.distance, images_of(self, "test"))
        if len(far := unpack_floats(self.distance)) and far.max() > self.config.most * (1 + 1e-6):  # float32
            raise ValueError(f"a distance is above {self.config.most!r}, the greatest that was tried")
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


class ClusterRecord(Record):
    kind: Literal["cluster"]
    config: ClusterConfig
    figures: ClusterFigures

    needs = ("versions.slurm", "versions.snakemake", "seconds.total")


class BenchmarkRecord(Record):
    """What benchmarks/speed.py measured; its tables are as it made them."""

    kind: Literal["benchmark"]
    config: BenchmarkConfig
    rows: list[dict[str, Any]]
    memory: dict[str, Any]
    growth: dict[str, Any]
    throughput: dict[str, Any]
    worst: dict[str, Any] = Field(default_factory=dict)  # not in the first ones, as the next
    rest: dict[str, dict[str, float]] = Field(default_factory=dict)

    needs = ("seconds.total",)

    @property
    def is_quick(self) -> bool:
        """Whether it was made with --quick, whose figures say nothing."""
        return bool(self.config.model_dump().get("quick"))


class ScaleRecord(Record):
    """What benchmarks/scale.py measured, as it made it."""

    kind: Literal["scale"]
    config: ScaleConfig
    rows: list[dict[str, Any]]
    figures: dict[str, Any]

    needs = ("seconds.total",)


KINDS: dict[str, type[Record]] = {
    "finetune": FinetuneRecord,
    "diverged": DivergedRecord,
    "evaluate": EvaluateRecord,
    "sensitivity": SensitivityRecord,
    "first_order": FirstOrderRecord,
    "spend": SpendRecord,
    "stronger": StrongerRecord,
    "objective": ObjectiveRecord,
    "certified": CertifiedRecord,
    "pretrain": PretrainRecord,
    "precision": PrecisionRecord,
    "upsilon": UpsilonRecord,
    "reliability": ReliabilityRecord,
    "cluster": ClusterRecord,
    "benchmark": BenchmarkRecord,
    "scale": ScaleRecord,
}
