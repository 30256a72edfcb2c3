"""The grid under Slurm: where it cannot run it says why, and the book says what the record says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from altered import altered

from benchmarks import one_node, slurm
from companion import files
from companion.records import parse_record, read_records, write_record

SNAKEMAKE = shutil.which("snakemake") or "snakemake"


@pytest.fixture
def root_with_slurm(monkeypatch):
    """As root, with everything on the path, and with a Snakemake that has its plugin."""
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(one_node, "said", lambda *command: "[--slurm-status-command VALUE]")
    monkeypatch.setattr(one_node, "running", lambda: {"bash"})


def skipped(capsys, *arguments):
    slurm.main([*arguments])
    return capsys.readouterr().out


def test_nothing_is_in_the_way(root_with_slurm):
    assert one_node.why_not("snakemake") is None


@pytest.mark.parametrize("missing", ["munged", "slurmctld", "slurmd", "sbatch", "srun", "snakemake"])
def test_a_program_that_is_missing_is_named(root_with_slurm, monkeypatch, capsys, missing):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"bin/{name}")
    assert skipped(capsys) == f"skipped: {missing} is not on the path\n"


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        (os, "geteuid", lambda: 1000, "only root can start the daemons of Slurm"),
        (one_node, "running", lambda: {"slurmd", "bash"}, "slurmd runs on this machine already"),
        (one_node, "said", lambda *command: "usage", "other/snakemake does not have its plugin for Slurm"),
    ],
)
def test_what_else_is_in_the_way_is_said(root_with_slurm, monkeypatch, capsys, where, name, value, reason):
    monkeypatch.setattr(where, name, value)
    assert skipped(capsys, "--snakemake", "other/snakemake") == f"skipped: {reason}\n"


def test_as_a_script_it_ends_well_without_slurm(tmp_path):
    script = str(files.ROOT / "benchmarks" / "slurm.py")
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path)],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "skipped: munged is not on the path\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_processes_of_a_folder_are_those_that_have_it_in_their_environment(tmp_path):
    if not Path("/proc/self/environ").exists():
        pytest.skip("no /proc here")
    words = [sys.executable, "-c", "input()"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env={**os.environ, "SLURM_CONF": f"{tmp_path}/slurm.conf"})
    try:
        found = one_node.wait_for("it", lambda: one_node.processes_of(tmp_path), 30)
        assert [*found] == [process.pid]
    finally:
        process.communicate(b"\n")
    assert one_node.processes_of(tmp_path) == {}


def test_equal_numbers_are_equal_but_for_the_time(tmp_path):
    path = min(files.RESULTS.glob("finetune-*.json"), key=lambda path: path.stat().st_size)
    record = parse_record(path.read_bytes())

    def changed(**values):
        epochs = [{**row, **values} for row in record.history.epochs]
        return write_record(altered(record, history={"epochs": epochs}), tmp_path)

    assert slurm.numbers(changed(seconds=7.0)) == slurm.numbers(path)
    assert slurm.numbers(changed(loss=7.0)) != slurm.numbers(path)


def test_the_page_says_what_the_record_says():
    (record,) = read_records(kind="cluster")
    counted, config = record.figures, record.config
    sentence = (
        f"`benchmarks/slurm.py` ran {config.columns} columns under Slurm {record.versions['slurm']}, and killed"
        f" {counted.jobs_killed} job and {counted.controller_restarts} controller in the middle: {counted.finished} of"
        f" {config.columns} finished after {counted.restarts} restart{'s' * (counted.restarts != 1)}, in"
        f" {record.seconds['grid'] / 60:.0f} minutes; {counted.compared} of them, computed without Slurm, had the same"
        " accuracies and losses."
    )
    page = " ".join((files.ROOT / "book" / "cluster.md").read_text(encoding="utf-8").split())
    assert sentence in page


@pytest.mark.skipif(bool(reason := one_node.why_not(SNAKEMAKE)), reason=f"no cluster can be set up here: {reason}")
def test_a_grid_that_was_disturbed_goes_on(tmp_path):
    """Nothing of it runs afterwards."""
    before = one_node.running()
    slurm.main(["--snakemake", SNAKEMAKE, "--out", str(tmp_path)])
    (record,) = read_records(tmp_path, kind="cluster")
    assert record.figures.finished == record.config.columns == 8 and record.figures.restarts >= 1
    assert not (one_node.running() - before) & {*one_node.DAEMONS, "slurmstepd"}
