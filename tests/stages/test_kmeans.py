"""k-means against brute force in double precision and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from agentforge.stages.kmeans import kmeans, nearest, spread_start


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def clustered(n: int, v: int, k: int, seed: int = 0) -> np.ndarray:
    """k tight heaps far from each other."""
    generator = np.random.default_rng(seed)
    heaps = 20 * generator.standard_normal((k, v))
    return (heaps[np.arange(n) % k] + generator.standard_normal((n, v))).astype(np.float32)


def squared_distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((x[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(2)


@pytest.mark.parametrize(("n", "v", "k"), [(1, 1, 1), (5, 2, 3), (203, 3, 128), (999, 4, 129), (401, 6, 700), (50, 8, 2048)])
def test_nearest_is_the_nearest(n: int, v: int, k: int) -> None:
    x, centroids = gaussian(n, v), gaussian(k, v, seed=1)
    found = nearest(x, centroids)
    distances = squared_distances(x, centroids)
    assert found.dtype == np.int32
    assert found.min() >= 0 and found.max() < k
    # Float32 scores differ from the truth by some 2**-22 of the squared norms.
    slack = 2**-20 * ((x**2).sum(1) + (centroids**2).sum(1).max())
    assert (distances[np.arange(n), found] <= distances.min(1) + slack).all()
    assert (found == distances.argmin(1)).mean() > 0.99 or n < 100


def test_of_equally_near_centroids_the_first_wins() -> None:
    # Small integers: all scores are exact, and there are ties everywhere, also between blocks.
    generator = np.random.default_rng(0)
    x = generator.integers(-2, 3, (500, 3)).astype(np.float32)
    centroids = generator.integers(-2, 3, (1000, 3)).astype(np.float32)
    assert np.array_equal(nearest(x, centroids), squared_distances(x, centroids).argmin(1))


def test_threads_share_the_work_and_change_nothing() -> None:
    x, centroids = gaussian(20_001, 4), gaussian(300, 4, seed=1)
    one = nearest(x, centroids)
    assert all(np.array_equal(nearest(x, centroids, threads), one) for threads in (2, 5))
    a, b = (kmeans(x, 50, iterations=5, threads=threads) for threads in (1, 3))
    assert a.centroids.tobytes() == b.centroids.tobytes() and a.inertia == b.inertia


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [lambda: gaussian(20_000, 4), lambda: clustered(20_000, 4, 90)])
def test_inertia_is_scikit_learns(weighted: bool, make: object) -> None:
    x = make()  # type: ignore[operator]
    weights = np.random.default_rng(2).exponential(size=len(x)) if weighted else None
    start = x[:100].copy()
    ours = kmeans(x, 100, weights, start=start, iterations=300, tolerance=1e-7)
    theirs = KMeans(100, init=start, n_init=1, max_iter=300, tol=1e-7).fit(x, sample_weight=weights)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=0.01)
    cost = squared_distances(x, ours.centroids)[np.arange(len(x)), ours.labels]
    assert ours.inertia == pytest.approx(float((cost * (1 if weights is None else weights)).sum()), rel=1e-6)
    assert np.array_equal(ours.labels, nearest(x, ours.centroids))


def test_a_few_iterations_are_the_textbooks() -> None:
    x, start = gaussian(3000, 3), gaussian(40, 3, seed=1)
    centroids = start.astype(np.float64)
    for _ in range(4):
        labels = squared_distances(x, centroids).argmin(1)
        centroids = np.stack([x[labels == c].astype(np.float64).mean(0) for c in range(40)])
    found = kmeans(x, 40, start=start, iterations=4, tolerance=0)
    assert found.iterations == 4
    assert abs(found.centroids - centroids).max() < 1e-4


def test_a_weight_counts_as_so_many_vectors() -> None:
    x, start = gaussian(400, 2), gaussian(10, 2, seed=1)
    times = np.random.default_rng(3).integers(0, 4, 400)
    a = kmeans(x, 10, times, start=start, iterations=20, tolerance=0)
    b = kmeans(np.repeat(x, times, 0), 10, start=start, iterations=20, tolerance=0)
    assert abs(a.centroids - b.centroids).max() < 1e-5
    assert a.inertia == pytest.approx(b.inertia)


def test_inertia_falls_with_every_iteration() -> None:
    x, start = gaussian(2000, 4), gaussian(64, 4, seed=1) * 3
    inertias = [kmeans(x, 64, start=start, iterations=n, tolerance=0).inertia for n in range(12)]
    assert all(b < a for a, b in zip(inertias, inertias[1:], strict=False))


def test_centroids_without_vectors_move_where_they_help() -> None:
    x = clustered(3000, 3, 30)
    start = np.tile(x[:1], (30, 1))  # one centroid thirty times
    found = kmeans(x, 30, start=start, iterations=50)
    assert len(np.unique(found.labels)) == 30
    best = float(((x - x.reshape(100, 30, 3).mean(0)[np.arange(3000) % 30]) ** 2).sum())
    stuck = kmeans(x, 1, start=start[:1]).inertia
    assert found.inertia < 3 * best < 0.02 * stuck
    lonely = kmeans(x, 30, np.arange(3000) < 40, start=x[-30:], iterations=50)  # vectors without weight draw nobody
    assert len(np.unique(lonely.labels[:40])) == 30


def test_the_spread_start_finds_every_heap() -> None:
    x = clustered(2000, 4, 25)
    start = spread_start(x, 25, np.ones(len(x)), seed=0)
    assert kmeans(x, 25, start=start, iterations=0).inertia < 0.02 * kmeans(x, 1, iterations=1).inertia
    assert len(np.unique(start, axis=0)) == 25
    assert np.isin(start, x).all()
    assert np.array_equal(start, spread_start(x, 25, np.ones(len(x)), seed=0))
    assert not np.array_equal(start, spread_start(x, 25, np.ones(len(x)), seed=1))
    only = spread_start(x, 10, np.arange(len(x)) % 25 == 3, seed=0, candidates=200)  # without weight, never drawn
    assert np.isin(only, x[3::25]).all()


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 8), (8, 8)])
def test_more_centroids_than_vectors(n: int, k: int) -> None:
    x = gaussian(n, 4)
    found = kmeans(x, k)
    assert np.isfinite(found.centroids).all()
    assert found.inertia == pytest.approx(0, abs=1e-10)
    assert np.array_equal(found.centroids[found.labels], x)


def test_equal_vectors_and_weights_of_zero() -> None:
    x = np.full((50, 3), 0.25, np.float32)
    assert kmeans(x, 4).inertia == 0
    assert not kmeans(x * 0, 4, np.zeros(50)).centroids.any()
