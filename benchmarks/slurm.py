"""A grid under Slurm on this machine, with a job and the controller killed in the middle; one record of how it went on.

python benchmarks/slurm.py [--snakemake PATH] [--out runs]

Slurm runs in a temporary folder, without systemd. A job that fails is started again in the other partition. A record is
written only if all columns finished, and two of them have the same numbers when computed without Slurm.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.one_node import PARTITIONS, Daemons, cluster, processes_of, said, start, wait_for, why_not
from companion import files
from companion.bases import SCHEMA
from companion.grid import jobs
from companion.machine import core_digest, made_on, pick_device
from companion.records import parse_record, write_record

PARTS = ("workflow", "companion", "assets", "notebooks", "wdat_core.py")  # of the checkout, what a grid needs
SMALL = {"train_images": 64, "val_images": 32, "test_images": 32, "epochs": 2, "steps": 2, "found_steps": 2}
VALUES = {"tau": [0.1, 0.01], "eta": [0.1, 1], "seed": [0, 1]}
COLUMNS = {"item": "table4", "preset": "demo", "network": "small_trades", "device": "cpu", **VALUES, **SMALL}
GRID = {"grid": [COLUMNS], "python": sys.executable, "threads": 1, "gpus": 0}
LONGEST = 1800  # seconds
ATTEMPTS = f"slurm_partition='{PARTITIONS[0]}' if attempt < 2 else '{PARTITIONS[1]}'"
RESOURCES = ("runtime=30", "mem_mb=1500", ATTEMPTS)


def copy_to(root: Path) -> None:
    """What a grid needs of this checkout, and this grid."""
    for part in PARTS:
        source = files.ROOT / part
        shutil.copytree(source, root / part) if source.is_dir() else shutil.copy(source, root / part)
    (root / "workflow" / "config.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))


def markers(root: Path) -> dict[str, str]:
    """The name of each record of the grid, by that of its job."""
    return {path.stem: path.read_text().strip() for path in root.glob("runs/grid/*.done")}


def disturbed(root: Path, folder: Path, snakemake: str, daemons: Daemons) -> str:
    """Run the grid, kill the process of a job and the controller, and wait: the name of that job."""
    command = [snakemake, "--workflow-profile", "workflow/profiles/slurm", "--nocolor"]
    command += ["--slurm-init-seconds-before-status-checks", "10", "--default-resources", *RESOURCES]
    names = {tuple(words): name for name, words in jobs(GRID).items()}
    seen: dict[int, float] = {}

    def at_work() -> tuple[int, str] | None:
        """A column that has been computing for 10 seconds, as soon as two others are done."""
        if running.poll() is not None:
            sys.exit(f"{(root / 'snakemake.log').read_text()[-4000:]}\nslurm.py: Snakemake ended too early")
        for number, words in processes_of(folder).items() if len(markers(root)) >= 2 else ():
            now = time.monotonic()
            if words[1:3] == ["-m", "companion"] and now - seen.setdefault(number, now) > 10:
                return number, names[tuple(words[3:-1])]
        return None

    with (root / "snakemake.log").open("wb") as log:
        running = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    number, killed = wait_for("a column at work", at_work, LONGEST)
    os.kill(number, signal.SIGKILL)
    daemons["slurmctld"].kill()
    daemons["slurmctld"].wait()
    time.sleep(10)
    daemons["slurmctld"] = start(folder, "slurmctld")
    running.wait(LONGEST)
    return killed


def is_equal(root: Path, alone: Path, name: str) -> bool:
    """A column computed without Slurm has the numbers of the one computed with it."""
    words = [sys.executable, "-m", "companion", *jobs(GRID)[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in a job
    done = subprocess.run(words, cwd=alone, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return numbers(root / "runs" / markers(root)[name]) == numbers(alone / "runs" / done.stdout.strip())


def numbers(path: Path) -> list[Any]:
    """What a record of fine-tuning found: accuracies, which images are right, and each epoch without its time."""
    found = parse_record(path.read_bytes()).stored()
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in found["history"]["epochs"]]
    return [found["metrics"], found["correct"], rows, found["history"]["upsilon"]]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snakemake", default="snakemake", help="with its plugin for Slurm")
    parser.add_argument("--out", type=Path, default=files.RUNS)
    given = parser.parse_args(arguments)
    if reason := why_not(given.snakemake):
        print(f"skipped: {reason}")
        return
    core_digest()  # of the code that runs, should the file be edited meanwhile
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons end too
    begin, columns = time.perf_counter(), jobs(GRID)
    with tempfile.TemporaryDirectory() as top:
        folder, root, alone = (Path(top) / name for name in ("slurm", "grid", "alone"))
        Path(top).chmod(0o755)  # munged goes through
        for place in (root, alone):
            copy_to(place)
        with cluster(folder) as daemons:
            killed = disturbed(root, folder, given.snakemake, daemons)
        grid, finished, log = time.perf_counter() - begin, markers(root), (root / "snakemake.log").read_text()
        if len(finished) < len(columns):
            sys.exit(f"{log[-4000:]}\nslurm.py: {len(finished)} of {len(columns)} columns finished: nothing to record")
        compared = [killed, next(name for name in columns if name != killed)]
        if other := [name for name in compared if not is_equal(root, alone, name)]:
            sys.exit(f"slurm.py: {', '.join(other)} differs from the same without Slurm: nothing to record")
    figures = {"finished": len(finished), "jobs_killed": 1, "controller_restarts": 1, "compared": len(compared)}
    record = {
        "schema": SCHEMA,
        "kind": "cluster",
        "config": {"columns": len(columns), "partitions": len(PARTITIONS)},
        "figures": figures | {"restarts": log.count("has been submitted with SLURM jobid") - len(columns)},
        "seconds": {"grid": round(grid, 1), "total": round(time.perf_counter() - begin, 1)},
        **made_on(pick_device("cpu"), "python benchmarks/slurm.py"),
    }
    record["versions"] |= {
        "slurm": said("slurmctld", "-V").split()[-1],
        "snakemake": said(given.snakemake, "--version"),
    }
    print(write_record(record, given.out))


if __name__ == "__main__":
    main(sys.argv[1:])
