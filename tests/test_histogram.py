"""The accuracy of more distances than memory holds: the interval holds that of Boundary, as narrow as it says."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.histogram import PIECE, accuracy_between
from wdat_core import Boundary, Threat, WdatError

INF = math.inf
ORDERS = [1.0, 2.0, 3.5, 64.0, INF]
RADII = [1e-300, 1e-30, 1e-3, 4 / 255, 0.5, 30.0, 1e300]


def made(kind, n=2000, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    d = {
        "uniform": lambda: random.random(n) * 0.2,
        "log": lambda: np.exp(random.normal(-4, 3, n)),
        "ties": lambda: random.integers(0, 9, n) / 255,
        "zeros": lambda: np.zeros(n),
        "infs": lambda: np.full(n, INF),
        "mixed": lambda: random.choice([0, 1e-40, 1e-7, 4 / 255, 8 / 255, 0.3, 1e38, INF], n),
        "one": lambda: np.array([4 / 255]),
        "greatest": lambda: np.full(n, np.finfo(dtype).max),
    }[kind]()
    return d.astype(dtype)


def between(d, threat, parts=3, **options):
    return accuracy_between(np.array_split(d, parts), threat, **options)


def by_sorting(d, threat):
    return Boundary(torch.from_numpy(d), threat.r).accuracy(threat)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("kind", ["uniform", "log", "ties", "zeros", "infs", "mixed", "one", "greatest"])
def test_the_interval_holds_the_accuracy_by_sorting_and_is_an_image_wide(kind, p, dtype):
    d = made(kind, dtype=dtype)
    for delta in RADII:
        low, high = between(d, Threat(p, 2.0, delta))
        exact = by_sorting(d, Threat(p, 2.0, delta))
        assert 0 <= low <= exact <= high <= 1
        # Distances of float64 that agree in 32 bits are few, but for those that are equal.
        assert high - low <= (0 if p == INF else 1.001 / len(d))


@given(
    d=st.lists(st.one_of(st.sampled_from([0.0, 0.25, 0.5, INF]), st.floats(0, INF, width=32)), min_size=1, max_size=30),
    p=st.one_of(st.just(INF), st.floats(1, 1e4)),
    delta=st.floats(1e-12, 1e12),
    bins=st.sampled_from([2, 4, 256, 65536, 1 << 20]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_interval_holds_the_accuracy_of_any_distances(d, p, delta, bins, dtype):
    d = np.array(d, dtype)
    low, high = between(d, Threat(p, 2.0, delta), bins=bins)
    assert 0 <= low <= by_sorting(d, Threat(p, 2.0, delta)) <= high <= 1


def test_prices_far_apart_in_one_sub_bin():
    """With few bins the cheapest that a sub-bin can have costs less than any float64 divides by."""
    d = np.array([0.0, 1e-160, 1.0, 1.5], np.float64)
    for bins in (2, 4, 8, 16, 32):
        for delta in (1.0, 1.1, 1e-100):
            low, high = between(d, Threat(2, 2.0, delta), bins=bins)
            assert low <= by_sorting(d, Threat(2, 2.0, delta)) <= high


@pytest.mark.parametrize("dtype, width", [(np.float32, 31), (np.float64, 63)])
@pytest.mark.parametrize("bins", [2, 16, 64, 256, 1024])
def test_the_width_is_at_most_the_images_of_one_sub_bin(bins, dtype, width):
    for kind in ("uniform", "log", "ties"):
        d = made(kind, dtype=dtype)
        bits = d.view(f"i{d.dtype.itemsize}") >> max(0, width - 2 * int(math.log2(bins)))
        for p in (1.0, 2.0, 8.0):
            threat = Threat(p=p, delta=8 / 255)
            low, high = between(d, threat, bins=bins)
            bought = int((1 - by_sorting(d, threat)) * len(d) + 0.5)
            last = np.sort(bits)[min(bought, len(d) - 1)]
            assert low <= by_sorting(d, threat) <= high
            assert high - low <= max(1, (bits == last).sum()) / len(d) * 1.001
    if bins > 64:
        assert high - low < 0.2


def test_how_the_distances_are_divided_does_not_matter(tmp_path):
    d = made("log", 3 * PIECE + 7)
    threat = Threat(p=2, delta=8 / 255)
    file = np.memmap(tmp_path / "distances", np.float32, "w+", shape=d.shape)
    file[:] = d
    exact = by_sorting(d, threat)
    whole = accuracy_between([d], threat)
    assert whole == accuracy_between([file], threat)
    assert whole[0] <= exact <= whole[1] <= whole[0] + 2 / len(d)
    slices = [file[i : i + 999_999] for i in range(0, len(d), 999_999)]
    pieces = [d[:0], torch.from_numpy(d[:5]), d[5:][::-1], d[:0].astype(">f4")]
    for chunks in (slices, pieces, [d.astype(">f4")]):
        low, high = accuracy_between(chunks, threat)
        assert low <= exact <= high <= low + 2 / len(d)


def test_tensors_of_any_floating_type_are_taken():
    threat = Threat(p=2, delta=0.1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        d = torch.tensor([0.0, -0.0, 0.05, 0.1, 0.3, INF], dtype=dtype)
        low, high = accuracy_between([d, d.requires_grad_()], threat)
        assert low <= Boundary(torch.cat([d, d]).detach()).accuracy(threat) <= high <= low + 1 / 12


class Walked:
    """Chunks that count how often they are walked over, and may be others the second time."""

    def __init__(self, *walks):
        self.walks, self.count = walks, 0

    def __iter__(self):
        self.count += 1
        return iter(self.walks[min(self.count, len(self.walks)) - 1])


def test_there_are_two_walks_and_one_where_no_budget_is_shared():
    d = made("uniform")
    for p, times in ((2.0, 2), (INF, 1)):
        chunks = Walked([d])
        accuracy_between(chunks, Threat(p=p, delta=0.05))
        assert chunks.count == times


HALF = np.full(4, 0.5, np.float32)
BAD = [
    (
        ([HALF, np.array([0.1, np.nan], np.float32)],),
        "chunk 2 has a distance of nan: each must be a number >= 0, or inf",
    ),
    (([-HALF],), "chunk 1 has a distance of -0.5: each must be a number >= 0, or inf"),
    (([],), "there are no distances: the chunks are empty"),
    (([HALF[:0]],), "there are no distances: the chunks are empty"),
    ((iter([HALF]),), "the chunks are walked over twice, and a list_iterator can be only once: give a list"),
    (((h for h in [HALF]),), "the chunks are walked over twice, and a generator can be only once: give a list"),
    ((HALF,), "chunks must be several tensors or arrays: put a single one into a list"),
    ((torch.ones(3),), "chunks must be several tensors or arrays: put a single one into a list"),
    ((7,), "chunks must be tensors or arrays in a list or the like, not int"),
    (([HALF[:, None]],), "chunk 1 must be a 1-d tensor or array of floating-point distances, not float32 (4, 1)"),
    (([np.arange(3)],), "chunk 1 must be a 1-d tensor or array of floating-point distances, not int64 (3,)"),
    (([[0.5]],), "chunk 1 must be a 1-d tensor or array of floating-point distances, not list"),
    (([HALF, HALF.astype(np.float64)],), "chunk 2 is float64, those before are float32: make them alike"),
    ((Walked([HALF], [HALF[:3]]),), "the second walk over the chunks met other distances than the first"),
    ((Walked([HALF], [HALF / 4]),), "the second walk over the chunks met other distances than the first"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[message[:40] for _, message in BAD])
def test_what_cannot_be_is_named(given, message):
    with pytest.raises(WdatError, match=re.escape(message)):
        accuracy_between(*given, Threat(p=2, delta=0.1))


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("bins", [0, 1, 3, -2, 2.0, True, "many", 1 << 25])
def test_bins_that_cannot_be_are_named(bins, p):
    with pytest.raises(WdatError, match="bins must be a power of 2 from 2 to 16777216, not"):
        accuracy_between([HALF], Threat(p=p), bins)


def test_a_threat_that_is_none_is_named():
    with pytest.raises(WdatError, match="threat must be a Threat, not 2"):
        accuracy_between([HALF], 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_measurement_reads_what_it_made_twice_and_leaves_nothing(tmp_path):
    from benchmarks import histogram

    threat = Threat(p=2, delta=8 / 255)
    histogram.make(tmp_path / "made", 10_000)
    d = np.fromfile(tmp_path / "made", np.float32)
    (tmp_path / "made").unlink()
    figures = histogram.measure(10_000, threat, tmp_path)
    assert figures["low"] <= by_sorting(d, threat) <= figures["high"] <= figures["low"] + 1.001e-4
    assert figures["bytes"] == 40_000 and list(tmp_path.iterdir()) == []
