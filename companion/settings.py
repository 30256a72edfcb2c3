"""From a notebook's parameters to one frozen, checked configuration.

This module imports the standard library alone: parameters are checked before torch is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = {"clean": "Clean", "w_inf": "W∞", "w_2": "W₂"}
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


class ParameterError(ValueError):
    """Something the user of a notebook can put right; a notebook shows the message, what and how, and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


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
    },
}


@dataclass(frozen=True)
class Settings:
    """The parameters of all notebooks.

    None takes the preset's value where it has one; for tau and eta both of the paper's; for the others, none.
    """

    preset: str = "demo"
    tau: float | None = None
    eta: float | None = None
    network: str | None = None
    data: str | None = None
    train_images: int | None = None
    val_images: int | None = None
    test_images: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    delta: float = 8 / 255
    beta: float = 6.0
    steps: int = 20
    consistency: str = "ce_detached"
    upsilon_from: str = "sample"
    precision: str = "float32"
    compiled: bool = False
    seed: int = 0
    device: str = "auto"
    models: str = "models"
    stop_after: float | None = None
    export: str | None = None
    fresh: bool = False
    point: str = "noise"
    value: Any = 0.05
    autoattack: int = 0

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any], notebook: str) -> Settings:
        """The settings that the variables of a notebook's namespace give, checked, with the preset filled in.

        Args:
            namespace: the notebook's `globals()`.
            notebook: its name, a key of `NOTEBOOKS`.

        Raises:
            ParameterError: a variable is no parameter of this notebook, has the wrong type, or an impossible value.
        """
        does = NOTEBOOKS[notebook]
        known = PARAMETERS[does]
        # In a live notebook the cell is run again when the names of all later cells are there as well.
        again = namespace.get("_parameters_were_checked", False)
        given = {}
        for name, value in namespace.items():
            if name.startswith("_") or name in ("In", "Out") or isinstance(value, types.ModuleType) or callable(value):
                continue
            if name in known:
                given[name] = value
            elif not again:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else "."
                raise ParameterError(f"unknown parameter {name!r}{hint} Known are {', '.join(known)}")
        namespace["_parameters_were_checked"] = True
        if given.get("preset") == "paper" and given.get("network") is None and notebook in PAPER_SUBJECTS:
            given["network"] = PAPER_SUBJECTS[notebook]
        settings = cls(**given).resolved()
        if does in ONE_COLUMN:
            for name in ("tau", "eta"):
                _check(name, getattr(settings, name), float)
        if settings.fresh and settings.stop_after is not None:
            raise ParameterError("fresh=True with stop_after would never end: each call starts from the beginning")
        return settings

    @classmethod
    def each_from_notebook(cls, namespace: dict[str, Any], notebook: str) -> list[Settings]:
        """As `from_notebook`, for a notebook about several networks: one for each, or for the one that is given."""
        settings = cls.from_notebook(namespace, notebook)
        if namespace.get("network") is not None:
            return [settings]
        every = PAPER_NETWORKS if settings.preset == "paper" else STAND_INS
        return [dataclasses.replace(settings, network=name) for name in every]

    def resolved(self) -> Settings:
        """Checked, and with the preset's values where there was None."""
        _check("preset", self.preset, str, choices=tuple(PRESETS))
        preset = {k: v for k, v in PRESETS[self.preset].items() if getattr(self, k) is None}
        settings = dataclasses.replace(self, **preset)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("network", "data", "device", "models"):
            _check(name, getattr(self, name), str)
        if self.export is not None:
            _check("export", self.export, str)
        if self.stop_after is not None:
            _check("stop_after", self.stop_after, float, above=0)
        if self.tau is not None:
            _check("tau", self.tau, float, above=0)
        if self.eta is not None:
            _check("eta", self.eta, float, above=0, at_most=1)
        _check("delta", self.delta, float, above=0, at_most=1)
        _check("beta", self.beta, float, above=-math.ulp(0))
        for name in ("train_images", "val_images", "test_images", "epochs", "batch_size", "steps"):
            _check(name, getattr(self, name), int, above=0)
        _check("seed", self.seed, int, above=-1, at_most=2**63 - 1)
        _check("consistency", self.consistency, str, choices=("ce_detached", "ce", "kl"))
        _check("upsilon_from", self.upsilon_from, str, choices=("sample", "batch"))
        _check("precision", self.precision, str, choices=("float32", "bfloat16"))
        _check("autoattack", self.autoattack, int, above=-1)
        self._check_point()
        for name in ("compiled", "fresh"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name} must be True or False, not {getattr(self, name)!r}")
        most = (
            {"train_images": 4000, "val_images": 1000, "test_images": 1000}
            if self.data == "embedded"
            else {"test_images": 10_000}
        )
        for name, limit in most.items():
            if getattr(self, name) > limit:
                raise ParameterError(
                    f"{name} is {getattr(self, name)}, and the {self.data!r} data has {limit}:"
                    " ask for fewer, or give the folder of CIFAR-10 as data"
                )
        if self.data != "embedded" and self.train_images + self.val_images > 50_000:  # type: ignore[operator]
            raise ParameterError(
                f"train_images is {self.train_images}, {self.val_images} images are kept for validation (val_images),"
                " and CIFAR-10 has 50000 training images for both together: ask for fewer"
            )

    def _check_point(self) -> None:
        points: dict[str, tuple[Any, ...]] = OPEN_POINTS | CONTROLS
        _check("point", self.point, str, choices=tuple(points))
        usual = points[self.point][0]
        if isinstance(usual, str):
            _check("value", self.value, str, choices=points[self.point])
        elif isinstance(usual, bool):
            if not isinstance(self.value, bool):
                raise ParameterError(f"value must be True or False for {self.point}, not {self.value!r}")
        else:
            limit = {"random_start": 1.0, "momentum": math.nextafter(1, 0)}.get(self.point, math.inf)
            _check("value", self.value, float, above=-math.ulp(0), at_most=limit)

    def grid(self) -> list[tuple[float, float]]:
        """The (tau, eta) of each column, in the paper's order."""
        taus = (0.1, 0.01) if self.tau is None else (self.tau,)
        etas = (0.1, 1.0) if self.eta is None else (self.eta,)
        return [(float(tau), float(eta)) for eta in etas for tau in taus]


_ALL = [f.name for f in dataclasses.fields(Settings) if f.name not in ("point", "value", "autoattack")]
_ATTACK = [
    "preset",
    "network",
    "data",
    "test_images",
    "delta",
    "steps",
    "precision",
    "compiled",
    "device",
    "models",
    "fresh",
]
PARAMETERS = {  # of the notebooks, by what they do
    "fine-tune": _ALL,
    "fine-tune both ways": [name for name in _ALL if name not in ("tau", "eta", "export")],
    "follow": [name for name in _ALL if name != "export"],
    "change a point": ["point", "value", *(name for name in _ALL if name not in ("consistency", "export"))],
    "attack": _ATTACK,
    "attack harder": [*_ATTACK[:4], "autoattack", *_ATTACK[4:]],
    "show attacks": _ATTACK[:-1],
    "bring your own": ["tau", "epochs", "delta", "steps", "seed"],
    "attack in batches": [*_ATTACK[:3], "train_images", "test_images", "batch_size", *_ATTACK[4:]],
    "estimate": [
        "preset",
        "network",
        "data",
        "train_images",
        "delta",
        "precision",
        "compiled",
        "seed",
        "device",
        "models",
        "fresh",
    ],
}


NOTEBOOKS = {  # what each does
    "table1": "attack",
    "table2": "attack in batches",
    **{f"table{n}": "fine-tune" for n in GRIDS},
    "table5": "fine-tune both ways",
    "figure7_1": "estimate",
    **{f"figure7_{n}": "follow" for n in (2, 3, 4)},
    "open_points": "change a point",
    "stronger": "attack harder",
    "gallery": "show attacks",
    "own_network": "bring your own",
}
ONE_COLUMN = ("follow", "change a point")  # of a grid, so that tau and eta have to be given
# Whose network each takes in the preset "paper", where it is one; of Chen and Lee the paper prints no grid.
PAPER_SUBJECTS = {f"table{n}": network for n, (network, _) in GRIDS.items()} | {"table5": "Chen2024Data_WRN_34_10"}


def _check(
    name: str,
    value: Any,
    kind: Any,
    *,
    above: float = -math.inf,
    at_most: float = math.inf,
    choices: Sequence[str] = (),
) -> None:
    word = {int: "a whole number", float: "a number", str: "a text"}[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ParameterError(f"{name} must be {word}, not {value!r}")
    if choices and value not in choices:
        raise ParameterError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if kind is not str and not (above < value <= at_most and math.isfinite(value)):
        low = "at least 0" if above < 0 else f"above {above:g}"
        raise ParameterError(f"{name} must be {low}{f' and at most {at_most:g}' * (at_most < math.inf)}, not {value!r}")
