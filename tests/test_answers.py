"""The first sentences of the pages: what made-up records make them say, and that the committed ones have an answer."""

import re

import pytest
import torch
from altered import altered, recorded

from companion.answers import PAGES, answer
from companion.records import read_records
from companion.settings import GRIDS, NOTEBOOKS
from companion.values import pack
from wdat_core import Threat

N = 10_000  # test images, so that a percentage point is a hundred of them
BASE = recorded("finetune-small_trades-whole-tau0.01-eta1-seed2-*")
HALF = pack(torch.arange(N) < N // 2)


def made(gain=0.0, network="small_trades", *, val=0.5, data=(40_000, 10_000, N), **config):
    """A record of the whole protocol in which W_2 and W_inf change by that many points from 50 %."""
    right = pack(torch.arange(N) < N // 2 + round(gain * N / 100))
    after = {"clean": HALF, "w_2": right, "w_inf": right}
    epochs = [{**row, "w_2": val if row["epoch"] == BASE.history.best else 0.0} for row in BASE.history.epochs]
    return altered(
        BASE,
        network={"name": network, "digest": network},
        data=dict(zip(("train", "val", "test"), data, strict=True)),
        config={"seed": 0, **config},
        correct={"before": dict.fromkeys(after, HALF), "after": after},
        history={"epochs": epochs},
    )


def said(page, *records):
    return answer(page, records).replace("\u00a0", " ")


def test_a_table_says_the_paper_s_best_column_and_each_network_s():
    text = said("table4", made(3), made(-2, "small_pgd"))
    assert text.startswith("Paper: +7.54 points of W₂ accuracy in its best column (τ = 0.01, η = 1). Here: +3.00 ± ")
    assert " on `small_trades` and -2.00 ± " in text
    assert text.endswith("on `small_pgd`. ◐ **Holds in 1 of 2, contradicted in 1.**")


@pytest.mark.parametrize(
    ("gain", "mark"), [(3, "✓ **Holds in 1 of 1.**"), (-3, "✗ **Contradicted in 1 of 1.**"), (0, "○ **Not visible")]
)
def test_the_mark_follows_the_side_of_the_paper(gain, mark):
    assert mark in said("table4", made(gain))
    if gain:  # Table 3's best column loses
        assert mark in said("table3", made(-gain, perturb="last_layer"))


def test_the_best_column_is_chosen_on_validation_images():
    text = said("table4", made(9, val=0.4), made(1, val=0.6, tau=0.1))
    assert "Here: +1.00 ± " in text and "+9.00" not in text


def test_one_seed_on_the_other_side_makes_it_invisible():
    assert "○ **Not visible in 1 of 1.**" in said("table4", made(9), made(-0.01, seed=1))


def test_shorter_runs_are_named_where_the_whole_protocol_is_not_recorded():
    short = made(3, data=(1000, 100, N), epochs=5)
    text = said("table4", short)
    assert "The whole protocol is not recorded here; in shorter runs: +3.00" in text
    assert "on `small_trades` (1,000 images, 5 epochs)." in text
    longer = made(-4, data=(2000, 100, N), epochs=5)
    assert "+3.00" not in said("table4", short, longer) and "(2,000 images, 5 epochs)" in said("table4", short, longer)
    assert "shorter" not in said("table4", short, longer, made(1)) and "2,000" not in said("table4", longer, made(1))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("claims", "intro")])
def test_without_records_a_page_says_so(page):
    assert "othing is recorded here yet." in answer(page, [])


def test_deviations_are_no_evidence_for_a_table():
    assert "Nothing is recorded here yet." in said("table4", made(3, noise=0.05))


def test_tables_of_networks_with_more_data_say_so():
    for table in GRIDS:
        how = GRIDS[table][1]
        assert ("far more data" in said(f"table{table}", made(3, perturb=how))) == (table > 4)


def test_the_best_setting_is_named():
    text = said("table5", made(3, val=0.4), made(1, val=0.6, perturb="last_layer"))
    assert "+1.00 ± " in text and "on `small_trades` (last layer, τ = 0.01, η = 1)" in text


def test_every_committed_record_has_its_page_and_every_page_its_answer():
    kinds = ["finetune", "evaluate", "sensitivity", "stronger", "certified", "pretrain", "spend", "benchmark"]
    records = [record for kind in [*kinds, "objective", "first_order"] for record in read_records(kind=kind)]
    assert {page for page in NOTEBOOKS if page != "own_network"} <= PAGES.keys()
    for page in PAGES:
        text = answer(page, records)
        assert text[-1] in ".*" and "None" not in text and "nan" not in text and "\n\n\n" not in text, page
        assert not re.search(r"holds in 0|  |\.\.", text), page
    first = answer("intro", records)
    assert answer("table4", records) in first and answer("claims", records) in first


def test_runs_of_another_radius_or_other_images_are_not_held_against_the_paper():
    odd = altered(made(3), config={"threat": Threat(p=2, r=2.0, delta=128 / 255)}, data={"source": "CIFAR-100"})
    assert "nothing is recorded" in said("table4", odd).lower()
    short = made(-2, data=(2000, 500, N), epochs=20)
    assert said("table4", odd, short) == said("table4", short) and "-2.00" in said("table4", short)


def test_a_gpu_that_made_the_columns_was_measured():
    """Also where it is no benchmark that says so, and a processor made others."""
    card = made(3, "Zhang2019Theoretically").model_copy(update={"device": "NVIDIA H100 80GB HBM3"})
    text = said("cost", made(3), card)
    assert "measured with Zhang et al. (2019) on NVIDIA H100" in text
    assert "No GPU was measured" not in text and "small network" not in text
    assert "No GPU was measured" in said("cost", made(3))


def test_networks_on_different_numbers_of_images_are_not_said_to_be_on_one():
    short = [recorded(f"sensitivity-{name}-seed0-*") for name in ("demo", "small_pgd")]
    few, many = (altered(r, data={"train": n}) for r, n in zip(short, (500, 2000), strict=True))
    assert "Here, on 500 to 2,000 training images, the" in said("figure7_1", few, many)
    assert "Here, on 2,000 training images, the" in said("figure7_1", many, many)
