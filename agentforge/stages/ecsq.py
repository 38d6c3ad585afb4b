"""Entropy-coded scalar quantisation: whole multiples of a step, in as many bits as their entropy.

At high rates the entropy of a uniformly quantised value is within log2(2 pi e / 12) / 2 = 0.254 bits of what any code of any
length could reach at the same squared error (Gish & Pierce 1968), whatever the distribution.  So there is nothing to
search for but the steps and the errors' direction:

* The damage to a layer's outputs is tr(G E H E^T): E the error of the weight, H = E[x x^T] of its inputs, G the curvature
  of the loss in its outputs, of which the diagonal is taken ("sensitivity").  With H = M D M^T, M unit triangular, columns
  that are rounded one after the other, each with M's share of the errors before it in its target, leave
  sum_ij g_i D_j e_ij^2 (LDLQ: Chee et al. 2023, sections 3 and 4; GPTQ does the same), e_ij the rounding of one value.
* Under a budget of bits every value should then be damaged alike (reverse water-filling: Cover & Thomas, theorem 10.3.3), so
  that its step goes with 1 / sqrt(g_i D_j).  Rows get only half of that in the exponent, (g_i)^-1/4: their curvatures are
  the noisier estimate, and the other half did not pay when it was measured.
* In queries and keys errors of the outputs of one head make up for each other, too: there G = M' D' M'^T is not diagonal
  but in blocks, and a row's target has the share M' of what the rows before it left (Tseng et al. 2025, YAQA, section 4).
  D'_i takes g_i's place, in the whole exponent: on tokens that it was not made of, half of the damage is gone.
* Rounding towards zero a little costs few errors and saves more bits (a dead zone: Sullivan 1996): 0.44 is added before
  the fraction is cut off, instead of one half.

WaterSIC (arXiv 2603.04956) has the same core, found independently.

Steps are stored as a base, and an exponent in eighths of octaves for each row and column.  Codes are zigzag integers
(0, -1, 1, -2, ...), entropy-coded on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numba import njit

from ..bits import unzigzag, zigzag
from ..entropy import expected_bytes
from ..planes import FLOAT32_MAX, Packed, Plane
from .base import SAMPLED, InputStatistics, Layout, Stage, register, represented
from .propagation import pass_down, pass_on, quantised, unit_factor

OCTAVE = 8  # exponents of steps in one
HEADS_DAMPING = 0.1  # what is added to the diagonal of the outputs' curvature, in units of its mean
LARGEST = (1 << 15) - 1  # the largest multiple of a step that 16 bits hold beside its sign
# A weight, float32[in, out]; M, strictly upper triangular; the factors of rows' and of columns' steps; and M' of each head,
# float32[heads, size, size], none for a diagonal G.
About = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
DIAGONAL = np.zeros((0, 1, 1), np.float32)


class Stepped(Stage):
    """A stage of whole multiples of steps, one for each row times one for each column.

    step, damping, gains: as `ECSQ` has them.
    """

    trains = "floats"
    needs_statistics = needs_sensitivity = True
    step: float
    damping: float
    gains: bool

    @property
    def coding(self) -> str:
        """Of the multiples, zigzag."""
        return "~uint16"

    def _check(self) -> None:
        self._expect(2**-12 <= self.step <= 2**6, "step", "0.000244 to 64")
        self._expect(0.0 < self.damping <= 1e6, "damping", "more than 0, at most 1e6")

    def between(self, other: Stage, share: float) -> Stage | None:
        """Of stages that differ by their step alone."""
        mine, step = asdict(self), getattr(other, "step", None)
        if step is None or type(self)(**mine | {"step": step}) != other:
            return None
        return type(self)(**mine | {"step": round(self.step ** (1 - share) * step**share, 6)})

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        rows, columns = shape
        planes: Layout = {
            "codes": (self.coding, (rows, columns)),
            "rows": ("~uint8", (rows,)),
            "columns": ("~uint8", (columns,)),
            "step": ("float32", (1,)),
        }
        return planes | ({"gains": ("float16", (rows,))} if self.gains else {})

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """Every row has its own codes and factors."""
        return 1, {"codes": shape[1], "rows": 1} | ({"gains": 1} if self.gains else {})

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        plan = self._plan(weight.numpy(), stats)
        factor, of_rows, of_columns, step = plan.factor, plan.of_rows, *self._reaching(plan)
        values = np.ascontiguousarray(weight.numpy().T)
        codes = self._codes((values, factor, *_steps(of_rows, of_columns, step), plan.heads), plan.weights)
        planes = {
            "codes": zigzag(torch.from_numpy(np.ascontiguousarray(codes.T))),
            "rows": torch.from_numpy(of_rows),
            "columns": torch.from_numpy(of_columns),
            "step": torch.tensor([step]),
            "gains": torch.ones(shape[0], dtype=torch.float16),
        }
        packed = self.packed(shape, planes)
        if not self.gains:
            return packed
        planes["gains"] = _gains(weight, self.decode(packed), stats)
        return self.packed(shape, planes)

    reach: ClassVar[float]  # the largest multiple

    def _codes(self, about: About, weights: np.ndarray) -> np.ndarray:
        """The multiples, int32[in, out], of the weight.  weights: of the rows, as `_of_outputs` gives them."""
        raise NotImplementedError

    def _plan(self, values: np.ndarray, stats: InputStatistics | None) -> _Plan:
        rows, columns = values.shape
        factor, of_columns = np.zeros((columns, columns), np.float32), np.zeros(columns)
        if stats is not None and stats.diagonal.any():
            factor, moments = _factor(stats.hessian, self.damping)
            of_columns = -np.log2(moments) / 2
        weights, heads = _of_outputs(rows, stats)
        of_rows = _exponents(np.log2(weights) / (-2 if len(heads) else -4))
        rms = math.sqrt(float(np.square(values, dtype=np.float64).mean()))
        with np.errstate(over="ignore"):  # infinite: the coarsest step there is
            largest = np.abs(values / _powers(of_rows)[:, None]).max(0)
        return _Plan(factor, weights, heads, of_rows, _exponents(of_columns), rms, largest)

    def _reaching(self, plan: _Plan) -> tuple[np.ndarray, np.float32]:
        """Exponents of the columns' steps, and the step: those of a plan, but coarser where the largest value of a column
        would be more than half of all multiples there are.  The other half is for what other columns pass on."""
        step = np.float32(min(self.step * plan.rms, FLOAT32_MAX))
        with np.errstate(all="ignore"):  # of zeros
            least = np.nan_to_num(np.ceil(OCTAVE * np.log2(plan.largest / (float(step) * self.reach / 2))) + 128, nan=0)
        return np.clip(np.maximum(plan.of_columns, least), 0, 255).astype(np.uint8), step

    def _decode(self, packed: Packed) -> torch.Tensor:
        return self.dense(packed, packed.floats).clamp_(-FLOAT32_MAX, FLOAT32_MAX)

    def dense(self, packed: Packed, floats: Any) -> torch.Tensor:
        """The weight as a function of step and gains."""
        rows, columns = factors(packed)
        # No step is infinite: a code of zero stands for zero.
        column_steps = (columns * floats["step"]).clamp(-FLOAT32_MAX, FLOAT32_MAX)
        dense: torch.Tensor = unzigzag(packed["codes"]).to(torch.float32) * rows[:, None] * column_steps
        return dense * floats["gains"][:, None] if self.gains else dense


@register
@dataclass(frozen=True)
class ECSQ(Stepped):
    """Entropy-coded scalar quantisation.

    step: the geometric mean of all steps, in units of the weight's root mean square; the entropy of Gaussian weights is
    about 2.05 - log2(step) bits.  rounding: what is added before the fraction is cut off, 0.5 to the nearest.  damping:
    what is added to H's diagonal, in units of its mean; without input statistics all columns are alike.  gains: one half
    float per row that its codes are multiplied by: the factor that leaves least damage, or what training has made of it.
    """

    name: ClassVar[str] = "ecsq"
    reach: ClassVar[float] = LARGEST
    step: float = 0.6
    rounding: float = 0.44
    damping: float = 0.1
    gains: bool = False

    def _check(self) -> None:
        super()._check()
        self._expect(0.0 < self.rounding <= 0.5, "rounding", "more than 0, at most 0.5")

    def _codes(self, about: About, weights: np.ndarray) -> np.ndarray:
        return quantised(about[0], about[1], partial(_round_block, about, np.float32(self.rounding)))

    def price(
        self, weight: torch.Tensor, stats: InputStatistics, name: str, scratch: dict[str, Any]
    ) -> tuple[int, float, bool]:
        """Bytes and damage, estimated from a sample of the rows if that has at most half of them."""
        return self.priced(weight, stats, name, scratch, expected_bytes)

    def priced(
        self,
        weight: torch.Tensor,
        stats: InputStatistics,
        name: str,
        scratch: dict[str, Any],
        expected: Callable[[np.ndarray, int, int], float],
    ) -> tuple[int, float, bool]:
        """`price`, with codes of a sample that take the bytes that `expected` gives."""
        if len(weight) < 2 * SAMPLED or self.gains:  # a sample would save less than half
            return super().price(weight, stats, name, scratch)
        key = f"ecsq {self.damping}"
        if key not in scratch:
            scratch[key] = _Sample.of(self._checked(weight, stats, name).numpy(), stats, self._plan(weight.numpy(), stats))
        sample: _Sample = scratch[key]
        of_columns, step = self._reaching(sample.plan)
        rows, columns = _steps(sample.plan.of_rows, of_columns, step)
        codes = self._codes((sample.values, sample.plan.factor, rows, columns, sample.plan.heads), sample.plan.weights)
        error = torch.from_numpy(codes * (rows * columns[:, None]) - sample.values).to(torch.float32)
        lost = ((stats.hessian @ error) * error).sum(0).double().numpy()
        stored = zigzag(torch.from_numpy(np.ascontiguousarray(codes.T))).numpy()
        with np.errstate(all="ignore"):  # a step may be zero
            multiples = float(np.nan_to_num(sample.plan.largest / columns).max())
        largest = 2 * int(min(multiples + self.rounding, LARGEST))
        size = sample.beside + expected(stored, len(weight), max(largest, int(stored.max())))
        return math.ceil(size), float(lost @ sample.shares) / 2, False


class _Plan(NamedTuple):
    """What is the same for every step.  factor: M.  weights, heads: as `_of_outputs` gives them.  of_rows, of_columns:
    exponents of the steps.  rms: of the weight.  largest: of each column's values, in units of their rows' factors."""

    factor: np.ndarray
    weights: np.ndarray
    heads: np.ndarray
    of_rows: np.ndarray
    of_columns: np.ndarray
    rms: float
    largest: np.ndarray


class _Sample(NamedTuple):
    """Rows that stand for all rows of a weight.

    A row's bits depend on how large its values are beside its step, as does its damage in units of that step: all rows are
    sorted by that, and of each of `SAMPLED` parts one row is taken.

    values: float32[in, rows].  plan: of the weight, exponents of these rows alone.  shares: what a row's error counts for,
    its whole part with it.  beside: bytes of the planes that are no codes.
    """

    values: np.ndarray
    plan: _Plan
    shares: np.ndarray
    beside: int

    @classmethod
    def of(cls, values: np.ndarray, stats: InputStatistics, plan: _Plan) -> _Sample:
        """The rows that stand for `values`, float32[out, in]."""
        squares = np.square(_powers(plan.of_rows), dtype=np.float64)
        loudness = np.square(values, dtype=np.float64).mean(1) / squares
        parts, some = represented(loudness)
        weights = squares * plan.weights
        shares = np.array([weights[part].sum() for part in parts]) / squares[some]
        exponents = (Plane("", torch.from_numpy(plane), "~uint8") for plane in (plan.of_rows, plan.of_columns))
        beside = sum(plane.stored().nbytes for plane in exponents) + 4
        chosen = np.ascontiguousarray(values[some].T)
        sampled = plan._replace(weights=plan.weights[some], heads=DIAGONAL, of_rows=plan.of_rows[some])
        return cls(chosen, sampled, shares, beside)


def factors(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """What the steps of rows and columns are multiplied by: float32[out], float32[in]."""
    device = packed["rows"].device
    rows, columns = _steps(packed["rows"].cpu().numpy(), packed["columns"].cpu().numpy(), np.float32(1))
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)


def _gains(weight: torch.Tensor, decoded: torch.Tensor, stats: InputStatistics | None) -> torch.Tensor:
    """The factor of each row that leaves least of its outputs' error: w H d^T / d H d^T for w of the weight and d decoded;
    float16[out], 1 if nothing is left of a row."""
    through = decoded.double() if stats is None else decoded.double() @ stats.hessian.double()
    found = (through * weight).sum(1) / (through * decoded).sum(1)
    return torch.where(found.isfinite() & (found > 0), found.clamp(2**-10, 2**10), torch.ones_like(found)).to(torch.float16)


@lru_cache(maxsize=4)  # by the tensor's identity: one weight is tried with many steps, and three share one H
def _factor(hessian: torch.Tensor, damping: float) -> tuple[np.ndarray, np.ndarray]:
    return unit_factor(hessian.numpy(), damping)


def _of_outputs(rows: int, stats: InputStatistics | None) -> tuple[np.ndarray, np.ndarray]:
    """g_i, or D'_i: float64[out], none of them zero, and all alike if nothing is known of them; and M', of each head."""
    if stats is None or stats.sensitivity is None or not stats.sensitivity.any():
        return np.ones(rows), DIAGONAL
    if stats.curvature is None:
        sensitivity = stats.sensitivity.double()
        return (sensitivity + 1e-3 * sensitivity.mean()).numpy(), DIAGONAL
    added = HEADS_DAMPING * stats.sensitivity.double().mean()
    damped = stats.curvature.double() + added * torch.eye(stats.curvature.shape[1])
    heads, weights = zip(*(unit_factor(one.numpy()) for one in damped), strict=True)
    return np.concatenate(weights), np.stack(heads)


def _exponents(logarithms: np.ndarray) -> np.ndarray:
    """Eighths of octaves around the mean, 128 for none: uint8[n]."""
    return np.asarray(np.clip(np.rint(OCTAVE * (logarithms - logarithms.mean())) + 128, 0, 255), np.uint8)


def _steps(rows: np.ndarray, columns: np.ndarray, step: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The rows' factors, and the columns' times `step`: float32 each."""
    return _powers(rows), np.minimum(_powers(columns).astype(np.float64) * step, FLOAT32_MAX).astype(np.float32)


def _powers(exponents: np.ndarray) -> np.ndarray:
    """What exponents of steps stand for: float32[n]."""
    powers = np.array([2.0 ** ((e - 128) / OCTAVE) for e in range(256)], np.float32)
    return np.asarray(powers[exponents])


@njit(nogil=True, cache=True)
def _round_block(
    about: About, rounding: np.float32, first: int, last: int, codes: np.ndarray, target: np.ndarray, error: np.ndarray
) -> None:
    """Round columns first .. last - 1 one after the other."""
    weight, factor, rows, columns, heads = about
    told = np.zeros(heads.shape[1], np.float32)
    for n in range(first, last):
        for r in range(weight.shape[1]):
            step = rows[r] * columns[n]
            x = target[n, r]
            if len(heads):
                i = r % len(told)
                x += told[i] if i else np.float32(0)
            q = np.float32(0)
            if step > 0:
                q = min(np.floor(abs(x) / step + rounding), np.float32(LARGEST))
            q = -q if x < 0 else q
            codes[n, r] = np.int32(q)
            error[n, r] = weight[n, r] - q * step if q != 0 else weight[n, r]  # a step may be infinite
            if len(heads):
                pass_down(heads, r, target[n, r] + (error[n, r] - weight[n, r]), told, told)
        pass_on(n, last, factor, target, error)
