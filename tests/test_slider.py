"""The budget that is moved by hand: each state is what the attackers do, and everybody can move it and read it."""

import json
import math
import re

import pytest
import torch
from bs4 import BeautifulSoup

from companion import files, slider
from companion.settings import Settings

FEW = 12


@pytest.fixture(scope="module")
def known():
    return slider.prices(Settings(test_images=FEW, steps=3))


@pytest.fixture(scope="module")
def page(known):
    return BeautifulSoup(slider.slider(known), "html.parser")


def live(page):
    """What the script takes out of its template and puts on the page."""
    (template,) = page.select("template")
    return BeautifulSoup(template.decode_contents(), "html.parser")


def made(price, bought, right, radius=8.0, vain=0.25):
    """Images with these prices, in 255ths, in one state."""
    state = slider.State(radius, tuple(bought), tuple(right), vain)
    n = len(price)
    return slider.Prices([torch.zeros(3, 2, 2)] * n, (3,) * n, (5,) * n, tuple(p / 255 for p in price), (state,))


def test_each_state_buys_the_cheapest_that_the_budget_pays_for(known):
    assert list(known.price) == sorted(known.price) and [s.radius for s in known.states] == slider.RADII
    for state in known.states:
        bought = [price for price, is_bought in zip(known.price, state.bought, strict=True) if is_bought]
        left = [price for price, is_left in zip(known.price, known.left(state), strict=True) if is_left]
        budget, spent = FEW * (state.radius / 255) ** 2, sum(price**2 for price in bought)
        assert spent <= budget * (1 + 1e-6) and all(bought)
        assert not left or spent + min(left) ** 2 > budget * (1 - 1e-6)
        assert len(bought) + len(left) + known.price.count(0) == FEW
    counts = [sum(known.left(state)) for state in known.states]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_what_is_wrong_as_it_is_costs_nothing_and_is_not_bought(known):
    wrong = [price == 0 for price in known.price]
    assert wrong == [a != b for a, b in zip(known.label, known.before, strict=True)] and any(wrong)
    for state in known.states:
        assert not any(a and b for a, b in zip(wrong, state.right, strict=True))
    assert all(0 <= state.vain <= 1 for state in known.states)


def test_the_words_count_what_the_state_shows():
    known = made([0, 1, 2, 30], [False, True, True, False], [False, True, False, True])
    text = slider.says(known, known.states[0])
    assert text == (
        "With δ = 8/255 the attacker buys 2 images, the dearest for 2.0/255. Still right: 1 of 4 (25.0 %)."
        " With the same δ, W-PGD leaves 2 right (50.0 %), 1 of them bought here. 25 % of what it spends goes to images"
        " that stay right."
    )
    nothing = made([0, math.inf], [False, False], [False, True], radius=0.0)
    assert slider.says(nothing, nothing.states[0]) == (
        "With δ = 0 nothing is bought. 1 of 2 images are wrong as they are, and 1 are right."
    )


def test_without_a_script_the_paper_s_radius_is_shown_and_every_other_is_in_a_table(page, known):
    state = next(state for state in known.states if state.radius == slider.SHOWN)
    (output,) = page.select("output")
    assert output.get_text() == slider.says(known, state)
    kinds = [card["class"][0] for card in page.select("ol > li")]
    assert kinds.count("bought") == sum(state.bought) and kinds.count("wrong") == known.price.count(0)
    assert not page.select(".prices > .control") and live(page).select(".control")  # nothing to move without it
    assert [row.th.get_text() for row in page.select("tbody tr")] == [f"{k}" for k in range(11)]
    assert page.select("details > summary")


def test_the_control_has_a_name_a_value_in_words_and_the_keyboard_of_the_browser(page):
    inside = live(page)
    (control,) = inside.select("input")
    (label,) = inside.select(f'label[for="{control["id"]}"]')
    assert label.get_text() == "Budget δ, in 255ths"
    assert control["type"] == "range" and control["aria-valuetext"] == "δ = 8/255" and "tabindex" not in control.attrs
    assert page.select(f"ol#{control['aria-controls']}")
    (output,) = page.select("output")
    assert output["role"] == "status" and output["for"] == [control["id"]]
    values = [float(control[name]) for name in ("min", "max", "step")]
    states = json.loads(page.select_one(".prices")["data-states"])
    assert values[0] == 0 and values[1] / values[2] + 1 == len(states) == len(slider.RADII)


def test_every_image_and_mark_is_said_in_words(page):
    for card in page.select("ol > li"):
        assert card.img["alt"].strip() and card.select_one(".heard").get_text() == "price "
        said, (first, second) = card.select_one(".marks")["aria-label"], card.select(".marks > *")
        assert re.fullmatch(r"(wrong|bought|kept); W-PGD: (right|wrong)", said)
        assert first.get_text() == ("✓" if said.startswith("kept") else "✗")
        assert second.get_text() == ("✓" if said.endswith("right") else "✗")


def test_the_script_changes_what_the_page_has_and_loads_nothing(page):
    script = (files.ROOT / "book" / "_static" / "prices.js").read_text(encoding="utf-8")
    assert not re.search(r"https?:|import|fetch|innerHTML|eval", script)
    for selector in re.findall(r'querySelector(?:All)?\("([^"]+)"\)', script):
        assert page.select(selector) or live(page).select(selector), selector
    states = json.loads(page.select_one(".prices")["data-states"])
    assert {key for state in states for key in state} == set(re.findall(r"\bstate\.(\w+)", script))
    assert all(len(state["kind"]) == len(state["right"]) == len(page.select("ol > li")) for state in states)
