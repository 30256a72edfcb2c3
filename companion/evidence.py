"""The paper's numbers, and which records belong together."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from companion import cores, files
from companion.bases import Record
from companion.datasets import DATASETS
from companion.files import one_line, verified
from companion.kinds import DivergedRecord, FinetuneRecord, ObjectiveRecord, PretrainRecord, SensitivityRecord
from companion.records import protocol
from companion.settings import CONTROLS, OPEN_POINTS, PAPER_NETWORKS, STAND_INS, ParameterError
from companion.values import accuracy_name
from wdat_core import FinetuneConfig, Threat

DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(FinetuneConfig)}
R = TypeVar("R", bound=Record)
Column = tuple[float, float]  # tau, eta
Setting = tuple[str, float, float]  # perturb, tau, eta
COLUMNS: list[Column] = [(tau, eta) for eta in (0.1, 1.0) for tau in (0.1, 0.01)]  # in the paper's order

STATED: dict[str, Any] = {  # of the method, by the paper
    "beta": 6,
    "gamma": 0,
    "threat": Threat(p=2, r=math.inf, delta=8 / 255),
    "steps": 20,
    "step_ratio": 1,
    "sample": 0.1,
    "fraction": 0.1,
    "upsilon_from": "sample",
}
ALONG_THE_SLOPE = ("slope", "mma")  # objectives that follow the gradient of the distances
PLAIN = {"precision": "float32", "compiled": False}
FULL = {"train": 40_000, "val": 10_000, "test": 10_000, "epochs": 20, "batch_size": 512}  # Section 6 of the paper


def is_current(record: Record) -> bool:
    """Whether a record was made by code that is known to give the same numbers as the present one."""
    slope = isinstance(record, ObjectiveRecord) and record.config.objective in ALONG_THE_SLOPE
    return cores.is_current(record.core, worst_case=slope)


def paper_value(
    table: int, network: str, metric: str, tau: float | None = None, eta: float | None = None
) -> float | None:
    """A number of the paper's tables in per cent, or None where it has none (assets/paper.csv)."""
    for row in paper_rows():
        cell = (int(row["table"]), row["network"], row["metric"])
        at = tuple(float(row[k]) if row[k] else None for k in ("tau", "eta"))
        if cell == (table, network, metric) and at == (tau, eta):
            return float(row["value"])
    return None


def paper_rows() -> list[dict[str, str]]:
    """The rows of assets/paper.csv.

    Raises:
        ParameterError: the file is damaged or missing.
    """
    try:
        return list(csv.DictReader(io.StringIO(verified(files.ASSETS, "paper.csv").decode())))
    except OSError as error:
        raise ParameterError(
            f"the paper's numbers are damaged or missing: restore {files.ASSETS / 'paper.csv'} and SHA256SUMS beside it"
            f" from the repository ({one_line(error)})"
        ) from error


def is_stated(record: Record) -> bool:
    """Whether a record is of the method as the paper states it."""
    return all(getattr(record.config, k, value) == value for k, value in STATED.items())


def is_full(record: Record) -> bool:
    """Whether a record is of the paper's whole protocol: its method and data, as many images and epochs, the batch."""
    if record.data is None or record.data.source != DATASETS["cifar10"].name:
        return False
    if any(getattr(record.config, name, value) != value for name, value in PLAIN.items()):
        return False
    sizes = [(getattr(part, k, None), size) for part in (record.data, record.config) for k, size in FULL.items()]
    return is_stated(record) and all(known in (None, size) for known, size in sizes)


def deviations(record: FinetuneRecord | DivergedRecord) -> dict[str, Any]:
    """What of the open points, and of the controls, a fine-tuning record has otherwise than by default."""
    attacker = "pointwise" if record.config.threat.p == math.inf else "distributional"
    found = {point: getattr(record.config, point) for point in OPEN_POINTS} | {"attacker": attacker}
    return {point: found[point] for point, values in (OPEN_POINTS | CONTROLS).items() if found[point] != values[0]}


def alike(records: Sequence[R], *but: str) -> list[list[R]]:
    """Groups of one protocol: they differ in tau, eta, the seed, and in the fields named.

    Args:
        but: fields of FinetuneConfig, "p" of its threat, or "network".
    """
    groups: dict[str, list[R]] = {}
    for record in records:
        groups.setdefault(protocol(_without(record, but)), []).append(record)
    return list(groups.values())


def _without(record: R, but: Sequence[str]) -> R:
    """A record in which the fields named are the same for all."""
    update: dict[str, Any] = {"network": None} if "network" in but else {}
    if same := {name: DEFAULTS[name] for name in but if name in DEFAULTS}:
        update["config"] = dataclasses.replace(record.config, **same)
    if "p" in but:
        threat = dataclasses.replace(record.config.threat, p=2)
        update["config"] = dataclasses.replace(update.get("config", record.config), threat=threat)
    return record.model_copy(update=update)


def studies(records: Sequence[FinetuneRecord]) -> list[list[FinetuneRecord]]:
    """Fine-tuning records that differ in perturbation, tau, eta and seed alone, a list for each such study.

    Those of the paper's whole protocol come first, then those of more training before those of less; of equal ones the
    paper's networks, then the stand-ins in the order of `STAND_INS`.
    """
    return sorted(alike(records, "perturb"), key=lambda study: _order(study[0]))


def grids(perturb: str, records: Sequence[FinetuneRecord]) -> list[list[FinetuneRecord]]:
    """The fine-tuning records of one perturbation without a deviation, a list for each protocol, as `studies`."""
    return studies([r for r in records if r.config.perturb == perturb and not deviations(r)])


def _order(record: FinetuneRecord) -> tuple[bool, int, int]:
    names = [*PAPER_NETWORKS, *STAND_INS, record.network.name]
    return not is_full(record), -training_of(record), names.index(record.network.name)


def pretrained_with(record: PretrainRecord) -> str:
    """The objective of a pre-training: "trades" or "pgd". The first trainer called it a method."""
    return getattr(record.config, "objective", None) or getattr(record.config, "method", None) or "trades"


def training_of(record: FinetuneRecord) -> int:
    """How many images a network saw in training, each as often as there are epochs."""
    return (record.data.train or 0) * int(record.config.epochs)


def column_of(record: FinetuneRecord | DivergedRecord) -> Column:
    """Tau and eta of a fine-tuning record."""
    return record.config.tau, record.config.eta


def columns_of(records: Sequence[FinetuneRecord]) -> dict[Column, list[FinetuneRecord]]:
    """The records of each (tau, eta), in the paper's order."""
    columns: dict[Column, list[FinetuneRecord]] = {}
    for record in sorted(records, key=lambda r: (r.config.eta, -r.config.tau, r.config.seed)):
        columns.setdefault(column_of(record), []).append(record)
    return columns


def by_setting(study: Sequence[FinetuneRecord]) -> dict[Setting, list[FinetuneRecord]]:
    """The records of each (perturb, tau, eta), one a seed."""
    by_perturb: dict[str, list[FinetuneRecord]] = {}
    for record in study:
        by_perturb.setdefault(record.config.perturb, []).append(record)
    return {(how, *cell): seeds for how, those in by_perturb.items() for cell, seeds in columns_of(those).items()}


def setting_of(record: FinetuneRecord) -> Setting:
    """Perturbation, tau and eta of a fine-tuning record."""
    return record.config.perturb, *column_of(record)


def best_setting(study: Sequence[FinetuneRecord]) -> list[FinetuneRecord]:
    """The records of the (perturb, tau, eta) that did best under W_2 on validation images, in the mean over seeds."""
    return max(by_setting(study).values(), key=on_validation)


def on_validation(records: Sequence[FinetuneRecord]) -> float:
    """The accuracy under the training's threat on validation images of the epochs that were kept, mean over records."""
    kept = [record.history.epochs[record.history.best - 1] for record in records]
    return sum(row[accuracy_name(r.config.threat)] for r, row in zip(records, kept, strict=True)) / len(kept)


def unusual(record: Record) -> str:
    """What in a configuration is not as by default, which is the paper's where it says; empty where nothing is."""
    own = ("perturb", "tau", "eta", "seed", "epochs", "threat", "samples", "fraction")
    threat = record.config.threat
    parts = [] if math.isclose(threat.delta, 8 / 255) else [f"δ = {255 * threat.delta:.4g}/255"]
    parts += [] if threat.r == math.inf else [f"l_{threat.r:g}"]
    parts += ["trained against the pointwise attack"] * (record.kind == "finetune" and threat.p == math.inf)
    parts += [f"`{k}={v}`" for k, v in vars(record.config).items() if k not in own and v != DEFAULTS.get(k, v)]
    return "".join(f", {part}" for part in parts)


ALONG = {  # what Figures 7.2 to 7.4 show of each epoch: a record's key, and what it is; the second is drawn dashed
    "w_2": {"test_w_2": "test", "w_2": "validation"},
    "w_inf": {"test_w_inf": "test", "val_w_inf": "validation"},
    "upsilon": {"test_upsilon": "test", "train_upsilon": "training"},
}


def along(record: FinetuneRecord) -> list[dict[str, float]]:
    """The rows of a record's curves, from epoch 0, the network before fine-tuning."""
    assert record.history.start is not None, "ask has_curves first"
    return [record.history.start, *record.history.epochs]


def has_curves(record: FinetuneRecord) -> bool:
    """Whether accuracies and Upsilon were measured after each epoch."""
    return bool(record.history.start)


def with_curves(records: Sequence[FinetuneRecord], like: Sequence[FinetuneRecord]) -> list[FinetuneRecord]:
    """Those whose curves were measured, at the tau and eta of other records."""
    columns = {column_of(r) for r in like}
    return [r for r in records if has_curves(r) and column_of(r) in columns]


def relative_errors(record: SensitivityRecord) -> list[float]:
    """|estimate / reference - 1| of each sample of a record of kind "sensitivity"."""
    whole = max(record.reference, sys.float_info.min)  # 0 where no image is classified correctly
    return [abs(estimate - record.reference) / whole for estimate in record.estimates]
