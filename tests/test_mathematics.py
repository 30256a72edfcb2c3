"""What the paper's formulas imply, on random networks, images and threats."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import INF, PIXELS, SHAPE, conjugate, images, lengths, mean, network, predict, reference_wpgd
from torch import nn

from wdat_core import (
    LOSSES,
    Threat,
    _pack,
    _unpack,
    ce,
    dlr,
    evaluate,
    margin,
    project,
    redlr,
    sensitivity,
    wpgd,
    wpgd_budget,
)

ORDERS = (1.1, 1.3, 1.5, 2.0, 3.0, INF)
DTYPES = (torch.float64, torch.float32)
THREATS = [(2, INF), (2, 2), (INF, INF), (INF, 2), (1.5, 3), (3, 1.5), (1.1, INF), (2, 1.1)]


@dataclass(frozen=True)
class Case:
    """A network, images and labels, and every parameter of an attack."""

    kind: str
    dtype: torch.dtype
    n: int
    seed: int
    threat: Threat
    loss: str
    steps: int
    step_ratio: float
    batch_size: int

    @property
    def model(self):
        return network(self.kind, dtype=self.dtype, seed=self.seed)

    @property
    def data(self):
        return images(self.n, self.model, dtype=self.dtype, seed=self.seed)

    @property
    def options(self):
        return {"loss": self.loss, "steps": self.steps, "step_ratio": self.step_ratio}

    @property
    def plain(self):
        """The arguments of `reference_wpgd` after the data."""
        p, r, delta = self.threat.p, self.threat.r, self.threat.delta
        return p, r, delta, LOSSES[self.loss], self.steps, self.step_ratio

    def attack(self, model, x, y):
        return wpgd(model, x, y, self.threat, batch_size=self.batch_size, **self.options)


def cases(dtypes=DTYPES, losses=tuple(LOSSES), p=ORDERS, r=ORDERS, longest=3.0):
    threats = st.builds(Threat, st.sampled_from(p), st.sampled_from(r), st.floats(1e-3, 0.5))
    return st.builds(
        Case,
        kind=st.sampled_from(("linear", "conv", "mlp")),
        dtype=st.sampled_from(dtypes),
        n=st.integers(1, 20),
        seed=st.integers(0, 2**32),
        threat=threats,
        loss=st.sampled_from(losses),
        steps=st.integers(1, 5),
        step_ratio=st.floats(0.1, longest),
        batch_size=st.integers(1, 25),
    )


exact = cases(dtypes=(torch.float64,))


def well_conditioned(attack):
    """DLR is 1 up to its 1e-12 on images whose label comes third: its gradient is then nothing but rounding."""
    return all(upsilon == 0 or upsilon > 1e-6 for upsilon in attack.history["upsilon"])


def rounding(dtype, scale=1.0):
    return 32 * torch.finfo(dtype).eps * scale


def moved(x_adv, x, threat):
    """The Wasserstein distance between two sets of images, in double precision."""
    return mean(lengths(x_adv.double() - x.double(), threat.r), threat.p).item()


# ---------------------------------------------------------------------------------------------------------------------
# The threat and the losses
# ---------------------------------------------------------------------------------------------------------------------


@given(st.floats(1.001, 1e3), st.floats(1.001, 1e3))
def test_conjugates(p, r):
    threat = Threat(p, r)
    assert 1 / threat.p + 1 / threat.q == pytest.approx(1, rel=1e-12)
    assert 1 / threat.r + 1 / threat.s == pytest.approx(1, rel=1e-12)


def test_conjugate_of_infinity():
    assert (Threat(INF, INF).q, Threat(INF, INF).s) == (1, 1)


seeds = st.integers(0, 2**32)


def logits_and_labels(seed, n=12, classes=5):
    """Random logits, no two of an image closer than 0.05."""
    generator = torch.Generator().manual_seed(seed)
    ascending = (0.05 + 3 * torch.rand(n, classes, generator=generator, dtype=torch.float64)).cumsum(1)
    order = torch.rand(n, classes, generator=generator).argsort(1)
    return ascending.gather(1, order) - 5, torch.randint(classes, (n,), generator=generator)


@given(seeds)
def test_losses_by_their_definitions(seed):
    logits, y = logits_and_labels(seed)
    for z, label, *values in zip(
        logits.tolist(), y.tolist(), *(f(logits, y).tolist() for f in (ce, dlr, redlr, margin)), strict=True
    ):
        rival = max(v for k, v in enumerate(z) if k != label)
        first, _, third, *_ = sorted(z, reverse=True)
        ratio = -(z[label] - rival) / (first - third)
        entropy = math.log(sum(math.exp(v) for v in z)) - z[label]
        assert values == pytest.approx([entropy, ratio, min(ratio, 0), min(rival - z[label], 0)], rel=1e-9)


@given(seeds)
def test_redlr_is_the_negative_part_of_dlr(seed):
    logits, y = logits_and_labels(seed)
    assert torch.equal(redlr(logits, y), dlr(logits, y).clamp(max=0))


@pytest.mark.parametrize("loss", [redlr, margin])
@given(seed=seeds)
def test_redlr_and_margin_have_gradient_zero_exactly_on_misclassified_images(loss, seed):
    logits, y = logits_and_labels(seed)
    (gradient,) = torch.autograd.grad(loss(logits.requires_grad_(), y).sum(), logits)
    assert torch.equal(gradient.abs().sum(1) > 0, logits.argmax(1) == y)


@pytest.mark.parametrize("loss", [redlr, margin])
def test_a_tie_that_another_class_wins_has_gradient_zero(loss):
    logits = torch.zeros(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([3, 1])).sum(), logits)
    assert not gradient.any()


@given(seeds, st.floats(-50, 50), st.floats(0.1, 10))
def test_dlr_ignores_shift_and_scale_of_the_logits(seed, shift, scale):
    logits, y = logits_and_labels(seed)
    torch.testing.assert_close(dlr(scale * logits + shift, y), dlr(logits, y), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [dlr, redlr])
def test_dlr_is_flat_where_the_three_largest_logits_are_equal(loss, dtype):
    """As they often are in 16 bits; 0 / 1e-12 has a gradient of 1e12, and is 0 / 0 in float16."""
    logits = torch.tensor([[2.0, 2, 2, 1], [0, 3, 3, 3]], dtype=dtype, requires_grad=True)
    values = loss(logits, logits.argmax(1))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert not values.any() and not gradient.any()


@pytest.mark.parametrize("logits", [[1 + 1e-9, 1.0, 1 - 1e-9, 0.0], [1.0, 1.0, 1 - 1e-9, 0.0]])
def test_dlr_keeps_its_slope_where_logits_are_nearly_equal(logits):
    logits = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    written = (logits[:, 1] - logits[:, 0]) / (logits[:, 0] - logits[:, 2] + 1e-12)
    value = dlr(logits, torch.tensor([0]))
    assert torch.equal(value, written)
    slope, expected = (torch.autograd.grad(v.sum(), logits)[0] for v in (value, written))
    assert slope.abs().max() > 1e8
    torch.testing.assert_close(slope, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Sensitivity, Theorem 4.1
# ---------------------------------------------------------------------------------------------------------------------


@given(exact)
def test_sensitivity_is_the_mean_norm_of_the_gradients(case):
    model, (x, y) = case.model, case.data
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[case.loss](model(z), y).sum(), z)
    expected = mean(lengths(gradient, conjugate(case.threat.r)), conjugate(case.threat.p)).item()
    got = sensitivity(model, x, y, case.threat, loss=case.loss, batch_size=case.batch_size)
    assert got == pytest.approx(expected, rel=1e-9, abs=0)


@given(cases(losses=("redlr",)), st.booleans())
def test_sensitivity_of_redlr_is_zero_only_when_no_image_is_classified_correctly(case, all_wrong):
    model, (x, y) = case.model, case.data
    if all_wrong:
        y = (predict(model, x) + 1) % 4
    upsilon = sensitivity(model, x, y, case.threat, batch_size=case.batch_size)
    assert (upsilon == 0) == (not (predict(model, x) == y).any())


def away_from_the_label(logits, y):
    """A loss affine in the images when the network is."""
    return -logits.gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("p, r", THREATS)
def test_closed_form_on_an_affine_loss(p, r):
    """V(delta) = V(0) + delta Upsilon: one step attains it, and no point of the ball exceeds it."""
    model, threat = network("linear"), Threat(p, r, delta=0.02)
    x, y = images(12, model, low=0.3, high=0.7)
    attack = wpgd(model, x, y, threat, loss=away_from_the_label, steps=1)
    upsilon = sensitivity(model, x, y, threat, loss=away_from_the_label)
    value = attack.history["loss"][0] + threat.delta * upsilon
    assert attack.x_adv.min() > 0 and attack.x_adv.max() < 1  # or the pixel range would have cut it short
    assert attack.loss == pytest.approx(value, rel=1e-12, abs=0)
    assert attack.distance == pytest.approx(threat.delta, rel=1e-12, abs=0)

    generator = torch.Generator().manual_seed(1)
    for scale in (0.001, 0.1, 1):  # around the optimum, and anywhere
        noise = scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        other = project(attack.x_adv + noise, x, threat)
        assert away_from_the_label(model(other), y).mean() <= value + 1e-12


@pytest.mark.parametrize("p, r", THREATS)
def test_upsilon_is_the_slope_of_the_value_at_zero(p, r):
    """(V(delta) - V(0)) / delta - Upsilon goes to 0 with delta, V measured by one step and by ten."""
    model = network("smooth")
    x, y = images(10, model, low=0.3, high=0.7)
    upsilon = sensitivity(model, x, y, Threat(p, r), loss="ce")
    for steps in (1, 10):
        errors = []
        for delta in (1e-2, 1e-3, 1e-4, 1e-5):
            attack = wpgd(model, x, y, Threat(p, r, delta), loss="ce", steps=steps)
            errors.append(abs((max(attack.history["loss"]) - attack.history["loss"][0]) / delta / upsilon - 1))
        assert errors[-1] < 1e-3
        assert all(after < before / 3 for before, after in itertools.pairwise(errors))


# ---------------------------------------------------------------------------------------------------------------------
# The projection
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def moves(draw, dtype=torch.float64):
    """Images, where they have been moved (some not at all), and a threat."""
    generator = torch.Generator().manual_seed(draw(seeds))
    n, scale = draw(st.integers(1, 20)), draw(st.floats(1e-3, 2))
    x = torch.rand(n, *SHAPE, generator=generator, dtype=dtype)
    move = scale * torch.randn(n, *SHAPE, generator=generator, dtype=dtype)
    move *= torch.rand(n, 1, 1, 1, generator=generator, dtype=dtype) ** 2
    move[torch.rand(n, generator=generator) < 0.2] = 0
    threat = draw(st.builds(Threat, st.sampled_from(ORDERS), st.sampled_from(ORDERS), st.floats(1e-3, 0.5)))
    return x + move, x, threat


@given(st.sampled_from(DTYPES).flatmap(moves))
def test_projection_ends_inside_the_ball_and_is_idempotent(case):
    x_adv, x, threat = case
    once = project(x_adv, x, threat)
    assert moved(once, x, threat) <= threat.delta + rounding(x.dtype)
    torch.testing.assert_close(project(once, x, threat), once, rtol=0, atol=rounding(x.dtype))


@given(moves())
def test_projection_ends_on_the_sphere_when_it_acts(case):
    x_adv, x, threat = case
    before = moved(x_adv, x, threat)
    after = moved(project(x_adv, x, threat), x, threat)
    assert after == pytest.approx(min(before, threat.delta), rel=1e-9)


@given(moves(), st.floats(0, 0.999))
def test_projection_leaves_interior_points_alone_bit_for_bit(case, fraction):
    x_adv, x, threat = case
    inside = x + (x_adv - x) * (fraction * threat.delta / max(moved(x_adv, x, threat), threat.delta))
    assert torch.equal(project(inside, x, threat), inside)


@given(moves())
def test_projection_shrinks_all_images_by_one_factor(case):
    """Budgets rho d_i with one rho for finite p; for p = inf each image on its own, at most delta."""
    x_adv, x, threat = case
    distance, after = (lengths(z - x, threat.r) for z in (x_adv, project(x_adv, x, threat)))
    rho = min(1, threat.delta / max(mean(distance, threat.p).item(), 1e-300))
    expected = distance.clamp(max=threat.delta) if threat.p == INF else rho * distance
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-14)


@given(moves())
def test_projection_for_the_pointwise_threat_keeps_images_that_are_inside(case):
    x_adv, x, threat = case
    threat = Threat(INF, threat.r, threat.delta)
    inside = lengths(x_adv - x, threat.r) <= threat.delta
    assert torch.equal(project(x_adv, x, threat)[inside], x_adv[inside])


# ---------------------------------------------------------------------------------------------------------------------
# W-PGD
# ---------------------------------------------------------------------------------------------------------------------


@given(cases())
def test_result_is_inside_the_ball_and_the_pixel_range(case):
    model, (x, y) = case.model, case.data
    attack = case.attack(model, x, y)
    assert attack.x_adv.min() >= 0 and attack.x_adv.max() <= 1
    assert moved(attack.x_adv, x, case.threat) <= case.threat.delta + rounding(case.dtype)
    assert (attack.x_adv.shape, attack.x_adv.dtype) == (x.shape, x.dtype)


@settings(max_examples=100)
@given(cases())
def test_report_is_that_of_the_returned_images(case):
    model, (x, y) = case.model, case.data
    attack = case.attack(model, x, y)
    with torch.no_grad():
        before, after = model(x), model(attack.x_adv)
    top = after.topk(3, dim=1).values
    gap = (top[:, 0] - top[:, 2]).min().item() if case.loss != "ce" else 1.0
    loss = LOSSES[case.loss](after, y).mean().item()
    # Where two classes tie up to rounding, a sum in another order may decide otherwise.
    sure = top[:, 0] - top[:, 1] > rounding(case.dtype, 10)
    assert torch.equal(attack.correct[sure], (after.argmax(1) == y)[sure])
    assert torch.equal(attack.was_correct, before.argmax(1) == y)
    assert attack.accuracy == attack.correct.sum().item() / len(x)
    assert attack.loss == pytest.approx(loss, rel=0, abs=rounding(case.dtype, 10 / gap))
    distance = moved(attack.x_adv, x, case.threat)
    assert attack.distance == pytest.approx(distance, rel=1e-5, abs=rounding(case.dtype))


@given(cases())
def test_history_holds_every_iterate_and_accuracy_is_its_minimum(case):
    attack = case.attack(case.model, *case.data)
    assert attack.accuracy == min(attack.history["accuracy"][1:])
    assert attack.history["accuracy"][0] == attack.was_correct.sum().item() / case.n
    assert attack.loss == attack.history["loss"][1:][attack.history["accuracy"][1:].index(attack.accuracy)]
    lengths_ = {name: len(values) for name, values in attack.history.items()}
    assert lengths_ == {"accuracy": case.steps + 1, "loss": case.steps + 1, "upsilon": case.steps}


@given(cases())
def test_first_upsilon_of_the_history_is_the_sensitivity(case):
    model, (x, y) = case.model, case.data
    upsilon = sensitivity(model, x, y, case.threat, loss=case.loss, batch_size=case.batch_size)
    first = case.attack(model, x, y).history["upsilon"][0]
    assert first == pytest.approx(upsilon, rel=1e-12, abs=0)


@settings(max_examples=100)
@given(exact)
def test_agrees_with_the_plain_implementation(case):
    """Looking again only at the images that moved changes nothing."""
    model, (x, y) = case.model, case.data
    attack = case.attack(model, x, y)
    assume(well_conditioned(attack))
    iterates, upsilons = reference_wpgd(model, x, y, *case.plain)
    with torch.no_grad():
        logits = [model(z) for z in iterates]
    accuracies = [(z.argmax(1) == y).sum().item() / len(x) for z in logits]
    losses = [LOSSES[case.loss](z, y).mean().item() for z in logits]
    best = 1 + accuracies[1:].index(min(accuracies[1:]))
    assert attack.history["accuracy"] == accuracies
    assert attack.history["loss"] == pytest.approx(losses, rel=1e-9, abs=1e-9)
    assert attack.history["upsilon"] == pytest.approx(upsilons, rel=1e-9, abs=0)
    torch.testing.assert_close(attack.x_adv, iterates[best], rtol=0, atol=1e-9)


@given(exact, st.integers(1, 25))
def test_batch_size_changes_nothing(case, other):
    model, (x, y) = case.model, case.data
    one = case.attack(model, x, y)
    assume(well_conditioned(one))
    two = wpgd(model, x, y, case.threat, batch_size=other, **case.options)
    assert one.history["accuracy"] == two.history["accuracy"]
    assert one.history["loss"] == pytest.approx(two.history["loss"], rel=1e-9, abs=1e-9)
    assert torch.equal(one.correct, two.correct)
    torch.testing.assert_close(one.x_adv, two.x_adv, rtol=0, atol=1e-9)


@given(exact)
def test_permuted_images_give_the_permuted_result(case):
    model, (x, y) = case.model, case.data
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(case.seed))
    plain, permuted = case.attack(model, x, y), case.attack(model, x[order], y[order])
    assume(well_conditioned(plain))
    torch.testing.assert_close(permuted.x_adv, plain.x_adv[order], rtol=0, atol=1e-9)
    assert torch.equal(permuted.correct, plain.correct[order])
    assert permuted.history["accuracy"] == plain.history["accuracy"]


def pgd(model, x, y, loss, step, steps, r, delta):
    """PGD as everyone writes it, for l_inf and l_2; its iterates."""
    iterates = [x]
    for _ in range(steps):
        z = iterates[-1].clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(model(z), y).sum(), z)
        if r == INF:
            move = (z + step * g.sign() - x).clamp(-delta, delta)
        else:
            move = (z + step * nn.functional.normalize(g.flatten(1), eps=1e-300).view_as(x) - x).flatten(1)
            move = (move * (delta / move.norm(dim=1, keepdim=True)).clamp(max=1)).view_as(x)
        iterates.append((x + move).clamp(0, 1).detach())
    return iterates


@pytest.mark.parametrize("r", [INF, 2.0])
def test_pointwise_threat_is_ordinary_pgd(r):
    @given(cases(dtypes=(torch.float64,), p=(INF,), r=(r,)))
    def check(case):
        model, (x, y) = case.model, case.data
        step = case.step_ratio * case.threat.delta / case.steps
        iterates = pgd(model, x, y, LOSSES[case.loss], step, case.steps, r, case.threat.delta)
        attack = case.attack(model, x, y)
        hits = [(predict(model, z) == y).sum().item() / len(x) for z in iterates]
        assert attack.history["accuracy"] == hits
        best = 1 + hits[1:].index(min(hits[1:]))
        torch.testing.assert_close(attack.x_adv, iterates[best], rtol=0, atol=1e-9)

    check()


@settings(max_examples=25)
@given(cases(dtypes=(torch.float64,), p=(INF,)))
def test_pointwise_threat_attacks_each_image_as_if_alone(case):
    model, (x, y) = case.model, case.data
    options = case.options | {"steps": 1}  # the returned iterate is then the same for all
    whole = wpgd(model, x, y, case.threat, **options).x_adv
    for i in range(len(x)):
        alone = wpgd(model, x[i : i + 1], y[i : i + 1], case.threat, **options).x_adv
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-9)


@given(st.sampled_from(ORDERS), st.sampled_from(ORDERS), st.integers(1, 20), st.floats(0.1, 1), seeds)
def test_a_step_has_unit_length(p, r, n, step_ratio, seed):
    """Far from the pixel bounds one step of length alpha moves the images by alpha in W_p."""
    model, threat = network("linear", seed=seed), Threat(p, r, delta=1e-3)
    x, y = images(n, model, low=0.4, high=0.6, seed=seed)
    attack = wpgd(model, x, y, threat, loss="ce", steps=1, step_ratio=step_ratio)
    assert attack.distance == pytest.approx(step_ratio * threat.delta, rel=1e-9, abs=0)
    # Cross-entropy of a linear network is convex, so that it gains what its slope promises, or more.
    gain = attack.loss - attack.history["loss"][0]
    assert gain >= step_ratio * threat.delta * attack.history["upsilon"][0] - 1e-14


@given(cases(losses=("redlr",)))
def test_redlr_leaves_misclassified_images_where_they_are(case):
    model, (x, y) = case.model, case.data
    attack = case.attack(model, x, y)
    assert torch.equal(attack.x_adv[~attack.was_correct], x[~attack.was_correct])
    assert not attack.correct[~attack.was_correct].any()


@given(cases(losses=("redlr",), dtypes=(torch.float64,), longest=0.99))
def test_redlr_never_wins_an_image_back_while_the_projection_sleeps(case):
    """With step_ratio below 1 the steps cannot leave the ball, so a misclassified image stays misclassified."""
    accuracy = case.attack(case.model, *case.data).history["accuracy"]
    assert accuracy == sorted(accuracy, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# W-PGD-budget and the evaluation
# ---------------------------------------------------------------------------------------------------------------------


@given(exact)
def test_budgets_of_the_batches_keep_the_whole_set_inside_the_ball(case):
    model, (x, y) = case.model, case.data
    upsilon = sensitivity(model, x, y, case.threat, loss=case.loss)
    assume(upsilon > 0)
    attack = wpgd_budget(model, x, y, case.threat, upsilon=upsilon, batch_size=case.batch_size, **case.options)
    assert moved(attack.x_adv, x, case.threat) <= case.threat.delta * (1 + 1e-9)
    assert attack.distance == pytest.approx(moved(attack.x_adv, x, case.threat), rel=1e-9, abs=1e-14)
    assert attack.history["upsilon"][0] == pytest.approx(upsilon, rel=1e-9, abs=0)


@given(exact, st.floats(0.3, 3))
def test_budget_of_a_batch_is_its_share(case, factor):
    """Each batch is attacked on its own with the radius delta (Upsilon_B / Upsilon)^(q-1)."""
    model, (x, y) = case.model, case.data
    upsilon = factor * (sensitivity(model, x, y, case.threat, loss=case.loss) or 1.0)
    options = case.options | {"batch_size": case.batch_size}
    whole = wpgd_budget(model, x, y, case.threat, upsilon=upsilon, **options)
    accuracies = []
    for rows in torch.arange(case.n).split(case.batch_size):
        own = sensitivity(model, x[rows], y[rows], case.threat, loss=case.loss)
        delta = case.threat.delta * (own / upsilon) ** (case.threat.q - 1)
        assume(delta <= 1)  # a threat has no larger one in l_inf
        assert moved(whole.x_adv[rows], x[rows], case.threat) <= delta * (1 + 1e-9) + 1e-14
        if own > 0:
            threat = Threat(case.threat.p, case.threat.r, delta)
            alone = wpgd(model, x[rows], y[rows], threat, **options)
            torch.testing.assert_close(whole.x_adv[rows], alone.x_adv, rtol=0, atol=1e-9)
        else:
            assert torch.equal(whole.x_adv[rows], x[rows])
        accuracies.append((predict(model, whole.x_adv[rows]) == y[rows]).sum().item())
    assert whole.accuracy == sum(accuracies) / case.n


@given(exact)
def test_budget_of_a_single_batch_with_its_own_upsilon_is_delta(case):
    model, (x, y) = case.model, case.data
    upsilon = sensitivity(model, x, y, case.threat, loss=case.loss) or 1.0
    budget = wpgd_budget(model, x, y, case.threat, upsilon=upsilon, batch_size=case.n, **case.options)
    attack = wpgd(model, x, y, case.threat, batch_size=case.n, **case.options)
    torch.testing.assert_close(budget.x_adv, attack.x_adv, rtol=0, atol=1e-9)
    assert budget.history["accuracy"] == attack.history["accuracy"]


@pytest.mark.parametrize("steps", [1, 20])
def test_evaluate_is_clean_accuracy_pgd_with_ce_and_w2_with_redlr(steps):
    model = network("conv")
    x, y = images(40, model)
    scores = evaluate(model, x, y, delta=0.02, steps=steps, batch_size=16)
    pointwise = wpgd(model, x, y, Threat(INF, INF, 0.02), loss="ce", steps=steps)
    distributional = wpgd(model, x, y, Threat(2, INF, 0.02), loss="redlr", steps=steps)
    assert scores.clean == (predict(model, x) == y).double().mean().item()
    assert (scores.w_inf, scores.w_2) == (pointwise.accuracy, distributional.accuracy)
    assert 0 < scores.w_2 < scores.clean and 0 < scores.w_inf < scores.clean
    for name, expected in {
        "clean": predict(model, x) == y,
        "w_inf": pointwise.correct,
        "w_2": distributional.correct,
    }.items():
        assert torch.equal(scores.correct[name], expected)


def test_images_of_any_shape():
    """(n, pixels) and (n, c, h, w) are the same to the attack."""
    model = network("mlp")
    x, y = images(8, model)
    flat = nn.Sequential(nn.Unflatten(1, SHAPE), model)
    for p, r in THREATS:
        shaped = wpgd(model, x, y, Threat(p, r, 0.05), steps=3).x_adv
        assert torch.equal(wpgd(flat, x.flatten(1), y, Threat(p, r, 0.05), steps=3).x_adv, shaped.view(8, PIXELS))


@pytest.mark.parametrize("r", [2, math.inf])
def test_distances_whose_inverse_is_infinite_are_projected(r):
    x = torch.tensor([[5.5e-309], [1.0]], dtype=torch.float64)
    x_adv = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert (project(x_adv, x, Threat(r=r, delta=5e-324)) - x).abs().max() <= 5e-324


@pytest.mark.parametrize("shape", [(18,), (2, 3, 3), (1, 1, 1), (2, 2, 3), (1, 1, 7)])
def test_signs_are_packed_and_unpacked(shape):
    signs = torch.randint(-1, 2, (5, *shape), generator=torch.Generator().manual_seed(0)).double()
    packed = _pack(signs)
    assert packed.shape == (5, math.ceil(math.prod(shape) / 4)) and packed.dtype == torch.uint8
    assert torch.equal(_unpack(packed, signs).double(), signs)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1), (1, 1, 7), (2, 2, 3)], ids=str)
def test_any_number_of_pixels_is_attacked_as_plainly_written(shape, p):
    """Four pixels share a byte; the images need not have four times as many."""
    model = network("smooth", shape=shape)
    x, y = images(9, model, shape=shape)
    attack = wpgd(model, x, y, Threat(p, INF, 0.05), loss="ce", steps=3)
    iterates, _ = reference_wpgd(model, x, y, p, INF, 0.05, ce, 3, 1.0)
    best = 1 + attack.history["accuracy"][1:].index(attack.accuracy)
    torch.testing.assert_close(attack.x_adv, iterates[best], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(8,), (1, 2, 4)], ids=str)
def test_images_that_are_transposed_in_memory(shape):
    """Also with four times as many pixels as bytes, where packing makes no copy."""
    model = network("smooth", shape=(1, 2, 4))
    x, y = images(9, model, shape=shape)
    transposed = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(transposed, x) and not transposed.is_contiguous()
    for p in (2, INF):
        attack = wpgd(model, transposed, y, Threat(p, INF, 0.05), steps=3)
        plain = wpgd(model, x, y, Threat(p, INF, 0.05), steps=3)
        torch.testing.assert_close(attack.x_adv, plain.x_adv, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "threat", [Threat(INF, INF, 0.05), Threat(INF, 2.0, 0.3), Threat(10, INF, 0.05), Threat(2, INF, 0.05)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_images_stay_in_the_ball_up_to_the_rounding_of_a_pixel(threat, dtype):
    """Steps too short for the numbers add up to no more."""
    model = network("conv", dtype=dtype)
    x, y = images(40, model, dtype=dtype)
    attack = wpgd(model, x, y, threat, loss="ce", steps=20)
    rounding = torch.finfo(dtype).eps / 2 * (1 if threat.r == INF else PIXELS**0.5)
    moved = lengths((attack.x_adv.double() - x.double()), threat.r)
    assert mean(moved, threat.p) <= threat.delta * (1 + 2 * torch.finfo(dtype).eps) + rounding
