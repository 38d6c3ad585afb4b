"""SeedLM (arXiv 2410.10714v2): a block of C weights as a pseudo-random basis, named by its seed, and P coefficients.

A weight is flattened row by row and cut into blocks w of C (zeros fill the last one).  What is stored of a block is the
seed s of a linear feedback shift register, an exponent e and P coefficients q, all of four bits but the seed's K:

    w ~ U(s) t,   t_i = q_i 2^e,   U(s) = (V(s) - 2^(K-1)) / (2^(K-1) - 1)                                     (Equation 1)

with V(s), C x P, filled row by row with the states that follow the seed.  Of all 2^K - 1 seeds the one of least squared
error |w - U(s) t|^2 is found (Algorithm 1), where t is the least-squares fit, quantised.  A weight costs
(K + 4 + 4 P) / C bits (Equation 4).

Where this departs from the print:

* Section 3.2 prints e = max floor(log2|t_i|), which leaves q in -2..2 and wastes two of its four bits.  The stated range
  of t, up to 7 * 2^7, asks for e = floor(log2 max|t_i|) - 2: exponent="corrected".  exponent="printed" shows what the
  other costs.
* e is absolute, so that small weights would sink below 2^-8: one power of two per tensor (eight bits, counted) brings their
  root mean square to about one.
* Ties go to the lowest seed; the paper leaves them open.

Beyond the paper: refine=True takes, for every seed that can still win, the best coefficients there are, at e and the
exponents next to it (rounding the fit is not the best where columns of U are alike); weighted=True counts the error of
weight j times E[x_j^2], the diagonal of the layer's input statistics (floored at 1% of its mean).

The search is exact, and seldom looks at a seed twice: see `Tables` and `search_seeds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from ..errors import BadArtifact, BadInput
from ..planes import Packed, times_power_of_two
from . import gpu_search
from .base import InputStatistics, Layout, Stage, register
from .seedlm_search import LARGEST_EXPONENT, LEAST_EXPONENT, Rule, reconstruct, reweigh, search_seeds, tables_of, taps_mask

LARGEST_K = 20  # of a search: its tables grow with 2^K, a tenth of a GB for K = 20
PRESETS = {2: (16, 3), 3: (12, 4), 4: (8, 3), 8: (4, 3)}  # bits -> C, P at K = 16; 3 and 4 are the paper's Table 1
FLOOR = 0.01  # least weight of an input's error, relative to the mean


@register
@dataclass(frozen=True)
class SeedLM(Stage):
    """Blocks of C weights as P coefficients of a basis that a K-bit shift register makes from a seed.

    bits: 2, 3, 4 or 8 bits per weight by a preset C and P (default 4); 0 if C and P are given.  K: bits of a seed, 2 to
    20.  C: weights per block.  P: coefficients per block, less than C.  exponent: "corrected" or "printed".  refine: search
    exponent and coefficients around the rounded fit.  weighted: weigh errors by the inputs' second moments.
    """

    name: ClassVar[str] = "seedlm"
    uses_gpu: ClassVar[bool] = True
    bits: int = 0
    K: int = 16
    C: int = 0
    P: int = 0
    exponent: Literal["corrected", "printed"] = "corrected"
    refine: bool = False
    weighted: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Only the weighted error looks at the inputs."""
        return self.weighted

    @property
    def geometry(self) -> tuple[int, int]:
        """C and P."""
        return (self.C, self.P) if self.C or self.P else PRESETS[self.bits or 4]

    def _check(self) -> None:
        if self.C or self.P:
            if self.bits:
                raise BadInput(f"seedlm: bits={self.bits} beside C={self.C}, P={self.P}; expected either bits or C and P")
            if not 1 <= self.P < self.C <= 32 or self.P > 16:
                raise BadInput(f"seedlm: C={self.C}, P={self.P}; expected 1 <= P <= 16 and P < C <= 32")
        elif self.bits not in (0, *PRESETS):
            raise BadInput(f"seedlm: bits={self.bits}; expected one of {', '.join(map(str, PRESETS))}, or C and P")
        self._expect(2 <= self.K <= LARGEST_K, "K", f"2 to {LARGEST_K}")

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        C, P = self.geometry
        blocks = math.ceil(shape[0] * shape[1] / C)
        return {
            "seeds": (f"uint{self.K}", (blocks,)),
            "exponents": ("uint4", (blocks,)),
            "coefficients": ("uint4", (blocks, P)),
            "exponent": ("uint8", (1,)),
        }

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """As many rows as end with a block."""
        C, P = self.geometry
        rows = C // math.gcd(C, shape[1])
        blocks = rows * shape[1] // C
        return rows, {"seeds": blocks, "exponents": blocks, "coefficients": blocks * P}

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        if self.weighted and stats is None:
            raise BadInput("seedlm: weighted=True needs the layer's input statistics; compress a model, or pass stats")
        C, P = self.geometry
        device, weight = weight.device, weight.cpu()
        power = _power_of_two(weight.numpy())
        blocks = _blocks(times_power_of_two(weight, power).numpy(), C)
        rule = (LEAST_EXPONENT, LARGEST_EXPONENT, 0 if self.exponent == "printed" else -2, 1 if self.refine else 0)
        moments = stats.diagonal.numpy() if self.weighted and stats else None
        seeds, codes = _search(blocks, self.K, P, rule, device, moments)
        shape = (weight.shape[0], weight.shape[1])
        numbers = codes.astype(np.int16) & 15  # four bits, two's complement
        planes = {"seeds": seeds.astype(np.int32), "exponents": numbers[:, 0], "coefficients": numbers[:, 1:]}
        return self.packed(shape, planes, power)

    def _decode(self, packed: Packed) -> torch.Tensor:
        C, _ = self.geometry
        device = packed["seeds"].device
        seeds = packed["seeds"].to("cpu", torch.int64).numpy()
        if len(seeds) and int(seeds.min()) == 0:
            raise BadArtifact("plane seeds: holds 0; a shift register runs from 1 to 2^K - 1")
        codes = torch.cat([packed["exponents"].unsqueeze(1), packed["coefficients"]], 1).to("cpu", torch.int8).numpy()
        values = np.empty((len(seeds), C), np.float32)
        reconstruct(seeds, codes, self.K, taps_mask(self.K), values)
        count = packed.shape[0] * packed.shape[1]
        flat = torch.from_numpy(values).reshape(-1)[:count].reshape(packed.shape).to(device)
        return times_power_of_two(flat, 128 - int(packed["exponent"]))


def _power_of_two(weight: np.ndarray) -> int:
    """The e in [-128, 127] that brings the root mean square of weight * 2^e into [1/2, 1), unless the largest would leave
    the range of t: then it comes below 2^9."""
    largest = float(np.abs(weight).max())
    if largest == 0.0:
        return 0
    rms = largest * math.sqrt(float(np.square(weight / np.float32(largest), dtype=np.float64).mean()))
    return max(-128, min(127, -math.frexp(rms)[1], 9 - math.frexp(largest)[1]))


def _blocks(weight: np.ndarray, C: int) -> np.ndarray:
    """The weight row by row in blocks, zeros at the end: float32[blocks, C]."""
    blocks = np.zeros((math.ceil(weight.size / C), C), np.float32)
    blocks.reshape(-1)[: weight.size] = weight.reshape(-1)
    return blocks


def _search(
    blocks: np.ndarray, K: int, P: int, rule: Rule, device: torch.device, moments: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The seed of least error of every block, uint32[n], and its exponent and coefficients, int8[n, P + 1].

    blocks: float32[n, C].  moments: of each column's input, float32[columns]; the error of each weight counts that many
    times.  Blocks that lie at the same columns share their importance.
    """
    C = blocks.shape[1]
    importance, step = np.ones(C), 1
    if moments is not None:
        importance = moments.astype(np.float64) / max(float(moments.mean(dtype=np.float64)), 1e-300)
        importance = np.maximum(importance, FLOOR)
        step = len(moments) // math.gcd(len(moments), C)  # after so many blocks the columns come round again
    seeds, codes = np.empty(len(blocks), np.uint32), np.empty((len(blocks), P + 1), np.int8)
    tables = tables_of(K, C, P) if device == gpu_search.CPU else None
    weighted = tables and tables._replace(groups=np.empty_like(tables.groups), seeds=np.empty_like(tables.seeds))
    for start in range(min(step, len(blocks))):
        h = importance[(start * C + np.arange(C)) % len(importance)]
        these = np.ascontiguousarray(blocks[start::step])
        if tables is None or weighted is None:
            seeds[start::step], codes[start::step] = gpu_search.search(these, h, K, P, rule, device)
            continue
        if moments is not None:
            reweigh(tables.groups, tables.seeds, P, h, weighted.groups, weighted.seeds)
        found = np.empty(len(these), np.uint32), np.empty((len(these), P + 1), np.int8)
        search_seeds(these, h, tables if moments is None else weighted, rule, *found)
        seeds[start::step], codes[start::step] = found
    return seeds, codes
