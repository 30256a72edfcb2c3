"""What each parameter of a notebook means there, its default, and how its value is read from a command line.

Nothing here imports torch: parameters are checked before it is loaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

from companion.checked import Checked
from companion.cost import Reader
from companion.settings import NOTEBOOKS, PARAMETERS, Settings

NETWORKS = "any network, as for Table 4; None: the paper's five, or the stand-ins"
OWN: dict[str, dict[str, str]] = {  # by what a notebook does: where it means something more special
    "follow": {
        "tau": "learning rate, > 0; that of the paper's figure",
        "eta": "update rate of Upsilon, in (0, 1]; that of the paper's figure",
    },
    "change a point": {"tau": "learning rate, > 0", "eta": "update rate of Upsilon, in (0, 1]"},
    "attack": {"network": NETWORKS, "test_images": "how many test images are attacked; None: the preset's"},
    "attack harder": {
        "network": "any network, as for Table 4; None: by preset",
        "test_images": "how many test images are attacked; None: the preset's",
    },
    "attack in batches": {
        "network": NETWORKS,
        "train_images": "how many training images are attacked; None: the preset's, as for the next two",
        "test_images": "how many test images are attacked",
        "batch_size": "images of a batch of W-PGD-budget, eq. 5.5",
    },
    "show attacks": {"test_images": "how many are attacked, the gallery's among them; None: the preset's"},
    "estimate": {
        "network": NETWORKS,
        "train_images": "how many images Upsilon is of; None: the preset's",
        "seed": "of the samples",
    },
    "bring your own": {
        "tau": "learning rate of fine-tuning, > 0",
        "epochs": "of fine-tuning",
        "delta": "radius of the attacks, in [0, 1] pixel units; 8 / 255 in the paper",
        "seed": "of the weights and of the training",
    },
}
USUAL: dict[str, dict[str, Any]] = {  # parameters that are not as by default in `Settings`
    **{f"figure7_{n}": {"tau": 0.01, "eta": 1.0} for n in (2, 3, 4)},
    "open_points": {"tau": 0.01, "eta": 1.0},
    "stronger": {"network": "small_trades"},
    "own_network": {"tau": 0.1, "epochs": 2, "delta": 4 / 255},
}


def explained(notebook: str) -> dict[str, str]:
    """The parameters of a notebook, in their order, each with what it means."""
    does = NOTEBOOKS[notebook]
    own, fields = OWN.get(does, {}), _of(does).model_fields
    return {name: own.get(name) or str(fields[name].description) for name in PARAMETERS[does]}


def _of(does: str) -> type[Checked]:
    return Reader if does == "work out a cost" else Settings


def defaults(notebook: str) -> dict[str, Any]:
    """The values that the parameters of a notebook have when none is given."""
    values = _of(NOTEBOOKS[notebook])().model_dump() | USUAL.get(notebook, {})
    return {name: values[name] for name in PARAMETERS[NOTEBOOKS[notebook]]}


CONSTANTS = {"True": True, "False": False, "None": None}


def read(text: str) -> Any:
    """A value as papermill's -p reads it: True, False, None, a number, or else text."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text
