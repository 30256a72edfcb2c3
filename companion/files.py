"""Where things lie, and files that are written whole and read as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
RESULTS = ROOT / "results"  # committed: what the book quotes
RUNS = ROOT / "runs"  # not committed: what this checkout computed


def from_root(path: str | Path) -> Path:
    """A path given to a notebook; relative ones start at the repository, wherever the notebook runs."""
    with contextlib.suppress(RuntimeError):  # ~somebody who is not known here: a name as any other
        path = Path(path).expanduser()
    return ROOT / path


def one_line(error: BaseException) -> str:
    """An error of another library on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def digest(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: first under another name, which no other process has.

    Raises:
        OSError: there is no room, or no right to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def try_to_write(folder: Path) -> None:
    """Make a folder where there is none, and try to write there; nothing stays but the folder.

    Raises:
        OSError: there is no room, or no right to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write SHA256SUMS, the digests of files in a folder, as `sha256sum --check` and `verified` read it."""
    lines = [f"{digest((folder / name).read_bytes())}  {name}\n" for name in sorted(names)]
    write_whole(folder / "SHA256SUMS", "".join(lines).encode())


def verified(folder: Path, name: str) -> bytes:
    """The content of a file that SHA256SUMS in its folder lists.

    Raises:
        OSError: it is missing, cannot be read, or is not what it was when its digest was taken.
    """
    content = (folder / name).read_bytes()
    listed = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
    if f"{digest(content)}  {name}" not in listed:
        raise OSError(f"{name} does not have the digest that SHA256SUMS beside it lists")
    return content
