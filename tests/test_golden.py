"""The attack gives what the authors' published 2023 implementation gave, in float64, on one small network.

`golden/official_wpgd.json` holds its numbers and their definitions.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wdat_core import LOSSES, Threat, sensitivity, wpgd

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = json.loads((GOLDEN / "official_wpgd.json").read_text(encoding="utf-8"))
CLEAN = {name: OFFICIAL["clean"][name] for name in ("CE", "DLR", "ReDLR")}


def number(value):
    return math.inf if value == "inf" else value


def name_of(attack):
    return "W{p}-l{r} {delta:.3f} {loss} {steps}x{ratio}".format(**attack)


@pytest.fixture(scope="module")
def model():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    ).double()
    with np.load(GOLDEN / "tiny_net.npz", allow_pickle=False) as weights:
        network.load_state_dict({name: torch.from_numpy(weights[name]).double() for name in weights})
    return network


@pytest.fixture(scope="module")
def data():
    with np.load(GOLDEN / "cifar10_test_256.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["images"]).double() / 255, torch.from_numpy(file["labels"]).long()


@pytest.mark.parametrize("official", OFFICIAL["attacks"], ids=name_of)
def test_attack(model, data, official):
    x, y = data
    p, r = number(official["p"]), number(official["r"])
    attack = wpgd(
        model,
        x,
        y,
        Threat(p, r, official["delta"]),
        loss=official["loss"].lower(),
        steps=official["steps"],
        step_ratio=official["ratio"],
        batch_size=100,
    )
    ill_conditioned = official["loss"] == "DLR"
    assert attack.history["accuracy"][0] == CLEAN[official["loss"]]["acc"]
    assert attack.accuracy == official["acc_min"]
    assert max(attack.history["loss"][1:]) == pytest.approx(
        official["loss_max"], rel=0, abs=1e-3 if ill_conditioned else 1e-6
    )
    assert attack.distance == pytest.approx(official["w_p"], rel=0, abs=1e-6)
    first = torch.linalg.vector_norm((attack.x_adv - x)[:8], r, (1, 2, 3))
    assert first.tolist() == pytest.approx(official["first_8_distances"], rel=0, abs=1e-6)
    assert attack.x_adv.sum().item() == pytest.approx(
        official["x_adv_sum"], rel=0, abs=1e-3 if ill_conditioned else 1e-4
    )


@pytest.mark.parametrize("r, s", [(math.inf, 1), (2, 2)])
@pytest.mark.parametrize("p, q", [(math.inf, 1), (2, 2)])
@pytest.mark.parametrize("loss", CLEAN)
def test_sensitivity(model, data, loss, p, q, r, s):
    threat = Threat(p, r)
    assert (threat.q, threat.s) == (q, s)
    upsilon = sensitivity(model, *data, threat, loss=loss.lower(), batch_size=100)
    assert upsilon == pytest.approx(CLEAN[loss][f"upsilon_q{q}_s{s}"], rel=1e-9, abs=0)


@pytest.mark.parametrize("loss", CLEAN)
def test_clean_loss(model, data, loss):
    """The mean of the loss over all images, and over those misclassified (the file's `loss_cond`)."""
    x, y = data
    with torch.no_grad():
        logits = model(x)
    value, correct = LOSSES[loss.lower()](logits, y), logits.argmax(1) == y
    assert correct.double().mean().item() == CLEAN[loss]["acc"]
    assert value.mean().item() == pytest.approx(CLEAN[loss]["loss"], rel=1e-9, abs=0)
    assert value[~correct].mean().item() == pytest.approx(CLEAN[loss]["loss_cond"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("p", [math.inf, 2, 1.5])
def test_gradient_norms(model, data, p):
    """The sensitivity of one image is the norm of its gradient, whatever p."""
    x, y = data
    norms = [sensitivity(model, x[i : i + 1], y[i : i + 1], Threat(p), loss="redlr") for i in range(8)]
    assert norms == pytest.approx(OFFICIAL["clean"]["first_8_grad_l1_ReDLR"], rel=1e-9, abs=0)
