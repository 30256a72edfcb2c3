"""The machine: its devices, and what a record says of it, of the libraries and of the code."""

from __future__ import annotations

import datetime
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.files import one_line
from companion.settings import ParameterError

if TYPE_CHECKING:
    import torch


def made_on(device: torch.device, command: str) -> dict[str, Any]:
    """Where, with what, when, and by which command a record is made."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "core": core_digest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def check_device(name: str) -> None:
    """The name is one that some machine may have.

    Raises:
        ParameterError: it is not.
    """
    import torch

    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ParameterError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:1 ({one_line(error)})") from error


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU.

    Raises:
        ParameterError: there is no such device, or this machine has none.
    """
    import torch

    check_device(name)

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParameterError(f"this machine has no device {name!r}: use auto or cpu ({one_line(error)})") from error
    return device


def device_name(device: torch.device) -> str:
    """The hardware in words."""
    import torch

    from companion import processes

    among = f", {processes.count()} processes" * (processes.count() > 1)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + among
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{processor}, {threads} thread{'s' * (threads > 1)}{among}"


def hardware(device: str) -> str:
    """A device's name without how many threads and processes used it, which decide no more than rounding."""
    return re.sub(r", \d+ (thread|process)(e?s)?\b", "", device)


def processor() -> str:
    """Which make of processor, where the system says: its name alone can stand for several that round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return ", ".join(f"{name} {said[name]}" for name in ("cpu family", "model", "stepping") if name in said)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a number."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "robustbench", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def core_digest() -> str:
    """The digest of wdat_core.py's code when it was first asked for, so that a record says which code made it."""
    from wdat_core import code_digest

    return code_digest()
