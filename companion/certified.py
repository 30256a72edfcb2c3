"""Certified l_inf distances of plain convolutional networks: how far no image at all is read otherwise.

An attack finds a misread image, and so bounds the distance to the nearest one from above. Here it is bounded from
below, by CROWN (Zhang et al., 2018, arXiv 1811.00866): a ReLU lies between two lines wherever its input can be, and
with lines in place of every ReLU the margin z_y - z_j is at least an affine function of the image, whose least value
over a box is known in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.architectures import Normalised
from companion.settings import ParameterError

HANDLED = (
    "what is certified is a chain, nn.Sequential or Normalised, of Conv2d (without groups, dilation, or padding with"
    " other than zeros), ReLU, Flatten and Linear, which ends in a Linear"
)
Pair = tuple[int, int]
Lines = tuple[Tensor, Tensor, Tensor]  # low, high, lift, each (b, c, h, w): low z <= relu(z) <= high z + lift


def certified_distances(
    model: nn.Module, x: Tensor, y: Tensor, *, most: float = 16 / 255, bisections: int = 8, batch_size: int = 2
) -> Tensor:
    """For each image a radius within which no image in [0, 1] is read otherwise, in l_inf: float64 (n,), in [0, most].

    It is the largest one found by bisection, a multiple of most / 2^bisections, and has itself been certified. It is 0
    where the image is misclassified as it is. The true distance may be larger.

    What holds, in exact arithmetic with the weights as they are stored: everywhere within the radius z_y exceeds every
    other logit, and by more than 16 roundings of the greatest logit of the image in the precision of the weights. That
    is what `wdat_core.boundary` calls the rounding of the network as it runs; the bounds are computed in float64, and
    what rounding can do there is taken off.

    Args:
        model: a chain of the layers in `HANDLED`: (n, c, h, w) or (n, d) to logits (n, m).
        x: images, floating point, in [0, 1].
        y: labels (n,), int64.
        most: the largest radius that is tried, in (0, 1].
        bisections: how often the interval from 0 to `most` is halved, >= 1.
        batch_size: images that are bounded at once; on a CPU few are faster.

    Raises:
        ParameterError: names the layer that is not handled, or what is wrong with the images, labels or a parameter.
    """
    _check(x, y, most, bisections, batch_size)
    with torch.inference_mode(False), torch.no_grad():
        chain = _chain(model, x[:batch_size].clone())
        if int(y.min()) < 0 or int(y.max()) >= chain.classes:
            raise ParameterError(
                f"labels must lie in 0..{chain.classes - 1}, these span {int(y.min())}..{int(y.max())}"
            )
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([_bisected(chain, *part, most, bisections) for part in parts])


def _bisected(chain: _Chain, x: Tensor, y: Tensor, most: float, bisections: int) -> Tensor:
    """The radii (b,) of images."""
    home = x.device
    x, y = _as_maps(x).to(chain.mean.device, torch.float64), y.to(chain.mean.device)
    z = chain.logits(x)
    rounding = chain.rounding * z.abs().amax(1)
    own = F.one_hot(y, chain.classes).bool()
    right = z[own] - z.masked_fill(own, -torch.inf).amax(1) > rounding
    low, high = torch.zeros_like(rounding), torch.full_like(rounding, most)
    rows, radius = right.nonzero()[:, 0], high
    for _ in range(bisections + 1):
        if not len(rows):
            break
        holds = (
            _margins(chain, x[rows], y[rows], radius[rows]).amin(1) > rounding[rows]
        )  # False where it is not a number
        low[rows[holds]], high[rows[~holds]] = radius[rows[holds]], radius[rows[~holds]]
        rows, radius = rows[low[rows] < most], (low + high) / 2
    return low.to(home)


def _check(x: Any, y: Any, most: Any, bisections: Any, batch_size: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (2, 4) or not x.numel():
        kind = f"{x.dtype}, {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ParameterError(f"images must be a floating-point tensor (n, c, h, w) or (n, d), not {kind}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ParameterError(f"images must lie in [0, 1], these span [{x.min():.4g}, {x.max():.4g}]")
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        kind = f"{y.dtype}, {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ParameterError(f"labels must be an int64 tensor ({len(x)},), one for each image, not {kind}")
    if isinstance(most, bool) or not isinstance(most, int | float) or not 0 < most <= 1:
        raise ParameterError(f"most must lie in (0, 1], in pixel units, not be {most!r}")
    for name, value in (("bisections", bisections), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ParameterError(f"{name} must be a whole number, 1 or more, not {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The network as a chain of convolutions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """An affine layer as a convolution; a Linear is one whose kernel is as large as what it is given."""

    weight: Tensor  # (o, c, kh, kw), float64
    bias: Tensor  # (o,), float64
    stride: Pair
    padding: Pair
    relu: bool = False  # whether one follows
    slack: float = 0.0  # what rounding can do to a bound of its values, see `_slack`

    def __call__(self, z: Tensor) -> Tensor:
        """(b, c, h, w) to (b, o, h', w'), before the ReLU."""
        return F.conv2d(z, self.weight, self.bias, self.stride, self.padding)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the values, from bounds of what the layer is given."""
        middle, reach = self((lower + upper) / 2), (upper - lower) / 2
        reach = F.conv2d(reach, self.weight.abs(), None, self.stride, self.padding)
        return middle - reach, middle + reach


@dataclass(frozen=True)
class _View:
    """For each place of a layer the patch of an earlier map that its values depend on."""

    kernel: Pair
    stride: Pair
    padding: Pair

    @classmethod
    def of(cls, layer: _Layer) -> _View:
        """Of what the layer is given."""
        return cls((layer.weight.shape[2], layer.weight.shape[3]), layer.stride, layer.padding)

    def through(self, layer: _Layer) -> _View:
        """The same in the map that the layer is given, where this is in the map that it returns."""
        (height, width), stride, padding = self.kernel, layer.stride, layer.padding
        tall, wide = layer.weight.shape[2:]
        return _View(
            ((height - 1) * stride[0] + tall, (width - 1) * stride[1] + wide),
            (self.stride[0] * stride[0], self.stride[1] * stride[1]),
            (self.padding[0] * stride[0] + padding[0], self.padding[1] * stride[1] + padding[1]),
        )

    def patches(self, z: Tensor) -> Tensor:
        """(b, c, h, w) to (b, p, 1, c, kh, kw) for p places; 0 outside the map."""
        columns = F.unfold(z, self.kernel, padding=self.padding, stride=self.stride)
        return columns.mT.unflatten(2, (z.shape[1], *self.kernel))[:, :, None]


@dataclass(frozen=True)
class _Chain:
    mean: Tensor  # (c, 1, 1), of the images
    std: Tensor
    layers: list[_Layer]
    rounding: float  # of logits, relative to the greatest, in the precision of the weights

    @property
    def classes(self) -> int:
        return len(self.layers[-1].bias)

    def normal(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def logits(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, m)."""
        z = self.normal(x)
        for layer in self.layers:
            z = layer(z).relu() if layer.relu else layer(z)
        return z.flatten(1)


def _chain(model: nn.Module, x: Tensor) -> _Chain:
    """The network for images (n, c, h, w), in float64, looked at to see that it is the same network.

    Raises:
        ParameterError: it has a layer that is not handled, or one at another place; or does not take the images.
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    modules = list(_in_order(model))
    known = next((t for t in [*model.parameters(), *model.buffers()]), x)
    to: dict[str, Any] = {"dtype": torch.float64, "device": known.device}
    largest = torch.ones(1, *_as_maps(x).shape[1:], **to)  # of any image; what is said of it at `_slack`
    mean, std, flat = torch.zeros(1, 1, 1, **to), torch.ones(1, 1, 1, **to), x.ndim == 2
    layers: list[_Layer] = []
    for place, module in enumerate(modules):
        kind, unlike = type(module), f"{HANDLED}; layer {place + 1} is {' '.join(str(module).split())}"
        if kind is Normalised and not place and not flat:
            mean, std = module.mean.to(**to), module.std.to(**to)
            largest = largest * (1 + mean.abs()) / std
        elif kind is nn.ReLU and layers:
            layers[-1] = replace(layers[-1], relu=True)
        elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif (kind is nn.Linear and flat) or (kind is nn.Conv2d and not flat and _plain(module)):
            weight = module.weight.detach().to(**to)
            bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(**to)
            stride, padding = ((1, 1), (0, 0)) if flat else (module.stride, module.padding)
            try:
                weight = weight.unflatten(1, largest.shape[1:]) if flat else weight
                largest = F.conv2d(largest, weight.abs(), bias.abs(), stride, padding)
            except RuntimeError as error:  # a size that is not the layer's
                raise ParameterError(f"the network does not take images of shape {tuple(x.shape[1:])}") from error
            layer = _Layer(weight, bias, stride, padding)
            layers.append(replace(layer, slack=_slack(layer, layers, largest.max().item())))
        elif kind is not nn.Identity:
            raise ParameterError(unlike)
    if not layers or not flat or layers[-1].relu or largest.shape[2:] != (1, 1) or largest.shape[1] < 2:
        raise ParameterError(f"{HANDLED} of 2 classes or more; this one ends otherwise")
    if not (std > 0).all():
        raise ParameterError(f"the standard deviations of Normalised must be above 0, not {std.flatten().tolist()}")
    chain = _Chain(mean, std, layers, 16 * torch.finfo(known.dtype).eps)
    _compare(model, chain, x.to(known.device, known.dtype))
    return chain


def _in_order(module: nn.Module) -> Iterator[Any]:
    """The layers of a chain, those of chains within it too; a Normalised comes before its own."""
    if type(module) is not nn.Sequential:  # a subclass may do anything
        yield module
    if type(module) in (nn.Sequential, Normalised):
        for part in module.children():
            yield from _in_order(part)


def _plain(conv: nn.Conv2d) -> bool:
    ours = (conv.groups, conv.dilation, conv.padding_mode) == (1, (1, 1), "zeros")
    return ours and not isinstance(conv.padding, str)


def _compare(model: nn.Module, chain: _Chain, x: Tensor) -> None:
    """Hooks, for one, can make a network of something else than its layers."""
    theirs, ours = model(x), chain.logits(_as_maps(x).double())
    if not ours.isfinite().all():
        raise ParameterError("the logits of the network are not finite")
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        raise ParameterError(f"{HANDLED}; this one returns something else than its last layer")
    if not (theirs - ours).abs().max() <= 0.01 * ours.abs().max():  # far above rounding, TF32's too; and not NaN
        raise ParameterError(
            f"{HANDLED}; this one returns other logits than its layers give, so it has hooks or the like"
        )


def _as_maps(x: Tensor) -> Tensor:
    """(n, c, h, w) as it is, (n, d) as (n, d, 1, 1)."""
    return x if x.ndim == 4 else x[:, :, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------------------------------


def _margins(chain: _Chain, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Lower bounds (b, m - 1) of z_y - z_j, for each class j other than y, over boxes around images (b, c, h, w).

    The box is that of all images in [0, 1] within l_inf distance `radius` (b,).
    """
    radius = radius.view(-1, 1, 1, 1)
    lower, upper = chain.normal((x - radius).clamp(min=0)), chain.normal((x + radius).clamp(max=1))
    box, lines = ((lower + upper) / 2, (upper - lower) / 2), list[Lines]()
    *inner, last = chain.layers
    for place, layer in enumerate(inner):
        lower, upper = layer.interval(lower, upper)
        if place:  # of the first layer the interval is exact
            rows, constant = torch.cat([layer.weight, -layer.weight]), torch.cat([layer.bias, -layer.bias])
            least = _least(rows[None, None], constant, _View.of(layer), inner[:place], lines, box)
            least, most = least.mT.unflatten(2, lower.shape[2:]).chunk(2, 1)
            lower, upper = torch.maximum(lower, least), torch.minimum(upper, -most)
        lower, upper = lower - layer.slack, upper + layer.slack
        lines.append(_lines(lower, upper) if layer.relu else _line(lower))
        if layer.relu:
            lower, upper = lower.relu(), upper.relu()
    others = torch.arange(chain.classes - 1, device=y.device)
    others = others + (others >= y[:, None])  # (b, m - 1), all classes but y
    rows, constant = last.weight[y, None] - last.weight[others], last.bias[y, None] - last.bias[others]
    least = _least(rows[:, None], constant[:, None], _View.of(last), inner, lines, box)
    return least[:, 0] - 2 * last.slack  # that of two logits


def _lines(lower: Tensor, upper: Tensor) -> Lines:
    """The lines of a ReLU for values between bounds (b, c, h, w): the upper one is the chord.

    The lower one is 0 or z, whichever leaves the smaller triangle; where the ReLU is 0 or z itself, both lines are.
    """
    high = torch.where(lower >= 0, 1.0, upper.relu() / (upper.relu() - lower.clamp(max=0)))
    high = torch.where(upper <= 0, 0.0, high)
    return (upper > -lower).double(), high, -high * lower.clamp(max=0)


def _line(z: Tensor) -> Lines:
    """Those of a layer that no ReLU follows."""
    return torch.ones_like(z), torch.ones_like(z), torch.zeros_like(z)


def _least(
    rows: Tensor,
    constant: Tensor,
    view: _View,
    layers: Sequence[_Layer],
    lines: Sequence[Lines],
    box: tuple[Tensor, ...],
) -> Tensor:
    """Lower bounds (b, p, r) of affine functions of what comes out of the layers, over the box.

    Args:
        rows: (b or 1, p or 1, r, c, kh, kw), r functions at each of p places, each of the patch there.
        constant: what is added, to go with (b, p, r).
        view: where the patches lie.
        layers: from the image to there.
        lines: of what follows each of them.
        box: the middle and the reach of the normalised images, (b, c, h, w).
    """
    for layer, (low, high, lift) in zip(reversed(layers), reversed(lines), strict=True):
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        constant = constant + _dot(down, view.patches(lift))
        rows = up * view.patches(low) + down * view.patches(high)  # 0 in the padding, which is no value of the layer
        constant = constant + rows.sum((4, 5)) @ layer.bias
        places = rows.shape[:3]
        rows = F.conv_transpose2d(rows.flatten(0, 2), layer.weight, stride=layer.stride).unflatten(0, places)
        view = view.through(layer)
    middle, reach = (view.patches(part) for part in box)
    return constant + _dot(rows, middle) - _dot(rows.abs(), reach)


def _dot(rows: Tensor, patches: Tensor) -> Tensor:
    """(b or 1, p or 1, r, c, kh, kw) and (b, p, 1, c, kh, kw) to (b, p, r)."""
    return (rows.flatten(3) @ patches.flatten(3).mT)[..., 0]


def _slack(layer: _Layer, before: Sequence[_Layer], largest: float) -> float:
    """What rounding can do to a bound of a value of the layer, whether by `interval` or by `_least`, at most.

    The largest magnitude M of a value comes from |W|, |b| and (1 + |mean|) / std, layer by layer. A bound is a sum of
    products. Those of the image come to at most M in magnitude, so do the biases of each layer, and so do the lifts of
    each, which are no larger than the values of that layer. Every term goes through fewer sums than there are numbers
    in the patches on its way, whatever their order, and n sums in a row change it by a factor of at most 1 + n eps.
    """
    view, numbers = _View.of(layer), 0
    shapes = [layer.weight.shape[1:]]
    for earlier in reversed(before):
        view = view.through(earlier)
        shapes.append(torch.Size([earlier.weight.shape[1], *view.kernel]))
    numbers = sum(shape.numel() for shape in shapes)
    return 4 * numbers * torch.finfo(torch.float64).eps * (2 * len(before) + 1) * largest
