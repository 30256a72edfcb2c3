"""Theorem 4.1, seen: how far first order carries, from W-PGD with many steps.

    python -m companion.first_order NETWORK... --data data --test-images 500

The theorem says V(delta) = V(0) + delta Upsilon + o(delta), where V(delta) is the greatest mean loss in the ball. W-PGD
gives V(delta) from below. The record goes to runs/; with one in results/ the page "How far first order carries" has it.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import wdat_core
from companion.bases import Record
from companion.bench import Bench, begin, bench, data_words, each_network, network_words, recorded
from companion.kinds import FirstOrderRecord
from companion.parts import FirstOrderConfig, FirstOrderRow
from companion.settings import ParameterError, Settings
from companion.words import NOTHING, listed, markdown, name_of, plural, short_name
from wdat_core import Threat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREATS = [Threat(2, math.inf, 8 / 255), Threat(2, 2, 128 / 255), Threat(4, math.inf, 8 / 255)]  # the usual radii
LOSSES = {"ce": "CE", "dlr": "DLR", "redlr": "ReDLR"}
FRACTIONS = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]  # of the usual radius
STEPS, WITHIN = 100, 0.1  # how near first order has to be
STYLES = (("#0072b2", "o"), ("#a6467f", "s"), ("#007a5a", "^"), ("#8a5a00", "D"), ("#444444", "v"))


def first_order_each(settings: Sequence[Settings], *, steps: int = STEPS) -> list[FirstOrderRecord]:
    """For each of the settings a record of the first test images: Upsilon, V(0), and V at several radii.

    Raises:
        ParameterError: as `bench`.
    """
    records: list[Any] = []
    for one in settings:
        on = bench(one, classes=3)
        config = FirstOrderConfig(steps=steps, fractions=FRACTIONS, losses=list(LOSSES), threats=THREATS)
        network, data = shlex.quote(network_words(str(one.network))), shlex.quote(data_words(one))
        command = f"python -m companion.first_order {network} --data {data} --test-images {one.test_images}"
        begun = begin("first_order", on, ("test",), config)
        records.append(recorded(begun, on, command, lambda on=on: {"rows": _rows(on, steps)}))  # type: ignore[misc]
    return records


def _rows(on: Bench, steps: int) -> list[FirstOrderRow]:
    rows = []
    for threat, loss in itertools.product(THREATS, LOSSES):
        how: dict[str, Any] = {"loss": loss, "batch_size": on.at_once}
        upsilon = wdat_core.sensitivity(on.model, *on.data.test, threat, **how)
        if not upsilon:
            raise ParameterError(
                f"{on.network.name} reads none of these images rightly, so {loss} has no slope: take more"
            )
        values = []
        for fraction in FRACTIONS:
            there = replace(threat, delta=fraction * threat.delta)
            show = on.progress(f"{loss}, {_ball(threat)}, {255 * there.delta:.3g}/255")
            losses = wdat_core.wpgd(on.model, *on.data.test, there, steps=steps, progress=show, **how).history["loss"]
            values.append(max(losses))  # of all iterates, since each of them is in the ball
        rows.append(FirstOrderRow(threat=threat, loss=loss, upsilon=upsilon, start=losses[0], values=values))
    return rows


def carried(record: FirstOrderRecord, row: FirstOrderRow) -> list[float]:
    """(V(delta) - V(0)) / (delta Upsilon) at each radius of a row: 1 where first order is exact."""
    slopes = [f * row.threat.delta * row.upsilon for f in record.config.fractions]
    return [(v - row.start) / slope for v, slope in zip(row.values, slopes, strict=True)]


def reach(record: FirstOrderRecord, row: FirstOrderRow) -> float:
    """The greatest radius up to which first order holds within a tenth, in 255ths; 0 where at none."""
    pairs = zip(record.config.fractions, carried(record, row), strict=True)
    held = itertools.takewhile(lambda pair: abs(pair[1] - 1) <= WITHIN, pairs)
    return max((255 * fraction * row.threat.delta for fraction, _ in held), default=0.0)


def newest(records: Sequence[Record]) -> list[FirstOrderRecord]:
    """For each network the record of the most images."""
    best: dict[str, FirstOrderRecord] = {}
    those = [record for record in records if isinstance(record, FirstOrderRecord)]
    for record in sorted(those, key=lambda r: r.data.test or 0):
        best[record.network.digest] = record
    return list(best.values())


def first_order_answer(records: Sequence[Record]) -> str:
    """Up to which radius first order holds, for the paper's loss and ball, and what it is worth at the usual one."""
    those = newest(records)
    if not those:
        return NOTHING
    at_usual = [carried(record, _row(record, "redlr"))[-1] for record in those]
    low, high = min(at_usual), max(at_usual)
    said = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    return (
        f"**At the paper's radius, 8/255, the mean loss rises by {said} times what first order says,** for ReDLR and"
        f" (W₂, l∞), under W-PGD with {those[0].config.steps} steps. There first order holds within a"
        f" tenth {_held(those, 'redlr')}; for cross-entropy {_held(those, 'ce')}."
    )


def _row(record: FirstOrderRecord, loss: str) -> FirstOrderRow:
    """The row of a loss and the paper's ball."""
    return next(row for row in record.rows if (row.loss, row.threat) == (loss, THREATS[0]))


def _held(those: Sequence[FirstOrderRecord], loss: str) -> str:
    """Up to where first order holds on each network, in words."""
    far = [reach(record, _row(record, loss)) for record in those]
    if not any(far):
        return "at no radius that was tried"
    words = [f"up to {_radius(f)}" if f else "at none that was tried" for f in far]
    return listed([f"{w} on {name_of(record)}" for w, record in zip(words, those, strict=True)])


def _radius(radius: float) -> str:
    return f"{radius:.3g}/255" if radius else "no radius that was tried"


def reach_table(records: Sequence[Record]) -> Any:
    """For each network, ball and loss: Upsilon, how far first order holds, and what it is worth at the usual radius."""
    lines = []
    for record in newest(records):
        for row in record.rows:
            cells = [short_name(record.network.name), _ball(row.threat), LOSSES[row.loss], f"{row.upsilon:.3g}"]
            cells += [
                _radius(reach(record, row)),
                f"{carried(record, row)[-1]:.2f} at {255 * row.threat.delta:.0f}/255",
            ]
            lines.append(cells)
    heads = ["network", "ball", "loss", "Υ", "holds within a tenth up to δ =", "(V(δ) − V(0)) / (δ Υ)"]
    return markdown(heads, lines)


def _ball(threat: Threat) -> str:
    return ", ".join(
        f"{name}{'∞' if order == math.inf else f'{order:g}'}"
        for name, order in zip("Wl", (threat.p, threat.r), strict=True)
    )


def plot_first_order(records: Sequence[Record]) -> Figure:
    """A panel for each ball and loss: what W-PGD reaches over what first order says, against the radius."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    those = newest(records)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.85):
        size: dict[str, Any] = {"figsize": (7.0, 6.4), "sharex": "col", "sharey": "row", "layout": "constrained"}
        figure, axes = plt.subplots(len(LOSSES), len(THREATS), **size)
        plt.close(figure)
        for (i, loss), (k, threat) in itertools.product(enumerate(LOSSES), enumerate(THREATS)):
            axis = axes[i, k]
            axis.axhspan(1 - WITHIN, 1 + WITHIN, color="0.85", zorder=0)
            for record, (colour, marker) in zip(those, itertools.cycle(STYLES), strict=False):
                row = next(row for row in record.rows if (row.loss, row.threat) == (loss, threat))
                radii = [255 * threat.delta * f for f in record.config.fractions]
                label = short_name(record.network.name) if (i, k) == (0, 0) else None
                axis.plot(radii, carried(record, row), color=colour, marker=marker, markersize=5, label=label)
            ticks = [255 * threat.delta * f for f in FRACTIONS[::2]]
            axis.set(xscale="log")
            axis.set_xticks(ticks, [f"{radius:.3g}" for radius in ticks])
            axis.minorticks_off()
            if not i:
                axis.set_title(_ball(threat))
            if i == len(LOSSES) - 1:
                axis.set_xlabel("δ, in 255ths")
            if not k:
                axis.set_ylabel(LOSSES[loss])
        for axis in axes[:, 0]:
            axis.set_ylim(0, None)
        figure.supylabel("(V(δ) − V(0)) / (δ Υ)", fontsize="medium")
        if those:
            figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def how_measured(records: Sequence[Record]) -> Any:
    """How it was measured, a line for each network, as Markdown."""
    from IPython.display import Markdown

    lines = [
        f"- {name_of(r)}: the first {plural(r.data.test or 0, 'test image')}, {r.config.steps} steps, on {r.device}"
        for r in newest(records)
    ]
    return Markdown("\n".join(lines) or NOTHING)


def main(arguments: list[str]) -> None:
    each_network("first_order", __doc__, arguments, 500, first_order_each)


if __name__ == "__main__":
    main(sys.argv[1:])
