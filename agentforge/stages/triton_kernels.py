"""Triton kernels for the two exhaustive searches, nearest centroid and seed, with the results of the CPU's kernels.

Imported only where Triton is installed, by `base.kernels_for`, for weights on a GPU (or on the CPU under
TRITON_INTERPRET=1, as in the tests).

Both searches go in two steps.  Tensor cores score everything, fast and with errors of which a bound is known; whatever is
too close to the best to be told apart by such scores is then scored again by the operations of the CPU, in their order
(`nearest`), or by the CPU's own code (`search`).  So the result is that of the CPU, bit for bit, however a tensor core
rounds.

Tensor cores multiply numbers of 11 significant bits (TF32, float16).  A float32 is split into two such numbers,
x = high + low to 2**-22, and x.c = high.high + low.high + high.low becomes one longer product:
[high, low, high].[high, high, low].
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numba import njit

from .codebook import LANES, Codebook
from .seedlm_search import LARGEST_Q, LEAST_Q, fit_seed, lfsr, to_unit

ROWS = 128  # vectors per program of the first step
EXACT_ROWS = 32  # vectors per program of the second
CHUNK = 1 << 21  # vectors at a time: 0.3 GB of split operands for vectors of 8
FEW = 2048  # centroids for which the second step alone is as fast
ERROR = 2.0**-16  # of the first step's scores, the CPU's own rounding included; see `_margins`
SEEDS = 128  # neighbouring seeds of which the first step keeps the largest energy
ENERGIES = 1 << 27  # such energies at a time: 0.5 GB
PAIRS = 1 << 19  # blocks and chunks of seeds at a time in the second step: 0.3 GB
PAIR_ROWS = 16
GUESSES = 4
CLOSE = 1e-9  # relative; numbers in double precision that differ by less may come out in the other order on the CPU
SINGULAR = 1e-6  # share of a column's square that lies outside the columns before it
SLACK = 1e-5  # of the root of an energy: more than float32 loses in it

Array = np.ndarray[Any, Any]


def nearest(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of every vector, int32[n], as `kmeans.nearest` gives it: of equal ones the first.

    vectors: float32[n, v], centroids: float32[k, v], both contiguous and on one device.
    """
    book = Codebook.of(centroids.cpu().numpy())  # the CPU's own halves of squared norms, to the last bit
    blocks = torch.from_numpy(book.blocks).to(vectors.device)
    halves = torch.from_numpy(book.halves).to(vectors.device)
    found = torch.empty(len(vectors), dtype=torch.int32, device=vectors.device)
    if not len(vectors):
        return found
    if len(centroids) <= FEW:
        _exact(vectors, blocks, halves, torch.zeros_like(found), len(blocks), found)
        return found
    right = _right(centroids, halves.reshape(-1))
    norms = centroids.norm(dim=1)
    for x, part in zip(vectors.split(CHUNK), found.split(CHUNK), strict=True):
        block, lead = torch.empty_like(part), torch.empty(len(part), device=part.device)
        grid = (triton.cdiv(len(part), ROWS),)
        left = _left(x, right.shape[1])
        _best_block[grid](left, right, block, lead, len(part), len(blocks), right.shape[1], ROWS, LANES, num_warps=8)
        _exact(x, blocks, halves, block, 1, part)
        close = (~(lead > _margins(x, norms))).nonzero().squeeze(1)  # what is not a number is close, too
        if len(close):
            again = torch.empty_like(part[close])
            _exact(x[close].contiguous(), blocks, halves, torch.zeros_like(again), len(blocks), again)
            part[close] = again
    return found


def _margins(x: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """By how much the best block must lead for its lead to be beyond doubt: float32[n].

    A score |c|**2 / 2 - x.c is wrong by less than 2**-17 (|x| |c| + |c|**2 / 2): 2**-21 for what the split leaves out, and
    2**-18 for at most 64 terms summed in float32, truncated; both scores may be wrong.  A centroid longer than
    R = 4 |x| + 2 min|c| is farther from x than the shortest one is, by far more than these errors, so that only lengths
    up to R count.
    """
    size = x.norm(dim=1)
    reach = (4 * size + 2 * norms.min()).clamp(max=norms.max())
    margins: torch.Tensor = ERROR * (size * reach + reach * reach / 2)
    return margins


def _tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to the 11 significant bits of TF32."""
    rounded: torch.Tensor = ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return rounded


def _left(x: torch.Tensor, length: int) -> torch.Tensor:
    """[high, low, high, 1, 1] of every vector, filled up with zeros: float32[n, length]."""
    n, v = x.shape
    left = torch.zeros(n, length, device=x.device)
    left[:, :v] = left[:, 2 * v : 3 * v] = high = _tf32(x)
    left[:, v : 2 * v] = _tf32(x - high)
    left[:, 3 * v : 3 * v + 2] = 1
    return left


def _right(centroids: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """[high, high, low, -half's high, -half's low] of every centroid: float32[lanes, power of two]; the product with the
    left is x.c - |c|**2 / 2.  Lanes beyond the last centroid lose against all."""
    k, v = centroids.shape
    right = torch.zeros(len(halves), max(triton.next_power_of_2(3 * v + 2), 16), device=centroids.device)
    right[:k, :v] = right[:k, v : 2 * v] = high = _tf32(centroids)
    right[:k, 2 * v : 3 * v] = _tf32(centroids - high)
    right[:k, 3 * v] = high_half = -_tf32(halves[:k])
    right[:k, 3 * v + 1] = _tf32(-halves[:k] - high_half)
    right[k:, 3 * v] = -(2.0**127)
    return right


def _exact(
    x: torch.Tensor, blocks: torch.Tensor, halves: torch.Tensor, start: torch.Tensor, count: int, found: torch.Tensor
) -> None:
    """found[i] becomes the nearest of the centroids in the `count` blocks from start[i], scored as on the CPU."""
    grid = (triton.cdiv(len(x), EXACT_ROWS),)
    _nearest_in[grid](x, blocks, halves, start, found, len(x), count, x.shape[1], EXACT_ROWS, LANES)


def search(
    blocks: Array, h: Array, K: int, P: int, rule: tuple[int, int, int, int], device: str = "cuda"
) -> tuple[Array, Array]:
    """The seed of least error for every block, uint32[n], and its exponent and coefficients, int8[n, P + 1].

    blocks: float32[n, C].  h: float64[C], the weight of each column's error.  K, P, rule: as for
    `seedlm_search.search_seeds`, whose result this is.

    The energy of a seed is the share of |w|**2 that lies in the span of U(s); one less the energy is the error of the best
    unquantised fit.  The seeds of most energy, one of each of `GUESSES` parts of all seeds, set an error that others must
    be able to beat; those that can are fitted on the device, and those that are best, or too close to call, on the CPU.
    """
    n, C = blocks.shape
    job = _Job.of(h, K, C, P, rule, device)
    seeds, codes = np.empty(n, np.uint32), np.empty((n, P + 1), np.int8)
    step = max(ENERGIES // len(job.table), ROWS)
    for part in (slice(first, first + step) for first in range(0, n, step)):
        owners, positions = _survivors(job, torch.from_numpy(blocks[part]).to(device))
        _choose(job, owners, positions, blocks[part], seeds[part], codes[part])
    return seeds, codes


class _Job(NamedTuple):
    """What is the same for all blocks.  values, states: as in `seedlm_search.Tables`; values also on the device.  right,
    table: see `_seed_operands`."""

    h: Array
    rule: tuple[int, int, int, int]
    values: Array
    states: Array
    on_device: torch.Tensor
    right: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, h: Array, K: int, C: int, P: int, rule: tuple[int, int, int, int], device: str) -> _Job:
        """The tables of a search on `device`: arguments as for `search`, h the importance of a block's weights."""
        count = (1 << K) - 1
        states = np.roll(lfsr(K, 1, count), 1)  # the last one of the cycle is the seed itself
        values = to_unit(states[np.arange(count + C * P) % count].astype(np.float64), K)
        on_device = torch.from_numpy(values).to(device)
        bases = _bases(on_device, count, C, P, torch.from_numpy(np.sqrt(h)).to(device))
        return cls(h, rule, values, states, on_device, *_seed_operands(bases))


def _survivors(job: _Job, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, in ascending order, and the positions of the seeds that may be the best for them."""
    w = blocks.double() * torch.from_numpy(np.sqrt(job.h)).to(blocks.device)
    size = w.norm(dim=1, keepdim=True)
    x = (w / size.clamp(min=1e-300)).float()
    everyone = torch.arange(len(x), device=x.device)
    energies = _chunk_energies(x, job.right)
    least = torch.where(size.squeeze(1) > 0, math.inf, 0.0)  # nothing is sought for a block of zeros
    first = 0
    for some in energies.tensor_split(min(GUESSES, len(energies))):
        chunks = some.argmax(0) + first
        first += len(some)
        best = chunks * SEEDS + _pair_energies(x, job.table, everyone, chunks).argmax(1)
        errors, certain = _plain_errors(job, blocks, everyone, best.clamp(max=len(job.states) - 1))
        least = torch.where(certain, torch.minimum(errors, least), least)
    # A basis of P rows of length one, rounded to 11 bits, is wrong by at most 2**-11 sqrt(P) in all; x is of length one.
    lost = 2.0**-11 * math.sqrt(job.right.shape[1])
    pairs = (energies.T.sqrt() >= (_root(least) - lost).unsqueeze(1)).nonzero()
    found = [_candidates(job, blocks, x, least, *some.T.contiguous()) for some in pairs.split(PAIRS)]
    owners, positions, energy, errors, certain = (torch.cat(columns) for columns in zip(*found, strict=True))
    least.scatter_reduce_(0, owners[certain], errors[certain], "amin")
    keep = energy.sqrt() >= _root(least)[owners]
    if not job.rule[3]:  # what is refined on the CPU may still fall below any other
        keep &= ~certain | (errors <= least[owners] * (1 + CLOSE))
    return owners[keep], positions[keep]


def _root(errors: torch.Tensor) -> torch.Tensor:
    """The least root of an energy that can come with these relative errors: float32[n]."""
    return (1 - errors).clamp(min=0).sqrt().float() - SLACK


def _candidates(
    job: _Job, blocks: torch.Tensor, x: torch.Tensor, least: torch.Tensor, owners: torch.Tensor, chunks: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of every seed in these chunks whose energy lets it beat the least error of its block: block, position, energy, and
    what `_plain_errors` gives."""
    energies = _pair_energies(x, job.table, owners, chunks)
    pair, lane = (energies.sqrt() >= _root(least)[owners].unsqueeze(1)).nonzero(as_tuple=True)
    positions = chunks[pair] * SEEDS + lane
    inside = positions < len(job.states)
    pair, lane, positions = pair[inside], lane[inside], positions[inside]
    return owners[pair], positions, energies[pair, lane], *_plain_errors(job, blocks, owners[pair], positions)


def _plain_errors(
    job: _Job, blocks: torch.Tensor, owners: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors of these seeds, float64[m], fitted and rounded as in `seedlm_search.fit_seed` without refinement, and
    whether the CPU is certain to find the same: not if a number is about to be rounded the other way, or U is nearly
    singular."""
    C, P = blocks.shape[1], job.table.shape[1]
    least, largest, shift, _ = job.rule
    w = [column[owners].double() for column in blocks.T.contiguous()]
    u = [[job.on_device[positions + 1 + c * P + i] for i in range(P)] for c in range(C)]
    h = job.h.tolist()
    G = [[sum(h[c] * u[c][i] * u[c][j] for c in range(C)) for j in range(i + 1)] for i in range(P)]
    L: list[list[torch.Tensor]] = [[] for _ in range(P)]
    t: list[torch.Tensor] = []
    certain = torch.ones_like(positions, dtype=torch.bool)
    for i in range(P):
        for j in range(i):
            L[i].append((G[i][j] - sum(L[i][k] * L[j][k] for k in range(j))) / L[j][j])
        pivot = G[i][i] - sum(L[i][k] * L[i][k] for k in range(i))
        certain &= pivot > SINGULAR * G[i][i]
        L[i].append(pivot.clamp(min=1e-300).sqrt())
        t.append((sum(h[c] * u[c][i] * w[c] for c in range(C)) - sum(L[i][k] * t[k] for k in range(i))) / L[i][i])
    for i in reversed(range(P)):
        t[i] = (t[i] - sum(L[k][i] * t[k] for k in range(i + 1, P))) / L[i][i]
    biggest = torch.stack(t).abs().amax(0)
    mantissa, exponent = torch.frexp(biggest)
    certain &= ((mantissa - 0.75).abs() < 0.25 - CLOSE) & torch.isfinite(biggest)
    scale = torch.tensor([2.0**e for e in range(least, largest + 1)], dtype=torch.float64, device=w[0].device)[
        (exponent - 1 + shift).clamp(least, largest).long() - least
    ]
    for i in range(P):
        z = t[i] / scale
        certain &= ((z - z.floor() - 0.5).abs() > 1e3 * CLOSE) | (z.abs() > LARGEST_Q + 2)
        t[i] = z.round().clamp(LEAST_Q, LARGEST_Q) * scale
    error, square = torch.zeros_like(biggest), torch.zeros_like(biggest)
    for c in range(C):
        error += h[c] * (w[c] - sum(u[c][i] * t[i] for i in range(P))) ** 2
        square += h[c] * w[c] * w[c]
    return error / square, certain & (square > 0)


def _bases(values: torch.Tensor, count: int, C: int, P: int, root: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of diag(root) U for each seed: float64[count, P, C].

    Gram and Schmidt, twice over, which is enough; if a column depends on those before it, it gives zeros.
    """
    at = torch.arange(count, device=values.device).view(-1, 1, 1) + 1
    inner = torch.arange(P, device=values.device).view(1, -1, 1) + P * torch.arange(C, device=values.device)
    columns = (values[at + inner] * root).unbind(1)
    basis: list[torch.Tensor] = []
    for column in columns:
        q, size = column, column.norm(dim=1, keepdim=True)
        for _ in range(2):
            for other in basis:
                q = q - (q * other).sum(1, keepdim=True) * other
        norm = q.norm(dim=1, keepdim=True)
        basis.append(torch.where(norm > 1e-10 * size, q / norm, 0.0))
    return torch.stack(basis, 1)


def _seed_operands(bases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bases in chunks of seeds, filled up with zeros: for the first step [q, q] of each vector, float16[chunks, P,
    SEEDS, power of two], for the second float32[chunks, P, C, SEEDS]."""
    count, P, C = bases.shape
    chunks = triton.cdiv(count, SEEDS)
    whole = torch.zeros(chunks * SEEDS, P, C, dtype=torch.float64, device=bases.device)
    whole[:count] = bases
    whole = whole.view(chunks, SEEDS, P, C).transpose(1, 2)
    right = torch.zeros(chunks, P, SEEDS, max(triton.next_power_of_2(2 * C), 16), dtype=torch.float16, device=bases.device)
    right[..., :C] = right[..., C : 2 * C] = whole.to(torch.float16)
    return right, whole.transpose(2, 3).float().contiguous()


def _chunk_energies(x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The largest energy in every chunk of seeds: float32[chunks, n]."""
    n, C = x.shape
    chunks, P, _, length = right.shape
    left = torch.zeros(n, length, dtype=torch.float16, device=x.device)
    left[:, :C] = x.to(torch.float16)
    left[:, C : 2 * C] = (x - left[:, :C].float()).to(torch.float16)
    energies = torch.empty(chunks, n, device=x.device)
    _largest_energy[(triton.cdiv(n, ROWS),)](left, right, energies, n, chunks, P, length, ROWS, SEEDS, num_warps=8)
    return energies


def _pair_energies(x: torch.Tensor, table: torch.Tensor, owners: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """The energies of a chunk of seeds for a block, float32[pairs, SEEDS], of pairs of block and chunk."""
    _, P, C, _ = table.shape
    energies = torch.empty(len(owners), SEEDS, device=x.device)
    grid = (triton.cdiv(len(owners), PAIR_ROWS),)
    _energies_of[grid](x, table, owners, chunks, energies, len(owners), P, C, PAIR_ROWS, SEEDS)
    return energies


def _choose(job: _Job, owners: torch.Tensor, positions: torch.Tensor, blocks: Array, seeds: Array, codes: Array) -> None:
    """Fit the survivors, of every block at least one, as the CPU's search does; writes seeds and codes."""
    firsts = torch.searchsorted(owners, torch.arange(len(blocks) + 1, device=owners.device)).cpu().numpy()
    candidates = positions.to(torch.int32).cpu().numpy()

    def work(first: int, last: int) -> None:
        part = slice(first, last)
        limits = firsts[first : last + 1]
        _choose_kernel(candidates, limits, blocks[part], job.h, job.values, job.states, job.rule, seeds[part], codes[part])

    cores = os.cpu_count() or 1
    ends = np.linspace(0, len(blocks), cores + 1).astype(int).tolist()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(work, ends[:-1], ends[1:]))


@njit(nogil=True)  # not cached: it takes in `_fit`, and numba would not notice that file change
def _choose_kernel(  # pragma: no cover  (compiled)
    positions: Array,
    firsts: Array,
    blocks: Array,
    h: Array,
    values: Array,
    states: Array,
    rule: tuple[int, int, int, int],
    seeds: Array,
    codes: Array,
) -> None:
    """Of positions[firsts[b]] .. positions[firsts[b + 1] - 1] the one of least error for block b, of equal ones the lowest
    seed."""
    C, P = blocks.shape[1], codes.shape[1] - 1
    fit = np.empty(P + 1, np.int64)
    for b in range(len(blocks)):
        square = 0.0
        for c in range(C):
            square += h[c] * np.float64(blocks[b, c]) ** 2
        if square == 0.0:  # as the CPU's search has it
            seeds[b] = 1
            codes[b, :] = 0
            codes[b, 0] = rule[0]
            continue
        least = np.inf
        for k in range(firsts[b], firsts[b + 1]):
            position = positions[k]
            error = fit_seed(blocks[b], h, values, position + 1, P, rule, fit) / square
            if error < least or (error == least and states[position] < seeds[b]):
                least, seeds[b] = error, states[position]
                for i in range(P + 1):
                    codes[b, i] = fit[i]


@triton.jit
def _best_block(  # type: ignore[no-untyped-def]
    left, right, block_out, lead_out, n, BLOCKS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """The block with the highest score, and by how much it leads the next one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    inner = tl.arange(0, LENGTH)
    lanes = tl.arange(0, LANES)
    x = tl.load(left + rows[:, None] * LENGTH + inner[None, :], mask=inside[:, None], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    second = tl.full([ROWS], float("-inf"), tl.float32)
    block = tl.zeros([ROWS], tl.int32)
    for b in range(BLOCKS):
        c = tl.load(right + (b * LANES + lanes)[:, None] * LENGTH + inner[None, :])
        top = tl.max(tl.dot(x, tl.trans(c), input_precision="tf32"), axis=1)
        second = tl.maximum(second, tl.minimum(best, top))
        block = tl.where(top > best, b, block)
        best = tl.maximum(best, top)
    tl.store(block_out + rows, block, mask=inside)
    tl.store(lead_out + rows, best - second, mask=inside)


@triton.jit
def _nearest_in(  # type: ignore[no-untyped-def]
    x, blocks, halves, start, found, n, COUNT: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """The least |c|^2 / 2 - x.c, coordinate after coordinate by fused multiply-adds, and the first centroid that has it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    lanes = tl.arange(0, LANES)
    first = tl.load(start + rows, mask=inside, other=0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for step in range(COUNT):
        b = first + step
        score = tl.load(halves + b[:, None] * LANES + lanes[None, :])
        for d in tl.static_range(V):
            coordinate = tl.load(x + rows * V + d, mask=inside, other=0.0)
            c = tl.load(blocks + (b * V + d)[:, None] * LANES + lanes[None, :])
            score = tl.fma(-coordinate[:, None], c, score)
        least = tl.min(score, axis=1)
        lane = tl.min(tl.where(score == least[:, None], lanes[None, :], LANES), axis=1)
        index = tl.where(least < best, b * LANES + lane, index)
        best = tl.minimum(best, least)
    tl.store(found + rows, index, mask=inside)


@triton.jit
def _largest_energy(  # type: ignore[no-untyped-def]
    left,
    right,
    energies,
    n,
    CHUNKS: tl.constexpr,
    P: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    SEEDS: tl.constexpr,
):
    """energies[chunk, row] = the largest sum over P basis vectors of (x.q)^2 among the chunk's seeds."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    inner = tl.arange(0, LENGTH)
    lanes = tl.arange(0, SEEDS)
    x = tl.load(left + rows[:, None] * LENGTH + inner[None, :], mask=inside[:, None], other=0.0)
    for chunk in range(CHUNKS):
        energy = tl.zeros([ROWS, SEEDS], tl.float32)
        for j in tl.static_range(P):
            q = tl.load(right + ((chunk * P + j) * SEEDS + lanes)[:, None] * LENGTH + inner[None, :])
            y = tl.dot(x, tl.trans(q))
            energy += y * y
        tl.store(energies + chunk * n + rows, tl.max(energy, axis=1), mask=inside)


@triton.jit
def _energies_of(  # type: ignore[no-untyped-def]
    x,
    table,
    owners,
    chunks,
    energies,
    n,
    P: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    SEEDS: tl.constexpr,
):
    """energies[pair, lane] = the sum over P basis vectors of (x.q)^2 for the pair's block and each seed of its chunk."""
    pairs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = pairs < n
    lanes = tl.arange(0, SEEDS)
    owner = tl.load(owners + pairs, mask=inside, other=0)
    chunk = tl.load(chunks + pairs, mask=inside, other=0)
    energy = tl.zeros([ROWS, SEEDS], tl.float32)
    for j in tl.static_range(P):
        y = tl.zeros([ROWS, SEEDS], tl.float32)
        for c in range(C):
            w = tl.load(x + owner * C + c, mask=inside, other=0.0)
            q = tl.load(table + (((chunk * P + j) * C + c) * SEEDS)[:, None] + lanes[None, :])
            y += w[:, None] * q
        energy += y * y
    tl.store(energies + pairs.to(tl.int64)[:, None] * SEEDS + lanes[None, :], energy, mask=inside[:, None])
