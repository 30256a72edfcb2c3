"""How images go through the model: which, how often, how many at once, in which format, precision and place."""

import copy
import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import INF, configuration, images, lengths, mean, network, predict, reference_wpgd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wdat_core import (
    FinetuneConfig,
    Threat,
    WdatError,
    _passes,
    ce,
    evaluate,
    finetune,
    redlr,
    sensitivity,
    wpgd,
    wpgd_budget,
)

THREAT = Threat(delta=0.05)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))) or " " in torch.__file__,
    reason="torch.compile needs a compiler, and links nothing in a folder with a space in its name",
)


class Log(nn.Module):
    """A network that notes the images of every pass, and whether their gradient is wanted."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append((x.detach().clone(), x.requires_grad))
        return self.inner(x)


def attacked(loss, steps=4, n=20, **options):
    """What the network saw in an attack, and the iterates of W-PGD written plainly."""
    model = network("mlp")
    x, y = images(n, model)
    log = Log(model)
    # The first pass is that of the check, on one image.
    wpgd(log, x, y, THREAT, loss=loss, steps=steps, **options)
    functions = {"ce": ce, "redlr": redlr}
    iterates, _ = reference_wpgd(model, x, y, 2.0, INF, THREAT.delta, functions[loss], steps, 1.0)
    return log.seen[1:], iterates, (model, x, y)


# ---------------------------------------------------------------------------------------------- which, and how often


def test_under_ce_an_attack_is_its_steps_and_one_forward_pass():
    seen, iterates, _ = attacked("ce")
    assert [(len(x), wants) for x, wants in seen] == 4 * [(20, True)] + [(20, False)]
    for (x, _), iterate in zip(seen, iterates, strict=True):
        torch.testing.assert_close(x, iterate, rtol=0, atol=1e-12)


def test_under_redlr_only_images_that_moved_are_looked_at_again():
    seen, iterates, (model, _, y) = attacked("redlr")
    moved = [torch.ones(20, dtype=torch.bool), *((b != a).flatten(1).any(1) for a, b in itertools.pairwise(iterates))]
    assert [len(x) for x, _ in seen] == [rows.sum().item() for rows in moved]
    assert len(seen[1][0]) == (predict(model, iterates[0]) == y).sum() < 20
    for (x, _), iterate, rows in zip(seen, iterates, moved, strict=True):
        torch.testing.assert_close(x, iterate[rows], rtol=0, atol=1e-12)


def test_no_image_is_looked_at_again_where_all_are_misclassified():
    model = network("mlp")
    x, _ = images(10, model)
    log = Log(model)
    wpgd(log, x, (predict(model, x) + 1) % 4, THREAT, steps=5)
    assert [len(z) for z, _ in log.seen] == [1, 10]


def constant(gradient, before):
    """A rule that moves every image, whatever its gradient."""
    return torch.ones_like(gradient)


def test_along_a_rule_images_with_gradient_0_are_looked_at_again():
    """They may move: an image that stays where it is under the gradient is saved, one under a rule is not."""
    seen, _, (model, x, _) = attacked("redlr", rule=constant)
    assert [(len(z), wants) for z, wants in seen] == 4 * [(20, True)] + [(20, False)]
    wrong = (predict(model, x) + 1) % 4
    attack = wpgd(model, x, wrong, THREAT, steps=4, rule=constant)
    assert (attack.x_adv > x).flatten(1).any(1).all()
    assert attack.distance == pytest.approx(mean(lengths(attack.x_adv - x, INF), 2).item(), rel=1e-12)


@pytest.mark.parametrize("mode, again", [("train", 5), ("eval", 1)])
def test_in_train_mode_images_with_gradient_0_are_looked_at_again(mode, again):
    """What the network says of an image depends on the others there: only in eval mode is it known."""
    model = network("mlp")
    x, _ = images(8, model)
    log, wrong = Log(model), (predict(model, x) + 1) % 4
    options = {"epochs": 1, "batch_size": 8, "sample": 0.5, "augment": False, "noise": 0.0}
    config = FinetuneConfig(threat=THREAT, steps=5, **options, attack_mode=mode)
    finetune(log, (x, wrong), None, config)
    attack = [(len(z), wants) for z, wants in log.seen if wants and len(z) == 8]
    assert len(attack) == again  # the last iterate is not looked at in training


@pytest.mark.parametrize("batch_size", [1, 7, 20, 512])
@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_never_more_images_at_once_than_the_batch_size(loss, batch_size):
    seen, _, _ = attacked(loss, batch_size=batch_size)
    sizes = [len(x) for x, _ in seen]
    assert max(sizes) == min(batch_size, 20)


@pytest.mark.parametrize(
    "n, size, rows", [(10, 4, None), (10, 4, 9), (10, 4, 3), (3, 8, None), (10, 4, 0), (8, 4, None)]
)
@pytest.mark.parametrize("fixed", [False, True])
def test_batches_hold_each_image_and_are_even(n, size, rows, fixed):
    x = torch.arange(n)
    passes = _passes(nn.Identity(), x, size, "float32", fixed)
    wanted = x if rows is None else x[:rows] * 1
    parts = [x[part] for part in passes.batches(x, None if rows is None else wanted)]
    assert torch.equal(torch.cat([*parts, x[:0]]).unique(), wanted)
    sizes = [len(part) for part in parts]
    if fixed:
        assert set(sizes) <= {min(n, size)}
    else:
        assert sum(sizes) == len(wanted) and max(sizes, default=0) <= size
    if rows and not fixed:
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rows", [None, 9])
def test_in_train_mode_no_image_comes_twice(rows):
    """Copies that fill up a batch for a compiled network would change its statistics."""
    x = torch.arange(10)
    passes = replace(_passes(nn.Identity(), x, 4, "float32", True), whole=True)
    parts = [x[part] for part in passes.batches(x, None if rows is None else x[:rows])]
    assert torch.equal(torch.cat(parts), x[:rows])


def test_progress_wraps_the_steps_or_the_batches_of_an_attack():
    model, shown = network("mlp"), []
    x, y = images(20, model)

    def show(items):
        shown.append(len(items))
        return items

    plain, wrapped = (wpgd(model, x, y, THREAT, steps=4, progress=progress).x_adv for progress in (None, show))
    assert torch.equal(plain, wrapped)
    wpgd_budget(model, x, y, THREAT, upsilon=1.0, steps=4, batch_size=8, progress=show)
    evaluate(model, x, y, steps=3, progress=show)
    assert shown == [4, 3, 3, 3]


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a number, or how many rows there are."""

    def __init__(self):
        super().__init__()
        self.numbers = self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.numbers += function is torch.ops.aten._local_scalar_dense.default
        self.rows += function is torch.ops.aten.nonzero.default
        return function(*args, **(kwargs or {}))


def reads(steps, **options):
    model = network("mlp")
    x, y = images(20, model)
    with Reads() as count:
        wpgd(model, x, y, THREAT, steps=steps, **options)
    return count


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("loss", ["ce", "dlr", "redlr"])
def test_the_host_reads_no_number_between_the_steps(loss, p):
    """Only which images are worth looking at, and that only where the loss can be flat."""
    model = network("mlp")
    x, y = images(20, model)
    short, long = (Reads() for _ in range(2))
    for steps, count in ((3, short), (9, long)):
        with count:
            wpgd(model, x, y, Threat(p=p, delta=0.05), loss=loss, steps=steps)
    assert long.numbers == short.numbers
    assert (short.rows, long.rows) == ((3, 9) if loss == "redlr" else (0, 0))


# ---------------------------------------------------------------------------------------- format, precision, compiled


@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_channels_last_images_stay_so(loss):
    model = network("conv", shape=(3, 6, 5))
    x, y = images(11, model, shape=(3, 6, 5))
    x = x.contiguous(memory_format=torch.channels_last)
    log = Log(model)
    result = wpgd(log, x, y, THREAT, loss=loss, steps=3, batch_size=4).x_adv
    for seen in (result, *(z for z, _ in log.seen[1:])):
        assert seen.is_contiguous(memory_format=torch.channels_last)
    plain = wpgd(model, x.contiguous(), y, THREAT, loss=loss, steps=3, batch_size=4).x_adv
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-9)


def single():
    model = network("conv", dtype=torch.float32)
    x, y = images(30, model, dtype=torch.float32)
    return model, x, y


def test_bfloat16_is_autocast_of_the_network_alone():
    """The network computes in bfloat16; images, their distance and the losses stay in float32."""
    model, x, y = single()
    kinds = []
    model[3].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    model[1].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    attack = wpgd(model, x, y, THREAT, steps=3, precision="bfloat16")
    assert set(kinds[2:]) == {torch.bfloat16}  # the check before them is in float32
    assert attack.x_adv.dtype == torch.float32
    assert attack.distance <= THREAT.delta * (1 + 1e-6)
    moved = mean(lengths((attack.x_adv - x).double(), INF), 2)
    assert attack.distance == pytest.approx(moved.item(), rel=1e-5)
    plain = wpgd(model, x, y, THREAT, steps=3)
    assert not torch.equal(attack.x_adv, plain.x_adv)
    assert attack.history["loss"] == pytest.approx(plain.history["loss"], abs=0.05)


def test_bfloat16_reaches_every_function():
    model, x, y = single()
    plain, lower = ({"precision": precision} for precision in ("float32", "bfloat16"))
    pairs = [
        [sensitivity(model, x, y, THREAT, **options) for options in (plain, lower)],
        [wpgd_budget(model, x, y, THREAT, upsilon=20.0, **options).history["loss"][1] for options in (plain, lower)],
    ]
    for a, b in pairs:
        assert a != b and a == pytest.approx(b, rel=0.05)
    kinds = set()
    model[3].register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    evaluate(model, x, y, steps=2, **lower)
    assert torch.bfloat16 in kinds


def test_finetuning_in_bfloat16_stays_close_to_float32():
    models = [single()[0] for _ in range(2)]
    _, x, y = single()
    for model, precision in zip(models, ("float32", "bfloat16"), strict=True):
        config = FinetuneConfig(threat=THREAT, steps=2, epochs=2, batch_size=10, precision=precision)
        finetune(model, (x, y), (x, y), config)
    assert not torch.equal(models[0][1].weight, models[1][1].weight)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)


@compiler
def test_a_compiled_network_gives_the_same():
    torch._dynamo.reset()  # whatever was compiled before
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model, x, y = single()
    options = {"steps": 4, "batch_size": 8}
    plain, fast = wpgd(model, x, y, THREAT, **options), wpgd(model, x, y, THREAT, **options, compiled=True)
    # One graph with a backward pass and one without: every batch had the same size, however few images were left.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    torch.testing.assert_close(fast.x_adv, plain.x_adv, rtol=0, atol=1e-5)
    assert torch.equal(fast.correct, plain.correct)
    tuned, train = copy.deepcopy(model), (x[:24], y[:24])
    config = FinetuneConfig(threat=THREAT, steps=2, epochs=1, batch_size=8, sample=0.6)
    finetune(model, train, train, config, eval_batch_size=8)
    finetune(tuned, train, train, replace(config, compiled=True), eval_batch_size=8)
    for a, b in zip(model.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_compiled_network_in_train_mode_is_attacked_as_a_plain_one(monkeypatch):
    """The remainder of a sample is not filled up: batch statistics would be others. Compiling is left out here."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    models, histories = [network("full", dtype=torch.float32) for _ in range(2)], []
    x, y = images(30, network("full"))
    for model, compiled in zip(models, (False, True), strict=True):
        config = FinetuneConfig(threat=THREAT, steps=2, epochs=1, batch_size=8, sample=0.4, attack_mode="train")
        histories.append(finetune(model, (x.float(), y), None, replace(config, compiled=compiled)))
    assert histories[0].upsilon == histories[1].upsilon
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@compiler
def test_what_cannot_be_compiled_is_named(monkeypatch):
    model, x, y = single()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(WdatError, match=r"torch\.compile fails on this model, use compiled=False \(.+\)"):
        wpgd(model, x, y, THREAT, steps=1, compiled=True)


# ------------------------------------------------------------------------------------------------------------- where


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_images_on_the_host_come_to_the_model_a_batch_at_a_time(loss, compiled):
    model = network("full").to("cuda")
    x, y = images(30, network("full"))
    here = wpgd(model, x.to("cuda"), y.to("cuda"), THREAT, loss=loss, steps=3, batch_size=8)
    there = wpgd(model, x, y, THREAT, loss=loss, steps=3, batch_size=8, compiled=compiled)
    assert there.x_adv.device.type == there.correct.device.type == "cpu"
    torch.testing.assert_close(there.x_adv, here.x_adv.cpu(), rtol=0, atol=1e-9)
    config = FinetuneConfig(threat=THREAT, steps=2, epochs=1, batch_size=10)
    finetune(model, (x, y), (x, y), config)
    finetune(model, (x, y), (x, y), configuration("trades", epochs=1, batch_size=10, steps=2))


# ---------------------------------------------------------------------------------------------------------- training


def test_how_many_images_at_once_is_no_matter_to_finetuning():
    models = [network("mlp") for _ in range(2)]
    x, y = images(20, models[0])
    config = FinetuneConfig(threat=THREAT, steps=2, epochs=2, batch_size=8, augment=False)
    histories = [
        finetune(model, (x, y), (x, y), config, eval_batch_size=size)
        for model, size in zip(models, (512, 3), strict=True)
    ]
    assert histories[0].upsilon == pytest.approx(histories[1].upsilon, rel=1e-9)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [0, 2.0, True])
def test_a_wrong_number_of_images_at_once_is_named(size):
    model = network("mlp")
    x, y = images(8, model)
    with pytest.raises(WdatError, match=r"eval_batch_size must be a whole number"):
        finetune(model, (x, y), None, FinetuneConfig(epochs=1), eval_batch_size=size)


def minibatches(**fields):
    """Sizes of the passes of one epoch of three minibatches of 8 among 24 images, and its Upsilon."""
    model = network("mlp")
    x, y = images(24, model)
    log = Log(model)
    options = {
        "threat": THREAT,
        "steps": 2,
        "epochs": 1,
        "batch_size": 8,
        "augment": False,
        "sample": 0.5,
        "tau": 1e-30,
    }
    history = finetune(log, (x, y), None, FinetuneConfig(**options | fields))
    return log.seen[2:], history.upsilon, (model, x, y)  # two passes look at the model first


def test_upsilon_from_the_minibatches_costs_nothing():
    sampled, batch = (minibatches(upsilon_from=source)[0] for source in ("sample", "batch"))
    assert sum(len(x) for x, wants in sampled if wants) - sum(len(x) for x, wants in batch if wants) == 3 * 12


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_upsilon_from_the_minibatches_is_the_mean_over_them(p):
    """With a learning rate too small to move anything: after an epoch it is the sensitivity of the whole set."""
    threat = Threat(p=p, delta=0.05)
    seen, upsilons, (model, x, y) = minibatches(upsilon_from="batch", eta=1.0, noise=0.0, threat=threat)
    firsts = [z for z, wants in seen if wants][::2]
    labels = [y[(z[:, None] == x[None]).flatten(2).all(2).long().argmax(1)] for z in firsts]
    for k, upsilon in enumerate(upsilons, start=1):
        expected = sensitivity(model, torch.cat(firsts[:k]), torch.cat(labels[:k]), threat)
        assert upsilon == pytest.approx(expected, rel=1e-9)
    assert upsilons[-1] == pytest.approx(sensitivity(model, x, y, threat), rel=1e-9)


def test_upsilon_from_the_minibatches_forgets_old_ones():
    """It averages over the latest 8, or over as many as hold the images of the sample."""
    _, plain, _ = minibatches(upsilon_from="batch", batch_size=2, sample=0.1)
    squares = [plain[0] ** 2]  # of each minibatch's own, from the means over all of them so far
    squares += [(k + 1) * plain[k] ** 2 - k * plain[k - 1] ** 2 for k in range(1, 8)]
    squares += [8 * plain[8] ** 2 - sum(squares[1:])]
    assert len(plain) == 12 and min(squares) > -1e-9
    _, long, _ = minibatches(upsilon_from="batch", batch_size=2, sample=1.0)
    assert long[:8] == pytest.approx(plain[:8], rel=1e-9)
    assert long[8] == pytest.approx((sum(squares) / 9) ** 0.5, rel=1e-9)
    assert long[8] != pytest.approx(plain[8], rel=1e-3)
