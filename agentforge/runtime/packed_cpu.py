"""Products of a few vectors with packed weights on the CPU, straight from the bits, and rows decoded for many vectors.

A product with one vector takes as long as reading the weight does, so that what is read should be the packed bits.  Two
forms cover most stages:

- `grid`: W = scale * (code - zero) + minimum on each group of a row's columns (rounding), or W = code * a row's factor * a
  column's (ecsq and tcq, whose few large codes are in a list);
- `vectors`: W is made of the vectors of a codebook.  They lie along a column (vptq) or along a row (trajectory).

`half` multiplies the 16 bits in which embedding and head are kept: a small model's head is its largest matrix.

The first two take four rows (of vectors) at a time, which share what is loaded of x, and are written in LLVM's own terms;
`grid` takes four vectors at a time, too, which share what is unpacked.
Products and sums are float32 in an order that does not depend on the number of threads: a result differs from x W^T by
rounding alone, at most 1e-6 |x| |W|^T.

Functions take addresses.  What they inline is in this file, but for single instructions, because numba's cache on disk
does not notice changes elsewhere.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import ternary_cpu
from .ternary_cpu import Value, _floats, _int, _keep, _load, _pointer, _shuffle, _splat, _spread, _store, f32, i16, i32, i64

ROWS = 4
LANES = 16
WORD_BITS = 57  # that a word of 64 holds at any offset in a byte
WIDEST = 32  # bits of an index
WIDTHS = (2, 3, 4, 5, 6, 8, 10, 16)  # of fields, so that a word of 32 holds another number of them
LARGE = 20  # bytes of fields that take as long to read as one code of a list
AHEAD = 4096  # bytes that are asked for before they are read
TOGETHER = 4  # vectors that share what is unpacked

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


def _prefetch(b: Any, address: Value) -> None:
    """Ask for the line at this address, wherever that is."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
    b.call(prefetch, [b.inttoptr(address, byte), *(ir.Constant(i32, value) for value in (0, 3, 1))])


def _word(b: Any, base: Value, size: Value, bit: Value) -> Value:
    """The 64 bits that begin at this bit of a plane of `size` bytes, shifted down; never reads beyond the plane."""
    last = b.sub(size, _int(8))
    byte = b.lshr(bit, _int(3))
    byte = b.select(b.icmp_signed("<", byte, last), byte, last)
    return b.lshr(_load(b, b.add(base, byte), i64), b.sub(bit, b.shl(byte, _int(3))))


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight of whole numbers: of code - zero times factors of row and column, or times scale + minimum of its group.

    Codes are fields of 32-bit words, n = 32 // width in each, the first in the lowest bits.  `shared`: neighbours share a
    word, as `pack_uint` packs them.  Else codes that share one lie sixteen columns apart (eight in the last words of a row),
    so that decoded vectors are written as they are, and rows are filled up.

    words: `per_row` in each row.  lanes: words of a vector.  spans: groups that a vector holds, 0 if there are none.
    per_group: words.  scale, minimum: float16[rows, groups].  rows, columns, gains: factors, float32, of columns with a zero
    for each field that fills a row up.  large: codes, less `zero`, that the fields cannot hold: where those of each row
    begin, their columns, and they themselves, int32.
    """

    words: torch.Tensor
    shape: tuple[int, int]
    width: int
    zero: int
    per_row: int
    rows: torch.Tensor
    shared: bool = True
    lanes: int = LANES
    spans: int = 0
    per_group: int = 0
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    large: tuple[torch.Tensor, ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [value for value in (*vars(self).values(), *self.large) if isinstance(value, torch.Tensor)]

    @cached_property
    def about(self) -> tuple[int, int, int, int, int, bool]:
        """What its kernels are made for."""
        return self.width, self.zero, self.lanes, self.spans, int(self.minimum is not None), self.shared

    @cached_property
    def kernels(self) -> tuple[Any, Any]:
        """Products of `TOGETHER` vectors at a time, and of one."""
        return _grid_kernel(*self.about, TOGETHER), _grid_kernel(*self.about, 1)

    @cached_property
    def operands(self) -> tuple[int, ...]:
        """What the kernels take of it."""
        planes = (self.scale, self.minimum, self.rows, self.columns, self.gains, *(self.large or [None] * 3))
        addresses = [0 if plane is None else plane.data_ptr() for plane in planes]
        return *self.shape, self.words.data_ptr(), self.per_row, self.per_group, *addresses


def grouped(
    codes: torch.Tensor,
    shape: tuple[int, int],
    width: int,
    group: int,
    zero: int,
    rows: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
) -> Grid | None:
    """The grid of codes as `pack_uint` packs them, uint8[bytes], in groups of columns; None if no kernel reads it."""
    if 32 % width or shape[1] % group or group * width % 32 or shape[0] < ROWS or not available():
        return None
    per_row, per_group = shape[1] * width // 32, group * width // 32
    for lanes in (LANES, LANES // 2):
        several = lanes % per_group == 0 and per_row % lanes in (0, lanes // 2) and per_row % lanes % per_group == 0
        if several or per_group % lanes == 0:
            spans = max(1, lanes // per_group)
            return Grid(codes, shape, width, zero, per_row, rows, True, lanes, spans, per_group, scale, minimum)
    return None


def narrow(codes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, gains: torch.Tensor | None) -> Grid | None:
    """The grid of zigzag codes, uint16[out, in], in the width that takes the least memory; None if no kernel reads it."""
    (out, size), values = codes.shape, codes.numpy()
    if out < ROWS or not available():
        return None
    per_row = [8 * math.ceil(size / (8 * (32 // width))) for width in WIDTHS]
    at_most = np.cumsum(np.bincount(values.reshape(-1), minlength=1 << WIDTHS[-1]))
    beyond = [int(values.size - at_most[(1 << width) - 1]) for width in WIDTHS]
    best = int(np.argmin([4 * out * n + LARGE * count for n, count in zip(per_row, beyond, strict=True)]))
    filled = torch.nn.functional.pad(columns, (0, per_row[best] * (32 // WIDTHS[best]) - size))
    words = np.zeros((out, per_row[best]), np.uint32)
    large = np.zeros(out + 1, np.int32), np.empty(beyond[best], np.int32), np.empty(beyond[best], np.int32)
    _fill(values, WIDTHS[best], words, *large)
    return Grid(
        torch.from_numpy(words.view(np.int32)),
        (out, size),
        WIDTHS[best],
        1 << (WIDTHS[best] - 1),
        per_row[best],
        rows,
        shared=False,
        columns=filled,
        gains=gains,
        large=tuple(map(torch.from_numpy, large)),
    )


@njit(nogil=True, cache=True)
def _fill(values, width, words, starts, places, codes):  # type: ignore[no-untyped-def]
    """Words and lists of large codes from zigzag codes."""
    fields, zero, per_row, count = 32 // width, 1 << (width - 1), words.shape[1], 0
    for r in range(values.shape[0]):
        for begin in range(0, per_row, LANES):
            lanes = min(LANES, per_row - begin)
            for i in range(begin * fields, min((begin + lanes) * fields, values.shape[1])):
                zigzag, within = np.int32(values[r, i]), i - begin * fields
                code = (zigzag >> 1) ^ -(zigzag & 1)
                kept = min(max(code, -zero), zero - 1)
                if kept != code:
                    places[count], codes[count], count = i, code, count + 1
                words[r, begin + within % lanes] |= np.uint32((kept + zero) << (width * (within // lanes)))
        starts[r + 1] = count


def _code(b: Any, words: Value, width: int, zero: int, field: int) -> Value:
    """A field of each word less zero, as float32: with the exponent of 2^23 its bits are those of 2^23 + code."""
    ints, floats = words.type, ir.VectorType(f32, words.type.count)
    code = b.and_(b.lshr(words, _splat(width * field, ints)), _splat((1 << width) - 1, ints))
    code = b.bitcast(b.or_(code, _splat(0x4B000000, ints)), floats)
    return b.fsub(code, _splat(float((1 << 23) + zero), floats))


def _halves(b: Any, address: Value, count: int) -> Value:
    """So many half floats, as float32."""
    return b.fpext(_load(b, address, ir.VectorType(ir.HalfType(), count)), ir.VectorType(f32, count))


def _widened(b: Any, vector: Value, lanes: int) -> Value:
    """Each value in as many lanes as it takes to fill them all."""
    return _shuffle(b, vector, [lane * vector.type.count // lanes for lane in range(lanes)])


def _runs(b: Any, count: Value, most: int, take: Callable[[Value, int], None]) -> None:
    """take(first, many): `most` of them at a time, and half as many if these are left."""
    with cgutils.for_range(b, b.sdiv(count, _int(most))) as loop:
        take(b.mul(loop.index, _int(most)), most)
    if most > 1:
        with b.if_then(b.icmp_signed("!=", b.srem(count, _int(most)), _int(0))):
            take(b.sub(count, _int(most // 2)), most // 2)


@intrinsic(prefer_literal=True)
def _grid_rows(typing, width, zero, lanes, spans, low, tokens, words, per_row, per_group, row, x, scale, minimum, sums, out):  # type: ignore[no-untyped-def]
    """Products of four rows with some vectors, without the factors of rows.

    width, zero, lanes, spans (see `Grid`), low (1 if there are minima), tokens: literals.  words, scale, minimum: addresses.
    row: the first.  x: address of float32[tokens, per_row * n], in the order in which a row's fields are taken.  sums: of x
    in each group, float32[tokens, groups].  out: float32[tokens, 4].
    """
    signature = types.void(width, zero, lanes, spans, low, tokens, *([types.int64] * 9))
    bits, offset, whole, k, has_low, T = (each.literal_value for each in (width, zero, lanes, spans, low, tokens))
    fields = 32 // bits

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        words, per_row, per_group, row, x, scale, minimum, sums, out = args[6:]
        cells = [(r, t) for r in range(ROWS) for t in range(T)]
        totals = {cell: _zero(b, ir.VectorType(f32, whole)) for cell in cells}
        singles = {cell: _zero(b, f32) for cell in cells}
        groups = b.sdiv(per_row, per_group) if k else _int(0)
        rows = [b.add(row, _int(r)) for r in range(ROWS)]
        size = b.mul(per_row, _int(4 * ROWS))
        ahead = b.add(words, b.add(b.mul(row, b.mul(per_row, _int(4))), _int(AHEAD)))
        with cgutils.for_range(b, b.lshr(b.add(size, _int(63)), _int(6))) as loop:
            _prefetch(b, b.add(ahead, b.mul(loop.index, _int(64))))

        def add(first: Value, lanes: int, places: dict[Any, Value]) -> None:
            """Products of the `lanes` words that begin with this one."""
            ints, floats = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)
            at = [b.add(words, b.mul(_int(4), b.add(b.mul(r, per_row), first))) for r in rows]
            loaded = [_load(b, place, ints) for place in at]
            sums = {cell: b.load(place) for cell, place in places.items()}
            for field in range(fields):
                here = b.add(b.mul(first, _int(fields)), _int(lanes * field))
                of_tokens = (b.add(b.mul(b.mul(per_row, _int(fields)), _int(t)), here) for t in range(T))
                values = [_load(b, b.add(x, b.mul(_int(4), place)), floats) for place in of_tokens]
                for r, word in enumerate(loaded):
                    code = _code(b, word, bits, offset, field)
                    for t in range(T):
                        sums[r, t] = _accumulate(b, sums[r, t], code, values[t])
            for cell, place in places.items():
                b.store(sums[cell], place)

        def add_groups(first: Value, spans: int) -> None:
            """Products of the `spans` groups that begin with this one, or of one group of several vectors."""
            lanes = whole * spans // k
            parts = {cell: cgutils.alloca_once(b, ir.VectorType(f32, lanes)) for cell in cells}
            for place in parts.values():
                b.store(_splat(0.0, place.type.pointee), place)
            with cgutils.for_range(b, b.sdiv(per_group, _int(lanes)) if spans == 1 else _int(1)) as loop:
                add(b.add(b.mul(first, per_group), b.mul(loop.index, _int(lanes))), lanes, parts)
            for r in range(ROWS):
                at = b.mul(_int(2), b.add(b.mul(rows[r], groups), first))
                factor = _widened(b, _halves(b, b.add(scale, at), spans), lanes)
                for t in range(T):
                    part = b.load(parts[r, t])
                    if lanes == whole:
                        b.store(_accumulate(b, b.load(totals[r, t]), part, factor), totals[r, t])
                    else:
                        b.store(b.fadd(b.load(singles[r, t]), _sum(b, b.fmul(part, factor))), singles[r, t])
                    if has_low:
                        minima = _halves(b, b.add(minimum, at), spans)
                        share = _load(b, b.add(sums, b.mul(_int(4), b.add(b.mul(groups, _int(t)), first))), minima.type)
                        share = b.fmul(share, minima)
                        b.store(b.fadd(b.load(singles[r, t]), _sum(b, share)), singles[r, t])

        def add_words(first: Value, lanes: int) -> None:
            """Products of the words that begin with this one, in a row without groups."""
            if lanes == whole:
                return add(first, lanes, totals)
            rest = {cell: _zero(b, ir.VectorType(f32, lanes)) for cell in cells}
            add(first, lanes, rest)
            for cell, place in rest.items():
                b.store(_sum(b, b.load(place)), singles[cell])

        if k:
            _runs(b, groups, k, add_groups)
        else:
            _runs(b, per_row, whole, add_words)
        for r, t in cells:
            result = b.fadd(_sum(b, b.load(totals[r, t])), b.load(singles[r, t]))
            _store(b, result, b.add(out, _int(4 * (ROWS * t + r))))
        return context.get_dummy_value()

    return signature, emit


@njit
def _arrange(x, of_columns, shared, fields, lanes, vector, sums, group):  # type: ignore[no-untyped-def]
    """x, float32[columns], times the columns' factors, in the order in which a row's fields are taken; its groups' sums."""
    if shared:
        per_row = len(x) // fields
        for word in range(per_row):
            first = word // lanes * lanes
            step = min(lanes, per_row - first)
            for field in range(fields):
                vector[first * fields + step * field + word - first] = x[word * fields + field]
        for g in range(len(sums)):
            total = np.float32(0)
            for i in range(g * group, (g + 1) * group):
                total += x[i]
            sums[g] = total
    else:
        for i in range(len(x)):
            vector[i] = x[i] * of_columns[i]


@cache
def _grid_kernel(width: int, zero: int, lanes: int, spans: int, low: int, shared: bool, count: int) -> Any:
    """Products of `count` vectors at a time."""
    fields = 32 // width

    @njit(nogil=True, cache=True)
    def kernel(x, weight, out, tokens, first, last):  # type: ignore[no-untyped-def]
        rows, columns, words, per_row, per_group, scale, minimum, factors, of_columns, gains, starts, places, codes = weight
        groups = per_row // per_group if spans else 0
        vectors, sums = np.zeros((count, per_row * fields), np.float32), np.empty((count, groups), np.float32)
        results = np.empty((count, ROWS), np.float32)
        a, b, c = vectors.ctypes.data, sums.ctypes.data, results.ctypes.data
        of_rows, of_columns = carray(_floats(factors), rows), carray(_floats(of_columns), columns)
        for start in range(0, tokens, count):
            for t in range(count):
                vector = carray(_floats(x + 4 * (start + t) * columns), columns)
                _arrange(vector, of_columns, shared, fields, lanes, vectors[t], sums[t], per_group * fields)
            for at in range(first, last, ROWS):
                row = min(at, rows - ROWS)  # the last four overlap the four before
                _grid_rows(width, zero, lanes, spans, low, count, words, per_row, per_group, row, a, scale, minimum, b, c)
                for r in range(row, row + ROWS):
                    for t in range(count):
                        total = results[t, r - row]
                        if not shared:
                            begin = carray(_ints(starts), rows + 1)
                            for i in range(begin[r], begin[r + 1]):
                                code, place = carray(_ints(codes), begin[rows])[i], carray(_ints(places), begin[rows])[i]
                                total += np.float32(code - (zero - 1 if code > 0 else -zero)) * vectors[t, place]
                        total *= of_rows[r]
                        if gains:
                            total *= carray(_floats(gains), rows)[r]
                        carray(_floats(out + 4 * (start + t) * rows), rows)[r] = total
        _keep(vectors, sums, results)

    return kernel


def grid(x: torch.Tensor, weight: Grid) -> torch.Tensor:
    """x W^T, float32[tokens, rows], of x: float32[tokens, columns]; see the module."""
    x, tokens, (rows, columns) = x.contiguous(), len(x), weight.shape
    out = torch.empty(tokens, rows)
    several, one = weight.kernels
    fours = tokens // TOGETHER * TOGETHER
    for kernel, first, count in ((several, 0, fours), (one, fours, tokens - fours)):
        if count:
            x_at, out_at = x.data_ptr() + 4 * first * columns, out.data_ptr() + 4 * first * rows
            operands = (x_at, weight.operands, out_at, count)
            ternary_cpu.in_parts(kernel, operands, rows, count * rows * columns)
    return out


@intrinsic(prefer_literal=True)
def _grid_row(typing, width, zero, lanes, spans, low, words, per_row, per_group, scale, minimum, factor, columns, gain, out):  # type: ignore[no-untyped-def]
    """A row, in the order of products and sums in which its stage decodes.

    width, zero, lanes, spans, low: literals, as `_grid_rows` has them.  words, scale, minimum: addresses of the row's first.
    columns: address of the columns' factors, if there are no groups.  out: of float32[per_row * n].
    """
    addresses, f = [types.int64] * 5, types.float32
    signature = types.void(width, zero, lanes, spans, low, *addresses, f, types.int64, f, types.int64)
    bits, offset, whole, k, has_low = (each.literal_value for each in (width, zero, lanes, spans, low))
    fields = 32 // bits

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        words, per_row, per_group, scale, minimum, factor, columns, gain, out = args[5:]

        def write(first: Value, lanes: int) -> None:
            word = _load(b, b.add(words, b.mul(_int(4), first)), ir.VectorType(i32, lanes))
            codes = [_code(b, word, bits, offset, field) for field in range(fields)]
            at = b.add(out, b.mul(first, _int(4 * fields)))
            if k:
                spans = max(1, k * lanes // whole)
                group = b.mul(_int(2), b.sdiv(first, per_group))
                values = [b.fmul(code, _widened(b, _halves(b, b.add(scale, group), spans), lanes)) for code in codes]
                if has_low:
                    low = _widened(b, _halves(b, b.add(minimum, group), spans), lanes)
                    values = [b.fadd(value, low) for value in values]
                values = [b.fmul(value, _spread(b, factor, lanes)) for value in values]
                while len(values) > 1:  # neighbours share words
                    count, half = values[0].type.count, len(values) // 2
                    order = [place // 2 + place % 2 * count for place in range(2 * count)]
                    values = [_shuffle(b, values[i], order, values[i + half]) for i in range(half)]
                _store(b, values[0], at)
                return
            for field, code in enumerate(codes):
                here = _int(4 * lanes * field)
                of = _load(b, b.add(b.add(columns, b.mul(first, _int(4 * fields))), here), code.type)
                value = b.fmul(b.fmul(b.fmul(code, _spread(b, factor, lanes)), of), _spread(b, gain, lanes))
                _store(b, value, b.add(at, here))

        _runs(b, per_row, whole, write)
        return context.get_dummy_value()

    return signature, emit


@cache
def _row_kernel(width: int, zero: int, lanes: int, spans: int, low: int, shared: bool) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(weight, out, first, last):  # type: ignore[no-untyped-def]
        rows, columns, words, per_row, per_group, scale, minimum, factors, of_columns, gains, starts, places, codes = weight
        filled = per_row * (32 // width)
        groups = per_row // per_group if spans else 0
        for r in range(first, last):
            factor, gain = carray(_floats(factors), rows)[r], np.float32(1)
            if gains:
                gain = carray(_floats(gains), rows)[r]
            row, beside, to = words + 4 * r * per_row, 2 * r * groups, out + 4 * (r - first) * filled
            a, b = scale + beside, minimum + beside
            _grid_row(width, zero, lanes, spans, low, row, per_row, per_group, a, b, factor, of_columns, gain, to)
            if not shared:
                begin = carray(_ints(starts), rows + 1)
                values, of = carray(_floats(to), columns), carray(_floats(of_columns), columns)
                for i in range(begin[r], begin[r + 1]):
                    code, place = carray(_ints(codes), begin[rows])[i], carray(_ints(places), begin[rows])[i]
                    values[place] = np.float32(code) * factor * of[place] * gain

    return kernel


def decode(weight: Grid, first: int, last: int) -> torch.Tensor:
    """float32[last - first, in]: rows, exactly those that the stage decodes."""
    out = torch.empty(last - first, weight.per_row * (32 // weight.width))
    _row_kernel(*weight.about)(weight.operands, out.data_ptr(), first, last)
    return out[:, : weight.shape[1]]


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
    def kernel(indices, size, count, x, columns, book, top, out, tokens, lines, first, last):  # type: ignore[no-untyped-def]
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


_ints, _shorts = _pointer(types.int32, i32), _pointer(types.int16, i16)


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
    def kernel(weights, x, columns, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]
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
