"""Hyper-Compression (arXiv 2409.00592): a few weights at a time become one index along a winding trajectory.

Theory (section 3): theta -> (frac(a_1 theta), ..., frac(a_K theta)) with rationally independent a_k comes as near as one
likes to every point of the unit cube, so one number theta can stand for K weights.  Practice (section 4, and the authors'
code): K = 2 and a rational winding of U points, a sheared grid of N x N with N = ceil(sqrt(U)),

    point(theta) = (theta l / N**2, (theta l / N) mod l) + c - l / 2,    theta = 0 .. U - 1,

in the square of side l about the centroid c of all pairs of weights.  Index 0 is the centroid itself, index theta + 1 a
point.  Pairs inside the square have class 0.  The others have class 1 .. M by their distance from c, in equal steps from
l / 2 to the farthest pair; they shrink towards c until the class fits into the inscribed circle, and swell again when
decoded.  A pair is stored as one integer, index + (U + 1) * class.

Every such codebook is the set of points of a lattice inside a box: there are integers D and z, z_1 = 1, such that theta
stands for the coordinates theta z mod D, the first of which is theta itself.  The nearest point therefore takes no tree
and constant time: the lattice's basis is reduced once (by Lagrange and Gauss), rounding the coefficients one by one (Babai)
leaves a cell about each lattice point, and a short list holds every lattice vector that can be nearer than that point to
some place in the cell.  If the nearest point lies outside the box, the lines of the lattice are gone through in order of
their distance: on each the points inside the box are an interval, and the nearest of them is a rounding.

Deviations and errata:

* variant="printed" is Equation 3 as it stands, tan(alpha) = U: theta then covers only a strip of 1/sqrt(U) of the
  square.  "code" is what the authors' code does.  The classes divide l_f - l/2 as the code does; Equations 8 and 10 print
  l_f / M.
* select=True chooses U and M per tensor as the code does (mean absolute error).  The index's width is fixed by the
  settings here, whatever was chosen; `paper_bits_per_weight` counts as the paper does.  The code keeps tensors of fewer
  than 10 weights, and those it finds too lossy, in float32; this stage encodes what it is given.
* M = 0 while pairs lie outside the square does not occur in the code; here these move to the square's edge first.
* Ours: K = 1, variant="korobov" (the generator with the longest shortest vector), `centred`, l = 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numba import njit

from ..errors import BadArtifact, BadInput
from ..planes import FLOAT32_MAX, Packed
from .base import Stage, register

LARGEST_U = 2**24
GENERATORS = 512  # generators of a Korobov lattice that are tried
SAMPLE = 2**14  # vectors on which the side of least squared error is searched
HALVINGS = 16  # its first tries, each narrower by sqrt(2); golden sections follow
SECTIONS = 12
BLOCK = 512  # vectors that a kernel takes through each of its steps at a time


@register
@dataclass(frozen=True)
class Trajectory(Stage):
    """K weights per trajectory index.

    U: points of the trajectory, 2 to 2**24.  M: classes of vectors outside the cube.  l: its side, in units of the
    weights; 0 searches the side of least squared error on a sample.  K: weights per index, 1 or 2.  variant: "code",
    "printed" (Equation 3, K = 2) or "korobov".  centred: the trajectory's middle at the centroid, not its corner at the
    cube's corner.  select: choose M from 1 .. M by the mean absolute error, stopping at `loss`, as the authors' code
    does, and U from `U_first` (0: none) and `U`, going on to `U` if the error is above `loss`.
    """

    name: ClassVar[str] = "trajectory"
    U: int = 1600
    M: int = 3
    l: float = 0.1  # noqa: E741  (the paper's name)
    K: int = 2
    variant: Literal["code", "printed", "korobov"] = "code"
    centred: bool = False
    select: bool = True
    U_first: int = 0
    loss: float = 0.001

    def _check(self) -> None:
        for key, least, most in (("U", 2, LARGEST_U), ("M", 0, 100), ("K", 1, 2)):
            if not least <= getattr(self, key) <= most:
                raise BadInput(f"trajectory: {key}={getattr(self, key)}; expected {least} to {most}")
        if self.U_first and not 2 <= self.U_first < self.U:
            raise BadInput(f"trajectory: U_first={self.U_first}; expected 2 to below U={self.U}, or 0 for none")
        if self.U_first and not self.select:
            raise BadInput(f"trajectory: U_first={self.U_first}; expected 0 if select=False, which takes U as it is")
        if self.l and not 1e-30 <= self.l <= 1e30:
            raise BadInput(f"trajectory: l={self.l}; expected 1e-30 to 1e30, or 0 to search it")
        if self.loss < 0:
            raise BadInput(f"trajectory: loss={self.loss}; expected 0 or more")
        if self.variant == "printed" and self.K != 2:
            raise BadInput(f"trajectory: K={self.K}; expected 2 with variant=printed")

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Coding and shape of each plane."""
        width = (self.U + (self.U + 1) * self.M).bit_length()
        planes: dict[str, tuple[str, tuple[int, ...]]] = {
            "indices": (f"uint{width}", (math.ceil(shape[0] * shape[1] / self.K),)),
            "centroid": ("float32", (self.K,)),
        }
        if self.M:
            planes["radius"] = ("float32", (1,))
        if not self.l:
            planes["side"] = ("float32", (1,))
        if self.select:
            planes["choice"] = ("uint8", (2,))
        return planes

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """As many rows as end with a vector."""
        rows = self.K // math.gcd(self.K, shape[1])
        return rows, {"indices": rows * shape[1] // self.K}

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        flat = weight.numpy().reshape(-1)
        spare = -flat.size % self.K
        if spare:
            flat = np.concatenate([flat, np.full(spare, flat.mean(dtype=np.float64), np.float32)])
        points = np.ascontiguousarray(flat.reshape(-1, self.K).T)
        del weight, flat  # as large as the points
        centroid, widest, radius = _extent(points)
        radius = float(np.float32(min(radius, FLOAT32_MAX)))  # as it is stored
        for number, U in enumerate([self.U_first, self.U] if self.U_first else [self.U]):
            lattice = _lattice(U, self.K, self.variant, self.centred)
            least = math.inf
            for M in self._classes(outside=widest > self.l / 2):
                tried_side = self.l or _best_side(points, centroid, widest, radius, M, lattice)
                tried = np.empty(points.shape[1], np.int32)
                error = _assign(points, centroid, _reaches(tried_side, radius, M), lattice, tried)[0] / points.size
                if error <= least:
                    least, indices, side, choice = error, tried, tried_side, (number, M)
                if least <= self.loss:
                    break
            if least <= self.loss:
                break
        values = {
            "indices": indices,
            "centroid": centroid,
            "radius": torch.tensor([radius], dtype=torch.float32),
            "side": torch.tensor([side], dtype=torch.float32),
            "choice": torch.tensor(choice, dtype=torch.uint8),
        }
        return self.packed(shape, values)

    def _classes(self, outside: bool) -> range:
        """The numbers of classes to try; `outside`: whether any vector lies outside the cube of side l."""
        if not self.select:
            return range(self.M, self.M + 1)
        if not self.l:
            return range(self.M + 1)
        return range(1, self.M + 1) if outside and self.M else range(1)

    def _decode(self, packed: Packed) -> torch.Tensor:
        U, M = self._chosen(packed)
        indices = packed["indices"].contiguous()
        largest = int(indices.max())
        if largest >= (U + 1) * (M + 1):
            raise BadArtifact(f"plane indices: holds {largest}; expected at most {(U + 1) * (M + 1) - 1}")
        rows, columns = packed.shape
        if indices.is_cpu:
            points = torch.from_numpy(self._points(packed, U, M, indices.numpy()))
        else:
            points = self.book(packed)[indices.to(torch.int64)]
        return points.reshape(-1)[: rows * columns].reshape(rows, columns)

    def book(self, packed: Packed) -> torch.Tensor:
        """What each index stands for: float32[(U + 1) (M + 1), K], on the planes' device."""
        U, M = self._chosen(packed)
        points = self._points(packed, U, M, np.arange((U + 1) * (M + 1), dtype=np.int32))
        return torch.from_numpy(points).to(packed["indices"].device)

    def _chosen(self, packed: Packed) -> tuple[int, int]:
        """U and M, as the planes have them."""
        U, M = self.U, self.M
        if self.select:
            number, M = (int(x) for x in packed["choice"])
            if number > bool(self.U_first) or M > self.M:
                raise BadArtifact(f"plane choice: holds {number}, {M}; expected at most {int(bool(self.U_first))}, {self.M}")
            U = self.U if number or not self.U_first else self.U_first
        return U, M

    def _points(self, packed: Packed, U: int, M: int, indices: np.ndarray) -> np.ndarray:
        """float32[n, K] for n indices."""
        side = self.l or float(packed["side"])
        reaches = _reaches(side, float(packed["radius"]) if M else 0.0, M)
        lattice = _lattice(U, self.K, self.variant, self.centred)
        points = np.empty((len(indices), self.K), np.float32)
        _look_up(indices, packed["centroid"].cpu().numpy(), reaches, lattice, points)
        return points


def paper_bits_per_weight(packed: Packed) -> float:
    """Bits a weight as the paper counts them: the bit length of the largest index of the tensor, for K weights each."""
    return int(packed["indices"].max()).bit_length() / len(packed["centroid"])


class Lattice(NamedTuple):
    """A codebook as the points of a lattice in a box, in units of side / D, with a reduced basis.

    D: units per side.  z: int64[K], the step of theta, z[0] = 1.  shift: float64[K], from the cube's corner to the first
    point.  box: int64[K], coordinates run from 0 to below it.  basis: float64[K, K] of integers, one vector per row.
    dual: float64[K, K], <u, dual[i]> is the coefficient of u along the i-th vector of Gram and Schmidt; mu: float64[K, K],
    their coefficients; norm: float64[K], their squared lengths.  rivals: float64[R, K], every lattice vector that may be
    nearer than 0 to a point of Babai's cell, 0 first; where the point's coefficients are rho (at most 1/2 each), rival r is
    nearer by <rho, slope[r]> - cost[r].
    """

    D: float
    z: np.ndarray
    shift: np.ndarray
    box: np.ndarray
    basis: np.ndarray
    dual: np.ndarray
    mu: np.ndarray
    norm: np.ndarray
    rivals: np.ndarray
    slope: np.ndarray
    cost: np.ndarray


@functools.lru_cache(maxsize=64)
def _lattice(U: int, K: int, variant: str, centred: bool) -> Lattice:
    """The lattice of a trajectory of U points in K dimensions."""
    N = round(U ** (1 / K))
    N += N**K < U
    N -= (N - 1) ** K >= U
    if variant == "printed":
        D, step = U * math.isqrt(U), U
    elif variant == "korobov":
        D, step = U, _generator(U, K)
    else:
        D, step = N**K, N
    z = [pow(step, k, D) for k in range(K)]
    # What the points leave free: theta runs to U - 1 of D, the other coordinates in steps of gcd(z, D).
    free = [D - U + 1] + [math.gcd(zk, D) for zk in z[1:]]
    shift = np.array(free) / 2 if centred else np.zeros(K)
    basis = _reduced(np.array(z, np.float64), float(D))
    dual, mu, norm = _gram_schmidt(basis)
    rivals, coefficients = _rivals(basis, mu, norm)
    box = np.array([U] + [D] * (K - 1), np.float64)
    slope, cost = 2 * norm * coefficients, (norm * coefficients**2).sum(1)
    return Lattice(float(D), np.array(z, np.int64), shift, box, basis, dual, mu, norm, rivals, slope, cost)


def _rivals(basis: np.ndarray, mu: np.ndarray, norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every lattice vector that can be nearer than 0 to some point of Babai's cell, and their coefficients; 0 first.

    In Gram and Schmidt's orthogonal directions the cell is |rho_i| <= 1/2, so a vector w with coefficients omega comes
    nearer somewhere only if sum n_i omega_i**2 < sum n_i |omega_i|.  Hence sum n_i (|omega_i| - 1/2)**2 < sum n_i / 4,
    which bounds the integers to try.
    """
    bound = 0.5 + np.sqrt(norm.sum() / (4 * norm))
    ranges = [np.arange(-most, most + 1) for most in np.ceil(bound + bound[-1] / 2)]
    tails = np.stack(np.meshgrid(*ranges[::-1], indexing="ij"), -1).reshape(-1, len(norm))[:, ::-1]
    omega = tails @ mu
    near = ((norm * omega**2).sum(1) < (norm * abs(omega)).sum(1) * (1 + 1e-12)) & tails.any(1)
    integers = np.concatenate([np.zeros((1, len(norm))), tails[near]])
    return integers @ basis, integers @ mu


def _generator(U: int, K: int) -> int:
    """The a of the lattice theta (1, a, a**2, ...) mod U whose shortest vector is longest, of `GENERATORS` tried."""

    def shortest(a: int) -> float:
        basis = _reduced(np.array([pow(a, k, U) for k in range(K)], np.float64), float(U))
        return float((basis[0] ** 2).sum())

    return max(sorted({1 + i * (U - 1) // GENERATORS for i in range(GENERATORS)}), key=shortest)


def _reaches(side: float, radius: float, M: int) -> np.ndarray:
    """The distance from the centroid that each class fills, class 0 first: float64[M + 1]."""
    half = side / 2
    return np.array([half + m * (max(radius, half) - half) / M if m else half for m in range(M + 1)])


def _best_side(points: np.ndarray, centroid: np.ndarray, widest: float, radius: float, M: int, lattice: Lattice) -> float:
    """The side of least squared error on a sample: tries narrower by sqrt(2) each, then golden sections; a float32."""
    sample = points
    count = points.shape[1]
    if count > SAMPLE:  # spread out, but not in step with the rows
        sample = np.ascontiguousarray(points[:, np.arange(SAMPLE) * (int(0.618 * count) | 1) % count])
    indices = np.empty(sample.shape[1], np.int32)

    def error(halvings: float) -> float:
        return float(_assign(sample, centroid, _reaches(2 * widest * 2**-halvings, radius, M), lattice, indices)[1])

    start = min(range(HALVINGS), key=lambda i: error(i / 2)) / 2
    golden = (math.sqrt(5) - 1) / 2
    low, high = start - 0.5, start + 0.5
    for _ in range(SECTIONS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if error(left) <= error(right):
            high = right
        else:
            low = left
    best = min((start, (low + high) / 2), key=error)
    return float(np.float32(min(2 * widest * 2**-best, FLOAT32_MAX)))


# The kernels run without fast-math: the order of every sum is fixed, and so are the bytes, on any machine.


@njit(nogil=True, cache=True)
def _gram_schmidt(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # pragma: no cover  (compiled)
    """Dual vectors, coefficients and squared lengths of the orthogonalised rows of `basis`, as `Lattice` holds them."""
    K = len(basis)
    dual, mu, norm = np.zeros((K, K)), np.eye(K), np.zeros(K)
    for i in range(K):
        star = basis[i].copy()
        for j in range(i):
            mu[i, j] = (basis[i] * dual[j]).sum()
            star -= mu[i, j] * norm[j] * dual[j]
        norm[i] = (star * star).sum()
        dual[i] = star / norm[i]
    return dual, mu, norm


@njit(nogil=True, cache=True)
def _reduced(z: np.ndarray, D: float) -> np.ndarray:  # pragma: no cover  (compiled)
    """A basis of {theta z + D e}, z[0] = 1, reduced by Lagrange and Gauss.

    The entries are integers below 2**53, so every step on them is exact.
    """
    basis = np.eye(len(z)) * D
    basis[0] = z
    while len(z) > 1:
        basis[1] -= np.rint(_gram_schmidt(basis)[1][1, 0]) * basis[0]
        _, mu, norm = _gram_schmidt(basis)
        if norm[1] >= (0.999 - mu[1, 0] ** 2) * norm[0]:
            break
        basis = basis[::-1].copy()
    return basis


@njit(nogil=True, cache=True)
def _extent(points: np.ndarray) -> tuple[np.ndarray, float, float]:  # pragma: no cover  (compiled)
    """The centroid, float32[K], the largest coordinate of any vector from there, and the largest distance.

    Sums and maxima are those of vectors BLOCK apart, until the end, so that several can be taken at a time.
    """
    K, n = points.shape
    total, widest, farthest, distance = np.zeros((K, BLOCK)), np.zeros(BLOCK), np.zeros(BLOCK), np.empty(BLOCK)
    for first in range(0, n, BLOCK):
        for k in range(K):
            _add_times(total[k], 1.0, points[k, first : first + BLOCK])
    centroid = (total.sum(axis=1) / n).astype(np.float32)
    for first in range(0, n, BLOCK):
        distance[:] = 0.0
        for k in range(K):
            row, middle = points[k, first : first + BLOCK], np.float64(centroid[k])
            for i in range(len(row)):
                offset = row[i] - middle
                widest[i] = max(widest[i], abs(offset))
                distance[i] += offset * offset
        for i in range(BLOCK):
            farthest[i] = max(farthest[i], distance[i])
    return centroid, widest.max(), math.sqrt(farthest.max())


@njit(nogil=True, cache=True)
def _assign(  # pragma: no cover  (compiled)
    points: np.ndarray, centroid: np.ndarray, reaches: np.ndarray, lattice: Lattice, indices: np.ndarray
) -> tuple[float, float]:
    """Fill `indices` with the nearest entry of every vector in its class; sums of absolute and squared errors.

    By blocks, and inside a block step by step, so that the compiler can take several vectors at a time.
    """
    K, n = points.shape
    U, middle = np.int64(lattice.box[0]), lattice.D / 2 - lattice.shift
    # Units of the lattice in a unit of the weights, and back; all at the centroid if the cube has no extent.
    per_weight = np.array([lattice.D / 2 / reach if reach > 0 else 0.0 for reach in reaches])
    per_unit = reaches * (2 / lattice.D)
    absolute, squared = np.zeros(BLOCK), np.zeros(BLOCK)
    point = np.empty(K)
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        offset, u, found = np.empty((K, count)), np.empty((K, count)), np.empty((K, count))
        nearer, inside = np.zeros(count), np.ones(count, np.bool_)
        for k in range(K):
            offset[k] = points[k, first : first + count] - np.float64(centroid[k])
        classes = _classes_of(offset, reaches)
        for k in range(K):
            row, away, middle_k = u[k], offset[k], middle[k]
            for i in range(count):
                row[i] = max(-lattice.D / 2, min(lattice.D / 2, away[i] * per_weight[classes[i]])) + middle_k
        _nearest_in_lattice(u, lattice, found)
        for k in range(K):
            row, f, middle_k, size = u[k], found[k], middle[k], lattice.box[k]
            for i in range(count):
                inside[i] &= (f[i] >= 0.0) & (f[i] < size)
                # By how much what was found is nearer to u than the centroid, squared distances.
                nearer[i] += (f[i] - middle_k) * (2.0 * row[i] - f[i] - middle_k)
        for i in range(count):
            if nearer[i] > 0.0 and not inside[i]:
                for k in range(K):
                    point[k] = u[k, i]
                inside[i] = _nearest_in_box(point, middle, lattice)
                for k in range(K):
                    found[k, i] = point[k]
            index = np.int64(0)
            if nearer[i] > 0.0 and inside[i]:
                index = np.int64(found[0, i]) + 1
            else:
                for k in range(K):
                    found[k, i] = middle[k]
            indices[first + i] = index + (U + 1) * classes[i]
        for k in range(K):
            away, f, middle_k = offset[k], found[k], middle[k]
            for i in range(count):
                error = abs(away[i] - per_unit[classes[i]] * (f[i] - middle_k))
                absolute[i] += error
                squared[i] += error * error
    return absolute.sum(), squared.sum()


@njit(nogil=True, cache=True)
def _classes_of(offset: np.ndarray, reaches: np.ndarray) -> np.ndarray:  # pragma: no cover  (compiled)
    """The class of every vector: 0 inside the cube, else the first whose reach is no less than its distance."""
    M = len(reaches) - 1
    half, spread = reaches[0], reaches[M] - reaches[0]
    widest, distance = np.zeros(offset.shape[1]), np.zeros(offset.shape[1])
    for k in range(len(offset)):
        away = offset[k]
        for i in range(len(away)):
            widest[i] = max(widest[i], abs(away[i]))
            distance[i] += away[i] * away[i]
    classes = np.zeros(offset.shape[1], np.int64)
    per_class = M / spread if spread > 0 else 0.0
    for i in range(len(classes)):
        steps = np.ceil((math.sqrt(distance[i]) - half) * per_class)
        outside = min(np.float64(M), max(1.0, steps))
        classes[i] = np.int64(outside if widest[i] > half else 0.0) if M > 0 else 0
    return classes


@njit(nogil=True, cache=True)
def _nearest_in_lattice(  # pragma: no cover  (compiled)
    u: np.ndarray, lattice: Lattice, found: np.ndarray
) -> None:
    """The lattice point nearest to every u, whether in the box or not: Babai's plane by plane, then his cell's rivals."""
    K, count = u.shape
    rho, x = np.zeros((K, count)), np.empty((K, count))
    for level in range(K - 1, -1, -1):
        coefficient, rounded = rho[level], x[level]
        for k in range(K):
            _add_times(coefficient, lattice.dual[level, k], u[k])
        for above in range(level + 1, K):
            _add_times(coefficient, -lattice.mu[above, level], x[above])
        for i in range(count):
            rounded[i] = np.rint(coefficient[i])
            coefficient[i] -= rounded[i]
    gain, nearer, rival = np.zeros(count), np.empty(count), np.zeros(count, np.int64)
    for r in range(1, len(lattice.cost)):
        nearer[:] = -lattice.cost[r]
        for k in range(K):
            _add_times(nearer, lattice.slope[r, k], rho[k])
        for i in range(count):
            rival[i] = r if nearer[i] > gain[i] else rival[i]
            gain[i] = max(gain[i], nearer[i])
    for k in range(K):
        coordinate = found[k]
        for i in range(count):
            coordinate[i] = lattice.rivals[rival[i], k]
        for level in range(K):
            _add_times(coordinate, lattice.basis[level, k], x[level])


@njit(nogil=True, cache=True, inline="always")
def _add_times(target: np.ndarray, factor: float, values: np.ndarray) -> None:  # pragma: no cover  (compiled)
    """Add `factor` times `values` to the first places of `target`, which is no shorter."""
    for i in range(len(values)):
        target[i] += factor * values[i]


@njit(nogil=True, cache=True)
def _nearest_in_box(  # pragma: no cover  (compiled)
    point: np.ndarray, middle: np.ndarray, lattice: Lattice
) -> bool:
    """Put the point of the box nearest to `point` in its place; False if none is nearer than the centroid, `middle`.

    The lines of the lattice in order of their distance, as long as one can hold a nearer point than the one found.
    """
    last = len(point) - 1
    best, hit = ((point - middle) ** 2).sum(), False
    y = np.array([(point * lattice.dual[0]).sum(), (point * lattice.dual[last]).sum()])
    line = np.rint(y[1]) if last else 0.0
    turn = 1.0 if y[1] >= line else -1.0
    while True:
        away = (y[1] - line) ** 2 * lattice.norm[1] if last else 0.0
        if not away < best:
            return hit
        centre = y[0] - line * lattice.mu[1, 0] if last else y[0]
        x = _into_box(np.rint(centre), line, lattice)
        distance = away + (centre - x) ** 2 * lattice.norm[0]
        if distance < best:  # infinite or NaN if the line has no point in the box
            best, hit = distance, True
            for k in range(len(point)):
                point[k] = x * lattice.basis[0, k] + line * lattice.basis[last, k]
        if not last:
            return hit
        line += turn
        turn = -turn - (1.0 if turn > 0 else -1.0)


@njit(nogil=True, cache=True)
def _into_box(x: float, line: float, lattice: Lattice) -> float:  # pragma: no cover  (compiled)
    """The coefficient of the first basis vector nearest to x, on this line, inside the box; infinite if there is none."""
    low, high = -math.inf, math.inf
    for k in range(len(lattice.box)):
        step, start = lattice.basis[0, k], line * lattice.basis[-1, k]
        if step == 0:
            if start < 0 or start >= lattice.box[k]:
                return math.inf
        else:
            ends = -start / step, (lattice.box[k] - 1 - start) / step
            low, high = max(low, math.ceil(min(ends))), min(high, math.floor(max(ends)))
    return max(low, min(high, x)) if low <= high else math.inf


@njit(nogil=True, cache=True)
def _look_up(  # pragma: no cover  (compiled)
    indices: np.ndarray, centroid: np.ndarray, reaches: np.ndarray, lattice: Lattice, points: np.ndarray
) -> None:
    """The vectors that `indices` stand for; every index must be below (U + 1) times the number of classes."""
    U, D = np.int64(lattice.box[0]), np.int64(lattice.D)
    middle, per_unit = lattice.D / 2 - lattice.shift, reaches * (2 / lattice.D)
    for i in range(len(indices)):
        m, index = divmod(np.int64(indices[i]), U + 1)
        for k in range(points.shape[1]):
            value = np.float64(centroid[k])
            if index > 0:
                value += per_unit[m] * ((index - 1) * lattice.z[k] % D - middle[k])
            points[i, k] = max(-FLOAT32_MAX, min(FLOAT32_MAX, value))
