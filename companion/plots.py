"""Figures, drawn from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from companion.evidence import columns_of, table_rows
from companion.records import Record
from companion.settings import METRICS
from companion.tables import _short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, RECORDED, THIS_RUN = "#4d4d4d", "#0072b2", "#d55e00"  # Okabe and Ito's, told apart by every eye


def plot_changes(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> Figure:
    """Change of each accuracy against the baseline, in points: the paper, recorded here and this run, by column."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    grid = list(columns_of(records or recorded))
    rows = table_rows(table, records, recorded)
    styles = {"paper": (PAPER, "D", 0.22), "recorded here": (RECORDED, "o", 0.0), "this run": (THIS_RUN, "s", -0.22)}
    figure, axes = plt.subplots(1, 3, figsize=(10, 1.4 + 0.75 * len(grid)), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for row in (r for r in rows if r["metric"] == metric):
            colour, marker, shift = styles[row["source"]]
            points = [(i, cell[1]) for i, cell in enumerate(row["cells"].values()) if cell]
            if not points:
                continue
            axis.errorbar(
                [e.value for _, e in points],
                [len(grid) - 1 - i + shift for i, _ in points],
                xerr=[e.half or 0 for _, e in points],
                fmt=marker, color=colour, markersize=6, capsize=3, label=f"{row['source']}: {_short(row['network'])}",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(f"{METRICS[metric]} accuracy")
        axis.set_xlabel("change, percentage points")
        axis.set_yticks(range(len(grid)), [f"τ = {tau:g}, η = {eta:g}" for tau, eta in reversed(grid)])
        axis.set_ylim(-0.6, len(grid) - 0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # the caller shows it, once
    return figure
