"""What a caller can get wrong ends in a WdatError whose one sentence names it."""

import copy
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import FROM_SCRATCH, INF, Centre, configuration, images, network, predict
from torch import nn

from wdat_core import (
    Boundary,
    FinetuneConfig,
    Threat,
    WdatError,
    boundary,
    ce,
    code_digest,
    evaluate,
    finetune,
    perturb_,
    project,
    sensitivity,
    worst_case,
    wpgd,
    wpgd_budget,
)

THREAT = Threat(delta=0.05)
MODEL = network("conv")
X, Y = images(6, MODEL)


def raises(*words):
    """WdatError with all the words in its message."""
    return pytest.raises(WdatError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def call(name, model=MODEL, x=X, y=Y, **options):
    """One of the public functions, with whatever is wrong passed on."""
    if name == "evaluate":
        return evaluate(model, x, y, **options)
    if name == "wpgd_budget":
        return wpgd_budget(model, x, y, THREAT, **({"upsilon": 1.0} | options))
    if name in TRAININGS:
        config = configuration(name, epochs=1, steps=1, augment=False, **options)
        return finetune(model, (x, y), None, config)
    return {"wpgd": wpgd, "sensitivity": sensitivity}[name](model, x, y, THREAT, **options)


ATTACKS = ("wpgd", "wpgd_budget", "sensitivity", "evaluate")
TRAININGS = ("wdat", "trades")
everywhere = pytest.mark.parametrize("name", (*ATTACKS, *TRAININGS))
trainings = pytest.mark.parametrize("objective", TRAININGS)
attacks = pytest.mark.parametrize("name", ATTACKS)


def test_error_is_a_value_error():
    assert issubclass(WdatError, ValueError)


@everywhere
def test_the_good_input_that_the_bad_ones_differ_from(name):
    call(name, model=network("conv"))


# ---------------------------------------------------------------------------------------------------------------------
# Images and labels
# ---------------------------------------------------------------------------------------------------------------------

BAD_IMAGES = {
    "bytes": ((255 * X).to(torch.uint8), ("images", "uint8", "255")),
    "integers": (X.long(), ("images", "int64")),
    "no tensor": (X.numpy(), ("images", "ndarray")),
    "below 0": (X - 0.5, (r"images must lie in \[0, 1\]", "span", "normalisation")),
    "above 1": (2 * X, (r"images must lie in \[0, 1\]", "span")),
    "a hair above 1": (torch.full_like(X, 1 + 1e-9), (r"images must lie in \[0, 1\]",)),
    "NaN": (torch.full_like(X, math.nan), (r"images must lie in \[0, 1\]", "nan")),
    "one NaN": (torch.where(torch.arange(3) == 1, math.nan, X), (r"images must lie in \[0, 1\]", "nan")),
    "infinite": (torch.full_like(X, INF), (r"images must lie in \[0, 1\]", "inf")),
    "none": (X[:0], ("images", "at least one image", r"\(0, 2, 3, 3\)")),
    "no pixels": (X[:, :, :0], ("images", r"\(6, 2, 0, 3\)")),
    "one dimension": (X.flatten(), ("images", r"\(n, c, h, w\)", r"\(108,\)")),
    "a number": (X.sum(), ("images", r"\(n, c, h, w\)")),
}


@everywhere
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images(name, case):
    x, words = BAD_IMAGES[case]
    with raises(*words):
        call(name, x=x, y=Y[: len(x)] if case == "none" else Y)


BAD_LABELS = {
    "int32": (Y.int(), ("labels", "int64", "int32")),
    "float": (Y.double(), ("labels", "int64", "float64")),
    "a list": (Y.tolist(), ("labels", "int64", "list")),
    "too few": (Y[:-1], ("labels", r"\(6,\)", r"\(5,\)")),
    "column": (Y[:, None], ("labels", r"\(6,\)", r"\(6, 1\)")),
    "one-hot": (nn.functional.one_hot(Y, 4), ("labels", r"\(6,\)", r"\(6, 4\)")),
    "too large": (torch.full_like(Y, 4), ("labels", r"0\.\.3", r"4\.\.4")),
    "negative": (Y - 10, ("labels", r"0\.\.3", "-10")),
    "another device": (Y.to("meta"), ("images are on cpu", "labels on meta")),
}


@everywhere
@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels(name, case):
    y, words = BAD_LABELS[case]
    with raises(*words):
        call(name, y=y)


@trainings
def test_validation_images_are_checked_before_training(objective):
    model = network("conv")
    before = [parameter.clone() for parameter in model.parameters()]
    with raises(r"images must lie in \[0, 1\]"):
        finetune(model, (X, Y), (2 * X, Y), configuration(objective))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """What a function makes of the logits of a good network."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = network("conv"), change

    def forward(self, x):
        return self.change(self.inner(x))


def with_value(value, after=0):
    """Logits in which one is replaced for the images of the batch from `after` on."""

    def change(logits):
        logits = logits.clone()
        logits[after:, 1] = logits[after:, 1] * 0 + value
        return logits

    return change


SHAPE_WORDS = (r"logits of shape \(b, classes\)",)
BAD_MODELS = {
    "no module": (lambda x: x, ("model", r"torch\.nn\.Module", "function")),
    "None": (None, ("model", r"torch\.nn\.Module", "NoneType")),
    "a class": (nn.Linear, ("model", r"torch\.nn\.Module", "type")),
    "tuple": (Lambda(lambda z: (z, z)), (*SHAPE_WORDS, "tuple")),
    "three dimensions": (Lambda(lambda z: z[:, :, None]), (*SHAPE_WORDS, r"\(1, 4, 1\)")),
    "one dimension": (Lambda(lambda z: z[:, 0]), (*SHAPE_WORDS, r"\(1,\)")),
    "sum over the batch": (Lambda(lambda z: z.sum(0)), (*SHAPE_WORDS, r"\(4,\)")),
    "two rows an image": (Lambda(lambda z: z.repeat(2, 1)), (*SHAPE_WORDS, r"\(2, 4\)")),
    "float32": (network("conv", dtype=torch.float32), ("model is torch.float32", "images are torch.float64")),
    "device": (network("conv").to("meta"), ("model is on meta", "images are on cpu")),
    "a buffer on another device": (
        nn.Sequential(network("conv"), nn.BatchNorm1d(4, affine=False).to("meta")),
        ("model is on cpu and meta", "images are on cpu"),
    ),
}


@everywhere
@pytest.mark.parametrize("case", BAD_MODELS)
def test_model(name, case):
    model, words = BAD_MODELS[case]
    with raises(*words):
        call(name, model=model)


@everywhere
@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError])
def test_an_error_inside_the_model_is_shown_as_it_is(name, kind):
    """Its own type, words and traceback; not as something that is wrong with the images."""
    error = kind("mine")

    def breaks(logits):
        raise error

    with pytest.raises(kind) as caught:
        call(name, model=Lambda(breaks))
    assert caught.value is error and error.__cause__ is None and error.__context__ is None
    assert caught.traceback[-1].name == "breaks"


@everywhere
def test_images_that_a_layer_of_the_model_refuses(name):
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 2 channels") as caught:
        call(name, model=network("conv", shape=(3, 3, 3)))
    assert not isinstance(caught.value, WdatError)


def test_an_error_inside_the_loss_the_rule_or_the_objective_is_shown_as_it_is():
    error = TypeError("mine")

    def breaks(*_):
        raise error

    for use in (
        lambda: wpgd(MODEL, X, Y, THREAT, loss=breaks),
        lambda: wpgd(MODEL, X, Y, THREAT, rule=breaks),
        lambda: finetune(network("conv"), (X, Y), None, FinetuneConfig(objective=breaks)),
        lambda: call("wdat", model=network("conv"), loss=breaks),
    ):
        with pytest.raises(TypeError) as caught:
            use()
        assert caught.value is error and caught.traceback[-1].name == "breaks"


def test_model_of_another_precision_than_float32_images():
    with raises("model is torch.float64", "images are torch.float32"):
        wpgd(MODEL, X.float(), Y, THREAT)


COARSE = [(torch.bfloat16, Threat(delta=8 / 255)), (torch.float16, Threat(delta=1 / 255))]


@pytest.mark.parametrize("dtype, threat", [*COARSE, *((torch.float32, threat) for _, threat in COARSE)])
def test_images_that_round_a_step_away(dtype, threat):
    """The step would leave them where they are, and the network would seem robust."""
    model = network("conv", dtype=dtype)
    x = X.to(dtype)
    config = FinetuneConfig(threat=threat, epochs=1, augment=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call_ in (
        lambda: wpgd(model, x, Y, threat),
        lambda: wpgd_budget(model, x, Y, threat, upsilon=1.0),
        lambda: finetune(model, (x, Y), None, config),
    ):
        if dtype == torch.float32:
            call_()
        else:
            with raises(f"images of {dtype} are too coarse for 20 steps of delta", "float32 images and model"):
                call_()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_is_as_coarse_as_it_is_for_a_pixel():
    """In l_2 a step of 0.025 leaves each of 3,072 pixels 0.0005."""
    x, threat = 0.5 + torch.rand(8, 3, 32, 32) / 2, Threat(p=INF, r=2, delta=0.5)
    model, y = network("conv", shape=(3, 32, 32), dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    with raises("images of torch.bfloat16 are too coarse for 20 steps of delta 0.5"):
        wpgd(model, x.bfloat16(), y, threat)
    wpgd(model, x.bfloat16(), y, threat, steps=1)


@pytest.mark.parametrize("p", [2, INF])
def test_the_projection_measures_what_16_bits_do_not_hold(p):
    x = torch.ones(2, 3, 224, 224, dtype=torch.float16)
    threat = Threat(p=p, r=1.02, delta=1.0)
    moved = project(x, 0 * x, threat)
    assert moved.dtype == x.dtype and torch.equal(moved, project(x.float(), 0 * x.float(), threat).half())
    assert float(moved.max()) < 1e-4
    with raises("x_adv is further from x than torch.float32 holds"):
        project(torch.full((2, 9), 3e38), torch.full((2, 9), -3e38), threat)


def test_a_network_without_gradients_by_its_kind_is_named():
    hard = Lambda(lambda x: nn.functional.one_hot(x.flatten(1).argmax(1) % 4, 4))
    with raises(r"must return logits of shape \(b, classes\); for one image it returned torch.int64 \(1, 4\)"):
        wpgd(hard, X, Y, THREAT)
    frozen = torch.jit.freeze(torch.jit.script(network("conv").eval()))
    with raises("the model is frozen TorchScript"):
        wpgd(frozen, X, Y, THREAT)


not_finite = pytest.mark.parametrize("value", [math.nan, INF, -INF])


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget"])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("loss", ["ce", "dlr", "redlr"])
@not_finite
def test_model_that_is_not_finite(name, loss, after, value):
    with raises("model", "NaN or infinite"):
        call(name, model=Lambda(with_value(value, after)), loss=loss)


@pytest.mark.parametrize("loss", ["ce", "dlr", "redlr"])
@not_finite
def test_sensitivity_of_a_model_that_is_not_finite(loss, value):
    with raises("model", "NaN or infinite"):
        sensitivity(Lambda(with_value(value)), X, Y, THREAT, loss=loss)


@not_finite
def test_evaluation_of_a_model_that_is_not_finite(value):
    with raises("model", "NaN or infinite"):
        evaluate(Lambda(with_value(value)), X, Y)


def test_model_whose_gradient_is_not_finite():
    model = Lambda(lambda z: z + (z - z.detach()).sqrt())  # finite, with an infinite slope
    for name in ATTACKS:
        with raises("gradient there is not finite"):
            call(name, model=model)


@attacks
def test_model_that_detaches_its_output(name):
    with raises("no gradient", "detach"):
        call(name, model=Lambda(lambda z: z.detach()))


@attacks
def test_model_that_turns_gradients_off(name):
    class Off(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return MODEL(x)

    with raises("no gradient", "no_grad"):
        call(name, model=Off())


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "sensitivity"])
@pytest.mark.parametrize("loss", ["dlr", "redlr"])
def test_two_classes_are_too_few_for_dlr(name, loss):
    model = network("linear", classes=2)
    with raises("3 classes", "2", "margin"):
        call(name, model=model, y=Y % 2, loss=loss)
    call(name, model=model, y=Y % 2, loss="margin")


@pytest.mark.parametrize("name", ["evaluate", *TRAININGS])
def test_two_classes_take_another_loss_than_the_default(name):
    """The error names an argument that exists: with it a network with two classes is evaluated and trained."""
    model = network("linear", classes=2)
    before = [parameter.clone() for parameter in model.parameters()]
    with raises("3 classes", "has 2", "take loss='margin'"):
        call(name, model=model, y=Y % 2, loss="redlr")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    result = call(name, model=model, y=Y % 2, loss="margin")
    if name == "evaluate":
        expected = wpgd(model, X, Y % 2, Threat(), loss="margin")
        assert result.w_2 == expected.accuracy and torch.equal(result.correct["w_2"], expected.correct)
    else:
        assert math.isfinite(result.epochs[0]["loss"])
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------

BAD_THREATS = [
    ({"p": 0.5}, ("p must be a number at least 1", "0.5")),
    ({"p": -2}, ("p must be a number at least 1", "-2")),
    ({"p": math.nan}, ("p must be a number at least 1", "nan")),
    ({"p": True}, ("p must be a number", "True")),
    ({"p": "inf"}, ("p must be a number", "inf")),
    ({"p": None}, ("p must be a number", "None")),
    ({"r": 1}, ("r must be a number above 1",)),
    ({"r": math.nan}, ("r must be a number above 1", "nan")),
    ({"r": "2"}, ("r must be a number", "'2'")),
    ({"delta": 0}, ("delta must be a number above 0", "0")),
    ({"delta": -0.1}, ("delta must be a number above 0", "-0.1")),
    ({"delta": math.nan}, ("delta must be a number above 0", "nan")),
    ({"delta": INF}, ("delta must be a number above 0", "inf")),
    ({"delta": "8/255"}, ("delta must be a number", "8/255")),
]


@pytest.mark.parametrize("fields, words", BAD_THREATS, ids=str)
def test_threat(fields, words):
    with raises(*map(re.escape, words)):
        Threat(**fields)


def test_threat_is_frozen():
    with pytest.raises(AttributeError):
        THREAT.delta = 1.0


@attacks
@pytest.mark.parametrize("value", [0, -1, True, 2.5, 2.0, "8", None])
def test_batch_size(name, value):
    with raises("batch_size must be a whole number", re.escape(repr(value))):
        call(name, batch_size=value)


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "evaluate"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "20"])
def test_steps(name, value):
    with raises("steps must be a whole number", re.escape(repr(value))):
        call(name, steps=value)


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, INF, True, "1"])
def test_step_ratio(name, value):
    with raises("step_ratio must be a number", re.escape(repr(value))):
        call(name, step_ratio=value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("random_start", 1.1, "random_start must be a number at least 0 and at most 1"),
        ("random_start", math.nan, "random_start must be a number"),
        ("seed", -1, "seed must be a whole number"),
        ("seed", 0.5, "seed must be a whole number"),
    ],
)
def test_where_an_attack_starts(name, value, message):
    with raises(message, re.escape(repr(value))):
        call("wpgd", **{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, INF, "1", None, torch.tensor(1.0)])
def test_upsilon(value):
    with raises("upsilon must be a number", re.escape(repr(value))):
        call("wpgd_budget", upsilon=value)


def test_evaluate_names_a_bad_delta():
    with raises("delta must be a number above 0"):
        evaluate(MODEL, X, Y, delta=0)


def test_evaluate_takes_no_random_start():
    """The clean accuracy would be that of the start."""
    with raises("clean accuracy", "no random_start"):
        evaluate(MODEL, X, Y, random_start=0.5)
    assert evaluate(MODEL, X, Y, random_start=0.0).clean == (predict(MODEL, X) == Y).double().mean().item()


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "sensitivity"])
@pytest.mark.parametrize("loss", ["cw", "CE", "", None, 3])
def test_loss_that_does_not_exist(name, loss):
    with raises("loss must be one of ce, dlr, redlr", re.escape(repr(loss))):
        call(name, loss=loss)


BAD_LOSSES = {
    "mean over the batch": nn.functional.cross_entropy,
    "sum over the batch": lambda z, y: ce(z, y).sum(),
    "a value a class": lambda z, y: z,
    "a column": lambda z, y: ce(z, y)[:, None],
    "tuple": lambda z, y: (ce(z, y),),
}


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "sensitivity"])
@pytest.mark.parametrize("case", BAD_LOSSES)
def test_loss_that_is_not_one_number_an_image(name, case):
    with raises("loss", "each image|one (number|value) (for each|an|per) image|shape"):
        call(name, loss=BAD_LOSSES[case])


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "sensitivity"])
def test_loss_that_detaches(name):
    with raises("no gradient"):
        call(name, loss=lambda z, y: ce(z.detach(), y))


@pytest.mark.parametrize("function", [wpgd, sensitivity])
@pytest.mark.parametrize("threat", [8 / 255, None, "W_2"])
def test_threat_that_is_none(function, threat):
    with raises("threat must be a Threat"):
        function(MODEL, X, Y, threat)


BAD_FINETUNE = [
    ({"objective": "madry"}, ("objective must be one of wdat, worst_case, trades, pgd", "'madry'")),
    ({"objective": 3}, ("objective must be one of wdat, worst_case, trades, pgd or a function", "3")),
    ({"objective": "trades"}, ('objective="trades" is pointwise', "threat=Threat(p=math.inf)")),
    ({"objective": "pgd", "threat": Threat(p=3)}, ('objective="pgd" is pointwise', "threat=Threat(p=math.inf)")),
    ({"nesterov": True}, ("nesterov needs a momentum above 0",)),
    ({"nesterov": 1, "momentum": 0.9}, ("nesterov must be True or False", "1")),
    ({"average": 1}, ("average must be a number at least 0 and below 1",)),
    ({"warm_up": 0}, ("warm_up must be a number above 0 and below 1",)),
    ({"warm_up": 1}, ("warm_up must be a number above 0 and below 1",)),
    ({"precision": "float16"}, ("precision must be one of float32, bfloat16", "'float16'")),
    ({"upsilon_from": "all"}, ("upsilon_from must be one of sample, batch", "'all'")),
    ({"compiled": "yes"}, ("compiled must be True or False", "'yes'")),
    ({"loss": "cw"}, ("loss must be one of ce, dlr, redlr", "'cw'")),
    ({"loss": None}, ("loss must be one of ce, dlr, redlr, margin or a function", "None")),
    ({"perturb": "all"}, ("perturb must be one of whole, last_layer, none", "'all'")),
    ({"consistency": "mse"}, ("consistency must be one of ce_detached, ce, kl", "'mse'")),
    ({"attack_label": "false"}, ("attack_label must be one of true, predicted", "'false'")),
    ({"attack_mode": True}, ("attack_mode must be one of eval, train", "True")),
    ({"update_mode": ""}, ("update_mode must be one of train, eval", "''")),
    ({"reinit": "he"}, ("reinit must be one of default, xavier", "'he'")),
    ({"head": 3}, ("head must be the name of a layer", "3")),
    ({"schedule": "step"}, ("schedule must be one of constant, cosine, one_cycle", "'step'")),
    ({"first_upsilon": 0}, ("first_upsilon must be one of sample, full", "0")),
    ({"threat": 8 / 255}, ("threat must be a Threat", "0.03")),
    ({"tau": 0}, ("tau must be a number above 0",)),
    ({"tau": math.nan}, ("tau must be a number above 0", "nan")),
    ({"tau": INF}, ("tau must be a number above 0", "inf")),
    ({"tau": "0.01"}, ("tau must be a number", "'0.01'")),
    ({"eta": 0}, ("eta must be a number above 0 and at most 1",)),
    ({"eta": 1.1}, ("eta must be a number above 0 and at most 1", "1.1")),
    ({"sample": 0}, ("sample must be a number above 0 and at most 1",)),
    ({"sample": 1.5}, ("sample must be a number above 0 and at most 1", "1.5")),
    ({"beta": -1}, ("beta must be a number at least 0", "-1")),
    ({"beta": INF}, ("beta must be a number at least 0", "inf")),
    ({"gamma": -0.1}, ("gamma must be a number at least 0", "-0.1")),
    ({"noise": -0.1}, ("noise must be a number at least 0", "-0.1")),
    ({"weight_decay": -1e-4}, ("weight_decay must be a number at least 0",)),
    ({"momentum": 1}, ("momentum must be a number at least 0 and below 1", "1")),
    ({"random_start": 1.1}, ("random_start must be a number at least 0 and at most 1", "1.1")),
    ({"steps": 0}, ("steps must be a whole number",)),
    ({"step_ratio": 0}, ("step_ratio must be a number above 0",)),
    ({"step_ratio": math.nan}, ("step_ratio must be a number above 0", "nan")),
    ({"epochs": 0}, ("epochs must be a whole number at least 1", "0")),
    ({"epochs": 2.0}, ("epochs must be a whole number", "2.0")),
    ({"batch_size": 0}, ("batch_size must be a whole number at least 1", "0")),
    ({"batch_size": True}, ("batch_size must be a whole number", "True")),
    ({"seed": -1}, ("seed must be a whole number at least 0", "-1")),
    ({"seed": 2**63}, ("seed must be a whole number", "below")),
    ({"seed": None}, ("seed must be a whole number", "None")),
    ({"batch_size": 2.5}, ("batch_size must be a whole number", "2.5")),
    ({"augment": 1}, ("augment must be True or False", "1")),
    ({"augment": "yes"}, ("augment must be True or False", "'yes'")),
]


@pytest.mark.parametrize("fields, words", BAD_FINETUNE, ids=str)
def test_finetune_config(fields, words):
    with raises(*map(re.escape, words)):
        FinetuneConfig(**fields)


@trainings
@pytest.mark.parametrize(
    "value, words",
    [
        (lambda logits: logits, r"scalar tensor, not \(6, 4\)"),
        (lambda logits: logits.mean(0), r"scalar tensor, not \(4,\)"),
        (lambda logits: logits.sum().item(), "scalar tensor, not float"),
        (lambda logits: None, "scalar tensor, not NoneType"),
        (lambda logits: logits.sum().detach(), "no parameter that is to be trained"),
    ],
)
def test_objective_that_gives_no_number_to_lower(objective, value, words):
    model = network("conv")
    before = [parameter.clone() for parameter in model.parameters()]
    fields = FROM_SCRATCH | {"objective": lambda batch: value(batch.net(batch.x)), "epochs": 1}
    with raises("the objective", words):
        finetune(model, (X, Y), None, FinetuneConfig(**fields))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "call_", [lambda batch, loss: batch.attack(THREAT, loss), lambda batch, loss: wpgd(MODEL, X, Y, THREAT, loss=loss)]
)
def test_objective_that_asks_for_a_loss_that_does_not_exist(call_):
    config = FinetuneConfig(objective=lambda batch: call_(batch, "cw"), epochs=1)
    with raises("loss must be one of ce, dlr, redlr", "'cw'"):
        finetune(network("conv"), (X, Y), None, config)


BAD_RULES = {
    "of the images": lambda g, before: g.flatten(1).sum(1),
    "of the first": lambda g, before: g[:1],
    "tuple": lambda g, before: (g, before),
    "None": lambda g, before: None,
}


@pytest.mark.parametrize("case", BAD_RULES)
def test_rule_that_gives_no_vector(case):
    with raises(r"the rule must return a tensor of shape \(6, 2, 3, 3\), not"):
        wpgd(MODEL, X, Y, THREAT, rule=BAD_RULES[case])


@pytest.mark.parametrize("name", ["rule", "progress"])
@pytest.mark.parametrize("value", ["momentum", 3, True])
def test_what_is_no_function(name, value):
    with raises(f"{name} must be a function", re.escape(repr(value))):
        wpgd(MODEL, X, Y, THREAT, **{name: value})


@not_finite
def test_rule_that_is_not_finite(value):
    with raises("NaN or infinite"):
        wpgd(MODEL, X, Y, THREAT, rule=lambda g, before: g * value)


def normalised():
    """BatchNorm of one value a channel, which in train mode takes no batch of one."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 4)).double()


@pytest.mark.parametrize("fields", [{"batch_size": 5}, {"batch_size": 1}, {"batch_size": 5, "objective": "trades"}])
def test_a_remainder_of_one_image_is_named_before_training(fields):
    model, seen = normalised(), []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = configuration(**({"objective": "wdat", "steps": 1, "epochs": 1} | fields))
    with raises("BatchNorm cannot train on a batch of one image", "choose a batch_size"):
        finetune(model, (X, Y), None, config)
    assert not any(seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 3},
        {"batch_size": 4},
        {"batch_size": 5, "perturb": "last_layer"},
        {"batch_size": 5, "update_mode": "eval"},
    ],
)
def test_no_remainder_of_one_image_trains(fields):
    finetune(normalised(), (X, Y), None, FinetuneConfig(**({"steps": 1, "epochs": 1} | fields)))


def test_a_remainder_of_one_image_matters_where_it_leaves_one_value_a_channel():
    config = FinetuneConfig(steps=1, epochs=1, batch_size=5)
    one = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)).double()
    with raises("BatchNorm cannot train on a batch of one image", "choose a batch_size"):
        finetune(one, (X, Y), None, config)
    nine = nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(18, 4)).double()
    assert finetune(nine, (X, Y), None, config).finished


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 3},  # the sample of Upsilon is one image
        {"batch_size": 3, "sample": 0.7},  # it is four
        {"batch_size": 5, "sample": 1.0, "update_mode": "eval"},
    ],
)
def test_one_image_that_is_attacked_in_train_mode_is_named_before_training(fields):
    config = FinetuneConfig(steps=1, epochs=1, attack_mode="train", **fields)
    with raises("BatchNorm", "one image"):
        finetune(normalised(), (X, Y), None, config)


@trainings
def test_augmentation_needs_images_with_height_and_width(objective):
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), network("conv"))
    with raises("augment"):
        finetune(model, (X.flatten(1), Y), None, configuration(objective, epochs=1, steps=1))


def test_perturb():
    with raises("how must be one of whole, last_layer", "'half'"):
        perturb_(network(), "half")
    with raises("reinit must be one of default, xavier", "'he'"):
        perturb_(network(), "last_layer", reinit="he")
    for noise in (-0.1, math.nan, INF):
        with raises("noise must be a number at least 0"):
            perturb_(network(), "whole", noise=noise)
    convolutional = nn.Sequential(Centre(), nn.Conv2d(2, 4, 3), nn.Flatten())
    with raises("which layer gives the logits", "head", "x, images", "'1'"):
        perturb_(convolutional, "last_layer")
    for head in ("fc", "", 3, [1], True):
        with raises("head must name a linear or convolutional layer", re.escape(repr(head)), "'1'"):
            perturb_(convolutional, "last_layer", head=head)
    for x in ("an image", 3, [X]):
        with raises("x, images"):
            perturb_(convolutional, "last_layer", x=x)
    with raises("needs a linear or convolutional layer"):
        perturb_(nn.Sequential(nn.Flatten(), nn.LayerNorm(18)), "last_layer", x=X)
    assert len(perturb_(convolutional, "whole")) == 2


def test_a_last_layer_that_computes_its_weight_is_named():
    """A weight drawn anew would be computed once more from what it was before."""
    model = network("mlp")
    nn.utils.parametrizations.weight_norm(model[-1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fields in ({"x": X}, {"head": "4"}):
        with raises("last layer computes its weight", "weight_norm", "remove that"):
            perturb_(model, "last_layer", **fields)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# What is no error
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p, r", [(2, INF), (INF, INF), (2, 2), (1.5, 3)])
def test_no_image_classified_correctly_is_no_error(p, r):
    """ReDLR then has nothing to do: accuracy is the clean accuracy 0, and the images stay."""
    wrong, threat = (predict(MODEL, X) + 1) % 4, Threat(p, r, 0.05)
    for attack in (wpgd(MODEL, X, wrong, threat), wpgd_budget(MODEL, X, wrong, threat, upsilon=1.0)):
        assert (attack.accuracy, attack.loss, attack.distance) == (0, 0, 0)
        assert torch.equal(attack.x_adv, X)
        assert attack.history == {"accuracy": [0] * 21, "loss": [0] * 21, "upsilon": [0] * 20}
    assert sensitivity(MODEL, X, wrong, threat) == 0
    scores = evaluate(MODEL, X, wrong)
    assert (scores.clean, scores.w_inf, scores.w_2) == (0, 0, 0)


def test_no_model_meets_an_empty_batch():
    """Under ReDLR images drop out; a model that cannot reshape an empty batch never sees one."""

    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network("mlp")

        def forward(self, x):
            assert len(x)
            return self.body(x.view(len(x), -1).view(x.shape))

    model = Reshaping()
    x, _ = images(6, model)
    y = (predict(model, x) + 1) % 4
    attack = wpgd(model, x, y, Threat())
    assert attack.accuracy == 0 and torch.equal(attack.x_adv, x)


@trainings
def test_training_starts_also_where_no_image_is_classified_correctly(objective):
    model = network("conv")
    wrong = (predict(model, X) + 1) % 4
    config = configuration(objective, epochs=2, steps=2, batch_size=4)
    history = finetune(model, (X, wrong), (X, wrong), config)
    assert all(math.isfinite(row["loss"]) for row in history.epochs)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_constant_model_is_attacked_in_vain():
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :4] + torch.tensor([0.0, 3.0, 1.0, 2.0], dtype=x.dtype)

    for p, r, loss in ((2, INF, "redlr"), (2, 2, "ce"), (INF, 2, "dlr")):
        attack = wpgd(Constant(), X, Y, Threat(p, r, 0.05), loss=loss)
        assert torch.equal(attack.x_adv, X) and attack.distance == 0


def test_one_image_is_enough():
    for p in (1.5, 2, INF):
        attack = wpgd(MODEL, X[:1], Y[:1], Threat(p, delta=0.05), loss="ce", steps=1)
        assert attack.distance == pytest.approx(0.05, rel=1e-12) or not 0 < attack.x_adv.min() < 1


@pytest.mark.parametrize("r, delta", [(INF, 1e-12), (2, 1e-12), (INF, 1.0), (2, 1e3)])
def test_extreme_radii(r, delta):
    attack = wpgd(MODEL, X, Y, Threat(r=r, delta=delta), loss="ce")
    assert 0 < attack.distance <= delta * (1 + 1e-3)
    assert attack.x_adv.isfinite().all()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("p of 1.001 or more, not 1", lambda batch: batch.attack(Threat(p=1, delta=0.2), "ce")),
        ("p of 1.001 or more, not 1", lambda batch: batch.look(batch.x, batch.y, Threat(p=1), "ce")),
        ("threat must be a Threat, not None", lambda batch: batch.attack(None, "ce")),
    ],
)
def test_a_minibatch_is_attacked_under_the_threats_that_wpgd_takes(words, call):
    config = FinetuneConfig(objective=lambda batch: call(batch).sum(), epochs=1, steps=1, augment=False)
    with raises(words):
        finetune(network("conv"), (X, Y), None, config)


@pytest.mark.parametrize("x", [X[:0], X.byte(), X.to_sparse(), X.to("meta"), X[0, 0, 0]])
def test_what_cannot_show_the_last_layer_is_named(x):
    with pytest.raises(WdatError):
        perturb_(network("conv"), "last_layer", x=x)


def test_a_model_without_values_is_asked_for_the_name_of_its_last_layer():
    model = network("mlp").to("meta")
    with raises("on the device meta", "give head", "'4'"):
        perturb_(model, "last_layer", x=X)
    assert perturb_(model, "last_layer", head="4")[0].is_meta


def test_two_classes_of_one_image_do_not_tell_the_last_layer():
    """Two points lie on a line, whichever layer they are of; more images tell."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.by = nn.Linear(12, 2), torch.randn(2, 2, generator=torch.Generator().manual_seed(0))

        def forward(self, x):
            return self.inner(x).tanh() @ self.by

    for n in (1, 8):
        with raises("no layer is plainly the one that gives the logits"):
            perturb_(Turned(), "last_layer", x=torch.rand(n, 12))


def test_there_is_no_accuracy_without_distances():
    empty = Boundary(torch.empty(0))
    for call in (
        lambda: empty.accuracy(Threat()),
        empty.curve,
        lambda: empty.interval(Threat()),
        lambda: empty.price(Threat()),
    ):
        with raises("there are no distances"):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Networks that would seem robust, or that cannot be attacked as they are
# ---------------------------------------------------------------------------------------------------------------------


class Blind(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return 2 * x

    @staticmethod
    def backward(_, __):
        return None


@everywhere
@pytest.mark.parametrize("function", [Blind.apply, torch.Tensor.detach])
def test_a_gradient_that_does_not_reach_the_images_is_named(name, function):
    """Taken for 0, it would leave every image where it is."""
    with raises("no gradient comes from the loss to the images", "quantisation"):
        call(name, model=Lambda(function))
    with raises("no gradient comes from the loss to the images"):
        boundary(Lambda(function), X, Y)


@everywhere
def test_probabilities_are_no_logits(name):
    model = nn.Sequential(network("conv"), nn.Softmax(1))
    with raises("returns probabilities", "leave out its softmax", "logarithm"):
        call(name, model=model)
    call(name, model=nn.Sequential(network("conv"), nn.LogSoftmax(1)))


def test_a_radius_in_bytes_is_named():
    with raises("delta must be at most 1 for r = inf, not 8", "8 / 255"):
        Threat(delta=8)
    assert Threat(r=2.0, delta=8).delta == 8 and Threat(delta=1).delta == 1


@everywhere
def test_a_model_made_in_inference_mode_is_named_and_stays_as_it_is(name):
    with torch.inference_mode():
        model = network("conv")
    with raises("made in inference mode"):
        call(name, model=model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_without_a_size_are_named():
    with raises("lazy layers", "run it once"):
        wpgd(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), X.float(), Y, THREAT)


def test_a_copy_of_a_scripted_network_is_named():
    scripted = torch.jit.trace(network("conv"), X)
    attack = wpgd(scripted, X, Y, THREAT)
    assert torch.equal(attack.x_adv, wpgd(network("conv"), X, Y, THREAT).x_adv)
    with raises("computed from another", "TorchScript", "load the model again"):
        wpgd(copy.deepcopy(scripted), X, Y, THREAT)


def test_a_loss_that_writes_into_its_labels_changes_none_of_the_callers():
    def writes(logits, y):
        own = nn.functional.one_hot(y, 4)
        y.zero_()
        return -(logits.log_softmax(1) * own).sum(1)

    y = Y.clone()
    assert y.any()
    attack, plain = (wpgd(MODEL, X, y, THREAT, loss=loss) for loss in (writes, "ce"))
    assert torch.equal(y, Y)
    assert attack.accuracy == plain.accuracy and torch.equal(attack.x_adv, plain.x_adv)


def test_images_of_another_kind_are_told_what_makes_them_tensors():
    with raises("not ndarray", "torch.from_numpy"):
        wpgd(MODEL, X.numpy(), Y, THREAT)
    with raises("not torch.uint8", "divide bytes by 255"):
        wpgd(MODEL, (255 * X).byte(), Y, THREAT)
    with raises("some pixels are NaN"):
        wpgd(MODEL, X * math.nan, Y, THREAT)


@pytest.mark.parametrize(
    "kept, words",
    [
        (lambda loss: {"mine": loss}, ("memory holds lists", "'mine'")),
        (lambda loss: {"mine": loss.item()}, ("memory holds lists", "'mine'", "float")),
        (lambda loss: {"upsilon": [loss.item()]}, ("'upsilon'", "a scalar tensor")),
        (lambda loss: {"upsilon": [loss.expand(2)]}, ("'upsilon'", "a scalar tensor")),
    ],
)
def test_what_an_objective_cannot_keep_is_named_in_the_first_minibatch(kept, words):
    def objective(batch):
        loss = ce(batch.net(batch.x), batch.y).mean()
        batch.memory.update(kept(loss.detach()))
        return loss

    model = network("conv")
    before = copy.deepcopy(model.state_dict())
    with raises(*words):
        finetune(model, (X, Y), None, FinetuneConfig(objective=objective, epochs=1, augment=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_name_that_is_too_long_is_named(tmp_path):
    long = tmp_path / ("x" * 300)
    with raises("could not be written|cannot be read"):
        finetune(network("conv"), (X, Y), None, configuration("wdat", epochs=1, steps=1, augment=False), resume=long)
    with raises("folder must be a folder that is there"):
        wpgd(MODEL, X, Y, THREAT, folder=long)


def test_no_hook_stays_where_a_check_is_interrupted():
    model = network("full")
    x, y = images(7, model)

    def stop(_, __):
        raise KeyboardInterrupt

    calls = []
    handle = model.register_forward_pre_hook(lambda m, z: stop(m, z) if len(calls) > 1 else calls.append(1))
    with pytest.raises(KeyboardInterrupt):
        finetune(model, (x, y), None, configuration("wdat", epochs=1, steps=1, batch_size=6))
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# What used to end deep inside, or was refused though it is right
# ---------------------------------------------------------------------------------------------------------------------


def scripted():
    """A network whose layers TorchScript has made its own."""
    model = network("conv")
    return torch.jit.script(nn.Sequential(nn.Flatten(1, 3), nn.Unflatten(1, (2, 3, 3)), *[*model][1:]))


def test_a_scripted_network_has_no_average_and_no_last_layer():
    train = (X, Y)
    with raises("average needs a copy of the model, and TorchScript gives none", "torch.jit.script"):
        finetune(scripted(), train, None, FinetuneConfig(threat=THREAT, steps=1, epochs=1, average=0.5))
    for error in (
        lambda: perturb_(scripted(), "last_layer", x=X),
        lambda: finetune(scripted(), train, None, FinetuneConfig(perturb="last_layer", threat=THREAT, epochs=1)),
    ):
        with raises("TorchScript does not say what its layers are: give the model before torch.jit.script"):
            error()
    history = finetune(scripted(), train, None, FinetuneConfig(threat=THREAT, steps=1, epochs=1, augment=False))
    assert history.finished


@pytest.mark.parametrize("use", ["attack", "look"])
def test_two_classes_under_redlr_are_named_in_an_objective_of_one_s_own_too(use):
    model = network("mlp", classes=2)
    data = images(6, model, classes=2)

    def objective(batch):
        if use == "attack":
            batch.attack(THREAT, "redlr")
        batch.look(batch.x, batch.y, THREAT, "redlr")

    with raises("DLR and ReDLR need 3 classes or more, the model has 2: take loss='margin'"):
        finetune(model, data, None, FinetuneConfig(objective=objective, loss="ce", augment=False, threat=THREAT))


def test_numbers_of_numpy_and_fractions_are_numbers():
    one = {"steps": np.int64(3), "batch_size": np.int32(4), "step_ratio": np.float32(1.5)}
    threat = Threat(p=np.float32(2), r=np.float64(INF), delta=Fraction(1, 20))
    plain = {"steps": 3, "batch_size": 4, "step_ratio": 1.5}
    assert [type(value) for value in (threat.p, threat.r, threat.delta)] == [float] * 3

    def same(a, b):
        assert torch.equal(a.x_adv, b.x_adv)

    start = {"random_start": np.float32(0.5), "seed": np.int64(3)}
    same(wpgd(MODEL, X, Y, threat, **one, **start), wpgd(MODEL, X, Y, THREAT, **plain, random_start=0.5, seed=3))
    same(
        wpgd_budget(MODEL, X, Y, threat, upsilon=np.float64(0.7), **one),
        wpgd_budget(MODEL, X, Y, THREAT, upsilon=0.7, **plain),
    )
    found = boundary(MODEL, X, Y, r=np.float64(2), steps=np.int64(5), batch_size=np.int64(4))
    same(found, boundary(MODEL, X, Y, r=2, steps=5, batch_size=4))
    same(found, boundary(MODEL, [(X, Y)], r=np.float32(2), steps=np.uint8(5), batch_size=np.int64(4)))
    assert found.curve(np.float64(2))[1].equal(found.curve(2)[1])
    assert type(Boundary(found.distance, np.float64(2)).r) is float
    found = evaluate(MODEL, X, Y, delta=np.float64(0.05), steps=np.int64(2), found_steps=np.int64(2))
    assert found.w_2_found == evaluate(MODEL, X, Y, delta=0.05, steps=2, found_steps=2).w_2_found
    config = FinetuneConfig(threat=threat, seed=np.int64(7), tau=np.float32(0.5), epochs=np.int16(1), steps=np.int64(1))
    assert [type(value) for value in (config.seed, config.tau, config.epochs)] == [int, float, int]
    assert repr(config) == repr(FinetuneConfig(threat=threat, seed=7, tau=0.5, epochs=1, steps=1))
    assert finetune(network("conv"), (X, Y), None, config, eval_batch_size=np.int64(4)).finished
    perturb_(network("conv"), "whole", noise=np.float32(0.1))


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(2.0), np.array(2), torch.tensor(2), "2", 2 + 0j])
def test_what_is_no_whole_number_is_none(value):
    with raises("steps must be a whole number"):
        wpgd(MODEL, X, Y, THREAT, steps=value)


def test_a_checkpoint_after_every_epoch_alone_is_asked_for_by_infinite_seconds(tmp_path):
    config = configuration("wdat", threat=THREAT, steps=1, epochs=2, augment=False)
    assert finetune(network("conv"), (X, Y), None, config, resume=tmp_path / "run", save_every=INF).finished
    assert (tmp_path / "run").is_file()
    with raises("save_every must be a number at least 0"):
        finetune(network("conv"), (X, Y), None, config, resume=tmp_path / "other", save_every=math.nan)


@pytest.mark.parametrize("call", [wpgd, wpgd_budget, boundary])
def test_progress_that_returns_nothing_is_named(call):
    more = {wpgd: (THREAT,), wpgd_budget: (THREAT,), boundary: ()}[call]
    options = {"upsilon": 1.0} if call is wpgd_budget else {}
    with raises("progress must return what it is given, as tqdm does; it returned NoneType"):
        call(MODEL, X, Y, *more, progress=lambda things: None, **options)


def test_evaluate_names_an_option_that_it_has_not():
    with raises("evaluate has no step, stps: it takes what wpgd takes"):
        evaluate(MODEL, X, Y, step=3, stps=3)


def test_a_batch_norm_without_statistics_of_its_own_is_named():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18, track_running_stats=False), nn.Linear(18, 4)).double()
    with raises("normalises by the statistics of the batch in eval mode too", "track_running_stats=True"):
        wpgd(model, X, Y, THREAT)

    class Own(nn.Module):
        def forward(self, x):
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        wpgd(nn.Sequential(Own(), nn.Linear(1, 1).double()), X, Y, THREAT)


def test_batches_where_images_belong_are_named_as_such():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=3)
    with raises("images must be a floating-point tensor", "DataLoader: put the images into one tensor; only boundary"):
        evaluate(MODEL, loader, Y)
    with raises("from_numpy makes one of an array"):
        evaluate(MODEL, X.numpy(), Y)


def test_an_image_alone_is_told_how_to_be_a_batch():
    with raises(r"labels must have shape \(2,\), one for each image, not \(1,\): .* one alone is x\[None\]"):
        wpgd(MODEL, X[0], Y[:1], THREAT)


@pytest.mark.parametrize("objective", ["worst_case", worst_case, "trades", "pgd"])
def test_a_pointwise_term_where_the_objective_has_none_is_named(objective):
    threat = THREAT if objective in ("worst_case", worst_case) else Threat(p=INF)
    with raises('objective="(worst_case|trades|pgd)" has no pointwise term beside its own: leave gamma out'):
        FinetuneConfig(objective=objective, threat=threat, gamma=1.0)


class Rounded(nn.Module):
    def forward(self, x):
        return (255 * x).round() / 255


@pytest.mark.parametrize("loss", ["redlr", "margin", "ce", "dlr"])
def test_a_network_that_rounds_its_images_is_named_and_does_not_seem_robust(loss):
    model = nn.Sequential(Rounded(), network("conv"))
    y = predict(model, X)
    config = FinetuneConfig(threat=THREAT, loss=loss, batch_size=5)
    for use in (
        lambda: wpgd(model, X, y, THREAT, loss=loss),
        lambda: wpgd(model, X, y, THREAT, loss=loss, rule=lambda gradient, before: before + gradient),
        lambda: wpgd_budget(model, X, y, THREAT, upsilon=1.0, loss=loss, batch_size=4),
        lambda: sensitivity(model, X, y, THREAT, loss=loss),
        lambda: evaluate(model, X, y, loss=loss),
        lambda: boundary(model, X, y, steps=5),
        lambda: boundary(model, [(X, y)], steps=5, keep=False),
        lambda: boundary(model, X, torch.cat([y[:4], (y[4:] + 1) % 4]), steps=5, batch_size=2),
        lambda: finetune(model, (X, y), None, config),
        lambda: finetune(model, (X, y), None, replace(config, objective="trades", threat=Threat(p=INF))),
    ):
        with raises(
            "is 0 at every image, though the model tells images apart: remove the rounding or the quantisation"
        ):
            use()


class Steep(nn.Module):
    def forward(self, x):
        return 1e6 * x


def test_a_saturated_loss_is_named_where_no_image_has_a_gradient():
    model = nn.Sequential(network("conv"), Steep())
    y = predict(model, X)
    for use in (lambda: wpgd(model, X, y, THREAT, loss="ce"), lambda: evaluate(model, X, y)):
        with raises("the gradient of the loss ce is 0 .*: the loss is saturated, since the logits move: take another"):
            use()
    assert wpgd(model, X, y, THREAT, loss="dlr").distance > 0


def test_a_network_whose_units_are_off_at_the_images_is_not_said_to_round_and_is_trained():
    model = network("mlp")
    first = next(part for part in model.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        first.weight.copy_(-first.weight.abs())
        first.bias.fill_(1e-3)
    bright = 0.75 + X / 4  # where each unit is off
    y = predict(model, bright)
    with raises("all of the model is off or saturated at these images, as it is not elsewhere: give other images"):
        wpgd(model, bright, y, THREAT)
    assert wpgd(model, torch.cat([bright, 1 - bright]), torch.cat([y, y]), THREAT, loss="ce").distance > 0
    assert finetune(model, (bright, y), None, FinetuneConfig(threat=THREAT, batch_size=5, epochs=1)).finished


def test_a_buffer_that_is_many_numbers_in_one_is_named_before_training():
    model = network("conv")
    model.register_buffer("scale", torch.ones(1, dtype=torch.float64).expand(4))
    with raises(r"scale of the model is expanded, many of its numbers are one: give the model a clone\(\) of it"):
        finetune(model, (X, Y), None, FinetuneConfig(threat=THREAT, batch_size=5, epochs=1))


def test_a_buffer_that_grows_is_averaged_too():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network("conv")
            self.register_buffer("means", torch.zeros(0, dtype=torch.float64))
            self.register_buffer("last", None)

        def forward(self, x):
            z = self.inner(x)
            if self.training:
                self.means, self.last = torch.cat([self.means, z.detach().mean()[None]]), z.detach().mean(0)
            return z

    model, alone = Growing(), Growing()
    config = FinetuneConfig(threat=THREAT, batch_size=5, epochs=2)
    finetune(model, (X, Y), None, replace(config, average=0.5))
    finetune(alone, (X, Y), None, config)
    assert len(model.means) == len(alone.means) > 2 and model.last.shape == (4,)
    assert not torch.equal(model.inner[1].weight, alone.inner[1].weight)


def test_a_network_that_says_the_same_of_all_images_is_robust():
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4).double())
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.arange(4.0).flip(0))
    zeros = torch.zeros_like(Y)
    assert wpgd(model, X, zeros, THREAT).accuracy == 1 == evaluate(model, X, zeros).w_2
    assert sensitivity(model, X, zeros, THREAT) == 0
    assert boundary(model, X, zeros, steps=3).accuracy(THREAT) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Threat(delta=Fraction(1, 10**400)),
        lambda: Threat(r=1 + Fraction(1, 10**30)),
        lambda: Threat(p=10**5000),
        lambda: Threat(delta=-(10**5000)),
        lambda: FinetuneConfig(momentum=1 - Fraction(1, 10**30)),
        lambda: FinetuneConfig(seed=10**5000),
        lambda: FinetuneConfig(steps=-(10**5000)),
    ],
)
def test_numbers_that_no_float_holds_are_out_of_range(make):
    with raises("must be a (whole )?number"):
        make()


@pytest.mark.filterwarnings("error")
def test_a_float32_of_numpy_overflows_nothing():
    assert Threat(delta=np.float32(0.03)).delta == pytest.approx(0.03)


def test_a_path_that_no_file_can_have_is_named(tmp_path):
    config = configuration("wdat", threat=THREAT, steps=1, epochs=1, augment=False)
    for path in ("\udcff\ud800", tmp_path / ("x" * 300)):
        with raises("resume must be the path of a file|could not be written|cannot be read"):
            finetune(network("conv"), (X, Y), None, config, resume=path)


def test_code_that_is_none_has_no_digest(tmp_path):
    (tmp_path / "words").write_text("These are words.")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    for path in (tmp_path / "words", tmp_path / "bytes", 3.5):
        with raises("the code cannot be read"):
            code_digest(path)


def test_a_rule_that_stays_where_it_is_is_its_author_s():
    attack = wpgd(MODEL, X, Y, THREAT, rule=lambda gradient, before: torch.zeros_like(gradient))
    assert attack.distance == 0 and torch.equal(attack.x_adv, X)
