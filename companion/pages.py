"""What pages show beside the tables and figures: the short table of a curve, and numbers inside a page's text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from companion.answers import answer
from companion.effects import KINDS
from companion.evidence import ALONG, along, studies
from companion.kinds import FinetuneRecord
from companion.open_points import budget_below_pointwise, how_much
from companion.records import read_records
from companion.settings import OPEN_POINTS
from companion.tables import labels_of
from companion.words import markdown


def kept_table(what: str, recorded: Sequence[FinetuneRecord]) -> Any:
    """Figure 7.2, 7.3 or 7.4 in three numbers a curve: before, at the epoch that was kept, after the last epoch.

    Means over seeds, of fine-tuning records with curves; accuracies in per cent.
    """
    groups: list[list[Any]] = studies(recorded)
    lines, scale = [], 1 if what == "upsilon" else 100
    for label, study in zip(labels_of(groups), groups, strict=True):
        kept = ", ".join(str(record.history.best) for record in study)
        for key, part in ALONG[what].items():
            epochs = [(0, record.history.best, -1) for record in study]
            rows = [[along(record)[i][key] for i in at] for record, at in zip(study, epochs, strict=True)]
            means = [scale * sum(column) / len(column) for column in zip(*rows, strict=True)]
            lines.append([label, f"{part} images", *(f"{mean:.2f}" for mean in means), kept])
    columns = ["network", "images", "before", "epoch that is kept", "last epoch", "kept in each seed"]
    return markdown(columns, lines or [["nothing is recorded yet", *["–"] * (len(columns) - 1)]])


def substitutions(results: Path) -> dict[str, str]:
    """Markdown that stands in a page as {{ name }}, made when the book is built.

    `found` is the answer of the first page; `matter_POINT` and `matter_table2` are the last column of the ledger.
    """
    of = {kind: read_records(results, kind) for kind in KINDS}
    points = {f"matter_{point}": how_much(of["finetune"], point) for point in OPEN_POINTS}
    table2 = budget_below_pointwise(of["evaluate"])
    found = answer("intro", [record for those in of.values() for record in those])
    return {"found": found, **points, "matter_table2": table2}
