"""Kernels of second-order quantisation: the factor of the Hessian, sums of errors, one block of columns.

Matrices lie with the inputs (columns of the weight) as rows, so that the inner loops run over a column's weights.  No
kernel shares its work between threads, and every sum has a fixed order: the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from ..errors import BadInput
from .codebook import nearest_kernel

TILE = 576  # weights of a column that are worked on together: twelve such rows fit into the first cache
FACTOR = 64  # rows of a factor that are found together
BLOCK = 64  # columns that pass on their errors together


def unit_factor(hessian: np.ndarray, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """M, strictly upper triangular part only, float32[n, n], and D, float64[n], of H = M D M^T.

    Raises BadInput if H is not positive definite.

    hessian: float[n, n], symmetric.  damping: what is added to its diagonal, in units of the diagonal's mean.  By Cholesky's
    method in double precision on H read from its end: with J the reversal of order, J H J = U^T U gives
    H = (J U^T J)(J U^T J)^T, whose first factor is upper triangular.  In memory are 12 bytes * n^2.
    """
    upper = np.array(hessian[::-1, ::-1], np.float64, order="C")  # a copy always: it is worked on in place
    if damping:
        upper[np.diag_indices(len(upper))] += damping * np.diag(upper)[::-1].mean()
    for first in range(0, len(upper), FACTOR):
        last = min(first + FACTOR, len(upper))
        done = upper[:first]
        add_product(upper[first:last, first:], -done[:, first:last], np.ascontiguousarray(done[:, first:]))
        if not _eliminate(upper, first, last):
            raise BadInput("the statistics are not second moments (not positive definite); collect them again")
    factor = upper.T[::-1, ::-1]
    roots = np.diag(factor).copy()
    unit = np.empty(upper.shape, np.float32)
    for first in range(0, len(upper), FACTOR):
        unit[first : first + FACTOR] = np.triu(factor[first : first + FACTOR] / roots, first + 1)
    return unit, roots * roots


@njit(nogil=True, cache=True)
def _eliminate(upper: np.ndarray, first: int, last: int) -> bool:
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


@njit(nogil=True, cache=True)
def _eight(a: np.ndarray, i: int, j: int) -> tuple[np.float32, ...]:
    """Eight numbers of a column, as values that stay in registers."""
    return a[i, j], a[i + 1, j], a[i + 2, j], a[i + 3, j], a[i + 4, j], a[i + 5, j], a[i + 6, j], a[i + 7, j]


@njit(nogil=True, cache=True, fastmath={"contract"})
def add_product(out: np.ndarray, a: np.ndarray, e: np.ndarray) -> None:
    """out += a.T @ e for a [n, m] and e [n, columns]: eight rows of e go into four rows of `out` in one run."""
    n, m = a.shape
    columns = e.shape[1]
    whole, fours = n // 8 * 8, m // 4 * 4
    for t in range(0, columns, TILE):
        end = min(t + TILE, columns)
        for i in range(0, whole, 8):
            e0, e1, e2, e3 = e[i, t:end], e[i + 1, t:end], e[i + 2, t:end], e[i + 3, t:end]
            e4, e5, e6, e7 = e[i + 4, t:end], e[i + 5, t:end], e[i + 6, t:end], e[i + 7, t:end]
            for j in range(0, fours, 4):
                o0, o1, o2, o3 = out[j, t:end], out[j + 1, t:end], out[j + 2, t:end], out[j + 3, t:end]
                p0, p1, p2, p3 = _eight(a, i, j), _eight(a, i, j + 1), _eight(a, i, j + 2), _eight(a, i, j + 3)
                for c in range(end - t):
                    x0, x1, x2, x3, x4, x5, x6, x7 = e0[c], e1[c], e2[c], e3[c], e4[c], e5[c], e6[c], e7[c]
                    o0[c] += (
                        p0[0] * x0 + p0[1] * x1 + p0[2] * x2 + p0[3] * x3 + p0[4] * x4 + p0[5] * x5 + p0[6] * x6 + p0[7] * x7
                    )
                    o1[c] += (
                        p1[0] * x0 + p1[1] * x1 + p1[2] * x2 + p1[3] * x3 + p1[4] * x4 + p1[5] * x5 + p1[6] * x6 + p1[7] * x7
                    )
                    o2[c] += (
                        p2[0] * x0 + p2[1] * x1 + p2[2] * x2 + p2[3] * x3 + p2[4] * x4 + p2[5] * x5 + p2[6] * x6 + p2[7] * x7
                    )
                    o3[c] += (
                        p3[0] * x0 + p3[1] * x1 + p3[2] * x2 + p3[3] * x3 + p3[4] * x4 + p3[5] * x5 + p3[6] * x6 + p3[7] * x7
                    )
            for j in range(fours, m):
                for k in range(i, i + 8):
                    for c in range(t, end):
                        out[j, c] += a[k, j] * e[k, c]
        for i in range(whole, n):
            for j in range(m):
                for c in range(t, end):
                    out[j, c] += a[i, j] * e[i, c]


def product(hessian: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """hessian @ matrix, of a symmetric one."""
    out = np.zeros_like(matrix)
    add_product(out, hessian, matrix)
    return out


def quantised(weight: np.ndarray, factor: np.ndarray, quantise_block: Callable[..., None]) -> np.ndarray:
    """Multiples, int32[in, out], of a weight, float32[in, out], whose columns are quantised one after the other.

    factor: M of `unit_factor`.  quantise_block(first, last, codes, target, error): does so with columns first .. last - 1,
    each of which then calls `pass_on`.
    """
    codes = np.zeros(weight.shape, np.int32)
    target, error = weight.copy(), np.zeros_like(weight)
    feedback = bool(factor.any())
    for first in range(0, len(weight), BLOCK):
        last = min(first + BLOCK, len(weight))
        if feedback and first:
            add_product(target[first:last], np.ascontiguousarray(factor[:first, first:last]), error[:first])
        quantise_block(first, last, codes, target, error)
    return codes


@njit(nogil=True, cache=True)
def pass_on(n: int, last: int, factor: np.ndarray, target: np.ndarray, error: np.ndarray) -> None:
    """The error of column n, to those that follow it in its block."""
    for m in range(n + 1, last):
        share = factor[n, m]
        if share != 0:
            for r in range(target.shape[1]):
                target[m, r] += share * error[n, r]


@njit(nogil=True, cache=True)
def pass_down(heads: np.ndarray, row: int, left: np.float32, told: np.ndarray, after: np.ndarray) -> None:
    """What a row has left of its target, to those that follow it in its head, beside what the rows before have told them.

    heads: M' of each, float32[heads, size, size].  told, after: float32[size], which may be one array.
    """
    size = len(told)
    i = row % size
    for j in range(i + 1, size):
        after[j] = (told[j] if i else np.float32(0)) + heads[row // size, i, j] * left


@njit(nogil=True, cache=True, fastmath={"contract"})
def sweep_block(
    first: int,
    last: int,
    layer: tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray],
    books: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...],
    like: tuple[int, ...],
    keep: bool,
    indices: tuple[np.ndarray, np.ndarray],
    target: np.ndarray,
    error: np.ndarray,
) -> None:
    """Quantise columns first .. last - 1 one after the other, and pass each change of error on to those that follow.

    layer: the weight, float32[in, padded rows]; its rows; coefficients, float32[in, in], what of a column's error its
    successor's target takes; scales and their inverses, float32[in].  books: blocks, halves and centroids of the parts'
    codebooks, main and residual, none at all for no residual; like: as for `nearest_kernel`.  indices: of both,
    int32[last - first, parts, chunks], overwritten; keep: the residual indices are those of an earlier sweep, and the main
    codebook first has to do with what they leave.  target, error: float32[in, padded rows].
    """
    weight, rows, coefficients, scale, inverse = layer
    main, residual = books
    main_indices, residual_indices = indices
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
def gather(values: np.ndarray, where: np.ndarray, scale: np.ndarray, rows: int) -> np.ndarray:
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
def scatter(sums: np.ndarray, matrix: np.ndarray, where: np.ndarray, scale: np.ndarray, rows: int) -> None:
    """The transpose of `gather`: adds scale_n * matrix[n, r] to sums[where[level, n, r]] for every level."""
    levels, columns, _ = where.shape
    for level in range(levels):
        for n in range(columns):
            for r in range(rows):
                sums[where[level, n, r]] += np.float64(scale[n]) * matrix[n, r]
