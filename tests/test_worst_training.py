"""Training for the worst case: the slope of the lowest accuracy in the ball, in the distances and in the parameters."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from tiny import INF, conjugate, images, lengths, network
from torch import nn

from wdat_core import Boundary, FinetuneConfig, Threat, WdatError, boundary, finetune, trades, worst_case

ORDERS = (1, 1.5, 2, 4)


def split_accuracy(distance, threat):
    """A_p(delta) where one image can be split: without steps, so that it has a slope."""
    return Boundary(distance, threat.r).shares(threat).mean().item()


def some_distances(seed):
    """Forty distances, some of them 0, and one inf."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.1 * torch.rand(40, generator=generator, dtype=torch.float64)
    values[:6], values[6] = 0.0, INF
    return values


# ---------------------------------------------------------------------------------------------------------------------
# In the distances
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("delta", [0.002, 0.01, 0.03])
def test_the_slope_is_that_of_finite_differences(p, delta):
    distance, threat, h = some_distances(int(p)), Threat(p, INF, delta), 1e-7
    slope = Boundary(distance).slope(threat)
    for i, d in enumerate(distance):
        if not 0 < d < INF:
            assert slope[i] == 0
            continue
        up, down = distance.clone(), distance.clone()
        up[i], down[i] = d + h, d - h
        numeric = (split_accuracy(up, threat) - split_accuracy(down, threat)) / (2 * h)
        assert slope[i].item() == pytest.approx(numeric, abs=1e-5)
    assert 0 < (slope > 0).sum() < 34


@pytest.mark.parametrize("p", ORDERS)
def test_it_has_the_form_of_the_envelope_theorem(p):
    found, threat = Boundary(some_distances(0)), Threat(p, INF, 0.02)
    bought, t = found.bought(threat) & (found.distance > 0), found.price(threat)
    assert t == found.distance[~found.bought(threat)].min()
    expected = p * found.distance[bought] ** (p - 1) / (40 * t**p)
    torch.testing.assert_close(found.slope(threat)[bought], expected)
    given = found.slope(threat, price=t.item())
    torch.testing.assert_close(given[bought], expected)
    assert (given > 0).sum() == bought.sum() + 1  # the next one too, of which the budget pays a part


def test_images_of_the_same_price_share_what_the_budget_leaves_to_them():
    found, threat = Boundary(torch.tensor([0.01, 0.02, 0.02, 0.02], dtype=torch.float64)), Threat(2, INF, 0.0125)
    slope = found.slope(threat)
    assert slope[1] == slope[2] == slope[3]
    scaled = [split_accuracy(found.distance + h * torch.tensor([0, 1, 1, 1]), threat) for h in (-1e-7, 1e-7)]
    assert slope[1:].sum().item() == pytest.approx((scaled[1] - scaled[0]) / 2e-7, rel=1e-5)


def test_no_small_change_saves_an_image_where_the_budget_pays_for_all():
    found, threat = Boundary(torch.tensor([0.0, 0.01, 0.02])), Threat(2, INF, 0.05)
    assert found.price(threat) == pytest.approx(0.02) and (found.slope(threat) == 0).all()
    assert (found.slope(threat, price=0.02) > 0).tolist() == [False, True, True]


@pytest.mark.parametrize("values", [[0.0, 0.0], [INF, INF], [0.0, INF]])
def test_where_there_is_nothing_to_buy_there_is_no_price_and_no_slope(values):
    found = Boundary(torch.tensor(values))
    assert found.price(Threat()) is None and (found.slope(Threat()) == 0).all()


@pytest.mark.parametrize(
    "message, call",
    {
        "pointwise threat has no slope": lambda found: found.slope(Threat(p=INF)),
        "price must be a number above 0": lambda found: found.slope(Threat(), price=0.0),
        "price must be a number above 0, not nan": lambda found: found.slope(Threat(), price=math.nan),
        "threat must be a Threat": lambda found: found.price(2),
    }.items(),
)
def test_bad_input_is_named(message, call):
    with pytest.raises(WdatError, match=message):
        call(Boundary(torch.tensor([0.01, 0.02])))


# ---------------------------------------------------------------------------------------------------------------------
# In the parameters
# ---------------------------------------------------------------------------------------------------------------------


def nearest_exactly(model, x, y):
    """The nearest points of the decision boundary in l_2, (n, ...), to 1e-10: no attack, but a solver, in float64."""
    nearest = []
    for image, label in zip(x, y, strict=True):

        def value_and_gradient(flat, j, image=image, label=label):
            z = torch.from_numpy(flat).reshape(1, *image.shape).requires_grad_()
            logits = model(z)[0]
            (gradient,) = torch.autograd.grad(logits[label] - logits[j], z)
            return (logits[label] - logits[j]).item(), gradient.flatten().numpy()

        start, tried = image.flatten().numpy(), []
        for j in range(4):
            if j == label:
                continue
            found = minimize(
                lambda flat, start=start: (((flat - start) ** 2).sum(), 2 * (flat - start)),
                start,
                jac=True,
                method="SLSQP",
                bounds=[(0, 1)] * len(start),
                constraints={
                    "type": "eq",
                    "fun": lambda flat, j=j: value_and_gradient(flat, j)[0],
                    "jac": lambda flat, j=j: value_and_gradient(flat, j)[1],
                },
                options={"ftol": 1e-15, "maxiter": 200},
            )
            if abs(value_and_gradient(found.x, j)[0]) < 1e-9:
                flat = found.x.round(12) if min(abs(found.x).min(), abs(1 - found.x).min()) < 1e-9 else found.x
                tried.append((found.fun, flat))  # exactly 0 or 1 where the solver stopped there
        nearest.append(torch.from_numpy(min(tried, key=lambda pair: pair[0])[1]).reshape(image.shape))
    return torch.stack(nearest)


def right_ones(n, model, **options):
    """Images that the network reads rightly, at some distance from its boundaries."""
    x, y = images(3 * n, model, **options)
    x = x.clamp(0, 1)
    with torch.no_grad():
        top = model(x).topk(2).values
        sure = (model(x).argmax(1) == y) & (top[:, 0] - top[:, 1] > 0.05)
    return x[sure][:n], y[sure][:n]


@pytest.mark.parametrize("low", [0.4, -0.5])
@pytest.mark.parametrize("kind", ["linear", "smooth"])
def test_the_gradient_of_the_accuracy_in_the_parameters_is_that_of_finite_differences(kind, low):
    """The whole chain, in float64: parameters to distances to A_2(delta), on distances that a solver finds.

    With and without pixels that are black or white, and cannot go on.
    """
    model = network(kind)
    x, y = right_ones(12, model, low=low, high=1 - low)
    nearest = nearest_exactly(model, x, y)
    stopped = ((nearest == x) & ((x == 0) | (x == 1))).float().mean().item()
    assert stopped == 0 if low > 0 else stopped > 0.1
    threat = Threat(2, 2.0, 0.6 * lengths(nearest - x, 2).median().item())

    def exact(model):
        nearest = nearest_exactly(model, x, y)
        return Boundary(lengths(nearest - x, 2), 2.0, nearest)

    gradients = []

    def objective(batch):
        found = exact(model)
        order = [int((x == image).flatten(1).all(1).nonzero()) for image in batch.x]
        found = Boundary(found.distance[order], 2.0, found.x_adv[order])
        total = (found.slope(threat) * batch.distance(found)).sum()
        gradients.extend(torch.autograd.grad(total, [*batch_parameters], retain_graph=True))
        return total

    start = copy.deepcopy(model.state_dict())
    batch_parameters = [p for p in model.parameters() if p.ndim > 1]
    config = FinetuneConfig(objective=objective, perturb="none", augment=False, epochs=1, batch_size=12, threat=threat)
    finetune(model, (x, y), None, config)

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in batch_parameters]
        ends, h = [], 1e-5
        for sign in (1, -1):
            model.load_state_dict(start)
            with torch.no_grad():
                for parameter, direction in zip(batch_parameters, way, strict=True):
                    parameter += sign * h * direction
            ends.append(split_accuracy(exact(model).distance, threat))
        numeric = (ends[0] - ends[1]) / (2 * h)
        formula = sum((g * d).sum().item() for g, d in zip(gradients, way, strict=True))
        assert abs(numeric) > 1e-3 and formula == pytest.approx(numeric, rel=1e-3)


def seen(config_fields, model, x, y, look):
    """What `look` says of the first minibatch of a run on these images; the run itself changes nothing."""
    said = []

    def objective(batch):
        said.append(look(batch))
        return 0 * batch.net(batch.x).sum()

    fields = {"perturb": "none", "augment": False, "epochs": 1, "batch_size": len(x), "steps": 8} | config_fields
    finetune(model, (x, y), None, FinetuneConfig(objective=objective, **fields))
    return said[0]


@pytest.mark.parametrize("r", [INF, 2.0])
def test_a_minibatch_is_searched_as_boundary_searches(r):
    model = network("mlp")
    x, y = images(24, model)
    order, found = seen({}, model, x, y, lambda batch: (batch.x, batch.boundary(r)))
    rows = [int((x == image).flatten(1).all(1).nonzero()) for image in order]
    alone = boundary(model, x[rows], y[rows], r=r, steps=8)
    assert torch.equal(found.distance, alone.distance) and torch.equal(found.x_adv, alone.x_adv)


@pytest.mark.parametrize("r", [INF, 2.0])
def test_distances_have_their_values_and_move_as_the_margin_does(r):
    model = network("mlp")
    x, y = images(24, model)

    def look(batch):
        found = batch.boundary(r)
        distance = batch.distance(found)
        weight = model[2].weight.requires_grad_()
        return (
            batch.x,
            batch.y,
            found,
            distance.detach(),
            torch.autograd.grad(distance[found.distance < INF].sum(), weight)[0],
        )

    images_of_the_batch, y, found, distance, gradient = seen({}, model, x, y, look)
    assert torch.equal(distance, found.distance)
    z = found.x_adv.clone().requires_grad_()
    own = F.one_hot(y, 4).bool()

    def margin():
        logits = model(z)
        return logits[own] - logits.masked_fill(own, -INF).amax(1)

    (slope,) = torch.autograd.grad(margin().sum(), z)
    stopped = ((z == 0) & (slope > 0)) | ((z == 1) & (slope < 0))
    slope = slope.masked_fill(stopped, 0.0)
    moves = (found.distance > 0) & (found.distance < INF)
    if r == 2:
        far = (z - images_of_the_batch).detach()
        grows = torch.where(moves, lengths(far, r) / lengths(far.masked_fill(stopped, 0.0), r), 1.0)
        slope = slope * grows.view(-1, 1, 1, 1)
    weight = model[2].weight.requires_grad_()
    expected = torch.autograd.grad((margin() / lengths(slope, conjugate(r)))[moves].sum(), weight)[0]
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


def test_in_l_inf_pixels_that_cannot_go_on_have_no_part():
    """A linear network, its distances by hand: at d, x* is the image moved by d along the signs, within [0, 1]."""
    model = network("linear")
    x, y = right_ones(8, model, low=-0.5, high=1.5)
    weight, bias = (p.detach().clone() for p in model[-1].parameters())

    def by_hand(weight):
        found, points = [], []
        for image, label in zip(x.flatten(1), y, strict=True):
            tried = []
            for j in {0, 1, 2, 3} - {int(label)}:
                w, b = 8 * (weight[label] - weight[j]), bias[label] - bias[j]  # of an image as it is: see tiny.Centre
                b = b - w.sum() / 2
                low, high = 0.0, 1.0
                for _ in range(60):
                    middle = (low + high) / 2
                    point = (image - middle * w.sign()).clamp(0, 1)
                    low, high = (middle, high) if point @ w + b > 0 else (low, middle)
                if high < 1:
                    tried.append((high, (image - high * w.sign()).clamp(0, 1)))
            distance, point = min(tried, key=lambda pair: pair[0])
            found.append(distance)
            points.append(point.view(x.shape[1:]))
        return torch.tensor(found, dtype=torch.float64), torch.stack(points)

    distance, points = by_hand(weight)
    assert (((points == 0) | (points == 1)) & (points == x)).float().mean() > 0.1

    def look(batch):
        order = [int((x == image).flatten(1).all(1).nonzero()) for image in batch.x]
        moving = batch.distance(Boundary(distance[order], INF, points[order]))
        return torch.autograd.grad(moving.sum(), model[-1].weight)[0]

    formula = seen({}, model, x, y, look)
    way, h = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype), 1e-6
    numeric = (by_hand(weight + h * way)[0].sum() - by_hand(weight - h * way)[0].sum()) / (2 * h)
    assert (formula * way).sum().item() == pytest.approx(numeric.item(), rel=1e-4)


def test_a_distance_that_nothing_but_the_wall_decides_does_not_move():
    """Every pixel that moved is at 1 and cannot go on: the boundary lies along the other one, however far."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    model[1].weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.1]], dtype=torch.float64)
    x, y = torch.tensor([[0.9, 0.5]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def look(batch):
        weight = model[1].weight.requires_grad_()
        gradients = []
        for point in ([1.0, 0.5], [0.95, 0.5]):  # stopped, and free
            nearest = torch.tensor([point], dtype=torch.float64)
            found = Boundary(torch.linalg.vector_norm(nearest - x, 2, 1), 2.0, nearest)
            gradients.append(torch.autograd.grad(batch.distance(found).sum(), weight)[0])
        return gradients

    stopped, free = seen({"loss": "margin"}, model, x, y, look)
    assert (stopped == 0).all() and free.abs().max() > 0.5


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_worst_case_by_hand(eta):
    """CE - beta sum of slope times distance, with a price that follows that of the minibatches."""
    model = network("smooth")
    x, y = images(20, model)
    threat, prices, totals = Threat(2, INF, 0.05), [], []

    def objective(batch):
        found = batch.boundary(INF)
        now = found.price(threat).item()
        prices.append(prices[-1] + eta * (now - prices[-1]) if prices else now)
        slope = found.slope(threat, price=prices[-1])
        expected = F.cross_entropy(batch.net(batch.x), batch.y) - 2 * (slope * found.distance)[slope > 0].sum()
        total = worst_case(batch)
        totals.append((total.item(), expected.item()))
        return total

    fields = {"threat": threat, "eta": eta, "beta": 2.0, "steps": 6, "epochs": 2, "batch_size": 7, "tau": 0.05}
    fields |= {"augment": False}
    finetune(model, (x, y), None, FinetuneConfig(objective=objective, **fields))
    assert len(totals) == 6 and len(set(prices)) > 3
    for total, expected in totals:
        assert total == pytest.approx(expected, rel=1e-9)


def test_what_is_all_wrong_is_left_to_the_cross_entropy():
    model = network("smooth")
    x, _ = images(12, model)
    with torch.no_grad():
        y = model(x).argmin(1)
    config = FinetuneConfig(objective="worst_case", perturb="none", augment=False, epochs=1, batch_size=12, tau=1e-9)
    history = finetune(model, (x, y), None, config)
    assert history.epochs[0]["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


def test_it_raises_the_worst_case_that_it_trains_for():
    model = network("mlp", seed=3)
    x, y = images(240, model, low=0.2, high=0.8)
    threat = Threat(2, INF, 0.02)
    before = boundary(model, x, y).accuracy(threat)
    fields = {"threat": threat, "perturb": "none", "augment": False, "epochs": 12, "batch_size": 60, "tau": 0.05}
    finetune(model, (x, y), None, FinetuneConfig(objective="worst_case", beta=3.0, clip=10.0, **fields))
    assert boundary(model, x, y, steps=100).accuracy(threat) > before + 0.05


@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_the_gradient_is_no_longer_than_clip(clip):
    model = network("mlp")
    x, y = images(20, model)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    config = FinetuneConfig(
        perturb="none", augment=False, epochs=1, batch_size=20, tau=0.1, clip=clip, objective="wdat"
    )
    finetune(model, (x, y), None, config)
    length = (torch.nn.utils.parameters_to_vector(model.parameters()) - start).norm().item() / 0.1
    assert length == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize(
    "message, fields",
    {
        "no slope in the distances: give a finite p": {"objective": "worst_case", "threat": Threat(p=INF)},
        'objective="trades" is pointwise': {"objective": trades},
        "clip must be a number above 0": {"clip": 0.0},
        "clip must be a number above 0, not nan": {"clip": math.nan},
    }.items(),
)
def test_a_configuration_that_cannot_be_is_named(message, fields):
    with pytest.raises(WdatError, match=message):
        FinetuneConfig(**fields)


def test_images_too_coarse_for_a_distance_are_named():
    model = network("mlp", dtype=torch.bfloat16)
    x, y = images(8, model, dtype=torch.bfloat16)
    start = copy.deepcopy(model.state_dict())
    config = FinetuneConfig(objective="worst_case", augment=False, threat=Threat(delta=0.1), steps=2, epochs=1)
    with pytest.raises(WdatError, match="too coarse for a distance"):
        finetune(model, (x, y), None, config)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_distances_are_those_of_the_network_in_eval_mode_also_where_it_is_attacked_in_train_mode():
    """Only images that are right are searched: batch statistics would be of those alone, or of one image."""
    model = network("full")
    x, y = images(10, model)
    y = torch.where(torch.arange(10) < 1, y, (model(x).argmax(1) + 1) % 4)  # one right image at most

    def look(batch):
        found = batch.boundary(INF)
        with torch.no_grad():
            wrong = copy.deepcopy(model).eval()(found.x_adv).argmax(1) != batch.y
        return found.distance, wrong, batch.distance(found)

    distance, wrong, moved = seen({"attack_mode": "train", "threat": Threat(delta=0.1)}, model, x, y, look)
    assert torch.equal(distance, moved) and wrong[distance < INF].all()


def test_a_network_with_one_class_is_named_before_it_is_changed():
    model = network("linear", classes=1)
    x, _ = images(8, model, classes=1)
    start = copy.deepcopy(model.state_dict())
    config = FinetuneConfig(objective="worst_case", loss="ce", augment=False, epochs=1)
    with pytest.raises(WdatError, match="one class can make no error"):
        finetune(model, (x, torch.zeros(8, dtype=torch.int64)), None, config)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_a_gradient_too_long_to_be_measured_is_no_step_of_length_0():
    model = network("mlp", dtype=torch.float32)
    x, y = images(8, model, dtype=torch.float32)
    fields = {"objective": lambda batch: batch.net(batch.x).sum() * 1e30, "augment": False, "epochs": 1}
    with pytest.raises(WdatError, match="training diverged"):
        finetune(model, (x, y), None, FinetuneConfig(clip=1.0, **fields))


def test_a_price_may_be_given_as_it_is_returned():
    found, threat = Boundary(some_distances(0)), Threat(2, INF, 0.02)
    price = found.price(threat)
    assert torch.equal(found.slope(threat, price=price), found.slope(threat, price=price.item()))


def test_distances_need_the_nearest_images():
    model = network("mlp")
    x, y = images(12, model)

    def look(batch):
        with pytest.raises(WdatError, match="the nearest images were not kept"):
            batch.distance(boundary(model, batch.x, batch.y, steps=2, keep=False))
        return True

    assert seen({}, model, x, y, look)
