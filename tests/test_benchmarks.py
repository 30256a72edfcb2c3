"""The benchmark: what is compared is comparable, what is missing is said, and its record can be drawn. No timings."""

import copy
import dataclasses
import math
import os
import random
import sys
import time

import pytest
import torch
from torch import nn

import wdat_core
from benchmarks import baselines, card, malloc, peers, races, rest, speed, upsilon, worst
from companion import networks
from companion.architectures import WideResNet
from companion.performance import (
    UNITS,
    benchmark_table,
    describe_benchmark,
    growth_table,
    overhead,
    plot_growth,
    plot_ratios,
    rest_table,
    strength_answer,
    throughput_table,
    verdict,
    worst_table,
)
from companion.records import parse_record, read_records, record_bytes, write_record
from companion.settings import ParameterError

CPU = torch.device("cpu")
NO_PEERS = sys.executable  # this environment has neither foolbox nor torchattacks


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


@pytest.fixture(scope="module")
def subject():
    return baselines.demo(48, CPU)


def plan(**changes):
    return dataclasses.replace(speed.Plan(CPU, 1, NO_PEERS, **speed.QUICK), **changes)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "widen", "count"), [(28, 10, 36_479_194), (34, 10, 46_160_474)])
def test_wide_networks_have_as_many_parameters_as_published(depth, widen, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in WideResNet(depth, widen).parameters()) == count


def test_wide_network_is_that_of_robustbench():
    """With RobustBench's weights, in the order in which both store them, it is the same function."""
    networks.zoo()  # so that robustbench finds what it imports
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet as Theirs

    theirs, ours = Theirs(16, 10, 2).eval(), WideResNet(16, 2).eval()
    weights = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    x = torch.rand(4, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_depth_of_a_wide_network_that_is_none():
    with pytest.raises(ParameterError, match=r"is 10, 16, 22, 28, ..., not 12"):
        WideResNet(12, 1)


def passes_of_attack(subject, **options):
    """Without the first, of one image: the core sees whether the network takes it."""

    def attack(model):
        baselines.attacked(dataclasses.replace(subject, model=model), 16, **options)

    (images, _), *passes = baselines.passes_of(subject.model, attack)
    assert images == 1
    return passes


def test_attack_that_skips_nothing_makes_every_pass(subject):
    assert passes_of_attack(subject) == baselines.every_pass(48, 16)


def test_redlr_skips_images(subject):
    assert baselines.gradients(passes_of_attack(subject, loss="redlr")) < 48 * baselines.STEPS


def test_training_with_ce_skips_no_image(subject):
    """What the rows "no image skipped" are measured with."""
    config = wdat_core.FinetuneConfig(loss="ce", epochs=1, batch_size=24, steps=3, sample=0.5)
    made = baselines.passes_of(
        WideResNet(10, 1),
        lambda model: wdat_core.finetune(model, (subject.x, subject.y), None, config, eval_batch_size=24),
    )
    assert made.count((24, "input")) == 2 * (3 + 1)  # in two minibatches: three steps, and one estimate of Upsilon


def test_replay_makes_the_same_passes_again(subject):
    """Those of Algorithm 1, which are of all kinds when the labels are the network's own answers."""

    def train(model):
        options = {"epochs": 1, "batch_size": 24, "steps": 2, "sample": 0.25, "attack_label": "predicted"}
        config = wdat_core.FinetuneConfig(**options)
        wdat_core.finetune(model, (subject.x, subject.y), None, config, eval_batch_size=10)

    network = WideResNet(10, 1)
    made = baselines.passes_of(network, train)
    assert {gradient for _, gradient in made} == {"input", "parameters", "none"}
    before = [p.clone() for p in network.parameters()]
    again = baselines.passes_of(
        network, lambda model: baselines.replay(dataclasses.replace(subject, model=model), made)
    )
    assert again == made
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("batch_size", [32, 7])
def test_published_way_finds_what_ours_finds(subject, batch_size):
    accuracy, loss = baselines.published_way(subject, batch_size=batch_size)
    ours = wdat_core.wpgd(subject.model, subject.x, subject.y, wdat_core.Threat())
    assert abs(accuracy - ours.accuracy) * 48 < 1.5
    assert loss == pytest.approx(ours.loss, abs=0.01)


def test_without_the_libraries_the_subject_is_random_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert baselines.demo(4, CPU).name == "demo (random images)"
    monkeypatch.setitem(sys.modules, "safetensors", None)
    first, second = baselines.demo(4, CPU), baselines.demo(4, CPU)
    assert first.name == "demo (random weights)"
    assert torch.equal(first.model(first.x), second.model(second.x)) and torch.equal(first.y, second.y)


# ---------------------------------------------------------------------------------------------------------------------
# Races and rows
# ---------------------------------------------------------------------------------------------------------------------


def laps_of(*seconds):
    """A contestant whose laps take these seconds of the process's time, and twice as many on the wall."""
    laps = iter(seconds)

    def lap():
        cpu = next(laps)
        return races.Lap(2 * cpu, cpu, 0.5)

    return lap


def run_of(contestants, pairs=(("a", "b"),), **options):
    return races.contest(contestants, pairs, CPU, **options)


def test_ratios_are_of_the_same_round_and_leave_the_warm_up_out():
    done = run_of({"a": laps_of(100, 2, 4, 6, 8, 10, 12), "b": laps_of(1, 1, 1, 2, 2, 2, 2)}, rounds=6)
    assert done.ratios("a", "b") == [2, 4, 3, 4, 5, 6]
    row = races.compare(done, "a", "b", races.TIME, target=1.05)
    assert (row["low"], row["ratio"], row["high"], row["rounds"]) == (2, 4, 6, 6)
    assert (row["target"], row["met"], verdict(row)) == ("at most 1.05", False, "missed by 2.95")
    assert (row["clock"], row["wall"], row["seconds"]) == ("cpu", [4, 2, 6], 7)
    row = races.compare(done, "b", "a", races.SPEED, target=2)
    assert (row["ratio"], row["target"]) == (4, "at least 2")


def test_on_a_gpu_the_wall_clock_decides():
    race = races.contest(
        {"a": lambda: races.Lap(3, 1), "b": lambda: races.Lap(1, 1)}, [], torch.device("cuda"), rounds=6
    )
    row = races.compare(race, "a", "b", races.TIME)
    assert (row["clock"], row["ratio"]) == ("wall", 3)


@pytest.mark.parametrize(
    ("unit", "target", "met", "said"),
    [
        (races.TIME, 3.5, True, "met"),
        (races.TIME, 0.9, False, "missed by 1.10"),
        (races.TIME, 2.5, None, "not decided, the interval has the target inside"),
        (races.SPEED, 1.5, None, "not decided, the interval has the target inside"),
        (races.SPEED, 0.9, True, "met"),
        (races.SPEED, 4.0, False, "missed by 2.00"),
        (races.SPEED, None, None, ""),
    ],
)
def test_target_inside_the_interval_is_not_decided(unit, target, met, said):
    slow, fast = laps_of(1, 1, 2, 2, 2, 2, 3), laps_of(*[1] * 7)
    laps = {"a": slow, "b": fast} if unit == races.TIME else {"a": fast, "b": slow}
    row = races.compare(run_of(laps, rounds=6), "a", "b", unit, target=target)
    assert (row["low"], row["ratio"], row["high"], row["met"], verdict(row)) == (1, 2, 3, met, said)


def test_race_ends_when_every_interval_is_narrow_enough_or_after_the_rounds():
    def noisy(scale, seed):
        draw = random.Random(seed)
        return lambda: races.Lap(0, math.exp(draw.gauss(0, scale)))

    steady = run_of({"a": noisy(0.001, 1), "b": noisy(0.001, 2)})
    assert len(steady.laps["a"]) == races.LEAST
    assert len(run_of({"a": noisy(1, 1), "b": noisy(1, 2)}, rounds=11).laps["a"]) == 11
    between = run_of({"a": noisy(0.02, 1), "b": noisy(0.02, 2)}, rounds=200)
    found = races.estimate(between.ratios("a", "b"))
    assert races.LEAST < len(between.laps["a"]) < 200
    assert (found.high - found.low) / 2 <= races.CLOSE * found.ratio


def test_order_within_a_round_is_drawn_and_the_same_again():
    def order(seed):
        ran = []

        def lap(name):
            ran.append(name)
            return races.Lap(1, 1)

        run_of({name: lambda name=name: lap(name) for name in "abcd"}, (), rounds=9, seed=seed)
        return ["".join(ran[i : i + 4]) for i in range(4, len(ran), 4)]

    assert all(sorted(r) == list("abcd") for r in order(0)) and len(set(order(0))) > 4
    assert order(0) == order(0) != order(1)


def test_relay_gives_each_part_to_each_contestant_once_in_a_drawn_order():
    ran = []
    works = {name: lambda part, name=name: ran.append(f"{name}{part}") or part / 10 for name in "ab"}
    race = races.relay(works, range(8), CPU)
    rounds = [(first[0], {first, second}) for first, second in zip(ran[::2], ran[1::2], strict=True)]
    assert [pair for _, pair in rounds] == [{f"a{i}", f"b{i}"} for i in range(8)]
    assert {first for first, _ in rounds} == {"a", "b"}
    assert [lap.accuracy for lap in race.laps["b"]] == [i / 10 for i in range(8)]


@pytest.mark.parametrize("disturbed", [0, 0.1, 0.25])
def test_interval_has_the_true_ratio_inside_95_times_of_100(disturbed):
    """On made times: noise of 2 %, a machine that gets slower and faster, and laps that take several times as long."""
    hits, races_run = 0, 400
    for seed in range(races_run):
        draw, clock = random.Random(seed), iter(range(10**6))

        def lap(seconds, draw=draw, clock=clock):
            now = next(clock)
            seconds *= math.exp(draw.gauss(0, 0.02)) * (1 + now / 60 + 0.2 * math.sin(now / 9))
            seconds *= 1 + draw.expovariate(1) * (draw.random() < disturbed)
            return races.Lap(0, seconds)

        race = run_of({"a": lambda lap=lap: lap(1.05), "b": lambda lap=lap: lap(1.0)}, seed=seed)
        found = races.estimate(race.ratios("a", "b"))
        hits += found.low <= 1.05 <= found.high
    assert 0.92 <= hits / races_run <= 0.98


def test_interval_needs_six_rounds():
    assert races.estimate([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)
    assert races.estimate(range(9)) == (4, 1, 7)  # 2 of 512 cases are outside on each side with k = 1, 10 with k = 2
    with pytest.raises(ValueError, match="needs 6 rounds"):
        races.estimate([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (baselines.UnavailableError("not installed"), "not installed"),
        (wdat_core.WdatError("torch.compile fails on this model"), "torch.compile fails on this model"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
    ],
)
def test_contestant_that_cannot_start_has_rows_that_say_why(error, reason):
    def broken():
        raise error

    done = run_of({"a": laps_of(*[1] * 7), "b": broken}, rounds=6)
    for names in (("a", "b"), ("b", "a")):
        row = races.compare(done, *names, races.TIME, target=1)
        assert (row["ratio"], row["met"], row["reason"]) == (None, None, reason)


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


def test_peer_is_timed_on_all_the_images(subject):
    found = peers.run("pyautoattack", subject, 16)
    clean = (subject.model(subject.x).argmax(1) == subject.y).sum().item()
    assert found["gradients"] == clean * (baselines.STEPS + 1)
    ours = baselines.attacked(subject, 16, p=float("inf"))
    assert abs(found["accuracy"] - ours) < 0.1 and found["version"]


def test_peers_that_are_not_there_are_named(subject):
    with peers.worker(NO_PEERS, subject, 16) as ask:
        for name in ("foolbox", "torchattacks"):
            with pytest.raises(baselines.UnavailableError, match=f"{name} is not installed"):
                ask(name)
        assert ask("pyautoattack")["accuracy"] <= 1  # and the worker still answers


def test_worker_that_dies_or_cannot_start(subject, tmp_path, monkeypatch):
    with pytest.raises(baselines.UnavailableError, match="does not start"), peers.worker("no/python", subject, 16):
        pass
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "no_worker.py"))
    with peers.worker(NO_PEERS, subject, 16) as ask, pytest.raises(baselines.UnavailableError, match="exit code 2"):
        ask("foolbox")


# ---------------------------------------------------------------------------------------------------------------------
# The command, its record and its page
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    speed.main(["--quick", "--rounds", "6", "--device", "cpu", "--peers", NO_PEERS, "--out", str(folder)])
    (record,) = read_records(folder, kind="benchmark")
    return record


def test_quick_run_ends_in_a_record_with_every_group(record):
    groups = {row["group"] for row in record.rows}
    assert groups == {
        "Attack: overhead",
        "Attack: speed",
        "Worst case: overhead",
        "Worst case: beside AutoAttack",
        "Precision and compilation",
        "Algorithm 1",
        "Peak memory",
        "Share of the card's rate",
    }
    for row in record.rows:
        assert (row["ratio"] is None) == (row["reason"] is not None)
        if row["ratio"] is not None and row["unit"] != races.EXTENT:
            assert row["low"] <= row["ratio"] <= row["high"] and row["rounds"] >= races.LEAST
            assert (row["clock"], len(row["wall"])) == ("cpu", 3)
    assert set(record.growth) == set(record.memory) == {"images", "steps", "epochs"}
    assert record.command == "python benchmarks/speed.py --device cpu --rounds 6 --quick"
    assert "pyautoattack" in record.versions


def test_where_the_rest_goes_adds_up(record):
    (shares,) = record.rest.values()
    assert shares.keys() == {*rest.KINDS, "other"}
    table = rest_table(record).data
    assert f"| together | {100 * sum(shares.values()):.1f} % |" in table
    without = {name: value for name, value in record.stored().items() if name != "rest"}
    assert "measured on a CPU alone" in rest_table(parse_record(record_bytes(without))).data


def test_an_operation_that_only_one_side_makes_is_seen():
    """Sixty sines of images, which are of no kind of their own, beside one sum; and nothing beside itself."""
    x = torch.rand(200, 3, 32, 32)

    def ours():
        for _ in range(60):
            x.sin()
        x.sum()

    assert rest.where(ours, x.sum, 3)["other"] > 1
    assert rest.where(ours, ours, 3)["other"] < 0.5


def test_what_is_missing_here_has_a_reason(record):
    reasons = {row["reason"] for row in record.rows if row["ratio"] is None}
    for words in (
        "foolbox is not installed",
        "torchattacks is not installed",
        "left out of a quick run",
        "needs a GPU",
    ):
        assert any(words in reason for reason in reasons)


def test_damaged_record_of_a_benchmark_is_named(record, tmp_path, capsys):
    path = write_record(record, tmp_path)
    text = path.read_text(encoding="utf-8")
    (tmp_path / "benchmark-other.json").write_text(text.replace('"rows"', '"lines"'), encoding="utf-8")
    (tmp_path / "benchmark-half.json").write_text(text[:1000], encoding="utf-8")
    assert read_records(tmp_path, kind="benchmark") == [record]
    complaint = capsys.readouterr().err
    assert "benchmark-other.json" in complaint and "benchmark-half.json" in complaint


def test_table_has_every_row_and_the_reasons(record):
    text = benchmark_table(record).data
    for row in record.rows:
        if row["ratio"] is None:
            assert row["reason"] in text
        else:
            interval = f" ({row['low']:.2f} to {row['high']:.2f})" if row["rounds"] else ""
            assert f"**{row['ratio']:.2f}**{interval} {UNITS[row['unit']]}" in text
    assert "Reason: needs a GPU" in text and "None" not in text
    assert describe_benchmark(record).data.startswith(f"**{record.device}.**")


def test_ratio_without_its_interval_is_not_shown(record):
    rows = [{name: value for name, value in row.items() if name != "wall"} for row in record.rows]
    earlier = record.model_copy(update={"rows": rows})
    text = benchmark_table(earlier).data
    assert "recorded it, without an interval" in text and text.count("**") == 2  # the memory
    assert "not measured yet" in overhead(earlier)
    assert not [c for axis in plot_ratios(earlier).axes for c in axis.containers if len(c.lines[0].get_xdata())]


def test_first_sentence_has_the_ratios_with_their_intervals(record):
    text = overhead(record)
    rows = [row for row in record.rows if row["unit"] == races.TIME]
    assert len(rows) == 6
    assert all(f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})" in text for row in rows)
    assert f"met by {sum(row['met'] is True for row in rows)} of 6" in text


def test_figures_show_what_the_tables_say(record):
    shown = [row["ratio"] for row in record.rows if row["ratio"] and row["unit"] != races.EXTENT]
    figure = plot_ratios(record)
    drawn = [x for axis in figure.axes for c in axis.containers for x in c.lines[0].get_xdata()]
    assert sorted(drawn) == pytest.approx(sorted(shown))
    text = growth_table(record).data
    points = [point for key in ("growth", "memory") for axis in getattr(record, key).values() for point in axis]
    assert all(f"{x:,}: {y:.2f}" in text for x, y in points)
    drawn = [p for axis in plot_growth(record).axes for line in axis.lines for p in line.get_xydata().tolist()]
    assert all(any(p == pytest.approx(q) for q in drawn) for p in points)


def test_tables_and_figures_of_a_record_without_values(record):
    rows = [{**row, "ratio": None, "met": None, "reason": "no electricity"} for row in record.rows]
    empty = record.model_copy(update={"rows": rows, "growth": {}, "memory": {}})
    assert "Reason: no electricity" in benchmark_table(empty).data
    assert "| images | – | – |" in growth_table(empty).data
    assert not [c for axis in plot_ratios(empty).axes for c in axis.containers if len(c.lines[0].get_xdata())]
    plot_growth(empty)


def test_the_worst_case_stands_beside_its_peers_and_what_a_stream_holds(record):
    found = record.worst["strength"]
    assert {row["attack"] for row in found} == {"boundary", *worst.PEERS.values()}
    for row in found:
        measured = row["attack"] == "boundary"
        assert (row["reason"] is None) == measured and row["steps"] == [2, 3] * measured
        assert all(0 <= a <= 1 for budget in worst.BUDGETS for a in row[budget])
    assert [images for images, _ in record.worst["stream"]] == [1000, 2000]
    text = worst_table(record).data
    assert all(f"| {name} | boundary | 2: " in text for name in ("demo", "small_pgd", "small_trades"))
    assert "adv_lib is not installed" in text and "2,000 made images" in text and "MB more than with the first" in text
    assert "not measured yet" in worst_table(record.model_copy(update={"worst": {}})).data


MADE = {"reason": None, "images": 1000, "steps": [20, 40, 100], "gradients": [20.0, 40.0, 100.0]}
FMN = {"w_2_4": [0.18, 0.17, 0.17], "w_2_8": [0.043, 0.012, 0.003], "w_inf_8": [0.273, 0.27, 0.27]}
FOUND = {"w_2_4": [0.17, 0.17, 0.165], "w_2_8": [0.043, 0.010, 0.003], "w_inf_8": [0.272, 0.265, 0.26]}


def judged(record, found, rows=(), **changes):
    """The sentences on a made record, of a network on which `boundary` has found this."""
    attacks = {"boundary": found, "adv-lib FMN": FMN}
    strength = [
        {**MADE, "network": "small_trades", "attack": attack, **left, **changes} for attack, left in attacks.items()
    ]
    return strength_answer(record.model_copy(update={"worst": {"strength": strength}, "rows": list(rows)}))


def test_never_weaker_than_fmn_is_judged_in_every_cell(record):
    text = judged(record, FOUND)
    assert "On 1,000 images, in 9 cells of the table below: **met**." in text and "missed" not in text
    text = judged(record, FOUND | {"w_inf_8": [0.272, 0.271, 0.26]})
    assert "**missed in 1: small_trades, W∞, δ = 8/255, 40 gradients (27.1 % against 27.0 %)**" in text


def test_what_is_left_of_small_trades_is_judged_by_number(record):
    said = "Of small_trades it leaves, at W₂, δ = 8/255: 4.3 % with 20 gradients (at most 4.5 %: met); "
    assert f"{said}1.0 % with 40 gradients (at most 1.0 %: met); 0.3 % with 100 gradients (at most 0.3 %: met)." in (
        judged(record, FOUND)
    )
    text = judged(record, FOUND | {"w_2_8": [0.043, 0.011, 0.003]})
    assert f"{said}1.1 % with 40 gradients (at most 1.0 %: **missed**); " in text


def test_what_an_older_record_lacks_is_said(record):
    assert record.worst["strength"] and "beside adv-lib's FMN yet" in strength_answer(record)
    text = judged(record, FOUND, images=300)
    assert "On 300 images" in text and "The targets are for 1,000 images, and this was measured on 300." in text
    assert "not measured beside AutoAttack yet" in text
    stored = {name: value for name, value in record.stored().items() if name != "worst"}
    assert "AutoAttack yet" in strength_answer(parse_record(record_bytes(stored)))


def beside(monkeypatch, ours, theirs, seconds):
    """The rows where ours leaves this share of the images right and takes so long for a part, AutoAttack 50 ms."""

    def leaves(share, x, seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.arange(len(x)) < share * len(x)

    def found(part, batch_size, steps):
        return wdat_core.Boundary(torch.where(leaves(ours, part.x, seconds), math.inf, 0.0))

    monkeypatch.setattr(worst, "bounded", found)
    monkeypatch.setattr(worst, "autoattack", lambda model, x, y, **_: leaves(theirs, x, 0.05))
    return worst.beside_autoattack(baselines.random_subject("tiny", tiny, 60, CPU), 6)


def test_beside_autoattack_each_target_has_a_row(monkeypatch, record):
    faster, close = beside(monkeypatch, ours=0.5, theirs=0.5, seconds=0.002)
    assert faster["ratio"] > 10 and faster["met"] and faster["rounds"] == 6
    assert (close["ratio"], close["met"]) == (0, True)
    slow, far = beside(monkeypatch, ours=0.5, theirs=0.4, seconds=0.05)
    assert (slow["met"], far["ratio"], far["met"]) == (False, 10, False)
    assert slow["baseline_seconds"] == pytest.approx(0.3, abs=0.11)
    text = judged(record, FOUND, [slow, far])
    assert "50.0 % against 40.0 %, +10.0 points (at most 0.3: missed by 9.70)" in text
    assert "times as fast (at least 10: missed by " in text
    text = benchmark_table(record.model_copy(update={"rows": [slow, far]})).data
    assert "**10.00** points above it (counted)" in text


@pytest.mark.parametrize(("theirs", "ratio", "met"), [(0.263, 0.1, True), (0.260, 0.4, False), (0.270, -0.6, True)])
def test_autoattack_stronger_by_more_than_a_few_images_is_a_miss(monkeypatch, theirs, ratio, met):
    def relay(works, parts, device):
        laps = ([races.Lap(1, 1, left)] * len(parts) for left in (0.264, theirs))
        return races.Race("cpu", dict(zip(works, laps, strict=True)))

    monkeypatch.setattr(worst, "relay", relay)
    _, row = worst.beside_autoattack(baselines.random_subject("tiny", tiny, 1000, CPU), 10)
    assert (row["ratio"], row["met"]) == (ratio, met)


def test_autoattack_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    rows = worst.beside_autoattack(baselines.random_subject("tiny", tiny, 6, CPU), 6)
    assert [(row["ratio"], row["met"]) for row in rows] == [(None, None)] * 2
    assert all(row["reason"].startswith("pyautoattack is not installed") for row in rows)


def test_a_peer_of_minimum_norm_is_run_again(subject, monkeypatch):
    """Its distances are those of images that the network errs on; here it is ours, and then one that finds nothing."""

    def found(model, device, steps):
        return lambda x, y: wdat_core.boundary(model, x, y, steps=steps).x_adv

    monkeypatch.setitem(peers.NEAREST, "torch", found)
    theirs, ours = peers.nearest("torch", subject, 16, 5), worst.ours(subject, 16, 5)
    assert theirs["distance"] == pytest.approx(ours["distance"], abs=1e-6)
    assert 0 < ours["gradients"] <= 5 * 48 + 1
    monkeypatch.setitem(peers.NEAREST, "torch", lambda model, device, steps: lambda x, y: x)
    assert {*peers.nearest("torch", subject, 16, 5)["distance"]} == {0.0, math.inf}


def test_all_that_is_timed_has_one_setting_of_malloc(monkeypatch, record):
    """The program starts again with it, once; memory is measured without it."""
    started = []
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    for name in malloc.SETTING:
        monkeypatch.setenv(name, "0")  # so that it is as it was at the end
    monkeypatch.setattr(sys, "platform", "win32")
    malloc.start_again_with_it()
    assert not started and malloc.words() == record.config.malloc == "as the system has it"
    monkeypatch.setattr(sys, "platform", "linux")
    malloc.start_again_with_it()
    malloc.start_again_with_it()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert malloc.words() == "MALLOC_TOP_PAD_=100000000 MALLOC_TRIM_THRESHOLD_=1000000000"
    assert not malloc.SETTING.keys() & malloc.environment_without().keys()
    shown = describe_benchmark(record).data
    assert "malloc: as the system has it." in shown and "System time: " in shown


def test_throughput_table(record):
    assert "on a GPU alone" in throughput_table(record).data
    figures = {"demo, float32": {"images_per_second": 10.0}}  # where the memory ended at the iteration
    assert "| demo, float32 | 10 | – |" in throughput_table(record.model_copy(update={"throughput": figures})).data


def test_figures_of_a_card_without_a_card(monkeypatch):
    """The code that runs on a GPU runs; what it returns here is no measurement."""
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(card, "MATRIX", 8)
    tiny = baselines.random_subject("tiny", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 8, CPU)
    with card.tf32(True):
        row, figures = card.on_the_card(tiny, 6, {"precision": "bfloat16", "compiled": False})
    assert row["ratio"] > 0 and row["network"] == "tiny (random weights)"
    assert set(figures) == {
        "images_per_second", "tflop_per_second", "attack_gib", "iteration_seconds", "training_gib", "projected_minutes"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "5"], "--rounds must be at least 6"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--groups", "others", "--quick", "--peers", "no/python"], "the Python of the peers does not start"),
    ],
)
def test_bad_argument_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        speed.main(arguments)
    assert message in f"{caught.value} {capsys.readouterr().err}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory, and the estimates of Upsilon
# ---------------------------------------------------------------------------------------------------------------------


def test_estimates_of_upsilon_are_followed_along_algorithm_1(subject):
    """What is noted before the first step is that of the network as it was."""
    network, train = copy.deepcopy(subject.model), (subject.x, subject.y)
    config = wdat_core.FinetuneConfig(
        tau=0.1, eta=1.0, epochs=1, batch_size=12, steps=2, sample=1.0, perturb="none", augment=False
    )
    before = wdat_core.sensitivity(network, *train, config.threat)
    points = upsilon.follow(network, train, config, batch=48, every=2)
    assert points["minibatch"] == [0, 2]
    assert points["whole"][0] == pytest.approx(before) and points["whole"][1] != pytest.approx(before)
    assert points["sample"] == pytest.approx(points["whole"])  # the sample is everything
    assert all(value > 0 for value in points["batch"])
