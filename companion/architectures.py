"""The architectures: of the stand-ins, of the networks that others published as plain files, and of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.settings import STAND_INS, ParameterError


class SmallResNet(nn.Module):
    """A residual network for small images: a stride-2 stem, then a block for each width, all but the first halving.

    Input (b, 3, h, w) in [0, 1], output logits (b, classes).
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(_Block(a, b, stride=2 if i else 1) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(_normed(self.stem, self.norm, x)))
        return self.head(x.mean((2, 3)))


class PatchResNet(nn.Module):
    """A residual network whose first pixels are patches of 4 x 4: a stem, then a block for each width.

    Where an image shrinks, four neighbours become one pixel of four times the channels and a 1 x 1 convolution brings
    these to the next width: every convolution has stride 1, whose gradient a CPU computes faster. Input
    (b, 3, h, w) in [0, 1], h and w multiples of 2^(1 + number of widths); output logits (b, classes).
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * 4**2, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(_Block(widths[0], widths[0], stride=1))
        for width_in, width in pairwise(widths):
            self.blocks.append(nn.PixelUnshuffle(2))
            self.blocks.append(nn.Conv2d(4 * width_in, width, 1, bias=False))
            self.blocks.append(_Block(width, width, stride=1))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(_normed(self.stem, self.norm, F.pixel_unshuffle(x, 4))))
        return self.head(x.mean((2, 3)))


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)). In eval mode the norm is affine and goes into the kernel, which saves passes over the images."""
    if norm.training:
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    kernel, shift = conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
    return F.conv2d(x, kernel, shift, conv.stride, conv.padding)  # type: ignore[arg-type]


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(_normed(self.conv1, self.norm1, x))
        return F.relu(_normed(self.conv2, self.norm2, y) + self.skip(x))


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko and Komodakis (2016), WRN-depth-widen, as RobustBench has it.

    Input (b, 3, h, w) in [0, 1], output logits (b, classes); the depth is 6 k + 4 for k blocks in each of three groups.
    """

    def __init__(self, depth: int, widen: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ParameterError(f"the depth of a wide residual network is 10, 16, 22, 28, ..., not {depth!r}")
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, width_in = [], 16
        for group in range(3):
            width = 16 * widen * 2**group
            for i in range((depth - 4) // 6):
                blocks.append(_WideBlock(width_in, width, stride=2 if group and i == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width_in)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _WideBlock(nn.Module):
    """Normalisation and ReLU come before each convolution; a block that changes the width projects after them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.skip is None else self.skip(active))


class Normalised(nn.Sequential):
    """Layers that see (x - mean) / std, channel by channel, where x in [0, 1] goes in."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)  # no part of a weights file
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) / self.std)


def cnn_a() -> nn.Module:
    """CNN-A of Dathathri et al. (2020), untrained: (b, 3, 32, 32) in [0, 1] to 10 logits."""
    return Normalised(
        [125.3 / 255, 123.0 / 255, 113.9 / 255],
        [63.0 / 255, 62.1 / 255, 66.7 / 255],
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def new_stand_in(name: str) -> nn.Module:
    """A stand-in with untrained weights, drawn from the global generator."""
    architecture, widths = STAND_INS[name]
    return channels_last({"SmallResNet": SmallResNet, "PatchResNet": PatchResNet}[architecture](widths))


def channels_last(model: nn.Module) -> nn.Module:
    """The layout in which convolutions are fastest, on CPUs and GPUs; `Module.to` is typed without it."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
