"""Gives the record of an exported network the distances of its worst case, where the run did not measure them.

    python -m companion.complete EXPORT... --data data --found-steps 100

The record goes to runs/, as that of a new run would. Its accuracies stay as they are, and are measured again first: a
network or images that are others are refused. The distances say which code found them, and where.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from companion import files
from companion.bench import bench
from companion.datasets import DATASETS
from companion.files import from_root
from companion.records import make_record, parse_record, record_name, write_record
from companion.runs import found, scores
from companion.settings import FINETUNED, ParameterError, Settings
from companion.terminal import arguments_of

WITHIN = 0.002  # of an accuracy as a fraction: another machine rounds otherwise


def complete(export: str, data: str, models: str, steps: int, before: str | None = None) -> Path:
    """Writes the record of an export with distances before and after, and returns its path.

    Args:
        export: the folder that `export` made.
        data: the folder of the images, or "embedded".
        models: the folder of published weights.
        steps: of the search.
        before: the network that was fine-tuned, if the record does not name one that can be loaded: itself an export.

    Raises:
        ParameterError: as `bench`; or there is no export, or it began from one that is not given; or the images are
            others than those of the record, or the accuracies differ.
    """
    path = from_root(export) / "record.json"
    if not path.is_file():
        raise ParameterError(f"{export} is not an export of this project: it has no record.json")
    record = _kept(parse_record(path.read_bytes()))
    start = before or record.network.name
    if start.endswith(FINETUNED):
        raise ParameterError(f"{export} began from an export, {start}: give its folder with --before")
    threat = record.config.threat
    sizes = {f"{part}_images": getattr(record.data, part) for part in ("train", "val", "test")}
    usual: dict[str, Any] = {
        "data": data,
        "models": models,
        "steps": record.config.steps,
        "found_steps": steps,
        "delta": threat.delta,
        "precision": record.config.precision,
        "compiled": record.config.compiled,
    }
    usual["dataset"] = next((key for key, row in DATASETS.items() if row.name == record.data.source), "cifar10")
    norm: Any = "Linf" if threat.r == math.inf else "L2"
    settings = [Settings(**usual, **sizes, norm=norm, network=n).resolved() for n in (start, export)]
    packed: dict[str, str] = {}
    part: dict[str, Any] = {}
    for when, one in zip(("before", "after"), settings, strict=True):
        on = bench(one)
        if on.data.digest("train", "val", "test") != record.data.digest:
            raise ParameterError(f"the images in {data} are not those of the record in {export}")
        for metric, bits in scores(on, on.data.test).items():
            here, there = bits.sum().item() / len(bits), record.metrics[when][metric]
            if abs(here - there) > WITHIN:
                raise ParameterError(f"{export}, {metric} {when}: {here:.4f} here and {there:.4f} in the record")
        part = found(on, steps, when, **packed)
        packed = part["boundary"]["distance"]
    return write_record(make_record(record.stored() | part), files.RUNS)


def _kept(record: Any) -> Any:
    """The record in results/ of the same run to the bit, which may have curves too; else the one that is given."""
    try:
        known: Any = parse_record((files.RESULTS / record_name(record)).read_bytes())
    except (OSError, ValueError):
        return record
    return known if (known.metrics, known.correct) == (record.metrics, record.correct) else record


def main(arguments: list[str]) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("exports", nargs="+", help="folders of exports")
    parser.add_argument("--found-steps", type=int, default=100)
    parser.add_argument("--before", help="folder of the export that was fine-tuned, if it was one")
    given = parser.parse_args(arguments)
    if given.found_steps < 1:
        sys.exit("complete: --found-steps must be at least 1: the distances are what it adds")
    for export in given.exports:
        try:
            print(complete(export, given.data, given.models, given.found_steps, given.before))
        except (ParameterError, OSError, ValueError) as error:
            sys.exit(f"complete: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
