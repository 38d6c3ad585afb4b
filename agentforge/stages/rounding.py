"""Round to nearest: the baseline of every table.

A weight is cut along its input dimension into groups (the last one may be shorter), and every group gets a grid of
equally spaced levels:

* symmetric: w ~ (code - z) * scale with z = 2**(bits-1) - 1 and codes 0 .. 2 z: zero is a level, one code stays unused;
* asymmetric: w ~ code * scale + minimum with codes 0 .. 2**bits - 1.

clip="none" lays the grid from end to end of the group.  clip="mse" looks for the grid of least squared error: it tries
`STARTS` narrower and narrower grids and goes on by turns (nearest codes, then the least-squares grid for those codes,
as Lloyd's algorithm does) until the error stops falling; the asymmetric search, with its two unknowns, from every
start, the symmetric one from the best.  The tests hold the result against the true optimum.

Scales and minima are half floats behind one power of two per tensor; codes are chosen for the grid as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numba import njit

from ..errors import BadArtifact
from ..planes import Packed, power_of_two_exponent, times_power_of_two
from .base import Layout, Stage, register

STARTS = 6  # starting grids of the search for the least squared error
NARROWEST = 0.4  # the narrowest of them, as a share of the group's range
ROUNDS = 6  # most turns of codes and grid from there


@register
@dataclass(frozen=True)
class Rounding(Stage):
    """Round to nearest on one grid per group.

    bits: 2 to 8.  group: weights per grid along the input dimension, 0 for one grid per row (per output channel).
    symmetric: grids with a level at zero and no minimum to store.  clip: "none" or "mse".
    """

    name: ClassVar[str] = "rounding"
    trains = "floats"
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    clip: Literal["none", "mse"] = "none"

    def _check(self) -> None:
        self._expect(2 <= self.bits <= 8, "bits", "2 to 8")
        self._expect(self.group >= 0, "group", "1 or more, or 0 for one grid per row")

    def columns_a_grid(self, columns: int) -> int:
        """Weights a grid in a row of this length."""
        return min(self.group or columns, columns)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        grids = (shape[0], math.ceil(shape[1] / self.columns_a_grid(shape[1])))
        planes: Layout = {"codes": (f"uint{self.bits}", shape), "scale": ("float16", grids)}
        if not self.symmetric:
            planes["minimum"] = ("float16", grids)
        planes["exponent"] = ("uint8", (1,))
        return planes

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """Every row has its own codes and grids."""
        return 1, {name: size[1] for name, (_, size) in self.layout(shape).items() if len(size) == 2}

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        exponent = power_of_two_exponent(weight)
        scaled = times_power_of_two(weight, exponent).numpy()
        del weight  # as large as what is scaled
        group = self.columns_a_grid(shape[1])
        scale, minimum = _fit(scaled, group, self.bits, self.symmetric, self.clip == "mse")
        # What is stored are half floats: the codes are chosen for those.
        half_scale, half_minimum = scale.astype(np.float16), minimum.astype(np.float16)
        codes = np.empty(shape, np.uint8)
        _assign(
            scaled, group, self.bits, self.symmetric, half_scale.astype(np.float32), half_minimum.astype(np.float32), codes
        )
        return self.packed(shape, {"codes": codes, "scale": half_scale, "minimum": half_minimum}, exponent)

    def _decode(self, packed: Packed) -> torch.Tensor:
        zero = 2 ** (self.bits - 1) - 1
        if self.symmetric and int(packed["codes"].max()) > 2 * zero:
            raise BadArtifact(f"plane codes: holds {2 * zero + 1}; a symmetric code is at most {2 * zero}")
        return self.dense(packed, packed.floats)

    def dense(self, packed: Packed, floats: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(codes - zero) * scale, or codes * scale + minimum, of each group."""
        rows, columns = packed.shape
        group = self.columns_a_grid(columns)
        scale = floats["scale"].unsqueeze(2)
        codes = packed["codes"].to(scale.device, torch.float32)
        if columns % group:  # padding copies even if there is nothing to pad
            codes = torch.nn.functional.pad(codes, (0, -columns % group))
        codes = codes.reshape(rows, -1, group)
        if self.symmetric:
            values = codes.sub_(2 ** (self.bits - 1) - 1).mul_(scale)
        else:
            values = codes.mul_(scale).add_(floats["minimum"].unsqueeze(2))
        return times_power_of_two(values.reshape(rows, -1)[:, :columns], 128 - int(packed["exponent"]), in_place=True)


# The kernels run without fast-math: the order of every sum is fixed, and so are the bytes, on any machine.


# Minimum and maximum do not depend on the order; told that there are no NaNs, the compiler may take them eight at a time.
@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _ends(w: np.ndarray) -> tuple[np.float32, np.float32]:
    """Least and largest weight."""
    low, high = w[0], w[0]
    for i in range(len(w)):
        low = min(low, w[i])
        high = max(high, w[i])
    return low, high


@njit(nogil=True, cache=True)
def _fit(weight: np.ndarray, group: int, bits: int, symmetric: bool, search: bool) -> tuple[np.ndarray, np.ndarray]:
    """The grid of every group: scale and minimum, float32[out, groups]; the minimum is 0 if symmetric."""
    rows, columns = weight.shape
    groups = (columns + group - 1) // group
    scales = np.zeros((rows, groups), np.float32)
    minima = np.zeros((rows, groups), np.float32)
    top = np.float32(2**bits - 1)
    zero = np.float32(2 ** (bits - 1) - 1)
    for r in range(rows):
        for k in range(groups):
            w = weight[r, k * group : min(columns, (k + 1) * group)]
            low, high = _ends(w)
            if symmetric:
                scale = max(high, -low) / zero
                minimum = np.float32(0.0)
            else:
                scale = (high - low) / top
                minimum = low
            if search and scale > 0:
                if symmetric:
                    scale = _search_symmetric(w, scale, zero)
                else:
                    scale, minimum = _search_asymmetric(w, scale, minimum, top)
            scales[r, k] = scale
            minima[r, k] = minimum
    return scales, minima


@njit(nogil=True, cache=True)
def _search_symmetric(w: np.ndarray, widest: np.float32, zero: np.float32) -> np.float32:
    """The scale of least squared error for codes -zero .. zero."""
    best_scale = widest
    best_error = np.float32(np.inf)
    scale = widest
    for turn in range(STARTS + ROUNDS):
        inverse = np.float32(1.0) / scale
        wq, qq, error = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for x in w:
            q = min(max(np.rint(x * inverse), -zero), zero)
            d = x - q * scale
            wq += x * q
            qq += q * q
            error += d * d
        if error < best_error:
            best_error, best_scale = error, scale
            best_fit = wq / qq if qq > 0 else scale
        elif turn >= STARTS:
            break
        if turn < STARTS - 1:
            scale = widest * np.float32(1.0 - (1.0 - NARROWEST) * (turn + 1) / (STARTS - 1))
        else:
            scale = best_fit
    return best_scale


@njit(nogil=True, cache=True)
def _search_asymmetric(
    w: np.ndarray, widest: np.float32, lowest: np.float32, top: np.float32
) -> tuple[np.float32, np.float32]:
    """The scale and minimum of least squared error for codes 0 .. top."""
    n = np.float32(len(w))
    half = np.float32(0.5) * top
    middle = lowest + half * widest
    best_scale, best_minimum = widest, lowest
    best_error = np.float32(np.inf)
    for start in range(STARTS):
        scale = widest * np.float32(1.0 - (1.0 - NARROWEST) * start / (STARTS - 1))
        minimum = middle - half * scale
        last_error = np.float32(np.inf)
        for _ in range(ROUNDS):
            inverse = np.float32(1.0) / scale
            # Sums about the middle of codes and weights: no cancellation in the least-squares fit.
            sq, sw, qq, wq = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            error = np.float32(0.0)
            for x in w:
                q = min(max(np.rint((x - minimum) * inverse), np.float32(0.0)), top)
                d = x - (q * scale + minimum)
                error += d * d
                q -= half
                y = x - middle
                sq += q
                sw += y
                qq += q * q
                wq += y * q
            if error < best_error:
                best_error, best_scale, best_minimum = error, scale, minimum
            spread = qq - sq * sq / n
            if error >= last_error * np.float32(0.99) or spread <= 0:
                break
            last_error = error
            scale = (wq - sq * sw / n) / spread
            if scale <= 0:
                break
            minimum = middle + (sw - scale * sq) / n - half * scale
    return best_scale, best_minimum


@njit(nogil=True, cache=True)
def _assign(
    weight: np.ndarray, group: int, bits: int, symmetric: bool, scales: np.ndarray, minima: np.ndarray, codes: np.ndarray
) -> None:
    """The nearest code of every weight on the grids as they are stored."""
    rows, columns = weight.shape
    zero = np.float32(2 ** (bits - 1) - 1)
    top = np.float32(2 * zero) if symmetric else np.float32(2**bits - 1)
    for r in range(rows):
        for k in range(scales.shape[1]):
            scale = scales[r, k]
            origin = -zero * scale if symmetric else minima[r, k]
            first, last = k * group, min(columns, (k + 1) * group)
            if scale == 0:
                codes[r, first:last] = np.uint8(zero) if symmetric else 0
                continue
            w, out = weight[r, first:last], codes[r, first:last]
            for i in range(len(w)):
                q = np.rint((w[i] - origin) / scale)
                q = q if q > 0 else np.float32(0.0)
                # By way of int32, which has vector instructions.
                out[i] = np.int32(q if q < top else top)
