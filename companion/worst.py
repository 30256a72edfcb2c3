"""How robust is it really: the lowest accuracy found in the ball, from the distances in records, beside W-PGD's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion.bases import Record, images_of
from companion.claims import RADII
from companion.intervals import accuracy, boundary_of, found_at, has_found, search_of
from companion.kinds import CertifiedRecord, EvaluateRecord, StrongerRecord
from companion.networks import PUBLISHED
from companion.settings import PAPER_NETWORKS, STAND_INS
from companion.values import unpack_floats
from companion.words import NOTHING, listed, markdown, name_of, plural, short_name
from wdat_core import Boundary, Threat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = {1.0: "#8a5a00", 2.0: "#0072b2", 4.0: "#007a5a", math.inf: "#a6467f"}  # of the curves, each with its colour
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words on a curve
NORMS = {"Linf": math.inf, "L2": 2.0}
MOST = 16  # radius at which the curves end, in 255ths


def measured(records: Sequence[Record]) -> list[EvaluateRecord]:
    """The records of networks as they are whose distances are known: for each network that of the most test images.

    Of as many images it is that of the longest search.

    Names are used again for other data sets, norms and fine-tunings, so a network is one set of weights and a threat.
    """
    names = [*PAPER_NETWORKS, *STAND_INS, *PUBLISHED]
    best: dict[Any, Any] = {}
    for record in records:
        if isinstance(record, EvaluateRecord) and has_found(record, "test"):
            key = (record.network.digest, record.config.threat)
            if key not in best or _extent(record) > _extent(best[key]):
                best[key] = record
    return sorted(best.values(), key=lambda r: names.index(r.network.name) if r.network.name in names else len(names))


def _extent(record: EvaluateRecord) -> tuple[int, int]:
    return images_of(record, "test"), search_of(record)


def worst_answer(records: Sequence[Record]) -> str:
    """By how much W-PGD overstates robustness, on each network, and what that number is not."""
    those = measured(records)
    if not those:
        return NOTHING
    found = [_left(record) for record in those]
    short = [name_of(r) for r, (before, after) in zip(those, found, strict=True) if after >= before]
    weak = f" The search was too short to say so of {listed(short)}: it found no more than W-PGD."
    pairs = [(r, b, a) for r, (b, a) in zip(those, found, strict=True) if b > a]
    if not pairs:
        return weak.strip()
    parts = [f"{b:.1f} % against {a:.1f} % on {name_of(r)}" for r, b, a in pairs]
    radii = sorted({r.config.threat.delta for r, *_ in pairs})
    radius = listed([f"{255 * delta:.4g}/255" for delta in radii])
    certified = [r for r in records if isinstance(r, CertifiedRecord)]
    known = [f"{words} on {name_of(r)}" for r, *_ in pairs if (words := _sandwich(r, certified))]
    proofs = f" At δ = {RADII[0]}/255 the truth lies between what is proved and what was found: {listed(known)}."
    return (
        f"{overstated(records)} At δ = {radius} it leaves more images right than an attacker who buys the cheapest ones"
        f" first, with the same budget: {listed(parts)}. Neither number is a certificate: the true"
        " worst case may be lower still." + weak * bool(short) + proofs * bool(known)
    )


def overstated(records: Sequence[Record]) -> str:
    """The greatest difference between W-PGD and the cheapest first, in one sentence of Markdown; "" where none is."""
    most = max((before - after for before, after in map(_left, measured(records))), default=0)
    return f"**W-PGD overstates robustness by up to {most:.0f} points.**" if most > 0 else ""


def _left(record: EvaluateRecord) -> tuple[float, float]:
    """What W-PGD leaves right of the test images and what the cheapest first does, in per cent."""
    before, after = (accuracy([record], "test", metric).value for metric in ("w_2", "w_2_found"))
    return before, after


def _sandwich(record: EvaluateRecord, certified: Sequence[CertifiedRecord]) -> str:
    proof = _proof_of_all(record, certified)
    if proof is None:
        return ""
    threat = Threat(p=2, r=record.config.threat.r, delta=RADII[0] / 255)
    found = accuracy([record], "test", found_at(2, RADII[0])).value
    return f"{_proved_at_least(proof, threat):.1f} to {found:.1f} %"


def proof_of(record: EvaluateRecord, certified: Sequence[CertifiedRecord]) -> CertifiedRecord | None:
    """What is proved of the network of a record, in its norm: of its own images, or of the first of them; else None."""
    those = [
        c
        for c in certified
        if (c.network.digest, NORMS[c.config.norm], c.data.source)
        == (record.network.digest, record.config.threat.r, record.data.source)
        and images_of(c, "test") <= images_of(record, "test")
    ]
    return max(those, key=lambda c: images_of(c, "test"), default=None)


def proved(proof: CertifiedRecord) -> Boundary:
    """Certified distances as `Boundary` takes them: what it says of accuracies is then a lower bound of the truth."""
    import torch

    return Boundary(torch.from_numpy(unpack_floats(proof.distance)), NORMS[proof.config.norm])


def proof_holds(record: EvaluateRecord, certified: Sequence[CertifiedRecord]) -> bool:
    """Whether no image was found nearer than is proved; one that was would be a fault of the proof or of the attack."""
    proof = proof_of(record, certified)
    if proof is None:
        return True
    least = proved(proof).distance
    return bool((boundary_of(record, "test").distance[: len(least)] >= least).all())


def worst_table(
    records: Sequence[Record],
    stronger: Sequence[StrongerRecord] = (),
    certified: Sequence[CertifiedRecord] = (),
) -> Any:
    """A row for each network, as Markdown: accuracy in per cent clean, under W-PGD, and in the worst case found.

    In brackets what is proved to be left, where that is known. The radii are those of the book, or where all records
    have one radius that, its half and its quarter.
    """
    lines, those = [], measured(records)
    attacks = {(r.config.steps, r.config.threat.delta, r.config.threat.r) for r in those}
    deltas, norms = {delta for _, delta, _ in attacks}, {r for *_, r in attacks}
    radii: Sequence[float] = RADII
    if len(deltas) == 1:
        radii = [round(255 * max(deltas) / part, 9) for part in (4, 2, 1)]
    for record in those:
        twin = [
            s
            for s in stronger
            if s.network.digest == record.network.digest
            and s.data.digest == record.data.digest
            and s.config.threat == record.config.threat
        ]
        cells = [short_name(record.network.name), accuracy([record], "test", "clean").text()]
        cells.append(accuracy([record], "test", "w_2").text())
        cells.append(accuracy(twin[:1], "w_2_2023", "accuracy").text() if twin else "–")
        for p, delta in [*((2.0, delta) for delta in radii), (math.inf, radii[-1])]:
            found = accuracy([record], "test", found_at(p, delta)).text()
            cells.append(found + _at_least(record, certified, p, delta))
        lines.append(cells)
    words = [
        f"{steps} steps, {255 * delta:.4g}/255{'' if r == math.inf else f', l_{r:g}'}" for steps, delta, r in attacks
    ]
    attack = f", {words[0]}" if len(words) == 1 else ", as in its record"
    norm = "" if norms <= {math.inf} else f", l_{max(norms):g}" if len(norms) == 1 else ", in its own norm"
    former = f", {radii[-1]:.4g}/255" if len(deltas) == 1 else ", as in its record"
    heads = ["network", "clean", f"W-PGD{attack}", f"W-PGD of 2023{former}"]
    heads += [f"worst case found, W₂, {delta:.4g}/255{norm}" for delta in radii]
    heads.append(f"worst case found, W∞, {radii[-1]:.4g}/255{norm}")
    return markdown(heads, lines or [["no distances: they come with found_steps above 0", *["–"] * (len(heads) - 1)]])


def _at_least(record: EvaluateRecord, certified: Sequence[CertifiedRecord], p: float, delta: float) -> str:
    proof = proof_of(record, certified)
    if proof is None:
        return ""
    threat, n = Threat(p=p, r=record.config.threat.r, delta=delta / 255), images_of(proof, "test")
    least = f"{_proved_at_least(proof, threat):.2f}"
    if n == images_of(record, "test"):
        return f" (proved: {least})"
    same = Boundary(boundary_of(record, "test").distance[:n], threat.r)
    return f" (of the first {n:,} images {100 * same.accuracy(threat):.2f} found, {least} proved)"


def _proof_of_all(record: EvaluateRecord, certified: Sequence[CertifiedRecord]) -> CertifiedRecord | None:
    """A proof of all the images of a record: that of some is of another sample, and could lie above what was found."""
    proof = proof_of(record, certified)
    return proof if proof and images_of(proof, "test") == images_of(record, "test") else None


def _proved_at_least(proof: CertifiedRecord, threat: Threat) -> float:
    """The accuracy in per cent below which no attacker gets, not even one who splits an image."""
    return 100 * max(0.0, proved(proof).accuracy(threat) - (threat.p < math.inf) / images_of(proof, "test"))


def searched(records: Sequence[Record], certified: Sequence[CertifiedRecord] = ()) -> str:
    """How the distances were found, in one line for each network, as Markdown."""
    lines = []
    for record in measured(records):
        part = record.boundary
        assert part is not None
        images = plural(images_of(record, "test"), "test image")
        lines.append(f"- {name_of(record)}: {images}, {part.steps} gradients an image, on {part.device}")
        if proof := proof_of(record, certified):
            images = plural(images_of(proof, "test"), "test image")
            lines[-1] += f"; proved by {proof.config.method}: {images}, up to {255 * proof.config.most:.4g}/255"
    return "\n".join(lines) or NOTHING


def plot_worst(records: Sequence[Record], certified: Sequence[CertifiedRecord] = ()) -> Figure:
    """For each network the accuracy left by the cheapest-first attacker at every radius, and W-PGD's on top.

    Where something is proved of the same images it is a dashed curve below, and the truth lies in the band between.
    """
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
                _panel(axis, those[i], _proof_of_all(those[i], certified))
                axis.set(
                    xlabel="radius δ, in 255ths" if i + columns >= len(those) else "", xticks=range(0, MOST + 1, 4)
                )
                axis.set_ylabel("accuracy, per cent" if i % columns == 0 else "")
            else:
                axis.axis("off")
        shown = [
            Line2D([], [], color=colour, label=f"worst case found, p = {_order(p)}") for p, colour in ORDERS.items()
        ]
        if any(_proof_of_all(record, certified) for record in those):
            shown.append(Line2D([], [], color="black", linestyle="--", label="proved, p = 2 and ∞"))
        steps = plural(those[0].config.steps if those else 0, "step")
        marks = ((f"W-PGD, {steps}, p = 2", "o", 2.0), (f"PGD, {steps}, p = ∞", "s", math.inf))
        for name, marker, p in marks:
            shown.append(
                Line2D([], [], color=ORDERS[p], linestyle="", marker=marker, markeredgecolor="black", label=name)
            )
        axes[0, 0].set_ylim(0, None)
        figure.legend(handles=shown, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def plot_sandwich(records: Sequence[Record], certified: Sequence[CertifiedRecord]) -> Figure:
    """For each network with a proof: what was found above, what is proved below, on the same first images."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.lines import Line2D

    those = [record for record in measured(records) if proof_of(record, certified)]
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        size = (5.0, 1.3 + 2.4 * max(1, len(those)))
        figure, axes = plt.subplots(max(1, len(those)), 1, figsize=size, squeeze=False, layout="constrained")
        plt.close(figure)
        for axis, record in zip(axes[:, 0], those, strict=False):
            proof = proof_of(record, certified)
            assert proof is not None
            n = images_of(proof, "test")
            found = Boundary(boundary_of(record, "test").distance[:n], record.config.threat.r)
            for p in (2.0, math.inf):
                axis.plot(*_steps(found, p), drawstyle="steps-post", color=ORDERS[p], linewidth=1.8)
                _band(axis, found, proved(proof), p)
            name = f"{short_name(record.network.name)}, the first {n:,} test images"
            axis.set(title=name, xlabel="radius δ, in 255ths", ylabel="accuracy, per cent", xlim=(0, 8), ylim=(0, None))
        shown = [Line2D([], [], color=ORDERS[p], label=f"p = {_order(p)}") for p in (2.0, math.inf)]
        shown.append(Line2D([], [], color="black", label="found"))
        shown.append(Line2D([], [], color="black", linestyle="--", label="proved"))
        figure.legend(handles=shown, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _order(p: float) -> str:
    return "∞" if p == math.inf else f"{p:g}"


def _panel(axis: Any, record: EvaluateRecord, proof: CertifiedRecord | None) -> None:
    found, delta = boundary_of(record, "test"), 255 * record.config.threat.delta
    for p, colour in ORDERS.items():
        axis.plot(*_steps(found, p), drawstyle="steps-post", color=colour, linewidth=1.8)
    for p in (2.0, math.inf) if proof else ():
        assert proof is not None
        _band(axis, found, proved(proof), p)
    for metric, marker, p in (("w_2", "o", 2.0), ("w_inf", "s", math.inf)):
        value = accuracy([record], "test", metric).value
        axis.plot([delta], [value], marker=marker, color=ORDERS[p], markeredgecolor="black", markersize=7, zorder=3)
        if metric == "w_2":
            left = accuracy([record], "test", "w_2_found").value
            axis.annotate(
                "", (delta, left), (delta, value), arrowprops={"arrowstyle": "->", "color": ORDERS[p], "shrinkA": 4}
            )
            axis.text(
                0.97, 0.95, f"↓ {value - left:.1f} points", color=ORDERS[p], ha="right", va="top", bbox=WHITE,
                transform=axis.transAxes,
            )  # fmt: skip
    axis.set(title=short_name(record.network.name), xlim=(0, MOST))


def _steps(found: Boundary, p: float) -> tuple[list[float], list[float]]:
    """A curve to draw: radii in 255ths, up to the end of the panel at least, and accuracies in per cent."""
    radii, accuracies = ((scale * values).tolist() for scale, values in zip((255, 100), found.curve(p), strict=True))
    return [*radii, max(MOST, radii[-1])], [*accuracies, accuracies[-1]]


def _band(axis: Any, found: Boundary, least: Boundary, p: float) -> None:
    """What is proved, and between it and what was found the band in which the truth lies."""
    import numpy as np

    grid, between = np.linspace(0, MOST, 401), []
    for curve in (least, found):
        x, y = map(np.array, _steps(curve, p))
        between.append(y[np.searchsorted(x, grid, side="right") - 1])
    axis.plot(grid, between[0], color=ORDERS[p], linestyle="--", linewidth=1.4)
    axis.fill_between(grid, *between, color=ORDERS[p], alpha=0.15, linewidth=0)


def found_is_no_higher(record: EvaluateRecord, within: float = 0.1) -> bool:
    """Whether the search left no more than W-PGD and PGD did in the same balls, within so many points.

    Also where nothing was searched for.
    """
    if not has_found(record, "test"):
        return True
    delta = 255 * record.config.threat.delta
    pairs = (("w_2", 2.0), ("w_inf", math.inf))
    value = {m: accuracy([record], "test", m).value for m, _ in pairs}
    return all(accuracy([record], "test", found_at(p, delta)).value <= value[m] + within for m, p in pairs)
