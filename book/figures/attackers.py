"""Draws attackers.html, the schematic of intro.md: `python book/figures/attackers.py`.

Eight images with invented margins, that is, distances to the nearest point where the network changes its mind. The
pointwise attacker moves each by delta. The distributional one moves as many as it can just over the boundary, cheapest
first, until the mean of the squared moves is delta squared. Nothing here is measured.

The drawing is inline SVG, so that text and colours follow the theme of the page (classes in _static/companion.css).
"""

import math
from pathlib import Path

MARGINS = [0.0, 0.4, 0.7, 0.95, 1.3, 1.5, 1.58, 2.6]  # in units of delta; 0: wrong before any attack
LEFT, UNIT, TOP, ROW = 6, 118, 58, 21  # pixels: where 0 is, the length of delta, the first row, between rows


def pointwise(margins: list[float]) -> list[float]:
    return [1.0 for _ in margins]


def distributional(margins: list[float]) -> list[float]:
    """The most images fooled for a root mean square of 1: the cheapest ones, and nothing for the others."""
    left, moves = float(len(margins)), [0.0] * len(margins)
    for i in sorted(range(len(margins)), key=margins.__getitem__):
        if margins[i] ** 2 <= left:
            moves[i] = margins[i]
            left -= margins[i] ** 2
    return moves


def panel(title: str, line: str, moves: list[float]) -> str:
    wrong = sum(move >= margin for move, margin in zip(moves, MARGINS, strict=True))
    length = math.sqrt(sum(move**2 for move in moves) / len(moves))
    bottom = TOP + ROW * len(MARGINS)
    alt = f"{title}: {line}. {wrong} of {len(moves)} images end up wrong."
    parts = [
        f'<svg viewBox="0 0 340 {bottom + 60}" role="img" aria-label="{alt}">',
        f'<text x="0" y="16" class="title">{title}</text>',
        f'<text x="0" y="35">{line}</text>',
    ]
    for tick, name in enumerate(["0", "δ", "2δ"]):
        x = LEFT + UNIT * tick
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{bottom - 6}" class="grid"/>')
        parts.append(f'<text x="{x}" y="{bottom + 10}" class="tick">{name}</text>')
    for i, (move, margin) in enumerate(zip(moves, MARGINS, strict=True)):
        y, end, edge = TOP + ROW * i, LEFT + UNIT * move, LEFT + UNIT * margin
        kind = "fooled" if 0 < margin <= move else "spared"
        if move:
            parts.append(f'<line x1="{LEFT}" x2="{end:.1f}" y1="{y}" y2="{y}" class="move {kind}"/>')
        if margin:
            parts.append(f'<circle cx="{end:.1f}" cy="{y}" r="5" class="{kind}"/>')
            parts.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{y - 8}" y2="{y + 8}" class="edge"/>')
        else:
            parts.append(f'<circle cx="{end:.1f}" cy="{y}" r="4.5" class="wrong"/>')
    parts.append(f'<text x="0" y="{bottom + 36}" class="result">{wrong} of {len(moves)} wrong</text>')
    parts.append(f'<text x="0" y="{bottom + 54}">root mean square of the moves: {length:.2f} δ</text>')
    return "\n".join([*parts, "</svg>"])


def draw() -> str:
    panels = [
        panel("Pointwise attacker", "moves every image by δ", pointwise(MARGINS)),
        panel("Distributional attacker", "moves an image only where it pays", distributional(MARGINS)),
    ]
    return '<div class="attackers">\n' + "\n".join(panels) + "\n</div>\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".html").write_text(draw(), encoding="utf-8", newline="\n")
