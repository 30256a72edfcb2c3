"""What only a GPU can show: how near the attack comes to the card's rate, how long the paper's training would take."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import DELTA, STEPS, Subject, attacked, demo, wide
from benchmarks.races import ROUGH, SPEED, Contestant, Lap, Row, compare, contest, row_of, timed
from wdat_core import FinetuneConfig, Threat, finetune

PAPER_IMAGES, PAPER_BATCH, PAPER_EPOCHS, PAPER_SAMPLE = 40_000, 512, 20, 4000  # Section 6 of the paper
MATRIX, PRODUCTS = 8192, 20  # rows and columns of the matrices, and how many products, that give the card's rate
ATTACK, RATE = "W_2 attack, CE", "its arithmetic as bfloat16 matrix products"
NO_GPU = "needs a GPU: python make.py benchmark on a machine with one"


def throughput(device: torch.device, rounds: int) -> dict[str, Any]:
    """How near the attack comes to the card's bfloat16 rate, and how long the paper's fine-tuning would take on it."""
    rows, found = [], {}
    for network in ("demo", "WRN-28-10", "WRN-34-10"):
        for precision in ("float32", "float32 with TF32", "bfloat16"):
            for compiled in (False, True):
                way = precision + ", compiled" * compiled
                about = {"group": "Share of the card's rate", "precision": way}
                if device.type != "cuda":
                    about |= {"network": network, "reason": NO_GPU}
                    rows.append(row_of(ATTACK, RATE, SPEED, None, **about))
                    continue
                subject = demo(1000, device) if network == "demo" else wide(network, PAPER_BATCH, device)
                options = {"precision": precision.split()[0], "compiled": compiled}
                with tf32("TF32" in way):
                    row, found[f"{network}, {way}"] = on_the_card(subject, rounds, options)
                rows.append(row | about)
                torch.compiler.reset()
                torch.cuda.empty_cache()
    return {"rows": rows, "throughput": found}


def on_the_card(subject: Subject, rounds: int, options: dict[str, Any]) -> tuple[Row, dict[str, float]]:
    """The attack's share of the card's rate, and the figures of attack and training in one precision, compiled or not.

    The attacker's loss is CE, with which no image is skipped: how many could be depends on the weights, and most are
    random here. An iteration takes Upsilon from all the images; the projection adds what the paper's sample has more.
    """
    x, y, device, n = subject.x, subject.y, subject.x.device, len(subject.x)
    batch = min(PAPER_BATCH, n)
    about: dict[str, Any] = {"threat": Threat(delta=DELTA), "steps": STEPS, "loss": "ce"}
    config = FinetuneConfig(**about, epochs=1, batch_size=batch, sample=1.0, **options)
    operations = n * operations_of_an_image(subject)
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    peaks: dict[str, float] = {}

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b

    def rate() -> Lap:
        share, lap = operations / (PRODUCTS * 2 * MATRIX**3), timed(products, device)()
        return Lap(lap.wall * share, lap.cpu * share)

    def train() -> None:
        finetune(copy.deepcopy(subject.model), (x, y), None, config, eval_batch_size=batch)

    def watched(name: str, contestant: Contestant) -> Contestant:
        def lap() -> Lap:
            torch.cuda.reset_peak_memory_stats(device)
            done = contestant()
            peaks[name] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
            return done

        return lap

    contestants = {
        RATE: rate,
        ATTACK: watched(ATTACK, timed(partial(attacked, subject, batch, **options), device)),
        "training": watched("training", timed(train, device)),
    }
    done = contest(contestants, [(ATTACK, RATE)], device, within=ROUGH, rounds=rounds)
    figures = {}
    if ATTACK in done.laps:
        seconds = done.seconds(ATTACK)
        figures["images_per_second"] = round(n / seconds, 1)
        figures["tflop_per_second"] = round(operations / seconds / 1e12, 2)
        figures["attack_gib"] = peaks[ATTACK]
    if "training" in done.laps:
        iteration = done.seconds("training") / math.ceil(n / batch)
        gradient = done.seconds(ATTACK) / (n * STEPS)
        iterations = PAPER_EPOCHS * math.ceil(PAPER_IMAGES / PAPER_BATCH)
        figures["iteration_seconds"] = round(iteration, 4)
        figures["training_gib"] = peaks["training"]
        figures["projected_minutes"] = round(iterations * (iteration + (PAPER_SAMPLE - n) * gradient) / 60, 1)
    return compare(done, ATTACK, RATE, SPEED, network=subject.name, images=n, batch_size=batch), figures


def operations_of_an_image(subject: Subject) -> int:
    """Of its gradients at every step and the look at the end, as torch counts them, products and sums apart."""
    x, y = subject.x[:1].clone().requires_grad_(), subject.y[:1]  # the counter wants backward(), and cannot do grad()
    with FlopCounterMode(display=False) as gradient:
        F.cross_entropy(subject.model(x), y).backward()
    with FlopCounterMode(display=False) as look, torch.no_grad():
        subject.model(x)
    return STEPS * gradient.get_total_flops() + look.get_total_flops()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be computed in TF32."""
    kinds: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = allowed
        yield
    finally:
        for kind, was in zip(kinds, before, strict=True):
            kind.allow_tf32 = was
