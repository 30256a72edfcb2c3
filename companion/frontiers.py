"""Training for the worst case: what each objective gives and what it costs, against the frontier of Algorithm 1.

Of records of kind "objective" and, for a network as it is, "evaluate". Robustness is bought with clean accuracy, so two
trainings are compared at the same clean accuracy. Weights are chosen on validation images, shown are test images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from companion.bases import Record, images_of
from companion.files import digest
from companion.intervals import Estimate, boundary_of, estimate_of, has_found, shares, side, span
from companion.kinds import EvaluateRecord, ObjectiveRecord
from companion.networks import FROM_SCRATCH, PUBLISHED
from companion.objective_functions import OBJECTIVES
from companion.settings import PAPER_NETWORKS, STAND_INS
from companion.words import NOTHING, listed, markdown, name_of, plural, short_name
from wdat_core import Threat

BASE = ("algorithm1", 8)  # the objective and the radius, in 255ths, whose points are the frontier
AT = 4  # 255ths: the radius at which A_2 is compared
GOAL = 1.5  # points above the frontier, on two of three networks: set before the first run
SHOWN = ((2.0, 2), (2.0, 4), (2.0, 8), (math.inf, 8))  # order and radius of the accuracies in the table
PARTS = {"val": "validation", "test": "test"}
Study = list[ObjectiveRecord]


class Setting(NamedTuple):
    """What the trainings of a study differ in, the seed excepted; the radius in 255ths."""

    objective: str
    beta: float
    delta: float

    @property
    def words(self) -> str:
        return f"β = {self.beta:g}, δ = {self.delta:.4g}/255"


def studies(records: Sequence[Record]) -> list[Study]:
    """The trainings of "Training for the worst case", `grouped`: none by the joint objective, and none from scratch."""
    every = [record for record in records if isinstance(record, ObjectiveRecord)]
    return grouped([record for record in every if not record.config.gamma and not is_from_scratch(record)])


def is_from_scratch(record: ObjectiveRecord) -> bool:
    return record.network.name.endswith(FROM_SCRATCH)


def grouped(records: Sequence[ObjectiveRecord]) -> list[Study]:
    """Records that differ in objective, weights, radius and seed alone: known networks first, the longest of each."""
    found: dict[Any, Study] = {}
    for record in records:
        found.setdefault(_protocol(record), []).append(record)
    names = [*PAPER_NETWORKS, *STAND_INS, *PUBLISHED, *sorted({study[0].network.name for study in found.values()})]
    return sorted(
        found.values(), key=lambda s: (names.index(s[0].network.name), -(s[0].data.train or 0) * s[0].config.epochs)
    )


def _protocol(record: ObjectiveRecord) -> Any:
    config = record.config.model_dump(exclude={"objective", "beta", "gamma", "threat", "seed"})
    same = {**config, **record.data.model_dump(), "r": record.config.threat.r}
    # Weights that are drawn anew are others with each seed.
    network = record.network.name if is_from_scratch(record) else record.network.digest
    return network, tuple(sorted(same.items()))


def settings_of(study: Study) -> dict[Setting, Study]:
    """The records of each setting, which differ in the seed alone: Algorithm 1 first, weights in their order."""
    found: dict[Setting, Study] = {}
    for record in study:
        config = record.config
        found.setdefault(Setting(config.objective, config.beta, round(255 * config.threat.delta, 6)), []).append(record)
    order = [*OBJECTIVES, *sorted({setting.objective for setting in found})]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0].objective), *item[0][1:])))


def as_it_is(study: Study, part: str, records: Sequence[Record]) -> EvaluateRecord | None:
    """The record of the network before training: the same images, and distances found with as many steps."""
    like = study[0]
    for record in records:
        if (
            isinstance(record, EvaluateRecord)
            and has_found(record, part)
            and (record.network.digest, record.data.source) == (like.network.digest, like.data.source)
            and record.config.threat.r == like.config.threat.r
            and images_of(record, part) == images_of(like, part)
            and record.boundary is not None
            and record.boundary.steps == like.boundary.steps
        ):
            return record
    return None


def label(study: Study, every: Sequence[Study], code: bool = False) -> str:
    """The name of a study's network, and how it was trained where that is not the same in all studies."""
    called = name_of(study[0]) if code else short_name(study[0].network.name)
    if len({_words(s) for s in every}) == 1 == [s[0].network.digest for s in every].count(study[0].network.digest):
        return called
    alike = [s for s in every if (s[0].network.digest, _words(s)) == (study[0].network.digest, _words(study))]
    mark = f", protocol {digest(repr(_protocol(study[0])).encode())[:8]}" if len(alike) > 1 else ""
    return f"{called} ({_words(study)}{mark})"


def _words(study: Study) -> str:
    data, config = study[0].data, study[0].config
    return f"{data.train:,} training images, {plural(config.epochs, 'epoch')}, τ = {config.tau:g}, {data.test:,} test"


# ---------------------------------------------------------------------------------------------------------------------
# The frontier
# ---------------------------------------------------------------------------------------------------------------------


Ball = tuple[float, float]  # order, and radius in 255ths


@dataclass(frozen=True)
class Point:
    """What each image adds to the clean accuracy and to A_p, arrays (n,), means over seeds; accuracies are theirs."""

    clean: Any
    robust: Any


def point(records: Sequence[Any], part: str, ball: Ball = (2.0, AT)) -> Point:
    """Clean accuracy and A_p, by default A_2 at AT/255, of records that differ in the seed alone."""
    import numpy as np

    clean = np.mean([(boundary_of(r, part).distance > 0).double().numpy() for r in records], axis=0)
    return Point(clean, np.mean([_shares(r, part, *ball) for r in records], axis=0))


def _shares(record: Any, part: str, p: float, delta: float) -> Any:
    return shares(record, part, Threat(p=p, r=record.config.threat.r, delta=delta / 255))


def frontier(study: Study, part: str, records: Sequence[Record], ball: Ball = (2.0, AT)) -> list[Point]:
    """Algorithm 1's points for all its weights, and the network as it is where that is known, by clean accuracy."""
    before = as_it_is(study, part, records)
    those: list[Any] = [
        group for (objective, _, delta), group in settings_of(study).items() if (objective, delta) == BASE
    ]
    line = [point(group, part, ball) for group in [*([[before]] if before else []), *those]] if those else []
    return sorted(line, key=lambda p: p.clean.mean())


def reached(one: Point, line: Sequence[Point]) -> Any:
    """A_2 on a frontier at the clean accuracy of a point, image by image (n,); None where it does not reach there.

    It is the highest A_2 that the straight lines between neighbours have there, or at a higher clean accuracy: who has
    more of both is not behind. Each image counts for the clean accuracies too, which decide the place on the line.
    """
    at = one.clean.mean()
    if not line or not line[0].clean.mean() <= at <= line[-1].clean.mean():
        return None
    found = [p.robust for p in line if p.clean.mean() >= at]
    for a, b in pairwise(line):
        if a.clean.mean() < at < b.clean.mean():
            run, rise = b.clean.mean() - a.clean.mean(), b.robust.mean() - a.robust.mean()
            share = (at - a.clean.mean()) / run
            clean, robust = ((1 - share) * x + share * y for x, y in ((a.clean, b.clean), (a.robust, b.robust)))
            found.append(robust + rise / run * (one.clean - clean))
    return max(found, key=lambda robust: robust.mean())


def above(one: Point, line: Sequence[Point]) -> Estimate | None:
    """By how many points A_2 is above a frontier at the same clean accuracy, with the interval of paired differences.

    None: not comparable, see `reached`.
    """
    known = reached(one, line)
    return None if known is None else estimate_of([one.robust - known])


@dataclass(frozen=True)
class Judged:
    """An objective on a network, with the weight and radius chosen on validation images: points above the frontier."""

    study: Study
    setting: Setting
    val: Estimate
    test: Estimate | None  # None: not comparable
    seeds: list[float]  # on test images, of the seeds that are comparable

    @property
    def text(self) -> str:
        return self.test.text(signed=True) if self.test else "not comparable"

    @property
    def where(self) -> str:
        """On which side of the frontier it visibly is, with the interval and every seed: "above", "below" or ""."""
        return side(self.test.low, self.test.high, self.seeds) if self.test else ""

    @property
    def range(self) -> str:
        return f"; seeds {span(self.seeds)}" if len(self.seeds) > 1 else "; one seed"


def judged(study: Study, records: Sequence[Record]) -> list[Judged]:
    """Each objective that the frontier of the validation images can be compared with, Algorithm 1 excepted."""
    lines = {part: frontier(study, part, records) for part in PARTS}
    best: dict[str, Judged] = {}
    for setting, those in settings_of(study).items():
        val = above(point(those, "val"), lines["val"])
        known = best.get(setting.objective)
        if setting.objective == BASE[0] or val is None or (known and known.val.value >= val.value):
            continue
        each = [above(point([record], "test"), lines["test"]) for record in those]
        test, seeds = above(point(those, "test"), lines["test"]), [e.value for e in each if e]
        best[setting.objective] = Judged(study, setting, val, test, seeds)
    return list(best.values())


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows
# ---------------------------------------------------------------------------------------------------------------------


def name(objective: str) -> str:
    return OBJECTIVES[objective].words if objective in OBJECTIVES else objective


def frontier_answer(records: Sequence[Record]) -> str:
    """Who wins, whether the goal is reached, and by how much on each network: on that with the longest training."""
    every = studies(records)
    first = {study[0].network.digest: study for study in reversed(every)}  # of each network the longest
    main = [study for study in every if study is first[study[0].network.digest]]
    if not main:
        return NOTHING
    found: dict[str, list[Judged]] = {}
    for one in (one for study in main for one in judged(study, records) if one.test):
        found.setdefault(one.setting.objective, []).append(one)
    goal = f"{GOAL:g} points above Algorithm 1 on two of three networks"
    if not found:
        return (
            "**Nothing can be compared with Algorithm 1 yet: no other objective has a clean accuracy that its frontier"
            f" reaches, on validation and on test images.** The goal set beforehand, {goal}, is open."
        )
    wins = {o: sum(one.test.value >= GOAL for one in those if one.test) for o, those in found.items()}
    seen = {o: sum(one.where == "above" for one in those) for o, those in found.items()}
    means = {o: sum(one.test.value for one in those if one.test) / len(those) for o, those in found.items()}
    best = max(found, key=lambda o: (wins[o], seen[o], means[o]))
    there = [o for o in found if wins[o] >= 2 and 3 * wins[o] >= 2 * len(main)]
    if best in there:
        text = (
            f"**The winner is “{name(best)}”: at the same clean accuracy it is at least {GOAL:g} points above Algorithm"
            f" 1 on {wins[best]} of {plural(len(main), 'network')}. That is the goal set beforehand: reached.**"
        )
    else:
        text = (
            f"**The goal set beforehand is not reached: no objective is {goal}. “{name(best)}” comes nearest: with"
            f" every seed it is above Algorithm 1 on {seen[best]} of {plural(len(main), 'network')}, and by {GOAL:g}"
            f" points on {wins[best]}.**"
        )

    def differences(objective: str) -> str:
        those = found[objective]
        parts = [f"{j.text} on {label(j.study, every, code=True)} ({j.setting.words}{j.range})" for j in those]
        return f"A₂ at {AT}/255 of “{name(objective)}” minus that of Algorithm 1: {listed(parts)}."

    text += f" {differences(best)}"
    if out := [label(s, every, code=True) for s in main if not any(one.study is s for one in found[best])]:
        text += f" Not comparable on {listed(out)}."
    widest = max(found, key=lambda o: (seen[o], wins[o], means[o]))
    if seen[widest] > seen[best]:
        text += f" “{name(widest)}” is above it with every seed on more networks, {seen[widest]}. {differences(widest)}"
    if others := [f"“{name(o)}”" for o in there if o != best]:
        text += f" The goal is also reached by {listed(others)}."
    run = {setting.objective for study in main for setting in settings_of(study)}
    if missing := [f"“{name(o)}”" for o in OBJECTIVES if o not in run]:
        text += f" Not run yet: {listed(missing)}."
    return text


def frontier_table(records: Sequence[Record]) -> Any:
    """A row for each setting, and first one for each network as it is: accuracies of test images, in per cent.

    Of several seeds it is the mean, and of A_2 at AT/255 in brackets from the lowest to the highest. Bold is the
    difference of the setting that was chosen on validation images.
    """
    lines, every = [], studies(records)
    for study in every:
        called, line = label(study, every), frontier(study, "test", records)
        chosen = {one.setting for one in judged(study, records)}
        if before := as_it_is(study, "test", records):
            lines.append([called, "as it is", "–", "–", "–", *_accuracies([before]), "–"])
        for setting, those in settings_of(study).items():
            found = above(point(those, "test"), line)
            text = found.text(signed=True) if found else "not comparable"
            if (setting.objective, setting.delta) == BASE:
                text = "its frontier"
            mark = "**" if setting in chosen else ""
            seeds = ", ".join(str(seed) for seed in sorted(r.config.seed for r in those))
            cells = [called, name(setting.objective), f"{setting.beta:g}", f"{setting.delta:.4g}/255"]
            lines.append([*cells, f"{mark}{text}{mark}", *_accuracies(those), seeds])
    heads = ["network", "objective", "β", "δ", "above Algorithm 1", "clean"]
    heads += [f"A{'₂' if p == 2 else '∞'} at {delta}/255" for p, delta in SHOWN]  # in narrow columns
    return markdown([*heads, "seeds"], lines) if lines else markdown(["network"], [[NOTHING]])


def times_table(records: Sequence[Record]) -> Any:
    """How long each training took, a row for each run."""
    every = studies(records)
    lines = [
        [
            label(study, every),
            name(setting.objective),
            setting.words,
            f"{r.config.seed}",
            f"{r.seconds['train']:,.0f}",
            r.device,
        ]
        for study in every
        for setting, those in settings_of(study).items()
        for r in those
    ]
    return markdown(["network", "objective", "weight", "seed", "training, s", "on"], lines or [[NOTHING, *["–"] * 5]])


def _accuracies(those: Sequence[Any]) -> list[str]:
    """Clean accuracy and those of SHOWN on test images, means over seeds; with the range of the one compared."""
    import numpy as np

    cells = [f"{100 * point(those, 'test').clean.mean():.2f}"]
    for p, delta in SHOWN:
        values = [100 * float(np.mean(_shares(record, "test", p, delta))) for record in those]
        ranged = (p, delta) == (2.0, AT) and len(those) > 1
        cells.append(f"{sum(values) / len(values):.2f}" + f" ({min(values):.2f} to {max(values):.2f})" * ranged)
    return cells


def chosen_table(records: Sequence[Record]) -> Any:
    """What was chosen on validation images, and what it gives on test images: points above the frontier."""
    every = studies(records)
    lines = []
    for study in every:
        tried = [setting.objective for setting in settings_of(study)]
        found = judged(study, records)
        for one in found:
            alone = ", the only one that was run" * (tried.count(one.setting.objective) == 1)
            words = [name(one.setting.objective), one.setting.words + alone, one.val.text(signed=True)]
            words.append(one.text + one.range)
            lines.append([label(study, every), *words])
        for objective in dict.fromkeys(tried):
            if objective not in (BASE[0], *(one.setting.objective for one in found)):
                beyond = ["–", "none is comparable", "–"]
                lines.append([label(study, every), name(objective), *beyond])
    heads = ["network", "objective", "chosen", *(f"{words} images" for words in PARTS.values())]
    return markdown(heads, lines or [["nothing can be compared yet", *["–"] * 4]])
