"""Products of a few vectors with packed weights on the CPU, straight from the bits: no weight is written anywhere.

A product with one vector takes as long as reading the weight does, so that what is read should be the packed bits.  Two
forms cover most stages:

- `grid`: W = scale * (code - zero) + minimum on each group of a row's columns (rounding), or W = code, zigzag (ecsq and tcq,
  whose steps of rows and columns are factors of the results and the inputs);
- `vectors`: W is made of the vectors of a codebook.  They lie along a column (vptq) or along a row (trajectory).

`half` multiplies the 16 bits in which embedding and head are kept: a small model's head is its largest matrix.

The first two take four rows (of vectors) at a time, which share what is loaded of x, and are written in LLVM's own terms.
Products and sums are float32 in an order that does not depend on the number of threads: a result differs from x W^T by
rounding alone, at most 1e-6 |x| |W|^T.

Functions take addresses.  What they inline is in this file, but for single instructions, because numba's cache on disk
does not notice changes elsewhere.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import ternary_cpu
from .ternary_cpu import Value, _floats, _int, _load, _shuffle, _splat, _spread, _store, f32, i8, i16, i32, i64

ROWS = 4
LANES = 16
WORD_BITS = 57  # that a word of 64 holds at any offset in a byte
WIDEST = 32  # bits of an index
WIDEST_CODE = 14  # of which a word holds four, wherever in a byte they begin

HALF_FEW = 4  # vectors up to which a matrix of 16 bits is multiplied by our kernel, not torch's
CHUNK = 4096  # rows of such a matrix that are converted at a time for more of them


@cache  # asking takes longer than a small product
def available() -> bool:
    """Whether the machine turns half floats into float32 by an instruction."""
    return platform.machine() in ("aarch64", "arm64") or "f16c" in ternary_cpu.features()


def _zero(b: Any, kind: ir.Type) -> Value:
    """A place on the stack, filled with zeros."""
    return cgutils.alloca_once(b, kind, zfill=True)


def _accumulate(b: Any, total: Value, x: Value, y: Value) -> Value:
    return b.fadd(total, b.fmul(x, y, flags=("contract",)), flags=("contract",))


def _sum(b: Any, vector: Value) -> Value:
    """The sum of the lanes: halves, then halves of those, as far as they come out even."""
    while vector.type.count % 2 == 0:
        count = vector.type.count // 2
        vector = b.fadd(*(_shuffle(b, vector, list(range(k, k + count))) for k in (0, count)))
    total = b.extract_element(vector, ir.Constant(i32, 0))
    for lane in range(1, vector.type.count):
        total = b.fadd(total, b.extract_element(vector, ir.Constant(i32, lane)))
    return total


def _word(b: Any, base: Value, size: Value, bit: Value) -> Value:
    """The 64 bits that begin at this bit of a plane of `size` bytes, shifted down; never reads beyond the plane."""
    last = b.sub(size, _int(8))
    byte = b.lshr(bit, _int(3))
    byte = b.select(b.icmp_signed("<", byte, last), byte, last)
    return b.lshr(_load(b, b.add(base, byte), i64), b.sub(bit, b.shl(byte, _int(3))))


def streams(width: int) -> int:
    """Codes of a byte, if they fill it: x then has to come in so many streams, every n-th column each.  Else 1."""
    return 8 // width if 8 % width == 0 else 1


def _lanes(width: int) -> int:
    """Codes that are unpacked together: those of sixteen bytes, else as many as a word of 64 bits holds."""
    return LANES if 8 % width == 0 else 8 if width < 8 else 4


@intrinsic(prefer_literal=True)
def _grid_rows(typing, width, zero, zigzag, codes, size, row, x, columns, group, scale, minimum, sums, out):  # type: ignore[no-untyped-def]
    """Products of four rows with one vector.

    width, zero, zigzag: literals.  codes: address of the plane, of `size` bytes.  row: the first.  x: address of float32
    in streams.  scale, minimum: addresses of float16[rows, groups], or 0.  sums: address of the sums of x in each group.
    """
    signature = types.void(width, zero, zigzag, *([types.int64] * 10))
    bits, offset, coded = width.literal_value, zero.literal_value, zigzag.literal_value
    count, lanes = streams(bits), _lanes(bits)
    floats, words = ir.VectorType(f32, lanes), ir.VectorType(i32, lanes)

    def unpacked(b: Any, codes: Value, size: Value, at: Value) -> list[Value]:
        """i32[lanes] of each stream; at: the first code's place in the plane."""
        if 8 % bits == 0:
            run = _load(b, b.add(codes, b.sdiv(at, _int(count))), ir.VectorType(i8, lanes))
            run = b.zext(run, words)
            return [b.and_(b.lshr(run, _splat(s * bits, words)), _splat((1 << bits) - 1, words)) for s in range(count)]
        word = _spread(b, _word(b, codes, size, b.mul(at, _int(bits))), lanes)
        shifted = b.lshr(word, ir.Constant(word.type, [bits * lane for lane in range(lanes)]))
        return [b.and_(b.trunc(shifted, words), _splat((1 << bits) - 1, words))]

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        codes, size, row, x, columns, group, scale, minimum, sums, out = args[3:]
        groups = b.sdiv(columns, group)
        totals, parts, offsets = ([_zero(b, kind) for _ in range(ROWS)] for kind in (floats, floats, f32))
        with cgutils.for_range(b, groups) as of_groups:
            for place in parts:
                b.store(_splat(0.0, floats), place)
            first = b.mul(of_groups.index, group)
            with cgutils.for_range(b, b.sdiv(group, _int(lanes * count))) as loop:
                column = b.add(first, b.mul(loop.index, _int(lanes * count)))
                within = b.sdiv(column, _int(count))
                values = [
                    _load(b, b.add(x, b.mul(_int(4), b.add(within, b.mul(_int(s), b.sdiv(columns, _int(count)))))), floats)
                    for s in range(count)
                ]
                for r, place in enumerate(parts):
                    at = b.add(b.mul(b.add(row, _int(r)), columns), column)
                    total = b.load(place)
                    for code, value in zip(unpacked(b, codes, size, at), values, strict=True):
                        if coded:
                            sign = b.sub(_splat(0, words), b.and_(code, _splat(1, words)))
                            code = b.xor(b.lshr(code, _splat(1, words)), sign)
                        if offset:
                            code = b.sub(code, _splat(offset, words))
                        total = _accumulate(b, total, b.sitofp(code, floats), value)
                    b.store(total, place)
            for r in range(ROWS):
                at = b.mul(_int(2), b.add(b.mul(b.add(row, _int(r)), groups), of_groups.index))
                part = b.load(parts[r])
                with b.if_else(b.icmp_signed("!=", scale, _int(0))) as (scaled, plain):
                    with scaled:
                        factor = b.fpext(_load(b, b.add(scale, at), ir.HalfType()), f32)
                        b.store(_accumulate(b, b.load(totals[r]), part, _spread(b, factor, lanes)), totals[r])
                    with plain:
                        b.store(b.fadd(b.load(totals[r]), part), totals[r])
                with b.if_then(b.icmp_signed("!=", minimum, _int(0))):
                    low = b.fpext(_load(b, b.add(minimum, at), ir.HalfType()), f32)
                    share = _load(b, b.add(sums, b.mul(_int(4), of_groups.index)), f32)
                    b.store(_accumulate(b, b.load(offsets[r]), low, share), offsets[r])
        for r in range(ROWS):
            result = b.fadd(_sum(b, b.load(totals[r])), b.load(offsets[r]))
            _store(b, result, b.add(out, _int(4 * r)))
        return context.get_dummy_value()

    return signature, emit


@cache
def _grid_kernel(width: int, zero: int, zigzag: int) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(codes, size, x, columns, group, scale, minimum, sums, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
        for at in range(first, last, ROWS):
            r = min(at, rows - ROWS)  # the last four overlap the four before
            for t in range(tokens):
                vector, share, to = x + 4 * t * columns, sums + 4 * t * (columns // group), out + 4 * (t * rows + r)
                _grid_rows(width, zero, zigzag, codes, size, r, vector, columns, group, scale, minimum, share, to)

    return kernel


def fits_grid(width: int, rows: int, columns: int, group: int) -> bool:
    """Whether `grid` computes a weight of this form on this machine; groups must be multiples of what it takes at a time."""
    bytes_ = rows * columns * width // 8
    enough = rows >= ROWS and bytes_ >= 8 and width <= WIDEST_CODE
    return available() and enough and not (columns % group or group % (_lanes(width) * streams(width)))


def grid(
    x: torch.Tensor,
    codes: torch.Tensor,
    rows: int,
    width: int,
    group: int,
    scale: torch.Tensor | None = None,
    minimum: torch.Tensor | None = None,
    zero: int = 0,
    zigzag: bool = False,
) -> torch.Tensor:
    """x W^T, float32[tokens, rows]; see the module.

    x: float32[tokens, columns].  codes: uint8[bytes], as `planes.pack_uint` packs [rows, columns].  group: columns per
    group.  scale, minimum: float16[rows, groups], contiguous; minimum goes with scale.  The caller has asked `fits_grid`.
    """
    tokens, columns = x.shape
    x = x.contiguous()
    sums = x if minimum is None else x.reshape(tokens, columns // group, group).sum(2)
    if (count := streams(width)) > 1:
        x = x.reshape(tokens, columns // count, count).transpose(1, 2).contiguous()
    out = torch.empty(tokens, rows)
    floats = [0 if plane is None else plane.data_ptr() for plane in (scale, minimum)]
    operands = (codes.data_ptr(), codes.numel(), x.data_ptr(), columns, group, *floats, sums.data_ptr(), out.data_ptr())
    operands += (tokens, rows)
    ternary_cpu.in_parts(_grid_kernel(width, zero, int(zigzag)), operands, rows, tokens * rows * columns)
    return out


@intrinsic(prefer_literal=True)
def _vector_lines(typing, v, width, along, together, indices, size, line, count, x, book, top, out):  # type: ignore[no-untyped-def]
    """Products of four lines of vectors with one vector.

    v, width, along, together: literals.  along: 1 for vectors that lie along a row (a line gives one result), 0 for those
    that lie along a column (it gives v).  together: how many indices are read at a time, of which `count` is a multiple.
    indices: address of the plane, of `size` bytes.  line: the first, of `count` vectors.  book: address of
    float32[top + 1, v].
    """
    signature = types.void(v, width, along, together, *([types.int64] * 8))
    length, bits, in_row, n = (literal.literal_value for literal in (v, width, along, together))
    floats = ir.VectorType(f32, length)

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        indices, size, line, count, x, book, top, out = args[4:]
        places = [_zero(b, floats) for _ in range(ROWS)]
        with cgutils.for_range(b, b.sdiv(count, _int(n))) as loop:
            column = b.mul(loop.index, _int(n))
            at_x = b.add(x, b.mul(column, _int(4 * (length if in_row else 1))))
            values = []
            for j in range(n):
                if in_row:
                    values.append(_load(b, b.add(at_x, _int(4 * length * j)), floats))
                else:
                    values.append(_spread(b, _load(b, b.add(at_x, _int(4 * j)), f32), length))
            for r, place in enumerate(places):
                at = b.add(b.mul(b.add(line, _int(r)), count), column)
                word, total = _word(b, indices, size, b.mul(at, _int(bits))), b.load(place)
                for j, value in enumerate(values):
                    index = b.and_(b.lshr(word, _int(bits * j)), _int((1 << bits) - 1))
                    index = b.select(b.icmp_signed("<", index, top), index, top)  # nothing beyond the codebook is read
                    centroid = _load(b, b.add(book, b.mul(index, _int(4 * length))), floats)
                    total = _accumulate(b, total, centroid, value)
                b.store(total, place)
        for r, place in enumerate(places):
            result = _sum(b, b.load(place)) if in_row else b.load(place)
            _store(b, result, b.add(out, _int(4 * r * (1 if in_row else length))))
        return context.get_dummy_value()

    return signature, emit


@cache
def _vector_kernel(v: int, width: int, along: int, together: int) -> Any:
    results = 1 if along else v

    @njit(nogil=True, cache=True)
    def kernel(indices, size, count, x, columns, book, top, out, tokens, lines, first, last):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
        for at in range(first, last, ROWS):
            line = min(at, lines - ROWS)
            for t in range(tokens):
                to = out + 4 * results * (t * lines + line)
                _vector_lines(v, width, along, together, indices, size, line, count, x + 4 * t * columns, book, top, to)

    return kernel


def fits_vectors(width: int, lines: int, count: int) -> bool:
    """Whether `vectors` computes so many lines of so many vectors."""
    return width <= WIDEST and lines >= ROWS and lines * count * width >= 64


def vectors(
    x: torch.Tensor, indices: torch.Tensor, width: int, lines: int, count: int, book: torch.Tensor, along: bool
) -> torch.Tensor:
    """x W^T for W of vectors of a codebook: float32[tokens, lines], or [tokens, lines * v] of those along columns.

    x: float32[tokens, columns].  indices: uint8[bytes], as `planes.pack_uint` packs [lines, count].  book: float32[k, v].
    The caller has asked `fits_vectors`.
    """
    tokens, columns = x.shape
    x, book = x.contiguous(), book.contiguous()
    v = book.shape[1]
    out = torch.empty(tokens, lines * (1 if along else v))
    operands = (indices.data_ptr(), indices.numel(), count, x.data_ptr(), columns, book.data_ptr(), len(book) - 1)
    kernel = _vector_kernel(v, width, int(along), 4 if count % 4 == 0 and 4 * width <= WORD_BITS else 1)
    ternary_cpu.in_parts(kernel, (*operands, out.data_ptr(), tokens, lines), lines, tokens * lines * count * v)
    return out


@intrinsic
def _shorts(typing: Any, address: Any) -> Any:
    """An address as a pointer to int16."""
    kind = types.CPointer(types.int16)
    return kind(types.int64), lambda context, b, signature, args: b.inttoptr(args[0], i16.as_pointer())


@intrinsic(prefer_literal=True)
def _float_of(typing: Any, brain: Any, bits: Any) -> Any:
    """The float32 of 16 bits: of a bfloat16 if brain, a literal, is 1, of a float16 if it is 0."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if brain.literal_value:
            return b.bitcast(b.shl(b.zext(args[1], i32), ir.Constant(i32, 16)), f32)
        return b.fpext(b.bitcast(args[1], ir.HalfType()), f32)

    return types.float32(brain, types.int16), emit


@cache
def _half_kernel(brain: int) -> Any:
    @njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
    def kernel(weights, x, columns, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
        for t in range(tokens):
            vector, results = carray(_floats(x + 4 * t * columns), columns), carray(_floats(out + 4 * t * rows), rows)
            for r in range(first, last):
                row, total = carray(_shorts(weights + 2 * r * columns), columns), np.float32(0)
                for i in range(columns):
                    total += _float_of(brain, row[i]) * vector[i]
                results[r] = total

    return kernel


def half(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in x's dtype.  x: float[..., in].  weight: float16 or bfloat16 [out, in], contiguous.

    Up to `HALF_FEW` vectors are multiplied in float32; for more a chunk of W after the other is converted to x's dtype.
    """
    rows, columns = weight.shape
    tokens = x.numel() // columns
    if x.is_cpu and tokens <= HALF_FEW and available():
        out = torch.empty((*x.shape[:-1], rows))
        dtype, x = x.dtype, x.to(torch.float32).contiguous()
        operands = weight.data_ptr(), x.data_ptr(), columns, out.data_ptr(), tokens, rows
        ternary_cpu.in_parts(_half_kernel(int(weight.dtype == torch.bfloat16)), operands, rows, weight.nbytes)
        return out.to(dtype)
    out = x.new_empty(*x.shape[:-1], rows)
    for first in range(0, rows, CHUNK):
        out[..., first : first + CHUNK] = x @ weight[first : first + CHUNK].to(x.dtype).T
    return out
