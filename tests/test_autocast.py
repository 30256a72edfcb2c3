"""Calls inside an autocast of the caller's own, and networks that cast by themselves."""

import pytest
import torch
from tiny import images, network
from torch import nn
from torch.nn.functional import cross_entropy

import wdat_core
from wdat_core import FinetuneConfig, Threat, boundary, evaluate, finetune, sensitivity, wpgd

THREAT = Threat(delta=0.05)


def small(seed=0):
    model = network("conv", dtype=torch.float32, seed=seed)
    return model, images(64, model, dtype=torch.float32)


def directly(batch):
    """An objective that asks the model itself, whom it has closed over."""
    return cross_entropy(directly.model(batch.x), batch.y)


def trained(objective, around):
    model, data = small()
    directly.model = model
    shared = {"perturb": "none", "augment": False, "steps": 2, "epochs": 3, "batch_size": 32, "tau": 0.3}
    config = FinetuneConfig(objective=objective, threat=THREAT, **shared)
    with around():
        history = finetune(model, data, data, config)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history.epochs]
    return [*model.state_dict().values()], rows


def cast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("objective", ["wdat", "worst_case", directly])
def test_a_training_inside_an_autocast_learns_what_it_learns_outside(objective):
    state, rows = trained(objective, torch.enable_grad)
    inside, rows_inside = trained(objective, cast)
    assert rows == rows_inside and len({row["loss"] for row in rows}) == 3
    assert all(torch.equal(a, b) for a, b in zip(state, inside, strict=True))


def test_a_training_in_bfloat16_inside_an_autocast_learns_what_it_learns_outside():
    def loss(around):
        model, data = small()
        fields = {"perturb": "none", "augment": False, "steps": 2, "epochs": 3, "batch_size": 32, "tau": 0.3}
        with around():
            history = finetune(model, data, None, FinetuneConfig(precision="bfloat16", threat=THREAT, **fields))
        return [row["loss"] for row in history.epochs]

    assert loss(torch.enable_grad) == loss(cast)


def of_batches(model, x, y):
    """Given by a generator that is inside an autocast itself whenever it gives one."""

    def batches():
        with cast():
            yield from zip(x.split(10), y.split(10), strict=True)

    return boundary(model, batches(), steps=5).distance


USES = {
    "wpgd": lambda model, x, y: wpgd(model, x, y, THREAT, steps=3).x_adv,
    "sensitivity": lambda model, x, y: torch.tensor(sensitivity(model, x, y, THREAT)),
    "evaluate": lambda model, x, y: evaluate(model, x, y, steps=3).correct["w_2"],
    "boundary": lambda model, x, y: boundary(model, x, y, steps=5).distance,
    "boundary of batches": of_batches,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_an_attack_inside_an_autocast_is_that_outside(use):
    model, (x, y) = small()
    outside = use(model, x, y)
    with cast():
        inside = use(model, x, y)
    assert torch.equal(outside, inside)
    assert torch.equal(outside, USES["boundary"](model, x, y)) or use is not of_batches


class Casting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with cast():
            return self.inner(x)


def test_what_is_found_on_a_network_that_casts_by_itself_is_found_by_more_than_its_rounding():
    """Its logits have 8 bits, whatever type the images have."""
    model, (x, y) = small()
    found = boundary(Casting(model), x, y, steps=20)
    bought = (found.distance > 0) & (found.distance < torch.inf)
    assert bought.any()
    with torch.no_grad():
        assert not (model(found.x_adv).argmax(1) == y)[bought].any()


def test_a_network_that_casts_by_itself_learns_inside_an_autocast_too():
    def weights(around):
        model, data = small()
        fields = {"perturb": "none", "augment": False, "steps": 1, "epochs": 2, "tau": 0.3}
        with around():
            finetune(Casting(model), data, None, FinetuneConfig(threat=THREAT, **fields))
        return [*model.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(weights(torch.enable_grad), weights(cast), strict=True))


# The backends' settings themselves: reading `allow_tf32` raises where only some of them were set by their new names.
FINE = 16 * torch.finfo(torch.float32).eps
SETTINGS = {
    "convolutions in TF32, as by default": ("tf32", "none", "none", 0.004),
    "convolutions set to float32": ("ieee", "none", "none", FINE),
    "products in TF32": ("ieee", "tf32", "none", 0.004),
    "products on a CPU in bfloat16": ("ieee", "none", "bf16", FINE),
}


@pytest.fixture
def precision(monkeypatch):
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("before PyTorch 2.9 there is one flag")
    parts = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [part.fp32_precision for part in parts]

    def put(*values):
        for part, value in zip(parts, values, strict=True):
            part.fp32_precision = value

    yield put
    put(*before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_rounding_of_a_gpu_is_that_of_its_settings(setting, precision):
    *values, expected = SETTINGS[setting]
    precision(*values)
    float32 = (torch.float32, torch.float32)
    assert wdat_core._rounding(*float32, torch.device("cuda")) == pytest.approx(expected)
    assert wdat_core._rounding(*float32, torch.device("cpu")) == pytest.approx(0.03 if values[2] == "bf16" else FINE)
    assert wdat_core._rounding(torch.float64, torch.float64, torch.device("cuda")) < 1e-14


class Decorated(nn.Module):
    """Its autocast is older than any call, and keeps the weights that it has cast."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return self.inner(x)


def test_a_network_that_keeps_its_weights_in_an_autocast_learns():
    def trained_as(kind):
        model, data = small()
        fields = {"perturb": "none", "augment": False, "steps": 1, "epochs": 3, "tau": 0.3}
        history = finetune(kind(model), data, None, FinetuneConfig(threat=THREAT, **fields))
        return [row["loss"] for row in history.epochs]

    losses, same = trained_as(Casting), trained_as(Decorated)
    assert same == pytest.approx(losses, rel=0.01) and len({round(loss, 2) for loss in same}) == 3


def test_the_caller_s_autocast_has_the_new_weights_after_a_training():
    model, data = small()
    with cast(), torch.no_grad():
        model.requires_grad_()
        with torch.enable_grad():
            before = model(data[0])
            finetune(model, data, None, FinetuneConfig(threat=THREAT, steps=1, epochs=1, tau=0.3, augment=False))
            after = model(data[0])
    with torch.enable_grad(), cast():
        expected = model(data[0])
    assert not torch.equal(before, after) and torch.equal(after, expected)
