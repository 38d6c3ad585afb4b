"""How fast k-means runs, beside scikit-learn's and beside what the multiply-adds allow.

    python benchmarks/kmeans.py

Same vectors, same start, same number of iterations (scikit-learn's is told not to stop early), both on one thread and
both in this process.  The peak is measured: as many float32 multiply-adds per second as a loop over registers reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from agentforge.stages.kmeans import kmeans, nearest

ITERATIONS = 5
CASES = ((6, 4096, 100_000), (4, 4096, 100_000), (4, 256, 200_000), (12, 4096, 50_000), (8, 65536, 10_000))


def best(work: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest of `runs` runs, after one to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@njit(fastmath=True)
def _multiply_add(x: np.ndarray, rounds: int) -> None:
    for _ in range(rounds):
        for i in range(len(x)):
            y = x[i]
            for _ in range(64):
                y = y * np.float32(0.999) + np.float32(0.001)
            x[i] = y


def main() -> None:
    x = np.ones(1024, np.float32)
    peak = 1024 * 64 * 1000 / best(lambda: _multiply_add(x, 1000))
    table = Table(title=f"one thread; peak {peak / 1e9:.0f} billion multiply-adds a second")
    for column in (
        "v",
        "k",
        "vectors",
        "nearest (s)",
        "of the peak",
        "k-means (s)",
        "scikit-learn (s)",
        "ratio",
        "inertia / theirs",
    ):
        table.add_column(column, justify="right")
    for v, k, n in CASES:
        generator = np.random.default_rng(0)
        vectors = generator.standard_normal((n, v)).astype(np.float32)
        start = vectors[generator.choice(n, k, replace=k > n)] if k <= n else generator.standard_normal((k, v))
        start = start.astype(np.float32)
        seconds = best(lambda: nearest(vectors, start))  # noqa: B023
        row = [f"{v}", f"{k}", f"{n}", f"{seconds:.3f}", f"{n * k * v / seconds / peak:.0%}"]
        if k <= n:
            with threadpool_limits(1):
                ours = best(lambda: kmeans(vectors, k, start=start, iterations=ITERATIONS, tolerance=0), 1)  # noqa: B023
                theirs = best(lambda: KMeans(k, init=start, n_init=1, max_iter=ITERATIONS, tol=0).fit(vectors), 1)  # noqa: B023
                inertia = KMeans(k, init=start, n_init=1, max_iter=ITERATIONS, tol=0).fit(vectors).inertia_
            found = kmeans(vectors, k, start=start, iterations=ITERATIONS, tolerance=0).inertia
            row += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", f"{found / inertia:.4f}"]
        table.add_row(*row)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
