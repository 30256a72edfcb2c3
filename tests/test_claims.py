"""The rules of the claims on made-up records whose images are known, and what the page of the claims may say."""

import ast
import csv
import dataclasses
import json
import math
import re

import pytest
import torch
from altered import altered, recorded

import wdat_core
from companion import claim_texts, effects, evidence, files
from companion.claims import CLAIMS, RADII, outcome, used, verdict
from companion.effects import Effect, stated
from companion.evidence import by_setting, studies
from companion.intervals import boundary_of, median_interval
from companion.records import make_record, read_records
from companion.settings import PAPER_NETWORKS, STAND_INS
from companion.values import pack, pack_floats
from companion.words import OUTCOMES, VERDICTS

N = 400  # test images; half are right under attack before fine-tuning
BY_KEY = {claim.key: claim for claim in CLAIMS}
UP, DOWN, NOISE = (40, 0), (0, 40), (6, 5)  # images won and lost


def bits(won=0, lost=0):
    """Half of the images right, then `won` more and `lost` fewer."""
    return pack(torch.arange(N) < N // 2) if not (won or lost) else pack(_moved(won, lost))


def _moved(won, lost):
    right = torch.arange(N) < N // 2
    right[:lost], right[N - won :] = False, True
    return right


FINETUNED, EVALUATED = recorded("finetune-demo-whole-tau0.01-eta1-seed0-*"), recorded("evaluate-demo-*")
ESTIMATED = recorded("sensitivity-demo-*")


def finetuned(w_2=(0, 0), w_inf=(0, 0), *, val=0.5, network="demo", curve=(), epochs=3, **config):
    epochs = len(curve) - 1 if curve else epochs
    kept = epochs - 1  # a middle epoch, so that the last is not taken for it
    rows = [{"epoch": e, "w_2": val if e == kept else 0.0} for e in range(1, epochs + 1)]
    curves = [{"train_upsilon": upsilon} for upsilon in curve]
    rows = [{**row, **more} for row, more in zip(rows, curves[1:] or [{}] * epochs, strict=True)]
    return altered(
        FINETUNED,
        network={"name": network, "digest": network},
        data={"digest": "images", "train": 1000, "val": 100, "test": N},
        config={"threat": wdat_core.Threat(), "epochs": epochs, **config},
        correct={"before": {"w_2": bits(), "w_inf": bits()}, "after": {"w_2": bits(*w_2), "w_inf": bits(*w_inf)}},
        history={"best": kept, "epochs": rows, "start": curves[0] if curve else None},
    )


def evaluated(w_inf=(0, 0), budget=(0, 0), w_2=(0, 0), *, network="demo", part="test", **config):
    return altered(
        EVALUATED.model_copy(update={"correct": {}, "metrics": {}}),
        network={"name": network, "digest": network},
        data={"digest": part, "train": None, "test": None, part: N},
        config={"steps": 20, "batch_size": 512, **config},
        correct={part: {"w_inf": bits(*w_inf), "budget": bits(*budget), "w_2": bits(*w_2)}},
        metrics={part: {"w_2": 0.5 + (w_2[0] - w_2[1]) / N}},
    )


def estimated(errors, *, network="demo", seed=0):
    """A record of Figure 7.1 whose estimates are off by that many per cent."""
    return altered(
        ESTIMATED,
        network={"name": network, "digest": network},
        data={"digest": "train", "train": 1000},
        config={"seed": seed},
        reference=50.0,
        estimates=[50.0 * (1 + error / 100) for error in errors],
    )


def found(key, *records):
    """The verdict, and the outcome of each effect."""
    claim = BY_KEY[key]
    effects = claim.effects(records)
    return verdict(effects, claim), [outcome(effect, claim) for effect in effects]


# ---------------------------------------------------------------------------------------------------------------------
# From effects to verdicts
# ---------------------------------------------------------------------------------------------------------------------

EPS = 1e-9


@pytest.mark.parametrize(
    ("side", "line", "low", "high", "expected"),
    [
        ("above", 0, EPS, 1, "holds"),
        ("above", 0, 0, 1, "not visible"),
        ("above", 0, -1, 0, "not visible"),
        ("above", 0, -1, -EPS, "contradicted"),
        ("above", 10, 9, 11, "not visible"),
        ("above", 10, 10 + EPS, 11, "holds"),
        ("below", 10, 1, 10, "not visible"),
        ("below", 10, 1, 10 - EPS, "holds"),
        ("below", 10, 10 + EPS, 11, "contradicted"),
        ("not above", 0, EPS, 1, "contradicted"),
        ("not above", 0, 0, 1, "holds"),
        ("not above", 0, -2, -1, "holds"),
        ("not below", 0, -1, -EPS, "contradicted"),
        ("not below", 0, -1, 0, "holds"),
        ("not below", 0, 1, 2, "holds"),
        ("above", 0, None, None, "not visible"),
        ("not above", 0, None, None, "not visible"),
    ],
)
def test_outcome_is_where_the_whole_interval_lies(side, line, low, high, expected):
    claim = dataclasses.replace(CLAIMS[0], side=side, line=line)
    assert outcome(Effect("", "", 0, low, high, (), ()), claim) == expected


@pytest.mark.parametrize(("seeds", "expected"), [((1, 3), "holds"), ((0, 3), "not visible"), ((-1, 5), "not visible")])
def test_every_seed_has_to_lie_there_too(seeds, expected):
    assert outcome(Effect("", "", 2, 1, 3, seeds, ()), BY_KEY["whole-w2"]) == expected


def test_a_seed_that_disagrees_makes_a_visible_mean_invisible():
    good, bad = finetuned(UP, seed=0), finetuned((0, 1), seed=1)
    (effect,) = BY_KEY["whole-w2"].effects([good, bad])
    assert effect.low > 0 and effect.seeds == pytest.approx((10, -0.25))
    assert found("whole-w2", good, bad) == ("not visible", ["not visible"])
    assert found("whole-w2", good, finetuned(UP, seed=1)) == ("holds", ["holds"])


def test_verdicts_over_studies():
    up, noise, down = finetuned(UP, epochs=5), finetuned(NOISE, epochs=4), finetuned(DOWN, epochs=3)
    assert found("whole-w2") == ("not yet measured", [])
    assert found("whole-w2", finetuned(UP, perturb="last_layer")) == ("not yet measured", [])
    assert found("whole-w2", up) == ("holds", ["holds"])
    assert found("whole-w2", up, noise) == ("holds in part", ["holds", "not visible"])
    assert found("whole-w2", noise, down) == ("contradicted", ["not visible", "contradicted"])


def test_a_verdict_counts_the_whole_protocol_where_there_is_one():
    whole = altered(finetuned(epochs=20), data={"source": "CIFAR-10", "train": 40_000, "val": 10_000, "test": 10_000})
    short = altered(whole, config={"epochs": 5})
    claim = BY_KEY["whole-w2"]
    holds, hidden = ((1.0, 0.5, 1.5), (0.1, -0.5, 0.7))

    def effect(numbers, *records):
        return Effect("study", "comparison", *numbers, (), records)

    small, large = effect(holds, short), effect(hidden, whole)
    assert verdict([small], claim) == "holds" and verdict([small, large], claim) == "not visible"
    assert verdict([effect(hidden, short), effect(holds, whole), effect(hidden, short)], claim) == "holds"
    assert not effect(holds, whole, short).full  # one smaller record makes it a smaller run


def test_interval_of_an_effect_is_that_of_its_paired_images():
    """10 of 400 images won, 4 lost: the mean of the differences, and 1.96 of its standard errors."""
    (effect,) = BY_KEY["whole-w2"].effects([finetuned((10, 4))])
    half = 1.96 * math.sqrt((14 - 36 / N) / (N - 1) / N) * 100
    assert (effect.value, effect.low, effect.high) == pytest.approx((1.5, 1.5 - half, 1.5 + half))


@pytest.mark.parametrize("n", range(1, 60))
def test_interval_of_a_median_is_the_narrowest_of_95_per_cent(n):
    def outside(k):  # the probability that fewer than k of n values lie below the median, or fewer than k above
        return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    median, low, high = median_interval([*range(n, 0, -1)])
    assert median == (n + 1) / 2
    if low is None:
        assert high is None and outside(1) > 0.05
    else:
        assert high == n + 1 - low and outside(low) <= 0.05 < outside(low + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Which records a claim is about
# ---------------------------------------------------------------------------------------------------------------------


def test_stated_values_are_those_of_the_method():
    usual = vars(wdat_core.FinetuneConfig())
    assert {name: value for name, value in evidence.STATED.items() if name != "fraction"} == {
        name: usual[name] for name in evidence.STATED if name != "fraction"
    }
    assert evidence.STATED["fraction"] == evidence.STATED["sample"]


@pytest.mark.parametrize(
    "other", [{"beta": 1.0}, {"steps": 10}, {"upsilon_from": "batch"}, {"threat": wdat_core.Threat(delta=4 / 255)}]
)
def test_another_method_counts_for_no_claim(other):
    record = finetuned(UP, **other)
    assert stated([record], "finetune") == [] and used([record]) == []


def test_a_study_differs_in_perturb_tau_eta_and_seed_alone():
    whole, last = finetuned(tau=0.1, seed=1), finetuned(eta=0.1, perturb="last_layer")
    older = finetuned(tau=0.1, seed=2)
    (study,) = studies([whole, last, older])
    assert by_setting(study) == {("whole", 0.1, 1.0): [whole, older], ("last_layer", 0.01, 0.1): [last]}
    others = [finetuned(network="other"), finetuned(epochs=7), finetuned(consistency="kl")]
    assert len(studies([whole, *others])) == 4
    labels = [effect.study for effect in BY_KEY["whole-w2"].effects([whole, *others])]
    assert labels == [  # more training first, then the stand-ins
        "`demo`, 1,000 images, 7 epochs",
        "`demo`, 1,000 images, 3 epochs",
        "`demo`, 1,000 images, 3 epochs, `consistency=kl`",
        "`other`, 1,000 images, 3 epochs",
    ]


def test_columns_are_chosen_on_validation_images_only():
    """The column that is best on test images is worse on validation images, though not for every seed."""
    chosen = [finetuned(NOISE, tau=0.1, seed=s, val=v) for s, v in ((0, 0.50), (1, 0.60))]
    better_on_test = [finetuned(UP, tau=0.01, seed=s, val=v) for s, v in ((0, 0.65), (1, 0.40))]
    assert found("whole-w2", *chosen, *better_on_test) == ("not visible", ["not visible"])
    (effect,) = BY_KEY["whole-w2"].effects(better_on_test + chosen)
    assert effect.comparison == "whole network, τ = 0.1, η = 1 (best of 2)"
    assert found("whole-worth", *chosen, *better_on_test)[0] == found("every-network", *chosen, *better_on_test)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Each rule
# ---------------------------------------------------------------------------------------------------------------------


def test_whole_network_is_worth_it_where_the_sum_of_both_changes_is_positive():
    assert found("whole-worth", finetuned(w_2=(60, 0), w_inf=(0, 20))) == ("holds", ["holds"])
    assert found("whole-worth", finetuned(w_2=(20, 0), w_inf=(0, 20))) == ("not visible", ["not visible"])
    assert found("whole-worth", finetuned(w_2=(20, 0), w_inf=(0, 60))) == ("contradicted", ["contradicted"])


@pytest.mark.parametrize("key", ["whole-winf", "last-layer"])
def test_claims_about_networks_trained_on_cifar10_only(key):
    how = {"perturb": "last_layer"} if key == "last-layer" else {}
    for name in STAND_INS | PAPER_NETWORKS:
        measured = found(key, finetuned(UP, UP, network=name, **how))[0] != "not yet measured"
        assert measured == (name in (*STAND_INS, "Zhang2019Theoretically", "Chen2024Data_WRN_34_10"))


def test_whole_network_raises_w_inf_too():
    assert found("whole-winf", finetuned(w_2=DOWN, w_inf=UP)) == ("holds", ["holds"])
    assert found("whole-winf", finetuned(w_2=UP, w_inf=DOWN)) == ("contradicted", ["contradicted"])


def test_last_layer_does_not_raise_w_2_unless_it_visibly_does():
    for change, expected in ((UP, ("contradicted", ["contradicted"])), (NOISE, ("holds", ["holds"])), (DOWN, None)):
        assert found("last-layer", finetuned(change, perturb="last_layer")) == (expected or ("holds", ["holds"]))


def test_every_network_is_judged_in_its_best_setting_of_both_kinds():
    whole, last = finetuned(DOWN, val=0.3), finetuned(UP, perturb="last_layer", val=0.4)
    assert found("every-network", whole, last) == ("holds", ["holds"])
    other = finetuned(NOISE, network="other")
    assert found("every-network", whole, last, other) == ("holds in part", ["holds", "not visible"])


def test_eta_is_compared_at_the_same_tau_and_perturbation_over_common_seeds():
    high, low = finetuned(UP, eta=1.0), finetuned(NOISE, eta=0.1)
    assert found("eta", high) == ("not yet measured", [])
    assert found("eta", high, finetuned(eta=0.1, tau=0.1)) == ("not yet measured", [])
    assert found("eta", high, finetuned(eta=0.1, seed=1)) == ("not yet measured", [])
    assert found("eta", high, low) == ("holds", ["holds"])
    last = [finetuned(change, eta=eta, perturb="last_layer") for change, eta in ((DOWN, 1.0), (UP, 0.1))]
    assert found("eta", high, low, *last) == ("holds in part", ["holds", "contradicted"])
    (effect,) = BY_KEY["eta"].effects([high, low, finetuned(DOWN, eta=1.0, seed=1)])
    assert effect.seeds == pytest.approx((10 - 0.25,)) and len(effect.records) == 2


def test_tau_is_preferred_small_for_the_whole_network_and_large_for_the_last_layer():
    for key, perturb, better, worse in (("tau-whole", "whole", 0.01, 0.1), ("tau-last", "last_layer", 0.1, 0.01)):
        records = [finetuned(UP, perturb=perturb, tau=better), finetuned(DOWN, perturb=perturb, tau=worse)]
        assert found(key, *records) == ("holds", ["holds"])
        swapped = [finetuned(DOWN, perturb=perturb, tau=better), finetuned(UP, perturb=perturb, tau=worse)]
        assert found(key, *swapped) == ("contradicted", ["contradicted"])
        other = next(k for k in ("tau-whole", "tau-last") if k != key)
        assert found(other, *records) == ("not yet measured", [])


def test_budget_lies_between_the_pointwise_and_the_distributional_attack():
    between = evaluated(w_inf=UP, budget=(0, 0), w_2=DOWN)
    assert found("budget-strong", between) == found("budget-slight", between) == ("holds", ["holds"])
    equal = evaluated()
    assert found("budget-strong", equal) == ("not visible", ["not visible"])
    assert found("budget-slight", equal) == ("holds", ["holds"])
    too_strong = evaluated(w_inf=UP, budget=DOWN, w_2=(0, 0), part="train")
    assert found("budget-slight", between, too_strong) == ("holds in part", ["holds", "contradicted"])
    assert found("budget-strong", evaluated(w_inf=UP, steps=10)) == ("not yet measured", [])


def test_estimates_are_close_where_the_median_error_lies_below_ten_per_cent():
    assert found("upsilon-close", estimated([5, -6] * 5)) == ("holds", ["holds"])
    assert found("upsilon-close", estimated([20, -30] * 5)) == ("contradicted", ["contradicted"])
    assert found("upsilon-close", estimated([5] * 8 + [20, 20])) == ("not visible", ["not visible"])
    assert found("upsilon-close", estimated([5] * 4)) == ("not visible", ["not visible"])
    (effect,) = BY_KEY["upsilon-close"].effects([estimated([1] * 10), estimated([2] * 10, seed=1)])
    assert effect.seeds == pytest.approx((1, 2)) and effect.value == pytest.approx(1.5)
    assert found("upsilon-close", altered(estimated([5] * 10), reference=0.0)) == ("not yet measured", [])


def test_estimates_are_ranked_by_visible_robustness():
    weak, strong = evaluated(network="weak"), evaluated(w_2=UP, network="strong")
    far, near = estimated([20, -20] * 5, network="weak"), estimated([4, -4] * 5, network="strong")
    assert found("upsilon-robust", far, weak) == found("upsilon-robust", far, near, weak) == ("not yet measured", [])
    for records in ([far, near, weak, strong], [strong, near, weak, far]):
        assert found("upsilon-robust", *records) == ("holds", ["holds"])
    swapped = [estimated([4] * 10, network="weak"), estimated([20] * 10, network="strong")]
    assert found("upsilon-robust", *swapped, weak, strong) == ("contradicted", ["contradicted"])
    assert found("upsilon-robust", far, near, weak, evaluated(w_2=NOISE, network="strong")) == ("not yet measured", [])
    few = [evaluated(network="weak"), evaluated(w_2=DOWN, network="strong")]  # which would say the opposite
    few = [altered(r, data={"digest": "few", "test": 100}) for r in few]
    assert found("upsilon-robust", *few, far, near, weak, strong) == ("holds", ["holds"])
    third = [estimated([30] * 10, network="third"), evaluated(w_2=(80, 0), network="third")]
    assert found("upsilon-robust", far, near, weak, strong, *third)[0] == "holds in part"


def test_upsilon_is_volatile_where_its_median_change_lies_above_ten_per_cent():
    wild, tame = [1.0, 1.5] * 10, [1.0, 1.01] * 10
    assert found("upsilon-volatile", finetuned(curve=wild)) == ("holds", ["holds"])
    assert found("upsilon-volatile", finetuned(curve=tame)) == ("contradicted", ["contradicted"])
    assert found("upsilon-volatile", finetuned(curve=wild, eta=0.1)) == ("not yet measured", [])
    assert found("upsilon-volatile", finetuned()) == ("not yet measured", [])
    both = [finetuned(curve=wild), finetuned(curve=tame, seed=1)]
    assert found("upsilon-volatile", *both) == ("not visible", ["not visible"])
    assert found("upsilon-volatile", finetuned(curve=[0.0, *wild])) == ("holds", ["holds"])


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own numbers
# ---------------------------------------------------------------------------------------------------------------------

PAPER = list(csv.DictReader((files.ASSETS / "paper.csv").open(encoding="utf-8", newline="")))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_claim_has_a_rule_a_place_and_a_command(claim):
    assert claim.text.endswith(".") and "The claim holds " in claim_texts.rule(claim)
    printed = {int(row["table"]) for row in PAPER}
    figures = re.findall(r"Figure (\d\.\d)", claim.place)
    tables = re.findall(r"\d+", re.sub(r"Section \d|Figure \d\.\d", "", claim.place))
    assert {int(t) for t in tables} <= printed and set(figures) <= {"7.1", "7.2", "7.3", "7.4"} and tables + figures
    assert bool(claim.paper()) != ("no number" in claim.note or claim.key == "upsilon-robust")
    for command in claim.commands:
        assert re.fullmatch(r"papermill notebooks/(table\d+|figure7_\d)\.ipynb out\.ipynb( -p preset paper)?", command)


def test_keys_are_distinct():
    assert len(BY_KEY) == len(CLAIMS)


def test_numbers_of_the_paper_are_those_it_prints():
    changes = {what.split(",")[0]: value for what, value in BY_KEY["every-network"].paper()}
    printed = {r["network"]: float(r["value"]) for r in PAPER if (r["table"], r["metric"]) == ("5", "w_2_change")}
    assert changes == pytest.approx({PAPER_NETWORKS[n]["paper"]: v for n, v in printed.items()}, abs=0.011)
    assert dict(BY_KEY["whole-w2"].paper())["Zhang et al. (2019), whole network, τ = 0.01, η = 1"] == pytest.approx(
        7.54
    )
    assert [round(value, 2) for _, value in BY_KEY["whole-winf"].paper()] == [2.94, 1.98]
    assert [round(value, 2) for _, value in BY_KEY["last-layer"].paper()] == [-1.23]
    assert [len(BY_KEY[key].paper()) for key in ("eta", "tau-whole", "tau-last")] == [16, 8, 8]
    assert dict(BY_KEY["budget-slight"].paper())["Cui et al. (2023)"] == pytest.approx(0.03)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_without_records_every_claim_says_what_would_measure_it():
    rows = claim_texts.overview([]).data.splitlines()[2:]
    assert len(rows) == len(CLAIMS)
    for row, claim in zip(rows, CLAIMS, strict=True):
        assert VERDICTS["not yet measured"] in row and all(f"`{command}`" in row for command in claim.commands)
    assert used([]) == [] and not any(word in claim_texts.details([]).data for word in OUTCOMES.values())


def test_every_effect_has_a_row_with_its_interval_seeds_and_outcome():
    records = [finetuned(UP, seed=0), finetuned((44, 0), seed=1), finetuned(DOWN, epochs=4)]
    page = claim_texts.details(records).data
    row = "| `demo`, 1,000 images, 3 epochs | whole network, τ = 0.01, η = 1 (the only one) | +10.50 |"
    half = 1.96 * math.sqrt((40 + 4 / 4 - 42**2 / N) / (N - 1) / N) * 100  # 40 images won for both seeds, 4 for one
    assert f"{row} {10.5 - half:+.2f} to {10.5 + half:+.2f} | 2: +10.00 to +11.00 | ✓ holds |" in page
    assert "| 1 | ✗ contradicted |" in page and "◐ holds in 1 of 2, contradicted in 1" in page
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("|")}
    assert widths == {7}
    assert used(records) == records


def test_committed_records_make_a_page_on_which_stand_ins_bear_their_own_names():
    records = [record for kind in effects.KINDS for record in read_records(kind=kind)]
    assert claim_texts.overview(records).data.count("\n") == len(CLAIMS) + 1
    page = claim_texts.details(records).data
    for claim in CLAIMS:
        found = verdict(claim.effects(records), claim)
        assert found in ("holds", "not yet measured") or (claim.why and claim.why in page), f"{claim.key} needs a why"
        for effect in claim.effects(records):
            names = {record.network.name for record in effect.records}
            words = f"{effect.study} {effect.comparison}"
            for name, about in PAPER_NETWORKS.items():
                assert (about["paper"] in words) == (name in names)
    assert {id(r) for r in used(records)} <= {id(r) for r in records}


def test_no_verdict_is_typed_by_hand():
    notebook = json.loads((files.ROOT / "notebooks" / "claims.ipynb").read_text(encoding="utf-8"))
    typed = ["".join(c["source"]) for c in notebook["cells"]] + [(files.ROOT / "README.md").read_text(encoding="utf-8")]
    for text in typed:
        assert not [words for words in (*VERDICTS.values(), *OUTCOMES.values()) if words in text]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not re.search(r"\bdef\b|\bfor .*:\n|\d\.\d", ast.unparse(ast.parse("".join(cell["source"]))))


# ---------------------------------------------------------------------------------------------------------------------
# By the worst case
# ---------------------------------------------------------------------------------------------------------------------


def with_distances(before, after):
    """A record of the whole protocol on small_trades whose test images have these distances, in 255ths."""
    record = recorded("finetune-small_trades-whole-tau0.01-eta1-seed1-*.json")
    n = record.data.test
    packed = {
        when: pack_floats(torch.tensor(values).repeat(n)[:n] / 255)
        for when, values in (("before", before), ("after", after))
    }
    part = {"steps": 10, "core": "a" * 64, "device": "a processor", "distance": packed}
    return make_record(record.stored() | {"boundary": part})


def test_the_worst_case_judges_by_the_distances_of_the_records():
    record = with_distances([0.0, 3.0, 6.0, 9.0], [0.0, 4.0, 7.0, 12.0])
    (claim,) = [claim for claim in CLAIMS if claim.key == "whole-w2"]
    for delta in RADII:
        (effect,) = claim.found([record], delta)
        threat = wdat_core.Threat(p=2, delta=delta / 255)
        left = [boundary_of(record, when).accuracy(threat) for when in ("before", "after")]
        assert effect.value == pytest.approx(100 * (left[1] - left[0]), abs=100 / record.data.test)
        assert outcome(effect, claim) == ("holds" if left[1] > left[0] else "not visible")
    bare = make_record(_without_boundary(record))
    assert [e.value for e in claim.effects([record])] == [e.value for e in claim.effects([bare])]
    assert claim.found([bare], 4) == []


def _without_boundary(record):
    return {name: value for name, value in record.stored().items() if name != "boundary"}


def test_a_claim_about_both_accuracies_takes_both_balls():
    record = with_distances([0.0, 3.0, 6.0, 9.0], [0.0, 4.0, 7.0, 12.0])
    both, two, inf = (next(c for c in CLAIMS if c.key == key) for key in ("whole-worth", "whole-w2", "whole-winf"))
    values = [claim.found([record], 8)[0].value for claim in (both, two, inf)]
    assert values[0] == pytest.approx(values[1] + values[2])


def test_claims_about_the_attacks_have_no_worst_case():
    about = [claim.key for claim in CLAIMS if claim.found is None]
    assert about == ["budget-strong", "budget-slight", "upsilon-close", "upsilon-robust", "upsilon-volatile"]


def test_the_first_page_s_table_and_that_of_the_claims_are_those_of_the_effects():
    records = [r for r in read_records() if evidence.is_full(r)] + read_records(kind="evaluate")
    first, table = claim_texts.by_both(records), claim_texts.by_worst_case(records).data
    (claim,) = [claim for claim in CLAIMS if claim.key == "whole-w2"]
    rows = {cells[1].strip(" `"): cells for cells in (line.split("|") for line in first.splitlines()[2:])}
    columns = [claim.effects(records), claim.found(records, 4)]
    for place, those in enumerate(columns, 4):
        for effect in (e for e in those if e.full):
            cell = rows[effect.records[0].network.name][place].replace("\u00a0", " ").strip()
            star = "\\*" * (len(effect.seeds) == 1)
            assert cell == f"{effect.value:+z.2f} ± {effect.value - effect.low:.2f}{star}"
            assert place == 4 or f"{effect.value:+z.2f}" in table
    assert first.count("\\*") == 4 and rows["cnn_a_mix4"][4:] == [" – "] * 2 + [""]
    assert claim_texts.by_both([]).count("\n") == 1
