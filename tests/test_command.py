"""The command line computes what the notebooks compute, and says in one line what is wrong."""

import json
import os
import re
import subprocess
import sys
import types

import papermill.cli
import pytest

from companion import files, runs, terminal
from companion.__main__ import main
from companion.items import ITEMS, checked, compute
from companion.parameters import defaults, read
from companion.records import parse_record, record_name
from companion.settings import NOTEBOOKS, PARAMETERS, Settings

SMALL = {"train_images": 60, "val_images": 20, "test_images": 50, "steps": 2, "epochs": 1, "found_steps": 2}
PAGES = sorted(path.stem for path in files.ROOT.glob("notebooks/*.ipynb"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # with it, progress is shown as in a notebook
    return files.RUNS


def given_to(item, **more):
    """As many of the small sizes as an item has a parameter for."""
    return {k: v for k, v in {**SMALL, **more}.items() if k in PARAMETERS[NOTEBOOKS[item]]}


def words(item, given):
    return [item, *(word for name, value in given.items() for word in ("-p", name, str(value)))]


def printed(capsys, *arguments):
    main(arguments)
    return capsys.readouterr().out.split()


def refused(capsys, *arguments):
    """The one line that a command ends in, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("companion: ")
    return line, caught.value.code


# ---------------------------------------------------------------------------------------------------------------------
# The same as the notebook
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What runs.py is asked for, in place of computing it."""
    asked = []

    def instead(name):
        def function(*args, **how):
            asked.append((name, args, how))
            return [], {}

        return function

    for name in ("attack_each", "attack_harder", "estimates_each", "spend", "finetune_grid", "change_point"):
        monkeypatch.setattr(runs, name, instead(name))
    return asked


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("more", [{}, {"preset": "paper"}, {"preset": "paper", "network": "small_pgd", "seed": 3}])
def test_an_item_asks_for_what_its_notebook_asks_for(item, more, calls):
    given = {name: value for name, value in more.items() if name in PARAMETERS[NOTEBOOKS[item]]}
    cells = json.loads((files.ROOT / "notebooks" / f"{item}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (check,) = [cell for cell in code if "from_notebook(globals()" in cell]
    namespace = {}
    exec(code[0], namespace)  # the parameters
    namespace |= given
    exec(check, namespace)
    namespace["runs"] = runs
    for line in re.findall(r"^.*\bruns\.\w+\(.*\)$", "\n".join(code), re.MULTILINE):
        exec(line, namespace)
    by_notebook = calls.copy()
    calls.clear()
    compute(item, checked(item, given))
    assert calls == by_notebook != []


def timeless(value):
    """A stored record without what no two runs share."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("created", "seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("item", ["table3", "figure7_2", "worst_case", "figure7_1", "gallery"])
def test_a_record_of_the_command_is_that_of_the_notebook(item, folder, tmp_path, monkeypatch, capsys):
    given = given_to(item, network="demo", tau=0.1, eta=1, seed=5)
    names = printed(capsys, *words(item, given))
    made = {name: parse_record((folder / name).read_bytes()) for name in names}
    monkeypatch.setattr(files, "RUNS", tmp_path / "other")
    settings = Settings.from_notebook(defaults(item) | given, item)
    theirs = {
        "table3": lambda: runs.finetune_grid(settings, "last_layer", notebook=item),
        "figure7_2": lambda: runs.finetune_grid(settings, "whole", notebook=item, curves=True),
        "worst_case": lambda: runs.attack_each([settings], "test", notebook=item),
        "figure7_1": lambda: runs.estimates_each([settings], notebook=item),
        "gallery": lambda: [runs.spend(settings, notebook=item)[0]],
    }[item]()
    assert len(names) == 1 and names == [record_name(record) for record in theirs]
    for record in theirs:
        assert timeless(made[record_name(record)].stored()) == timeless(record.stored())
    # And the notebook finds it: what is there is not computed again.
    monkeypatch.setattr(files, "RUNS", folder)
    if item != "gallery":  # which no record holds the images of
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert printed(capsys, *words(item, given)) == names
        assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_every_record_is_named_and_nothing_else_is(folder, capsys, tmp_path):
    given = given_to("table4", eta=1, export=str(tmp_path / "exports"))
    names = printed(capsys, *words("table4", given))
    assert len(names) == 2 and [re.search(r"-tau([\d.]+)-", name)[1] for name in names] == ["0.1", "0.01"]
    assert {*names} <= {path.name for path in folder.iterdir()} and len(list((tmp_path / "exports").iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["True", "False", "None", "true", "1", "-2", "1_0", "0.5", "1e-3", "nan", "inf", "0x10", "[1]", "8/255", ""]
)
def test_values_are_read_as_papermill_reads_them(text):
    ours, theirs = read(text), papermill.cli._resolve_type(text)
    assert (type(ours), repr(ours)) == (type(theirs), repr(theirs))


# ---------------------------------------------------------------------------------------------------------------------
# Errors and help
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [
        ("tabel3", "unknown item 'tabel3': did you mean 'table3'?", 1),
        ("../settings", "unknown item '../settings'. Known are", 1),
        ("own_network", "own_network leaves no record: run its notebook, papermill notebooks/own_network.ipynb", 1),
        ("claims -p seed 1", "claims leaves no record", 1),
        ("table3 -p tua 1", "unknown parameter 'tua': did you mean 'tau'?", 1),
        ("table3 -p _tau 1", "unknown parameter '_tau': did you mean 'tau'?", 1),
        ("worst_case -p tau 1", "unknown parameter 'tau'", 1),
        ("table3 -p tau fast", "tau must be a number, not 'fast'", 1),
        ("table3 -p seed 1e400", "seed must be a whole number, not inf", 1),
        ("table3 -p test_images 5000", "test_images is 5000, and the 'embedded' data has 1000", 1),
        ("figure7_2 -p eta None", "eta must be a number, not None", 1),
        ("table3 -p tau", "Option '-p' requires 2 arguments", 2),
        ("table3 --tau 1", "No such option '--tau'", 2),
        ("table3 table4", "Got unexpected extra argument (table4)", 2),
        ("table3 -p network smal_trades", "unknown network 'smal_trades': did you mean small_trades", 1),
        ("table3 --check -p network smal_trades", "unknown network 'smal_trades': did you mean small_trades", 1),
        ("table3 --check -p network exports/none", "exports/none is not an export of this project", 1),
        ("table3 --check -p network none.py:f", "network is 'none.py:f', and there is no file", 1),
        ("table3 --check -p device gpu", "unknown device 'gpu': use auto, cpu, cuda or cuda:1", 1),
        ("table3 -p delta 1e-40", "delta must be at least 1e-06", 1),
        ("table3 -p delta 8/0", "delta must be a number, not '8/0'", 1),
        ("table3 -p network nowhere/file.py:f", "network is 'nowhere/file.py:f', and there is no file", 1),
        ("table3 -p network exports/nothing", "is not an export of this project", 1),
        ("table3 -p device cuda:77", "this machine has no device 'cuda:77'", 1),
    ],
)
def test_what_is_wrong_is_said_in_one_line(line, message, code, folder, capsys):
    said, ended = refused(capsys, *line.split())
    assert message in said and ended == code
    assert not folder.exists()


def test_an_error_of_the_core_is_one_line_too(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef network():\n"
        "    linear = torch.nn.Linear(3072, 10)\n    linear.weight.data.fill_(float('nan'))\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), linear)\n",
        encoding="utf-8",
    )
    said, code = refused(capsys, *words("table1", given_to("table1", network=f"{tmp_path}/mine.py:network")))
    assert "the model, the loss or the rule returns NaN" in said and code == 1


def test_a_radius_in_255ths_is_read_as_it_is_written():
    (settings,) = checked("table1", {"delta": read("8/255"), "network": "demo"})
    assert settings.delta == 8 / 255
    (settings,) = checked("table1", {"delta": read("0.5 / 255"), "network": "demo"})
    assert settings.delta == 0.5 / 255


def test_checking_computes_nothing(folder, capsys):
    assert printed(capsys, "table3", "--check", "-p", "network", "small_trades") == []
    assert not folder.exists()


def test_parameters_are_checked_and_help_is_shown_without_torch():
    code = (
        "import sys\nfrom companion.__main__ import main\n"
        "for line in ('table3 -p tau fast', 'nothing', 'table3 --help', '--help', ''):\n"
        "    try:\n        main(line.split())\n    except SystemExit:\n        pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("item", ITEMS)
def test_help_has_every_parameter_with_its_default(item, capsys):
    main([item, "--help"])
    shown = capsys.readouterr().out
    for name, value in defaults(item).items():
        assert re.search(rf"^  {name} {re.escape(str(value))}(  |$)", shown, re.MULTILINE), name
    described = " ".join(shown.split())
    assert str(Settings.model_fields["preset"].description) in described


def test_help_has_every_item_and_no_other(capsys):
    main(["--help"])
    shown = re.findall(r"^  (\w+)  +\S", capsys.readouterr().out.split("Commands:")[1], re.MULTILINE)
    assert shown == ITEMS and {*PAGES} - {*ITEMS} == {
        "own_network",
        "cost",
        "claims",
        "performance",
        "reliability",
        "stand_ins",
        "first_order",
        "train_worst_case",
        "joint",
    }
    main([])
    assert "Commands:" in capsys.readouterr().out


def test_the_command_itself(tmp_path):
    """As a process, with an exit code and no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "companion", "table3", "-p", "tau", "-1"], cwd=files.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "companion: tau must be above 0, not -1\n")


def test_progress_is_shown_on_a_terminal_of_any_encoding(monkeypatch, folder):
    try:
        main_end, end = os.openpty()
    except (AttributeError, OSError):
        pytest.skip("there is no terminal to try it on")
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(fileno=lambda: end, encoding="ascii"))
    assert [*terminal.progress("W₂")(["only"])] == ["only"]
    terminal._line()("W₂, 3 s left")
    assert b"W?, 3 s left" in os.read(main_end, 1000)


def test_a_home_that_is_not_known_is_a_folder_that_is_not_there(capsys, folder):
    assert "~nosuchuser" in refused(capsys, *words("table4", {"data": "~nosuchuser/x"}))[0]


@pytest.mark.parametrize(
    "item, given, said",
    [
        ("table2", {"dataset": "imagenet", "data": "data"}, "table2 needs training images, and of ImageNet there are"),
        ("stronger", {"autoattack": 5, "compiled": True}, "autoattack runs in float32 and not compiled"),
    ],
)
def test_what_a_run_would_find_out_late_is_said_first(capsys, folder, item, given, said):
    assert said in refused(capsys, *words(item, given))[0]
