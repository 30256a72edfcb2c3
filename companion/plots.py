"""Figures, drawn from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from companion.evidence import ALONG, along, by_setting, columns_of, paper_value, studies
from companion.intervals import change
from companion.records import Record
from companion.settings import GRIDS, METRICS
from companion.tables import grid_rows
from companion.words import HOW, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, RECORDED, THIS_RUN = "#4d4d4d", "#0072b2", "#d55e00"  # Okabe and Ito's, told apart by every eye
STUDIES = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "v"), ("#e69f00", "P")]  # theirs, too


def plot_changes(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> Figure:
    """Change of each accuracy against the baseline, in points: the paper, recorded here and this run, by column."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    grid = list(columns_of(records or recorded))
    rows = grid_rows(table, records, recorded)
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
                fmt=marker,
                color=colour,
                markersize=6,
                capsize=3,
                label=f"{row['source']}: {short_name(row['network'])}",
            )
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(f"{METRICS[metric]} accuracy")
        axis.set_xlabel("change, percentage points")
        axis.set_yticks(range(len(grid)), [f"τ = {tau:g}, η = {eta:g}" for tau, eta in reversed(grid)])
        axis.set_ylim(-0.6, len(grid) - 0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # the caller shows it, once
    return figure


def plot_protocol(records: Sequence[Record]) -> Figure:
    """Change of each accuracy in all eight columns: the paper's network of Tables 3 and 4, and each study of records.

    Points are means over seeds with 95 % intervals over test images, small ones single seeds where there are several.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    taken = [(how, tau, eta) for how in ("whole", "last_layer") for eta in (1.0, 0.1) for tau in (0.01, 0.1)]
    places = {column: len(taken) - i - (column[0] == "last_layer") * 0.6 for i, column in enumerate(taken)}
    groups = [(group[0]["network"]["name"], by_setting(group)) for group in studies(records)]
    figure, axes = plt.subplots(1, 3, figsize=(10, 7.2), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for (how, tau, eta), place in places.items():
            table = 4 if how == "whole" else 3
            value, base = paper_value(table, GRIDS[table][0], metric, tau, eta), paper_value(1, GRIDS[table][0], metric)
            assert value is not None and base is not None
            label = f"{short_name(GRIDS[table][0])} (paper)" if place == places[taken[0]] else None
            axis.plot(value - base, place + 0.2, "D", color=PAPER, markersize=6, label=label)
        for i, (name, columns) in enumerate(groups):
            (colour, marker), label = STUDIES[i % len(STUDIES)], name
            for column, seeds in columns.items():
                if column not in places:
                    continue
                mean, place = change(seeds, metric), places[column] - 0.2 * i
                axis.errorbar(
                    mean.value,
                    place,
                    xerr=mean.half or 0,
                    fmt=marker,
                    color=colour,
                    markersize=6,
                    capsize=3,
                    label=label,
                )
                label = None
                if len(seeds) > 1:
                    each = [change([r], metric).value for r in seeds]
                    axis.plot(each, [place] * len(each), "|", color=colour, markersize=9, alpha=0.6)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(f"{METRICS[metric]} accuracy")
        axis.set_xlabel("change, percentage points")
        axis.set_ylim(min(places.values()) - 0.5, max(places.values()) + 0.5)
        axis.set_yticks(list(places.values()), [f"{HOW[how]}\nτ = {tau:g}, η = {eta:g}" for how, tau, eta in places])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    plt.close(figure)
    return figure


def plot_estimates(records: Sequence[Record], recorded: Sequence[Record]) -> Figure:
    """Figure 7.1: for each network Upsilon of its training set (a bar) and of samples of it (points)."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    columns = [(r, RECORDED, "recorded here", "o") for r in recorded]
    columns += [(r, THIS_RUN, "this run", "s") for r in records]
    figure, axis = plt.subplots(figsize=(max(5.0, 2 + 1.8 * len(columns)), 4.2), layout="constrained")
    for i, (record, colour, source, marker) in enumerate(columns):
        n = len(record["estimates"])
        places = [i + 0.3 * (2 * k / max(1, n - 1) - 1) for k in range(n)]
        axis.plot(places, record["estimates"], marker, color=colour, markersize=6, label=f"{source}: a sample")
        whole, label = record["reference"], f"{source}: all images"
        axis.plot([i - 0.4, i + 0.4], [whole, whole], ":", color=colour, linewidth=2.5, label=label)
    names = [f"{short_name(r['network']['name'])}\n{r['data']['train']:,} images" for r, *_ in columns]
    axis.set(ylabel="Υ", xlim=(-0.6, len(columns) - 0.4), ylim=(0, None))
    axis.set_xticks(range(len(columns)), names)
    by_label = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)
    return figure


def plot_along(what: str, records: Sequence[Record], recorded: Sequence[Record]) -> Figure:
    """Figure 7.2 ("w_2"), 7.3 ("w_inf") or 7.4 ("upsilon"): solid on test images, dashed on validation or training.

    The recorded runs are a line of their mean over seeds in a band from the least to the greatest.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.ticker import MaxNLocator

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    scale = 1 if what == "upsilon" else 100
    for source, those, colour in (("recorded here", recorded, RECORDED), ("this run", records, THIS_RUN)):
        for (key, part), line in zip(ALONG[what].items(), ("-", "--"), strict=True):
            epochs = [[scale * row[key] for row in rows] for rows in zip(*map(along, those), strict=True)]
            if not epochs:
                continue
            mean, label = [sum(v) / len(v) for v in epochs], f"{source}, {part} images"
            axis.plot(mean, color=colour, linestyle=line, marker="o", markersize=5, label=label)
            low, high = [min(v) for v in epochs], [max(v) for v in epochs]
            axis.fill_between(range(len(epochs)), low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="epoch (0: before fine-tuning)", ylabel="Υ" if what == "upsilon" else "accuracy, per cent")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)
    return figure
