"""Every run of the suite draws the same examples, and builds the book once."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
BOOK = ["_config.yml", "book", "notebooks", "wdat_core.py", "companion", "results", "assets"]  # what it is built from

settings.register_profile("wdat", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("wdat")


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """The exit code and the output of `jupyter-book build book/` in a fresh copy, and the folder of its pages."""
    root = tmp_path_factory.mktemp("clone")
    for part in BOOK:
        if (ROOT / part).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "notebooks")
            shutil.copytree(ROOT / part, root / part, ignore=left_out)
        else:
            shutil.copy(ROOT / part, root)
    (root / "book" / "notebooks").mkdir()
    (root / "book" / "notebooks" / "stale.ipynb").write_text("a copy of a notebook that is gone", encoding="utf-8")
    program = shutil.which("jupyter-book", path=sysconfig.get_path("scripts"))
    command = [program, "build", "book/", "-W", "--keep-going"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.returncode, done.stdout + done.stderr, root / "_build" / "html"
