"""A grid of runs as jobs of the command line: what workflow/config.yaml lists, checked, and what each job is called.

Nothing here imports torch: a grid is checked before anything runs.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion import files
from companion.items import checked
from companion.parameters import read
from companion.settings import PAPER_NETWORKS, STAND_INS, ParameterError, Settings

KEYS = {"grid": list, "python": str, "threads": int, "gpus": int}  # of workflow/config.yaml


def jobs(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The arguments of `python -m companion` for each job, by the job's name.

    Args:
        config: what workflow/config.yaml holds. An entry of its grid has an `item` and parameters, each with a value or
            with a list of values: each of them.

    Raises:
        ParameterError: as `checked`; or the configuration has another shape.
    """
    if wrong := [k for k in {**config, **KEYS} if k not in KEYS or not isinstance(config.get(k), KEYS[k])]:
        raise ParameterError(f"{wrong[0]} is not known, or not what it has to be: see workflow/config.yaml")
    found = {}
    for block in config["grid"]:
        if not isinstance(block, Mapping) or "item" not in block:
            raise ParameterError(f"an entry of the grid has an item and its parameters, and {block!r:.100} has not")
        each = {str(name): value if isinstance(value, list) else [value] for name, value in block.items()}
        if empty := [name for name, values in each.items() if not values]:
            raise ParameterError(f"an entry of the grid has no value for {empty[0]}, so it has no job")
        for values in itertools.product(*each.values()):
            given = {name: str(value) for name, value in zip(each, values, strict=True)}
            item = given.pop("item")
            settings = checked(item, {name: read(text) for name, text in given.items()})
            arguments = [word for name, text in given.items() for word in ("-p", name, text)]
            found[_name(item, given, settings)] = [item, *arguments]
    return found


def _name(item: str, given: Mapping[str, str], settings: Sequence[Settings]) -> str:
    """Item, network, tau, eta and seed where they are given, and a digest of all settings."""
    known = [item] + ([Path(given["network"]).name] if "network" in given else [])
    known += [f"{name}{given[name].removesuffix('.0')}" for name in ("tau", "eta", "seed") if name in given]
    digest = files.digest(json.dumps([one.model_dump() for one in settings], sort_keys=True).encode())
    return re.sub(r"[^\w.-]", "_", "-".join([*known, digest[:8]]))


def check_networks(found: Mapping[str, list[str]], python: str) -> None:
    """The networks that are neither a stand-in nor the paper's are known to the project's own Python.

    Raises:
        ParameterError: one is not; or there is no such Python.
    """
    plain = {None, *STAND_INS, *PAPER_NETWORKS}
    odd = {}
    for arguments in found.values():
        given = dict(zip(arguments[2::3], arguments[3::3], strict=True))
        if given.get("network") not in plain:
            odd[given["network"], given.get("dataset"), given.get("norm")] = arguments
    for item, *parameters in odd.values():
        command = [python, "-m", "companion", item, "--check", *parameters]
        try:
            done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
        except OSError as error:
            raise ParameterError(f"python: {python} cannot be run ({files.one_line(error)})") from error
        if done.returncode:
            raise ParameterError(done.stderr.strip().splitlines()[-1].removeprefix("companion: "))
