"""The notebooks as papermill runs them: bad parameters stop at once with one line, good ones end in a record."""

import ast
import csv
import json
import re
import runpy

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from companion import files
from companion.cost import Reader
from companion.settings import GRIDS, NOTEBOOKS, ONE_COLUMN, PARAMETERS, Settings

NOTEBOOKS_OF_THE_BOOK = sorted(files.ROOT.glob("notebooks/*.ipynb"))
TABLE4 = files.ROOT / "notebooks" / "table4.ipynb"
TEMPLATES = runpy.run_path(str(files.ASSETS / "notebooks.py"))
WRITTEN = TEMPLATES["notebooks"]()
SMALL = {"tau": 0.01, "eta": 1, "train_images": 60, "val_images": 20, "test_images": 50, "batch_size": 20, "steps": 2}


def execute(out, **parameters):
    return papermill.execute_notebook(TABLE4, out, parameters, progress_bar=False, cwd=files.ROOT)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tua": 0.01}, "ParameterError: unknown parameter 'tua': did you mean 'tau'?"),
        ({"tau": "fast"}, "ParameterError: tau must be a number, not 'fast'"),
        ({"network": "demmo"}, "ParameterError: unknown network 'demmo': did you mean demo?"),
    ],
)
def test_bad_parameter_ends_in_one_line(tmp_path, parameters, message):
    with pytest.raises(PapermillExecutionError) as caught:
        execute(tmp_path / "out.ipynb", **SMALL | parameters)
    assert f"{caught.value.ename}: {caught.value.evalue}".startswith(message)
    (line,) = caught.value.traceback
    assert line.startswith(message)


def test_a_column_ends_in_a_record_and_a_table(tmp_path, capfd):
    notebook = execute(tmp_path / "out.ipynb", epochs=1, seed=987654321, fresh=True, **SMALL)
    (path,) = files.RUNS.glob("finetune-demo-*seed987654321-*")
    record = json.loads(path.read_text(encoding="utf-8"))
    for made in files.RUNS.glob("*-demo-*.json"):  # other processes write there too
        if json.loads(made.read_text(encoding="utf-8"))["data"].get("test") == SMALL["test_images"]:
            made.unlink()
    assert record["config"]["tau"] == 0.01 and record["config"]["epochs"] == 1 and record["data"]["test"] == 50
    shown = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any(f"{100 * record['metrics']['after']['w_2']:.2f} (" in str(o.get("data")) for o in shown)
    assert any("image/png" in o.get("data", {}) for o in shown)
    # Progress was shown while it ran; nothing of it, and no warning, stays.
    assert not [o for o in shown if o.output_type == "stream"]
    assert not [o for o in shown if " left" in str(o)]
    # What the kernel itself writes goes to the terminal.
    assert "warning" not in capfd.readouterr().err.lower()


@pytest.mark.parametrize("path", NOTEBOOKS_OF_THE_BOOK, ids=lambda path: path.stem)
def test_every_parameter_is_explained_and_known(path):
    parameters = papermill.inspect_notebook(path)  # empty where a notebook has none
    assert [name for name, parameter in parameters.items() if not parameter["help"].strip()] == []
    asked = re.findall(r'from_notebook\(globals\(\)(?:, \\"(.*?)\\")', path.read_text(encoding="utf-8"))
    if asked:
        assert asked == [path.stem]
        does = NOTEBOOKS[path.stem]
        assert list(parameters) == PARAMETERS[does]
        if does in ("bring your own", "work out a cost"):
            assert does == "bring your own" or repr(Reader()) == repr(defaults_of(parameters))
            return
        usual = Settings().model_dump() | ({"tau": 0.01, "eta": 1.0} if does in ONE_COLUMN else {})
        usual |= {"network": "small_trades"} if does == "attack harder" else {}
        for name, parameter in parameters.items():
            assert ast.literal_eval(parameter["default"].replace("8 / 255", repr(8 / 255))) == usual[name]
    about_records = ("claims", "first_order", "joint", "performance", "reliability", "stand_ins", "train_worst_case")
    assert bool(asked) == (path.stem not in about_records)


def defaults_of(parameters):
    return Reader(**{name: ast.literal_eval(parameter["default"]) for name, parameter in parameters.items()})


def cells_of(notebook):
    """What decides a notebook, its outputs excepted."""
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_notebook_of_a_template_is_what_the_template_says(name):
    notebook = nbformat.read(files.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert cells_of(notebook) == cells_of(WRITTEN[name]), "write it again: python assets/notebooks.py"


@pytest.mark.parametrize("name", sorted(NOTEBOOKS.keys() - WRITTEN.keys()))
def test_the_parameters_of_every_other_notebook_are_written_too(name):
    cells = nbformat.read(files.ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    (written,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert written == TEMPLATES["parameters"](name), "write it again: python assets/notebooks.py"


def test_templates_fill_every_gap_and_keep_the_outputs_of_cells_that_stay():
    assert WRITTEN.keys() == {*(f"table{n}" for n in GRIDS), "figure7_2", "figure7_3", "figure7_4"}
    assert not re.search("[«»]", json.dumps(WRITTEN, ensure_ascii=False))
    old, new = (TEMPLATES["notebooks"]()["table4"] for _ in range(2))
    same, other = (next(c for c in old.cells if c.id == f"table4-{part}") for part in ("answer", "columns"))
    same.outputs = other.outputs = [nbformat.v4.new_output("stream", text="kept")]
    other.source += "  # changed"
    TEMPLATES["keep_outputs"](new, old)
    assert [cell.id for cell in new.cells if cell.get("outputs")] == ["table4-answer"]


@pytest.mark.parametrize("table", GRIDS)
def test_what_a_page_says_of_the_paper_is_in_its_table(table):
    with (files.ASSETS / "paper.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == GRIDS[table][0]]
    printed = {f"{float(row['value']):.2f}" for row in rows if int(row["table"]) in (1, table)}
    said = set(re.findall(r"\d\d\.\d\d", TEMPLATES["READ"][table]))
    assert said <= printed and (said or table == 11 or not rows)


@pytest.mark.parametrize("path", NOTEBOOKS_OF_THE_BOOK, ids=lambda path: path.stem)
def test_a_page_answers_before_it_does_anything_else(path):
    cells = nbformat.read(path, as_version=4).cells
    tags = [cell.metadata.get("tags", []) for cell in cells]
    (answer,) = [i for i, cell in enumerate(cells) if "answer" in tags[i] or cell.id.endswith("-answer")]
    assert cells[0].source.startswith("# ") and "\n" not in cells[0].source
    # Nothing that is seen comes between the title and the answer, and nothing is computed for it.
    assert all({"hide-cell", "remove-cell"} & {*shown} for shown in tags[1:answer])
    assert "nbval-ignore-output" not in tags[answer]
    first_run = next((i for i, cell in enumerate(cells) if "runs." in cell.source), len(cells))
    assert answer < first_run
    headings = re.findall(r"^## (.*)", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.MULTILINE)
    assert not NOTEBOOKS.get(path.stem) or headings[-1] == "Run it"


@pytest.mark.parametrize("path", NOTEBOOKS_OF_THE_BOOK, ids=lambda path: path.stem)
def test_what_is_folded_says_what_it_holds(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if {"hide-cell", "hide-input", "hide-output"} & {*cell.metadata.get("tags", [])}:
            labels = cell.metadata["mystnb"]
            assert labels["code_prompt_show"] == labels["code_prompt_hide"] != "", cell.id
