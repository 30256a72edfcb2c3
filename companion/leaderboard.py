"""Networks ranked by the worst case found, beside their rank by the accuracy that leaderboards rank by.

    python -m companion.leaderboard [--dataset cifar10]... [--here]

prints RobustBench's networks as dataset/norm/name, one a line: `snakemake leaderboard` measures them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from companion import files
from companion.bases import Record
from companion.datasets import DATASETS
from companion.intervals import Estimate, estimate_of, search_of, shares
from companion.kinds import EvaluateRecord
from companion.networks import robustbench_files, zoo
from companion.settings import ParameterError
from companion.words import NOTHING, markdown, plural, short_name
from companion.worst import measured


@dataclass(frozen=True)
class Place:
    """A network's accuracy and rank under one budget of half the radius for all images, and at the radius for each."""

    name: str
    worst: Estimate
    pointwise: Estimate
    rank: int
    former: int


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the greatest; equal values share a rank, and the next one comes after all of them."""
    return [1 + sum(other > value for other in values) for value in values]


def leaderboards(records: Sequence[Record]) -> list[tuple[EvaluateRecord, list[Place]]]:
    """For each set of images, norm, radius and length of the search the networks by rank, with one of their records."""
    groups: dict[Any, list[EvaluateRecord]] = {}
    for record in measured(records):
        threat = record.config.threat
        # A search of another length is another competition.
        key = (record.data.digest, record.data.test, threat.r, threat.delta, search_of(record))
        groups.setdefault(key, []).append(record)
    return [(those[0], _places(those)) for those in groups.values()]


def _places(records: Sequence[EvaluateRecord]) -> list[Place]:
    threat = records[0].config.threat
    worst, pointwise = (
        [estimate_of([shares(record, "test", ball)]) for record in records]
        for ball in (replace(threat, p=2, delta=threat.delta / 2), replace(threat, p=math.inf))
    )
    rank, former = (ranks([one.value for one in found]) for found in (worst, pointwise))
    names = [record.network.name for record in records]
    places = [Place(*row) for row in zip(names, worst, pointwise, rank, former, strict=True)]
    return sorted(places, key=lambda place: (place.rank, place.former))


def leaderboard_table(records: Sequence[Record]) -> Any:
    """A table for each set of images, norm and radius, as Markdown: ranks, what they are by, and the change."""
    from IPython.display import Markdown

    parts = []
    for record, places in leaderboards(records):
        delta = record.config.threat.delta
        near, far = (f"{255 * d:.4g}/255" for d in (delta / 2, delta))
        norm = "Linf" if record.config.threat.r == math.inf else f"L{record.config.threat.r:g}"
        heads = ["rank", "network", f"worst case found, W₂, {near}", f"W∞, {far}", "rank by W∞", "change"]
        rows = [
            [str(p.rank), short_name(p.name), p.worst.text(), p.pointwise.text(), str(p.former), change(p)]
            for p in places
        ]
        about = f"{plural(len(places), 'network')} on {record.data.source}, {record.data.test:,} test images, {norm},"
        about += f" {plural(search_of(record), 'gradient')} an image:"
        parts.append(f"{about}\n\n{markdown(heads, rows).data}")
    return Markdown("\n\n".join(parts) or NOTHING)


def change(place: Place) -> str:
    """By how many ranks a network is better by its worst case than pointwise: "+2", "−1", "0"."""
    return f"{place.former - place.rank:+d}".replace("-", "−").replace("+0", "0")


def entrants(datasets: Sequence[str], here: Path | None = None) -> list[str]:
    """RobustBench's networks for these data sets, in the norms that the project knows: "cifar10/Linf/NAME".

    Args:
        here: a folder of weights; only the networks whose files are all in it.

    Raises:
        ParameterError: a data set is not known.
    """
    if unknown := [name for name in datasets if name not in DATASETS]:
        raise ParameterError(f"unknown data set {unknown[0]!r}: known are {', '.join(DATASETS)}")
    found = [(name, dataset, norm) for dataset in datasets for norm in DATASETS[dataset].delta
             for name in zoo(dataset, norm)]  # fmt: skip
    if here is not None:
        each = {one: [*robustbench_files(one[0], here, *one[1:])] for one in found}
        found = [one for one, paths in each.items() if paths and all(path.exists() for path in paths)]
    return [f"{dataset}/{norm}/{name}" for name, dataset, norm in found]


@click.command(help=__doc__)
@click.option("--dataset", multiple=True, help="May be given many times; all of them by default.")
@click.option("--here", is_flag=True, help="Only networks whose weights are in the folder models.")
def main(dataset: tuple[str, ...], here: bool) -> None:
    try:
        found = entrants(dataset or [*DATASETS], files.ROOT / "models" if here else None)
        if not found:
            raise ParameterError("the folder models has no weights of RobustBench for these data sets")
        click.echo("\n".join(found))
    except ParameterError as error:
        click.echo(f"companion: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
