"""Algorithm 1 and the other objectives, on networks and data that train in a blink."""

import copy
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import INF, PIXELS, SHAPE, configuration, images, network, predict, reference_step, seeded
from torch import nn
from torch.nn.utils import prune

from wdat_core import (
    FinetuneConfig,
    Threat,
    WdatError,
    _consistency,
    _crop_and_flip,
    _moved,
    ce,
    finetune,
    perturb_,
    redlr,
    sensitivity,
    wpgd,
)

THREAT = Threat(delta=0.05)
POINTWISE = Threat(p=INF, delta=0.05)
LAST = {"perturb": "last_layer"}
X = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)  # an image to find the last layer with


def quick(objective="wdat", **fields):
    """Two epochs of three minibatches on 12 images, otherwise as the objective is trained."""
    threat = POINTWISE if objective in ("trades", "pgd") else THREAT
    defaults = {"threat": threat, "steps": 2, "epochs": 2, "batch_size": 5, "sample": 0.3}
    return configuration(objective, **(defaults | fields))


both = pytest.mark.parametrize("objective", ["wdat", "worst_case", "trades"])


def trained(objective="wdat", kind="full", val=False, on_epoch=None, model=None, **fields):
    """A model trained on 12 images, and its history."""
    model = network(kind) if model is None else model
    validation = data(9, kind, seed=1) if val else None
    return model, finetune(model, data(12, kind), validation, quick(objective, **fields), on_epoch=on_epoch)


def data(n, kind="full", seed=0):
    """Images and labels, of which the network of that kind, as yet untrained, gets three in four right."""
    return images(n, network(kind), seed=seed)


def state(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return {name: torch.equal(a[name], b[name]) for name in a}


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, and what changes
# ---------------------------------------------------------------------------------------------------------------------


@both
def test_the_seed_decides_the_weights_bit_for_bit(objective):
    one, two, other = (state(trained(objective, val=True, seed=seed)[0]) for seed in (3, 3, 4))
    assert all(same(one, two).values())
    assert not any(value for name, value in same(one, other).items() if name.endswith("weight"))


@pytest.mark.parametrize("reinit", ["default", "xavier"])
def test_last_layer_changes_the_last_linear_layer_only(reinit):
    """Batch statistics included: they stay even though the network is given, and given back, in train mode."""
    model = network("full").train()
    before = state(model)
    trained(model=model, perturb="last_layer", reinit=reinit)
    changed = {name for name, value in same(before, state(model)).items() if not value}
    assert changed == {"6.weight", "6.bias"}


def test_last_layer_freezes_batch_statistics_also_when_attacked_in_train_mode():
    model = network("full")
    before = state(model)
    trained(model=model, perturb="last_layer", attack_mode="train")
    changed = {name for name, value in same(before, state(model)).items() if not value}
    assert changed == {"6.weight", "6.bias"}


def test_whole_changes_everything():
    model = network("full")
    before = state(model)
    trained(model=model, perturb="whole")
    assert not any(same(before, state(model)).values())


@both
@pytest.mark.parametrize("fails", [False, True])
def test_mode_flags_and_gradients_come_back(objective, fails):
    model = network("full").train()
    model[2].eval()
    model[1].bias.requires_grad_(False)
    gradient = torch.randn(model[6].weight.shape, dtype=torch.float64, generator=torch.Generator())
    model[6].weight.grad = gradient
    kept = gradient.clone()

    def fail(epoch, model):
        raise ZeroDivisionError

    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            trained(objective, model=model, on_epoch=fail)
    else:
        trained(objective, model=model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model[6].weight.grad is gradient and torch.equal(gradient, kept)
    assert all(p.grad is None for p in model.parameters() if p is not model[6].weight)


@both
def test_frozen_flags_do_not_keep_parameters_from_training(objective):
    """What is trained is what Algorithm 1 says, whatever the caller's flags, which come back."""
    model = network("full").requires_grad_(False)
    before = state(model)
    trained(objective, model=model)
    assert not any(value for name, value in same(before, state(model)).items() if "weight" in name)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@both
def test_data_are_not_changed(objective):
    model = network("full")
    pairs = data(12), data(9, seed=1)
    before = [tensor.clone() for pair in pairs for tensor in pair]
    finetune(model, *pairs, quick(objective))
    assert all(torch.equal(a, b) for a, b in zip(before, [t for pair in pairs for t in pair], strict=True))


@both
def test_images_that_require_a_gradient_get_none(objective):
    expected = state(trained(objective)[0])
    model, (x, y) = network("full"), data(12)
    x.requires_grad_()
    finetune(model, (x, y), None, quick(objective))
    assert x.requires_grad and x.grad is None
    assert all(same(expected, state(model)).values())


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_trains_where_the_caller_has_gradients_off(objective, mode):
    expected = state(trained(objective)[0])
    model = network("full")
    with mode():
        trained(objective, model=model)
    assert all(same(expected, state(model)).values())


# ---------------------------------------------------------------------------------------------------------------------
# perturb_
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])
def test_whole_adds_noise_of_the_given_relative_size(noise):
    with seeded(0):
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
        model[1].weight.data *= 50
    before = [parameter.detach().clone() for parameter in model.parameters()]
    returned = perturb_(model, "whole", noise=noise)
    assert [id(p) for p in returned] == [id(p) for p in model.parameters()]
    for old, new in zip(before, model.parameters(), strict=True):
        relative = ((new - old).square().mean() / old.square().mean()).sqrt().item()
        # The standard deviation of n normal numbers has a relative error of about 1/sqrt(2n).
        assert relative == pytest.approx(noise, rel=4 / math.sqrt(2 * old.numel()), abs=0)


def test_noise_of_weights_whose_squares_are_zero_in_float16():
    layer = nn.Linear(50, 50, bias=False)
    with torch.no_grad():
        layer.half().weight.normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
    old = layer.weight.detach().double()
    perturb_(layer, "whole", noise=0.5)
    assert ((layer.weight.double() - old).norm() / old.norm()).item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reinit", ["default", "xavier"])
def test_last_layer_is_drawn_anew(reinit, bias):
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50, bias=bias))
    before = state(model)
    returned = perturb_(model, "last_layer", reinit=reinit, x=torch.rand(1, 200))
    assert [id(p) for p in returned] == [id(p) for p in model[2].parameters()]
    changed = {name for name, value in same(before, state(model)).items() if not value}
    assert changed == {"2.weight", "2.bias"} if bias else {"2.weight"}
    deviation = 1 / math.sqrt(3 * 100) if reinit == "default" else math.sqrt(2 / 150)
    assert model[2].weight.std().item() == pytest.approx(deviation, rel=0.05)
    if bias:
        assert model[2].bias.abs().max() <= (0 if reinit == "xavier" else 1 / math.sqrt(100))


class Gated(nn.Module):
    """A convolution gives the logits; a gate, with a linear layer as wide, is registered after it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.gate = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))

    def forward(self, x):
        features = self.body(x).relu().mean((2, 3))
        return self.head((features * self.gate(features).sigmoid())[:, :, None, None]).flatten(1)


class Mixed(nn.Module):
    """The logits are no layer's output, though a linear layer is as wide."""

    def __init__(self):
        super().__init__()
        self.body, self.mix = nn.Linear(PIXELS, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return self.body(x.flatten(1)).tanh() @ self.mix


class Summed(nn.Module):
    """Two linear layers, the sum of which gives the logits."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(PIXELS, 4), nn.Linear(PIXELS, 4)

    def forward(self, x):
        return self.one(x.flatten(1)) + self.two(x.flatten(1))


class Tempered(nn.Module):
    """The logits are no layer's output; one linear layer is as wide."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 4), nn.Linear(PIXELS, 8)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu()) / 2


class Shifted(nn.Module):
    """The logits are a layer's output, scaled and shifted; a layer before it is as wide."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 4), nn.Linear(PIXELS, 4)

    def forward(self, x):
        return 3 * self.head(self.body(x.flatten(1)).relu()) + 1


class Cosine(nn.Module):
    """Cosines to weights of its own give the logits; `width` is that of a layer before, `aside` is never called."""

    def __init__(self, width):
        super().__init__()
        self.body, self.aside = nn.Linear(PIXELS, width), nn.Linear(width, 4 if width != 4 else 5)
        self.weight = nn.Parameter(torch.randn(4, width))

    def forward(self, x):
        return 9 * F.normalize(self.body(x.flatten(1)), dim=1) @ F.normalize(self.weight, dim=1).T


@pytest.mark.parametrize(
    "kind, fields, layer",
    [
        (Gated, {}, "head"),
        (Gated, {"head": "gate.2"}, "gate.2"),
        (Tempered, {}, "head"),
        (Shifted, {}, "head"),
        (Summed, {"head": "one"}, "one"),
    ],
)
def test_the_last_layer_is_the_one_that_gives_the_logits(kind, fields, layer):
    """And not the one that is registered last."""
    with seeded(0):
        model = kind().double()
    before = state(model)
    returned = perturb_(model, "last_layer", x=X, **fields)
    assert {id(parameter) for parameter in returned} == {id(p) for p in model.get_submodule(layer).parameters()}
    names = {f"{layer}.weight", f"{layer}.bias"}
    assert {name for name, value in same(before, state(model)).items() if not value} == names
    before = state(model)
    finetune(model, data(12), None, quick(perturb="last_layer", **fields))
    assert {name for name, value in same(before, state(model)).items() if not value} == names


@pytest.mark.parametrize("train", [lambda m: perturb_(m, "last_layer", x=X), lambda m: trained(model=m, **LAST)])
def test_a_last_layer_that_cannot_be_told_is_asked_for(train):
    model = Summed().double()
    before = state(model)
    with pytest.raises(WdatError, match=r"give head, its name; 'one', 'two'"):
        train(model)
    assert all(same(before, state(model)).values())


def test_a_few_numbers_do_not_tell_the_last_layer():
    """Three points are nearly on a line by chance, one time in thirty."""
    for seed in range(150):
        with seeded(seed):
            model = Mixed()
        with pytest.raises(WdatError, match="give head, its name; 'body'"):
            perturb_(model, "last_layer", x=X.float())


def test_a_last_layer_whose_bias_is_computed_is_named():
    """Its own reset would leave the bias as it is, without a word."""
    for reinit in ("default", "xavier"):
        model = network("mlp")
        prune.random_unstructured(model[-1], "bias", 0.5)
        before = state(model)
        with pytest.raises(WdatError, match="computes its weight or its bias from others"):
            perturb_(model, "last_layer", reinit=reinit, head="4")
        assert all(same(before, state(model)).values())


def test_the_last_layer_is_found_with_images_of_any_precision():
    model = network("mlp")
    perturb_(model, "last_layer", x=X.float())


@pytest.mark.parametrize("width", [8, 4])
def test_a_layer_that_is_only_as_wide_as_the_logits_is_not_the_last(width):
    """Neither one that is never called nor one in the middle."""
    with seeded(0):
        model = Cosine(width).double()
    before = state(model)
    with pytest.raises(WdatError, match=r"no layer is plainly .* give head, its name; 'body', 'aside'"):
        perturb_(model, "last_layer", x=X)
    assert all(same(before, state(model)).values())


@pytest.mark.parametrize("how", ["whole", "last_layer"])
def test_perturbation_is_decided_by_the_generator(how):
    models = [network("mlp") for _ in range(4)]
    for model, seed in zip(models, (None, 0, 0, 1), strict=True):
        perturb_(model, how, x=X, generator=None if seed is None else torch.Generator().manual_seed(seed))
    default, zero, again, one = map(state, models)
    assert all(same(default, zero).values()) and all(same(zero, again).values())
    assert not all(same(zero, one).values())


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1 by hand
# ---------------------------------------------------------------------------------------------------------------------


def written_consistency(reading, clean, attacked):
    """CE(f(x), f(x')) with soft labels softmax(f(x)), as torch's own cross-entropy reads them."""
    target = clean.softmax(1)
    if reading == "ce":
        return F.cross_entropy(attacked, target)
    if reading == "ce_detached":
        return F.cross_entropy(attacked, target.detach())
    return F.cross_entropy(attacked, target) - F.cross_entropy(clean, target)


@torch.no_grad()
def labels_of(config, model, x, y):
    return y if config.attack_label == "true" else model(x).argmax(1)


def by_hand(model, x, y, config):
    """Algorithm 1 on full batches, without augmentation or noise; the values of Upsilon."""
    model.train()
    upsilons = []
    for _ in range(config.epochs):
        model.eval()
        threat = config.threat
        labels = labels_of(config, model, x, y)
        own = sensitivity(model, x, labels, threat)
        upsilon = own if not upsilons else (1 - config.eta) * upsilons[-1] + config.eta * own
        upsilons.append(upsilon)
        delta = threat.delta * (own / upsilon) ** (threat.q - 1)
        x_adv, x_point = x, x
        for _ in range(config.steps):
            arguments = (redlr, config.step_ratio * delta / config.steps, delta)
            x_adv, _ = reference_step(model, x, x_adv, labels, threat.p, threat.r, *arguments)
            arguments = (ce, config.step_ratio * threat.delta / config.steps, threat.delta)
            x_point, _ = reference_step(model, x, x_point, y, INF, threat.r, *arguments)
        model.train(config.update_mode == "train")
        model.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss = loss + config.beta * written_consistency(config.consistency, logits, model(x_adv))
        if config.gamma:
            loss = loss + config.gamma * written_consistency(config.consistency, logits, model(x_point))
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= config.tau * parameter.grad
    return upsilons


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"consistency": "ce"},
        {"consistency": "kl"},
        {"gamma": 3.0},
        {"gamma": 3.0, "consistency": "ce"},
        {"beta": 0.0},
        {"eta": 1.0, "update_mode": "eval"},
        {"threat": Threat(1.5, 2.0, 0.2), "step_ratio": 2.5},
        {"threat": Threat(3.0, INF, 0.05)},
        {"attack_label": "predicted"},
    ],
    ids=str,
)
def test_algorithm_1_by_hand(fields):
    """Three epochs of full batches: Upsilon (5.4), the radius (5.5), the objective (5.1, 5.6) and the SGD step."""
    options = {"threat": THREAT, "tau": 0.02, "eta": 0.3, "steps": 3, "epochs": 3, "batch_size": 20, "sample": 1.0}
    config = FinetuneConfig(**(options | {"noise": 0.0, "augment": False} | fields))
    model = nn.Sequential(*(layer for layer in network("full") if not isinstance(layer, nn.Dropout)))
    x, y = images(20, model)
    expected = copy.deepcopy(model)
    upsilons = by_hand(expected, x, y, config)
    before = state(model)
    history = finetune(model, (x, y), None, config)
    assert history.upsilon == pytest.approx(upsilons, rel=1e-9, abs=0)
    assert len(set(upsilons)) == 3
    for (name, got), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert not same(before, state(model))["5.weight"]


@pytest.mark.parametrize("eta", [0.1, 0.7])
def test_moving_average_of_upsilon(eta):
    """Eq. 5.4: with a rate too small to change a bit of the weights, eta = 1 gives the estimates themselves."""
    plain, average = (trained(kind="mlp", tau=1e-30, eta=e, epochs=3)[1].upsilon for e in (1.0, eta))
    assert len(plain) == len(average) == 3 * 3
    assert len(set(plain)) > 5
    expected = plain[0]
    assert average[0] == expected
    for estimate, got in zip(plain[1:], average[1:], strict=True):
        expected += eta * (estimate - expected)
        assert got == pytest.approx(expected, rel=1e-12, abs=0)


def test_estimates_of_upsilon_are_sensitivities_of_the_network_of_that_moment():
    models = []
    model = network("full")
    x, y = data(12)
    config = quick(sample=1.0, epochs=3, batch_size=12)
    history = finetune(model, (x, y), None, config, on_epoch=lambda _, m: models.append(copy.deepcopy(m)) or {})
    assert len(history.upsilon) == 3
    for seen, upsilon in zip(models, history.upsilon[1:], strict=False):
        assert upsilon == pytest.approx(sensitivity(seen, x, y, THREAT), rel=1e-12, abs=0)


def test_first_upsilon_of_the_full_training_set():
    history = trained(first_upsilon="full", noise=0.0)[1]
    whole = sensitivity(network("full"), *data(12), THREAT)
    assert history.upsilon[0] == pytest.approx(whole, rel=1e-12, abs=0)
    assert trained(noise=0.0)[1].upsilon[0] != pytest.approx(history.upsilon[0], rel=1e-3)


def test_first_upsilon_of_the_full_training_set_is_taken_once():
    """Also by an objective that keeps no Upsilon itself."""
    estimates = []

    def objective(batch):
        estimates.append(batch.estimate_upsilon(torch.ones((), dtype=torch.float64)).item())
        return F.cross_entropy(batch.net(batch.x), batch.y)

    config = replace(quick(first_upsilon="full", noise=0.0, tau=1e-30), objective=objective)
    finetune(network("mlp"), data(12, "mlp"), None, config)
    whole = sensitivity(network("mlp"), *data(12, "mlp"), THREAT)
    assert [estimate == pytest.approx(whole, rel=1e-9) for estimate in estimates] == [True] + 5 * [False]


def test_an_upsilon_estimated_as_zero_leaves_the_batch_its_delta():
    """All the images of the sample are misclassified, and not all of the batch."""
    x, _ = images(12, network("smooth"), low=0.3, high=0.7)
    guess = predict(network("smooth"), x)
    y = torch.where(torch.arange(12) < 2, guess, (guess + 1) % 4)
    model = Recorder(network("smooth"))
    config = quick(epochs=1, batch_size=12, sample=1e-9, noise=0.0, augment=False, seed=1)
    assert finetune(model, (x, y), None, config).upsilon == [0]
    clean, attacked = (seen for training, seen in model.shown if training)
    distance = (attacked - clean).flatten(1).abs().amax(1).square().mean().sqrt().item()
    assert 0 < distance <= THREAT.delta * (1 + 1e-9)


def test_both_sensitivities_of_a_radius_are_of_the_same_labels():
    """(5.5) is their quotient: 1 where the batch is the sample, whichever labels the attack is given."""
    x, y = data(12)
    guess = predict(network("full"), x)
    fields = {"sample": 1.0, "batch_size": 12, "epochs": 1, "noise": 0.0, "augment": False}
    for attack_label, labels in (("true", y), ("predicted", guess)):
        (upsilon,) = trained(**fields, attack_label=attack_label)[1].upsilon
        assert upsilon == pytest.approx(sensitivity(network("full"), x, labels, THREAT), rel=1e-12, abs=0)
    assert sensitivity(network("full"), x, y, THREAT) < 0.95 * upsilon


@pytest.mark.parametrize("random_start", [0.0, 1.0])
def test_the_batch_is_measured_where_its_attack_starts_and_the_sample_where_it_is(random_start):
    """As the ledger says: Upsilon-hat is that of the images, Upsilon_B of the start."""
    x, y = data(20, "smooth")
    model = Recorder(network("smooth"))
    fields = {"sample": 1.0, "batch_size": 20, "epochs": 1, "noise": 0.0, "augment": False, "tau": 1e-30}
    config = quick(**fields, random_start=random_start)
    (upsilon,) = finetune(model, (x, y), None, config).upsilon
    assert upsilon == pytest.approx(sensitivity(network("smooth"), x, y, THREAT), rel=1e-12, abs=0)
    start, sample, *_ = (seen for training, seen in model.shown if not training and len(seen) == 20)
    order = torch.cdist(start.flatten(1), x.flatten(1)).argmin(1)
    distances = (start - x[order]).flatten(1).abs().amax(1)
    assert distances.max().item() == pytest.approx(random_start * THREAT.delta, abs=1e-12)
    assert torch.cdist(sample.flatten(1), x.flatten(1)).amin(1).max() == 0


def test_the_three_readings_of_the_consistency_term():
    """ce = kl + entropy of softmax(f(x)); ce_detached is ce in value, and cross-entropy of fixed soft labels."""
    generator = torch.Generator().manual_seed(0)
    clean, attacked = (2 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    value, gradient = {}, {}
    for reading in ("ce", "ce_detached", "kl"):
        both_logits = [clean.clone().requires_grad_(), attacked.clone().requires_grad_()]
        loss = _consistency(reading, *both_logits)
        value[reading] = loss.item()
        gradient[reading] = torch.autograd.grad(loss, both_logits, allow_unused=True)
    entropy = -(clean.softmax(1) * clean.log_softmax(1)).sum(1).mean().item()
    assert value["ce"] == pytest.approx(value["kl"] + entropy, rel=1e-12)
    assert value["ce"] == value["ce_detached"]
    assert value["kl"] > 0 and _consistency("kl", clean, clean).abs() < 1e-15

    z = attacked.clone().requires_grad_()
    (fixed,) = torch.autograd.grad(F.cross_entropy(z, clean.softmax(1)), z)
    assert gradient["ce_detached"][0] is None
    for reading in gradient:  # they differ in the gradient to f(x) alone
        torch.testing.assert_close(gradient[reading][1], fixed, rtol=1e-12, atol=1e-15)
    assert gradient["ce"][0].abs().max() > 0.01
    assert (gradient["ce"][0] - gradient["kl"][0]).abs().max() > 0.01


@pytest.mark.parametrize("reading", ["ce", "ce_detached", "kl"])
def test_a_probability_that_rounds_to_zero_has_a_gradient(reading):
    clean = torch.tensor([[1200.0, 0.0, -1200.0]], dtype=torch.float64, requires_grad=True)
    attacked = torch.tensor([[0.0, 900.0, 3.0]], dtype=torch.float64, requires_grad=True)
    _consistency(reading, clean, attacked).backward()
    assert attacked.grad.isfinite().all() and (clean.grad is None or clean.grad.isfinite().all())


class Recorder(nn.Module):
    """A network that keeps what it was shown, with its mode then."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shown = inner, []

    def forward(self, x):
        self.shown.append((self.training, x.detach().clone()))
        return self.inner(x)


def first_minibatch(objective, x, y, **fields):
    """The network before and after one step on all the images, and their order in it.

    Also all that it saw in the update, and in the attack.
    """
    before = network("smooth")
    model = Recorder(copy.deepcopy(before))
    config = quick(objective, epochs=12, batch_size=20, momentum=0.0, nesterov=False, augment=False, **fields)
    states = []
    finetune(model, (x, y), None, config, on_epoch=lambda _, m: states.append(state(m.inner)) or {})
    update, attack = (
        [seen for training, seen in model.shown if training == mode and len(seen) == 20] for mode in (True, False)
    )
    order = torch.cdist(update[0].flatten(1), x.flatten(1)).argmin(1)
    assert order.unique().numel() == 20
    return config, before, states[0], order, update, attack


def assert_stepped(model, after, config):
    """`after` is the model's state one step of SGD along its gradients later."""
    for name, parameter in model.named_parameters():
        step = config.tau / 25 * (parameter.grad + config.weight_decay * parameter)  # the cycle starts at 1/25
        torch.testing.assert_close(after[name], parameter - step, rtol=0, atol=1e-12)


def attacked_from(start, model, x, y, config, loss):
    x_adv, threat = start, config.threat
    for _ in range(config.steps):
        alpha = config.step_ratio * threat.delta / config.steps
        x_adv, _ = reference_step(model, x, x_adv, y, threat.p, threat.r, loss, alpha, threat.delta)
    return x_adv


def test_trades_by_hand():
    """x' from PGD on the KL divergence, started at x plus a little noise; then SGD on CE + beta KL(f(x) || f(x'))."""
    x, y = data(20, "smooth")
    found = first_minibatch("trades", x, y, steps=4, beta=3.0, tau=0.5, weight_decay=0.1)
    config, model, after, order, (clean, attacked, *_), (_, start, *_) = found
    assert torch.equal(clean, x[order])
    noise = start - clean
    assert noise.std().item() == pytest.approx(1e-3, rel=0.1) and noise.abs().max() < 5e-3

    target = model(clean).detach()

    def kl(logits, _):
        return (target.softmax(1) * (target.log_softmax(1) - logits.log_softmax(1))).sum(1)

    expected = attacked_from(start, model, clean, y[order], config, kl)
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-12)

    logits, logits_adv = model(clean), model(attacked)
    divergence = written_consistency("kl", logits, logits_adv)
    assert divergence > 0.01
    (F.cross_entropy(logits, y[order]) + config.beta * divergence).backward()
    assert_stepped(model, after, config)


@pytest.mark.parametrize("r", [INF, 2.0])
def test_pgd_by_hand(r):
    """x' from PGD on CE, started at random in the ball (Madry et al., 2018); then SGD on CE(f(x'), y)."""
    x, y = images(20, network("smooth"), low=0.3, high=0.7)
    found = first_minibatch("pgd", x, y, threat=Threat(INF, r, 0.05), steps=4, tau=0.5)
    config, model, after, order, (attacked, *_), (start, *_) = found
    move = (start - x[order]) / 0.05
    if r == INF:  # uniform on [-1, 1]: no quantile of the 360 pixels is off by more than chance would have in 1 of 100
        assert move.abs().flatten(1).amax(1).max() < 1
        quantiles = (torch.arange(360) + 0.5) / 180 - 1
        assert (move.flatten().sort().values - quantiles).abs().max() < 2 * 1.63 / 360**0.5
    else:
        torch.testing.assert_close(move.flatten(1).norm(dim=1), torch.ones(20, dtype=move.dtype))
    expected = attacked_from(start, model, x[order], y[order], config, ce)
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-12)
    F.cross_entropy(model(attacked), y[order]).backward()
    assert_stepped(model, after, config)


OTHER = {
    "consistency": ["ce", "kl"],
    "attack_label": ["predicted"],
    "attack_mode": ["train"],
    "update_mode": ["eval"],
    "random_start": [0.5],
    "noise": [0.1],
    "augment": [False],
    "momentum": [0.9],
    "weight_decay": [0.01],
    "clip": [0.1],
    "schedule": ["cosine", "one_cycle"],
    "average": [0.5],
    "loss": ["ce", "dlr"],
    "first_upsilon": ["full"],
    "gamma": [1.0],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in OTHER for value in OTHER[name]])
def test_every_open_point_runs_and_matters(name, value):
    fields = {"tau": 0.05, "eta": 0.5}
    plain, other = trained(**fields)[0], trained(**fields, **{name: value})[0]
    assert not same(state(plain), state(other))["6.weight"]
    assert all(tensor.isfinite().all() for tensor in other.state_dict().values())


@pytest.mark.parametrize(
    "fields, name, value", [({"momentum": 0.9}, "nesterov", True), ({"schedule": "one_cycle"}, "warm_up", 0.9)]
)
def test_what_goes_with_another_field_runs_and_matters(fields, name, value):
    plain, other = trained(**fields)[0], trained(**fields, **{name: value})[0]
    assert not same(state(plain), state(other))["6.weight"]


def test_every_way_to_draw_the_last_layer_runs_and_matters():
    default, xavier = (trained(perturb="last_layer", reinit=reinit)[0] for reinit in ("default", "xavier"))
    assert not same(state(default), state(xavier))["6.weight"]


def test_cosine_schedule_ends_at_zero():
    """(1 + cos(pi i / total)) / 2: the rate of the last of many minibatches is next to nothing."""
    states = []
    options = {"schedule": "cosine", "update_mode": "eval", "epochs": 20, "batch_size": 12}
    trained(kind="mlp", on_epoch=lambda _, m: states.append(state(m)) or {}, **options)
    moves = [(b["2.weight"] - a["2.weight"]).norm().item() for a, b in itertools.pairwise(states)]
    assert moves[-1] < 0.02 * moves[0]


def test_random_start_is_its_fraction_of_delta_away():
    """Exactly that far from the middle of the pixel range, and clamped at its edge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((50, *SHAPE), 0.5, dtype=torch.float64)
    for r in (1.5, 2.0, INF):
        start = _moved(x, Threat(2, r, 0.1), 0.7, torch.rand(x.shape, generator=generator, dtype=x.dtype))
        distances = torch.linalg.vector_norm(start - x, r, (1, 2, 3))
        torch.testing.assert_close(distances, torch.full_like(distances, 0.07))
        assert start.unique().numel() > 50
    still = _moved(x.half(), THREAT, 1.0, torch.full_like(x, 0.5).half())  # as numbers in 16 bits may all be
    assert torch.equal(still, x.half())
    edge = _moved(torch.ones_like(x), THREAT, 1.0, torch.rand(x.shape, generator=generator, dtype=x.dtype))
    assert edge.max() == 1 and edge.min() >= 0.95 - 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# The epochs
# ---------------------------------------------------------------------------------------------------------------------


@both
def test_history_has_a_row_an_epoch_and_upsilon_a_minibatch(objective):
    score = f"w_{configuration(objective).threat.p:g}"
    _, history = trained(objective, val=True, epochs=3, on_epoch=lambda epoch, _: {"square": epoch**2})
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]
    assert [row["square"] for row in history.epochs] == [1, 4, 9]
    for row in history.epochs:
        assert set(row) == {"epoch", "loss", "seconds", "clean", score, "square"}
        assert 0 <= row[score] <= row["clean"] <= 1
    seconds = [row["seconds"] for row in history.epochs]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    assert len(history.upsilon) == (3 * 3 if objective == "wdat" else 0)
    assert all(upsilon > 0 for upsilon in history.upsilon)


@pytest.mark.parametrize("p, name", [(2, "w_2"), (4.0, "w_4"), (1.5, "w_1.5"), (INF, "w_inf")])
def test_the_score_has_the_name_of_its_threat(p, name):
    """The pointwise control of Algorithm 1 is selected on W_inf accuracy, and says so."""
    model, history = trained(val=True, threat=Threat(p=p, delta=0.05), epochs=1)
    (row,) = history.epochs
    assert set(row) == {"epoch", "loss", "seconds", "clean", name}
    assert row[name] == wpgd(model, *data(9, seed=1), Threat(p=p, delta=0.05), steps=2).accuracy


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("name", ["w_2", "clean", "loss", "epoch", "seconds"])
def test_on_epoch_cannot_stand_in_for_what_is_measured(name, val):
    """Nor can accuracy on other images choose the epoch."""
    with pytest.raises(WdatError, match=rf"on_epoch must not return '{name}'.*rename yours"):
        trained(val=val, on_epoch=lambda epoch, model: {name: float(epoch), "mine": 0.5})


def test_on_epoch_may_call_another_threat_by_its_name():
    _, history = trained(val=True, on_epoch=lambda epoch, model: {"w_inf": 1.0 / epoch})
    assert [row["w_inf"] for row in history.epochs] == [1.0, 0.5]


@both
@pytest.mark.parametrize("val", [True, False])
def test_on_epoch_sees_a_model_in_eval_mode(objective, val):
    """It may call it, and the batch statistics stay as they are."""
    modes = []

    def on_epoch(epoch, model):
        modes.append(model.training)
        model(data(12)[0] / 2)

    model, _ = trained(objective, val=val, on_epoch=on_epoch)
    assert modes == [False, False]
    assert all(same(state(model), state(trained(objective, val=val)[0])).values())


@both
def test_without_validation_the_last_epoch_stays(objective):
    states = []
    model, history = trained(objective, epochs=3, on_epoch=lambda _, m: states.append(state(m)) or {})
    assert history.best == 3
    assert all(same(states[-1], state(model)).values())
    assert not all(same(states[-2], state(model)).values())
    assert set(history.epochs[0]) == {"epoch", "loss", "seconds"}


@pytest.mark.parametrize("objective", ["wdat", "trades"])
def test_the_best_epoch_on_validation_stays(objective):
    """Trained on wrong labels, so that later epochs are worse: the model ends with the weights of the best one."""
    model = network("full")
    x, _ = images(40, model)
    val = images(200, model, seed=1)
    val = val[0], predict(model, val[0])
    wrong = (predict(model, x) + 1) % 4
    states, scores = [], []
    config = quick(objective, tau=0.05, warm_up=0.1, epochs=5, batch_size=20, step_ratio=2.5, augment=False)

    def on_epoch(epoch, m):
        states.append(state(m))
        scores.append(wpgd(m, *val, config.threat, loss=config.loss, steps=2, step_ratio=2.5).accuracy)
        return {}

    history = finetune(model, (x, wrong), val, config, on_epoch=on_epoch)
    best = scores.index(max(scores))
    assert scores[-1] < scores[best] - 0.1
    assert [row[{"wdat": "w_2", "trades": "w_inf"}[objective]] for row in history.epochs] == scores
    assert history.best == best + 1
    assert all(same(states[best], state(model)).values())


@both
def test_the_earliest_of_equally_good_epochs_stays(objective):
    """A rate too small to change anything that validation sees."""
    _, history = trained(objective, kind="mlp", val=True, epochs=3, tau=1e-30)
    assert history.best == 1


@both
@pytest.mark.parametrize("rate", [1e10, 1e30])
@pytest.mark.parametrize("batch_size", [4, 12])
def test_a_rate_far_too_large_is_named(objective, rate, batch_size):
    """The message names the epoch, the minibatch and the learning rate."""
    model = network("conv", dtype=torch.float32)
    x, y = images(12, model, dtype=torch.float32)
    config = quick(objective, tau=rate, epochs=6, batch_size=batch_size)
    with pytest.raises(WdatError) as error:
        finetune(model, (x, y), (x, y), config)
    assert re.search(r"epoch \d", str(error.value))
    assert re.search(r"minibatch \d", str(error.value))
    assert re.search(r"rate [\d.e+]+", str(error.value))


# ---------------------------------------------------------------------------------------------------------------------
# What training is for
# ---------------------------------------------------------------------------------------------------------------------


def easy_problem(n, seed):
    """Three classes. One strong feature is right 9 times in 10; 40 weak ones always, but an attack undoes them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    seen = torch.where(torch.rand(n, generator=generator) < 0.9, y, (y + 1) % 3)
    strong = 0.3 * F.one_hot(seen, 3).repeat(1, 4)
    weak = 0.04 * F.one_hot(y, 3).repeat(1, 44)
    x = 0.3 + torch.cat([strong, weak], dim=1) + 0.05 * torch.randn(n, 144, generator=generator)
    return x.clamp(0, 1).view(n, 1, 12, 12), y


PROBLEM = {"threat": Threat(delta=0.06), "batch_size": 64, "augment": False, "steps": 5}


def plain_network():
    with seeded(0):
        return nn.Sequential(Scale(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 3))


class Scale(nn.Module):
    def forward(self, x):
        return 3 * (x - 0.4)


def scores(model, data):
    w_2 = wpgd(model, *data, PROBLEM["threat"])
    w_inf = wpgd(model, *data, Threat(p=INF, delta=0.06), loss="ce")
    return w_2.history["accuracy"][0], w_inf.accuracy, w_2.accuracy


@pytest.fixture(scope="module")
def standard():
    return pretrained(beta=0.0, tau=0.1)


@pytest.fixture(scope="module")
def robust():
    return pretrained(beta=6.0, tau=0.05)


def pretrained(**fields):
    model = plain_network()
    options = PROBLEM | {"threat": Threat(p=INF, delta=0.06), "epochs": 8}
    finetune(model, easy_problem(512, 1), None, configuration("trades", **(options | fields)))
    return model


def test_pretraining_learns_and_beta_buys_robustness(standard, robust):
    test = easy_problem(512, 2)
    clean, w_inf, _ = scores(standard, test)
    assert clean > 0.97 and w_inf < 0.1  # the weak features, all right and all undone
    clean, w_inf, _ = scores(robust, test)
    assert clean > 0.88 and w_inf > 0.85  # the strong one, nine in ten


def test_finetuning_the_whole_network_raises_accuracy_under_the_distributional_attack(standard):
    model, test = copy.deepcopy(standard), easy_problem(512, 2)
    before = scores(model, test)
    config = FinetuneConfig(**PROBLEM, tau=0.03, epochs=4)
    history = finetune(model, easy_problem(512, 1), easy_problem(256, 3), config)
    after = scores(model, test)
    assert before[2] < 0.1 and after[2] > 0.8
    assert after[0] > 0.88
    assert history.epochs[history.best - 1]["w_2"] == max(row["w_2"] for row in history.epochs)


def test_finetuning_the_last_layer_finds_it_again(robust):
    """Robust features below a last layer drawn anew: training that layer alone brings the accuracy back."""
    model, test = copy.deepcopy(robust), easy_problem(512, 2)
    perturb_(model, "last_layer", x=test[0])
    assert scores(model, test)[2] < 0.5
    config = FinetuneConfig(**PROBLEM, perturb="last_layer", tau=0.03, epochs=6)
    finetune(model, easy_problem(512, 1), easy_problem(256, 3), config)
    assert scores(model, test)[2] > 0.8


class Keeping(nn.Module):
    """Keeps what it computed of the last images."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(18, 8), nn.Linear(8, 4)

    def forward(self, x):
        self.kept = self.body(x.flatten(1)).relu()
        return self.last(self.kept)


def test_a_network_that_keeps_what_it_computed_is_averaged():
    model = Keeping().double()
    model(X)  # as its caller may have done
    before = state(model)
    finetune(model, data(12), None, quick(average=0.9))
    assert not any(same(before, state(model)).values())


def test_averaged_weights_differ_and_are_what_is_validated():
    model, average = plain_network(), []
    data, val = easy_problem(128, 1), easy_problem(128, 3)
    fields = PROBLEM | {"threat": Threat(p=INF, delta=0.06), "epochs": 3, "step_ratio": 2.5}
    config = configuration("trades", **fields, average=0.9)

    def on_epoch(epoch, shown):
        average.append(state(shown))
        return {"again": wpgd(shown, *val, config.threat, loss="ce", steps=5, step_ratio=2.5).accuracy}

    history = finetune(model, data, val, config, on_epoch=on_epoch)
    assert [row["again"] for row in history.epochs] == [row["w_inf"] for row in history.epochs]
    assert all(same(average[history.best - 1], state(model)).values())
    plain = plain_network()
    finetune(plain, data, val, replace(config, average=0.0))
    assert not any(same(state(plain), state(model)).values())


def test_average_of_the_weights_by_hand():
    """The exponential moving average of weights and batch statistics after every step, started after the first."""
    states = {}
    for average in (0.0, 0.7):
        seen = states.setdefault(average, [])
        options = {"epochs": 6, "batch_size": 12, "average": average}
        trained("trades", on_epoch=lambda _, m, seen=seen: seen.append(state(m)) or {}, **options)
    expected = states[0.0][0]
    for weights, got in zip(states[0.0], states[0.7], strict=True):
        expected = {name: 0.7 * expected[name] + 0.3 * weights[name] for name in weights}
        for name in got.keys() - {"2.num_batches_tracked"}:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


class Buffered(nn.Module):
    """A network with an order of its logits and a mask, which are buffers."""

    def __init__(self):
        super().__init__()
        self.inner = network("full")
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -INF, 0.0], dtype=torch.float64))

    def forward(self, x):
        return self.inner(x)[:, self.order] * (1 + self.mask.softmax(0))


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("buffers", [{"order"}, {"order", "mask"}])
def test_buffers_of_whole_or_infinite_numbers_stay_as_they_are(buffers, average):
    """Three ninths and one of 3 are rounded to 2, and the difference of two infinities is no number."""
    model = Buffered()
    if "mask" not in buffers:
        model.mask.zero_()
    before = state(model)
    trained(model=model, average=average, val=True)
    assert {name for name, value in same(before, state(model)).items() if value} == {"order", "mask"}


@pytest.mark.parametrize("warm_up", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 9])
def test_pretraining_of_any_length_runs(epochs, warm_up):
    """The one-cycle schedule has corners where its warm-up ends at its first step."""
    _, history = trained("trades", kind="mlp", epochs=epochs, batch_size=12, warm_up=warm_up)
    assert len(history.epochs) == epochs


def test_pretraining_in_bfloat16_stays_close_to_float32():
    x, y = data(12, "conv")
    models = [network("conv", dtype=torch.float32) for _ in range(2)]
    for model, precision in zip(models, ("float32", "bfloat16"), strict=True):
        finetune(model, (x.float(), y), None, quick("trades", precision=precision, tau=0.01))
    assert not same(*map(state, models))["1.weight"]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)


@both
def test_progress_wraps_the_minibatches_of_each_epoch(objective):
    """And changes nothing else."""
    model, shown = network("conv"), []

    def show(minibatches):
        shown.append([len(indices) for indices in minibatches])
        return minibatches

    finetune(model, data(12, "conv"), None, quick(objective), progress=show)
    assert shown == [[5, 5, 2], [5, 5, 2]]
    assert all(same(state(trained(objective, "conv")[0]), state(model)).values())


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------------------


def shifts(image, pad=4):
    """All 81 * 2 shifts and flips of one image, zeros coming in."""
    h, w = image.shape[1:]
    padded = F.pad(image, (pad,) * 4)
    crops = [padded[:, i : i + h, j : j + w] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return torch.stack(crops + [crop.flip(2) for crop in crops])


@pytest.mark.parametrize("h, w", [(8, 8), (6, 9), (32, 32)])
def test_crop_and_flip_gives_shifts_and_flips_of_each_image(h, w):
    x = torch.rand(60, 3, h, w, generator=torch.Generator().manual_seed(0))
    out = _crop_and_flip(x, torch.Generator().manual_seed(1))
    assert out.shape == x.shape
    for image, result in zip(x, out, strict=True):
        assert (shifts(image) == result).flatten(1).all(1).sum() == 1


class Viewing(nn.Module):
    """Asks for images that lie row by row in memory, as many networks do."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(18, 4)

    def forward(self, x):
        return self.last(x.view(len(x), -1))


@both
def test_a_network_that_views_its_images_is_trained_on_augmented_ones(objective):
    model = Viewing().double()
    before = state(model)
    finetune(model, data(12), data(6), quick(objective, augment=True))
    assert not any(same(before, state(model)).values())


def test_crop_and_flip_draws_every_shift_and_flip():
    image = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    out = _crop_and_flip(image.expand(3000, -1, -1, -1), torch.Generator().manual_seed(1))
    which = (shifts(image[0])[None] == out[:, None]).flatten(2).all(2).long().argmax(1)
    counts = which.bincount(minlength=162)
    # 3000 draws from 162 equally likely outcomes: chi-square has mean 161 and deviation about 18.
    chi_square = ((counts - 3000 / 162) ** 2 / (3000 / 162)).sum()
    assert counts.min() > 0 and chi_square < 161 + 4 * 18
