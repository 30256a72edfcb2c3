"""From records to effects: what each study says about a claim, with its interval; and the same of the paper's numbers.

Each function takes records of any kind and gives an effect for each study, or for each comparison within one. A study
is everything with the same network, images and configuration apart from perturb, tau, eta and the seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from companion import evidence
from companion.bases import OfNetwork, Record, images_of
from companion.evidence import Setting, alike, best_setting, by_setting, paper_value, setting_of, studies
from companion.intervals import bits, estimate_of, is_found, median_interval, search_of, with_metrics
from companion.kinds import EvaluateRecord, FinetuneRecord, SensitivityRecord
from companion.settings import GRIDS, METRICS, PAPER_NETWORKS
from companion.words import HOW, name_of, setting_words, short_name, training_words

KINDS = ("finetune", "evaluate", "sensitivity")  # of the records that effects are computed from
ATTACKS = METRICS | {"budget": "W-PGD-budget"}

Pair = tuple[Setting, Setting]  # said to be better, said to be worse
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
    records: tuple[Any, ...]

    @property
    def full(self) -> bool:
        """Whether all its records are of the paper's whole protocol."""
        return all(map(evidence.is_full, self.records))


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------


def stated(records: Sequence[Record], kind: str) -> list[Any]:
    """The records of a kind that follow the method as the paper states it, with what it leaves open as in the ledger.

    The readings of CE(f(x), f(x')) are an exception: each makes a study of its own.
    """
    those = [r for r in records if r.kind == kind and evidence.is_stated(r)]
    return [r for r in those if not isinstance(r, FinetuneRecord) or set(evidence.deviations(r)) <= {"consistency"}]


def _label(record: OfNetwork) -> str:
    """A study in words: network, training, and where the configuration is not that of wdat_core."""
    parts = [name_of(record)]
    if isinstance(record, FinetuneRecord):
        parts.append(training_words(record))
    return ", ".join(parts) + evidence.unusual(record)


def _against(better: Setting, worse: Setting) -> str:
    other = f"η = {worse[2]:g}" if better[1] == worse[1] else f"τ = {worse[1]:g}"
    return f"{setting_words(*better)} against {other}"


# ---------------------------------------------------------------------------------------------------------------------
# From records to effects
# ---------------------------------------------------------------------------------------------------------------------


def _of_images(study: str, comparison: str, per_seed: Sequence[Any], records: Sequence[Record]) -> Effect:
    """The mean over seeds of differences on the same images, arrays (n,); the interval is that of sampling images."""
    estimate = estimate_of(per_seed)
    seeds = tuple(estimate_of([one]).value for one in per_seed) if hasattr(records[0].config, "seed") else ()
    return Effect(study, comparison, estimate.value, estimate.low, estimate.high, seeds, tuple(records))


def _of_median(study: str, comparison: str, per_seed: Sequence[list[float]], records: Sequence[Record]) -> Effect:
    """The median of the values of all seeds together, with its interval."""
    value, low, high = median_interval([v for one in per_seed for v in one])
    return Effect(study, comparison, value, low, high, tuple(map(statistics.median, per_seed)), tuple(records))


def best_changes(
    records: Sequence[Record], metrics: Sequence[str], perturb: str = "", only: Sequence[str] = ()
) -> list[Effect]:
    """For each study, in its best setting: the sum over metrics of the accuracies after minus before, in points.

    Args:
        perturb: of the settings to choose among; "" is all.
        only: the names of the networks that the claim is about; () is all.
    """
    effects = []
    for study in studies(stated(records, "finetune")):
        # The settings that are not chosen are evidence too: of the choice.
        those = [record for record in study if perturb in ("", record.config.perturb)]
        those = with_metrics(those, metrics, "before", "after")
        if not those or (only and those[0].network.name not in only):
            continue
        best, n = best_setting(those), len(by_setting(those))
        per_seed = [sum(bits(r, "after", m) - bits(r, "before", m) for m in metrics) for r in best]
        comparison = f"{setting_words(*setting_of(best[0]))} ({f'best of {n}' if n > 1 else 'the only one'})"
        effects.append(_of_images(_label(best[0]), comparison, per_seed, those))
    return effects


def contrasts(records: Sequence[Record], pairs: Sequence[Pair], metric: str = "w_2") -> list[Effect]:
    """For each study and each pair of settings in it: the accuracy in the first minus in the second, in points.

    Of the same test images, and of the seeds that both have.
    """
    effects = []
    settings = map(by_setting, studies(with_metrics(stated(records, "finetune"), [metric], "after")))
    for study, (better, worse) in itertools.product(settings, pairs):
        first, second = ({r.config.seed: r for r in study.get(setting, [])} for setting in (better, worse))
        seeds = sorted(first.keys() & second.keys())
        if is_found(metric):  # of searches of one length
            seeds = [s for s in seeds if search_of(first[s]) == search_of(second[s])]
        if seeds:
            per_seed = [bits(first[s], "after", metric) - bits(second[s], "after", metric) for s in seeds]
            drawn = [those[s] for those in (first, second) for s in seeds]
            effects.append(_of_images(_label(drawn[0]), _against(better, worse), per_seed, drawn))
    return effects


def gaps(records: Sequence[Record], weaker: str, stronger: str) -> list[Effect]:
    """For each network and part of the data: accuracy under the attack said to be weaker minus the other, in points."""
    effects = []
    for record in stated(records, "evaluate"):
        for part in (part for part in record.correct if part != "val"):  # validation images choose, and decide no claim
            differences = [bits(record, part, weaker) - bits(record, part, stronger)]
            words = f"{images_of(record, part):,} {part} images, {ATTACKS[weaker]} − {ATTACKS[stronger]}"
            effects.append(_of_images(_label(record), words, differences, [record]))
    return effects


def _errors(record: SensitivityRecord) -> list[float]:
    """How far each estimate of Upsilon is from the reference, in per cent of it."""
    return [100 * error for error in evidence.relative_errors(record)]


def _estimated(records: Sequence[Record]) -> list[SensitivityRecord]:
    return [record for record in stated(records, "sensitivity") if record.reference > 0]


def closeness(records: Sequence[Record]) -> list[Effect]:
    """For each network and training set: the median relative error of the estimates of Upsilon, in per cent."""
    effects = []
    for group in alike(_estimated(records)):
        words = f"{sum(len(r.estimates) for r in group)} estimates, {group[0].data.train:,} training images"
        effects.append(_of_median(_label(group[0]), words, [_errors(r) for r in group], group))
    return effects


def ranking(records: Sequence[Record]) -> list[Effect]:
    """For each two networks whose W_2 accuracy differs visibly: how much more the estimates of Upsilon err for the less
    robust one, median over the draws, in per cent of Upsilon; draw by draw, for equal seeds draw the same images.
    """
    tested: list[EvaluateRecord] = [record for record in stated(records, "evaluate") if "test" in record.correct]
    effects = []
    for group in alike(_estimated(records), "network"):
        networks = {digest: list(those) for digest, those in itertools.groupby(sorted(group, key=_digest), _digest)}
        for pair in itertools.combinations(networks, 2):
            if not (order := _by_robustness(tested, *pair)):
                continue
            less, more = ({r.config.seed: r for r in networks[_digest(record)]} for record in order)
            if not (seeds := sorted(less.keys() & more.keys())):
                continue
            per_seed = [[a - b for a, b in zip(_errors(less[s]), _errors(more[s]), strict=False)] for s in seeds]
            accuracies = [100 * record.metrics["test"]["w_2"] for record in order]
            words = f"{name_of(order[0])} (W₂ {accuracies[0]:.2f} %) − {name_of(order[1])} (W₂ {accuracies[1]:.2f} %)"
            drawn = [those[s] for those in (less, more) for s in seeds] + list(order)
            study = f"{group[0].data.train:,} training images"
            effects.append(_of_median(study, words, per_seed, drawn))
    return effects


def _digest(record: OfNetwork) -> str:
    return record.network.digest


def _by_robustness(
    tested: Sequence[EvaluateRecord], one: str, other: str
) -> tuple[EvaluateRecord, EvaluateRecord] | None:
    """Records of the less and of the more robust of two networks (by digest); None without a visible difference.

    On the same test images, as many as there are.
    """
    for group in sorted(alike(tested, "network"), key=lambda g: -images_of(g[0], "test")):
        found = {_digest(record): record for record in group}
        if one in found and other in found:
            a, b = found[one], found[other]
            gap = estimate_of([bits(b, "test", "w_2") - bits(a, "test", "w_2")])
            if gap.half is not None and abs(gap.value) > gap.half:
                return (a, b) if gap.value > 0 else (b, a)
    return None


def volatility(records: Sequence[Record]) -> list[Effect]:
    """For each study and setting with eta 1 whose curves were measured: the median relative change of Upsilon of the
    whole training set from one epoch to the next, in per cent."""
    effects = []
    for study in studies(stated(records, "finetune")):
        for setting, seeds in by_setting(study).items():
            moved = {i: moves for i, record in enumerate(seeds) if (moves := _moves(record))}
            if setting[2] == 1 and moved:
                drawn = [seeds[i] for i in moved]
                effects.append(_of_median(_label(drawn[0]), setting_words(*setting), list(moved.values()), drawn))
    return effects


def _moves(record: FinetuneRecord) -> list[float]:
    """Relative changes of Upsilon of the training set from epoch to epoch, in per cent; none without curves.

    Not of the estimates in the minibatches: those err by sampling, whether the network trains or not.
    """
    if not evidence.has_curves(record):
        return []
    curve = [row["train_upsilon"] for row in evidence.along(record)]
    return [100 * abs(b / a - 1) for a, b in itertools.pairwise(curve) if a > 0]


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own numbers
# ---------------------------------------------------------------------------------------------------------------------

TAUS, ETAS = (0.1, 0.01), (0.1, 1.0)
GRID: tuple[Setting, ...] = tuple(itertools.product(HOW, TAUS, ETAS))
ETA_PAIRS = [((how, tau, 1.0), (how, tau, 0.1)) for how in HOW for tau in TAUS]
TAU_PAIRS = {
    "whole": [(("whole", 0.01, eta), ("whole", 0.1, eta)) for eta in ETAS],
    "last_layer": [(("last_layer", 0.1, eta), ("last_layer", 0.01, eta)) for eta in ETAS],
}


def printed(network: str, setting: Setting, metric: str) -> float | None:
    """Accuracy after fine-tuning as the paper prints it, in per cent. Of Chen and Lee it has one column: Table 5."""
    tables = {subject: table for table, subject in GRIDS.items()}
    if (network, setting[0]) in tables:
        return paper_value(tables[network, setting[0]], network, metric, *setting[1:])
    return paper_value(5, network, metric) if network.startswith("Chen") and setting == ("whole", 0.01, 1.0) else None


def paper_best_changes(metrics: Sequence[str], perturb: str = "", only: Sequence[str] = ()) -> Numbers:
    """As `best_changes`, but best on test images: the paper prints nothing of validation images."""
    found = []
    for network in PAPER_NETWORKS:
        w_2 = {setting: printed(network, setting, "w_2") for setting in GRID if perturb in ("", setting[0])}
        known = {setting: value for setting, value in w_2.items() if value is not None}
        if known and (not only or network in only):
            setting = max(known, key=lambda c: known[c])
            value = sum(_number(printed(network, setting, m)) - _number(paper_value(1, network, m)) for m in metrics)
            found.append((f"{short_name(network)}, {setting_words(*setting)}", value))
    return found


def paper_contrasts(pairs: Sequence[Pair]) -> Numbers:
    """As `contrasts`."""
    found = []
    for network, (better, worse) in itertools.product(PAPER_NETWORKS, pairs):
        first, second = (printed(network, setting, "w_2") for setting in (better, worse))
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
