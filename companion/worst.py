"""How robust is it really: the lowest accuracy found in the ball, from the distances in records, beside W-PGD's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion.intervals import accuracy, boundary_of, found_at, has_found
from companion.kinds import EvaluateRecord, Record, StrongerRecord, images_of
from companion.networks import PUBLISHED
from companion.settings import PAPER_NETWORKS, STAND_INS
from companion.words import NOTHING, listed, markdown, name_of, plural, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADII = (2, 4, 8)  # of the table, in 255ths
ORDERS = {1.0: "#8a5a00", 2.0: "#0072b2", 4.0: "#007a5a", math.inf: "#a6467f"}  # of the curves, each with its colour
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words on a curve
MOST = 16  # radius at which the curves end, in 255ths


def measured(records: Sequence[Record]) -> list[EvaluateRecord]:
    """The records of networks as they are whose distances are known: for each network that of the most test images."""
    names = [*PAPER_NETWORKS, *STAND_INS, *PUBLISHED]
    best: dict[str, Any] = {}
    for record in records:
        if isinstance(record, EvaluateRecord) and has_found(record, "test"):
            known = best.get(record.network.name)
            if known is None or images_of(record, "test") > images_of(known, "test"):
                best[record.network.name] = record
    return sorted(best.values(), key=lambda r: names.index(r.network.name) if r.network.name in names else len(names))


def worst_answer(records: Sequence[Record]) -> str:
    """By how much W-PGD overstates robustness, on each network, and what that number is not."""
    those = measured(records)
    if not those:
        return NOTHING
    pairs = [(accuracy([r], "test", "w_2").value, accuracy([r], "test", "w_2_found").value) for r in those]
    most = max(before - after for before, after in pairs)
    parts = [f"{b:.1f} % against {a:.1f} % on {name_of(r)}" for r, (b, a) in zip(those, pairs, strict=True)]
    radius = f"{255 * those[0].config.threat.delta:.4g}/255"
    return (
        f"**W-PGD overstates robustness by up to {most:.0f} points.** At δ = {radius} it leaves more images right than"
        f" an attacker who buys the cheapest ones first, with the same budget: {listed(parts)}. Neither number is a"
        " certificate: the true worst case may be lower still."
    )


def worst_table(records: Sequence[Record], stronger: Sequence[StrongerRecord] = ()) -> Any:
    """A row for each network, as Markdown: accuracy in per cent clean, under W-PGD, and in the worst case found."""
    lines = []
    for record in measured(records):
        twin = [
            s for s in stronger if s.network.digest == record.network.digest and s.data.digest == record.data.digest
        ]
        cells = [short_name(record.network.name), accuracy([record], "test", "clean").text()]
        cells.append(accuracy([record], "test", "w_2").text())
        cells.append(accuracy(twin[:1], "w_2_2023", "accuracy").text() if twin else "–")
        cells += [accuracy([record], "test", found_at(2, delta)).text() for delta in RADII]
        cells.append(accuracy([record], "test", found_at(math.inf, RADII[-1])).text())
        lines.append(cells)
    at = f"{RADII[-1]}/255"
    heads = ["network", "clean", f"W-PGD, 20 steps, {at}", f"W-PGD of 2023, {at}"]
    heads += [f"worst case found, W₂, {delta}/255" for delta in RADII]
    return markdown([*heads, f"worst case found, W∞, {at}"], lines)


def searched(records: Sequence[Record]) -> str:
    """How the distances were found, in one line for each network, as Markdown."""
    lines = []
    for record in measured(records):
        part = record.boundary
        assert part is not None
        images = plural(images_of(record, "test"), "test image")
        lines.append(f"- {name_of(record)}: {images}, {part.steps} gradients an image, on {part.device}")
    return "\n".join(lines) or NOTHING


def plot_worst(records: Sequence[Record]) -> Figure:
    """For each network the accuracy left by the cheapest-first attacker at every radius, and W-PGD's on top."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.lines import Line2D

    those = measured(records)
    columns = min(2, max(1, len(those)))
    rows = math.ceil(max(1, len(those)) / columns)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.2 + 2.5 * columns, 1.2 + 2.1 * rows), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        plt.close(figure)
        for i, axis in enumerate(axes.flat):
            if i < len(those):
                _panel(axis, those[i])
                axis.set(
                    xlabel="radius δ, in 255ths" if i + columns >= len(those) else "", xticks=range(0, MOST + 1, 4)
                )
                axis.set_ylabel("accuracy, per cent" if i % columns == 0 else "")
            else:
                axis.axis("off")
        shown = [
            Line2D([], [], color=colour, label=f"worst case found, p = {_order(p)}") for p, colour in ORDERS.items()
        ]
        marks = (("W-PGD, 20 steps, p = 2", "o", 2.0), ("PGD, 20 steps, p = ∞", "s", math.inf))
        for name, marker, p in marks:
            shown.append(
                Line2D([], [], color=ORDERS[p], linestyle="", marker=marker, markeredgecolor="black", label=name)
            )
        figure.legend(handles=shown, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _order(p: float) -> str:
    return "∞" if p == math.inf else f"{p:g}"


def _panel(axis: Any, record: EvaluateRecord) -> None:
    found, delta = boundary_of(record, "test"), 255 * record.config.threat.delta
    for p, colour in ORDERS.items():
        radii, accuracies = found.curve(p)
        x, y = [*(255 * radii).tolist(), MOST], [*(100 * accuracies).tolist(), 100 * accuracies[-1].item()]
        axis.plot(x, y, drawstyle="steps-post", color=colour, linewidth=1.8)
    for metric, marker, p in (("w_2", "o", 2.0), ("w_inf", "s", math.inf)):
        value = accuracy([record], "test", metric).value
        axis.plot([delta], [value], marker=marker, color=ORDERS[p], markeredgecolor="black", markersize=7, zorder=3)
        if metric == "w_2":
            left = accuracy([record], "test", "w_2_found").value
            axis.annotate(
                "", (delta, left), (delta, value), arrowprops={"arrowstyle": "->", "color": ORDERS[p], "shrinkA": 4}
            )
            axis.text(
                delta + 0.3, (value + left) / 2, f"−{value - left:.1f} points", color=ORDERS[p], va="center", bbox=WHITE
            )
    axis.set(title=short_name(record.network.name), xlim=(0, MOST), ylim=(0, 72))


def found_is_no_higher(record: EvaluateRecord, within: float = 0.1) -> bool:
    """Whether the search left no more than W-PGD and PGD did in the same balls, within so many points."""
    delta = 255 * record.config.threat.delta
    pairs = (("w_2", 2.0), ("w_inf", math.inf))
    value = {m: accuracy([record], "test", m).value for m, _ in pairs}
    return all(accuracy([record], "test", found_at(p, delta)).value <= value[m] + within for m, p in pairs)
