"""The figure of gains: against the size of the network, by kind of pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion import gains
from companion.bases import Record
from companion.evidence import by_setting
from companion.intervals import change, with_metrics
from companion.plots import PAPER, RECORDED, saying, sized
from companion.words import HOW, NOTHING, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# For each kind of pre-training, and any other: colour and marker.
PRETRAINED = {"TRADES": (RECORDED, "o"), "PGD": ("#a6467f", "s")}
OTHERWISE = (PAPER, "D")
SMALL = {"whole": "full", "last_layer": "none"}  # of small markers, by what was trained


def plot_gains(records: Sequence[Record]) -> Figure:
    """Gain of Algorithm 1 against the number of parameters, a panel for each yardstick, by kind of pre-training.

    Small marks are the other settings of Tables 3 and 4; hollow is what is not counted. Networks of one size stand side
    by side.
    """
    import seaborn as sns
    from matplotlib.lines import Line2D

    every = gains.tuned(records)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure = sized(4.6, width=6.2)
        if not every:
            return saying(figure, NOTHING)
        axes = figure.subplots(1, len(gains.YARDSTICKS), sharex=True, sharey=True)
        for axis, (metric, title) in zip(axes, gains.YARDSTICKS.items(), strict=True):
            axis.axhline(0, color="black", linewidth=1)
            for network, at in _side_by_side(every):
                _mark(axis, network, at, metric)
            axis.set(title=title.replace(" as ", "\nas "), xlabel="parameters, thousands", xscale="log")
            axis.margins(x=0.15)
        ticks = _apart(sorted({network.size for network in every}))
        axes[0].set_xticks(ticks, [f"{size / 1000:,.0f}" for size in ticks])
        axes[0].minorticks_off()
        axes[0].set_ylabel("gain, points")
        marks = [(kind, *PRETRAINED.get(kind, OTHERWISE), 8.0, "full") for kind in {n.kind: None for n in every}]
        marks += [("not counted: a shorter protocol", "black", "o", 8.0, "none")] * any(not n.full for n in every)
        marks += [(f"other settings, {HOW[how]}", "black", "o", 3.5, fill) for how, fill in SMALL.items()]
        shown = []
        for label, colour, marker, size, fill in marks:
            look: Any = {"color": colour, "marker": marker, "markersize": size, "fillstyle": fill}
            shown.append(Line2D([], [], linestyle="", label=label, **look))
        figure.legend(handles=shown, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _mark(axis: Any, network: gains.Tuned, at: float, metric: str) -> None:
    """A network on a panel: its gain with the interval and its name, and its other settings, small."""
    from matplotlib.patheffects import withStroke

    colour, marker = PRETRAINED.get(network.kind, OTHERWISE)
    for setting, those in by_setting(network.study).items():
        if setting != gains.SETTING and (known := with_metrics(those, [metric], "before", "after")):
            look: Any = {"markersize": 3.5, "fillstyle": SMALL[setting[0]], "alpha": 0.6}
            axis.plot(at, change(known, metric).value, marker, color=colour, **look)
    if gain := network.gain(metric):
        fill = "full" if network.full else "none"
        axis.errorbar(at, gain.value, gain.half or 0, fmt=marker, color=colour, markersize=8, fillstyle=fill, zorder=3)
        name, place = short_name(network.study[0].network.name), (7, 4 if gain.value > 0 else -12)  # off the line at 0
        look = {"color": colour, "path_effects": [withStroke(linewidth=2.5, foreground="white")], "fontsize": 9}
        axis.annotate(name, (at, gain.value), place, textcoords="offset points", zorder=4, **look)


def _side_by_side(networks: Sequence[gains.Tuned]) -> list[tuple[gains.Tuned, float]]:
    """Where each stands: at its size, and beside others of this size."""
    places = []
    for network in networks:
        same = [other for other in networks if other.size == network.size]
        places.append((network, network.size * 1.06 ** (same.index(network) - (len(same) - 1) / 2)))
    return places


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of the sizes, in their order, whose numbers do not touch below an axis."""
    ticks: list[int] = []
    for size in sizes:
        ticks += [size] if not ticks or size > 1.2 * ticks[-1] else []
    return ticks
