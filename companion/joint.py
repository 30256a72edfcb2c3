"""The joint objective (5.6) as gamma moves, and training from scratch: what each gives and what it costs.

Of records of kind "objective" and, for a network as it is, "evaluate". All numbers are of test images, and nothing is
chosen on them. The rules were written before the first record was there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from companion import frontiers
from companion.bases import Record
from companion.frontiers import Ball, Setting, Study
from companion.intervals import Estimate, estimate_of, side
from companion.kinds import EvaluateRecord, ObjectiveRecord
from companion.words import listed, markdown, name_of, plural

POINTWISE: Ball = (math.inf, 8)
SPREAD: Ball = (2.0, frontiers.AT)
BALLS: dict[Ball, str] = {SPREAD: "A₂, 4/255", (2.0, 8): "A₂, 8/255", POINTWISE: "A∞, 8/255"}
JOINT, BESIDE = "algorithm1", "trades"  # what has the pointwise term; what the others stand beside from scratch
NOT_YET = "Not measured yet"


# ---------------------------------------------------------------------------------------------------------------------
# The joint objective
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A network trained with one beta and delta: its records for each gamma, in their order, and itself before."""

    study: Study  # all that was trained alike, other weights too
    beta: float
    delta: float  # in 255ths
    points: dict[float, Study]
    before: EvaluateRecord | None

    @property
    def words(self) -> str:
        return f"β = {self.beta:g}, δ = {self.delta:.4g}/255"

    @property
    def most(self) -> float:
        """The greatest gamma: where the pointwise term is judged, so that nothing is chosen."""
        return max(self.points)


def lines(records: Sequence[Record]) -> list[Line]:
    """A line for each network, beta and delta that has a run with the pointwise term."""
    return [line for line in _all_lines(records) if line.most]


def _all_lines(records: Sequence[Record]) -> list[Line]:
    """Those too that have no such run yet, with every beta and delta."""
    every = [r for r in records if isinstance(r, ObjectiveRecord) and r.config.objective == JOINT]
    found = []
    for study in frontiers.grouped([r for r in every if not frontiers.is_from_scratch(r)]):
        before = frontiers.as_it_is(study, "test", records)
        for beta, delta in sorted({_weights(r) for r in study}):
            points: dict[float, Study] = {}
            for record in sorted(study, key=lambda r: (r.config.gamma, r.config.seed)):
                if _weights(record) == (beta, delta):
                    points.setdefault(record.config.gamma, []).append(record)
            found.append(Line(study, beta, delta, points, before))
    return found


def _open(records: Sequence[Record], known: Sequence[Line]) -> list[Line]:
    """Networks that lose pointwise accuracy with the weights of known lines, and where the term has not run yet."""
    weights, there = {(line.beta, line.delta) for line in known}, {line.study[0].network.digest for line in known}
    alone = [line for line in _all_lines(records) if line.before and not line.most]
    fit = [line for line in alone if (line.beta, line.delta) in weights]
    return [line for line in _of_each_network(fit) if line.study[0].network.digest not in there and _loses(line)]


def _weights(record: ObjectiveRecord) -> tuple[float, float]:
    return record.config.beta, round(255 * record.config.threat.delta, 6)


def moved(those: Sequence[Any], others: Sequence[Any], ball: Ball | None) -> tuple[Estimate, str]:
    """Accuracy in a ball (None: clean) minus that of others on the same images, in points; and its side of 0.

    "above" and "below" need the whole interval and every seed of `those`; "" is neither.
    """

    def of(group: Sequence[Any]) -> Any:
        there = frontiers.point(group, "test", ball or SPREAD)
        return there.robust if ball else there.clean

    known = of(others)
    found = estimate_of([of(those) - known])
    seeds = [estimate_of([of([one]) - known]).value for one in those]
    return found, side(found.low, found.high, seeds)


def above_algorithm1(line: Line, gamma: float, ball: Ball, records: Sequence[Record]) -> Estimate | None:
    """By how many points A_p is above Algorithm 1 without the term, with whatever beta, at the same clean accuracy."""
    alone = [record for record in line.study if not record.config.gamma]
    edge = frontiers.frontier(alone, "test", records, ball) if alone else []
    return frontiers.above(frontiers.point(line.points[gamma], "test", ball), edge)


def joint_answer(records: Sequence[Record]) -> str:
    """Whether the pointwise term stops the loss of pointwise accuracy, on the networks that have one without it.

    There is a loss where A_inf at gamma 0 lies wholly below that of the network as it is. It is stopped where A_inf at
    the greatest gamma lies wholly above that at gamma 0, and not wholly below the network as it is.
    """
    every = lines(records)
    judged = _of_each_network([line for line in every if line.before and 0 in line.points])
    if not judged:
        if not every:
            return f"**{NOT_YET}.** Of runs with the pointwise term nothing is recorded here yet."
        return f"**{NOT_YET}: beside the pointwise term, a run without it and the network as it is are needed.**"
    lost, open_ = [line for line in judged if _loses(line)], _open(records, every)
    if lost:
        stopped = sum(map(_is_stopped, lost))
        on = f"on {stopped} of {plural(len(lost), 'network')} that {'has' if len(lost) == 1 else 'have'} it"
        text = f"**The pointwise term {'stops' if stopped else 'does not stop'} the loss of pointwise accuracy: {on}.**"
    elif open_:
        where = plural(len(judged), "network")
        text = f"**Not known yet: the term was tried on {where} only, where without it no accuracy is visibly lost.**"
    else:
        on = f"on {plural(len(judged), 'network')} measured"
        text = f"**There is nothing to stop: without the pointwise term no pointwise accuracy is visibly lost, {on}.**"
    if kept := [name_of(line.study[0]) for line in judged if lost and not _loses(line)]:
        text += f" Without it {listed(kept)} visibly {'loses' if len(kept) == 1 else 'lose'} none."
    text += f" A∞ at 8/255 minus that of the network as it is, without the term and with it: {_courses(judged)}."
    return text + _no_more_than_weight(judged, records) + _still_open(open_)


def _of_each_network(known: Sequence[Line]) -> list[Line]:
    """One line of each network: that of the longest training, with the most gammas."""
    found: dict[str, Line] = {}
    for line in known:
        best = found.setdefault(line.study[0].network.digest, line)
        if line.study is best.study and len(line.points) > len(best.points):
            found[line.study[0].network.digest] = line
    return list(found.values())


def _loses(line: Line) -> bool:
    return moved(line.points[0], [line.before], POINTWISE)[1] == "below"


def _is_stopped(line: Line) -> bool:
    there = line.points[line.most]
    against_none, against_start = (moved(there, those, POINTWISE)[1] for those in (line.points[0], [line.before]))
    return against_none == "above" and against_start != "below"


def _courses(judged: Sequence[Line]) -> str:
    """What the greatest gamma changes on each network, and what it costs."""
    parts = []
    for line in judged:
        without, with_it = (
            moved(line.points[g], [line.before], POINTWISE)[0].text(signed=True) for g in (0, line.most)
        )
        cost = moved(line.points[line.most], line.points[0], None)[0].text(signed=True)
        how = f"γ = {line.most:g}, which changes clean accuracy by {cost}"
        parts.append(f"{without} and {with_it} on {name_of(line.study[0])} ({how})")
    return "; ".join(parts)


def _no_more_than_weight(judged: Sequence[Line], records: Sequence[Record]) -> str:
    """How the term compares with a larger beta, where Algorithm 1 reaches the same clean accuracy."""
    parts = []
    for line in judged:
        if found := above_algorithm1(line, line.most, POINTWISE, records):
            parts.append(f"{found.text(signed=True)} on {name_of(line.study[0])}")
    if not parts:
        return ""
    return f" Against Algorithm 1 with another β at the same clean accuracy, A∞ is {listed(parts)}."


def _still_open(open_: Sequence[Line]) -> str:
    parts = []
    for line in open_:
        lost = moved(line.points[0], [line.before], POINTWISE)[0].text(signed=True)
        parts.append(f"{name_of(line.study[0])} ({lost})")
    return f" Without the term there is a loss on {listed(parts)}; the term has not run there yet." if parts else ""


def joint_table(records: Sequence[Record]) -> Any:
    """A row for each gamma, after the network as it is: accuracies of test images in per cent."""
    rows, every = [], lines(records)
    studies, alike = [line.study for line in every], len({line.words for line in every}) == 1
    for line in every:
        called = frontiers.label(line.study, studies) + ("" if alike else f", {line.words}")
        if line.before:
            rows.append([called, "as it is", *_accuracies([line.before]), *["–"] * 3])
        for gamma, those in line.points.items():
            lost = moved(those, [line.before], POINTWISE)[0].text(signed=True) if line.before else "–"
            found = [above_algorithm1(line, gamma, ball, records) for ball in (POINTWISE, SPREAD)]
            beside = [one.text(signed=True) if one else "not comparable" for one in found]
            if not gamma and (JOINT, line.delta) == frontiers.BASE:
                beside = ["its frontier"] * 2
            rows.append([called, f"{gamma:g}", *_accuracies(those), lost, *beside])
    heads = ["network", "γ", "clean", *BALLS.values(), "A∞ minus as it is", "A∞ above Algorithm 1"]
    heads += ["A₂, 4/255 above Algorithm 1"]
    return markdown(heads, rows) if rows else markdown(["network"], [[f"{NOT_YET}."]])


def _accuracies(those: Sequence[Any]) -> list[str]:
    clean = frontiers.point(those, "test").clean.mean()
    left = [frontiers.point(those, "test", ball).robust.mean() for ball in BALLS]
    return [f"{100 * value:.2f}" for value in (clean, *left)]


def _runs(those: Study) -> list[str]:
    """The seeds of records, and the mean time of their training."""
    seeds = ", ".join(str(seed) for seed in sorted(r.config.seed for r in those))
    return [seeds, f"{sum(r.seconds['train'] for r in those) / len(those):,.0f}"]


# ---------------------------------------------------------------------------------------------------------------------
# From scratch
# ---------------------------------------------------------------------------------------------------------------------


def scratch_studies(records: Sequence[Record]) -> list[Study]:
    """Trainings from scratch by one recipe on one architecture, which differ in the objective and its weights alone."""
    every = [record for record in records if isinstance(record, ObjectiveRecord) and not record.config.gamma]
    return frontiers.grouped([record for record in every if frontiers.is_from_scratch(record)])


def chosen(study: Study) -> dict[str, tuple[Setting, Study]]:
    """Of each objective the setting with the highest A_2 at 4/255 on validation images, and its records."""
    found: dict[str, tuple[Setting, Study]] = {}
    best: dict[str, float] = {}
    for setting, those in frontiers.settings_of(study).items():
        value = float(frontiers.point(those, "val").robust.mean())
        if value > best.get(setting.objective, -1.0):
            best[setting.objective], found[setting.objective] = value, (setting, those)
    return found


def scratch_answer(records: Sequence[Record]) -> str:
    """Which objective has more A_2 at 4/255 than TRADES from scratch, by paired intervals, and at which clean accuracy.

    It has more where the interval and every seed lie above 0.
    """
    texts = [text for study in scratch_studies(records) if (text := _beside_trades(study))]
    if not texts:
        return f"**{NOT_YET}: from scratch, TRADES and another objective by the same recipe are needed.**"
    return " ".join(texts)


def _beside_trades(study: Study) -> str:
    found = chosen(study)
    if BESIDE not in found or len(found) == 1:
        return ""
    _, trades = found.pop(BESIDE)
    outcome: dict[str, list[str]] = {"above": [], "below": [], "": []}
    facts = []
    for objective, (setting, those) in found.items():
        robust, where = moved(those, trades, SPREAD)
        (clean, _), (pointwise, _) = (moved(those, trades, ball) for ball in (None, POINTWISE))
        called = f"“{frontiers.name(objective)}”"
        outcome[where].append(called)
        numbers = f"{robust.text(signed=True)} of A₂ at 4/255, {pointwise.text(signed=True)} of A∞ at 8/255"
        facts.append(f"{called} ({setting.words}) has {numbers} and {clean.text(signed=True)} clean")
    words = {"above": "more A₂ than TRADES", "below": "less A₂ than TRADES", "": "no visibly different A₂"}
    said = "; ".join(f"{words[where]}: {listed(names)}" for where, names in outcome.items() if names)
    return f"**From scratch on {name_of(study[0])}, {said}.** In points more than TRADES, {listed(facts)}."


def scratch_table(records: Sequence[Record]) -> Any:
    """A row for each setting: accuracies of test images in per cent; what was chosen on validation images is bold."""
    rows, every = [], scratch_studies(records)
    for study in every:
        picked = chosen(study)
        base, trades = picked.get(BESIDE, (None, []))
        for setting, those in frontiers.settings_of(study).items():
            mark = "**" if picked[setting.objective][0] == setting else ""
            cells = [frontiers.label(study, every), f"{mark}{frontiers.name(setting.objective)}{mark}"]
            beside = moved(those, trades, SPREAD)[0].text(signed=True) if trades and setting != base else "–"
            rows.append([*cells, setting.words, *_accuracies(those), beside, *_runs(those)])
    heads = ["architecture", "objective", "β, δ", "clean", *BALLS.values(), "A₂ at 4/255 against TRADES"]
    heads += ["seeds", "training, s"]
    return markdown(heads, rows) if rows else markdown(["architecture"], [[f"{NOT_YET}."]])


def shown(records: Sequence[Record]) -> list[Record]:
    """The records that the page draws on."""
    every = lines(records)
    of_lines: list[Any] = [r for line in every for r in (*line.study, line.before) if r]
    return list({id(r): r for r in (*of_lines, *(r for study in scratch_studies(records) for r in study))}.values())
