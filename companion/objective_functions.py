"""What a network can be trained further for: the core's objectives, and others to compare them with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from wdat_core import Minibatch


def cheapest(batch: Minibatch) -> Tensor:
    """(5.1) with the images that an attacker buys who buys the cheapest first, in place of those of W-PGD."""
    threat = batch.config.threat
    x_adv = batch.boundary(threat.r).spend(batch.x, threat).x_adv
    logits = batch.net(batch.x)
    held_fixed = logits.softmax(1).detach()
    return F.cross_entropy(logits, batch.y) + batch.config.beta * F.cross_entropy(batch.net(x_adv), held_fixed)


def equal_weights(batch: Minibatch) -> Tensor:
    """MMA (Ding et al., 2020): CE(f(x), y) - beta mean_i min(d_i, delta) / delta, all with the same weight."""
    threat = batch.config.threat
    distance = batch.distance(batch.boundary(threat.r))
    reached = distance.clamp(max=threat.delta).mean() / threat.delta
    return F.cross_entropy(batch.net(batch.x), batch.y) - batch.config.beta * reached


@dataclass(frozen=True)
class Objective:
    words: str
    function: str | Callable[[Minibatch], Tensor]
    p: float = 2.0


OBJECTIVES = {
    "algorithm1": Objective("Algorithm 1", "wdat"),
    "slope": Objective("exact slope", "worst_case"),
    "cheapest": Objective("Algorithm 1, cheapest first", cheapest),
    "mma": Objective("MMA, equal weights", equal_weights),
    "pointwise": Objective("pointwise control", "wdat", math.inf),
    "trades": Objective("TRADES", "trades", math.inf),
}
