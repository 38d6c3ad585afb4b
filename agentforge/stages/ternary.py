"""Ternary weights: BitNet b1.58 (arXiv 2402.17764, section 2), and the threshold rule of Agent Forge's documentation.

rule="absmean", the paper's: one scale for the whole matrix, gamma = mean|W|, codes = clip(round(W / gamma), -1, 1), so
that |W| < gamma / 2 becomes zero.  As the authors' code does it: the mean is clamped at `eps`, the weight is multiplied
by the float32 reciprocal, and halves go to even.

rule="threshold", the documentation's: one scale per row, alpha = mean|row| (at least 1e-8), and zero if
|w| < tau * alpha, else the sign.

rule="calibrated", ours: codes as in "threshold", but a row's scale is the one of least output error, and tau the one of
`GRID` that suits the layer best.  With H = E[x x^T] the output error of a row is (w - a c) H (w - a c)^T; for given codes c
it is least at a = c H w / c H c, where it is w H w - (c H w)^2 / c H c.  Without statistics H is the identity.

packing="trits" stores five codes per byte (1.6 bits per weight; the bound for three equally likely values is log2(3) =
1.585), packing="2bit" four codes per byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..errors import BadArtifact
from ..planes import Packed, power_of_two_exponent, times_power_of_two
from .base import Layout, Stage, register
from .propagation import product

GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # tau of the calibrated rule, in units of a row's mean |w|


@register
@dataclass(frozen=True)
class Ternary(Stage):
    """Weights of -1, 0, +1 times a scale.

    rule: "absmean" (BitNet b1.58), "threshold" (the documentation) or "calibrated" (least output error).  tau: the zero band
    of "threshold", in units of a row's mean |w|.  eps: the least mean |W| of "absmean".  packing: "trits" (1.6 bits) or
    "2bit".
    """

    name: ClassVar[str] = "ternary"
    trains = "weights"
    rule: Literal["absmean", "threshold", "calibrated"] = "absmean"
    tau: float = 0.1
    eps: float = 1e-5
    packing: Literal["trits", "2bit"] = "trits"

    @property
    def needs_statistics(self) -> bool:
        """Only the calibrated rule looks at inputs."""
        return self.rule == "calibrated"

    def _check(self) -> None:
        self._expect(self.tau >= 0, "tau", "0 or more")
        self._expect(self.eps >= 1e-37, "eps", "at least 1e-37, so that its reciprocal is a float32")

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        codes = ("trit" if self.packing == "trits" else "uint2", shape)
        if self.rule == "absmean":
            return {"codes": codes, "scale": ("float32", (1,))}
        return {"codes": codes, "scale": ("float16", (shape[0],)), "exponent": ("uint8", (1,))}

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """Every row has its own codes, and its own scale unless the tensor has one."""
        return 1, {"codes": shape[1]} | ({} if self.rule == "absmean" else {"scale": 1})

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        if self.rule == "absmean":
            gamma = absmean(weight, self.eps)
            codes = (weight * (1.0 / gamma)).round_().clamp_(-1, 1)
            return self.packed(shape, {"codes": (codes + 1).to(torch.uint8), "scale": gamma})
        if self.rule == "calibrated":
            codes, alpha = _calibrated(weight.numpy(), None if stats is None else stats.hessian.numpy())
        else:
            alpha = _row_means(weight)
            codes = _thresholded(weight, alpha, self.tau)
        exponent = power_of_two_exponent(alpha)
        scale = times_power_of_two(alpha, exponent).to(torch.float16)
        return self.packed(shape, {"codes": (codes + 1).to(torch.uint8), "scale": scale}, exponent)

    def _decode(self, packed: Packed) -> torch.Tensor:
        if self.packing == "2bit" and int(packed["codes"].max()) > 2:
            raise BadArtifact("plane codes: holds 3; a ternary code is 0, 1 or 2")
        codes = packed["codes"].to(torch.float32).sub_(1)
        if self.rule == "absmean":
            return codes.mul_(packed["scale"])
        exponent = int(packed["exponent"]) - 128
        return codes.mul_(times_power_of_two(packed["scale"], -exponent).unsqueeze(1))


def _row_means(weight: torch.Tensor) -> torch.Tensor:
    """mean|row| of each row, at least 1e-8: float64[out]."""
    return torch.from_numpy(np.abs(weight.numpy()).mean(axis=1, dtype=np.float64)).clamp_(min=1e-8)


def _thresholded(weight: torch.Tensor, alpha: torch.Tensor, tau: float) -> torch.Tensor:
    """sign(w), or 0 if |w| < tau * alpha of its row: float32[out, in]."""
    codes = weight.sign()
    codes[weight.abs() < (tau * alpha).to(torch.float32).unsqueeze(1)] = 0
    return codes


def _calibrated(weight: np.ndarray, hessian: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float32[out, in] and scales float64[out] of least output error, over all tau of GRID."""
    dense = torch.from_numpy(weight)
    largest = float(dense.abs().max()) or 1.0
    dense = dense / largest  # so that no square overflows
    means, moved = _row_means(dense), _through(hessian, dense.numpy())
    best: tuple[float, torch.Tensor, np.ndarray] | None = None
    for tau in GRID:
        codes = _thresholded(dense, means, tau)
        c = codes.numpy().T
        with_w = (c * moved).sum(0, dtype=np.float64)
        with_c = (c * _through(hessian, codes.numpy())).sum(0, dtype=np.float64)
        # A scale is never negative; a row of zeros, or one whose inputs are dead, gets none.
        scale = np.where((with_c > 0) & (with_w > 0), with_w / np.where(with_c > 0, with_c, 1.0), 0.0)
        gain = float((scale * with_w).sum())
        if best is None or gain > best[0]:
            best = (gain, codes, scale)
    assert best is not None
    return best[1], torch.from_numpy(best[2] * largest)


def _through(hessian: np.ndarray | None, matrix: np.ndarray) -> np.ndarray:
    """H matrix^T, float32[in, out], with sums in a fixed order whatever the number of threads."""
    columns = np.ascontiguousarray(matrix.T)
    return columns if hessian is None else product(np.ascontiguousarray(hessian), columns)


def absmean(weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """gamma = mean|W|, at least eps: float32[1].  Summed in double precision by one thread: the same bits everywhere."""
    return torch.tensor([max(float(np.abs(weight.numpy()).mean(dtype=np.float64)), eps)], dtype=torch.float32)


def zero_fraction(packed: Packed) -> float:
    """The share of weights that a ternary encoding set to zero (its sparsity)."""
    codes = packed["codes"]
    return int((codes == 1).sum()) / codes.numel()
