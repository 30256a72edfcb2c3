"""What is timed, and what it is compared with: passes through the network and nothing else, and the published way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.architectures import WideResNet, channels_last, new_stand_in
from companion.data import embedded, floats
from companion.networks import load_network
from wdat_core import Threat, project, redlr, wpgd

STEPS = 20  # of every attack, as in the paper
DELTA = 8 / 255


class UnavailableError(Exception):
    """Why something cannot be timed here."""


# ---------------------------------------------------------------------------------------------------------------------
# Subjects: a network with its images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network in eval mode whose parameters ask for no gradient, and the images it is timed on, on one device."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def first(self, n: int) -> Subject:
        return Subject(self.name, self.model, self.x[:n], self.y[:n])


def demo(images: int, device: torch.device, part: str = "test", network: str = "demo") -> Subject:
    """A stand-in on embedded images; each is random, and called so, where its library is not installed."""
    try:
        model = load_network(network, Path()).model
    except ImportError:
        return random_subject(network, lambda: new_stand_in(network), images, device)
    try:
        x, y = (t[:images] for t in embedded(part))
    except ImportError:
        return _subject(f"{network} (random images)", model, _random_images(images), None, device)
    return _subject(network, model, x, y, device)


def random_subject(name: str, make: Callable[[], nn.Module], images: int, device: torch.device) -> Subject:
    """A network with random weights on random images, always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = channels_last(make())
    return _subject(f"{name} (random weights)", model, _random_images(images), None, device)


def _random_images(n: int) -> Tensor:
    return torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def _subject(name: str, model: nn.Module, x: Tensor, y: Tensor | None, device: torch.device) -> Subject:
    """Without labels they are the network's own answers, so that ReDLR has something to attack."""
    model = model.to(device).eval().requires_grad_(False)
    x = floats(x).to(device)
    if y is None:
        with torch.no_grad():
            y = torch.cat([model(xb).argmax(1) for xb in x.split(256)])
    return Subject(name, model, x, y.to(device))


def wide(name: str, images: int, device: torch.device) -> Subject:
    """WRN-depth-widen."""
    depth, widen = map(int, name.split("-")[1:])
    return random_subject(name, lambda: WideResNet(depth, widen), images, device)


def attacked(subject: Subject, batch_size: int, *, p: float = 2, loss: str = "ce", **options: Any) -> float:
    """The accuracy under our attack; with CE it skips no image."""
    threat = Threat(p=p, delta=DELTA)
    return wpgd(
        subject.model, subject.x, subject.y, threat, loss=loss, batch_size=batch_size, **{"steps": STEPS, **options}
    ).accuracy


# ---------------------------------------------------------------------------------------------------------------------
# Passes: what a piece of work asks of the network, and the same again with nothing around it
# ---------------------------------------------------------------------------------------------------------------------

Pass = tuple[int, str]  # how many images; the gradient wanted: "input", "parameters" or "none"


class _Logged(nn.Module):
    """A network that notes every pass through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.log: list[Pass] = []
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        self.log.append((len(x), "input" if x.requires_grad else "parameters" if trained else "none"))
        return self.model(x)


def passes_of(model: nn.Module, work: Callable[[nn.Module], Any]) -> list[Pass]:
    """The passes that `work` makes through the network that it is given."""
    logged = _Logged(model)
    work(logged)
    return logged.log


def every_pass(images: int, batch_size: int, steps: int = STEPS) -> list[Pass]:
    """The passes of an attack that leaves nothing out: the gradient of every image at each step, a last look at all."""
    sizes = [min(batch_size, images - i) for i in range(0, images, batch_size)]
    return [(size, "input") for size in sizes] * steps + [(size, "none") for size in sizes]


def gradients(passes: Sequence[Pass]) -> int:
    """How many images' gradients in the input these passes give."""
    return sum(size for size, gradient in passes if gradient == "input")


def replay(subject: Subject, passes: Sequence[Pass]) -> None:
    """These passes and nothing else, on the images of the subject in turn.

    Neighbouring passes for the parameters are one update: train mode, one backward pass, one step of SGD at rate 0. The
    network's batch statistics change with it.
    """
    model, place = subject.model, 0

    def loss(size: int, gradient: bool) -> tuple[Tensor, Tensor]:
        nonlocal place
        place = 0 if place + size > len(subject.x) else place
        rows = slice(place, place + size)
        place += size
        x = subject.x[rows].detach().requires_grad_(gradient)
        return x, F.cross_entropy(model(x), subject.y[rows], reduction="sum")

    for gradient, group in itertools.groupby(passes, key=lambda p: p[1]):
        sizes = [size for size, _ in group]
        if gradient == "input":
            for size in sizes:
                x, value = loss(size, True)
                torch.autograd.grad(value, x)
        elif gradient == "none":
            with torch.no_grad():
                for size in sizes:
                    loss(size, False)
        else:
            model.train().requires_grad_(True)
            optimiser = torch.optim.SGD(model.parameters(), 0.0)
            torch.stack([loss(size, False)[1] for size in sizes]).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The published way
# ---------------------------------------------------------------------------------------------------------------------


def published_way(subject: Subject, *, batch_size: int = 32, steps: int = STEPS) -> tuple[float, float]:
    """The (W_2, l_inf) attack with ReDLR, organised as the authors' implementation of 2023.

    The set stays on the host. Every step takes each batch to the device and its gradient back, updates and projects the
    whole set on the host, and looks at all images once more for the accuracy and the loss of the iterate.

    Returns:
        The accuracy under attack, the lowest over the iterates, and the loss of that iterate.
    """
    model, device, threat = subject.model, subject.x.device, Threat(delta=DELTA)
    x, y = subject.x.cpu(), subject.y.cpu()
    x_adv, batches = x.clone(), [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    iterates = []
    for _ in range(steps):
        gradient = torch.empty_like(x)
        for rows in batches:
            xb = x_adv[rows].to(device).requires_grad_()
            value = redlr(model(xb), y[rows].to(device))
            gradient[rows] = torch.autograd.grad(value.sum(), xb)[0].cpu()
        norm = gradient.abs().sum((1, 2, 3))
        share = norm / norm.square().mean().sqrt().clamp(min=1e-30)
        x_adv += DELTA / steps * share[:, None, None, None] * gradient.sign()
        x_adv = project(x_adv, x, threat).clamp(0, 1)
        correct, loss = 0, 0.0
        with torch.no_grad():
            for rows in batches:
                yb = y[rows].to(device)
                logits = model(x_adv[rows].to(device))
                correct += int((logits.argmax(1) == yb).sum())
                loss += float(redlr(logits, yb).sum())
        iterates.append((correct / len(x), loss / len(x)))
    return min(iterates)
