"""The leaderboard: ranks, their change, and which networks Snakemake is given."""

import re

import pytest
from altered import altered
from test_worst import made

from companion import files, leaderboard
from companion.datasets import DATASETS
from companion.networks import robustbench_files, zoo
from companion.settings import ParameterError
from companion.words import NOTHING
from wdat_core import Threat

CHEAP = [0.0] * 10 + [0.5] * 40 + [9.0] * 50  # much falls at once, the rest holds
EVEN = [0.0] * 10 + [6.0] * 90  # nothing is cheap, nothing holds at 8/255
LEVEL = [0.0] * 20 + [9.0] * 80  # both


def test_ranks_of_nothing_of_one_and_of_equal_values():
    assert leaderboard.ranks([]) == []
    assert leaderboard.ranks([7.0]) == [1]
    assert leaderboard.ranks([5.0, 7.0, 5.0, 3.0]) == [2, 1, 2, 4]
    assert leaderboard.ranks([1.0, 1.0]) == [1, 1]


def test_networks_are_ranked_by_the_worst_case_and_the_change_is_said():
    each = [made(CHEAP, "cheap"), made(EVEN, "even"), made(LEVEL, "level")]
    ((record, places),) = leaderboard.leaderboards(each)
    assert record.data.test == 100
    # Cheapest first, with 100 * 4^2 to spend at 4/255: 40 * 0.25 and 19 * 81 of CHEAP; 44 * 36 of EVEN; 19 * 81.
    assert [(p.name, round(p.worst.value), round(p.pointwise.value)) for p in places] == [
        ("level", 60, 80),
        ("even", 46, 0),
        ("cheap", 30, 50),
    ]
    assert [(p.rank, p.former, leaderboard.change(p)) for p in places] == [(1, 1, "0"), (2, 3, "+1"), (3, 2, "−1")]
    lines = leaderboard.leaderboard_table(each).data.splitlines()
    assert lines[0].startswith("3 networks on ") and lines[0].endswith(
        ", 100 test images, Linf, 100 gradients an image:"
    )
    assert "worst case found, W₂, 4/255 | W∞, 8/255 | rank by W∞ | change |" in lines[2]
    assert lines[5].startswith("| 2 | even | 45.56") and lines[5].endswith(" | 3 | +1 |")


def test_equal_networks_share_a_rank():
    ((_, places),) = leaderboard.leaderboards([made(EVEN, "one"), made(EVEN, "two"), made([0.0] * 100, "none")])
    assert [(p.name, p.rank, p.former) for p in places] == [("one", 1, 1), ("two", 1, 1), ("none", 3, 1)]


def test_one_network_and_none():
    ((_, (place,)),) = leaderboard.leaderboards([made(LEVEL)])
    assert (place.rank, place.former, leaderboard.change(place)) == (1, 1, "0")
    assert leaderboard.leaderboard_table([made(LEVEL)]).data.startswith("1 network on ")
    assert leaderboard.leaderboards([]) == [] and leaderboard.leaderboard_table([]).data == NOTHING


def test_networks_of_other_images_or_another_radius_are_not_compared():
    other = altered(made(EVEN, "other"), data={"digest": "0" * 64})
    tables = leaderboard.leaderboards([made(LEVEL), other, made(CHEAP, "far", delta=16 / 255)])
    assert [[place.name for place in places] for _, places in tables] == [["demo"], ["other"], ["far"]]
    assert leaderboard.leaderboard_table([made(CHEAP, delta=16 / 255)]).data.count("W₂, 8/255 | W∞, 16/255") == 1


def test_the_networks_are_all_that_robustbench_lists():
    names = leaderboard.entrants([*DATASETS])
    pairs = [(dataset, norm) for dataset, row in DATASETS.items() for norm in row.delta]
    assert len(names) == sum(len(zoo(*pair)) for pair in pairs) == len({*names}) > 100
    assert all(re.fullmatch(r"\w+/(Linf|L2)/[\w.-]+", name) for name in names)  # as the Snakefile has it
    with pytest.raises(ParameterError, match="unknown data set 'cifar': known are cifar10"):
        leaderboard.entrants(["cifar"])


def test_networks_whose_weights_are_here_are_those_with_every_file(tmp_path):
    assert leaderboard.entrants(["cifar10"], tmp_path) == []
    files_of = {name: [*robustbench_files(name, tmp_path, "cifar10", "L2")] for name in zoo("cifar10", "L2")}
    alone = next(name for name, paths in files_of.items() if len(paths) == 1)
    files_of[alone][0].parent.mkdir(parents=True)
    files_of[alone][0].touch()
    assert leaderboard.entrants(["cifar10"], tmp_path) == [f"cifar10/L2/{alone}"]
    assert leaderboard.entrants(["cifar100"], tmp_path) == []
    ensemble = next(name for name in zoo() if len(robustbench_files(name, tmp_path, "cifar10", "Linf")) > 1)
    first, *others = robustbench_files(ensemble, tmp_path, "cifar10", "Linf")
    first.parent.mkdir(parents=True)
    first.touch()
    assert leaderboard.entrants(["cifar10"], tmp_path) == [f"cifar10/L2/{alone}"]
    for path in others:
        path.touch()
    assert f"cifar10/Linf/{ensemble}" in leaderboard.entrants(["cifar10"], tmp_path)


def test_a_norm_of_pixels_is_named():
    record = altered(made(EVEN), config={"threat": Threat(r=2.0, delta=8 / 255)})
    assert leaderboard.leaderboard_table([record]).data.splitlines()[0].endswith(", L2, 100 gradients an image:")


def test_a_folder_without_weights_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        leaderboard.main(["--here"])
    assert "the folder models has no weights of RobustBench" in capsys.readouterr().err
