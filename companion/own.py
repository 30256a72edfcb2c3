"""A function of the user's own, named as path/file.py:function: it returns a network, or images."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from companion.files import from_root, one_line
from companion.settings import ParameterError

OWN = "own_"  # begins the name of a module that `call` makes of a file


def parts(value: str, parameter: str) -> tuple[Path, str]:
    """The file, which is there, and the name of the function.

    Raises:
        ParameterError: there is no such file, or no such name.
    """
    file, _, name = value.rpartition(":") if not value.endswith(".py") else (value, "", "")
    path = from_root(file).resolve()
    if not name.isidentifier():
        raise ParameterError(f"{parameter} is {value!r}, which names no function: write path/file.py:function")
    if not path.is_file():
        raise ParameterError(f"{parameter} is {value!r}, and there is no file {path}")
    return path, name


def call(value: str, parameter: str) -> Any:
    """What the function returns, called without arguments.

    The file may import what lies beside it. It is run anew at each call: it may have been edited.

    Args:
        value: path/file.py:function; a relative path starts at the repository.
        parameter: which parameter has this value, for the messages.

    Raises:
        ParameterError: there is no such file or function, or one of the two raises; its `__cause__` is that exception.
    """
    path, name = parts(value, parameter)
    module_name = OWN + path.stem
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            near = ", ".join(k for k, v in vars(module).items() if getattr(v, "__module__", "") == module_name)
            raise ParameterError(f"{path} has no function {name!r}; what it defines is: {near or 'nothing'}")
        return function()
    except ParameterError:
        raise
    except (Exception, SystemExit) as error:
        raise ParameterError(f"{value} raised {one_line(error)}{where(error)}") from error
    finally:
        sys.path.remove(str(path.parent))


def code(value: str) -> bytes:
    """The file of a function that was called, and the files beside it that were imported."""
    own = from_root(value.rpartition(":")[0]).resolve()
    names = [name for name in sys.modules if not name.startswith(OWN)]  # others of these are called for themselves
    known = {str(getattr(sys.modules[name], "__file__", None) or "") for name in names}
    beside = [path for path in map(Path, sorted(known)) if path.parent == own.parent and path.suffix == ".py"]
    return b"\0".join(path.read_bytes() for path in [own, *beside] if path.is_file())


def where(error: BaseException) -> str:
    """The line at which the user's code raised an exception, in words; nothing, where it came from a library alone."""
    ours = str(Path(__file__).parent)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((str(error.filename), error.lineno))
    theirs = [(f, n) for f, n in frames if f[:1] != "<" and "site-packages" not in f and not f.startswith(ours)]
    return f" (line {theirs[-1][1]} of {theirs[-1][0]})" if theirs else ""


def words(value: str) -> str:
    """The file and the function, as a record can hold them; without the folders, which are of one machine alone."""
    return re.sub(r"[^\w.: -]", "_", Path(value).name)
