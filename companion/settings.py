"""From a notebook's parameters to one frozen, checked configuration.

Nothing here imports torch: parameters are checked before it is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from companion.checked import Checked, variables
from companion.checked import ParameterError as ParameterError  # where everybody looks for it
from companion.checked import unknown as unknown
from companion.datasets import DATASETS, EMBEDDED, is_own

METRICS = {"clean": "Clean", "w_inf": "W∞", "w_2": "W₂"}
FOUND = {  # from the distances of `wdat_core.boundary`, where a record has them: at its radius, and at half of it
    "w_2_found": "W₂, worst case found",
    "w_2_found_half": "W₂, worst case found at δ/2",
}
PAPER_NETWORKS: dict[str, dict[str, Any]] = {
    "Zhang2019Theoretically": {"paper": "Zhang et al. (2019)", "architecture": "WRN-34-10", "clean": 84.92},
    "Chen2024Data_WRN_34_10": {"paper": "Chen and Lee (2024)", "architecture": "WRN-34-10", "clean": 86.54},
    "Gowal2020Uncovering_28_10_extra": {"paper": "Gowal et al. (2020)", "architecture": "WRN-28-10", "clean": 89.48},
    "Cui2023Decoupled_WRN-28-10": {"paper": "Cui et al. (2023)", "architecture": "WRN-28-10", "clean": 92.16},
    "Wang2023Better_WRN-28-10": {"paper": "Wang et al. (2023)", "architecture": "WRN-28-10", "clean": 92.44},
}
STAND_INS = {  # name -> class in networks, and its widths; pre-trained by the recipes in assets/make_demo.py
    "demo": ("SmallResNet", (16, 64, 128)),
    "small_trades": ("PatchResNet", (32, 64)),
    "small_pgd": ("PatchResNet", (32, 64)),
}
FINETUNED = "-finetuned"  # ends the name of a network that is not as its origin published it
OPEN_POINTS: dict[str, tuple[Any, ...]] = {  # what the paper leaves open: a field of FinetuneConfig, default first
    "consistency": ("ce_detached", "ce", "kl"),
    "attack_label": ("true", "predicted"),
    "attack_mode": ("eval", "train"),
    "update_mode": ("train", "eval"),
    "random_start": (0.0, 1.0),
    "noise": (0.01, 0.0, 0.05),
    "reinit": ("default", "xavier"),
    "augment": (True, False),
    "momentum": (0.0, 0.9),
    "weight_decay": (0.0, 0.0005),
    "schedule": ("constant", "cosine"),
    "first_upsilon": ("sample", "full"),
}
CONTROLS = {"attacker": ("distributional", "pointwise")}  # what the paper says, changed to see what it does
GRIDS = {  # the tables of (tau, eta): whose network of the paper, and how it is perturbed first
    3: ("Zhang2019Theoretically", "last_layer"),
    4: ("Zhang2019Theoretically", "whole"),
    6: ("Gowal2020Uncovering_28_10_extra", "last_layer"),
    7: ("Gowal2020Uncovering_28_10_extra", "whole"),
    8: ("Cui2023Decoupled_WRN-28-10", "last_layer"),
    9: ("Cui2023Decoupled_WRN-28-10", "whole"),
    10: ("Wang2023Better_WRN-28-10", "last_layer"),
    11: ("Wang2023Better_WRN-28-10", "whole"),
}


@dataclass(frozen=True)
class Stronger:
    """An attack of the page on stronger attacks, in the words of `wdat_core.wpgd`."""

    p: float
    loss: str
    steps: int | None = None  # None: as many as in the tables
    step_ratio: float = 1.0
    starts: int = 1  # random ones, where there is more than one; the best of them counts

    def words(self, steps: int) -> str:
        loss = {"ce": "CE", "dlr": "DLR", "redlr": "ReDLR"}[self.loss]
        parts = ["W∞" if self.p == math.inf else f"W{'₂' if self.p == 2 else self.p}", f"{self.steps or steps} steps"]
        parts += [loss, *[f"step ratio {self.step_ratio:g}"] * (self.step_ratio != 1)]
        return ", ".join([*parts, *[f"{self.starts} random starts"] * (self.starts > 1)])


STRONGER = {  # the first of each kind is that of the tables; 50 steps of ratio 1.875 are those of the 2023 paper
    "w_2": Stronger(2, "redlr"),
    "w_2_100": Stronger(2, "redlr", steps=100),
    "w_2_2023": Stronger(2, "redlr", steps=50, step_ratio=1.875),
    "w_2_starts": Stronger(2, "redlr", step_ratio=1.875, starts=3),
    "w_2_dlr": Stronger(2, "dlr"),
    "w_2_ce": Stronger(2, "ce"),
    "w_inf": Stronger(math.inf, "ce"),
    "w_inf_50": Stronger(math.inf, "ce", steps=50, step_ratio=1.875),
    "w_inf_dlr": Stronger(math.inf, "dlr", steps=50, step_ratio=1.875),
    "w_inf_starts": Stronger(math.inf, "ce", step_ratio=1.875, starts=3),
}


PRESETS: dict[str, dict[str, Any]] = {
    # A laptop computes a column of Table 4 in a minute, without any download.
    "demo": {
        "network": "demo",
        "data": "embedded",
        "train_images": 2000,
        "val_images": 500,
        "test_images": 1000,
        "epochs": 4,
        "batch_size": 512,
        "found_steps": 40,
    },
    # Section 6 of the paper.
    "paper": {
        "network": "Zhang2019Theoretically",
        "data": "data",
        "train_images": 40_000,
        "val_images": 10_000,
        "test_images": 10_000,
        "epochs": 20,
        "batch_size": 512,
        "found_steps": 100,
    },
}


Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Radius = Annotated[float, Field(ge=1e-6)]  # below that float32 rounds the steps away


def _quotient(value: Any) -> Any:
    """8/255, which a command line passes on as text, as a number; anything else as it is."""
    number = r"\d+(?:\.\d+)?"
    if isinstance(value, str) and (parts := re.fullmatch(rf"\s*({number})\s*/\s*({number})\s*", value)):
        return float(parts[1]) / float(parts[2]) if float(parts[2]) else value
    return value


class Settings(Checked):
    """The parameters of all notebooks. Types are strict: True is no number, and "2" is no number.

    None takes the preset's or the data set's value where there is one; for tau and eta both of the paper's; for the
    others, none: see `resolved`.

    Raises:
        ParameterError: a parameter is not known, has a wrong type, or an impossible value.
    """

    preset: Literal["demo", "paper"] = Field(
        "demo",
        description='"demo": a stand-in and embedded images, minutes on a laptop; "paper": its Section 6, a GPU',
    )
    tau: Positive | None = Field(None, description="learning rate, > 0; None: 0.1 and 0.01")
    eta: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="update rate of Upsilon, in (0, 1]; None: 0.1 and 1"
    )
    network: str | None = Field(
        None,
        description="a stand-in, any of RobustBench, an export, or path/file.py:function of your own; None: by preset",
    )
    dataset: Literal["cifar10", "cifar100", "imagenet"] = Field(
        "cifar10", description='what the images are: "cifar10", "cifar100" or "imagenet"'
    )
    data: str | None = Field(
        None, description='"embedded", a folder of images, or path/file.py:function of your own; None: the preset\'s'
    )
    train_images: Count | None = Field(
        None, description="how many images to train on; None: the preset's, as for the next four"
    )
    val_images: Count | None = Field(None, description="how many validation images choose the epoch that is kept")
    test_images: Count | None = Field(None, description="how many test images the accuracies are measured on")
    epochs: Count | None = Field(None, description="passes over the training images")
    batch_size: Count | None = Field(None, description="images of a minibatch")
    norm: Literal["Linf", "L2"] = Field("Linf", description='norm of the attack\'s pixels: "Linf" or "L2"')
    delta: Annotated[Radius | None, BeforeValidator(_quotient)] = Field(
        None,
        description="radius of the attack, in [0, 1] pixel units or as 8/255; None: the usual one of the data set",
    )
    beta: Annotated[float, Field(ge=0)] = Field(6.0, description="weight of the distributional term, eq. 5.1")
    steps: Count = Field(20, description="of every attack")
    found_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="of the search for the worst case over the ball; 0: no search; None: the preset's"
    )
    consistency: Literal["ce_detached", "ce", "kl"] = Field(
        "ce_detached", description='reading of CE(f(x), f(x\')): "ce_detached", "ce" or "kl"'
    )
    upsilon_from: Literal["sample", "batch"] = Field(
        "sample",
        description='"sample": the paper\'s 10 %; "batch": the minibatches\' own gradients, which cost nothing',
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description='"bfloat16": autocast of the network')
    compiled: bool = Field(False, description="True: torch.compile")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the perturbation, the minibatches, the samples and the augmentation"
    )
    device: str = Field("auto", description='"auto", "cpu", "cuda", "cuda:1", ...')
    models: str = Field("models", description="folder of RobustBench's weights")
    stop_after: Positive | None = Field(
        None, description="seconds of fine-tuning after which a column is kept for the next call; None: no limit"
    )
    export: str | None = Field(
        None, description="folder for each column's fine-tuned network, with its record and a model card; None: none"
    )
    fresh: bool = Field(False, description="True: compute also what runs/ already holds")
    point: str = Field("noise", description='which: a field of FinetuneConfig, as the ledger names it, or "attacker"')
    value: bool | float | str = Field(0.05, description="what it is instead of its default")
    autoattack: Annotated[int, Field(ge=0)] = Field(
        0,
        description="how many of the test images AutoAttack is run on, which takes far longer than all the others",
    )

    def __init__(self, **given: Any) -> None:  # else mypy wants every field
        super().__init__(**given)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any], notebook: str) -> Self:
        """The settings that the variables of a notebook's namespace give, checked, with the preset filled in.

        Args:
            namespace: the notebook's `globals()`.
            notebook: its name, a key of `NOTEBOOKS`.

        Raises:
            ParameterError: a variable is no parameter of this notebook, has the wrong type, or an impossible value.
        """
        does = NOTEBOOKS[notebook]
        given = variables(namespace, PARAMETERS[does])
        if given.get("preset") == "paper" and given.get("network") is None and notebook in PAPER_SUBJECTS:
            given["network"] = PAPER_SUBJECTS[notebook]
        settings = cls(**given).resolved()
        row = DATASETS[settings.dataset]
        if "train_images" in PARAMETERS[does] and not row.train and not is_own(str(settings.data)):
            raise ParameterError(
                f"{notebook} needs training images, and of {row.name} there are test images alone: give your own as"
                " data, path/file.py:function"
            )
        if settings.autoattack and (settings.precision != "float32" or settings.compiled):
            raise ParameterError("autoattack runs in float32 and not compiled: leave it out, or precision and compiled")
        for name in ("tau", "eta") if does in ONE_COLUMN else ():
            if getattr(settings, name) is None:
                raise ParameterError(f"{name} must be a number, not None")
        if settings.fresh and settings.stop_after is not None:
            raise ParameterError("fresh=True with stop_after would never end: each call starts from the beginning")
        return settings

    @classmethod
    def each_from_notebook(cls, namespace: dict[str, Any], notebook: str) -> list[Self]:
        """As `from_notebook`, for a notebook about several networks: one for each, or for the one that is given."""
        settings = cls.from_notebook(namespace, notebook)
        if namespace.get("network") is not None:
            return [settings]
        every = PAPER_NETWORKS if settings.preset == "paper" else STAND_INS
        return [settings.model_copy(update={"network": name}) for name in every]

    def resolved(self) -> Self:
        """With the preset's and the data set's values where there was None, and checked against each other.

        Raises:
            ParameterError: there are fewer images than asked for, or `value` is none of `point`.
        """
        usual = {k: v for k, v in PRESETS[self.preset].items() if getattr(self, k) is None}
        if self.delta is None:
            usual["delta"] = self._usual_delta()
        elif self.norm == "Linf" and self.delta > 1:
            raise ParameterError(f"delta must be at most 1 in Linf, not {self.delta!r}: pixels are in [0, 1]")
        settings = self.model_copy(update=usual)
        most = settings._most_images()
        if self.test_images is None and self.dataset == "imagenet":  # it has fewer than a preset takes
            fewer = min(settings.test_images or 0, DATASETS["imagenet"].test)
            settings = settings.model_copy(update={"test_images": fewer})
        settings._check_images(most)
        settings._check_point()
        return settings

    @property
    def r(self) -> float:
        """The norm of the pixels as a number: inf or 2."""
        return math.inf if self.norm == "Linf" else 2.0

    def _usual_delta(self) -> float:
        row = DATASETS[self.dataset]
        if self.norm not in row.delta:
            raise ParameterError(f"delta must be given: there is no usual radius for {row.name} in {self.norm}")
        return row.delta[self.norm]

    def _most_images(self) -> dict[str, int]:
        """How many images of each part there are, where that is known."""
        row = DATASETS[self.dataset]
        if self.data == "embedded" and row.robustbench != "cifar10":
            raise ParameterError(f"the embedded images are of CIFAR-10: give the folder of {row.name} as data")
        if is_own(str(self.data)):
            return {}
        if self.data == "embedded":
            return {f"{part}_images": n for part, n in EMBEDDED.items()}
        return {"test_images": row.test}

    def _check_images(self, most: dict[str, int]) -> None:
        row = DATASETS[self.dataset]
        for name, n in most.items():
            if getattr(self, name) > n:
                raise ParameterError(
                    f"{name} is {getattr(self, name)}, and the {self.data!r} data has {n}: ask for fewer"
                    + ", or give the folder of CIFAR-10 as data" * (self.data == "embedded")
                )
        both = (self.train_images or 0) + (self.val_images or 0)
        if self.data != "embedded" and not is_own(str(self.data)) and row.train and both > row.train:
            raise ParameterError(
                f"train_images is {self.train_images}, {self.val_images} images are kept for validation (val_images),"
                f" and {row.name} has {row.train} training images for both together: ask for fewer"
            )

    def _check_point(self) -> None:
        """The value is one that `wdat_core.FinetuneConfig` takes for the point."""
        points: dict[str, tuple[Any, ...]] = OPEN_POINTS | CONTROLS
        if self.point not in points:
            raise ParameterError(f"point must be one of {', '.join(points)}, not {self.point!r}")
        choices, value = points[self.point], self.value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(choices[0], bool):
            fits, wanted = isinstance(value, bool), f"True or False for {self.point}"
        elif isinstance(choices[0], str):
            fits, wanted = value in choices, f"one of {', '.join(choices)}"
        elif self.point == "momentum":
            fits, wanted = number and 0 <= value < 1, "a number, at least 0 and below 1"  # type: ignore[operator]
        elif self.point == "random_start":
            fits, wanted = number and 0 <= value <= 1, "a number, at least 0 and at most 1"  # type: ignore[operator]
        else:
            fits, wanted = number and value >= 0, "a number, at least 0"  # type: ignore[operator]
        if not fits:
            raise ParameterError(f"value must be {wanted}, not {value!r}")

    def grid(self) -> list[tuple[float, float]]:
        """The (tau, eta) of each column, in the paper's order."""
        taus = (0.1, 0.01) if self.tau is None else (self.tau,)
        etas = (0.1, 1.0) if self.eta is None else (self.eta,)
        return [(tau, eta) for eta in etas for tau in taus]


_ALL = [name for name in Settings.model_fields if name not in ("point", "value", "autoattack")]
_WHERE = ["precision", "compiled", "device", "models", "fresh"]
_ATTACK = ["preset", "network", "dataset", "data", "test_images", "norm", "delta", "steps", *_WHERE]
_FOUND = [*_ATTACK[:8], "found_steps", *_WHERE]
PARAMETERS = {  # of the notebooks, by what they do
    "fine-tune": _ALL,
    "fine-tune both ways": [name for name in _ALL if name not in ("tau", "eta", "export")],
    "follow": [name for name in _ALL if name != "export"],
    "change a point": ["point", "value", *(name for name in _ALL if name not in ("consistency", "export"))],
    "attack": _FOUND,
    "attack harder": [*_ATTACK[:5], "autoattack", *_ATTACK[5:]],
    "show attacks": _FOUND[:-1],
    "work out a cost": ["images_per_second", "parameters", "bandwidth", "devices"],  # see cost.py
    "bring your own": ["tau", "epochs", "delta", "steps", "seed"],
    "attack in batches": [*_ATTACK[:4], "train_images", "test_images", "batch_size", *_ATTACK[5:]],
    "estimate": [*_ATTACK[:4], "train_images", "norm", "delta", *_WHERE[:2], "seed", *_WHERE[2:]],
}
NOTEBOOKS = {  # what each does
    "table1": "attack",
    "worst_case": "attack",
    "table2": "attack in batches",
    **{f"table{n}": "fine-tune" for n in GRIDS},
    "table5": "fine-tune both ways",
    "figure7_1": "estimate",
    **{f"figure7_{n}": "follow" for n in (2, 3, 4)},
    "open_points": "change a point",
    "stronger": "attack harder",
    "gallery": "show attacks",
    "own_network": "bring your own",
    "cost": "work out a cost",
}
ONE_COLUMN = ("follow", "change a point")  # of a grid, so that tau and eta have to be given
# Whose network each takes in the preset "paper", where it is one; of Chen and Lee the paper prints no grid.
PAPER_SUBJECTS = {f"table{n}": network for n, (network, _) in GRIDS.items()} | {"table5": "Chen2024Data_WRN_34_10"}
