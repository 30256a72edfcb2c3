"""Whether this run agrees with what is recorded of the same settings, within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companion.evidence import column_of, columns_of
from companion.intervals import accuracy, bits
from companion.kinds import EvaluateRecord, FinetuneRecord, SensitivityRecord, SpendRecord
from companion.pictures import FOUND, NAMES, accuracies
from companion.records import protocol, record_name
from companion.settings import METRICS
from companion.words import listed, name_of

NOTHING_TO_COMPARE = "Nothing is recorded for these parameters: there is nothing to compare this run with."


def of_columns(
    records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord], *, before: float, after: float
) -> Any:
    """Whether this run agrees with the recorded ones, as a line of Markdown; tolerances in percentage points.

    Another machine rounds otherwise. Without training that moves single images at the decision boundary (`before`);
    training amplifies it as another seed would (`after`).

    Raises:
        AssertionError: an accuracy differs by more.
    """
    by_column = columns_of(recorded)
    compared = [r for r in records if column_of(r) in by_column]
    for r in compared:
        column = column_of(r)
        for when, tolerance in (("before", before), ("after", after)):
            for metric in METRICS:
                here, there = (accuracy(those, when, metric).value for those in ([r], by_column[column]))
                assert abs(here - there) <= tolerance, (
                    f"{metric} {when} fine-tuning at tau {column[0]:g}, eta {column[1]:g}: {here:.2f} % in this run,"
                    f" {there:.2f} % recorded, further apart than {tolerance:g} points"
                )
    return _agrees(
        len(compared),
        f"This run agrees with the recorded ones in {len(compared)} of {len(records)} columns: within {before:g}"
        f" points before fine-tuning and {after:g} points after it."
        " (Another machine rounds otherwise, and training amplifies it. Such agreement shows that all works, not what"
        " the method gains.)",
        _too_weak(records, "before", "after"),
    )


def of_networks(
    part: str, records: Sequence[EvaluateRecord], recorded: Sequence[EvaluateRecord], *, within: float
) -> Any:
    """As `of_columns`, for records of kind "evaluate"; `within` percentage points.

    Raises:
        AssertionError: an accuracy differs by more.
    """
    known = {protocol(r): r for r in recorded}
    compared = [r for r in records if protocol(r) in known]
    for r in compared:
        for metric in r.metrics[part]:
            here, there = (accuracy([one], part, metric).value for one in (r, known[protocol(r)]))
            assert abs(here - there) <= within, (
                f"{r.network.name}, {metric} on {part} images: {here:.2f} % in this run, {there:.2f} % recorded,"
                f" further apart than {within:g} points"
            )
    return _agrees(
        len(compared),
        f"On {part} images this run agrees with the recorded one for {len(compared)} of {len(records)} networks, within"
        f" {within:g} points. (Another machine rounds otherwise, which moves single images at the decision boundary.)",
        _too_weak(records, part),
    )


def of_estimates(records: Sequence[SensitivityRecord], recorded: Sequence[SensitivityRecord], *, within: float) -> Any:
    """As `of_columns`, for records of kind "sensitivity"; `within` is relative.

    Raises:
        AssertionError: Upsilon of the whole set or of a sample differs by more.
    """
    known = {(protocol(r), r.config.seed): r for r in recorded}
    compared = [r for r in records if (protocol(r), r.config.seed) in known]
    for r in compared:
        there = known[protocol(r), r.config.seed]
        pairs = zip([r.reference, *r.estimates], [there.reference, *there.estimates], strict=True)
        for here, other in pairs:
            assert abs(here - other) <= within * other, (
                f"Upsilon of {r.network.name}: {here:g} in this run, {other:g} recorded, further apart than"
                f" {100 * within:g} %"
            )
    return _agrees(
        len(compared),
        f"This run agrees with the recorded one for {len(compared)} of {len(records)} networks, within"
        f" {100 * within:g} %.",
    )


def of_pictures(record: SpendRecord, recorded: Sequence[SpendRecord], *, points: float = 0.5) -> str:
    """Whether a run agrees with the recorded ones of the same settings, in a sentence; tolerance in percentage points.

    Raises:
        AssertionError: an accuracy differs by more.
    """
    here, names = accuracies(record), NAMES | FOUND
    for other in recorded:
        for name, there in accuracies(other).items():
            assert abs(here.get(name, there) - there) <= points / 100 + 1e-9, (
                f"{names.get(name, 'clean')} accuracy is {100 * here[name]:.2f} % in this run and {100 * there:.2f} %"
                f" in {record_name(other)}, further apart than {points:g} points"
            )
    if not recorded:
        return NOTHING_TO_COMPARE
    return f"This run agrees with the recorded one: its accuracies are within {points:g} points."


def _too_weak(records: Sequence[EvaluateRecord | FinetuneRecord], *whens: str) -> str:
    """Where the distributional attack was visibly too weak: it leaves more images right than the pointwise one."""
    those = [(r, when) for r in records for when in whens if {"w_2", "w_inf"} <= r.correct.get(when, {}).keys()]
    names = [name_of(r) for r, when in those if bits(r, when, "w_2").sum() > bits(r, when, "w_inf").sum()]
    if not names:
        return ""
    return (
        f" **On {listed(list(dict.fromkeys(names)))} W₂ accuracy is above W∞ accuracy.** The W∞ ball lies inside that"
        " of W₂, so the distributional attack was too weak there: go by the worst case found."
    )


def _agrees(compared: int, line: str, warning: str = "") -> Any:
    from IPython.display import Markdown

    return Markdown((line if compared else NOTHING_TO_COMPARE) + warning)
