"""Relative squared error against bits per weight, for any stage, beside what theory allows.

Shannon's bound D = 2**(-2 R) (Shannon 1959, section 6; Cover and Thomas, theorem 10.3.2) is that of independent Gaussian
weights of unit variance: no coder of R bits per weight has a smaller mean squared error, however long its blocks.
Weights of another distribution and the same variance may fall below it: of all distributions, the Gaussian is the hardest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..bits import tensor_bytes
from ..stages import Stage, parse
from . import intervals
from .measurement import Measurement


@dataclass(frozen=True)
class Row:
    """What one stage costs and loses on one weight.

    bits: of all planes as they are stored, a weight.  coded_bits: the same after entropy coding.  error: relative
    squared error, |W - decoded|^2 / |W|^2, with its standard error over the weight's rows.
    """

    stage: str
    weight: str
    bits: Measurement
    coded_bits: Measurement
    error: Measurement


def shannon(bits: float) -> float:
    """The least mean squared error of any coder of unit Gaussian values at this many bits per value."""
    return math.exp2(-2 * bits)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Independent weights of the unit Gaussian: float32[rows, columns]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))


def measure(stages: Sequence[Stage | str], weights: Mapping[str, torch.Tensor], seed: int = 0) -> list[Row]:
    """Bits, coded bits and relative squared error of every stage on every weight, float[out, in], each by itself."""
    rows = []
    for stage in (parse(stage) if isinstance(stage, str) else stage for stage in stages):
        for name, given in weights.items():
            weight = given.to(torch.float32)
            packed = stage.encode(weight, None, seed, name=name)
            bits, coded = packed.bits / weight.numel(), 8 * packed.coded_bytes / weight.numel()
            rows.append(_row(stage, name, weight, stage.decode(packed), bits, coded, seed))
    return rows


def _row(stage: Stage, name: str, weight: torch.Tensor, back: torch.Tensor, bits: float, coded: float, seed: int) -> Row:
    w, d = weight.numpy().astype(np.float64), back.numpy().astype(np.float64)
    top = float(abs(w).max()) or 1.0  # squares of 1e-200 would vanish
    lost, power = (((d - w) / top) ** 2).sum(1), ((w / top) ** 2).sum(1)
    error = intervals.ratio(torch.from_numpy(lost), torch.from_numpy(power), len(w), f"{len(w)} rows")
    if not power.sum():
        error = {"value": float(lost.any()), "stderr": None, "n": len(w)}
    about = {"weight": name, "shape": list(w.shape), "stage": stage.to_json()}
    inputs = {"weight_sha256": hashlib.sha256(tensor_bytes(weight)).hexdigest()}

    def taken(unit: str, metric: str, found: dict[str, Any]) -> Measurement:
        return Measurement(unit=unit, protocol={"metric": metric, **about}, seed=seed, inputs=inputs, **found)

    def exact(value: float) -> dict[str, Any]:
        return {"value": value, "stderr": None, "n": w.size}

    return Row(
        str(stage),
        name,
        taken("bits/weight", "bits of all planes", exact(bits)),
        taken("bits/weight", "bits of all planes, entropy coded", exact(coded)),
        taken("share of squared weights", "relative squared error", error),
    )
