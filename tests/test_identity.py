"""Which run a checkpoint belongs to: the network with its layers, and functions with their code and their values."""

import ast
import importlib
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import Centre, images, network, seeded
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

    def __init__(self, scale=1.0, act=torch.relu, passes=0):
        super().__init__()
        self.scale, self.act, self.passes, self.inner = scale, act, passes, network("full")

    def forward(self, x):
        self.passes += 1
        return self.scale * self.act(self.inner(x))


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
    with pytest.raises(WdatError, match="differs in the layers of the network: their kinds, settings or code: give"):
        begun(tmp_path / "run", OTHER_LAYERS[other]())
    begun(tmp_path / "run", network("full"))


@pytest.mark.parametrize("other", [{"scale": 2.0}, {"act": torch.tanh}, {"act": lambda x: x}, {"act": steep(0.5)}])
def test_settings_that_a_network_does_not_print_belong_to_it(other, tmp_path):
    begun(tmp_path / "run", Setting())
    with pytest.raises(WdatError, match="differs in the layers of the network"):
        begun(tmp_path / "run", Setting(**other))


def test_a_network_that_counts_its_passes_goes_on(tmp_path):
    model = Setting()
    begun(tmp_path / "run", model)
    assert model.passes
    begun(tmp_path / "run", model)
    begun(tmp_path / "run", Setting(passes=7))


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
    for old, new in (("torch.relu", "torch.tanh"), ("SHIFT = 1.0", "SHIFT = 2.0"), ("power=1", "power=2")):
        with pytest.raises(WdatError, match="differs in the layers of the network: their kinds, settings or code"):
            begun(tmp_path / "run", module(tmp_path, NET.replace(old, new), "Net")(network("full")))
    with pytest.raises(WdatError, match="differs in the layers of the network"):
        begun(tmp_path / "run", module(tmp_path, NET.replace("scale = 1.0", "scale = 2.0"), "Net")(network("full")))


def test_a_hook_belongs_to_the_network(tmp_path):
    begun(tmp_path / "run", network("full"))
    model = network("full")
    model[1].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with pytest.raises(WdatError, match="differs in the layers of the network"):
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
    with pytest.raises(WdatError, match="differs in the network, which must be as it was"):
        finetune(model, data, None, small(), resume=tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- functions

OBJECTIVE = '''
import settings
import torch
from torch import nn
from torch.nn.functional import cross_entropy

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

class Owner:
    """Has a method that is an objective."""

    def objective(self, batch):
        return 1 * self.scaled(cross_entropy(batch.net(batch.x), batch.y))

    def scaled(self, value):
        return value + 0.0

class Asked:
    """Is asked by an objective."""
    factor = 1.0

    def __init__(self):
        self.steps = [1, 2]

    def shifted(self, value):
        return self.factor * value - 0.0

class Made:
    def scaled(self, value):
        return value / 1.0

def asking(batch):
    return asked.shifted(cross_entropy(batch.net(batch.x), batch.y)) * asked.steps[0]

def making(batch):
    return Made().scaled(cross_entropy(batch.net(batch.x), batch.y))

def elsewhere(batch):
    return settings.doubled(cross_entropy(batch.net(batch.x), batch.y))

held, loss, method, asked = Held(), Loss(), Owner().objective, Asked()
'''
VALUE, CODE = ", in a value that it reads, such as a list that it fills: give", ", in its code: give"
EDITS = {
    "a setting of a class": ("    weight = 1.0\n    scale", "    weight = 2.0\n    scale", "objective", VALUE),
    "a list of a class": ("scale = [1.0]", "scale = [2.0]", "objective", VALUE),
    "a class in a class": ("        weight = 1.0", "        weight = 2.0", "objective", VALUE),
    "its code": ("CFG.weight * Inner", "CFG.weight + Inner", "objective", CODE),
    "the code of a function that it calls": ("z * 1.0", "z + 1.0", "objective", CODE),
    "a call": ("return self.scaled(cross", "return 2 * self.scaled(cross", "held", CODE),
    "a method that the call takes": ("value * 1.0", "value * 2.0", "held", CODE),
    "the code of another file": ("", "", "elsewhere", CODE),
    "a method of an object that it asks": ("value - 0.0", "value - 1.0", "asking", VALUE),
    "a method of an object that it makes": ("value / 1.0", "value / 2.0", "making", CODE),
    "a list that an object holds": ("steps = [1, 2]", "steps = [1, 3]", "asking", VALUE),
    "a number of an object's class": ("factor = 1.0", "factor = 2.0", "asking", VALUE),
    "a method that a method takes": ("value + 0.0", "value + 1.0", "method", CODE),
    "the forward of a module": ("1.0 * cross", "2.0 * cross", "loss", CODE),
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A module that an objective reads."""
    (tmp_path / "settings.py").write_text("WEIGHT = 1.0\ndef doubled(x):\n    return 2 * x\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import settings

    yield settings
    monkeypatch.delitem(sys.modules, "settings")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_function_is_refused_and_the_message_says_what_was_edited(edit, tmp_path, settings):
    old, new, name, words = EDITS[edit]
    assert OBJECTIVE.count(old) == 1 or not old

    def go_on(source):
        field = "loss" if name == "loss" else "objective"
        begun(tmp_path / "run", network("full"), **{field: module(tmp_path, source, name)})

    go_on(OBJECTIVE)
    tree = ast.parse(OBJECTIVE)
    for node in ast.walk(tree):  # other docstrings are the same code
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = "Other words."
    go_on(ast.unparse(tree))
    if not old:
        (tmp_path / "settings.py").write_text("WEIGHT = 1.0\ndef doubled(x):\n    return 30 * x\n", encoding="utf-8")
        importlib.reload(settings)
    with pytest.raises(WdatError, match=f"belongs to another run, it differs in (objective|loss){words}"):
        go_on(OBJECTIVE.replace(old, new) if old else OBJECTIVE)


def test_a_number_that_an_objective_reads_from_a_module_belongs_to_the_run(tmp_path, settings):
    objective = module(tmp_path, OBJECTIVE, "objective")
    begun(tmp_path / "run", network("full"), objective=objective)
    settings.WEIGHT = 2.0
    with pytest.raises(WdatError, match=f"differs in objective{VALUE}"):
        begun(tmp_path / "run", network("full"), objective=objective)


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


def test_a_name_that_has_no_value_yet_stops_nothing(tmp_path):
    def objective(batch):
        if batch.config.seed:
            return later(batch)
        return cross_entropy(batch.net(batch.x), batch.y)

    begun(tmp_path / "run", network("full"), objective=objective)

    def later(batch):
        return objective(batch)

    assert wdat_core._named(objective)


# -------------------------------------------------------------------------------------------------------------- files


def test_forty_thousand_sensitivities_are_saved_in_a_moment_and_come_back_alike(tmp_path):
    values = [torch.tensor(k / 7) for k in range(40_000)]
    checkpoint = wdat_core._Checkpoint(tmp_path / "run", {}, 60, 0)
    begin = time.perf_counter()
    checkpoint.save({"memory": wdat_core._packed(values), "identity": {}})
    saved = checkpoint.load()["memory"]
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

    assert wdat_core._named(make()) == wdat_core._named(make())


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
    assert len(wdat_core._Checkpoint(tmp_path / "run", {}, 60, 0).load()["rows"]) == 2


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
