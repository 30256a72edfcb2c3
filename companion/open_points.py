"""What the paper leaves open, and how much it matters: runs in which one point differs from the default.

A control is a point that the paper does state, changed in the same way to see what it does."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from companion.bases import images_of
from companion.evidence import (
    COLUMNS,
    Column,
    alike,
    column_of,
    columns_of,
    deviations,
    is_full,
    paper_value,
    setting_of,
    training_of,
)
from companion.intervals import Estimate, bits, change, estimate_of, has_found, search_of, side, span
from companion.kinds import EvaluateRecord, FinetuneRecord
from companion.settings import CONTROLS, FOUND, GRIDS, METRICS, OPEN_POINTS
from companion.tables import PARTS
from companion.words import HOW, NOTHING, column_words, listed, markdown, setting_words, short_name, training_words

READINGS = OPEN_POINTS["consistency"]
WORST = "w_2_found_half"  # at the whole radius the small networks have next to nothing left to compare
COMPARED = METRICS | {WORST: FOUND[WORST]}
PATTERNS = {how: table for table, (_, how) in sorted(GRIDS.items(), reverse=True)}  # Tables 3 and 4


@dataclass(frozen=True)
class Matter:
    """What one change of an open point or a control does, in one column of one study.

    Attributes:
        point, value: which, a key of `OPEN_POINTS` or `CONTROLS`, and what it is instead of its default.
        differences: of each accuracy after fine-tuning, with it minus without it, same seeds and test images; `WORST`
            is among them where all the records have distances.
        seeds: the same of each seed alone.
        with_it, without: the records.
    """

    point: str
    value: Any
    differences: dict[str, Estimate]
    seeds: dict[str, list[float]]
    with_it: tuple[FinetuneRecord, ...]
    without: tuple[FinetuneRecord, ...]

    def side(self, metric: str) -> str:
        """Where the whole change of an accuracy lies, interval and every seed: "above" or "below" 0; "" else."""
        difference = self.differences[metric]
        return side(difference.low, difference.high, self.seeds[metric])


def matters(records: Sequence[FinetuneRecord]) -> list[Matter]:
    """For each column of each study and each single change in it: the differences that it makes."""
    found = []
    for group in _grouped(records):
        without = {r.config.seed: r for r in group if not deviations(r)}
        alone: dict[tuple[str, Any], dict[int, FinetuneRecord]] = {}
        for record in group:
            if len(those := deviations(record)) == 1:
                (deviation,) = those.items()
                alone.setdefault(deviation, {})[record.config.seed] = record
        for (point, value), with_it in alone.items():
            if seeds := sorted(with_it.keys() & without.keys()):
                pairs = [(with_it[s], without[s]) for s in seeds]
                known = all(has_found(r, "after") for pair in pairs for r in pair)
                metrics = COMPARED if known and all(search_of(a) == search_of(b) for a, b in pairs) else METRICS
                each = {m: [bits(a, "after", m) - bits(b, "after", m) for a, b in pairs] for m in metrics}
                differences = {m: estimate_of(values) for m, values in each.items()}
                single = {m: [estimate_of([one]).value for one in values] for m, values in each.items()}
                records_of = (tuple(r[s] for s in seeds) for r in (with_it, without))
                found.append(Matter(point, value, differences, single, *records_of))
    order = [*OPEN_POINTS, *CONTROLS]
    return sorted(found, key=lambda m: (order.index(m.point), m.with_it[0].network.name))


def _grouped(records: Sequence[FinetuneRecord]) -> list[list[FinetuneRecord]]:
    """Groups that differ in the seed, the open points and the controls alone."""
    columns: dict[Column, list[FinetuneRecord]] = {}
    for record in records:
        columns.setdefault(column_of(record), []).append(record)
    return [group for those in columns.values() for group in alike(those, *OPEN_POINTS, "p")]


def matters_table(records: Sequence[FinetuneRecord], points: Collection[str] = (*OPEN_POINTS, *CONTROLS)) -> Any:
    """One row for each change of one of the points: what it does to the accuracies after fine-tuning."""
    found = [m for m in matters(records) if m.point in points]
    trainings = {training_words(m.with_it[0]) for m in found}
    common = f" ({trainings.pop()})" if len(trainings) == 1 else ""  # said once, where it is the same for all
    lines, heads = [], ["changed", *COMPARED.values(), "seeds (W₂)", f"in{common}"]
    for matter in found:
        one, each = matter.with_it[0], matter.seeds["w_2"]
        seeds = f"{len(each)}" + f": {span(each)}" * (len(each) > 1)
        cells = [matter.differences[m].text(signed=True) if m in matter.differences else "–" for m in COMPARED]
        lines.append([f"`{matter.point}={matter.value}`", *cells, seeds, where(one, training=not common)])
    return markdown(heads, lines or [["nothing is recorded yet", *["–"] * (len(heads) - 1)]])


def by_worst_case(found: Sequence[Matter]) -> str:
    """A sentence: how many of the changes move the worst case found visibly, and which of them against W_2."""
    those = [m for m in found if WORST in m.differences]
    if not those:
        return ""
    moved = [m for m in those if m.side(WORST)]
    against = [f"`{m.point}={m.value}`" for m in moved if m.side("w_2") and m.side("w_2") != m.side(WORST)]
    none = ", none of them in the other direction than W₂" * bool(moved)
    others = f", {listed(against)} in the other direction than W₂" if against else none
    return f" By the worst case found, at half the radius, {len(moved)} of the {len(those)} measured do{others}."


def where(record: FinetuneRecord, training: bool = True) -> str:
    """Network, setting and, unless they are known, images and epochs of a record, in words."""
    network = f"`{record.network.name}`" + f", {training_words(record)}" * training
    return f"{network}; {setting_words(*setting_of(record))}"


def how_much(records: Sequence[FinetuneRecord], point: str) -> str:
    """The ledger's last column: what each change of the point does to W_2 accuracy, in points, in the longest runs.

    As the paper measures it, and by the worst case found where all those runs have it.
    """
    found = [m for m in matters(records) if m.point == point]
    longest = max((training_of(m.with_it[0]) for m in found), default=0)
    by_value: dict[Any, list[Matter]] = {}
    for matter in found:
        if training_of(matter.with_it[0]) == longest:
            by_value.setdefault(matter.value, []).append(matter)
    parts = []
    for value, each in by_value.items():
        yardsticks = {"w_2": "W₂", WORST: "worst case"} if all(WORST in m.differences for m in each) else {"w_2": "W₂"}
        words = [f"{words} {_over([m.differences[metric] for m in each])}" for metric, words in yardsticks.items()]
        parts.append(f"`{value}`: {', '.join(words)}" + f" in {len(each)} comparisons" * (len(each) > 1))
    return "; ".join(parts) or "–"


def _over(each: Sequence[Estimate]) -> str:
    return each[0].text(signed=True) if len(each) == 1 else span([e.value for e in each])


def budget_below_pointwise(records: Sequence[EvaluateRecord]) -> str:
    """Of Table 2's images: for how many networks W-PGD-budget is visibly the stronger attack, on which images."""
    counts = []
    for part, label in PARTS.items():
        those = [r for r in records if part in r.correct and is_full(r)]
        gaps = [estimate_of([bits(r, part, "w_inf") - bits(r, part, "budget")]) for r in those]
        stronger = sum(gap.value > (gap.half or 0) for gap in gaps)
        if those:
            counts.append(f"on {images_of(those[0], part):,} {label} for {stronger} of {len(those)} networks")
    return f"W-PGD-budget is stronger than the pointwise attack {', '.join(counts)}" if counts else "–"


# ---------------------------------------------------------------------------------------------------------------------
# The three readings of CE(f(x), f(x')), over the grid
# ---------------------------------------------------------------------------------------------------------------------


def by_reading(records: Sequence[FinetuneRecord]) -> list[dict[str, list[FinetuneRecord]]]:
    """For each study and way to perturb in which two readings or more are recorded: reading to its records."""
    found = []
    for group in alike([r for r in records if deviations(r).keys() <= {"consistency"}], "consistency"):
        each = {reading: [r for r in group if r.config.consistency == reading] for reading in READINGS}
        found.append({reading: those for reading, those in each.items() if those})
    return [readings for readings in found if len(readings) > 1]


def distance(records: Sequence[FinetuneRecord], how: str) -> float | None:
    """How far changes are from the paper's in Table 4 (whole network) or 3 (last layer): root mean square, in points.

    Over the four columns and the three accuracies, of the network of Zhang et al.; None where a column is missing.
    """
    table = PATTERNS[how]
    name, by_column, squares = GRIDS[table][0], columns_of(records), []
    for column in COLUMNS:
        if column not in by_column:
            return None
        for metric in METRICS:
            after, before = paper_value(table, name, metric, *column), paper_value(1, name, metric)
            assert after is not None and before is not None
            squares.append((change(by_column[column], metric).value - (after - before)) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def readings_table(records: Sequence[FinetuneRecord], metric: str = "w_2") -> Any:
    """For each study a table: the change of an accuracy in each column, in the paper and under each reading."""
    from IPython.display import Markdown

    heads = ["changes from", *(column_words(*column) for column in COLUMNS), "distance"]
    parts = []
    for study in by_reading(records):
        one = next(iter(study.values()))[0]
        how = one.config.perturb
        table = PATTERNS[how]
        name = GRIDS[table][0]
        printed = [paper_value(table, name, metric, *c) for c in COLUMNS]
        base = paper_value(1, name, metric)
        lines = [[f"{short_name(name)} (paper)", *(f"{v - base:+z.2f}" if v and base else "–" for v in printed), "–"]]
        for reading, those in study.items():
            by_column, far = columns_of(those), distance(those, how)
            found = [change(by_column[c], metric).text(signed=True) if c in by_column else "–" for c in COLUMNS]
            lines.append([f"`{reading}`", *found, "–" if far is None else f"{far:.1f}"])
        title = f"**{HOW[how].capitalize()} of `{one.network.name}`**, {training_words(one)}:"
        parts += [title, markdown(heads, lines).data]
    return Markdown("\n\n".join(parts) or NOTHING)


def closest(records: Sequence[FinetuneRecord]) -> list[tuple[str, dict[str, float], dict[str, bool]]]:
    """For each study with all columns under every reading: how it perturbs, then for each reading its distance from the
    paper, and whether W_2 accuracy gains most in the same column as in the paper, and in no other as much."""
    found = []
    for study in by_reading(records):
        how = next(iter(study.values()))[0].config.perturb
        far = {reading: d for reading, those in study.items() if (d := distance(those, how)) is not None}
        if len(far) == len(READINGS):
            table = PATTERNS[how]
            gains = {r: {c: change(one, "w_2").value for c, one in columns_of(study[r]).items()} for r in READINGS}
            best = max(gains[READINGS[0]], key=lambda c: paper_value(table, GRIDS[table][0], "w_2", *c) or 0)
            same = {r: all(by[best] > gain for c, gain in by.items() if c != best) for r, by in gains.items()}
            found.append((how, far, same))
    return found


def closest_table(records: Sequence[FinetuneRecord]) -> Any:
    """Which reading comes nearest to the paper's Tables 3 and 4, in distance and in the column that is best."""
    found, lines = closest(records), []
    for how, table in PATTERNS.items():
        studies = [(far, same) for its, far, same in found if its == how]
        if studies:
            mean = [f"{sum(far[r] for far, _ in studies) / len(studies):.1f}" for r in READINGS]
            nearest = [sum(min(far, key=lambda k: far[k]) == r for far, _ in studies) for r in READINGS]
            best = [sum(same[r] for _, same in studies) for r in READINGS]
            what = f"Table {table}, {HOW[how]}"
            lines.append([f"{what}: mean distance", *mean])
            lines.append([f"{what}: nearest, of {len(studies)}", *map(str, nearest)])
            lines.append([f"{what}: best column as in the paper, of {len(studies)}", *map(str, best)])
    return markdown(["", *(f"`{r}`" for r in READINGS)], lines or [["nothing is recorded yet", *["–"] * len(READINGS)]])
