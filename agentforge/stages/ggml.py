"""The block types of ggml, llama.cpp's library: what a GGUF file holds, chosen for the least damage to a layer's outputs.

A row is cut into blocks of 32 or 256 weights.  Each block, or each part of it of 16 or 32 weights, has a scale, in some
types a minimum too, and each weight a level: w ~ scale * level - minimum.  In blocks of 256 the scales and minima of the
parts are integers of 4 to 8 bits, times two half floats of the block; the ternary types have one scale for all 256.  The
layouts are ggml's to the bit; they are decoded by the `gguf` package (quants.py).

llama.cpp chooses scales and levels for the least squared error, each input weighed by its mean square (its importance
matrix).  Here it is the damage itself, tr(E H E^T) for the error E of the weight and H = E[x x^T] of its inputs:

* With H = M D M^T, M unit triangular, columns that are rounded one after the other, each with M's share of the errors before
  it in its target, leave sum_ij D_j e_ij^2, e_ij the rounding of one value (LDLQ: Chee et al. 2023; GPTQ does the same).
  A part's scale and minimum are searched, with D for weights, when its first column's turn comes: for its targets, not for
  the weights.
* Blocks of the largest inputs come first, while there are others to make up for their errors.
* Then everything is chosen once more, part after part, all others as they are (coordinate descent): a part's scale and
  minimum for its levels, which is a problem of least squares, and each level, nearest to where its row's damage is least.

Columns lie as rows in all arrays here, so that the inner loops run over the rows of the weight, which do not depend on each
other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numba import njit

from ..planes import Packed
from .base import SAMPLED, InputStatistics, Layout, Stage, damage, register, represented
from .propagation import add_product, unit_factor

ROWS = 512  # that are encoded together
SWEEPS = 4  # of coordinate descent
STARTS, TURNS, NARROWEST = 8, 3, 0.5  # of the search for a scale: its starts, turns from each, and the least start
LARGEST_HALF = 65504.0
BEYOND = 2.0**28  # what no type can reach
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # levels of iq4_nl and iq4_xs


class Form(NamedTuple):
    """What a type's blocks are made of.

    bytes: of a block.  block, part: columns.  levels: the least and the greatest, or all.  minimum: whether parts have one.
    scales: the least and the greatest integer for a part's scale; None: it is a half float.  minima: the greatest for a
    part's minimum.
    """

    bytes: int
    block: int
    part: int
    levels: tuple[int, ...]
    minimum: bool = False
    scales: tuple[int, int] | None = None
    minima: int = 0


Array = np.ndarray  # as kernels say it, and a tuple of several things
Tuple = tuple[Any, ...]
Type = Literal[
    "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0"
]
FORMS: dict[Type, Form] = {
    "q8_0": Form(34, 32, 32, (-127, 127)),
    "q6_k": Form(210, 256, 16, (-32, 31), scales=(-128, 127)),
    "q5_k": Form(176, 256, 32, (0, 31), True, (0, 63), 63),
    "q4_k": Form(144, 256, 32, (0, 15), True, (0, 63), 63),
    "q3_k": Form(110, 256, 16, (-4, 3), scales=(-32, 31)),
    "q2_k": Form(84, 256, 16, (0, 3), True, (0, 15), 15),
    "q4_0": Form(18, 32, 32, (-8, 7)),
    "q4_1": Form(20, 32, 32, (0, 15), True),
    "q5_0": Form(22, 32, 32, (-16, 15)),
    "q5_1": Form(24, 32, 32, (0, 31), True),
    "iq4_nl": Form(18, 32, 32, TABLE),
    "iq4_xs": Form(136, 256, 32, TABLE, scales=(-32, 31)),
    "tq1_0": Form(54, 256, 256, (-1, 1)),
    "tq2_0": Form(66, 256, 256, (-1, 1)),
}


@register
@dataclass(frozen=True)
class GGML(Stage):
    """A block type of ggml.

    type: as llama.cpp calls it.  damping: what is added to H's diagonal, in units of its mean; without input statistics all
    columns are alike.  A row's last block is filled up with zeros; llama.cpp itself takes whole blocks alone (see `fits`).
    """

    name: ClassVar[str] = "ggml"
    type: Type = "q4_k"
    damping: float = 0.03

    @property
    def needs_statistics(self) -> bool:
        """Always: without them llama.cpp does as well."""
        return True

    @property
    def form(self) -> Form:
        """What its blocks are made of."""
        return FORMS[self.type]

    def fits(self, columns: int) -> bool:
        """Whether rows of this length are whole blocks."""
        return columns % self.form.block == 0

    def _check(self) -> None:
        self._expect(0.0 < self.damping <= 1e6, "damping", "more than 0, at most 1e6")

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        return {"blocks": ("uint8", (shape[0], -(-shape[1] // self.form.block) * self.form.bytes))}

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """Every row has its own blocks."""
        return 1, {"blocks": self.layout(shape)["blocks"][1][1]}

    def _decode(self, packed: Packed) -> torch.Tensor:
        from gguf import GGMLQuantizationType, dequantize

        with np.errstate(all="ignore"):  # a file may hold any half floats
            values = dequantize(packed["blocks"].numpy(), GGMLQuantizationType[self.type.upper()])
        return torch.from_numpy(np.ascontiguousarray(values[:, : packed.shape[1]], np.float32))

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        plan = _plan(self.form, shape[1], stats, self.damping)
        parts = [self._rows(weight[first : first + ROWS].numpy(), plan) for first in range(0, shape[0], ROWS)]
        return self.packed(shape, {"blocks": torch.from_numpy(np.concatenate(parts))})

    def _rows(self, weight: np.ndarray, plan: _Plan) -> np.ndarray:
        """Blocks of some rows, uint8[rows, bytes]."""
        return _pack(self.type, _quantise(weight, plan, self.form))

    def price(
        self, weight: torch.Tensor, stats: InputStatistics, name: str, scratch: dict[str, Any]
    ) -> tuple[int, float, bool]:
        """Bytes, and damage estimated from a sample of the rows if that has at most half of them.  Infinite damage if rows
        are not whole blocks."""
        shape = (weight.shape[0], weight.shape[1])
        if not self.fits(shape[1]):
            return shape[0] * self.layout(shape)["blocks"][1][1], math.inf, True
        if shape[0] < 2 * SAMPLED:
            return super().price(weight, stats, name, scratch)
        self._checked(weight, stats, name)
        if "ggml rows" not in scratch:
            # What rows lose is nearly in proportion to what they weigh: one of each part by that stands for the part.
            weights = torch.ones(shape[0]) if stats.sensitivity is None else stats.sensitivity
            loud = (weights * (weight.square() @ stats.diagonal.float().abs())).double().numpy()
            parts, some = represented(loud)
            shares = np.array([loud[part].sum() for part in parts]) / np.maximum(loud[some], 1e-300)
            scratch["ggml rows"] = torch.from_numpy(some), torch.from_numpy(shares).float() * weights[some]
        rows, shares = scratch["ggml rows"]
        key = f"ggml {self.form.block} {self.damping}"
        if key not in scratch:
            scratch[key] = _plan(self.form, shape[1], stats, self.damping)
        sample = weight[rows].contiguous()
        packed = self.packed((len(rows), shape[1]), {"blocks": torch.from_numpy(self._rows(sample.numpy(), scratch[key]))})
        lost = damage(sample, self.decode(packed), InputStatistics(stats.hessian, stats.n, shares))
        return shape[0] * self.layout(shape)["blocks"][1][1], lost, True


class _Plan(NamedTuple):
    """What is the same for all rows.  order: of the blocks, as they are worked on.  hessian: H of their columns, damped,
    float32[n, n].  factor: M, strictly upper triangular.  moments: D."""

    order: np.ndarray
    hessian: np.ndarray
    factor: np.ndarray
    moments: np.ndarray


def _plan(form: Form, columns: int, stats: InputStatistics | None, damping: float) -> _Plan:
    blocks = -(-columns // form.block)
    full = blocks * form.block
    if stats is None or not stats.diagonal.any():
        one = np.eye(full, dtype=np.float32)
        return _Plan(np.arange(blocks), one, np.zeros_like(one), np.ones(full, np.float32))
    hessian = np.zeros((full, full), np.float64)
    hessian[:columns, :columns] = stats.hessian.double().numpy()
    hessian /= np.trace(hessian) / columns
    hessian[np.diag_indices(full)] += damping  # of columns that only fill up, that alone
    order = np.argsort(-hessian.diagonal().reshape(blocks, -1).mean(1), kind="stable")
    at = np.arange(full).reshape(blocks, -1)[order].reshape(-1)
    hessian = hessian[np.ix_(at, at)]
    factor, moments = unit_factor(hessian)
    return _Plan(order, hessian.astype(np.float32), factor, moments.astype(np.float32))


class _Found(NamedTuple):
    """Levels, float32[blocks, columns, rows].  scales, minima: as they are stored, float32[blocks, parts, rows].  base,
    base_minimum: the half floats that their integers are multiplied by, float32[blocks, rows]."""

    levels: np.ndarray
    scales: np.ndarray
    minima: np.ndarray
    base: np.ndarray
    base_minimum: np.ndarray


def _quantise(weight: np.ndarray, plan: _Plan, form: Form) -> _Found:
    """The blocks of some rows of the weight, float32[rows, columns]."""
    rows, blocks, each = len(weight), len(plan.order), form.block // form.part
    values = np.zeros((len(plan.hessian), rows), np.float32)
    values[: weight.shape[1]] = weight.T
    values = values.clip(-BEYOND, BEYOND).reshape(blocks, -1, rows)[plan.order]
    levels = np.array(form.levels, np.float32)
    between = levels[:0] if len(levels) == 2 else levels  # of two all integers between them are levels
    grid = levels[0], levels[-1], (between[1:] + between[:-1]) / 2, np.diff(between)
    of_scales = [np.float32(n) for n in (*(form.scales or (0, 0)), form.minima)]
    kind = (form.part, form.minimum, form.scales is not None, *of_scales)
    shapes = values.shape, (blocks, each, rows), (blocks, each, rows), (blocks, rows), (blocks, rows)
    found = _Found(*(np.zeros(shape, np.float32) for shape in shapes))
    target, error = values.copy(), np.zeros_like(values)
    flat, feedback = error.reshape(-1, rows), bool(plan.factor.any())
    at = [slice(b * form.block, (b + 1) * form.block) for b in range(blocks)]
    for b, own in enumerate(at):
        state = tuple(of_blocks[b] for of_blocks in found)
        if feedback and b:
            add_product(target[b], np.ascontiguousarray(plan.factor[: own.start, own]), flat[: own.start])
        inner = np.ascontiguousarray(plan.factor[own, own]), plan.moments[own]
        _first_block(values[b], target[b], error[b], inner, grid, kind, state)
    for _ in range(SWEEPS if feedback else 0):
        for b, own in enumerate(at):
            slope = np.zeros_like(error[b])
            add_product(slope, np.ascontiguousarray(plan.hessian[:, own]), flat)
            state = tuple(of_blocks[b] for of_blocks in found)
            _next_block(slope, error[b], np.ascontiguousarray(plan.hessian[own, own]), grid, kind, state)
    back = np.argsort(plan.order)
    return _Found(*(of_blocks[back] for of_blocks in found))


# The kernels run without fast-math: the order of every sum is fixed, and so are the bytes, on any machine.


@njit(nogil=True, cache=True)
def _nearest(x: Array, s: Array, grid: Tuple, out: Array) -> None:
    """The level nearest to each x / s, into `out`.  x: overwritten."""
    low, high, bounds, steps = grid
    for r in range(len(x)):
        x[r] = x[r] / s[r] if s[r] != 0 else np.float32(0)
    if len(bounds) == 0:
        for r in range(len(x)):
            out[r] = min(max(np.rint(x[r]), low), high)
        return
    out[:] = low
    for k in range(len(bounds)):
        bound, step = bounds[k], steps[k]
        for r in range(len(x)):
            out[r] += step if x[r] > bound else np.float32(0)


@njit(nogil=True, cache=True)
def _store(x: Array, base: Array, coded: bool, low: np.float32, high: np.float32) -> None:
    """What becomes of scales or minima: integers times `base`, or half floats, rounded to even, the largest at most."""
    if coded:
        for r in range(len(x)):
            x[r] = base[r] * min(max(np.rint(x[r] / base[r]), low), high) if base[r] != 0 else np.float32(0)
        return
    bits = x.view(np.int32)
    for r in range(len(x)):
        x[r] = min(max(x[r], np.float32(-LARGEST_HALF)), np.float32(LARGEST_HALF))
        if abs(x[r]) < np.float32(2.0**-14):
            x[r] = np.rint(x[r] * np.float32(2.0**24)) * np.float32(2.0**-24)
        else:
            bits[r] = (bits[r] + 0xFFF + ((bits[r] >> 13) & 1)) & ~0x1FFF


@njit(nogil=True, cache=True)
def _sums(t: Array, weight: Array, grid: Tuple, s: Array, m: Array, sums: Array) -> None:
    """Of targets, float32[columns, rows], on the grid of scale s and minimum m: the weighed squared error, and the sums of
    levels, their squares, targets, products of both, and weights: float32[6, rows]."""
    rows = len(s)
    x, level = np.empty(rows, np.float32), np.empty(rows, np.float32)
    sums[:] = 0
    for c in range(len(t)):
        w, column = weight[c], t[c]
        for r in range(rows):
            x[r] = column[r] + m[r]
        _nearest(x, s, grid, level)
        for r in range(rows):
            lost, of = column[r] + m[r] - s[r] * level[r], w * level[r]
            sums[0, r] += w * lost * lost
            sums[1, r] += of
            sums[2, r] += of * level[r]
            sums[3, r] += w * column[r]
            sums[4, r] += of * column[r]
            sums[5, r] += w


@njit(nogil=True, cache=True)
def _keep(sums: Array, new: Tuple, best: Array, s: Array, m: Array) -> None:
    """Take the new scales and minima over where their error is less than the best one."""
    for r in range(len(s)):
        better = sums[0, r] < best[r]
        best[r] = sums[0, r] if better else best[r]
        s[r] = new[0][r] if better else s[r]
        m[r] = new[1][r] if better else m[r]


@njit(nogil=True, cache=True)
def _search(t: Array, weight: Array, grid: Tuple, kind: Tuple, s: Array, m: Array) -> None:
    """The scale and minimum, into s and m, of least weighed squared error that is found for targets, float32[columns, rows]:
    from several starts by turns, nearest levels, then the least-squares grid for those levels."""
    _, minimum, coded, _, _, _ = kind
    low, high, rows = grid[0], grid[1], t.shape[1]
    least, most = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for r in range(rows):
        least[r] = np.float32(0) if coded and minimum else t[0, r]  # a minimum that is coded is not negative
        most[r] = t[0, r]
    for c in range(len(t)):
        for r in range(rows):
            least[r], most[r] = min(least[r], t[c, r]), max(most[r], t[c, r])
    best, sums = np.full(rows, np.inf, np.float32), np.empty((6, rows), np.float32)
    new_s, new_m = np.empty(rows, np.float32), np.zeros(rows, np.float32)
    narrowest = NARROWEST if high - low > 2 else NARROWEST / 2  # of three levels, most values take an outer one
    sides = 1 if minimum else 2  # without a minimum, the larger side takes the lowest level or the highest
    for start in range(STARTS * sides):
        share = np.float32(1 - (1 - narrowest) * (start // sides) / (STARTS - 1))
        for r in range(rows):
            if minimum:
                new_s[r] = share * (most[r] - least[r]) / (high - low)
                new_m[r] = new_s[r] * (high + low) / 2 - (least[r] + most[r]) / 2
                new_m[r] = max(new_m[r], np.float32(0)) if coded else new_m[r]
            else:
                new_s[r] = share * (most[r] if most[r] > -least[r] else least[r]) / (low if start % 2 == 0 else high)
        for _ in range(TURNS):
            _sums(t, weight, grid, new_s, new_m, sums)
            _keep(sums, (new_s, new_m), best, s, m)
            for r in range(rows):
                of_levels, squares, of_targets, products, all_ = sums[1, r], sums[2, r], sums[3, r], sums[4, r], sums[5, r]
                if squares > 0:
                    free = products / squares
                    spread = squares - of_levels * of_levels / all_ if minimum else np.float32(0)
                    if spread > 0:
                        new_s[r] = (products - of_levels * of_targets / all_) / spread
                        new_m[r] = (new_s[r] * of_levels - of_targets) / all_
                    if not minimum or (coded and new_m[r] < 0):
                        new_s[r], new_m[r] = free, np.float32(0)


@njit(nogil=True, cache=True)
def _snap(t: Array, weight: Array, grid: Tuple, kind: Tuple, base: Tuple, s: Array, m: Array) -> None:
    """Of the integers next to the scale s, and the minimum that is best with each, those of least error; in place."""
    _, minimum, _, low, high, top = kind
    rows = len(s)
    best, sums, old = np.full(rows, np.inf, np.float32), np.empty((6, rows), np.float32), (s.copy(), m.copy())
    new_s, new_m = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for step in (-1, 0, 1):
        for r in range(rows):
            new_s[r], new_m[r] = old[0][r] + step * base[0][r], old[1][r]
        _store(new_s, base[0], True, low, high)
        if minimum:
            _sums(t, weight, grid, new_s, new_m, sums)
            for r in range(rows):
                new_m[r] = (new_s[r] * sums[1, r] - sums[3, r]) / sums[5, r]
            _store(new_m, base[1], True, np.float32(0), top)
        _sums(t, weight, grid, new_s, new_m, sums)
        _keep(sums, (new_s, new_m), best, s, m)


@njit(nogil=True, cache=True)
def _first_block(weight: Array, target: Array, error: Array, inner: Tuple, grid: Tuple, kind: Tuple, state: Tuple) -> None:
    """Quantise a block's columns one after the other, and pass each error on to those that follow.

    weight, target, error: float32[columns, rows]; target: with the errors before the block.  inner: M and D of the columns.
    state: levels, scales, minima and the bases of scales and minima, all overwritten.
    """
    part, minimum, coded, low, high, top = kind
    levels, scales, minima, base, base_minimum = state
    factor, moments = inner
    columns, rows = weight.shape
    x = np.empty(rows, np.float32)
    if coded:
        for k in range(len(scales)):
            own = slice(k * part, (k + 1) * part)
            _search(target[own], moments[own], grid, kind, scales[k], minima[k])
            for r in range(rows):
                base[r] = scales[k, r] if abs(scales[k, r]) > abs(base[r]) else base[r]
                base_minimum[r] = max(base_minimum[r], minima[k, r])
        for r in range(rows):
            base[r] /= low if low < 0 else high
            base_minimum[r] /= top if minimum else np.float32(1)
        _store(base, base, False, low, high)
        _store(base_minimum, base, False, low, high)
    for k in range(len(scales)):
        own, s, m = slice(k * part, (k + 1) * part), scales[k], minima[k]
        _search(target[own], moments[own], grid, kind, s, m)
        if coded:
            _snap(target[own], moments[own], grid, kind, (base, base_minimum), s, m)
        else:
            _store(s, base, False, low, high)
            _store(m, base, False, low, high)
        for c in range(k * part, (k + 1) * part):
            for r in range(rows):
                x[r] = target[c, r] + m[r]
            _nearest(x, s, grid, levels[c])
            for r in range(rows):
                error[c, r] = weight[c, r] - (s[r] * levels[c, r] - m[r])
            for n in range(c + 1, columns):
                share = factor[c, n]
                if share != 0:
                    for r in range(rows):
                        target[n, r] += share * error[c, r]


@njit(nogil=True, cache=True)
def _change(first: int, change: Array, c: int, hessian: Array, error: Array, slope: Array) -> None:
    """Add `change` to column c: its error, and the slope of the block's columns from `first` on."""
    for r in range(len(change)):
        error[c, r] -= change[r]
    for n in range(first, len(slope)):
        h = hessian[c, n]
        for r in range(len(change)):
            slope[n, r] -= h * change[r]


@njit(nogil=True, cache=True)
def _next_block(slope: Array, error: Array, hessian: Array, grid: Tuple, kind: Tuple, state: Tuple) -> None:
    """Choose a block's scales, minima and levels once more.  slope: H e of its columns, for the errors e of all columns,
    float32[columns, rows], overwritten.  hessian: H of its columns.  error, state: as in `_first_block`."""
    part, minimum, coded, low, high, top = kind
    levels, scales, minima, base, base_minimum = state
    rows = error.shape[1]
    x, change, through = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    new_s, new_m, level = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    sums = np.empty((4, rows), np.float32)
    ll, l1, le, oe = sums[0], sums[1], sums[2], sums[3]
    for k in range(len(scales)):
        own, s, m = range(k * part, (k + 1) * part), scales[k], minima[k]
        sums[:], oo = 0, np.float32(0)
        for c in own:  # l^T H l, l^T H 1, l^T H e, 1^T H e and 1^T H 1 of the part's levels l
            through[:] = 0
            for n in own:
                h = hessian[c, n]
                oo += h
                for r in range(rows):
                    through[r] += h * levels[n, r]
            for r in range(rows):
                ll[r] += through[r] * levels[c, r]
                l1[r] += through[r]
                le[r] += slope[c, r] * levels[c, r]
                oe[r] += slope[c, r]
        for r in range(rows):  # e becomes e - (ds l - dm): least where its slope along l and 1 is zero
            spread = ll[r] * oo - l1[r] * l1[r] if minimum else ll[r] * oo
            ds = (le[r] * oo - l1[r] * oe[r] if minimum else le[r] * oo) / spread if spread > 1e-5 * ll[r] * oo else 0
            new_s[r], new_m[r] = s[r] + np.float32(ds), m[r]
        _store(new_s, base, coded, low, high)
        if minimum:
            for r in range(rows):
                new_m[r] = m[r] + (l1[r] * (new_s[r] - s[r]) - oe[r]) / oo
            _store(new_m, base_minimum, coded, np.float32(0), top)
        for r in range(rows):
            ds, dm = new_s[r] - s[r], new_m[r] - m[r]
            more = ll[r] * ds * ds - 2 * l1[r] * ds * dm + oo * dm * dm
            if not more < 2 * (le[r] * ds - oe[r] * dm):  # rounded, it may be worse
                new_s[r], new_m[r] = s[r], m[r]
        for c in own:
            for r in range(rows):
                change[r] = (new_s[r] - s[r]) * levels[c, r] - (new_m[r] - m[r])
            _change(k * part, change, c, hessian, error, slope)
        s[:], m[:] = new_s, new_m
        for c in own:
            for r in range(rows):
                x[r] = s[r] * levels[c, r] + slope[c, r] / hessian[c, c]
            _nearest(x, s, grid, level)
            for r in range(rows):
                change[r] = s[r] * (level[r] - levels[c, r])
                levels[c, r] = level[r]
            _change(c + 1, change, c, hessian, error, slope)


def _pack(kind: Type, found: _Found) -> np.ndarray:
    """Blocks as ggml lays them out, uint8[rows, bytes]."""
    from gguf import GGMLQuantizationType, quantize

    form, rows = FORMS[kind], found.levels.shape[2]
    levels, scales, minima = (values.transpose(2, 0, 1).reshape(-1, values.shape[1]) for values in found[:3])
    base, base_minimum = (values.T.reshape(-1, 1) for values in found[3:])

    def halves(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)

    def one_bit(bits: np.ndarray) -> np.ndarray:
        """Bits of 32 columns at a time: byte i has those of the columns i, i + 32, ..."""
        return np.packbits(bits.reshape(len(bits), -1, 32), axis=1, bitorder="little").reshape(len(bits), -1)

    codes = (levels - form.levels[0] if len(form.levels) == 2 else np.searchsorted(form.levels, levels)).astype(np.uint8)
    d, dmin = halves(base), halves(base_minimum)
    with np.errstate(all="ignore"):
        sc, mn = (np.nan_to_num(np.rint(a / b)).astype(np.int64) for a, b in ((scales, base), (minima, base_minimum)))
    if form.levels == (-1, 1):  # gguf's own quantiser takes the largest |w| for d, and that is the scale
        return np.asarray(quantize(levels * scales, GGMLQuantizationType[kind.upper()])).reshape(rows, -1)
    if form.scales is None:
        parts = [halves(scales)] + ([halves(-minima)] if form.minimum else [])
        if kind == "q8_0":
            parts.append(levels.astype(np.int8).view(np.uint8))
        else:
            parts += [np.packbits(codes >> 4, axis=1, bitorder="little")] if kind in ("q5_0", "q5_1") else []
            parts.append(_together(codes & 15, 1, 4))
    elif kind == "q2_k":
        parts = [sc | mn << 4, _together(codes, 2, 2), d, dmin]
    elif kind == "q3_k":
        sc += 32
        low = [_together(codes & 3, 2, 2), _together(sc & 15, 1, 4), _together(sc >> 4, 1, 2)]
        parts = [one_bit(codes >> 2), *low, d]
    elif kind == "q6_k":
        parts = [_together(codes & 15, 2, 4), _together(codes >> 4, 2, 2), sc.astype(np.int8).view(np.uint8), d]
    elif kind == "iq4_xs":
        sc += 32
        high = ((sc >> 4) << 2 * np.arange(8)).sum(1, keepdims=True).astype("<u2").view(np.uint8)
        parts = [d, high, sc[:, ::2] & 15 | (sc[:, 1::2] & 15) << 4, _together(codes, 8, 4)]
    else:
        both = [sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6, sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4]
        fifth = [one_bit(codes >> 4)] if kind == "q5_k" else []
        parts = [d, dmin, *both, *fifth, _together(codes & 15, 4, 4)]
    return np.concatenate([part.astype(np.uint8) for part in parts], 1).reshape(rows, -1)


def _together(codes: np.ndarray, groups: int, bits: int) -> np.ndarray:
    """Codes of a few bits, [blocks, n], in bytes: of each group 8 / bits stretches side by side, the first one lowest."""
    many = 8 // bits
    shifted = codes.reshape(len(codes), groups, many, -1) << bits * np.arange(many, dtype=codes.dtype)[:, None]
    return np.asarray(np.bitwise_or.reduce(shifted, 2).reshape(len(codes), -1))
