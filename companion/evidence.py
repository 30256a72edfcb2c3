"""The paper's numbers beside the records: estimates, intervals, agreement."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from companion import files
from companion.files import one_line, verified
from companion.records import Record, images_of, protocol, unpack
from companion.settings import CONTROLS, GRIDS, METRICS, OPEN_POINTS, PAPER_NETWORKS, ParameterError

STATED: dict[str, Any] = {  # of the method, by the paper
    "beta": 6,
    "gamma": 0,
    "threat": {"p": 2, "r": "inf", "delta": 8 / 255},
    "steps": 20,
    "step_ratio": 1,
    "sample": 0.1,
    "fraction": 0.1,
    "upsilon_from": "sample",
}
FULL = {"train": 40_000, "val": 10_000, "test": 10_000, "epochs": 20, "batch_size": 512}  # Section 6 of the paper
PARTS = {"test": "test images", "train": "training images"}


@dataclass(frozen=True)
class Estimate:
    """An accuracy or a change of accuracy in per cent, with half the width of its 95 % interval (None: not known)."""

    value: float
    half: float | None = None

    def text(self, signed: bool = False) -> str:
        value = f"{self.value:{'+' if signed else ''}z.2f}"
        return value if self.half is None else f"{value}\u00a0±\u00a0{self.half:.2f}"  # not to be broken


def span(values: Sequence[float]) -> str:
    """Signed numbers in points, from the lowest to the highest; one alone where there is one."""
    return " to ".join(f"{value:+z.2f}" for value in (min(values), max(values))[: len(values)])


def paper_value(
    table: int, network: str, metric: str, tau: float | None = None, eta: float | None = None
) -> float | None:
    """A number of the paper's tables in per cent, or None where it has none (assets/paper.csv)."""
    for row in _paper_rows():
        cell = (int(row["table"]), row["network"], row["metric"])
        at = tuple(float(row[k]) if row[k] else None for k in ("tau", "eta"))
        if cell == (table, network, metric) and at == (tau, eta):
            return float(row["value"])
    return None


def _paper_rows() -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(verified(files.ASSETS, "paper.csv").decode())))
    except OSError as error:
        raise ParameterError(
            f"the paper's numbers are damaged or missing: restore {files.ASSETS / 'paper.csv'} and SHA256SUMS beside it"
            f" from the repository ({one_line(error)})"
        ) from error


def accuracy(records: Sequence[Record], when: str, metric: str) -> Estimate:
    """Mean over records that differ in the seed alone, with the interval of sampling test images."""
    return estimate_of([bits(r, when, metric) for r in records])


def change(records: Sequence[Record], metric: str) -> Estimate:
    """Accuracy after minus before on the same images, mean over seeds, with the interval of the paired differences."""
    return estimate_of([bits(r, "after", metric) - bits(r, "before", metric) for r in records])


def bits(record: Record, when: str, metric: str) -> Any:
    """Whether each image is classified correctly, a numpy array (n,) of 0 and 1."""
    return unpack(record["correct"][when][metric], images_of(record, when))


def estimate_of(per_seed: Sequence[Any]) -> Estimate:
    """The mean in per cent of what each image contributes, arrays (n,) of the seeds, and the interval over images."""
    import numpy as np

    values = 100 * np.mean(per_seed, axis=0)
    half = float(1.96 * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), half)


def is_stated(record: Record) -> bool:
    """Whether a record is of the method as the paper states it."""
    return all(record["config"].get(k, value) == value for k, value in STATED.items())


def is_full(record: Record) -> bool:
    """Whether a record is of the paper's whole protocol: its method, as many images and epochs, as large a batch."""
    sizes = record["data"] | record["config"]
    return is_stated(record) and all(known == FULL[k] for k, known in sizes.items() if k in FULL)


def changed(record: Record) -> dict[str, Any]:
    """What of the open points, and of the controls, a fine-tuning record has otherwise than by default."""
    config = record["config"] | {
        "attacker": "pointwise" if record["config"]["threat"]["p"] == "inf" else "distributional"
    }
    usual = {point: values[0] for point, values in (OPEN_POINTS | CONTROLS).items()}
    return {k: config[k] for k, value in usual.items() if config.get(k, value) != value}


def columns_of(records: Sequence[Record]) -> dict[tuple[float, float], list[Record]]:
    """The records of each (tau, eta), in the paper's order."""
    columns: dict[tuple[float, float], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["config"]["eta"], -r["config"]["tau"], r["config"]["seed"])):
        columns.setdefault((record["config"]["tau"], record["config"]["eta"]), []).append(record)
    return columns


def unusual(record: Record) -> str:
    """What in a configuration is not as by default, which is the paper's where it says; empty where nothing is."""
    import wdat_core

    usual = {f.name: f.default for f in dataclasses.fields(wdat_core.FinetuneConfig)}
    own = ("perturb", "tau", "eta", "seed", "epochs", "threat", "samples", "fraction")
    delta = record["config"]["threat"]["delta"]
    parts = [] if math.isclose(delta, 8 / 255) else [f"δ = {255 * delta:.4g}/255"]
    parts += ["trained against the pointwise attack"] * ("attacker" in changed(record))
    parts += [f"`{k}={v}`" for k, v in record["config"].items() if k not in own and v != usual.get(k, v)]
    return "".join(f", {part}" for part in parts)


def of_networks(table: int, part: str, records: Sequence[Record], recorded: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of Table 1 or 2: the paper's five networks, what is recorded here, and this run.

    Each row has "network", "source" ("paper", "recorded here", "this run"), "images" (how many, of what; None where the
    paper does not say), "upsilon" (of those images, or None) and "cells", an Estimate or None for each metric.

    Args:
        part: the images of the measured rows, "test" or "train".
        records, recorded: of kind "evaluate"; those of another part are left out.
    """
    metrics = list(METRICS) if table == 1 else ["budget", "w_inf", "w_2"]
    rows = []
    for name in PAPER_NETWORKS:
        values = {m: paper_value(table, name, m) for m in metrics}
        cells = {m: None if v is None else Estimate(v) for m, v in values.items()}
        rows.append({"network": name, "source": "paper", "images": None, "upsilon": None, "cells": cells})
    for source, those in (("recorded here", recorded), ("this run", records)):
        for r in (r for r in those if part in r["metrics"]):
            cells = {m: accuracy([r], part, m) for m in metrics}
            images = f"{images_of(r, part):,} {PARTS[part]}, {r['data']['source']}{unusual(r)}"
            row = {"network": r["network"]["name"], "source": source, "images": images}
            rows.append({**row, "upsilon": r["upsilon"], "cells": cells})
    return rows


ALONG = {  # what Figures 7.2 to 7.4 show of each epoch: a record's key, and what it is; the second is drawn dashed
    "w_2": {"test_w_2": "test", "w_2": "validation"},
    "w_inf": {"test_w_inf": "test", "val_w_inf": "validation"},
    "upsilon": {"test_upsilon": "test", "train_upsilon": "training"},
}


def along(record: Record) -> list[dict[str, float]]:
    """The rows of a record's curves, from epoch 0, the network before fine-tuning."""
    return [record["history"]["start"], *record["history"]["epochs"]]


def with_curves(records: Sequence[Record], like: Sequence[Record]) -> list[Record]:
    """Those whose curves were measured, at the tau and eta of other records."""
    columns = {(r["config"]["tau"], r["config"]["eta"]) for r in like}
    return [r for r in records if "start" in r["history"] and (r["config"]["tau"], r["config"]["eta"]) in columns]


def relative_errors(record: Record) -> list[float]:
    """|estimate / reference - 1| of each sample of a record of kind "sensitivity"."""
    whole = max(record["reference"], sys.float_info.min)  # 0 where no image is classified correctly
    return [abs(estimate - record["reference"]) / whole for estimate in record["estimates"]]


def studies(records: Sequence[Record]) -> list[list[Record]]:
    """Fine-tuning records that differ in perturbation, tau, eta and seed alone, a list for each such study."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        config = {k: v for k, v in record["config"].items() if k != "perturb"}
        groups.setdefault(protocol({**record, "config": config}), []).append(record)
    return list(groups.values())


def grids(perturb: str, records: Sequence[Record]) -> list[list[Record]]:
    """The fine-tuning records of one perturbation without a changed open point, a list for each protocol.

    Those of the paper's whole protocol come first, then those of more training before those of less.
    """
    those = [r for r in records if r["config"]["perturb"] == perturb and not changed(r)]
    groups = studies(those)
    return sorted(groups, key=lambda g: (not is_full(g[0]), -g[0]["data"]["train"] * g[0]["config"]["epochs"]))


def best_setting(study: Sequence[Record]) -> list[Record]:
    """The records of the (perturb, tau, eta) that did best under W_2 on validation images, in the mean over seeds."""
    return max(settings_of(study).values(), key=on_validation)


def settings_of(study: Sequence[Record]) -> dict[tuple[str, float, float], list[Record]]:
    """The records of each (perturb, tau, eta), one a seed."""
    by_perturb: dict[str, list[Record]] = {}
    for record in study:
        by_perturb.setdefault(record["config"]["perturb"], []).append(record)
    return {(how, *cell): seeds for how, those in by_perturb.items() for cell, seeds in columns_of(those).items()}


def on_validation(records: Sequence[Record]) -> float:
    """The accuracy under W_2 on validation images of the epochs that were kept, mean over records."""
    kept = [record["history"]["epochs"][record["history"]["best"] - 1]["w_2"] for record in records]
    return sum(kept) / len(kept)


def table_rows(table: int | None, records: Sequence[Record], recorded: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of a fine-tuning table: for each metric the paper, what is recorded here, and this run.

    Each row has "metric", "source" ("paper", "recorded here", "this run"), "network", "before" (an Estimate) and, for
    each (tau, eta) of the run (of the recorded ones without a run), a pair of Estimates (accuracy, change), or None
    where there is no evidence. Without a table there is no paper, and what there are no records of has no rows.
    """
    grid = list(columns_of(records or recorded))
    rows = []
    for metric in METRICS:
        cells: dict[tuple[float, float], tuple[Estimate, Estimate] | None] = {}
        if table:
            name = GRIDS[table][0]
            base = paper_value(1, name, metric)
            for tau, eta in grid:
                value = paper_value(table, name, metric, tau, eta)
                known = value is not None and base is not None
                cells[tau, eta] = (Estimate(value), Estimate(value - base)) if known else None  # type: ignore[arg-type,operator]
            before = None if base is None else Estimate(base)
            rows.append({"metric": metric, "source": "paper", "network": name, "before": before, "cells": cells})
        for source, those in (("recorded here", recorded), ("this run", records)):
            if not those and (source == "this run" or not table):
                continue
            by_column = columns_of(those)
            cells = {
                column: (accuracy(by_column[column], "after", metric), change(by_column[column], metric))
                if column in by_column
                else None
                for column in grid
            }
            # Records of other seeds share the baseline: one is enough.
            before = accuracy(those[:1], "before", metric) if those else None
            network = those[0]["network"]["name"] if those else records[0]["network"]["name"]
            rows.append({"metric": metric, "source": source, "network": network, "before": before, "cells": cells})
    return rows


def agreement_of_networks(part: str, records: Sequence[Record], recorded: Sequence[Record], *, within: float) -> Any:
    """As `agreement`, for records of kind "evaluate"; `within` percentage points.

    Raises:
        AssertionError: an accuracy differs by more.
    """
    known = {protocol(r): r for r in recorded}
    compared = [r for r in records if protocol(r) in known]
    for r in compared:
        for metric in r["metrics"][part]:
            here, there = (accuracy([one], part, metric).value for one in (r, known[protocol(r)]))
            assert abs(here - there) <= within, (
                f"{r['network']['name']}, {metric} on {part} images: {here:.2f} % in this run, {there:.2f} % recorded,"
                f" further apart than {within:g} points"
            )
    return _agrees(
        len(compared),
        f"On {part} images this run agrees with the recorded one for {len(compared)} of {len(records)} networks, within"
        f" {within:g} points. (Another machine rounds otherwise, which moves single images at the decision boundary.)",
    )


def agreement_of_estimates(records: Sequence[Record], recorded: Sequence[Record], *, within: float) -> Any:
    """As `agreement`, for records of kind "sensitivity"; `within` is relative.

    Raises:
        AssertionError: Upsilon of the whole set or of a sample differs by more.
    """
    known = {(protocol(r), r["config"]["seed"]): r for r in recorded}
    compared = [r for r in records if (protocol(r), r["config"]["seed"]) in known]
    for r in compared:
        there = known[protocol(r), r["config"]["seed"]]
        pairs = zip([r["reference"], *r["estimates"]], [there["reference"], *there["estimates"]], strict=True)
        for here, other in pairs:
            assert abs(here / other - 1) <= within, (
                f"Upsilon of {r['network']['name']}: {here:g} in this run, {other:g} recorded, further apart than"
                f" {100 * within:g} %"
            )
    return _agrees(
        len(compared),
        f"This run agrees with the recorded one for {len(compared)} of {len(records)} networks, within"
        f" {100 * within:g} %.",
    )


def agreement(records: Sequence[Record], recorded: Sequence[Record], *, before: float, after: float) -> Any:
    """Whether this run agrees with the recorded ones, as a line of Markdown; tolerances in percentage points.

    Another machine rounds otherwise. Without training that moves single images at the decision boundary (`before`);
    training amplifies it as another seed would (`after`).

    Raises:
        AssertionError: an accuracy differs by more.
    """
    by_column = columns_of(recorded)
    compared = [r for r in records if (r["config"]["tau"], r["config"]["eta"]) in by_column]
    for r in compared:
        column = (r["config"]["tau"], r["config"]["eta"])
        for when, tolerance in (("before", before), ("after", after)):
            for metric in METRICS:
                here, there = (accuracy(those, when, metric).value for those in ([r], by_column[column]))
                assert abs(here - there) <= tolerance, (
                    f"{metric} {when} fine-tuning at tau {column[0]:g}, eta {column[1]:g}: {here:.2f} % in this run,"
                    f" {there:.2f} % recorded, further apart than {tolerance:g} points"
                )
    return _agrees(
        len(compared),
        f"This run agrees with the recorded ones in {len(compared)} of {len(records)} columns: within {before:g}"
        f" points before fine-tuning and {after:g} points after it."
        " (Another machine rounds otherwise, which training amplifies.)",
    )


def _agrees(compared: int, line: str) -> Any:
    from IPython.display import Markdown

    nothing = "Nothing is recorded for these parameters: there is nothing to compare this run with."
    return Markdown(line if compared else nothing)
