"""Wasserstein distributional adversarial attack and training, in one file.

The method of Bai, He, Jiang, Obłój, *Wasserstein distributional adversarial training for deep neural networks*
(arXiv 2502.09352), in the paper's order; equation numbers are the paper's. Five lines attack a network of your own::

    from wdat_core import Threat, wpgd
    attack = wpgd(model, x, y, Threat(p=2, delta=8 / 255))
    attack.accuracy, attack.distance, attack.x_adv

Conventions, everywhere in this file:

- images `x`: floating point, shape (n, c, h, w) (any shape (n, ...) works), values in [0, 1]; labels `y`: int64, (n,);
- radii, distances and steps are in the same [0, 1] pixel units; accuracies are fractions;
- the device and the floating-point type are those of the images and the model, which must agree;
- the caller's model keeps its mode, `requires_grad` flags and gradients; only `perturb_`, `finetune` and `pretrain`
  change parameters, which is what they are for;
- randomness comes from one `torch.Generator` made from a seed; the global generator is left as it was found;
- what a caller can get wrong raises `WdatError` with one sentence that says what was wrong and what to do.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import io
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attack",
    "FinetuneConfig",
    "History",
    "PretrainConfig",
    "Scores",
    "Threat",
    "WdatError",
    "ce",
    "dlr",
    "evaluate",
    "finetune",
    "perturb_",
    "pretrain",
    "project",
    "redlr",
    "sensitivity",
    "wpgd",
    "wpgd_budget",
]

Loss = Callable[[Tensor, Tensor], Tensor]
Progress = bool | Callable[[str], None]
Images = tuple[Tensor, Tensor]
Rows = slice | Tensor


class WdatError(ValueError):
    """Something the caller can put right; the message says what and how, and a notebook shows nothing but it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # arrays and torch's own messages come with line breaks

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class _NotFiniteError(WdatError):
    """The network's output is not finite; while it trains, the learning rate is to blame."""


# ---------------------------------------------------------------------------------------------------------------------
# Section 3: the threat (W_p, l_r) and the losses of the attacker
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threat:
    """An adversary who may move the data distribution by `delta` in Wasserstein distance W_p over the pixel norm l_r.

    Args:
        p: order of the Wasserstein distance, in (1, inf]. inf bounds every image alone, as in ordinary PGD.
        r: norm between images, in (1, inf].
        delta: radius, > 0, in [0, 1] pixel units.
    """

    p: float = 2.0
    r: float = math.inf
    delta: float = 8 / 255

    def __post_init__(self) -> None:
        for name in ("p", "r"):
            _check_number(name, getattr(self, name), above=1, at_most=math.inf)
        _check_number("delta", self.delta, above=0)

    @property
    def q(self) -> float:
        """The conjugate of p, 1/p + 1/q = 1."""
        return _conjugate(self.p)

    @property
    def s(self) -> float:
        """The conjugate of r, 1/r + 1/s = 1."""
        return _conjugate(self.r)


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (n, m) and (n,) to (n,)."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio of each image (Croce and Hein, 2020), (n, m) and (n,) to (n,); m >= 3."""
    top, classes = logits.topk(3, dim=1)
    z_y = logits.gather(1, y[:, None])[:, 0]
    rival = torch.where(classes[:, 0] == y, top[:, 1], top[:, 0])
    return -(z_y - rival) / (top[:, 0] - top[:, 2] + 1e-12)


def redlr(logits: Tensor, y: Tensor) -> Tensor:
    """Rectified DLR of each image, -(DLR)^-, (n, m) and (n,) to (n,); m >= 3 (Section 3 of the paper).

    It is 0, with gradient 0, on a misclassified image, so that a distributional attacker spends nothing there.
    """
    return torch.where(logits.argmax(1) == y, dlr(logits, y), 0.0)


def _kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax of the logits) of each image, (n, m) and (n, m) to (n,): the attacker's loss in TRADES."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


SLOPED = (ce, dlr, _kl)  # rising somewhere from nearly every image; the others may be flat, as ReDLR on a lost image
LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "redlr": redlr}


# ---------------------------------------------------------------------------------------------------------------------
# Section 4: sensitivity and the first-order optimal direction (Theorem 4.1)
# ---------------------------------------------------------------------------------------------------------------------


def sensitivity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: str | Loss = "redlr",
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
) -> float:
    """The sensitivity Upsilon = (E ||grad_x J||_s^q)^(1/q) of Theorem 4.1 over all the images.

    It is the slope of V(delta) = sup E[J] over the Wasserstein ball at delta = 0, so it does not depend on
    `threat.delta`. It is 0 for ReDLR when no image is classified correctly.

    Raises:
        WdatError: for the faults of input that `wpgd` names.
    """
    loss, classes = _check_attack(model, x, y, loss, batch_size, threat)
    passes = _passes(model, x, batch_size, precision, compiled, classes)
    with _prepared(model):
        return float(_sensitivity(passes, _plain(x), _plain(y), threat, loss))


def _sensitivity(passes: _Passes, x: Tensor, y: Tensor, threat: Threat, loss: Loss) -> Tensor:
    norm = x.new_zeros(len(x))
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for rows in passes.batches(x):
        look = _look(passes, x[rows], y[rows], threat.s, loss)
        norm[rows] = look.norm
        finite &= look.finite
    upsilon = _mean(norm, threat.q)
    _check_finite(finite & upsilon.isfinite())
    return upsilon


@dataclass(frozen=True)
class _Look:
    """What one forward and backward pass says about a batch; on the device of the images."""

    correct: Tensor  # bool (b,)
    loss: Tensor  # (b,)
    norm: Tensor  # (b,), ||g||_s of the gradient g of the loss in x
    direction: Tensor  # as x, the steepest ascent of unit l_r norm; empty without a backward pass, as is the norm
    finite: Tensor  # bool (), all logits, losses and norms are


def _look(passes: _Passes, x: Tensor, y: Tensor, s: float, loss: Loss, backward: bool = True) -> _Look:
    try:
        return _look_at_once(passes, x, y, s, loss, backward)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
    # Out of the except clause, where the failed pass still held its memory.
    half = len(x) // 2
    if passes.whole or not half:
        raise WdatError(
            f"out of memory on {passes.device} with {len(x)} images at once"
            + (f": a batch_size of {half} takes about half of it" if half else ": the network is too large for it")
        )
    passes.batch_size = min(passes.batch_size, half)
    if passes.device.type == "cuda":
        torch.cuda.empty_cache()
    first, second = (_look(passes, x[part], y[part], s, loss, backward) for part in (slice(half), slice(half, None)))
    parts = {f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(_Look)[:-1]}
    return _Look(**parts, finite=first.finite & second.finite)


def _look_at_once(passes: _Passes, x: Tensor, y: Tensor, s: float, loss: Loss, backward: bool) -> _Look:
    home = x.device
    with torch.enable_grad() if backward else torch.no_grad():
        x = x.detach().to(passes.device).requires_grad_(backward)
        y = y.to(passes.device)
        logits = passes.call(x).to(x.dtype)
        classes, finite = logits.detach().argmax(1), logits.detach().isfinite().all()  # a loss may write into logits
        value = loss(logits, y)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise WdatError(f"the loss must return one value for each image, shape ({len(x)},), not {shape}")
        norm = direction = x.new_empty(0)
        if backward:
            if not value.requires_grad:
                raise WdatError("the model's output carries no gradient to its input: remove no_grad or detach in it")
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True, materialize_grads=True)
            norm = _norm(gradient, s)
            direction = _steepest(gradient, norm, s)
    value = value.detach().to(x.dtype)
    labels = y if y.ndim == 1 else y.argmax(1)  # soft labels stand for their likeliest class
    finite &= value.isfinite().all() & norm.isfinite().all()
    return _Look(*(t.to(home) for t in (classes == labels, value, norm, direction, finite)))


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise _NotFiniteError(NOT_FINITE)


def _steepest(gradient: Tensor, norm: Tensor, s: float) -> Tensor:
    """The direction of unit l_r norm along which each loss rises fastest: sgn(g) |g|^(s-1) / ||g||_s^(s-1).

    Images with gradient 0 get direction 0. For l_inf (s = 1) it is the sign, kept in one byte a pixel.
    """
    if s == 1:
        return gradient.sign().to(torch.int8)
    unit = gradient / _per_image(torch.where(norm > 0, norm, 1.0), gradient)
    return unit.sign() * _power(unit.abs(), s - 1)


def _share(norm: Tensor, upsilon: Tensor, q: float) -> Tensor:
    """How far each image goes: (||g||_s / Upsilon)^(q-1), whose p-th power has mean 1. All 1 for p = inf."""
    return _power(torch.where(upsilon > 0, norm / upsilon, 0.0), q - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Section 5: the projection pj_delta, W-PGD (eq. 5.3) and W-PGD-budget (eq. 5.5)
# ---------------------------------------------------------------------------------------------------------------------


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """pj_delta: `x_adv` moved back into the Wasserstein ball of radius delta around `x`; both (n, ...).

    Nothing moves when (mean_i d_i^p)^(1/p) <= delta, d_i the distance image i has gone. Otherwise the budget of
    every image shrinks from d_i to rho d_i, rho = delta / W_p, by clipping (l_inf) or scaling (any other norm). For
    p = inf, images further away than delta come back to delta and the others stay. The pixel range is not its business.
    """
    _check_threat(threat)
    for name, images in (("x_adv", x_adv), ("x", x)):
        if not isinstance(images, Tensor) or images.dtype not in FLOATS or images.ndim < 2 or images.numel() == 0:
            kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise WdatError(f"{name} must be a floating-point tensor (n, ...) with at least one image, not {kind}")
        _check_dense(name, images)
        if not images.isfinite().all():
            raise WdatError(f"{name} must be finite")
    if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
        raise WdatError(
            f"x_adv and x must be alike, not {tuple(x_adv.shape)} {x_adv.dtype} on {x_adv.device} and"
            f" {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    distance = _norm(x_adv - x, threat.r)
    return _pull_back(x_adv, x, distance, _budgets(distance, threat.p, threat.delta), threat.r)


def _budgets(distance: Tensor, p: float, delta: Tensor | float) -> Tensor:
    """The radius (n,) within which the projection leaves each image."""
    if p == math.inf:
        return torch.as_tensor(delta, dtype=distance.dtype, device=distance.device).expand_as(distance)
    total = _mean(distance, p)
    # Not delta / total, for which torch takes 1 / total, and that can be infinite.
    return torch.where(total > delta, distance / total * delta, distance)


def _pull_back(x_adv: Tensor, x: Tensor, distance: Tensor, budget: Tensor, r: float) -> Tensor:
    """Images at `distance` > `budget` (n,) brought to their budget: clipped for r = inf, scaled for another r."""
    move = x_adv - x
    if r == math.inf:
        limit = _per_image(budget, x)
        shrunk = x + move.clamp(-limit, limit)
    else:
        shrunk = x + move * _per_image(budget / torch.where(distance > 0, distance, 1.0), x)
    return torch.where(_per_image(distance <= budget, x), x_adv, shrunk)


@dataclass(frozen=True)
class Attack:
    """What an attack found: its iterate of lowest accuracy.

    Attributes:
        x_adv: the attacked images, as x.
        accuracy: fraction classified correctly there, the lowest over the iterates x_1..x_steps.
        loss: mean attack loss of that iterate.
        distance: (mean_i ||x_adv_i - x_i||_r^p)^(1/p), at most delta.
        correct: bool (n,), whether each attacked image is still classified correctly.
        was_correct: bool (n,), the same of x_0, before the attack.
        history: "accuracy" and "loss" of x_0..x_steps, "upsilon" of x_0..x_(steps-1), each a list of floats.
    """

    x_adv: Tensor = field(repr=False)
    accuracy: float
    loss: float
    distance: float
    correct: Tensor = field(repr=False)
    was_correct: Tensor = field(repr=False)
    history: dict[str, list[float]] = field(repr=False)


def wpgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: str | Loss = "redlr",
    steps: int = 20,
    step_ratio: float = 1.0,
    random_start: float = 0.0,
    seed: int = 0,
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
    progress: Progress = False,
) -> Attack:
    """W-PGD (Bai et al., 2023; eq. 5.3): projected gradient ascent of the mean loss inside a Wasserstein ball.

    Every step moves image i by alpha (||g_i||_s / Upsilon)^(q-1) along its steepest direction, projects the whole set
    (`project`) and clamps to [0, 1]; alpha = step_ratio delta / steps, g_i the gradient of its loss, Upsilon that of
    the current iterate. For p = inf this is PGD. The result does not depend on `batch_size` beyond rounding: it only
    bounds how many images the model sees at once. Nor does it depend on where the images are: a set too large for the
    model's device stays on another one and goes there a batch at a time.

    Args:
        model: maps images (b, c, h, w) to logits (b, m); run in eval mode and given back as it was.
        x: images (n, c, h, w), floating point, in [0, 1]; on the model's device, or on the CPU.
        y: labels (n,), int64, on the same device.
        threat: the ball; `Threat()` is (W_2, l_inf) with delta = 8/255.
        loss: "redlr", "dlr" (both need 3 classes or more), "ce", or a function (logits, labels) to losses (b,).
        steps: number of steps, >= 1 (20 in the paper).
        step_ratio: total length of the steps over delta, > 0 (1 in the paper).
        random_start: x_0 is each image moved this fraction of delta, in [0, 1], in a random direction; 0 is the image.
        seed: of that random direction.
        precision: "float32" runs the model as it is, "bfloat16" under autocast; images and steps stay as they are.
        compiled: run the model through `torch.compile`, with CUDA graphs on a GPU; the first batch then takes a minute.
        progress: True for a line on stderr, or a function that shows the line of text it is given.

    Raises:
        WdatError: names what is wrong with the images, the labels, the model or a parameter.
    """
    loss, classes = _check_attack(model, x, y, loss, batch_size, threat)
    _check_steps(steps, step_ratio)
    _check_number("random_start", random_start, at_least=0, at_most=1)
    _check_number("seed", seed, at_least=0, below=2**63, whole=True)
    _check_progress(progress)
    passes = _passes(model, x, batch_size, precision, compiled, classes)
    with _prepared(model):
        x, y = _plain(x), _plain(y)
        start = _random_start(x, threat, random_start, torch.Generator().manual_seed(seed)) if random_start else None
        return _attack(passes, x, y, threat, loss, steps, step_ratio, start=start, progress=progress)


def _attack(
    passes: _Passes,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    loss: Loss,
    steps: int,
    step_ratio: float,
    *,
    upsilon: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    last: bool = False,
    progress: Progress = False,
) -> Attack:
    """The one attack loop, on checked input and a prepared model.

    `upsilon` makes delta the share of this batch, eq. 5.5: it is given the batch's own sensitivity and returns that of
    the set. `start` replaces x_0 = x. `last` gives the last iterate, as training wants it, and saves its forward pass
    (accuracy, loss and correct are then those of the iterate before).

    An image that a step did not move keeps its loss, its gradient and its prediction, so only the moved ones are looked
    at again: under ReDLR a misclassified image costs nothing until a projection moves it. Which ones those are is all
    that the host asks the device for before the end.
    """
    n, p, q, r, s = len(x), threat.p, threat.q, threat.r, threat.s
    delta: Tensor | float = threat.delta
    x_adv = (x if start is None else start).clone()
    norm, value = x.new_zeros(n), x.new_zeros(n)
    direction = torch.empty_like(x, dtype=torch.int8 if s == 1 else x.dtype)
    correct = torch.zeros(n, dtype=torch.bool, device=x.device)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    hits, losses, upsilons = [], [], []
    batches = passes.batches(x)
    for k in _track(range(steps if last else steps + 1), f"W_{p:g} attack", progress):
        for rows in batches:
            look = _look(passes, x_adv[rows], y[rows], s, loss, backward=k < steps)
            correct[rows], value[rows] = look.correct, look.loss
            finite &= look.finite
            if k < steps:
                norm[rows], direction[rows] = look.norm, look.direction
        hits.append(correct.sum())
        losses.append(value.mean())
        if k == 0:
            was_correct = correct.clone()
        if k == 1 and not last:
            x_best, best_correct, best_hits, best_loss = x_adv.clone(), correct.clone(), hits[1], losses[1]
        elif k > 1 and not last:
            better = hits[k] < best_hits
            for rows in passes.batches(x):
                x_best[rows] = torch.where(better, x_adv[rows], x_best[rows])
            best_correct = torch.where(better, correct, best_correct)
            best_hits, best_loss = torch.where(better, hits[k], best_hits), torch.where(better, losses[k], best_loss)
        if k == steps:
            break

        upsilons.append(_mean(norm, q))
        if k == 0 and upsilon is not None:
            own = upsilons[0].to(torch.promote_types(x.dtype, torch.float32))  # the quotient overflows in float16
            delta = threat.delta * _share(own, upsilon(own), q)
        # 0 where an infinite step meets an image that is to stay; far enough for any pixel, and its norm is a number.
        step = (_share(norm, upsilons[k], q) * (step_ratio * delta / steps)).nan_to_num(0.0)
        step = step.clamp(max=math.sqrt(torch.finfo(x.dtype).max))
        for rows in batches:
            x_adv[rows] += _per_image(step[rows], x) * direction[rows]
        moved = norm > 0
        # The steps are step_ratio delta / steps long: until they add up to delta, the set cannot have left the ball.
        # Powers of order q - 1 and s - 1 know that length up to as many roundings.
        if start is not None or step_ratio * (k + 1) > (0.999 - 8 * torch.finfo(x.dtype).eps * (q + s)) * steps:
            distance = _distances(passes, x_adv, x, r)
            budget = _budgets(distance, p, delta)
            for rows in passes.batches(x):
                x_adv[rows] = _pull_back(x_adv[rows], x[rows], distance[rows], budget[rows], r)
            moved |= distance > budget
        x_adv.clamp_(0, 1)
        batches = passes.batches(x, None if loss in SLOPED else moved.nonzero()[:, 0])

    _check_finite(finite)
    if last:
        x_best, best_correct, best_hits, best_loss = x_adv, correct, hits[-1], losses[-1]
    history = {"accuracy": [h / n for h in _floats(hits)], "loss": _floats(losses), "upsilon": _floats(upsilons)}
    reached = _mean(_distances(passes, x_best, x, r), p)
    return Attack(x_best, best_hits.item() / n, best_loss.item(), reached.item(), best_correct, was_correct, history)


def _distances(passes: _Passes, x_adv: Tensor, x: Tensor, r: float) -> Tensor:
    """How far each image has gone, (n,), without a copy of the set."""
    distance = x.new_empty(len(x))
    for rows in passes.batches(x):
        distance[rows] = _norm(x_adv[rows] - x[rows], r)
    return distance


def wpgd_budget(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    upsilon: float,
    loss: str | Loss = "redlr",
    steps: int = 20,
    step_ratio: float = 1.0,
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
    progress: Progress = False,
) -> Attack:
    """W-PGD-budget: each batch attacked on its own with the radius delta_B = delta Upsilon_B / Upsilon, eq. 5.5.

    For p other than 2 the radius is delta (Upsilon_B / Upsilon)^(q-1), which is the paper's at p = 2 and keeps the
    whole set inside the ball of radius delta whenever `upsilon` is the sensitivity of the whole set.

    Args:
        upsilon: the sensitivity of the whole set or an estimate of it, > 0 (see `sensitivity`).

    The other arguments are those of `wpgd`, except that `batch_size` matters: it is the size of the batches of eq. 5.5.

    Returns:
        Attack: each batch's iterate of lowest accuracy; the history holds means over the images.

    Raises:
        WdatError: names what is wrong with the images, the labels, the model or a parameter.
    """
    loss, classes = _check_attack(model, x, y, loss, batch_size, threat)
    _check_steps(steps, step_ratio)
    _check_number("upsilon", upsilon, above=0)
    _check_progress(progress)
    passes = _passes(model, x, batch_size, precision, compiled, classes)
    with _prepared(model):
        batches = list(
            zip(_plain(x).split(min(batch_size, len(x))), _plain(y).split(min(batch_size, len(x))), strict=True)
        )
        attacks = [
            _attack(
                passes,
                xb,
                yb,
                threat,
                loss,
                steps,
                step_ratio,
                upsilon=lambda own: own.new_tensor(upsilon).clamp(min=torch.finfo(own.dtype).tiny),
            )
            for xb, yb in _track(batches, "W-PGD-budget", progress)
        ]
    sizes = torch.tensor([len(xb) / len(x) for xb, _ in batches], dtype=torch.float64)

    def pool(values: Sequence[float], order: float) -> float:
        return _mean(torch.tensor(values, dtype=torch.float64), order, sizes).item()

    def average(values: Sequence[float]) -> float:
        return float(sizes @ torch.tensor(values, dtype=torch.float64))

    by_iterate = {key: list(zip(*(a.history[key] for a in attacks), strict=True)) for key in attacks[0].history}
    correct = torch.cat([a.correct for a in attacks])
    return Attack(
        x_adv=torch.cat([a.x_adv for a in attacks]),
        accuracy=correct.sum().item() / len(x),
        loss=average([a.loss for a in attacks]),
        distance=pool([a.distance for a in attacks], threat.p),
        correct=correct,
        was_correct=torch.cat([a.was_correct for a in attacks]),
        history={
            "accuracy": [average(values) for values in by_iterate["accuracy"]],
            "loss": [average(values) for values in by_iterate["loss"]],
            "upsilon": [pool(values, threat.q) for values in by_iterate["upsilon"]],
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Section 6: accuracy, clean and under the two attacks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Accuracies as fractions, and per image, so that two networks can be compared on the same images.

    Attributes:
        clean, w_inf, w_2: accuracy without attack, under PGD with CE, and under (W_2, l_inf) W-PGD with ReDLR.
        correct: the same three names to bool (n,).
    """

    clean: float
    w_inf: float
    w_2: float
    correct: dict[str, Tensor] = field(repr=False)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    delta: float = 8 / 255,
    steps: int = 20,
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
    progress: Progress = False,
) -> Scores:
    """The three accuracies of the paper's tables (Section 6): clean, W_inf (20 steps, CE) and W_2 (20 steps, ReDLR).

    Arguments, and the errors raised, are those of `wpgd`.
    """
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "progress": progress}
    options |= {"precision": precision, "compiled": compiled}
    pointwise = wpgd(model, x, y, Threat(p=math.inf, delta=delta), loss="ce", **options)
    distributional = wpgd(model, x, y, Threat(p=2, delta=delta), loss="redlr", **options)
    correct = {"clean": pointwise.was_correct, "w_inf": pointwise.correct, "w_2": distributional.correct}
    return Scores(**{name: c.sum().item() / len(x) for name, c in correct.items()}, correct=correct)


# ---------------------------------------------------------------------------------------------------------------------
# Section 5, "Training vs Fine-tuning": perturb a pre-trained network, then Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PERTURBATIONS = ("whole", "last_layer")
CONSISTENCIES = ("ce_detached", "ce", "kl")


def perturb_(
    model: nn.Module,
    how: str,
    *,
    noise: float = 0.01,
    reinit: str = "default",
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Perturb a pre-trained network in place, in one of the paper's two ways, before it is fine-tuned.

    Args:
        how: "whole" adds Gaussian noise of standard deviation `noise` times its root mean square to every parameter;
            "last_layer" draws the final linear layer anew.
        noise: relative size of that noise, >= 0.
        reinit: "default" calls the layer's own `reset_parameters`, "xavier" draws Xavier-normal weights, zero biases.
        generator: source of randomness (on the CPU); None is a new one with seed 0.

    Returns:
        The parameters that are to be trained next, all of them or those of the last layer.

    Raises:
        WdatError: for another `how` or `reinit`, a negative noise, or a network without a linear layer.
    """
    _check_choice("how", how, PERTURBATIONS)
    _check_choice("reinit", reinit, ("default", "xavier"))
    _check_number("noise", noise, at_least=0)
    _check_model(model)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    elif not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise WdatError(f"generator must be a torch.Generator on the CPU, not {generator!r}")
    if how == "whole":
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        with torch.no_grad():
            moved = []
            for parameter in parameters:
                rms = parameter.square().mean().sqrt()
                random = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                moved.append(parameter + noise * rms * random.to(parameter.device))
            if not all(m.is_meta or m.isfinite().all() for m in moved):
                raise WdatError(f"noise of {noise!r} makes the parameters infinite or NaN: use less")
            for parameter, value in zip(parameters, moved, strict=True):
                parameter.copy_(value)
        return parameters
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise WdatError('how="last_layer" needs a network with an nn.Linear layer; this one has none: use how="whole"')
    with _seeded(model, generator):
        if reinit == "default":
            layers[-1].reset_parameters()
        else:
            nn.init.xavier_normal_(layers[-1].weight)
            if layers[-1].bias is not None:
                nn.init.zeros_(layers[-1].bias)
    return list(layers[-1].parameters())


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a run of Algorithm 1. Defaults are the paper's; where it is silent, the comment says so.

    Raises:
        WdatError: when made with a value of the wrong type or outside its range.
    """

    perturb: str = "whole"  # "whole" or "last_layer", see perturb_
    tau: float = 0.01  # learning rate of SGD
    eta: float = 1.0  # update rate of Upsilon, in (0, 1], eq. 5.4
    beta: float = 6.0  # weight of the distributional term, eq. 5.1
    gamma: float = 0.0  # weight of the pointwise term, eq. 5.6; 0 is eq. 5.1
    threat: Threat = field(default_factory=Threat)
    steps: int = 20
    step_ratio: float = 1.0
    epochs: int = 20
    batch_size: int = 512
    sample: float = 0.1  # fraction of the training set that estimates Upsilon at every minibatch
    upsilon_from: str = "sample"  # "batch": instead, the latest minibatches' own sensitivities, which cost nothing
    precision: str = "float32"  # "bfloat16": autocast of the network throughout, validation included
    compiled: bool = False  # the network goes through torch.compile, with CUDA graphs on a GPU
    seed: int = 0
    # What the paper leaves open:
    consistency: str = (
        "ce_detached"  # CE(f(x), f(x')): target softmax(f(x)) held fixed; "ce": not held; "kl": as TRADES
    )
    attack_label: str = "true"  # second argument of ReDLR(f(x), f(x')): the true label or the "predicted" one
    attack_mode: str = "eval"  # mode of the network while it is attacked
    update_mode: str = "train"  # mode of the trained part of the network during the SGD step
    random_start: float = 0.0  # attack starts at a random point this fraction of delta away
    noise: float = 0.01  # "small noise" of perturb="whole", relative to each tensor's root mean square
    reinit: str = "default"  # how perturb="last_layer" draws the layer
    augment: bool = True  # pad-4 crop and flip of the minibatch
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"  # of the learning rate; or "cosine", to 0
    first_upsilon: str = "sample"  # Upsilon starts at the first estimate; "full": at that of the whole training set

    def __post_init__(self) -> None:
        _check_choice("perturb", self.perturb, PERTURBATIONS)
        _check_choice("consistency", self.consistency, CONSISTENCIES)
        _check_choice("attack_label", self.attack_label, ("true", "predicted"))
        _check_choice("attack_mode", self.attack_mode, ("eval", "train"))
        _check_choice("update_mode", self.update_mode, ("train", "eval"))
        _check_choice("reinit", self.reinit, ("default", "xavier"))
        _check_choice("schedule", self.schedule, ("constant", "cosine"))
        _check_choice("first_upsilon", self.first_upsilon, ("sample", "full"))
        _check_choice("upsilon_from", self.upsilon_from, ("sample", "batch"))
        _check_choice("precision", self.precision, PRECISIONS)
        _check_threat(self.threat)
        _check_number("tau", self.tau, above=0)
        for name in ("eta", "sample"):
            _check_number(name, getattr(self, name), above=0, at_most=1)
        for name in ("beta", "gamma", "noise", "weight_decay"):
            _check_number(name, getattr(self, name), at_least=0)
        _check_number("momentum", self.momentum, at_least=0, below=1)
        _check_number("random_start", self.random_start, at_least=0, at_most=1)
        _check_steps(self.steps, self.step_ratio)
        for name in ("epochs", "batch_size"):
            _check_number(name, getattr(self, name), at_least=1, whole=True)
        _check_number("seed", self.seed, at_least=0, below=2**63, whole=True)
        _check_flag("augment", self.augment)
        _check_flag("compiled", self.compiled)


@dataclass(frozen=True)
class History:
    """What happened along a training run.

    Attributes:
        epochs: one dict an epoch: "epoch" (from 1), "loss" (mean of the training objective), "seconds" (since the
            start), "clean", "w_2" or "w_inf" on the validation set if there was one, and what `on_epoch` returned.
        best: the epoch (from 1) whose weights the model now has: best on validation, the last without one.
        upsilon: the moving estimate Upsilon at every minibatch (fine-tuning only).
        seconds: of the whole run, all its pieces together.
        finished: False where `stop_after` ended the run; the model then has its latest weights, and best is so far.
    """

    epochs: list[dict[str, float]]
    best: int
    upsilon: list[float]
    seconds: float
    finished: bool


def finetune(
    model: nn.Module,
    train: Images,
    val: Images | None,
    config: FinetuneConfig,
    *,
    eval_batch_size: int = 512,
    resume: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    stop_after: float | None = None,
    on_epoch: Callable[[int, nn.Module], dict[str, float] | None] | None = None,
    progress: Progress = False,
) -> History:
    """Algorithm 1: perturb the model, then train it against W-PGD-budget; eq. 5.1, or eq. 5.6 for gamma > 0.

    At every minibatch: Upsilon from a fresh random sample of the training set, its moving average (eq. 5.4), the
    batch's radius (eq. 5.5), W-PGD on the batch, and one SGD step on CE(f(x), y) + beta CE(f(x), f(x')). After every
    epoch the accuracy under the same threat is measured on `val`; the model is left with the weights of the best epoch.

    Args:
        model: changed in place; mode, `requires_grad` flags and gradients are given back as they were.
        train, val: pairs (x, y) as `wpgd` takes them; val None keeps the last epoch.
        config: see `FinetuneConfig`.
        eval_batch_size: how many images the network sees at once, at most, wherever that changes nothing but the speed
            (in eval mode: the attack, Upsilon, validation).
        resume: file of the run's checkpoint. Where it exists the run goes on from it, and ends with the weights and the
            history of one that was never stopped, bit for bit on the same machine; a checkpoint of another run is
            refused. SIGTERM and SIGINT (in the main thread) write it before they end the run. It stays at the end.
        save_every: seconds between two checkpoints, >= 0; one more is written after every epoch.
        stop_after: seconds after which the run writes its checkpoint and returns, at the end of a minibatch.
        on_epoch: called with the epoch and the model; a dict of numbers that it returns joins the epoch's history.

    Raises:
        WdatError: for the faults of input that `wpgd` names, when loss, gradient or logits are no longer finite, and
            when the checkpoint cannot be written or belongs to another run.
    """
    _check_training(train, val, config, FinetuneConfig, on_epoch, progress)
    x, y = train
    _check_number("eval_batch_size", eval_batch_size, at_least=1, whole=True)
    loss, classes = _check_attack(model, x, y, "redlr", eval_batch_size, config.threat)
    if val is not None:
        _check_attack(model, *val, "redlr", eval_batch_size, config.threat)
    threat, steps, step_ratio, batch_size = config.threat, config.steps, config.step_ratio, config.batch_size
    if config.augment and x.ndim != 4:
        raise WdatError(f"augment needs images of shape (n, c, h, w), not {tuple(x.shape)}: use augment=False")
    passes = _passes(model, x, eval_batch_size, config.precision, config.compiled, classes)
    net = passes.call
    in_train_mode = config.attack_mode == "train" and config.perturb == "whole"
    # Batch statistics are those of the whole minibatch.
    attack_passes = replace(passes, batch_size=batch_size, whole=True) if in_train_mode else passes
    generator = torch.Generator().manual_seed(config.seed)
    in_sample = config.sample * len(x)
    upsilons: list[Tensor] = []
    recent: deque[Tensor] = deque(maxlen=max(8, round(in_sample / batch_size)))
    checkpoint = _checkpoint(resume, save_every, stop_after, model, train, val, config)

    def draw(count: int) -> Tensor:
        return torch.randperm(len(x), generator=generator)[:count].to(x.device)

    def update_upsilon(own: Tensor) -> Tensor:
        recent.append(own)
        everything = config.first_upsilon == "full" and not upsilons
        if config.upsilon_from == "batch" and not everything:
            estimate = _mean(torch.stack([*recent]), threat.q)
        else:
            rows = draw(len(x) if everything else max(1, round(in_sample)))
            estimate = _sensitivity(attack_passes, x[rows], y[rows], threat, loss).to(own)
        upsilons.append(upsilons[-1] + config.eta * (estimate - upsilons[-1]) if upsilons else estimate)
        return upsilons[-1]

    def perturbed(xb: Tensor, labels: Tensor, threat: Threat, loss: Loss, **options: Any) -> Tensor:
        start = _random_start(xb, threat, config.random_start, generator) if config.random_start else None
        return _attack(
            attack_passes, xb, labels, threat, loss, steps, step_ratio, start=start, last=True, **options
        ).x_adv

    def objective(rows: Tensor) -> Tensor:
        xb, yb = x[rows].to(passes.device), y[rows].to(passes.device)
        if config.augment:
            xb = _crop_and_flip(xb, generator)
        with _prepared(model, training=in_train_mode):
            with torch.no_grad():
                labels = yb if config.attack_label == "true" else net(xb).argmax(1)
            x_adv = perturbed(xb, labels, threat, loss, upsilon=update_upsilon)
            x_point = perturbed(xb, yb, replace(threat, p=math.inf), ce) if config.gamma else None
        logits = net(xb).to(xb.dtype)
        total = F.cross_entropy(logits, yb)
        total = total + config.beta * _consistency(config.consistency, logits, net(x_adv).to(xb.dtype))
        if x_point is not None:
            total = total + config.gamma * _consistency(config.consistency, logits, net(x_point).to(xb.dtype))
        return total

    def validate(x: Tensor, y: Tensor) -> dict[str, float]:
        with _prepared(model):
            attack = _attack(passes, _plain(x), _plain(y), threat, loss, steps, step_ratio)
        return {"clean": attack.history["accuracy"][0], "w_2": attack.accuracy}

    with _seeded(model, generator), _untouched(model), torch.inference_mode(False), torch.enable_grad():
        x, y = _plain(x), _plain(y)
        trained = perturb_(model, config.perturb, noise=config.noise, reinit=config.reinit, generator=generator)
        _check_trainable(trained)
        optimiser = torch.optim.SGD(trained, config.tau, config.momentum, weight_decay=config.weight_decay)
        total = config.epochs * math.ceil(len(x) / batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda i: 1.0 if config.schedule == "constant" else (1 + math.cos(math.pi * i / total)) / 2
        )
        return _train(
            model,
            objective,
            optimiser,
            schedule,
            config.epochs,
            batches=lambda: draw(len(x)).split(min(batch_size, len(x))),
            # A frozen layer stays in eval mode, or its batch statistics would train after all.
            training=config.update_mode == "train" and config.perturb == "whole",
            validate=None if val is None else partial(validate, *val),
            score="w_2",
            on_epoch=on_epoch,
            progress=progress,
            checkpoint=checkpoint,
            generator=generator,
            memory={"upsilon": upsilons, "recent": recent},
        )


def _consistency(reading: str, logits: Tensor, logits_adv: Tensor) -> Tensor:
    """CE(f(x), f(x')) under one of its three readings; batch mean."""
    if reading == "kl":  # in logarithms: where a probability rounds to 0, its own has no finite slope
        return F.kl_div(logits_adv.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    target = logits.softmax(1)
    if reading == "ce_detached":
        target = target.detach()
    return -(target * logits_adv.log_softmax(1)).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training of stand-ins: TRADES (Zhang et al., 2019), the p = inf case of eq. 4.2, and PGD (Madry et al., 2018)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a run of `pretrain`: TRADES or PGD with SGD under a one-cycle learning rate.

    Raises:
        WdatError: when made with a value of the wrong type or outside its range.
    """

    method: str = "trades"  # "pgd": cross-entropy of the attacked images and nothing else, which has no beta
    threat: Threat = field(default_factory=lambda: Threat(p=math.inf))
    beta: float = 6.0
    steps: int = 10
    step_ratio: float = 2.5  # total length of the steps over delta
    epochs: int = 30
    batch_size: int = 256
    rate: float = 0.1  # peak of the learning rate
    warm_up: float = 0.2  # fraction of the run until the peak
    momentum: float = 0.9
    weight_decay: float = 5e-4
    average: float = 0.0  # decay of the exponential moving average of the weights, at every step; 0 is none
    augment: bool = True  # pad-4 crop and flip
    precision: str = "float32"  # "bfloat16": autocast of the network throughout, validation included
    compiled: bool = False  # the network goes through torch.compile, with CUDA graphs on a GPU
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat) or self.threat.p != math.inf:
            raise WdatError("threat must be a Threat with p = inf: pre-training is against a pointwise attack")
        _check_choice("method", self.method, ("trades", "pgd"))
        _check_choice("precision", self.precision, PRECISIONS)
        _check_number("rate", self.rate, above=0)
        for name in ("beta", "weight_decay"):
            _check_number(name, getattr(self, name), at_least=0)
        for name in ("momentum", "average"):
            _check_number(name, getattr(self, name), at_least=0, below=1)
        _check_number("warm_up", self.warm_up, above=0, below=1)
        _check_steps(self.steps, self.step_ratio)
        for name in ("epochs", "batch_size"):
            _check_number(name, getattr(self, name), at_least=1, whole=True)
        _check_number("seed", self.seed, at_least=0, below=2**63, whole=True)
        _check_flag("augment", self.augment)
        _check_flag("compiled", self.compiled)


def pretrain(
    model: nn.Module,
    train: Images,
    val: Images | None,
    config: PretrainConfig,
    *,
    resume: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    stop_after: float | None = None,
    on_epoch: Callable[[int, nn.Module], dict[str, float] | None] | None = None,
    progress: Progress = False,
) -> History:
    """Adversarial training against the pointwise attack, by one of two methods.

    "trades" is SGD on CE(f(x), y) + beta KL(f(x) || f(x')), x' from PGD on that KL, started at x plus 0.001 noise
    (Zhang et al., 2019); "pgd" is SGD on CE(f(x'), y), x' from PGD on that CE, started delta away in a random direction
    (Madry et al., 2018).

    The model is changed in place; with `config.average` it ends with the averaged weights (and averaged buffers). With
    `val` the epoch of best W_inf accuracy there (PGD, CE) is kept, without it the last.

    Arguments, History and errors are those of `finetune`.
    """
    _check_training(train, val, config, PretrainConfig, on_epoch, progress)
    x, y = train
    _, classes = _check_attack(model, x, y, "ce", config.batch_size, config.threat)
    if val is not None:
        _check_attack(model, *val, "ce", config.batch_size, config.threat)
    if config.augment and x.ndim != 4:
        raise WdatError(f"augment needs images of shape (n, c, h, w), not {tuple(x.shape)}: use augment=False")
    generator = torch.Generator().manual_seed(config.seed)

    passes = _passes(model, x, config.batch_size, config.precision, config.compiled, classes)
    checkpoint = _checkpoint(resume, save_every, stop_after, model, train, val, config)

    def objective(rows: Tensor) -> Tensor:
        xb, yb = x[rows].to(passes.device), y[rows].to(passes.device)
        if config.augment:
            xb = _crop_and_flip(xb, generator)
        budget = (config.steps, config.step_ratio)
        if config.method == "pgd":
            start = _random_start(xb, config.threat, 1.0, generator)
            with _prepared(model):
                x_adv = _attack(passes, xb, yb, config.threat, ce, *budget, start=start, last=True).x_adv
            return F.cross_entropy(passes.call(x_adv).to(xb.dtype), yb)
        start = (xb + 0.001 * torch.randn(xb.shape, generator=generator).to(xb)).clamp(0, 1)
        with _prepared(model):
            with torch.no_grad():
                target = passes.call(xb).to(xb.dtype).softmax(1)
            x_adv = _attack(passes, xb, target, config.threat, _kl, *budget, start=start, last=True).x_adv
        logits, logits_adv = passes.call(xb).to(xb.dtype), passes.call(x_adv).to(xb.dtype)
        return F.cross_entropy(logits, yb) + config.beta * _consistency("kl", logits, logits_adv)

    def validate(x: Tensor, y: Tensor) -> dict[str, float]:
        options: dict[str, Any] = {"precision": config.precision, "compiled": config.compiled}
        attack = wpgd(shown, x, y, config.threat, loss="ce", batch_size=config.batch_size, **options)
        return {"clean": attack.history["accuracy"][0], "w_inf": attack.accuracy}

    with _seeded(model, generator), _untouched(model), torch.inference_mode(False), torch.enable_grad():
        x, y = _plain(x), _plain(y)
        averaged = None
        if config.average:
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(config.average)
            averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        shown = model if averaged is None else averaged.module
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        _check_trainable(parameters)
        optimiser = torch.optim.SGD(
            parameters,
            config.rate,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        total = config.epochs * math.ceil(len(x) / config.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            config.rate,
            total_steps=total + 1,
            pct_start=max(config.warm_up, 1.5 / (total + 1)),  # a warm-up of exactly one step divides by zero in torch
            cycle_momentum=False,
        )
        return _train(
            model,
            objective,
            optimiser,
            schedule,
            config.epochs,
            batches=lambda: (
                torch.randperm(len(x), generator=generator).to(x.device).split(min(config.batch_size, len(x)))
            ),
            training=True,
            validate=None if val is None else partial(validate, *val),
            score="w_inf",
            on_epoch=on_epoch,
            progress=progress,
            checkpoint=checkpoint,
            generator=generator,
            averaged=averaged,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The training loop that both share
# ---------------------------------------------------------------------------------------------------------------------


def _train(
    model: nn.Module,
    objective: Callable[[Tensor], Tensor],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    epochs: int,
    *,
    batches: Callable[[], Sequence[Tensor]],
    training: bool,
    validate: Callable[[], dict[str, float]] | None,
    score: str,
    on_epoch: Callable[[int, nn.Module], dict[str, float] | None] | None,
    progress: Progress,
    checkpoint: _Checkpoint,
    generator: torch.Generator,
    memory: dict[str, Any] | None = None,
    averaged: torch.optim.swa_utils.AveragedModel | None = None,
) -> History:
    """SGD on `objective` over the batches of each epoch; the model ends with the weights of the best epoch.

    The best epoch is that of the highest validation `score`, the earliest among equals; the last without validation.
    `memory` holds the lists that the objective appends to; they are kept in the checkpoint like everything else.

    Parameters change in one place only, in which no signal is let in: whenever the run ends, the state at the end of
    the last finished minibatch is that of the parameters as they are and of the rest as it was noted then.
    """
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    shown = model if averaged is None else averaged.module
    memory = memory or {}
    stateful: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule, "averaged": averaged}
    stateful = {name: part for name, part in stateful.items() if part is not None}
    order: Sequence[Tensor] = ()
    losses: list[float] = []
    rows: list[dict[str, float]] = []
    best, best_state, spent = 0, copy.deepcopy(model.state_dict()), 0.0
    saved, checkpoint.saved = checkpoint.saved, None
    if saved:
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        order, losses, rows, best, best_state, spent = (
            saved[name] for name in ("order", "losses", "rows", "best", "best_state", "spent")
        )
        for name, values in saved["memory"].items():
            memory[name].extend(values.to(trained[0].device))
        _set_random_state(model, generator, saved["random"])
    fresh, saved = saved is None, None  # it may be as large as three networks
    begin = time.perf_counter() - spent

    def history(finished: bool) -> History:
        return History(rows, best, _floats(memory.get("upsilon", [])), time.perf_counter() - begin, finished)

    def noted() -> dict[str, Any]:
        """What changes within a minibatch, or is replaced; cheap."""
        if checkpoint.path is None:
            return {}
        return {
            "order": order,
            "losses": [*losses],
            "rows": [*rows],
            "best": best,
            "best_state": best_state,
            "memory": {name: [*values] for name, values in memory.items()},
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
            "random": _random_state(model, generator),
            "spent": time.perf_counter() - begin,
        }

    def save(note: dict[str, Any]) -> None:
        if checkpoint.path is None:
            return
        state = {name: part.state_dict() for name, part in stateful.items()}
        state["memory"] = {name: torch.stack([*values]) for name, values in note["memory"].items() if values}
        state["model"] = {name: note["buffers"].get(name, value) for name, value in state["model"].items()}
        checkpoint.save(note | state)

    with checkpoint.signals() as signals:
        note = noted()
        try:
            if fresh:
                save(note)  # a folder that cannot be written is better known now
            while len(rows) < epochs:
                epoch = len(rows) + 1
                if not order:
                    with signals.held():
                        order = batches()
                        note = noted()
                for batch in _track(order[len(losses) :], f"epoch {epoch}/{epochs}", progress):
                    model.train(training)
                    for parameter in model.parameters():
                        parameter.requires_grad_(False)
                    for parameter in trained:
                        parameter.requires_grad_(True)
                    optimiser.zero_grad()
                    with _blamed_on_the_rate(optimiser, epoch, len(losses) + 1), _blamed_on_the_batch(len(batch)):
                        loss = objective(batch)
                        if not loss.requires_grad:
                            raise WdatError("the model's output depends on no parameter that is to be trained")
                        loss.backward()
                        gradients = [p.grad.isfinite().all() for p in trained if p.grad is not None]
                        _check_finite(torch.stack([loss.isfinite(), *gradients]).all())
                    with signals.held():
                        with _blamed_on_the_rate(optimiser, epoch, len(losses) + 1):
                            _step(optimiser)
                        schedule.step()
                        if averaged is not None:
                            averaged.update_parameters(model)
                        losses.append(loss.item())
                        note = noted()
                    if checkpoint.time_is_up():
                        save(note)
                        return history(finished=False)
                    if checkpoint.is_due():
                        save(note)
                row = {"epoch": epoch, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - begin}
                with _blamed_on_the_rate(optimiser, epoch, len(losses)):
                    _check_finite(torch.stack([t.isfinite().all() for t in shown.state_dict().values()]).all())
                    row |= validate() if validate else {}
                if on_epoch:
                    more = on_epoch(epoch, shown)
                    if not isinstance(more, dict | None):
                        raise WdatError(f"on_epoch must return a dict of numbers or None, not {more!r}")
                    row |= more or {}
                with signals.held():
                    rows.append(row)
                    if validate is None or best == 0 or row[score] > rows[best - 1][score]:
                        best, best_state = epoch, copy.deepcopy(shown.state_dict())
                    order, losses = (), []
                    note = noted()
                save(note)
        except _Interrupt:
            save(note)
            raise
    model.load_state_dict(best_state)
    return history(finished=True)


def _step(optimiser: torch.optim.Optimizer) -> None:
    try:
        optimiser.step()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise _NotFiniteError(NOT_FINITE) from error  # the type of the weights does not hold the rate


@contextmanager
def _blamed_on_the_rate(optimiser: torch.optim.Optimizer, epoch: int, minibatch: int) -> Iterator[None]:
    try:
        yield
    except _NotFiniteError as error:
        raise WdatError(
            f"training diverged in epoch {epoch}, minibatch {minibatch}, at learning rate"
            f" {optimiser.param_groups[0]['lr']:g}: the loss, the model or its gradient is not finite: try a lower one"
            + (", or weights that start with less noise" if epoch == minibatch == 1 else "")
        ) from error


@contextmanager
def _blamed_on_the_batch(size: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise WdatError(
            "BatchNorm cannot train on a batch of one image: choose a batch_size that leaves no remainder of one"
        ) from error
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise WdatError(
            f"out of memory in the SGD step on a minibatch of {size} images: a batch_size of {max(1, size // 2)} takes"
            " about half of it; the attack alone is split by itself"
        ) from error


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def _random_start(x: Tensor, threat: Threat, fraction: float, generator: torch.Generator) -> Tensor:
    """Each image moved `fraction` of delta in a random direction, then clamped to [0, 1]."""
    noise = (2 * torch.rand(x.shape, generator=generator) - 1).to(x)
    return (x + fraction * threat.delta * noise / _per_image(_norm(noise, threat.r), x)).clamp(0, 1)


def _crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Each image (n, c, h, w) shifted by up to `pad` pixels with zeros coming in, and flipped with probability 1/2."""
    n, _, h, w = x.shape
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    flip = torch.randint(2, (n, 1), generator=generator).to(x.device)
    i = top + torch.arange(h, device=x.device)
    j = torch.arange(w, device=x.device)
    j = left + torch.where(flip == 1, w - 1 - j, j)
    images = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)[images, i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a run that is stopped at any moment goes on from the last one as if it had never been stopped
# ---------------------------------------------------------------------------------------------------------------------

CHECKPOINT = b"wdat_core checkpoint 1\n"


class _Interrupt(BaseException):
    """SIGTERM or SIGINT, while a run that has a checkpoint goes on."""


@dataclass
class _Checkpoint:
    """The file in which a training run is kept; without a path it keeps nothing and nothing is caught."""

    path: Path | None
    identity: dict[str, str]  # what must be the same for the run to go on: the words of the user to their values
    every: float  # seconds
    stop_at: float  # on the clock of time.monotonic
    written: float = field(default_factory=time.monotonic)
    saved: dict[str, Any] | None = None  # what the run goes on from

    def is_due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def time_is_up(self) -> bool:
        return time.monotonic() >= self.stop_at

    def load(self) -> dict[str, Any] | None:
        """What was saved last, None where nothing was. Nothing in the file is executed."""
        assert self.path is not None
        if not self.path.exists():
            return None
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise WdatError(f"the checkpoint {self.path} cannot be read ({error})") from error
        head, content = content[: len(CHECKPOINT) + 32], content[len(CHECKPOINT) + 32 :]
        try:
            if head != CHECKPOINT + hashlib.sha256(content).digest():
                raise pickle.UnpicklingError
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise WdatError(
                f"{self.path} is damaged, or no checkpoint of this version: remove it to start anew, or put back a copy"
            ) from error
        for name, value in self.identity.items():
            if saved["identity"].get(name) != value:
                there = f": there it was {saved['identity'].get(name)}, here it is {value}" if len(value) < 60 else ""
                raise WdatError(
                    f"the checkpoint {self.path} belongs to another run, it differs in {name}{there}:"
                    " give resume another file, or remove this one"
                )
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Whole or not at all: whatever happens meanwhile, the file under this name is the last good one."""
        assert self.path is not None
        stream = io.BytesIO()
        torch.save(state | {"identity": self.identity}, stream)
        content = stream.getbuffer()
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(CHECKPOINT + hashlib.sha256(content).digest())
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise WdatError(
                f"the checkpoint {self.path} could not be written ({error}): make room or give resume another file, and"
                " start again; the run goes on from the last one that was"
            ) from error
        self.written = time.monotonic()

    @contextmanager
    def signals(self) -> Iterator[_Signals]:
        """Where there is a checkpoint, SIGTERM and SIGINT raise `_Interrupt`; outside they do what they did before.

        One that is ignored, as in a job in the background, stays so. Python lets only the main thread handle signals;
        in another one the run is kept every minute all the same.
        """
        signals = _Signals()
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
        if self.path is None or threading.current_thread() is not threading.main_thread():
            yield signals
            return
        before = {number: signal.signal(number, signals) for number in numbers}
        try:
            yield signals
        except _Interrupt:
            pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if signals.received is not None:
            signal.raise_signal(signals.received)
            raise SystemExit(128 + signals.received)  # the handler of the caller has let it pass


class _Signals:
    """A signal handler that raises at once, or at the end of `held`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.holding = False

    def __call__(self, number: int, frame: Any) -> None:
        first, self.received = self.received is None, number
        if first and not self.holding:
            raise _Interrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.received is not None:
            raise _Interrupt


def _checkpoint(
    resume: str | os.PathLike[str] | None,
    save_every: float,
    stop_after: float | None,
    model: nn.Module,
    train: Images,
    val: Images | None,
    config: FinetuneConfig | PretrainConfig,
) -> _Checkpoint:
    """Checks the three arguments about checkpoints; must be called before the model is changed."""
    _check_number("save_every", save_every, at_least=0)
    if stop_after is not None:
        _check_number("stop_after", stop_after, at_least=0)
    if resume is None:
        if stop_after is not None:
            raise WdatError("stop_after needs resume, the file from which the next run goes on")
        return _Checkpoint(None, {}, save_every, math.inf)
    if not isinstance(resume, (str, os.PathLike)) or str(resume) in ("", ".") or "\0" in str(resume):
        raise WdatError(f"resume must be the path of a file, not {resume!r}")
    path = Path(resume)
    if path.is_dir():
        raise WdatError(f"resume must be the path of a file, and {path} is a folder")
    identity = {
        **{f.name: repr(getattr(config, f.name)) for f in fields(config)},
        "the network": _digest(*model.state_dict().values(), names=[*model.state_dict()]),
        "the training images": _digest(*train),
        "the validation images": "none" if val is None else _digest(*val),
        "the version of wdat_core.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    stop_at = math.inf if stop_after is None else time.monotonic() + stop_after
    checkpoint = _Checkpoint(path, identity, save_every, stop_at)
    checkpoint.saved = checkpoint.load()
    return checkpoint


def _digest(*tensors: Tensor, names: Sequence[str] = ()) -> str:
    """SHA-256 of names, shapes, types and values, a thousand images at a time; on any device the same."""
    total = hashlib.sha256(repr([*names]).encode())
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in tensor.detach().split(1000) if tensor.ndim else [tensor.detach()]:
            part = part.cpu().contiguous()
            if part.numel():
                total.update((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
    return total.hexdigest()


def _random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """The states of all generators that a training run draws from."""
    state = {"run": generator.get_state(), "cpu": torch.get_rng_state()}
    return state | {str(d): torch.get_device_module(d).get_rng_state(d) for d in _accelerators(model)}


def _set_random_state(model: nn.Module, generator: torch.Generator, state: dict[str, Tensor]) -> None:
    generator.set_state(state["run"].cpu())
    torch.set_rng_state(state["cpu"].cpu())
    for device in _accelerators(model):
        torch.get_device_module(device).set_rng_state(state[str(device)].cpu(), device)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, model state, checks
# ---------------------------------------------------------------------------------------------------------------------


def _conjugate(p: float) -> float:
    return 1.0 if p == math.inf else p / (p - 1)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0 near 1 and below, also where the type of x does not hold the exponent (float16)."""
    return x ** min(exponent, torch.finfo(x.dtype).max)


def _mean(values: Tensor, order: float, weights: Tensor | None = None) -> Tensor:
    """(mean_i v_i^order)^(1/order) of values >= 0, their maximum for order inf; scaled first, so nothing overflows."""
    top = values.max()
    if order == math.inf:
        return top
    scale = torch.where(top > 0, top, 1.0)
    powers = _power(values / scale, order)
    return scale * (powers.mean() if weights is None else (powers * weights).sum()) ** (1 / order)


def _norm(x: Tensor, order: float) -> Tensor:
    """The l_order norm of each image, (n, ...) to (n,); scaled first where powers could overflow."""
    dims = tuple(range(1, x.ndim))
    if order == 1:
        return x.abs().sum(dims)  # on a CPU several times as fast as vector_norm, as is the next
    top = x.abs().amax(dims)
    if order == math.inf:
        return top
    return top * torch.linalg.vector_norm(x / _per_image(torch.where(top > 0, top, 1.0), x), order, dims)


def _floats(values: Sequence[Tensor]) -> list[float]:
    """Numbers that stayed on the device, read all at once."""
    return torch.stack([*values]).tolist() if values else []


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """(n,) to (n, 1, ..., 1), to go with x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _plain(x: Tensor) -> Tensor:
    """`x` outside the caller's graph, and an ordinary tensor if the caller made it in inference mode."""
    return x.clone() if x.is_inference() else x.detach()


@dataclass
class _Passes:
    """How images go through the model."""

    call: Callable[[Tensor], Tensor]
    device: torch.device  # of the model; images elsewhere come to it a batch at a time
    batch_size: int  # images at once, at most; halved where the device has no room for them
    fixed: bool  # always as many, since the model is compiled for one shape
    whole: bool = False  # never fewer, since the model is in train mode and looks at the batch

    def batches(self, x: Tensor, rows: Tensor | None = None) -> Sequence[Rows]:
        """Which of the images go together: all of them as slices, or the given row numbers in even shares."""
        n, size = len(x), min(self.batch_size, len(x))
        if rows is None and not (self.fixed and n % size):
            return [slice(i, i + size) for i in range(0, n, size)]
        rows = torch.arange(n, device=x.device) if rows is None else rows
        if not len(rows):
            return []
        if self.fixed:
            return torch.cat([rows, rows[-1:].expand(-len(rows) % size)]).split(size)  # an image twice is no harm
        return rows.tensor_split(math.ceil(len(rows) / size))


def _passes(
    model: nn.Module, x: Tensor, batch_size: int, precision: str, compiled: bool, classes: int | None = None
) -> _Passes:
    _check_choice("precision", precision, PRECISIONS)
    _check_flag("compiled", compiled)
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), x.device)
    run: Callable[[Tensor], Tensor] = model
    if compiled:
        fast = torch.compile(model, dynamic=False, mode="reduce-overhead")

        def run(x: Tensor) -> Tensor:
            try:
                return fast(x)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = " ".join(str(error).split())[:300]
                raise WdatError(f"torch.compile fails on this model, use compiled=False ({reason})") from error

    def call(x: Tensor) -> Tensor:
        logits = run(x.clone())  # a model may write into what it is given
        if not isinstance(logits, Tensor) or logits.shape != (len(x), classes or logits.shape[-1]):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise WdatError(
                f"the model must return logits of shape (b, classes), also for {len(x)} images; it returned {shape}"
            )
        return logits

    if precision == "float32":
        return _Passes(call, device, batch_size, compiled)

    def lower(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call(x)

    return _Passes(lower, device, batch_size, compiled)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Mode, requires_grad flags and gradients are given back as they were, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _prepared(model: nn.Module, training: bool = False) -> Iterator[None]:
    """The model as the attacker sees it: in eval mode unless told otherwise, no gradients for its parameters."""
    with _untouched(model), torch.inference_mode(False):
        model.train(training)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def _accelerators(model: nn.Module) -> list[torch.device]:
    """The devices of the model that have random numbers of their own."""
    return [d for d in {p.device for p in model.parameters()} if d.type not in ("cpu", "meta")]


@contextmanager
def _seeded(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """The global generators, which layers such as dropout use, seeded from `generator`; given back as they were."""
    devices = _accelerators(model)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        # torch.manual_seed would seed every other device as well, and those are not given back.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)
        yield


def _track(items: Sequence[Any], label: str, progress: Progress) -> Iterator[Any]:
    """The items, with a line of text twice a second on how far they are; an empty line at the end clears it."""
    if not progress:
        yield from items
        return
    show = _stderr_line if progress is True else progress
    begin, shown = time.monotonic(), -math.inf
    try:
        for i, item in enumerate(items):
            now = time.monotonic()
            if now - shown > 0.5:
                left = f", {(now - begin) / i * (len(items) - i):.0f} s left" if i else ""
                show(f"{label}: {i}/{len(items)}{left}")
                shown = now
            yield item
    finally:
        show("")


def _stderr_line(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


NOT_FINITE = (
    "the model or the loss returns NaN or infinite values for these images, or its gradient there is not finite"
)


def _check_threat(threat: Threat) -> None:
    if not isinstance(threat, Threat):
        raise WdatError(f"threat must be a Threat, not {threat!r}")


def _check_attack(
    model: nn.Module, x: Tensor, y: Tensor, loss: str | Loss, batch_size: int, threat: Threat
) -> tuple[Loss, int]:
    """Names the first fault of the images, the labels, the model or the loss; returns the loss as a function."""
    _check_threat(threat)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise WdatError(f"images must be a floating-point tensor in [0, 1], not {kind}: divide bytes by 255")
    _check_dense("images", x)
    if x.ndim < 2 or x.numel() == 0:
        raise WdatError(f"images must have shape (n, c, h, w) with at least one image, not {tuple(x.shape)}")
    least, most = x.aminmax()
    if not (least >= 0 and most <= 1):
        raise WdatError(
            f"images must lie in [0, 1], these span [{least:.4g}, {most:.4g}]: normalisation belongs in the model"
        )
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise WdatError(f"labels must be an int64 tensor, not {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    _check_dense("labels", y, meta_is_fine=True)
    if y.shape != x.shape[:1]:
        raise WdatError(f"labels must have shape ({len(x)},), one for each image, not {tuple(y.shape)}")
    if y.device != x.device:
        raise WdatError(f"images are on {x.device} and labels on {y.device}: put both on one device")
    _check_number("batch_size", batch_size, at_least=1, whole=True)
    if isinstance(loss, str):
        _check_choice("loss", loss, tuple(LOSSES))
    elif not callable(loss):
        raise WdatError(f"loss must be one of {', '.join(LOSSES)} or a function, not {loss!r}")
    function = LOSSES[loss] if isinstance(loss, str) else loss

    _check_model(model)
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]} or {x.device}
    device = min(devices, key=str)
    if len(devices) > 1 or device.type == "meta" or x.device not in (device, torch.device("cpu")):
        where = " and ".join(sorted(map(str, devices)))
        raise WdatError(
            f"the model is on {where}, the images are on {x.device}: put the model on one device, and the images"
            " there or on the CPU"
        )
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds and x.dtype not in kinds:
        raise WdatError(f"the model is {kinds.pop()}, the images are {x.dtype}: convert one to the other")
    with _prepared(model), torch.enable_grad():
        try:
            logits = model(_plain(x[:1]).to(device).requires_grad_().clone())
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise WdatError(f"the model does not take images of shape {tuple(x.shape[1:])}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise WdatError(f"the model must return logits of shape (b, classes); for one image it returned {shape}")
    classes = logits.shape[1]
    if function in (dlr, redlr) and classes < 3:
        raise WdatError(f"DLR and ReDLR need 3 classes or more, the model has {classes}: use loss='ce'")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise WdatError(f"labels must lie in 0..{classes - 1} for this model, these span {low}..{high}")
    return function, classes


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise WdatError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _check_training(train: Images, val: Images | None, config: Any, kind: type, on_epoch: Any, progress: Any) -> None:
    """What training alone is given; before anything is unpacked."""
    if not isinstance(config, kind):
        raise WdatError(f"config must be a {kind.__name__}, not {type(config).__name__}")
    for name, pair in (("train", train), ("val", val)):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2) and not (name == "val" and pair is None):
            raise WdatError(f"{name} must be a pair (images, labels), not {type(pair).__name__}")
    if on_epoch is not None and not callable(on_epoch):
        raise WdatError(f"on_epoch must be a function, not {on_epoch!r}")
    _check_progress(progress)


def _check_trainable(parameters: Sequence[nn.Parameter]) -> None:
    if not parameters:
        raise WdatError("the model has no floating-point parameter to train")


def _check_progress(progress: Any) -> None:
    if not isinstance(progress, bool) and not callable(progress):
        raise WdatError(f"progress must be True, False or a function, not {progress!r}")


def _check_dense(name: str, tensor: Tensor, meta_is_fine: bool = False) -> None:
    if tensor.layout != torch.strided or (tensor.is_meta and not meta_is_fine):
        raise WdatError(f"{name} must be a dense tensor with values, not {tensor.layout} on {tensor.device}")


def _check_steps(steps: int, step_ratio: float) -> None:
    _check_number("steps", steps, at_least=1, whole=True)
    _check_number("step_ratio", step_ratio, above=0)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise WdatError(f"{name} must be True or False, not {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise WdatError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """`value` is a number (whole if asked) in the range; infinite only where `at_most` is."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise WdatError(f"{name} must be {kind}, not {value!r}")
    inside = value > above and value >= at_least and (value < below if at_most is None else value <= at_most)
    inside &= whole or value == math.inf or abs(value) <= sys.float_info.max  # not an integer that no float holds
    if not inside:
        low = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}"
        high = "" if at_most == math.inf else f" and at most {at_most:g}" if at_most else f" and below {below:g}"
        raise WdatError(f"{name} must be {kind} {low}{high if below < math.inf or at_most else ''}, not {value!r}")
