"""assets/paper.csv, which the book quotes, cell by cell against the tables as the paper prints them."""

import re

import pytest

from companion import evidence, files
from companion.settings import GRIDS, PAPER_NETWORKS

TABLES = (files.ROOT / "tests" / "golden" / "paper_tables.tsv").read_text(encoding="utf-8").split("\n\n")
NAMES = {entry["paper"]: name for name, entry in PAPER_NETWORKS.items()}
METRICS = {
    "Clean Acc": "clean",
    "W_inf Adversarial Acc": "w_inf",
    "W_2 Adversarial Acc": "w_2",
    "W-PGD-Budget": "budget",
}


def printed(table):
    """The numbers of a table as the paper prints them, by (network, tau, eta, metric); tau and eta may be None."""
    title, head, *rows = (line.split("\t") for line in TABLES[table - 1].strip().split("\n"))
    assert title == [f"Table {table}"]
    for row in rows:
        for column, cell in list(zip(head, row, strict=True))[1:]:
            if at := re.fullmatch(r"tau (\S+), eta (\S+)", column):
                yield (GRIDS[table][0], float(at[1]), float(at[2]), METRICS[row[0]]), float(cell)
            elif column in METRICS:
                value, _, change = cell.partition(" ")
                yield (NAMES[row[0]], None, None, METRICS[column]), float(value)
                if change:
                    yield (NAMES[row[0]], None, None, METRICS[column] + "_change"), float(change.strip("()"))


@pytest.mark.parametrize("table", range(1, 12))
def test_every_number_is_as_printed(table):
    ours = {}
    for row in evidence.paper_rows():
        if int(row["table"]) == table:
            at = tuple(float(row[key]) if row[key] else None for key in ("tau", "eta"))
            ours[row["network"], *at, row["metric"]] = float(row["value"])
    assert ours == dict(printed(table)) and len(ours) >= 12


def test_architectures_and_clean_accuracies_are_those_of_table_1():
    _, head, *rows = (line.split("\t") for line in TABLES[0].strip().split("\n"))
    for row in rows:
        entry, cells = PAPER_NETWORKS[NAMES[row[0]]], dict(zip(head, row, strict=True))
        assert entry["clean"] == float(cells["Clean Acc"])
        assert entry["architecture"].split("-", 1)[1] == cells["Architectures"].split()[-1]
