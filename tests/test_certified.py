"""Certified distances: sound against attacks, exact where the network is linear, as plain CROWN says, bad input."""

import math
from fractions import Fraction

import pytest
import torch
from tiny import Centre, predict, seeded
from torch import nn

from companion import certified
from companion.architectures import Normalised, cnn_a
from companion.certified import certified_distances
from companion.settings import ParameterError
from wdat_core import Threat, boundary, wpgd

SHAPES = {"mlp": (6,), "deep": (2, 3, 3), "strided": (2, 7, 6), "affine": (2, 6, 5)}


def random_network(kind, seed=0, dtype=torch.float64):
    """A random chain whose ReLUs are open on some boxes and not on others, for images of `SHAPES`, to 4 logits."""
    with seeded(seed):
        model = {
            "mlp": lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)),
            "deep": lambda: Normalised(
                [0.5, 0.4],
                [0.2, 0.3],
                nn.Flatten(),
                nn.Linear(18, 16),
                nn.ReLU(),
                nn.Sequential(nn.Linear(16, 16), nn.Identity(), nn.ReLU()),
                nn.Linear(16, 12, bias=False),
                nn.ReLU(),
                nn.Linear(12, 4),
            ),
            "strided": lambda: Normalised(  # neither stride divides what it goes over
                [0.5, 0.4],
                [0.2, 0.3],
                nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
                nn.ReLU(),
                nn.Conv2d(4, 5, 3, stride=2, padding=2),
                nn.ReLU(),
                nn.Conv2d(5, 4, 2, padding=1, bias=False),
                nn.Flatten(),
                nn.ReLU(),
                nn.Linear(80, 8),
                nn.ReLU(),
                nn.Linear(8, 4),
            ),
            "affine": lambda: Normalised(  # layers without a ReLU between them, whose padding is still 0
                [0.5, 0.4],
                [0.2, 0.3],
                nn.Conv2d(2, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(36, 8),
                nn.Linear(8, 4),
            ),
        }[kind]()
        for parameter in model.parameters():
            parameter.data *= 2
    return model.to(dtype)


def some(kind, n, seed=0, model=None):
    """Images, some of them at the edge of [0, 1], and what the model reads them as."""
    x = torch.rand(n, *SHAPES[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (1.2 * x - 0.1).clamp(0, 1)
    return x, predict(model or random_network(kind), x)


def box(x, radius):
    """The lowest and the highest image within a radius (n,)."""
    radius = radius.view(-1, *[1] * (x.ndim - 1))
    return (x - radius).clamp(min=0), (x + radius).clamp(max=1)


def worst_margins(model, x, y, radius, tries=30, seed=0):
    """The lowest z_y - z_j found in the box, (n, m - 1): at random points and corners, and by gradients."""
    low, high = box(x, radius)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(x))
    found = None

    def margins(z):
        logits = model(z)
        other = torch.ones_like(logits).scatter_(1, y[:, None], 0).bool()
        return logits[rows, y][:, None] - logits[other].view(len(x), -1)

    def keep(value):
        nonlocal found
        found = value if found is None else torch.minimum(found, value)

    for attempt in range(tries):
        share = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        start = low + (high - low) * (share.round() if attempt % 2 else share)
        keep(margins(start).detach())
    for rival in range(found.shape[1]):
        z = x.clone()
        for _ in range(8):  # to the corner where the slope leads
            z.requires_grad_()
            (slope,) = torch.autograd.grad(margins(z)[:, rival].sum(), z)
            z = torch.where(slope > 0, low, high).detach()
            keep(margins(z).detach())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is found below the bounds
# ---------------------------------------------------------------------------------------------------------------------


def bounds(model, x, y, radius):
    chain = certified._chain(model, x[:2])
    with torch.no_grad():
        return certified._margins(chain, certified._as_maps(x), y, radius)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_no_margin_in_a_box_is_below_its_bound(kind, seed):
    model = random_network(kind, seed)
    x, y = some(kind, 250, seed, model)
    y = torch.where(torch.arange(250) % 5 == 0, (y + 1) % 4, y)  # bounds hold for wrong labels too
    radius = 10 ** (-3 * torch.rand(250, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    low = bounds(model, x, y, radius)
    worst = worst_margins(model, x, y, radius)
    assert (low <= worst).all()
    small = radius < 0.005
    scale = worst.abs().amax(1, keepdim=True)
    assert ((worst - low) / scale)[small].median() < 0.05  # and they are of use


@pytest.mark.parametrize("kind", SHAPES)
def test_no_attack_misleads_within_the_certified_distance(kind):
    model = random_network(kind, 5)
    x, y = some(kind, 120, 5, model)
    found = certified_distances(model, x, y, most=1.0, bisections=12, batch_size=60)
    assert found.dtype == torch.float64 and ((found > 0) & (found < 1)).sum() > 90
    assert (worst_margins(model, x, y, found) > 0).all()
    assert (boundary(model, x, y, steps=40).distance >= found).all()
    for delta in found.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist():
        held = found >= delta
        for start in (0.0, 1.0):
            attack = wpgd(
                model, x[held], y[held], Threat(p=math.inf, delta=delta), loss="ce", random_start=start, step_ratio=2
            )
            assert attack.correct.all()


def test_no_attack_misleads_an_untrained_cnn_a_within_the_certified_distance():
    with seeded(0):
        model = cnn_a()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = predict(model, x)
    found = certified_distances(model, x, y, bisections=6)
    assert ((found > 0) & (found < 16 / 255)).any()
    exact = cnn_a().double()
    exact.load_state_dict(model.state_dict())
    assert (worst_margins(exact, x.double(), y, found) > 0).all()
    for row, delta in enumerate(found.tolist()):
        if delta:
            threat = Threat(p=math.inf, delta=delta)
            assert wpgd(model, x[row : row + 1], y[row : row + 1], threat, loss="ce").correct.all()


# ---------------------------------------------------------------------------------------------------------------------
# What they are
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_at_radius_0_the_bounds_are_the_differences_of_logits(kind):
    model = random_network(kind, 1)
    x, y = some(kind, 40, 1, model)
    with torch.no_grad():
        logits = model(x)
    other = torch.ones_like(logits).scatter_(1, y[:, None], 0).bool()
    margins = logits.gather(1, y[:, None]) - logits[other].view(40, -1)
    low = bounds(model, x, y, torch.zeros(40))
    assert (low <= margins).all()
    torch.testing.assert_close(low, margins, rtol=0, atol=1e-6)  # what rounding may do at most is taken off


def exact_distance(weight, bias, mean, std, x, y, most):
    """Of a linear network: the radius at which the lowest margin over the box is 0, by bisection to the last bit."""
    low, high = torch.zeros(len(x), dtype=torch.float64), torch.full((len(x),), most, dtype=torch.float64)
    slope = ((weight[y][:, None] - weight[None]) / std).flatten(2)  # (n, m, d)
    offset = (bias[y][:, None] - bias[None]) - (slope * mean.expand_as(x[0]).reshape(-1)).sum(2)
    slope, x = slope, x.flatten(1)
    own = torch.nn.functional.one_hot(y, len(weight)).bool()
    for _ in range(60):
        middle = (low + high) / 2
        corners = box(x, middle)
        least = offset + torch.minimum(slope * corners[0][:, None], slope * corners[1][:, None]).sum(2)
        holds = least.masked_fill(own, math.inf).amin(1) > 0
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


@pytest.mark.parametrize("inside", [True, False])
def test_on_a_linear_network_the_distance_is_the_exact_one(inside):
    with seeded(3):
        model = Normalised([0.5, 0.4], [0.25, 0.3], nn.Flatten(), nn.Linear(18, 4)).double()
    x = torch.rand(60, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = 0.4 + 0.2 * x if inside else (1.4 * x - 0.2).clamp(0, 1)
    y = predict(model, x)
    mean, std, most = model.mean.double(), model.std.double(), 0.35
    weight, bias = model[1].weight.detach().view(4, 2, 3, 3), model[1].bias.detach()
    found = certified_distances(model, x, y, most=most, bisections=24, batch_size=7)
    exact = exact_distance(weight, bias, mean, std, x, y, most)
    assert (found <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-7)
    if inside:  # and where [0, 1] is far, it is margin / l_1 norm
        logits = model(x).detach()
        other = ~torch.nn.functional.one_hot(y, 4).bool()
        norms = ((weight[y][:, None] - weight[None]) / std).abs().sum((2, 3, 4))
        quotient = torch.where(other, (logits.gather(1, y[:, None]) - logits) / norms, math.inf).amin(1)
        near = quotient < 0.35
        assert near.sum() > 40
        torch.testing.assert_close(found[near], quotient[near], rtol=0, atol=2e-7)


def test_of_two_pixels_no_distance_is_above_that_of_a_fine_grid():
    axis = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    ratios = []
    for seed in range(6):
        with seeded(seed):
            model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        model[0].weight.data *= 4
        x = torch.rand(30, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y, read = predict(model, x), predict(model, grid)
        found = certified_distances(model, x, y, most=1.0, bisections=12, batch_size=30)
        far = (x[:, None] - grid[None]).abs().amax(2).masked_fill(read[None] == y[:, None], 1.0).amin(1)
        assert (found <= far).all()
        ratios += (found / far)[far < 1].tolist()
    assert len(ratios) > 40 and torch.tensor(ratios).median() > 0.6


def plain_crown(weights, biases, x, y, radius):
    """CROWN once more, with a matrix for each layer, one image (d,), one function at a time: (m - 1,)."""
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
    known = []

    def least(row, constant, below):
        for place in reversed(range(below)):
            lower, upper = known[place]
            fresh = torch.zeros_like(row)
            for i, a in enumerate(row.tolist()):
                l, u = lower[i].item(), upper[i].item()  # noqa: E741
                if u <= 0:
                    continue
                if l >= 0:
                    fresh[i] = a
                elif a > 0:
                    fresh[i] = a if u > -l else 0.0
                else:
                    fresh[i] = a * u / (u - l)
                    constant = constant - a * u * l / (u - l)
            constant = constant + fresh @ biases[place]
            row = fresh @ weights[place]
        return constant + torch.where(row > 0, row * low, row * high).sum()

    reach = [low, high]
    for place in range(len(weights) - 1):
        w, b = weights[place], biases[place]
        middle, half = w @ (reach[0] + reach[1]) / 2 + b, w.abs() @ (reach[1] - reach[0]) / 2
        lower = torch.stack([least(w[i], b[i], place) for i in range(len(b))])
        upper = -torch.stack([least(-w[i], -b[i], place) for i in range(len(b))])
        lower, upper = torch.maximum(lower, middle - half), torch.minimum(upper, middle + half)
        known.append((lower, upper))
        reach = [lower.relu(), upper.relu()]
    w, b = weights[-1], biases[-1]
    return torch.stack([least(w[y] - w[j], b[y] - b[j], len(weights) - 1) for j in range(len(b)) if j != y])


def as_matrix(layer, shape):
    """An affine map of images of a shape as a matrix and a vector, and the shape of what it returns."""
    with torch.no_grad():
        constant = layer(torch.zeros(1, *shape, dtype=torch.float64))
        unit = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        return (layer(unit) - constant).flatten(1).T, constant.flatten(), constant.shape[1:]


@pytest.mark.parametrize("radius", [0.003, 0.03, 0.2])
def test_the_bounds_are_those_of_crown_with_plain_matrices(radius):
    model = random_network("strided", 2)
    normal = lambda x: (x - model.mean.double()) / model.std.double()  # noqa: E731
    conv1, conv2, conv3, flat, first, last = (model[i] for i in (0, 2, 4, 5, 7, 9))
    weights, biases, shape = [], [], SHAPES["strided"]
    parts = (lambda x: conv1(normal(x)), conv2, conv3, lambda x: first(flat(x)), last)
    for part in parts:
        weight, bias, shape = as_matrix(part, shape)
        weights.append(weight)
        biases.append(bias)
    x, y = some("strided", 3, 2, model)
    ours = bounds(model, x, y, torch.full((3,), radius))
    theirs = torch.stack([plain_crown(weights, biases, a.flatten(), b, radius) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_what_float64_rounds_is_taken_off():
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e9):  # terms that cancel, so that what is left has few digits
        half = scale * torch.randn(2, 40, generator=generator, dtype=torch.float64)
        model = nn.Sequential(nn.Linear(80, 2)).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.cat([half, -half + 1e-3], 1))
        x = torch.rand(20, 40, generator=generator, dtype=torch.float64).repeat(1, 2)
        y, radius = torch.zeros(20, dtype=torch.int64), 1e-12
        low = bounds(model, x, y, torch.full((20,), radius, dtype=torch.float64))[:, 0]
        weight = [[Fraction(value) for value in row] for row in model[0].weight.tolist()]
        bias = [Fraction(value) for value in model[0].bias.tolist()]
        slope = [a - b for a, b in zip(*weight, strict=True)]
        for image, bound in zip(x.tolist(), low.tolist(), strict=True):
            exact = bias[0] - bias[1]
            for a, pixel in zip(slope, image, strict=True):
                ends = max(Fraction(pixel) - Fraction(radius), 0), min(Fraction(pixel) + Fraction(radius), 1)
                exact += min(a * end for end in ends)
            assert Fraction(bound) <= exact


# ---------------------------------------------------------------------------------------------------------------------
# What is returned
# ---------------------------------------------------------------------------------------------------------------------


def test_it_is_0_where_the_image_is_misread_and_does_not_depend_on_the_batches():
    model = random_network("strided", 4, torch.float32)
    x, y = some("strided", 23, 4, random_network("strided", 4))
    x, wrong = x.float(), torch.arange(23) % 3 == 0
    y = torch.where(wrong, (y + 1) % 4, y)
    before = [p.clone() for p in model.parameters()]
    found = certified_distances(model, x, y, most=0.5, bisections=7, batch_size=23)
    assert (found[wrong] == 0).all() and (found[~wrong] > 0).sum() > 10
    for size in (1, 4):
        assert (certified_distances(model, x, y, most=0.5, bisections=7, batch_size=size) == found).all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.inference_mode():
        assert (certified_distances(model, x.clone(), y.clone(), most=0.5, bisections=7) == found).all()


def test_the_radius_is_one_that_was_certified_and_the_next_of_the_grid_was_not():
    model, most, halves = random_network("deep", 6), 0.25, 5
    x, y = some("deep", 60, 6, model)
    found = certified_distances(model, x, y, most=most, bisections=halves, batch_size=60)
    step = most / 2**halves
    assert (found / step == (found / step).round()).all()
    held, short = found > 0, found < most
    assert held.any() and short.any()
    assert (bounds(model, x, y, found).amin(1)[held] > 0).all()
    assert (bounds(model, x, y, found + step).amin(1)[short] <= 1e-9).all()
    easy = certified_distances(model, x, y, most=1e-6, bisections=1)
    assert (easy == 1e-6).sum() > 50  # the largest that is tried, where it holds


def test_a_tie_is_not_certified():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    for label in (0, 1):
        assert certified_distances(model, torch.rand(1, 3).double(), torch.tensor([label])).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is not handled
# ---------------------------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def conv_net(*layers, width=2):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 9, 4))


UNLIKE = {
    "Centre": lambda: conv_net(Centre()),
    "BatchNorm2d": lambda: conv_net(nn.BatchNorm2d(2)),
    "MaxPool2d": lambda: conv_net(nn.MaxPool2d(3, 1, 1)),
    "Tanh": lambda: conv_net(nn.Conv2d(2, 2, 1), nn.Tanh()),
    "Own": lambda: nn.Sequential(nn.Flatten(), Own(18, 4)),
    "groups=2": lambda: conv_net(nn.Conv2d(2, 2, 3, padding=1, groups=2)),
    "dilation=\\(2, 2\\)": lambda: conv_net(nn.Conv2d(2, 2, 3, padding=2, dilation=2)),
    "padding=same": lambda: conv_net(nn.Conv2d(2, 2, 3, padding="same")),
    "reflect": lambda: conv_net(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
    "layer 1 is ReLU": lambda: conv_net(nn.ReLU()),
    "layer 2 is Normalised": lambda: conv_net(nn.Identity(), Normalised([0.5] * 2, [0.2] * 2)),
    "layer 1 is Linear": lambda: nn.Sequential(nn.Linear(3, 3), nn.Flatten(), nn.Linear(18, 4)),
    "Flatten": lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(18, 4)),
    "ends otherwise": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.ReLU()),
    "one ends otherwise": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten()),
    "not take images": lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(18, 4)),
    "of shape \\(2, 3, 3\\)": lambda: nn.Sequential(nn.Flatten(), nn.Linear(17, 4)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_network_of_another_kind_is_refused_with_the_layer(name):
    x = torch.rand(2, 2, 3, 3)
    with pytest.raises(ParameterError, match=name) as error:
        certified_distances(UNLIKE[name](), x, torch.zeros(2, dtype=torch.int64))
    assert "chain" in str(error.value) or "images" in str(error.value)


def test_a_network_that_does_more_than_its_layers_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    x, y = torch.rand(2, 2, 3, 3), torch.zeros(2, dtype=torch.int64)
    model.register_forward_hook(lambda module, given, logits: -logits)
    with pytest.raises(ParameterError, match="hooks"):
        certified_distances(model, x, y)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    broken[1].bias.data[0] = math.nan
    with pytest.raises(ParameterError, match="finite"):
        certified_distances(broken, x, y)
    with pytest.raises(ParameterError, match="standard deviations"):
        certified_distances(Normalised([0.5] * 2, [0.2, -0.2], *model), x, y)
    with pytest.raises(ParameterError, match="Module, not function"):
        certified_distances(lambda x: x, x, y)


GOOD = {"x": torch.full((2, 2, 3, 3), 0.5), "y": torch.zeros(2, dtype=torch.int64)}
BAD = {
    "images must be a floating": [{"x": GOOD["x"].int()}, {"x": GOOD["x"][0]}, {"x": [1]}, {"x": GOOD["x"][:0]}],
    "must lie in \\[0, 1\\], these": [{"x": GOOD["x"] * 3}, {"x": GOOD["x"] * math.nan}],
    "labels must be": [{"y": GOOD["y"].int()}, {"y": GOOD["y"][:1]}, {"y": None}],
    "labels must lie in 0..3": [{"y": GOOD["y"] + 4}, {"y": GOOD["y"] - 1}],
    "most must": [{"most": value} for value in (0, -1, 1.5, math.nan, True, "1")],
    "bisections must": [{"bisections": value} for value in (0, 1.5, True)],
    "batch_size must": [{"batch_size": 0}],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    for change in BAD[message]:
        given = GOOD | change
        with pytest.raises(ParameterError, match=message):
            certified_distances(conv_net(), given.pop("x"), given.pop("y"), **given)
