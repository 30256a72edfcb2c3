"""The paper's protocol, stand-ins, stronger attacks and open points: what is compared with what."""

import dataclasses
import math

import numpy as np
import pyautoattack
import pytest
import torch
from altered import altered, recorded
from matplotlib.collections import PathCollection
from torch import nn

import wdat_core
from companion import architectures, evidence, files, intervals, networks, open_points, plots, runs, tables, words
from companion.bases import images_of
from companion.evidence import paper_value
from companion.parts import BoundaryPart
from companion.records import parse_record, read_records, record_bytes, record_name
from companion.settings import METRICS, OPEN_POINTS, STAND_INS, STRONGER, ParameterError, Settings
from companion.values import pack, pack_floats, unpack
from wdat_core import Boundary, Threat, wpgd

SMALL = {"train_images": 60, "val_images": 20, "test_images": 50, "batch_size": 20, "steps": 2, "epochs": 1}
N = 10_000  # images of a made-up record, so that a percentage point is a hundred of them


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAND_INS)
def test_norms_inside_the_kernels_change_no_logit(name, monkeypatch):
    torch.manual_seed(0)
    model = architectures.new_stand_in(name)
    x = torch.rand(16, 3, 32, 32)
    for _ in range(20):
        model(x)  # in train mode: statistics that are not 0 and 1
    model.eval()
    folded = model(x)
    monkeypatch.setattr(architectures, "_normed", lambda conv, norm, x: norm(conv(x)))
    assert torch.allclose(folded, model(x), atol=1e-5)
    assert folded.std() > 0.01
    assert not torch.allclose(folded, model.train()(x), atol=1e-3)  # the batch's own statistics


def test_patches_lose_no_pixel():
    """What a stem sees is the whole image: moving any pixel moves a logit."""
    model = architectures.PatchResNet((8, 16)).eval()
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), x)
    assert (gradient != 0).all()
    assert all(m.stride == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", STAND_INS)
def test_every_stand_in_has_weights_and_a_record(name, tmp_path):
    (record,) = [r for r in read_records(kind="pretrain") if r.network.name == name]
    assert networks.load_network(name, tmp_path).digest == record.network.digest
    assert record.metrics["after"]["clean"] > 0.4 > record.metrics["after"]["w_2"] > 0.1
    assert f"| `{name}` |" in tables.stand_ins_table([record]).data


# ---------------------------------------------------------------------------------------------------------------------
# Stronger attacks
# ---------------------------------------------------------------------------------------------------------------------


class Brief(pyautoattack.AutoAttack):
    """AutoAttack with fewer queries and target classes: what is tested here is what we do with it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.square.n_queries = 50
        self.fab.n_target_classes = self.apgd_targeted.n_target_classes = 1


@pytest.fixture(scope="module")
def harder(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "RUNS", tmp_path_factory.mktemp("runs"))
    patch.setattr(pyautoattack, "AutoAttack", Brief)
    settings = Settings(network="small_trades", autoattack=6, **SMALL | {"steps": 20}).resolved()
    yield settings, runs.attack_harder(settings, notebook="stronger")
    patch.undo()


def test_each_attack_is_of_its_images(harder):
    _, record = harder
    assert record.metrics.keys() == {*STRONGER, "autoattack"}
    assert images_of(record, "autoattack") == 6 and images_of(record, "w_2_100") == 50
    assert parse_record(record_bytes(record)) == record
    less = {name: value for name, value in record.metrics.items() if name != "w_inf_dlr"}
    with pytest.raises(ValueError, match=r"w_inf_dlr.* is missing"):
        parse_record(record_bytes({**record.stored(), "metrics": less}))
    lines = tables.stronger_table([record], []).data
    assert all(attack.words(20) in lines for attack in STRONGER.values())
    assert "AutoAttack, the first 6 images" in lines


def test_the_first_attacks_are_those_of_the_tables(harder):
    settings, record = harder
    (scores,) = runs.attack_each([settings], "test", notebook="table1")
    for metric in ("w_inf", "w_2"):
        assert record.metrics[metric]["accuracy"] == scores.metrics["test"][metric]


def test_autoattack_turns_images_and_mends_none(harder):
    settings, record = harder
    left = unpack(record.correct["autoattack"]["accuracy"], 6)
    (scores,) = runs.attack_each([settings], "test", notebook="table1")
    right = unpack(scores.correct["test"]["clean"], 50)[:6]
    assert (left <= right).all() and left.sum() < right.sum()


def test_a_finished_run_of_stronger_attacks_is_read(harder, monkeypatch):
    settings, record = harder
    monkeypatch.setattr(wdat_core, "wpgd", None)
    assert runs.attack_harder(settings, notebook="stronger") == record


def test_a_fine_tuned_network_stands_beside_what_it_came_from(harder):
    _, before = harder
    name = before.network.name
    flipped = pack(torch.tensor(unpack(before.correct["w_2"]["accuracy"], 50)) < 2)  # every image right
    network = {"name": f"{name}-finetuned", "source": "made up", "digest": "x"}
    after = altered(before, network=network, correct={"w_2": {"accuracy": flipped}})
    text = tables.stronger_table([], [before, after]).data
    gain = 100 * (1 - before.metrics["w_2"]["accuracy"])
    (row,) = [line for line in text.splitlines() if STRONGER["w_2"].words(20) + " |" in line]
    assert "100.00" in row and f"{gain:+.2f}" in row and "fine-tuned 1: made up" in text
    # All the other attacks are as strong as before, and the strongest of them is none the weaker.
    (row,) = [line for line in text.splitlines() if "W₂, the strongest" in line]
    lowest = min(before.metrics[k]["accuracy"] for k, attack in STRONGER.items() if attack.p == 2 and k != "w_2")
    assert lowest < before.metrics["w_2"]["accuracy"]
    assert row.count(f"{100 * lowest:.2f}") == 2 and "+0.00" in row
    other = altered(after, data={"digest": "other images"})
    assert "fine-tuned" not in tables.stronger_table([], [before, other]).data


def test_random_starts_stay_in_the_ball_and_repeat():
    model = architectures.new_stand_in("small_pgd").eval()
    x, y = torch.rand(12, 3, 32, 32), torch.arange(12) % 10
    for p in (2, math.inf):
        options = {"steps": 3, "loss": "ce", "random_start": 1.0}
        attacks = [wpgd(model, x, y, Threat(p=p), seed=seed, **options) for seed in (0, 0, 1)]
        assert torch.equal(attacks[0].x_adv, attacks[1].x_adv) and not torch.equal(attacks[0].x_adv, attacks[2].x_adv)
        assert all(a.distance <= 8 / 255 * (1 + 1e-5) for a in attacks)
        assert torch.equal(
            wpgd(model, x, y, Threat(p=p), steps=3, loss="ce", seed=5).x_adv,
            wpgd(model, x, y, Threat(p=p), steps=3, loss="ce").x_adv,
        )  # a seed alone starts nothing


# ---------------------------------------------------------------------------------------------------------------------
# Records of the whole protocol, and of open points
# ---------------------------------------------------------------------------------------------------------------------


WHOLE = recorded("finetune-small_trades-whole-tau0.01-eta1-seed2-*")


def made(gain=0, *, tau=0.01, eta=1.0, seed=0, **config):
    """A full-protocol record in which W_2 changes by that many points; half of the images are right before."""
    half, after = (pack(torch.arange(N) < N // 2 + won) for won in (0, round(gain * N / 100)))
    return altered(
        WHOLE,
        network={"name": "small_trades", "digest": "weights"},
        data={"digest": "images", "train": 40_000, "val": 10_000, "test": N},
        config={"tau": tau, "eta": eta, "seed": seed, **config},
        correct={"before": dict.fromkeys(METRICS, half), "after": dict.fromkeys(METRICS, half) | {"w_2": after}},
    )


def test_the_whole_protocol_is_all_of_it():
    record = made()
    assert evidence.is_full(record)
    for part, name, value in (("data", "train", 39_999), ("data", "test", 1000), ("config", "epochs", 19)):
        assert not evidence.is_full(altered(record, **{part: {name: value}}))
    for changes in ({"beta": 1.0}, {"steps": 40}, {"upsilon_from": "batch"}, {"threat": Threat(p=math.inf)}):
        assert not evidence.is_full(made(**changes))
    for part, name, value in (
        ("data", "source", "CIFAR-100"),
        ("config", "precision", "bfloat16"),
        ("config", "compiled", True),
    ):
        assert not evidence.is_full(altered(record, **{part: {name: value}}))
    attacked = altered(recorded("evaluate-demo-*"), data={"train": None, "test": 10_000}, config={"batch_size": 512})
    assert evidence.is_full(attacked) and not evidence.is_full(altered(attacked, config={"batch_size": 256}))


def test_intervals_are_those_of_a_bootstrap_over_images():
    """Of what is recorded: the ends agree, up to one image and what 20,000 resamples leave to chance."""
    generator, compared = np.random.default_rng(0), 0
    for record in read_records(kind="finetune"):
        for metric in METRICS:
            differences = intervals.bits(record, "after", metric) - intervals.bits(record, "before", metric)
            values, counts = np.unique(differences, return_counts=True)
            n = len(differences)
            means = 100 * generator.multinomial(n, counts / n, 20_000) @ values / n
            change = intervals.change([record], metric)
            ends = (change.value - change.half, change.value + change.half)
            assert np.percentile(means, (2.5, 97.5)) == pytest.approx(ends, abs=100 / n + 0.04 * change.half)
            compared += 1
    assert compared > 50


def test_grids_begin_with_the_whole_protocol_and_leave_changed_points_out():
    small = made()
    small = altered(small, data={"train": 45_000})
    grids = evidence.grids("whole", [small, made(noise=0.05), made(), made(seed=1), made(perturb="last_layer")])
    assert [len(grid) for grid in grids] == [2, 1] and grids[0][0] == made()


def test_a_changed_point_is_compared_with_the_same_run_without_it():
    without = [made(1, seed=0), made(2, seed=1), made(9, tau=0.1)]
    with_it = [made(4, seed=0, noise=0.05), made(6, seed=1, noise=0.05), made(9, seed=2, noise=0.05)]
    two = made(9, noise=0.05, augment=False)
    (matter,) = open_points.matters([*with_it, *without, two])
    assert (matter.point, matter.value, matter.seeds["w_2"]) == ("noise", 0.05, pytest.approx([3, 4]))
    assert matter.differences["w_2"].value == pytest.approx(3.5) and matter.differences["clean"].value == 0
    assert "| `noise=0.05` | +0.00 ± 0.03 |" in open_points.matters_table([*with_it, *without]).data.replace(
        "\u00a0", " "
    )
    assert open_points.how_much([*with_it, *without], "noise").startswith("`0.05`: W₂ +3.50")
    assert open_points.how_much(without, "noise") == "–"
    assert "nothing is recorded" in open_points.matters_table(without).data


def test_the_ledger_quotes_the_longest_runs():
    short = [made(9), made(1, noise=0.05)]
    short = [altered(r, data={"train": 1000}) for r in short]
    assert open_points.how_much([*short, made(0), made(2, noise=0.05)], "noise").startswith("`0.05`: W₂ +2.00")
    assert open_points.how_much(short, "noise").startswith("`0.05`: W₂ -8.00")


def test_a_changed_point_is_measured_by_the_worst_case_too_where_every_run_has_distances():
    """Half of the images move out of reach, half are wrong: at delta / 2 the change of A_2 follows from the formula."""
    near, far = (torch.tensor([0.0, d / 255] * (N // 2)) for d in (2, 32))
    part = {"steps": 40, "core": "0" * 64, "device": "cpu"}
    without, with_it = (
        altered(record, boundary=BoundaryPart(**part, distance={"before": pack_floats(near), "after": pack_floats(d)}))
        for record, d in ((made(0), near), (made(1, noise=0.05), far))
    )
    assert Boundary(near).accuracy(Threat(delta=4 / 255)) == 0
    gain = 50 - 100 * (4 / 32) ** 2  # of the last image, for which the budget pays in part, a part counts
    assert 100 * Boundary(far).accuracy(Threat(delta=4 / 255)) == pytest.approx(gain, abs=100 / N)
    (matter,) = open_points.matters([without, with_it])
    assert matter.differences[open_points.WORST].value == pytest.approx(gain, abs=1e-4)
    said = open_points.how_much([without, with_it], "noise").replace("\u00a0", " ")
    assert said.startswith("`0.05`: W₂ +1.00 ± ") and f", worst case +{gain:.2f} ± " in said
    assert f"| +{gain:.2f} ± " in open_points.matters_table([without, with_it]).data.replace("\u00a0", " ")

    bare = made(0).model_copy(update={"boundary": None})
    (matter,) = open_points.matters([bare, with_it])
    assert open_points.WORST not in matter.differences
    assert "worst case" not in open_points.how_much([bare, with_it], "noise")
    assert matter.differences["w_2"].value == pytest.approx(1)


def test_training_against_the_pointwise_attack_is_a_control_and_counts_as_nothing_else():
    without, with_it = made(3), made(1, threat=Threat(p=math.inf))
    (matter,) = open_points.matters([without, with_it])
    assert (matter.point, matter.value) == ("attacker", "pointwise")
    assert matter.differences["w_2"].value == pytest.approx(-2)
    assert "`attacker=pointwise`" in open_points.matters_table([without, with_it], ["attacker"]).data
    assert "nothing is recorded" in open_points.matters_table([without, with_it], ["noise"]).data
    assert evidence.grids("whole", [without, with_it]) == [[without]]
    assert "trained against the pointwise attack" in evidence.unusual(with_it)
    assert evidence.unusual(without) == ""


def test_images_of_table_2_are_told_by_the_order_of_the_attacks():
    base = recorded("evaluate-demo-*").model_copy(update={"correct": {}})

    def attacked(part, budget):
        right = {"w_inf": pack(torch.arange(N) < N // 2), "budget": pack(torch.arange(N) < budget)}
        sizes = {"train": None, "test": None, part: N}
        return altered(base, data=sizes, config={"batch_size": 512}, correct={part: right})

    records = [attacked("test", 6000), attacked("test", 4000), attacked("test", 5000)]
    said = open_points.budget_below_pointwise(records)
    assert said.endswith("on 10,000 test images for 1 of 3 networks")
    assert open_points.budget_below_pointwise([attacked("train", 1)]) == "–"  # 10,000 are not all of them


def test_distance_from_the_paper_is_zero_for_the_paper_s_own_changes():
    columns = [(tau, eta) for tau in (0.1, 0.01) for eta in (0.1, 1.0)]
    name = "Zhang2019Theoretically"

    def like_the_paper(off=0.0):
        grid = []
        for tau, eta in columns:
            record, after = made(tau=tau, eta=eta), {}
            for m in METRICS:
                gain = paper_value(4, name, m, tau, eta) - paper_value(1, name, m) + off
                after[m] = pack(torch.arange(N) < round(N * (0.5 + gain / 100)))
            grid.append(altered(record, correct={"after": after}))
        return grid

    assert open_points.distance(like_the_paper(), "whole") == pytest.approx(0, abs=1e-9)
    assert open_points.distance(like_the_paper(2.0), "whole") == pytest.approx(2)
    assert open_points.distance(like_the_paper()[1:], "whole") is None
    readings = {"ce_detached": 3.0, "ce": 0.5, "kl": -1.0}
    recorded = [
        altered(r, config={"consistency": reading}) for reading, off in readings.items() for r in like_the_paper(off)
    ]
    ((how, far, best),) = open_points.closest(recorded)
    assert how == "whole" and far == {k: pytest.approx(abs(v)) for k, v in readings.items()}
    assert "| `ce` |" in open_points.readings_table(recorded).data
    assert best == dict.fromkeys(readings, True)
    text = open_points.closest_table(recorded).data
    assert "mean distance | 3.0 | 0.5 | 1.0 |" in text and "nearest, of 1 | 0 | 1 | 0 |" in text
    assert "best column as in the paper, of 1 | 1 | 1 | 1 |" in text
    level = [altered(r, correct=recorded[0].correct) if r.config.consistency == "kl" else r for r in recorded]
    assert open_points.closest(level)[0][2] == {"ce_detached": True, "ce": True, "kl": False}  # no column is best
    assert open_points.closest(recorded[:-1]) == []


def test_open_points_are_fields_with_these_defaults():
    usual = {f.name: f.default for f in dataclasses.fields(wdat_core.FinetuneConfig)}
    for point, values in OPEN_POINTS.items():
        assert usual[point] == values[0]
        for value in values:
            wdat_core.FinetuneConfig(**{point: value})
            Settings(point=point, value=value).resolved()


@pytest.mark.parametrize(
    ("point", "value", "message"),
    [
        ("nois", 0.1, "point must be one of consistency, "),
        ("attacker", "none", "value must be one of distributional, pointwise, not 'none'"),
        ("noise", "much", "value must be a number, at least 0, not 'much'"),
        ("noise", -0.1, "value must be a number, at least 0, not -0.1"),
        ("momentum", 1, "value must be a number, at least 0 and below 1, not 1"),
        ("reinit", "zeros", "value must be one of default, xavier"),
        ("augment", 1, "value must be True or False for augment, not 1"),
    ],
)
def test_impossible_point_is_named(point, value, message):
    with pytest.raises(ParameterError, match=message):
        Settings.from_notebook({"point": point, "value": value, "tau": 0.01, "eta": 1.0}, "open_points")


def test_a_point_is_changed_and_nothing_else(harder):
    settings = Settings(network="small_pgd", tau=0.1, eta=1, point="augment", value=False, **SMALL).resolved()
    without, with_it = runs.change_point(settings, notebook="open_points")
    differ = {k for k, v in vars(without.config).items() if v != getattr(with_it.config, k)}
    assert differ == {"augment"} and without.correct["after"] != with_it.correct["after"]
    assert "-p point augment -p value False" in with_it.command
    assert (files.RUNS / record_name(with_it)).exists()
    usual, control = runs.change_point(
        settings.model_copy(update={"point": "attacker", "value": "pointwise"}), notebook="open_points"
    )
    assert record_name(usual) == record_name(without)  # what a control leaves as it is, is no run of its own
    differ = {k for k, v in vars(without.config).items() if v != getattr(control.config, k)}
    assert differ == {"threat"} and control.config.threat.p == math.inf
    assert parse_record((files.RUNS / record_name(control)).read_bytes()) == control
    (last, _) = runs.change_point(
        settings.model_copy(update={"point": "reinit", "value": "xavier"}), notebook="open_points"
    )
    assert last.config.perturb == "last_layer"


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------------------


def test_pgd_has_no_beta_and_trades_does():
    def weights(**fields):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        options = {"perturb": "none", "threat": Threat(p=math.inf), "loss": "ce", "tau": 0.1}
        config = wdat_core.FinetuneConfig(epochs=2, batch_size=5, steps=2, augment=False, **options, **fields)
        wdat_core.finetune(model, (x, y), None, config)
        return model[1].weight.detach()

    assert torch.equal(weights(objective="pgd", beta=1.0), weights(objective="pgd", beta=6.0))
    assert not torch.equal(weights(objective="trades", beta=1.0), weights(objective="trades", beta=6.0))
    with pytest.raises(wdat_core.WdatError, match="objective must be one of wdat, worst_case, trades, pgd"):
        wdat_core.FinetuneConfig(objective="madry")


# ---------------------------------------------------------------------------------------------------------------------
# Words, marks and figures over several studies
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "verdict", "counted"),
    [
        (["holds", "holds"], "holds", "holds in 2 of 2"),
        (["holds", "contradicted", "holds"], "holds in part", "holds in 2 of 3, contradicted in 1"),
        (["not visible", "contradicted"], "contradicted", "contradicted in 1 of 2, not visible in 1"),
        (["not visible"], "not visible", "not visible in 1 of 1"),
        ([], "not yet measured", ""),
    ],
)
def test_several_outcomes_are_one_verdict(outcomes, verdict, counted):
    assert (words.overall(outcomes), words.count(outcomes)) == (verdict, counted)


def test_a_table_of_two_studies_marks_what_the_paper_reports_in_each():
    gains, loses = made(3), altered(made(-3), network={"name": "small_pgd"})
    lines = tables.grid_table(4, [], [loses, gains]).data.splitlines()
    (up,) = [line for line in lines if line.startswith("| W₂ | recorded here: small_trades")]
    (down,) = [line for line in lines if line.startswith("| W₂ | recorded here: small_pgd")]
    assert up.endswith(") ✓ |") and down.endswith(") ✗ |") and lines.index(up) < lines.index(down)
    assert not any("✓" in line or "✗" in line or "○" in line for line in lines if line.startswith("| Clean"))
    rows = tables.outcome_table(4, [loses, gains]).data.splitlines()[2:]
    assert [row.split(" | ")[-1].rstrip(" |") for row in rows] == [
        "✓ holds",
        "○ not visible",
        "✗ contradicted",
        "○ not visible",
    ]
    assert "Nothing is recorded" in tables.outcome_table(4, []).data


def test_figures_have_a_legend_for_each_study_and_say_so_where_there_is_none():
    both = [made(3), altered(made(-3), network={"name": "small_pgd"})]
    for figure in (plots.plot_changes(4, [], both), plots.plot_protocol(both)):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "paper: Zhang et al. (2019)",
            "recorded here: small_trades",
            "recorded here: small_pgd",
        ]
        assert figure.get_figwidth() < 6.5  # inches at 100 dots: still read at the width of a phone
    (words_of_it,) = plots.plot_along("w_2", [], []).texts
    assert words_of_it.get_text() == words.NOTHING


def test_estimates_are_drawn_one_by_one():
    record = recorded("sensitivity-demo-*")
    (axis,) = plots.plot_estimates([], [record]).axes
    drawn = [float(x) for c in axis.collections if isinstance(c, PathCollection) for x, _ in c.get_offsets()]
    assert sorted(drawn) == pytest.approx(sorted(record.estimates))
