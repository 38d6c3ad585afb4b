"""Decoding on a GPU from packed bits, in Triton: VPTQ's centroids, and SeedLM's blocks from their seeds.

Imported only if Triton is installed, for CUDA tensors, or for CPU tensors under TRITON_INTERPRET=1.  The product follows
as a matrix product of its own.  Results are the CPU's, bit for bit.  Tested in Triton's interpreter; no GPU has run it yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..planes import times_power_of_two
from ..stages.seedlm import SeedLM, taps_mask
from ..stages.vptq import LEVELS, Vptq

if TYPE_CHECKING:
    from .decoding import Ready

LANES = 128


def dense(ready: Ready) -> torch.Tensor | None:
    """The decoded weight, float32[out, in] on the planes' device, or None if there is no kernel for its settings."""
    if isinstance(ready.stage, SeedLM):
        return _seedlm(ready, ready.stage)
    if isinstance(ready.stage, Vptq) and ready.stage.parts == 1 and len(ready.stage.segments(ready.shape)) == 1:
        return _vptq(ready, ready.stage)
    return None


def _vptq(ready: Ready, stage: Vptq) -> torch.Tensor:
    rows, columns = ready.shape
    segment = stage.segments(ready.shape)[0]
    chunks = math.ceil(rows / segment.v)
    out = torch.empty(rows, columns, device=ready.planes["indices"].stored.device)
    for number, level in enumerate(LEVELS[: len(segment.sizes)]):
        indices, name = ready.planes[f"{level}indices"], f"{level}codebook"
        book = ready.planes[name].stored.float() if ready.shared is None else ready.shared[name]
        _gather[(chunks, triton.cdiv(columns, LANES))](
            indices.stored,
            indices.stored.numel(),
            book.contiguous(),
            out,
            rows,
            columns,
            WIDTH=int(indices.coding[4:]),
            V=segment.v,
            ADD=number > 0,
            LANES=LANES,
        )
    for name, apply in (("scale", out.mul_), ("mean", out.add_)):
        if name in ready.planes:
            apply(ready.planes[name].stored.to(torch.float32))
    return times_power_of_two(out, 128 - int(ready.planes["exponent"].stored), in_place=True)


def _seedlm(ready: Ready, stage: SeedLM) -> torch.Tensor:
    (rows, columns), (C, P) = ready.shape, stage.geometry
    seeds, exponents, coefficients = (ready.planes[name] for name in ("seeds", "exponents", "coefficients"))
    blocks = math.ceil(rows * columns / C)
    out = torch.empty(blocks * C, device=seeds.stored.device)
    _regenerate[(triton.cdiv(blocks, LANES),)](
        seeds.stored,
        exponents.stored,
        coefficients.stored,
        seeds.stored.numel(),
        exponents.stored.numel(),
        coefficients.stored.numel(),
        out,
        blocks,
        SEED_BITS=int(seeds.coding[4:]),
        EXPONENT_BITS=int(exponents.coding[4:]),
        BITS=int(coefficients.coding[4:]),
        K=stage.K,
        TAPS=taps_mask(stage.K),
        UNIT=float(max((1 << (stage.K - 1)) - 1, 1)),
        C=C,
        P=P,
        LANES=LANES,
    )
    decoded = out[: rows * columns].reshape(rows, columns)
    return times_power_of_two(decoded, 128 - int(ready.planes["exponent"].stored), in_place=True)


@triton.jit
def _bits(plane, size, at, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    """Values of WIDTH bits, up to 20, at these places of a plane of `size` bytes."""
    bit = at.to(tl.int64) * WIDTH
    byte = bit // 8
    word = tl.zeros_like(bit)
    for k in tl.static_range(4):
        there = inside & (byte + k < size)
        word += tl.load(plane + byte + k, mask=there, other=0).to(tl.int64) << (8 * k)
    return ((word >> (bit % 8)) & ((1 << WIDTH) - 1)).to(tl.int32)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    indices,
    size,
    book,
    out,
    rows,
    columns,
    WIDTH: tl.constexpr,
    V: tl.constexpr,
    ADD: tl.constexpr,
    LANES: tl.constexpr,
):
    """The V rows of a chunk, for LANES columns; added to what is there for a second codebook."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = column < columns
    index = _bits(indices, size, chunk.to(tl.int64) * columns + column, inside, WIDTH)
    for i in tl.static_range(V):
        row = chunk.to(tl.int64) * V + i
        there = inside & (row < rows)
        value = tl.load(book + index * V + i, mask=there, other=0.0)
        to = out + row * columns + column
        if ADD:
            value += tl.load(to, mask=there, other=0.0)
        tl.store(to, value, mask=there)


@triton.jit
def _regenerate(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    seeds,
    exponents,
    coefficients,
    seed_bytes,
    exponent_bytes,
    bytes_,
    out,
    blocks,
    SEED_BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    BITS: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    LANES: tl.constexpr,
):
    """U(seed) t of LANES blocks, U made by the register; sums are integers, exact in any order."""
    block = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = block < blocks
    state = _bits(seeds, seed_bytes, block, inside, SEED_BITS)
    exponent = (_bits(exponents, exponent_bytes, block, inside, EXPONENT_BITS) ^ 8) - 8
    scale = (1 << (exponent + 8)).to(tl.float64) / 256.0 / UNIT
    for c in tl.static_range(C):
        total = tl.zeros_like(state)
        for p in tl.static_range(P):
            tapped = state & TAPS
            for half in tl.static_range(5):
                tapped ^= tapped >> (16 >> half)
            state = (state >> 1) | ((tapped & 1) << (K - 1))
            q = (_bits(coefficients, bytes_, block.to(tl.int64) * P + p, inside, BITS) ^ 8) - 8
            total += (state - (1 << (K - 1))) * q
        tl.store(out + block.to(tl.int64) * C + c, (total.to(tl.float64) * scale).to(tl.float32), mask=inside)
