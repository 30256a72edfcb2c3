"""Hostile input ends in a result that keeps its promises, or in a WdatError whose one line names what was wrong.

Hypothesis puts strange images, labels, models, losses and numbers together, up to three kinds at a time. Every one of
them says what is due: a result (`fine`), an error (`bad`) or either (`risky`), and which words an error about it
contains. Whatever the end, what belongs to the caller is as it was.

Every run draws the same examples, unless the environment variable WDAT_EXAMPLES says how many each test is to draw::

    WDAT_EXAMPLES=1000 pytest tests/test_hostile.py --hypothesis-seed=1
"""

import copy
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import INF, STARTS, images, network
from torch import nn

from wdat_core import (
    FinetuneConfig,
    Threat,
    WdatError,
    ce,
    evaluate,
    finetune,
    perturb_,
    project,
    sensitivity,
    wpgd,
    wpgd_budget,
)

EXAMPLES = int(os.environ.get("WDAT_EXAMPLES", 40))
drawn = settings(max_examples=EXAMPLES, derandomize="WDAT_EXAMPLES" not in os.environ, deadline=None, database=None)

ENDS = Counter()  # how many cases ended in a result, and in an error
CLASSES = 4
SHAPES = ((2, 3, 3), (1, 1, 1), (7,), (2, 2, 1, 2))  # of an image
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN = math.nan
HUGE = 10**400  # a Python integer that no float holds


# ---------------------------------------------------------------------------------------------------------------------
# Ingredients: what is strange, and what is due
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Odd:
    """Something strange; an error about it contains one of the `words`, and is due if it is `fatal`."""

    value: Any
    words: tuple[str, ...] = ()
    fatal: bool = False


def fine(value):
    return Odd(value)


def bad(value, *words):
    return Odd(value, words, fatal=True)


def risky(value, *words):
    return Odd(value, words)


# Nothing that a number, a word or a flag could be; some of it prints as more lines than one.
NO_TEXT = (b"1", NAN, -1, -INF, 1j, (), [1], torch.ones(2, 2), np.ones((2, 2)), torch.tensor(1.0), torch)
JUNK = ("no\nword", *NO_TEXT)


def parameter(name, good=(), wrong=(), either=()):
    """The values to try for a parameter; `either` may be taken or refused."""
    return (
        *(fine(value) for value in good),
        *(bad(value, name) for value in (*wrong, *JUNK)),
        *(risky(value, name) for value in either),
    )


def order(name, shared=True):
    """Orders of a norm, close to 1 and far from it; `shared`: W-PGD shares a budget of order p, and 1 is too near."""
    near, one = (1 + 1e-9, 1 + 1e-6), (1, 1.0)
    good = (*near * (name == "r" or not shared), *one * (not shared), 1.001, 1.5, 2, np.float64(3), 50.0, 1e6, INF)
    wrong = (*near * (name == "p" and shared), *one * shared, 0.5, 0, True, None)
    return parameter(name, good, wrong=wrong, either=(HUGE, np.float32(2), Fraction(5, 2)))


def whole(name, good=()):
    return parameter(name, good, wrong=(0, 2.0, 1.5, INF, True, None), either=(np.int64(2),))


def positive(name, good, wrong=()):
    return parameter(name, good, wrong=(0, -0.0, INF, HUGE, True, None, *wrong), either=(np.float32(0.5),))


def at_least_0(name, good):
    return parameter(name, (0, *good), wrong=(INF, HUGE, True, None), either=(np.float32(0.5),))


def fraction(name, good, wrong=()):
    return parameter(name, good, wrong=(1.5, INF, HUGE, True, None, *wrong))


def word(name, *words):
    return parameter(name, words, wrong=("", words[0].upper(), None, True, 0))


def flag(name, *good):
    return parameter(name, (False, *good), wrong=(None, 0, 1, "yes"))


def show(items):
    """Progress that nobody sees."""
    yield from items


RADII = positive("delta", (5e-324, 1e-12, 0.03, 1, np.float64(0.1), 1e6))
OPTIONS = {
    "steps": whole("steps", (1, 2, 10)),
    "step_ratio": positive("step_ratio", (5e-324, 1e-12, 0.5, 0.99, 1, 3, 1e6)),
    "batch_size": whole("batch_size", (1, 2, 3, 1000, 2**70)),
    "precision": word("precision", "float32", "bfloat16"),
    "compiled": flag("compiled"),
    "progress": parameter("progress", (None, iter, show), wrong=(True, False, 0)),
}
PLACES = {
    "random_start": fraction("random_start", (0, 5e-324, 0.5, 1)),
    "seed": parameter("seed", (0, 2**63 - 1), wrong=(2**63, 1.0, True, None, HUGE)),
}
RULES = {
    "rule": (
        *(fine(rule) for rule in (None, torch.add, lambda g, before: torch.zeros_like(g), lambda g, before: g.sign())),
        fine(lambda g, before: g.clone().mul_(-1)),
        risky(lambda g, before: g.double(), "rule"),
        risky(lambda g, before: 1e30 * g, "gradient"),
        bad(lambda g, before: NAN * g, "gradient"),
        *(bad(value, "rule") for value in (lambda g, before: g[:0], lambda g, before: (g,), True, *JUNK)),
    )
}
THREATS = {"p": order("p"), "r": order("r"), "delta": RADII}
BALLS = THREATS | {"p": order("p", shared=False)}  # of the projection alone
UPSILON = {"upsilon": positive("upsilon", (5e-324, 1e-30, 1e-3, 1, 1e30, 1e300))}


def inference(x):
    with torch.inference_mode():
        return x.clone()


IMAGES = {
    "not contiguous": fine(lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "transposed": fine(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)),
    "one image expanded": fine(lambda x: x[:1].expand_as(x)),
    "one number expanded": fine(lambda x: x.new_tensor(0.5).expand_as(x)),
    "channels last": fine(lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x),
    "requires a gradient": fine(lambda x: x.clone().requires_grad_()),
    "inside a graph": fine(lambda x: x.clone().requires_grad_() * 1),
    "a parameter": fine(nn.Parameter),
    "inference": fine(inference),
    "negative zeros": fine(lambda x: torch.where(x < 0.5, -0.0, x)),
    "subnormal": fine(lambda x: torch.where(x < 0.5, torch.finfo(x.dtype).tiny / 4, x)),
    "0 and 1": fine(torch.round),
    "all 0": fine(torch.zeros_like),
    "all 1": fine(torch.ones_like),
    "none": bad(lambda x: x[:0], "images"),
    "no pixels": bad(lambda x: x[..., :0], "images"),
    "a number": bad(lambda x: x.flatten()[0], "images"),
    "one dimension": bad(lambda x: x.flatten(1)[:, 0], "images"),
    "one NaN": bad(lambda x: torch.where(x == x.max(), NAN, x), "images"),
    "infinite": bad(lambda x: x / 0, "images"),
    "a hair above 1": bad(lambda x: torch.full_like(x, 1 + torch.finfo(x.dtype).eps), "images"),
    "a hair below 0": bad(lambda x: torch.full_like(x, -torch.finfo(x.dtype).tiny), "images"),
    "another dtype": bad(lambda x: x.to(torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16), "images"),
    "float8": bad(lambda x: x.to(torch.float8_e4m3fn), "images"),
    "int64": bad(torch.Tensor.long, "images"),
    "uint8": bad(lambda x: (255 * x).to(torch.uint8), "images"),
    "bool": bad(torch.Tensor.bool, "images"),
    "complex": bad(lambda x: x.double() + 0j, "images"),
    "meta": bad(lambda x: x.to("meta"), "images"),
    "sparse": bad(torch.Tensor.to_sparse, "images"),
    "numpy": bad(lambda x: x.double().numpy(), "images"),
    "a list": bad(torch.Tensor.tolist, "images"),
    "None": bad(lambda x: None, "images"),
}

LABELS = {
    "not contiguous": fine(lambda y: y.repeat_interleave(2)[::2]),
    "one label expanded": fine(lambda y: y[:1].expand_as(y)),
    "inference": fine(inference),
    "too few": bad(lambda y: y[:-1], "labels"),
    "none": bad(lambda y: y[:0], "labels"),
    "a number": bad(lambda y: y[0], "labels"),
    "column": bad(lambda y: y[:, None], "labels"),
    "one-hot": bad(lambda y: F.one_hot(y, CLASSES), "labels"),
    "soft": bad(lambda y: F.one_hot(y, CLASSES).double(), "labels"),
    "int32": bad(torch.Tensor.int, "labels"),
    "uint8": bad(torch.Tensor.byte, "labels"),
    "bool": bad(torch.Tensor.bool, "labels"),
    "float": bad(torch.Tensor.double, "labels"),
    "too large": bad(lambda y: y + CLASSES, "labels"),
    "negative": bad(lambda y: y - CLASSES, "labels"),
    "ignored by cross-entropy": bad(lambda y: torch.full_like(y, -100), "labels"),
    "least": bad(lambda y: torch.full_like(y, torch.iinfo(torch.int64).min), "labels"),
    "meta": bad(lambda y: y.to("meta"), "labels"),
    "sparse": bad(torch.Tensor.to_sparse, "labels"),
    "numpy": bad(torch.Tensor.numpy, "labels"),
    "a list": bad(torch.Tensor.tolist, "labels"),
    "None": bad(lambda y: None, "labels"),
}


def in_place_margin(logits, y):
    """The loss of Carlini and Wagner as it is often written: the label's logit overwritten to find its rival."""
    images = torch.arange(len(y))
    own = logits[images, y]
    logits[images, y] = torch.finfo(logits.dtype).min
    return logits.max(1).values - own


ATTACK_LOSSES = {
    "ce": fine("ce"),
    "dlr": risky("dlr", "classes"),
    "margin in place": fine(in_place_margin),
    "of some images": fine(lambda z, y: torch.where(y == 0, ce(z, y), 0)),
    "flat": fine(lambda z, y: 0 * ce(z, y)),
    "tiny": fine(lambda z, y: 1e-30 * ce(z, y)),
    "huge": risky(lambda z, y: 1e30 * ce(z, y), "loss"),
    "in double precision": fine(lambda z, y: ce(z.double(), y)),
    "sum": bad(lambda z, y: ce(z, y).sum(), "loss"),
    "column": bad(lambda z, y: ce(z, y)[:, None], "loss"),
    "logits": bad(lambda z, y: z, "loss"),
    "of the first image": bad(lambda z, y: ce(z, y)[:0], "loss"),
    "a Python float": bad(lambda z, y: 0.5, "loss"),
    "a tuple": bad(lambda z, y: (ce(z, y),), "loss"),
    "None": bad(lambda z, y: None, "loss"),
    "NaN": bad(lambda z, y: NAN * ce(z, y), "loss"),
    "infinite": bad(lambda z, y: INF + ce(z, y), "loss"),
    "infinite slope": bad(lambda z, y: (ce(z, y) - ce(z, y).detach()).sqrt(), "loss", "gradient"),
    "0-1": bad(lambda z, y: (z.argmax(1) != y).to(z), "loss", "gradient"),
    "integers": bad(lambda z, y: z.argmax(1), "loss", "gradient"),
    "unknown": bad("cw", "loss"),
    "no loss": bad(None, "loss"),
    "an array": bad(np.ones((2, 2)), "loss"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What a function makes of a good network and its input."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner, x)


def no_grad_in_place(net, x):
    """Normalises the very images it is given, and not in its graph."""
    with torch.no_grad():
        x.sub_(0.5)
    return net(x)


def data_in_place(net, x):
    x.data.mul_(0.5)
    return net(x)


def nan_on_some(net, x):
    bright = x.detach().flatten(1).mean(1, keepdim=True) > 0.55
    return net(x) + torch.where(bright, NAN, 0.0).to(x)


def pixels_as_logits(x):
    return 8 * F.pad(x.flatten(1), (0, CLASSES))[:, :CLASSES]


def by_batch(alone, together):
    """A model that answers a single image in one way and several in another."""
    return lambda net, x: alone(net(x)) if len(x) == 1 else together(net(x))


def unchanged(logits):
    return logits


WRAPPERS = {
    "constant": fine(lambda net, x: 0 * net(x) + torch.arange(CLASSES).to(x)),
    "tied": risky(lambda net, x: net(x)[:, :1].expand(-1, CLASSES), "loss"),  # in float16 DLR is 0/0 there
    "two tied": fine(lambda net, x: net(x)[:, [0, 0, 1, 2]]),
    "not contiguous": fine(lambda net, x: net(x).t().contiguous().t()),
    "double precision": fine(lambda net, x: net(x).double()),
    "unused weights": fine(lambda net, x: pixels_as_logits(x)),
    "weights of no effect": fine(lambda net, x: pixels_as_logits(x) + 0 * net(x)),
    "saturated": risky(lambda net, x: (1e4 * net(x)).sigmoid(), "loss", "probabilities"),
    "in place, no_grad": fine(no_grad_in_place),
    "in place, data": fine(data_in_place),
    "tiny": risky(lambda net, x: 1e-30 * net(x), "model"),
    "huge": risky(lambda net, x: 1e30 * net(x), "model"),
    "NaN for some": risky(nan_on_some, "model"),
    "one class": risky(lambda net, x: net(x)[:, :1], "classes"),
    "two classes": risky(lambda net, x: net(x)[:, :2], "classes"),
    "a row short": risky(by_batch(unchanged, lambda z: z[:-1]), "model"),
    "a row too many": risky(by_batch(unchanged, lambda z: torch.cat([z, z[:1]])), "model"),
    "one row for all": risky(by_batch(unchanged, lambda z: z[:1]), "model"),
    "a column": risky(by_batch(unchanged, lambda z: z[..., None]), "model"),
    "classes by batch": risky(by_batch(unchanged, lambda z: z[:, :3]), "model"),
    "flat when several": risky(by_batch(unchanged, torch.flatten), "model"),
    "a tuple when several": risky(by_batch(unchanged, lambda z: (z,)), "model"),
    "cut when several": risky(by_batch(unchanged, torch.Tensor.detach), "gradient"),
    "no classes": bad(lambda net, x: net(x)[:, :0], "classes", "labels"),
    "in place": risky(lambda net, x: net(x.mul_(2)), "model"),
    "detached": bad(lambda net, x: net(x).detach(), "gradient"),
    "no dependence on images": bad(lambda net, x: torch.eye(CLASSES).to(x)[torch.zeros(len(x)).long()], "gradient"),
    "whole numbers": bad(lambda net, x: net(x).long(), "gradient"),
    "infinite": bad(lambda net, x: net(x) + INF, "model"),
    "infinite slope": bad(lambda net, x: net(x) + (net(x) - net(x).detach()).sqrt(), "model"),
    "a vector": bad(lambda net, x: net(x)[:, 0], "model"),
    "a dict": bad(lambda net, x: {"logits": net(x)}, "model"),
    "nothing": bad(lambda net, x: None, "model"),
}


def with_buffer(net):
    net.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    return net


def with_integers(net):
    net.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    return net


def shared(net):
    """Two layers of one weight."""
    tail = nn.Linear(CLASSES, CLASSES, bias=False)
    tail.weight = nn.Parameter(torch.eye(CLASSES).to(net[-1].weight))
    return nn.Sequential(net, tail, nn.Sequential(tail))


def normalised(net):
    """BatchNorm of one value a channel, which in train mode takes no batch of one, and dropout."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(net[2].in_features), nn.Dropout(), *net[2:]).to(net[2].weight)


def convolutional(net):
    """Without a linear layer."""
    pixels = net[2].in_features
    layers = nn.Flatten(), nn.Unflatten(1, (pixels, 1)), nn.Conv1d(pixels, CLASSES, 1), nn.Flatten()
    return nn.Sequential(*layers).to(net[2].weight)


def another_dtype(net):
    return net.to(torch.float32 if net[2].weight.dtype == torch.float64 else torch.float64)


BUILT = {
    "integer buffer": fine(with_buffer),
    "integer parameter": fine(with_integers),
    "shared weights": fine(shared),
    "BatchNorm": fine(normalised),
    "convolution": fine(convolutional),
    "frozen": fine(lambda net: net.requires_grad_(False)),
    "no parameters": fine(lambda net: Wrapped(nn.Identity(), lambda net, x: pixels_as_logits(x))),
    "another dtype": bad(another_dtype, "model"),
    "meta": bad(lambda net: net.to("meta"), "model"),
    "a function": bad(lambda net: lambda x: net(x), "model"),
    "a class": bad(lambda net: nn.Linear, "model"),
    "None": bad(lambda net: None, "model"),
}

MODELS = {
    name: Odd(lambda net, function=odd.value: Wrapped(net, function), odd.words, odd.fatal)
    for name, odd in WRAPPERS.items()
} | BUILT
FEW_CLASSES = {"one class": 1, "two classes": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = Odd(lambda thing: thing)


@dataclass(frozen=True)
class Case:
    """Names of the ingredients, empty for an ordinary one, and all the numbers."""

    images: str
    labels: str
    model: str
    loss: str
    threat: dict[str, Odd]
    options: dict[str, Odd]
    dtype: torch.dtype
    shape: tuple[int, ...]
    n: int
    tampered: bool
    seed: int

    @property
    def network(self):
        return network("mlp", CLASSES, self.dtype, self.seed, self.shape)

    def make(self):
        """The model, the images and the labels."""
        net = self.network
        x, y = images(self.n, net, CLASSES, self.dtype, self.seed, shape=self.shape)
        y = y % FEW_CLASSES.get(self.model, CLASSES)
        model = MODELS.get(self.model, PLAIN).value(net)
        if self.tampered and isinstance(model, nn.Module):
            tamper(model)
        return model, IMAGES.get(self.images, PLAIN).value(x), LABELS.get(self.labels, PLAIN).value(y)

    @property
    def odds(self):
        """All that is strange about it."""
        named = (IMAGES, self.images), (LABELS, self.labels), (MODELS, self.model), (ATTACK_LOSSES, self.loss)
        strange = [table[name] for table, name in named if name]
        if self.dtype == torch.float16 and self.loss in ("", "dlr"):
            strange.append(risky(None, "loss"))  # 1e-12 is 0 there, and one over the square of a small gap is infinite
        return [*strange, *self.threat.values(), *self.options.values()]

    @property
    def fields(self):
        return values(self.threat)

    @property
    def keywords(self):
        loss = {"loss": ATTACK_LOSSES[self.loss].value} if self.loss else {}
        return loss | {"steps": 3} | values(self.options)


def without(table, *names):
    return {name: value for name, value in table.items() if name not in names}


def values(odds):
    return {name: odd.value for name, odd in odds.items()}


def tamper(model):
    """Modes, flags and gradients as only a caller in the middle of something else has them."""
    model.train()
    for module in list(model.modules())[1::2]:
        module.train(False)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.grad = torch.ones_like(parameter)


@st.composite
def some(draw, table, most=2):
    """Values for up to `most` of the parameters in the table."""
    names = draw(st.sets(st.sampled_from(sorted(table)), min_size=1, max_size=most))
    return {name: draw(st.sampled_from(table[name])) for name in sorted(names)}


def any_fine(table):
    """A value for every parameter in the table, none that may be refused."""
    return st.fixed_dictionaries(
        {name: st.sampled_from([odd for odd in odds if not odd.words]) for name, odds in table.items()}
    )


@st.composite
def cases(draw, *parts, options=OPTIONS, most=3):
    """Cases in which up to `most` parts of the input are strange."""
    strange = draw(st.sets(st.sampled_from(("images", "labels", "model", *parts, "options")), max_size=most))

    def pick(part, table):
        return draw(st.sampled_from(sorted(table))) if part in strange else ""

    return Case(
        images=pick("images", IMAGES),
        labels=pick("labels", LABELS),
        model=pick("model", MODELS),
        loss=pick("loss", ATTACK_LOSSES),
        threat=draw(some(THREATS, 3)) if "threat" in strange else {},
        options=draw(some(options)) if "options" in strange else {},
        dtype=draw(st.sampled_from(DTYPES)),
        shape=draw(st.sampled_from(SHAPES)),
        n=draw(st.integers(1, 7)),
        tampered=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


@st.composite
def extremes(draw, options):
    """Ordinary networks and images under every number that there is no reason to refuse."""
    return replace(
        draw(cases(most=0)),
        loss=draw(st.sampled_from(("", "ce", "dlr", "tiny"))),
        threat=draw(any_fine(THREATS)),
        options=draw(any_fine(without(options, "precision", "compiled", "progress"))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What has to hold
# ---------------------------------------------------------------------------------------------------------------------


def bits(thing):
    """Every bit of a tensor, so that NaN equals itself and -0.0 is not 0.0."""
    if not isinstance(thing, torch.Tensor) or thing.is_meta:
        return None
    plain = thing.clone().detach().to_dense().flatten().clone(memory_format=torch.contiguous_format)
    untouched = not thing.is_leaf or thing.grad is None
    return thing.dtype, thing.shape, thing.requires_grad, untouched, plain.view(torch.uint8).tolist()


def belongings(model, *things):
    """All that a call could change of the caller's."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    buffers = [b for module in modules for b in module.buffers(recurse=False)]
    return {
        "modes": [module.training for module in modules],
        "flags": [(id(p), p.requires_grad, id(p.grad)) for p in parameters],
        "gradients": [bits(p.grad) for p in parameters],
        "weights": [bits(tensor) for tensor in (*parameters, *buffers)],
        "things": [bits(thing) for thing in things],
        "random numbers": (bits(torch.get_rng_state()), random.getstate()),
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def names_one_of(message, words):
    return any(re.search(rf"\b{re.escape(word)}\b", message) for word in words)


def is_too_coarse(message, things):
    """An error about images in 16 bits and a step, or a gradient, that they round away; neither is strange."""
    kinds = "|".join(str(t.dtype) for t in things if getattr(t, "dtype", None) in (torch.float16, torch.bfloat16))
    words = rf"images of ({kinds}) are too coarse for \d+ steps of delta \S+: give float32 images and model"
    words += ', and precision="bfloat16" for speed'
    flat = r"the gradient of the loss( \w+)? is 0 at every image, though the model tells images apart: "
    return bool(kinds and (re.fullmatch(words, message) or re.match(flat, message)))


def outcome(call, odds, model, *things, may_change=lambda error: False):
    """What the call returns, or None after an error that was due; the caller's belongings are as they were.

    `may_change` says whether the model's weights may have changed, given the error or None.
    """
    before, error, result = belongings(model, *things), None, None
    try:
        result = call()
    except WdatError as caught:
        error = caught
    after = belongings(model, *things)
    if may_change(error):
        after["weights"] = before["weights"]
    assert not [name for name in before if before[name] != after[name]]
    if error is None:
        assert not any(odd.fatal for odd in odds), "an error was due"
    else:
        message, words = str(error), {word for odd in odds for word in odd.words}
        assert message and message.isprintable(), "more than one line"
        assert names_one_of(message, words) or is_too_coarse(message, things), f"{message!r} names none of {words}"
    ENDS["hostile_results" if error is None else "hostile_errors"] += 1
    return result


@pytest.fixture(scope="session", autouse=True)
def _ends(record_testsuite_property):
    yield
    for end, count in ENDS.items():
        record_testsuite_property(end, count)


def power_mean(values, order, reduce):
    """(sum or mean of v_i^order)^(1/order) over the last dimension; inf is no exception, and nothing overflows."""
    top = values.amax(-1, keepdim=True)
    return top[..., 0] * reduce((values / top).nan_to_num(0).pow(order), -1).pow(1 / order)


def distance(x_adv, x, threat):
    """W_p between two sets of images, in double precision."""
    lengths = power_mean((x_adv.double() - x.double()).flatten(1).abs(), threat.r, torch.sum)
    return power_mean(lengths, threat.p, torch.mean).item()


def slack(x, threat, radius):
    """How far beyond the radius rounding can carry a set of images of numbers up to 1 in size.

    Each pixel of the result is rounded once, by eps / 2 at most, and so is the difference that it is the sum of: eps in
    all, which is eps pixels^(1/r) in an image's norm. The radius that an image is given comes out of two sums, over the
    pixels and over the images, whose relative error is at most eps for each term, and a handful of products.
    """
    eps, pixels = torch.finfo(x.dtype).eps, x[0].numel()
    reach = min(radius, pixels ** (1 / threat.r))  # no image goes further while its pixels are in [0, 1]
    return eps * (pixels ** (1 / threat.r) + (pixels + len(x) + 8) * reach)


@torch.no_grad()
def look(model, x, precision="float32"):
    """The model's logits in eval mode, image by image, so that nothing can depend on the batch."""
    model = copy.deepcopy(model).train(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return torch.cat([model(image.clone().contiguous()) for image in x.detach().split(1)]).double()


def assert_verdicts(correct, model, x, y, precision="float32"):
    """`correct` is what the model says of each image whose two likeliest classes do not tie up to rounding."""
    logits = look(model, x, precision)
    assert logits.isfinite().all()
    eps = torch.finfo(torch.bfloat16 if precision == "bfloat16" else x.dtype).eps
    first, second = F.pad(logits, (0, 1), value=-INF).topk(2, 1).values.T
    sure = first - second > 64 * eps * (1 + logits.abs().amax(1))
    assert (correct.dtype, correct.shape) == (torch.bool, y.shape)
    assert torch.equal(correct[sure], (logits.argmax(1) == y)[sure])


def assert_attack(attack, case, model, x, y, radius):
    """All that an Attack promises, inside a ball of the given radius."""
    threat, steps, n = Threat(**case.fields), case.keywords["steps"], len(x)
    x, y, x_adv, history = x.detach(), y.detach(), attack.x_adv, attack.history
    assert (x_adv.shape, x_adv.dtype, x_adv.device, x_adv.requires_grad) == (x.shape, x.dtype, x.device, False)
    assert x_adv.min() >= 0 and x_adv.max() <= 1

    reached, rounding = distance(x_adv, x, threat), slack(x, threat, radius)
    assert reached <= radius + rounding
    assert abs(attack.distance - reached) <= rounding

    numbers = {name: len(values) for name, values in history.items()}
    assert numbers == {"accuracy": steps + 1, "loss": steps + 1, "upsilon": steps}
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert min(history["upsilon"]) >= 0
    assert math.isfinite(attack.loss)
    assert attack.accuracy == attack.correct.sum().item() / n
    assert history["accuracy"][0] == pytest.approx(attack.was_correct.sum().item() / n, rel=1e-12)
    precision = case.keywords.get("precision", "float32")
    assert_verdicts(attack.correct, model, x_adv, y, precision)
    if not case.keywords.get("random_start"):  # else it is of the start
        assert_verdicts(attack.was_correct, model, x, y, precision)


# ---------------------------------------------------------------------------------------------------------------------
# Attacks
# ---------------------------------------------------------------------------------------------------------------------


def assert_wpgd(case):
    model, x, y = case.make()
    attack = outcome(lambda: wpgd(model, x, y, Threat(**case.fields), **case.keywords), case.odds, model, x, y)
    if attack:
        assert_attack(attack, case, model, x, y, Threat(**case.fields).delta)
        assert attack.accuracy == min(attack.history["accuracy"][1:])
        assert attack.loss == attack.history["loss"][1:][attack.history["accuracy"][1:].index(attack.accuracy)]


def assert_wpgd_budget(case):
    model, x, y = case.make()
    keywords = {"upsilon": 1.0} | case.keywords
    attack = outcome(lambda: wpgd_budget(model, x, y, Threat(**case.fields), **keywords), case.odds, model, x, y)
    if attack:
        threat = Threat(**case.fields)
        # Both sensitivities are known up to rounding; the power makes of that what it will.
        ratio = torch.tensor(attack.history["upsilon"][0] / keywords["upsilon"], dtype=torch.float64)
        radius = threat.delta * (ratio * (1 + 4 * torch.finfo(x.dtype).eps)) ** (threat.q - 1)
        assert_attack(attack, case, model, x, y, radius.item())


@drawn
@given(cases("loss", "threat", options=OPTIONS | PLACES | RULES))
def test_wpgd_keeps_its_promises_or_names_what_is_wrong(case):
    assert_wpgd(case)


@drawn
@given(extremes(OPTIONS | PLACES | RULES))
def test_no_number_is_too_extreme_for_wpgd(case):
    assert_wpgd(case)


@drawn
@given(cases("loss", "threat", options=OPTIONS | UPSILON))
def test_wpgd_budget_keeps_its_promises_or_names_what_is_wrong(case):
    assert_wpgd_budget(case)


@drawn
@given(extremes(OPTIONS | UPSILON))
def test_no_number_is_too_extreme_for_wpgd_budget(case):
    assert_wpgd_budget(case)


@drawn
@given(cases("loss", "threat", options=without(OPTIONS, "steps", "step_ratio", "progress")))
def test_sensitivity_is_a_finite_number_or_names_what_is_wrong(case):
    model, x, y = case.make()
    keywords = without(case.keywords, "steps")
    upsilon = outcome(lambda: sensitivity(model, x, y, Threat(**case.fields), **keywords), case.odds, model, x, y)
    assert upsilon is None or (isinstance(upsilon, float) and 0 <= upsilon < INF)


TRAINING_LOSSES = (
    *(odd for odd in ATTACK_LOSSES.values() if not callable(odd.value)),
    *map(fine, (ce, in_place_margin)),
)


@drawn
@given(cases(options=without(OPTIONS, "step_ratio") | {"delta": RADII, "loss": TRAINING_LOSSES}))
def test_evaluate_keeps_its_promises_or_names_what_is_wrong(case):
    model, x, y = case.make()
    scores = outcome(lambda: evaluate(model, x, y, **case.keywords), case.odds, model, x, y)
    if scores:
        accuracies = {"clean": scores.clean, "w_inf": scores.w_inf, "w_2": scores.w_2}
        assert accuracies == {name: correct.sum().item() / len(x) for name, correct in scores.correct.items()}
        assert_verdicts(scores.correct["clean"], model, x, y, case.keywords.get("precision", "float32"))


@drawn
@given(
    st.sampled_from((1e-300, 1e-40, 1e-20, 1e-6, 0.1, 1.0)),
    st.sampled_from(DTYPES),
    st.sampled_from((1.5, 2.0, 3.0, INF)),
    st.sampled_from((1.5, 2.0, INF)),
    st.sampled_from(("ce", "redlr")),
    st.integers(0, 2**32),
)
def test_however_small_upsilon_is_the_images_move_at_least_as_far_as_for_the_true_one(factor, dtype, p, r, loss, seed):
    """A radius too large for the floating-point type is no reason to stay at home, or to go nowhere in particular."""
    model, threat = network("mlp", dtype=dtype, seed=seed), Threat(p, r, 0.05)
    x, y = images(5, model, dtype=dtype, seed=seed, low=0.3, high=0.7)
    upsilon = sensitivity(model, x, y, threat, loss=loss)
    if upsilon > 0:
        attack = wpgd_budget(model, x, y, threat, upsilon=factor * upsilon, loss=loss, steps=1)
        assert attack.distance >= threat.delta * (1 - 64 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------------------------------------
# The projection
# ---------------------------------------------------------------------------------------------------------------------

MOVED = {
    "far": fine(lambda x: x + torch.linspace(-2, 2, x.numel()).to(x).view_as(x)),
    "very far": risky(lambda x: x + 1e30, "x_adv"),
    "nowhere": fine(torch.clone),
    "one of them": fine(lambda x: torch.cat([x[:1] + 1, x[1:]])),
    "not contiguous": fine(lambda x: (x + 0.2).repeat_interleave(2, -1)[..., ::2]),
    "expanded": fine(lambda x: x.new_tensor(0.5).expand_as(x)),
    "inference": fine(inference),
    "requires a gradient": fine(lambda x: (x + 0.2).requires_grad_()),
    "another dtype": risky(lambda x: (x + 0.2).double(), "x_adv"),
    "twice as many": bad(lambda x: torch.cat([x, x]), "x_adv"),
    "another shape": bad(lambda x: x[..., None], "x_adv"),
    "one image for all": bad(lambda x: x[:1] if len(x) > 1 else x.expand(2, *x.shape[1:]), "x_adv"),
    "NaN": bad(lambda x: x + NAN, "x_adv"),
    "infinite": bad(lambda x: x + INF, "x_adv"),
    "int64": bad(torch.Tensor.long, "x_adv"),
    "complex": bad(lambda x: x.double() + 0j, "x_adv"),
    "meta": bad(lambda x: x.to("meta"), "x_adv"),
    "numpy": bad(lambda x: x.double().numpy(), "x_adv"),
    "None": bad(lambda x: None, "x_adv"),
}
# Here images may lie anywhere, as long as that is somewhere.
ORIGINS = {
    name: Odd(IMAGES[name].value, ("x", "images"), IMAGES[name].fatal)
    for name in sorted(set(IMAGES) - {"a hair above 1", "a hair below 0", "another dtype", "float8"})
}


@drawn
@given(
    st.sampled_from(("", *MOVED)),
    st.sampled_from(("", *ORIGINS)),
    some(BALLS, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.integers(1, 7),
)
def test_projection_is_idempotent_inside_the_ball_and_names_what_is_wrong(move, origin, fields, dtype, shape, n):
    good = torch.linspace(0, 1, n * math.prod(shape)).view(n, *shape).to(dtype)
    x = ORIGINS.get(origin, PLAIN).value(good)
    x_adv = MOVED[move].value(good) if move else good + 0.2
    odds = [*fields.values(), *(table[name] for table, name in ((MOVED, move), (ORIGINS, origin)) if name)]
    once = outcome(lambda: project(x_adv, x, Threat(**values(fields))), odds, None, x_adv, x)
    if once is not None:
        threat = Threat(**values(fields))
        scale = max(1, x_adv.detach().abs().max().item())
        rounding = scale * slack(x, threat, threat.delta)
        assert once.shape == x.shape and once.isfinite().all()
        assert distance(once, x, threat) <= threat.delta + rounding
        assert (project(once, x, threat) - once).abs().max() <= rounding
        if distance(x_adv, x, threat) < threat.delta - rounding:
            assert torch.equal(once, x_adv)


@pytest.mark.parametrize("threat", [None, 0.03, "W_2", FinetuneConfig()], ids=str)
def test_projection_names_a_threat_that_is_none(threat):
    with pytest.raises(WdatError, match="threat"):
        project(torch.ones(2, 3), torch.ones(2, 3), threat)


# ---------------------------------------------------------------------------------------------------------------------
# Perturbing a network
# ---------------------------------------------------------------------------------------------------------------------

CHANGES = {
    "noise": (*at_least_0("noise", (5e-324, 0.1, 1e3)), risky(1e300, "noise")),
    "reinit": word("reinit", "default", "xavier"),
    "head": (risky(None, "head", "layer"), *(risky(value, "head", "layer") for value in ("2", "4", "inner.2", *JUNK))),
    "generator": (fine(None), *(bad(value, "generator") for value in (0, 1, True, *JUNK, np.random.default_rng(0)))),
}


def odd_to_perturb(model, how):
    """What is strange about the model itself, to `perturb_`."""
    if not isinstance(model, nn.Module):
        return bad(None, "model")
    if isinstance(how, str) and how == "last_layer":
        return risky(None, "head", "layer", "model")
    # Whole numbers among the parameters may be left alone or refused.
    return PLAIN if all(p.is_floating_point() for p in model.parameters()) else risky(None, "parameter")


@drawn
@given(cases(options=CHANGES), st.sampled_from(word("how", "whole", "last_layer", "none")))
def test_perturbed_weights_are_finite_or_the_error_names_what_is_wrong(case, how):
    model, *_ = case.make()
    x = images(1, case.network, CLASSES, case.dtype, shape=case.shape)[0]
    odds = [*case.options.values(), how, odd_to_perturb(model, how.value)]
    result = outcome(
        lambda: perturb_(model, how.value, x=x, **values(case.options)),
        odds,
        model,
        x,
        may_change=lambda error: error is None,
    )
    if result is not None:
        assert {id(parameter) for parameter in result} <= {id(parameter) for parameter in model.parameters()}
        assert_finite_weights(model)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def diverging(name, values):
    """Values at which training may well diverge, or not even begin."""
    return tuple(risky(value, name, "rate", "loss") for value in values)


def strange_threats(*good):
    return parameter("threat", good, wrong=(None, 0.03, THREATS))


def pairing(batch):
    logits, logits_adv = batch.net(batch.x), batch.net(batch.attack(Threat(delta=0.1), "ce"))
    return F.cross_entropy(logits_adv, batch.y) + F.mse_loss(logits_adv, logits)


def of_the_logits(function):
    return lambda batch: function(batch.net(batch.x))


OBJECTIVES = (
    *(fine(objective) for objective in ("wdat", pairing, of_the_logits(lambda z: z.square().mean()))),
    *(risky(objective, "objective", "threat") for objective in ("trades", "pgd")),
    *(
        bad(of_the_logits(f), "objective")
        for f in (unchanged, torch.Tensor.argmax, lambda z: z.sum().item(), lambda z: z.mean(0))
    ),
    *(bad(value, "objective") for value in ("", "WDAT", None, True, 0, *JUNK)),
)
BOTH = {
    "beta": (*at_least_0("beta", (5e-324, 6)), *diverging("beta", (1e6, 1e300))),
    "steps": OPTIONS["steps"],
    "step_ratio": OPTIONS["step_ratio"],
    "epochs": whole("epochs", (1, 2)),
    "batch_size": OPTIONS["batch_size"],
    "loss": TRAINING_LOSSES,
    "momentum": (*fraction("momentum", (0.5,), wrong=(1,)), risky(0, "momentum")),
    "nesterov": (*flag("nesterov"), risky(True, "momentum")),
    "weight_decay": (*at_least_0("weight_decay", (1e-4,)), *diverging("weight_decay", (1e6, 1e300))),
    "schedule": word("schedule", "constant", "cosine", "one_cycle"),
    "warm_up": fraction("warm_up", (5e-324, 0.5, 1 - 1e-9), wrong=(0, 1)),
    "average": fraction("average", (0, 5e-324, 0.9), wrong=(1,)),
    "augment": (*flag("augment"), risky(True, "augment")),
    "precision": OPTIONS["precision"],
    "compiled": OPTIONS["compiled"],
    "seed": PLACES["seed"],
    "perturb": (*word("perturb", "whole", "none"), risky("last_layer", "head", "layer")),
    "tau": (*positive("tau", (5e-324, 1e-3)), *diverging("tau", (1, 1e6, 1e30, 1e300))),
    "noise": (*CHANGES["noise"], *diverging("noise", (1e6,))),
    "reinit": CHANGES["reinit"],
    "head": (fine(None), *(risky(value, "head") for value in ("2", "")), *(bad(value, "head") for value in NO_TEXT)),
}
ALGORITHM_1 = BOTH | {
    "objective": OBJECTIVES,
    "eta": fraction("eta", (5e-324, 0.5, 1), wrong=(0,)),
    "gamma": (*at_least_0("gamma", (5e-324, 1)), *diverging("gamma", (1e300,))),
    "threat": strange_threats(Threat(1.001), Threat(1.5, 2, 1e-12), Threat(INF, 2, 1e6), Threat(3, 1.001, 0.1)),
    "sample": fraction("sample", (5e-324, 0.5, 1), wrong=(0,)),
    "upsilon_from": word("upsilon_from", "sample", "batch"),
    "consistency": word("consistency", "ce_detached", "ce", "kl"),
    "attack_label": word("attack_label", "true", "predicted"),
    "attack_mode": (fine("eval"), *word("attack_mode", "train")),
    "update_mode": (fine("eval"), *word("update_mode", "train")),
    "random_start": PLACES["random_start"],
    "first_upsilon": word("first_upsilon", "sample", "full"),
}
POINTWISE = BOTH | {
    "threat": strange_threats(Threat(INF, 2, 1e6), Threat(INF, 1 + 1e-9, 1e-12), Threat(INF, 1.5, 0.1)),
}
CALLS = {
    "on_epoch": (
        *(fine(function) for function in (None, lambda epoch, model: None, lambda epoch, model: {"half": 0.5})),
        *(
            bad(value, "on_epoch")
            for value in (lambda epoch, model: 0.5, lambda epoch, model: {"clean": 1}, True, *JUNK)
        ),
    ),
    "progress": OPTIONS["progress"],
    "resume": (
        fine(None),
        *(bad(value, "resume") for value in (True, 3, "", "/", "a\0b", *NO_TEXT)),
    ),
    "save_every": at_least_0("save_every", (5e-324, 60)),
    "eval_batch_size": whole("eval_batch_size", (1, 2, 1000, 2**70)),
    "stop_after": (fine(None), *(bad(value, "stop_after") for value in (0, 1, INF, HUGE, True, *JUNK))),
}
SETS = {
    "a list": fine(lambda x, y: [x, y]),
    "images alone": bad(lambda x, y: y if x is None else x, "train", "val", "images", "labels"),
    "one": bad(lambda x, y: (x,), "train", "val"),
    "three": bad(lambda x, y: (x, y, y), "train", "val"),
    "swapped": bad(lambda x, y: (y, x), "images"),
    "a number": bad(lambda x, y: 3, "train", "val"),
    "nothing": bad(lambda x, y: None, "train"),
}
TRAINED = {  # models that only training finds strange
    "no parameters": bad(None, "parameter", "layer"),
    "unused weights": bad(None, "parameter", "layer"),
    "integer parameter": risky(None, "parameter"),
    "BatchNorm": risky(None, "batch_size"),
    "huge": risky(None, "rate"),
    "NaN for some": risky(None, "rate"),
}


@dataclass(frozen=True)
class Training:
    """A case whose images and labels are those of `part`, "train" or "val"; the other is ordinary or, for val, none."""

    case: Case
    part: str
    pair: str
    validated: bool
    calls: dict[str, Odd]

    @property
    def odds(self):
        case = self.case
        strange = [*case.odds, *self.calls.values(), *([TRAINED[case.model]] if case.model in TRAINED else [])]
        if self.pair:
            strange.append(SETS[self.pair])
        return strange

    def sets(self):
        """The model, the images and labels of the strange set, and the two sets as training is given them."""
        model, x, y = self.case.make()
        other = images(4, self.case.network, CLASSES, self.case.dtype, shape=self.case.shape)
        other = other[0], other[1] % FEW_CLASSES.get(self.case.model, CLASSES)
        strange = SETS[self.pair].value(x, y) if self.pair else (x, y)
        if self.part == "val":
            return model, (x, y), other, strange
        return model, (x, y), strange, other if self.validated else None


@st.composite
def trainings(draw, options):
    """Trainings in which anything may be strange, but for the other set."""
    part = draw(st.sampled_from(("train", "val")))
    return Training(
        case=draw(cases(options=options, most=2)),
        part=part,
        pair=draw(st.sampled_from(("", *without(SETS, *(["nothing"] if part == "val" else []))))),
        validated=draw(st.booleans()),
        calls=draw(st.just({}) | some(CALLS, 1)),
    )


@st.composite
def long_trainings(draw, options):
    """Ordinary networks and sets under every configuration that there is no reason to refuse at once."""
    taken = {name: [odd for odd in odds if not odd.fatal] for name, odds in without(options, "compiled").items()}
    case = replace(draw(cases(most=0)), options=draw(some(taken, 4)))
    return Training(case, part="train", pair="", validated=draw(st.booleans()), calls={})


def assert_training(training, objective):
    """A run ends in a History that keeps its promises, or in an error that was due."""
    model, things, first, second = training.sets()
    fields = {"objective": objective, "epochs": 1, "steps": 2, "batch_size": 3, "augment": False}
    fields |= values(training.case.options)
    history = outcome(
        lambda: finetune(
            model, first, second, FinetuneConfig(**(STARTS[objective] | fields)), **values(training.calls)
        ),
        training.odds,
        model,
        *things,
        # Some models and some numbers are found out only by training with them.
        may_change=lambda error: (
            error is None or training.case.model or re.search("finite|must return|objective", str(error))
        ),
    )
    if history is None:
        return
    rows = history.epochs
    score = f"w_{({'threat': Threat()} | STARTS[objective] | fields)['threat'].p:g}"
    assert [row["epoch"] for row in rows] == list(range(1, fields["epochs"] + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    scores = [0.0] * len(rows) if second is None else [row[score] for row in rows]
    assert history.best == (len(rows) if second is None else 1 + scores.index(max(scores)))
    minibatches = fields["epochs"] * math.ceil(len(first[0]) / fields["batch_size"])
    assert len(history.upsilon) == (minibatches if fields["objective"] == "wdat" else 0)
    assert all(0 <= upsilon < INF for upsilon in history.upsilon)
    assert_finite_weights(model)


def assert_finite_weights(model):
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if not tensor.is_meta)


@drawn
@given(trainings(ALGORITHM_1))
def test_finetune_keeps_its_promises_or_names_what_is_wrong(training):
    assert_training(training, "wdat")


@drawn
@given(long_trainings(ALGORITHM_1))
def test_no_number_is_too_extreme_for_finetune(training):
    assert_training(training, "wdat")


@pytest.mark.parametrize("objective", ["trades", "pgd"])
def test_pretraining_keeps_its_promises_or_names_what_is_wrong(objective):
    @settings(drawn, max_examples=EXAMPLES // 2)
    @given(trainings(POINTWISE))
    def check(training):
        assert_training(training, objective)

    check()


@pytest.mark.parametrize("objective", ["trades", "pgd"])
def test_no_number_is_too_extreme_for_pretraining(objective):
    @settings(drawn, max_examples=EXAMPLES // 2)
    @given(long_trainings(POINTWISE))
    def check(training):
        assert_training(training, objective)

    check()


def test_training_names_a_config_of_another_kind():
    model = network("mlp")
    for config in (None, {}, Threat(), FinetuneConfig):
        with pytest.raises(WdatError, match=r"\bconfig\b"):
            finetune(model, images(4, model), None, config)
