"""Many processes, and sets larger than memory: what benchmarks/scale.py measured, in words and in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companion.kinds import ScaleRecord
from companion.words import markdown

GB = 1e9
PAIRS = {  # the baseline of a row, and what its ratio says
    "one process": "the same work for each",
    "two processes that share nothing": "what sharing adds to what the machine itself costs",
}


def scale_answer(records: Sequence[ScaleRecord]) -> str:
    """One paragraph of Markdown: what a second process costs, and what a million images hold."""
    if not records:
        return "Many processes are not measured yet: `python benchmarks/scale.py` does it."
    record = records[-1]
    parts = [_row_in_words(row) for row in _measured(record) if row["baseline"] in list(PAIRS)[1:]]
    text = [f"Two processes that share the images take {' and '.join(parts)} the time of two that share nothing."]
    beyond = [_streamed(record), _mapped(record), _histogram(record)]
    return " ".join(filter(None, [*(text if parts else []), *beyond]))


def _measured(record: ScaleRecord) -> list[dict[str, Any]]:
    return [row for row in record.rows if row["ratio"] is not None]


def _row_in_words(row: dict[str, Any]) -> str:
    return f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f}) times ({row['group']})"


def _streamed(record: ScaleRecord) -> str:
    stream = record.figures.get("stream")
    if not stream:
        return ""
    (few, least), (many, most) = stream[0], stream[-1]
    return (
        f"A stream of {many:,} made images ({many * 12288 / GB:.1f} GB) through `boundary(keep=False)` holds at most"
        f" {most / 1e6:.0f} MB, and {least / 1e6:.0f} MB with {few:,}."
    )


def _mapped(record: ScaleRecord) -> str:
    found = record.figures.get("mapped")
    if not found:
        return ""
    return (
        f"W-PGD on {found['images']:,} images in a file, with what is as large in files too (`folder=`), held"
        f" {found['held'] / 1e6:.0f} MB of memory beside them: {found['bytes'] / GB:.1f} GB of images, and the attack"
        f" and its best iterate as large each, on a machine with {found['memory'] / GB:.1f} GB. {found['steps']} steps"
        f" took {found['seconds']['attack'] / 60:.0f} minutes."
    )


def _histogram(record: ScaleRecord) -> str:
    found = record.figures.get("histogram")
    if not found:
        return ""
    return (
        f"$A_p(\\delta)$ of {found['n']:,} distances in a file, in two walks over them: {found['seconds']:.0f} seconds,"
        f" {found['grew_by'] / 1e6:.0f} MB, known to {found['high'] - found['low']:.1e}."
    )


def scale_table(record: ScaleRecord) -> Any:
    """What a second process costs, a row for each ratio, as Markdown."""
    lines = []
    for row in _measured(record):
        ratio = f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})"
        share = "–"
        if "talked" in row:
            least, most = (f"{100 * value:.0f}" for value in row["talked"])
            share = f"{least} to {most} % in {row['messages']} messages, {row['sent'] / 1000:,.1f} kB"
        about = f"{row['images']:,} images a process, batches of {row['batch_size']}"
        lines.append([row["group"], row["network"], row["baseline"], ratio, share, str(row["rounds"]), about])
    heads = ["two processes that share", "network", "against", "times as long (95 % interval)", "of it in messages"]
    return markdown([*heads, "rounds", "remarks"], lines)
