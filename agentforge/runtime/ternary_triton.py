"""Products of 2-bit ternary weights with 8-bit activations in Triton, on the planes of ternary_cpu and with its results.

Imported only if Triton is installed, for CUDA tensors, or for CPU tensors under TRITON_INTERPRET=1.

A program computes some rows for some tokens: it reads packed bytes once, and for each of the four fields multiplies the
codes with the activations of that field on integer tensor cores.  Sums are integers, so that their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ternary_cpu import COLUMNS, ROWS


def product(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, rows: int) -> torch.Tensor:
    """scale * (W q) / s + bias: float32[..., rows] of x: float32[..., in], contiguous; all tensors on one device.

    Operands as for `ternary_cpu.product`.
    """
    columns, runs = x.shape[-1], packed.shape[1]
    tokens = x.numel() // columns
    out = torch.empty((*x.shape[:-1], rows), device=x.device)
    if not tokens:
        return out
    flat = x.reshape(tokens, columns)
    largest = flat.abs().amax(dim=1)
    s = largest.clamp(min=1e-5).reciprocal() * 127
    q = torch.zeros((tokens, runs * COLUMNS), dtype=torch.int8, device=x.device)
    rounded = (flat * s.unsqueeze(1)).round_()
    q[:, :columns] = torch.where(largest.isfinite().unsqueeze(1), rounded, 0).to(torch.int8)
    factors = torch.where(largest.isfinite(), s.double().reciprocal(), torch.nan)
    sums = q.sum(dim=1, dtype=torch.int32)
    steps = int(scales.numel() > ROWS), int(biases.numel() > ROWS)
    operands = packed, q, sums, factors, scales, biases, out, tokens, rows, runs, *steps
    groups, together = (4, 16) if tokens <= 16 else (16, 32)  # 16 tokens are the least that tensor cores take
    _batch[(triton.cdiv(rows, 4 * groups), triton.cdiv(tokens, together))](*operands, groups, together, num_warps=4)
    return out


@triton.jit
def _batch(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    packed,
    q,
    sums,
    factors,
    scales,
    biases,
    out,
    tokens,
    rows,
    runs,
    scale_step,
    bias_step,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """4 * GROUPS rows of TOKENS tokens; two runs of 64 columns at a time, as a tensor core takes 32 bytes."""
    row = tl.program_id(0) * 4 * GROUPS + tl.arange(0, 4 * GROUPS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    byte = tl.arange(0, 32)  # of a row: 16 in each run
    x = q + token.to(tl.int64) * runs * 64
    start = (row // 4).to(tl.int64) * runs * 64 + row % 4 * 16
    total = tl.zeros((4 * GROUPS, TOKENS), tl.int32)
    for run in range(0, runs, 2):
        at = run + byte // 16
        there = (at < runs)[None, :] & (row < rows)[:, None]
        bytes_ = tl.load(packed + start[:, None] + (at * 64 + byte % 16)[None, :], mask=there, other=0)
        for field in tl.static_range(4):
            codes = ((bytes_ >> (2 * field)) & 3).to(tl.int8)
            inside = (at < runs)[:, None] & (token < tokens)[None, :]
            a = tl.load(x[None, :] + (at * 64 + field * 16 + byte % 16)[:, None], mask=inside, other=0)
            total = tl.dot(codes, a, acc=total, out_dtype=tl.int32)
    row, token = row[:, None], token[None, :]
    last = token < tokens
    exact = (total - tl.load(sums + token, mask=last, other=0)).to(tl.float64)
    scale = tl.load(scales + row * scale_step, mask=row < rows, other=0.0).to(tl.float64)
    bias = tl.load(biases + row * bias_step, mask=row < rows, other=0.0).to(tl.float64)
    result = exact * (scale * tl.load(factors + token, mask=last, other=0.0)) + bias
    tl.store(out + token * rows + row, result.to(tl.float32), mask=(row < rows) & last)
