"""Figures, drawn from records alone: narrow enough for a phone, at most two panels a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from companion import frontiers, joint
from companion.bases import Record
from companion.evidence import ALONG, COLUMNS, along, by_setting, paper_value, studies
from companion.intervals import change, change_of_each
from companion.kinds import FinetuneRecord, SensitivityRecord
from companion.settings import FOUND, GRIDS, METRICS
from companion.tables import grid_rows, labels_of
from companion.words import HOW, NOTHING, column_words, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, RECORDED, THIS_RUN = "#4d4d4d", "#0072b2", "#d55e00"  # Okabe and Ito's, told apart by every eye
# For each study that is recorded: theirs too, but darker, so that all can be told from white; and a marker.
STUDIES = [(RECORDED, "o"), ("#007a5a", "^"), ("#a6467f", "v"), ("#8a5a00", "P"), ("#2d7da8", "X"), ("#4b3f8f", "*")]
# For each objective of "Training for the worst case": colour, marker, line. The last two tell them apart in grey too.
OBJECTIVES: dict[str, tuple[str, str, str]] = {
    "algorithm1": (PAPER, "o", "-"),
    "slope": (RECORDED, "^", "-"),
    "cheapest": (THIS_RUN, "v", "--"),
    "mma": ("#007a5a", "s", "--"),
    "pointwise": ("#a6467f", "P", ":"),
    "trades": ("#8a5a00", "X", "-."),
}
FILLS = ("full", "none", "left", "top")  # of markers, by the radius of training, the greatest first
WIDTH = 5.0  # of a figure in inches, at 100 dots to the inch
# Of the panels; what the paper is about comes first.
TITLES = {metric: f"{METRICS[metric]} accuracy" for metric in ("w_2", "w_inf", "clean")}
EVERY = {"w_2": TITLES["w_2"], **FOUND, **TITLES}
Data = dict[str, list[Any]]  # a column a key, as seaborn takes it


def plot_changes(table: int, records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord]) -> Figure:
    """Change of each accuracy against the baseline, in points: the paper, each study recorded here, and this run."""
    import seaborn.objects as so

    styles: dict[str, tuple[str, str]] = {}
    data: Data = {key: [] for key in ("accuracy", "column", "evidence", "change", "low", "high")}
    for row in grid_rows(table, records, recorded):
        name, cells = f"{row['source']}: {row['network']}", {c: cell for c, cell in row["cells"].items() if cell}
        if cells:
            styles.setdefault(name, _style(row["source"], len(styles) - 1))
        for column, (_, moved) in cells.items():
            half = moved.half or 0
            values = (EVERY[row["metric"]], column_words(*column), name, moved.value)
            _append(data, *values, moved.value - half, moved.value + half)
    rows, shown = len(set(data["column"])) * len(styles), [t for t in EVERY.values() if t in data["accuracy"]]
    figure = sized(0.9 + 0.25 * len(styles) + math.ceil(len(shown) / 2) * (0.5 + 0.13 * rows), width=6.2)
    plot = so.Plot(data, x="change", y="column", color="evidence", marker="evidence")
    plot = plot.facet(col="accuracy", order=shown, wrap=2)
    plot = plot.add(so.Range(linewidth=1.8), so.Dodge(), xmin="low", xmax="high").add(so.Dot(pointsize=7), so.Dodge())
    plot = plot.label(x="change, points", y="")
    return _drawn(plot, figure, styles, zero=True)


def _style(source: str, study: int) -> tuple[str, str]:
    return {"paper": (PAPER, "D"), "this run": (THIS_RUN, "s")}.get(source) or STUDIES[study % len(STUDIES)]


def plot_protocol(records: Sequence[FinetuneRecord]) -> Figure:
    """Change of each accuracy in all eight settings: the paper's network of Tables 3 and 4, and each study of records.

    Points are means over seeds with 95 % intervals over test images, small ones single seeds where there are several.
    """
    import seaborn.objects as so

    paper, groups = f"paper: {short_name(GRIDS[4][0])}", studies(records)
    styles = {paper: (PAPER, "D")}
    data: Data = {key: [] for key in ("accuracy", "layers", "column", "evidence", "change", "low", "high", "seed")}
    for metric in TITLES:
        for how, table in (("whole", 4), ("last_layer", 3)):
            base = paper_value(1, GRIDS[table][0], metric)
            for column in COLUMNS:
                value = paper_value(table, GRIDS[table][0], metric, *column)
                assert value is not None and base is not None
                place = (TITLES[metric], HOW[how], column_words(*column), paper, value - base)
                _append(data, *place, value - base, value - base, math.nan)
        for i, (label, study) in enumerate(zip(labels_of(groups), groups, strict=True)):
            name = f"recorded here: {label}"
            styles.setdefault(name, STUDIES[i % len(STUDIES)])
            for (how, tau, eta), those in by_setting(study).items():
                mean, where = change(those, metric), (TITLES[metric], HOW[how], column_words(tau, eta), name)
                half = mean.half or 0
                _append(data, *where, mean.value, mean.value - half, mean.value + half, math.nan)
                for value in change_of_each(those, metric) if len(those) > 1 else []:
                    _append(data, *where, math.nan, math.nan, math.nan, value)
    figure = sized(9.6, width=6.2)
    plot = so.Plot(data, x="change", y="column", color="evidence", marker="evidence")
    plot = plot.facet(row="accuracy", col="layers", order={"row": list(TITLES.values()), "col": list(HOW.values())})
    plot = plot.share(x="col").add(so.Range(linewidth=1.8), so.Dodge(), xmin="low", xmax="high")
    plot = plot.add(so.Dot(pointsize=6), so.Dodge()).add(so.Dot(pointsize=2.5, alpha=0.7), so.Dodge(), x="seed")
    plot = plot.label(x="change, points", y="")
    return _drawn(plot, figure, styles, zero=True)


def plot_estimates(records: Sequence[SensitivityRecord], recorded: Sequence[SensitivityRecord]) -> Figure:
    """Figure 7.1: for each network Upsilon of its training set (a line) and of samples of it (points)."""
    import seaborn.objects as so

    styles: dict[str, tuple[str, str]] = {}
    samples: Data = {key: [] for key in ("network", "evidence", "upsilon")}
    whole: Data = {key: [] for key in samples}
    for source, those in (("recorded here", recorded), ("this run", records)):
        for record in those:
            name = f"{short_name(record.network.name)}\n{record.data.train:,} images"
            styles.setdefault(source, _style(source, 0))
            _append(whole, name, source, record.reference)
            for estimate in record.estimates:
                _append(samples, name, source, estimate)
    figure = sized(1.4 + 0.7 * len(set(whole["network"])))
    plot = so.Plot(samples, x="upsilon", y="network", color="evidence", marker="evidence")
    plot = plot.add(so.Dot(pointsize=6, alpha=0.6), so.Dodge(), so.Jitter(0.5, seed=0))
    plot = plot.add(so.Dash(width=0.9, linewidth=2.5), so.Dodge(), data=whole)
    plot = plot.label(x="Υ of samples (points), of all images (lines)", y="").limit(x=(0, None))
    return _drawn(plot, figure, styles)


def plot_along(what: str, records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord]) -> Figure:
    """Figure 7.2 ("w_2"), 7.3 ("w_inf") or 7.4 ("upsilon"): solid on test images, dashed on validation or training.

    A panel for each network and training. A line is the mean over seeds, in a band from the least to the greatest.
    """
    import seaborn.objects as so
    from matplotlib.ticker import MaxNLocator

    data: Data = {key: [] for key in ("epoch", "value", "images", "evidence", "network")}
    groups = studies([*recorded, *records])
    styles: dict[str, tuple[str, str]] = {}
    for label, those in zip(labels_of(groups), groups, strict=True):
        for record in those:
            source = "this run" if any(record is r for r in records) else "recorded here"
            styles.setdefault(source, _style(source, 0))
            for epoch, row in enumerate(along(record)):
                for key, part in ALONG[what].items():
                    _append(data, epoch, (1 if what == "upsilon" else 100) * row[key], part, source, label)
    figure = sized(1.3 + 2.3 * len(groups))
    plot = so.Plot(data, x="epoch", y="value", color="evidence", linestyle="images", group="images").facet(
        row="network"
    )
    plot = plot.share(y=False).add(so.Band(alpha=0.15), so.Est(errorbar=("pi", 100))).add(so.Line(), so.Agg())
    plot = plot.scale(linestyle=so.Nominal(["-", "--"], order=list(ALONG[what].values())))
    plot = plot.label(x="epoch (0: before fine-tuning)", y="Υ" if what == "upsilon" else "accuracy, per cent")
    drawn = _drawn(plot, figure, styles, [f"{part} images" for part in ALONG[what].values()])
    for axis in drawn.axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def plot_frontiers(records: Sequence[Record]) -> Figure:
    """What each objective gives and costs: clean accuracy against A_2, a panel for each study, on test images.

    A line joins the weights of one objective at one radius; small points are single seeds where there are several. What
    Algorithm 1 reaches is shaded.
    """
    import seaborn as sns
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    every = frontiers.studies(records)
    deltas = sorted({setting.delta for study in every for setting in frontiers.settings_of(study)}, reverse=True)
    fills = {delta: FILLS[i % len(FILLS)] for i, delta in enumerate(deltas)}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure = sized(1.4 + 3.2 * max(1, len(every)))
        if not every:
            return saying(figure, NOTHING)
        shown: dict[str, Any] = {}
        for axis, study in zip(figure.subplots(len(every), 1, squeeze=False)[:, 0], every, strict=True):
            for (objective, delta), those in _lines(study).items():
                colour, marker, line = OBJECTIVES.get(objective, ("black", "d", ":"))
                look: Any = {"color": colour, "marker": marker, "fillstyle": fills[delta], "linestyle": line}
                words = f"{frontiers.name(objective)}, δ = {delta:.4g}/255"
                shown.setdefault(words, Line2D([], [], label=words, markersize=7, linewidth=1.5, **look))
                points = [_place(group) for group in those.values()]
                axis.plot(*zip(*points, strict=True), markersize=7, linewidth=1.5, zorder=3, **look)
                for (beta, group), at in zip(those.items(), points, strict=True):
                    _beside(axis, f"{beta:g}", at, colour)
                    for record in group if len(group) > 1 else []:
                        axis.plot(*_place([record]), marker=marker, color=colour, markersize=2.5, zorder=3)
            if before := frontiers.as_it_is(study, "test", records):
                star: Any = {"color": "black", "marker": "*", "markersize": 12, "linestyle": ""}
                axis.plot(*_place([before]), zorder=5, **star)
                shown["before"] = Line2D([], [], label="the network as it is", **star)
            axis.margins(0.12)
            low, _ = axis.get_ylim()
            if grid := _edge(frontiers.frontier(study, "test", records)):
                axis.fill_between(*zip(*grid, strict=True), low, color="0.9", linewidth=0, zorder=1)
                shown["frontier"] = Patch(color="0.9", label="what Algorithm 1 reaches")
            axis.set(
                title=frontiers.label(study, every), ylabel=f"A₂ at {frontiers.AT}/255, per cent", ylim=(low, None)
            )
        axis.set_xlabel("clean accuracy, per cent")
        title = "numbers at points: the weight β"
        figure.legend(handles=[*shown.values()], title=title, loc="outside upper center", frameon=False)
    return figure


def _edge(line: Sequence[frontiers.Point]) -> list[tuple[float, float]]:
    """A frontier as it is drawn: clean accuracy and A_2 in per cent, from its lowest clean accuracy to its highest."""
    import numpy as np

    if not line:
        return []
    grid = np.linspace(line[0].clean.mean(), line[-1].clean.mean(), 401)
    heights = [frontiers.reached(frontiers.Point(np.array([at]), 0), line).mean() for at in grid]
    return [(100 * x, 100 * y) for x, y in zip(grid, heights, strict=True)]


def _lines(study: frontiers.Study) -> dict[tuple[str, float], dict[float, frontiers.Study]]:
    """The records of each line: of an objective at a radius, for each weight."""
    found: dict[tuple[str, float], dict[float, frontiers.Study]] = {}
    for (objective, beta, delta), those in frontiers.settings_of(study).items():
        found.setdefault((objective, delta), {})[beta] = those
    return found


def _place(records: Sequence[Any]) -> tuple[float, float]:
    there = frontiers.point(records, "test")
    return 100 * there.clean.mean(), 100 * there.robust.mean()


def plot_joint(records: Sequence[Record]) -> Figure:
    """A_inf against A_2 as gamma moves: a line for each network, a panel for each radius of A_2, on test images."""
    import seaborn as sns
    from matplotlib.lines import Line2D

    every = joint.lines(records)
    studies = [line.study for line in every]
    spread = [ball for ball in joint.BALLS if ball != joint.POINTWISE]
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure = sized(1.0 + 3.0 * len(spread) + 0.25 * len(every))
        if not every:
            return saying(figure, f"{joint.NOT_YET}.")
        shown = []
        for i, line in enumerate(every):
            colour, marker = STUDIES[i % len(STUDIES)]
            words = f"{frontiers.label(line.study, studies)}, {line.words}"
            shown.append(Line2D([], [], color=colour, marker=marker, label=words))
        for axis, ball in zip(figure.subplots(len(spread), 1, squeeze=False)[:, 0], spread, strict=True):
            for i, line in enumerate(every):
                colour, marker = STUDIES[i % len(STUDIES)]
                points = [_robust(those, ball) for those in line.points.values()]
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, zorder=3)
                for gamma, at in zip(line.points, points, strict=True):
                    _beside(axis, f"{gamma:g}", at, colour)
                if line.before:
                    at = _robust([line.before], ball)
                    axis.plot(*at, color=colour, marker="*", markersize=12, linestyle="", zorder=3)
            axis.margins(0.12)
            axis.set(xlabel=f"{joint.BALLS[ball]}, per cent", ylabel="A∞, 8/255, per cent")
        if any(line.before for line in every):
            shown.append(Line2D([], [], color="black", marker="*", linestyle="", label="the network as it is"))
        figure.legend(handles=shown, title="numbers at points: γ", loc="outside upper center", frameon=False)
    return figure


def _robust(those: Sequence[Any], ball: tuple[float, float]) -> tuple[float, float]:
    """A_2 in a ball and A_inf at 8/255, in per cent."""
    across, up = (100 * frontiers.point(those, "test", one).robust.mean() for one in (ball, joint.POINTWISE))
    return across, up


def plot_scratch(records: Sequence[Record]) -> Figure:
    """From scratch: clean accuracy against A_2 and against A_inf, a row of panels an architecture, on test images."""
    import seaborn as sns
    from matplotlib.lines import Line2D

    every = joint.scratch_studies(records)
    balls = [joint.SPREAD, joint.POINTWISE]
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure = sized(1.2 + 2.8 * max(1, len(every) * len(balls)))
        if not every:
            return saying(figure, f"{joint.NOT_YET}.")
        panels = [(study, ball) for study in every for ball in balls]
        shown: dict[str, Any] = {}
        for axis, (study, ball) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            for setting, those in frontiers.settings_of(study).items():
                colour, marker, _ = OBJECTIVES.get(setting.objective, ("black", "d", ":"))
                look: Any = {"color": colour, "marker": marker, "linestyle": "", "markersize": 8}
                there = frontiers.point(those, "test", ball)
                axis.plot(100 * there.clean.mean(), 100 * there.robust.mean(), zorder=3, **look)
                words = f"{frontiers.name(setting.objective)}, {setting.words}"
                shown.setdefault(words, Line2D([], [], label=words, **look))
            axis.margins(0.2)
            title = frontiers.label(study, every) if ball == balls[0] else ""
            axis.set(title=title, xlabel="clean accuracy, per cent", ylabel=f"{joint.BALLS[ball]}, per cent")
        figure.legend(handles=[*shown.values()], loc="outside upper center", frameon=False)
    return figure


def _beside(axis: Any, text: str, at: tuple[float, float], colour: str) -> None:
    """A few letters beside a point, readable on lines too."""
    from matplotlib.patheffects import withStroke

    how: Any = {"color": colour, "fontsize": 9, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    axis.annotate(text, at, (5, 4), textcoords="offset points", zorder=4, **how)


def _append(data: Data, *values: Any) -> None:
    for column, value in zip(data.values(), values, strict=True):
        column.append(value)


def sized(height: float, width: float = WIDTH) -> Figure:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)  # the caller shows it, once
    return figure


def saying(figure: Figure, words: str) -> Figure:
    """With words alone. Without axes a notebook would not show it as a picture."""
    figure.subplots().set_axis_off()
    figure.text(0.5, 0.5, words, ha="center", va="center")
    return figure


def _drawn(
    plot: Any, figure: Figure, styles: Mapping[str, tuple[str, str]], lines: Sequence[str] = (), zero: bool = False
) -> Figure:
    """Draw a plot on a figure, evidence in its colours and markers, and say above it which is which.

    Args:
        lines: what a solid line is, and what a dashed one.
        zero: whether a line marks 0, and others part the rows.
    """
    import seaborn as sns
    import seaborn.objects as so
    from matplotlib.lines import Line2D

    names = list(styles)
    plot = plot.scale(color=so.Nominal([colour for colour, _ in styles.values()], order=names))
    if not lines:
        plot = plot.scale(marker=so.Nominal([marker for _, marker in styles.values()], order=names))
    if not styles:
        figure.text(0.5, 0.5, NOTHING, ha="center", va="center")
        return figure
    plot.theme(sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=0.9)).on(figure).plot()
    figure.legends.clear()
    for axis in figure.axes:
        axis.tick_params(labelbottom=True)
        if zero:
            axis.axvline(0, color="black", linewidth=1)
            axis.grid(False, axis="y")
            for between in range(len(axis.get_yticks()) - 1):
                axis.axhline(between + 0.5, color="0.85", linewidth=0.8)
    style: Any = "-" if lines else ""
    shown = [
        Line2D([], [], color=colour, linestyle=style, marker=None if lines else marker, label=name)
        for name, (colour, marker) in styles.items()
    ]
    kinds: tuple[Any, ...] = ("-", "--")
    shown += [Line2D([], [], color="black", linestyle=kind, label=n) for n, kind in zip(lines, kinds, strict=False)]
    figure.legend(handles=shown, loc="outside upper center", ncols=2 if lines else 1, frameon=False)
    return figure
