"""Imports go one way, no module of companion/ is long, and the guide knows where things are."""

import ast
import graphlib
import re

from companion import files
from companion.settings import NOTEBOOKS

CORE = files.ROOT / "wdat_core.py"
MODULES = {"wdat_core": CORE} | {f"companion.{path.stem}": path for path in (files.ROOT / "companion").glob("*.py")}


def imported(name):
    """The modules of this project that a module imports, wherever in its file: in a function or for its types too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, ["companion" if node.level else "", node.module]))
            found |= {home} | {f"{home}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def test_the_picture_of_the_imports_has_no_circle():
    imports = {name: imported(name) for name in MODULES}
    assert {"companion.processes", "companion.settings"} < imports["companion.runs"] and not imports["wdat_core"]
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_module_of_the_companion_is_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 400 and name != "wdat_core"} == {}


def test_the_guide_names_files_that_exist_and_asks_for_three_at_most():
    text = (files.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:/|\.(?:py|json|csv|md|yml)))`", text))
    assert len(named) > 20 and [name for name in named - {"runs/"} if not (files.ROOT / name).exists()] == []
    recipes = re.findall(r"^## (Add .*?)$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert [title for title, _ in recipes] == [
        "Add a step rule", "Add an objective", "Add a data set", "Add a network", "Add a table"
    ]  # fmt: skip
    for title, recipe in recipes:
        steps = re.findall(r"^\d\. `([\w/]+\.\w+)`", recipe, re.MULTILINE)
        assert 1 < len(steps) <= 3 and "`tests/" in recipe, title


def test_notebooks_that_share_columns_are_tested_in_one_process(pytestconfig):
    families = pytestconfig.pluginmanager.get_plugin(str(files.ROOT / "conftest.py")).FAMILIES
    tested = {path.stem for folder in ("tests", "notebooks") for path in (files.ROOT / folder).iterdir()}
    assert [name for family in families for name in family if name not in tested] == []
    sharing = {name for name, does in NOTEBOOKS.items() if does in ("fine-tune", "fine-tune both ways", "follow")}
    assert sharing < {*families[0]}
