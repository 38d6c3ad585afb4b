"""Entropy-coded trellis-coded quantisation: `ecsq` without most of the quarter of a bit that scalars lose.

Values that are rounded one by one are 0.25 bit from Shannon's bound at all rates that matter, because their cells are cubes.
A trellis (`trellis`; Ungerboeck 1982, Marcellin & Fischer 1990) allows each value every other multiple of a step alone, and
the values before it decide which.  Of all sequences that are allowed the one of least cost is taken, which Viterbi's
algorithm finds.  With an entropy code 0.17 bit is taken back with 8 states, 0.19 with 32, 0.21 with 256, at any rate
(Marcellin 1994; here measured on Gaussian weights, bytes on disk).

* Steps, feedback of errors (LDLQ) and their reasons are those of `ecsq`.  A path goes down a column: all of its values have
  been told the errors of the columns before, and none depends on another.
* The value k for the target x, in steps, costs w_i (x - k)^2 + 0.25 bits(k).  w_i is what an error in row i does beside the
  others, its step included: about sqrt(g_i), 1 on average.  As D, the mean of w_i (x - k)^2, falls with 4^-R, least of it is
  left in as many bits if one is worth 2 ln 2 D, 0.36.  But the more bits are worth, the smaller are the values, all of them,
  and what all layers have in common adds up: with 0.25 there is 1% more damage, and the divergence is 9% less (SmolLM2-135M,
  2 bits).
* bits(k) are what the coder takes, for the parity of k and the cell of its row and column.  The first pass counts what
  rounding one by one gives, each other pass what the pass before gave.

With half of the multiples allowed, half of `ecsq`'s step takes about as many bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numba import njit

from ..entropy import expected_path_bytes, path_costs
from ..trellis import RESTART, successors
from .base import SAMPLED, InputStatistics, register
from .ecsq import ECSQ, About, Stepped
from .propagation import pass_down, pass_on, quantised

REACH = 65528.0  # steps that a target may be large, so that multiples fit into 16 bits and their parity
COUNTED = 256  # absolute values of which bits are counted; those beyond are taken for as rare as the last one
PASSES = 3
WORTH = 0.25  # squares of a step that a bit is worth
# Measured in three blocks of SmolLM2-135M, 1.2 to 2.8 bits: for a step s, `ecsq`'s in as many bits is 2 s (1 + COARSER s^2),
# and the damage between 0.67 (queries) and 0.79 (outputs) of its damage.
COARSER, DAMAGE = 0.08, 0.73
Bits = tuple[np.ndarray, np.ndarray, np.ndarray]  # as `entropy.path_costs` gives them


@register
@dataclass(frozen=True)
class TCQ(Stepped):
    """Entropy-coded trellis-coded quantisation.

    step: the geometric mean of all steps, in units of the weight's root mean square; half of `ecsq`'s takes as many bits.
    states: of the trellis; encoding with 256 takes five times as long as with 8, decoding does not.  damping, gains: as
    `ecsq` has them.
    """

    name: ClassVar[str] = "tcq"
    reach: ClassVar[float] = REACH
    step: float = 0.3
    states: Literal[8, 32, 256] = 8
    damping: float = 0.1
    gains: bool = False

    @property
    def coding(self) -> str:
        """Of the multiples, zigzag."""
        return f"~trellis{self.states}"

    def price(
        self, weight: torch.Tensor, stats: InputStatistics, name: str, scratch: dict[str, Any]
    ) -> tuple[int, float, bool]:
        """Bytes and damage, estimated from those of `ecsq` in as many bits, or counted if there are few rows."""
        if len(weight) < 2 * SAMPLED or self.gains:
            return super().price(weight, stats, name, scratch)
        self.check()
        alike = ECSQ(step=min(2 * self.step * (1 + COARSER * self.step**2), 64.0), damping=self.damping)
        size, lost, _ = alike.priced(weight, stats, name, scratch, expected_path_bytes)
        return size, DAMAGE * lost, False

    def _codes(self, about: About, weights: np.ndarray) -> np.ndarray:
        values, _, rows, columns, _ = about
        importance = np.square(rows, dtype=np.float64) * weights
        importance = (importance / importance.mean()).astype(np.float32)
        with np.errstate(all="ignore"):  # a step may be zero, or infinite
            codes: np.ndarray = np.nan_to_num(np.rint(values / rows / columns[:, None])).clip(-REACH, REACH).astype(np.int32)
        for _ in range(PASSES):
            codes = _quantise(about, importance, path_costs(abs(codes.T), COUNTED), self.states)
        return codes


def _quantise(about: About, importance: np.ndarray, bits: Bits, states: int) -> np.ndarray:
    """Multiples, int32[in, out], of the weight, along paths.  importance: w."""
    tables = bits[0], bits[1], (WORTH * bits[2]).astype(np.float32)
    return quantised(about[0], about[1], partial(_path_block, about, importance, tables, _predecessors(states)))


def _predecessors(states: int) -> np.ndarray:
    """The states before each state, by the bit that leads from them to it: int32[2, states].

    The upper bit of a state is the parity of both of them.
    """
    found = np.empty((2, states), np.int32)
    following = successors(states)
    for bit in range(2):
        found[bit, following[:, bit]] = np.arange(states)
    return found


@njit(nogil=True, cache=True)
def _path_block(
    about: About,
    importance: np.ndarray,
    bits: Bits,
    before: np.ndarray,
    first: int,
    last: int,
    codes: np.ndarray,
    target: np.ndarray,
    error: np.ndarray,
) -> None:
    """Quantise columns first .. last - 1 one after the other."""
    weight, factor, rows, columns, heads = about
    of_rows, of_columns, tables = bits
    out = weight.shape[1]
    choices, cost = np.empty((4, out), np.int32), np.empty((4, out), np.float32)
    for n in range(first, last):
        if len(heads):
            steps, lines = rows * columns[n], of_rows + of_columns[n]
            _viterbi_of_heads(target[n], steps, importance, tables, lines, before, heads, codes[n])
        else:
            for r in range(out):
                x = _in_steps(target[n, r], rows[r] * columns[n])
                for c in range(4):
                    choices[c, r], cost[c, r] = _best(x, c, importance[r], tables[of_rows[r] + of_columns[n]])
            _viterbi(cost, choices, before, codes[n])
        for r in range(out):
            q = np.float32(codes[n, r]) * (rows[r] * columns[n])
            error[n, r] = weight[n, r] - q if abs(q) < np.inf else weight[n, r]
        pass_on(n, last, factor, target, error)


@njit(nogil=True, cache=True)
def _in_steps(target: np.float32, step: np.float32) -> np.float32:
    x = target / step if step > 0 else np.float32(0)
    return min(max(x, np.float32(-REACH)), np.float32(REACH)) if x == x else np.float32(0)


@njit(nogil=True, cache=True)
def _best(x: np.float32, c: int, importance: np.float32, bits: np.ndarray) -> tuple[np.int32, np.float32]:
    """Of the values that are c modulo 4, the one below the target or the one above, and its cost."""
    low: Any = np.int32(np.floor((x - np.float32(c)) * np.float32(0.25))) * 4 + c
    high = low + 4
    below, above = x - np.float32(low), x - np.float32(high)
    lower = importance * below * below + bits[min(abs(low), COUNTED - 1)]
    upper = importance * above * above + bits[min(abs(high), COUNTED - 1)]
    return high if upper < lower else low, min(lower, upper)


@njit(nogil=True, cache=True)
def _viterbi_of_heads(
    target: np.ndarray,
    steps: np.ndarray,
    importance: np.ndarray,
    tables: np.ndarray,
    lines: np.ndarray,
    before: np.ndarray,
    heads: np.ndarray,
    path: np.ndarray,
) -> None:
    """The path of least cost, or nearly so, if each row is told what the rows before it in its head have left.

    That depends on the path: each state's best one tells its own (per-survivor processing: Raheli et al. 1995).
    lines: the tables' lines that rows look into.
    """
    states, size = before.shape[1], heads.shape[1]
    total, new = np.empty(states, np.float32), np.empty(states, np.float32)
    told, after = np.zeros((states, size), np.float32), np.zeros((states, size), np.float32)
    choices, cost = np.empty((2, states), np.int32), np.empty((2, states), np.float32)
    taken, chosen = np.empty((RESTART, states), np.uint8), np.empty((RESTART, states), np.int32)
    for start in range(0, len(path), RESTART):
        end = min(start + RESTART, len(path))
        total[:] = np.inf
        total[0] = 0
        for r in range(start, end):
            i = r % size
            for s in range(states):
                x = _in_steps(target[r] + (told[s, i] if i else np.float32(0)), steps[r])
                for bit in range(2):
                    choices[bit, s], cost[bit, s] = _best(x, (s & 1) + 2 * bit, importance[r], tables[lines[r]])
            for t in range(states):
                a, b = total[before[0, t]] + cost[0, before[0, t]], total[before[1, t]] + cost[1, before[1, t]]
                bit = 1 if b < a else 0
                s = before[bit, t]
                taken[r - start, t], chosen[r - start, t], new[t] = bit, choices[bit, s], min(a, b)
                q = np.float32(choices[bit, s]) * steps[r]
                pass_down(heads, r, target[r] - q if abs(q) < np.inf else target[r], told[s], after[t])
            total, new, told, after = new, total, after, told
        state: Any = np.argmin(total)
        told[0] = told[state]
        for r in range(end - 1, start - 1, -1):
            path[r] = chosen[r - start, state]
            state = before[taken[r - start, state], state]


@njit(nogil=True, cache=True)
def _viterbi(cost: np.ndarray, choices: np.ndarray, before: np.ndarray, path: np.ndarray) -> None:
    """The path of least cost, into int32[n].  cost, choices: of the best value that is c modulo 4, float32[4, n] and
    int32[4, n]."""
    states = before.shape[1]
    half = states // 2
    total, new = np.empty(states, np.float32), np.empty(states, np.float32)
    taken = np.empty((RESTART, states), np.uint8)
    for start in range(0, len(path), RESTART):
        end = min(start + RESTART, len(path))
        total[:] = np.inf
        total[0] = 0
        for r in range(start, end):
            for z in range(2):
                less, more = cost[z, r], cost[z + 2, r]
                for t in range(z * half, (z + 1) * half):
                    a, b = total[before[0, t]] + less, total[before[1, t]] + more
                    taken[r - start, t] = b < a
                    new[t] = min(a, b)
            total, new = new, total
        s = np.argmin(total)
        for r in range(end - 1, start - 1, -1):
            bit = taken[r - start, s]
            path[r] = choices[2 * bit + (1 if s >= half else 0), r]
            s = before[bit, s]
