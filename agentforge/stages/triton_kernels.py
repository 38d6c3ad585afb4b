"""Triton kernels for the two exhaustive searches, nearest centroid and seed, with the results of the CPU's kernels.

Imported only where Triton is installed, for CUDA tensors, or for CPU tensors under TRITON_INTERPRET=1.

Both searches go in two steps.  Tensor cores score everything, fast and to about 2**-17 of the numbers' size; whatever is
too close to the best to be told apart by such scores is then scored again by the same float32 operations, in the same
order, as on the CPU.  The result is that of the CPU, bit for bit, because a bound on the error of the first step says
what has to be looked at in the second, however a tensor core rounds.

Tensor cores multiply numbers of 11 significant bits (TF32).  A float32 is split into two such numbers, x = high + low to
2**-22, and x.c = high.high + low.high + high.low as one longer product: [high, low, high].[high, high, low].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .kmeans import LANES, Codebook

ROWS = 128  # vectors a program of the first step
EXACT_ROWS = 32  # vectors a program of the second
CHUNK = 1 << 21  # vectors at a time: 0.3 GB of split operands for vectors of 8
FEW = 2048  # centroids for which the second step alone is as fast
ERROR = 2.0**-16  # of the first step's scores, the CPU's own rounding included; see `_margins`


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
