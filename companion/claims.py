"""The paper's claims as rules over records: effects with intervals, and verdicts that follow from them.

A rule is a pure function of a list of records. It gives an effect for each study, or for each comparison within one. A
study is everything with the same network, images and configuration but for perturb, tau, eta and the seed."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from companion import evidence
from companion.evidence import bits, estimate_of, paper_value, span
from companion.records import Record, images_of, protocol
from companion.settings import GRIDS, METRICS, PAPER_NETWORKS, STAND_INS
from companion.tables import HOW, markdown, short_name

KINDS = ("finetune", "evaluate", "sensitivity")  # of the records that the claims are about
CIFAR10_ONLY = ("Zhang2019Theoretically", "Chen2024Data_WRN_34_10", *STAND_INS)  # trained on nothing else
VERDICTS = {
    "reproduced": "✓ reproduced",
    "partly": "◐ partly",
    "not": "✗ not reproduced",
    "not yet measured": "– not yet measured",
}
OUTCOMES = {"holds": "✓ holds", "contradicted": "✗ contradicted", "not visible": "○ not visible"}
ATTACKS = METRICS | {"budget": "W-PGD-budget"}

Column = tuple[str, float, float]  # perturb, tau, eta
Study = dict[Column, list[Record]]  # in a column the seeds
Numbers = list[tuple[str, float]]  # the paper's: what it compares, the effect


@dataclass(frozen=True)
class Effect:
    """What one study says about a claim.

    Attributes:
        study: network, images and configuration, in words.
        comparison: what is compared within it.
        value: the effect, in the claim's unit.
        low, high: the ends of its 95 % interval; None where there are too few values for one.
        seeds: the effect of each seed alone; empty where nothing is random.
        records: what it is computed from.
    """

    study: str
    comparison: str
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    records: tuple[Record, ...]

    @property
    def full(self) -> bool:
        """Whether all its records are of the paper's whole protocol."""
        return all(map(evidence.is_full, self.records))


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the rule that decides it.

    Attributes:
        key: its short name.
        text: the claim in one sentence.
        place: where the paper makes it or has its numbers.
        measure: what an effect is.
        unit: of an effect.
        effects: from records to effects.
        paper: the effects by the paper's own numbers (assets/paper.csv); empty where it prints none.
        commands: what would measure it.
        side: where of `line` the claim says an effect is: "above", "below", "not above" or "not below".
        line: 0, or a threshold of our own.
        note: what else a reader must know of the rule.
        why: where it does not hold everywhere, why that might be: a conjecture, but for what it refers to.
    """

    key: str
    text: str
    place: str
    measure: str
    unit: str
    effects: Callable[[Sequence[Record]], list[Effect]]
    paper: Callable[[], Numbers]
    commands: tuple[str, ...]
    side: str = "above"
    line: float = 0.0
    note: str = ""
    why: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# From effects to verdicts
# ---------------------------------------------------------------------------------------------------------------------


def outcome(effect: Effect, claim: Claim) -> str:
    """What an effect says of its claim: "holds", "contradicted" or "not visible".

    An effect is on a side of the line where its interval and the effect of every seed lie wholly there. A claim that
    something happens holds on its side; one that something does not happen holds unless the effect is on the other.
    """
    if effect.low is None or effect.high is None:
        return "not visible"
    above = min(effect.low, *effect.seeds, math.inf) > claim.line
    below = max(effect.high, *effect.seeds, -math.inf) < claim.line
    there, opposite = (above, below) if claim.side.endswith("above") else (below, above)
    if claim.side.startswith("not "):
        return "contradicted" if there else "holds"
    return "holds" if there else "contradicted" if opposite else "not visible"


def counted(effects: Sequence[Effect]) -> list[Effect]:
    """Those that a verdict counts: of the paper's whole protocol where there is one, all where there is none."""
    return [effect for effect in effects if effect.full] or list(effects)


def verdict(effects: Sequence[Effect], claim: Claim) -> str:
    """What the counted effects say: it holds in every one, "reproduced"; in some, "partly"; in none, "not"; there is
    none, "not yet measured"."""
    if not effects:
        return "not yet measured"
    outcomes = [outcome(effect, claim) for effect in counted(effects)]
    holding = outcomes.count("holds")
    return "reproduced" if holding == len(outcomes) else "partly" if holding else "not"


def on_claimed_side(value: float, claim: Claim) -> bool:
    """Whether a number of the paper, which has no interval, is where the claim says."""
    there = value > claim.line if claim.side.endswith("above") else value < claim.line
    return there != claim.side.startswith("not ")


def used(records: Sequence[Record]) -> list[Record]:
    """Those of the records that some claim is decided on."""
    drawn = {id(record) for claim in CLAIMS for effect in claim.effects(records) for record in effect.records}
    return [record for record in records if id(record) in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    """The records of a kind that follow the method as the paper states it, and as the ledger has what it leaves open.

    But for the reading of CE(f(x), f(x')): each makes a study of its own.
    """
    those = [r for r in records if r["kind"] == kind and evidence.is_stated(r)]
    return [r for r in those if evidence.changed(r).keys() <= {"consistency"}]


def _grouped(records: Sequence[Record], *but: str) -> list[list[Record]]:
    """Groups of one network, images and configuration but for tau, eta, the seed and the fields named."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        less = {k: v for k, v in record.items() if k not in but}
        less["config"] = {k: v for k, v in record["config"].items() if k not in but}
        groups.setdefault(protocol(less), []).append(record)
    return list(groups.values())


def studies(records: Sequence[Record]) -> list[Study]:
    """The fine-tuning records, a study for each group that differs in perturb, tau, eta and the seed alone."""
    return [evidence.settings_of(group) for group in evidence.studies(_of(records, "finetune"))]


def best_column(study: Study) -> Column:
    """The column of the best mean over seeds of the W_2 accuracy on validation images; never chosen on test images."""
    return max(study, key=lambda column: evidence.on_validation(study[column]))


def _name(record: Record) -> str:
    """The paper's own words for one of its networks; any other, a stand-in too, by its own name as code."""
    name = record["network"]["name"]
    return short_name(name) if name in PAPER_NETWORKS else f"`{name}`"


def _label(record: Record) -> str:
    """A study in words: network, training, and where the configuration is not that of wdat_core."""
    config = record["config"]
    parts = [_name(record)]
    if "epochs" in config:
        parts += [f"{record['data']['train']:,} images", f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"]
    return ", ".join(parts) + evidence.unusual(record)


def _words(column: Column) -> str:
    return f"{HOW[column[0]]}, τ = {column[1]:g}, η = {column[2]:g}"


def _against(better: Column, worse: Column) -> str:
    return f"{_words(better)} against " + (f"η = {worse[2]:g}" if better[1] == worse[1] else f"τ = {worse[1]:g}")


# ---------------------------------------------------------------------------------------------------------------------
# From records to effects
# ---------------------------------------------------------------------------------------------------------------------


def _of_images(study: str, comparison: str, per_seed: Sequence[Any], records: Sequence[Record]) -> Effect:
    """The mean over seeds of differences on the same images, arrays (n,); the interval is that of sampling images."""
    estimate = estimate_of(per_seed)
    low, high = (
        (None, None) if estimate.half is None else (estimate.value - estimate.half, estimate.value + estimate.half)
    )
    seeds = tuple(estimate_of([one]).value for one in per_seed) if "seed" in records[0]["config"] else ()
    return Effect(study, comparison, estimate.value, low, high, seeds, tuple(records))


def _of_median(study: str, comparison: str, per_seed: Sequence[list[float]], records: Sequence[Record]) -> Effect:
    """The median of the values of all seeds together, with its interval."""
    value, low, high = median_interval([v for one in per_seed for v in one])
    return Effect(study, comparison, value, low, high, tuple(map(statistics.median, per_seed)), tuple(records))


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


def changes(
    records: Sequence[Record], metrics: Sequence[str], perturb: str = "", only: Sequence[str] = ()
) -> list[Effect]:
    """For each study, in its best column: the sum over metrics of the accuracies after minus before, in points.

    Args:
        perturb: the columns to choose among; "" is all.
        only: the names of the networks that the claim is about; () is all.
    """
    effects = []
    for study in studies(records):
        columns = {column: seeds for column, seeds in study.items() if perturb in ("", column[0])}
        if not columns or (only and next(iter(columns.values()))[0]["network"]["name"] not in only):
            continue
        column = best_column(columns)
        seeds = columns[column]
        per_seed = [sum(bits(r, "after", m) - bits(r, "before", m) for m in metrics) for r in seeds]
        best = f"best of {len(columns)}" if len(columns) > 1 else "the only one"
        # The columns that were not chosen are evidence too: of the choice.
        drawn = [record for those in columns.values() for record in those]
        effect = _of_images(_label(seeds[0]), f"{_words(column)} ({best})", per_seed, drawn)
        effects.append(effect)
    return effects


def contrasts(records: Sequence[Record], pairs: Sequence[tuple[Column, Column]]) -> list[Effect]:
    """For each study and each pair of columns in it: W_2 accuracy in the first minus in the second, in points.

    Of the same test images, and of the seeds that both have.
    """
    effects = []
    for study, (better, worse) in itertools.product(studies(records), pairs):
        first, second = ({r["config"]["seed"]: r for r in study.get(column, [])} for column in (better, worse))
        if seeds := sorted(first.keys() & second.keys()):
            per_seed = [bits(first[s], "after", "w_2") - bits(second[s], "after", "w_2") for s in seeds]
            drawn = [those[s] for those in (first, second) for s in seeds]
            effects.append(_of_images(_label(drawn[0]), _against(better, worse), per_seed, drawn))
    return effects


def gaps(records: Sequence[Record], weaker: str, stronger: str) -> list[Effect]:
    """For each network and part of the data: accuracy under the attack said to be weaker minus the other, in points."""
    effects = []
    for record in _of(records, "evaluate"):
        for part in record["correct"]:
            differences = [bits(record, part, weaker) - bits(record, part, stronger)]
            words = f"{images_of(record, part):,} {part} images, {ATTACKS[weaker]} − {ATTACKS[stronger]}"
            effects.append(_of_images(_label(record), words, differences, [record]))
    return effects


def _errors(record: Record) -> list[float]:
    """How far each estimate of Upsilon is from the reference, in per cent of it."""
    return [100 * error for error in evidence.relative_errors(record)]


def _estimated(records: Sequence[Record]) -> list[Record]:
    return [record for record in _of(records, "sensitivity") if record["reference"] > 0]


def closeness(records: Sequence[Record]) -> list[Effect]:
    """For each network and training set: the median relative error of the estimates of Upsilon, in per cent."""
    effects = []
    for group in _grouped(_estimated(records)):
        words = f"{sum(len(r['estimates']) for r in group)} estimates, {group[0]['data']['train']:,} training images"
        effects.append(_of_median(_label(group[0]), words, [_errors(r) for r in group], group))
    return effects


def ranking(records: Sequence[Record]) -> list[Effect]:
    """For each two networks whose W_2 accuracy differs visibly: how much more the estimates of Upsilon err for the less
    robust one, median over the draws, in per cent of Upsilon; draw by draw, for equal seeds draw the same images.
    """
    tested = [record for record in _of(records, "evaluate") if "test" in record["correct"]]
    effects = []
    for group in _grouped(_estimated(records), "network"):
        networks = {digest: list(those) for digest, those in itertools.groupby(sorted(group, key=_digest), _digest)}
        for pair in itertools.combinations(networks, 2):
            if not (order := _by_robustness(tested, *pair)):
                continue
            less, more = ({r["config"]["seed"]: r for r in networks[_digest(record)]} for record in order)
            if not (seeds := sorted(less.keys() & more.keys())):
                continue
            per_seed = [[a - b for a, b in zip(_errors(less[s]), _errors(more[s]), strict=False)] for s in seeds]
            accuracies = [100 * record["metrics"]["test"]["w_2"] for record in order]
            words = f"{_name(order[0])} (W₂ {accuracies[0]:.2f} %) − {_name(order[1])} (W₂ {accuracies[1]:.2f} %)"
            drawn = [those[s] for those in (less, more) for s in seeds] + list(order)
            study = f"{group[0]['data']['train']:,} training images"
            effects.append(_of_median(study, words, per_seed, drawn))
    return effects


def _digest(record: Record) -> str:
    return record["network"]["digest"]


def _by_robustness(tested: Sequence[Record], one: str, other: str) -> tuple[Record, Record] | None:
    """Records of the less and of the more robust of two networks (by digest); None without a visible difference.

    On the same test images, as many as there are.
    """
    for group in sorted(_grouped(tested, "network"), key=lambda g: -images_of(g[0], "test")):
        found = {_digest(record): record for record in group}
        if one in found and other in found:
            a, b = found[one], found[other]
            gap = estimate_of([bits(b, "test", "w_2") - bits(a, "test", "w_2")])
            if gap.half is not None and abs(gap.value) > gap.half:
                return (a, b) if gap.value > 0 else (b, a)
    return None


def volatility(records: Sequence[Record]) -> list[Effect]:
    """For each study and column with eta 1 whose curves were measured: the median relative change of Upsilon of the
    whole training set from one epoch to the next, in per cent."""
    effects = []
    for study in studies(records):
        for column, seeds in study.items():
            moved = {i: moves for i, record in enumerate(seeds) if (moves := _moves(record))}
            if column[2] == 1 and moved:
                drawn = [seeds[i] for i in moved]
                effects.append(_of_median(_label(drawn[0]), _words(column), list(moved.values()), drawn))
    return effects


def _moves(record: Record) -> list[float]:
    """Relative changes of Upsilon of the training set from epoch to epoch, in per cent; none without curves.

    Not of the estimates in the minibatches: those err by sampling, whether the network trains or not.
    """
    if "start" not in record["history"]:
        return []
    curve = [row["train_upsilon"] for row in evidence.along(record)]
    return [100 * abs(b / a - 1) for a, b in itertools.pairwise(curve) if a > 0]


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own numbers
# ---------------------------------------------------------------------------------------------------------------------

TAUS, ETAS = (0.1, 0.01), (0.1, 1.0)
GRID: tuple[Column, ...] = tuple(itertools.product(HOW, TAUS, ETAS))
ETA_PAIRS = [((how, tau, 1.0), (how, tau, 0.1)) for how in HOW for tau in TAUS]
TAU_PAIRS = {
    "whole": [(("whole", 0.01, eta), ("whole", 0.1, eta)) for eta in ETAS],
    "last_layer": [(("last_layer", 0.1, eta), ("last_layer", 0.01, eta)) for eta in ETAS],
}


def printed(network: str, column: Column, metric: str) -> float | None:
    """Accuracy after fine-tuning as the paper prints it, in per cent. Of Chen and Lee it has one column: Table 5."""
    tables = {subject: table for table, subject in GRIDS.items()}
    if (network, column[0]) in tables:
        return paper_value(tables[network, column[0]], network, metric, *column[1:])
    return paper_value(5, network, metric) if network.startswith("Chen") and column == ("whole", 0.01, 1.0) else None


def paper_changes(metrics: Sequence[str], perturb: str = "", only: Sequence[str] = ()) -> Numbers:
    """As `changes`; in the column of the best W_2, since the paper prints no accuracy on validation images."""
    found = []
    for network in PAPER_NETWORKS:
        w_2 = {column: printed(network, column, "w_2") for column in GRID if perturb in ("", column[0])}
        known = {column: value for column, value in w_2.items() if value is not None}
        if known and (not only or network in only):
            column = max(known, key=lambda c: known[c])
            value = sum(_number(printed(network, column, m)) - _number(paper_value(1, network, m)) for m in metrics)
            found.append((f"{short_name(network)}, {_words(column)}", value))
    return found


def paper_contrasts(pairs: Sequence[tuple[Column, Column]]) -> Numbers:
    """As `contrasts`."""
    found = []
    for network, (better, worse) in itertools.product(PAPER_NETWORKS, pairs):
        first, second = (printed(network, column, "w_2") for column in (better, worse))
        if first is not None and second is not None:
            found.append((f"{short_name(network)}, {_against(better, worse)}", first - second))
    return found


def paper_gaps(weaker: str, stronger: str) -> Numbers:
    """As `gaps`, from Table 2."""
    return [
        (short_name(network), _number(paper_value(2, network, weaker)) - _number(paper_value(2, network, stronger)))
        for network in PAPER_NETWORKS
    ]


def nothing_printed() -> Numbers:
    """Of what the paper shows in a figure only."""
    return []


def _number(value: float | None) -> float:
    assert value is not None, "the paper prints this number: assets/paper.csv must have it"
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The claims
# ---------------------------------------------------------------------------------------------------------------------


def _both(measure: Any, paper: Any, **what: Any) -> dict[str, Any]:
    """The same rule over records and over the paper's numbers."""
    return {"effects": functools.partial(measure, **what), "paper": functools.partial(paper, **what)}


def _run(notebook: str) -> str:
    return f"papermill notebooks/{notebook}.ipynb out.ipynb"


POINTS, OF_UPSILON = "percentage points", "per cent of Υ"
CHANGE = (
    "accuracy of the fine-tuned minus that of the given network, same test images, in the column of the best W₂"
    " accuracy on validation images"
)
WIDE = "An interval that is wide upholds it too."
TO_GAIN = (
    "Under the best attacks accuracy under W₂ cannot exceed that under W∞, whose ball is a part of its own: the gap"
    " between the two is what there is to win without growing stronger under the pointwise attack as well. By"
    " [Table 1](table1.ipynb) it is wide in the paper's networks, narrower in stand-ins pre-trained with TRADES, and"
    " narrowest in the one pre-trained with PGD."
)
CLAIMS = (
    Claim(
        "whole-w2",
        "Fine-tuning the whole network raises its W₂ accuracy.",
        "Section 7; Tables 4, 7, 9, 11 and 5",
        f"W₂ {CHANGE}",
        POINTS,
        **_both(changes, paper_changes, metrics=("w_2",), perturb="whole"),
        commands=(_run("table4"),),
        why=TO_GAIN,
    ),
    Claim(
        "whole-worth",
        "Fine-tuning the whole network raises W₂ accuracy by more than it costs in W∞ accuracy.",
        "Abstract; Tables 4, 7, 9, 11 and 5",
        f"W₂ plus W∞ {CHANGE}",
        POINTS,
        **_both(changes, paper_changes, metrics=("w_2", "w_inf"), perturb="whole"),
        commands=(_run("table4"),),
        why=TO_GAIN,
    ),
    Claim(
        "whole-winf",
        "For networks trained on CIFAR-10 only, fine-tuning the whole network raises W∞ accuracy too.",
        "Section 7; Tables 4 and 5",
        f"W∞ {CHANGE}",
        POINTS,
        **_both(changes, paper_changes, metrics=("w_inf",), perturb="whole", only=CIFAR10_ONLY),
        commands=(_run("table4"),),
        why="If [Table 2](table2.ipynb) is of training images, as its W∞ column suggests, the paper's networks fit"
        " those far better than others, and further training with new attacked images may win some of that back. The"
        " stand-ins fit both nearly alike. Nor is the pointwise attack of the tables the strongest: "
        "[Stronger attacks](stronger.ipynb) has the change under others.",
    ),
    Claim(
        "last-layer",
        "For networks trained on CIFAR-10 only, fine-tuning the last layer alone does not raise W₂ accuracy.",
        "Section 7; Table 3",
        f"W₂ {CHANGE}",
        POINTS,
        **_both(changes, paper_changes, metrics=("w_2",), perturb="last_layer", only=CIFAR10_ONLY),
        commands=(_run("table3"),),
        side="not above",
        note=WIDE,
        why="Where it gains, it loses clean accuracy ([Table 3](table3.ipynb)): the one is traded for the"
        " other, and a last layer alone can do that. A network whose pre-training left that trade open has it to make.",
    ),
    Claim(
        "eta",
        "The current estimate of Υ (η = 1) always outperforms the moving average (η = 0.1).",
        "Section 7; Tables 3, 4 and 6 to 11",
        "W₂ accuracy after fine-tuning at η = 1 minus that at η = 0.1, same τ, seeds and test images",
        POINTS,
        **_both(contrasts, paper_contrasts, pairs=ETA_PAIRS),
        commands=(_run("table3"), _run("table4")),
        why="η changes the budget of each batch and nothing else. Where training against the distributional attacker"
        " has little to win (claim 1), how its budget is found can matter little.",
    ),
    Claim(
        "tau-whole",
        "For the whole network, the smaller learning rate τ = 0.01 does better than 0.1.",
        "Section 7; Tables 4, 7, 9 and 11",
        "W₂ accuracy after fine-tuning at τ = 0.01 minus that at τ = 0.1, same η, seeds and test images",
        POINTS,
        **_both(contrasts, paper_contrasts, pairs=TAU_PAIRS["whole"]),
        commands=(_run("table4"),),
    ),
    Claim(
        "tau-last",
        "For the last layer, the larger learning rate τ = 0.1 does better than 0.01.",
        "Section 7; Tables 3, 6, 8 and 10",
        "W₂ accuracy after fine-tuning at τ = 0.1 minus that at τ = 0.01, same η, seeds and test images",
        POINTS,
        **_both(contrasts, paper_contrasts, pairs=TAU_PAIRS["last_layer"]),
        commands=(_run("table3"),),
    ),
    Claim(
        "every-network",
        "In the best setting, whole network or last layer, fine-tuning raises the W₂ accuracy of every network.",
        "Section 7; Table 5",
        f"W₂ {CHANGE}, whichever layers were trained",
        POINTS,
        **_both(changes, paper_changes, metrics=("w_2",)),
        commands=(_run("table3"), _run("table4")),
        why=TO_GAIN,
    ),
    Claim(
        "budget-strong",
        "The W-PGD-budget attack is stronger than the pointwise attack.",
        "Section 7; Table 2",
        "accuracy under the pointwise attack minus that under W-PGD-budget, same images",
        POINTS,
        **_both(gaps, paper_gaps, weaker="w_inf", stronger="budget"),
        commands=(_run("table2"),),
        why="W-PGD-budget splits one budget over the batches by their share of Υ. Where a few images with nearly tied"
        " logits make up most of Υ, their batches have most of the budget and waste it, and the attack on all the"
        " others is weak. Whether a set has such images is chance. The paper may have attacked training images, as"
        " [the ledger](../ledger.md) says.",
    ),
    Claim(
        "budget-slight",
        "The W-PGD-budget attack is no stronger than the W₂ attack whose budget it splits.",
        "Section 7; Table 2",
        "accuracy under W-PGD-budget minus that under the W₂ attack, same images",
        POINTS,
        **_both(gaps, paper_gaps, weaker="budget", stronger="w_2"),
        commands=(_run("table2"),),
        side="not below",
        note=WIDE,
    ),
    Claim(
        "upsilon-close",
        "Estimates of Υ from 10 % of the training set are close to the reference from all of it.",
        "Section 7; Figure 7.1",
        "median over the draws of the distance between estimate and reference",
        OF_UPSILON,
        effects=closeness,
        paper=nothing_printed,
        commands=(_run("figure7_1"),),
        side="below",
        line=10.0,
        note="The paper gives no number for close; the 10 % are ours.",
        why="ReDLR divides by a difference of two logits, and where these nearly tie its gradient has no bound: a few"
        " images make up most of Υ, and a tenth of all the images has them or has not.",
    ),
    Claim(
        "upsilon-robust",
        "For more robust networks these estimates are closer to the reference.",
        "Section 7; Figure 7.1, Table 1",
        "for each two networks whose W₂ accuracy on test images differs visibly, error of the estimate for the less"
        " robust one minus that for the more robust one, median over draws of the same images",
        OF_UPSILON,
        effects=ranking,
        paper=nothing_printed,
        commands=(f"{_run('table1')} -p preset paper", f"{_run('figure7_1')} -p preset paper"),
        why="Ten draws tell the errors of two networks apart only where one is far larger.",
    ),
    Claim(
        "upsilon-volatile",
        "Along training, Υ is volatile.",
        "Section 7; Figure 7.4",
        "median change of Υ of the training set from one epoch to the next, at η = 1",
        OF_UPSILON,
        effects=volatility,
        paper=nothing_printed,
        commands=(_run("figure7_4"),),
        line=10.0,
        note="The paper gives no number for volatile; the 10 % are ours. The interval takes changes as independent.",
        why="The threshold is ours, and a median passes over the few great jumps that make a curve look volatile"
        " ([Figure 7.4](figure7_4.ipynb)).",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def rule(claim: Claim) -> str:
    """What an effect of the claim is, and where the claim holds, in words."""
    line = f"{claim.line:g}{' %' if claim.line else ''}"
    when = "unless" if claim.side.startswith("not ") else "where"
    holds = f"The claim holds {when} the effect lies wholly {claim.side.removeprefix('not ')} {line}."
    return " ".join(filter(None, [f"Effect: {claim.measure}; in {claim.unit}.", holds, claim.note]))


def overview(records: Sequence[Record]) -> Any:
    """A row for each claim, as Markdown: its place, how many of the paper's own numbers bear it out, the verdict."""
    from IPython.display import Markdown

    lines = ["| | claim | in the paper | the paper's own numbers | here |", "|---|---|---|---|---|"]
    for number, claim in enumerate(CLAIMS, 1):
        effects = claim.effects(records)
        cells = [f"{number}", claim.text, claim.place, _paper_count(claim), _verdict_text(effects, claim)]
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def details(records: Sequence[Record]) -> Any:
    """For each claim, as Markdown: its rule, the paper's numbers, every effect with its interval and outcome, and where
    it does not hold everywhere, why that might be."""
    from IPython.display import Markdown

    parts = []
    for number, claim in enumerate(CLAIMS, 1):
        effects = claim.effects(records)
        parts += [f"**{number}. {claim.text}** {_verdict_text(effects, claim)}", rule(claim), _paper_text(claim)]
        heads = ["network and run", "comparison", "effect", "95 % interval", "seeds", "outcome"]
        first = counted(effects)
        rest = [effect for effect in effects if not effect.full] if len(first) < len(effects) else []
        for those, title in ((first, ""), (rest, "Smaller runs, which the verdict does not count:")):
            if those:
                parts += [title] * bool(title) + [markdown(heads, [_row(effect, claim) for effect in those]).data]
        if claim.why and verdict(effects, claim) in ("partly", "not"):
            parts.append(f"*Why it might be:* {claim.why}")
    return Markdown("\n\n".join(parts))


def _verdict_text(effects: Sequence[Effect], claim: Claim) -> str:
    found = VERDICTS[verdict(effects, claim)]
    if not effects:
        return f"{found}: {', '.join(f'`{command}`' for command in claim.commands)}"
    outcomes = [outcome(effect, claim) for effect in counted(effects)]
    counts = [f"holds in {outcomes.count('holds')} of {len(outcomes)}"]
    counts += [f"contradicted in {outcomes.count('contradicted')}"] * ("contradicted" in outcomes)
    return f"{found}: {', '.join(counts)}"


def _paper_count(claim: Claim) -> str:
    numbers = claim.paper()
    return f"{sum(on_claimed_side(v, claim) for _, v in numbers)} of {len(numbers)}" if numbers else "–"


def _paper_text(claim: Claim) -> str:
    numbers = claim.paper()
    if not numbers:
        return "The paper prints no number."
    others = [f"{what}: {value:+z.2f}" for what, value in numbers if not on_claimed_side(value, claim)]
    return (
        f"By the paper's own numbers it is so in {_paper_count(claim)} comparison{'s' * (len(numbers) > 1)},"
        f" {span([value for _, value in numbers])}{'; not for ' * bool(others)}{'; '.join(others)}."
    )


def _row(effect: Effect, claim: Claim) -> list[str]:
    number = "{:.2f}" if claim.line else "{:+z.2f}"  # a sign says something against 0 only
    known = effect.low is not None and effect.high is not None
    interval = f"{number.format(effect.low)} to {number.format(effect.high)}" if known else "–"
    seeds = "–" if not effect.seeds else f"{len(effect.seeds)}"
    if len(effect.seeds) > 1:
        seeds += f": {number.format(min(effect.seeds))} to {number.format(max(effect.seeds))}"
    return [
        effect.study,
        effect.comparison,
        number.format(effect.value),
        interval,
        seeds,
        OUTCOMES[outcome(effect, claim)],
    ]
