"""k-means for codebooks: Lloyd's iteration on top of `codebook`'s nearest centroids.

All results are the same bits on every call, whatever the number of threads: every vector is a task of its own, and sums
over vectors are taken in order, in double precision.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from . import gpu_search
from .codebook import in_blocks, nearest_kernel
from .gpu_search import CPU

SPREAD = 8192  # most centroids that k-means++ places
CHUNK = 4096  # vectors per task; with the chunk's scores it stays in the cache
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


def nearest(vectors: np.ndarray, centroids: np.ndarray, threads: int = 1, device: torch.device = CPU) -> np.ndarray:
    """Index of the nearest centroid of every vector: int32[n].

    vectors: float32[n, v], C-contiguous.  centroids: float32[k, v].  threads: share the vectors among so many.  device:
    to compute on.  The result does not depend on either.
    """
    if device != gpu_search.CPU:
        on_device = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (vectors, centroids))
        return np.asarray(gpu_search.nearest(*on_device).cpu())
    blocks, halves = in_blocks(centroids)
    found = np.empty(len(vectors), np.int32)
    like = (0,) * vectors.shape[1]

    def work(first: int) -> None:
        nearest_kernel(vectors[first : first + CHUNK], blocks, halves, like, found[first : first + CHUNK])

    starts = range(0, len(vectors), CHUNK)
    if threads == 1:  # beginning a thread would take a tenth of small codebooks' time
        for first in starts:
            work(first)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))
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


@njit(nogil=True, cache=True)
def _moments(
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
def _spread(coordinates: np.ndarray, mass: np.ndarray, squares: np.ndarray, draws: np.ndarray) -> np.ndarray:
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
