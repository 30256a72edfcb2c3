"""Estimates with 95 % intervals: of accuracies and changes over test images, and of medians; and where they lie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from companion.bases import Record, images_of
from companion.kinds import ObjectiveRecord, Scored, SpendRecord, unpack
from companion.settings import FOUND
from companion.values import unpack_floats
from wdat_core import Boundary, Threat

S = TypeVar("S", bound=Scored)


@dataclass(frozen=True)
class Estimate:
    """An accuracy or a change of accuracy in per cent, with half the width of its 95 % interval (None: not known)."""

    value: float
    half: float | None = None

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.value - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.value + self.half

    def text(self, signed: bool = False) -> str:
        value = f"{self.value:{'+' if signed else ''}z.2f}"
        return value if self.half is None else f"{value}\u00a0±\u00a0{self.half:.2f}"  # not to be broken


def estimate_of(per_seed: Sequence[Any]) -> Estimate:
    """The mean in per cent of what each image contributes, arrays (n,) of the seeds, and the interval over images.

    Where all images contribute the same, up to 3 in n others may be like another one (the rule of three): 300 / n.
    """
    import numpy as np

    values, n = 100 * np.mean(per_seed, axis=0), len(per_seed[0])
    if n == 1:
        return Estimate(float(values.mean()))
    half = float(1.96 * values.std(ddof=1) / math.sqrt(n)) if np.ptp(values) else 300 / n
    return Estimate(float(values.mean()), half)


def bits(record: Scored, when: str, metric: str) -> Any:
    """Whether each image is classified correctly, a numpy array (n,) of 0 and 1; of `found_at` what it adds: `shares`.

    Raises:
        KeyError: the record does not have it.
    """
    if is_found(metric):
        return shares(record, when, _ball(metric, record.config.threat))
    return unpack(record.correct[when][metric], images_of(record, when))


def _ball(metric: str, threat: Threat) -> Threat:
    """The ball of a metric that comes from distances, of a record that was attacked with a threat."""
    if metric in FOUND:
        return replace(threat, p=2, delta=threat.delta / (2 if metric == "w_2_found_half" else 1))
    _, p, delta = metric.split(":")
    return replace(threat, p=float(p), delta=float(delta) / 255)


def shares(record: Scored | ObjectiveRecord, when: str, threat: Threat) -> Any:
    """What each image adds to the lowest accuracy found in the ball, a numpy array (n,): see `Boundary.shares`.

    Raises:
        KeyError: the record has no distances of these images.
    """
    return boundary_of(record, when).shares(threat).numpy()


def boundary_of(record: Scored | SpendRecord | ObjectiveRecord, when: str) -> Boundary:
    """The distances of the images of a record.

    Raises:
        KeyError: the record has none.
    """
    import torch

    if not has_found(record, when):
        raise KeyError(when)
    assert record.boundary is not None
    distance = torch.from_numpy(unpack_floats(record.boundary.distance[when]))
    return Boundary(distance, record.config.threat.r)


def has_found(record: Record, *when: str) -> bool:
    """Whether a record has the distances of these images."""
    boundary = getattr(record, "boundary", None)
    return boundary is not None and boundary.distance.keys() >= set(when)


def found_at(p: float, delta: float) -> str:
    """The name, as `bits` takes it, of the lowest accuracy found in the W_p ball of radius delta / 255."""
    return f"found:{p:g}:{delta:g}"


def is_found(metric: str) -> bool:
    """Whether a metric comes from distances; those of `FOUND` are `found_at` 2 and the record's radius, or its half."""
    return metric in FOUND or metric.startswith("found:")


def search_of(record: Any) -> int:
    """How many gradients an image the search for its worst case took; 0 where there was none."""
    return record.boundary.steps if record.boundary else 0


def with_metrics(records: Sequence[S], metrics: Sequence[str], *when: str) -> list[S]:
    """Those of the records that have the metrics; distances not all have."""
    return [r for r in records if not any(map(is_found, metrics)) or has_found(r, *when)]


def accuracy(records: Sequence[Scored], when: str, metric: str) -> Estimate:
    """Mean over records that differ in the seed alone, with the interval of sampling test images."""
    return estimate_of([bits(r, when, metric) for r in records])


def change(records: Sequence[Scored], metric: str) -> Estimate:
    """Accuracy after minus before on the same images, mean over seeds, with the interval of the paired differences."""
    return estimate_of([bits(r, "after", metric) - bits(r, "before", metric) for r in records])


def change_of_each(records: Sequence[Scored], metric: str) -> list[float]:
    """The change of each record alone, in points."""
    return [change([record], metric).value for record in records]


def median_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The median, and its interval from the k-th smallest to the k-th largest value, of at least 95 %.

    It assumes independent values and nothing else. Below 6 values there is none.
    """
    ordered, n = sorted(values), len(values)
    k, term, tail = 0, 1, 1  # tail / 2^n: the probability that at most k of n values fall below the median
    while 40 * tail <= 2**n:
        k += 1
        term = term * (n - k + 1) // k
        tail += term
    median = statistics.median(ordered)
    return (median, ordered[k - 1], ordered[n - k]) if k else (median, None, None)


def side(low: float | None, high: float | None, seeds: Sequence[float] = (), line: float = 0.0) -> str:
    """Where something lies wholly, "above" or "below" a line: its interval and the value of every seed. "" else."""
    if low is None or high is None:
        return ""
    if min(low, *seeds, math.inf) > line:
        return "above"
    return "below" if max(high, *seeds, -math.inf) < line else ""


def outcome_of_change(printed: float, records: Sequence[Scored], metric: str) -> str:
    """Whether a change of the paper, in points, is there in records of the seeds: on the same side of 0, visibly."""
    here = change(records, metric)
    where = side(here.low, here.high, change_of_each(records, metric))
    if not where:
        return "not visible"
    return "holds" if where == ("above" if printed > 0 else "below") else "contradicted"


def span(values: Sequence[float]) -> str:
    """Signed numbers in points, from the lowest to the highest; one alone where there is one."""
    return " to ".join(f"{value:+z.2f}" for value in (min(values), max(values))[: len(values)])
