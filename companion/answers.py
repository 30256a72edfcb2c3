"""The first sentences of each page: what the paper says, what is recorded here, and whether the two agree.

Everything is computed from assets/paper.csv and from records; nothing is typed by hand. Records of the paper's whole
protocol come first; where there are none, the longest training of each network is named, or it is said that nothing is
recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from companion import pictures
from companion.bases import Record, images_of
from companion.claim_texts import by_both, paper_count
from companion.claims import CLAIMS, Claim, cifar10_only, counted, outcomes, verdict
from companion.cost_page import cost_answer
from companion.datasets import DATASETS, EMBEDDED_SOURCE
from companion.evidence import (
    COLUMNS,
    FULL,
    along,
    best_setting,
    columns_of,
    grids,
    has_curves,
    is_full,
    is_stated,
    paper_value,
    relative_errors,
    setting_of,
)
from companion.first_order import first_order_answer
from companion.frontiers import frontier_answer
from companion.intervals import Estimate, bits, change, estimate_of, outcome_of_change, side, span
from companion.joint import joint_answer
from companion.kinds import FinetuneRecord
from companion.open_points import by_worst_case, matters
from companion.performance import performance_answer
from companion.settings import CONTROLS, FINETUNED, GRIDS, METRICS, PAPER_NETWORKS, STAND_INS, STRONGER
from companion.tables import fewest_left, paper_changes
from companion.words import (
    HOW,
    NOTHING,
    VERDICTS,
    column_words,
    count,
    listed,
    name_of,
    overall,
    plural,
    plural_of,
    setting_words,
    short_name,
    training_words,
)
from companion.worst import overstated, worst_answer


def answer(page: str, records: Sequence[Record]) -> str:
    """What a page found, in one to a few short sentences of Markdown.

    Args:
        page: the name of its notebook, or "intro" for the first page.
        records: of any kinds; each page takes those it is about.

    Raises:
        KeyError: there is no answer for such a page.
    """
    return PAGES[page](records)


def _of(records: Sequence[Record], kind: str) -> list[Any]:
    return [record for record in records if record.kind == kind]


def _mark(found: Sequence[str]) -> str:
    """Outcomes as a verdict: "◐ **Holds in 1 of 2, contradicted in 1.**"."""
    words = count(found)
    return f"{VERDICTS[overall(found)][0]} **{words[:1].upper()}{words[1:]}.**"


# ---------------------------------------------------------------------------------------------------------------------
# Tables 3, 4 and 6 to 11, and 5
# ---------------------------------------------------------------------------------------------------------------------


def _grid(table: int, records: Sequence[Record]) -> str:
    """The change of W_2 accuracy in the best column: the paper's, and of each network that is recorded."""
    network, how = GRIDS[table]
    changes = [(pair[1], c) for c, pair in paper_changes(table, "w_2", COLUMNS).items() if pair]
    printed, column = max(changes)
    paper = f"Paper: {printed:+z.2f} points of W₂ accuracy in its best column ({column_words(*column)})."
    studies = [study for study in grids(how, _of(records, "finetune")) if _is_comparable(study[0])]
    whole = [study for study in studies if is_full(study[0])]
    if not studies:
        return f"{paper} {NOTHING}"
    parts, found = [], []
    for study in whole or _longest(studies):
        best = best_setting(study)
        where = "" if whole else f" ({training_words(best[0])})"
        parts.append(f"{change(best, 'w_2').text(signed=True)} on {name_of(best[0])}{where}")
        found.append(outcome_of_change(printed, best, "w_2"))
    here = "Here" if whole else "The whole protocol is not recorded here; in shorter runs"
    other = "" if network in cifar10_only() else " The paper's network was pre-trained on far more data than these."
    return f"{paper} {here}: {listed(parts)}. {_mark(found)}{other}"


def _is_comparable(record: Any) -> bool:
    """Of the paper's threat and images, if of fewer; not of another radius, norm or data set."""
    return is_stated(record) and record.data.source in (DATASETS["cifar10"].name, EMBEDDED_SOURCE)


def _longest(studies: Sequence[list[FinetuneRecord]]) -> list[list[FinetuneRecord]]:
    """The first study of each network: that of the most training."""
    first: dict[str, list[FinetuneRecord]] = {}
    for study in studies:
        first.setdefault(study[0].network.name, study)
    return list(first.values())


def _best(records: Sequence[Record]) -> str:
    """Table 5: the change of W_2 accuracy in the best setting of each network."""
    claim = _claim("every-network")
    values = [value for _, value in claim.paper()]
    paper = (
        f"Paper: in its best setting each of the {len(values)} networks gains, {span(values)} points of W₂ accuracy."
    )
    effects = counted(claim.effects(records))
    if not effects:
        return f"{paper} {NOTHING}"
    parts = []
    for effect in effects:
        text = _text(effect.value, effect.low)
        where = "" if effect.full else f" ({training_words(effect.records[0])})"
        setting = setting_words(*setting_of(best_setting(effect.records)[0]))
        parts.append(f"{text} on {name_of(effect.records[0])} ({setting}){where}")
    return f"{paper} Here: {listed(parts)}. {_mark(outcomes(effects, claim))}"


def _text(value: float, low: float | None) -> str:
    return Estimate(value, None if low is None else value - low).text(signed=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables 1 and 2, and the claims
# ---------------------------------------------------------------------------------------------------------------------


def _claim(key: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.key == key)


def _networks(records: Sequence[Record]) -> str:
    """Table 1: how much weaker each network is under the distributional attack than under the pointwise one."""
    pairs = [(paper_value(1, n, "w_inf"), paper_value(1, n, "w_2")) for n in PAPER_NETWORKS]
    printed = [a - b for a, b in pairs if a is not None and b is not None]
    paper = (
        f"Paper: W₂ accuracy is lower than W∞ accuracy for all {len(printed)} networks, by {min(printed):.2f} to"
        f" {max(printed):.2f} points."
    )
    tested = [r for r in _of(records, "evaluate") if "test" in r.correct]
    those = [r for r in tested if is_full(r)] or tested
    if not those:
        return f"{paper} {NOTHING}"
    parts, found = [], []
    for record in those:
        gap = estimate_of([bits(record, "test", "w_inf") - bits(record, "test", "w_2")])
        parts.append(f"{gap.text()} on {name_of(record)}")
        found.append({"above": "holds", "below": "contradicted"}.get(side(gap.low, gap.high), "not visible"))
    images = plural_of([images_of(r, "test") for r in those], "test image")
    return f"{paper} Here, on {images}, the gap is {listed(parts)}. {_mark(found)}"


def _budget(records: Sequence[Record]) -> str:
    """Table 2: where W-PGD-budget stands between the two other attacks."""
    parts = []
    for key, words in (
        ("budget-strong", "W-PGD-budget is stronger than the pointwise attack"),
        ("budget-slight", "W-PGD-budget is no stronger than the W₂ attack on the whole set"),
    ):
        parts.append(f"{words}: in the paper for {paper_count(_claim(key))} networks. Here: {_claimed(key, records)}")
    return " ".join(parts)


def _claimed(key: str, records: Sequence[Record]) -> str:
    """What the records say of a claim."""
    claim = _claim(key)
    effects = claim.effects(records)
    return _mark(outcomes(effects, claim)) if effects else NOTHING


def _claims(records: Sequence[Record]) -> str:
    """The page of the claims: how many of them hold."""
    found = [verdict(claim.effects(records), claim) for claim in CLAIMS]
    if set(found) == {"not yet measured"}:
        return f"The paper makes {len(CLAIMS)} claims that can be measured. {NOTHING}"
    words = {
        "holds": "hold in every comparison",
        "holds in part": "hold in part",
        "contradicted": "hold nowhere and are contradicted at least once",
        "not visible": "are not visible",
        "not yet measured": "are not yet measured",
    }
    parts = [f"{VERDICTS[v][0]} **{found.count(v)}** {words[v]}" for v in VERDICTS if v in found]
    ours = [str(number) for number, claim in enumerate(CLAIMS, 1) if claim.line]
    return (
        f"Of {len(CLAIMS)} claims of the paper, {listed(parts)}. For claims {listed(ours)} the paper gives no number,"
        " and the threshold is ours."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def _estimates(records: Sequence[Record]) -> str:
    """Figure 7.1: how far estimates of Upsilon from a tenth of the images are off."""
    from statistics import median

    paper = "Paper: a sample of 10 % of the training set estimates Υ well (a figure without numbers)."
    estimated = [r for r in _of(records, "sensitivity") if _is_comparable(r)]
    those = [r for r in estimated if r.data.train == FULL["train"]] or estimated
    if not those:
        return f"{paper} {NOTHING}"
    parts = [f"{100 * median(relative_errors(r)):.0f} % on {name_of(r)}" for r in those]
    images = plural_of([r.data.train for r in those], "training image")
    claim = _claim("upsilon-close")
    here = f"Here, on {images}, the median error is {listed(parts)}; well means below {claim.line:g} %."
    robust = "Paper: for more robust networks the estimates are closer."
    return f"{paper} {here} {_claimed('upsilon-close', records)} {robust} {_claimed('upsilon-robust', records)}"


def _curve(metric: str, records: Sequence[Record]) -> str:
    """Figures 7.2 and 7.3: accuracy before fine-tuning and in the epoch that is kept."""
    network, key = GRIDS[4][0], f"test_{metric}"
    before, after = paper_value(1, network, metric), paper_value(4, network, metric, 0.01, 1.0)
    assert before is not None and after is not None
    paper = (
        f"Paper: {METRICS[metric]} accuracy goes from {before:.2f} to {after:.2f} % (Table 4: before, and in the epoch"
        " that is kept)."
    )
    followed = [[r for r in study if has_curves(r)] for study in grids("whole", _of(records, "finetune"))]
    followed = [study for study in followed if study and _is_comparable(study[0])]
    whole = [study for study in followed if is_full(study[0])]
    if not followed:
        return f"{paper} {NOTHING}"
    parts, found = [], []
    for study in whole or _longest(followed):
        best = columns_of(study).get((0.01, 1.0)) or best_setting(study)
        rows = [(along(r)[0][key], along(r)[r.history.best][key]) for r in best]
        start, kept = (100 * sum(values) / len(rows) for values in zip(*rows, strict=True))
        epochs = listed(sorted({f"{r.history.best}" for r in best}, key=int))
        parts.append(f"from {start:.2f} to {kept:.2f} % on {name_of(best[0])} (epoch {epochs})")
        found.append(outcome_of_change(after - before, best, metric))
    here = "Here" if whole else "The whole protocol is not recorded here; in shorter runs"
    return f"{paper} {here}: {listed(parts)}. {_mark(found)}"


def _volatile(records: Sequence[Record]) -> str:
    """Figure 7.4: how much Upsilon of the training set changes from epoch to epoch."""
    claim = _claim("upsilon-volatile")
    paper = "Paper: Υ is volatile during fine-tuning (a figure without numbers)."
    effects = counted(claim.effects(records))
    if not effects:
        return f"{paper} {NOTHING}"
    parts = [f"{effect.value:.0f} % on {name_of(effect.records[0])}" for effect in effects]
    here = f"Here Υ of the training set changes from one epoch to the next by {listed(parts)} (median)"
    return f"{paper} {here}; volatile means more than {claim.line:g} %. {_mark(outcomes(effects, claim))}"


# ---------------------------------------------------------------------------------------------------------------------
# What goes beyond the paper
# ---------------------------------------------------------------------------------------------------------------------


def _open_points(records: Sequence[Record]) -> str:
    """How many choices that the paper leaves open move W_2 accuracy visibly, which most; and the control."""
    found = matters(_of(records, "finetune"))
    points = [m for m in found if m.point not in CONTROLS and m.point != "consistency"]
    if not points:
        return f"How much each choice matters that the paper leaves open: {NOTHING[:1].lower()}{NOTHING[1:]}"
    seen = [m for m in points if m.side("w_2")]
    of_one = ", each with one seed, so what chance does in a training is in it too"
    once = of_one * all(len(m.with_it) == 1 for m in seen)
    text = f"Of {len(points)} changes of what the paper leaves open, {len(seen)} move W₂ accuracy visibly{once}."
    text += by_worst_case(points)
    for how, words in HOW.items():
        if those := [m for m in points if m.with_it[0].config.perturb == how]:
            most = max(those, key=lambda m: abs(m.differences["w_2"].value))
            text += (
                f" The largest for the {words} is `{most.point}={most.value}`:"
                f" {most.differences['w_2'].text(signed=True)} points on {name_of(most.with_it[0])}."
            )
    for control in (m for m in found if m.point in CONTROLS):
        text += (
            f" Training against the {control.value} attacker instead changes W₂ accuracy by"
            f" {control.differences['w_2'].text(signed=True)} points on {name_of(control.with_it[0])}."
        )
    return text


def _stronger(records: Sequence[Record]) -> str:
    """How much of a gain in W_2 accuracy is there under the strongest attack of its kind."""
    those, parts = _of(records, "stronger"), []
    attacks = [name for name, attack in STRONGER.items() if attack.p == 2]
    names = [*PAPER_NETWORKS, *STAND_INS]
    given = [r for r in those if FINETUNED not in r.network.name]
    for before in sorted(given, key=lambda r: [*names, r.network.name].index(r.network.name)):
        tuned = [r for r in those if r.network.name == before.network.name + FINETUNED and r.data == before.data]
        # The whole network before the last layer, by the words of the source.
        for after in sorted((r for r in tuned if r.config == before.config), key=lambda r: r.network.source)[::-1]:
            usual = estimate_of([bits(after, "w_2", "accuracy") - bits(before, "w_2", "accuracy")])
            strongest = estimate_of([fewest_left(after, attacks) - fewest_left(before, attacks)])
            how = next((words for key, words in HOW.items() if f" {key}," in after.network.source), "fine-tuned")
            parts.append(
                f"{strongest.text(signed=True)} on {name_of(before)}, {how} ({usual.text(signed=True)} under the attack"
                " of the tables)"
            )
    if not parts:
        return f"Whether a gain is there under stronger attacks too: {NOTHING[:1].lower()}{NOTHING[1:]}"
    return (
        f"Fine-tuning changes W₂ accuracy under the strongest of {len(attacks)} distributional attacks by"
        f" {'; '.join(parts)}. Points, on the same test images."
    )


def _stand_ins(records: Sequence[Record]) -> str:
    """What the networks are that stand in for the paper's."""
    trained = _of(records, "pretrain")
    if not trained:
        return NOTHING
    values = [100 * r.metrics["after"]["w_2"] for r in trained]
    printed = [v for n in PAPER_NETWORKS if (v := paper_value(1, n, "w_2")) is not None]
    return (
        f"{plural(len(trained), 'small network')}, trained here on CIFAR-10, stand in for the paper's:"
        f" {listed([name_of(r) for r in trained])}. They keep {min(values):.0f} to {max(values):.0f} % W₂ accuracy,"
        f" the paper's networks {min(printed):.0f} to {max(printed):.0f} %."
    )


def _gallery(records: Sequence[Record]) -> str:
    """What each attacker leaves right, and how unequal the moves of the distributional one are."""
    record = pictures.opening(_of(records, "spend"))
    if record is None:
        return NOTHING
    right, moved = pictures.accuracies(record), record.distance["w_2"]
    delta = f"{255 * record.config.threat.delta:.4g}/255"
    return (
        f"With the same radius, δ = {delta}, the pointwise attacker leaves {100 * right['w_inf']:.1f} % of"
        f" {plural(len(moved), 'image')} right and the distributional one {100 * right['w_2']:.1f} %. It leaves"
        f" {moved.count(0):,} images alone and moves others by up to {pictures.pixels(max(moved))}/255."
    )


def _intro(records: Sequence[Record]) -> str:
    """The first page: what came of the paper's main claim, how much its yardstick says, and what of all its claims."""
    network = short_name(GRIDS[4][0])
    parts = [f"**Does fine-tuning help?** {network}, whole network. {_grid(4, records)}"]
    if headline := overstated(records):
        words = "With the same budget, an attacker who buys the cheapest images first leaves fewer images right."
        parts += [f"{headline} {words} The true worst case may be lower still.", by_both(records)]
        parts.append(
            "Accuracy on test images in per cent, at δ = 8/255 where no other is named. A change is what fine-tuning"
            " the whole network by the whole protocol adds, in points, with a 95 % interval; \\* is of one seed."
        )
    if any(claim.effects(records) for claim in CLAIMS):
        parts.append(_claims(records))
    return "\n\n".join(parts)


def _page_of_grid(table: int) -> Callable[[Sequence[Record]], str]:
    return lambda records: _grid(table, records)


PAGES: dict[str, Callable[[Sequence[Record]], str]] = {
    "intro": _intro,
    "claims": _claims,
    "worst_case": worst_answer,
    "train_worst_case": frontier_answer,
    "joint": joint_answer,
    "first_order": first_order_answer,
    "table1": _networks,
    "table2": _budget,
    "table5": _best,
    **{f"table{table}": _page_of_grid(table) for table in GRIDS},
    "figure7_1": _estimates,
    "figure7_2": lambda records: _curve("w_2", records),
    "figure7_3": lambda records: _curve("w_inf", records),
    "figure7_4": _volatile,
    "open_points": _open_points,
    "stronger": _stronger,
    "stand_ins": _stand_ins,
    "gallery": _gallery,
    "performance": performance_answer,
    "cost": cost_answer,
}
