"""Cells: a model of integers whose size goes with their row's and with their column's, in some hundred bytes.

Each row and each column has a scale, in thirds of octaves, found by turns from the means of absolute values.  A value's cell
is the sum of both; few values at either end share the last cell there.  In a cell the absolute value k is as frequent as

    exp(-(k / a)^b),   zero w times that,

a generalised Gaussian (Nadarajah 2005): three numbers in place of a histogram.  On weights of SmolLM2-135M that
takes 0.0014 bit per value more than the histograms themselves, which would have to be written down.

Frequencies are made by arithmetic in decimals, which is rounded correctly and so is the same on every machine.  What is
searched for is compared in whole bits.
"""

from __future__ import annotations

import decimal
import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

THIRDS = 3  # of octaves: steps of scales
STEEPEST = 24  # thirds of octaves that a column's scale is from the mean at most
LARGEST = 4096  # frequencies in a histogram
FEW = 1000  # a share of 1 / FEW of all values at either end is one cell
SHAPES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)  # b
WIDTHS, NARROWEST = 8, -2  # a is 2^(i / 8 - 2), i of 8 bits
ZEROS = (4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54)  # w, in sixteenths: quarters of octaves
TRIED = 4  # widths on either side of the one that the mean asks for
ONE = 1 << 24  # the frequency that stands for 1
_EXACT = decimal.Context(prec=12, rounding=decimal.ROUND_HALF_EVEN)

Array = np.ndarray[Any, Any]


class Cells(NamedTuple):
    """of_rows, of_columns: int[rows] and int[columns] from 0, whose sum less `low` is the number of a value's cell, if it is
    one.  numbers: int[3, cells], of a, of b and of w.  size: bits that the absolute values take."""

    of_rows: Array
    of_columns: Array
    low: int
    numbers: Array
    size: int

    @property
    def many(self) -> int:
        """How many cells there are."""
        return len(self.numbers[0])


def numbered(of_rows: Array, of_columns: Array, low: int, many: int) -> Array:
    """The cell of each value, of `many`: int[rows, columns]."""
    return np.asarray((of_rows[:, None] - low + of_columns).clip(0, many - 1))


def cells_of(sizes: Array) -> Cells:
    """The cells of absolute values, int[rows, columns]."""
    of_rows, of_columns = _scales(sizes.astype(np.float64))
    both = of_rows[:, None] + of_columns
    total = np.cumsum(np.bincount(both.reshape(-1)))
    low = int(np.searchsorted(total, total[-1] / FEW, "right"))
    high = max(int(np.searchsorted(total, total[-1] - total[-1] / FEW, "right")), low)
    values, many = int(sizes.max()) // 2 * 2 + 2, high - low + 1
    both = numbered(of_rows, of_columns, low, many) * values + sizes
    counts = np.bincount(both.reshape(-1), minlength=many * values).reshape(many, values)
    fitted = [_fitted(found) for found in counts]
    found = np.array([one[:3] for one in fitted]).T
    return Cells(of_rows, of_columns, low, found, sum(one[3] for one in fitted))


def frequencies(numbers: Array, size: int) -> list[Array]:
    """Of |2 m| and of |2 m + 1| in each cell, signs together, by m: int[size], two per cell.  numbers: of `Cells`."""
    found = []
    for a, b, w in numbers.T.tolist():
        density = np.zeros(2 * size, np.int64)
        known = _density(a, b)[: 2 * size]
        density[: len(known)] = known
        even, odd = 2 * density[::2], 2 * density[1::2]
        even[0] = density[0] * ZEROS[w] // 16
        found += [np.maximum(even, 1), np.maximum(odd, 1)]
    return found


@lru_cache(maxsize=1024)
def _density(a: int, b: int) -> Array:
    """exp(-(k / a)^b) in units of 1 / `ONE`, for k from 0, until nothing is left of it: int[n]."""
    shape, width = decimal.Decimal(SHAPES[b]), _EXACT.multiply(_log(2), decimal.Decimal(a) / WIDTHS + NARROWEST)
    found = [ONE]
    while found[-1] and len(found) < 2 * LARGEST:
        power = _EXACT.exp(_EXACT.multiply(shape, _EXACT.subtract(_log(len(found)), width)))
        found.append(int(_EXACT.to_integral_value(_EXACT.multiply(_EXACT.exp(-power), ONE))))
    return np.array(found)


@cache
def _log(k: int) -> decimal.Decimal:
    return _EXACT.ln(decimal.Decimal(k))


def _scales(sizes: Array) -> tuple[Array, Array]:
    """Scales of rows and columns, from 0: int[rows], int[columns].  Sums are of whole numbers below 2^53, and exact."""
    rows, columns = sizes.shape
    steps = np.rint(4096 * 2.0 ** (-np.arange(-STEEPEST, STEEPEST + 1) / THIRDS))
    of_columns = np.zeros(columns, np.int64)
    for _ in range(2):
        of_rows = _thirds(sizes @ steps[of_columns + STEEPEST] / (4096 * columns))
        middle = int(np.median(of_rows))
        near = (of_rows - middle).clip(-STEEPEST, STEEPEST)
        means = steps[near + STEEPEST] @ sizes / (4096 * rows) * 2.0 ** (-middle / THIRDS)
        of_columns = _thirds(means).clip(-STEEPEST, STEEPEST)
    return of_rows - of_rows.min(), of_columns - of_columns.min()


def _thirds(means: Array) -> Array:
    """The nearest thirds of octaves, at least -4 octaves: int[n]."""
    return np.asarray(np.rint(THIRDS * np.log2(np.maximum(means, 1 / 16))), np.int64)


def _fitted(counts: Array) -> tuple[int, int, int, int]:
    """The numbers of a, b and w that fit counts of absolute values best, int[n] with n even, and the bits that these take
    without signs."""
    there = np.flatnonzero(counts)
    n, most = counts.sum(), int(there[-1]) if len(there) else 0
    even, zero, many = counts[::2].sum(), counts[0], counts[there]
    mean = max(float(many @ there) / max(int(n), 1), 1 / 16)
    k = np.arange(min(len(counts), 2 * most + 16) // 2 * 2, dtype=np.float64)
    widths = [mean * math.gamma(1 / shape) / math.gamma(2 / shape) for shape in SHAPES]
    middles = [round(WIDTHS * (math.log2(width) - NARROWEST)) for width in widths]
    tried = (np.array(middles)[:, None] + np.arange(-TRIED, TRIED + 1)).clip(0, 255)
    powers = (k[:, None, None] / 2.0 ** (tried / WIDTHS + NARROWEST)) ** np.array(SHAPES)[:, None]
    density = np.exp(-powers)
    w = np.array(ZEROS)[:, None] / 16
    evens, odds = (2 * density[first::2].sum(0)[:, None] for first in (2, 1))
    evens = evens + w
    bits = np.tensordot(many, powers[there], 1)[:, None] / math.log(2) + even * np.log2(evens)  # [b, w, a]
    bits = np.rint(bits - zero * np.log2(w) - (n - zero) + (n - even) * np.log2(np.maximum(odds, 1e-300)))
    b, i, j = np.unravel_index(int(bits.argmin()), bits.shape)
    return int(tried[b, j]), int(b), int(i), int(bits[b, i, j])
