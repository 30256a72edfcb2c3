"""Pictures of a "spend" record: where attackers spend their budget, image by image, as HTML without any script.

Text is text and colours are classes of book/_static/companion.css, so that a picture follows the theme of its page, is
read aloud, printed, and read on a phone."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from companion.evidence import is_current
from companion.intervals import boundary_of, has_found
from companion.kinds import SpendRecord
from companion.records import record_name

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES = {"w_inf": "W∞", "w_2": "W₂"}
FOUND = {"found": "cheapest first"}  # who has the budget of W₂ and knows what was found; not every record has them
# How the images divide, in the order of the picture: what the label below a block says, and what the table says.
GROUPS = {
    "wrong": ("already wrong", "wrong before any attack"),
    "both": ("fooled by both", "fooled by both attackers"),
    "w_2": ("by W₂ alone", "fooled by W₂, not by W∞"),
    "neither": ("by neither", "fooled by neither"),
    "w_inf": ("by W∞ alone", "fooled by W∞, not by W₂"),
}
FOOLS = {"w_inf": ("both", "w_inf"), "w_2": ("both", "w_2")}  # the groups that each attacker gets
DELTA, HEAD, REM = 64, 80, 20  # in units of the drawing: the height of delta, the room of a heading, 1 rem of the page


@dataclass(frozen=True)
class Image:
    """One test image: its place in the record, its class, what it is read as, and how far (l_inf) it was moved."""

    index: int
    label: int
    before: int
    after: dict[str, int]  # by attacker
    moved: dict[str, float]  # by attacker; in [0, 1] pixel units
    source: str  # of the data

    def name(self, label: int) -> str:
        """What a label stands for."""
        return class_name(label) if "CIFAR-10" in self.source.split() else f"class {label}"

    @property
    def group(self) -> str:
        """What became of it, a key of GROUPS."""
        if self.before != self.label:
            return "wrong"
        fooled = [name for name in NAMES if self.after[name] != self.label]
        return "both" if len(fooled) == 2 else fooled[0] if fooled else "neither"


def attackers(record: SpendRecord) -> dict[str, str]:
    """The attackers of a record, by their names in it, with what they are called."""
    return NAMES | FOUND if has_found(record, "test") else NAMES


def images_in(record: SpendRecord) -> list[Image]:
    """The images of a record, in its order."""
    read, moved = dict(record.prediction), dict(record.distance)
    if has_found(record, "test"):
        found = boundary_of(record, "test")
        bought = found.bought(record.config.threat).tolist()
        prices = zip(bought, found.distance.tolist(), strict=True)
        moved["found"] = [price if buys else 0.0 for buys, price in prices]
        nearest = zip(bought, read["found"], read["x"], strict=True)
        read["found"] = [there if buys else here for buys, there, here in nearest]
    names, source = attackers(record), record.data.source
    return [
        Image(i, label, read["x"][i], {a: read[a][i] for a in names}, {a: moved[a][i] for a in names}, source)
        for i, label in enumerate(record.label)
    ]


def grouped(images: Iterable[Image]) -> dict[str, list[Image]]:
    """The images of each group that has any, in the order of GROUPS; within one by what W₂ spends."""
    found: dict[str, list[Image]] = {name: [] for name in GROUPS}
    for image in sorted(images, key=lambda i: (i.moved["w_2"], i.moved["w_inf"], i.index)):
        found[image.group].append(image)
    return {name: members for name, members in found.items() if members}


def root_mean_square(images: Sequence[Image], attacker: str) -> float:
    """What an attacker spends on images: (mean d^2)^(1/2), which for W₂ may be delta over all of them."""
    return math.sqrt(sum(i.moved[attacker] ** 2 for i in images) / len(images))


def share(images: Iterable[Image], of: Iterable[Image], attacker: str) -> float:
    """The part of an attacker's budget, the sum of d^2, that goes to some of the images."""
    total = sum(i.moved[attacker] ** 2 for i in of)
    return sum(i.moved[attacker] ** 2 for i in images) / total if total else 0.0


def class_name(label: int) -> str:
    """Of CIFAR-10."""
    return CLASSES[label] if label < len(CLASSES) else f"class {label}"


def pixels(distance: float) -> str:
    """A distance in 255ths, the steps of an 8-bit pixel."""
    return f"{255 * distance:.1f}"


def opening(records: Iterable[SpendRecord]) -> SpendRecord | None:
    """The record that the book opens with: the demo network's, attacked as in the paper, of the most images."""
    fit = [
        r
        for r in records
        if r.network.name == "demo"
        and (r.config.threat.delta, r.config.steps, r.config.precision) == (8 / 255, 20, "float32")
    ]
    return max(fit, key=lambda r: len(r.label), default=None)


# --- where the budget goes -------------------------------------------------------------------------------------------


def budget(record: SpendRecord | None) -> str:
    """Each image as thin bars, what each attacker spends on it; below them the sums of each group, as a table."""
    if not record or not record.label:
        return (
            '<p class="budget-none">Where the budget goes, image by image: no such run is recorded yet, so nothing is'
            " drawn here. <code>papermill notebooks/gallery.ipynb out.ipynb</code> makes one.</p>\n"
        )
    images = images_in(record)
    groups, delta, n = grouped(images), record.config.threat.delta, len(images)
    tops = {a: max(1, math.ceil(round(max(i.moved[a] for i in images) / delta, 3))) for a in attackers(record)}
    base, height = {}, 0
    for attacker, top in tops.items():  # in deltas
        height += HEAD + DELTA * top
        base[attacker] = height
    height += 2
    lines, marks, x = [], [], 0
    for attacker, zero in base.items():
        lines += [f'<path class="axis" d="M0 {zero}H{n}"/>']
        lines += [f'<path class="delta" d="M0 {zero - DELTA * k}H{n}"/>' for k in range(1, tops[attacker] + 1)]
    for name, members in groups.items():
        marks.append(f'<g class="{name}">')
        marks += [_marks(image, x + k, base, delta) for k, image in enumerate(members)]
        marks.append("</g>")
        x += len(members)
        if x < n:
            lines += [f'<path class="between" d="M{x} {zero - DELTA * tops[a]}V{zero}"/>' for a, zero in base.items()]
    ticks = [
        f'<span class="tick" style="bottom:{_rem(height - zero + DELTA * k)}">{tick}</span>'
        for attacker, zero in base.items()
        for k, tick in enumerate(["0", "δ", *(f"{k}δ" for k in range(2, tops[attacker] + 1))])
    ]
    heads = [
        f'<p style="bottom:{_rem(height - zero + DELTA * tops[attacker] + 6)}">{_heading(record, attacker)}</p>'
        for attacker, zero in base.items()
    ]
    labels = [
        f'<span style="flex:{len(members)} 0 0">'
        + f"<b>{len(members)}</b> <i>{GROUPS[name][0]}</i>" * (30 * len(members) > n)  # where there is room
        + "</span>"
        for name, members in groups.items()
    ]
    parts = [
        '<div class="budget">',
        f'<div class="plot" style="height:{_rem(height)}">',
        f'<svg viewBox="0 0 {n} {height}" preserveAspectRatio="none" role="img" aria-label="{_summary(record)}">',
        *marks,
        *lines,
        "</svg>",
        *heads,
        *ticks,
        "</div>",
        f'<div class="blocks" aria-hidden="true">{"".join(labels)}</div>',
        _sums(images, groups, attackers(record)),
        f'<p class="figure-note">{_note(record, images)}</p>',
        "</div>",
    ]
    return "\n".join(parts) + "\n"


def _rem(units: float) -> str:
    return f"{units / REM:g}rem"


def _marks(image: Image, x: int, base: Mapping[str, int], delta: float) -> str:
    """The column of one image: what the pointer says of it, where it feels it, and a bar for each attacker."""
    words = [f"image {image.index}: {image.name(image.label)}, read as {image.name(image.before)}"]
    called = NAMES | FOUND
    words += [f"{called[a]}: {pixels(image.moved[a])}/255, {image.name(image.after[a])}" for a in base]
    bars = [f"M{x}.5 {zero}v{-DELTA * image.moved[a] / delta:.0f}" for a, zero in base.items()]
    title = html.escape("\n".join(words))
    return f'<g><title>{title}</title><path d="M{x}.5 0V999"/>' + "".join(f'<path d="{bar}"/>' for bar in bars) + "</g>"


def _heading(record: SpendRecord, attacker: str) -> str:
    moved, kept = [image.moved[attacker] for image in images_in(record)], accuracies(record)[attacker]
    zeros, most = moved.count(0), pixels(max(moved))
    left = f"<b>{100 * kept:.1f}&nbsp;%</b> still right."
    if attacker in FOUND:
        return f"<b>Cheapest first:</b> {len(moved) - zeros:,} images bought, the dearest for {most}/255. {left}"
    even = pixels(min(moved)) == most
    spent = (
        f"every image moved by {most}/255"
        if even
        else f"{zeros:,} images not moved, others by up to {most}/255"
        if zeros
        else f"images moved by up to {most}/255"
    )
    who = {"w_inf": "Pointwise", "w_2": "Distributional"}[attacker]
    return f"<b>{who}, {NAMES[attacker]}:</b> {spent}. {left}"


def _sums(images: Sequence[Image], groups: Mapping[str, Sequence[Image]], names: Mapping[str, str]) -> str:
    head = "".join(f'<th colspan="2" scope="colgroup">{name} spends</th>' for name in NAMES.values())
    heads = "<th>r.m.s., /255</th><th>of its total</th>" * len(NAMES)
    if "found" in names:
        head += f'<th rowspan="2">{names["found"]}: bought</th>'
    rows = []
    for name, members in [*groups.items(), ("", images)]:
        cells = [f'<th scope="row">{GROUPS[name][1] if name else "all"}</th><td>{len(members):,}</td>']
        for attacker in NAMES:
            kind = "wrong" if name == "wrong" else "fooled" if name in FOOLS[attacker] else "kept"
            mark = f'<span class="{kind}" aria-hidden="true">■</span> ' if name else ""
            part = f"{100 * share(members, images, attacker):.0f}&nbsp;%"
            cells.append(f"<td>{mark}{pixels(root_mean_square(members, attacker))}</td><td>{part}</td>")
        if "found" in names:
            cells.append(f"<td>{sum(i.moved['found'] > 0 for i in members):,}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<table><thead><tr><th rowspan="2">images</th><th rowspan="2">number</th>'
        f"{head}</tr><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _summary(record: SpendRecord) -> str:
    """What the picture shows, for those who do not see it."""
    images, delta = images_in(record), record.config.threat.delta
    says = [
        f"{len(images)} test images as columns, each with what {'three' if has_found(record, 'test') else 'two'}"
        f" attackers of radius {255 * delta:.4g}/255"
        " spend on it."
    ]
    says += [html.unescape(_heading(record, a).replace("<b>", "").replace("</b>", "")) for a in attackers(record)]
    says += [f"{len(members)}: {GROUPS[name][1]}." for name, members in grouped(images).items()]
    return html.escape(" ".join(says))


def _note(record: SpendRecord, images: Sequence[Image]) -> str:
    old = "" if is_current(record) else ", by an earlier version of <code>wdat_core.py</code>"
    network, delta = html.escape(record.network.name), record.config.threat.delta
    third = (
        " The third has the budget of W₂, and buys the images with the nearest misclassified image found first: no"
        " certificate, since nearer ones may exist."
    ) * has_found(record, "test")
    return (
        f"<strong>Measured.</strong> A column is one of {len(images):,} CIFAR-10 test images, the same in each band;"
        ' <span class="wrong">■</span> wrong before any attack, <span class="fooled">■</span> fooled,'
        f' <span class="kept">■</span> still right. The network <code>{network}</code> reads'
        f" {100 * accuracies(record)['x']:.1f}&nbsp;% correctly when nobody attacks. Each attacker may spend"
        f" δ&nbsp;=&nbsp;{255 * delta:.4g}/255: W∞ on every image, W₂ as the root mean square (r.m.s.) over all."
        f" W₂ ends at {pixels(root_mean_square(images, 'w_2'))}/255: its steps add up to δ, but do not all move the"
        f" same images.{third} Point at a column for its image."
        f" Drawn from <code>results/{html.escape(record_name(record))}</code>{old}."
    )


# --- the gallery -----------------------------------------------------------------------------------------------------

KINDS = {
    "dearest": "Fooled by W₂ at the highest price",
    "cheapest": "Fooled by W₂ at the lowest price",
    "in vain": "Not fooled by W₂, at the highest price",
    "spared": "Wrong before any attack: the first ones",
}
_STYLE = """<style>
.gallery h3 { margin: 1.25rem 0 0; font-size: 1rem; }
.gallery figure { max-width: 36rem; margin: 0.4rem 0 1rem; break-inside: avoid; }
.gallery figcaption { margin: 0; padding: 0; color: inherit; font: inherit; text-align: left; }
.gallery .five { display: grid; grid-template-columns: repeat(5, 1fr); gap: 0.4rem; }
.gallery .five { font-size: 0.8rem; line-height: 1.3; }
.gallery img { display: block; width: 100%; margin: 0; image-rendering: pixelated; }
.gallery .swap { display: block; background: var(--original) 0 0 / 100% 100%; image-rendering: pixelated; }
.gallery .swap:is(:hover, :focus) img { opacity: 0; }
</style>"""


def chosen(record: SpendRecord, each: int = 2) -> dict[str, list[Image]]:
    """The images that the gallery shows, by a rule alone: `each` of every key of KINDS, or as many as there are."""
    images = images_in(record)
    price = sorted(images, key=lambda i: (i.moved["w_2"], i.index))
    fooled, kept = ([i for i in price if i.group in groups] for groups in (FOOLS["w_2"], ("neither", "w_inf")))
    found = {
        "dearest": fooled[::-1][:each],
        "cheapest": [i for i in fooled if i not in fooled[::-1][:each]][:each],
        "in vain": kept[::-1][:each],
        "spared": [i for i in images if i.group == "wrong"][:each],
    }
    return {kind: members for kind, members in found.items() if members}


def magnification(record: SpendRecord) -> int:
    """How many times moves can be magnified so that the largest still fits between black and white around mid-grey."""
    largest = max(max(record.distance[attacker]) for attacker in NAMES)
    return max(1, math.floor(0.5 / largest)) if largest else 1


def gallery(record: SpendRecord, pixels_of: Mapping[str, Any], which: Mapping[str, Sequence[Image]]) -> str:
    """Images as they were, what each attacker added, magnified around mid-grey, and what came of it.

    Args:
        record: the run.
        pixels_of: its images as `runs.spend` returns them: "x", "w_inf" and "w_2", (n, 3, h, w) in [0, 1].
        which: the images to show, by a key of KINDS; their places count, and what became of them is the record's.
    """
    images, times = images_in(record), magnification(record)
    parts = [_STYLE, '<div class="gallery">']
    for kind, members in which.items():
        parts.append(f"<h3>{KINDS[kind]}</h3>")
        parts += [_card(images[member.index], pixels_of, times) for member in members]
    return "\n".join([*parts, "</div>"])


def _card(image: Image, pixels_of: Mapping[str, Any], times: int) -> str:
    x, name = pixels_of["x"][image.index], image.name(image.label)
    original = png(x)
    cells = [f'<div><img src="{original}" alt="Image {image.index}, {name}">original</div>']
    for attacker, symbol in NAMES.items():
        attacked, read = pixels_of[attacker][image.index], image.name(image.after[attacker])
        read = f"<b>{read}</b>" if image.after[attacker] != image.label else read
        said = f"after {symbol}, moved by {pixels(image.moved[attacker])}/255"
        cells += [
            f'<div><img src="{png(0.5 + times * (attacked - x))}" alt="the move of {symbol}, {times} times">'
            f"{symbol}: {pixels(image.moved[attacker])}/255</div>",
            f'<div><span class="swap" tabindex="0"><img src="{png(attacked)}" alt="{said}"></span>{read}</div>',
        ]
    return (
        f"<figure style=\"--original: url('{original}')\"><figcaption>Image {image.index}, <b>{name}</b>,"
        f' read as {image.name(image.before)}</figcaption><div class="five">{"".join(cells)}</div></figure>'
    )


def png(x: Any) -> str:
    """An image (3, h, w) or (1, h, w) in [0, 1] as the address of a PNG that holds it."""
    from PIL import Image as Picture

    content, values = io.BytesIO(), (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Picture.fromarray((values[:, :, 0] if values.shape[2] == 1 else values).numpy()).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def gallery_table(record: SpendRecord | None) -> str:
    """The same images in numbers, as Markdown."""
    if not record or not record.label:
        return "Nothing is recorded for these parameters yet."
    lines = [
        "| why | image | class | read as | W∞ moves it | read as | W₂ moves it | read as |",
        "|---|--:|---|---|--:|---|--:|---|",
    ]
    for kind, members in chosen(record).items():
        for i in members:
            cells = [kind, str(i.index), i.name(i.label), i.name(i.before)]
            for attacker in NAMES:
                cells += [f"{pixels(i.moved[attacker])}/255", i.name(i.after[attacker])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spend_table(record: SpendRecord | None) -> str:
    """Accuracy and budget of nobody, W∞ and W₂ over all images, as Markdown."""
    if not record or not record.label:
        return "Nothing is recorded for these parameters yet."
    images = images_in(record)
    lines = ["| attacker | still right | r.m.s. of the moves | largest move | not moved |", "|---|--:|--:|--:|--:|"]
    lines.append(f"| none | {100 * accuracies(record)['x']:.1f}\u00a0% | – | – | {len(images):,} |")
    for attacker, symbol in NAMES.items():
        moved = [i.moved[attacker] for i in images]
        cells = [
            f"{100 * accuracies(record)[attacker]:.1f}\u00a0%",
            f"{pixels(root_mean_square(images, attacker))}/255",
        ]
        lines.append(f"| {symbol} | {' | '.join(cells)} | {pixels(max(moved))}/255 | {moved.count(0):,} |")
    return "\n".join(lines)


def accuracies(record: SpendRecord) -> dict[str, float]:
    """The part of the images that is read correctly: as they are, "x", and after each attacker."""
    images = images_in(record)
    right = {"x": [i.before == i.label for i in images]}
    right |= {a: [i.after[a] == i.label for i in images] for a in attackers(record)}
    return {name: sum(each) / len(each) for name, each in right.items()}
