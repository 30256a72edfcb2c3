"""The data sets: one row for each, and what RobustBench says of it.

This module imports the standard library alone: parameters are checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NORMS = ("Linf", "L2")  # of the pixels, in RobustBench's spelling


@dataclass(frozen=True)
class DataSet:
    """What a data set is.

    Attributes:
        name: as people write it.
        robustbench: as RobustBench writes it, in `load_model(dataset=...)` and in the folder of weights.
        classes: how many there are; labels are 0 to classes - 1.
        shape: of an image, (channels, height, width).
        train: how many training images there are; 0 where this project loads none.
        test: how many test images.
        delta: for each norm in which RobustBench has networks, the radius of its leaderboard, pixels in [0, 1].
    """

    name: str
    robustbench: str
    classes: int
    shape: tuple[int, int, int]
    train: int
    test: int
    delta: Mapping[str, float]


_ROWS = (
    DataSet("CIFAR-10", "cifar10", 10, (3, 32, 32), 50_000, 10_000, {"Linf": 8 / 255, "L2": 0.5}),
    DataSet("CIFAR-100", "cifar100", 100, (3, 32, 32), 50_000, 10_000, {"Linf": 8 / 255}),
    # The test images are the 5,000 of the validation set that RobustBench lists, cut to a square of 224 pixels.
    DataSet("ImageNet", "imagenet", 1000, (3, 224, 224), 0, 5_000, {"Linf": 4 / 255}),
)
DATASETS = {row.robustbench: row for row in _ROWS}  # the keys are the values of the parameter `dataset`
EMBEDDED = {"train": 4000, "val": 1000, "test": 1000}  # images of CIFAR-10 that are in the repository
EMBEDDED_SOURCE = "embedded CIFAR-10 images"  # as records call them


def is_own(value: str) -> bool:
    """Whether the value of `network` or `data` names a function of the user's own, as path/file.py:function does."""
    return value.endswith(".py") or value.rpartition(":")[0].endswith(".py")
