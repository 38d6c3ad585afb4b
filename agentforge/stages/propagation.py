"""Kernels of second-order quantisation: the factor of the Hessian, sums of errors, one block of columns.

Matrices lie with the inputs (columns of the weight) as rows, so that the inner loops run over a column's weights.  No
kernel shares its work between threads, and every sum has a fixed order: the same bits everywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .kmeans import nearest_kernel

TILE = 512  # weights of a column that are worked on together: eight such rows fit into the first cache
FACTOR = 64  # rows of a factor that are found together


def unit_factor(hessian: np.ndarray) -> np.ndarray | None:
    """M of H = M D M^T, strictly upper triangular part only: float32[n, n]; None where H is not positive definite.

    hessian: float[n, n], symmetric.  By Cholesky's method in double precision on H read from its end: with J the
    reversal of order, J H J = U^T U gives H = (J U^T J)(J U^T J)^T, whose first factor is upper triangular.
    """
    upper = np.ascontiguousarray(hessian[::-1, ::-1], np.float64)
    for first in range(0, len(upper), FACTOR):
        last = min(first + FACTOR, len(upper))
        done = upper[:first]
        add_product(upper[first:last, first:], -done[:, first:last], np.ascontiguousarray(done[:, first:]))
        if not _eliminate(upper, first, last):
            return None
    factor = np.triu(upper).T[::-1, ::-1]
    return np.ascontiguousarray(np.triu(factor / np.diag(factor), 1), np.float32)


@njit(nogil=True, cache=True)
def _eliminate(upper: np.ndarray, first: int, last: int) -> bool:  # pragma: no cover  (compiled)
    """Rows first .. last - 1 of Cholesky's factor, in place, the rows before them being done with."""
    n = len(upper)
    for i in range(first, last):
        for j in range(first, i):
            x = upper[j, i]
            for c in range(i, n):
                upper[i, c] -= x * upper[j, c]
        if not upper[i, i] > 0:
            return False
        x = 1 / np.sqrt(upper[i, i])
        for c in range(i, n):
            upper[i, c] *= x
    return True


@njit(nogil=True, cache=True, fastmath={"contract"})
def add_product(out: np.ndarray, a: np.ndarray, e: np.ndarray) -> None:  # pragma: no cover  (compiled)
    """out += a.T @ e for a [n, m] and e [n, columns], four rows of each at a time."""
    n, m = a.shape
    columns = e.shape[1]
    for t in range(0, columns, TILE):
        end = min(t + TILE, columns)
        for i in range(0, n - 3, 4):
            e0, e1, e2, e3 = e[i, t:end], e[i + 1, t:end], e[i + 2, t:end], e[i + 3, t:end]
            for j in range(0, m - 3, 4):
                o0, o1, o2, o3 = out[j, t:end], out[j + 1, t:end], out[j + 2, t:end], out[j + 3, t:end]
                for c in range(end - t):
                    x0, x1, x2, x3 = e0[c], e1[c], e2[c], e3[c]
                    o0[c] += a[i, j] * x0 + a[i + 1, j] * x1 + a[i + 2, j] * x2 + a[i + 3, j] * x3
                    o1[c] += a[i, j + 1] * x0 + a[i + 1, j + 1] * x1 + a[i + 2, j + 1] * x2 + a[i + 3, j + 1] * x3
                    o2[c] += a[i, j + 2] * x0 + a[i + 1, j + 2] * x1 + a[i + 2, j + 2] * x2 + a[i + 3, j + 2] * x3
                    o3[c] += a[i, j + 3] * x0 + a[i + 1, j + 3] * x1 + a[i + 2, j + 3] * x2 + a[i + 3, j + 3] * x3
            for j in range(m // 4 * 4, m):
                o0 = out[j, t:end]
                for c in range(end - t):
                    o0[c] += a[i, j] * e0[c] + a[i + 1, j] * e1[c] + a[i + 2, j] * e2[c] + a[i + 3, j] * e3[c]
        for i in range(n // 4 * 4, n):
            e0 = e[i, t:end]
            for j in range(m):
                o0 = out[j, t:end]
                for c in range(end - t):
                    o0[c] += a[i, j] * e0[c]


@njit(nogil=True, cache=True, fastmath={"contract"})
def sweep_block(  # pragma: no cover  (compiled)
    first: int,
    last: int,
    weight: np.ndarray,
    rows: int,
    coefficients: np.ndarray,
    scale: np.ndarray,
    inverse: np.ndarray,
    main: tuple[np.ndarray, np.ndarray, np.ndarray],
    residual: tuple[np.ndarray, np.ndarray, np.ndarray],
    like: tuple[int, ...],
    keep: bool,
    main_indices: np.ndarray,
    residual_indices: np.ndarray,
    target: np.ndarray,
    error: np.ndarray,
) -> None:
    """Quantise columns first .. last - 1 one after the other, and pass each change of error on to those that follow.

    weight, target, error: float32[in, padded rows].  coefficients: float32[in, in], what of a column's error its
    successor's target takes.  scale, inverse: float32[in].  main, residual: blocks, halves and centroids of the parts'
    codebooks, none at all for no residual; like: as for `nearest_kernel`.  *_indices: int32[last - first, parts, chunks],
    overwritten; keep: the residual indices are those of an earlier sweep, and the main codebook first has to do with
    what they leave.
    """
    width = len(like)
    parts, chunks = main_indices.shape[1:]
    x = np.empty((chunks, width), np.float32)
    change = np.empty(weight.shape[1], np.float32)
    two = len(residual[0]) > 0
    for n in range(first, last):
        change[:] = 0
        for part in range(parts):
            found, found_too = main_indices[n - first, part], residual_indices[n - first, part]
            for i in range(chunks):
                row = (i * parts + part) * width
                for d in range(width):
                    x[i, d] = target[n, row + d] * inverse[n]
                    if two and keep:
                        x[i, d] -= residual[2][part, found_too[i], d]
            nearest_kernel(x, main[0][part], main[1][part], like, found)
            if two:
                for i in range(chunks):
                    row = (i * parts + part) * width
                    for d in range(width):
                        x[i, d] = target[n, row + d] * inverse[n] - main[2][part, found[i], d]
                nearest_kernel(x, residual[0][part], residual[1][part], like, found_too)
            for i in range(chunks):
                row = (i * parts + part) * width
                for d in range(min(width, rows - row)):
                    value = main[2][part, found[i], d]
                    if two:
                        value += residual[2][part, found_too[i], d]
                    new = weight[n, row + d] - scale[n] * value
                    change[row + d] = new - error[n, row + d]
                    error[n, row + d] = new
        for m in range(n + 1, last):
            share = coefficients[n, m]
            for r in range(rows):
                target[m, r] += share * change[r]


@njit(nogil=True, cache=True)
def gather(
    values: np.ndarray, where: np.ndarray, scale: np.ndarray, rows: int
) -> np.ndarray:  # pragma: no cover  (compiled)
    """scale_n * sum over levels of values[where[level, n, r]]: float32[in, padded rows], 0 beyond `rows`.

    values: float64[...], all centroids, flat.  where: int32[levels, in, padded rows].
    """
    levels, columns, padded = where.shape
    out = np.zeros((columns, padded), np.float32)
    for n in range(columns):
        for r in range(rows):
            total = 0.0
            for level in range(levels):
                total += values[where[level, n, r]]
            out[n, r] = scale[n] * total
    return out


@njit(nogil=True, cache=True)
def scatter(  # pragma: no cover  (compiled)
    sums: np.ndarray, matrix: np.ndarray, where: np.ndarray, scale: np.ndarray, rows: int
) -> None:
    """The transpose of `gather`: adds scale_n * matrix[n, r] to sums[where[level, n, r]] for every level."""
    levels, columns, _ = where.shape
    for level in range(levels):
        for n in range(columns):
            for r in range(rows):
                sums[where[level, n, r]] += np.float64(scale[n]) * matrix[n, r]
