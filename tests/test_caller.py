"""What belongs to the caller comes back as it was: model, images, labels, random numbers, autograd."""

import copy
import random

import pytest
import torch
from tiny import configuration, images, network, predict, seeded
from torch import nn

from wdat_core import (
    FinetuneConfig,
    Threat,
    ce,
    evaluate,
    finetune,
    perturb_,
    project,
    sensitivity,
    wpgd,
    wpgd_budget,
)

THREAT = Threat(delta=0.05)

# Every function that leaves the model alone, on a model, images and labels.
USES = {
    "wpgd": lambda model, x, y: wpgd(model, x, y, THREAT, steps=3, batch_size=4).x_adv,
    "wpgd from a random start": lambda model, x, y: wpgd(model, x, y, THREAT, steps=3, random_start=0.5).x_adv,
    "wpgd along a rule": lambda model, x, y: wpgd(model, x, y, THREAT, steps=3, rule=torch.add).x_adv,
    "wpgd_budget": lambda model, x, y: wpgd_budget(model, x, y, THREAT, upsilon=1.0, steps=3, batch_size=4).x_adv,
    "sensitivity": lambda model, x, y: sensitivity(model, x, y, THREAT, batch_size=4),
    "evaluate": lambda model, x, y: evaluate(model, x, y, delta=0.05, steps=3, batch_size=4).correct["w_2"],
}


@pytest.fixture(params=USES)
def use(request):
    return USES[request.param]


def mixed_model():
    """A network in mixed modes, with a frozen parameter, and gradients from some earlier backward pass."""
    model = network("full").train()
    model[2].eval()
    model[1].requires_grad_(False)
    with seeded(1):
        model[6].weight.grad = torch.randn_like(model[6].weight)
    return model


def snapshot(model):
    """Everything a caller could find changed; gradients by identity and by value."""
    parameters = dict(model.named_parameters())
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "identities": {name: (id(parameter), id(parameter.grad)) for name, parameter in parameters.items()},
        "grads": {n: p.grad if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "state": copy.deepcopy(model.state_dict()),
    }


def assert_same(before, after, keys=("modes", "flags", "identities")):
    for key in keys:
        assert before[key] == after[key], key
    for key in ("grads", *(["state"] if "state" in before else [])):
        assert before[key].keys() == after[key].keys()
        for name, value in before[key].items():
            assert value is after[key][name] or torch.equal(value, after[key][name]), name


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Boom(Exception):
    pass


class Fuse(nn.Module):
    """Passes its input on a number of times, then blows."""

    def __init__(self, times):
        super().__init__()
        self.left = times

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise Boom
        return x


def test_model_comes_back_as_it_was(use):
    model = mixed_model()
    x, y = images(10, network("full"))
    before = snapshot(model)
    use(model, x, y)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("times", [0, 1, 2])
def test_model_comes_back_as_it_was_after_an_exception_in_it(use, times):
    model = mixed_model()
    model.append(Fuse(times))
    x, y = images(10, network("full"))
    before = snapshot(model)
    with pytest.raises(Boom):
        use(model, x, y)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("times", [0, 1, 4])
@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "sensitivity"])
def test_model_comes_back_as_it_was_after_an_exception_in_the_loss(name, times):
    fuse = Fuse(times if name != "sensitivity" else min(times, 2))

    def loss(logits, y):
        return ce(fuse(logits), y)

    calls = {
        "wpgd": lambda: wpgd(model, x, y, THREAT, loss=loss, batch_size=4),
        "wpgd_budget": lambda: wpgd_budget(model, x, y, THREAT, upsilon=1.0, loss=loss, batch_size=4),
        "sensitivity": lambda: sensitivity(model, x, y, THREAT, loss=loss, batch_size=4),
    }
    model = mixed_model()
    x, y = images(10, network("full"))
    before = snapshot(model)
    with pytest.raises(Boom):
        calls[name]()
    assert_same(before, snapshot(model))


def test_images_and_labels_are_not_changed(use):
    model = network("conv")
    x, y = images(10, model)
    x_before, y_before = x.clone(), y.clone()
    use(model, x, y)
    assert torch.equal(x, x_before) and torch.equal(y, y_before)


def test_result_is_no_view_of_the_images():
    """Also where nothing moves: writing into the result must not write into the images."""
    model = network("conv")
    x, _ = images(10, model)
    wrong = (predict(model, x) + 1) % 4
    for attack in (wpgd(model, x, wrong, THREAT), wpgd_budget(model, x, wrong, THREAT, upsilon=1.0)):
        assert torch.equal(attack.x_adv, x)
        assert attack.x_adv.data_ptr() != x.data_ptr()


def test_images_that_require_a_gradient_stay_out_of_the_graph(use):
    model = network("conv")
    x, y = images(10, model)
    expected = use(model, x, y)
    x.requires_grad_()
    got = use(model, x, y)
    assert equal(expected, got)
    assert x.requires_grad and x.grad is None
    assert not getattr(got, "requires_grad", False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_the_caller_has_gradients_off(use, mode):
    model = network("conv")
    x, y = images(10, model)
    expected = use(model, x, y)
    with mode():
        got = use(model, x, y)
    assert equal(expected, got)


def test_works_on_images_made_in_inference_mode(use):
    model = network("conv")
    x, y = images(10, model)
    with torch.inference_mode():
        inference = x.clone(), y.clone()
    assert equal(use(model, x, y), use(model, *inference))
    with torch.inference_mode():
        assert equal(use(model, x, y), use(model, *inference))


def test_gradients_are_on_again_only_inside(use):
    model = network("conv")
    x, y = images(10, model)
    with torch.no_grad():
        use(model, x, y)
        assert not torch.is_grad_enabled()
    use(model, x, y)
    assert torch.is_grad_enabled()


class Witness(nn.Module):
    """A linear layer that notes, at every forward pass, its mode and whether its weights want a gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, set()

    def forward(self, x):
        self.seen.add((self.training, any(p.requires_grad for p in self.inner.parameters())))
        return self.inner(x)


def test_parameters_get_no_gradient(use):
    model = Witness(network("conv")).train()
    x, y = images(10, model)
    model.seen.clear()
    use(model, x, y)
    assert model.seen == {(False, False)}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_runs_in_eval_mode(use):
    """BatchNorm and Dropout in train mode: attacked with their running statistics and without dropping."""
    model = network("full")
    x, y = images(10, model)
    expected = use(model, x, y)
    assert equal(use(model.train(), x, y), expected)
    assert equal(use(mixed_model(), x, y), expected)


def training(objective, **fields):
    config = configuration(objective, epochs=1, batch_size=5, steps=2, **fields)
    return lambda model, x, y: finetune(model, (x, y), (x, y), config)


# Every function that draws random numbers.
RANDOM = {
    "finetune": training("wdat", attack_mode="train", random_start=0.5),
    "trades": training("trades"),
    "pgd": training("pgd"),
    "perturb_ whole": lambda model, x, y: perturb_(model, "whole"),
    "perturb_ last_layer": lambda model, x, y: perturb_(model, "last_layer", x=x),
}


@pytest.mark.parametrize("name", [*USES, *RANDOM])
def test_global_random_numbers_are_left_alone(name):
    model = network("full").train()
    x, y = images(10, network("full"))
    with seeded(5):
        torch_before, python_before = torch.get_rng_state(), random.getstate()
        (USES | RANDOM)[name](model, x, y)
        assert torch.equal(torch.get_rng_state(), torch_before)
        assert random.getstate() == python_before


@pytest.mark.parametrize("name", RANDOM)
def test_gpus_that_the_model_is_not_on_are_not_seeded(name, monkeypatch):
    """torch.manual_seed would seed every one of them."""
    model, seeded_gpus = network("full"), []
    x, y = images(10, model)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    RANDOM[name](model, x, y)
    assert not seeded_gpus


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_global_random_numbers_of_the_gpu_are_left_alone(device):
    x, y = (tensor.to(device) for tensor in images(10, network("full")))
    for name, use in (USES | RANDOM).items():
        before = torch.cuda.get_rng_state()
        use(network("full").train().to(device), x, y)
        assert torch.equal(torch.cuda.get_rng_state(), before), name


@pytest.mark.parametrize("name", [*USES, *RANDOM])
def test_global_random_numbers_change_nothing(name):
    model = network("full").train()
    x, y = images(10, network("full"))
    results, states = [], []
    for seed in (1, 2):
        one = copy.deepcopy(model)
        with seeded(seed):
            results.append((USES | RANDOM)[name](one, x, y))
        states.append(one.state_dict())
    if name in USES:
        assert equal(*results)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_project_changes_neither_argument():
    x = torch.full((3, 2, 2, 2), 0.5)
    x_adv = x + torch.linspace(0, 1, 8).view(1, 2, 2, 2)
    before = x.clone(), x_adv.clone()
    assert not torch.equal(project(x_adv, x, THREAT), x_adv)
    assert torch.equal(x, before[0]) and torch.equal(x_adv, before[1])


def test_a_train_that_returns_nothing_is_no_harm():
    class Forgetful(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model = Forgetful(*network("conv"))
    x, y = images(12, model)
    wpgd(model, x, y, Threat(), steps=1)
    finetune(model, (x, y), (x, y), FinetuneConfig(epochs=1, steps=1, augment=False))


@pytest.mark.parametrize("name", [*USES, *RANDOM])
def test_a_default_device_of_the_caller_changes_nothing(name):
    """The device "meta" stands for any other than the CPU, where all images and networks here are."""
    model = network("full").train()
    x, y = images(10, network("full"))
    results, states = [], []
    for device in ("cpu", "meta"):
        one = copy.deepcopy(model)
        with torch.device(device):
            results.append((USES | RANDOM)[name](one, x, y))
        states.append(one.state_dict())
    if name in USES:
        assert equal(*results)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
