"""Several processes attack and train as one does: 2 of them here, also 4 with WDAT_PROCESSES=4 in the environment."""

import os
import time

import processes
import pytest
import spread
import torch
from spread import task
from tiny import INF, images, network

from companion import files, items
from companion import processes as companion_processes
from companion.records import record_name
from wdat_core import FinetuneConfig, Threat, WdatError, boundary, evaluate, finetune, sensitivity, wpgd

MOST = int(os.environ.get("WDAT_PROCESSES", "2"))
ENDS = [(0, 9, 23), (0, 23, 23), (0, 1, 23)] if MOST == 2 else [(0, 4, 4, 17, 23)]  # unequal parts, one of no image
UNEQUAL = (0, 5, 23) if MOST == 2 else (0, 5, 9, 12, 23)
THREATS = [
    (Threat(2, INF, 0.1), "redlr"),
    (Threat(2, 2.0, 0.4), "ce"),
    (Threat(4, INF, 0.1), "dlr"),
    (Threat(INF, INF, 0.1), "ce"),
]
TRAINING = {"threat": Threat(delta=0.1), "steps": 3, "epochs": 3, "batch_size": 9, "sample": 0.3, "tau": 0.05}
TRAINING |= {"augment": False}


FORMS = [
    {},
    {"consistency": "ce", "gamma": 2.0, "random_start": 0.5, "momentum": 0.9, "clip": 0.5},
    {"objective": "worst_case", "eta": 0.5},
    {"objective": "trades", "threat": Threat(INF, INF, 0.1)},
    {"objective": "pgd", "threat": Threat(INF, INF, 0.1), "average": 0.5},
    {"upsilon_from": "batch", "first_upsilon": "full"},
]
SMALL = {"train_images": 40, "test_images": 51, "steps": 2, "batch_size": 20}
ITEMS = {
    "table4": SMALL | {"val_images": 33, "epochs": 2, "found_steps": 4, "tau": 0.01, "eta": 1.0},
    "table2": SMALL | {"network": "demo"},
    "figure7_1": {"train_images": 40, "network": "demo"},
}
OTHERS = {  # what the first process says, and the second
    "steps": ("steps must be the same in all processes: 2 here, 3 in 1", "steps must be the same"),
    "labels": ("process 1 of 2 cannot go on: labels must lie in 0..3", "labels must lie in 0..3"),
    "start": ("random_start must be the same in all processes: 0.0 here, 0.5 in 1", "random_start must be the same"),
    "random seed": ("process 1 of 2 cannot go on: seed must be", "seed must be a whole number at least 0"),
    "shape": ("images must be the same in all processes", "images must be the same in all processes"),
    "network": ("the network must be the same in all processes", "the network must be the same in all processes"),
    "nothing": ("no process of the group has an image", "no process of the group has an image"),
    "found_steps": ("found_steps must be the same in all processes: 0 here, 4 in 1", "found_steps must be the same"),
    "negative": ("found_steps must be a whole number at least 0", "found_steps must be a whole number at least 0"),
    "gather": ("r must be the same in all processes: 2.0 here, 3.0 in 1", "r must be the same"),
    "images": ("the training images must be the same in all processes", "the training images must be the same"),
    "seed": ("seed must be the same in all processes: 0 here, 1 in 1", "seed must be the same"),
    "few": ("a minibatch of 1 images cannot be shared by 2 processes", "cannot be shared by 2 processes"),
    "checkpoint": ("the checkpoint must be the same in all processes", "is damaged or no checkpoint"),
    "no checkpoint": ("the checkpoint must be the same in all processes", "the checkpoint must be the same"),
    "folder": ("could not be written", "process 0 of 2 cannot go on"),
    "epoch": ("process 1 of 2 cannot go on: on_epoch must return a dict", "on_epoch must return a dict"),
    "statistics": ("BatchNorm cannot train on a batch of one image", "BatchNorm cannot train on a batch of one image"),
    "not finite": ("training diverged", "training diverged"),
}


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def alone(fields, kind="smooth", val=True, **options):
    model, x, y = task(40, kind)
    return model, finetune(model, (x, y), (x[:11], y[:11]) if val else None, FinetuneConfig(**fields), **options)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of the processes says to each task: they start once for all tests here."""
    folder = tmp_path_factory.mktemp("processes")
    stopped = str(folder / "stopped by one.ckpt")
    alone(TRAINING, resume=stopped, stop_after=0.0)
    tasks = {f"attacks {ends}": ("attacks", (ends, THREATS)) for ends in ENDS}
    tasks |= {"scores": ("scores", (ENDS[0],)), "distances": ("distances", (UNEQUAL,))}
    tasks |= {f"training {fields}": ("training", (TRAINING | fields, "smooth")) for fields in FORMS}
    for mode in ("train", "eval"):
        tasks[f"batch statistics {mode}"] = ("training", (TRAINING | {"update_mode": mode}, "full"))
    tasks["goes on"] = ("training", (TRAINING, "smooth", stopped))
    tasks["stops"] = ("training", (TRAINING, "smooth", str(folder / "stopped by many.ckpt"), 0.0))
    tasks |= {item: ("records", (item, given, str(folder / item))) for item, given in ITEMS.items()}
    if MOST == 2:
        (folder / "file").touch()
        (folder / "other.ckpt").touch()

        tasks |= {f"other {what}": ("other_settings", (what, str(folder))) for what in OTHERS}
        tasks |= {"mixed": ("mixed", ()), "noisy": ("noisy_training", ())}
        tasks["noisy, stopped"] = ("noisy_training", (str(folder / "noisy.ckpt"),))
        tasks |= {"experts": ("experts", ()), "masked": ("masked", ()), "bits": ("sixteen_bits", ((0, 2900, 3001),))}
    found = dict(zip(tasks, processes.run(MOST, list(tasks.values())), strict=True))
    return found | {"folder": folder}


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_an_attack_is_that_of_one_process(ends, said):
    model, x, y = task()
    each = said[f"attacks {ends}"]
    for i, (threat, loss) in enumerate(THREATS):
        one = wpgd(model, x, y, threat, loss=loss, steps=6, step_ratio=2.0, batch_size=4)
        upsilon = sensitivity(model, x, y, threat, loss=loss)
        found = [part[i][0] for part in each]
        near(torch.cat([a.x_adv for a in found]), one.x_adv)
        assert torch.equal(torch.cat([a.correct for a in found]), one.correct)
        for attack, theirs in (part[i] for part in each):
            assert theirs == pytest.approx(upsilon, rel=1e-9)
            assert attack.accuracy == one.accuracy and attack.distance == pytest.approx(one.distance, rel=1e-9)
            for name, values in one.history.items():
                assert attack.history[name] == pytest.approx(values, rel=1e-9), name


def test_scores_are_those_of_one_process(said):
    one = evaluate(*task(), delta=0.05, steps=4, found_steps=8)
    for name in ("clean", "w_inf", "w_2", "w_2_found"):
        assert [getattr(s, name) for s in said["scores"]] == [getattr(one, name)] * MOST, name
        assert torch.equal(torch.cat([s.correct[name] for s in said["scores"]]), one.correct[name]), name


def test_distances_come_together_in_their_order(said):
    one = boundary(*task(), steps=8)
    for found in said["distances"]:
        near(found.distance, one.distance)
        assert found.accuracy(Threat(delta=0.1)) == one.accuracy(Threat(delta=0.1))


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_training_is_that_of_one_process(fields, said):
    model, history = alone(TRAINING | fields)
    start = task(40)[0].state_dict()
    for state, theirs in said[f"training {fields}"]:
        for name, value in model.state_dict().items():
            near(state[name], value)
        assert theirs.upsilon == pytest.approx(history.upsilon, rel=1e-9) and theirs.best == history.best
        for row, expected in zip(theirs.epochs, history.epochs, strict=True):
            for name in row.keys() - {"seconds"}:
                assert row[name] == pytest.approx(expected[name], rel=1e-9), name
        assert not torch.equal(state["2.weight"], start["2.weight"])


def test_batch_statistics_in_eval_mode_are_those_of_one_process(said):
    model, _ = alone(TRAINING | {"update_mode": "eval"}, "full")
    for state, _ in said["batch statistics eval"]:
        for name, value in model.state_dict().items():
            near(state[name], value)


def test_batch_statistics_in_train_mode_stay_alike(said):
    first, *others = (state for state, _ in said["batch statistics train"])
    for name, value in first.items():
        assert all(torch.equal(value, state[name]) for state in others), name


def test_a_run_goes_on_with_another_number_of_processes(said):
    model, _ = alone(TRAINING)
    for state, history in said["goes on"]:
        assert history.finished
        for name, value in model.state_dict().items():
            near(state[name], value)
    assert all(not history.finished and len(history.upsilon) == 1 for _, history in said["stops"])
    after, history = alone(TRAINING, resume=said["folder"] / "stopped by many.ckpt")
    for name, value in model.state_dict().items():
        near(after.state_dict()[name], value)


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path):
    path = tmp_path / "run.ckpt"
    begin = time.monotonic()
    running = processes.start(2, [("training_that_dies", (TRAINING, "smooth", str(path), 0))], folder=tmp_path)
    said = [process.communicate(timeout=60)[1] for process in running]
    assert time.monotonic() - begin < 60
    assert running[0].returncode == -9 and running[1].returncode == 1
    named = "another process of the group does not answer or has ended"
    lines = said[1].splitlines()  # torch itself warns of a machine that does not know its own name
    assert any(line.startswith(named) for line in lines) and "Traceback" not in said[1]
    model, history = alone(TRAINING, val=False, resume=path)
    assert history.finished and len(history.epochs) == 3
    one, _ = alone(TRAINING, val=False)
    for name, value in one.state_dict().items():
        near(model.state_dict()[name], value)


@pytest.mark.parametrize("item", ITEMS)
def test_a_command_makes_the_records_of_one_process_and_one_process_finds_them(item, said, tmp_path, monkeypatch):
    def made(folder):
        monkeypatch.setattr(files, "RUNS", folder)
        return [(record_name(r), r.stored()) for r in items.compute(item, items.checked(item, ITEMS[item]))]

    first, *others = said[item]
    assert all(other == first for other in others) and len(list((said["folder"] / item).glob("*.json"))) >= len(first)
    for (name, record), (its_name, one) in zip(first, made(tmp_path), strict=True):
        assert name == its_name and record["device"].endswith(f", {MOST} processes")
        for field in ("network", "data", "config"):
            assert record[field] == one[field]
        numbers = [record.get("metrics"), record.get("upsilon"), record.get("reference"), record.get("estimates")]
        others = [one.get("metrics"), one.get("upsilon"), one.get("reference"), one.get("estimates")]
        if item == "table4":  # trained with the batch statistics of each process's own part: not the same afterwards
            numbers, others = [record["metrics"]["before"]], [one["metrics"]["before"]]
        for number, other in zip(flat(numbers), flat(others), strict=True):
            assert number == pytest.approx(other, rel=1e-4, abs=0.021)  # one of 51 images may round otherwise
    assert [record["created"] for _, record in made(said["folder"] / item)] == [r["created"] for _, r in first]


def flat(value):
    """The numbers in lists and tables."""
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in flat(part)]
    return [] if value is None else [value]


@pytest.mark.skipif(MOST != 2, reason="two processes that differ")
@pytest.mark.parametrize("what", OTHERS)
def test_what_differs_between_processes_is_named_by_all_of_them(what, said):
    for words, expected in zip(said[f"other {what}"], OTHERS[what], strict=True):
        assert isinstance(words, str) and expected in words


@pytest.mark.skipif(MOST != 2, reason="two processes that differ")
def test_a_part_of_the_network_that_one_process_does_not_use_is_trained_as_one_process_would(said):
    expected = spread.experts(None)
    for state in said["experts"]:
        for name, value in expected.items():
            near(state[name], value)


@pytest.mark.skipif(MOST != 2, reason="two processes that differ")
def test_buffers_that_do_not_change_stay_as_they_are(said):
    for mask in said["masked"]:
        assert mask.tolist() == [0.0, torch.finfo(torch.float64).min, 0.1]


@pytest.mark.skipif(MOST != 2, reason="two processes that differ")
def test_sixteen_bits_hold_neither_the_count_nor_the_sum_of_many_images(said):
    accuracy, loss = spread.sixteen_bits(None, (0, 3001))
    for theirs, other in said["bits"]:
        assert theirs == pytest.approx(accuracy, abs=2e-3) and other == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("group", ["WORLD", 2])
def test_a_group_that_is_none_is_named(group):
    model, x, y = task()
    with pytest.raises(WdatError, match="group must be a process group"):
        wpgd(model, x, y, Threat(), group=group)
    with pytest.raises(WdatError, match="group must be a process group"):
        boundary(model, x, y, steps=1).gather(group)
    with pytest.raises(WdatError, match="group must be a process group"):
        finetune(model, (x, y), None, FinetuneConfig(), group=group)


@pytest.mark.skipif(MOST != 2, reason="these run with 2 processes")
def test_a_network_that_draws_random_numbers_goes_on_as_if_never_stopped(said):
    """Also where the parts of a minibatch are unequal, and take unequally many of them."""
    first, second = said["noisy"]
    for stopped in said["noisy, stopped"]:
        for name, value in stopped.items():
            assert torch.equal(value, first[name]) and torch.equal(value, second[name]), name


@pytest.mark.skipif(MOST != 2, reason="these run with 2 processes")
def test_parameters_of_two_types_are_trained_as_one_process_would(said):
    expected = spread.mixed(None)
    for found in said["mixed"]:
        assert found["scale"].dtype == torch.float32 and found["scale"] != 1
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_statistics_are_of_all_processes_where_torch_has_that(device, monkeypatch):
    """On GPUs; the network stays the same, so its record and its export do too."""
    monkeypatch.setattr(companion_processes, "group", lambda: True)
    model = network("full")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, _ = images(5, model)
    expected = model(x)
    shared = companion_processes.shared_statistics(model, torch.device(device))
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in shared.modules()) == (device == "cuda")
    assert shared.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in shared.state_dict().items())
    assert torch.equal(shared(x), expected)
