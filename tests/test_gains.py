"""What the gain of Algorithm 1 goes with: each branch of the rule on made-up records, and what the page makes of it."""

import itertools

import pytest
import torch
from altered import altered, recorded

from companion import claim_texts, effects, gains, gains_plot
from companion.claims import CLAIMS, RADII, verdict
from companion.gains import UNKNOWN, YARDSTICKS, gain_answer, gains_table, pairs, pairs_table, tuned
from companion.networks import shape_of
from companion.records import read_records
from companion.settings import FINETUNED, PAPER_NETWORKS
from companion.values import pack, pack_floats
from companion.words import NOTHING
from wdat_core import Threat

N = 10_000  # test images, as the whole protocol has: a point is a hundred of them
BASE = recorded("finetune-small_trades-whole-tau0.01-eta1-seed0-3e8ba1d1*")  # has distances
TRADES, PGD = recorded("pretrain-small_trades-*"), recorded("pretrain-small_pgd-*")
MADE = [TRADES, PGD]
DIGESTS = {record.network.name: record.network.digest for record in MADE}
W_2, A_2 = YARDSTICKS
SMALL, LARGE = (shape_of(name)[1] for name in ("small_trades", "cnn_a_adv4"))


def right(gain):
    return torch.arange(N) < N // 2 + round(gain * N / 100)


def far(gain):
    """Distances of which so many images are never bought, the others for nothing."""
    return pack_floats(torch.where(right(gain), 1000.0, 0.0))


def tune(gain, name, found=None, *, config=(), **parts):
    """A record of the whole protocol: by how many points both accuracies change, and A_2 (None: no distances)."""
    boundary = None
    if found is not None:
        boundary = BASE.boundary.model_copy(update={"distance": {"before": far(0), "after": far(found)}})
    bits = {when: dict.fromkeys(("w_2", "w_inf"), pack(right(by))) for when, by in (("before", 0), ("after", gain))}
    network = {"name": name, "digest": DIGESTS.get(name, name)}
    base = BASE.model_copy(update={"boundary": boundary})
    return altered(base, network=network, config={"seed": 0, **dict(config)}, correct=bits, **parts)


def said(*records):
    return gain_answer([*MADE, *records]).replace("\u00a0", " ")


def found(metric, *records):
    """The verdict: what it goes with, which kind is above, which size."""
    return gains.verdict(pairs([n for n in tuned([*MADE, *records]) if n.full], metric))


# ---------------------------------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------------------------------

TRADES_UP, PGD_UP, LARGER, SMALLER = (
    "TRADES above PGD", "PGD above TRADES", "the larger above the smaller", "the smaller above the larger"
)  # fmt: skip


@pytest.mark.parametrize(
    ("trades", "pgd", "large", "expected"),
    [
        (4, -1, 1, ("kind", TRADES_UP, "")),  # the large network was pre-trained with PGD
        (-1, 4, 5, ("both", PGD_UP, LARGER)),
        (-1, 4, 2, ("kind", PGD_UP, "")),
        (2, -1, 4, ("both", TRADES_UP, LARGER)),
        (4, 2, -1, ("both", TRADES_UP, SMALLER)),
        (2, -1, 2, ("pair", TRADES_UP, "")),
        (2, 2, 4, ("size", "", LARGER)),
        (2, 2, -1, ("size", "", SMALLER)),
        (2, 2, 2, ("neither", "", "")),
        (2, 2, None, ("neither", "", "")),
        (4, -1, None, ("kind", TRADES_UP, "")),
        (4, None, 1, ("open", "", SMALLER)),
        (None, 4, 1, ("open", "", SMALLER)),
        (None, None, 1, ("open", "", "")),
    ],
)
@pytest.mark.parametrize("metric", YARDSTICKS)
def test_every_branch_of_the_rule(metric, trades, pgd, large, expected):
    given = {"small_trades": trades, "small_pgd": pgd, "cnn_a_adv4": large}
    records = [tune(gain, name, found=gain) for name, gain in given.items() if gain is not None]
    for order in itertools.permutations(records):
        assert found(metric, *order) == expected
    key, who, size = expected
    words = gains.WORDS[key].format(who=who, large=size)
    assert f", and no more: by {YARDSTICKS[W_2]} the gain {words}. By {YARDSTICKS[A_2]} it {words}.**" in said(*records)


def test_the_two_yardsticks_are_judged_apart():
    records = [tune(4, "small_trades", 1), tune(-1, "small_pgd", 1), tune(1, "cnn_a_adv4", 3)]
    assert found(W_2, *records)[0] == "kind" and found(A_2, *records)[0] == "size"
    text = said(*records)
    assert "the gain goes with the kind" in text and "it goes with size or the architecture" in text
    assert "+4.00 ± 0.38 and +1.00 ± 0.20 on `small_trades` (TRADES, " in text
    assert f"`cnn_a_adv4` (PGD, {LARGE:,} parameters)" in text


def test_without_distances_the_paper_s_yardstick_judges_alone():
    text = said(tune(4, "small_trades"), tune(-1, "small_pgd"))
    assert text.startswith("**On 2 networks of 1 size, and no more: by ") and "in every pair.**" in text
    assert "A₂" not in text


def test_one_seed_on_the_other_side_makes_a_difference_invisible():
    records = [tune(4, "small_trades"), tune(-1, "small_pgd")]
    assert found(W_2, *records)[0] == "kind"
    other = [tune(-2, "small_trades", config={"seed": 1}), tune(-1, "small_pgd", config={"seed": 1})]
    assert found(W_2, *records, *other)[0] == "neither"
    assert found(W_2, *records, other[0])[0] == "kind"  # of seed 1 there is nothing to compare with


def test_networks_are_compared_image_by_image_over_the_means_of_their_seeds():
    records = [tune(4, "small_trades"), tune(5, "small_trades", config={"seed": 1}), tune(1, "small_pgd")]
    (pair,) = pairs(tuned([*MADE, *records]), W_2)
    assert pair.clean and pair.first.name == "`small_trades`" and pair.more.value == pytest.approx(3.5)
    same = [tune(4, "small_trades"), tune(4, "small_pgd")]  # both gain the same images
    more = pairs(tuned([*MADE, *same]), W_2)[0].more
    assert (more.value, more.half) == (0, 0.03)  # of 10,000 images


def test_other_test_images_make_no_pair():
    records = [tune(4, "small_trades"), tune(-1, "small_pgd", data={"digest": "other images"})]
    assert pairs(tuned([*MADE, *records]), W_2) == [] and found(W_2, *records)[0] == "open"


# ---------------------------------------------------------------------------------------------------------------------
# Which networks, and how they were made
# ---------------------------------------------------------------------------------------------------------------------


def test_how_a_network_was_pre_trained_comes_from_its_record_or_its_publisher():
    names = ["small_trades", "small_pgd", "cnn_a_adv4", "cnn_a_mix4", *list(PAPER_NETWORKS)[:2]]
    kinds = {n.study[0].network.name: n.kind for n in tuned([*MADE, *(tune(1, name) for name in names)])}
    assert kinds == dict(
        zip(names, ["TRADES", "PGD", "PGD", "PGD and interval bounds", "TRADES", UNKNOWN], strict=True)
    )
    assert [n.kind for n in tuned([tune(1, "small_trades")])] == [UNKNOWN]  # no record says how


def test_a_third_kind_counts_for_size_only():
    records = [tune(4, "small_trades"), tune(-1, "small_pgd"), tune(9, "cnn_a_mix4")]
    assert found(W_2, *records) == ("both", TRADES_UP, LARGER)
    assert found(W_2, tune(4, "cnn_a_adv4"), tune(-1, "cnn_a_mix4"))[0] == "open"


def test_sizes_are_those_of_the_architectures_and_draw_nothing_at_random():
    state = torch.get_rng_state()
    assert shape_of("small_trades") == shape_of("small_pgd") == ("PatchResNet(32, 64)", SMALL)
    assert shape_of("cnn_a_adv4") == ("cnn_a", 214_918) and shape_of("mine") is None
    assert shape_of("Zhang2019Theoretically")[1] > 40_000_000
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shorter_protocol_is_named_and_not_counted():
    short = tune(-9, "demo", data={"train": 1000}, config={"epochs": 3})
    assert NOTHING in said(short)
    records = [tune(4, "small_trades"), tune(-1, "small_pgd")]
    text = said(*records, short)
    rest = text.removeprefix(said(*records))
    assert rest.startswith(" Not counted, since the whole protocol is not recorded: -9.00 ± ")
    assert rest.endswith("parameters; 1,000 images, 3 epochs).")
    longer = tune(-8, "demo", data={"train": 2000}, config={"epochs": 3})
    assert "-8.00" in said(*records, short, longer) and "-9.00" not in said(*records, short, longer)


@pytest.mark.parametrize(
    "parts",
    [
        {"config": {"tau": 0.1}},
        {"config": {"eta": 0.1}},
        {"config": {"perturb": "last_layer"}},
        {"config": {"beta": 1.0}},
        {"config": {"noise": 0.05}},
        {"config": {"threat": Threat(delta=4 / 255)}},
    ],
)
def test_other_settings_and_other_methods_are_not_compared(parts):
    assert tuned([tune(1, "small_trades", **parts)]) == []
    assert tuned([tune(1, "mine"), tune(1, "small_trades" + FINETUNED)]) == []


def test_the_text_says_what_else_the_recipes_of_a_clean_pair_differ_in():
    records = [tune(4, "small_trades"), tune(-1, "small_pgd")]
    assert "`small_trades` and `small_pgd` have the same architecture, and the first gains +5.00" in said(*records)
    assert ", so size is not the reason there. But their pre-training differs in `average` (0.998 and 0) too." in said(
        *records
    )
    same = altered(PGD, config={"average": 0.998})
    assert "differs" not in gain_answer([TRADES, same, *records])
    assert "not the reason" not in said(tune(4, "small_trades"), tune(4, "small_pgd"))


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_without_records_everything_says_so():
    assert NOTHING in gain_answer([]) and "nothing" in gains_table([]).data and "nothing" in pairs_table([]).data
    assert [text.get_text() for text in gains_plot.plot_gains([]).texts] == [NOTHING]
    assert claim_texts.everywhere([]) == ""


def test_tables_have_a_row_a_network_and_a_row_a_pair():
    records = [*MADE, tune(4, "small_trades", 1), tune(-1, "small_pgd", 1), tune(1, "cnn_a_adv4")]
    table, paired = gains_table(records).data.splitlines()[2:], pairs_table(records).data.splitlines()[2:]
    assert [row.split(" | ")[0] for row in table] == ["| `small_trades`", "| `small_pgd`", "| `cnn_a_adv4`"]
    assert table[2].endswith(", seed 0 | – |") and f"| {SMALL:,} | 40,000 images, 20 epochs |" in table[0]
    assert len(paired) == 3 and all(row.count("|") == 5 for row in paired)
    assert "| `small_trades` − `small_pgd` | pre-training | +5.00" in paired[0] and ", not visible |" in paired[0]
    assert paired[1].startswith("| `small_trades` − `cnn_a_adv4` | pre-training and architecture |")
    assert paired[1].endswith("| – |")


def test_the_figure_has_a_mark_a_network_with_its_other_settings_behind_it():
    other = tune(2, "small_trades", config={"tau": 0.1})
    short = tune(0, "demo", data={"train": 1000}, config={"epochs": 3})
    records = [*MADE, tune(4, "small_trades", 1), tune(-1, "small_pgd", 1), tune(1, "cnn_a_adv4"), other, short]
    figure = gains_plot.plot_gains(records)
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["small_trades", "small_pgd", "cnn_a_adv4", "demo"]
    assert [text.get_text() for text in right.texts] == ["small_trades", "small_pgd"]
    places = {text.get_text(): text.xy for text in left.texts}
    assert places["cnn_a_adv4"] == pytest.approx((LARGE, 1)) and places["small_trades"][1] == pytest.approx(4)
    assert places["small_trades"][0] < SMALL < places["small_pgd"][0]  # beside each other, not on top
    small = [line for line in left.lines if line.get_markersize() == 3.5]
    assert [line.get_ydata()[0] for line in small] == pytest.approx([2])
    hollow = [line for line in left.lines if line.get_fillstyle() == "none"]
    assert len(hollow) == 1 and hollow[0].get_ydata()[0] == pytest.approx(0)


def test_the_committed_records_have_an_answer_with_every_network_s_numbers():
    records = [*read_records(kind="finetune"), *read_records(kind="pretrain")]
    text, networks = gain_answer(records), tuned(records)
    assert text.startswith("**On ") and "None" not in text and "nan" not in text and "  " not in text
    assert {"small_trades", "small_pgd", "cnn_a_adv4"} <= {n.study[0].network.name for n in networks if n.full}
    for n in networks:
        assert n.kind != UNKNOWN and f" on {n.name} ({n.kind}, {n.size:,} parameters" in text
        for metric in YARDSTICKS:
            assert n.gain(metric) is None or n.gain(metric).text(signed=True) in text
    (effect,) = [
        e for e in CLAIMS[0].effects(records) if e.full and e.records[0].network.name == "small_trades"
    ]  # the best setting by validation images is the one that is compared here
    (same,) = (n for n in networks if n.full and n.study[0].network.name == "small_trades")
    assert same.gain(W_2).value == pytest.approx(effect.value)


def test_claims_that_hold_on_every_network_are_those_whose_verdict_says_so():
    records = [record for kind in effects.KINDS for record in read_records(kind=kind)]
    text = claim_texts.everywhere(records)
    paper, worst = text.split(" By the worst case found, which can judge ")
    for number, claim in enumerate(CLAIMS, 1):
        assert (f"claim {number} (" in paper) == (verdict(claim.effects(records), claim) == "holds")
    judged = {
        number: [effect for delta in RADII for effect in claim.found(records, delta) if effect.full]
        for number, claim in enumerate(CLAIMS, 1)
        if claim.found
    }
    judged = {number: found for number, found in judged.items() if found}
    assert worst.startswith(f"{len(judged)} of them")
    for number, found_there in judged.items():
        assert (f"claim {number} " in worst) == (verdict(found_there, CLAIMS[number - 1]) == "holds")


def test_one_claim_holds_and_several_hold():
    up = [tune(3, name, found=3) for name in ("small_trades", "small_pgd")]
    text = claim_texts.everywhere(up)
    assert text.startswith("Of 5 claims that are measured, claim 1 (2 networks), claim 2 (2 networks), claim 3 (")
    assert "claim 8 hold on every network at δ = 2, 4 and 8/255 alike." in text
    down = claim_texts.everywhere([tune(-3, "cnn_a_adv4", found=-3)])
    assert "none holds on every network measured. By the worst case found" in down


def test_without_a_seed_in_common_every_seed_counts_all_the_same():
    """One seed gains 20 points and one loses 4: nothing is the same in every pair of seeds."""
    apart = [tune(20, "small_trades", config={"seed": 0}), tune(-4, "small_trades", config={"seed": 1})]
    assert found(W_2, *apart, tune(0, "small_pgd", config={"seed": 2})) == found(
        W_2, *apart, *(tune(0, "small_pgd", config={"seed": s}) for s in (0, 1))
    )
    alike = [tune(20, "small_trades", config={"seed": 0}), tune(14, "small_trades", config={"seed": 1})]
    assert found(W_2, *alike, tune(0, "small_pgd", config={"seed": 2})) != found(
        W_2, *apart, tune(0, "small_pgd", config={"seed": 2})
    )
