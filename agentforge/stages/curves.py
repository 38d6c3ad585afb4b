"""Hypercompression as Agent Forge's documentation defines it: smooth curves through the weights in their order.

The flattened weight is cut into segments, and each gets the curve of one degree that is nearest in squared error:

* kind="bezier": control points c_k of the Bernstein polynomials C(d, k) t**k (1 - t)**(d - k), t = i / (length - 1);
* kind="polynomial": coefficients of polynomials that are orthonormal on the segment's own nodes.

Both span all polynomials of that degree, so the curve is the same, and only the rounding of its numbers differs: half
floats behind one power of two a tensor.  The fit is a product with a pseudo-inverse, computed once for a length; with Q
the orthonormal polynomials and B Bernstein's, it is Q^T, or (Q^T B)^-1 Q^T.  Decoding evaluates at the same nodes.

A curve of degree d keeps d + 1 of a segment's `length` dimensions, so of weights without order it explains (d + 1) / length
of the variance and no more.  Sorting makes almost any segment smooth, but the permutation has to be stored, too: here
ceil(log2(length)) bits per weight, and no code can do with less than log2(length!) / length on average.

The documentation's own setting, 16 segments per tensor whatever its size, is `segments=16`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numba import njit

from ..errors import BadArtifact, BadInput
from ..planes import Packed, power_of_two_exponent, times_power_of_two
from .base import Layout, Stage, register


@register
@dataclass(frozen=True)
class Curves(Stage):
    """One curve per segment of the flattened weight.

    kind: "bezier" or "polynomial".  degree: 0 to 15, below the segment's length.  segment: weights per segment.  segments:
    cut every tensor into this many instead, 0 for `segment`.  sort: "none", "segment" (each segment's weights by size) or
    "tensor" (all weights, before they are cut).
    """

    name: ClassVar[str] = "curves"
    kind: Literal["bezier", "polynomial"] = "bezier"
    degree: int = 7
    segment: int = 64
    segments: int = 0
    sort: Literal["none", "segment", "tensor"] = "none"

    def _check(self) -> None:
        self._expect(0 <= self.degree <= 15, "degree", "0 to 15")
        self._expect(self.segments >= 0, "segments", "1 or more, or 0 to cut by length")
        self._expect(self.segments > 0 or self.segment > self.degree, "segment", f"more than degree={self.degree}")

    def _length(self, count: int) -> int:
        """Weights a segment, the last one aside, in a tensor of `count` weights."""
        return math.ceil(count / self.segments) if self.segments else min(self.segment, count)

    def _places(self, count: int) -> int:
        """Weights that are sorted together."""
        return count if self.sort == "tensor" else self._length(count)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        count = shape[0] * shape[1]
        planes: Layout = {
            "points": ("float16", (math.ceil(count / self._length(count)), self.degree + 1)),
            "exponent": ("uint8", (1,)),
        }
        if self.sort != "none":
            planes["order"] = (f"uint{max(1, (self._places(count) - 1).bit_length())}", (count,))
        return planes

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        layout = self.layout(shape)
        values = weight.numpy().reshape(-1)
        planes = {}
        if self.sort != "none":
            parts = _cut(values, self._places(values.size))
            orders = [np.argsort(part, axis=1, kind="stable") for part in parts]
            values = _joined([np.take_along_axis(part, order, 1) for part, order in zip(parts, orders, strict=True)])
            planes["order"] = _joined(orders)
        points = np.zeros(layout["points"][1])
        first = 0
        for part in _cut(values, self._length(values.size)):
            fit, _ = _matrices(self.kind, self.degree, part.shape[1])
            points[first : first + len(part), : fit.shape[1]] = _product(part, fit)
            first += len(part)
        exponent = power_of_two_exponent(torch.from_numpy(points))
        return self.packed(shape, {**planes, "points": np.ldexp(points, exponent).astype(np.float16)}, exponent)

    def _decode(self, packed: Packed) -> torch.Tensor:
        rows, columns = packed.shape
        values = np.empty(rows * columns, np.float32)
        points = packed["points"].to("cpu", torch.float32).numpy()  # segments have no kernel for other devices
        first = 0
        for part in _cut(values, self._length(values.size)):
            _, basis = _matrices(self.kind, self.degree, part.shape[1])
            part[:] = _product(np.ascontiguousarray(points[first : first + len(part), : len(basis)]), basis)
            first += len(part)
        if self.sort != "none":
            ordered, values = values, np.empty_like(values)
            places = self._places(values.size)
            orders = packed["order"].to("cpu", torch.int64).numpy()
            for target, source, order in zip(*(_cut(x, places) for x in (values, ordered, orders)), strict=True):
                if not (np.sort(order, axis=1) == np.arange(order.shape[1])).all():
                    raise BadArtifact(f"plane order: expected permutations of {order.shape[1]} places")
                np.put_along_axis(target, order, source, 1)
        decoded = torch.from_numpy(values).reshape(rows, columns).to(packed["points"].device)
        return times_power_of_two(decoded, 128 - int(packed["exponent"]))


def r_squared(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """The share of the weights' variance that `decoded` explains, 1 - sum (w - v)**2 / sum (w - mean)**2; 0 if none."""
    w, v = weight.double().numpy(), decoded.double().numpy()
    total = ((w - w.mean()) ** 2).sum()
    return float(1 - ((w - v) ** 2).sum() / total) if total else 0.0


def choose(weight: torch.Tensor, bits_per_weight: float, kind: Literal["bezier", "polynomial"] = "polynomial") -> Curves:
    """The curves of least squared error on `weight`, float[out, in], that take at most `bits_per_weight`.

    Tried are every degree with as many segments as the budget allows, and segments of every power of two, sorted, with the
    highest degree that the budget allows beside the permutation.  Sorting the whole tensor is not tried: its order
    takes as many bits as the weights themselves.  Raises BadInput if the budget is too small for any.
    """
    count = weight.numel()
    budget = int(bits_per_weight * count) - 8  # the exponent's byte
    stages = []
    for degree in range(16):
        segments = budget // (16 * (degree + 1))
        if segments > 0 and math.ceil(count / segments) > degree:
            stages.append(Curves(kind, degree, math.ceil(count / segments)))
    for width in range(1, (count - 1).bit_length()):
        degree = min(15, 2**width - 1, (budget - width * count) // (16 * math.ceil(count / 2**width)) - 1)
        if degree >= 0:
            stages.append(Curves(kind, degree, 2**width, sort="segment"))
    if not stages:
        raise BadInput(f"curves: bits_per_weight={bits_per_weight}; expected at least {24 / count:.3g} for {count} weights")

    def error(stage: Curves) -> float:
        return float(((stage.decode(stage.encode(weight)) - weight).double().numpy() ** 2).sum())

    return min(stages, key=error)


def _cut(values: np.ndarray, length: int) -> list[np.ndarray]:
    """Views of the flat `values` as [segments, length], and of what remains as [1, rest] if something does."""
    whole = values.size - values.size % length
    parts = [values[:whole].reshape(-1, length), values[whole:].reshape(1, -1)]
    return [part for part in parts if part.size]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in parts])


@functools.lru_cache(maxsize=64)
def _matrices(kind: str, degree: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The fit, float64[length, points], and the basis, float64[points, length], for one segment of this length.

    A segment no longer than the degree gets as many points as it has weights.
    """
    degree = min(degree, length - 1)
    x = np.linspace(-1, 1, length) if length > 1 else np.zeros(1)
    q: list[np.ndarray] = []
    for k in range(degree + 1):
        v = x * q[-1] if k else np.ones(length)
        for u in [*q, *q]:  # twice, as once leaves rounding errors
            v = v - (u * v).sum() * u
        q.append(v / math.sqrt((v * v).sum()))
    orthonormal = np.array(q)
    if kind == "polynomial":
        return np.ascontiguousarray(orthonormal.T), orthonormal
    t = (x + 1) / 2
    bernstein = np.array([math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)])
    to_points = np.linalg.inv([[(u * b).sum() for b in bernstein] for u in q])
    return _product(np.ascontiguousarray(orthonormal.T), np.ascontiguousarray(to_points.T)), bernstein


@njit(nogil=True, cache=True)
def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b in double precision, every sum in order: the same bytes whatever the number of threads."""
    result = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        row = result[i]
        for j in range(a.shape[1]):
            factor = np.float64(a[i, j])
            for k in range(b.shape[1]):
                row[k] += factor * b[j, k]
    return result
