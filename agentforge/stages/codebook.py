"""The nearest centroids of vectors, at the speed of the multiply-adds.

The nearest centroid of x is the one with the least |c|^2 / 2 - x.c, in float32; of equal ones the first.  Every centroid
is looked at: with vectors as short as ours, 20 multiply-adds per centroid on a machine that does 16 of them at once, tests
that could skip one cost more than the skipped work.  Centroids lie in blocks of `LANES`, one coordinate after the
other, so that the inner loop runs over centroids; four vectors go through a block together, so that what is loaded is
used four times.  The loop keeps only the least score of a block; which centroid it was is found out at the end, in the
one block that won.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

LANES = 128  # centroids per block
ROUND = {"contract", "nnan", "nsz"}  # fused multiply-adds; no sum is reordered


def in_blocks(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids, float32[k, v], as the kernels read them: float32[ceil(k / LANES), v, LANES], and |c|^2 / 2,
    float32[ceil(k / LANES), LANES], infinite in the lanes beyond k."""
    k, v = centroids.shape
    count = -(-k // LANES)
    padded = np.zeros((count * LANES, v), np.float32)
    padded[:k] = centroids
    halves = np.full(count * LANES, np.inf, np.float32)
    halves[:k] = 0.5 * (centroids.astype(np.float64) ** 2).sum(1)
    blocks = np.ascontiguousarray(padded.reshape(count, LANES, v).transpose(0, 2, 1))
    return blocks, halves.reshape(count, LANES)


@intrinsic
def least(_context: Any, a: Any, b: Any) -> Any:
    """The lesser of two float32 that are not NaN.  numba's own `min` lacks the flags that LLVM wants to see before it
    takes the minimum of a loop sixteen at a time."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        less = builder.fcmp_ordered("<", args[0], args[1], flags=("nnan", "nsz"))
        return builder.select(less, args[0], args[1], flags=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@njit(nogil=True, cache=True, fastmath=ROUND)
def nearest_kernel(x: np.ndarray, blocks: np.ndarray, halves: np.ndarray, like: tuple[int, ...], found: np.ndarray) -> None:
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
