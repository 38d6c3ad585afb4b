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
and constant time.  The lattice's basis is reduced once, by Lagrange and Gauss.  Its points lie on lines along the shorter
vector, at least 0.86 of its length apart, so that the nearest point is on one of the two lines beside the pair.  If it lies
outside the box, the lines are gone through in order of their distance: on each the points inside the box are an interval,
and the nearest of them is a rounding.

Deviations and errata:

* variant="printed" is Equation 3 as it stands, tan(alpha) = U: theta then covers only a strip of 1/sqrt(U) of the
  square.  "code" is what the authors' code does.  The classes divide l_f - l/2 as the code does; Equations 8 and 10 print
  l_f / M.
* select=True chooses U and M per tensor as the code does (mean absolute error).  The index's width is fixed by the
  settings here, whatever was chosen; the paper counts the bits of a tensor's largest index.  The code keeps tensors of fewer
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

from ..errors import BadArtifact
from ..planes import FLOAT32_MAX, Packed
from .base import Layout, Stage, register

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
            self._expect(least <= getattr(self, key) <= most, key, f"{least} to {most}")
        if self.U_first:
            self._expect(2 <= self.U_first < self.U, "U_first", f"2 to below U={self.U}, or 0 for none")
            self._expect(self.select, "U_first", "0 if select=False, which takes U as it is")
        self._expect(self.l == 0 or 1e-30 <= self.l <= 1e30, "l", "1e-30 to 1e30, or 0 to search it")
        self._expect(self.loss >= 0, "loss", "0 or more")
        self._expect(self.variant != "printed" or self.K == 2, "K", "2 with variant=printed")

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        width = (self.U + (self.U + 1) * self.M).bit_length()
        planes: Layout = {
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
        points = np.zeros((2, flat.size // self.K), np.float32)  # with K = 1 the second coordinate stays zero
        points[: self.K] = flat.reshape(-1, self.K).T
        del weight, flat  # as large as the points
        centroid, widest, radius = _extent(points)
        radius = float(np.float32(min(radius, FLOAT32_MAX)))  # as it is stored
        for number, U in enumerate([self.U_first, self.U] if self.U_first else [self.U]):
            lattice = _lattice(U, self.K, self.variant, self.centred)
            least = math.inf
            for M in self._classes(outside=widest > self.l / 2):
                tried_side = self.l or _best_side(points, centroid, widest, radius, M, lattice)
                tried = np.empty(points.shape[1], np.int32)
                error = _assign(points, centroid, _reaches(tried_side, radius, M), lattice, tried)[0] / (self.K * tried.size)
                if error <= least:
                    least, indices, side, choice = error, tried, tried_side, (number, M)
                if least <= self.loss:
                    break
            if least <= self.loss:
                break
        values = {
            "indices": indices,
            "centroid": centroid[: self.K],
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


class Lattice(NamedTuple):
    """A codebook as the points of a lattice in a box, in units of side / D; with K = 1 they have 0 as second coordinate.

    D: units per side.  z: int64[2], the step of theta, z[0] = 1.  shift: float64[2], from the square's corner to the first
    point.  box: float64[2], coordinates run from 0 to below it.  basis: float64[2, 2] of integers, reduced, one vector per
    row.  mu: the share of its first vector in the second; norm: float64[2], squared lengths of the first one and of what
    else is in the second; dual: float64[2, 2], <u, dual[i]> is the coefficient of u along these two.
    """

    D: float
    z: np.ndarray
    shift: np.ndarray
    box: np.ndarray
    basis: np.ndarray
    mu: float
    norm: np.ndarray
    dual: np.ndarray


@functools.lru_cache(maxsize=64)
def _lattice(U: int, K: int, variant: str, centred: bool) -> Lattice:
    """The lattice of a trajectory of U points in K dimensions."""
    N = math.isqrt(U - 1) + 1
    if K == 1:
        D, step = U, 0
    elif variant == "printed":
        D, step = U * math.isqrt(U), U % (U * math.isqrt(U))
    elif variant == "korobov":
        D, step = U, _generator(U)
    else:
        D, step = N * N, N
    z = np.array([1, step], np.int64)
    # What the points leave free: theta runs to U - 1 of D, the other coordinate in steps of gcd(step, D).
    shift = np.array([(D - U + 1) / 2 if centred else 0.0, math.gcd(step, D) / 2 if centred or K == 1 else 0.0])
    basis = _reduced(z, D)
    mu = float((basis[0] * basis[1]).sum() / (basis[0] ** 2).sum())
    orthogonal = np.array([basis[0], basis[1] - mu * basis[0]])
    norm = (orthogonal**2).sum(1)
    return Lattice(float(D), z, shift, np.array([U, D], np.float64), basis, mu, norm, orthogonal / norm[:, None])


def _reduced(z: np.ndarray, D: float) -> np.ndarray:
    """A basis of {theta z + D e}, z[0] = 1, reduced by Lagrange and Gauss: the shorter vector first, integers all."""
    basis = np.array([z, [0, D]], np.float64)
    while True:
        short, long = basis
        long -= np.rint((short * long).sum() / (short * short).sum()) * short
        if (long * long).sum() >= (short * short).sum():
            return basis
        basis = basis[::-1].copy()


def _generator(U: int) -> int:
    """The a of the lattice theta (1, a) mod U whose shortest vector is longest, of `GENERATORS` tried."""

    def shortest(a: int) -> float:
        return float((_reduced(np.array([1, a]), U)[0] ** 2).sum())

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
def _extent(points: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The centroid, float32[2], the largest coordinate of any vector from there, and the largest distance.

    Sums and maxima are those of vectors BLOCK apart, until the end, so that several can be taken at a time.
    """
    n = points.shape[1]
    total, widest, farthest = np.zeros((2, BLOCK)), np.zeros(BLOCK), np.zeros(BLOCK)
    for first in range(0, n, BLOCK):
        for i in range(min(BLOCK, n - first)):
            total[0, i] += points[0, first + i]
            total[1, i] += points[1, first + i]
    centroid = (total.sum(axis=1) / n).astype(np.float32)
    cx, cy = np.float64(centroid[0]), np.float64(centroid[1])
    for first in range(0, n, BLOCK):
        for i in range(min(BLOCK, n - first)):
            x, y = points[0, first + i] - cx, points[1, first + i] - cy
            widest[i] = max(widest[i], abs(x), abs(y))
            farthest[i] = max(farthest[i], x * x + y * y)
    return centroid, widest.max(), math.sqrt(farthest.max())


@njit(nogil=True, cache=True)
def _assign(
    points: np.ndarray, centroid: np.ndarray, reaches: np.ndarray, lattice: Lattice, indices: np.ndarray
) -> tuple[float, float]:
    """Fill `indices` with the nearest entry of every vector in its class; sums of absolute and squared errors.

    By blocks, and inside a block step by step, so that the compiler can take several vectors at a time.
    """
    n = points.shape[1]
    U, half = np.int64(lattice.box[0]), lattice.D / 2
    centre, middle = centroid.astype(np.float64), half - lattice.shift
    # Units of the lattice in a unit of the weights, and back; all at the centroid if the cube has no extent.
    per_weight = np.array([half / reach if reach > 0 else 0.0 for reach in reaches])
    per_unit = reaches * (2 / lattice.D)
    absolute, squared = np.zeros(BLOCK), np.zeros(BLOCK)
    offset, u, found = np.empty((2, BLOCK)), np.empty((2, BLOCK)), np.empty((2, BLOCK))
    classes = np.empty(BLOCK, np.int64)
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        for k in range(2):
            for i in range(count):
                offset[k, i] = points[k, first + i] - centre[k]
        _classes_of(offset[:, :count], reaches, classes)
        for k in range(2):
            for i in range(count):
                u[k, i] = max(-half, min(half, offset[k, i] * per_weight[classes[i]])) + middle[k]
        _nearest_in_lattice(u[:, :count], lattice, found)
        for i in range(count):
            x, y = found[0, i], found[1, i]
            # By how much what was found is nearer to u than the centroid, squared distances.
            nearer = (x - middle[0]) * (2.0 * u[0, i] - x - middle[0]) + (y - middle[1]) * (2.0 * u[1, i] - y - middle[1])
            hit = nearer > 0.0
            if hit and not (0.0 <= x < lattice.box[0] and 0.0 <= y < lattice.box[1]):
                hit, found[0, i], found[1, i] = _nearest_in_box(u[0, i], u[1, i], middle, lattice)
            if not hit:
                found[0, i], found[1, i] = middle[0], middle[1]
            indices[first + i] = (np.int64(found[0, i]) + 1 if hit else 0) + (U + 1) * classes[i]
        for k in range(2):
            for i in range(count):
                error = abs(offset[k, i] - per_unit[classes[i]] * (found[k, i] - middle[k]))
                absolute[i] += error
                squared[i] += error * error
    return absolute.sum(), squared.sum()


@njit(nogil=True, cache=True)
def _classes_of(offset: np.ndarray, reaches: np.ndarray, classes: np.ndarray) -> None:
    """The class of every vector: 0 inside the cube, else the first whose reach is no less than its distance."""
    M = len(reaches) - 1
    half, spread = reaches[0], reaches[M] - reaches[0]
    per_class = M / spread if spread > 0 else 0.0
    for i in range(offset.shape[1]):
        x, y = offset[0, i], offset[1, i]
        steps = np.ceil((math.sqrt(x * x + y * y) - half) * per_class)
        outside = min(np.float64(M), max(1.0, steps))
        classes[i] = np.int64(outside if max(abs(x), abs(y)) > half else 0.0) if M > 0 else 0


@njit(nogil=True, cache=True)
def _nearest_in_lattice(u: np.ndarray, lattice: Lattice, found: np.ndarray) -> None:
    """The lattice point nearest to every u, whether in the box or not: the nearer one of those on the two lines beside u."""
    basis, dual, mu, (along, across) = lattice.basis, lattice.dual, lattice.mu, lattice.norm
    for i in range(u.shape[1]):
        x = u[0, i] * dual[0, 0] + u[1, i] * dual[0, 1]
        y = u[0, i] * dual[1, 0] + u[1, i] * dual[1, 1]
        line = np.rint(y)
        other = line + (1.0 if y > line else -1.0)
        place, its = np.rint(x - mu * line), np.rint(x - mu * other)
        distance = (y - line) ** 2 * across + (x - mu * line - place) ** 2 * along
        its_distance = (y - other) ** 2 * across + (x - mu * other - its) ** 2 * along
        place, line = (its, other) if its_distance < distance else (place, line)
        found[0, i] = place * basis[0, 0] + line * basis[1, 0]
        found[1, i] = place * basis[0, 1] + line * basis[1, 1]


@njit(nogil=True, cache=True)
def _nearest_in_box(ux: float, uy: float, middle: np.ndarray, lattice: Lattice) -> tuple[bool, float, float]:
    """Whether a point of the box is nearer to u than the centroid, `middle`, and the nearest one.

    The lines of the lattice in order of their distance, as long as one can hold a nearer point than the one found.
    """
    basis, dual = lattice.basis, lattice.dual
    best, hit, at_x, at_y = (ux - middle[0]) ** 2 + (uy - middle[1]) ** 2, False, 0.0, 0.0
    x, y = ux * dual[0, 0] + uy * dual[0, 1], ux * dual[1, 0] + uy * dual[1, 1]
    line = np.rint(y)
    turn = 1.0 if y >= line else -1.0
    while (y - line) ** 2 * lattice.norm[1] < best:
        centre = x - line * lattice.mu
        place = _into_box(np.rint(centre), line, lattice)
        distance = (y - line) ** 2 * lattice.norm[1] + (centre - place) ** 2 * lattice.norm[0]
        if distance < best:  # infinite or NaN if the line has no point in the box
            best, hit = distance, True
            at_x, at_y = place * basis[0, 0] + line * basis[1, 0], place * basis[0, 1] + line * basis[1, 1]
        line += turn
        turn = -turn - (1.0 if turn > 0 else -1.0)
    return hit, at_x, at_y


@njit(nogil=True, cache=True)
def _into_box(x: float, line: float, lattice: Lattice) -> float:
    """The coefficient of the first basis vector nearest to x, on this line, inside the box; infinite if there is none."""
    low, high = -math.inf, math.inf
    for k in range(2):
        step, start = lattice.basis[0, k], line * lattice.basis[1, k]
        if step == 0:
            if start < 0 or start >= lattice.box[k]:
                return math.inf
        else:
            ends = -start / step, (lattice.box[k] - 1 - start) / step
            low, high = max(low, math.ceil(min(ends))), min(high, math.floor(max(ends)))
    return max(low, min(high, x)) if low <= high else math.inf


@njit(nogil=True, cache=True)
def _look_up(indices: np.ndarray, centroid: np.ndarray, reaches: np.ndarray, lattice: Lattice, points: np.ndarray) -> None:
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
