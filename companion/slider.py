"""A budget to move by hand: which of forty images the cheapest-first attacker buys with it, and what W-PGD does.

Every state is computed here, and is HTML; book/_static/prices.js only puts one in place of another. Without it the page
shows the state of the paper's radius, and all of them as a table."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from companion.pictures import class_name, pixels, png
from companion.settings import Settings
from companion.words import plural

if TYPE_CHECKING:
    from torch import Tensor

IMAGES, STEPS = 40, 100  # the first test images; gradients an image of the search
RADII = [k / 2 for k in range(21)]  # where the budget can be put, in 255ths
SHOWN = 8.0  # where it is at first: the paper's radius
MARKS = {True: "✓", False: "✗"}  # read rightly, or not


@dataclass(frozen=True)
class State:
    """What two attackers do with one budget, image by image."""

    radius: float  # in 255ths
    bought: tuple[bool, ...]  # by who buys the cheapest first
    right: tuple[bool, ...]  # after W-PGD
    vain: float  # the part of what W-PGD spends, as a sum of d^2, that goes to images that stay right


@dataclass(frozen=True)
class Prices:
    """Images, the cheapest first: what they are, what they are read as, what they cost, and every state."""

    pixels: Sequence[Tensor]  # each (3, h, w) in [0, 1]
    label: tuple[int, ...]
    before: tuple[int, ...]
    price: tuple[float, ...]  # in [0, 1] pixel units; 0: wrong as it is; inf: nothing was found
    states: tuple[State, ...]

    def left(self, state: State) -> tuple[bool, ...]:
        """Which images are still right when the cheapest are bought."""
        return tuple(price > 0 and not bought for price, bought in zip(self.price, state.bought, strict=True))


def prices(settings: Settings | None = None) -> Prices:
    """The embedded images as the demo network reads them, attacked with every budget of RADII; takes some seconds."""
    import torch

    from companion.bench import bench
    from wdat_core import Threat

    on = bench((settings or Settings(test_images=IMAGES)).resolved())
    x, y = on.data.test
    found = on.boundary((x, y), steps=STEPS)
    with torch.no_grad():
        before = on.model(x).argmax(1)
    order = found.distance.argsort(stable=True).tolist()
    states = []
    for radius in RADII:
        bought, right, vain = torch.zeros(len(y), dtype=torch.bool), before == y, 0.0
        if radius:
            threat = Threat(p=2, r=on.settings.r, delta=radius / 255)
            bought = found.bought(threat) & (found.distance > 0)
            there = replace(on, settings=on.settings.model_copy(update={"delta": radius / 255}))
            attack = there.attack((x, y), 2.0)
            right, spent = attack.correct, (attack.x_adv - x).double().flatten(1).norm(on.settings.r, dim=1).square()
            vain = 1 - (spent[~right].sum() / spent.sum()).item() if spent.any() else 0.0
        states.append(State(radius, tuple(bought[order].tolist()), tuple(right[order].tolist()), vain))
    label, read = (tuple(part[order].tolist()) for part in (y, before))
    return Prices(list(x[order].cpu()), label, read, tuple(found.distance[order].tolist()), tuple(states))


def says(known: Prices, state: State) -> str:
    """What a state shows, in a few short sentences."""
    n, left, right = len(known.label), known.left(state), sum(state.right)
    wrong, count = known.price.count(0), sum(state.bought)
    if not state.radius:
        return f"With δ = 0 nothing is bought. {wrong} of {n} images are wrong as they are, and {sum(left)} are right."
    dearest = max((price for price, bought in zip(known.price, state.bought, strict=True) if bought), default=0.0)
    text = f"With δ = {state.radius:g}/255 the attacker buys {plural(count, 'image')}"
    text += f", the dearest for {pixels(dearest)}/255" * (count > 0)
    text += f". Still right: {sum(left)} of {n} ({100 * sum(left) / n:.1f} %)."
    missed = sum(a and not b for a, b in zip(state.right, left, strict=True))
    text += f" With the same δ, W-PGD leaves {right} right ({100 * right / n:.1f} %)"
    text += f", {missed} of them bought here" * (missed > 0)
    return f"{text}. {100 * state.vain:.0f} % of what it spends goes to images that stay right."


def slider(known: Prices) -> str:
    """The images in the order of their prices, with the control of the budget and what it comes to, as HTML."""
    first = next(state for state in known.states if state.radius == SHOWN)
    states = [
        {
            "says": says(known, state),
            "kind": [_kind(known, state, i) for i in range(len(known.label))],
            "right": [int(right) for right in state.right],
        }
        for state in known.states
    ]
    data = html.escape(json.dumps(states, ensure_ascii=False, separators=(",", ":")))
    most, step = known.states[-1].radius, known.states[1].radius
    ticks = "".join(f"<span>{tick:g}</span>" for tick in range(0, math.floor(most) + 1, 2))
    return "\n".join([
        f'<div class="prices" data-states="{data}">',
        '<template><div class="control">',
        '<label for="prices-delta">Budget δ, in 255ths</label>',
        f'<input type="range" id="prices-delta" min="0" max="{most:g}" step="{step:g}" value="{SHOWN:g}"'
        f' aria-valuetext="δ = {SHOWN:g}/255" aria-controls="prices-images" autocomplete="off">',
        f'<div class="ticks" aria-hidden="true">{ticks}</div>',
        "</div></template>",
        f'<output for="prices-delta" role="status">{html.escape(says(known, first))}</output>',
        '<p class="key">Below each image is its price, in 255ths. The first mark: <b>✗</b> bought, or wrong as it is'
        " (grey); <b>✓</b> still right. The second mark: the same after W-PGD.</p>",
        '<ol id="prices-images">',
        *(_card(known, first, i) for i in range(len(known.label))),
        "</ol>",
        _table(known),
        "</div>",
    ])  # fmt: skip


def _kind(known: Prices, state: State, i: int) -> str:
    return "wrong" if known.price[i] == 0 else "bought" if state.bought[i] else "kept"


def _card(known: Prices, state: State, i: int) -> str:
    name, price, kind = class_name(known.label[i]), known.price[i], _kind(known, state, i)
    cost = "–" if price == math.inf else pixels(price)
    read = "" if price else f", read as {class_name(known.before[i])}"
    return (
        f'<li class="{kind}"><img src="{png(known.pixels[i])}" alt="{name}{read}" width="32" height="32">'
        f'<span><span class="heard">price </span>{cost}</span>'
        f'<span class="marks" role="img" aria-label="{kind}; W-PGD: {"right" if state.right[i] else "wrong"}">'
        f"<b>{MARKS[kind == 'kept']}</b> <i>{MARKS[state.right[i]]}</i></span></li>"
    )


def _table(known: Prices) -> str:
    heads = ("δ, in 255ths", "bought", "still right", "still right after W-PGD", "of W-PGD’s budget in vain")
    rows = []
    for state in known.states:
        if state.radius % 1 == 0:
            left = [
                f"{k} ({100 * k / len(known.label):.1f}&nbsp;%)" for k in map(sum, (known.left(state), state.right))
            ]
            vain = f"{100 * state.vain:.0f}&nbsp;%" if state.radius else "–"
            cells = (f"{sum(state.bought)}", *left, vain)
            rows.append(
                f'<tr><th scope="row">{state.radius:g}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
            )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        "<details><summary>Every budget, as a table</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def shown(known: Prices) -> Any:
    """The slider, for a notebook to show."""
    from IPython.display import HTML

    return HTML(slider(known))
