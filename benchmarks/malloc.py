"""One setting of malloc for everything that is timed, so that a ratio does not depend on where the heap happens to end.

glibc hands the end of the heap back to the system when it is freed and takes it again a moment later, at the cost of a
page fault for every 4 KiB. How often is a matter of what lies there, and it hits contestants unequally.
"""

from __future__ import annotations

import os
import sys

SETTING = {"MALLOC_TOP_PAD_": "100000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}  # bytes


def start_again_with_it() -> None:
    """This program from its beginning, with the setting, unless it has it; malloc reads it when a process starts."""
    if sys.platform == "linux" and not has_it():
        os.environ.update(SETTING)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_it() -> bool:
    return SETTING.items() <= os.environ.items()


def words() -> str:
    """What a record says of it."""
    return " ".join(f"{name}={value}" for name, value in SETTING.items()) if has_it() else "as the system has it"


def environment_without() -> dict[str, str]:
    """For a process whose memory is measured: it should be what a user sees."""
    return {name: value for name, value in os.environ.items() if name not in SETTING}
