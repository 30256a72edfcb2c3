"""The grid: what workflow/config.yaml lists is known, and Snakemake runs each column once."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from companion import files
from companion.grid import check_networks, jobs
from companion.networks import zoo
from companion.records import parse_record
from companion.settings import ParameterError

WORKFLOW = files.ROOT / "workflow"
CONFIG = yaml.safe_load((WORKFLOW / "config.yaml").read_text(encoding="utf-8"))
PARTS = ["workflow", "companion", "assets", "notebooks", "wdat_core.py"]  # of the project, what a grid needs
SMALL = {"train_images": 64, "val_images": 32, "test_images": 32, "epochs": 1, "steps": 2, "found_steps": 2}
COLUMNS = {"item": "table4", "preset": "demo", "network": "demo", "tau": [0.1, 0.01], "eta": 1, **SMALL}


def config(*grid, **other):
    return CONFIG | {"grid": [*grid], "python": sys.executable, **other}


# ---------------------------------------------------------------------------------------------------------------------
# The configuration
# ---------------------------------------------------------------------------------------------------------------------


def test_the_grid_of_the_repository_is_known():
    found = jobs(CONFIG)
    check_networks(found, sys.executable)
    assert len(found) == 8 and all(words[0] in ("table3", "table4") for words in found.values())
    said = (WORKFLOW / "config.yaml").read_text(encoding="utf-8")
    assert f"are {len(found)}." in said


def test_each_value_of_a_list_is_a_job():
    found = jobs(config(COLUMNS | {"item": ["table3", "table4"]}, {"item": "worst_case", "steps": 2}))
    assert [re.sub(r"-\w{8}$", "", name) for name in found] == [
        "table3-demo-tau0.1-eta1",
        "table3-demo-tau0.01-eta1",
        "table4-demo-tau0.1-eta1",
        "table4-demo-tau0.01-eta1",
        "worst_case",
    ]
    words = next(iter(found.values()))
    assert " ".join(words).startswith("table3 -p preset demo -p network demo -p tau 0.1 -p eta 1 -p train_images 64")


def test_other_settings_are_another_job_and_the_same_ones_are_not():
    (one,) = jobs(config(COLUMNS | {"tau": 0.1}))
    assert [one] == list(jobs(config(COLUMNS | {"tau": 0.1, "beta": 6.0}, COLUMNS | {"tau": "0.1"})))
    for change in ({"steps": 3}, {"network": "small_trades"}, {"device": "cpu"}, {"item": "table3"}, {"seed": 1}):
        assert one not in jobs(config(COLUMNS | {"tau": 0.1} | change))


@pytest.mark.parametrize("network", ["exports/a b", "some/where.py:my_network"])
def test_a_path_is_the_name_of_no_file(network):
    (name,) = jobs(config({"item": "table4", "network": network}))
    assert re.fullmatch(r"[\w.-]+", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "tabel4"}, "unknown item 'tabel4': did you mean 'table4'"),
        ({"item": "own_network"}, "own_network leaves no record"),
        ({"tua": 1}, "unknown parameter 'tua': did you mean 'tau'"),
        ({"tau": [0.1, -1]}, "tau must be above 0, not -1"),
        ({"seed": "zero"}, "seed must be a whole number, not 'zero'"),
        ({"network": "smal_trades"}, "unknown network 'smal_trades': did you mean small_trades"),
    ],
)
def test_what_is_not_known_is_said(change, message):
    with pytest.raises(ParameterError, match=message):
        check_networks(jobs(config(COLUMNS | change)), sys.executable)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (config(COLUMNS, gpu=1), "gpu is not known"),
        (config(COLUMNS, threads="two"), "threads is not known, or not what it has to be"),
        ({"grid": [COLUMNS]}, "python is not known"),
        (config({"network": "demo"}), "an entry of the grid has an item"),
        (config("table4"), "an entry of the grid has an item"),
        (config(COLUMNS | {"tau": []}), "an entry of the grid has no value for tau"),
        (CONFIG | {"grid": COLUMNS}, "grid is not known, or not what it has to be"),
    ],
)
def test_a_configuration_of_another_shape_is_named(whole, message):
    with pytest.raises(ParameterError, match=message):
        jobs(whole)


def test_a_python_that_is_not_there_is_named(tmp_path):
    found = jobs(config(COLUMNS | {"network": "mine.py:f"}))
    with pytest.raises(ParameterError, match=r"python: .*nothing cannot be run"):
        check_networks(found, str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_a_profile_lets_no_column_stop_another(name):
    profile = yaml.safe_load((WORKFLOW / "profiles" / name / "config.yaml").read_text(encoding="utf-8"))
    assert profile["keep-going"] is True and profile["rerun-triggers"] == "mtime"
    assert profile.get("executor", "local") == name


# ---------------------------------------------------------------------------------------------------------------------
# Snakemake itself
# ---------------------------------------------------------------------------------------------------------------------

SNAKEMAKE = shutil.which("snakemake")
snakemake = pytest.mark.skipif(not SNAKEMAKE, reason="no snakemake on the path: it is in the extra `grid` alone")


class Grid:
    """A copy of what a grid needs, and Snakemake in it."""

    def __init__(self, root, *grid):
        self.root = root
        for part in PARTS:
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            source = files.ROOT / part
            shutil.copytree(source, root / part, ignore=ignored) if source.is_dir() else shutil.copy(source, root)
        self.set(*grid)

    def set(self, *grid, **other):
        text = yaml.safe_dump(config(*grid, **other))
        (self.root / "workflow" / "config.yaml").write_text(text, encoding="utf-8")

    def command(self, *arguments):
        profile = "workflow/profiles/local"
        return [SNAKEMAKE, "--workflow-profile", profile, "--jobs", "1", "--nocolor", *arguments]

    def run(self, *arguments):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(self.command(*arguments), cwd=self.root, capture_output=True, text=True, env=env)
        return done.returncode, done.stdout + done.stderr

    def columns(self, *arguments):
        """The columns that Snakemake would compute, dry."""
        _, said = self.run("--dry-run", *arguments)
        return sorted(re.findall(r"output: runs/grid/([\w.-]+)\.done", said))

    @property
    def markers(self):
        return sorted(path.stem for path in (self.root / "runs" / "grid").glob("*.done"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A small grid of two columns that ran."""
    made = Grid(tmp_path_factory.mktemp("grid"), COLUMNS)
    assert made.columns() == sorted(jobs(config(COLUMNS)))
    code, said = made.run()
    assert code == 0, said
    return made


@snakemake
def test_every_column_ends_in_a_marker_with_the_name_of_its_record(grid):
    assert grid.markers == sorted(jobs(config(COLUMNS)))
    for name, tau in zip(grid.markers, (0.01, 0.1), strict=True):
        (record,) = (grid.root / "runs" / "grid" / f"{name}.done").read_text(encoding="utf-8").split()
        read = parse_record((grid.root / "runs" / record).read_bytes())
        assert read.config.tau == tau and read.data.test == SMALL["test_images"]


@snakemake
def test_what_is_done_is_not_done_again(grid):
    code, said = grid.run()
    assert code == 0 and "Nothing to be done" in said
    core = grid.root / "wdat_core.py"
    core.write_text(core.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    try:
        assert grid.columns() == []
    finally:
        shutil.copy(files.ROOT / "wdat_core.py", core)


@snakemake
def test_a_marker_that_is_gone_is_made_again_from_the_record(grid):
    marker = grid.root / "runs" / "grid" / f"{grid.markers[0]}.done"
    records = {path: path.stat().st_mtime_ns for path in (grid.root / "runs").glob("*.json")}
    before = marker.read_bytes()
    marker.unlink()
    assert grid.columns() == [marker.stem]
    code, said = grid.run()
    assert code == 0, said
    assert marker.read_bytes() == before
    assert records == {path: path.stat().st_mtime_ns for path in (grid.root / "runs").glob("*.json")}


@snakemake
def test_notebooks_and_book_come_after_the_columns(grid):
    code, said = grid.run("--dry-run", "book")
    pages = re.findall(r"output: runs/grid/pages/(\w+)\.done", said)
    assert code == 0 and sorted(pages) == sorted(path.stem for path in files.ROOT.glob("notebooks/*.ipynb")), said
    assert "output: runs/grid/book.done" in said


@snakemake
@pytest.mark.parametrize("change", [{"item": "tabel4"}, {"tua": 1}, {"network": "smal_trades"}])
def test_a_configuration_that_is_wrong_stops_at_once(grid, change):
    grid.set(COLUMNS | change)
    try:
        code, said = grid.run("--dry-run")
    finally:
        grid.set(COLUMNS)
    with pytest.raises(ParameterError) as caught:
        check_networks(jobs(config(COLUMNS | change)), sys.executable)
    assert code == 1 and said.count(f"workflow/config.yaml: {caught.value}") == 1 and "Traceback" not in said


@snakemake
def test_a_column_that_fails_leaves_a_log_and_stops_no_other(grid):
    grid.set(COLUMNS | {"network": ["nothing.py:f", "demo"], "seed": 1, "tau": 0.1})
    try:
        code, said = grid.run()
    finally:
        grid.set(COLUMNS)
    assert code == 1, said
    log = next((grid.root / "runs" / "grid" / "logs").glob("table4-nothing.py_f-*.log"))
    (line,) = log.read_text(encoding="utf-8").splitlines()
    assert line.startswith("companion: network is 'nothing.py:f', and there is no file")
    assert not [name for name in grid.markers if "nothing" in name]
    assert [name for name in grid.markers if "demo-tau0.1-eta1-seed1" in name]


@snakemake
def test_a_grid_that_was_killed_goes_on(grid):
    """Of everything at once, without a word to Snakemake."""
    long = COLUMNS | {"tau": 0.1, "seed": [2, 3], "epochs": 30}
    grid.set(long)
    try:
        process = subprocess.Popen(
            grid.command(), cwd=grid.root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        waited = time.monotonic()
        while not list((grid.root / "runs").glob("*.checkpoint")):
            assert process.poll() is None and time.monotonic() - waited < 300
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert [name for name in grid.markers if name in jobs(config(long))] == []
        assert list((grid.root / "runs").glob("*.checkpoint"))
        assert grid.run("--unlock")[0] == 0
        code, said = grid.run()
        assert code == 0, said
    finally:
        grid.set(COLUMNS)
    assert {*jobs(config(long))} < {*grid.markers}
    assert not list((grid.root / "runs").glob("*.checkpoint"))


@snakemake
def test_the_leaderboard_has_a_job_for_each_network_whose_weights_are_here(grid):
    """The names come from RobustBench: none is here, then one."""
    (grid.root / "workflow" / "leaderboard.yaml").write_text("{datasets: [cifar10], preset: demo, here: true}")
    try:
        code, said = grid.run("--dry-run", "leaderboard")
        assert code == 0 and "rule network" not in said, said
        name = next(name for name, entry in zoo("cifar10", "L2").items() if isinstance(entry["gdrive_id"], str))
        weights = grid.root / "models" / "cifar10" / "L2" / f"{name}.pt"
        weights.parent.mkdir(parents=True)
        weights.touch()
        code, said = grid.run("--dry-run", "--printshellcmds", "leaderboard")
        assert code == 0 and said.count("rule network") == 1, said
        command = f"-m companion worst_case -p preset demo -p dataset cifar10 -p norm L2 -p network {name} >"
        assert command in said and f"runs/grid/leaderboard/cifar10/L2/{name}.done" in said
        (grid.root / "workflow" / "leaderboard.yaml").write_text("{datasets: [cifar], preset: demo, here: true}")
        code, said = grid.run("--dry-run", "leaderboard")
        assert code == 1 and "unknown data set 'cifar'" in said
    finally:
        shutil.copy(WORKFLOW / "leaderboard.yaml", grid.root / "workflow")
