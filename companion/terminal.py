"""How far a run is, in the terminal behind papermill and in a live notebook."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def progress(label: str) -> Callable[[Sequence[Any]], Iterator[Any]]:
    """What wdat_core's `progress` takes: it wraps what is iterated over, and shows a line on how far that is.

    The line replaces the one before, and is cleared at the end: nothing stays in stored outputs.
    """

    def wrapped(items: Sequence[Any]) -> Iterator[Any]:
        show, begin, shown = _line(), time.monotonic(), 0.0
        try:
            for i, item in enumerate(items):
                if i and (now := time.monotonic()) - shown > 0.5:
                    show(f"{label}: {i}/{len(items)}, {(now - begin) / i * (len(items) - i):.0f} s left")
                    shown = now
                yield item
        finally:
            show("")

    return wrapped


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a module with this docstring, which works on images and published weights."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the images, or embedded")
    parser.add_argument("--models", default="models", help="folder of published weights")
    return parser


def _line() -> Callable[[str], None]:
    """A function that shows one line of text in place of the one before."""
    try:
        descriptor = sys.stderr.fileno()  # under ipykernel this is the process's own stderr
        how: dict[str, Any] = {"encoding": getattr(sys.stderr, "encoding", None), "errors": "replace"}
        terminal = os.fdopen(os.dup(descriptor), "w", **how) if os.isatty(descriptor) else None
    except (OSError, AttributeError, ValueError, io.UnsupportedOperation):
        terminal = None
    in_kernel = "ipykernel" in sys.modules

    def show(text: str) -> None:
        if terminal:
            terminal.write(f"\r\033[K{text}")
            terminal.flush()
        if in_kernel:
            from IPython.display import clear_output, display

            clear_output(wait=bool(text))
            if text:
                display({"text/plain": text}, raw=True)

    return show
