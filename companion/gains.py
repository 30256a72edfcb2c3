"""Does the gain of Algorithm 1 go with how a network was pre-trained, TRADES or PGD, or with its size?

The one clean comparison is of two networks of the same architecture, one pre-trained with TRADES and one with PGD:
size cannot be what sets them apart. All other pairs differ in more than one thing, so what they say is a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from companion.bases import Record
from companion.evidence import by_setting, deviations, is_full, is_stated, pretrained_with, studies
from companion.intervals import Estimate, bits, change, estimate_of, found_at, side, with_metrics
from companion.kinds import FinetuneRecord, PretrainRecord
from companion.networks import PUBLISHED, shape_of
from companion.parts import NetworkPart
from companion.words import NOTHING, listed, markdown, name_of, plural, seeds_words, training_words

SETTING = ("whole", 0.01, 1.0)  # in which all networks are compared: the paper's best for the whole network
AT = 4  # 255ths: the radius of the worst case
YARDSTICKS = {"w_2": "W₂ accuracy as the paper measures it", found_at(2, AT): f"A₂ at {AT}/255"}
COMPARED = ("TRADES", "PGD")  # the kinds of pre-training that the question is about
BY_PAPER = {"Zhang2019Theoretically": "TRADES"}  # of its other networks it does not say
UNKNOWN = "pre-training not recorded"


@dataclass(frozen=True)
class Tuned:
    """A network that Algorithm 1 fine-tuned.

    Attributes:
        kind: how it was pre-trained.
        shape: its architecture, the same words for the same one.
        size: how many parameters it has.
        study: the records of all its settings.
        recipe: how this project pre-trained it; None where others did.
    """

    kind: str
    shape: str
    size: int
    study: list[FinetuneRecord]
    recipe: PretrainRecord | None

    @property
    def name(self) -> str:
        return name_of(self.study[0])

    @property
    def full(self) -> bool:
        return is_full(self.study[0])

    def seeds(self, metric: str) -> list[FinetuneRecord]:
        """The records in `SETTING` that have a metric, one a seed."""
        return with_metrics(by_setting(self.study)[SETTING], [metric], "before", "after")

    def gain(self, metric: str) -> Estimate | None:
        """Accuracy after minus before in points; None where no record has it."""
        return change(self.seeds(metric), metric) if self.seeds(metric) else None


def tuned(records: Sequence[Record]) -> list[Tuned]:
    """Each network that was fine-tuned as the paper says: its whole protocol if recorded, else its longest training.

    Of records of kind "finetune", and "pretrain" for how stand-ins were made; others are passed over.
    """
    recipes = {r.network.digest: r for r in records if isinstance(r, PretrainRecord)}
    those = [r for r in records if isinstance(r, FinetuneRecord) and is_stated(r) and not deviations(r)]
    found: dict[str, Tuned] = {}
    for study in studies(those):
        network = study[0].network
        if network.digest not in found and SETTING in by_setting(study) and (shape := shape_of(network.name)):
            recipe = recipes.get(network.digest)
            found[network.digest] = Tuned(kind_of(network, recipe), *shape, study, recipe)
    return list(found.values())


def kind_of(network: NetworkPart, recipe: PretrainRecord | None) -> str:
    """How a network was pre-trained: by its record, or by those who published it."""
    if recipe:
        return pretrained_with(recipe).upper()
    return PUBLISHED[network.name].training if network.name in PUBLISHED else BY_PAPER.get(network.name, UNKNOWN)


# ---------------------------------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two networks, by how many points the first gains more, and where that visibly is: "above" or "below" 0, or ""."""

    first: Tuned
    second: Tuned
    more: Estimate
    where: str

    @property
    def of_kind(self) -> bool:
        return (self.first.kind, self.second.kind) == COMPARED

    @property
    def clean(self) -> bool:
        return self.of_kind and self.first.shape == self.second.shape

    @property
    def larger(self) -> str:
        """Where the gain of the larger network minus that of the smaller is."""
        flipped = {"above": "below", "below": "above", "": ""}
        return self.where if self.first.size > self.second.size else flipped[self.where]


def pairs(networks: Sequence[Tuned], metric: str) -> list[Pair]:
    """Each two networks with the same test images: TRADES before PGD, else the larger before the smaller."""
    found = []
    for a, b in combinations([n for n in networks if n.seeds(metric)], 2):
        swap = (b.kind, a.kind) == COMPARED or ((a.kind, b.kind) != COMPARED and b.size > a.size)
        first, second = (b, a) if swap else (a, b)
        if a.study[0].data.digest == b.study[0].data.digest:
            found.append(Pair(first, second, *_more(first, second, metric)))
    return found


def _more(first: Tuned, second: Tuned, metric: str) -> tuple[Estimate, str]:
    """Compared image by image, between the means over seeds; visible by the rule of the claims."""
    a, b = ({r.config.seed: bits(r, "after", metric) - bits(r, "before", metric) for r in n.seeds(metric)}
            for n in (first, second))  # fmt: skip
    mean_a, mean_b = (sum(each.values()) / len(each) for each in (a, b))
    more = estimate_of([mean_a - mean_b])
    singles = [a[s] - b[s] for s in a.keys() & b.keys()]
    if not singles:  # no seed in common: each against the mean of the other
        singles = [*(one - mean_b for one in a.values()), *(mean_a - one for one in b.values())]
    return more, side(more.low, more.high, [estimate_of([one]).value for one in singles])


def _common(where: Sequence[str]) -> str:
    """The side that all are on; "" where they are not all visibly on one."""
    return where[0] if len(set(where)) == 1 else ""


def verdict(found: Sequence[Pair]) -> tuple[str, str, str]:
    """What the gain goes with, a key of `WORDS`, the kind that gains more in the clean pairs, and the size that does.

    Kind and size each count where every pair that differs in it differs visibly, all in the same direction.
    """
    clean, every = [p.where for p in found if p.clean], [p.where for p in found if p.of_kind]
    kind, size = _common(clean), _common([p.larger for p in found if p.first.size != p.second.size])
    if not clean:
        key = "open"
    elif kind:
        key = "both" if size else "kind" if _common(every) else "pair"
    else:
        key = "size" if size else "neither"
    who = {"above": "TRADES above PGD", "below": "PGD above TRADES"}.get(kind, "")
    return key, who, {"above": "the larger above the smaller", "below": "the smaller above the larger"}.get(size, "")


WORDS = {
    "kind": "goes with the kind of pre-training, {who} in every pair",
    "size": "goes with size or the architecture that comes with it, {large} in every pair; at one architecture no kind"
    " of pre-training is always ahead",
    "both": "goes with the kind of pre-training where the architecture is the same, {who}, and else with size or the"
    " architecture that comes with it, {large}",
    "pair": "goes with the kind of pre-training where the architecture is the same, {who}, and over all networks with"
    " neither kind nor size",
    "neither": "cannot be told to go with the kind of pre-training or with size",
    "open": "cannot be told to go with either, since no architecture is recorded with both kinds of pre-training",
}


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows
# ---------------------------------------------------------------------------------------------------------------------


def gain_answer(records: Sequence[Record]) -> str:
    """What the gain goes with by each yardstick, the gains, the clean pairs, and what is not counted, as Markdown."""
    every = tuned(records)
    networks, rest = [n for n in every if n.full], [n for n in every if not n.full]
    if not networks:
        return f"Does the gain go with the kind of pre-training or with size? {NOTHING}"
    metrics = [m for m in YARDSTICKS if any(n.seeds(m) for n in networks)]
    found, said = {m: pairs(networks, m) for m in metrics}, list[str]()
    for metric, those in found.items():
        key, who, large = verdict(those)
        words = WORDS[key].format(who=who, large=large)
        said.append(f"{'By' if said else 'by'} {YARDSTICKS[metric]} {'it' if said else 'the gain'} {words}.")
    sizes = plural(len({n.size for n in networks}), "size")
    parts = [f"**On {plural(len(networks), 'network')} of {sizes}, and no more: {' '.join(said)}**"]
    parts.append(f"Gain in points, in this order: {_each(networks)}.")
    parts += _clean_words([p for those in found.values() for p in those if p.clean])
    parts += [f"Not counted, since the whole protocol is not recorded: {_each(rest)}."] * bool(rest)
    return " ".join(parts)


def _each(networks: Sequence[Tuned]) -> str:
    parts = []
    for n in networks:
        gains = listed([gain.text(signed=True) for m in YARDSTICKS if (gain := n.gain(m))])
        training = "" if n.full else f"; {training_words(n.study[0])}"
        parts.append(f"{gains} on {n.name} ({n.kind}, {n.size:,} parameters{training})")
    return listed(parts)


def _clean_words(clean: Sequence[Pair]) -> list[str]:
    """What sets the networks of each clean pair apart, by each yardstick, and what else their recipes differ in."""
    parts: dict[tuple[str, str], list[Pair]] = {}
    for pair in clean:
        parts.setdefault((pair.first.name, pair.second.name), []).append(pair)
    return [
        f"{a} and {b} have the same architecture, and the first gains"
        f" {listed([p.more.text(signed=True) for p in those])} points more"
        f"{', so size is not the reason there' * any(p.where for p in those)}.{_also(those[0])}"
        for (a, b), those in parts.items()
    ]


def _also(pair: Pair) -> str:
    """In which fields two recipes differ beside the objective; its weight counts for TRADES alone."""
    if not (pair.first.recipe and pair.second.recipe):
        return ""
    a, b = vars(pair.first.recipe.config), vars(pair.second.recipe.config)
    fields = [k for k in a.keys() & b.keys() - {"objective", "method", "beta"} if a[k] != b[k]]
    differ = [f"`{k}` ({' and '.join(str(c[k]).removesuffix('.0') for c in (a, b))})" for k in sorted(fields)]
    return f" But their pre-training differs in {listed(differ)} too." * bool(fields)


def gains_table(records: Sequence[Record]) -> Any:
    """A row for each network, as Markdown: how it was made, and its gain in points; those not counted come last."""
    heads, lines = ["network", "pre-training", "architecture", "parameters", "fine-tuning", *YARDSTICKS.values()], []
    for n in tuned(records):
        cells = [(n.gain(metric), n.seeds(metric)) for metric in YARDSTICKS]
        lines.append([n.name, n.kind, n.shape, f"{n.size:,}", training_words(n.study[0])])
        lines[-1] += [f"{gain.text(signed=True)}, {seeds_words(those)}" if gain else "–" for gain, those in cells]
    return markdown(heads, lines or [["nothing is recorded yet", *["–"] * (len(heads) - 1)]])


def pairs_table(records: Sequence[Record]) -> Any:
    """A row for each two networks that count, as Markdown: what they differ in, and how much more the first gains."""
    networks = [n for n in tuned(records) if n.full]
    lines: dict[tuple[str, str], list[str]] = {}
    for metric in YARDSTICKS:
        for pair in pairs(networks, metric):
            a, b = pair.first, pair.second
            differ = ["pre-training"] * (a.kind != b.kind) + ["architecture"] * (a.shape != b.shape)
            row = lines.setdefault((a.name, b.name), [f"{a.name} − {b.name}", listed(differ) or "weights"])
            row.append(pair.more.text(signed=True) + ("" if pair.where else ", not visible"))
    heads = ["pair", "differ in", *YARDSTICKS.values()]
    rows = [[*row, "–"][: len(heads)] for row in lines.values()]
    return markdown(heads, rows or [["nothing can be compared yet", *["–"] * (len(heads) - 1)]])
