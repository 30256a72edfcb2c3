"""What pyproject.toml cannot say to pytest: how the tests share processes, and what a notebook's kernel finds."""

import os
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parent

# One thread a process, kernels too: on busy cores two processes of two threads are many times slower than of one.
os.environ["OMP_NUM_THREADS"] = "1"

# nbval starts each notebook in its own folder: its kernel finds this checkout's modules here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# A notebook in the root is what papermill wrote, not a test.
collect_ignore = [notebook.name for notebook in ROOT.glob("*.ipynb")]

# Files that read what another of them has computed: one process takes them all, one after the other.
FAMILIES = [
    ["figure7_2", "figure7_3", "figure7_4", "open_points", *(f"table{n}" for n in (3, 4, 5, 6, 7, 8, 9, 10, 11))],
    ["table1", "table2", "worst_case"],
    ["test_accessible", "test_book"],
]
FAMILY = {stem: family[0] for family in FAMILIES for stem in family}


class ByFamily(LoadFileScheduling):
    """Every file in one process, as a notebook's cells must be, and with it the rest of its family."""

    def _split_scope(self, nodeid):
        stem = Path(super()._split_scope(nodeid)).stem
        return FAMILY.get(stem, stem)


def pytest_collection_modifyitems(items):
    """The family that takes longest comes first: begun last, it would be run alone when all others are done."""
    items.sort(key=lambda item: FAMILY.get(item.path.stem) != FAMILIES[0][0])


def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # by number of tests, which is not by time
    return ByFamily(config, log)


def pytest_xdist_auto_num_workers(config):
    """As many processes as cores for the whole suite; none but this one for a part of it, which is done sooner so."""
    chosen = config.option.file_or_dir or config.option.keyword or config.option.markexpr or config.option.lf
    if chosen or config.option.collectonly:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
