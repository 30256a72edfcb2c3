"""The paper's claims as data: a sentence, a place and a rule each; and the verdicts that follow by the rules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from companion.bases import Record
from companion.effects import (
    ETA_PAIRS,
    TAU_PAIRS,
    Effect,
    Numbers,
    best_changes,
    closeness,
    contrasts,
    gaps,
    nothing_printed,
    paper_best_changes,
    paper_contrasts,
    paper_gaps,
    ranking,
    volatility,
)
from companion.intervals import found_at, side
from companion.networks import PUBLISHED
from companion.settings import STAND_INS
from companion.words import overall

ORDER = {"w_2": 2.0, "w_inf": math.inf}  # p of an attack of the tables
RADII = (2, 4, 8)  # in 255ths, at which the worst case judges


def cifar10_only() -> tuple[str, ...]:
    """The networks that were trained on CIFAR-10's images and nothing else."""
    others = [name for name, network in PUBLISHED.items() if not network.extra]
    return ("Zhang2019Theoretically", "Chen2024Data_WRN_34_10", *STAND_INS, *others)


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
        side: on which side of `line` the claim says an effect is: "above", "below", "not above" or "not below".
        line: 0, or a threshold of our own.
        note: what else a reader must know about the rule.
        why: where it does not hold everywhere, a possible reason: a guess, apart from what it refers to.
        found: the same effects by the worst case found at a radius, in 255ths, in place of the attacks of the tables;
            None where the claim is about these attacks.
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
    found: Callable[[Sequence[Record], float], list[Effect]] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# From effects to verdicts
# ---------------------------------------------------------------------------------------------------------------------


def outcome(effect: Effect, claim: Claim) -> str:
    """What an effect says of its claim: "holds", "contradicted" or "not visible".

    An effect is on a side of the line where its interval and the effect of every seed lie wholly there. A claim that
    something happens holds on its side; one that something does not happen holds unless the effect is on the other.
    """
    if effect.low is None:
        return "not visible"
    where, named = side(effect.low, effect.high, effect.seeds, claim.line), claim.side.removeprefix("not ")
    if claim.side.startswith("not "):
        return "contradicted" if where == named else "holds"
    return "holds" if where == named else "contradicted" if where else "not visible"


def counted(effects: Sequence[Effect]) -> list[Effect]:
    """Those that a verdict counts: of the paper's whole protocol where there is one, all where there is none."""
    return [effect for effect in effects if effect.full] or list(effects)


def outcomes(effects: Sequence[Effect], claim: Claim) -> list[str]:
    """The outcomes of the effects that count."""
    return [outcome(effect, claim) for effect in counted(effects)]


def verdict(effects: Sequence[Effect], claim: Claim) -> str:
    """What the counted effects say together, a key of `words.VERDICTS`."""
    return overall(outcomes(effects, claim))


def on_claimed_side(value: float, claim: Claim) -> bool:
    """Whether a number of the paper, which has no interval, is where the claim says."""
    there = value > claim.line if claim.side.endswith("above") else value < claim.line
    return there != claim.side.startswith("not ")


def used(records: Sequence[Record], *keys: str) -> list[Record]:
    """Those of the records that some claim is decided on, or one of the claims with these keys."""
    those = [claim for claim in CLAIMS if claim.key in keys or not keys]
    drawn = {id(record) for claim in those for effect in claim.effects(records) for record in effect.records}
    return [record for record in records if id(record) in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# The claims
# ---------------------------------------------------------------------------------------------------------------------


def _both(measure: Any, paper: Any, **what: Any) -> dict[str, Any]:
    """The same rule over records and over the paper's numbers."""
    return {"effects": functools.partial(measure, **what), "paper": functools.partial(paper, **what)}


def _changes(metrics: Sequence[str], **what: Any) -> dict[str, Any]:
    """A rule about changes, by the attacks of the tables and by the worst case found."""

    def found(records: Sequence[Record], delta: float) -> list[Effect]:
        return best_changes(records, [found_at(ORDER[metric], delta) for metric in metrics], **what)

    return {**_both(best_changes, paper_best_changes, metrics=metrics, **what), "found": found}


def _contrasts(pairs: Any) -> dict[str, Any]:
    """The same of a rule about two settings."""

    def found(records: Sequence[Record], delta: float) -> list[Effect]:
        return contrasts(records, pairs, found_at(2, delta))

    return {**_both(contrasts, paper_contrasts, pairs=pairs), "found": found}


def _run(notebook: str) -> str:
    return f"papermill notebooks/{notebook}.ipynb out.ipynb"


POINTS, OF_UPSILON = "percentage points", "per cent of Υ"
CHANGE = (
    "accuracy of the fine-tuned minus that of the given network, same test images, in the setting with the best W₂"
    " accuracy on validation images"
)
WIDE = "So a wide interval does not count against the claim."
TO_GAIN = (
    "The W₂ ball contains the W∞ ball, so under the best attacks W₂ accuracy cannot be higher than W∞ accuracy. The gap"
    " between the two is what a network can win without becoming more robust to the pointwise attack as well. By"
    " [Table 1](table1.ipynb) the gap is wide in the paper's networks, narrower in stand-ins pre-trained with TRADES,"
    " and narrowest in the one pre-trained with PGD."
)
CLAIMS = (
    Claim(
        "whole-w2",
        "Fine-tuning the whole network raises its W₂ accuracy.",
        "Section 7; Tables 4, 7, 9, 11 and 5",
        f"W₂ {CHANGE}",
        POINTS,
        **_changes(("w_2",), perturb="whole"),
        commands=(_run("table4"),),
        why=TO_GAIN,
    ),
    Claim(
        "whole-worth",
        "Fine-tuning the whole network raises W₂ accuracy by more than it costs in W∞ accuracy.",
        "Abstract; Tables 4, 7, 9, 11 and 5",
        f"W₂ plus W∞ {CHANGE}",
        POINTS,
        **_changes(("w_2", "w_inf"), perturb="whole"),
        commands=(_run("table4"),),
        why=TO_GAIN,
    ),
    Claim(
        "whole-winf",
        "For networks trained on CIFAR-10 only, fine-tuning the whole network raises W∞ accuracy too.",
        "Section 7; Tables 4 and 5",
        f"W∞ {CHANGE}",
        POINTS,
        **_changes(("w_inf",), perturb="whole", only=cifar10_only()),
        commands=(_run("table4"),),
        why="If [Table 2](table2.ipynb) is of training images, as its W∞ column suggests, the paper's networks do far"
        " better on training images than on test images, and more training may close some of that gap. The stand-ins"
        " do almost equally well on both. Also, the pointwise attack of the tables is not the strongest one:"
        " [Stronger attacks](stronger.ipynb) has the change under others.",
    ),
    Claim(
        "last-layer",
        "For networks trained on CIFAR-10 only, fine-tuning the last layer alone does not raise W₂ accuracy.",
        "Section 7; Table 3",
        f"W₂ {CHANGE}",
        POINTS,
        **_changes(("w_2",), perturb="last_layer", only=cifar10_only()),
        commands=(_run("table3"),),
        side="not above",
        note=WIDE,
        why="Where W₂ accuracy rises, clean accuracy falls ([Table 3](table3.ipynb)). A last layer alone can trade one"
        " for the other. How much there is to trade depends on how the network was pre-trained.",
    ),
    Claim(
        "eta",
        "The current estimate of Υ (η = 1) always outperforms the moving average (η = 0.1).",
        "Section 7; Tables 3, 4 and 6 to 11",
        "W₂ accuracy after fine-tuning at η = 1 minus that at η = 0.1, same τ, seeds and test images",
        POINTS,
        **_contrasts(ETA_PAIRS),
        commands=(_run("table3"), _run("table4")),
        why="η changes the budget of each batch and nothing else. Where training against the distributional attacker"
        " wins little (claim 1), the way its budget is found cannot matter much.",
    ),
    Claim(
        "tau-whole",
        "For the whole network, the smaller learning rate τ = 0.01 does better than 0.1.",
        "Section 7; Tables 4, 7, 9 and 11",
        "W₂ accuracy after fine-tuning at τ = 0.01 minus that at τ = 0.1, same η, seeds and test images",
        POINTS,
        **_contrasts(TAU_PAIRS["whole"]),
        commands=(_run("table4"),),
    ),
    Claim(
        "tau-last",
        "For the last layer, the larger learning rate τ = 0.1 does better than 0.01.",
        "Section 7; Tables 3, 6, 8 and 10",
        "W₂ accuracy after fine-tuning at τ = 0.1 minus that at τ = 0.01, same η, seeds and test images",
        POINTS,
        **_contrasts(TAU_PAIRS["last_layer"]),
        commands=(_run("table3"),),
        why="At τ = 0.1 the accuracy of `cnn_a_adv4` jumps from one epoch to the next, and with all layers its training"
        " diverges: the rate is too large for this network, which has no batch normalisation.",
    ),
    Claim(
        "every-network",
        "In the best setting, whole network or last layer, fine-tuning raises the W₂ accuracy of every network.",
        "Section 7; Table 5",
        f"W₂ {CHANGE}, whichever layers were trained",
        POINTS,
        **_changes(("w_2",)),
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
        why="W-PGD-budget splits one budget over the batches by their share of Υ. Where a few images with two almost"
        " equal logits make up most of Υ, their batches get most of the budget and waste it, and the attack on all"
        " other batches is weak. Whether a set has such images is chance. The paper may have attacked training images:"
        " see [the ledger](../ledger.md).",
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
        note=f"{WIDE} The paper says slightly less effective and gives no bound, so this judges the direction alone.",
    ),
    Claim(
        "upsilon-close",
        "A sample of 10 % of the training set estimates Υ well.",
        "Section 8; Figure 7.1",
        "median over the draws of the distance between estimate and reference",
        OF_UPSILON,
        effects=closeness,
        paper=nothing_printed,
        commands=(_run("figure7_1"),),
        side="below",
        line=10.0,
        note="The paper says good performance and gives no number; the 10 % are our choice.",
        why="ReDLR divides by a difference of two logits. Where they are almost equal, its gradient has no bound. So a"
        " few images make up most of Υ, and a sample of a tenth holds some of them or none.",
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
        why="Ten samples show a difference between two networks only where one error is far larger.",
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
        note="The paper gives no number for volatile; the 10 % are our choice. The interval takes the changes as"
        " independent.",
        why="The threshold is our choice, and a median does not see the few large jumps that make a curve look volatile"
        " ([Figure 7.4](figure7_4.ipynb)).",
    ),
)
