"""Which run a checkpoint belongs to: the network with its layers, and functions with their code and their values."""

import ast
import copy
import functools
import importlib
import os
import pickle
import re
import runpy
import subprocess
import sys
import time
import types
import weakref
from collections import defaultdict, deque
from enum import Enum
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import Centre, images, named, network, seeded
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import wdat_core
from wdat_core import FinetuneConfig, Threat, WdatError, finetune


def small(**fields):
    return FinetuneConfig(**({"threat": Threat(delta=0.05), "steps": 1, "epochs": 2, "batch_size": 5} | fields))


def begun(path, model, **fields):
    """A run that is stopped after its first minibatch, or goes on by one."""
    data = images(10, network("full"))
    return finetune(model, data, data, small(**fields), resume=path, stop_after=0)


# ----------------------------------------------------------------------------------------------------------- networks


def steep(slope):
    return lambda x: x * slope


class Setting(nn.Module):
    """A network with settings of its own beside its layers."""

    gain = 1.0

    def __init__(self, scale=1.0, act=torch.relu, passes=0):
        super().__init__()
        self.scale, self.act, self.passes, self.inner = scale, act, passes, network("full")

    def forward(self, x):
        self.passes += 1
        return self.scale * self.gain * self.act(self.inner(x))


def with_layer(index, layer):
    model = network("full")
    model[index] = layer
    return model.to(torch.float64).eval()


def convolution(**options):
    model = network("full")
    layer = nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64, **options)
    layer.load_state_dict(model[1].state_dict())
    return with_layer(1, layer)


OTHER_LAYERS = {
    "an activation": lambda: with_layer(3, nn.Tanh()),
    "a rate of dropout": lambda: with_layer(5, nn.Dropout(0.1)),
    "a mode of padding": lambda: convolution(padding_mode="reflect"),
    "a layer without tensors": lambda: with_layer(0, nn.Sequential(Centre(), nn.Sigmoid())),
}


@pytest.mark.parametrize("other", OTHER_LAYERS)
def test_a_checkpoint_of_other_layers_with_the_same_tensors_is_refused(other, tmp_path):
    begun(tmp_path / "run", network("full"))
    with pytest.raises(WdatError, match="differs in the layers of the network: put that back as it was when"):
        begun(tmp_path / "run", OTHER_LAYERS[other]())
    begun(tmp_path / "run", network("full"))


@pytest.mark.parametrize("other", [{"scale": 2.0}, {"act": torch.tanh}, {"act": lambda x: x}, {"act": steep(0.5)}])
def test_settings_that_a_network_does_not_print_belong_to_it(other, tmp_path):
    begun(tmp_path / "run", Setting())
    with pytest.raises(WdatError, match=f"differs in the network.{next(iter(other))}: there it was "):
        begun(tmp_path / "run", Setting(**other))


def test_a_network_that_counts_its_passes_goes_on(tmp_path):
    model = Setting()
    begun(tmp_path / "run", model)
    assert model.passes
    model(images(1, model.inner)[0])
    begun(tmp_path / "run", model)
    begun(tmp_path / "run", Setting(passes=7))


class Featured(Setting):
    """Keeps what its layers say, by a hook."""

    def __init__(self):
        super().__init__()
        self.features, self.counts = {}, {"passes": 0}
        self.inner[1].register_forward_hook(self.keep)

    def keep(self, layer, inputs, output):
        self.features["conv"] = output.detach()
        self.counts["passes"] += 1


def test_a_network_that_keeps_features_goes_on_after_other_passes_and_after_ctrl_c(tmp_path):
    def stopping(things):
        yield from list(things)[:1]
        raise KeyboardInterrupt

    model, data = Featured(), images(20, network("full"))
    begun(tmp_path / "run", model)
    model(data[0][:3])
    begun(tmp_path / "run", model)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            model, images(10, model.inner), images(10, model.inner), small(), resume=tmp_path / "run", progress=stopping
        )
    begun(tmp_path / "run", model)
    assert model.counts["passes"] and model.features["conv"].shape[1] == 4


def test_a_network_that_was_saved_whole_and_loaded_again_is_the_same(tmp_path):
    pair, model = (1, 2), network("full")
    model[1].held, model[1].alike = [pair, pair], [[pair], [(1, 2)]]
    start = pickle.dumps(model)
    begun(tmp_path / "run", model)
    begun(tmp_path / "run", pickle.loads(start))
    begun(tmp_path / "run", copy.deepcopy(pickle.loads(start)))


SHIFT = 0.0


class Times:
    kind = "times"

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


HELD = {
    "a whole number": lambda by: by,
    "a tensor": lambda by: torch.tensor(by),
    "a list": lambda by: [1, [by]],
    "a dict": lambda by: {"by": by},
    "a partial function": lambda by: partial(torch.mul, by),
    "an object that is called": Times,
    "a function that closes over another": lambda by: (lambda inner: lambda x: inner(x))(steep(by)),
}


@pytest.mark.parametrize("held", HELD)
def test_whatever_a_network_holds_belongs_to_it(held, tmp_path):
    def make(by):
        model = network("full")
        model[1].held = HELD[held](by)
        return model

    begun(tmp_path / "run", make(1))
    begun(tmp_path / "run", make(1))
    with pytest.raises(WdatError, match=r"differs in .*1\.held.* of the network"):
        begun(tmp_path / "run", make(2))


def test_what_a_hook_and_a_class_of_a_network_read_belongs_to_it(tmp_path, monkeypatch):
    def make():
        model = Setting(act=Times(1.0))
        model.inner[1].register_forward_hook(lambda module, inputs, output: output + SHIFT)
        return model

    begun(tmp_path / "run", make())
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "SHIFT", 1.0)
        with pytest.raises(WdatError, match=r"differs in SHIFT of hook 1 of inner\.1 of the network: there"):
            begun(tmp_path / "run", make())
    monkeypatch.setattr(Setting, "kind", "other", raising=False)  # which no code reads
    begun(tmp_path / "run", make())
    monkeypatch.setattr(Setting, "gain", 2.0)
    with pytest.raises(
        WdatError, match=r"differs in Setting\.gain of the network: there it was 1\.0, here it is 2\.0:"
    ):
        begun(tmp_path / "run", make())


def normed(change):
    model = network("full")
    with seeded(0):
        change(model[1])
    return model


KINDS = {
    "compiled": lambda: torch.compile(network("full"), backend="eager"),
    "of torch.fx": lambda: torch.fx.symbolic_trace(network("full")),
    "with weight_norm": lambda: normed(parametrizations.weight_norm),
    "with spectral_norm": lambda: normed(parametrizations.spectral_norm),
    "with functions for settings": lambda: Setting(act=lambda x: x.relu()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_kind_go_on(kind, tmp_path):
    """Used before, or made anew."""
    make, data = KINDS[kind], images(10, network("full"))
    whole, first, second = make(), make(), make()
    with torch.no_grad():
        first(data[0])
    finetune(whole, data, data, small())
    finetune(first, data, data, small(), resume=tmp_path / "run", stop_after=0)
    finetune(second, data, data, small(), resume=tmp_path / "run", stop_after=0)
    for model in (second, make()):
        finetune(model, data, data, small(), resume=tmp_path / "run")
        assert all(torch.equal(a, b) for a, b in zip(parameters(model), parameters(whole), strict=True))


NET = '''
import torch
from torch import nn

SHIFT = 1.0

class Net(nn.Module):
    """A network."""
    scale = 1.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, power=1):
        """Logits."""
        return self.scale * torch.relu(self.inner(x) + SHIFT) ** power
'''


def module(tmp_path, source, name):
    """What a file of this name says now; the name of the module is the same."""
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    return runpy.run_path(str(tmp_path / "own.py"), run_name="own")[name]


def test_an_edited_forward_is_another_network_and_an_edited_docstring_is_not(tmp_path):
    begun(tmp_path / "run", module(tmp_path, NET, "Net")(network("full")))
    begun(tmp_path / "run", module(tmp_path, NET.replace("Logits.", "The logits."), "Net")(network("full")))
    for old, new, what in (
        ("torch.relu", "torch.tanh", "the code of Net.forward of the network:"),
        ("SHIFT = 1.0", "SHIFT = 2.0", "SHIFT of Net.forward of the network: there it was 1.0, here it is 2.0:"),
        ("power=1", "power=2", "power of Net.forward of the network: there it was 1, here it is 2:"),
        ("scale = 1.0", "scale = 2.0", "Net.scale of the network: there it was 1.0, here it is 2.0:"),
    ):
        with pytest.raises(WdatError, match=f"differs in {what}"):
            begun(tmp_path / "run", module(tmp_path, NET.replace(old, new), "Net")(network("full")))


def test_a_hook_belongs_to_the_network(tmp_path):
    begun(tmp_path / "run", network("full"))
    model = network("full")
    model[1].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with pytest.raises(WdatError, match="differs in hook 1 of 1 of the network: put"):
        begun(tmp_path / "run", model)


class Noting(nn.Module):
    """A network that notes what it saw, in a number, in a buffer that comes with use, and in one with a graph."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = network("full"), 0.0
        self.act = lambda z: z * self.inner[1].weight.mean()  # closes over the network
        self.register_buffer("mean", None)
        self.register_buffer("seen", torch.zeros(1, 4, dtype=torch.float64), persistent=False)

    def forward(self, x):
        z = self.inner(x)
        self.last = z.mean().item()
        if self.training:
            self.mean = z.detach().mean(0) if self.mean is None else 0.9 * self.mean + 0.1 * z.detach().mean(0)
        self.seen = z
        return z + 0.1 * self.act(z) + (0 if self.mean is None else self.mean)


def test_a_network_that_notes_what_it_saw_goes_on(tmp_path):
    data = images(10, network("full"))
    whole, first, second = Noting(), Noting(), Noting()
    finetune(whole, data, data, small())
    finetune(first, data, data, small(), resume=tmp_path / "run", stop_after=0)
    finetune(first, data, data, small(), resume=tmp_path / "run", stop_after=0)
    finetune(second, data, data, small(), resume=tmp_path / "run")
    assert torch.equal(whole.mean, second.mean)
    assert all(torch.equal(a, b) for a, b in zip(parameters(second), parameters(whole), strict=True))


def test_what_comes_with_use_goes_again_after_an_exception():
    model = Noting()
    with pytest.raises(WdatError, match="training diverged"):
        finetune(model, images(10, network("full")), None, small(objective=lambda b: b.net(b.x).sum() * torch.inf))
    assert model.mean is None


def test_a_network_with_a_sparse_buffer_is_trained_and_goes_on(tmp_path):
    def make():
        model = network("full")
        model[5].register_buffer("mask", torch.eye(4, dtype=torch.float64).to_sparse())
        return model

    data = images(10, network("full"))
    finetune(make(), data, data, small(), resume=tmp_path / "run", stop_after=0)
    assert finetune(make(), data, data, small(), resume=tmp_path / "run").finished


def test_the_code_of_a_scripted_network_belongs_to_it(tmp_path):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    class Shifted(nn.Module):
        def forward(self, x):
            return 2 + x

    def scripted(kind):
        return torch.jit.trace(nn.Sequential(network("mlp"), kind()), images(1, network("mlp"))[0])

    data = images(10, network("mlp"))
    for kind, words in ((Doubled, None), (Doubled, None), (Shifted, "differs in the layers of the network")):
        if words is None:
            finetune(scripted(kind), data, None, small(), resume=tmp_path / "run", stop_after=0)
            continue
        with pytest.raises(WdatError, match=words):
            finetune(scripted(kind), data, None, small(), resume=tmp_path / "run")


# --------------------------------------------------------------------------------------- parameters that are not saved


class Adapted(nn.Module):
    """A network that saves its adapter alone, as adapters do."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = network("full"), nn.Linear(4, 4, dtype=torch.float64)
        with torch.no_grad():
            self.adapter.weight.copy_(torch.eye(4))

    def forward(self, x):
        return self.adapter(self.base(x))

    def state_dict(self, *arguments, **options):
        return {name: v for name, v in super().state_dict(*arguments, **options).items() if "adapter" in name}

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def test_a_network_that_saves_a_part_of_itself_goes_on_and_ends_whole(tmp_path):
    with seeded(0):
        start = Adapted()
    bias = start.adapter.bias.detach().clone()

    def model():
        made = Adapted()
        with torch.no_grad():
            made.adapter.bias.copy_(bias)
        return made

    data, val = images(14, network("full")), images(9, network("full"), seed=1)
    config = small(tau=0.3, epochs=4)
    states, whole = [], model()
    finetune(whole, data, val, config, on_epoch=lambda epoch, m: states.append(parameters(m)) or None)
    for best in range(4):
        if all(torch.equal(a, b) for a, b in zip(parameters(whole), states[best], strict=True)):
            break
    else:
        raise AssertionError("the network has the weights of no epoch")

    first = model()
    finetune(first, data, val, config, resume=tmp_path / "run", stop_after=0)
    for made in (first, model()):
        finetune(made, data, val, config, resume=tmp_path / "run")
        assert all(torch.equal(a, b) for a, b in zip(parameters(made), parameters(whole), strict=True))


def test_an_adapter_on_another_base_is_another_network(tmp_path):
    data, model = images(10, network("full")), Adapted()
    finetune(model, data, None, small(), resume=tmp_path / "run", stop_after=0)
    with torch.no_grad():
        model.base[1].weight.add_(1)
    with pytest.raises(WdatError, match="differs in the tensors of the network: put that back as it was"):
        finetune(model, data, None, small(), resume=tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- functions

OBJECTIVE = '''
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import settings
import torch
from torch import nn
from torch.nn.functional import cross_entropy

STOP = 1.0

class CFG:
    """What is read."""
    weight = 1.0
    scale = [1.0]

class Inner:
    class Deep:
        weight = 1.0

def helper(z):
    """Helps."""
    return z * 1.0

@functools.cache
def kept():
    return 1.0 + 0

@functools.wraps(helper)
def wrapping(z):
    return cached() * kept() * torch.no_grad()(without)(z)

def without(z):
    return z + 0.5

cached = functools.cache(lambda: 1.0 + 1)

def wrapped(batch):
    return wrapping(1.0) * cross_entropy(batch.net(batch.x), batch.y)

def objective(batch):
    """One value."""
    def total(logits):
        """Of the minibatch."""
        return cross_entropy(helper(logits), batch.y)
    return CFG.weight * Inner.Deep.weight * CFG.scale[0] * settings.WEIGHT * total(batch.net(batch.x))

class Held:
    """An object that is an objective."""

    def __call__(self, batch):
        return self.scaled(cross_entropy(batch.net(batch.x), batch.y))

    def scaled(self, value):
        return value * 1.0

class Loss(nn.Module):
    """A module that is the loss of the attacker."""

    def forward(self, logits, y):
        return 1.0 * cross_entropy(logits, y, reduction="none")

@dataclass
class Options:
    power: float = 1.0

class Shifting:
    shift = 0.0

class Owner:
    """Has a method that is an objective, and counts its calls."""

    def __init__(self):
        self.how, self.options, self.args = "mean", Options(), SimpleNamespace(deep=1.0, stop_after=STOP)
        self.inner, self.calls, self.act = Shifting(), 0, lambda z: z + 3.0

    def objective(self, batch):
        self.calls += 1
        losses = self.act(cross_entropy(batch.net(batch.x), batch.y, reduction="none"))
        return self.args.deep * self.scaled(getattr(losses, self.how)() ** self.options.power)

    def scaled(self, value):
        return value + 0.0 + self.inner.shift

class Asked:
    """Is asked by an objective."""
    factor = 1.0

    def __init__(self):
        self.steps = [1, 2]

    def shifted(self, value):
        return self.factor * value - 0.0

class Made:
    def __init__(self):
        self.by = 1.0

    def scaled(self, value):
        return value / 1.0 * self.by

class Whole:
    wide = 1.0

whole = Whole()

def by(held, value):
    return held.wide * value

def passing(batch):
    return by(whole, cross_entropy(batch.net(batch.x), batch.y))

def configured(batch):
    return settings.DEPTH[0] * settings.DEEP.a.b * cross_entropy(batch.net(batch.x), batch.y)

class Base:
    base = 1.0

    def __call__(self, batch):
        return self.base * cross_entropy(batch.net(batch.x), batch.y)

class Derived(Base):
    def __call__(self, batch):
        return 2 * super().__call__(batch)

def asking(batch):
    return asked.shifted(cross_entropy(batch.net(batch.x), batch.y)) * asked.steps[0]

def making(batch):
    return Made().scaled(cross_entropy(batch.net(batch.x), batch.y))

def elsewhere(batch):
    return settings.doubled(cross_entropy(batch.net(batch.x), batch.y))

held, loss, method, asked, derived = Held(), Loss(), Owner().objective, Asked(), Derived()
'''
EDITS = {
    "a setting of a class": ("    weight = 1.0\n    scale", "    weight = 2.0\n    scale", "CFG.weight"),
    "a list of a class": ("scale = [1.0]", "scale = [2.0]", "CFG.scale"),
    "a class in a class": ("        weight = 1.0", "        weight = 2.0", "Inner.Deep.weight"),
    "its code": ("CFG.weight * Inner", "CFG.weight + Inner", "the code"),
    "the code of a function that it calls": ("z * 1.0", "z + 1.0", "the code of helper"),
    "a call": ("return self.scaled(cross", "return 2 * self.scaled(cross", "the code of Held.__call__", "held"),
    "a method that the call takes": ("value * 1.0", "value * 2.0", "the code of Held.scaled", "held"),
    "the code of another file": ("", "", "the code of settings.doubled", "elsewhere"),
    "a method of an object that it asks": (
        "value - 0.0",
        "value - 1.0",
        "the code of Asked.shifted of asked",
        "asking",
    ),
    "a method of an object that it makes": ("value / 1.0", "value / 2.0", "the code of Made.scaled", "making"),
    "how an object that it makes begins": ("self.by = 1.0", "self.by = 2.0", "the code of Made.__init__", "making"),
    "a list that an object holds": ("steps = [1, 2]", "steps = [1, 3]", "asked.steps", "asking"),
    "a number of an object's class": ("factor = 1.0", "factor = 2.0", "Asked.factor of asked", "asking"),
    "a method that a method takes": ("value + 0.0", "value + 1.0", "the code of Owner.scaled of self", "method"),
    "text that a method's owner has": ('"mean"', '"sum"', "self.how", "method"),
    "a dataclass that it has": ("power: float = 1.0", "power: float = 2.0", "Options.power of self.options", "method"),
    "a namespace that it has": ("deep=1.0", "deep=2.0", "self.args.deep", "method"),
    "a function that it has": ("z + 3.0", "z + 4.0", "the code of self.act", "method"),
    "an object in an object that it has": ("shift = 0.0", "shift = 1.0", "Shifting.shift of self.inner", "method"),
    "what is passed on whole": ("wide = 1.0", "wide = 2.0", "Whole.wide of whole", "passing"),
    "which of a module's values": ("DEPTH[0]", "DEPTH[1]", "the code", "configured"),
    "a value of the class above it": ("base = 1.0", "base = 2.0", "Base.base", "derived"),
    "a function that is cached": ("1.0 + 0", "2.0 + 0", "the code of what it wraps of kept of wrapping", "wrapped"),
    "a function in a cache": ("1.0 + 1", "2.0 + 1", "the code of what it wraps of cached of wrapping", "wrapped"),
    "a function under no_grad": ("z + 0.5", "z + 1.5", "the code of without of wrapping", "wrapped"),
    "the forward of a module": ("1.0 * cross", "2.0 * cross", "the code of Loss.forward", "loss"),
}


SETTINGS = """
from types import SimpleNamespace
WEIGHT, DEPTH, DEEP = 1.0, [1.0, 2.0], SimpleNamespace(a=SimpleNamespace(b=1.0, c=1.0))
def doubled(x):
    return 2 * x
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A module that an objective reads."""
    (tmp_path / "settings.py").write_text(SETTINGS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import settings

    yield settings
    del sys.modules["settings"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_function_is_refused_and_the_message_says_what_was_edited(edit, tmp_path, settings):
    old, new, what, *name = EDITS[edit]
    name = name[0] if name else "objective"
    field = "loss" if name == "loss" else "objective"
    assert OBJECTIVE.count(old) == 1 or not old

    def go_on(source):
        begun(tmp_path / "run", network("full"), **{field: module(tmp_path, source, name)})

    go_on(OBJECTIVE)
    tree = ast.parse(OBJECTIVE)
    for node in ast.walk(tree):  # other docstrings are the same code
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = "Other words."
    go_on(ast.unparse(tree).replace("STOP = 1.0", "STOP = 2.0"))  # and nobody reads that one
    if not old:
        (tmp_path / "settings.py").write_text(SETTINGS.replace("2 * x", "30 * x"), encoding="utf-8")
        importlib.reload(settings)
    with pytest.raises(WdatError, match=f"belongs to another run, it differs in {re.escape(what)} of {field}:"):
        go_on(OBJECTIVE.replace(old, new) if old else OBJECTIVE)


def test_what_an_objective_reads_from_a_module_belongs_to_the_run_and_nothing_else_there(tmp_path, settings):
    for name, value in (("objective", "WEIGHT"), ("configured", "DEPTH[1]"), ("configured", "DEEP.a.b")):
        objective, path = module(tmp_path, OBJECTIVE, name), tmp_path / value
        begun(path, network("full"), objective=objective)
        settings.DEEP.a.c += 1  # which nobody reads
        begun(path, network("full"), objective=objective)
        if value == "WEIGHT":
            settings.WEIGHT = 2.0
        elif value == "DEPTH[1]":
            settings.DEPTH[1] = 3.0
        else:
            settings.DEEP.a.b = 2.0
        shown = value.removesuffix("[1]")
        with pytest.raises(WdatError, match=f"differs in settings.{shown} of objective: there it was .*, here it is "):
            begun(path, network("full"), objective=objective)


def test_a_finished_run_whose_objective_asks_the_model_itself_gives_its_end_again(tmp_path):
    """Also where the best epoch is not the last, and in another process, where that model is another object."""

    def call(model):
        def objective(batch):
            return cross_entropy(model(batch.x), batch.y) + 0 * model[1].weight.sum()

        data, val = images(14, network("full")), images(9, network("full"), seed=1)
        config = small(objective=objective, tau=3.0, epochs=4)
        return finetune(model, data, val, config, resume=tmp_path / "run")

    model = network("full")
    history = call(model)
    assert history.best < 4
    expected = parameters(model)
    for again in (model, network("full")):
        assert call(again).best == history.best
        assert all(torch.equal(a, b) for a, b in zip(parameters(again), expected, strict=True))


class Angry:
    """Whoever looks into it by its own ways runs into an error."""

    def __getattr__(self, name):
        raise RuntimeError("asked")

    @property
    def weight(self):
        raise RuntimeError("run")

    def __iter__(self):
        raise RuntimeError("gone through")

    __eq__ = __bool__ = __len__ = __repr__ = __iter__
    __hash__ = None


class Mute(str):
    def __repr__(self):
        raise RuntimeError("asked")


def itself():
    held = []
    held.append(held)
    return held


STRANGE = {
    "an angry object": Angry(),
    "text without words": [Mute("a"), 1],
    "a list that is in itself": itself(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "a tensor without values": torch.empty(2, device="meta"),
    "a layer without a size": nn.LazyLinear(2),
    "a quantised tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    "a compiled function": torch.compile(lambda x: x, backend="eager"),
    "a scripted function": torch.jit.script(nn.Linear(1, 1)),
    "a generic type": dict[str, int],
    "a method of a class": FinetuneConfig.__post_init__,
    "arrays": [np.zeros(2, dtype=[("a", "f4")]), np.array([{1: 2}, None], dtype=object)],
}


@pytest.mark.parametrize("strange", STRANGE)
def test_whatever_an_objective_reads_has_a_name_and_is_not_asked_for_it(strange):
    value = STRANGE[strange]

    def whole(batch):
        return value

    def deep(batch):
        return value.weight.a.b, value.c

    for objective in (value, whole, deep, partial(whole, value)):
        assert named(objective) == named(objective)


def test_a_name_that_has_no_value_yet_stops_nothing(tmp_path):
    def objective(batch):
        if batch.config.seed:
            return later(batch)
        return cross_entropy(batch.net(batch.x), batch.y)

    begun(tmp_path / "run", network("full"), objective=objective)

    def later(batch):
        return objective(batch)

    assert named(objective)


# -------------------------------------------------------------------------------------------------------------- files


def test_forty_thousand_sensitivities_are_saved_in_a_moment_and_come_back_alike(tmp_path):
    values = [torch.tensor(k / 7) for k in range(40_000)]
    checkpoint = wdat_core._Checkpoint(tmp_path / "run", {wdat_core.NETWORK: ""}, 60, 0)
    begin = time.perf_counter()
    checkpoint.save({"memory": wdat_core._packed(values), "identity": {}})
    saved = checkpoint.read()["memory"]
    assert time.perf_counter() - begin < 5
    assert all(torch.equal(a, b) for a, b in zip(saved, values, strict=True))


def test_what_an_objective_keeps_comes_back_as_lists(tmp_path):
    kept = {"numbers": [1, 2.5], "alike": [torch.ones(2), torch.zeros(2)], "unlike": [torch.ones(2), torch.ones(3)]}
    kept |= {"none": [], "mixed": [torch.ones(()), 1.0]}
    seen = []

    def objective(batch):
        seen.append({name: list(values) for name, values in batch.memory.items()})
        batch.memory.update(kept)
        return cross_entropy(batch.net(batch.x), batch.y)

    for _ in range(2):
        begun(tmp_path / "run", network("full"), objective=objective)
    first, second = seen
    assert not first and second.keys() == kept.keys()
    for name, values in kept.items():
        assert isinstance(second[name], list) and len(second[name]) == len(values)
        assert all(torch.as_tensor(a).equal(torch.as_tensor(b)) for a, b in zip(second[name], values, strict=True))


@pytest.mark.parametrize("learned", [False, True])
def test_what_an_objective_keeps_is_changed_in_place_alike_after_a_stop(learned, tmp_path):
    """Each tensor has memory of its own, as it had, and one that learns goes on learning."""

    def objective(batch):
        mean, spread = batch.memory.setdefault("both", [torch.zeros(()), torch.ones((), requires_grad=learned)])
        z = batch.net(batch.x)
        if not learned:
            spread.mul_(0.9).add_(0.1 * z.detach().var())
        scale = mean.clone() * spread
        mean.add_(0.1)
        return cross_entropy(z, batch.y) + 0.1 * (z * scale).mean()

    data, losses = images(20, network("full")), []
    for stops in (0, 3):
        for _ in range(stops):
            finetune(network("full"), data, None, small(objective=objective), resume=tmp_path / "run", stop_after=0)
        where = tmp_path / "run" if stops else None
        history = finetune(network("full"), data, None, small(objective=objective), resume=where)
        losses.append([row["loss"] for row in history.epochs])
    assert losses[0] == losses[1]


def test_a_compiled_teacher_has_one_name(tmp_path):
    def make():
        teacher = torch.compile(network("mlp"), backend="eager")
        teacher(torch.zeros(1, 2, 3, 3, dtype=torch.float64))
        return lambda batch: (batch.net(batch.x) - teacher(batch.x).detach()).square().mean()

    assert named(make()) == named(make())


def test_a_checkpoint_in_the_home_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    begun("~/runs/a", network("full"))
    assert (tmp_path / "home" / "runs" / "a").is_file() and not (tmp_path / "~").exists()


def test_a_checkpoint_stays_where_it_was_when_the_working_folder_changes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def leave(epoch, model):
        os.chdir(tmp_path / "elsewhere")

    data = images(10, network("full"))
    finetune(network("full"), data, None, small(), resume=Path("run"), on_epoch=leave)
    assert (tmp_path / "run").is_file() and not [*(tmp_path / "elsewhere").iterdir()]
    assert len(wdat_core._Checkpoint(tmp_path / "run", {}, 60, 0).read()["rows"]) == 2


def test_files_of_others_beside_a_checkpoint_stay(tmp_path):
    theirs = [tmp_path / name for name in ("run.notes.tmp", "run.2023.tmp", "run.2.tmp.tmp")]
    for file in theirs:
        file.write_text("mine")
        os.utime(file, (time.time() - 7200,) * 2)
    begun(tmp_path / "run", network("full"))
    assert all(file.exists() for file in theirs)


def test_an_objective_that_makes_its_teacher_at_first_use_goes_on(tmp_path):
    class Distilled:
        teacher = None

        def __call__(self, batch):
            if self.teacher is None:
                self.teacher = network("mlp")
            return (batch.net(batch.x) - self.teacher(batch.x).detach()).square().mean()

    objective = Distilled()
    begun(tmp_path / "run", network("full"), objective=objective)
    assert objective.teacher is not None
    begun(tmp_path / "run", network("full"), objective=objective)
    begun(tmp_path / "run", network("full"), objective=Distilled())


class Counting:
    """Counts in each way that a function can, and closes over the model by way of torch.compile."""

    count = 0

    def __init__(self, model):
        self.calls, self.model = 0, torch.compile(model, backend="eager")

    def __call__(self, batch):
        global CALLED
        CALLED += 1
        self.calls += 1
        Counting.count += 1
        return cross_entropy(self.model(batch.x), batch.y)


CALLED = 0


def test_an_objective_that_counts_goes_on_after_ctrl_c_in_the_same_process(tmp_path):
    def stopping(things):
        yield from (thing for k, thing in enumerate(things) if k < 1)
        raise KeyboardInterrupt

    model, data = network("mlp"), images(20, network("mlp"))
    objective = Counting(model)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, None, small(objective=objective), resume=tmp_path / "run", progress=stopping)
    assert objective.calls == Counting.count == CALLED == 1
    assert finetune(model, data, None, small(objective=objective), resume=tmp_path / "run").finished


def test_a_list_of_a_million_numbers_is_named_in_a_moment_and_a_tensor_once(monkeypatch):
    table, tensor, digested = [k / 7 for k in range(1_000_000)], torch.ones(3), []
    functions = [lambda batch, k=k: (k, table, tensor) for k in range(8)]

    def objective(batch):
        return [function(batch) for function in functions]

    monkeypatch.setattr(wdat_core, "_digest", lambda *tensors: digested.append(tensors) or "digest")
    begin = time.perf_counter()
    names = named(objective)
    assert time.perf_counter() - begin < 10
    assert len(names) > 8 and len(digested) == 1
    table[500_000] = 0.0
    assert named(objective) != names


READ = {
    "in a chain of comparisons": lambda: lambda x: 0 < EPS < x,
    "beside another": lambda: lambda x: EPS * (FACTOR or 1),
    "as an index": lambda: lambda x: x[int(EPS)],
    "in what is changed": lambda: lambda x: x.append(EPS),
    "by name and by attribute": lambda: lambda x: EPS.real + x,
    "in a comprehension": lambda: lambda x: [EPS * part for part in x],
    "in a class inside": lambda: lambda x: type("Inner", (), {"eps": EPS}),
    "after a lambda": lambda: lambda x: (lambda z: lambda: z * EPS)(x),
    "as a default": lambda: lambda x, eps=EPS: x * eps,
}
EPS = FACTOR = 1.0


@pytest.mark.parametrize("read", READ)
def test_a_number_is_read_wherever_it_stands(read, monkeypatch):
    before = named(READ[read]())
    assert named(READ[read]()) == before
    monkeypatch.setitem(globals(), "EPS", 2.0)
    assert named(READ[read]()) != before


class Hidden(Enum):
    ONE, TWO = 1.0, 2.0


class Modest:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


def with_attribute(by):
    def objective(x):
        return objective.by * x

    objective.by = by
    return objective


def under_a_property(by):
    class Owner:
        @property
        def by(self):
            return by

        def __call__(self, x):
            return self.by * x

    return Owner()


def under_super(by):
    class Above:
        def __call__(self, x):
            return by * x

    class Below(Above):
        def __call__(self, x):
            return super().__call__(x)

    return Below()


def decorated(by):
    @functools.wraps(abs)
    def objective(x):
        return by * abs(x)

    return objective


class Weighty(Enum):
    ONE = 1

    def weight(self):
        return EPS


class Tabled(dict):
    scale = 1.0


def tabled(by):
    table = Tabled()
    table.scale = by
    return lambda x: table.scale * x


def set_by_a_property(by):
    class Owner:
        def __init__(self):
            self.by = 1.0

        @property
        def by(self):
            return self.held

        @by.setter
        def by(self, value):
            self.held = value * by

        def __call__(self, x):
            self.by = 2.0
            return self.by * x

    return Owner()


def as_its_parent_is_called(by):
    class Objective:
        def weight(self):
            return 1.0

        def __call__(self, x):
            return self.weight() * x

    above = Objective

    class Objective(above):
        def weight(self):
            return by

    Objective.__qualname__ = above.__qualname__
    return Objective()


PLACES = {
    "in a function's attribute": with_attribute,
    "in slots": Modest,
    "under a property": under_a_property,
    "in the class above": under_super,
    "in a decorator": decorated,
    "in an enumeration": lambda by: (lambda how: lambda x: how.value * x)(Hidden(by)),
    "in a deque": lambda by: (lambda held: lambda x: held[0] * x)(deque([by])),
    "in an object in a list": lambda by: (lambda held: lambda x: sum(one.by for one in held) * x)([Modest(by)]),
    "by a name as text": lambda by: (lambda held: lambda x: getattr(held, "by") * x)(SimpleNamespace(by=by)),  # noqa: B009
    "in a function under its name": lambda by: (lambda held: lambda x: held["ce"](x))({"ce": lambda x: by * x}),
    "in a generator": lambda by: (lambda many: lambda x: next(many()) * x)(lambda: (yield by)),
    "in a loss of torch": lambda by: (lambda loss: lambda x: loss(x, x))(nn.CrossEntropyLoss(label_smoothing=by - 1)),
    "in the default of a dict": lambda by: (lambda held: lambda x: held[x])(defaultdict(lambda: by)),
    "in an attribute of a dict": tabled,
    "in a setter": set_by_a_property,
    "in a class that is called as the one above": as_its_parent_is_called,
    "in a method of a partial": lambda by: partialmethod(max, by),
    "in a slice": lambda by: (lambda held: lambda x: x[held])(slice(0, int(by))),
    "by vars": lambda by: (lambda held: lambda x: dict(**vars(held)))(SimpleNamespace(by=by)),
    "by a name in tuples": lambda by: (
        lambda held: lambda x: [getattr(held, name) for name, _ in (("by", 1), ("by", 2))]
    )(SimpleNamespace(by=by)),
    "by a name in a set": lambda by: (lambda held: lambda x: [getattr(held, name) for name in {"by", "by"}])(  # noqa: B033
        SimpleNamespace(by=by)
    ),
    "in a tensor of a loss": lambda by: (lambda loss: lambda x: loss(x, x))(nn.CrossEntropyLoss(torch.tensor([by]))),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_number_is_found_wherever_it_is_kept(place):
    one, again, other = (named(PLACES[place](by)) for by in (1.0, 1.0, 2.0))
    assert one == again != other


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -EPS * gradient


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, EPS * weight, bias)


class Frozen(nn.Conv2d):
    def train(self, mode=True):
        return super().train(mode and EPS > 0)


@torch.jit.script
def scripted(x):
    return 2 * x


CALLED_BY_OTHERS = {
    "a gradient of one's own": lambda: lambda x: Reversed.apply(x),
    "what a layer calls": lambda: Standardised(1, 1, 1),
    "what a mode calls": lambda: Frozen(1, 1, 1),
    "a method of an enumeration": lambda: lambda x, how=Weighty.ONE: how.weight() * x,
}


@pytest.mark.parametrize("what", CALLED_BY_OTHERS)
def test_what_torch_or_python_calls_is_read(what, monkeypatch):
    with seeded(0):
        before = named(CALLED_BY_OTHERS[what]())
    with seeded(0):
        assert named(CALLED_BY_OTHERS[what]()) == before
    monkeypatch.setitem(globals(), "EPS", 2.0)
    with seeded(0):
        assert named(CALLED_BY_OTHERS[what]()) != before


def test_the_code_of_a_scripted_function_is_read():
    assert "the code of scripted of objective" in named(lambda x: scripted(x))


def test_hooks_of_parameters_belong_to_the_network(tmp_path):
    def hooked(by):
        model = network("full")
        model[1].weight.register_hook(lambda gradient: by * gradient)
        return model

    begun(tmp_path / "run", hooked(1.0))
    begun(tmp_path / "run", hooked(1.0))
    with pytest.raises(
        WdatError, match=r"differs in by of hook 1 of 1 of the network: there it was 1\.0, here it is 0\.0:"
    ):
        begun(tmp_path / "run", hooked(0.0))


class Shy(nn.Module):
    """Its attributes are those of what it holds, and there are none of that name."""

    def __init__(self):
        super().__init__()
        self.inner = network("full")

    def __getattr__(self, name):
        return self.__dict__["_modules"]["inner"] if name == "inner" else self.__dict__["_parameters"][name]

    def forward(self, x):
        return self.inner(x)


def test_what_lets_nobody_look_into_it_stops_no_run(tmp_path):
    class Gone:
        pass

    gone = weakref.proxy(Gone())
    begun(tmp_path / "shy", Shy())
    begun(tmp_path / "shy", Shy())
    for _ in range(2):
        begun(
            tmp_path / "run",
            network("full"),
            objective=lambda batch: cross_entropy(batch.net(batch.x), batch.y) + 0 * len([gone]),
        )


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    "line", ["from settings import WEIGHT", "from .settings import WEIGHT", "from . import settings"]
)
def test_what_is_imported_inside_a_function_is_read(line, loaded, tmp_path, monkeypatch):
    """Whether or not somebody has imported it before."""
    (tmp_path / "pack").mkdir()
    weight = "settings.WEIGHT" if line.endswith("settings") else "WEIGHT"
    (tmp_path / "pack" / "own.py").write_text(f"def objective(x):\n    {line}\n    return {weight} * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "pack"))

    def found(weight, other):
        (tmp_path / "pack" / "settings.py").write_text(f"WEIGHT, DEPTH = {weight}, {other}  # {'.' * len(names)}")
        importlib.invalidate_caches()
        for name in ("settings", "pack", "pack.own", "pack.settings"):
            sys.modules.pop(name, None)
        objective = importlib.import_module("pack.own").objective
        if loaded:
            objective(1)
        return named(objective)

    names = []
    for weight_and_other in ((1.0, 1.0), (1.0, 2.0), (3.0, 1.0)):
        names.append(found(*weight_and_other))
    assert names[0] == names[1] != names[2]


def test_settings_that_a_method_makes_and_hooks_of_the_gradient_belong_to_the_network(tmp_path):
    class Set(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.inner = network("full")
            self.set(by)

        def set(self, by):
            self.by = by

        def forward(self, x):
            return self.by * self.inner(x)

    def hooked(by):
        model = network("full")
        model[1].register_full_backward_hook(lambda _, into, out: (by * into[0],) if into[0] is not None else None)
        return model

    for make, what in ((Set, "the network.by"), (hooked, "by of hook 1 of 1 of the network")):
        path = tmp_path / make.__name__
        begun(path, make(1.0))
        begun(path, make(1.0))
        with pytest.raises(WdatError, match=rf"differs in {what}: there it was 1\.0, here it is 2\.0:"):
            begun(path, make(2.0))


def test_the_last_of_many_names_is_read_too():
    many = "\n    ".join(f"name{k}.part" for k in range(700))
    source = compile(f"def objective(x):\n    {many}\n    return CFG.weight", "own.py", "exec")
    place = {"CFG": SimpleNamespace(weight=1.0, other=1.0)}
    types.FunctionType(source, place)()
    names = named(place["objective"])
    assert names["CFG.weight of objective"] == "1.0" and "CFG.other of objective" not in names


CHANGED = {
    "a global": "global EPS; EPS = EPS + 1",
    "an attribute": "HELD.value = HELD.value + 1",
    "an attribute by its name": "setattr(HELD, 'value', HELD.value + 1)",
    "a list": "HELD.parts.append(1)",
    "a list that is made anew": "HELD.parts = HELD.parts + [1]",
    "an index": "HELD.parts[0] += 1",
    "a dict": "HELD.table.update({len(HELD.table): 1})",
    "a dict by its method": "HELD.table.__setitem__(len(HELD.table), TENSOR)",
    "a tensor": "HELD.tensor.add_(1)",
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_while_a_run_goes_on_is_its_own_work(what, tmp_path):
    """The rest, which is read too, belongs to the run."""
    held = SimpleNamespace(value=0, parts=[0], table={}, tensor=torch.zeros(1), weight=1.0)
    place = {"HELD": held, "EPS": 0, "TENSOR": torch.zeros(1), "cross_entropy": cross_entropy, "__name__": "own"}
    reads = "HELD.value, HELD.parts, HELD.table, HELD.tensor, EPS"
    loss = f"HELD.weight * cross_entropy(batch.net(batch.x), batch.y) + 0 * len(({reads}))"
    source = f"def objective(batch):\n    {CHANGED[what]}\n    return {loss}"
    types.FunctionType(compile(source, "own.py", "exec"), place)()
    objective = place["objective"]

    def call():  # as in a notebook, after a stop in the middle
        with pytest.raises(KeyboardInterrupt):
            finetune(network("full"), images(20, network("full")), None, small(objective=objective), **options)

    def stopping(things):
        yield from list(things)[:2]
        raise KeyboardInterrupt

    options = {"resume": tmp_path / "run", "progress": stopping, "save_every": 1000}
    for _ in range(2):
        call()
    held.weight = 2.0
    with pytest.raises(WdatError, match=r"differs in HELD\.weight of objective: there it was 1\.0, here it is 2\.0:"):
        call()


def weigh(held, batch):
    return held.lam * cross_entropy(batch.net(batch.x), batch.y)


class Passed:
    """Gives itself to a function, or takes itself in another way."""

    def __init__(self, lam, way):
        self.lam, self.way = lam, way

    def __call__(self, batch):
        me = self
        if self.way == "under another name":
            return me.lam * cross_entropy(batch.net(batch.x), batch.y)
        return weigh(self, batch)


class Starred:
    def __init__(self, lam, way):
        self.lam = lam

    def __call__(*given):
        return given[0].lam * cross_entropy(given[1].net(given[1].x), given[1].y)


@pytest.mark.parametrize("kind, way", [(Passed, "whole"), (Passed, "under another name"), (Starred, "in a tuple")])
def test_an_object_that_is_passed_on_counts_with_what_it_holds(kind, way, tmp_path):
    begun(tmp_path / "run", network("full"), objective=kind(1.0, way))
    begun(tmp_path / "run", network("full"), objective=kind(1.0, way))
    with pytest.raises(WdatError, match=r"differs in objective.lam: there it was 1\.0, here it is 2\.0"):
        begun(tmp_path / "run", network("full"), objective=kind(2.0, way))


steps = 0


def counting_steps(batch):
    global steps
    steps += 1
    return cross_entropy(batch.net(batch.x), batch.y)


def test_a_counter_that_is_called_like_a_field_hides_no_field(tmp_path):
    begun(tmp_path / "run", network("full"), objective=counting_steps)
    begun(tmp_path / "run", network("full"), objective=counting_steps)
    with pytest.raises(WdatError, match="differs in steps: there it was 1, here it is 3"):
        begun(tmp_path / "run", network("full"), objective=counting_steps, steps=3)


class Meter:
    def __init__(self):
        self.lam = 0.0

    def note(self, value):
        self.lam = value


class OwnLayer(nn.Linear):
    def reset_parameters(self):
        self.weight = nn.Parameter(torch.full_like(self.weight, 0.5))
        self.bias = nn.Parameter(torch.zeros_like(self.bias))


def test_what_one_object_changes_is_not_changed_in_its_namesakes(tmp_path):
    meter, settings, teacher = Meter(), SimpleNamespace(lam=1.0), nn.Sequential(OwnLayer(2, 2)).double()

    def objective(batch):
        meter.note(settings.lam)
        return meter.lam * cross_entropy(batch.net(batch.x), batch.y) + 0 * teacher(batch.x.new_ones(1, 2)).sum()

    for _ in range(2):
        begun(tmp_path / "run", network("full"), objective=objective)
    settings.lam = 2.0
    with pytest.raises(WdatError, match=r"differs in settings\.lam of objective: there it was 1\.0, here it is 2\.0:"):
        begun(tmp_path / "run", network("full"), objective=objective)
    settings.lam = 1.0
    with torch.no_grad():
        teacher[0].weight.fill_(2.0)
    with pytest.raises(WdatError, match=r"differs in tensor 0\.weight of teacher of objective: put"):
        begun(tmp_path / "run", network("full"), objective=objective)


class Cached:
    def __init__(self):
        self.by = 2.0

    @functools.cached_property
    def lam(self):
        return self.by + 1

    def __call__(self, batch):
        return self.lam * cross_entropy(batch.net(batch.x), batch.y)


def test_what_is_computed_once_is_no_other_value():
    objective = Cached()
    before, whole = named(objective), named([objective, Meter()])
    assert objective.lam == 3.0
    assert named(objective) == before and named([objective, Meter()]) == whole
    objective.by = 5.0
    assert named(objective) != before


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_what_a_hook_computes_is_no_setting_of_the_network(change, tmp_path):
    model, data = normed(change), images(20, network("full"))
    begun(tmp_path / "run", model)
    model(data[0])
    begun(tmp_path / "run", model)


class Table(dict):
    by = 1.0

    def __missing__(self, key):
        return self.by


OTHERS_INSIDE = {
    "a set of tuples": (lambda by: {(1, by)}),
    "a set in a dict": (lambda by: {"a": {1, by}}),
    "a frozen set as a key": (lambda by: {frozenset({"a", "b", by}): 1}),
    "a dict of tuples": (lambda by: {k: (k, by) for k in range(200_000)}),
    "a tuple in tuples": (lambda by: ((((((by,),),),),),)),
    "a dict of one's own": (lambda by: Table({"a": by})),
}


@pytest.mark.parametrize("inside", OTHERS_INSIDE)
def test_containers_are_named_by_what_is_in_them_and_at_once(inside):
    begin = time.perf_counter()
    names = [named(OTHERS_INSIDE[inside](by)) for by in (1.0, 1.0, 2.0)]
    assert time.perf_counter() - begin < 20
    assert names[0] == names[1] != names[2]


def test_the_class_of_an_own_dict_counts(monkeypatch):
    before = named(Table())
    monkeypatch.setattr(Table, "by", 2.0)
    assert named(Table()) != before


def test_a_frozen_set_as_a_key_has_one_name_in_every_process():
    code = "import sys; sys.path[:0] = sys.argv[1:]; from tiny import named; "
    code += "print(named({frozenset('abcdef'): [{'x', 'y'}]}))"
    here = Path(__file__).parent
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(here), str(here.parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_buffer_that_is_registered_during_the_training_is_named_in_the_first_minibatch(average):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network("full")

        def forward(self, x):
            if self.training and not hasattr(self, "seen"):
                self.register_buffer("seen", torch.zeros(1))
            return self.inner(x)

    model, data = Late(), images(10, network("full"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WdatError, match="the model registered seen while it was trained: register it in its __init__"):
        finetune(model, data, None, small(average=average))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_which_part_of_the_network_an_objective_reads_belongs_to_the_run(tmp_path):
    def make(index):
        model = network("full")
        parts = [model[index].weight]
        return model, lambda batch: cross_entropy(batch.net(batch.x), batch.y) + sum(p.square().sum() for p in parts)

    for index in (1, 1):
        model, objective = make(index)
        begun(tmp_path / "run", model, objective=objective)
    model, objective = make(2)
    with pytest.raises(
        WdatError, match=r"parts\[0\] of objective: there it was its 1\.weight, here it is its 2\.weight"
    ):
        begun(tmp_path / "run", model, objective=objective)


def test_classes_of_one_name_are_both_compared(tmp_path):
    """As two files have them, or a function that makes them."""
    source = "from torch import nn\nclass Block(nn.Module):\n    def forward(self, x):\n        return x * {}"

    def model(*factors):
        blocks = [module(tmp_path, source.format(factor), "Block")() for factor in factors]
        return nn.Sequential(*blocks, network("full"))

    begun(tmp_path / "run", model(1.0, 2.0))
    begun(tmp_path / "run", model(1.0, 2.0))
    for factors, which in (((3.0, 2.0), "Block.forward"), ((1.0, 3.0), "Block.forward (1)")):
        with pytest.raises(WdatError, match=re.escape(f"differs in the code of {which} of the network:")):
            begun(tmp_path / "run", model(*factors))
