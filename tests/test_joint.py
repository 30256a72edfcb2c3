"""The joint objective and training from scratch: the rules, on made-up records, and what the page says of them."""

import itertools
import math

import pytest
import torch
from altered import altered
from test_frontiers import N, algorithm1, before, cells, made

from companion import answers, files, frontiers, joint, origins, plots
from companion.kinds import ObjectiveRecord
from companion.records import parse_record, read_records, record_bytes
from companion.values import pack_floats

FINE = 1000  # images, so that three points are more than an interval


def reach(clean, pointwise, spread, n=FINE):
    """Distances of which so many per cent are above 0, above 8/255, and left at A_2 and 4/255, nearly."""
    distance = torch.zeros(n)
    right, firm, left = (round(n * share / 100) for share in (clean, pointwise, spread))
    distance[:right] = 1e-5
    distance[:firm] = 9 / 255
    distance[:left] = 100 * math.sqrt(n) / 255
    return distance


def run(gamma, clean=60.0, pointwise=30.0, spread=20.0, *, beta=6.0, **parts):
    """A record of the joint objective; with gamma 0, of Algorithm 1."""
    config = parts.pop("config", {}) | ({"gamma": gamma} if gamma else {})
    record = made(50, 20, parts.pop("objective", "algorithm1"), beta, config=config, data={"test": N}, **parts)
    return with_distances(record, reach(clean, pointwise, spread))


def with_distances(record, distance):
    boundary = record.boundary.model_copy(
        update={"distance": dict.fromkeys(record.boundary.distance, pack_floats(distance))}
    )
    data = {part: len(distance) for part in ("val", "test") if getattr(record.data, part)}
    return altered(record, data=data).model_copy(update={"boundary": boundary})


def start(clean=60.0, pointwise=33.0, spread=20.0, name="demo"):
    return with_distances(before(50, 20, name), reach(clean, pointwise, spread))


def from_scratch(objective, clean=40.0, pointwise=15.0, spread=10.0, *, seed=0, **parts):
    name = "PatchResNet-32-64-from-scratch"
    record = run(0, clean, pointwise, spread, objective=objective, name=name, seed=seed, **parts)
    return altered(
        record, network={"digest": files.digest(f"weights of seed {seed}".encode())}, config={"perturb": "none"}
    )


def subsets(n):
    return [kept for k in range(n + 1) for kept in itertools.combinations(range(n), k)]


def plain(text):
    return text.replace("\u00a0", " ")


# ---------------------------------------------------------------------------------------------------------------------
# The joint objective
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_the_term_takes_away_is_stopped():
    records = [start(), run(0), run(3, 58, 34, 21), run(1, 59, 32, 20)]
    text = plain(joint.joint_answer(records))
    assert text.startswith(
        "**The pointwise term stops the loss of pointwise accuracy: on 1 of 1 network that has it.**"
    )
    assert "without the term and with it: -3.00 ± 1.06 and +1.00 ± 0.62 on `demo` (γ = 3, which changes" in text
    assert "changes clean accuracy by -2.00" in text and text.endswith(".")


@pytest.mark.parametrize("most", [30.0, 30.1, 28.0])  # as without the term, not visibly more, and less
def test_a_loss_that_stays_is_said_to_stay(most):
    text = joint.joint_answer([start(), run(0), run(1, pointwise=40), run(6, pointwise=most)])
    assert text.startswith("**The pointwise term does not stop the loss of pointwise accuracy: on 0 of 1 network")


def test_half_of_a_loss_is_not_all_of_it():
    text = joint.joint_answer([start(pointwise=40), run(0, pointwise=30), run(6, pointwise=35)])
    assert text.startswith("**The pointwise term does not stop")


def test_where_nothing_is_lost_there_is_nothing_to_stop():
    text = plain(joint.joint_answer([start(pointwise=28), run(0), run(6, pointwise=36)]))
    assert text.startswith(
        "**There is nothing to stop: without the pointwise term no pointwise accuracy is visibly lost, on 1"
    )
    both = [start(pointwise=28, name="small_pgd"), run(0, name="small_pgd"), run(6, pointwise=36, name="small_pgd")]
    text = joint.joint_answer([start(), run(0), run(6, pointwise=36), *both])
    assert "on 1 of 1 network that has it.** Without it `small_pgd` visibly loses none." in text


def test_a_network_that_loses_and_waits_for_the_term_is_named():
    without = [start(pointwise=28, name="small_pgd"), run(0, name="small_pgd")]
    waits = [start(), run(0), run(0, 50, 40, beta=12.0)]
    text = plain(joint.joint_answer([*waits, *without, run(6, pointwise=36, name="small_pgd")]))
    assert text.startswith(
        "**Not known yet: the term was tried on 1 network only, where without it no accuracy is visibly lost"
    )
    assert text.endswith(" Without the term there is a loss on `demo` (-3.00 ± 1.06); the term has not run there yet.")
    text = joint.joint_answer([*waits, *without, run(6, pointwise=36, name="small_pgd"), run(1, pointwise=36)])
    assert text.startswith("**The pointwise term stops") and "yet" not in text
    text = joint.joint_answer([start(), run(6), *without, run(6, pointwise=36, name="small_pgd")])
    assert text.startswith("**There is nothing to stop") and "`demo`" not in text  # it needs a run without the term
    assert joint.lines([*waits, *without]) == [] and len(cells(joint.joint_table(waits))) == 3


def test_every_seed_must_be_on_one_side():
    seeds = [run(0, pointwise=27, seed=0), run(0, pointwise=33.5, seed=1)]
    assert joint.joint_answer([start(), *seeds, run(6)]).startswith("**There is nothing to stop")


def test_the_greatest_gamma_is_judged_and_no_other():
    (line,) = joint.lines([start(), run(6), run(0), run(1)])
    assert line.most == 6 and [*line.points] == [0, 1, 6]


def test_more_weight_alone_is_compared_at_the_same_clean_accuracy():
    alone = [run(0, 60, 30), run(0, 50, 40, beta=12.0)]
    records = [*alone, run(6, 55, 37)]
    (line,) = joint.lines([*records, start(70, 10)])
    assert joint.above_algorithm1(line, 6, joint.POINTWISE, records).value == pytest.approx(2, abs=1e-3)
    text = plain(joint.joint_answer([*records, start(70, 33)]))
    assert "Against Algorithm 1 with another β at the same clean accuracy, A∞ is +2.00 ±" in text
    assert joint.above_algorithm1(line, 6, joint.POINTWISE, []).value == pytest.approx(2, abs=1e-3)
    assert "Against" not in joint.joint_answer([start(), run(0), run(6, 90, 40)])  # beyond the frontier


@pytest.mark.parametrize("kept", subsets(4))
def test_whichever_records_there_are_the_page_is_shown(kept):
    every = [start(), run(0), run(1), run(6)]
    records = [every[i] for i in kept]
    text, joined = joint.joint_answer(records), {2, 3} & {*kept}
    assert text.startswith("**Not measured yet") == (not ({0, 1} <= {*kept} and joined)), text
    table = cells(joint.joint_table(records))
    gammas = [row[1] for row in table[2:] if len(row) > 2]
    assert gammas == (["as it is"] * (0 in kept) + [g for i, g in ((1, "0"), (2, "1"), (3, "6")) if i in kept]) * bool(
        joined
    )
    assert plots.plot_joint(records).axes and plots.plot_scratch(records).axes
    assert joint.scratch_answer(records).startswith("**Not measured yet")


def test_trainings_that_differ_in_more_are_no_line():
    other = run(6, config={"epochs": 4})
    (line,) = joint.lines([start(), run(0), other])
    assert [*line.points] == [6] and joint.joint_answer([start(), run(0), other]).startswith("**Not measured yet")
    assert len(joint.lines([run(0), run(1), run(1, beta=12.0)])) == 2


def test_the_figure_has_every_point():
    figure = plots.plot_joint([start(), run(0), run(1), run(6)])
    drawn = [len(line.get_xdata()) for axis in figure.axes for line in axis.lines]
    assert drawn == [3, 1, 3, 1]  # a line and a star, in two panels
    assert {t.get_text() for axis in figure.axes for t in axis.texts} == {"0", "1", "6"}


# ---------------------------------------------------------------------------------------------------------------------
# From scratch
# ---------------------------------------------------------------------------------------------------------------------


def test_from_scratch_each_objective_stands_beside_trades():
    records = [from_scratch("trades"), from_scratch("slope", 38, 17, 13), from_scratch("algorithm1", 45, 12, 7)]
    text = plain(joint.scratch_answer(records))
    assert text.startswith(
        "**From scratch on `PatchResNet-32-64-from-scratch`, more A₂ than TRADES: “exact slope”; less A₂ than TRADES:"
        " “Algorithm 1”.**"
    )
    rows = cells(joint.scratch_table(records))[2:]
    assert [row[7].split(" ")[0] for row in rows] == ["-3.00", "+3.00", "–"]
    assert "“exact slope” (β = 6, δ = 8/255) has +3.00 ±" in text and "-2.00 ± 0.87 clean" in text
    assert "no visibly different A₂: “exact slope”" in joint.scratch_answer([*records[:1], from_scratch("slope")])


@pytest.mark.parametrize("kept", subsets(3))
def test_whichever_trainings_from_scratch_there_are_the_page_is_shown(kept):
    every = [from_scratch("trades"), from_scratch("slope", spread=13), from_scratch("algorithm1")]
    records = [every[i] for i in kept]
    assert joint.scratch_answer(records).startswith("**Not measured yet") == (0 not in kept or len(kept) == 1)
    rows = cells(joint.scratch_table(records))[2:]
    assert len(rows) == max(1, len(kept))
    assert plots.plot_scratch(records).axes or not kept
    assert joint.joint_answer(records).startswith("**Not measured yet")
    assert len(joint.shown(records)) == len(kept)


def test_the_weight_from_scratch_is_chosen_on_validation_images():
    few, more = from_scratch("slope", spread=13, beta=1.0), from_scratch("slope", spread=11, beta=3.0)
    worse = pack_floats(reach(40, 15, 5))
    few = few.model_copy(
        update={"boundary": few.boundary.model_copy(update={"distance": few.boundary.distance | {"val": worse}})}
    )
    records = [from_scratch("trades"), few, more]
    assert "(β = 3, δ = 8/255)" in joint.scratch_answer(records)
    bold = [row for row in cells(joint.scratch_table(records)) if row[1].startswith("**")]
    assert [row[2][:5] for row in bold] == ["β = 3", "β = 6"]


def test_seeds_from_scratch_are_one_training_though_their_weights_differ():
    records = [from_scratch("trades", seed=seed) for seed in (0, 1)]
    (study,) = joint.scratch_studies(records)
    assert len({record.network.digest for record in study}) == 2 and len(frontiers.settings_of(study)) == 1
    assert cells(joint.scratch_table(records))[2][-2] == "0, 1"


# ---------------------------------------------------------------------------------------------------------------------
# Beside the page "Training for the worst case"
# ---------------------------------------------------------------------------------------------------------------------


def test_neither_is_any_part_of_training_for_the_worst_case():
    usual = [*algorithm1(), made(75, 22), before(90, 5)]
    more = [made(75, 60, "algorithm1", 6.0, config={"gamma": 3.0}), from_scratch("slope"), from_scratch("trades")]
    for show in (
        frontiers.frontier_answer,
        lambda known: frontiers.frontier_table(known).data,
        lambda known: frontiers.chosen_table(known).data,
        lambda known: origins.trained(known).data,
        frontiers.studies,
    ):
        assert show([*more, *usual]) == show(usual)


def test_a_record_without_gamma_reads_as_gamma_0():
    record = made(75, 22)
    assert "gamma" not in record.config.model_dump(exclude_unset=True) and record.config.gamma == 0
    joined = made(75, 22, "algorithm1", config={"gamma": 3.0})
    assert parse_record(record_bytes(joined)).config.gamma == 3


def test_how_it_was_run_tells_the_recipe_from_scratch():
    recipe = {
        "schedule": "one_cycle",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "upsilon_from": "batch",
        "batch_size": 128,
    }
    records = [from_scratch("trades", config=recipe)]
    text = origins.trained(records, joint.scratch_studies(records)).data
    assert "schedule one_cycle, momentum 0.9, weight decay 0.0005, Υ from the batch, 20 steps" in text
    assert "as it is" not in text
    records = [start(), run(0), run(3)]
    text = origins.trained(records, [line.study for line in joint.lines(records)]).data
    assert "schedule" not in text and "includes the network as it is on test images" in text


def test_committed_records_are_shown():
    known = [record for kind in ("objective", "evaluate") for record in read_records(kind=kind)]
    text = answers.answer("joint", known)
    assert text == joint.joint_answer(known) and text.startswith("**")
    gammas = [r for r in known if isinstance(r, ObjectiveRecord) and r.config.gamma]
    assert {id(r) for r in gammas} <= {id(r) for r in joint.shown(known)}
    assert len(cells(joint.joint_table(known))) >= 3 and len(cells(joint.scratch_table(known))) >= 3


def test_the_readme_says_what_the_records_say():
    readme = " ".join((files.ROOT / "README.md").read_text(encoding="utf-8").split())
    known = [record for kind in ("objective", "evaluate") for record in read_records(kind=kind)]
    found = {joint.name_of(line.study[0]): line for line in joint.lines(known) if {0, 6} <= line.points.keys()}
    lost, kept = found["`small_pgd`"], found["`small_trades`"]
    assert found.keys() == {"`small_pgd`", "`small_trades`"}
    without, with_it = (
        [
            f"{value.value:+.2f} ± {value.half:.2f}"
            for value, _ in (joint.moved(line.points[gamma], [line.before], joint.POINTWISE) for line in (lost, kept))
        ]
        for gamma in (0, 6)
    )
    assert joint._loses(lost) and joint._is_stopped(lost) and not joint._loses(kept)
    assert f"in the pointwise worst case, {without[0]} points, and with this term it does not, {with_it[0]};" in readme
    assert f"gains {without[1]} without the term and {with_it[1]} with it" in readme
    runs = [record for line in found.values() for gamma in (0, 6) for record in line.points[gamma]]
    assert {record.config.seed for record in runs} == {0}
    assert {record.data.train for record in runs} == {10_000}
