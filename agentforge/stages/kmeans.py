"""k-means for codebooks: nearest centroids at the speed of the multiply-adds, and Lloyd's iteration on top of them.

The nearest centroid of x is the one with the least |c|^2 / 2 - x.c, in float32; of equal ones the first.  Every centroid
is looked at: with vectors as short as ours, 20 multiply-adds per centroid on a machine that does 16 of them at once, tests
that could skip one cost more than the skipped work.  Centroids lie in blocks of `LANES`, one coordinate after the
other, so that the inner loop runs over centroids; four vectors go through a block together, so that what is loaded is
used four times.  The loop keeps only the least score of a block; which centroid it was is found out at the end, in the
one block that won.

All results are the same bits on every call, whatever the number of threads: every vector is a task of its own, and sums
over vectors are taken in order, in double precision.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from .base import kernels_for

CPU = torch.device("cpu")
LANES = 128  # centroids per block
SPREAD = 8192  # most centroids that k-means++ places
CHUNK = 4096  # vectors per task; with the chunk's scores it stays in the cache
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]
ROUND = {"contract", "nnan", "nsz"}  # fused multiply-adds; no sum is reordered


@dataclass(frozen=True)
class Codebook:
    """Centroids as the kernels read them.

    blocks: float32[ceil(k / LANES), v, LANES].  halves: |c|^2 / 2, float32[ceil(k / LANES), LANES], infinite in the
    lanes beyond k.
    """

    blocks: np.ndarray
    halves: np.ndarray

    @classmethod
    def of(cls, centroids: np.ndarray) -> Codebook:
        """From float32[k, v]."""
        k, v = centroids.shape
        count = -(-k // LANES)
        padded = np.zeros((count * LANES, v), np.float32)
        padded[:k] = centroids
        halves = np.full(count * LANES, np.inf, np.float32)
        halves[:k] = 0.5 * (centroids.astype(np.float64) ** 2).sum(1)
        blocks = np.ascontiguousarray(padded.reshape(count, LANES, v).transpose(0, 2, 1))
        return cls(blocks, halves.reshape(count, LANES))


def nearest(vectors: np.ndarray, centroids: np.ndarray, threads: int = 1, device: torch.device = CPU) -> np.ndarray:
    """Index of the nearest centroid of every vector: int32[n].

    vectors: float32[n, v], C-contiguous.  centroids: float32[k, v].  threads: share the vectors among so many.  device:
    to compute on.  The result does not depend on either.
    """
    if kernels := kernels_for(device):
        on_device = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (vectors, centroids))
        return np.asarray(kernels.nearest(*on_device).cpu())
    book = Codebook.of(centroids)
    found = np.empty(len(vectors), np.int32)
    like = (0,) * vectors.shape[1]

    def work(first: int) -> None:
        nearest_kernel(vectors[first : first + CHUNK], book.blocks, book.halves, like, found[first : first + CHUNK])

    _share(work, range(0, len(vectors), CHUNK), threads)
    return found


@dataclass(frozen=True)
class Clusters:
    """What `kmeans` found.  centroids: float32[k, v].  labels: int32[n], the nearest of these centroids.  inertia: the
    weighted sum of squared distances to them.  iterations: how often the centroids moved."""

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float
    iterations: int


def kmeans(
    vectors: np.ndarray,
    k: int,
    weights: np.ndarray | None = None,
    *,
    seed: int = 0,
    start: np.ndarray | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    threads: int = 1,
    device: torch.device = CPU,
) -> Clusters:
    """Lloyd's algorithm: nearest centroids and weighted means by turns.

    vectors: float32[n, v].  weights: float[n], not negative (default: all one).  start: first centroids float32[k, v]
    (default: `spread_start`).  It ends after `iterations`, or when the inertia falls by less than a share `tolerance`.
    A centroid that no vector is nearest to moves to one that is far from all centroids.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    mass = np.ones(len(vectors)) if weights is None else np.ascontiguousarray(weights, np.float64)
    centroids = spread_start(vectors, k, mass, seed) if start is None else np.array(start, np.float32)
    last = np.inf
    for done in range(iterations + 1):
        labels = nearest(vectors, centroids, threads, device)
        moments = _moments(vectors, mass, centroids, labels)
        inertia = float((mass * moments[2]).sum())
        if done == iterations or inertia == 0 or (done and last - inertia <= tolerance * last):
            break
        last = inertia
        centroids = _move(vectors, mass, centroids, moments, seed)
    return Clusters(centroids, labels, inertia, done)


def spread_start(vectors: np.ndarray, k: int, weights: np.ndarray, seed: int, candidates: int = 16) -> np.ndarray:
    """First centroids by k-means++ (Arthur and Vassilvitskii 2007): each is drawn with a chance in proportion to its
    weighted squared distance from those before.  Drawn among `candidates` * k vectors at most, taken at random; beyond
    `SPREAD` centroids, where this would take longer than what follows, k vectors at random."""
    generator = np.random.default_rng(seed)
    most = candidates * k if k <= SPREAD else k
    if len(vectors) > most:
        chosen = np.sort(generator.choice(len(vectors), most, replace=False))
        vectors, weights = vectors[chosen], weights[chosen]
    if len(vectors) == k:
        return vectors
    nothing = np.full(len(vectors), np.inf, np.float32)
    return np.asarray(vectors[_spread(np.ascontiguousarray(vectors.T), weights, nothing, generator.random(k))])


def _move(vectors: np.ndarray, mass: np.ndarray, centroids: np.ndarray, moments: Moments, seed: int) -> np.ndarray:
    """The weighted means; centroids without any weight go to vectors drawn as by k-means++."""
    sums, masses, squares = moments
    moved = centroids.copy()
    used = masses > 0
    moved[used] = sums[used] / masses[used, None]
    empty = np.flatnonzero(~used)
    if len(empty) and (squares * mass).any():
        draws = np.random.default_rng(seed).random(len(empty))
        moved[empty] = vectors[_spread(np.ascontiguousarray(vectors.T), mass, squares.astype(np.float32), draws)]
    return moved


def _share(work: Any, items: Any, threads: int) -> None:
    if threads == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        list(pool.map(work, items))


@intrinsic
def least(_context: Any, a: Any, b: Any) -> Any:
    """The lesser of two float32 that are not NaN.  numba's own `min` lacks the flags that LLVM wants to see before it
    takes the minimum of a loop sixteen at a time."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        less = builder.fcmp_ordered("<", args[0], args[1], flags=("nnan", "nsz"))
        return builder.select(less, args[0], args[1], flags=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@njit(nogil=True, cache=True, fastmath=ROUND)
def nearest_kernel(  # pragma: no cover  (compiled)
    x: np.ndarray, blocks: np.ndarray, halves: np.ndarray, like: tuple[int, ...], found: np.ndarray
) -> None:
    """The nearest centroid of each row of x.  like: a tuple as long as a vector, so that its length is known when this is
    compiled and the loop over coordinates is unrolled."""
    n = len(x)
    best = np.full(n, np.inf, np.float32)
    found[:] = 0
    for b in range(len(blocks)):
        for i in range(0, n, 4):
            # The last four may hold a vector more than once.
            i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
            m0, m1, m2, m3 = np.float32(np.inf), np.float32(np.inf), np.float32(np.inf), np.float32(np.inf)
            for c in range(LANES):
                s0 = halves[b, c]
                s1, s2, s3 = s0, s0, s0
                for d in range(len(like)):
                    y = blocks[b, d, c]
                    s0 -= x[i, d] * y
                    s1 -= x[i1, d] * y
                    s2 -= x[i2, d] * y
                    s3 -= x[i3, d] * y
                m0, m1, m2, m3 = least(s0, m0), least(s1, m1), least(s2, m2), least(s3, m3)
            for j, m in ((i, m0), (i1, m1), (i2, m2), (i3, m3)):
                if m < best[j]:
                    best[j], found[j] = m, b
    scores = np.empty(LANES, np.float32)
    for i in range(n):
        b = found[i]
        m = np.float32(np.inf)
        for c in range(LANES):
            s = halves[b, c]
            for d in range(len(like)):
                s -= x[i, d] * blocks[b, d, c]
            scores[c] = s
            m = least(s, m)
        lane = np.int32(LANES)
        for c in range(LANES):
            lane = min(lane, np.int32(c) if scores[c] == m else np.int32(LANES))
        found[i] = b * LANES + lane


@njit(nogil=True, cache=True)
def _moments(  # pragma: no cover  (compiled)
    x: np.ndarray, mass: np.ndarray, centroids: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted sums and weights of the clusters, and each vector's squared distance from its centroid."""
    k, v = centroids.shape
    sums, masses, squares = np.zeros((k, v)), np.zeros(k), np.zeros(len(x))
    for i in range(len(x)):
        c = labels[i]
        for d in range(v):
            distance = np.float64(x[i, d]) - np.float64(centroids[c, d])
            squares[i] += distance * distance
            sums[c, d] += mass[i] * x[i, d]
        masses[c] += mass[i]
    return sums, masses, squares


@njit(nogil=True, cache=True, fastmath={"contract"})
def _spread(  # pragma: no cover  (compiled)
    coordinates: np.ndarray, mass: np.ndarray, squares: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """k-means++ on float32[v, n]: the indices of the chosen vectors.  squares: float32[n], squared distances from the
    centroids there are already, all infinite for none; overwritten.  draws: a number in [0, 1) for each choice."""
    v, n = coordinates.shape
    chosen = np.zeros(len(draws), np.int64)
    distance, sums = np.empty(n, np.float32), np.empty(n)
    for j in range(len(draws)):
        total = 0.0
        for i in range(n):
            total += mass[i] * squares[i] if squares[i] < np.inf else mass[i]
            sums[i] = total
        chosen[j] = min(np.searchsorted(sums, draws[j] * total, side="right"), n - 1)
        distance[:] = 0
        for d in range(v):
            origin = coordinates[d, chosen[j]]
            for i in range(n):
                step = coordinates[d, i] - origin
                distance[i] += step * step
        for i in range(n):
            squares[i] = min(squares[i], distance[i])
    return chosen
