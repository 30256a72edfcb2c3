"""Where the time of an attack goes that its passes do not take: by torch's profiler, which names every operation."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

KINDS = {  # the operations of each; everything else that costs more than in the bare passes is "other"
    "signs, in two bits each": ("sign", "rshift", "lshift", "bitwise_and", "bitwise_or", "constant_pad", "fill_"),
    "norms": ("abs", "sum", "amax", "div", "pow", "max"),
    "step, projection and [0, 1]": ("mul", "addcmul", "clamp", "sub", "add", "where"),
    "best iterate": ("lerp",),
    "copies": ("copy_", "index", "cat"),
}
NETWORK = ("convolution", "threshold_backward", "relu", "clamp_min", "mm", "batch_norm")  # alike in both, but for noise


def where(work: Callable[[], Any], bare: Callable[[], Any], rounds: int = 6) -> dict[str, float]:
    """What each kind of operation takes beyond the bare passes, as a share of these; medians over rounds, on a CPU."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        ours, theirs = _seconds(work), _seconds(bare)
        more = Counter({name: ours[name] - theirs[name] for name in ours.keys() | theirs.keys()})
        shares: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
        for name, seconds in more.items():
            if not any(part in name for part in NETWORK):
                shares[_kind(name)] += seconds / sum(theirs.values())
        found.append(shares)
    return {kind: round(statistics.median(shares[kind] for shares in found), 4) for kind in found[0]}


def _kind(name: str) -> str:
    operation = name.removeprefix("aten::").lstrip("_")
    return next((kind for kind, parts in KINDS.items() if operation.startswith(parts)), "other")


def _seconds(work: Callable[[], Any]) -> Counter[str]:
    """Of the process, by operation, without the operations that it calls."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        work()
    return Counter({event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()})
