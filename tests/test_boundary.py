"""The worst case over the ball: the allocation against brute force, the distances against exact ones, bad input."""

import copy
import gc
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tiny import INF, images, lengths, network, predict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from wdat_core import (
    Boundary,
    FinetuneConfig,
    Threat,
    WdatError,
    boundary,
    evaluate,
    finetune,
    sensitivity,
    wpgd,
    wpgd_budget,
)

ORDERS = (1, 1.5, 2, 4, INF)


def distances(n, seed, special=True):
    """Random distances, some of them 0, infinite or equal."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if special:
        values[values < 0.2] = 0.0
        values[values > 0.9] = INF
        values[1::3] = values[:1]
    return values


def enough(values, p, delta):
    """Whether a budget pays for these distances together, n of them all."""

    def pays(chosen):
        if p == INF:
            return all(d <= delta for d in chosen)
        return sum((d / delta) ** p for d in chosen) <= len(values)

    return pays


# ---------------------------------------------------------------------------------------------------------------------
# From distances to accuracies
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_images_makes_more_errors(p, seed):
    values, delta = distances(8, seed), 0.1 + 0.15 * seed
    pays = enough(values, p, delta)
    most = max(k for k in range(9) for chosen in itertools.combinations(values.tolist(), k) if k == 0 or pays(chosen))
    found = Boundary(values)
    assert found.accuracy(Threat(p=p, delta=delta)) == pytest.approx(1 - most / 8, abs=1e-15)
    bought = found.bought(Threat(p=p, delta=delta))
    assert bought.sum() == most and pays(values[bought].tolist())


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_shares_average_to_the_linear_program_in_which_an_image_can_be_split(p, seed):
    values, delta = distances(30, seed), 0.1 + 0.1 * seed
    price = (values / delta) ** p
    finite = price < INF
    best = linprog(
        -np.ones(int(finite.sum())),
        A_ub=price[finite].numpy()[None],
        b_ub=[len(values)],
        bounds=[(0, 1)] * finite.sum(),
    )
    found, threat = Boundary(values), Threat(p=p, delta=delta)
    assert found.shares(threat).mean() == pytest.approx(1 + best.fun / 30, abs=1e-8)
    assert -1e-9 < found.accuracy(threat) - found.shares(threat).mean() < 1 / 30


@pytest.mark.parametrize("p", [*ORDERS, 200.0])
def test_the_curve_is_the_whole_staircase(p):
    values = distances(50, 7)
    found = Boundary(values)
    radii, accuracies = found.curve(p)
    assert radii[0] == 0 and accuracies[0] == (values > 0).double().mean()
    assert (radii.diff() >= 0).all() and (accuracies.diff() < 0).all() and (radii[1:] > 0).all()
    for delta in torch.linspace(0.01, 1.0, 40).tolist():
        step = int((radii <= delta).sum()) - 1
        assert found.accuracy(Threat(p=p, delta=delta)) == pytest.approx(accuracies[step].item(), abs=1e-12)
    assert accuracies[-1] == pytest.approx((values == INF).double().mean().item())


def test_a_larger_order_is_a_smaller_ball():
    found = Boundary(distances(200, 3))
    for delta in (0.05, 0.2, 0.5):
        left = [found.accuracy(Threat(p=p, delta=delta)) for p in ORDERS]
        assert left == sorted(left)


def test_distances_of_nothing_and_of_everything():
    wrong, never = Boundary(torch.zeros(4)), Boundary(torch.full((4,), INF))
    for p in ORDERS:
        threat = Threat(p=p, delta=0.1)
        assert wrong.accuracy(threat) == 0 and never.accuracy(threat) == 1
        assert wrong.interval(threat) == (0, 3 / 4) and never.interval(threat) == (1 - 3 / 4, 1)  # the rule of three
        assert [len(part) for part in never.curve(p)] == [1, 1] == [len(part) for part in wrong.curve(p)]


@pytest.mark.parametrize(
    "distance, words",
    [
        ([0.1], "must be a floating-point tensor .* not list"),
        (torch.ones(2, 2), "must be a floating-point tensor"),
        (torch.ones(2).int(), "must be a floating-point tensor"),
        (torch.tensor([0.1, math.nan]), "must hold numbers >= 0, inf where nothing was found, and it holds NaN"),
        (torch.tensor([0.1, -0.5]), "must hold numbers >= 0, .* holds -0.5"),
    ],
)
def test_what_cannot_be_distances_is_named(distance, words):
    with pytest.raises(WdatError, match=f"distance {words}"):
        Boundary(distance)


def test_it_says_in_a_line_what_it_holds():
    assert repr(Boundary(torch.tensor([0.0, 0.1, INF]))) == "Boundary(3 images, a misclassified one found for 2, r=inf)"


# ---------------------------------------------------------------------------------------------------------------------
# How sure
# ---------------------------------------------------------------------------------------------------------------------


def sample(n, rng):
    """Distances with an atom at 0: 30 % are 0, the others uniform on [0, 1]."""
    return torch.from_numpy(np.where(rng.random(n) < 0.3, 0.0, rng.random(n)))


def truth(p, delta):
    """A_p of that distribution: 0.7 t^(p+1) / (p+1) = delta^p, A = 0.7 (1 - t)."""
    t = delta if p == INF else ((p + 1) * delta**p / 0.7) ** (1 / (p + 1))
    return 0.7 * (1 - t)


@pytest.mark.parametrize("p", [1, 2, 4, INF])
def test_the_interval_holds_the_truth_as_often_as_it_says(p):
    rng, delta, held, runs = np.random.default_rng(0), 0.2, 0, 1000
    for _ in range(runs):
        low, high = Boundary(sample(400, rng)).interval(Threat(p=p, delta=delta))
        held += low <= truth(p, delta) <= high
    assert abs(held / runs - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize("p", [1, 2, INF])
def test_the_interval_is_that_of_a_bootstrap(p):
    rng, threat = np.random.default_rng(1), Threat(p=p, delta=0.2)
    values = sample(1000, rng)
    again = [Boundary(values[rng.integers(1000, size=1000)]).accuracy(threat) for _ in range(600)]
    low, high = Boundary(values).interval(threat)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(again), rel=0.12)


# ---------------------------------------------------------------------------------------------------------------------
# The attack
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1.5, 2, 3, INF])
def test_on_a_linear_network_the_distance_is_the_exact_one(r):
    model = network("linear", classes=4)
    x, y = images(60, model)
    x = 0.4 + 0.2 * x  # far enough from 0 and 1 for most
    y = predict(model, x)
    weight, logits = model[-1].weight.detach() * 8, model(x).detach()
    s = 1.0 if r == INF else r / (r - 1)
    slopes = (weight[y][:, None] - weight[None]).abs().pow(s).sum(2).pow(1 / s)
    exact = ((logits.gather(1, y[:, None]) - logits) / slopes).nan_to_num(INF)
    exact[range(60), y] = INF
    exact = exact.amin(1)
    found = boundary(model, x, y, r=r, steps=100, keep=False).distance
    assert (found >= exact * (1 - 1e-9)).all()  # the box makes it only larger
    within = exact * (weight.shape[1] ** (1 / r) if r < INF else 1) < 0.3
    assert within.sum() > 20 and (found[within] <= 1.01 * exact[within]).all()


def in_the_box(weight, bias, x, r):
    """The exact l_r distance in [0, 1] of images (n, pixels) to the plane weight . x + bias = 0.

    By the conditions of Karush, Kuhn and Tucker each pixel goes along sgn(w) |w|^(s-1), as far as the others or to its
    end; how far, by bisection.
    """
    s = 1.0 if r == INF else r / (r - 1)
    gap = x @ weight + bias
    ways = -gap.sign()[:, None] * weight.sign() * weight.abs() ** (s - 1)
    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e30)
    for _ in range(400):
        middle = (low + high) / 2
        beyond = ((x + middle[:, None] * ways).clamp(0, 1) @ weight + bias).sign() != gap.sign()
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return torch.linalg.vector_norm((x + high[:, None] * ways).clamp(0, 1) - x, r, 1)


@pytest.mark.parametrize("r", [1.1, 1.5, 2, 10, INF])
def test_pixels_that_reach_the_wall_on_their_way_hide_no_error(r):
    """The step is shorter for them, and the boundary just out of reach: it must not stay there for all steps."""
    for seed in range(5):
        model = network("linear", classes=2, seed=seed, shape=(3, 8, 8))
        x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y, linear = predict(model, x), model[-1]
        weight, zero = model(torch.stack([torch.ones_like(x[0]), torch.zeros_like(x[0])])).detach().diff(dim=1)[:, 0], 0
        rise = (linear.weight[1] - linear.weight[0]).detach()
        scale = (weight[0] - weight[1]) / rise.sum()  # of what the network does before its layer
        exact = in_the_box(scale * rise, weight[1] + zero, x.flatten(1), r)
        found = boundary(model, x, y, r=r, keep=False).distance
        assert (found >= exact * (1 - 1e-9)).all() and (found <= 1.02 * exact).all()


@pytest.mark.parametrize("r", [1.1, 1.5, 2, 3, INF])
def test_pixels_of_0_and_1_move_one_way_only(r):
    """On a linear network the distance is that along the pixels that can move; 40 steps find it."""
    model = network("linear", classes=4)
    x = images(60, model)[0].round()
    y = predict(model, x)
    weight, logits = model[-1].weight.detach() * 8, model(x).detach()
    s = 1.0 if r == INF else r / (r - 1)
    rises = weight[None] - weight[y][:, None]  # of z_j - z_y, (60, 4, pixels)
    free = (rises > 0) == (x.flatten(1) == 0)[:, None]
    exact = ((logits.gather(1, y[:, None]) - logits) / (rises * free).abs().pow(s).sum(2).pow(1 / s)).nan_to_num(INF)
    exact[range(60), y] = INF
    exact = exact.amin(1)
    found = boundary(model, x, y, r=r, keep=False).distance
    assert (found >= exact * (1 - 1e-9)).all()
    inside = exact < 1  # no pixel reaches the other end
    assert inside.sum() > 20 and (found[inside] <= 1.03 * exact[inside]).all()


@pytest.mark.parametrize("kind", ["mlp", "smooth", "full"])
@pytest.mark.parametrize(("r", "dtype"), [(INF, torch.float64), (2, torch.float64), (INF, torch.float32)])
def test_each_image_found_is_what_it_is_said_to_be(kind, r, dtype):
    model = network(kind, dtype=dtype)
    x, y = images(50, model, dtype=dtype)
    found = boundary(model, x, y, r=r, steps=20, batch_size=16)
    assert ((found.distance == 0) == (predict(model, x) != y)).all() and (found.distance > 0).any()
    there = (found.distance > 0) & (found.distance < INF)
    assert there.any()
    for size in (1, 7, 50):
        answers = torch.cat([predict(model, part) for part in found.x_adv.split(size)])
        assert (answers[there] != y[there]).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert lengths(found.x_adv - x, r)[there] == pytest.approx(found.distance[there].tolist(), rel=1e-5)
    assert torch.equal(found.x_adv[~there], x[~there])


@pytest.mark.parametrize("p", ORDERS)
def test_the_attacked_images_keep_the_budget_and_the_promise(p):
    model = network("mlp")
    x, y = images(40, model)
    found, threat = boundary(model, x, y, steps=20), Threat(p=p, delta=0.03)
    attack = found.spend(x.clone().requires_grad_(), threat)
    assert not attack.x_adv.requires_grad
    assert attack.accuracy == (predict(model, attack.x_adv) == y).double().mean() == found.accuracy(threat)
    assert attack.distance <= threat.delta * (1 + 1e-12)
    moved = lengths(attack.x_adv - x, INF)
    spent = moved.max() if p == INF else moved.pow(p).mean() ** (1 / p)
    assert attack.distance == pytest.approx(spent.item())
    assert torch.equal(attack.correct, ~found.bought(threat)) and attack.loss == 1 - attack.accuracy
    assert torch.equal(attack.was_correct, predict(model, x) == y)
    assert attack.history["accuracy"] == [attack.was_correct.double().mean(), attack.accuracy]


def test_it_is_stronger_than_w_pgd_on_the_same_ball():
    model = network("mlp")
    x, y = images(200, model)
    found = boundary(model, x, y, steps=40, keep=False)
    for p, loss in ((2, "redlr"), (INF, "ce")):
        for delta in (0.01, 0.03, 0.1):
            threat = Threat(p=p, delta=delta)
            assert found.accuracy(threat) <= wpgd(model, x, y, threat, loss=loss).accuracy


def test_more_steps_find_nearer_images():
    model = network("mlp")
    x, y = images(100, model)
    means = [boundary(model, x, y, steps=steps, keep=False).distance.mean() for steps in (2, 10, 50)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("sizes", [(1, 30, 2, 7), (20, 20), (40,)])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_how_the_images_come_changes_nothing(sizes, batch_size):
    model = network("mlp")
    x, y = images(40, model)
    whole = boundary(model, x, y, steps=6)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    streamed = boundary(model, parts, steps=6, batch_size=batch_size)
    assert streamed.distance.tolist() == pytest.approx(whole.distance.tolist(), rel=1e-6)
    assert torch.allclose(streamed.x_adv, whole.x_adv, atol=1e-6)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    assert boundary(model, parts, steps=6, batch_size=batch_size, keep=False).x_adv is None


class Endless(IterableDataset):
    """A data set that does not know its length; a DataLoader of it has a len() that fails."""

    def __iter__(self):
        return iter(zip(*images(40, network("mlp")), strict=True))


def test_the_batches_need_no_length():
    model = network("mlp")
    whole = boundary(model, *images(40, model), steps=4)
    for batches in (DataLoader(Endless(), batch_size=15), tqdm(DataLoader(Endless(), batch_size=15), disable=True)):
        assert torch.equal(boundary(model, batches, steps=4).distance, whole.distance)


def test_a_batch_may_come_in_the_memory_of_the_last():
    model = network("mlp")
    x, y = images(40, model)

    def batches():
        pixels, labels = torch.empty_like(x[:8]), torch.empty_like(y[:8])
        for part in zip(x.split(8), y.split(8), strict=True):
            yield pixels.copy_(part[0]), labels.copy_(part[1])

    found, whole = boundary(model, batches(), steps=4), boundary(model, x, y, steps=4)
    assert found.distance.tolist() == pytest.approx(whole.distance.tolist(), rel=1e-6)
    assert torch.allclose(found.x_adv, whole.x_adv, atol=1e-6)


def test_one_pair_of_all_the_images_is_no_more_work_than_many():
    """The images that wait were once copied for every batch of the attack."""
    model = network("mlp", dtype=torch.float32)
    x, y = images(64, model, dtype=torch.float32)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cat.default:
                copied.append(sum(part.numel() for part in args[0]))
            return func(*args, **(kwargs or {}))

    with Watch():
        boundary(model, [(x, y)], steps=1, batch_size=2, keep=False)
    assert sum(copied) < 5 * x.numel()


class Counted(nn.Module):
    """Counts the images whose gradient is asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.gradients = model, 0

    def forward(self, x):
        self.gradients += len(x) * x.requires_grad
        return self.model(x)


@pytest.mark.parametrize("steps", [1, 2, 20, 41])
def test_each_image_that_is_right_costs_its_steps_and_no_other_costs_any(steps):
    model = Counted(network("mlp"))
    x, y = images(30, model.model)
    y[::2] = (y[::2] + 1) % 4
    right = int((predict(model.model, x) == y).sum())
    boundary(model, x, y, steps=steps, batch_size=8)
    assert model.gradients == right * steps + 1  # the one with which the network is looked at first


def test_the_model_and_the_images_are_left_as_they_were():
    model = network("full").train()
    x, y = images(20, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels, state = x.clone().requires_grad_(), torch.get_rng_state()
    with torch.inference_mode():
        found = boundary(model, pixels, y, steps=3)
    assert not found.distance.is_inference() and not found.x_adv.is_inference()
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(pixels, x) and pixels.grad is None and torch.equal(torch.get_rng_state(), state)


class Constant(nn.Module):
    def forward(self, x):
        return x.flatten(1).sum(1, keepdim=True) * 0 + torch.tensor([[2.0, 1.0, 0.0]], dtype=x.dtype)


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def test_where_nothing_is_to_be_found_nothing_is():
    x = torch.rand(5, 2, 3, 3)
    found = boundary(Constant(), x, torch.zeros(5, dtype=torch.int64), steps=4)
    assert (found.distance == INF).all() and torch.equal(found.x_adv, x)
    assert found.spend(x, Threat()).accuracy == 1


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_logits_does_not_matter(factor):
    model = network("mlp")
    x, y = images(30, model)
    plain = boundary(model, x, y, steps=10).distance.tolist()
    assert boundary(Scaled(model, factor), x, y, steps=10).distance.tolist() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("classes", "shape", "n"), [(2, (12,), 9), (50, (3, 2, 2), 1), (3, (1, 1, 1), 6)])
def test_it_takes_two_classes_or_many_and_images_of_any_shape(classes, shape, n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes)).double()
    x = torch.rand(n, *shape, dtype=torch.float64)
    found = boundary(model, x, predict(model, x), steps=9)
    assert found.distance.shape == (n,) and (found.distance > 0).all() and found.x_adv.shape == x.shape


def test_bfloat16_finds_nearly_the_same():
    model = network("mlp", dtype=torch.float32)
    x, y = images(60, model, dtype=torch.float32)
    exact, short = (boundary(model, x, y, steps=20, precision=p).distance for p in ("float32", "bfloat16"))
    both = (exact > 0) & (exact < INF) & (short > 0) & (short < INF)
    assert both.sum() > 10 and short[both].median() < 2 * exact[both].median()


def test_evaluate_has_a_fourth_number_on_request():
    model = network("mlp")
    x, y = images(40, model)
    scores = evaluate(model, x, y, delta=0.02, found_steps=10)
    found = boundary(model, x, y, steps=10)
    assert scores.w_2_found == found.accuracy(Threat(p=2, delta=0.02)) <= scores.w_2
    assert torch.equal(scores.correct["w_2_found"], ~found.bought(Threat(p=2, delta=0.02)))
    plain = evaluate(model, x, y, delta=0.02)
    assert plain.w_2_found is None and plain.correct.keys() == {"clean", "w_inf", "w_2"}


def test_a_million_images_would_need_four_bytes_each():
    """And no tensor for each batch: many small ones between large ones break the heap into pieces."""
    model, seen = network("linear", dtype=torch.float32), []

    def stream():
        for _ in range(40):
            i = len(seen)
            seen.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
            x = torch.rand(25, 2, 3, 3, generator=torch.Generator().manual_seed(i))
            yield x, predict(model, x)

    found = boundary(model, stream(), steps=2, keep=False, batch_size=64)
    assert len(seen) == 40 and max(seen[20:]) <= max(seen[5:20])
    assert found.distance.shape == (1000,) and found.distance.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

MODEL = network("mlp")
X, Y = images(20, MODEL)
ATTACKS = {
    "wpgd": lambda threat: wpgd(MODEL, X, Y, threat),
    "wpgd_budget": lambda threat: wpgd_budget(MODEL, X, Y, threat, upsilon=1.0),
    "sensitivity": lambda threat: sensitivity(MODEL, X, Y, threat),
    "finetune": lambda threat: finetune(MODEL, (X, Y), None, FinetuneConfig(threat=threat, augment=False)),
}


@pytest.mark.parametrize("p", [1, 1.00001])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_w_pgd_says_that_it_cannot_take_p_of_one(attack, p):
    with pytest.raises(WdatError, match=r"W-PGD needs a threat with p of 1.001 or more, not 1.*: boundary takes any p"):
        attack(Threat(p=p))


@pytest.mark.parametrize("values", [torch.full((1000,), 0.1), torch.linspace(0.1, 1.1, 500)])
@pytest.mark.parametrize("delta", [0.0333, 0.002])
@pytest.mark.parametrize("p", [1, 2, 4, INF])
def test_where_all_images_are_alike_the_interval_is_that_of_the_rule_of_three(values, p, delta):
    """Also where they are so by rounding alone, for a finite p: each has the share 1 - (delta / t)^p."""
    found, threat = Boundary(values), Threat(p=p, delta=delta)
    low, high = found.interval(threat)
    if found.accuracy(threat) == 1:
        assert high == 1 and low == pytest.approx(1 - 3 / len(values))
    else:
        assert high - low > 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", [True, False])
def test_a_generator_of_batches_may_be_in_a_mode_of_its_own(mode, keep):
    whole = boundary(MODEL, X, Y, steps=5)

    def batches():
        with mode():
            yield from zip(X.clone().split(3), Y.split(3), strict=True)

    found = boundary(MODEL, batches(), steps=5, keep=keep, batch_size=8)
    torch.testing.assert_close(found.distance, whole.distance)


class NoLength(list):
    def __len__(self):
        raise NotImplementedError


def test_sizes_and_lengths_that_nobody_can_use_stop_nothing():
    whole = boundary(MODEL, X, Y, steps=5)
    for found in (
        boundary(MODEL, X, Y, steps=5, batch_size=10**30),
        boundary(MODEL, NoLength(MANY[:1]), steps=5, batch_size=10**30),
    ):
        torch.testing.assert_close(found.distance, whole.distance)


def test_results_with_tensors_can_be_compared():
    one, other = boundary(MODEL, X, Y, steps=1), boundary(MODEL, X, Y, steps=1)
    assert one == one and one != other
    assert wpgd(MODEL, X, Y, Threat(), steps=1) != wpgd(MODEL, X, Y, Threat(), steps=1)


@pytest.mark.parametrize("p", [1e17, 1e200, 1e308])
def test_a_curve_of_an_order_beyond_all_powers_is_that_of_the_greatest_distance(p):
    values = torch.tensor([0.03, 0.04, 0.0, 0.5], dtype=torch.float64)
    radii, accuracy = Boundary(values).curve(p)
    assert radii.tolist() == pytest.approx([0, 0.03, 0.04, 0.5]) and accuracy.tolist() == [0.75, 0.5, 0.25, 0]


class Short(list):
    """Says that it has more batches than it gives."""

    def __iter__(self):
        return iter(list(super().__iter__())[:1])


MANY = [(X, Y), (X, Y)]
WRONG = {
    "r must be a number above 1": lambda: boundary(MODEL, X, Y, r=1),
    "steps must be a whole number at least 1": lambda: boundary(MODEL, X, Y, steps=0),
    "model must be a torch.nn.Module": lambda: boundary(None, [(X, Y)]),
    "keep must be True or False": lambda: boundary(MODEL, X, Y, keep=1),
    "labels must be an int64 tensor, not NoneType": lambda: boundary(MODEL, X),
    "images must be a floating-point tensor": lambda: boundary(MODEL, [1], Y),
    "x must be images, or an iterable of pairs": lambda: boundary(MODEL, 3),
    "there are no images": lambda: boundary(MODEL, []),
    "batch 1 must be a pair": lambda: boundary(MODEL, [X]),
    "batch 2 must be a pair": lambda: boundary(MODEL, [(X, Y), X]),
    "batch 2 has images of shape": lambda: boundary(MODEL, [(X, Y), (X[:, :, :1], Y)]),
    "batch 2 has images of shape .* torch.float32": lambda: boundary(MODEL, [(X, Y), (X.float(), Y)]),
    "the batches ended after 1 of 2": lambda: boundary(MODEL, Short(MANY)),
    "labels must lie in 0..3": lambda: boundary(MODEL, [(X, Y), (X, Y + 4)]),
    "one class can make no error": lambda: boundary(network("mlp", classes=1), X, 0 * Y),
    "with one class can make no error": lambda: wpgd(network("mlp", classes=1), X, 0 * Y, Threat(), loss="margin"),
    "too coarse for a distance": lambda: boundary(network("mlp", dtype=torch.bfloat16), X.bfloat16(), Y),
    "threat has r = 2": lambda: Boundary(torch.ones(3)).accuracy(Threat(r=2)),
    "threat must be a Threat": lambda: Boundary(torch.ones(3)).accuracy(2),
    "p must be a number at least 1": lambda: Boundary(torch.ones(3)).curve(0.5),
    "call boundary with keep=True": lambda: boundary(MODEL, X, Y, steps=1, keep=False).spend(X, Threat()),
    "these are at other distances": lambda: boundary(MODEL, X, Y, steps=9).spend(X.flip(0), Threat()),
    "x must be the images that boundary was given": lambda: boundary(MODEL, X, Y, steps=1).spend(X[:3], Threat()),
}


@pytest.mark.parametrize(("message", "call"), WRONG.items(), ids=WRONG)
def test_bad_input_is_named(message, call):
    with pytest.raises(WdatError, match=message):
        call()


class Breaks(nn.Module):
    """Returns NaN for images whose first pixel is 1."""

    def forward(self, x):
        return torch.where(x.flatten(1)[:, :1] == 1, math.nan, MODEL(x))


@pytest.mark.parametrize("error", [WdatError, OSError, KeyboardInterrupt])
def test_what_was_found_before_an_error_is_not_lost(error):
    whole = boundary(MODEL, X, Y, steps=5)
    bad = X.clone()
    bad[:, 0, 0, 0] = 1

    def batches():
        yield from MANY
        if error is WdatError:
            yield bad, Y
        raise error

    with pytest.raises(error) as caught:
        boundary(Breaks(), batches(), steps=5, batch_size=8)
    found = caught.value.found
    assert 20 <= len(found.distance) <= 40 and torch.equal(found.distance[:20], whole.distance)
    assert torch.equal(found.x_adv[:20], whole.x_adv)
    with pytest.raises(WdatError) as caught:
        boundary(MODEL, [])
    assert caught.value.found is None


class SwitchedOff(nn.Module):
    """One more class, whose logit is the same for every image."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x):
        z = self.inner(x)
        return torch.cat([z, torch.full_like(z[:, :1], self.value)], 1)


@pytest.mark.parametrize("value", [-1e2, -1e4, -1e9, -1e38])
def test_a_class_that_is_switched_off_hides_no_error(value):
    """The logit of a third class says nothing about the rounding of the two that are compared."""
    model = network("mlp", dtype=torch.float32)
    x, y = images(40, model, dtype=torch.float32)
    plain, found = boundary(model, x, y), boundary(SwitchedOff(model, value), x, y)
    assert (plain.distance < INF).all()
    torch.testing.assert_close(found.distance, plain.distance, rtol=0.01, atol=5e-4)  # 0.2 % of a logit
    coarse = [boundary(net, x, y, precision="bfloat16") for net in (model, SwitchedOff(model, value))]
    assert (coarse[1].distance < INF).all()
    assert coarse[1].distance.mean() < 1.2 * coarse[0].distance.mean()
    config = FinetuneConfig(objective="worst_case", perturb="none", augment=False, epochs=1, steps=8, batch_size=40)
    trained = []
    for net in (copy.deepcopy(model), SwitchedOff(copy.deepcopy(model), value)):
        finetune(net, (x, y), None, config)
        trained.append(next(net.parameters()).detach())
    torch.testing.assert_close(trained[0], trained[1], rtol=0.02, atol=1e-3)
    assert not torch.equal(trained[0], next(model.parameters()))


def test_an_image_without_logits_does_not_stop_the_search():
    """A black image and a network without biases: all logits are 0, and so the image is at the boundary."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4, bias=False))
    x = torch.rand(6, 2, 3, 3)
    x[3] = 0
    found = boundary(model, x, model(x).argmax(1))
    assert found.distance.isfinite().all() and found.distance[3] < 1e-3
    assert (found.distance[[0, 1, 2, 4, 5]] > 0).all()


def test_a_progress_that_passes_on_too_little_is_named():
    model = network("mlp")
    x, y = images(24, model)

    def first(things):
        yield next(iter(things))

    def attack(progress):
        return wpgd(model, x, y, Threat(delta=0.05), progress=progress)

    for call, what in (
        (lambda: boundary(model, x, y, batch_size=8, progress=first), "batches ended after 1 of 3"),
        (lambda: boundary(model, DataLoader(list(zip(x, y, strict=True)), 8), progress=first), "batches ended after 1"),
        (lambda: attack(first), "steps ended after 1 of 20"),
        (lambda: attack(lambda things: ()), "steps ended after 0 of 20"),
        (lambda: wpgd_budget(model, x, y, Threat(), upsilon=1.0, batch_size=8, progress=first), "batches ended"),
    ):
        with pytest.raises(WdatError, match=f"{what}.*pass on all"):
            call()
    config = FinetuneConfig(epochs=1, steps=1, batch_size=8, augment=False)
    with pytest.raises(WdatError, match=r"minibatches ended after 1 of 3.*pass on all"):
        finetune(network("mlp"), (x, y), None, config, progress=first)


def test_where_nothing_is_found_and_the_last_batch_is_all_wrong_nothing_is_blamed():
    """Nothing near was found, which is no reason to say that there is no gradient."""
    flat = torch.zeros(1, *X.shape[1:], dtype=X.dtype)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    found = boundary(model, [(flat, torch.zeros(1).long()), (X[:2], torch.ones(2).long())], steps=2)
    assert found.distance.tolist() == [INF, 0, 0]
