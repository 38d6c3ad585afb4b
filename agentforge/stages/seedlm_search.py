"""The search for SeedLM's seeds: the shift register, the tables of its bases, and the exact search over all seeds.

`Tables` and `search_seeds` say how it looks at a seed seldom more than once; `seedlm` says what it is for.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from ..errors import BadInput

# Table 6: the bits, counted from the oldest (least significant) one, whose sum is the next bit.
TAPS: dict[int, tuple[int, ...]] = {
    2: (0, 1),
    3: (0, 1),
    4: (0, 1),
    5: (0, 2),
    6: (0, 1),
    7: (0, 1),
    8: (0, 2, 3, 4),
    9: (0, 4),
    10: (0, 3),
    11: (0, 2),
    12: (0, 1, 2, 8),
    13: (0, 1, 2, 5),
    14: (0, 1, 2, 12),
    15: (0, 1),
    16: (0, 1, 3, 12),
    17: (0, 3),
    18: (0, 7),
    19: (0, 1, 2, 5),
    20: (0, 3),
    21: (0, 2),
    22: (0, 1),
    23: (0, 5),
    24: (0, 1, 2, 7),
}
LEAST_EXPONENT, LARGEST_EXPONENT = -8, 7
LEAST_Q, LARGEST_Q = -8, 7


def lfsr(K: int, seed: int, count: int) -> np.ndarray:
    """The `count` states of the K-bit register that follow `seed`: uint32[count].

    Fibonacci form, shifting right: the sum of the tapped bits enters as the most significant bit (Section 3.1, Figure 3).
    Raises BadInput for a K without taps in Table 6, and for a seed outside 1 to 2^K - 1.
    """
    if K not in TAPS:
        raise BadInput(f"K={K}; expected {min(TAPS)} to {max(TAPS)}")
    if not 0 < seed < 1 << K:
        raise BadInput(f"seed {seed}; expected 1 to {(1 << K) - 1}")
    states = np.empty(count, np.uint32)
    _run(seed, K, taps_mask(K), states)
    return states


def basis(K: int, C: int, P: int, seed: int) -> np.ndarray:
    """U(seed), float64[C, P] with values in -1..1 (Equation 1): the states after the seed, row by row."""
    return to_unit(lfsr(K, seed, C * P), K).reshape(C, P)


def to_unit(states: np.ndarray, K: int) -> np.ndarray:
    """Entries of U for states of the register (Equation 1): float64, from -1 to 1."""
    half = 2.0 ** (K - 1)
    return (states - half) / max(half - 1, 1.0)


def taps_mask(K: int) -> int:
    """The tapped bits of a K-bit register."""
    return sum(1 << j for j in TAPS[K])


def cycle(K: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """All states from seed 1 on, uint32[2^K - 1], and so many entries of U, float64, the i-th from the i-th state, which
    begin again at the end."""
    states = np.roll(lfsr(K, 1, (1 << K) - 1), 1)  # the last one of the cycle is the seed itself
    return states, to_unit(states[np.arange(entries) % len(states)].astype(np.float64), K)


# How the search works.  The error of a seed's best unquantised fit is what of w lies outside the span of U(s): the sum of
# (n . w)^2 over an orthonormal basis n of the D = C - P dimensions that are orthogonal to U(s).  Any few of these n bound
# it from below, and the quantised error is larger still.
#
# The columns of U(s) are the vectors v_i = (u_i, u_(i+P), u_(i+2P), ...) of the state sequence u for P neighbouring i, so
# that neighbouring seeds share columns, and g of them span only P + g - 1 dimensions: r = D - g + 1 normals are common
# to all g seeds of a group.  For C = 8, P = 3 three normals rule out more than 99% of all groups of three seeds at once,
# with 24 products; what is left is measured with the other D - r normals of each seed, and the few seeds that could still
# beat the best are fitted and quantised in double precision.
#
# Groups lie in chunks of CHUNK, whose common normals are read as long rows, [C, r, group]; the others are read one by one.
CHUNK = 256
TILE = 64  # blocks that look at a chunk while it is in the cache
SLACK = np.float32(1e-5)  # more than the rounding of float32 dot products of unit vectors, so that no seed is lost


Rule = tuple[int, int, int, int]  # least and largest exponent, what is added to it, how far around it is searched


class Tables(NamedTuple):
    """groups: float32[chunks, C, r * CHUNK], the common normals.  seeds: float32[chunks * CHUNK, g, D - r, C], the others.
    values, states: see `cycle`."""

    groups: np.ndarray
    seeds: np.ndarray
    values: np.ndarray
    states: np.ndarray


@lru_cache(maxsize=4)
def tables_of(K: int, C: int, P: int) -> Tables:
    """The tables of all bases U(s), C x P, of a register of K bits."""
    D = C - P
    r = max(1, D - round(D / 3))
    g = D - r + 1
    chunks = math.ceil(((1 << K) - 1) / (g * CHUNK))
    states, values = cycle(K, chunks * CHUNK * g + C * P + g)
    groups = np.empty((chunks, C, r, CHUNK), np.float32)
    seeds = np.empty((chunks, CHUNK, g, D - r, C), np.float32)
    rows = P * np.arange(C)[:, None]
    for chunk in range(chunks):
        first = (chunk * CHUNK + np.arange(CHUNK)) * g + 1
        # Of [columns | rest], a complete QR makes the last vectors orthogonal to all columns, dependent or not.
        span = values[first[:, None, None] + rows + np.arange(P + g - 1)]
        common = np.linalg.qr(span, mode="complete")[0][:, :, C - r :]
        groups[chunk] = common.transpose(1, 2, 0)
        for j in range(g if r < D else 0):
            own = np.concatenate([values[(first + j)[:, None, None] + rows + np.arange(P)], common], axis=2)
            others = np.linalg.qr(own, mode="complete")[0][:, :, P + r :]
            seeds[chunk, :, j] = others.transpose(0, 2, 1)
    return Tables(groups.reshape(chunks, C, -1), seeds.reshape(chunks * CHUNK, g, D - r, C), values, states)


# The compiler may fuse products and sums and assume that there are no NaNs; it may not reorder sums.
FAST = {"contract", "nnan", "nsz"}


@njit(nogil=True, cache=True)
def _run(seed: int, K: int, mask: int, states: np.ndarray) -> None:
    state = np.uint32(seed)
    for i in range(len(states)):
        tapped = state & np.uint32(mask)
        bit = np.uint32(0)
        while tapped:
            tapped &= tapped - np.uint32(1)
            bit ^= np.uint32(1)
        state = (state >> np.uint32(1)) | (bit << np.uint32(K - 1))
        states[i] = state


@njit(nogil=True, cache=True)
def reconstruct(seeds: np.ndarray, codes: np.ndarray, K: int, mask: int, values: np.ndarray) -> None:
    """values[b] = U(seeds[b]) t, float32, with U made by the register alone."""
    C, P = values.shape[1], codes.shape[1] - 1
    states = np.empty(C * P, np.uint32)
    half = 2.0 ** (K - 1)
    for b in range(len(seeds)):
        _run(seeds[b], K, mask, states)
        scale = 2.0 ** ((codes[b, 0] ^ 8) - 8) / max(half - 1.0, 1.0)
        for c in range(C):
            total = 0.0
            for j in range(P):
                total += (states[c * P + j] - half) * ((codes[b, j + 1] ^ 8) - 8)
            values[b, c] = total * scale


@njit(nogil=True, cache=True, fastmath=FAST)
def _dots(unit: np.ndarray, b: int, groups: np.ndarray, chunk: int, dots: np.ndarray) -> None:
    """dots = unit[b] @ groups[chunk]: four rows of the table at a time, then one; sums stay in registers.

    The table is indexed and not sliced: a slice costs two atomic counts of references.
    """
    C, fours = unit.shape[1], unit.shape[1] // 4 * 4
    dots[:] = 0.0
    for c in range(0, fours, 4):
        a0, a1, a2, a3 = unit[b, c], unit[b, c + 1], unit[b, c + 2], unit[b, c + 3]
        for i in range(len(dots)):
            x = a0 * groups[chunk, c, i] + a1 * groups[chunk, c + 1, i]
            dots[i] += x + (a2 * groups[chunk, c + 2, i] + a3 * groups[chunk, c + 3, i])
    for c in range(fours, C):
        a0 = unit[b, c]
        for i in range(len(dots)):
            dots[i] += a0 * groups[chunk, c, i]


@njit(nogil=True, cache=True, fastmath=FAST)
def search_seeds(
    blocks: np.ndarray, h: np.ndarray, tables: Tables, rule: Rule, seeds: np.ndarray, codes: np.ndarray
) -> None:
    """For every block the seed of least error sum_c h_c (w - U t)_c^2, lowest seed first; codes: exponent and q."""
    count = len(blocks)
    guess = 1e30  # of the relative squared error; the average of what was found so far, doubled
    total, found = 0.0, 0
    errors = np.empty(TILE)
    again = np.empty(TILE, np.int64)
    for first in range(0, count, TILE):
        left = min(TILE, count - first)
        for i in range(left):
            again[i] = first + i
        limit = guess
        while left:
            some = again[:left]
            _search_tile(blocks, some, limit, h, tables, rule, seeds, codes, errors)
            # Where nothing below the limit was found, the limit was too low.
            missed = 0
            for i in range(left):
                if errors[i] > limit:
                    again[missed] = again[i]
                    missed += 1
                else:
                    total += errors[i]
                    found += 1
            left = missed
            limit = 1e30 if limit > 1.0 else limit * 4.0
        guess = max(2.0 * total / max(found, 1), 1e-6)


@njit(nogil=True, cache=True, fastmath=FAST)
def _search_tile(
    blocks: np.ndarray,
    which: np.ndarray,
    limit: float,
    h: np.ndarray,
    tables: Tables,
    rule: Rule,
    seeds: np.ndarray,
    codes: np.ndarray,
    errors: np.ndarray,
) -> None:
    """`search_seeds` for the blocks `which` whose relative squared error is at most `limit`; errors: what was reached."""
    n, C = len(which), blocks.shape[1]
    P = codes.shape[1] - 1
    groups, normals, values, states = tables
    r = groups.shape[2] // CHUNK
    g = C - P - r + 1
    N = len(states)
    unit = np.empty((n, C), np.float32)
    square = np.empty(n)
    for b in range(n):
        total = 0.0
        for c in range(C):
            total += h[c] * np.float64(blocks[which[b], c]) ** 2
        square[b] = total
        for c in range(C):
            unit[b, c] = blocks[which[b], c] / math.sqrt(total) if total > 0.0 else 0.0
        errors[b] = limit * (1.0 + 1e-9)
        if total == 0.0:  # nothing to fit: the lowest seed, all coefficients zero
            seeds[which[b]] = 1
            codes[which[b], :] = 0
            codes[which[b], 0] = rule[0]
            errors[b] = 0.0
    dots = np.empty(r * CHUNK, np.float32)
    bound = np.empty(CHUNK, np.float32)
    fit = np.empty(P + 1, np.int64)
    for chunk in range(len(groups)):
        for b in range(n):
            if square[b] == 0.0:
                continue
            cut = _cut(errors[b])
            _dots(unit, b, groups, chunk, dots)
            _sum_of_squares(dots, bound)
            for i in range(CHUNK):
                if bound[i] > cut:
                    continue
                group = chunk * CHUNK + i
                for j in range(min(g, N - group * g)):
                    if _beyond(unit, b, normals, group, j, bound[i], cut):
                        continue
                    position = group * g + j
                    error = fit_seed(blocks[which[b]], h, values, position + 1, P, rule, fit) / square[b]
                    if error < errors[b] or (error == errors[b] and states[position] < seeds[which[b]]):
                        errors[b] = error
                        seeds[which[b]] = states[position]
                        for m in range(P + 1):
                            codes[which[b], m] = fit[m]
                        cut = _cut(error)


@njit(nogil=True, cache=True)
def _cut(error: float) -> np.float32:
    """What a bound in float32 must exceed for a seed to be ruled out."""
    return np.float32((math.sqrt(min(error, 1e30)) + SLACK) ** 2)


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum_of_squares(dots: np.ndarray, sums: np.ndarray) -> None:
    """sums[i] = sum_k dots[k, i]^2, dots being flat."""
    n = len(sums)
    for i in range(n):
        sums[i] = dots[i] * dots[i]
    for k in range(n, len(dots), n):
        row = dots[k : k + n]  # sliced, so that the compiler sees long rows
        for i in range(n):
            sums[i] += row[i] * row[i]


@njit(nogil=True, cache=True, fastmath=FAST)
def _beyond(unit: np.ndarray, b: int, normals: np.ndarray, group: int, j: int, bound: np.float32, cut: np.float32) -> bool:
    """Whether bound + |n unit[b]|^2, for n = normals[group, j], is more than `cut`."""
    for e in range(normals.shape[2]):
        dot = np.float32(0.0)
        for c in range(unit.shape[1]):
            dot += normals[group, j, e, c] * unit[b, c]
        bound += dot * dot
        if bound > cut:
            return True
    return False


@njit(nogil=True, cache=True)
def fit_seed(w: np.ndarray, h: np.ndarray, values: np.ndarray, start: int, P: int, rule: Rule, out: np.ndarray) -> float:
    """Fit the coefficients of one seed, quantise them, and return the error; out: exponent and q."""
    C = len(w)
    least, largest, shift, spread = rule
    G = np.zeros((P, P))
    p = np.zeros(P)
    for c in range(C):
        row = start + c * P
        for i in range(P):
            x = h[c] * values[row + i]
            p[i] += x * w[c]
            for j in range(i + 1):
                G[i, j] += x * values[row + j]
    L = np.zeros((P, P))
    t = _solve(G, p, L)
    biggest = 0.0
    for i in range(P):
        biggest = max(biggest, abs(t[i]))
    e = least if biggest == 0.0 else math.frexp(biggest)[1] - 1 + shift
    q, z = np.empty(P), np.empty(P)
    result = np.inf
    for trial in range(e - spread, e + spread + 1):
        exponent = min(max(trial, least), largest)
        scale = 2.0**exponent
        for i in range(P):
            z[i] = t[i] / scale
            q[i] = min(max(np.rint(z[i]), float(LEAST_Q)), float(LARGEST_Q))
        if spread:
            _nearest(L, z, q)
        error = 0.0
        for c in range(C):
            d = np.float64(w[c])
            for i in range(P):
                d -= values[start + c * P + i] * (q[i] * scale)
            error += h[c] * d * d
        if error < result:
            result = error
            out[0] = exponent
            for i in range(P):
                out[i + 1] = int(q[i])
    return result


@njit(nogil=True, cache=True)
def _solve(G: np.ndarray, p: np.ndarray, L: np.ndarray) -> np.ndarray:
    """t with G t = p by the Cholesky factor L, which is written; of G the lower triangle is read.  Where columns of U
    depend on each other (only short registers make such), t is the shortest solution, as by the pseudo-inverse."""
    P = len(p)
    t = np.zeros(P)
    singular = False
    for i in range(P):
        for j in range(i + 1):
            x = G[i, j]
            for k in range(j):
                x -= L[i, k] * L[j, k]
            if i == j:
                L[i, i] = math.sqrt(x) if x > 1e-13 * G[i, i] else 0.0
                singular = singular or L[i, i] == 0.0
            else:
                L[i, j] = x / L[j, j] if L[j, j] > 0.0 else 0.0
    if singular:
        shortest: np.ndarray = np.linalg.pinv(G + np.tril(G, -1).T, 1e-12) @ p
        return shortest
    for i in range(P):
        x = p[i]
        for k in range(i):
            x -= L[i, k] * t[k]
        t[i] = x / L[i, i]
    for i in range(P - 1, -1, -1):
        x = t[i]
        for k in range(i + 1, P):
            x -= L[k, i] * t[k]
        t[i] = x / L[i, i]
    return t


@njit(nogil=True, cache=True)
def _nearest(L: np.ndarray, z: np.ndarray, q: np.ndarray) -> None:
    """The q in LEAST_Q .. LARGEST_Q of least |L^T (q - z)|^2, found from the q that is given by depth-first enumeration,
    the last coefficient first (sphere decoding): a partial sum beyond the best one closes a branch."""
    P = len(z)
    trial = np.empty(P)
    partial = np.zeros(P + 1)
    best = 0.0
    for i in range(P):
        x = 0.0
        for j in range(i, P):
            x += L[j, i] * (q[j] - z[j])
        best += x * x
    i = P - 1
    trial[i] = LEAST_Q - 1
    while i < P:
        trial[i] += 1.0
        if trial[i] > LARGEST_Q:
            i += 1
            continue
        x = 0.0
        for j in range(i, P):
            x += L[j, i] * (trial[j] - z[j])
        partial[i] = partial[i + 1] + x * x
        if partial[i] >= best:
            continue
        if i > 0:
            i -= 1
            trial[i] = LEAST_Q - 1
        else:
            best = partial[0]
            for j in range(P):
                q[j] = trial[j]


@njit(nogil=True, cache=True)
def reweigh(
    groups: np.ndarray, seeds: np.ndarray, P: int, h: np.ndarray, new_groups: np.ndarray, new_seeds: np.ndarray
) -> None:
    """Tables for the error weighted with h: the normals, made orthonormal in the metric 1/h.

    With n . U = 0 the weighted error of the best fit is n^T w (n^T diag(1/h) n)^-1 n^T w for all normals n together, so
    Gram-Schmidt in that metric, a group's common normals first, keeps every sum of squares a lower bound.
    """
    C = len(h)
    r = groups.shape[2] // CHUNK
    g = C - P - r + 1
    normals = np.empty((C, C))
    for chunk in range(len(groups)):
        for i in range(CHUNK):
            for e in range(r):
                for c in range(C):
                    normals[e, c] = groups[chunk, c, e * CHUNK + i]
                _orthonormal(normals, e, h)
                for c in range(C):
                    new_groups[chunk, c, e * CHUNK + i] = normals[e, c]
            for j in range(g):
                for e in range(g - 1):
                    for c in range(C):
                        normals[r + e, c] = seeds[chunk * CHUNK + i, j, e, c]
                    _orthonormal(normals, r + e, h)
                    for c in range(C):
                        new_seeds[chunk * CHUNK + i, j, e, c] = normals[r + e, c]


@njit(nogil=True, cache=True)
def _orthonormal(normals: np.ndarray, e: int, h: np.ndarray) -> None:
    """Make row e orthogonal to the rows before it, and of length one, in the metric 1/h; all in double precision."""
    C = len(h)
    for k in range(e):
        x = 0.0
        for c in range(C):
            x += normals[e, c] * normals[k, c] / h[c]
        for c in range(C):
            normals[e, c] -= x * normals[k, c]
    x = 0.0
    for c in range(C):
        x += normals[e, c] * normals[e, c] / h[c]
    x = 1.0 / math.sqrt(x)
    for c in range(C):
        normals[e, c] *= x
