"""Runs a function of tests in several processes that know each other, as torchrun would, with gloo on the CPU."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def start(count, tasks, *, folder):
    """`count` processes that each do the tasks, functions of spread.py and what they are given; not waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(folder) / "given.pickle"
    path.write_bytes(pickle.dumps(tasks))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "spread.py"), str(path)],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run(count, tasks):
    """For each task, a pair of a name and what is given, what each of the processes returns; an error as its words."""
    with tempfile.TemporaryDirectory() as folder:
        running = start(count, tasks, folder=folder)
        said = [process.communicate(timeout=300)[1] for process in running]
        results = [Path(folder) / f"given.pickle.{rank}" for rank in range(count)]
        assert all(result.exists() for result in results), said
        return list(zip(*(pickle.loads(result.read_bytes()) for result in results), strict=True))
