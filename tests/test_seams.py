"""The three things that a caller can replace: the attack's step rule, its loss, and the objective of the training.

The examples in the docstrings are run as they stand.
"""

import ast
import copy
import inspect
import itertools
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import INF, conjugate, images, lengths, mean, network, reference_wpgd
from torch import nn

import wdat_core
from wdat_core import FinetuneConfig, Threat, ce, finetune, sensitivity, wpgd

THREATS = [Threat(p, r, 0.05) for p in (2.0, INF, 1.5) for r in (INF, 2.0)]
threats = pytest.mark.parametrize("threat", THREATS, ids=lambda t: f"W{t.p:g}-l{t.r:g}")


def indent(line):
    return len(line) - len(line.lstrip())


def examples_of(docstring):
    """The code after each "::", which is indented further than the line that ends so."""
    lines = docstring.splitlines()
    for i, line in enumerate(lines):
        if line.endswith("::"):
            ends = (k for k, below in enumerate(lines) if k > i and below.strip() and indent(below) <= indent(line))
            block = lines[i + 1 : next(ends, len(lines))]
            yield textwrap.dedent("\n".join(block)).strip()


EXAMPLES = [
    example
    for name in ("__doc__", *wdat_core.__all__)
    for example in examples_of(inspect.getdoc(wdat_core if name == "__doc__" else getattr(wdat_core, name)) or "")
]


def run(example):
    """The names after an example, in which those before are a network, images and all that wdat_core has."""
    model = network("smooth", dtype=torch.float32)
    x, y = images(24, model, dtype=torch.float32)
    names = {name: getattr(wdat_core, name) for name in wdat_core.__all__}
    names |= {"torch": torch, "F": F, "math": math, "model": model, "x": x, "y": y, "train": (x, y), "val": (x, y)}
    exec(compile(example, "<example>", "exec"), names)
    return names


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_docstrings_run_as_they_stand(example, monkeypatch):
    monkeypatch.setattr(FinetuneConfig, "__init__", short(FinetuneConfig.__init__))
    run(example)
    assert len(example.splitlines()) <= 20


def short(init):
    """One epoch of one step for an example that trains."""
    return lambda self, **fields: init(self, **({"epochs": 1, "steps": 1} | fields))


def defined(name):
    """The function of that name from the docstrings' examples, and what surrounds it."""
    (example,) = (example for example in EXAMPLES if f"def {name}(" in example)
    tree = ast.parse(example)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return run(ast.unparse(tree))[name]


# ---------------------------------------------------------------------------------------------------------- step rule


@threats
@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_the_gradient_as_a_rule_is_no_rule(threat, loss):
    """The savings that it switches off change nothing that comes out."""
    model = network("mlp")
    x, y = images(20, model)
    plain = wpgd(model, x, y, threat, loss=loss, steps=4, step_ratio=2.5)
    ruled = wpgd(model, x, y, threat, loss=loss, steps=4, step_ratio=2.5, rule=lambda gradient, before: gradient)
    torch.testing.assert_close(ruled.x_adv, plain.x_adv, rtol=0, atol=1e-12)
    assert ruled.history["accuracy"] == plain.history["accuracy"]
    assert ruled.history["upsilon"] == pytest.approx(plain.history["upsilon"], rel=1e-12)


def written_momentum(model, x, y, threat, steps, ratio):
    """W-PGD along the sum of the gradients so far, each divided by its l_1 norm; its iterates."""
    iterates, total = [x], torch.zeros_like(x)
    p, r, q, s = threat.p, threat.r, conjugate(threat.p), conjugate(threat.r)
    for _ in range(steps):
        z = iterates[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ce(model(z), y).sum(), z)
        total = total + gradient / lengths(gradient, 1).view(-1, 1, 1, 1)
        size = lengths(total, s).view(-1, 1, 1, 1)
        h = total.sign() * total.abs() ** (s - 1) * size ** (q - s) / mean(size.flatten(), q) ** (q - 1)
        moved = wdat_core.project(iterates[-1] + ratio * threat.delta / steps * h, x, Threat(p, r, threat.delta))
        iterates.append(moved.clamp(0, 1))
    return iterates


@threats
@pytest.mark.parametrize("batch_size", [7, 512])
def test_momentum_by_hand(threat, batch_size):
    model = network("smooth")
    x, y = images(20, model)
    options = {"loss": "ce", "steps": 5, "step_ratio": 2.5}
    attack = wpgd(model, x, y, threat, **options, rule=defined("momentum"), batch_size=batch_size)
    iterates = written_momentum(model, x, y, threat, 5, 2.5)
    with torch.no_grad():
        losses = [ce(model(z), y).mean().item() for z in iterates]
    assert attack.history["loss"] == pytest.approx(losses, rel=1e-9)
    best = 1 + attack.history["accuracy"][1:].index(attack.accuracy)
    torch.testing.assert_close(attack.x_adv, iterates[best], rtol=0, atol=1e-9)
    plain = wpgd(model, x, y, threat, **options)
    assert not torch.allclose(torch.tensor(plain.history["loss"][2:]), torch.tensor(losses[2:]), rtol=1e-6)


def test_a_rule_is_given_what_it_returned_for_the_same_images():
    """Zeros at first; whatever the order and the size of the batches."""
    model = network("smooth")
    x, y = images(20, model)
    seen = []

    def rule(gradient, before):
        seen.append((gradient.clone(), before.clone()))
        return gradient + 0.5 * before

    wpgd(model, x, y, Threat(delta=0.05), loss="ce", steps=3, rule=rule, batch_size=20)
    vector = torch.zeros_like(x)
    for gradient, before in seen:
        assert torch.equal(before, vector)
        vector = gradient + 0.5 * before
    assert len(seen) == 3


@settings(max_examples=25)
@given(st.sampled_from(THREATS), st.integers(0, 2**32), st.floats(0.1, 1))
def test_whatever_the_rule_returns_a_step_has_its_length(threat, seed, step_ratio):
    """Noise that knows nothing of the gradient: far from the edges one step moves the images by alpha in W_p."""
    model = network("linear", seed=seed)
    x, y = images(9, model, low=0.4, high=0.6, seed=seed)
    threat = Threat(threat.p, threat.r, 1e-3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    attack = wpgd(model, x, y, threat, steps=1, step_ratio=step_ratio, rule=lambda *_: 1e9 * noise)
    assert attack.distance == pytest.approx(step_ratio * threat.delta, rel=1e-9)
    assert torch.equal((attack.x_adv - x).sign(), noise.sign())


@threats
def test_along_any_rule_the_images_stay_in_the_ball(threat):
    """Steps that add up to more than delta, and that go back and forth."""
    model = network("mlp")
    x, y = images(20, model)
    turns = itertools.count()
    attack = wpgd(model, x, y, threat, steps=6, step_ratio=4.0, rule=lambda g, before: (-1) ** (next(turns) // 3) * g)
    assert mean(lengths(attack.x_adv - x, threat.r), threat.p) <= threat.delta * (1 + 1e-9)
    assert attack.x_adv.min() >= 0 and attack.x_adv.max() <= 1


def test_a_rule_with_a_parameter_that_is_learned_leaves_no_trace_of_it():
    model, weight = network("smooth"), torch.ones((), dtype=torch.float64, requires_grad=True)
    x, y = images(9, model)
    for threat in THREATS:
        attack = wpgd(model, x, y, threat, rule=lambda gradient, before: weight * gradient, steps=3)
        assert not attack.x_adv.requires_grad
        assert torch.equal(
            attack.x_adv, wpgd(model, x, y, threat, rule=lambda gradient, before: gradient, steps=3).x_adv
        )


def test_out_of_memory_the_rule_is_given_the_same(monkeypatch):
    model, x_y = network("smooth"), images(20, network("smooth"))
    options = {"loss": "ce", "steps": 4, "rule": defined("momentum")}
    plain = wpgd(model, *x_y, Threat(delta=0.05), **options)
    forward = model.forward

    def little(x):
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    monkeypatch.setattr(model, "forward", little)
    torch.testing.assert_close(wpgd(model, *x_y, Threat(delta=0.05), **options).x_adv, plain.x_adv, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_margin_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(30, 5, generator=generator), torch.randint(5, (30,), generator=generator)
    rivals = [
        max(v for k, v in enumerate(z) if k != label) for z, label in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    own = logits.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(defined("carlini_wagner")(logits, y), torch.tensor(rivals) - own)


@threats
def test_the_margin_is_attacked_as_any_loss(threat):
    margin, model = defined("carlini_wagner"), network("mlp")
    x, y = images(20, model)
    attack = wpgd(model, x, y, threat, loss=margin, steps=4)
    iterates, upsilons = reference_wpgd(model, x, y, threat.p, threat.r, threat.delta, margin, 4, 1.0)
    assert attack.history["upsilon"] == pytest.approx(upsilons, rel=1e-9)
    assert upsilons[0] == pytest.approx(sensitivity(model, x, y, threat, loss=margin), rel=1e-12)
    best = 1 + attack.history["accuracy"][1:].index(attack.accuracy)
    torch.testing.assert_close(attack.x_adv, iterates[best], rtol=0, atol=1e-9)


def test_training_takes_a_loss_of_ones_own():
    """For the radius, the attack and the validation."""
    margin, model = defined("carlini_wagner"), network("smooth")
    x, y = images(20, model)
    config = {"epochs": 1, "batch_size": 20, "steps": 3, "sample": 1.0, "noise": 0.0, "augment": False}
    history = finetune(model, (x, y), (x, y), FinetuneConfig(**config, loss=margin))
    start = network("smooth")
    assert history.upsilon == pytest.approx([sensitivity(start, x, y, Threat(), loss=margin)], rel=1e-12)
    assert history.epochs[0]["w_2"] == wpgd(model, x, y, Threat(), loss=margin, steps=3).accuracy
    x_adv = reference_wpgd(start, x, y, 2.0, INF, 8 / 255, margin, 3, 1.0)[0][-1]
    logits = start(x)
    (ce(logits, y).mean() + 6 * F.cross_entropy(start(x_adv), logits.softmax(1).detach())).backward()
    for name, parameter in start.named_parameters():
        expected = parameter - 0.01 * parameter.grad
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- objective

STEP = {"epochs": 1, "batch_size": 20, "steps": 3, "noise": 0.0, "augment": False, "update_mode": "eval"}


def test_pairing_by_hand():
    """One step of SGD on the example's objective, x' the last iterate of PGD with CE."""
    pairing, model = defined("pairing"), network("smooth")
    x, y = images(20, model)
    history = finetune(model, (x, y), None, FinetuneConfig(**STEP, objective=pairing))
    start = network("smooth")
    x_adv = reference_wpgd(start, x, y, INF, INF, 8 / 255, ce, 3, 1.0)[0][-1]
    logits, logits_adv = start(x), start(x_adv)
    total = F.cross_entropy(logits_adv, y) + 0.5 * F.mse_loss(logits_adv, logits)
    total.backward()
    assert history.epochs[0]["loss"] == pytest.approx(total.item(), rel=1e-9)
    assert history.upsilon == [] and history.best == 1
    for name, parameter in start.named_parameters():
        expected = parameter - 0.01 * parameter.grad
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", [wdat_core.wdat, wdat_core.trades, wdat_core.pgd], ids=lambda f: f.__name__)
def test_the_objectives_of_the_core_are_functions_like_any_other(objective):
    """Given as such they do what they do by name."""
    models = [network("full") for _ in range(2)]
    x, y = images(20, network("full"))
    fields = {"epochs": 2, "batch_size": 8, "steps": 2, "threat": Threat(p=INF, delta=0.05)}
    for model, given_as in zip(models, (objective, objective.__name__), strict=True):
        finetune(model, (x, y), (x, y), FinetuneConfig(**fields, objective=given_as))
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


def test_an_objective_is_given_its_minibatch_and_keeps_its_memory():
    model, config = (
        network("full"),
        FinetuneConfig(**(STEP | {"batch_size": 8, "epochs": 2}), objective=lambda b: use(b)),
    )
    x, y = images(20, model)
    sizes = []

    def use(batch):
        rows = torch.cdist(batch.x.flatten(1), x.flatten(1)).argmin(1)
        assert torch.equal(batch.x, x[rows]) and torch.equal(batch.y, y[rows])
        assert batch.config is config and not model.training
        batch.memory.setdefault("upsilon", []).append(torch.tensor(float(len(sizes))))
        sizes.append(len(batch.x))
        x_adv = batch.attack(Threat(delta=0.05), "ce")
        assert x_adv.shape == batch.x.shape and not x_adv.requires_grad
        logits = batch.net(x_adv)
        assert logits.requires_grad and not batch.logits(batch.x).requires_grad
        return ce(logits, batch.y).mean()

    history = finetune(model, (x, y), None, config)
    assert sizes == [8, 8, 4, 8, 8, 4]
    assert history.upsilon == [0, 1, 2, 3, 4, 5]


def test_an_attack_in_the_middle_of_an_objective_leaves_its_gradients_alone():
    """Logits from before the attack are part of the loss as if no attack had come between."""
    states = []
    x, y = images(20, network("full"))

    def before(batch):
        logits = batch.net(batch.x)
        x_adv = batch.attack(Threat(delta=0.05), "ce")
        return ce(logits, batch.y).mean() + ce(batch.net(x_adv), batch.y).mean()

    def after(batch):
        x_adv = batch.attack(Threat(delta=0.05), "ce")
        logits = batch.net(batch.x)
        return ce(logits, batch.y).mean() + ce(batch.net(x_adv), batch.y).mean()

    for objective in (before, after):
        model = copy.deepcopy(network("full"))
        finetune(model, (x, y), None, FinetuneConfig(**STEP, objective=objective))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [INF, 2.0])
def test_a_look_serves_any_number_of_attacks(r):
    """It is left as it was."""
    threat = Threat(r=r, delta=0.05)

    def objective(batch):
        look = batch.look(batch.x, batch.y, threat, "ce")
        before = copy.deepcopy(look)
        fresh = batch.attack(threat, "ce")
        for _ in range(2):
            assert torch.equal(batch.attack(threat, "ce", first=look), fresh)
        for name in ("correct", "loss", "norm", "direction", "finite"):
            assert torch.equal(getattr(look, name), getattr(before, name)), name
        return ce(batch.net(fresh), batch.y).mean()

    model = network("full")
    finetune(model, images(20, model), None, FinetuneConfig(**STEP, objective=objective))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_does_more_in_train_than_to_set_its_mode_is_given_back_in_it(training):
    """As adapters do, which are merged into the weights in eval mode."""

    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network("smooth")

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

        def forward(self, x):
            assert self.merged != self.training
            return self.inner(x)

    model = Merging().train(training)
    x, y = images(8, model.inner)
    for call in (wpgd, sensitivity):
        call(model, x, y, Threat())
        assert model.training == training and model.merged != training
    finetune(model, (x, y), None, FinetuneConfig(epochs=1, steps=1, augment=False))
    assert model.training == training and model.merged != training
