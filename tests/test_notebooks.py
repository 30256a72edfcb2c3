"""The notebooks as papermill runs them: bad parameters stop at once with one line, good ones end in a record."""

import ast
import json
import re

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from companion import files
from companion.settings import NOTEBOOKS, ONE_COLUMN, PARAMETERS, Settings

TABLE4 = files.ROOT / "notebooks" / "table4.ipynb"
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


def test_a_column_ends_in_a_record_and_a_table(tmp_path):
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


@pytest.mark.parametrize("path", sorted(files.ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_every_parameter_is_explained_and_known(path):
    parameters = papermill.inspect_notebook(path)  # empty where a notebook has none
    assert [name for name, parameter in parameters.items() if not parameter["help"].strip()] == []
    asked = re.findall(r'from_notebook\(globals\(\)(?:, \\"(.*?)\\")', path.read_text(encoding="utf-8"))
    if asked:
        assert asked == [path.stem]
        does = NOTEBOOKS[path.stem]
        assert list(parameters) == PARAMETERS[does]
        if does == "bring your own":
            return
        usual = Settings().model_dump() | ({"tau": 0.01, "eta": 1.0} if does in ONE_COLUMN else {})
        usual |= {"network": "small_trades"} if does == "attack harder" else {}
        for name, parameter in parameters.items():
            assert ast.literal_eval(parameter["default"].replace("8 / 255", repr(8 / 255))) == usual[name]
    assert bool(asked) == (path.stem not in ("claims", "performance", "reliability", "stand_ins"))
