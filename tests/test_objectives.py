"""A network trained further for one objective or another: what each computes, and the records of `train_for`."""

import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from tiny import INF, images, network

import wdat_core
from companion import files, first_order, objectives
from companion.networks import load_network, new_network
from companion.objective_functions import OBJECTIVES, cheapest, equal_weights
from companion.objectives import train_for
from companion.records import parse_record, protocol, read_records, record_name
from companion.runs import attack_harder
from companion.settings import ParameterError, Settings
from companion.values import unpack_floats
from wdat_core import FinetuneConfig, Threat, boundary, finetune

SMALL = {"train_images": 24, "val_images": 10, "test_images": 12, "epochs": 1, "steps": 2, "found_steps": 3}
SMALL |= {"tau": 0.05, "eta": 1.0, "batch_size": 12, "network": "small_trades", "data": "embedded"}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")


def value_and_batch(objective, **fields):
    """The value of an objective on one minibatch of a tiny network, and what the minibatch is."""
    model, seen = network("smooth"), []
    x, y = images(20, model)

    def noted(batch):
        total = objective(batch)
        seen.append((total.item(), batch.x.clone(), batch.y.clone()))
        return total

    usual = {"perturb": "none", "augment": False, "epochs": 1, "batch_size": 20, "tau": 1e-12, "steps": 6, "beta": 2.0}
    finetune(model, (x, y), None, FinetuneConfig(objective=noted, **(usual | fields)))
    return model, *seen[0]


def test_cheapest_first_in_place_of_w_pgd():
    threat = Threat(2, INF, 0.06)
    model, value, x, y = value_and_batch(cheapest, threat=threat)
    x_adv = boundary(model, x, y, steps=6).spend(x, threat).x_adv
    logits = model(x)
    expected = F.cross_entropy(logits, y) + 2 * F.cross_entropy(model(x_adv), logits.softmax(1).detach())
    assert value == pytest.approx(expected.item(), rel=1e-6) and not torch.equal(x, x_adv)


def test_equal_weights_raise_each_distance_up_to_delta():
    model, value, x, y = value_and_batch(equal_weights, threat=Threat(2, INF, 0.06))
    distance = boundary(model, x, y, steps=6).distance
    expected = F.cross_entropy(model(x), y) - 2 * distance.clamp(max=0.06).mean() / 0.06
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert (distance > 0.06).any() and ((distance > 0) & (distance < 0.06)).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_leaves_a_record_of_what_it_made(objective):
    settings = Settings(preset="paper", **SMALL).resolved()
    record = train_for(settings, objective)
    path = files.RUNS / record_name(record)
    assert parse_record(path.read_bytes()).stored() == record.stored()
    assert record.config.objective == objective and record.config.threat.p == OBJECTIVES[objective].p
    for part, n in (("val", 10), ("test", 12)):
        distance = unpack_floats(record.boundary.distance[part])
        assert len(distance) == n and (distance >= 0).all() and (distance > 0).any()
    assert not list(files.RUNS.glob("*.checkpoint"))
    assert train_for(settings, objective).created == record.created  # read, not computed


OWN = """
import torch
from torch import nn

def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))

def images():
    g = torch.Generator().manual_seed(0)
    return {p: (torch.rand(24, 3, 8, 8, generator=g), torch.arange(24) % 2) for p in ("train", "val", "test")}
"""


@pytest.fixture
def own(tmp_path):
    """A network with two classes and its images, in a file of the user's."""
    (tmp_path / "mine here.py").write_text(OWN, encoding="utf-8")
    return {"network": f"{tmp_path / 'mine here.py'}:two", "data": f"{tmp_path / 'mine here.py'}:images"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_network_with_two_classes_is_trained_on_images_of_the_user_s(objective, own):
    """And the record's command names them, by the file alone."""
    record = train_for(Settings(preset="paper", **(SMALL | own)).resolved(), objective)
    assert record.config.loss == "margin"
    words = shlex.split(record.command)
    assert words[3] == "mine here.py:two" and words[-2:] == ["--data", "mine here.py:images"]
    assert parse_record((files.RUNS / record_name(record)).read_bytes()).stored() == record.stored()


def test_two_classes_are_too_few_for_what_compares_dlr(own, tmp_path):
    usual = ["--data", own["data"], "--test-images", "4"]
    with pytest.raises(SystemExit, match=r"first_order: .* which need 3 classes, and .* has 2: tables 1 to 11"):
        first_order.main([own["network"], *usual])
    settings = Settings(**own, test_images=4, autoattack=0).resolved()
    with pytest.raises(ParameterError, match=r"need 3 classes, and .* has 2"):
        attack_harder(settings, notebook="stronger")


def test_an_interrupt_ends_in_one_line(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives, "train_for", interrupted)
    with pytest.raises(SystemExit, match="objectives: interrupted: run it again to go on"):
        objectives.main(
            ["demo", "--data", "embedded", "--train-images", "24", "--val-images", "9", "--test-images", "9"]
        )
    monkeypatch.setattr(first_order, "first_order_each", interrupted)
    with pytest.raises(SystemExit, match="first_order: interrupted"):
        first_order.main(["demo", "--data", "embedded"])


def test_the_weights_are_those_of_the_same_call_of_finetune(monkeypatch):
    made = []
    trained = wdat_core.finetune

    def noted(model, *given, **how):
        history = trained(model, *given, **how)
        made.append(model)
        return history

    monkeypatch.setattr(wdat_core, "finetune", noted)
    settings = Settings(preset="paper", **SMALL).resolved()
    record = train_for(settings, "slope")
    on = objectives.bench(settings)
    config = FinetuneConfig(objective="worst_case", epochs=1, steps=2, batch_size=12, tau=0.05, clip=10.0)
    trained(on.model, on.data.train, None, config, eval_batch_size=128)
    for name, value in on.model.state_dict().items():
        assert torch.equal(value, made[0].state_dict()[name]), name
    distance = boundary(on.model, *on.data.test, steps=3, batch_size=128).distance
    assert unpack_floats(record.boundary.distance["test"]) == pytest.approx(distance.double().numpy())


def test_a_run_that_is_stopped_goes_on(monkeypatch):
    settings = Settings(preset="paper", **SMALL).resolved()
    whole = train_for(settings, "mma")
    (files.RUNS / record_name(whole)).unlink()
    trained = wdat_core.finetune

    def stopped(*given, **how):
        trained(*given, **how, stop_after=0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(wdat_core, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_for(settings, "mma")
    assert len(list(files.RUNS.glob("*.checkpoint"))) == 1
    monkeypatch.setattr(wdat_core, "finetune", trained)
    again = train_for(settings, "mma")
    assert again.boundary.distance == whole.boundary.distance and again.created >= whole.created
    assert not list(files.RUNS.glob("*.checkpoint"))


def named(capsys):
    """The names of records that were printed, beside what shows how far a run is."""
    return re.findall(r"\w+-(?:small_trades|PatchResNet)-\S*\.json", capsys.readouterr().out)


@pytest.mark.parametrize("more", [["--objective=slope"], ["--objective=algorithm1", "--gamma=3"], ["--scratch"]])
def test_the_command_in_a_record_makes_it_again(more, capsys):
    sizes = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k in objectives.SIZES]
    given = ["small_trades", "--delta=4", "--beta=3", "--tau=0.05", "--data=embedded", *more, *sizes]
    objectives.main(given)
    (name,) = named(capsys)
    record = parse_record((files.RUNS / name).read_bytes())
    assert record.config.threat == Threat(2, INF, 4 / 255) and record.config.beta == 3
    assert record.config.gamma == 3 * ("--gamma=3" in more)
    (files.RUNS / name).unlink()
    words = shlex.split(record.command)
    assert words[:3] == ["python", "-m", "companion.objectives"]
    objectives.main(words[3:])
    assert named(capsys) == [name]
    assert parse_record((files.RUNS / name).read_bytes()).boundary.distance == record.boundary.distance


def test_the_network_as_it_is_has_distances_of_both_parts(capsys):
    sizes = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k in objectives.SIZES]
    objectives.main(["small_trades", "--objective=none", "--data=embedded", *sizes])
    parts = [parse_record((files.RUNS / name).read_bytes()) for name in named(capsys)]
    assert [set(record.boundary.distance) for record in parts] == [{"val"}, {"test"}]
    assert [len(unpack_floats(*record.boundary.distance.values())) for record in parts] == [10, 12]


def test_a_record_of_gamma_0_is_the_one_that_was_there_before(monkeypatch):
    """Its file has the same name and its configuration the same fields, so that nothing is computed again."""
    (old,) = [
        record
        for record in read_records(kind="objective")
        if (record.network.name, record.config.objective, record.config.beta) == ("small_trades", "algorithm1", 6.0)
        and record.config.seed == 0
        and not record.config.gamma
    ]
    fields = set(old.config.model_dump(exclude_unset=True))
    new = train_for(Settings(preset="paper", **SMALL).resolved(), "algorithm1", gamma=0.0)
    assert set(new.config.model_dump(exclude_unset=True)) == fields and "gamma" not in fields
    assert (files.RESULTS / record_name(old)).exists() and "--gamma" not in new.command
    joint = train_for(Settings(preset="paper", **SMALL).resolved(), "algorithm1", gamma=3.0)
    assert joint.config.gamma == 3 and record_name(joint) != record_name(new)
    assert protocol(joint) != protocol(new) and "--gamma 3.0" in joint.command


def test_the_joint_objective_is_the_core_s_own(monkeypatch):
    asked = noted_configurations(monkeypatch)
    train_for(Settings(preset="paper", **SMALL).resolved(), "algorithm1", gamma=3.0)
    usual = {"epochs": 1, "steps": 2, "batch_size": 12, "tau": 0.05, "clip": 10.0}
    assert asked == [FinetuneConfig(gamma=3.0, **usual)]


def noted_configurations(monkeypatch):
    asked, trained = [], wdat_core.finetune

    def noted(model, train, val, config, **how):
        asked.append(config)
        return trained(model, train, val, config, **how)

    monkeypatch.setattr(wdat_core, "finetune", noted)
    return asked


@pytest.mark.parametrize("objective", ["algorithm1", "slope", "trades"])
def test_from_scratch_only_the_architecture_is_the_network_s(objective, monkeypatch):
    asked = noted_configurations(monkeypatch)
    settings = Settings(preset="paper", **SMALL).resolved()
    record = train_for(settings, objective, scratch=True)
    path = files.RUNS / record_name(record)
    assert parse_record(path.read_bytes()).stored() == record.stored()
    start = new_network("small_trades", 0)
    assert record.network.name == start.name == "PatchResNet-32-64-from-scratch" and "small_trades" not in path.name
    assert record.network.digest == start.digest != load_network("small_trades", files.ROOT / "models").digest
    (config,) = asked
    for name, value in objectives.SCRATCH.items():
        assert getattr(config, name) == value and (getattr(record.config, name) == value), name
    assert train_for(settings, objective, scratch=True).created == record.created  # read, not computed


def test_weights_drawn_anew_are_those_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (new_network("small_pgd", seed) for seed in (0, 0, 1))
    assert one.digest == again.digest != other.digest and torch.equal(torch.get_rng_state(), before)
    assert new_network("cnn_a_adv4", 0).name == "cnn_a-from-scratch"
    assert new_network("small_trades", 0).digest == one.digest  # the two stand-ins have one architecture


@pytest.mark.parametrize(
    "given, words",
    [
        (["small_tradess"], "unknown network 'small_tradess'"),
        (["small_trades", "--objective", "slope", "--gamma", "1"], "gamma is of objective algorithm1 alone"),
        (["small_trades", "--objective", "algorithm1", "--gamma", "-1"], "gamma must be"),
        (["small_trades", "--objective", "none", "--scratch"], "takes no gamma and no scratch"),
        (["small_trades", "--objective", "slop"], "objective must be one of algorithm1, slope"),
        (["small_trades", "--delta", "-1"], "delta must be at least 1e-06"),
        (["small_trades", "--delta", "0.0157"], "--delta is in 255ths: 4 means 4/255, and 0.0157 is"),
        (["small_trades", "--beta", "-1"], "beta must be at least 0"),
        (["small_trades", "--data", "nowhere"], "nowhere"),
        (["small_trades", "--found-steps", "0"], "--found-steps must be at least 1"),
    ],
)
def test_what_the_user_can_put_right_ends_in_one_line(given, words):
    few = ["--train-images=24", "--val-images=10", "--test-images=12", "--epochs=1", "--found-steps=2"]
    with pytest.raises(SystemExit) as ended:
        objectives.main([*few, *given])
    assert str(ended.value).startswith("objectives: ") and words in str(ended.value)


def test_an_objective_that_is_not_known_is_named():
    with pytest.raises(ParameterError, match="objective must be one of"):
        train_for(Settings(preset="paper", **SMALL).resolved(), "slop")
