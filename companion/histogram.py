"""The worst-case accuracy of more distances than memory holds, from two walks over them.

The bits of a floating-point number >= 0, read as a whole number, are in the order of the numbers. So their first bits
are bins that need no range to be known before, as fine for small distances as for large ones. The first walk counts
the images of each bin and adds up what they cost. The second does the same inside the bin in which the budget ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wdat_core import Threat, WdatError

Histogram = tuple[np.ndarray, np.ndarray]  # counts and costs, (bins,)
MOST = 1 << 24  # bins
OTHERS = "the second walk over the chunks met other distances than the first: they must stay as they are"
PIECE = 1 << 20  # distances at once: what is made of them is small, however long a chunk is


def accuracy_between(chunks: Iterable[Any], threat: Threat, bins: int = 65536) -> tuple[float, float]:
    """An interval that holds `Boundary.accuracy`, A_p(delta), of distances that come in chunks.

    Their order and how they are divided do not matter. What is held is two histograms of `bins` and one chunk.

    How wide it is: at most the images of one sub-bin over n, and those whose purchase rounding decides. A sub-bin is
    what agrees in the first 2 log2(bins) bits of 31 (float32) or 63 (float64). With the default bins that is a single
    float32, of which an exact number is bought, or float64s that differ by less than 2^-20 of their size. Rounding:
    sums of n float64s are known up to e = (n + p + 16) 2^-51 of their size, however they are added up, so the interval
    holds the accuracies for budgets of n (1 - e) delta^p to n (1 + e) delta^p; it is never less than one image where
    the budget ends exactly on one.

    Args:
        chunks: 1-d tensors or numpy arrays of distances, such as slices of a numpy.memmap: 0 where an image is
            misclassified, inf where nothing was found. All float32 or all float64; 16 bits become float32. They are
            walked over twice, so a list will do, or an object whose `__iter__` starts anew; a generator will not.
        threat: its p in [1, inf] and its delta; in which norm r the distances are is not looked at.
        bins: a power of 2, from 2 to 2^24.

    Returns:
        The lowest and the highest fraction that the accuracy can be.

    Raises:
        WdatError: a chunk is no such tensor or array, or not like those before; a distance is negative or NaN; there
            are none; the chunks can be walked over only once, or were others the second time.
    """
    if not isinstance(threat, Threat):
        raise WdatError(f"threat must be a Threat, not {threat!r}")
    if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= MOST or bins & (bins - 1):
        raise WdatError(f"bins must be a power of 2 from 2 to {MOST}, not {bins!r}")
    _check_again(chunks)
    if threat.p == math.inf:
        n = paid = 0
        for d in _pieces(chunks):
            n, paid = n + len(d), paid + int((d.astype(np.float64, copy=False) <= threat.delta).sum())
        return _fractions(n, paid, paid)

    split = None
    n, counts, costs = 0, np.zeros(bins, np.int64), np.zeros(bins)
    for d in _pieces(chunks):
        split = split or _Split(d.dtype, bins.bit_length() - 1)
        n += len(d)
        _add(counts, costs, split.bins(d), d, threat)
    if split is None:
        return _fractions(0, 0, 0)
    error = (n + threat.p + 16) * 2.0**-51
    budgets = [max(0.0, n * (1 - error)), n * (1 + error)]
    ends = [_end(costs, budget) for budget in budgets]  # almost always the same
    inside = {end: (np.zeros(split.size, np.int64), np.zeros(split.size)) for end in ends if end < bins}
    if inside:
        _walk_again(chunks, threat, split, inside, n)
        if any(sub_counts.sum() != counts[end] for end, (sub_counts, _) in inside.items()):
            raise WdatError(OTHERS)

    bought = []
    for end, budget, dearest in zip(ends, budgets, (True, False), strict=True):
        paid = int(counts[:end].sum())
        if end < bins:
            sub_counts, sub_costs = inside[end]
            left = float(budget - costs[:end].sum())
            last = _end(sub_costs, left)
            paid += int(sub_counts[:last].sum())
            if last < split.size:  # of it as many as are paid for if all are as dear, or as cheap, as any in it
                price = float(_cost(split.edge(end, last, dearest), threat)[0])
                left, most = max(float(left - sub_costs[:last].sum()), 0.0), int(sub_counts[last])
                paid += most if most * price <= left else int(left / price)
        bought.append(paid)
    return _fractions(n, *bought)


@dataclass(frozen=True)
class _Split:
    """Where a distance goes: its first bits say the bin, the next ones the sub-bin; the rest is not looked at."""

    dtype: np.dtype
    first: int  # bits

    @property
    def others(self) -> int:
        """The bits behind those of the bin; the sign, which is 0, is none."""
        return 8 * self.dtype.itemsize - 1 - self.first

    @property
    def next(self) -> int:
        return min(self.first, self.others)

    @property
    def size(self) -> int:
        """How many sub-bins a bin has."""
        return 1 << self.next

    def bins(self, d: np.ndarray) -> np.ndarray:
        return d.view(f"i{self.dtype.itemsize}") >> self.others

    def sub_bins(self, d: np.ndarray) -> np.ndarray:
        return d.view(f"i{self.dtype.itemsize}") >> (self.others - self.next) & (self.size - 1)

    def edge(self, number: int, sub_bin: int, upper: bool) -> np.ndarray:
        """The least or the greatest distance in a sub-bin, (1,)."""
        rest = self.others - self.next
        bits = (number << self.others) + (sub_bin << rest) + upper * ((1 << rest) - 1)
        edge = np.array([bits], f"i{self.dtype.itemsize}").view(self.dtype)
        return np.where(np.isnan(edge), np.inf, edge)  # behind inf there is nothing


def _walk_again(chunks: Iterable[Any], threat: Threat, split: _Split, inside: dict[int, Histogram], n: int) -> None:
    """Counts and costs of the sub-bins of each bin in `inside`."""
    again = 0
    for d in _pieces(chunks):
        again += len(d)
        where = split.bins(d)
        for end, histogram in inside.items():
            rows = d[where == end]
            _add(*histogram, split.sub_bins(rows), rows, threat)
    if again != n:
        raise WdatError(OTHERS)


def _add(counts: np.ndarray, costs: np.ndarray, where: np.ndarray, d: np.ndarray, threat: Threat) -> None:
    """Each distance's 1 and its cost, added to its bin."""
    counts += np.bincount(where, minlength=len(counts))
    costs += np.bincount(where, _cost(d, threat), minlength=len(costs))


def _cost(d: np.ndarray, threat: Threat) -> np.ndarray:
    """(d / delta)^p, of which the budget pays n: relative to delta, so that no power that matters is lost."""
    with np.errstate(over="ignore", under="ignore"):
        return (d.astype(np.float64) / threat.delta) ** threat.p


def _end(costs: np.ndarray, budget: float) -> int:
    """The first bin that the budget does not pay for in full; their number where it pays for all."""
    return int(np.searchsorted(np.cumsum(costs), budget, side="right"))


def _fractions(n: int, fewest: int, most: int) -> tuple[float, float]:
    if not n:
        raise WdatError("there are no distances: the chunks are empty")
    return (n - most) / n, (n - fewest) / n


def _check_again(chunks: Any) -> None:
    if isinstance(chunks, torch.Tensor | np.ndarray) and chunks.ndim == 1:
        raise WdatError("chunks must be several tensors or arrays: put a single one into a list")
    if not isinstance(chunks, Iterable):
        raise WdatError(f"chunks must be tensors or arrays in a list or the like, not {type(chunks).__name__}")
    if isinstance(chunks, Iterator):
        raise WdatError(
            f"the chunks are walked over twice, and a {type(chunks).__name__} can be only once: give a list, or an"
            " object whose __iter__ starts anew"
        )


def _pieces(chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """The distances, checked, a piece at a time: float32 or float64 in the byte order of the machine, and no -0."""
    known = None
    for number, chunk in enumerate(chunks, 1):
        if isinstance(chunk, torch.Tensor):
            chunk = chunk.detach().cpu()
            chunk = (chunk.float() if chunk.dtype == torch.bfloat16 else chunk).numpy()
        if not isinstance(chunk, np.ndarray) or chunk.ndim != 1 or chunk.dtype.kind != "f" or chunk.dtype.itemsize > 8:
            what = f"{chunk.dtype} {chunk.shape}" if isinstance(chunk, np.ndarray) else type(chunk).__name__
            raise WdatError(f"chunk {number} must be a 1-d tensor or array of floating-point distances, not {what}")
        dtype = np.dtype(np.float64 if chunk.dtype.itemsize == 8 else np.float32)
        known = known or dtype
        if dtype != known:
            raise WdatError(f"chunk {number} is {dtype}, those before are {known}: make them alike")
        for start in range(0, len(chunk), PIECE):
            piece = np.ascontiguousarray(chunk[start : start + PIECE], dtype)
            if not (piece >= 0).all():
                worst = piece[~(piece >= 0)][0]
                raise WdatError(f"chunk {number} has a distance of {worst:g}: each must be a number >= 0, or inf")
            yield piece + dtype.type(0)
