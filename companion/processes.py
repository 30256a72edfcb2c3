"""One run on many devices: what companion adds to the `group` of wdat_core when torchrun starts it.

    torchrun --nproc-per-node 2 -m companion table4 -p tau 0.01

Every process does the same work on its own part of the images; the first one looks into runs/ for all of them, and
writes records, checkpoints and words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from companion.files import one_line
from companion.settings import ParameterError
from wdat_core import Attack, Images


@contextmanager
def joined() -> Iterator[None]:
    """The processes that torchrun started find each other; of a process alone nothing changes.

    Raises:
        ParameterError: they do not.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        raise ParameterError(
            f"the processes do not find each other: start them by torchrun ({one_line(error)})"
        ) from error
    yield
    dist.destroy_process_group()  # not after an error: the others may wait, and are ended by torchrun


def group() -> Any:
    """What wdat_core takes for `group`: all processes, or None where this one is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def count() -> int:
    return dist.get_world_size() if group() else 1


def is_first() -> bool:
    return not group() or dist.get_rank() == 0


def of_first(look: Callable[[], Any]) -> Any:
    """What the first process sees, for all of them: where each looked for itself, they could part."""
    if not group():
        return look()
    seen = [look() if is_first() else None]
    with _answered():
        dist.broadcast_object_list(seen)
    return seen[0]


@contextmanager
def _answered() -> Iterator[None]:
    """What torch.distributed says where a process does not answer, in words."""
    try:
        yield
    except RuntimeError as error:
        raise ParameterError(
            f"another process does not answer or has ended: see what it said ({one_line(error)})"
        ) from error


def part(n: int, size: int = 1) -> slice:
    """Which of n images are this process's: whole batches of a size."""
    batches = -(-n // size)
    ends = [min(n, size * (batches * rank // count())) for rank in (_rank(), _rank() + 1)]
    return slice(*ends)


def _rank() -> int:
    return dist.get_rank() if group() else 0


def shared_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch statistics of all processes' images, where they are on GPUs: for a CPU torch has none."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if group() and device.type == "cuda" else model


def own(images: Images) -> Images:
    x, y = images
    rows = part(len(y))
    return x[rows], y[rows]


def gathered(own: Tensor) -> Tensor:
    """The parts of all processes, in their order, where this one's is."""
    if not group():
        return own
    parts: list[Any] = [None] * count()
    with _answered():
        dist.all_gather_object(parts, own.cpu())
    return torch.cat(parts).to(own.device)


def whole(attack: Attack) -> Attack:
    """An attack whose tensors are of all images, from those of the parts."""
    if not group():
        return attack
    tensors: dict[str, Any] = {name: gathered(getattr(attack, name)) for name in ("x_adv", "correct", "was_correct")}
    return replace(attack, **tensors)
