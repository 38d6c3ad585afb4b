"""How fast trajectories are found, beside the k-d tree of the authors' code and beside what the memory allows.

    python benchmarks/trajectory.py

The job is Hyper-Compression of SmolLM2's linear layers at U = 1600, M = 3, l = 0.1: classes, scaling, and the nearest of
1,601 entries for every pair of weights.  The peer takes numpy for the first and scikit-learn's KDTree(leaf_size=100) for
the second, as the authors' code does.  Both run in one thread on every tenth layer, give the same indices, and are timed
by turns, best of three; then our whole encoder takes all layers in one thread and in two.  The limit is one read of the
float32 weights and one write of the packed planes, at the speed at which one thread copies memory.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import KDTree

import agentforge as af
from agentforge.planes import Packed

U, M, L = 1600, 3, 0.1


def by_tree(weight: torch.Tensor, tree: KDTree) -> np.ndarray:
    """The stored integers, by numpy and scikit-learn."""
    points = weight.numpy().reshape(-1, 2).astype(np.float64)
    points -= points.mean(0).astype(np.float32)
    distance = np.sqrt((points**2).sum(1))
    spread = np.float64(np.float32(distance.max())) - L / 2
    steps = np.ceil((distance - L / 2) * M / spread).clip(1, M)
    classes = np.where(abs(points).max(1) > L / 2, steps, 0)
    points *= (L / 2 / (L / 2 + classes * spread / M))[:, None]
    return tree.query(points, return_distance=False)[:, 0] + (U + 1) * classes.astype(np.int64)


def encode_all(weights: list[torch.Tensor], threads: int) -> tuple[float, list[Packed]]:
    """Seconds that `threads` threads take, a tensor each at a time, and the result."""
    stage = af.stages.get("trajectory", U=U, M=M, l=L, select=False)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        packed = list(pool.map(stage.encode, weights))
    return time.perf_counter() - start, packed


def main() -> None:
    torch.set_num_threads(1)
    weights = [weight.load() for weight in af.open_model("smollm2-135m").weights()]
    sample = weights[::10]
    N = math.isqrt(U)
    theta = np.arange(U)
    grid = np.stack([theta / N**2, theta % N / N], 1) * L - L / 2
    tree = KDTree(np.concatenate([np.zeros((1, 2)), grid]), leaf_size=100)
    encode_all(sample[:1], 1)  # compiles
    ours, theirs = math.inf, math.inf
    for _ in range(3):
        seconds, packed = encode_all(sample, 1)
        ours = min(ours, seconds)
        start = time.perf_counter()
        trees = [by_tree(weight, tree) for weight in sample]
        theirs = min(theirs, time.perf_counter() - start)
    pairs = sum(len(indices) for indices in trees)
    differ = sum(int((p["indices"].numpy() != indices).sum()) for p, indices in zip(packed, trees, strict=True))
    whole = {threads: min(encode_all(weights, threads)[0] for _ in range(3)) for threads in (1, 2)}

    source = torch.cat([weight.reshape(-1) for weight in sample])
    target = torch.empty_like(source)
    copies = []
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
    bandwidth = 2 * source.nbytes / min(copies[1:])
    limit = (source.nbytes + sum(p.bits for p in packed) / 8) / bandwidth

    count = sum(weight.numel() for weight in weights)
    table = Table(title=f"U = {U}, M = {M}, l = {L}; {pairs / 1e6:.1f} M pairs in {len(sample)} layers, one thread")
    for column in ("", "seconds", "ns a pair", "times the limit"):
        table.add_column(column, justify="right" if column else "left")
    for label, seconds in (
        ("numpy and KDTree(leaf_size=100)", theirs),
        ("agentforge, whole encoder", ours),
        (f"limit: copying {bandwidth / 1e9:.1f} GB/s", limit),
    ):
        table.add_row(label, f"{seconds:.3f}", f"{seconds / pairs * 1e9:.1f}", f"{seconds / limit:.1f}")
    Console(width=120).print(table)
    print(f"ratio to the tree: {theirs / ours:.1f}; {differ} of {pairs:,} indices differ")
    print(
        f"all {len(weights)} layers, {count / 1e6:.1f} M weights: "
        + ", ".join(f"{seconds:.2f} s with {threads} thread{'s'[: threads > 1]}" for threads, seconds in whole.items())
    )


if __name__ == "__main__":
    main()
