"""Attacks of other libraries on the subject that ours run on: bounded for each image (p = inf), or of minimum norm.

Run as a program, by a Python that has the libraries, it answers questions: a line of JSON on stdin, a line on stdout.
So the peers keep to an environment of their own, and are timed in turn with ours without the time of starting them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.baselines import DELTA, STEPS, Subject, UnavailableError, demo, gradients, passes_of
from companion.files import one_line

Attacker = Callable[[Tensor, Tensor], Tensor]


def foolbox(model: nn.Module, device: torch.device) -> Attacker:
    """LinfPGD, which looks at the attacked images once more to say which are misclassified."""
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    wrapped = PyTorchModel(model, bounds=(0, 1), device=device)
    attack = LinfPGD(abs_stepsize=DELTA / STEPS, steps=STEPS, random_start=False)
    return lambda x, y: attack(wrapped, x, y, epsilons=DELTA)[1]


def torchattacks(model: nn.Module, device: torch.device) -> Attacker:
    """PGD."""
    from torchattacks import PGD

    return PGD(model, eps=DELTA, alpha=DELTA / STEPS, steps=STEPS, random_start=False)


def pyautoattack(model: nn.Module, device: torch.device) -> Attacker:
    """APGD on the cross-entropy, one start: random, with a gradient more than steps, for images it sees correct."""
    from pyautoattack.autopgd_base import APGDAttack

    return APGDAttack(model, n_iter=STEPS, norm="Linf", eps=DELTA, n_restarts=1, loss="ce", device=device).perturb


def adv_lib(model: nn.Module, device: torch.device, steps: int) -> Attacker:
    """FMN (Pintor et al., 2021) for the norm l_inf; it projects in place, in vain where images are channels_last."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom")).__dict__.setdefault("Visdom", None)  # shows curves
    from adv_lib.attacks import fmn

    return lambda x, y: fmn(model, x.contiguous(), y, norm=math.inf, steps=steps)


def foolbox_fmn(model: nn.Module, device: torch.device, steps: int) -> Attacker:
    """FMN of foolbox, for the norm l_inf."""
    from foolbox import PyTorchModel
    from foolbox.attacks.fast_minimum_norm import LInfFMNAttack

    wrapped = PyTorchModel(model, bounds=(0, 1), device=device)
    attack = LInfFMNAttack(steps=steps)
    return lambda x, y: attack.run(wrapped, x, y)


PEERS = {attack.__name__: attack for attack in (foolbox, torchattacks, pyautoattack)}
NEAREST = {attack.__name__: attack for attack in (adv_lib, foolbox_fmn)}


def nearest(name: str, subject: Subject, batch_size: int, steps: int) -> dict[str, Any]:
    """How far a peer's minimum-norm attack finds each image from an error: "distance", inf where what it returns is
    classified correctly, 0 where the image itself is not; the "gradients" it took, its "version".

    Raises:
        UnavailableError: its library is not installed.
    """
    x, y = subject.x, subject.y
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    found: list[Tensor] = []

    def work(model: nn.Module) -> None:
        try:
            attack = NEAREST[name](model, x.device, steps)
        except ImportError as error:
            raise UnavailableError(f"{name.split('_fmn')[0]} is not installed ({one_line(error)})") from error
        found.extend(attack(xb, yb).detach() for xb, yb in batches)

    passes = passes_of(subject.model, work)
    distance = []
    with torch.no_grad():
        for (xb, yb), found_b in zip(batches, found, strict=True):
            far = (found_b - xb).flatten(1).abs().amax(1)
            far[subject.model(found_b).argmax(1) == yb] = math.inf
            far[subject.model(xb).argmax(1) != yb] = 0
            distance += far.tolist()
    version = metadata.version(name.split("_fmn")[0])
    return {"distance": distance, "gradients": gradients(passes), "version": version}


def run(name: str, subject: Subject, batch_size: int) -> dict[str, Any]:
    """A peer's attack on the subject: its "wall" and "cpu" seconds, the "gradients" it took, the "accuracy" it leaves,
    its "version".

    Raises:
        UnavailableError: its library is not installed.
    """
    x, y, device = subject.x, subject.y, subject.x.device
    attacked: list[Tensor] = []
    seconds: dict[str, float] = {}

    def work(model: nn.Module) -> None:
        try:
            attack = PEERS[name](model, device)
        except ImportError as error:
            raise UnavailableError(f"{name} is not installed ({one_line(error)})") from error
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        attacked.extend(attack(xb, yb) for xb, yb in zip(x.split(batch_size), y.split(batch_size), strict=True))
        synchronise(device)
        seconds.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)

    passes = passes_of(subject.model, work)
    with torch.no_grad():
        correct = [subject.model(xb).argmax(1) == yb for xb, yb in zip(attacked, y.split(batch_size), strict=True)]
    return {
        **seconds,
        "gradients": gradients(passes),
        "accuracy": torch.cat(correct).float().mean().item(),
        "version": metadata.version(name),
    }


def synchronise(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def worker(python: str, subject: Subject, batch_size: int) -> Iterator[Callable[..., dict[str, Any]]]:
    """`run` in another Python: a function from a peer's name to what `run` returns there, or raises. With the `steps`
    of a minimum-norm attack it is `nearest` there.

    Between two questions the other Python waits, and takes no time of the processor.
    """
    question = {
        "network": subject.name,
        "images": len(subject.x),
        "batch_size": batch_size,
        "device": str(subject.x.device),
        "threads": torch.get_num_threads(),
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    try:
        process = subprocess.Popen([python, __file__], **pipes)
    except OSError as error:
        raise UnavailableError(f"the Python of the peers does not start ({one_line(error)})") from error

    def ask(name: str, steps: int | None = None) -> dict[str, Any]:
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"peer": name, "steps": steps, **question}), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise UnavailableError(f"the Python of the peers stopped with exit code {process.wait()}")
        found = json.loads(answer)
        if "reason" in found:
            raise UnavailableError(found["reason"])
        return found

    try:
        yield ask
    finally:
        process.communicate()


def answer_questions() -> None:
    """One question after the other, until stdin is closed."""
    subject = None
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        for line in sys.stdin:
            question = json.loads(line)
            if subject is None:
                torch.set_num_threads(question["threads"])
                network = question["network"].split()[0]  # without what is said of it
                subject = demo(question["images"], torch.device(question["device"]), network=network)
            try:
                answer = answer_to(question, subject)
            except UnavailableError as error:
                answer = {"reason": str(error)}
            except Exception as error:  # a fault of a foreign library must not end the benchmark
                answer = {"reason": f"it failed ({one_line(error)})"}
            print(json.dumps(answer), file=answers, flush=True)


def answer_to(question: dict[str, Any], subject: Subject) -> dict[str, Any]:
    if subject.name != question["network"]:
        raise UnavailableError(f"pillow or safetensors is not installed: {subject.name} in place of the network")
    if question["steps"] is not None:
        return nearest(question["peer"], subject, question["batch_size"], question["steps"])
    return run(question["peer"], subject, question["batch_size"])


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        answer_questions()
