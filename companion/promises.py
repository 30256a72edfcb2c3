"""What the project promises, with its tests and the figures of benchmarks/reliability.py."""

from __future__ import annotations

import csv
from typing import Any

from companion import files
from companion.kinds import ReliabilityRecord


def promises() -> list[dict[str, str]]:
    """What the project promises: "promise", "tests" (file::name; ...) and "figure", with {names}."""
    with (files.ASSETS / "promises.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def promises_table(record: ReliabilityRecord | None) -> Any:
    """Each promise with its tests, and with the figures of a reliability record where there is one, as Markdown."""
    from IPython.display import Markdown

    lines = ["| promise | tests | figures |", "|---|---|---|"]
    for row in promises():
        tests = "<br>".join(f"`{test.strip()}`" for test in row["tests"].split(";"))
        figure = row["figure"].format(**record.figures) if record else ""
        lines.append(f"| {row['promise']} | {tests} | {figure or '–'} |")
    if record:
        figures = record.figures
        lines.append(
            f"\n{figures['tests'] - figures['skipped']} tests passed, {figures['skipped']} skipped (no GPU here),"
            f" in {record.seconds['total'] / 60:.0f} minutes on {record.device}; core {record.core[:8]}, torch"
            f" {record.versions['torch']}; `{record.command}`."
        )
    return Markdown("\n".join(lines))
