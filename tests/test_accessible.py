"""The built pages can be read by ear, by keyboard and with weak eyes, as far as their markup and colours decide it."""

import importlib.util
import itertools
import re
from collections import Counter

import pytest
from bs4 import BeautifulSoup

from companion import files, gains_plot, plots, worst

MODES = ("light", "dark")
A_FILE = re.compile(
    r"[\w./\\-]+\.(png|svg|jpe?g|webp|gif)", re.IGNORECASE
)  # what Sphinx says of an image without a text


@pytest.fixture(scope="module")
def pages(build):
    """Every page of the book but index.html, which only forwards; search.html has no article."""
    paths = [path for path in sorted(build[2].rglob("*.html")) if "_static" not in path.parts]
    paths.remove(build[2] / "index.html")
    return {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in paths}


@pytest.fixture(scope="module")
def articles(pages):
    found = {name: page.select_one("article.bd-article") for name, page in pages.items()}
    found = {name: article for name, article in found.items() if article}
    assert len(found) > 8
    return found


def name_of(element):
    """What a screen reader says of a link or a button."""
    inner = [image.get("alt", "") for image in element.find_all("img")]
    return " ".join([element.get("aria-label", ""), element.get("title", ""), element.get_text(), *inner]).strip()


def test_every_page_says_its_language_and_its_title(pages):
    assert {page.html.get("lang") for page in pages.values()} == {"en"}
    titles = Counter(page.title.get_text(strip=True) for page in pages.values())
    assert "" not in titles and max(titles.values()) == 1


def test_every_image_has_a_text(articles):
    missing = []
    for name, article in articles.items():
        texts = [image.get("alt", "").strip() for image in article.find_all("img")]
        texts += [svg.get("aria-label", "") for svg in article.find_all("svg") if svg.get("aria-hidden") != "true"]
        missing += [f"{name}: {text!r}" for text in texts if not text or A_FILE.fullmatch(text)]
    # In a notebook: "metadata": {"mystnb": {"image": {"alt": "what the figure shows"}}} of its cell.
    assert missing == []


def test_headings_leave_out_no_level(articles):
    jumps = []
    for name, article in articles.items():
        levels = [int(heading.name[1]) for heading in article.find_all(re.compile("^h[1-6]$"))]
        ordered = levels[:1] == [1] and all(1 < b <= a + 1 for a, b in itertools.pairwise(levels))
        jumps += [] if ordered else [f"{name}: {levels}"]
    assert jumps == []


def test_every_table_has_headings_and_none_is_empty(articles):
    faults = []
    for name, article in articles.items():
        for table in article.find_all("table"):
            headings = [cell.get_text(strip=True) for cell in table.find_all("th")]
            faults += [] if headings and all(headings) else [f"{name}: {headings} of {table.get_text(' ')[:80]!r}"]
    assert faults == []


def test_every_link_and_button_says_what_it_is(pages):
    silent = []
    for name, page in pages.items():
        controls = [*page.find_all("a", href=True), *page.find_all(["button", "summary"])]
        silent += [f"{name}: {control}" for control in controls if not name_of(control)]
    assert silent == []


def test_no_two_parts_of_a_page_have_the_same_id(pages):
    doubled = []
    for name, page in pages.items():
        ids = Counter(element["id"] for element in page.find_all(id=True))
        doubled += [f"{name}: {key}" for key, count in ids.items() if count > 1]
    assert doubled == []


def test_lists_hold_what_lists_hold(articles):
    for name, article in articles.items():
        for block in article.find_all("dl", role=None):
            kinds = [part.name for part in block.find_all(recursive=False)]
            assert kinds[:1] == ["dt"] and "dd" in kinds, f"{name}: {kinds}"
        assert article.select('[role="list"], [role="doc-biblioentry"], summary[aria-label]') == [], name


# ---------------------------------------------------------------------------------------------------------------------
# Contrast, as WCAG 2.2 measures it: 4.5 for text, 3 for what a figure is made of
# ---------------------------------------------------------------------------------------------------------------------


def rgba(text):
    """(red, green, blue, opacity), each in 0..1, of #rgb, #rrggbb and rgba()."""
    if text.startswith("#"):
        digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
        return (*(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)), 1.0)
    *colour, opacity = (float(part) for part in re.findall(r"[\d.]+", text))
    return (*(part / 255 for part in colour), opacity)


def over(front, back):
    *colour, opacity = front
    return (*(opacity * a + (1 - opacity) * b for a, b in zip(colour, back, strict=False)), 1.0)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(front, back):
    low, high = sorted((luminance(over(front, back)), luminance(back)))
    return (high + 0.05) / (low + 0.05)


def colours(build, mode):
    """The colours of a mode: the theme's, then ours, each as rgba."""
    values = {}
    for sheet in ("styles/pydata-sphinx-theme.css", "styles/sphinx-book-theme.css", "companion.css"):
        text = (build[2] / "_static" / sheet).read_text(encoding="utf-8")
        text = text.split("/* --- print")[0]  # of ours
        for block in re.findall(rf'html\[data-theme="?{mode}"?\]\s*{{([^}}]*)}}', text):
            values |= dict(re.findall(r"(--[\w-]+):\s*((?:#[0-9a-f]{3,6}\b|rgba\([^)]*\)))", block))
    return {name: rgba(value) for name, value in values.items()}


def test_contrast_is_measured_as_wcag_measures_it():
    assert contrast(rgba("#000"), rgba("#fff")) == pytest.approx(21)
    assert contrast(rgba("#767676"), rgba("#ffffff")) == pytest.approx(4.54, abs=0.01)
    assert contrast(rgba("rgba(0, 0, 0, 0.5)"), rgba("#fff")) == pytest.approx(
        contrast(rgba("#808080"), rgba("#fff")), 0.01
    )


@pytest.mark.parametrize("mode", MODES)
def test_text_on_our_band_can_be_read(build, mode):
    theme = colours(build, mode)
    band = over(theme["--wdat-band"], theme["--pst-color-background"])
    for name in ("--pst-color-text-base", "--pst-color-text-muted", "--pst-color-primary"):  # primary is that of links
        assert contrast(theme[name], band) >= 4.5, name


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_of_the_first_picture_can_be_told_from_the_page(build, mode):
    theme = colours(build, mode)
    style = (build[2] / "_static" / "companion.css").read_text(encoding="utf-8")
    drawn = set(re.findall(r"\.budget [^{]*{[^}]*(?:color|stroke): var\((--wdat-\w+)\)", style))
    assert len(drawn) == 4
    for name in drawn:
        assert contrast(theme[name], theme["--pst-color-background"]) >= 3, name
    # Fooled and kept differ in more than the hue.
    assert abs(luminance(theme["--wdat-strike"]) - luminance(theme["--wdat-calm"])) > 0.13


def test_the_budget_that_is_moved_by_hand_is_on_its_page_with_its_script(pages):
    page = pages["worst_case.html"]
    (box,) = page.select(".prices")
    assert box.template and box.output["role"] == "status" and len(box.select("ol > li")) == 40
    assert any("prices.js" in script.get("src", "") for script in page.find_all("script"))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_bought_can_be_told_from_the_page(build, mode):
    theme = colours(build, mode)
    assert contrast(theme["--wdat-strike"], theme["--pst-color-background"]) >= 3
    assert contrast(theme["--pst-color-text-muted"], theme["--pst-color-background"]) >= 4.5


def test_the_colours_of_the_plots_can_be_told_from_white():
    drawn = [
        colour for colour, *_ in (*plots.OBJECTIVES.values(), *gains_plot.PRETRAINED.values(), gains_plot.OTHERWISE)
    ]
    for colour in (plots.PAPER, plots.RECORDED, plots.THIS_RUN, *worst.ORDERS.values(), *drawn):
        assert contrast(rgba(colour), rgba("#ffffff")) >= 3, colour


def test_repairs_change_what_they_name_and_nothing_else():
    path = files.ROOT / "book" / "_ext" / "accessible.py"
    spec = importlib.util.spec_from_file_location("accessible", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.repair('<dl>\n\n<dd><em class="sig-param">x</em></dd></dl>').startswith('<dl role="none">')
    untouched = '<dl><dt>a</dt><dd>b</dd></dl><th class="head"><p>c</p></th><summary>d</summary>'
    assert module.repair(untouched) == untouched
