"""How far first order carries: the numbers by hand, and what the page makes of made-up ones."""

import math

import pytest
from altered import altered

from companion import answers, files, first_order
from companion.records import make_record, parse_record, record_bytes, record_name
from companion.settings import ParameterError, Settings
from wdat_core import Threat, sensitivity, wpgd


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of the demo's small neighbour on a few images."""
    before, files.RUNS = files.RUNS, tmp_path_factory.mktemp("runs")
    try:
        (made,) = first_order.first_order_each([Settings(network="small_trades", test_images=8).resolved()], steps=3)
        return made
    finally:
        files.RUNS = before


def test_a_record_has_what_the_core_gives(record):
    assert record_name(record).startswith("first_order-small_trades-")
    assert parse_record(record_bytes(record)).stored() == record.stored()
    from companion.bench import bench

    on = bench(Settings(network="small_trades", test_images=8).resolved())
    assert len(record.rows) == 9
    for row in record.rows[::4]:
        threat = Threat(row.threat.p, row.threat.r, first_order.FRACTIONS[3] * row.threat.delta)
        attack = wpgd(on.model, *on.data.test, threat, loss=row.loss, steps=3, batch_size=128)
        assert row.upsilon == pytest.approx(sensitivity(on.model, *on.data.test, threat, loss=row.loss), rel=1e-4)
        assert row.start == pytest.approx(attack.history["loss"][0], rel=1e-4)
        assert row.values[3] == pytest.approx(max(attack.history["loss"]), rel=1e-3)


def test_a_small_ball_is_first_order(record):
    """The theorem itself: at an 64th of the usual radius the rise is the slope times the radius, to a few per cent."""
    for row in record.rows:
        if row.loss == "ce":
            assert first_order.carried(record, row)[0] == pytest.approx(1, abs=0.06)


def straight(record, bend=0.0, **parts):
    """The record with losses that rise by first order, bent by so much at the usual radius."""
    stored = record.stored()
    for row, old in zip(stored["rows"], record.rows, strict=True):
        rise = [f * old.threat.delta * old.upsilon * (1 + bend * f) for f in first_order.FRACTIONS]
        row["values"] = [old.start + r for r in rise]
    return make_record({**stored, **parts})


@pytest.mark.parametrize("bend, fraction", [(0.0, 1), (0.099, 1), (-0.15, 1 / 2), (0.3, 1 / 4), (-9.0, 0)])
def test_the_reach_is_the_greatest_radius_within_a_tenth(record, bend, fraction):
    made = straight(record, bend)
    for row in made.rows:
        assert first_order.reach(made, row) == pytest.approx(255 * fraction * row.threat.delta)
        assert first_order.carried(made, row)[-1] == pytest.approx(1 + bend)


def test_a_reach_ends_where_it_is_left_for_the_first_time(record):
    made = straight(record)
    values = list(made.rows[0].values)
    values[2] = made.rows[0].start
    broken = altered(made, rows=[made.rows[0].model_copy(update={"values": values}), *made.rows[1:]])
    assert first_order.reach(broken, broken.rows[0]) == pytest.approx(255 * first_order.FRACTIONS[1] * 8 / 255)


def test_the_answer_says_the_numbers_of_the_paper_s_loss_and_ball(record):
    text = answers.answer("first_order", [straight(record, 0.3)])
    assert (
        "rises by 1.30 times" in text and "within a tenth up to 2/255 on `small_trades`; for cross-entropy up" in text
    )
    none = answers.answer("first_order", [straight(record, -9.0)])
    assert "within a tenth at no radius that was tried; for cross-entropy at no radius that was tried." in none
    other = altered(straight(record, -9.0), network={"name": "other", "digest": "f" * 64})
    both = answers.answer("first_order", [straight(record, 0.3), other])
    assert "up to 2/255 on `small_trades` and at none that was tried on `other`" in both
    assert answers.answer("first_order", []) == "Nothing is recorded here yet."


def test_the_table_and_the_figure_have_each_ball_and_loss(record):
    table = first_order.reach_table([record]).data.splitlines()
    assert len(table) == 2 + 9 and table[2].startswith("| small_trades | W2, l∞ | CE |")
    figure = first_order.plot_first_order([record])
    assert len(figure.axes) == 9 and all(len(axis.lines) == 1 for axis in figure.axes)
    assert first_order.plot_first_order([]).axes


def test_the_record_of_the_most_images_is_shown(record):
    fewer = altered(record, data=record.data.model_copy(update={"test": 4}))
    assert first_order.newest([record, fewer]) == [record] == first_order.newest([fewer, record])


@pytest.mark.parametrize(
    "change", [{"values": [0.0]}, {"values": [math.nan] * 7}, {"upsilon": -1.0}, {"threat": {"p": 0.5}}], ids=str
)
def test_a_record_that_cannot_be_is_refused(record, change):
    stored = record.stored()
    stored["rows"][0] |= change
    with pytest.raises(ValueError):
        make_record(stored)


def test_an_unknown_network_is_named():
    with pytest.raises(ParameterError, match="unknown network"):
        first_order.first_order_each([Settings(network="small_tradess").resolved()])


def test_the_command_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        first_order.main(["nothing_like_it"])
    assert str(ended.value).startswith("first_order: unknown network")


def test_images_that_are_all_misread_have_no_slope(monkeypatch):
    monkeypatch.setattr("wdat_core.sensitivity", lambda *_, **__: 0.0)
    with pytest.raises(ParameterError, match="reads none of these images rightly, so ce has no slope: take more"):
        first_order.first_order_each([Settings(network="small_trades", test_images=4).resolved()], steps=1)
