"""Wasserstein distributional adversarial attack and training, in one file.

The method of Bai, He, Jiang, Obłój, *Wasserstein distributional adversarial training for deep neural networks*
(arXiv 2502.09352). Where to find what the paper says:

    Section 3                the threat (W_p, l_r)                         `Threat`
    Section 3                ReDLR, and the losses beside it               `redlr`, `dlr`, `ce`, `margin`
    (4.1)                    the metric d: images move, labels do not      `_norm`, `_distances`
    (4.2), (5.2)             the supremum over the ball                    `wpgd` finds a lower bound of it
    Theorem 4.1 (i)          the sensitivity Upsilon                       `sensitivity`
    Theorem 4.1 (ii)         the first-order optimal direction T           `_steepest` times `_share`
    pj_delta                 the projection onto the ball                  `project`
    (5.3)                    W-PGD                                         `wpgd`, its loop is `_attack`
    (5.5)                    W-PGD-budget                                  `wpgd_budget`
    (5.1), (5.4) to (5.6)    Algorithm 1, a minibatch                      `wdat`
    Algorithm 1              the loop over minibatches                     `finetune`
    Section 5                a network perturbed before its fine-tuning    `perturb_`
    Section 6                clean, W_inf and W_2 accuracy                 `evaluate`
    beyond the paper         the lowest accuracy in the ball               `boundary`
    beyond the paper         training for it                               `worst_case`

Three lines attack a network of your own::

    from wdat_core import Threat, wpgd
    attack = wpgd(model, x, y, Threat(p=2, delta=8 / 255))
    attack.accuracy, attack.distance, attack.x_adv

And three say how robust it is for every budget::

    from wdat_core import Threat, boundary
    found = boundary(model, x, y)
    found.accuracy(Threat(p=2, delta=8 / 255)), found.curve(p=2)

Three things can be replaced by a function: the loss of the attacker (`wpgd`), the vector along which it steps (`wpgd`)
and the objective of the training (`Minibatch`); each has an example where it is described.

On many devices each process holds a part of the images and gives a `group` of torch.distributed; what is global stays
global, so that N processes attack and train as one does. See `wpgd` and `finetune`.

Conventions, everywhere in this file:

- images `x`: floating point, shape (n, c, h, w) (any shape (n, ...) works), values in [0, 1]; labels `y`: int64, (n,);
- radii, distances and steps are in the same [0, 1] pixel units; accuracies are fractions;
- the device and the floating-point type are those of the images and the model, which must agree;
- the caller's model keeps its mode, `requires_grad` flags and gradients; only `perturb_` and `finetune` change
  parameters, which is what they are for;
- randomness comes from one `torch.Generator` made from a seed; the global generator is left as it was found, but by a
  model that draws from it in eval mode and by a DataLoader that does;
- a `torch.autocast` of the caller's own has no effect in here: `precision` is for that. Threads that share a model are
  not supported;
- what a caller can get wrong raises `WdatError` with one sentence that says what was wrong and what to do. An error
  inside the caller's own model or function is shown as it is.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import dis
import functools
import glob
import hashlib
import importlib.util
import io
import math
import numbers
import os
import pickle
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import types
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from inspect import getattr_static
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attack",
    "Boundary",
    "FinetuneConfig",
    "History",
    "Minibatch",
    "Scores",
    "Threat",
    "WdatError",
    "boundary",
    "ce",
    "code_digest",
    "dlr",
    "evaluate",
    "finetune",
    "margin",
    "perturb_",
    "pgd",
    "project",
    "redlr",
    "sensitivity",
    "trades",
    "wdat",
    "worst_case",
    "wpgd",
    "wpgd_budget",
]

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (b, m), labels (b,) -> (b,)
Rule = Callable[[Tensor, Tensor], Tensor]  # gradient (b, ...), what it gave before (b, ...; first zeros) -> (b, ...)
Progress = Callable[[Any], Any]  # wraps what is iterated over, as tqdm.tqdm does
Images = tuple[Tensor, Tensor]
Rows = slice | Tensor


class WdatError(ValueError):
    """Something the caller can put right; the message says what and how."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # arrays and torch's own messages come with line breaks


class _NotFiniteError(WdatError):
    """The network's output is not finite; while it trains, the learning rate is to blame."""


# ---------------------------------------------------------------------------------------------------------------------
# Section 3: the threat (W_p, l_r) and the losses of the attacker
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threat:
    """An adversary who may move the data distribution by `delta` in Wasserstein distance W_p over the pixel norm l_r.

    Args:
        p: order of the Wasserstein distance, in [1, inf]. inf bounds every image alone, as in ordinary PGD. 1 is for
            `boundary` and `project`; W-PGD needs a p above it.
        r: norm between images, in (1, inf].
        delta: radius, > 0, in [0, 1] pixel units; at most 1 for r = inf.
    """

    p: float = 2.0
    r: float = math.inf
    delta: float = 8 / 255

    def __post_init__(self) -> None:
        _check_number("p", self.p, at_least=1, at_most=math.inf)
        _check_number("r", self.r, above=1, at_most=math.inf)
        _check_number("delta", self.delta, above=0)
        if self.r == math.inf and self.delta > 1:
            raise WdatError(
                f"delta must be at most 1 for r = inf, not {self.delta!r}: pixels are in [0, 1], so it is 8 / 255"
            )
        _as_plain_numbers(self)

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
    gap = top[:, 0] - top[:, 2]
    tied = gap == 0  # all three, as they may be in 16 bits: the loss is flat there, and not nearly vertical
    return torch.where(tied, 0.0, -(z_y - rival) / (torch.where(tied, 1.0, gap) + 1e-12))


def redlr(logits: Tensor, y: Tensor) -> Tensor:
    """Rectified DLR of each image, -(DLR)^-, (n, m) and (n,) to (n,); m >= 3 (Section 3 of the paper).

    It is 0, with gradient 0, on a misclassified image, so that a distributional attacker spends nothing there.
    """
    return torch.where(logits.argmax(1) == y, dlr(logits, y), 0.0)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margin of each image, -(z_y - max_j z_j)^+, (n, m) and (n,) to (n,): ReDLR without its denominator; m >= 2.

    For two classes, where DLR and ReDLR are not defined. It too is 0, with gradient 0, on a misclassified image.
    """
    return torch.where(logits.argmax(1) == y, _deficit(logits, y), 0.0)


def _kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax of the logits) of each image, (n, m) and (n, m) to (n,): the attacker's loss in TRADES."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


SLOPED = (ce, dlr, _kl)  # rising somewhere from nearly every image; the others may be flat, as ReDLR on a lost image
LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "redlr": redlr, "margin": margin}


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
    group: Any = None,
) -> float:
    """The sensitivity Upsilon = (E ||grad_x J||_s^q)^(1/q) of Theorem 4.1 (i) over all the images.

    It is the slope of V(delta) = sup E[J] over the Wasserstein ball at delta = 0, so it does not depend on
    `threat.delta`. It is 0 for ReDLR when no image is classified correctly.

    Raises:
        WdatError: for the faults of input that `wpgd` names.
    """
    on = _attacker(model, x, y, threat, loss, batch_size, precision, compiled, group=group)
    with _prepared(model):
        x, y = _plain(x), _plain(y)
        look, upsilon = _whole_upsilon(on, x, y)
        _check_slope(on, x, not upsilon and not on.among.all(~look.correct.any()))
        return float(upsilon)


def _check_slope(on: _Attacker, x: Tensor, flat: bool) -> None:
    """A network that tells images apart, with gradient 0 at each of them, would seem robust.

    Args:
        flat: no image has a gradient, and some are classified correctly; alike in all processes.
    """
    if not flat:
        return
    few = x[:32]
    logits = _logits(on, torch.cat([few, 1 - few]))
    if on.among.all((logits == logits[:1]).all()):
        return
    if _moves(on, few):
        why = "the loss is saturated, since the logits move: take another, or divide the logits in the model"
    elif _moves(on, torch.cat([1 - few, few / 2])):
        why = "all of the model is off or saturated at these images, as it is not elsewhere: give other images"
    else:
        why = "remove the rounding or the quantisation in the model"
    name = getattr(on.loss, "__name__", "")
    loss = f"loss {name}" if name.isidentifier() else "loss"  # and no <lambda>
    raise WdatError(f"the gradient of the {loss} is 0 at every image, though the model tells images apart: {why}")


def _moves(on: _Attacker, images: Tensor) -> bool:
    """Whether the logits have a gradient other than 0 at any of a few images, in any process."""
    found = [torch.zeros((), dtype=torch.bool, device=on.passes.device)]

    def work(rows: Rows) -> None:
        x = images[rows].detach().to(on.passes.device).requires_grad_()
        logits = on.passes.call(x)
        total = (logits * torch.arange(1, 1 + on.classes, device=logits.device)).sum()  # a plain sum may be constant
        slope = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
        found.append(torch.ones_like(found[0]) if slope is None else slope.any())  # None is named by the attack

    with torch.enable_grad():
        _in_parts(on.passes, images, on.passes.batches(images), work)
    return not on.among.all(~torch.stack(found).any())


def _whole_upsilon(on: _Attacker, x: Tensor, y: Tensor) -> tuple[_Look, Tensor]:
    """A look at all images, and their Upsilon."""
    look = _look(on, x, y, _blank(on, x, directions=False))
    upsilon = _mean(look.norm, on.threat.q, on.among)
    _check_finite(on.among.all(look.finite) & upsilon.isfinite())
    return look, upsilon


def _steepest(gradient: Tensor, norm: Tensor, s: float) -> Tensor:
    """The direction of unit l_r norm along which each loss rises fastest: sgn(g) |g|^(s-1) / ||g||_s^(s-1).

    Images with gradient 0 get direction 0. For l_inf (s = 1) it is the sign.
    """
    if s == 1:
        return gradient.sign()
    unit = gradient / _per_image(torch.where(norm > 0, norm, 1.0), gradient)
    return unit.sign() * _power(unit.abs(), s - 1)


def _share(norm: Tensor, upsilon: Tensor, q: float) -> Tensor:
    """How far each image goes: (||g||_s / Upsilon)^(q-1), whose p-th power has mean 1. All 1 for p = inf.

    Together with `_steepest` this is T of Theorem 4.1 (ii), of unit length in W_p.
    """
    return _power(torch.where(upsilon > 0, norm / upsilon, 0.0), q - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Section 5: the projection pj_delta, W-PGD (5.3) and W-PGD-budget (5.5)
# ---------------------------------------------------------------------------------------------------------------------


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """pj_delta: `x_adv` moved back into the Wasserstein ball of radius delta around `x`; both (n, ...).

    Nothing moves when (mean_i d_i^p)^(1/p) <= delta, d_i the distance image i has gone. Otherwise the budget of
    every image shrinks from d_i to rho d_i, rho = delta / W_p, by clipping (l_inf) or scaling (any other norm). For
    p = inf, images further away than delta come back to delta and the others stay. Pixels may leave [0, 1]: `wpgd`
    clamps them afterwards.

    Raises:
        WdatError: names which of the two is no dense, finite, floating-point tensor, or that they are not alike, or
            too far apart.
    """
    _check_threat(threat)
    for name, images in (("x_adv", x_adv), ("x", x)):
        if not isinstance(images, Tensor) or images.dtype not in FLOATS or images.ndim < 2 or images.numel() == 0:
            what = "a floating-point tensor (n, ...) with at least one image"
            raise WdatError(f"{name} must be {what}, not {_kind(images)}")
        _check_dense(name, images)
        if not images.isfinite().all():
            raise WdatError(f"{name} must be finite")
    if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
        raise WdatError(
            f"x_adv and x must be alike, not {tuple(x_adv.shape)} {x_adv.dtype} on {x_adv.device} and"
            f" {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)  # 16 bits hold no large distance
    far, near = x_adv.to(wide), x.to(wide)
    distance = _norm(far - near, threat.r)
    if not distance.isfinite().all():
        raise WdatError(f"x_adv is further from x than {wide} holds")
    return _pull_back(far, near, distance, _budgets(distance, threat.p, threat.delta, _Among()), threat.r).to(x.dtype)


def _budgets(distance: Tensor, p: float, delta: Tensor | float, among: _Among) -> Tensor:
    """The radius (n,) within which the projection leaves each image."""
    if p == math.inf:
        return torch.as_tensor(delta, dtype=distance.dtype, device=distance.device).expand_as(distance)
    total = _mean(distance, p, among)
    # Not delta / total, for which torch takes 1 / total, and that can be infinite.
    return torch.where(total > delta, distance / total * delta, distance)


def _pull_back(x_adv: Tensor, x: Tensor, distance: Tensor, budget: Tensor, r: float) -> Tensor:
    """Images at `distance` > `budget` (n,) brought to their budget: clipped for r = inf, scaled for another r."""
    shrunk = x + _shortened(x_adv - x, distance, budget, r)
    return torch.where(_per_image(distance <= budget, x), x_adv, shrunk)


def _shortened(move: Tensor, distance: Tensor, budget: Tensor, r: float) -> Tensor:
    """Moves (n, ...) as long as `distance` (n,) brought to `budget`: clipped for r = inf, scaled for another r."""
    if r == math.inf:
        limit = _per_image(budget, move)
        return move.clamp(-limit, limit)
    return move * _per_image(budget / torch.where(distance > 0, distance, 1.0), move)


@dataclass(frozen=True, eq=False)  # tensors are not compared to one truth
class Attack:
    """What an attack found: its iterate of lowest accuracy.

    Attributes:
        x_adv: the attacked images, as x.
        accuracy: fraction classified correctly there, the lowest over the iterates x_1..x_steps.
        loss: mean attack loss of that iterate.
        distance: (mean_i ||x_adv_i - x_i||_r^p)^(1/p), at most delta, up to the rounding of the pixels.
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
    rule: Rule | None = None,
    steps: int = 20,
    step_ratio: float = 1.0,
    random_start: float = 0.0,
    seed: int = 0,
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
    folder: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress | None = None,
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
        loss: "redlr", "dlr" (both need 3 classes or more), "margin", "ce", or a function (logits, labels) to losses
            (b,). Cross-entropy is a weak attacker for a finite p: it spends budget on images that are lost already.
        rule: a function of the gradient of a batch and of what it returned for the same images one step before (zeros
            at first), both (b, c, h, w), to the vector that stands for g_i in (5.3). None is the gradient. Whatever it
            returns, the step has the length of (5.3). Momentum (Dong et al., 2018) is three lines::

                def momentum(gradient, before):
                    length = gradient.abs().sum((1, 2, 3), keepdim=True)
                    return before + gradient / torch.where(length > 0, length, 1.0)

                wpgd(model, x, y, Threat(), loss="ce", rule=momentum)

            And a loss of one's own, the margin of Carlini and Wagner (2017), on misclassified images too::

                def carlini_wagner(logits, y):
                    own = F.one_hot(y, logits.shape[1]).bool()
                    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]

                wpgd(model, x, y, Threat(), loss=carlini_wagner)

        steps: number of steps, >= 1 (20 in the paper).
        step_ratio: total length of the steps over delta, > 0 (1 in the paper).
        random_start: x_0 is each image moved this fraction of delta, in [0, 1], in a random direction; 0 is the image.
        seed: of that random direction.
        precision: "float32" runs the model as it is, "bfloat16" under autocast; images and steps stay as they are.
        compiled: run the model through `torch.compile`, with CUDA graphs on a GPU; the first batch then takes a minute.
        folder: for a set larger than memory, a folder on a disk with room for twice the images and more: what is as
            large as they are lies in files there, x_adv too, which are gone with the last tensor of this process. The
            images, on the CPU, can be such a file themselves (`torch.from_file`, or numpy's `memmap`). None: all is in
            memory.
        group: a process group of torch.distributed, such as `torch.distributed.group.WORLD` after
            `init_process_group`, each of whose processes calls this with its own part of the images, of any size, even
            of none. They attack as one process would that has them all: accuracy, loss, distance and history are of
            all images, x_adv and correct of the part. Only the random start is each process's own.
        progress: what the steps are wrapped in to show how far they are, such as `tqdm.tqdm`.

    Raises:
        WdatError: names what is wrong with the images, the labels, the model or a parameter.
    """

    def ahead() -> None:
        nonlocal random_start, seed
        random_start = _check_number("random_start", random_start, at_least=0, at_most=1)
        seed = _check_number("seed", seed, at_least=0, below=2**63, whole=True)
        _check_function("progress", progress)
        _check_folder(folder, x)

    also = {"random_start": random_start}
    on = _attacker(
        model, x, y, threat, loss, batch_size, precision, compiled, steps, step_ratio, rule, group, ahead, also
    )
    _check_fine(x, on)
    on = replace(on, folder=None if folder is None else Path(folder))
    with _prepared(model):
        x, y, start = on.room(x).copy_(x) if x.is_inference() else x.detach(), _plain(y), None
        if random_start:
            start, own = on.room(x), torch.Generator().manual_seed((seed + on.among.rank) % 2**63)
            for i in range(0, len(x), batch_size):
                rows = slice(i, i + batch_size)
                random = torch.rand(x[rows].shape, generator=own, device="cpu")
                start[rows] = _moved(x[rows], threat, random_start, random.to(x))
        attack = _attack(on, x, y, start=start, progress=progress)
        flat = not any(attack.history["upsilon"]) and attack.history["accuracy"][0] > 0
        if flat and rule is not None:  # it may stay where it is, as its author wants it: the gradient itself counts
            flat = not _whole_upsilon(replace(on, rule=None), x, y)[1]
        _check_slope(on, x, flat)
        return attack


def _attack(
    on: _Attacker,
    x: Tensor,
    y: Tensor,
    *,
    delta: Tensor | float | None = None,
    start: Tensor | None = None,
    first: _Look | None = None,
    last: bool = False,
    progress: Progress | None = None,
) -> Attack:
    """The one attack loop, on checked input and a prepared model.

    Args:
        delta: the radius, where it is not that of the threat: the share of a batch, (5.5).
        start: x_0, where it is not x.
        first: what is known of x_0 already; changed by the attack.
        last: the last iterate is wanted, as in training, and its forward pass is saved (accuracy, loss and correct are
            then those of the iterate before).
    """
    passes, steps, among, p, q, r = on.passes, on.steps, on.among, on.threat.p, on.threat.q, on.threat.r
    delta = on.threat.delta if delta is None else delta
    alpha = on.step_ratio * delta / steps
    slices = [slice(i, i + passes.batch_size) for i in range(0, len(x), passes.batch_size)]
    n = among.count(x)
    # Where the direction is that of the present gradient alone, an image with gradient 0 stays where it is, and so does
    # all that an eval-mode network says of it: it is not looked at again until a projection moves it.
    rests = on.rule is None and not passes.whole and on.loss not in SLOPED
    # A step is alpha long in W_p, whatever the rule. Until steps from x add up to delta there is nothing to project.
    # Powers of order q - 1 and s - 1 know that length up to as many roundings.
    free = (0.999 - 8 * torch.finfo(x.dtype).eps * (q + on.threat.s)) * steps / on.step_ratio
    if start is not None or x.dtype.itemsize == 2:  # in 16 bits every step may be rounded up
        free = 0.0

    x_adv = on.room(x).copy_(x if start is None else start)
    now = _look(on, x_adv, y, _blank(on, x)) if first is None else first
    was_correct = now.correct.clone()
    hits, losses, upsilons = ([value] for value in _summary(now, q, among))
    assert now.direction is not None
    for k in _shown(progress, range(1, steps + 1), "steps"):
        step = _step(now.norm, upsilons[-1], q, alpha)
        moved, distance = now.norm > 0, torch.empty_like(now.norm)
        for rows in slices:  # a batch at a time, while it is in the cache
            direction = _unpack(now.direction[rows], x_adv[rows]) if on.threat.s == 1 else now.direction[rows]
            x_adv[rows].addcmul_(_per_image(step[rows], x), direction)  # (5.3): x + alpha T(x),
            if k <= free:
                x_adv[rows].clamp_(0, 1)
            else:
                distance[rows] = _norm(x_adv[rows] - x[rows], r)
        if k > free:
            budget = _budgets(distance, p, delta, among)
            moved |= distance > budget
            for rows in slices:
                x_adv[rows] = _pull_back(x_adv[rows], x[rows], distance[rows], budget[rows], r)  # pj_delta,
                x_adv[rows].clamp_(0, 1)  # and [0, 1]
        if last and k == steps:
            break

        again = passes.batches(x, moved.nonzero()[:, 0] if rests else None)
        _look(on, x_adv, y, now, again, backward=k < steps)
        for values, value in zip((hits, losses, upsilons), _summary(now, q, among), strict=True):
            values.append(value)
        if last:
            continue
        if k == 1:
            x_best, best_correct = on.room(x).copy_(x_adv), now.correct.clone()
            best_hits, best_loss = hits[1], losses[1]
        else:
            better = hits[k] < best_hits  # not read: on a GPU the host would wait for it
            x_best.lerp_(x_adv, better.to(x.dtype))  # the one or the other, exactly
            best_correct = torch.where(better, now.correct, best_correct)
            best_hits, best_loss = torch.where(better, hits[k], best_hits), torch.where(better, losses[k], best_loss)

    _check_finite(among.all(now.finite))
    if last:
        x_best, best_correct, best_hits, best_loss = x_adv, now.correct, hits[-1], losses[-1]
    history = {
        "accuracy": [h / n for h in _floats(hits)],
        "loss": _floats(losses),
        "upsilon": _floats(upsilons[:steps]),
    }
    far = torch.empty_like(now.norm)  # one tensor: small ones between the large would break the heap into pieces
    for rows in slices:
        far[rows] = _norm(x_best[rows] - x[rows], r)
    reached = _mean(far, p, among)
    return Attack(x_best, best_hits.item() / n, best_loss.item(), reached.item(), best_correct, was_correct, history)


def _summary(look: _Look, q: float, among: _Among) -> tuple[Tensor, Tensor, Tensor]:
    """How many images are correct, their mean loss and Upsilon; with a group, of all its images, in one message."""
    if among.group is None:
        return look.correct.sum(), look.loss.mean(), _mean(look.norm, q)
    sums = torch.stack([look.correct.sum().double(), look.loss.double().sum()])
    every = among.rows(torch.cat([sums, _part(look.norm, q)]))
    hits, loss = every[:, :2].sum(0)
    return hits.round().long(), (loss / every[:, -1].sum()).to(look.loss), _together(every[:, 2:], q).to(look.norm)


def _step(norm: Tensor, upsilon: Tensor, q: float, alpha: Tensor | float) -> Tensor:
    """How far each image goes in a step of length alpha, (n,); alpha times `_share`, and always a number."""
    # 0 where an infinite step meets an image that is to stay; far enough for any pixel, and its norm is a number.
    step = (_share(norm, upsilon, q) * alpha).nan_to_num(0.0)
    return step.clamp(max=math.sqrt(torch.finfo(norm.dtype).max))


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
    progress: Progress | None = None,
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
    on = _attacker(model, x, y, threat, loss, batch_size, precision, compiled, steps, step_ratio)
    _check_fine(x, on)
    upsilon = _check_number("upsilon", upsilon, above=0)
    _check_function("progress", progress)
    size, attacks = min(on.passes.batch_size, len(x)), []
    with _prepared(model):
        batches = list(zip(_plain(x).split(size), _plain(y).split(size), strict=True))
        for xb, yb in _shown(progress, batches, "batches"):
            first = _look(on, xb, yb, _blank(on, xb))
            delta_b = _radius(threat, _upsilon(first.norm, threat.q, on.among), upsilon)  # (5.5)
            attacks.append(_attack(on, xb, yb, delta=delta_b, first=first))
    cpu: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the caller's default device is
    sizes = torch.tensor([len(xb) / len(x) for xb, _ in batches], **cpu)

    def pool(values: Sequence[float], order: float) -> float:
        return _mean(torch.tensor(values, **cpu), order, weights=sizes).item()

    def average(values: Sequence[float]) -> float:
        return float(sizes @ torch.tensor(values, **cpu))

    by_iterate = {key: list(zip(*(a.history[key] for a in attacks), strict=True)) for key in attacks[0].history}
    with _prepared(model):
        flat = not any(map(any, by_iterate["upsilon"]))
        _check_slope(on, _plain(x), flat and any(a.was_correct.any() for a in attacks))
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


def _radius(threat: Threat, upsilon_b: Tensor, upsilon: Tensor | float) -> Tensor:
    """delta_B of a batch with the sensitivity Upsilon_B, (5.5); delta where the estimate of Upsilon is 0."""
    tiny = torch.finfo(upsilon_b.dtype).tiny
    if not isinstance(upsilon, Tensor):
        upsilon = upsilon_b.new_tensor(max(upsilon, tiny))
    share = _share(upsilon_b, upsilon.clamp(min=tiny), threat.q)
    return threat.delta * torch.where(upsilon > 0, share, 1.0)


def _upsilon(norm: Tensor, q: float, among: _Among) -> Tensor:
    """Upsilon of some images, in float32 at least: the quotient of two overflows in float16."""
    return _mean(norm, q, among).to(torch.promote_types(norm.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Section 5, "Training vs Fine-tuning": perturb a pre-trained network, then Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16")
BATCH_NORM = nn.modules.batchnorm._BatchNorm
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CHOICES = {  # of the fields of FinetuneConfig that have some
    "perturb": ("whole", "last_layer", "none"),
    "consistency": ("ce_detached", "ce", "kl"),
    "attack_label": ("true", "predicted"),
    "attack_mode": ("eval", "train"),
    "update_mode": ("train", "eval"),
    "reinit": ("default", "xavier"),
    "schedule": ("constant", "cosine", "one_cycle"),
    "first_upsilon": ("sample", "full"),
    "upsilon_from": ("sample", "batch"),
    "precision": PRECISIONS,
}


def perturb_(
    model: nn.Module,
    how: str,
    *,
    noise: float = 0.01,
    reinit: str = "default",
    head: str | None = None,
    x: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Perturb a pre-trained network in place, in one of the paper's two ways, before it is fine-tuned.

    Args:
        how: "whole" adds Gaussian noise of standard deviation `noise` times its root mean square to every parameter;
            "last_layer" draws the layer that gives the logits anew; "none" changes nothing.
        noise: relative size of that noise, >= 0.
        reinit: "default" calls the layer's own `reset_parameters`, "xavier" draws Xavier-normal weights, zero biases.
        head: for "last_layer", the name of that layer in `model.named_modules()`.
        x: for "last_layer" without `head`, images (b, c, h, w) to find the layer with; up to eight are looked at.
        generator: source of randomness (on the CPU); None is a new one with seed 0.

    Returns:
        The parameters that are to be trained next: all of them, or those of the last layer.

    Raises:
        WdatError: for another `how` or `reinit`, a negative noise, or a last layer that cannot be told.
    """
    _check_choice("how", how, CHOICES["perturb"])
    _check_choice("reinit", reinit, CHOICES["reinit"])
    noise = _check_number("noise", noise, at_least=0)
    _check_model(model)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    elif not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise WdatError(f"generator must be a torch.Generator on the CPU, not {generator!r}")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if how == "whole":
        with torch.no_grad():
            moved = []
            for parameter in parameters:
                rms = parameter.to(torch.promote_types(parameter.dtype, torch.float32)).square().mean().sqrt()
                random = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu")
                moved.append(parameter + (noise * rms * random.to(parameter.device)).to(parameter.dtype))
            if not all(m.is_meta or m.isfinite().all() for m in moved):
                raise WdatError(f"noise of {noise!r} makes the parameters infinite or NaN: use less")
            for parameter, value in zip(parameters, moved, strict=True):
                parameter.copy_(value)
        torch.clear_autocast_cache()
    if how != "last_layer":
        return parameters
    layer = _last_layer(model, head, x)
    if "weight" not in layer._parameters or (layer.bias is not None and "bias" not in layer._parameters):
        raise WdatError(
            "the last layer computes its weight or its bias from others, as weight_norm does: remove that before"
        )
    with _seeded(model, generator):
        if reinit == "default":
            layer.reset_parameters()
        else:
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    torch.clear_autocast_cache()
    return list(layer.parameters())


def _last_layer(model: nn.Module, head: str | None, x: Tensor | None) -> Any:
    """The layer of that name, or the one whose output the logits are, perhaps scaled."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    if head is not None:
        if not isinstance(head, str) or head not in layers:
            raise WdatError(
                f"head must name a linear or convolutional layer of the model, not {head!r}: {_few(layers)}"
            )
        return layers[head]
    if not layers:
        why = "the model has none"
        if _is_scripted(model):
            why = "TorchScript does not say what its layers are: give the model before torch.jit.script"
        raise WdatError(f'perturb "last_layer" needs a linear or convolutional layer, and {why}')
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.ndim < 2 or not x.numel():
        raise WdatError(f"which layer gives the logits? Give head, its name, or x, images to find it: {_few(layers)}")
    _check_dense("x", x)
    if any(p.is_meta for p in model.parameters()):
        raise WdatError(f"the model is on the device meta, where no layer gives values: give head, {_few(layers)}")
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name, layer in layers.items()
    ]
    try:
        with _prepared(model), torch.no_grad():
            weight = next(p for p in model.parameters() if p.is_floating_point())
            logits = _passes(model, x, 1, "float32", False).call(_plain(x[:8]).to(weight))
    finally:
        for hook in hooks:
            hook.remove()
    same = [k for k, v in outputs.items() if v.data_ptr() == logits.data_ptr() and v.numel() == logits.numel()]
    # Or the logits are its output, scaled or shifted.
    wide = [k for k, v in outputs.items() if v.shape == logits.shape and isinstance(layers[k], nn.Linear)]
    pairs = {k: torch.stack([outputs[k].flatten(), logits.flatten()]).double() for k in wide}
    wide = [k for k, pair in pairs.items() if pair.shape[1] > 3 and torch.corrcoef(pair)[0, 1].abs() > 0.9999]
    for found in (same, wide):
        if len(found) == 1:
            return layers[found[0]]
    raise WdatError(f"no layer is plainly the one that gives the logits: give head, its name; {_few(layers)}")


def _is_scripted(model: nn.Module) -> bool:
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


def _few(names: Any) -> str:
    last = list(names)[-8:]
    return f"{'among others ' * (len(names) > len(last))}{', '.join(map(repr, last))}"


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a run of `finetune`. Defaults are the paper's; where it is silent, the comment says so.

    What estimates Upsilon and what reads the consistency term is for "wdat" alone: other objectives do not look at it.

    Raises:
        WdatError: when made with a value of the wrong type or outside its range.
    """

    perturb: str = "whole"  # "whole", "last_layer" or "none", see perturb_
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
    objective: str | Callable[[Minibatch], Tensor] = "wdat"  # "worst_case", "trades" or "pgd"; or see `Minibatch`
    loss: str | Loss = "redlr"  # of the attacker, as in `wpgd`; two classes need another
    # What the paper leaves open:
    consistency: str = (
        "ce_detached"  # CE(f(x), f(x')): target softmax(f(x)) held fixed; "ce": not held; "kl": as TRADES
    )
    attack_label: str = "true"  # second argument of ReDLR(f(x), f(x')): the true label or the "predicted" one
    attack_mode: str = "eval"  # mode of the network while it is attacked; always "eval" where the last layer is trained
    update_mode: str = "train"  # mode of the trained part of the network during the SGD step
    random_start: float = 0.0  # attack starts at a random point this fraction of delta away
    noise: float = 0.01  # "small noise" of perturb="whole", relative to each tensor's root mean square
    reinit: str = "default"  # how perturb="last_layer" draws the layer
    head: str | None = None  # its name; None: the layer whose output the logits are
    augment: bool = True  # pad-4 crop and flip of the minibatch
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float = math.inf  # the gradient of all parameters together is shortened to this l_2 norm
    schedule: str = "constant"  # of the learning rate; "cosine", to 0; "one_cycle", up to tau and to 0
    warm_up: float = 0.2  # fraction of the run until the peak of "one_cycle"
    average: float = 0.0  # decay of the exponential moving average of the weights, at every step; 0 is none
    first_upsilon: str = "sample"  # Upsilon starts at the first estimate; "full": at that of the whole training set

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _function_of("objective", self.objective, OBJECTIVES)
        _function_of("loss", self.loss, LOSSES)
        _check_threat(self.threat)
        _check_steps(self.steps, self.step_ratio)
        _check_number("tau", self.tau, above=0)
        _check_number("clip", self.clip, above=0, at_most=math.inf)
        _check_number("warm_up", self.warm_up, above=0, below=1)
        _check_number("random_start", self.random_start, at_least=0, at_most=1)
        for name in ("eta", "sample"):
            _check_number(name, getattr(self, name), above=0, at_most=1)
        for name in ("beta", "gamma", "noise", "weight_decay"):
            _check_number(name, getattr(self, name), at_least=0)
        for name in ("momentum", "average"):
            _check_number(name, getattr(self, name), at_least=0, below=1)
        for name in ("epochs", "batch_size"):
            _check_number(name, getattr(self, name), at_least=1, whole=True)
        _check_number("seed", self.seed, at_least=0, below=2**63, whole=True)
        for name in ("augment", "compiled", "nesterov"):
            _check_flag(name, getattr(self, name))
        if self.head is not None and not isinstance(self.head, str):
            raise WdatError(f"head must be the name of a layer, not {self.head!r}")
        if self.nesterov and not self.momentum:
            raise WdatError("nesterov needs a momentum above 0")
        _as_plain_numbers(self)
        objective = _function_of("objective", self.objective, OBJECTIVES)
        name = next((name for name, function in OBJECTIVES.items() if function is objective), "")
        if name in ("trades", "pgd") and self.threat.p != math.inf:
            raise WdatError(f'objective="{name}" is pointwise: give threat=Threat(p=math.inf)')
        if name == "worst_case" and self.threat.p == math.inf:
            raise WdatError("the worst case over a pointwise ball has no slope in the distances: give a finite p")
        if self.gamma and name in ("worst_case", "trades", "pgd"):
            raise WdatError(f'objective="{name}" has no pointwise term beside its own: leave gamma out')


@dataclass(frozen=True)
class Minibatch:
    """What the objective of a training is given: one minibatch, and what it needs to attack it and to learn from it.

    An objective is a function of it to a scalar, which one step of SGD then lowers. Where several processes share a
    minibatch it is a mean over the images of the process's own part, and what it keeps is alike in all. Pairing of
    logits (Kannan et al., 2018), as an example::

        def pairing(batch):
            x_adv = batch.attack(Threat(p=math.inf), loss="ce")
            logits, logits_adv = batch.net(batch.x), batch.net(x_adv)
            return F.cross_entropy(logits_adv, batch.y) + 0.5 * F.mse_loss(logits_adv, logits)

        finetune(model, train, val, FinetuneConfig(objective=pairing))

    Attributes:
        x: images (b, c, h, w), augmented, on the model's device.
        y: their labels (b,).
        net: images to logits (b, m) of the images' type, in the mode of the update, with gradients to the parameters.
        config: of the run.
        memory: what the objective keeps from one minibatch to the next, lists of tensors by name; it is part of the
            checkpoint, and "upsilon" becomes `History.upsilon`.
        generator: the run's source of randomness, on the CPU.
    """

    x: Tensor
    y: Tensor
    net: Callable[[Tensor], Tensor]
    config: FinetuneConfig
    memory: dict[str, list[Tensor]]
    generator: torch.Generator
    _run: _Run = field(repr=False)
    _part: slice = field(repr=False)  # of a minibatch that several processes share
    _whole: int = field(repr=False)  # how many images that minibatch has

    def draw(self, random: Callable[..., Tensor]) -> Tensor:
        """Random numbers for the images, as x: of a function such as `torch.randn`; alike however many processes."""
        drawn = random((self._whole, *self.x.shape[1:]), generator=self.generator, device="cpu")
        return drawn[self._part].to(self.x)

    def attack(
        self,
        threat: Threat,
        loss: str | Loss,
        *,
        labels: Tensor | None = None,
        start: Tensor | None = None,
        delta: Tensor | float | None = None,
        first: _Look | None = None,
    ) -> Tensor:
        """The last iterate of W-PGD on the minibatch with the steps of the configuration, shape of x, no gradient.

        The network is in the configuration's `attack_mode`. `labels` stand for y, `start` for x and `delta` for the
        threat's; `first` is what `look` said of the start, which saves a pass.
        """
        labels, start = self.y if labels is None else labels, None if start is self.x else start
        first = copy.deepcopy(first)  # which the attack changes
        with self._run.attacked(threat, loss) as on:
            start = start if start is None else start.detach()
            return _attack(on, self.x, labels, delta=delta, start=start, first=first, last=True).x_adv

    def look(self, x: Tensor, labels: Tensor, threat: Threat, loss: str | Loss) -> _Look:
        """What the network, as it is attacked, says of images: `norm` (b,) is ||grad_x J||_s, among others."""
        with self._run.attacked(threat, loss) as on:
            return _look(on, x, labels, _blank(on, x))

    def logits(self, x: Tensor) -> Tensor:
        """Logits (b, m) of the network as it is attacked, without gradient."""
        with self._run.attacked() as on:
            return _logits(on, x)

    def boundary(self, r: float) -> Boundary:
        """How far each image is from the nearest misclassified one, in l_r, and those: see the function `boundary`.

        As many gradients for each image as the configuration has steps, on the network in eval mode.
        """
        _check_precise(self.x)
        search, finite = _Search(keep=True), True
        with self._run.attacked(Threat(p=math.inf, r=r), _lead, in_eval_mode=True) as on:
            on = _searcher(on)
            try:
                search.take(on, self.x, self.y)
                search.attack(on, on.passes.batch_size)
            except _NotFiniteError:
                finite = False
            _check_finite(on.among.all(torch.tensor(finite, device="cpu")))  # in every process, or all would not stop
        found = search.found(r)
        assert found is not None
        return found

    def distance(self, found: Boundary) -> Tensor:
        """The distances (b,) of what `boundary` found, with gradients to the parameters.

        The distance of an image moves as m(x*) / ||grad_x m(x*)||_s does, m the margin z_y - max_j z_j and x* the
        nearest misclassified image (Ding et al., 2020). Pixels that [0, 1] stops have no part in the gradient in x; if
        they were moved, and r is finite, its norm grows by (||x* - x||_r / ||x* - x||_r without them)^(r-1). There is
        no gradient to the parameters at a distance of 0 or inf.
        """
        if found.x_adv is None:
            raise WdatError("the nearest images were not kept: take what the minibatch's own boundary found")
        z, r = found.x_adv.detach().requires_grad_(), found.r
        with self._run.attacked(in_eval_mode=True) as on:
            (ascent,) = torch.autograd.grad(_deficit(on.passes.call(z).to(z.dtype), self.y).sum(), z)
        z = z.detach()
        free = _free(ascent, z)
        steepness = _norm(ascent * free, _conjugate(r))
        if r < math.inf:
            moved = _norm((z - self.x) * free, r)
            steepness = steepness * (_norm(z - self.x, r) / moved) ** (r - 1)  # endless where nothing can move on
        moves = (steepness > 0) & (found.distance > 0) & (found.distance < math.inf)
        deficit = _deficit(self.net(z), self.y)
        move = torch.where(moves, (deficit.detach() - deficit) / torch.where(moves, steepness, 1.0), 0.0)
        return found.distance + move

    def random_start(self, threat: Threat, fraction: float) -> Tensor:
        """The images, each moved `fraction` of delta in a random direction, then clamped; x itself for 0."""
        return _moved(self.x, threat, fraction, self.draw(torch.rand)) if fraction else self.x

    def upsilon(self, look: _Look, threat: Threat) -> Tensor:
        """Upsilon_B, the sensitivity of the minibatch, from what `look` says of it."""
        return _upsilon(look.norm, threat.q, self._run.on.among)

    def price(self, found: Boundary, threat: Threat) -> Tensor | None:
        """The price up to which the budget buys in the minibatch, see `Boundary.price`; from what `boundary` found."""
        among = self._run.on.among
        return (found if among.group is None else found.gather(among.group)).price(threat)

    def estimate_upsilon(self, upsilon_b: Tensor) -> Tensor:
        """The estimate of Upsilon, as the configuration has it: of a fresh random sample of the training set."""
        config, run, recent = self.config, self._run, self.memory.setdefault("recent", [])
        recent.append(upsilon_b)
        del recent[: -max(8, round(config.sample * len(run.x) / config.batch_size))]
        everything = config.first_upsilon == "full" and len(recent) == 1
        if config.upsilon_from == "batch" and not everything:
            return _mean(torch.stack(recent), config.threat.q)
        count = len(run.x) if everything else max(1, round(config.sample * len(run.x)))
        rows = run.draw(count)[run.on.among.part(count)]
        x, y = run.x[rows], run.y[rows]
        if config.attack_label == "predicted":
            y = self.logits(x).argmax(1)
        with run.attacked() as on:
            return _whole_upsilon(on, x, y)[1].to(upsilon_b)


def wdat(batch: Minibatch) -> Tensor:
    """Algorithm 1: one minibatch of Wasserstein distributional adversarial training, up to its step of SGD."""
    config, threat, loss, x = batch.config, batch.config.threat, batch.config.loss, batch.x
    labels = batch.y if config.attack_label == "true" else batch.logits(x).argmax(1)

    start = batch.random_start(threat, config.random_start)
    first = batch.look(start, labels, threat, loss)
    upsilon_b = batch.upsilon(first, threat)
    estimate = batch.estimate_upsilon(upsilon_b)  # Upsilon-hat
    upsilons = batch.memory.setdefault("upsilon", [])
    upsilon = upsilons[-1] + config.eta * (estimate - upsilons[-1]) if upsilons else estimate  # (5.4)
    upsilons.append(upsilon)
    delta_b = _radius(threat, upsilon_b, upsilon)  # (5.5)
    x_adv = batch.attack(threat, loss, labels=labels, start=start, delta=delta_b, first=first)  # (5.3)
    if config.gamma:
        pointwise = replace(threat, p=math.inf)
        x_point = batch.attack(pointwise, ce, start=batch.random_start(pointwise, config.random_start))

    logits = batch.net(x)
    total = F.cross_entropy(logits, batch.y)
    total = total + config.beta * _consistency(config.consistency, logits, batch.net(x_adv))  # (5.1)
    if config.gamma:
        total = total + config.gamma * _consistency(config.consistency, logits, batch.net(x_point))  # (5.6)
    return total


def worst_case(batch: Minibatch) -> Tensor:
    """Gradient ascent of A_p(delta), the lowest accuracy in the ball, as `boundary` finds it; beyond the paper.

    A_p depends on the network by the distances d_i alone. It rises with them as `Boundary.slope` says, and they move
    with the parameters as `Minibatch.distance` says, so that the step of SGD lowers

        CE(f(x), y) - beta sum_i (dA_p / dd_i) d_i.

    The slope needs the price t up to which the budget buys. It follows that of the minibatches as (5.4) follows
    Upsilon: t + eta (t_B - t); with eta = 1 it is the minibatch's own, see `Boundary.price`. All images up to t count
    in full: the next one too, of which the budget pays only a part; and where it pays for all, and the exact slope is
    0, t is the greatest distance, so that there is a way to go. What is misclassified already is left to CE.
    """
    config, threat, x, y = batch.config, batch.config.threat, batch.x, batch.y
    found = batch.boundary(threat.r)
    latest = batch.memory.setdefault("price", [])
    price = batch.price(found, threat)
    if price is not None:
        latest[:] = [latest[0] + config.eta * (price - latest[0]) if latest else price]

    total = F.cross_entropy(batch.net(x), y)
    if not latest:
        return total
    slope = found.slope(threat, latest[0].item())
    return total - config.beta * (slope.to(x) * batch.distance(found).clamp(max=latest[0])).sum()


def _deficit(logits: Tensor, y: Tensor) -> Tensor:
    """How far the own class is below the likeliest other, (n, m) and (n,) to (n,)."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(1) - logits[own]


def trades(batch: Minibatch) -> Tensor:
    """TRADES (Zhang et al., 2019): CE(f(x), y) + beta KL(f(x) || f(x')), the p = inf case of (4.2).

    x' comes from PGD on that KL, started at x plus Gaussian noise of standard deviation 0.001.
    """
    x = batch.x
    start = (x + 0.001 * batch.draw(torch.randn)).clamp(0, 1)
    x_adv = batch.attack(batch.config.threat, _kl, labels=batch.logits(x).softmax(1), start=start)
    logits, logits_adv = batch.net(x), batch.net(x_adv)
    return F.cross_entropy(logits, batch.y) + batch.config.beta * _consistency("kl", logits, logits_adv)


def pgd(batch: Minibatch) -> Tensor:
    """PGD (Madry et al., 2018): CE(f(x'), y), x' from PGD on that CE, started at random inside the l_inf ball.

    The start is uniform in the ball for r = inf; for another norm, delta away in a random direction.
    """
    x, threat = batch.x, batch.config.threat
    if threat.r == math.inf:
        start = (x + threat.delta * (2 * batch.draw(torch.rand) - 1)).clamp(0, 1)
    else:
        start = batch.random_start(threat, 1.0)
    return F.cross_entropy(batch.net(batch.attack(threat, ce, start=start)), batch.y)


OBJECTIVES: dict[str, Callable[[Minibatch], Tensor]] = {
    "wdat": wdat,
    "worst_case": worst_case,
    "trades": trades,
    "pgd": pgd,
}


def _consistency(reading: str, logits: Tensor, logits_adv: Tensor) -> Tensor:
    """CE(f(x), f(x')) in one of its three readings, mean over the minibatch."""
    if reading == "kl":
        # In logarithms: the gradient of KL in a probability that rounds to 0 is not finite.
        return F.kl_div(logits_adv.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    target = logits.softmax(1)
    if reading == "ce_detached":
        target = target.detach()
    return -(target * logits_adv.log_softmax(1)).sum(1).mean()


@dataclass(frozen=True)
class History:
    """What happened along a training run.

    Attributes:
        epochs: one dict an epoch: "epoch" (from 1), "loss" (mean of the training objective), "seconds" (since the
            start), on the validation set, if there was one, "clean" and the accuracy under the configuration's threat
            and loss by the name of the threat ("w_2" for p = 2, "w_inf" for p = inf), and what `on_epoch` returned.
        best: the epoch (from 1) whose weights the model now has: best on validation, the last without one.
        upsilon: the moving estimate Upsilon at every minibatch (Algorithm 1 only).
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
    group: Any = None,
    progress: Progress | None = None,
) -> History:
    """Algorithm 1: perturb the model, then train it against W-PGD-budget; eq. 5.1, or eq. 5.6 for gamma > 0.

    At every minibatch: Upsilon from a fresh random sample of the training set, its moving average (eq. 5.4), the
    batch's radius (eq. 5.5), W-PGD on the batch (`wdat` is all of that), and one SGD step on CE(f(x), y) +
    beta CE(f(x), f(x')). After every epoch the accuracy under the same threat is measured on `val`; the model is left
    with the weights of the best epoch.

    With another `config.objective` it is the trainer of that objective; with `perturb="none"` it starts from the model
    as it is, so that `objective="trades"` or "pgd" pre-trains a new one.

    Args:
        model: changed in place, frozen parameters too. After an exception, Ctrl-C among them, it is as it was given,
            where there is a `resume` or was no step yet, so that the same call goes on; else it keeps what it has
            learned. Mode, `requires_grad` flags and gradients are given back as they were. With `config.average` it
            ends with the averaged weights and buffers.
        train, val: pairs (x, y) as `wpgd` takes them; val None keeps the last epoch.
        config: see `FinetuneConfig`.
        eval_batch_size: how many images the network sees at once, at most, wherever that changes nothing but the speed
            (in eval mode: the attack, Upsilon, validation).
        resume: file of the run's checkpoint; its folder is made where there is none. Where the file exists the run goes
            on from it, and ends with the weights and the history of one that was never stopped, bit for bit on the same
            machine. The file is whole whatever stops the process, a kill too, and stays at the end. A checkpoint of
            another run is refused with the name of what differs. To the run belong the configuration, the images, the
            network, and the user's own functions and classes in network, objective and loss: their code, and what their
            code reads by name. Of Python's own objects and those of installed packages it is no more than the class.
            Keep out of them what is other at every start, such as the time or a folder named after it. What changes
            while the run goes on, such as a counter, is its own work and not compared: it begins anew in a new process,
            as does any randomness but torch's own and `Minibatch.generator`. Only `Minibatch.memory`, parameters and
            buffers go on. A network in the objective that learns is refused, since it would begin anew in silence.
        save_every: seconds between two checkpoints, >= 0, which is the most that a stop loses of the training; one
            more is written after every epoch. A validation that was stopped begins anew.
        stop_after: seconds after which the run writes its checkpoint and returns, at the end of a minibatch.
        on_epoch: called with the epoch and the model, in eval mode; a dict of numbers that it returns joins the
            epoch's history. The names that the history has already are taken: nothing but validation chooses the epoch.
        group: a process group of torch.distributed, each of whose processes calls this with the same arguments. They
            share each minibatch, the sample and the validation images, and train as one process would, to rounding;
            the first one writes the checkpoint, which all of them can read, and from which any number of them goes on.
            Batch statistics are those of a process's share: on GPUs, torch.nn.SyncBatchNorm makes them global. The
            masks of dropout are alike in all.

    Raises:
        WdatError: for the faults of input that `wpgd` names, when loss, gradient or logits are no longer finite, and
            when the checkpoint cannot be written or belongs to another run.
    """
    _check_model(model)
    among = _among(group, model, train)
    kept = (resume, save_every, stop_after)
    check = functools.partial(_checked_training, model, train, val, config, eval_batch_size, kept, on_epoch, progress)

    def settings() -> dict[str, str]:
        return {"the checkpoint": _mark(resume), **_identity(model), **_settings(model, config), **_images(train, val)}

    on, checkpoint, saved = _agreed(among, lambda: check(among), settings)
    how: Any = (eval_batch_size, config.precision, config.compiled, on.classes)
    x, y = train
    training = config.update_mode == "train" and config.perturb != "last_layer"
    objective = _function_of("objective", config.objective, OBJECTIVES)
    generator = torch.Generator().manual_seed(config.seed)

    def learned() -> bool:  # and it is nowhere else
        return bool(rows or losses) and checkpoint.path is None

    losses: list[float] = []
    rows: list[dict[str, float]] = []
    with (
        checkpoint.left(writes=among.rank == 0),
        _seeded(model, generator),
        _untouched(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        _taken_back(model, learned),
    ):
        run = _Run(model, _plain(x), _plain(y), config, on, generator)
        wanted: dict[str, Any] = {"noise": config.noise, "reinit": config.reinit, "head": config.head, "x": x[:8]}
        trained = perturb_(model, config.perturb, **wanted, generator=generator)
        if not trained:
            raise WdatError("the model has no floating-point parameter to train")
        decay: dict[str, Any] = {"weight_decay": config.weight_decay, "nesterov": config.nesterov}
        optimiser = torch.optim.SGD(trained, config.tau, config.momentum, **decay)
        schedule = _schedule(config, optimiser, config.epochs * math.ceil(len(x) / config.batch_size))
        averaged = None
        if config.average:
            with _prepared(model), torch.no_grad():
                model(run.x[:1].to(on.passes.device).clone())  # what it keeps of a pass has no graph: it is copied
            averaged = torch.optim.swa_utils.AveragedModel(
                model, on.passes.device, multi_avg_fn=_moving(config.average), use_buffers=True
            )
        shown = model if averaged is None else averaged.module
        on_shown = on if averaged is None else replace(on, passes=_passes(shown, x, *how))
        score = f"w_{config.threat.p:g}"
        parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule, "averaged": averaged}
        parts = {name: part for name, part in parts.items() if part is not None}

        memory: dict[str, list[Tensor]] = {}
        order: Sequence[Tensor] = ()
        best_state: dict[str, Any] = {}
        best, spent = 0, 0.0
        if saved:
            for name, part in parts.items():
                _set_state(part, saved[name]) if isinstance(part, nn.Module) else part.load_state_dict(saved[name])
            memory = {name: _unpacked(values, on.passes.device) for name, values in saved["memory"].items()}
            for name, place, gradient in saved["gradients"]:
                memory[name][place].grad = gradient.to(on.passes.device)
            order, losses, rows, best, best_state, spent = (
                saved[name] for name in ("order", "losses", "rows", "best", "best_state", "spent")
            )
            _set_random_state(model, generator, saved["random"])
        saved = None  # it may be as large as three networks
        places = _places(model)
        begin = time.perf_counter() - spent

        def write() -> None:
            state = {n: _state_of(p) if isinstance(p, nn.Module) else p.state_dict() for n, p in parts.items()}
            state |= {"order": order, "losses": losses, "rows": rows, "best": best, "best_state": best_state}
            random, seconds = _random_state(model, generator), time.perf_counter() - begin
            packed = {name: _packed(values) for name, values in memory.items()}
            gradients = [
                (name, i, v.grad) for name, values in memory.items() for i, v in enumerate(values) if _learns(v)
            ]
            checkpoint.save(state | {"memory": packed, "gradients": gradients, "random": random, "spent": seconds})

        def save() -> None:
            if checkpoint.path is not None:  # the first process writes, and the file is there before any goes on
                _agreed(among, write if among.rank == 0 else dict, dict)

        def history(finished: bool) -> History:
            upsilons = _floats(memory.get("upsilon", []))
            return History(rows, best, upsilons, time.perf_counter() - begin, finished)

        while len(rows) < config.epochs:  # Algorithm 1: repeat,
            epoch = len(rows) + 1
            order = order or run.draw(len(x)).split(min(config.batch_size, len(x)))
            left = order[len(losses) :]
            for indices in _shown(progress, left, "minibatches"):
                _set_mode(model, training)
                for parameter in trained:
                    parameter.requires_grad_(True)
                optimiser.zero_grad()
                buffers: list[Tensor] = []
                if group is not None:
                    buffers = [b.clone() for b in model.buffers() if b.is_floating_point()]
                    # Parts of unequal size would draw unequally often, and a checkpoint has the state of the first.
                    _seed(_accelerators(model), config.seed + 1_000_003 * epoch + len(losses))
                work = _blamed(optimiser, epoch, len(losses) + 1, len(indices))
                with work, _autocast(on.passes.device, enabled=False):
                    batch = run.minibatch(indices, memory)
                    total = objective(batch)  # (5.4), (5.5), (5.3), (5.1),
                    _check_objective(total, memory)
                    _check_buffers(model, places)
                    share = len(batch.x) / len(indices)
                    (total * share).backward()
                    total = among.total(total.detach() * share)
                    _add_up_gradients(among, trained)
                    gradients = [p.grad.isfinite().all() for p in trained if p.grad is not None]
                    _check_finite(torch.stack([total.isfinite(), *gradients]).all())
                    if config.clip < math.inf:
                        _check_finite(nn.utils.clip_grad_norm_(trained, config.clip).isfinite())
                optimiser.step()  # theta <- theta - tau grad,
                torch.clear_autocast_cache()  # an autocast of the model's own may have kept the weights before
                _average_buffers(among, model, buffers)
                schedule.step()
                if averaged is not None:
                    _set_places(averaged.module, _state_of(model))
                    averaged.update_parameters(model)
                losses.append(total.item())
                up, due = checkpoint.time_is_up(), checkpoint.is_due()
                if checkpoint.path is not None and group is not None:  # the first process decides, else the others wait
                    up, due = among.gather((up, due))[0]
                if up or due:
                    save()
                if up:
                    return history(finished=False)

            row = {"epoch": epoch, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - begin}
            with _blamed(optimiser, epoch, len(losses), config.batch_size):
                _check_finite(torch.stack([t.isfinite().all() for t in shown.parameters()]).all())
                if val is not None:
                    with _prepared(shown):
                        part = among.part(len(val[0]))
                        attack = _attack(on_shown, *(_plain(tensor)[part] for tensor in val))
                    row |= {"clean": attack.history["accuracy"][0], score: attack.accuracy}
            if on_epoch:
                with _prepared(shown):
                    call = functools.partial(on_epoch, epoch, shown)
                    row |= _agreed(among, lambda: _checked_row(call(), {"clean", score, *row}), dict)  # noqa: B023
            rows.append(row)
            if val is None or best == 0 or row[score] > rows[best - 1][score]:
                best, best_state = epoch, copy.deepcopy(_state_of(shown))
            order, losses = (), []
            save()
    _set_state(model, best_state)
    return history(finished=True)


@contextmanager
def _taken_back(model: nn.Module, learned: Callable[[], bool]) -> Iterator[None]:
    """The weights as they were after an exception, unless they have learned something: the same call works again."""
    state = copy.deepcopy(_state_of(model))
    try:
        yield
    except BaseException:
        if not learned():
            _set_state(model, state)
        raise


def _add_up_gradients(among: _Among, parameters: Sequence[nn.Parameter]) -> None:
    """Each gradient becomes its sum over the processes, in one message; 0 where a process has none and another has."""
    if among.group is None:
        return
    used = among.total(torch.tensor([p.grad is not None for p in parameters]).int(), dist.ReduceOp.MAX).tolist()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p, is_used in zip(parameters, used, strict=True)
        if is_used
    ]
    if not gradients:
        return
    total = among.total(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
    for parameter in [p for p, is_used in zip(parameters, used, strict=True) if is_used]:
        part, *total = total
        parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)


def _average_buffers(among: _Among, model: nn.Module, before: Sequence[Tensor]) -> None:
    """Buffers that changed in a process, such as batch statistics, become their mean over the processes."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if among.group is None or not buffers:
        return
    changed = torch.tensor([not torch.equal(a, b) for a, b in zip(before, buffers, strict=True)]).int()
    for buffer, has in zip(buffers, among.total(changed, dist.ReduceOp.MAX).tolist(), strict=True):
        if has:
            buffer.copy_(among.total(buffer.double()) / among.size)


@dataclass
class _Run:
    """A training run: what its minibatches come from and how they are attacked."""

    model: nn.Module
    x: Tensor
    y: Tensor
    config: FinetuneConfig
    on: _Attacker
    generator: torch.Generator

    def draw(self, count: int) -> Tensor:
        """The numbers of so many images of the training set, in random order."""
        return torch.randperm(len(self.x), generator=self.generator, device="cpu")[:count].to(self.x.device)

    def minibatch(self, indices: Tensor, memory: dict[str, list[Tensor]]) -> Minibatch:
        passes, whole, part = self.on.passes, len(indices), self.on.among.part(len(indices))
        x, y = self.x[indices].to(passes.device), self.y[indices].to(passes.device)
        if self.config.augment:
            x = _crop_and_flip(x, self.generator)

        def net(z: Tensor) -> Tensor:
            return passes.call(z).to(z.dtype)

        return Minibatch(x[part], y[part], net, self.config, memory, self.generator, self, part, whole)

    @contextmanager
    def attacked(
        self, threat: Threat | None = None, loss: str | Loss | None = None, in_eval_mode: bool = False
    ) -> Iterator[_Attacker]:
        """The attacker of the training, with its threat and loss or others, on the network in its `attack_mode`."""
        if threat is not None or loss is not None:
            _check_order(threat)
        on = replace(self.on, threat=threat or self.on.threat, loss=_function_of("loss", loss or self.on.loss, LOSSES))
        _check_loss(on.loss, on.classes)
        in_train_mode = self.config.attack_mode == "train" and self.config.perturb != "last_layer" and not in_eval_mode
        if in_train_mode:  # batch statistics are those of the whole minibatch
            on = replace(on, passes=replace(on.passes, batch_size=self.config.batch_size, whole=True))
        with _prepared(self.model, training=in_train_mode):
            yield on


def _schedule(config: FinetuneConfig, optimiser: torch.optim.SGD, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `total` minibatches."""
    if config.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            config.tau,
            total_steps=total + 1,
            pct_start=max(config.warm_up, 1.5 / (total + 1)),  # a warm-up of exactly one step divides by zero in torch
            cycle_momentum=False,
        )
    cosine = config.schedule == "cosine"
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: (1 + math.cos(math.pi * i / total)) / 2 if cosine else 1.0
    )


def _moving(decay: float) -> Callable[[Any, Any, Any], None]:
    """The exponential moving average of weights and buffers; of whole numbers, such as indices, the latest."""
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: Sequence[Tensor], latest: Sequence[Tensor], count: Any) -> None:
        for a, b in zip(averages, latest, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
            elif not torch.equal(a, b):  # infinite ones, as in masks, have no difference
                average([a], [b], count)

    return update


def _checked_row(more: Any, taken: set[str]) -> dict[str, float]:
    """What `on_epoch` returned, if an epoch's history has room for it."""
    if not isinstance(more, dict | None):
        raise WdatError(f"on_epoch must return a dict of numbers or None, not {more!r}")
    if both := sorted(taken & (more or {}).keys()):
        raise WdatError(f"on_epoch must not return {', '.join(map(repr, both))}: the history has its own; rename yours")
    try:
        return {name: float(value) for name, value in (more or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise WdatError(f"on_epoch must return a dict of numbers or None, not {more!r}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Section 6: accuracy, clean and under the two attacks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scores:
    """Accuracies as fractions, and per image, so that two networks can be compared on the same images.

    Attributes:
        clean, w_inf, w_2: accuracy without attack, under PGD with CE, and under (W_2, l_inf) W-PGD with ReDLR.
        correct: the same names to bool (n,).
        w_2_found: the lowest accuracy that `boundary` finds in the ball of w_2, where it was asked for. No certificate:
            the true one may be lower still.
    """

    clean: float
    w_inf: float
    w_2: float
    correct: dict[str, Tensor] = field(repr=False)
    w_2_found: float | None = None


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    delta: float = 8 / 255,
    loss: str | Loss = "redlr",
    found_steps: int = 0,
    **options: Any,
) -> Scores:
    """The three accuracies of the paper's tables (Section 6): clean, W_inf (20 steps, CE) and W_2 (20 steps, ReDLR).

    Args:
        loss: of the W_2 attack; a network with two classes needs another.
        found_steps: of `boundary`, for the lowest W_2 accuracy that it finds; 0 leaves that out, 40 is its default.
        options: of both attacks, as `wpgd` takes them: steps, batch_size, precision, compiled, group and others.

    Raises:
        WdatError: for the faults of input that `wpgd` names, and for a random start, where nothing would be clean.
    """
    if options.get("random_start"):
        raise WdatError("evaluate measures the clean accuracy where the attack starts: it takes no random_start")
    among = _among(options.get("group"), model, x)

    def check() -> None:
        if unknown := options.keys() - (wpgd.__kwdefaults__ or {}).keys():
            raise WdatError(f"evaluate has no {', '.join(sorted(unknown))}: it takes what wpgd takes")
        _check_number("found_steps", found_steps, at_least=0, whole=True)
        if found_steps and isinstance(x, Tensor):
            _check_precise(x)  # now, and not after both attacks

    _agreed(among, check, lambda: {"found_steps": repr(found_steps)})
    pointwise = wpgd(model, x, y, Threat(p=math.inf, delta=delta), loss="ce", **options)
    w_2 = Threat(p=2, delta=delta)
    distributional = wpgd(model, x, y, w_2, loss=loss, **options)
    correct = {"clean": pointwise.was_correct, "w_inf": pointwise.correct, "w_2": distributional.correct}
    if found_steps:
        how = {name: value for name, value in options.items() if name in ("batch_size", "precision", "compiled")}
        none = Boundary(x.new_empty(0))
        found = boundary(model, x, y, steps=found_steps, keep=False, **how) if len(x) else none
        parts = [len(part) for part in among.gather(found.distance.cpu())]
        bought = found.gather(among.group).bought(w_2).split(parts)
        correct["w_2_found"] = ~bought[among.rank].to(x.device)
    count = among.count(x)
    return Scores(**{name: int(among.total(c.sum())) / count for name, c in correct.items()}, correct=correct)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the paper: the lowest accuracy in the ball, from the distance of each image to the nearest misclassified one
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Boundary:
    """How far each image is from the nearest misclassified one that was found, and what follows for every budget.

    An attacker who may move the images by delta in W_p, and wants as many errors as possible, buys the cheapest images
    first. This is the lowest accuracy in the ball (the dual of Blanchet and Murthy, 2019, for the 0-1 loss; up to the
    1/n of one image that could be split):

        A_p(delta) = 1 - max{k / n : the k smallest distances have sum d_i^p <= n delta^p}.

    The distances come from an attack, so they may be too large: the accuracies are upper bounds of the true ones, and
    no certificate. Each of them is reached by images that were found, see `spend`.

    Attributes:
        distance: (n,), the l_r distance: 0 where the image itself is misclassified, inf where nothing was found.
        r: that norm.
        x_adv: the nearest misclassified images, as x; the image itself where the distance is 0 or inf. None without
            `keep`.
    """

    distance: Tensor
    r: float = math.inf
    x_adv: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        far = self.distance
        if not isinstance(far, Tensor) or far.ndim != 1 or not far.is_floating_point():
            raise WdatError(f"distance must be a floating-point tensor (n,) of numbers >= 0, not {_kind(far)}")
        if not (far >= 0).all():
            what = "NaN" if far.isnan().any() else f"{far.min().item():g}"
            raise WdatError(f"distance must hold numbers >= 0, inf where nothing was found, and it holds {what}")
        _check_number("r", self.r, above=1, at_most=math.inf)
        _as_plain_numbers(self)

    def __repr__(self) -> str:
        some = int((self.distance < math.inf).sum())
        return f"Boundary({len(self.distance)} images, a misclassified one found for {some}, r={self.r:g})"

    def gather(self, group: Any) -> Boundary:
        """The distances that all processes of a group of torch.distributed found, in their order, on the CPU.

        It is what one process would have found with all the images: the search itself needs no others.
        """
        among = _among(group, nn.Module(), self.distance)
        parts = _agreed(among, lambda: among, lambda: {"r": repr(float(self.r))}).gather(self.distance.cpu())
        return Boundary(torch.cat(parts), self.r)

    def bought(self, threat: Threat) -> Tensor:
        """Which images are misclassified in the worst case, bool (n,): the cheapest ones that the budget pays for."""
        self._check(threat)
        prices, order = self.distance.double().sort(stable=True)
        if threat.p == math.inf:
            paid = prices <= threat.delta
        else:
            paid = (prices / threat.delta).pow(threat.p).cumsum(0) <= len(prices)
        return torch.zeros_like(paid).index_put((order,), paid)

    def accuracy(self, threat: Threat) -> float:
        """A_p(delta), the accuracy that is left in the worst case found, for any p in [1, inf] and delta."""
        return (~self.bought(threat)).sum().item() / len(self.distance)

    def curve(self, p: float = 2.0) -> tuple[Tensor, Tensor]:
        """All of A_p: from each radius delta (k,), 0 first, up to the next one the accuracy (k,); float64.

        Right at one of these radii `accuracy` may be the one before, for the radius itself is rounded.
        """
        self._check_some()
        p = _check_number("p", p, at_least=1, at_most=math.inf)
        n, prices = len(self.distance), self.distance.double().sort().values
        first, last = int((prices == 0).sum()), int((prices < math.inf).sum())
        prices = prices[first:last]  # in logarithms: powers of high order would underflow
        p = p if p == math.inf else min(p, 1e200)  # which gives the same, and of which no logarithm is infinite
        costs = prices if p == math.inf else (((p * prices.log()).logcumsumexp(0) - math.log(n)) / p).exp()
        accuracy = (n - torch.arange(first, last + 1, device=prices.device, dtype=torch.float64)) / n
        return torch.cat([prices.new_zeros(1), costs]), accuracy

    def shares(self, threat: Threat) -> Tensor:
        """What each image adds to the accuracy, float64 (n,): their mean is A_p(delta), but for the split image.

        They are min(1, (d_i / t)^p) - (delta / t)^p, where t is the price of the next image to be bought. That is the
        dual, so to first order it is also how A_p depends on the sample: from their spread comes the standard error,
        and for two networks on the same images that of the difference.
        """
        bought, p, distance = self.bought(threat), threat.p, self.distance.double()
        price = self._next(bought)
        if p == math.inf or price == math.inf:
            return (~bought).double()
        return (distance / price).clamp(max=1) ** p - (threat.delta / price) ** p

    def price(self, threat: Threat) -> Tensor | None:
        """The distance of the next image to be bought, float64 (); of the last, where the budget pays for all.

        None where there is nothing to buy: all are misclassified, or nothing was found.
        """
        left, distance = ~self.bought(threat), self.distance.double()
        found = (distance > 0) & (distance < math.inf)
        if not found.any():
            return None
        return distance[found & left].min() if (found & left).any() else distance[found].max()

    def slope(self, threat: Threat, price: float | Tensor | None = None) -> Tensor:
        """How fast A_p(delta) rises with each distance, float64 (n,), for a finite p: p d_i^(p-1) / (n t^p).

        That is of the images that the budget buys; 0 for those that are misclassified already, or too dear. t is the
        price of the next one, of which the budget pays a part, and by that part of it its slope is the less (envelope
        theorem, for the accuracy with one split image: the mean of `shares`). Where the budget pays for all images no
        small change of a distance saves one: the slope is 0.

        Args:
            price: t, where it is known from more images than these: those up to it count as bought, in full.

        Raises:
            WdatError: for p = inf, where the accuracy jumps and has no slope.
        """
        self._check(threat)
        p, n, distance = threat.p, len(self.distance), self.distance.double()
        if p == math.inf:
            raise WdatError("the accuracy under a pointwise threat has no slope in the distances: give a finite p")
        if price is not None:
            price = price.item() if isinstance(price, Tensor) and price.numel() == 1 else price
            price = _check_number("price", price, above=0)
            relative = torch.where(distance <= price, distance / price, 0.0)
            return torch.where(relative > 0, relative ** (p - 1), 0.0) * (p / n / price)
        bought = self.bought(threat)
        t = self._next(bought)
        if t == math.inf:
            return torch.zeros_like(distance)
        relative = torch.where(distance < t, distance / t, 0.0)
        part = n * (threat.delta / t) ** p - (relative**p).sum()
        split = distance == t  # images of the same price share what is left
        slope = torch.where(relative > 0, relative ** (p - 1), 0.0) + split * (part / split.sum())
        return slope * (p / n / t)

    def interval(self, threat: Threat) -> tuple[float, float]:
        """An interval that holds A_p(delta) of the distribution, whose sample the images are, in 95 % of samples.

        It rests on many images of either kind: where only a few are left, or only a few are not, it is too short. Where
        all images are alike, up to 3 in n others may not be (the rule of three).
        """
        shares, accuracy = self.shares(threat), self.accuracy(threat)
        alike = bool((shares == shares[0]).all())  # their spread may be 1e-16, and not 0
        half = 3 / len(shares) if alike else 1.96 * shares.std(correction=0).item() / math.sqrt(len(shares))
        return max(0.0, accuracy - half), min(1.0, accuracy + half)

    def spend(self, x: Tensor, threat: Threat) -> Attack:
        """The attacked images of the worst case found, as `wpgd` returns them; its loss is the fraction misclassified.

        Args:
            x: the images that `boundary` was given, in one tensor.

        Raises:
            WdatError: the images were not kept, or x is not alike, or the norm of the threat is another.
        """
        if self.x_adv is None:
            raise WdatError("the nearest images were not kept: call boundary with keep=True")
        if not isinstance(x, Tensor) or (x.shape, x.dtype) != (self.x_adv.shape, self.x_adv.dtype):
            raise WdatError(f"x must be the images that boundary was given, {_kind(self.x_adv)}, not {_kind(x)}")
        bought, right, x = self.bought(threat), self.distance > 0, _plain(x)
        far = _norm(self.x_adv.to(x.device) - x, self.r).to(self.distance)
        if not torch.allclose(far, torch.where(self.distance < math.inf, self.distance, 0.0), rtol=1e-3):
            raise WdatError("x must be the images that boundary was given, in that order: these are at other distances")
        clean, accuracy = right.sum().item() / len(x), self.accuracy(threat)
        return Attack(
            x_adv=torch.where(_per_image(bought, x), self.x_adv.to(x.device), x),
            accuracy=accuracy,
            loss=1 - accuracy,
            distance=_mean(torch.where(bought, self.distance, 0.0).double(), threat.p).item(),
            correct=~bought,
            was_correct=right,
            history={"accuracy": [clean, accuracy], "loss": [1 - clean, 1 - accuracy], "upsilon": []},
        )

    def _next(self, bought: Tensor) -> Tensor:
        """The price of the cheapest image that is not bought, float64 (); inf where nothing is left."""
        return torch.where(bought, math.inf, self.distance.double()).min()

    def _check_some(self) -> None:
        if not len(self.distance):
            raise WdatError("there are no distances, so there is no accuracy")

    def _check(self, threat: Threat) -> None:
        _check_threat(threat)
        self._check_some()
        if threat.r != self.r:
            raise WdatError(f"the distances are in the norm r = {self.r:g}, the threat has r = {threat.r:g}")


def boundary(
    model: nn.Module,
    x: Tensor | Iterable[Images],
    y: Tensor | None = None,
    *,
    r: float = math.inf,
    steps: int = 40,
    keep: bool = True,
    batch_size: int = 512,
    precision: str = "float32",
    compiled: bool = False,
    progress: Progress | None = None,
) -> Boundary:
    """The distance from each image to the nearest misclassified one: how robust a network is, for every budget at once.

    An image is attacked within a radius that shrinks where the network is fooled and grows where it is not, as in FMN
    (Pintor et al., 2021). The first radius is where a linear network would err, (z_y - z_j) / ||grad (z_y - z_j)||_s;
    the steps are steepest ascent of z_j - z_y; the steps are shared between the likeliest rivals j of the class y.
    An image that is misclassified as it is costs no step.

    Every image found was seen misclassified by a margin that rounding does not bridge, lies in [0, 1], and is looked at
    once more at the end: what fails then counts as not found. In bfloat16 that margin is 3 % of a logit, so distances
    are larger. A model that computes in 16 bits by itself and returns more asks for precision="bfloat16" too.

    Args:
        model: as `wpgd` takes it.
        x: images as `wpgd` takes them; or, without y, pairs (images, labels) in any iterable, such as a DataLoader:
            each is taken once, and not kept.
        y: labels (n,), int64.
        r: norm of the distance, in (1, inf].
        steps: gradients for each image, >= 1, in all.
        keep: keep the nearest images too, not only 4 bytes an image.
        progress: what the batches are wrapped in.

    The others are those of `wpgd`. The result does not depend on how the images come beyond rounding.

    Raises:
        WdatError: names what is wrong with the images, the labels, the model or a parameter. Whatever stops the search,
            once it has begun, the exception has an attribute `found`: the Boundary of the images before, or None.
    """
    _check_number("r", r, above=1, at_most=math.inf)
    _check_flag("keep", keep)
    _check_function("progress", progress)
    _check_model(model)
    threat = Threat(p=math.inf, r=r)

    def attacker(x: Any, y: Any) -> _Attacker:
        on = _attacker(model, x, y, threat, _lead, batch_size, precision, compiled, steps)
        _check_precise(x)
        return _searcher(on)

    batches: Any = x
    known = None
    if isinstance(x, Tensor) or y is not None:
        known = attacker(x, y)  # all of it, before the first is attacked
        size = min(int(batch_size), len(x))  # type: ignore[arg-type]
        batches = list(zip(x.split(size), y.split(size), strict=True))  # type: ignore[union-attr]
    if not isinstance(batches, Iterable):
        raise WdatError(f"x must be images, or an iterable of pairs (images, labels), not {type(batches).__name__}")
    search = _Search(keep)
    try:
        with _prepared(model):
            for on, xb, yb in _checked(_shown(progress, batches, "batches"), attacker, known):
                if keep and known is None:
                    xb = xb.clone()  # the next batch may come in the same memory
                size = min(int(batch_size), len(xb))
                for part in zip(_plain(xb).split(size), _plain(yb).split(size), strict=True):
                    search.take(on, *part)
                    search.attack(on, batch_size, least=batch_size)
            search.attack(on, batch_size)
            found = search.found(r)
            assert found is not None
            if found.distance.isinf().any() and not found.distance.nan_to_num(posinf=0.0).any():
                plainly, (few, labels) = replace(on, loss=margin, boxed=False), search.few
                _check_slope(plainly, few, not _whole_upsilon(plainly, few, labels)[1])
    except BaseException as error:
        error.found = search.found(r)  # type: ignore[attr-defined]
        raise
    return found


def _checked(
    batches: Iterable[Any], attacker: Callable[[Any, Any], _Attacker], on: _Attacker | None
) -> Iterator[tuple[_Attacker, Tensor, Tensor]]:
    """Pairs of images and labels, each checked, with the attacker: the one that is known, or that the first gives."""
    first = None
    for count, batch in enumerate(batches, 1):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise WdatError(f"batch {count} must be a pair (images, labels), not {type(batch).__name__}")
        x, y = batch
        if on is None:
            on = attacker(x, y)
        _check_images(x, y)
        _check_labels(y, on.classes)
        alike = (tuple(x.shape[1:]), x.dtype, x.device)
        first = first or alike
        if alike != first:
            raise WdatError(f"batch {count} has images of {_about(*alike)}, the first of {_about(*first)}")
        yield on, x, y
    if on is None:
        raise WdatError("there are no images: the iterable of batches is empty")


def _about(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {shape}, {dtype} on {device}"


@dataclass
class _Search:
    """What `boundary` has found, and the images that wait until a batch is full."""

    keep: bool
    count: int = 0  # images taken
    # 0 where misclassified, NaN where not known yet, and room for more: a small tensor for each batch would lie between
    # the large ones that come and go, and break the heap into pieces
    distance: Tensor | None = None
    images: list[Tensor] = field(default_factory=list)  # the same batches, if they are kept
    queue: list[tuple[Tensor, ...]] = field(default_factory=list)  # which image, it, its label, its rivals
    nearest: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # which image, the nearest, if they are kept
    few: tuple[Tensor, ...] = ()  # of the images that were right at first, and their labels

    @torch.inference_mode(False)  # in which images may come
    def take(self, on: _Attacker, x: Tensor, y: Tensor) -> None:
        logits = _logits(on, x)
        _check_finite(logits.isfinite().all())
        right = logits.argmax(1) == y
        if self.keep:
            self.images.append(x)
        if self.distance is None or self.count + len(x) > len(self.distance):
            more = x.new_empty(max(self.count + len(x), 65536))
            self.distance = more if self.distance is None else torch.cat([self.distance, more])
        self.distance[self.count : self.count + len(x)] = torch.where(right, math.nan, x.new_zeros(()))
        own = F.one_hot(y, on.classes).bool()
        rivals = logits.masked_fill(own, -math.inf).topk(_shared(on.steps, on.classes)).indices
        places = torch.arange(self.count, self.count + len(x), device=x.device)
        self.queue.append(tuple(part[right] for part in (places, x, y, rivals)))
        self.count += len(x)

    @torch.inference_mode(False)
    def attack(self, on: _Attacker, most: int, least: int = 1) -> None:
        """Those that wait, in batches of `most`, as long as there are `least`."""
        while sum(len(places) for places, *_ in self.queue) >= least:
            parts = [torch.cat(parts) for parts in zip(*self.queue, strict=True)]
            places, x, y, rivals = (part[:most] for part in parts)
            self.few = self.few or (x[:32].clone(), y[:32].clone())
            device = on.passes.device
            distance, nearest = _nearest(on, x.to(device), y.to(device), rivals.to(device))
            if self.keep:
                self.nearest.append((places, nearest.to(x.device)))
            assert self.distance is not None
            self.distance[places] = distance.to(x.device)
            self.queue = [tuple(part[most:] for part in parts)]

    def found(self, r: float) -> Boundary | None:
        """Of all images before the first that still waits."""
        if self.distance is None or not self.count:
            return None
        distance, x_adv = self.distance[: self.count].clone(), torch.cat(self.images) if self.keep else None
        for places, nearest in self.nearest:
            assert x_adv is not None
            x_adv[places] = nearest
        waits = distance.isnan().nonzero()
        end = int(waits[0]) if len(waits) else len(distance)
        return Boundary(distance[:end], r, None if x_adv is None else x_adv[:end]) if end else None


def _shared(steps: int, classes: int) -> int:
    """How many rivals share the steps: enough to find the nearest, few enough to come near it."""
    return min(classes - 1, max(1, round(math.sqrt(steps / 4))))


def _lead(logits: Tensor, sides: Tensor, far: float = 1.0) -> Tensor:
    """How far the likeliest other class is above the own one, relative to the greatest logit: > 0 where misclassified.

    `sides` (b, m) is 1 for the own class y and -1 for a rival j; the slope is that of z_j - z_y alone. The greatest
    logit is at most `far` times those of the three likeliest classes: others may be switched off, by -1e9 say.
    """
    z, own = logits.detach(), sides > 0
    lead = z.masked_fill(own, -math.inf).amax(1) - z.masked_fill(~own, -math.inf).amax(1)
    towards = -(logits * sides).sum(1)
    likeliest = z.topk(min(3, z.shape[1])).values.abs().amax(1)
    size = torch.minimum(z.abs().amax(1), far * likeliest)
    return (towards - towards.detach() + lead) / torch.where(size > 0, size, 1.0)


def _searcher(on: _Attacker) -> _Attacker:
    """An attacker by `_lead`, as the search for the nearest misclassified images needs it.

    Its boxed gradient keeps an image with many pixels of 0 or 1 from seeming far from any error. A margin that
    rounding does not bridge is at most 0.2 % of the logits that are compared, or rounding itself.
    """
    return replace(on, boxed=True, loss=functools.partial(_lead, far=max(1.0, 0.002 / on.rounding)))


def _nearest(on: _Attacker, x: Tensor, y: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """The distance (n,) of images that are classified correctly to the nearest others found, and these, as x."""
    r, runs = on.threat.r, rivals.shape[1]
    most = math.prod(x.shape[1:]) ** (1 / r)  # no two images are further apart
    margin = on.rounding  # by which logits differ from batch to batch
    best, nearest = x.new_full((len(x),), math.inf), x.clone()
    own = F.one_hot(y, on.classes)
    for run, rival in enumerate(rivals.T):
        sides, steps = own - F.one_hot(rival, on.classes), (on.steps + run) // runs  # which add up to on.steps
        x_adv, move, known, radius = x, torch.zeros_like(x), _blank(on, x, packed=False), best
        assert known.direction is not None
        for k in range(steps + 1):
            _look(on, x_adv, sides, known, backward=k < steps)
            distance, wrong = _norm(move, r), known.loss > margin
            better = wrong & (distance < best)
            best = torch.where(better, distance, best)
            nearest.lerp_(x_adv, _per_image(better.to(x.dtype), x))  # the one or the other, exactly
            if k == steps:
                break
            ease = (1 + math.cos(math.pi * k / steps)) / 2  # from 1 to 0
            change, stride = 0.005 + 0.195 * ease, 0.05 + 0.95 * ease
            linear = distance + (2 * margin - known.loss) / known.norm  # where a linear network would err
            if 2 * k > steps:  # pixels that [0, 1] stops make a step too short, time and again
                linear = torch.maximum(linear, 1.005 * radius)
            larger = torch.where(best < math.inf, torch.minimum(radius * (1 + change), 0.995 * best), linear)
            radius = torch.where(wrong, torch.minimum(radius, best) * (1 - change), larger)
            radius = radius.nan_to_num(most).clamp(max=most)
            move.addcmul_(_per_image(stride * radius, x), known.direction)
            length = radius if r == math.inf else _norm(move, r)  # clipping asks for none
            x_adv = x + _shortened(move, length, torch.minimum(radius, length), r)
            x_adv.clamp_(0, 1)
            torch.sub(x_adv, x, out=move)
        _check_finite(known.finite)
    _look(on, nearest, own, known, backward=False)
    sound = ~known.correct & (nearest.flatten(1).amin(1) >= 0) & (nearest.flatten(1).amax(1) <= 1)
    distance = torch.where(sound, _norm(nearest - x, r), math.inf)
    return distance, torch.where(_per_image(sound, x), nearest, x)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: what is global is added up here, and nowhere else
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Among:
    """The processes that share the images, each with a part of them; without a group it is this one alone."""

    group: Any = None
    device: torch.device | None = None  # where the group's tensors are

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def part(self, n: int) -> slice:
        """Which of n things, that all processes have, are this one's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def total(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum over the processes, or what another operation makes of their values; alike on all of them."""
        if self.group is None:
            return value
        there = value.detach().to(self.device, copy=True)
        with _heard():
            dist.all_reduce(there, op, group=self.group)
        return there.to(value.device)

    def rows(self, numbers: Tensor) -> Tensor:
        """Numbers (k,) of each process, (processes, k); alike on all of them."""
        own = numbers.detach().to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _heard():
            dist.all_gather(found, own, group=self.group)
        return torch.stack(found).to(numbers.device)

    def count(self, x: Tensor) -> int:
        """How many images there are."""
        return len(x) if self.group is None else int(self.total(torch.tensor(len(x))))

    def all(self, true: Tensor) -> Tensor:
        """Whether something is true, bool (), in every process."""
        return true if self.group is None else self.total(true.int(), dist.ReduceOp.MIN).bool()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.group is None:
            return [value]
        found = [None] * self.size
        with _heard():
            dist.all_gather_object(found, value, group=self.group)
        return found


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WdatError(
            f"another process of the group does not answer or has ended, so this one ends too: see what that one said;"
            f" a run with a checkpoint goes on from there ({error})"
        ) from error


def _among(group: Any, model: nn.Module, x: Any) -> _Among:
    if group is None:
        return _Among()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise WdatError(
            "group must be a process group, such as torch.distributed.group.WORLD after init_process_group,"
            f" not {group!r}"
        )
    return _Among(group, _device_of(model, x if isinstance(x, Tensor) else None))


def _agreed(among: _Among, check: Callable[[], Any], settings: Callable[[], dict[str, str]]) -> Any:
    """What `check` returns, if it raises in no process and all of them have the same settings; else all raise."""
    if among.group is None:
        return check()
    fault, found, own = None, None, {}
    with suppress(Exception):  # what cannot be said is named by the check
        own = settings()
    try:
        found = check()
    except Exception as error:
        fault = error
    said = among.gather((fault and f"{fault}", own))
    if isinstance(fault, WdatError):
        raise fault
    for rank, (_, theirs) in enumerate(said):
        for name in own.keys() & theirs.keys():
            if theirs[name] != own[name]:
                raise WdatError(f"{name} must be the same in all processes: {own[name]} here, {theirs[name]} in {rank}")
    if fault:
        raise fault
    for rank, (other, _) in enumerate(said):
        if other is not None:
            raise WdatError(f"process {rank} of {among.size} cannot go on: {other}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One look at a batch: all that the attack and the sensitivity ask of the network
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What a forward and a backward pass say about images; on their device."""

    correct: Tensor  # bool (n,)
    loss: Tensor  # (n,)
    norm: Tensor  # (n,), ||g||_s of the gradient g of the loss in x, or of what a rule made of it
    direction: Tensor | None  # the steepest ascent of unit l_r norm, where it is wanted; as x, for l_inf packed
    vector: Tensor | None  # as x, what the rule made of the gradient, where there is one
    finite: Tensor  # bool (), all logits, losses and norms are


@dataclass(frozen=True)
class _Attacker:
    """A network, a threat, a loss and how to step, all checked."""

    passes: _Passes
    threat: Threat
    loss: Loss
    steps: int
    step_ratio: float
    rule: Rule | None
    classes: int
    rounding: float  # of the logits, relative to the greatest
    among: _Among  # the processes that share the images
    folder: Path | None = None  # for what is as large as the images
    boxed: bool = False  # no gradient at pixels of 0 and 1 that it would move out of [0, 1]

    def room(self, x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Space as large as the images, or of another shape and type."""
        folder = self.folder if x.numel() else None
        device = torch.device("meta") if folder else x.device
        empty = torch.empty_like(x, device=device) if shape is None else torch.empty(shape, dtype=dtype, device=device)
        return _mapped(folder, empty) if folder else empty


def _mapped(folder: Path, like: Tensor) -> Tensor:
    """A tensor in a file that has no name any more: its room is free again when the tensor is gone, or the process."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="wdat-", delete=False) as file:
            try:
                if hasattr(os, "posix_fallocate"):  # a full disk is better known now: later it would kill the process
                    os.posix_fallocate(file.fileno(), 0, like.nbytes)
                flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
                return flat.as_strided(like.shape, like.stride())
            finally:
                with suppress(OSError):  # Windows keeps it
                    Path(file.name).unlink()
    except (OSError, RuntimeError) as error:
        raise WdatError(
            f"folder {folder} has no room for {like.nbytes / 1e9:.3g} GB, or cannot be written: {error}"
        ) from error


def _blank(on: _Attacker, x: Tensor, directions: bool = True, packed: bool = True) -> _Look:
    """What is known of images before the first look."""
    numbers = (x.new_zeros(len(x), dtype=torch.bool), x.new_zeros(len(x)), x.new_zeros(len(x)))
    direction = None
    if directions:  # signs take two bits a pixel, so that an attack holds little more than x, x_adv and the best x_adv
        shape = (len(x), math.ceil(math.prod(x.shape[1:]) / 4))
        direction = on.room(x, shape, torch.uint8) if on.threat.s == 1 and packed else on.room(x)
    return _Look(*numbers, direction, on.room(x).zero_() if on.rule else None, x.new_ones((), dtype=torch.bool))


def _look(
    on: _Attacker, x: Tensor, y: Tensor, known: _Look, batches: Sequence[Rows] | None = None, backward: bool = True
) -> _Look:
    """A look at all images, or at those of `batches`: it changes what is `known` of them, which is returned."""
    rows = on.passes.batches(x) if batches is None else batches
    _in_parts(on.passes, x, rows, lambda rows: _look_at(on, x, y, known, rows, backward))
    return known


def _logits(on: _Attacker, x: Tensor) -> Tensor:
    """Logits (n, m) without gradient, where the images are and of their type."""
    logits = x.new_empty(len(x), on.classes)

    def write(rows: Rows) -> None:
        logits[rows] = on.passes.call(x[rows].to(on.passes.device)).to(logits)

    with torch.no_grad():
        _in_parts(on.passes, x, on.passes.batches(x), write)
    return logits


def _in_parts(passes: _Passes, x: Tensor, batches: Sequence[Rows], work: Callable[[Rows], None]) -> None:
    """`work` for each of the batches, which are halved where the device has no room for them."""
    todo = [*batches][::-1]
    while todo:
        rows = todo.pop()
        try:
            with _autocast(passes.device, enabled=False):  # of whoever gave the images, for the way back
                work(rows)
            continue
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Out of the except clause, where the failed pass still held its memory.
        indices = torch.arange(len(x), device=x.device)[rows]
        half = len(indices) // 2
        if passes.whole or not half:
            raise WdatError(
                f"out of memory on {passes.device} with {len(indices)} images at once"
                + (f": a batch_size of {half} takes about half of it" if half else ": the network is too large for it")
            )
        passes.batch_size = min(passes.batch_size, half)
        todo += [indices[half:], indices[:half]]
        if passes.device.type == "cuda":
            torch.cuda.empty_cache()


def _look_at(on: _Attacker, images: Tensor, labels: Tensor, known: _Look, rows: Rows, backward: bool) -> None:
    home = images.device
    with torch.enable_grad() if backward else torch.no_grad():
        x = images[rows].detach().to(on.passes.device).requires_grad_(backward)
        y = labels[rows].to(on.passes.device)
        logits = on.passes.call(x).to(x.dtype)
        classes, finite = logits.detach().argmax(1), logits.detach().isfinite().all()  # a loss may write into logits
        value = on.loss(logits, y.clone())  # or into the labels
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            raise WdatError(f"the loss must return one value for each image, shape ({len(x)},), not {_kind(value)}")
        if backward:
            gradients = torch.autograd.grad(value.sum(), x, allow_unused=True) if value.requires_grad else (None,)
            gradient: Any = gradients[0]
            if gradient is None:  # with 0 in its place the network would seem robust
                raise WdatError(
                    "no gradient comes from the loss to the images: remove no_grad, detach, quantisation or whatever"
                    " else stops it in the model or in the loss"
                )
            if on.boxed:
                gradient = gradient * _free(gradient, x.detach())
    value = value.detach().to(x.dtype)
    finite &= value.isfinite().all()
    if backward:
        if on.rule is not None and known.vector is not None:
            gradient = on.rule(gradient, known.vector[rows].to(x.device))
            gradient = gradient.detach() if isinstance(gradient, Tensor) else gradient
            if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
                raise WdatError(f"the rule must return a tensor of shape {tuple(x.shape)}, not {_kind(gradient)}")
            known.vector[rows] = gradient.to(home)
        norm = _norm(gradient, on.threat.s)
        finite &= norm.isfinite().all()
        known.norm[rows] = norm.to(home)
        if known.direction is not None:
            direction = _steepest(gradient, norm, on.threat.s)
            known.direction[rows] = (_pack(direction) if known.direction.dtype == torch.uint8 else direction).to(home)
    # Soft labels stand for their likeliest class.
    known.correct[rows] = (classes == (y if y.ndim == 1 else y.argmax(1))).to(home)
    known.loss[rows] = value.to(home)
    known.finite.logical_and_(finite.to(home))


def _free(ascent: Tensor, x: Tensor) -> Tensor:
    """Which pixels go on along an ascent, bool as x: not those that are 0 or 1 and would leave [0, 1]."""
    return ascent.sign().add_(x).clamp_(0, 1) != x


def _shown(progress: Progress | None, things: Iterable[Any], called: str) -> Iterator[Any]:
    """All of the things, wrapped in what shows how far they are."""
    count, shown = 0, progress(things) if progress else things
    if not isinstance(shown, Iterable):
        raise WdatError(f"progress must return what it is given, as tqdm does; it returned {type(shown).__name__}")
    for thing in shown:
        yield thing
        count += 1
    promised = count
    with suppress(Exception):  # a DataLoader has a length also where it does not know it
        promised = len(things) if isinstance(things, Sized) else count
    if count < promised:
        why = ": progress must pass on all that it is given" if progress else ""
        raise WdatError(f"the {called} ended after {count} of {promised}{why}")


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise _NotFiniteError(NOT_FINITE)


# ---------------------------------------------------------------------------------------------------------------------
# What a training run needs beside its objective
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _blamed(optimiser: torch.optim.Optimizer, epoch: int, minibatch: int, size: int) -> Iterator[None]:
    """What may go wrong in a minibatch, in words that say what to change."""
    try:
        yield
    except _NotFiniteError as error:
        raise WdatError(
            f"training diverged in epoch {epoch}, minibatch {minibatch}, at learning rate"
            f" {optimiser.param_groups[0]['lr']:g}: the loss, the model or its gradient is not finite: try a lower one"
            + (
                ", a lower beta, or weights that start with less noise"
                if epoch == minibatch == 1
                else ", or a lower beta"
            )
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


def _moved(x: Tensor, threat: Threat, fraction: float, random: Tensor) -> Tensor:
    """Each image moved `fraction` of delta in a random direction, of numbers in [0, 1], then clamped to [0, 1]."""
    noise = 2 * random - 1
    length = _norm(noise, threat.r)
    return (x + fraction * threat.delta * noise / _per_image(torch.where(length > 0, length, 1.0), x)).clamp(0, 1)


def _crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Each image (n, c, h, w) shifted by up to `pad` pixels with zeros coming in, and flipped with probability 1/2."""
    n, _, h, w = x.shape
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device="cpu").to(x.device)
    flip = torch.randint(2, (n, 1), generator=generator, device="cpu").to(x.device)
    i = top + torch.arange(h, device=x.device)
    j = torch.arange(w, device=x.device)
    j = left + torch.where(flip == 1, w - 1 - j, j)
    images = torch.arange(n, device=x.device)[:, None, None]
    moved = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)[images, i[:, :, None], j[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()  # some networks view them so


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a run that is stopped at any moment goes on from the last one as if it had never been stopped
# ---------------------------------------------------------------------------------------------------------------------

CHECKPOINT = b"wdat_core checkpoint 5\n"


@dataclass
class _Checkpoint:
    """The file in which a training run is kept; without a path it keeps nothing."""

    path: Path | None
    fixed: dict[str, str]  # what cannot change while the run goes on, by name: the images, and the network at its start
    every: float  # seconds
    stop_at: float  # on the clock of time.monotonic
    settings: Callable[[Collection[str]], dict[str, str]] = lambda own_work: {}  # what else must be the same
    own_work: set[str] = field(default_factory=set)  # the names of settings that changed while the run went on
    begun: dict[str, str] = field(default_factory=dict)  # the other settings
    entered: list[str] = field(default_factory=list)  # the networks with which the run was begun, or gone on with
    written: float = -math.inf  # the first minibatch is saved, and shows what is the run's own work

    def is_due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def time_is_up(self) -> bool:
        return time.monotonic() >= self.stop_at

    def read(self) -> dict[str, Any] | None:
        """What was saved last, None where nothing was. Nothing in the file is executed."""
        if self.path is None:
            return None
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise WdatError(f"the checkpoint {self.path} cannot be read ({error})") from error
        head, content = content[: len(CHECKPOINT) + 32], content[len(CHECKPOINT) + 32 :]
        try:
            if head != CHECKPOINT + hashlib.sha256(content).digest():
                raise pickle.UnpicklingError
            return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise WdatError(
                f"{self.path} is damaged or no checkpoint of this version: give resume another file, or put back a copy"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """What was saved last of this run, None where nothing was."""
        saved = self.read()
        if saved is None:
            return None
        then, self.own_work, self.entered = saved["identity"], {*saved["own_work"]}, saved["entered"]
        self.begun = self.settings(self.own_work)
        now = self.fixed | self.begun
        if now[NETWORK] in (*self.entered, _digest_of(saved["model"]), _digest_of(saved["best_state"])):
            now[NETWORK] = then[NETWORK]  # as it was, or as a stop or the end left it
        for name in now | then:
            there, here = then.get(name, "nothing"), now.get(name, "nothing")
            if there != here:
                why = f": there it was {there}, here it is {here}" if max(len(there), len(here)) < 60 else ""
                raise WdatError(
                    f"the checkpoint {self.path} belongs to another run, it differs in {name}{why}: put that back as it"
                    " was when the run began, give resume another file, or remove this one"
                )
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state; the first time, after a minibatch, what has changed by then is known as the run's own."""
        if self.written < 0:
            for name in self.look():
                raise WdatError(
                    f"{name} changes while the run goes on, and no checkpoint keeps it: put that network in eval mode"
                    " if only its statistics move, make it anew in each minibatch if it is a copy, keep its tensors in"
                    " the memory of the batch if they learn, or train without resume"
                )
        self.write(state)
        self.written = time.monotonic()

    def look(self) -> list[str]:
        """Notes what has changed as the run's own work; but for tensors of other networks, whose names it returns."""
        now = self.settings(self.own_work)
        changed = [name for name in now | self.begun if now.get(name) != self.begun.get(name)]
        learned = [name for name in changed if name.startswith(TENSOR) and name in now and name in self.begun]
        self.own_work = self.own_work.union(changed).difference(learned)
        self.begun = self.settings(self.own_work) | {name: self.begun[name] for name in learned}
        return learned

    @contextmanager
    def left(self, writes: bool) -> Iterator[None]:
        """What changed since the first minibatch is known at the end, for the same call in the same process."""
        try:
            yield
        finally:
            before = self.own_work
            with suppress(Exception):  # the file is good as it is
                if writes and self.written > 0:
                    self.look()
                    if self.own_work != before and (saved := self.read()):
                        self.write(saved)

    def write(self, state: dict[str, Any]) -> None:
        """Whole or not at all: whatever happens meanwhile, the file under this name is the last good one."""
        stream = io.BytesIO()
        entered = [*dict.fromkeys((*self.entered, self.fixed[NETWORK]))]
        state |= {"identity": self.fixed | self.begun, "own_work": sorted(self.own_work), "entered": entered}
        torch.save(state, stream)
        content = stream.getbuffer()
        try:
            stream.seek(0)
            torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WdatError(
                "the model's state or the objective's memory holds what torch does not load again, so the checkpoint"
                f" would be lost: keep tensors and plain numbers there ({str(error).splitlines()[0]})"
            ) from error
        with self._part() as part:
            with part.open("wb") as file:
                file.write(CHECKPOINT + hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            assert self.path is not None
            part.replace(self.path)

    def try_to_write(self) -> None:
        """Before a run starts; what kills left behind goes."""
        with self._part() as part:
            part.touch()
        for old in part.parent.glob(f"{glob.escape(part.name.rsplit('-', 1)[0])}-*.tmp"):
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > 3600:  # nobody writes for so long
                    old.unlink()

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """The name of a file beside this one, which is gone in the end."""
        assert self.path is not None
        part = self.path.with_name(f"{self.path.name}.wdat-{os.getpid()}.tmp")  # another process may keep the same run
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield part
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise WdatError(
                f"the checkpoint {self.path} could not be written ({error}): make room or give resume another file, and"
                " start again; the run goes on from the last one that was"
            ) from error


def _checkpoint(
    resume: str | os.PathLike[str] | None,
    save_every: float,
    stop_after: float | None,
    model: nn.Module,
    train: Images,
    val: Images | None,
    config: FinetuneConfig,
    writes: bool,
    before: dict[str, str],
) -> tuple[_Checkpoint, dict[str, Any] | None]:
    """Checks the three arguments about checkpoints; must be called before the model is changed."""
    save_every = _check_number("save_every", save_every, at_least=0, at_most=math.inf)
    if stop_after is not None:
        stop_after = _check_number("stop_after", stop_after, at_least=0)
    if resume is None:
        if stop_after is not None:
            raise WdatError("stop_after needs resume, the file from which the next run goes on")
        return _Checkpoint(None, {}, save_every, math.inf), None
    if not isinstance(resume, (str, os.PathLike)) or str(resume) in ("", ".") or "\0" in str(resume):
        raise WdatError(f"resume must be the path of a file, not {resume!r}")
    try:
        path = _path(resume)
    except (OSError, ValueError, TypeError) as error:
        raise WdatError(f"resume must be the path of a file, not {resume!r} ({error})") from error
    if _is_folder(path):
        raise WdatError(f"resume must be the path of a file, and {path} is a folder")
    stop_at = math.inf if stop_after is None else time.monotonic() + stop_after
    settings = functools.partial(_settings, model, config)
    checkpoint = _Checkpoint(path, before | _images(train, val), save_every, stop_at, settings)
    saved = checkpoint.load()
    if saved is None:
        checkpoint.begun = settings()
    if writes:  # of many processes the first
        checkpoint.try_to_write()
    return checkpoint, saved


def _path(given: str | os.PathLike[str]) -> Path:
    """The file itself, whatever becomes of the working directory."""
    path = os.path.expanduser(given)  # noqa: PTH111
    os.fsencode(path)  # which raises where no file can have that name
    return Path(os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path))  # noqa: PTH100, PTH114


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # a name that is too long is none
        return path.is_dir()
    return False


def _mark(resume: Any) -> str:
    """Which checkpoint there is: what tells a file from others."""
    if resume is None:
        return "none"
    with suppress(OSError, ValueError, TypeError), _path(resume).open("rb") as file:
        return hashlib.sha256(file.read(len(CHECKPOINT) + 32)).hexdigest()[:16]
    return "not there"


NETWORK = "the tensors of the network"
TENSOR = "tensor "  # begins the name of what is in another network, such as a teacher
ADDRESS = r" at 0x[0-9a-fA-F]+"
Name = tuple[str, ...]  # a name: "SCALE of helper of objective" is ("SCALE", "helper", "objective")


def _identity(model: nn.Module) -> dict[str, str]:
    """What cannot change while a run goes on, beside the images."""
    return {"the code of wdat_core.py": code_digest(), NETWORK: _digest_of(_state_of(model))}


def _images(train: Images, val: Images | None) -> dict[str, str]:
    validation = "none" if val is None else _digest(*val)
    return {"the training images": _digest(*train), "the validation images": validation}


def _settings(model: nn.Module, config: FinetuneConfig, own_work: Collection[str] = ()) -> dict[str, str]:
    """What else decides a run, by name: the configuration, and the network but for its tensors."""
    values: dict[Name, Any] = {(f.name,): getattr(config, f.name) for f in fields(config)}
    model = _original(model)
    known = {**dict(model.named_modules()), **dict(model.named_parameters()), **dict(model.named_buffers())}
    del known[""]
    return _named(values | {("the network",): model}, known, own_work)


def _named(
    values: dict[Name, Any], known: dict[str, Any] | None = None, own_work: Collection[str] = ()
) -> dict[str, str]:
    """These values, and all that they hold or their code reads, by name, in words that any process finds alike.

    An attribute counts where its name stands in any of the code, so it is gone through until no new name turns up.
    What is `known` by a name is not entered, nor what is named in `own_work`.
    """
    kept: dict[int, tuple[Any, str | None]] = {}  # with the values, so that no other gets the number of one
    read: set[str] = set()
    while True:
        seen: dict[int, tuple[Any, str]] = {id(part): (part, f"its {name}") for name, part in (known or {}).items()}
        found: dict[str, str] = {}
        names: set[str] = set()
        todo = [*values.items()]
        for path, value in todo:  # which grows
            name = " of ".join(part.lstrip(".") for part in path)
            if name in own_work:
                continue
            value = _original(value)
            if id(value) not in seen:
                said, parts = f"{type(value).__module__}.{type(value).__qualname__}", dict[str, Any]()
                with suppress(Exception):  # what lets nobody look into it is of its class
                    if id(value) not in kept:
                        kept[id(value)] = value, _words(value)
                    words = kept[id(value)][1]
                    said, parts = (words, parts) if words is not None else _inside(value, read)
                    names |= _reads(value)[1] if isinstance(value, types.CodeType) else set()
                seen[id(value)] = value, said
                todo += [((path[0] + k, *path[1:]) if k[0] in ".[" else (k, *path), part) for k, part in parts.items()]
            found[name] = seen[id(value)][1]
        if names <= read:
            return found
        read |= names


def _original(value: Any) -> Any:
    """Of a network that torch.compile made, the one that it was made of."""
    with suppress(Exception):
        if isinstance(value, nn.Module) and "_orig_mod" in value._modules:
            return value._modules["_orig_mod"]
    return value


def _words(value: Any) -> str | None:
    """Numbers, text, tensors, arrays, code, and containers of numbers and text, in words; what is long digested."""
    if isinstance(value, Tensor):
        with suppress(RuntimeError, ValueError):  # one without values has none
            return _digest(value)
        return f"{value.dtype} {value.layout} on {value.device}"
    if isinstance(value, types.CodeType):
        return hashlib.sha256(repr(_instructions(value)).encode()).hexdigest()
    if isinstance(value, PLAIN) and (type(value) in PLAIN or not _is_own(type(value))):
        words = re.sub(ADDRESS, "", repr(value))
    elif type(value) in (list, tuple, set, frozenset, dict) and _is_plain(value):
        words = _ordered(value) if isinstance(value, set | frozenset) else repr(value)
    elif hasattr(type(value), "dtype") and hasattr(type(value), "tobytes"):  # numpy's words leave out the middle
        total = hashlib.sha256(f"{value.dtype} {value.shape} ".encode())
        if getattr(value.dtype, "hasobject", False):
            total.update(re.sub(ADDRESS, "", repr(value.tolist())).encode())
        else:
            total.update(value.data if value.flags.c_contiguous and value.size else value.tobytes())
        return total.hexdigest()
    else:
        return None
    return words if len(words) < 60 else hashlib.sha256(words.encode()).hexdigest()


def _ordered(value: Any) -> str:
    """As `repr`, with sets in an order that each process finds alike."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_ordered, value))})"
    return f"{{{', '.join(sorted(map(_ordered, value)))}}}" if isinstance(value, set | frozenset) else repr(value)


def _is_plain(value: Any, deep: int = 3) -> bool:
    """Numbers, text, and containers of them; of sets none inside, whose order each process has its own."""
    if isinstance(value, PLAIN):
        return True
    if not deep or type(value) not in ((list, tuple, dict, set, frozenset) if deep == 3 else (list, tuple, dict)):
        return False
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return all(_is_plain(part, deep - 1) for part in parts)


def _inside(value: Any, read: set[str]) -> tuple[str, dict[str, Any]]:
    """What a value is, and by name what it holds; of what is Python's or an installed package's, no more than that."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, nn.Module):
        state = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return name, {f"{TENSOR}{place}": tensor for place, tensor in state.items()} | _inside_module(value, read)
    if isinstance(value, functools.partial | functools.partialmethod):
        given = {f"argument {i}": part for i, part in enumerate(value.args, 1)}
        return name, {"the function": value.func, **given, **value.keywords}
    own = _of_class(kind, read)
    if _is_own(kind) or is_dataclass(value) or kind.__name__ in ("Namespace", "SimpleNamespace"):
        own |= {f".{field}": part for field, part in _fields_of(value).items() if field in read or EVERY in read}
    if isinstance(value, Enum):
        return f"{kind.__qualname__}.{value.name}", own | {".value": value.value}
    if isinstance(value, list | tuple | deque):
        return f"{len(value)} of them", own | {f"[{i}]": part for i, part in enumerate(value)}
    if isinstance(value, dict):
        if isinstance(value, defaultdict):
            own["its default"] = value.default_factory
        keys = {key: _words(key) or re.sub(ADDRESS, "", _ordered(key)) for key in value}
        return f"{len(value)} of them", own | {f"[{keys[key]}]": part for key, part in value.items()}
    if isinstance(value, types.MethodType):
        said, parts = _inside(value.__func__, read)
        return said, parts | {"self": value.__self__}
    if isinstance(value, types.FunctionType | type):
        name = f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, types.FunctionType) and _is_own(value):
            return name, _of_function(value, read)
        if isinstance(value, type):
            parts = _of_class(value, read, "__init__")
            return name, {field.removeprefix(value.__qualname__): part for field, part in parts.items()}
    if isinstance(value, types.ModuleType) and _is_own(value):
        return name, {f".{field}": part for field, part in vars(value).items() if field in read}
    if own:
        return re.sub(ADDRESS, "", repr(value)) if isinstance(value, PLAIN) else name, own
    if isinstance(value, torch.jit.ScriptFunction):
        return name, {"the code": str(value.code)}
    wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # by functools.cache, for one
    known = not callable(value) or isinstance(value, types.FunctionType)
    return name if known else re.sub(ADDRESS, "", repr(value)), {} if wrapped is None else {"what it wraps": wrapped}


def _of_function(function: types.FunctionType, read: set[str]) -> dict[str, Any]:
    """The code of a function, and by name what is around it: defaults, globals, and what it closes over."""
    code = function.__code__
    found = {f".{name}": part for name, part in vars(function).items() if name in read}
    found |= dict(zip(code.co_varnames[: code.co_argcount][::-1], (function.__defaults__ or ())[::-1], strict=False))
    found |= function.__kwdefaults__ or {}
    for name in sorted(_reads(code)[0]):
        part = _imported(name, function) if name.startswith(IMPORT) else function.__globals__.get(name)
        if part is not None:
            found[name.removeprefix(IMPORT)] = part
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # one that has no value yet
            found[name] = cell.cell_contents
    return found | {"the code": code}


def _imported(name: str, function: types.FunctionType) -> Any:
    """A module of the user's own that a function imports when it runs; now, so that each start finds it."""
    with suppress(Exception):  # the function itself says so where it is not there
        name = importlib.util.resolve_name(name.removeprefix(IMPORT), function.__globals__.get("__package__"))
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if name in sys.modules or (spec and spec.origin and not spec.origin.startswith(_installed())):
            return importlib.import_module(name)
    return None


def _of_class(kind: type, read: set[str], *also: str) -> dict[str, Any]:
    """The functions and the values of a class that may be read, those of the user's classes above it too."""
    found: dict[str, Any] = {}
    above = [owner for owner in kind.__mro__ if not _is_own(owner)]  # such as nn.Module, which calls `forward`
    for owner in filter(_is_own, kind.__mro__):
        for name, part in vars(owner).items():
            functions = _functions_in(part)
            called = bool(functions) and (name.startswith("__") or any(hasattr(other, name) for other in above))
            if name in also or name in read or (called and name != "__init__"):
                for i, function in enumerate(functions or [part]):  # a property has several
                    key = f"{owner.__qualname__}.{name}{' when set' if i else ''}"
                    found[key if key not in found else f"{owner.__module__}.{key}"] = function  # one called as above it
    return found


def _inside_module(model: nn.Module, read: set[str]) -> dict[str, Any]:
    """What decides a network's logits beside its tensors: its layers, settings, hooks and classes."""
    found: dict[str, Any] = {"the layers": re.sub(ADDRESS, "", repr(model))}
    kinds: dict[str, type] = {}
    for where, part in model.named_modules():
        for name, held in _fields_of(part).items():
            if not any(f"{name}{end}" in part._parameters for end in ("_orig", "_g")):  # computed by spectral_norm
                found[f"{where}.{name}"] = held
        kinds_of_hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
        hooks = [hook for those in kinds_of_hooks for hook in those.values()]
        hooks += [
            hook
            for p in part._parameters.values()
            for those in (getattr(p, "_backward_hooks", None), getattr(p, "_post_accumulate_grad_hooks", None))
            for hook in (those or {}).values()
        ]
        found |= {f"hook {i} of {where or 'it'}": hook for i, hook in enumerate(hooks, 1)}
        kind = type(part)
        another = f" ({where})" if kinds.setdefault(kind.__qualname__, kind) is not kind else ""  # of that name
        found |= {f"{name}{another}": held for name, held in _of_class(kind, read).items()}
        with suppress(AttributeError, RuntimeError):  # not every part of a scripted module has code
            if isinstance(part, torch.jit.ScriptModule | torch.fx.GraphModule):  # whose class has none
                found[f"the code of {where or 'it'}"] = str(part.code)
    return found


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    return (i for i in dis.get_instructions(code) if i.opname not in ("EXTENDED_ARG", "NOP"))


def _instructions(code: types.CodeType) -> list[Any]:
    """What a function does. A docstring is no part of it, nor is the order of a set, which each process has its own."""

    def plain(part: Any) -> Any:
        if isinstance(part, types.CodeType):
            return _instructions(part)
        return sorted(map(repr, part)) if isinstance(part, frozenset) else part

    return [(i.opname, plain(i.argval)) for i in _steps(code)]


def _reads(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of globals and modules, and of attributes, in the code of a function and of functions inside it."""
    around: set[str] = set()
    inside: set[str] = set()
    steps = [*_steps(code)]
    for at, i in enumerate(steps):
        if i.opname in GLOBALS:
            around.add(i.argval)
        elif i.opname in ATTRIBUTES:
            inside.add(i.argval)
        elif i.opname == "IMPORT_NAME":  # after how many packages it goes up, and what it takes from there
            up, taken = (step.argval for step in steps[at - 2 : at])
            package = f"{IMPORT}{'.' * up}{i.argval}"
            around |= {package, *(f"{package}{'.' * bool(i.argval)}{name}" for name in taken or ())}
        if i.argval in ("vars", "__dict__", "asdict", "astuple"):
            inside.add(EVERY)
        parts = [i.argval]
        for part in parts:  # which grows
            if isinstance(part, types.CodeType):
                more = _reads(part)
                around, inside = around | more[0], inside | more[1]
            elif isinstance(part, tuple | frozenset):
                parts += part
            elif i.opname == "LOAD_CONST" and isinstance(part, str):  # as getattr takes it
                inside.add(part)
    return around, inside


def _is_own(thing: Any) -> bool:
    """Whether a function, a class or a module is the user's, and not of Python, an installed package or this file."""
    if isinstance(thing, types.FunctionType):  # a wrapper says that it is of the module of what it wraps
        file = thing.__code__.co_filename
    else:
        place = thing if isinstance(thing, types.ModuleType) else sys.modules.get(thing.__module__)
        file = str(getattr(place, "__file__", None))  # a notebook has none, nor has what is built in
        if getattr(place, "__name__", "") in sys.builtin_module_names:
            return False
    return file != __file__ and not file.startswith(_installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    user = sysconfig.get_path("purelib", sysconfig.get_preferred_scheme("user"))
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return *paths, user, str(Path(torch.__file__).parent)


PLAIN = (
    int,
    float,
    str,
    bytes,
    range,
    slice,
    type(None),
    numbers.Number,
    os.PathLike,
    torch.dtype,
    torch.device,
    Threat,
)
GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
IMPORT = "import "  # begins the name of a module in what a function reads
EVERY = "every attribute"
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")


def _functions_in(part: Any) -> list[Any]:
    """The functions of a property, of a static method or the like, as it is in a class."""
    if isinstance(part, property):
        return [function for function in (part.fget, part.fset) if function is not None]
    if isinstance(part, staticmethod | classmethod):
        return [part.__func__]
    if isinstance(part, functools.cached_property):
        return [part.func]
    return [part] if isinstance(part, types.FunctionType) else []


def _fields_of(value: Any) -> dict[str, Any]:
    """The attributes of an object by name; of a module those that it has beside its state, its mode excepted."""
    if type(value).__module__.startswith("torch._dynamo"):  # what torch.compile keeps
        return {}
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    names = sorted(name for those in slots for name in ((those,) if isinstance(those, str) else those))
    held = {name: getattr(value, name) for name in names if hasattr(value, name) and not name.startswith("__")}
    left_out = vars(nn.Module()).keys() if isinstance(value, nn.Module) else ()
    held |= {name: part for name, part in getattr(value, "__dict__", {}).items() if name not in left_out}
    cached = functools.cached_property  # what it gave before is no setting
    return {
        name: part for name, part in held.items() if not isinstance(getattr_static(type(value), name, None), cached)
    }


def code_digest(path: str | os.PathLike[str] = __file__) -> str:
    """SHA-256, in hexadecimal, of the code of a file, this one: comments, docstrings and layout do not count.

    It says which code made a number. A checkpoint of other code is refused. Of this file it is the code at the first
    call in a process: what is written there later does not run.

    Raises:
        WdatError: the file cannot be read.
    """
    return _own_digest() if path == __file__ else _code_digest(path)


@functools.cache
def _own_digest() -> str:
    return _code_digest(__file__)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _code_digest(path: str | os.PathLike[str]) -> str:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise WdatError(f"the code cannot be read, so that nothing can say which one it is ({error})") from error

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(part) for part in node]
        if not isinstance(node, ast.AST):
            return node
        parts = dict(ast.iter_fields(node))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            parts["body"] = parts["body"][1:]
        # Versions of Python have fields of their own, empty here.
        return type(node).__name__, [(k, plain(v)) for k, v in parts.items() if v is not None and v != []]

    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name, also those that are not saved with a model but change with it."""
    buffers = {name: b.detach() for name, b in model.named_buffers(remove_duplicate=False)}
    return model.state_dict() | buffers | _unsaved(model)


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that the model leaves out of its `state_dict`, as adapters do with what they adapt."""
    dense = [v for v in model.state_dict().values() if isinstance(v, Tensor) and v.layout == torch.strided]
    saved = {value.data_ptr() for value in dense}
    return {name: p.detach() for name, p in model.named_parameters() if p.numel() and p.data_ptr() not in saved}


def _set_state(model: nn.Module, state: dict[str, Any]) -> None:
    _set_places(model, state)
    known = model.state_dict()  # it knows the versions of its modules, which some ask for
    for name in known:
        known[name] = state[name]
    model.load_state_dict(known)
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *_unsaved(model).items()]:
            if name not in known:
                tensor.copy_(state[name])
    torch.clear_autocast_cache()


def _set_places(model: nn.Module, state: dict[str, Any]) -> None:
    """Buffers that come or grow with use, as `register_buffer(name, None)` allows, are as large as in the state."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            value = state.get(f"{prefix}.{name}".removeprefix("."))
            if isinstance(value, Tensor) and (buffer is None or buffer.shape != value.shape):
                module._buffers[name] = value.to(_device_of(model), copy=True)
            elif buffer is not None and value is None:
                module._buffers[name] = None


def _digest_of(state: dict[str, Any]) -> str:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # or a module's extra state
    return _digest(*tensors.values(), names=[*tensors])


def _digest(*tensors: Tensor, names: Sequence[str] = ()) -> str:
    """SHA-256 of names, shapes, types and values, a thousand images at a time; on any device the same."""
    total = hashlib.sha256(repr([*names]).encode())
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        tensor = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        for part in tensor.split(1000) if tensor.ndim else [tensor]:
            part = part.cpu().contiguous()
            if part.numel():
                total.update((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
    return total.hexdigest()


def _packed(values: list[Any]) -> list[Any] | Tensor:
    """Many numbers, as Upsilon has them, as one tensor, which is saved a hundred times as fast; other lists as such."""
    alike = {(v.shape, v.dtype, v.device, v.requires_grad) if isinstance(v, Tensor) else () for v in values}
    if len(alike) != 1 or not isinstance(values[0], Tensor) or values[0].ndim or values[0].requires_grad:
        return values
    return torch.stack(values) if len({v.data_ptr() for v in values}) == len(values) else values


def _unpacked(values: list[Any] | Tensor, device: torch.device) -> list[Any]:
    if isinstance(values, Tensor):  # each with memory of its own, as it was
        return [v.clone() for v in values.to(device)]
    return [v.detach().to(device).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]


def _learns(value: Any) -> bool:
    """Whether a value has a gradient of its own, which is not saved with it."""
    return isinstance(value, Tensor) and value.is_leaf and value.grad is not None


def _random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """The states of all generators that a training run draws from."""
    state = {"run": generator.get_state(), "cpu": torch.get_rng_state()}
    for device in _accelerators(model):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(model: nn.Module, generator: torch.Generator, state: dict[str, Tensor]) -> None:
    generator.set_state(state["run"].cpu())
    torch.set_rng_state(state["cpu"].cpu())
    for device in _accelerators(model) if "device" in state else []:  # a run has one, and goes on on another too
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, model state, checks
# ---------------------------------------------------------------------------------------------------------------------


def _conjugate(p: float) -> float:
    return 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0 near 1 and below, also where the type of x does not hold the exponent (float16)."""
    return x ** min(exponent, torch.finfo(x.dtype).max)


def _mean(values: Tensor, order: float, among: _Among | None = None, weights: Tensor | None = None) -> Tensor:
    """(mean_i v_i^order)^(1/order) of values >= 0, their maximum for order inf; scaled first, so nothing overflows."""
    if among is not None and among.group is not None:
        return _together(among.rows(_part(values, order)), order).to(values)
    top = values.max()
    if order == math.inf:
        return top
    scale = torch.where(top > 0, top, 1.0)
    powers = _power(values / scale, order)
    return scale * (powers.mean() if weights is None else (powers * weights).sum()) ** (1 / order)


def _part(values: Tensor, order: float) -> Tensor:
    """What one process adds to `_mean`: the greatest, the sum of powers relative to it, and how many; float64 (3,)."""
    values = values.double()  # no 16 bits hold every count
    top = values.max() if len(values) else values.new_zeros(())
    powers = (values / torch.where(top > 0, top, 1.0)) ** min(order, sys.float_info.max)
    return torch.stack([top, powers.sum(), values.new_tensor(len(values))])


def _together(parts: Tensor, order: float) -> Tensor:
    """`_mean` from what the processes add to it, (processes, 3)."""
    tops, powers, counts = parts.T
    top = tops.max()
    if order == math.inf:
        return top
    scale = torch.where(top > 0, top, 1.0)
    return scale * ((powers * (tops / scale) ** order).sum() / counts.sum()) ** (1 / order)


def _norm(x: Tensor, order: float) -> Tensor:
    """The l_order norm of each image, (n, ...) to (n,); scaled first where powers could overflow."""
    dims = tuple(range(1, x.ndim))
    if order == 1:
        return x.abs().sum(dims)  # on a CPU several times as fast as vector_norm, as is the next
    top = _flat(x).abs().amax(1)  # thirty times as fast as over the dimensions
    if order == math.inf:
        return top
    return top * torch.linalg.vector_norm(x / _per_image(torch.where(top > 0, top, 1.0), x), order, dims)


def _flat(x: Tensor) -> Tensor:
    """Images (n, ...) as (n, pixels), without a copy where they are channels_last."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1)


def _pack(signs: Tensor) -> Tensor:
    """Values -1, 0, 1 (n, ...) in two bits each, (n, pixels / 4) bytes."""
    flat = _flat(signs).to(torch.int8)
    bits = F.pad(flat, (0, -flat.shape[1] % 4)).contiguous().add_(1).view(torch.int32)  # four at once
    bits = bits | bits >> 6
    return (bits | bits >> 12).to(torch.uint8)


def _unpack(packed: Tensor, x: Tensor) -> Tensor:
    """What `_pack` packed, int8, in the shape of x."""
    bits = packed.to(torch.int32)
    bits = bits | bits << 12
    bits = (bits | bits << 6) & 0x03030303
    flat = bits.view(torch.int8).sub_(1)[:, : math.prod(x.shape[1:])]
    return flat.reshape(x.movedim(1, -1).shape).movedim(-1, 1) if x.ndim == 4 else flat.reshape(x.shape)


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
        n, size = len(x), max(1, min(self.batch_size, len(x)))
        fixed = self.fixed and not self.whole  # copies of an image would change the statistics of a batch
        if rows is None and not (fixed and n % size):
            return [slice(i, i + size) for i in range(0, n, size)]
        rows = torch.arange(n, device=x.device) if rows is None else rows
        if not len(rows):
            return []
        if fixed:
            return torch.cat([rows, rows[-1:].expand(-len(rows) % size)]).split(size)  # an image twice is no harm
        return rows.tensor_split(math.ceil(len(rows) / size))


def _passes(
    model: nn.Module, x: Tensor, batch_size: int, precision: str, compiled: bool, classes: int | None = None
) -> _Passes:
    device = _device_of(model, x)
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
        with _autocast(device, enabled=precision == "bfloat16"):
            logits = run(x.clone())  # a model may write into what it is given
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape != (len(x), classes or logits.shape[1]):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise WdatError(
                f"the model must return logits of shape (b, classes), also for {len(x)} images; it returned {shape}"
            )
        return logits

    return _Passes(call, device, batch_size, compiled)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Mode, requires_grad flags and gradients are given back as they were, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # for models that do more in train() than to set the mode
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _prepared(model: nn.Module, training: bool = False) -> Iterator[None]:
    """The model as the attacker sees it: in eval mode unless told otherwise, no gradients for its parameters."""
    with _untouched(model), torch.inference_mode(False), _autocast(_device_of(model), enabled=False):
        _set_mode(model, training)
        yield


def _device_of(model: nn.Module, other: Tensor | None = None) -> torch.device:
    """The model's, or that of another tensor where it has none."""
    tensors = [*model.parameters(), *model.buffers(), torch.empty(0, device="cpu") if other is None else other]
    return tensors[0].device


def _autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """To bfloat16, or not at all whatever the caller does; weights in it are never older than the model's."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if enabled else None, enabled, cache_enabled=False)


def _set_mode(model: nn.Module, training: bool) -> None:
    """Train or eval mode, and no gradients for the parameters; a model's own `train` may return nothing."""
    model.train(training)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _accelerators(model: nn.Module) -> list[torch.device]:
    """The devices of the model that have random numbers of their own."""
    return [d for d in {p.device for p in model.parameters()} if d.type not in ("cpu", "meta")]


@contextmanager
def _seeded(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """The global generators, which layers such as dropout use, seeded from `generator`; given back as they were."""
    devices = _accelerators(model)
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        _seed(devices, seed)
        yield


def _seed(devices: Sequence[torch.device], seed: int) -> None:
    # torch.manual_seed would seed every other device as well, and those are not given back.
    torch.default_generator.manual_seed(seed % 2**63)
    for device in devices:
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(seed % 2**63)


NOT_FINITE = (
    "the model, the loss or the rule returns NaN or infinite values for these images, or a gradient there is not finite"
)


def _check_threat(threat: Threat) -> None:
    if not isinstance(threat, Threat):
        raise WdatError(f"threat must be a Threat, not {threat!r}")


def _check_order(threat: Any) -> None:
    """Of a threat that W-PGD takes."""
    _check_threat(threat)
    if threat.p < 1.001:  # an order q above a thousand leaves float32 no digits
        raise WdatError(
            f"W-PGD needs a threat with p of 1.001 or more, not {threat.p:g}: boundary takes any p from 1 on"
        )


def _attacker(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    loss: str | Loss,
    batch_size: int,
    precision: str,
    compiled: bool,
    steps: int = 1,
    step_ratio: float = 1.0,
    rule: Rule | None = None,
    group: Any = None,
    ahead: Callable[[], None] = lambda: None,
    also: dict[str, Any] | None = None,
) -> _Attacker:
    """Names the first fault of what an attack is given, in any process; what comes back has none.

    Args:
        ahead: checks what else there is.
        also: what else has to be the same in all processes.
    """
    _check_model(model)
    among = _among(group, model, x)

    def settings() -> dict[str, str]:
        same: dict[str, Any] = {
            "threat": threat,
            "loss": loss,
            "precision": precision,
            "steps": steps,
            "step_ratio": step_ratio,
        }
        same |= {"rule": rule, "compiled": compiled, **(also or {})}
        alike = {"images": f"{x.dtype} {tuple(x.shape[1:])}", "the network": _digest_of(_state_of(model))[:16]}
        return _named({(name,): value for name, value in same.items()}) | alike

    def check() -> _Attacker:
        ahead()
        _check_order(threat)
        _check_images(x, y, some=among.group is None)
        size = _check_number("batch_size", batch_size, at_least=1, whole=True)
        _check_choice("precision", precision, PRECISIONS)
        _check_flag("compiled", compiled)
        _check_steps(steps, step_ratio)
        _check_function("rule", rule)
        function = _function_of("loss", loss, LOSSES)
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
            one = _plain(x[:1]) if len(x) else x.new_zeros(1, *x.shape[1:])
            try:
                logits = model(one.to(device).requires_grad_().clone())
            except ValueError as error:
                if not any(m.running_mean is None for m in model.modules() if isinstance(m, BATCH_NORM)):
                    raise
                raise WdatError(
                    "the model normalises by the statistics of the batch in eval mode too, and one image has none: give"
                    f" its BatchNorm track_running_stats=True ({error})"
                ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or not logits.is_floating_point():
            raise WdatError(
                f"the model must return logits of shape (b, classes); for one image it returned {_kind(logits)}"
            )
        classes, total = logits.shape[1], logits.detach().double().sum().item()
        if classes > 1 and (logits >= 0).all() and abs(total - 1) <= classes * torch.finfo(logits.dtype).eps:
            raise WdatError(
                "the model returns probabilities, not logits, and would seem more robust: leave out its softmax, or"
                " return their logarithm"
            )
        _check_loss(function, classes)
        _check_labels(y, classes)
        passes = _passes(model, x, size, precision, compiled, classes)
        rounding = 0.03 if precision == "bfloat16" else _rounding(x.dtype, logits.dtype, device)
        return _Attacker(passes, threat, function, int(steps), float(step_ratio), rule, classes, rounding, among)

    on: _Attacker = _agreed(among, check, settings)
    if not among.count(x):
        raise WdatError("no process of the group has an image")
    return on


def _rounding(images: torch.dtype, logits: torch.dtype, device: torch.device) -> float:
    """By how much logits may differ from batch to batch, relative to the greatest."""
    fine = 16 * torch.finfo(images).eps
    if logits != images:  # of a model that casts by itself
        fine = max(fine, 0.03 if logits == torch.bfloat16 else min(0.004, 16 * torch.finfo(logits).eps))
    if torch.float32 not in (images, logits):
        return fine
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # before PyTorch 2.9, from which on reading this may raise
        return 0.004 if device.type == "cuda" and backends.cudnn.allow_tf32 else fine
    parts = {"cuda": (backends.cudnn.conv, backends.cuda.matmul), "cpu": (backends.mkldnn.conv, backends.mkldnn.matmul)}
    used = {part.fp32_precision for part in parts.get(device.type, ())}
    return max(fine, 0.03 if "bf16" in used else 0.004 if "tf32" in used else 0.0)


def _check_images(x: Tensor, y: Tensor, some: bool = True) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        how = ""
        if isinstance(x, Tensor):
            how = ": divide bytes by 255"
        elif hasattr(x, "__array__"):
            how = ": torch.from_numpy makes one of an array"
        elif isinstance(x, Iterable):
            how = ": put the images into one tensor; only boundary takes batches, such as those of a DataLoader"
        raise WdatError(f"images must be a floating-point tensor in [0, 1], not {kind}{how}")
    _check_dense("images", x)
    if x.ndim < 2 or (x[:1].numel() == 0 and (some or 0 in x.shape[1:])):
        raise WdatError(f"images must have shape (n, c, h, w) with at least one image, not {tuple(x.shape)}")
    # A part at a time, since of one that is not contiguous there is a copy; NaN stays NaN.
    spans = torch.stack([torch.stack(part.aminmax()) for part in x.split(4096)]) if len(x) else x.new_zeros(1, 2)
    least, most = spans.amin().item(), spans.amax().item()
    if not (least >= 0 and most <= 1):
        why = "some pixels are NaN" if math.isnan(least) else "normalisation belongs in the model"
        raise WdatError(f"images must lie in [0, 1], these span [{least:.4g}, {most:.4g}]: {why}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise WdatError(f"labels must be an int64 tensor, not {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.device != x.device:
        raise WdatError(f"images are on {x.device} and labels on {y.device}: put both on one device")
    _check_dense("labels", y)
    if y.shape != x.shape[:1]:
        alone = ": images are (n, c, h, w), and one alone is x[None]" if x.ndim < 4 and y.numel() == 1 else ""
        raise WdatError(f"labels must have shape ({len(x)},), one for each image, not {tuple(y.shape)}{alone}")


def _check_labels(y: Tensor, classes: int) -> None:
    low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    if low < 0 or high >= classes:
        raise WdatError(f"labels must lie in 0..{classes - 1} for this model, these span {low}..{high}")


def _check_fine(x: Tensor, on: _Attacker) -> None:
    """In 16 bits a step may be lost in rounding, and the network would seem robust."""
    of_a_pixel = on.step_ratio * on.threat.delta / on.steps / math.prod(x.shape[1:]) ** (1 / on.threat.r)
    if of_a_pixel < torch.finfo(x.dtype).eps / 4 and x.dtype.itemsize == 2:
        raise WdatError(
            f"images of {x.dtype} are too coarse for {on.steps} steps of delta {on.threat.delta:g}: give float32 images"
            ' and model, and precision="bfloat16" for speed'
        )


def _check_loss(loss: Loss, classes: int) -> None:
    if loss in (dlr, redlr) and classes < 3:
        raise WdatError(
            f"DLR and ReDLR need 3 classes or more, the model has {classes}: take loss='margin', or your own"
        )
    if loss in (_lead, margin):
        _check_two_classes(classes)


def _check_two_classes(classes: int) -> None:
    if classes < 2:
        raise WdatError("a network with one class can make no error: there is nothing to search for")


def _check_precise(x: Tensor) -> None:
    if x.dtype.itemsize == 2:
        how = 'give float32 images and model, and precision="bfloat16" for speed'
        raise WdatError(f"images of {x.dtype} are too coarse for a distance: {how}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise WdatError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not all(hasattr(module, "training") for module in model.modules()):
        raise WdatError("the model is frozen TorchScript, without a mode: give the one before torch.jit.freeze")
    if not all(nn.parameter.is_lazy(p) or p.is_leaf for p in model.parameters()):
        raise WdatError(
            "a parameter of the model was computed from another, as copy.deepcopy does with TorchScript: load the"
            " model again in place of a copy"
        )
    for tensor in [*model.parameters(), *model.buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise WdatError("the model has lazy layers that do not know their size yet: run it once on images")
        if tensor.is_inference():
            raise WdatError("the model was made in inference mode: make it, or load it, outside of that")


def _checked_training(
    model: nn.Module,
    train: Images,
    val: Images | None,
    config: FinetuneConfig,
    eval_batch_size: int,
    kept: tuple[Any, Any, Any],
    on_epoch: Any,
    progress: Any,
    among: _Among,
) -> tuple[_Attacker, _Checkpoint, dict[str, Any] | None]:
    """Names the first fault of what `finetune` is given; before anything is changed."""
    _check_training(train, val, config, on_epoch, progress)
    _check_number("eval_batch_size", eval_batch_size, at_least=1, whole=True)
    before = {}
    if kept[0] is not None:  # a pass may change it, so before any
        before = _identity(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout == torch.strided and any(
            n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise WdatError(
                f"{name} of the model is expanded, many of its numbers are one: give the model a clone() of it"
            )
    attacker: Any = (eval_batch_size, config.precision, config.compiled, config.steps, config.step_ratio)
    on = _attacker(model, *train, config.threat, config.loss, *attacker)
    _check_fine(train[0], on)
    if val is not None:
        _attacker(model, *val, config.threat, config.loss, *attacker)
    if config.objective in ("worst_case", worst_case):
        _check_precise(train[0])
        _check_two_classes(on.classes)
    if config.average and _is_scripted(model):
        raise WdatError(
            "average needs a copy of the model, and TorchScript gives none: leave it 0, or give the model"
            " before torch.jit.script"
        )
    _check_minibatches(model, train[0], config, among.size)
    with _prepared(model):
        few = _plain(train[0])[:32]
        _check_slope(on, few, not any(_moves(on, images) for images in (few[:1], few, 1 - few, few / 2)))
    return replace(on, among=among), *_checkpoint(*kept, model, train, val, config, among.rank == 0, before)


def _check_training(train: Images, val: Images | None, config: Any, on_epoch: Any, progress: Any) -> None:
    """What training alone is given; before anything is unpacked."""
    if not isinstance(config, FinetuneConfig):
        raise WdatError(f"config must be a FinetuneConfig, not {type(config).__name__}")
    for name, pair in (("train", train), ("val", val)):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2) and not (name == "val" and pair is None):
            raise WdatError(f"{name} must be a pair (images, labels), not {type(pair).__name__}")
    _check_function("on_epoch", on_epoch)
    _check_function("progress", progress)


def _check_minibatches(model: nn.Module, x: Tensor, config: FinetuneConfig, processes: int) -> None:
    """What would go wrong in the first minibatch, or in the last."""
    smallest = len(x) % config.batch_size or min(config.batch_size, len(x))
    if smallest < processes:
        raise WdatError(
            f"a minibatch of {smallest} images cannot be shared by {processes} processes: take fewer processes, or a"
            " batch_size that leaves more"
        )
    training = config.update_mode == "train" and config.perturb != "last_layer"
    if config.augment and x.ndim != 4:
        raise WdatError(f"augment needs images of shape (n, c, h, w), not {tuple(x.shape)}: use augment=False")
    for name in ("tau", "weight_decay"):
        if getattr(config, name) > torch.finfo(x.dtype).max:
            raise WdatError(f"{name} must be a number that {x.dtype} holds, not {getattr(config, name)!r}")
    attacked = config.attack_mode == "train" and config.perturb != "last_layer"
    counts = [len(x)] * (training or attacked) + [max(1, round(config.sample * len(x)))] * attacked
    sizes = {size for n in counts for size in (n, config.batch_size, n % config.batch_size)}
    parts = {part for n in sizes for part in (n // processes, -(-n // processes))}
    if 1 in parts | {part % config.batch_size for part in parts}:
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
        single: list[bool] = []
        hooks = [
            m.register_forward_pre_hook(lambda _, z: single.append(bool(z) and z[0].numel() == z[0].shape[1]))
            for m in norms
        ]
        try:
            with _prepared(model), torch.no_grad():
                model(_plain(x[:1]).to(next(model.parameters(), x).device).clone())
        finally:
            for hook in hooks:
                hook.remove()
        if any(single):
            raise WdatError(
                "BatchNorm cannot train on a batch of one image: choose a batch_size that leaves no remainder of one"
            )


def _check_objective(total: Any, memory: dict[str, Any]) -> None:
    for name, kept in memory.items():
        if not isinstance(kept, list):
            raise WdatError(f"the objective's memory holds lists, and {name!r} is {_kind(kept)}: put it in a list")
    if any(not isinstance(value, Tensor) or value.ndim for value in memory.get("upsilon", [])[-1:]):
        raise WdatError("the objective's memory has in 'upsilon' one number for each minibatch, a scalar tensor")
    if not isinstance(total, Tensor) or total.ndim:
        shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
        raise WdatError(f"the objective must return a scalar tensor, not {shape}")
    if not total.requires_grad:
        raise WdatError("the objective, or the model's output, depends on no parameter that is to be trained")


def _places(model: nn.Module) -> set[str]:
    parts = [(where, part) for where, part in model.named_modules() if isinstance(part._buffers, dict)]  # not scripted
    return {f"{where}.{name}".lstrip(".") for where, part in parts for name in part._buffers}


def _check_buffers(model: nn.Module, places: set[str]) -> None:
    """One that comes while the model is trained would be in no checkpoint and in no average."""
    if more := _places(model) - places:
        raise WdatError(
            f"the model registered {', '.join(sorted(more))} while it was trained: register it in its __init__, as None"
            " where it is not known yet"
        )


def _check_function(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise WdatError(f"{name} must be a function, not {value!r}")


def _function_of(name: str, value: Any, known: dict[str, Any]) -> Any:
    """A function, given as such or by its name."""
    if isinstance(value, str):
        _check_choice(name, value, tuple(known))
        return known[value]
    if not callable(value):
        raise WdatError(f"{name} must be one of {', '.join(known)} or a function, not {value!r}")
    return value


def _check_folder(folder: Any, x: Any) -> None:
    if folder is None:
        return
    if not isinstance(folder, (str, os.PathLike)) or not str(folder) or not _is_folder(Path(folder)):
        raise WdatError(f"folder must be a folder that is there, not {folder!r}")
    _mapped(Path(folder), torch.empty(1, device="meta"))  # in every process, before any starts
    if not isinstance(x, Tensor):
        return
    _check_dense("images", x)
    if x.device.type != "cpu":
        raise WdatError(
            f"folder is for images on the CPU, these are on {x.device}: they go to the model's device in parts"
        )
    if shutil.disk_usage(folder).free < 2 * x.nbytes:
        raise WdatError(f"folder {folder} has no room for twice the images, {2 * x.nbytes / 1e9:.3g} GB")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise WdatError(f"{name} must be a dense tensor with values, not {tensor.layout} on {tensor.device}")


def _check_steps(steps: int, step_ratio: float) -> None:
    _check_number("steps", steps, at_least=1, whole=True)
    _check_number("step_ratio", step_ratio, above=0)


def _as_plain_numbers(value: Any) -> None:
    """Numbers of any kind become those of the field: equal configurations are stored alike."""
    for f in fields(value):
        if f.type in ("int", "float"):
            number = getattr(value, f.name)
            object.__setattr__(value, f.name, min(int(number), sys.maxsize) if f.type == "int" else float(number))


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
) -> Any:
    """`value`, numpy's too, as an int or a float, if it is in the range; infinite only where `at_most` is."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise WdatError(f"{name} must be {kind}, not {value!r}")
    given: Any = value
    try:
        number = int(given) if whole else float(given)
    except OverflowError:  # an integer that no float holds
        number = math.nan
    if not (number > above and number >= at_least and (number < below if at_most is None else number <= at_most)):
        low = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}"
        high = "" if at_most == math.inf else f" and at most {at_most:g}" if at_most else f" and below {below:g}"
        said = "one with so many digits" if isinstance(value, int) and abs(value) > 10**4000 else repr(value)
        raise WdatError(f"{name} must be {kind} {low}{high if below < math.inf or at_most else ''}, not {said}")
    return min(number, sys.maxsize) if whole else number  # no size is larger
