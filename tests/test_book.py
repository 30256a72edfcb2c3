"""The book builds from a fresh copy without a warning, holds every page, and needs no network."""

import ast
import dataclasses
import importlib.util
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

import wdat_core
from companion.answers import answer
from companion.evidence import paper_value
from companion.pages import substitutions
from companion.pictures import budget, opening
from companion.records import read_records

ROOT = Path(__file__).resolve().parent.parent
EXTERNAL = re.compile(r"(?:https?:)?//", re.IGNORECASE)
# What a browser loads by itself, by tag: the attributes that say from where. (A link a reader clicks may go anywhere.)
LOADED = {
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src"],
    "img": ["src", "srcset"],
    "input": ["src"],
    "link": ["href"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "track": ["src"],
    "video": ["src", "poster"],
}


class Page(HTMLParser):
    """Where a page can be jumped to, where it links to, what it loads, and the text of its scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.code = set(), [], [], []
        self.inside = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED:
            self.loads += [values[name] for name in LOADED[tag] if name in values]
        self.code.append(values.get("style", ""))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.code.append(data)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build):
    # The theme leaves a template of its own in _static.
    paths = [path for path in sorted(build[2].rglob("*.html")) if "_static" not in path.parts]
    return {path: Page(path) for path in paths}


def test_the_build_ends_well_and_warns_of_nothing(build):
    code, output, _ = build
    assert code == 0 and "WARNING" not in output, output


def test_every_page_of_the_contents_is_there(build):
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    names = [contents["root"]] + [page["file"] for part in contents["parts"] for page in part["chapters"]]
    names += [f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")]
    assert len(names) > 5
    assert [name for name in names if not (build[2] / f"{name}.html").is_file()] == []


def test_every_link_inside_the_book_leads_somewhere(build, pages):
    html, dead, followed = build[2].resolve(), [], 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            anchor = unquote(parts.fragment)
            followed += 1
            known = target.is_file() and target.is_relative_to(html)
            if not known or (anchor and target.suffix == ".html" and anchor not in pages[target].anchors):
                dead.append(f"{path.name}: {link}")
    assert followed > 100 and dead == []


def test_nothing_is_loaded_from_another_host(build, pages):
    found = [f"{path.name}: {url}" for path, page in pages.items() for url in page.loads if EXTERNAL.match(url)]
    for path, page in pages.items():
        found += [f"{path.name}: {text[:200]}" for text in page.code if re.search(r"https?://", text)]
    for path in build[2].rglob("*.css"):
        loads = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]*)", path.read_text(encoding="utf-8"))
        found += [f"{path.name}: {url}" for url in loads if EXTERNAL.match(url)]
    assert found == []


def test_formulas_come_from_the_copy_in_the_book(build, pages):
    scripts = [url for url in pages[build[2] / "method.html"].loads if "mathjax" in url.lower()]
    assert len(scripts) == 1
    assert (build[2] / "mathjax" / "tex-mml-chtml.js").is_file()
    assert (build[2] / "mathjax" / "LICENSE").is_file()
    assert len(list((build[2] / "mathjax").rglob("*.woff"))) == 23


def test_no_numbered_formula_has_lines_that_sphinx_would_split(build):
    # Sphinx puts a $$ formula with \\ in it into a split environment, where MathJax refuses \tag: use equation* there.
    text = (build[2] / "method.html").read_text(encoding="utf-8")
    blocks = re.findall(r"\\begin{split}.*?\\end{split}", text, re.DOTALL)
    assert [block for block in blocks if r"\tag" in block] == []


def test_the_whole_interface_is_documented(build, pages):
    anchors = pages[build[2] / "api.html"].anchors
    assert [name for name in wdat_core.__all__ if f"wdat_core.{name}" not in anchors] == []


@pytest.mark.parametrize("page", ["method", "ledger"])
def test_every_function_that_a_page_names_is_linked(build, page):
    # Sphinx leaves a reference that it cannot resolve as plain code, without a warning.
    text = (build[2] / f"{page}.html").read_text(encoding="utf-8")
    names = re.findall(r'<code class="xref py py-(?:func|class)', text)
    linked = re.findall(r'<a [^>]*><code class="xref py py-(?:func|class)', text)
    assert len(names) == len(linked) > 0


def test_the_ledger_states_the_defaults_of_the_configuration():
    ledger = (ROOT / "book" / "ledger.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+)=([^`]+)`", ledger)
    stated = {name: math.inf if value == "inf" else ast.literal_eval(value) for name, value in found}
    stated.pop("perturb")  # not a default: the setting under which a point arises
    fields = [field.name for field in dataclasses.fields(wdat_core.FinetuneConfig)]
    left_open = fields[fields.index("consistency") :]
    assert sorted(stated) == sorted(left_open)
    config = wdat_core.FinetuneConfig()
    assert stated == {name: getattr(config, name) for name in left_open}


def test_the_first_page_shows_the_measured_picture(build):
    record = opening(read_records(kind="spend"))
    assert record is not None
    assert budget(record) in (build[2] / "intro.html").read_text(encoding="utf-8")


def words(text):
    """Text as it is read: without marks of Markdown and line breaks, and with the apostrophe of a keyboard."""
    return " ".join(re.sub(r"[*`\\]", "", text).replace("’", "'").split())


def article_of(build, page):
    soup = BeautifulSoup((build[2] / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    for link in soup.select("a.headerlink"):
        link.decompose()
    return soup.select_one("article.bd-article")


def test_the_first_page_begins_with_what_was_found(build):
    found = substitutions(ROOT / "results")["found"]
    assert re.search(r"\d\.\d\d", found)
    sections = article_of(build, "intro").select("section > section")
    assert sections[0].find("h2").get_text() == "What was found"
    seen = words(sections[0].get_text())
    table = next(part for part in found.split("\n\n") if part.startswith("|"))
    cells = [cell for line in table.splitlines() if "---" not in line for cell in line.strip("| ").split(" | ")]
    assert len(cells) > 12 and all(words(part) in seen for part in [*found.split("\n\n"), *cells] if part != table)


@pytest.mark.parametrize(
    "page",
    ["table3", "table4", "table11", "figure7_2", "claims", "worst_case", "train_worst_case", "joint", "first_order"],
)
def test_the_first_words_that_are_seen_on_a_page_are_its_answer(build, page):
    article = article_of(build, f"notebooks/{page}")
    for folded in article.select("details"):
        folded.decompose()
    kinds = ("finetune", "evaluate", "sensitivity", "certified", "objective", "first_order")
    known = [record for kind in kinds for record in read_records(kind=kind)]
    title = article.find("h1").extract().get_text()
    assert title and words(article.get_text()).startswith(words(answer(page, known)))


def test_what_is_folded_opens_by_keyboard_and_is_named(build):
    """A summary is what a browser itself lets one reach, open and hear; nothing else may hide a part of a page."""
    names = set()
    for path in sorted((build[2] / "notebooks").glob("*.html")):
        article = article_of(build, f"notebooks/{path.stem}")
        assert not article.select(".toggle, .toggle-hidden, [hidden]")
        for folded in article.select("details"):
            summary = folded.find(True, recursive=False)
            assert summary.name == "summary" and summary.get_text(strip=True)
            names.add(summary.find("p").get_text(strip=True) if summary.find("p") else "")
    assert {"Parameters", "Code", "This run"} <= names


def test_the_readme_begins_with_what_was_found_and_says_no_more():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = " ".join(text.split("\n\n")[1].split())
    name = "Zhang2019Theoretically"
    gain = paper_value(4, name, "w_2", 0.01, 1.0) - paper_value(1, name, "w_2")
    assert f"rises by {gain:.2f} points" in first and "small_trades" in first and "small_pgd" in first
    assert text.index("+") < text.index("make.py") < text.index("from wdat_core")
    assert "masked" not in text


def test_notebooks_are_copied_once_and_stale_copies_go(tmp_path):
    copy_notebooks = load(ROOT / "book" / "_ext" / "companion_book.py").copy_notebooks
    source, target = tmp_path / "notebooks", tmp_path / "book"
    source.mkdir()
    (source / "a.ipynb").write_bytes(b"one")
    (source / "notes.txt").write_bytes(b"not a notebook")
    copy_notebooks(source, target)
    (target / "stale.ipynb").write_bytes(b"")
    before = (target / "a.ipynb").stat().st_mtime_ns
    copy_notebooks(source, target)
    assert [path.name for path in target.iterdir()] == ["a.ipynb"]
    assert (target / "a.ipynb").stat().st_mtime_ns == before
    (source / "a.ipynb").write_bytes(b"two")
    copy_notebooks(source, target)
    assert (target / "a.ipynb").read_bytes() == b"two"
