"""Slurm on this machine alone, in a folder of its own and without systemd: a controller, a daemon, two partitions."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DAEMONS = {"munged": ["--foreground"], "slurmctld": ["-D"], "slurmd": ["-D", "-N", "localhost"]}
MUNGE = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
CONFIG = """ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munged/socket
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld/pid
SlurmdPidFile={folder}/slurmd/pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory}
"""
PARTITIONS = ("first", "again")
Daemons = dict[str, subprocess.Popen[bytes]]


def why_not(snakemake: str) -> str | None:
    """Why a cluster cannot be set up here, in words, or None where it can."""
    if missing := [name for name in (*DAEMONS, "sbatch", "srun", snakemake) if not shutil.which(name)]:
        return f"{missing[0]} is not on the path"
    if os.geteuid():
        return "only root can start the daemons of Slurm"
    if already := running() & DAEMONS.keys():
        return f"{min(already)} runs on this machine already"
    if "--slurm-status-command" not in said(snakemake, "--help"):
        return f"{snakemake} does not have its plugin for Slurm"
    return None


def running() -> set[str]:
    """The names of the processes on this machine."""
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.add(path.read_text().strip())
    return names


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for(what: str, found: Callable[[], Any], seconds: float) -> Any:
    """What is found, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.5)
    return value


def processes_of(folder: Path) -> dict[int, list[str]]:
    """The command of each process that has the folder in its environment, by its id: daemons, Snakemake and jobs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(folder).encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text(errors="replace").split("\0")
    return found


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """One of the daemons; munged as its own user."""
    options, user = DAEMONS[name], {}
    if name == "munged":
        options = [*options, *(f"--{option}={folder}/munged/{file}" for option, file in MUNGE.items())]
        user = {"user": "munge", "group": "munge"}
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([name, *options], stdout=log, stderr=log, start_new_session=True, **user)  # type: ignore


def prepare(folder: Path) -> None:
    """What the daemons read, and an `srun` that knows it: in a job, Snakemake's plugin takes SLURM_CONF away."""
    for name in (*DAEMONS, "bin"):
        (folder / name).mkdir(parents=True)
    key, srun, config = folder / "munged" / "key", folder / "bin" / "srun", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (key, key.parent):
        shutil.chown(path, "munge", "munge")
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={config} exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        ports = (one.getsockname()[1], other.getsockname()[1])
    memory = int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(folder=folder, host=host, ports=ports, cores=os.cpu_count(), memory=memory)
    config.write_text(text + "".join(f"PartitionName={name} Nodes=localhost\n" for name in PARTITIONS))
    os.environ |= {"SLURM_CONF": str(config), "PATH": f"{srun.parent}{os.pathsep}{os.environ['PATH']}"}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Daemons]:
    """The daemons of a cluster in this folder, by name. At the end they and their jobs are gone, whatever happens."""
    daemons: Daemons = {}
    before = dict(os.environ)
    try:
        prepare(folder)
        daemons["munged"] = start(folder, "munged")
        wait_for("munged", (folder / "munged" / "socket").exists, 30)
        daemons |= {name: start(folder, name) for name in ("slurmctld", "slurmd")}
        wait_for("an idle node", lambda: "idle" in subprocess.getoutput("sinfo --noheader --format=%t"), 60)
        yield daemons
    finally:
        for name in ("PATH", "SLURM_CONF"):
            os.environ.pop(name, None)
        os.environ |= before
        for daemon in reversed(daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        while left := processes_of(folder):
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)
