"""What a run costs: how often images go through the network, what processes send each other, and the hours.

Only counts and arithmetic are here. tests/test_cost.py counts the passes and the messages that wdat_core makes and
compares. How fast a device is has to be measured: it is a record's, or the reader's own.

Nothing here imports torch: parameters are checked before it is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, field_validator

from companion.checked import Checked, variables
from companion.settings import NOTEBOOKS, PAPER_NETWORKS, PARAMETERS, PRESETS, Count, Positive, Settings

PAPER = {name: PRESETS["paper"][f"{name}_images"] for name in ("train", "val", "test")}
PAPER |= {name: PRESETS["paper"][name] for name in ("epochs", "batch_size", "found_steps")}
STEPS: int = Settings.model_fields["steps"].default
SAMPLE = 0.1  # of the training images, for the estimate of Upsilon at every minibatch
IMAGENET, IMAGENET_FEW, IMAGENET_FOUND = 50_000, 5_000, 40  # its validation images, those of RobustBench; gradients
# A forward pass and the two halves of a backward pass, to the input and to the weights, have as many multiplications
# each in linear and convolutional layers. With the pass of an attack, forward and to the input, as the unit:
FORWARD, UPDATE = 0.5, 1.5
# How many messages all processes share: at each step of an attack that needs no projection before the last one, and
# beside that; of at most so many bytes. One of a minibatch's is of 4 bytes for each tensor of parameters instead, and
# the gradients come on top.
STEP_MESSAGES, ATTACK_MESSAGES, MINIBATCH_MESSAGES, MESSAGE_BYTES = 1, 6, 9, 40
PARAMETERS_OF = {"WRN-28-10": 36_479_194, "WRN-34-10": 46_160_474}  # of RobustBench's networks, ten classes
LAST_LAYER = 640 * 10 + 10  # parameters of theirs


@dataclass(frozen=True)
class Passes:
    """Images that go through a network: forward alone, forward and back to the input, forward and back to the weights.

    An image that does so ten times counts as ten.
    """

    forward: int = 0
    gradient: int = 0
    update: int = 0

    @property
    def whole(self) -> float:
        """All of them in passes of the attack: one forward and back to the input."""
        return FORWARD * self.forward + self.gradient + UPDATE * self.update

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.gradient + other.gradient, self.update + other.update)

    def __mul__(self, times: int) -> Passes:
        return Passes(self.forward * times, self.gradient * times, self.update * times)


def total(parts: dict[str, Passes]) -> Passes:
    return sum(parts.values(), Passes())


def attack(images: int, steps: int = STEPS) -> Passes:
    """W-PGD, the pointwise one too. The clean accuracy is in its first look. Under ReDLR it is at most this."""
    return Passes(forward=images, gradient=images * steps)


def worst_case(images: int, steps: int, classes: int = 10, right: int | None = None) -> Passes:
    """The search of `boundary` with `steps` gradients an image.

    Args:
        right: how many images are classified correctly; the others need one look. None: all, so at most this.
    """
    rivals = min(classes - 1, max(1, round(math.sqrt(steps / 4))))  # each has a look at its end
    right = images if right is None else right
    return Passes(forward=images + right * (rivals + 1), gradient=right * steps)


def evaluation(
    images: int, steps: int = STEPS, found_steps: int = 0, classes: int = 10, right: int | None = None
) -> dict[str, Passes]:
    """Clean, W_inf and W_2 accuracy, and the worst case where it is searched for: `evaluate`, part by part."""
    parts = {"W∞ and W₂ attack": attack(images, steps) * 2}
    return parts | ({"worst case": worst_case(images, found_steps, classes, right)} if found_steps else {})


def before(images: int, steps: int = STEPS, found_steps: int = 0, right: int | None = None) -> Passes:
    """What a network is measured by once, before its columns: also Upsilon, and W-PGD-budget."""
    more = attack(images, steps) + Passes(gradient=images)
    return total(evaluation(images, steps, found_steps, right=right)) + more


def minibatches(train: int, batch_size: int, epochs: int) -> int:
    return epochs * math.ceil(train / batch_size)


def training(perturb: str, train: int, val: int, epochs: int, batch_size: int, steps: int = STEPS) -> dict[str, Passes]:
    """Algorithm 1, part by part: `finetune` makes no others, but for checks that take a few images.

    Args:
        perturb: "whole", or "last_layer": the weights below it get no gradient, and its own costs next to nothing.
    """
    sample, seen = max(1, round(SAMPLE * train)), epochs * train
    return {
        "estimate of Υ": Passes(gradient=minibatches(train, batch_size, epochs) * sample),
        "attack": Passes(gradient=seen * steps),  # x_0 too, and not the last iterate, which the update looks at
        "update": Passes(forward=2 * seen) if perturb == "last_layer" else Passes(update=2 * seen),
        "validation": attack(val, steps) * epochs,
    }


def column(perturb: str = "whole") -> dict[str, Passes]:
    """A column of the paper's grid, part by part: its training, and the measurement after it."""
    sizes = {name: PAPER[name] for name in ("train", "val", "epochs", "batch_size")}
    return training(perturb, **sizes) | evaluation(PAPER["test"], found_steps=PAPER["found_steps"])


def grid() -> Passes:
    """The paper's grid with one seed: of each of its networks the eight columns, and the measurement before them."""
    columns = len({(tau, eta) for tau, eta in Settings().grid()})
    of_one = sum((total(column(how)) * columns for how in ("whole", "last_layer")), Passes())
    return (of_one + before(PAPER["test"], found_steps=PAPER["found_steps"])) * len(PAPER_NETWORKS)


def imagenet(images: int = IMAGENET) -> Passes:
    return total(evaluation(images, found_steps=IMAGENET_FOUND, classes=1000))


def sgd_steps(columns: int = 1) -> int:
    return columns * minibatches(PAPER["train"], PAPER["batch_size"], PAPER["epochs"])


def messages(steps: int = STEPS) -> int:
    """Of a minibatch, beside its gradients."""
    return STEP_MESSAGES * steps + MINIBATCH_MESSAGES


def step_bytes(parameters: int, steps: int = STEPS) -> int:
    """What the processes add up at a step of SGD: the gradients in float32, and the small messages.

    Running statistics of BatchNorm add 8 bytes each.
    """
    return 4 * parameters + MESSAGE_BYTES * messages(steps)


def evaluation_bytes(images: int, steps: int = STEPS) -> int:
    """What the processes of `evaluate` share: small messages of two attacks, and twice each image's distance."""
    return 2 * MESSAGE_BYTES * (STEP_MESSAGES * steps + ATTACK_MESSAGES) + 8 * images


def sent(size: float, devices: int) -> float:
    """Bytes that each device has to send, at the least, so that all have the sum of messages of that size."""
    return 2 * (devices - 1) / devices * size


def hours(passes: Passes, rate: float, devices: int = 1, shared: float = 0.0, bandwidth: float = math.inf) -> float:
    """passes / rate / devices + bytes / bandwidth, in hours: work that divides perfectly, and then communication.

    Args:
        rate: images a second that one device takes forward and back to the input.
        shared: bytes that are added up over the devices, in all.
        bandwidth: bytes a second between devices.
    """
    return (passes.whole / rate / devices + sent(shared, devices) / bandwidth) / 3600


# ---------------------------------------------------------------------------------------------------------------------
# The reader's own device
# ---------------------------------------------------------------------------------------------------------------------

COUNTS = 'whole numbers above 0 with commas between them, such as "1, 8, 64"'


class Reader(Checked):
    """The parameters of the page: what only the reader can know. None is not known, and nothing stands for it."""

    images_per_second: Positive | None = Field(
        None, description="your images a second: forward and back to the input, your network, one device; None: unknown"
    )
    parameters: Annotated[Count, Field(le=10**15)] | None = Field(
        None, description="how many your network has; None: WRN-34-10's"
    )
    bandwidth: Positive | None = Field(
        None, description="your bytes a second between devices; None: unknown, and left out of the hours"
    )
    devices: int | str = Field("1, 8, 64", description='how many devices: a number, or several as in "1, 8, 64"')

    def __init__(self, **given: Any) -> None:  # else mypy wants every field
        super().__init__(**given)

    @field_validator("devices", mode="before")
    @classmethod
    def _are_counts(cls, value: Any) -> Any:
        known = isinstance(value, int | str) and not isinstance(value, bool)
        if not known or not all(0 < n <= 10**6 for n in counts(value)):
            raise ValueError(COUNTS)
        return value

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any], notebook: str) -> Self:
        """The parameters among the variables of a notebook, its `globals()`, checked.

        Raises:
            ParameterError: a variable is no parameter, has the wrong type, or an impossible value.
        """
        return cls(**variables(namespace, PARAMETERS[NOTEBOOKS[notebook]]))

    @property
    def counts(self) -> list[int]:
        return counts(self.devices)


def counts(devices: int | str) -> list[int]:
    """The numbers of devices; 0 for what is no number."""
    parts = [part.strip() for part in str(devices).split(",")]
    return [int(part) if part.isascii() and part.isdigit() and len(part) < 8 else 0 for part in parts]
