"""Embedding and output head in the 16 bits in which an artifact keeps them, and products that read these bits.

A small model's head is its largest matrix, and a product with one vector takes as long as reading it does: 16 bits instead
of 32 take half as long.  The values are exactly those that the dense runtime turns into float32; products and sums are
float32, in a fixed order, so that only the rounding of sums differs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import nn

from .ternary_cpu import in_parts

LANES = 16
ROWS = 4  # that share what is loaded of x
FEW = 4  # tokens up to which our kernel is used, not torch's
CHUNK = 4096  # rows that are made float32 at a time for more tokens

i16, i32, i64, f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


@cache  # asking takes longer than a small product
def available() -> bool:
    """Whether the machine turns half floats into float32 by an instruction."""
    if platform.machine() in ("aarch64", "arm64"):
        return True
    if numba.config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES, or "" for NUMBA_CPU_NAME=generic
        return "+f16c" in str(numba.config.CPU_FEATURES).split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


@intrinsic(prefer_literal=True)
def _dots(typing: Any, brain: Any, weights: Any, x: Any, columns: Any, out: Any) -> Any:
    """Products of four rows with one vector.

    brain: 1 for bfloat16, 0 for float16, a literal.  Addresses: weights [4, columns], x and out float32.
    """

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, weights, x, columns, out = args
        floats, words = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)
        stored = ir.VectorType(i16 if brain.literal_value else ir.HalfType(), LANES)

        def load(address: Any, kind: Any) -> Any:
            return b.load(b.inttoptr(address, kind.as_pointer()), align=1)

        sums = [cgutils.alloca_once(b, floats) for _ in range(ROWS)]
        for place in sums:
            b.store(ir.Constant(floats, [0.0] * LANES), place)
        with cgutils.for_range(b, b.sdiv(columns, ir.Constant(i64, LANES))) as loop:
            at = b.mul(loop.index, ir.Constant(i64, 2 * LANES))
            value = load(b.add(x, b.add(at, at)), floats)
            for row, place in enumerate(sums):
                start = b.add(weights, b.mul(columns, ir.Constant(i64, 2 * row)))
                weight = load(b.add(start, at), stored)
                if brain.literal_value:
                    weight = b.bitcast(b.shl(b.zext(weight, words), ir.Constant(words, [16] * LANES)), floats)
                else:
                    weight = b.fpext(weight, floats)
                b.store(b.fadd(b.load(place), b.fmul(weight, value)), place)
        for row, place in enumerate(sums):
            total = b.load(place)
            for half in (8, 4, 2, 1):
                low, high = (
                    b.shuffle_vector(
                        total,
                        ir.Constant(total.type, ir.Undefined),
                        ir.Constant(ir.VectorType(i32, half), list(range(k, k + half))),
                    )
                    for k in (0, half)
                )
                total = b.fadd(low, high)
            result = b.extract_element(total, ir.Constant(i32, 0))
            b.store(result, b.inttoptr(b.add(out, ir.Constant(i64, 4 * row)), f32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(brain, *([types.int64] * 4)), emit


@njit(nogil=True, cache=True)
def _float16(weights, x, columns, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    for row in range(first, last, ROWS):
        r = min(row, rows - ROWS)  # the last four overlap the four before
        for t in range(tokens):
            _dots(0, weights + 2 * r * columns, x + 4 * t * columns, columns, out + 4 * (t * rows + r))


@njit(nogil=True, cache=True)
def _bfloat16(weights, x, columns, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    for row in range(first, last, ROWS):
        r = min(row, rows - ROWS)
        for t in range(tokens):
            _dots(1, weights + 2 * r * columns, x + 4 * t * columns, columns, out + 4 * (t * rows + r))


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float32.  x: float32[..., in].  weight: float16 or bfloat16 [out, in], contiguous."""
    rows, columns = weight.shape
    tokens = x.numel() // columns
    out = torch.empty((*x.shape[:-1], rows), device=x.device)
    if x.is_cpu and tokens <= FEW and columns % LANES == 0 and rows >= ROWS and available():
        x = x.contiguous()
        kernel = _bfloat16 if weight.dtype == torch.bfloat16 else _float16
        in_parts(kernel, (weight.data_ptr(), x.data_ptr(), columns, out.data_ptr(), tokens, rows), rows, weight.nbytes)
        return out
    for first in range(0, rows, CHUNK):
        out[..., first : first + CHUNK] = x @ weight[first : first + CHUNK].to(torch.float32).T
    return out


class _Half(nn.Module):
    """Holds a matrix in 16 bits; `like` remembers the dtype that a module's user asked for."""

    weight: torch.Tensor
    like: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("like", torch.empty(0), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """To another device, and never to another dtype."""
        kept = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != kept.dtype:
            self.weight = kept.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Shape and dtype, for `print(model)`."""
        return f"{list(self.weight.shape)}, {str(self.weight.dtype).removeprefix('torch.')}"


class HalfEmbedding(_Half):
    """A token embedding of 16 bits that gives float32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int[...].  Returns [..., size]."""
        return nn.functional.embedding(ids, self.weight).to(self.like.dtype)


class HalfLinear(_Half):
    """An output head of 16 bits: float32 products and sums."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float[..., in].  Returns [..., out] in x's dtype."""
        return product(x.to(torch.float32), self.weight).to(x.dtype)


def adopt(module: Any) -> None:
    """Put these in place of a model's embedding and head, if they are plain and their weights have 16 bits."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    halves = torch.float16, torch.bfloat16
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    plain_embedding = type(embedding) is nn.Embedding and embedding.max_norm is None and embedding.weight.dtype in halves
    plain_head = type(head) is nn.Linear and head.bias is None and head.weight.dtype in halves
    if tied and not (plain_embedding and plain_head):
        return
    if plain_embedding:
        module.set_input_embeddings(HalfEmbedding(embedding.weight))
    if plain_head:
        module.set_output_embeddings(HalfLinear(head.weight))
