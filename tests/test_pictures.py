"""The pictures show what is in the record: every image once, with what was spent on it, and nothing else."""

import base64
import dataclasses
import io
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from altered import altered
from PIL import Image

from companion import agreement, pictures
from companion.records import read_records
from companion.values import pack_floats

RECORD = pictures.opening(read_records(kind="spend"))
BAR = re.compile(r'<path d="M(\d+)\.5 (\d+)v-(\d+)"/>')


def drawn(record):
    """For each attacker the heights of the bars, in units of delta, in the order of the picture."""
    bars = [(int(zero), int(height) / pictures.DELTA) for _, zero, height in BAR.findall(pictures.budget(record))]
    return [[height for zero, height in bars if zero == which] for which in sorted({zero for zero, _ in bars})]


def record_of(rows, delta=0.1, name="demo"):
    """A record of images given as (label, before, after w_inf, after w_2, moved by w_inf, moved by w_2)."""
    label, x, w_inf, w_2, far_inf, far_2 = (list(column) for column in zip(*rows, strict=True)) if rows else [[]] * 6
    return altered(
        RECORD,
        network={"name": name},
        config={"threat": dataclasses.replace(RECORD.config.threat, delta=delta)},
        label=label,
        prediction={"x": x, "w_inf": w_inf, "w_2": w_2},
        distance={"w_inf": far_inf, "w_2": far_2},
        boundary=None,
    )


def with_found(record, distance, read):
    """The record with distances to the nearest misclassified images found, and what these are read as."""
    part = RECORD.boundary.model_copy(update={"distance": {"test": pack_floats(torch.tensor(distance))}})
    prediction = record.prediction | {"found": read}
    return record.model_copy(update={"boundary": part, "prediction": prediction})


ONE_OF_EACH = [
    (3, 5, 5, 5, 0.1, 0.0),  # wrong before
    (1, 1, 2, 4, 0.1, 0.05),  # fooled by both
    (2, 2, 2, 0, 0.1, 0.18),  # by W_2 alone
    (7, 7, 7, 7, 0.1, 0.02),  # by neither
    (8, 8, 9, 8, 0.1, 0.01),  # by W_inf alone
]


@pytest.mark.parametrize("attacker", pictures.NAMES)
def test_what_is_drawn_spends_what_the_record_spends_and_no_more_than_it_may(attacker):
    delta, moved = RECORD.config.threat.delta, RECORD.distance[attacker]
    heights = drawn(RECORD)[list(pictures.NAMES).index(attacker)]
    assert len(heights) == len(moved) == len(RECORD.label) and len(drawn(RECORD)) == 3
    step = 0.5 / pictures.DELTA  # heights are whole units
    assert sorted(heights) == pytest.approx(sorted(d / delta for d in moved), abs=1.001 * step)
    length = math.sqrt(sum(h**2 for h in heights) / len(heights))
    assert length == pytest.approx(pictures.root_mean_square(pictures.images_in(RECORD), attacker) / delta, abs=step)
    assert pictures.root_mean_square(pictures.images_in(RECORD), attacker) <= delta + 1e-6  # stored with 6 decimals


def test_every_image_is_drawn_once_with_a_word_on_it():
    text = pictures.budget(RECORD)
    said = re.findall(r"<title>image (\d+): ", text)
    assert sorted(map(int, said)) == list(range(len(RECORD.label)))
    columns = [int(x) for x, _, _ in BAR.findall(text)]
    assert Counter(columns) == dict.fromkeys(range(len(said)), len(pictures.attackers(RECORD)))
    assert len(text.encode()) < 300_000


def test_the_groups_are_all_the_images_and_give_the_accuracies():
    images = pictures.images_in(RECORD)
    groups = pictures.grouped(images)
    assert sorted(i.index for members in groups.values() for i in members) == list(range(len(images)))
    for attacker, fools in pictures.FOOLS.items():
        lost = sum(len(groups.get(name, [])) for name in ("wrong", *fools))
        assert pictures.accuracies(RECORD)[attacker] == pytest.approx(1 - lost / len(images))
        assert sum(pictures.share(those, images, attacker) for those in groups.values()) == pytest.approx(1)


def test_each_outcome_has_its_group():
    images = pictures.images_in(record_of(ONE_OF_EACH))
    assert [image.group for image in images] == list(pictures.GROUPS)


def test_the_summary_says_in_words_what_the_picture_shows():
    (words,) = re.findall(r'role="img" aria-label="([^"]*)"', pictures.budget(record_of(ONE_OF_EACH * 3)))
    assert words.startswith("15 test images") and "radius 25.5/255" in words
    for _, said in pictures.GROUPS.values():
        assert f"3: {said}." in words
    assert "40.0\u00a0% still right" in words and "3 images not moved, others by up to 45.9/255" in words
    assert "<" not in words


def test_the_third_attacker_buys_the_cheapest_first_with_the_same_budget():
    """Five images and delta = 0.1: the budget is 5 * 0.1^2, which pays for 0.05, 0.1 and 0.16, not for 0.2 as well."""
    record = with_found(record_of(ONE_OF_EACH), [0.0, 0.16, 0.2, 0.05, 0.1], [5, 0, 3, 1, 2])
    images = pictures.images_in(record)
    assert [i.moved["found"] for i in images] == pytest.approx([0, 0.16, 0, 0.05, 0.1])
    assert [i.after["found"] for i in images] == [5, 0, 2, 1, 2]
    assert pictures.accuracies(record)["found"] == 0.2
    text = pictures.budget(record)
    assert "<b>Cheapest first:</b> 3 images bought, the dearest for 40.8/255. <b>20.0&nbsp;%</b> still right." in text
    assert "what three attackers of radius" in text and "no certificate" in text
    assert sorted(drawn(record)[2]) == pytest.approx([0, 0, 0.5, 1, 1.6], abs=0.01)
    assert "cheapest first: bought" in text and "cheapest first" not in pictures.budget(record_of(ONE_OF_EACH))


def test_the_committed_picture_has_the_third_attacker_within_the_budget():
    spent = pictures.root_mean_square(pictures.images_in(RECORD), "found")
    left = pictures.accuracies(RECORD)
    assert 0 < spent <= RECORD.config.threat.delta and left["found"] < left["w_2"] < left["w_inf"]
    for image in pictures.images_in(RECORD):
        assert (image.after["found"] == image.label) == (image.group != "wrong" and image.moved["found"] == 0)


def test_markup_in_a_name_stays_text():
    text = pictures.budget(record_of(ONE_OF_EACH, name='<script>"&'))
    assert "<script>" not in text and "&lt;script&gt;&quot;&amp;" in text


def test_a_class_that_cifar10_has_not_is_a_number():
    assert "class 12, read as class 999" in pictures.budget(record_of([(12, 999, 0, 0, 0.1, 0.0)]))


@pytest.mark.parametrize("record", [None, record_of([])])
def test_without_a_record_each_picture_says_so(record):
    text = pictures.budget(record)
    assert "no such run is recorded yet" in text and "<svg" not in text
    assert "Nothing is recorded" in pictures.gallery_table(record)
    assert "Nothing is recorded" in pictures.spend_table(record)


def test_nothing_spent_is_drawn_as_nothing():
    rows = [(3, 5, 5, 5, 0.0, 0.0)]
    assert drawn(record_of(rows)) == [[0], [0]]
    assert pictures.magnification(record_of(rows)) == 1


def test_the_book_opens_with_the_demo_attacked_as_in_the_paper():
    of_paper, half = record_of(ONE_OF_EACH, delta=8 / 255), record_of(ONE_OF_EACH * 2, delta=4 / 255)
    other = record_of(ONE_OF_EACH * 3, delta=8 / 255, name="other")
    assert pictures.opening([half, of_paper, other]) is of_paper
    assert pictures.opening([half, other]) is None


def test_the_gallery_chooses_by_its_rule():
    rows = [(*row[:5], row[5] + 0.001 * k * (row[5] > 0)) for k in range(3) for row in ONE_OF_EACH]
    which = {kind: [i.index for i in members] for kind, members in pictures.chosen(record_of(rows)).items()}
    assert which == {"dearest": [12, 7], "cheapest": [1, 6], "in vain": [13, 8], "spared": [0, 5]}
    assert pictures.chosen(record_of(rows[2:3]), each=2).keys() == {"dearest"}  # no image twice


def test_the_gallery_shows_the_images_and_the_moves_between():
    torch.manual_seed(0)
    record = record_of(ONE_OF_EACH)
    x = 0.25 + 0.5 * torch.rand(5, 3, 32, 32)
    moves = {name: torch.tensor(record.distance[name]).view(-1, 1, 1, 1) for name in pictures.NAMES}
    shown = {"x": x, **{name: x + move for name, move in moves.items()}}
    text = pictures.gallery(record, shown, {"dearest": pictures.images_in(record)[2:3]})
    sources = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="[^"]+"', text)
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    times = pictures.magnification(record)
    assert times == 2  # 0.18 fits twice between mid-grey and white
    expected = [x[2]]
    for name in pictures.NAMES:
        expected += [0.5 + times * moves[name][2].expand(3, 32, 32), shown[name][2]]
    for image, wanted in zip(found, expected, strict=True):
        assert np.abs(image / 255.0 - wanted.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_agreement_allows_the_tolerance_and_no_more():
    ours = record_of(ONE_OF_EACH * 40)
    rows = ONE_OF_EACH * 40
    rows[3] = (7, 7, 7, 0, 0.1, 0.02)  # one of 200 images falls
    near = record_of(rows)
    assert "within 0.5 points" in agreement.of_pictures(ours, [near], points=0.5)
    with pytest.raises(AssertionError, match=r"W₂ accuracy is 40.00 % in this run and 39.50 % in spend-demo"):
        agreement.of_pictures(ours, [near], points=0.4)
    found = with_found(ours, [0.15] * 200, [0] * 200)
    assert "within 0.5 points" in agreement.of_pictures(ours, [found])  # it says nothing of what one of them lacks
    assert "Nothing is recorded" in agreement.of_pictures(ours, [])


def test_classes_of_other_data_have_no_names_of_cifar_10():
    record = record_of(ONE_OF_EACH)
    other = altered(record, data={"source": "CIFAR-100"})
    for known, name in ((record, "ship"), (other, "class 8")):
        assert f"{name}," in pictures.budget(known) and f"| {name} |" in pictures.gallery_table(known)
    assert "ship" not in pictures.budget(other)


def test_an_image_of_one_channel_is_drawn():
    _, content = pictures.png(torch.full((1, 4, 6), 0.5)).split(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == 128
