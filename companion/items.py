"""What each notebook computes, without the notebook: the same parameters, checks and records.

Nothing here imports torch before a run begins: parameters are checked before it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from companion import files
from companion.parameters import defaults
from companion.settings import GRIDS, NOTEBOOKS, PARAMETERS, ParameterError, Settings, unknown

# By what a notebook does: in words, and how its records are made, with the module `runs` and `each` of the settings.
Way = tuple[str, Callable[..., Sequence[Any]]]
WAYS: dict[str, Way] = {
    "attack": (
        "Attacks networks as they are, and searches for their worst case.",
        lambda runs, each, **how: runs.attack_each(each, "test", **how),
    ),
    "attack in batches": (
        "Attacks networks as they are, test and training images, at once and in batches.",
        lambda runs, each, **how: [*runs.attack_each(each, "test", **how), *runs.attack_each(each, "train", **how)],
    ),
    "fine-tune": (
        "Fine-tunes a network for each tau and eta, and measures it before and after.",
        lambda runs, each, notebook: runs.finetune_grid(each[0], _perturb(notebook), notebook=notebook),
    ),
    "fine-tune both ways": (
        "Fine-tunes a network for each tau and eta, the whole of it and its last layer first.",
        lambda runs, each, **how: [r for p in ("whole", "last_layer") for r in runs.finetune_grid(each[0], p, **how)],
    ),
    "estimate": (
        "Estimates Upsilon from all training images and from tenths of them.",
        lambda runs, each, **how: runs.estimates_each(each, **how),
    ),
    "follow": (
        "Fine-tunes a network, and measures it after every epoch.",
        lambda runs, each, **how: runs.finetune_grid(each[0], "whole", curves=True, **how),
    ),
    "change a point": (
        "Fine-tunes a network as by default and with one point changed.",
        lambda runs, each, **how: runs.change_point(each[0], **how),
    ),
    "attack harder": (
        "Attacks a network in more ways, by AutoAttack too if asked.",
        lambda runs, each, **how: [runs.attack_harder(each[0], **how)],
    ),
    "show attacks": (
        "Measures what each image costs each attacker.",
        lambda runs, each, **how: [runs.spend(each[0], **how)[0]],
    ),
}
ITEMS = [name for name, does in NOTEBOOKS.items() if does in WAYS]
OF_SEVERAL = ("attack", "attack in batches", "estimate")  # networks, where none is given


def _perturb(notebook: str) -> str:
    return GRIDS[int(notebook.removeprefix("table"))][1]


def checked(item: str, given: Mapping[str, Any]) -> list[Settings]:
    """The settings that the notebook of an item would have with these parameters: one for each network.

    Raises:
        ParameterError: as `Settings.from_notebook`; or the item is not known, or leaves no record.
    """
    if item not in ITEMS:
        raise ParameterError(_no_item(item))
    does = NOTEBOOKS[item]
    for name in given:  # also one that a notebook takes for a variable of its own, such as _tau
        if name not in PARAMETERS[does]:
            raise ParameterError(unknown(name, PARAMETERS[does]))
    namespace = {**defaults(item), **given}
    if does in OF_SEVERAL:
        return Settings.each_from_notebook(namespace, item)
    return [Settings.from_notebook(namespace, item)]


def _no_item(item: str) -> str:
    if (files.ROOT / "notebooks" / f"{item}.ipynb").is_file():
        return f"{item} leaves no record: run its notebook, papermill notebooks/{item}.ipynb out.ipynb"
    return unknown(item, ITEMS).replace("parameter", "item", 1)


def compute(item: str, each: Sequence[Settings]) -> list[Any]:
    """The records of an item, read from runs/ or computed and written there, as its notebook does."""
    from companion import runs

    return list(WAYS[NOTEBOOKS[item]][1](runs, each, notebook=item))
