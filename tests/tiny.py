"""Tiny networks, images, labels and runs for the tests, and W-PGD once more, as plainly as it can be written."""

import contextlib
import math

import torch
from torch import nn

from wdat_core import FinetuneConfig, Threat, _named

INF = math.inf
SHAPE = (2, 3, 3)  # of an image, unless a test says otherwise
PIXELS = math.prod(SHAPE)

# What a run from scratch is given beside its objective.
FROM_SCRATCH = {
    "perturb": "none",
    "threat": Threat(p=INF, delta=0.05),
    "loss": "ce",
    "tau": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "schedule": "one_cycle",
}
STARTS = {"wdat": {}, "worst_case": {}, "trades": FROM_SCRATCH, "pgd": FROM_SCRATCH}


def configuration(objective, **fields):
    """How the objective of that name is trained, but for the fields given: from scratch, except for Algorithm 1."""
    return FinetuneConfig(**(STARTS.get(objective, {}) | {"objective": objective} | fields))


class Centre(nn.Module):
    """Images in [0, 1] to values around 0, so that random networks do not answer one class for all."""

    def forward(self, x):
        return 8 * (x - 0.5)


def network(kind="mlp", classes=4, dtype=torch.float64, seed=0, shape=SHAPE):
    """A random network in eval mode; "mlp" has ReLU, "smooth" tanh, "full" BatchNorm and Dropout."""
    channels, pixels = shape[0], math.prod(shape)
    with seeded(seed):
        body = {
            "linear": lambda: [nn.Flatten(), nn.Linear(pixels, classes)],
            "conv": lambda: [
                nn.Conv2d(channels, 4, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(4 * pixels // channels, classes),
            ],
            "mlp": lambda: [nn.Flatten(), nn.Linear(pixels, 16), nn.ReLU(), nn.Linear(16, classes)],
            "smooth": lambda: [nn.Flatten(), nn.Linear(pixels, 16), nn.Tanh(), nn.Linear(16, classes)],
            "full": lambda: [
                nn.Conv2d(channels, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Flatten(),
                nn.Dropout(0.3),
                nn.Linear(4 * pixels // channels, classes),
            ],
        }[kind]()
    return nn.Sequential(Centre(), *body).to(dtype).eval()


def images(n, model, classes=4, dtype=torch.float64, seed=0, low=0.0, high=1.0, shape=SHAPE):
    """`n` random images, and labels of which the model gets about 3 in 4 right."""
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)
    x = x.to(dtype)
    guess = torch.randint(classes, (n,), generator=generator)
    y = torch.where(torch.rand(n, generator=generator) < 0.66, predict(model, x), guess)
    return x, y


@torch.no_grad()
def predict(model, x):
    return model(x).argmax(1)


@contextlib.contextmanager
def seeded(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def lengths(move, r):
    """The l_r norm of each image."""
    return move.flatten(1).norm(r, dim=1)


def mean(values, p):
    """(mean_i v_i^p)^(1/p)."""
    return values.max() if p == INF else values.pow(p).mean().pow(1 / p)


def conjugate(p):
    return 1.0 if p == INF else p / (p - 1)


def reference_step(model, x, x_adv, y, p, r, loss, alpha, delta):
    """One step of W-PGD, every image looked at, every quantity formed anew; the new iterate and Upsilon."""
    q, s = conjugate(p), conjugate(r)
    z = x_adv.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(z), y).sum(), z)
    size = lengths(gradient, s)
    upsilon = mean(size, q)
    if upsilon == 0:
        return x_adv, upsilon
    scale = torch.where(size > 0, size ** (q - s), 0).view(-1, 1, 1, 1)
    h = gradient.sign() * gradient.abs() ** (s - 1) * scale / upsilon ** (q - 1)
    move = x_adv + alpha * h - x
    distance = lengths(move, r)
    budget = distance.clamp(max=delta) if p == INF else distance * (delta / mean(distance, p)).clamp(max=1)
    if r == INF:
        limit = budget.view(-1, 1, 1, 1)
        move = torch.minimum(torch.maximum(move, -limit), limit)
    else:
        move = move * (budget / torch.where(distance > 0, distance, 1)).view(-1, 1, 1, 1)
    return (x + move).clamp(0, 1), upsilon


def reference_wpgd(model, x, y, p, r, delta, loss, steps, ratio):
    """The iterates x_0..x_steps of W-PGD and the Upsilon of x_0..x_(steps-1)."""
    iterates, upsilons = [x], []
    for _ in range(steps):
        x_adv, upsilon = reference_step(model, x, iterates[-1], y, p, r, loss, ratio * delta / steps, delta)
        iterates.append(x_adv)
        upsilons.append(upsilon.item())
    return iterates, upsilons


def named(value):
    """What decides a run in an objective, by name."""
    return _named({("objective",): value})
