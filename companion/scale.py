"""Many processes, and sets larger than memory: what benchmarks/scale.py measured, in words and in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from companion.kinds import ScaleRecord
from companion.performance import stream_words, symbols
from companion.records import newest_last
from companion.words import markdown, plural

ALONE, APART, TOGETHER = "one process", "two processes that share nothing", "two processes"  # who runs
ATTACK, TRAINING = "W_2 attack, ReDLR", "Algorithm 1"  # what they run
WHAT = {ATTACK: "An attack", TRAINING: "Fine-tuning"}
GB = 1e9


def scale_answer(records: Sequence[ScaleRecord]) -> str:
    """One paragraph of Markdown: what a second process costs, and what a million images hold."""
    if not records:
        return "Many processes are not measured yet: `python benchmarks/scale.py` does it."
    record = newest_last(records)[-1]
    ratios = {row["group"]: _ratio(row) for row in _measured(record) if row["baseline"] == APART}
    parts = [
        f"{WHAT[work]} by two processes that share the images takes {ratios[work]} times as long as by two that share"
        " nothing."
        for work in WHAT
        if work in ratios
    ]
    return " ".join([*parts, *(words(record.figures[name]) for name, words in WORDS.items())])


def _measured(record: ScaleRecord) -> list[dict[str, Any]]:
    return [row for row in record.rows if row["ratio"] is not None]


def _ratio(row: dict[str, Any]) -> str:
    return f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})"


def _mapped(found: dict[str, Any]) -> str:
    return (
        f"W-PGD on {found['images']:,} images in a file, with what is as large in files too (`folder=`), held"
        f" {found['held'] / 1e6:.0f} MB of memory beside them: {found['bytes'] / GB:.1f} GB of images, and the attack"
        f" and its best iterate as large each, on a machine with {found['memory'] / GB:.1f} GB. {found['steps']} steps"
        f" took {found['seconds']['attack'] / 60:.0f} minutes."
    )


def _histogram(found: dict[str, Any]) -> str:
    return (
        f"$A_p(\\delta)$ of {found['n']:,} distances in a file, in two walks over them: {found['seconds']:.0f} seconds,"
        f" {found['grew_by'] / 1e6:.0f} MB, known to {found['high'] - found['low']:.1e}."
    )


WORDS: dict[str, Callable[[Any], str]] = {"stream": stream_words, "mapped": _mapped, "histogram": _histogram}


def scale_table(record: ScaleRecord) -> Any:
    """What a second process costs, a row for each ratio, as Markdown."""
    lines = []
    for row in _measured(record):
        share = "–"
        if "talked" in row:
            least, most = (f"{100 * value:.0f}" for value in row["talked"])
            share = f"{least} to {most} % in {row['messages']} messages, {row['sent'] / 1000:,.1f} kB"
        about = f"{row['images']:,} images a process, batches of {row['batch_size']}"
        if row["group"] == TRAINING:
            about += f", {plural(record.config.epochs, 'epoch')}"
        lines.append(
            [symbols(row["group"]), row["network"], row["baseline"], _ratio(row), share, str(row["rounds"]), about]
        )
    heads = ["two processes that share", "network", "against", "times as long (95 % interval)", "of it in messages"]
    return markdown([*heads, "rounds", "remarks"], lines)
