"""Contestants that run lap by lap in a random order, and the rows of their ratios, each with a 95 % interval."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.baselines import Subject, UnavailableError
from benchmarks.peers import synchronise
from wdat_core import WdatError

Row = dict[str, Any]
TIME, SPEED = "time relative to the baseline", "times as fast as the baseline"
EXTENT, POINTS = "multiple of the baseline", "points above the baseline"  # counted: they have no interval
CLOSE, ROUGH = 0.02, 0.1  # half an interval over its ratio: of an overhead, and of everything else
LEAST = 6  # rounds: with fewer, the least and the greatest ratio are no 95 % interval
LOOKS = 1.5  # the interval is looked at after 6 rounds, and again whenever there are half as many more


class Lap(NamedTuple):
    """The time of one lap on both clocks, in seconds, and the accuracy under the attack that was timed."""

    wall: float
    cpu: float  # of the process, all its threads
    accuracy: float | None = None


Contestant = Callable[[], Lap]


class Estimate(NamedTuple):
    ratio: float
    low: float
    high: float


def estimate(ratios: Sequence[float]) -> Estimate:
    """The median of the rounds' ratios with a 95 % interval of the true one; at least 6 ratios.

    Both laps of a ratio ran within the same round, in an order that was drawn: what slows the machine down for longer
    slows both, and a disturbance hits either as often. So each ratio is as likely below the true one as above it, and
    how many of n are below is binomial, whatever the noise looks like. The interval goes from the k-th least ratio to
    the k-th greatest, k as large as 95 % allow. One lap of twice the time moves a mean; here it is one ratio more on
    one side.
    """
    n, ordered = len(ratios), sorted(ratios)
    k, below = 0, 0.5**n  # below: the probability that at most k of n ratios are less than the true one
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    if k == 0:
        raise ValueError(f"an interval needs {LEAST} rounds or more, not {n}")
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def clock_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "wall"


@dataclass(frozen=True)
class Race:
    """What `contest` saw."""

    clock: str  # "cpu" or "wall": the one that decides
    laps: dict[str, list[Lap]] = field(default_factory=dict)  # of each contestant, one a round
    warm_up: dict[str, float] = field(default_factory=dict)  # seconds of the round before, on the wall
    reasons: dict[str, str] = field(default_factory=dict)  # why a contestant dropped out

    def seconds(self, name: str, clock: str | None = None) -> float:
        return statistics.median(getattr(lap, clock or self.clock) for lap in self.laps[name])

    def ratios(self, name: str, baseline: str, clock: str | None = None) -> list[float]:
        """Of the time of `name` to that of `baseline` in the same round."""
        pairs = zip(self.laps[name], self.laps[baseline], strict=True)
        return [getattr(a, clock or self.clock) / getattr(b, clock or self.clock) for a, b in pairs]


def timed(work: Callable[[], Any], device: torch.device) -> Contestant:
    """A lap of this work, which may return the accuracy that it reached."""

    def lap() -> Lap:
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        synchronise(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Lap(wall, cpu, result if isinstance(result, float) else None)

    return lap


def contest(
    contestants: dict[str, Contestant],
    pairs: Sequence[tuple[str, str]],
    device: torch.device,
    *,
    within: float = CLOSE,
    rounds: int = 40,
    seed: int = 0,
) -> Race:
    """A warm-up, then rounds in which every contestant runs one lap, in an order drawn anew for each round.

    It ends when every pair's interval reaches no further than `within` times its ratio to either side, or after
    `rounds`. The interval is looked at after 6, 9, 14, 21 and 32 rounds only: who looks at every round stops at a
    lucky one, and the interval then holds the true ratio less often. Who cannot go on drops out.

    On a CPU the process's own time decides, which other processes lengthen little; on a GPU the wall clock.
    """
    race = Race(clock_of(device), {name: [] for name in contestants})
    order = random.Random(seed)

    def attempt(name: str) -> Lap | None:
        try:
            return contestants[name]()
        except (UnavailableError, WdatError) as error:
            race.reasons[name] = str(error)
        except torch.OutOfMemoryError:
            race.reasons[name] = "out of memory"
        del race.laps[name]
        return None

    def close_enough() -> bool:
        estimates = [estimate(race.ratios(*pair)) for pair in pairs if race.laps.keys() >= set(pair)]
        return all((e.high - e.low) / 2 <= within * e.ratio for e in estimates)

    for name in contestants:
        if lap := attempt(name):
            race.warm_up[name] = lap.wall
    look = LEAST
    for done in range(1, rounds + 1):
        for name in order.sample(list(race.laps), len(race.laps)):
            if lap := attempt(name):
                race.laps[name].append(lap)
        if done == look:
            if close_enough():
                break
            look = math.ceil(LOOKS * look)
    return race


def relay(
    works: dict[str, Callable[[Subject], float]], parts: Sequence[Subject], device: torch.device, *, seed: int = 0
) -> Race:
    """For work that takes minutes: a round is a part of it, which each contestant does once, in an order drawn anew.

    The ratios then differ by what is in a part too, and the interval has that in it.
    """
    race, order = Race(clock_of(device), {name: [] for name in works}), random.Random(seed)
    for part in parts:
        for name in order.sample(list(works), len(works)):
            race.laps[name].append(timed(partial(works[name], part), device)())
    return race


def compare(race: Race, name: str, baseline: str, unit: str, *, target: float | None = None, **about: Any) -> Row:
    """The row of one contestant against another. A target is an upper bound of a time, a lower one of a speed."""
    for missing in (name, baseline):
        if missing in race.reasons:
            return row_of(name, baseline, unit, target, reason=race.reasons[missing], **about)

    def of(clock: str) -> list[float]:
        ratios = race.ratios(name, baseline, clock)
        return [round(x, 4) for x in estimate(ratios if unit == TIME else [1 / x for x in ratios])]

    ratio, low, high = of(race.clock)
    met = None
    if target is not None and (low > target or high < target):  # else the interval has the target inside
        met = (low > target) == (unit == SPEED)
    about |= {"accuracy": race.laps[name][-1].accuracy, "baseline_accuracy": race.laps[baseline][-1].accuracy}
    measured = {"ratio": ratio, "low": low, "high": high, "met": met, "clock": race.clock, "wall": of("wall")}
    measured |= {"rounds": len(race.laps[name]), "seconds": round(race.seconds(name), 5)}
    return row_of(name, baseline, unit, target, **measured, **about)


def row_of(name: str, baseline: str, unit: str, target: float | None, **about: Any) -> Row:
    """A row with everything that a row has, None where it is not given."""
    empty = dict.fromkeys(("group", "network", "images", "batch_size", "precision", "seconds", "note", "reason"))
    empty |= dict.fromkeys(("ratio", "low", "high", "met", "clock", "wall", "rounds", "accuracy", "baseline_accuracy"))
    bound = "at least" if unit == SPEED else "at most"
    shown = None if target is None else f"{bound} {target:g}"
    return {**empty, "name": name, "baseline": baseline, "unit": unit, "target": shown, **about}
