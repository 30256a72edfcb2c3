"""Contestants in turn, and the rows of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.baselines import UnavailableError
from benchmarks.peers import synchronise
from wdat_core import WdatError

Row = dict[str, Any]
TIME, SPEED = "time relative to the baseline", "times as fast as the baseline"
EXTENT = "multiple of the baseline"


class Lap(NamedTuple):
    seconds: float
    accuracy: float | None = None  # under the attack that was timed


Contestant = Callable[[], Lap]


@dataclass(frozen=True)
class Race:
    laps: dict[str, list[Lap]]  # of each contestant, one a round
    warm_up: dict[str, float]  # seconds of the round before
    reasons: dict[str, str]  # why a contestant dropped out

    def seconds(self, name: str) -> float:
        return statistics.median(lap.seconds for lap in self.laps[name])


def timed(work: Callable[[], Any], device: torch.device) -> Contestant:
    """A lap of this work, which may return the accuracy that it reached."""

    def lap() -> Lap:
        synchronise(device)
        begin = time.perf_counter()
        result = work()
        synchronise(device)
        return Lap(time.perf_counter() - begin, result if isinstance(result, float) else None)

    return lap


def contest(contestants: dict[str, Contestant], rounds: int) -> Race:
    """All in turn: a warm-up, then the rounds, every second one in reverse order. Who cannot go on drops out."""
    race = Race({name: [] for name in contestants}, {}, {})

    def attempt(name: str) -> Lap | None:
        try:
            return contestants[name]()
        except (UnavailableError, WdatError) as error:
            race.reasons[name] = str(error)
        except torch.OutOfMemoryError:
            race.reasons[name] = "out of memory"
        del race.laps[name]
        return None

    for name in contestants:
        if lap := attempt(name):
            race.warm_up[name] = lap.seconds
    for i in range(rounds):
        for name in list(race.laps)[:: -1 if i % 2 else 1]:
            if lap := attempt(name):
                race.laps[name].append(lap)
    return race


def compare(race: Race, name: str, baseline: str, unit: str, *, target: float | None = None, **about: Any) -> Row:
    """The row of one contestant against another. A target is an upper bound of a time, a lower one of a speed."""
    for missing in (name, baseline):
        if missing in race.reasons:
            return row_of(name, baseline, unit, [], target, reason=race.reasons[missing], **about)
    pairs = list(zip(race.laps[name], race.laps[baseline], strict=True))
    ratios = [a.seconds / b.seconds if unit == TIME else b.seconds / a.seconds for a, b in pairs]
    about |= {"accuracy": pairs[-1][0].accuracy, "baseline_accuracy": pairs[-1][1].accuracy}
    return row_of(name, baseline, unit, ratios, target, seconds=round(race.seconds(name), 5), **about)


def row_of(name: str, baseline: str, unit: str, ratios: Sequence[float], target: float | None, **about: Any) -> Row:
    empty = dict.fromkeys(("group", "network", "images", "batch_size", "precision", "seconds", "note", "reason"))
    empty |= dict.fromkeys(("accuracy", "baseline_accuracy"))
    bound = "at least" if unit == SPEED else "at most"
    ratio = round(statistics.median(ratios), 4) if ratios else None
    return {
        **empty,
        "name": name,
        "baseline": baseline,
        "unit": unit,
        "ratio": ratio,
        "low": round(min(ratios), 4) if ratios else None,
        "high": round(max(ratios), 4) if ratios else None,
        "rounds": len(ratios),
        "target": None if target is None else f"{bound} {target:g}",
        "met": None if target is None or ratio is None else ratio >= target if unit == SPEED else ratio <= target,
        **about,
    }
