"""Training for the worst case: the rule by which it is judged, on made-up records, and what the page makes of them."""

import math

import numpy as np
import pytest
import torch
from altered import altered, recorded

from companion import answers, files, frontiers, origins, plots, worst
from companion.frontiers import Point, Setting, above
from companion.intervals import found_at
from companion.objective_functions import OBJECTIVES
from companion.records import make_record, parse_record, read_records, record_bytes
from companion.values import pack, pack_floats
from wdat_core import Threat

N = 200
BASE = recorded("evaluate-demo-a6c7a633*")  # CIFAR-10's 10,000 test images


def far(clean, robust):
    """Distances of N images, of which so many per cent are right, and so many are left at A_2 and 4/255.

    What is bought costs nearly nothing, and of what is left no image can be paid for, not even a part worth naming.
    """
    right, left = round(N * clean / 100), round(N * robust / 100)
    distance = torch.zeros(N)
    distance[:left] = 100 * frontiers.AT * math.sqrt(N) / 255
    distance[left:right] = 1e-5
    return distance


def made(clean, robust, objective="slope", beta=3.0, delta=8, *, val=None, seed=0, name="demo", **parts):
    """A record of kind "objective" with these accuracies on test images, and on validation images (None: the same)."""
    data, config = {"train": 300, "val": N, "test": N} | parts.pop("data", {}), parts.pop("config", {})
    stored = BASE.stored()
    distance = {"val": far(*(val or (clean, robust))), "test": far(clean, robust)}
    p = OBJECTIVES[objective].p if objective in OBJECTIVES else 2.0
    record = make_record({
        **{k: stored[k] for k in ("schema", "device", "versions", "core", "created")},
        "kind": "objective",
        "network": {"name": name, "source": "made up", "digest": files.digest(name.encode())},
        "data": {"source": "CIFAR-10", "digest": files.digest(b"images"), **data},
        "config": {
            "objective": objective, "threat": {"p": "inf" if p == math.inf else p, "r": "inf", "delta": delta / 255},
            "beta": beta, "tau": 0.01, "eta": 1.0, "clip": 10.0, "perturb": "whole", "steps": 20, "epochs": 20,
            "batch_size": 512, "found_steps": 100, "seed": seed, **config,
        },
        "history": {"epochs": [{"epoch": 20, "loss": 1.0}], "best": 20},
        "boundary": {
            "steps": 100, "core": stored["core"], "device": "a device",
            "distance": {part: pack_floats(d) for part, d in distance.items()},
        },
        "seconds": {"train": 100.0 + seed, "evaluate": 1.0},
        "command": "python -m companion.objectives demo",
    })  # fmt: skip
    return altered(record, **parts) if parts else record


def before(clean, robust, name="demo", part="test", steps=100, n=N):
    """The network as it is."""
    record = altered(
        BASE,
        network={"name": name, "digest": files.digest(name.encode())},
        data={"test": n, **({"val": n} if part == "val" else {})},
        correct={part: {"clean": pack(torch.arange(n) < round(n * clean / 100))}},
    )
    boundary = {"distance": {part: pack_floats(far(clean, robust)[:n])}, "steps": steps}
    return record.model_copy(update={"boundary": record.boundary.model_copy(update=boundary)})


def algorithm1(name="demo", **parts):
    """Its records with three weights: clean 80, 70 and 60 per cent, A_2 10, 30 and 40."""
    three = ((1.0, 80, 10), (6.0, 70, 30), (12.0, 60, 40))
    return [made(clean, left, "algorithm1", beta, name=name, **parts) for beta, clean, left in three]


def line(*points):
    """Points of one image alone: an accuracy is that number."""
    return [Point(np.array([clean]), np.array([robust])) for clean, robust in points]


def value(clean, robust, points):
    found = above(*line((clean, robust)), line(*points))
    return found and found.value / 100


def judged(*records):
    return {j.setting.objective: j for study in frontiers.studies(records) for j in frontiers.judged(study, records)}


def cells(table):
    return [[c.strip().replace("\u00a0", " ") for c in row.strip("| ").split("|")] for row in table.data.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------------------------------

THREE = ((60, 40), (70, 30), (80, 10))


def test_a_point_on_the_frontier_has_difference_0_and_one_above_it_what_it_is_above():
    for clean, robust in (*THREE, (65, 35), (72.5, 25)):
        assert value(clean, robust, THREE) == pytest.approx(0)
        assert value(clean, robust + 2, THREE) == pytest.approx(2)
        assert value(clean, robust - 3, THREE) == pytest.approx(-3)


def test_beyond_the_frontier_nothing_is_guessed():
    for clean in (59.9, 80.1):
        assert value(clean, 90, THREE) is None
    assert value(70, 90, ((70, 30),)) == pytest.approx(60) and value(70.1, 90, ((70, 30),)) is None
    assert value(70, 90, ()) is None


def test_who_has_more_of_both_is_not_behind():
    points = ((50, 10), (70, 30), (80, 10))  # the network as it is has less of both
    assert value(60, 25, points) == pytest.approx(-5) and value(50, 10, points) == pytest.approx(-20)
    assert value(75, 25, points) == pytest.approx(5)


def test_the_frontier_is_algorithm_1_at_its_radius_and_the_network_as_it_is():
    others = [made(75, 90, "algorithm1", 9.0, 4), made(75, 90, "slope"), *algorithm1("small_pgd")]
    start = before(90, 5)
    records = [*others, *reversed(algorithm1()), start]
    (study,) = (s for s in frontiers.studies(records) if s[0].network.name == "demo")
    found = frontiers.frontier(study, "test", records)
    assert [p.clean.mean() for p in found] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert [p.robust.mean() for p in found] == pytest.approx([0.4, 0.3, 0.1, 0.05], abs=1e-5)
    assert len(frontiers.frontier(study, "val", records)) == 3
    assert len(frontiers.frontier(study, "val", [*records, before(90, 5, part="val")])) == 4
    assert frontiers.frontier([made(75, 90)], "test", [made(75, 90), start]) == []


@pytest.mark.parametrize("other", [{"name": "small_pgd"}, {"steps": 40}, {"n": N - 1}, {"part": "val"}])
def test_the_network_as_it_is_is_the_same_one_on_the_same_images(other):
    study = [made(75, 20)]
    assert frontiers.as_it_is(study, "test", [before(90, 5)]) and not frontiers.as_it_is(study, "val", [before(90, 5)])
    assert frontiers.as_it_is(study, "test", [before(90, 5, **other)]) is None
    assert frontiers.as_it_is(study, "test", [altered(before(90, 5), data={"source": "other images"})]) is None


def test_made_up_records_have_the_accuracies_they_are_made_for():
    record = made(75, 22)
    there = frontiers.point([record], "test")
    assert (there.clean.mean(), there.robust.mean()) == pytest.approx((0.75, 0.22), abs=1e-5)
    assert parse_record(record_bytes(record)) == record


def test_a_record_two_points_above_is_found_two_points_above():
    (one,) = judged(*algorithm1(), made(75, 22)).values()
    assert one.test.value == pytest.approx(2, abs=1e-3) and one.setting == Setting("slope", 3.0, 8.0)
    assert one.val.value == pytest.approx(2, abs=1e-3) and one.range == "; one seed"


def test_the_weight_is_chosen_on_validation_images_alone():
    def chosen(*tests):
        """With two weights, 3 and 8, of which 3 is better on validation images; their numbers on test images."""
        vals = ((75, 25), (65, 36))
        weights = zip((3.0, 8.0), tests, vals, strict=True)
        return judged(*algorithm1(), *(made(*test, beta=beta, val=val) for beta, test, val in weights))["slope"]

    for tests in (((75, 21), (65, 36)), ((75, 21), (65, 60)), ((75, 1), (65, 60))):
        assert chosen(*tests).setting.beta == 3
        assert chosen(*tests).test.value == pytest.approx(tests[0][1] - 20, abs=1e-3)
    # One that is beyond the frontier of the test images stays chosen, and is not comparable.
    assert chosen((95, 50), (65, 60)).setting.beta == 3 and chosen((95, 50), (65, 60)).text == "not comparable"
    better = made(65, 36, beta=8.0, val=(65, 60))
    assert judged(*algorithm1(), made(75, 21, val=(75, 25)), better)["slope"].setting.beta == 8


def test_a_weight_beyond_the_frontier_of_validation_images_cannot_be_chosen():
    assert not judged(*algorithm1(), made(75, 22, val=(95, 50)))
    one = judged(*algorithm1(), made(75, 22, val=(95, 50)), made(75, 21, beta=8.0))["slope"]
    assert one.setting.beta == 8
    # With the network as it is on validation images the frontier reaches further.
    far_out = [*algorithm1(), before(98, 1, part="val"), made(75, 22, val=(95, 50))]
    assert judged(*far_out)["slope"].test.value == pytest.approx(2, abs=1e-3)


def test_seeds_enter_by_their_mean_and_their_range_is_told():
    seeds = [made(75, 20 + above, seed=seed) for seed, above in enumerate((1, 2, 6))]
    (one,) = judged(*algorithm1(), *seeds).values()
    assert one.test.value == pytest.approx(3, abs=1e-3)
    assert [round(v) for v in one.seeds] == [1, 2, 6] and one.range.startswith("; seeds +")
    (alone,) = judged(*algorithm1(), seeds[0]).values()
    assert alone.range == "; one seed"


def test_the_interval_is_of_differences_on_the_same_images():
    """By resampling images: for a point on a line, that the clean accuracies depend on the sample counts too."""
    generator = np.random.default_rng(0)
    n = 4000
    price = generator.random(n)  # of each image, for all networks alike: what one gets wrong, the others often do

    def point(clean, robust, own):
        noise = price + own * generator.normal(size=n)
        return Point((noise < np.quantile(noise, clean)) * 1.0, (noise < np.quantile(noise, robust)) * 1.0)

    ends, one = [point(0.6, 0.4, 0.1), point(0.8, 0.1, 0.1)], point(0.72, 0.3, 0.05)
    found = above(one, ends)
    again = []
    for _ in range(400):
        drawn = generator.integers(0, n, n)
        sample = [Point(p.clean[drawn], p.robust[drawn]) for p in (one, *ends)]
        again.append(above(sample[0], sample[1:]).value)
    assert found.value == pytest.approx(np.mean(again), abs=0.3)
    assert found.half == pytest.approx(1.96 * np.std(again), rel=0.12)
    assert (above(one, [one]).value, above(one, [one]).half) == (0, 300 / n)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"train": 900}},
        {"data": {"digest": files.digest(b"other images")}},
        {"config": {"epochs": 4}},
        {"config": {"tau": 0.1}},
        {"config": {"found_steps": 40}},
    ],
)
def test_what_was_trained_otherwise_is_never_compared(other):
    records = [*algorithm1(), made(75, 22, **other)]
    assert not judged(*records) and len(frontiers.studies(records)) == 2
    labels = [frontiers.label(study, frontiers.studies(records)) for study in frontiers.studies(records)]
    assert len(set(labels)) == 2 and all("training images" in text for text in labels)
    rows = [row for row in cells(frontiers.frontier_table(records)) if row[1] == "exact slope"]
    assert [row[4] for row in rows] == ["not comparable"]
    # Beside a frontier of its own it is compared with that one.
    assert judged(*records, *algorithm1(**other))["slope"].test.value == pytest.approx(2, abs=1e-3)


def test_networks_that_were_trained_alike_go_by_their_names_alone():
    every = frontiers.studies([*algorithm1("mine"), *algorithm1("small_pgd"), *algorithm1()])
    assert [frontiers.label(study, every) for study in every] == ["demo", "small_pgd", "mine"]
    every = frontiers.studies([*algorithm1(), *algorithm1("small_pgd", config={"epochs": 5})])
    assert "20 epochs" in frontiers.label(every[0], every) and "5 epochs" in frontiers.label(every[1], every)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def of_networks(*differences, objective="slope"):
    """A network for each difference, in which a record is that many points above (None: beyond) the frontier."""
    names = ("demo", "small_pgd", "mine")[: len(differences)]
    found = [record for name in names for record in algorithm1(name)]
    for name, points in zip(names, differences, strict=True):
        found.append(made(95 if points is None else 75, 20 + (points or 0), objective, name=name, val=(75, 25)))
    return found


def test_the_sentence_says_who_wins_and_that_the_goal_is_reached():
    text = frontiers.frontier_answer(of_networks(2, 3, -1)).replace("\u00a0", " ")
    assert (
        text.startswith("**The winner is “exact slope”") and "1.5 points above Algorithm 1 on 2 of 3 networks" in text
    )
    assert "reached.**" in text and "not reached" not in text and text.endswith(".")
    assert all(f"on `{name}` (β = 3, δ = 8/255; one seed)" in text for name in ("demo", "small_pgd", "mine"))


@pytest.mark.parametrize("differences", [(2, 1, 1), (-1, -2, -3), (2, None, None), (7, None, None), (2,)])
def test_the_sentence_says_that_the_goal_is_missed(differences):
    text = frontiers.frontier_answer(of_networks(*differences))
    wins, n = sum((d or 0) >= 1.5 for d in differences), len(differences)
    assert text.startswith("**The goal set beforehand is not reached") and "winner" not in text
    seen = sum((d or 0) > 5.4 for d in differences)  # half an interval of these few images
    where = f"on {seen} of {n} network{'s' * (n > 1)}, and by 1.5 points on {wins}.**"
    assert f"“exact slope” comes nearest: with every seed it is above Algorithm 1 {where}" in text
    assert ("Not comparable on `small_pgd` and `mine`." in text) == (None in differences)


def test_most_networks_come_first_then_the_mean_and_others_who_reach_the_goal_are_named():
    slope, mma = of_networks(2, 2, 2), of_networks(9, 9, -9, objective="mma")
    text = frontiers.frontier_answer([*slope, *mma[-3:]])
    assert text.startswith("**The winner is “exact slope”") and "also reached by “MMA, equal weights”." in text
    text = frontiers.frontier_answer([*slope, *of_networks(9, 9, 9, objective="mma")[-3:]])
    assert text.startswith("**The winner is “MMA, equal weights”")
    seen, higher = of_networks(7, -3, -3), of_networks(4, None, None, objective="mma")  # each above the goal on one
    assert "“exact slope” comes nearest: with every seed" in frontiers.frontier_answer([*seen, *higher[-3:]])


def test_who_is_visibly_above_on_more_networks_than_the_first_is_named_too():
    first = of_networks(3, 3, None, objective="mma")  # above the goal on two, and by less than these few images show
    text = frontiers.frontier_answer([*of_networks(7, -3, -3), *first[-3:]])
    assert text.startswith("**The winner is “MMA, equal weights”")
    assert "“exact slope” is above it with every seed on more networks, 1. A₂ at 4/255 of “exact slope” minus" in text
    text = frontiers.frontier_answer([*of_networks(4, -3, -3), *first[-3:]])
    assert "on more networks" not in text and "exact slope" not in text


def test_of_two_trainings_of_a_network_the_longer_one_decides():
    short = [made(75, 60, config={"epochs": 2}), *algorithm1(config={"epochs": 2})]
    text = frontiers.frontier_answer([*short, *of_networks(1)])
    assert (
        "on 0 of 1 network, and by 1.5 points on 0.**" in text
        and "20 epochs" in text
        and "2 epochs" not in text.replace("20 epochs", "")
    )


def test_without_a_frontier_or_without_records_the_page_says_so():
    assert frontiers.frontier_answer([]) == frontiers.frontier_answer([before(90, 5)]) == worst.NOTHING
    assert worst.NOTHING in frontiers.frontier_table([]).data and origins.trained([]).data == worst.NOTHING
    assert len(cells(frontiers.chosen_table([]))) == 3
    for records in ([made(75, 22)], [made(75, 22), before(90, 5)], algorithm1()[:1]):
        text = frontiers.frontier_answer(records)
        assert text.startswith("**Nothing can be compared with Algorithm 1 yet") and text.endswith(".")
        (row,) = cells(frontiers.frontier_table(records))[2:][-1:]
        assert row[4] in ("not comparable", "its frontier")
        assert plots.plot_frontiers(records).axes


def test_the_table_has_a_row_for_each_setting_after_the_network_as_it_is():
    records = [*algorithm1(), made(75, 21), made(75, 23, seed=1), made(95, 50, beta=1.0), before(90, 5)]
    table = cells(frontiers.frontier_table(records))
    assert [row[1] for row in table[2:]] == ["as it is", *["Algorithm 1"] * 3, *["exact slope"] * 2]
    assert [row[2] for row in table[3:]] == ["1", "6", "12", "1", "3"]
    heads = dict(zip(table[0], table[-1], strict=True))
    assert heads["seeds"] == "0, 1" and heads["δ"] == "8/255"
    assert heads["above Algorithm 1"].startswith("**+2.") and heads["above Algorithm 1"].endswith("**")
    assert heads["clean"] == "75.00" and heads["A₂ at 4/255"] == "22.00 (21.00 to 23.00)"
    start = dict(zip(table[0], table[2], strict=True))
    assert float(start["clean"]) == 90 and start["above Algorithm 1"] == "–"
    assert table[-2][4] == "not comparable" and {row[4] for row in table[3:6]} == {"its frontier"}


def test_the_network_as_it_is_has_the_numbers_of_its_own_page():
    start = before(90, 5)
    row = cells(frontiers.frontier_table([made(75, 21), start]))[2]
    for place, (p, delta) in zip((6, 7, 8, 9), frontiers.SHOWN, strict=True):
        assert row[place] == f"{worst.accuracy([start], 'test', found_at(p, delta)).value:.2f}"


def test_times_of_several_devices_are_told_apart():
    records = [made(75, 21), made(75, 22, "mma", device="another device")]
    rows = cells(frontiers.times_table(records))[2:]
    assert [row[-2:] for row in rows] == [["100", records[0].device], ["100", "another device"]]
    assert "another device" in origins.trained(records).data


def test_the_figure_has_a_panel_a_network_a_line_an_objective_and_a_weight_at_each_point():
    records = [*algorithm1(), made(75, 22), made(66, 35, beta=8.0), made(75, 21, delta=4), made(75, 19, "mma")]
    records += [made(75, 23, seed=1), *algorithm1("small_pgd"), before(90, 5)]
    figure = plots.plot_frontiers(records)
    assert [axis.get_title() for axis in figure.axes] == ["demo", "small_pgd"]
    axis = figure.axes[0]
    lines = [drawn for drawn in axis.lines if len(drawn.get_xdata()) > 1]
    assert sorted(len(drawn.get_xdata()) for drawn in lines) == [2, 3]
    (one,) = (drawn for drawn in lines if len(drawn.get_xdata()) == 2)
    assert list(one.get_xdata()) == pytest.approx([75, 66]) and list(one.get_ydata()) == pytest.approx(
        [22.5, 35], abs=1e-3
    )
    assert sorted(text.get_text() for text in axis.texts) == sorted(["1", "6", "12", "3", "8", "3", "3"])
    assert "per cent" in axis.get_ylabel() and "per cent" in figure.axes[-1].get_xlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "exact slope, δ = 4/255" in labels and "exact slope, δ = 8/255" in labels
    assert {"the network as it is", "what Algorithm 1 reaches"} < {*labels} and len(set(labels)) == len(labels)
    assert len([drawn for drawn in axis.lines if drawn.get_marker() == "*"]) == 1
    assert not [drawn for drawn in figure.axes[1].lines if drawn.get_marker() == "*"]


def test_the_shaded_edge_is_the_frontier():
    (study,) = frontiers.studies(algorithm1())
    edge = plots._edge(frontiers.frontier(study, "test", algorithm1()))
    assert edge[0] == pytest.approx((60, 40), abs=1e-3) and edge[-1] == pytest.approx((80, 10), abs=1e-3)
    for clean, height in edge:
        assert height == pytest.approx(40 - (clean - 60) if clean <= 70 else 30 - 2 * (clean - 70), abs=1e-3)
    assert plots._edge([]) == []


def test_objectives_are_told_apart_in_grey_too():
    assert plots.OBJECTIVES.keys() == OBJECTIVES.keys()
    assert len({marker for _, marker, _ in plots.OBJECTIVES.values()}) == len(OBJECTIVES)
    unknown = made(75, 21, "of_mine")
    assert "of_mine" in frontiers.frontier_table([unknown]).data and plots.plot_frontiers([unknown]).axes


def test_how_it_was_run_says_what_the_frontier_includes():
    text = origins.trained([*algorithm1(), made(75, 22, seed=4), before(90, 5)]).data
    assert "300 training, 200 validation and 200 test images of CIFAR-10; 20 epochs at batch size 512" in text
    assert "seeds 0, 4" in text and "the network as it is on test images. On " in text
    assert "the network as it is on no images" in origins.trained(algorithm1()).data
    both = [*algorithm1(), before(90, 5), before(90, 5, part="val")]
    assert "on validation images and test images" in origins.trained(both).data


def test_the_slope_on_the_page_is_that_of_the_accuracy():
    """dA_p / dd_i = p d_i^(p-1) / (n t^p) for what is bought: by finite differences of what each image adds."""
    from wdat_core import Boundary

    distance = torch.linspace(0.001, 0.1, 50, dtype=torch.float64)
    for p in (1.0, 2.0, 4.0):
        threat = Threat(p=p, delta=8 / 255)
        bought, price = Boundary(distance).bought(threat), Boundary(distance).price(threat)
        assert 3 < bought.sum() < 50
        for i in (0, 2, 49):
            moved = [distance.clone() for _ in range(2)]
            for sign, one in zip((1, -1), moved, strict=True):
                one[i] += sign * 1e-6
            up, down = (float(Boundary(one).shares(threat).mean()) for one in moved)
            expected = float(p * distance[i] ** (p - 1) / (50 * price**p)) if bought[i] else 0.0
            assert (up - down) / 2e-6 == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_committed_records_are_shown_as_they_are_judged():
    known = [record for kind in ("objective", "evaluate") for record in read_records(kind=kind)]
    text = answers.answer("train_worst_case", known)
    assert text == frontiers.frontier_answer(known) and text.endswith(".")
    shown = cells(frontiers.frontier_table(known))[2:]
    settings = [setting for study in frontiers.studies(known) for setting in frontiers.settings_of(study)]
    assert len([row for row in shown if len(row) > 1 and row[1] != "as it is"]) == len(settings)


def test_the_readme_says_what_the_records_say():
    """Above Algorithm 1 on two of three networks with every seed, and short of the goal."""
    readme = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    known = [record for kind in ("objective", "evaluate") for record in read_records(kind=kind)]
    every = [j for study in frontiers.studies(known) for j in frontiers.judged(study, known) if j.test]
    slopes = [j for j in every if j.setting.objective == "slope"]
    assert sorted(j.where for j in slopes) == ["", "above", "above"] and all(len(j.seeds) > 1 for j in slopes)
    assert "on two of three networks it lies above Algorithm 1 at the same clean accuracy with every seed." in readme
    (third,) = (j for j in slopes if not j.where)
    there = [j for j in every if j.study == third.study]
    assert not any(j.where == "above" for j in there) and all(len(j.seeds) > 1 or j.where == "below" for j in there)
    apart = max(max(j.seeds) - min(j.seeds) for j in there)
    assert f"On the third, `cnn_a_adv4`, trainings that differ in the seed alone lie up to {apart:.1f} points" in readme
    assert f"and none of the {len(there)} objectives that can be compared lies above Algorithm 1 with every" in readme
    assert not any(j.test.value >= frontiers.GOAL for j in slopes if j.test)
    assert f"goal that was set beforehand, {frontiers.GOAL:g} points" in readme
    lost = []
    for one in slopes:
        start, those = frontiers.as_it_is(one.study, "test", known), frontiers.settings_of(one.study)[one.setting]
        lost.append(100 * (frontiers.point([start], "test").clean - frontiers.point(those, "test").clean).mean())
    assert f"loses clean accuracy, {min(lost):.0f} to {max(lost):.0f} points with this weight" in readme
    assert all(f"beta={one.setting.beta}" in readme and one.setting.delta == 4 for one in slopes)
    assert frontiers.frontier_answer(known).startswith("**The goal set beforehand is not reached")
