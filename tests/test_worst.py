"""How robust is it really: table, figure and sentence say what distances say, and what is proved stays below."""

import math

import pytest
import torch
from altered import altered, recorded

from companion import answers, files, leaderboard, proofs, worst
from companion.intervals import boundary_of
from companion.kinds import KINDS
from companion.records import make_record, parse_record, read_records, record_bytes, record_name
from companion.settings import ParameterError, Settings
from companion.values import pack, pack_floats, unpack_floats
from wdat_core import Threat

BASE = recorded("evaluate-demo-a6c7a633*")  # CIFAR-10's 10,000 test images
N = 100


def made(distance, name="demo", w_2=50, w_inf=60, delta=8 / 255):
    """A record of N images, of which W-PGD leaves so many right, and these distances, in 255ths."""
    far = torch.tensor(distance).float() / 255
    right = {m: pack(torch.arange(N) < k) for m, k in (("clean", int((far > 0).sum())), ("w_2", w_2), ("w_inf", w_inf))}
    return altered(
        BASE,
        network={"name": name, "digest": files.digest(name.encode())},
        data={"test": N},
        config={"threat": Threat(delta=delta)},
        correct={"test": right},
        boundary=BASE.boundary.model_copy(update={"distance": {"test": pack_floats(far)}}),
    )


def proof(record, distance, **config):
    """A record of kind "certified" of the images of another, or of the first of them."""
    stored = record.stored()
    fields = {k: stored[k] for k in ("schema", "network", "device", "versions", "core", "created")}
    return make_record({
        **fields,
        "kind": "certified",
        "data": {**stored["data"], "test": len(distance)},
        "config": {"norm": "Linf", "most": 16 / 255, "bisections": 8, "method": "a proof", **config},
        "distance": pack_floats(proofs.rounded_down(torch.tensor(distance).double() / 255)),
        "seconds": {"total": 1.5},
        "command": "python -m companion.proofs demo",
    })  # fmt: skip


EVEN = [0.0] * 20 + [4.0] * 80  # a fifth is wrong; each other image costs 4/255
SLOPE = [0.2 * k for k in range(N)]


def test_of_each_network_the_most_images_count_and_known_ones_come_first():
    few = altered(made(SLOPE), data={"test": N - 1})
    others = [made(SLOPE, name) for name in ("mine", "cnn_a_adv4", "small_pgd")]
    without = made(SLOPE).model_copy(update={"boundary": None})
    assert [r.network.name for r in worst.measured([few, *others, made(SLOPE), without, proof(few, SLOPE[:9])])] == [
        *("demo", "small_pgd", "cnn_a_adv4", "mine")
    ]
    assert worst.measured([few, made(SLOPE)])[0].data.test == N


def test_the_table_has_the_accuracies_of_the_distances():
    (row,) = worst.worst_table([made(EVEN)]).data.splitlines()[2:]
    cells = [cell.strip().split("\u00a0")[0] for cell in row.strip("| ").split("|")]
    # A budget of 100 * 2^2 pays for 25 images at 4^2 each, one of 4^2 for all of them.
    assert cells[:5] == ["demo", "80.00", "50.00", "–", "55.00"] and [float(c) for c in cells[5:]] == [0, 0, 0]
    assert row.count("±") == 6


def test_the_attack_of_2023_is_of_the_same_network_and_the_same_images():
    stronger = recorded("stronger-small_pgd-d*")
    same = altered(made(SLOPE, "x"), network={"digest": stronger.network.digest}, data={"digest": stronger.data.digest})
    for record, there in ((same, True), (made(SLOPE), False), (altered(same, data={"digest": "0"}), False)):
        cells = worst.worst_table([record], [stronger]).data.splitlines()[2].split("|")
        assert (cells[4].strip() != "–") == there
    assert f"{100 * stronger.metrics['w_2_2023']['accuracy']:.2f}" in worst.worst_table([same], [stronger]).data


def test_the_sentence_says_by_how_much_and_that_it_is_no_certificate():
    text = worst.worst_answer([made(EVEN), made(SLOPE, "small_pgd", w_2=30)])
    assert text.startswith("**W-PGD overstates robustness by up to 50 points.** At δ = 8/255")
    assert "50.0 % against 0.0 % on `demo` and 30.0 % against " in text and text.endswith("lower still.")
    assert "certificate" in text and "proved" not in text
    assert worst.worst_answer([]) == "Nothing is recorded here yet."


def test_what_is_proved_stands_beside_what_was_found():
    record = made(EVEN)
    whole, first = proof(record, [0.0] * 20 + [3.0] * 80), proof(record, [0.0] * 20 + [3.0] * 30)
    other = proof(made(EVEN, "small_pgd"), [16.0] * N)
    assert worst.proof_of(record, [first, whole, other]) is whole and worst.proof_of(record, [other]) is None
    assert worst.proof_of(record, [proof(record, [1.0] * N, norm="L2")]) is None
    table = worst.worst_table([record], (), [whole, other]).data
    assert "55.00" in table and "(proved: 35.00)" in table  # 44 images at 3^2 each, and a part of one more
    assert "(proved: 80.00)" not in table.replace("80.00\u00a0±", "") and table.count("(proved: 0.00)") == 3
    of_some = worst.worst_table([record], (), [first]).data
    assert "(of the first 50 images 36.00 found, 14.00 proved)" in of_some  # 12 of 30, and 22 of 30 and a part
    assert "proved" not in worst.worst_answer([record, first])
    assert not [
        line for axis in worst.plot_worst([record], [first]).axes for line in axis.lines if line.get_linestyle() == "--"
    ]
    assert "the truth lies between what is proved and what was found: 35.0 to 55.0 % on `demo`." in (
        worst.worst_answer([record, whole])
    )
    assert "proved by a proof: 100 test images, up to 16/255" in worst.searched([record], [whole])
    assert worst.proof_holds(record, [whole]) and worst.proof_holds(record, []) and worst.proof_holds(record, [first])
    assert not worst.proof_holds(record, [proof(record, [0.0] * 20 + [4.5] * 80)])


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, math.inf])
def test_a_curve_is_drawn_as_it_is_to_the_end_of_the_panel(p):
    for distance in (EVEN, SLOPE, [0.0] * N, [40.0] * N, [math.inf] * N):
        found = boundary_of(made(distance), "test")
        radii, accuracies = worst._steps(found, p)
        assert radii == sorted(radii) and radii[0] == 0 and radii[-1] >= worst.MOST
        assert accuracies == sorted(accuracies, reverse=True)
        for delta in (0.5, 3.0, 7.9, 15.5):
            at = max(i for i, radius in enumerate(radii) if radius <= delta)
            assert accuracies[at] == pytest.approx(100 * found.accuracy(Threat(p=p, delta=delta / 255)))


@pytest.mark.parametrize("networks", [0, 1, 2, 5])
def test_the_figure_has_a_panel_for_each_network(networks):
    those = [made(SLOPE, f"n{k}") for k in range(networks)]
    proofs_of = [proof(r, [d / 2 for d in SLOPE]) for r in those[:1]]
    figure = worst.plot_worst(those, proofs_of)
    shown = [axis for axis in figure.axes if axis.axison and axis.lines]
    assert [axis.get_title() for axis in shown] == [f"n{k}" for k in range(networks)]
    for i, axis in enumerate(shown):
        solid = [line for line in axis.lines if line.get_linestyle() == "-" and line.get_marker() in ("", "None")]
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert len(solid) == 4 and len(dashed) == (0 if i else 2) == len(axis.collections)
        for low in dashed:
            (high,) = [line for line in solid if line.get_color() == low.get_color()]
            assert low.get_ydata()[0] <= high.get_ydata()[0] and low.get_ydata()[200] <= high.get_ydata()[0]
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert ("proved, p = 2 and ∞" in labels) == (networks > 0) and len(labels) == 6 + (networks > 0)


def test_committed_records_say_the_same_of_every_network():
    known = [r for r in read_records(kind="evaluate") if "test" in r.metrics]
    certified = read_records(kind="certified")
    for record in worst.measured(known):
        assert worst.found_is_no_higher(record) and worst.proof_holds(record, certified), record_name(record)
    assert len(worst.measured(known)) >= 5
    headline = worst.overstated(known)
    assert answers.answer("worst_case", known).startswith(headline) and headline in answers.answer("intro", known)


# ---------------------------------------------------------------------------------------------------------------------
# Records of kind "certified"
# ---------------------------------------------------------------------------------------------------------------------


def test_a_proof_comes_back_as_it_was_written():
    record = proof(made(EVEN), SLOPE[:50])
    assert KINDS["certified"] is type(record) and record_name(record).startswith("certified-demo-")
    assert parse_record(record_bytes(record)) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "AAAA"}, "distance"),
        ({"distance": pack_floats(torch.zeros(N - 1))}, "distance is not of 100 images"),
        ({"distance": pack_floats(torch.full((N,), -0.1))}, "negative"),
        ({"distance": pack_floats(torch.full((N,), math.nan))}, "not a number"),
        ({"distance": pack_floats(torch.full((N,), 0.07))}, "above 0.06"),
        ({"distance": pack_floats(torch.full((N,), math.inf))}, "above 0.06"),
        ({"distance": None}, "distance"),
        ({"config": {"norm": "Linf", "most": 0, "bisections": 8, "method": "a"}}, "most"),
        ({"config": {"norm": "L3", "most": 0.1, "bisections": 8, "method": "a"}}, "norm"),
        ({"config": {"norm": "Linf", "most": 0.1, "bisections": 8, "method": "<b>"}}, "method"),
        ({"config": {"norm": "Linf", "most": 0.1, "method": "a"}}, "bisections is missing"),
        ({"seconds": {}}, "seconds.total is missing"),
        ({"metrics": {}}, "metrics is not known"),
    ],
)
def test_a_proof_that_cannot_be_true_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_record({**proof(made(EVEN), [1.0] * N).stored(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary": None}, "one without the other"),
        ({"prediction": {}}, "prediction.x is missing"),
        ({"distances": {"test": pack_floats(torch.zeros(9))}}, "boundary.distance.test is not of 1000 images"),
        ({"distances": {"after": pack_floats(torch.zeros(9))}}, "boundary.distance is not of the test images alone"),
    ],
)
def test_what_an_attacker_spends_is_of_every_image(change, message):
    fields = recorded("spend-demo-*").stored()
    if "distances" in change:
        change = {"boundary": {**fields["boundary"], "distance": change["distances"]}}
    with pytest.raises(ValueError, match=message):
        make_record({**fields, **change})


def test_a_record_of_spending_without_the_third_attacker_stays_valid():
    fields = recorded("spend-demo-*").stored()
    prediction = {k: v for k, v in fields["prediction"].items() if k != "found"}
    old = make_record({k: v for k, v in fields.items() if k != "boundary"} | {"prediction": prediction})
    assert old.boundary is None and record_name(old) == record_name(recorded("spend-demo-*"))


def test_a_proof_is_a_run_like_any_other(monkeypatch, tmp_path):
    """Computed once, read from runs/ after that; and no stored distance is above the one that was proved."""
    asked = []

    def certified_distances(model, x, y, *, most, bisections):
        asked.append((len(x), most, bisections))
        return torch.linspace(0, most, len(x), dtype=torch.float64)

    monkeypatch.setattr(proofs, "certified_distances", certified_distances)
    monkeypatch.setattr(files, "RUNS", tmp_path)
    settings = Settings(test_images=30).resolved()
    (record,) = proofs.certify_each([settings])
    assert asked == [(30, proofs.MOST, proofs.BISECTIONS)] and proofs.certify_each([settings]) == [record]
    assert len(asked) == 1 and record.data.test == 30
    assert record.command == "python -m companion.proofs demo --data embedded --test-images 30"
    exact = torch.linspace(0, proofs.MOST, 30, dtype=torch.float64)
    stored = torch.from_numpy(unpack_floats(record.distance))
    assert (stored <= exact).all() and (exact - stored).max() < 1e-8
    with pytest.raises(ParameterError, match="norm must be Linf"):
        proofs.certify_each([settings.model_copy(update={"norm": "L2"})])


def test_one_name_can_be_of_several_networks_and_threats():
    """RobustBench has the same names for other data and norms, and every fine-tuned network of a base has one name."""
    other = altered(made(SLOPE), network={"digest": "f" * 64})
    near = made(SLOPE, delta=4 / 255)
    assert len(worst.measured([made(SLOPE), other, near, altered(near, data={"test": N - 1})])) == 3
    round_ = altered(made(SLOPE), config={"threat": Threat(r=2, delta=0.5)})
    names = [places for _, places in leaderboard.leaderboards([made(SLOPE), round_])]
    assert len(names) == 2


def test_the_table_says_how_its_networks_were_attacked():
    def head(*records):
        return worst.worst_table(records).data.splitlines()[0]

    five = altered(made(SLOPE, delta=4 / 255, w_2=95), config={"steps": 5})
    assert "| W-PGD, 20 steps, 8/255 |" in head(made(SLOPE)) and "| W-PGD, 5 steps, 4/255 |" in head(five)
    assert "| W-PGD, as in its record |" in head(made(SLOPE), five)
    assert "At δ = 4/255 and 8/255 it leaves" in worst.worst_answer([made(SLOPE), five])


def test_the_worst_case_stands_at_the_radius_that_was_asked_for_and_in_its_norm():
    """Beside W-PGD at another radius it would look kinder than it is."""
    record = altered(made(SLOPE, delta=84.99 / 255), config={"threat": Threat(r=2, delta=84.99 / 255)})
    head, _, row = worst.worst_table([record]).data.splitlines()
    for part in ("W₂, 21.25/255, l_2", "W₂, 42.49/255, l_2", "W₂, 84.99/255, l_2", "W∞, 84.99/255, l_2"):
        assert f"| worst case found, {part} |" in head
    left = boundary_of(record, "test").accuracy(record.config.threat)
    assert row.split(" | ")[-2].startswith(f"{100 * left:.2f}")
    mixed = worst.worst_table([made(SLOPE), record]).data.splitlines()[0]
    assert "| worst case found, W₂, 8/255, in its own norm |" in mixed
    assert "| worst case found, W₂, 8/255 |" in worst.worst_table([made(SLOPE)]).data


def test_without_distances_the_table_says_where_they_come_from():
    bare = made(SLOPE).model_copy(update={"boundary": None})
    assert "no distances: they come with found_steps above 0" in worst.worst_table([bare]).data


def test_where_nothing_was_searched_for_nothing_is_compared():
    assert worst.found_is_no_higher(made(SLOPE).model_copy(update={"boundary": None}))


def test_a_search_that_found_too_little_is_no_proof_of_anything():
    far = made([100.0] * 100, name="far")
    text = worst.worst_answer([far])
    assert text == "The search was too short to say so of `far`: it found no more than W-PGD."
    both = worst.worst_answer([made(SLOPE), far])
    assert "it leaves more images right" in both and "% on `far`" not in both and "too short to say so of `far`" in both


def test_of_one_network_the_longest_search_counts_and_others_are_no_competition():
    def searched(record, steps):
        return record.model_copy(update={"boundary": record.boundary.model_copy(update={"steps": steps})})

    short, long = searched(made([9.0] * 100), 1), searched(made(SLOPE), 100)
    assert worst.measured([short, long]) == worst.measured([long, short]) == [long]
    rival = searched(made(EVEN, name="rival"), 100)
    other = searched(made([9.0] * 100, name="other"), 1)
    boards = [[place.name for place in places] for _, places in leaderboard.leaderboards([long, rival, other])]
    assert sorted(map(len, boards)) == [1, 2] and ["other"] in boards


def test_two_networks_of_two_radii_are_attacked_by_2023_s_attack_as_in_their_records():
    head = worst.worst_table([made(SLOPE), made(EVEN, name="near", delta=4 / 255)]).data.splitlines()[0]
    assert "| W-PGD of 2023, as in its record |" in head
