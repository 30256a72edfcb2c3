"""What records are made of: the parts that several kinds have, and their configurations. See kinds.py for the kinds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from companion.values import Amount, Count, Distances, Fraction, Seed, Sha256, Text, ThreatField, Value, Whole


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


class CertifiedConfig(Part):
    """Of distances within which no image is misclassified: their norm, the greatest that was tried, the proof."""

    norm: Literal["Linf", "L2"]
    most: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bisections: Count
    method: Text


class ObjectiveConfig(Part):
    """Of a network trained for one objective or another: see objectives.py, and `wdat_core.FinetuneConfig`.

    Fields with a default came later than the first records, which read as if they had it.
    """

    objective: Text
    threat: ThreatField
    beta: Amount
    tau: Amount
    eta: Fraction
    clip: Amount
    perturb: Text
    steps: Count
    epochs: Count
    batch_size: Count
    found_steps: Count
    seed: Seed
    gamma: Amount = 0.0  # of the pointwise term, eq. 5.6
    schedule: Text = "constant"
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: Amount = 0.0
    upsilon_from: Text = "sample"
    loss: Text = "redlr"  # of the distributional attack


class FirstOrderConfig(Part):
    """Of V at several radii: fractions of that of each threat, for each loss."""

    steps: Count
    fractions: Annotated[list[Fraction], Field(min_length=1)]
    losses: list[Text]
    threats: list[ThreatField]


class FirstOrderRow(Part):
    """For one threat and loss: Upsilon, V(0), and V at the fractions of the radius."""

    threat: ThreatField
    loss: Text
    upsilon: Amount
    start: Value
    values: list[Value]


class ReliabilityConfig(Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Whole]


class ClusterConfig(Part):
    columns: Count
    partitions: Count


class ClusterFigures(Part):
    """How many columns finished and were compared, what was killed, and how many jobs were started again after it."""

    finished: Whole
    jobs_killed: Whole
    controller_restarts: Whole
    restarts: Whole
    compared: Count


class BenchmarkConfig(Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | Text | list[Text]]

    rounds: Count


class ScaleConfig(Part):
    """Of benchmarks/scale.py."""

    rounds: Count
    lap: Count
    epochs: Count
    images: Count
    steps: Count
    distances: Annotated[int, Field(ge=1)]  # up to thousands of millions


class History(Part):
    """`epochs`: a row for each epoch, see `wdat_core.History`; `start`: the same of the network before it."""

    epochs: Annotated[list[dict[str, Any]], Field(min_length=1)]
    best: Count
    upsilon: list[Amount] | None = None
    start: dict[str, Any] | None = None
