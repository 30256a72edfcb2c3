"""The words and marks that every page shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companion.bases import OfNetwork
from companion.kinds import FinetuneRecord, ObjectiveRecord
from companion.settings import PAPER_NETWORKS

# What one comparison says of what the paper says.
OUTCOMES = {"holds": "✓ holds", "contradicted": "✗ contradicted", "not visible": "○ not visible"}
# What all the comparisons of a claim say together.
VERDICTS = {
    "holds": "✓ holds",
    "holds in part": "◐ holds in part",
    "contradicted": "✗ contradicted",
    "not visible": "○ not visible",
    "not yet measured": "– not yet measured",
}
HOW = {"whole": "whole network", "last_layer": "last layer"}
NOTHING = "Nothing is recorded here yet."


def overall(outcomes: Sequence[str]) -> str:
    """The verdict over several outcomes, a key of VERDICTS.

    It holds where every outcome holds, in part where some do; where none does, one that is contradicted decides.
    """
    if not outcomes:
        return "not yet measured"
    if "holds" in outcomes:
        return "holds" if set(outcomes) == {"holds"} else "holds in part"
    return "contradicted" if "contradicted" in outcomes else "not visible"


def count(outcomes: Sequence[str]) -> str:
    """Several outcomes in words: "holds in 2 of 3, contradicted in 1"."""
    found = [word for word in OUTCOMES if word in outcomes]
    parts = [f"{word} in {outcomes.count(word)}{f' of {len(outcomes)}' * (not i)}" for i, word in enumerate(found)]
    return ", ".join(parts)


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def plural_of(numbers: Sequence[int], noun: str) -> str:
    """As `plural`, of one number or of several: "500 to 1,000 images"."""
    least, most = min(numbers), max(numbers)
    return f"{least:,} to {plural(most, noun)}" if least < most else plural(most, noun)


def short_name(network: str) -> str:
    """The paper's own words for one of its networks, the name of any other."""
    return PAPER_NETWORKS[network]["paper"] if network in PAPER_NETWORKS else network


def name_of(record: OfNetwork) -> str:
    """The paper's own words for one of its networks; any other, a stand-in too, by its own name as code."""
    name = record.network.name
    return short_name(name) if name in PAPER_NETWORKS else f"`{name}`"


def column_words(tau: float, eta: float) -> str:
    return f"τ = {tau:g}, η = {eta:g}"


def setting_words(perturb: str, tau: float, eta: float) -> str:
    return f"{HOW[perturb]}, {column_words(tau, eta)}"


def training_words(record: FinetuneRecord) -> str:
    """How long a record was trained: "40,000 images, 20 epochs"."""
    return f"{record.data.train:,} images, {plural(record.config.epochs, 'epoch')}"


def seeds_words(records: Sequence[FinetuneRecord | ObjectiveRecord]) -> str:
    """The seeds of records: "seeds 0, 1, 2"."""
    seeds = sorted({record.config.seed for record in records})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def listed(parts: Sequence[str]) -> str:
    """Several things in one sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    """A table of Markdown."""
    from IPython.display import Markdown

    rows = [columns, ["---"] * len(columns), *lines]
    return Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows))
