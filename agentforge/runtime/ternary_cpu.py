"""Products of 2-bit ternary weights with 8-bit activations on the CPU, from vector instructions.

    y = scale * (W q) / s + bias,   s = 127 / max|x|,   q = round(x * s)

W holds -1, 0 and +1 as codes 0, 1 and 2, so that an instruction for unsigned by signed bytes (vpdpbusd, vpmaddubsw) serves:
W q = codes q - sum(q).  W q is an integer, exact whatever the order of its sum: every path below, and every number of
threads, gives the same bits.

Layout.  Four rows share a run of 64 bytes for every 64 columns (the inputs are padded with zeros to such a multiple, the
rows to a multiple of four).  Row r has bytes 16r to 16r + 15; byte j holds columns j, 16 + j, 32 + j and 48 + j of the 64,
the first in the lowest bits.  So one register of packed bytes, shifted and masked, gives four registers of codes, and each
meets sixteen activations that are loaded once and repeated for all its rows.

The kernels are written in LLVM's own terms (llvmlite's builder inside numba's intrinsics), because numba cannot ask for the
instructions by name.  A path says how the instructions of one kind of machine do it:

- "avx512": 64 bytes, vpdpbusd (AVX-512 VNNI).
- "avxvnni": 32 bytes, vpdpbusd (AVX-VNNI, or AVX-512 VNNI with VL).
- "avx2": 32 bytes, vpmaddubsw and vpmaddwd.
- "portable": vectors of plain LLVM, for NEON and everything else.

All functions take addresses, not arrays: checking and unboxing a call's arrays would take longer than a small layer does.
What they inline is in this file, because numba's cache on disk does not notice changes elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import literally, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PATHS = ("avx512", "avxvnni", "avx2", "portable")  # the fastest first
ROWS, COLUMNS = 4, 64  # of a group and of a run
RUN = 64  # bytes
TOKENS = 64  # that are quantised at a time: their activations stay in the second cache
LIMIT = 1 << 23  # columns; beyond that a sum of 2 * 127 each might not fit into 32 bits
WORTH_THREADS = 3 << 20  # packed bytes times tokens, some 80 us: less is done before another thread has begun
SHARE = 16  # rows; a part's are a multiple of them
PARTS = 2  # a thread

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f32, f64 = ir.FloatType(), ir.DoubleType()
Value = Any  # an ir.Value


def available() -> tuple[str, ...]:
    """The paths that the code numba makes on this machine can take, the fastest first."""
    if numba.config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES, or "" for NUMBA_CPU_NAME=generic
        has = {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name.startswith("+")}
    else:
        has = {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}
    there = {
        "avx512": {"avx512f", "avx512bw", "avx512vnni"} <= has,
        "avxvnni": "avx2" in has and ("avxvnni" in has or {"avx512vl", "avx512vnni"} <= has),
        "avx2": "avx2" in has,
        "portable": True,
    }
    return tuple(path for path in PATHS if there[path])


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _int(value: int) -> Value:
    return ir.Constant(i64, value)


def _splat(value: float, kind: ir.VectorType) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def _shuffle(b: Any, v: Value, lanes: list[int], other: Value | None = None) -> Value:
    other = ir.Constant(v.type, ir.Undefined) if other is None else other
    return b.shuffle_vector(v, other, ir.Constant(_vector(i32, len(lanes)), lanes))


def _call(b: Any, name: str, result: ir.Type, *args: Value) -> Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _load(b: Any, address: Value, kind: ir.Type) -> Value:
    """What lies at this address, aligned or not."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: Any, value: Value, address: Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


class _Machine:
    """How one kind of machine does it.

    rows: of a group that share a register.  few, many: groups that are multiplied at a time with one token, and with `MANY`:
    as many sums as fit into the registers.
    """

    def __init__(self, rows: int, few: int, many: int) -> None:
        self.rows, self.few, self.many = rows, few, many
        self.sums = _vector(i32, 4 * rows)

    def weights(self, b: Any, address: Value) -> Value:
        """Packed bytes of the rows that share a register."""
        return _load(b, address, _vector(i8, 16 * self.rows))

    def activations(self, b: Any, address: Value) -> Value:
        """Sixteen activations, repeated for every row."""
        return _shuffle(b, _load(b, address, _vector(i8, 16)), list(range(16)) * self.rows)

    def codes(self, b: Any, packed: Value, field: int) -> Value:
        """The codes in one of the four fields of each byte.  Bits that come from the neighbouring byte are masked away."""
        wide = _vector(i16, packed.type.count // 2)
        shifted = b.bitcast(b.lshr(b.bitcast(packed, wide), _splat(2 * field, wide)), packed.type) if field else packed
        return b.and_(shifted, _splat(3, packed.type))

    def add(self, b: Any, sums: dict[Any, Value], packed: dict[Any, Value], x: Callable[[int, int], Value]) -> None:
        """Add the products of a run to sums[part, token].  packed: by part.  x(token, field): activations."""
        raise NotImplementedError

    def totals(self, b: Any, sums: Value) -> Value:
        """The sum of each row: i32[rows]."""
        parts = [_shuffle(b, sums, list(range(lane, 4 * self.rows, 4))) for lane in range(4)]
        return b.add(b.add(parts[0], parts[1]), b.add(parts[2], parts[3]))


class _Dpbusd(_Machine):
    def add(self, b: Any, sums: dict[Any, Value], packed: dict[Any, Value], x: Callable[[int, int], Value]) -> None:
        """Sums of products of four neighbours, in one instruction."""
        tokens = sorted({token for _, token in sums})
        for field in range(4):
            codes = {part: b.bitcast(self.codes(b, packed[part], field), self.sums) for part in packed}
            for token in tokens:
                q = b.bitcast(x(token, field), self.sums)
                for part, code in codes.items():
                    name = f"llvm.x86.avx512.vpdpbusd.{128 * self.rows}"
                    sums[part, token] = _call(b, name, self.sums, sums[part, token], code, q)


class _Maddubsw(_Machine):
    def add(self, b: Any, sums: dict[Any, Value], packed: dict[Any, Value], x: Callable[[int, int], Value]) -> None:
        """Products of pairs in 16 bits, then sums of four in 32."""
        tokens = sorted({token for _, token in sums})
        wide = _vector(i16, 8 * self.rows)
        for part in packed:
            codes = [self.codes(b, packed[part], field) for field in range(4)]
            for token in tokens:
                pairs = [_call(b, "llvm.x86.avx2.pmadd.ub.sw", wide, codes[f], x(token, f)) for f in range(4)]
                total = b.add(b.add(pairs[0], pairs[1]), b.add(pairs[2], pairs[3]))  # at most 4 * 2 * 2 * 128
                more = _call(b, "llvm.x86.avx2.pmadd.wd", self.sums, total, _splat(1, wide))
                sums[part, token] = b.add(sums[part, token], more)


class _Portable(_Machine):
    def add(self, b: Any, sums: dict[Any, Value], packed: dict[Any, Value], x: Callable[[int, int], Value]) -> None:
        """Plain products and sums, which every compiler knows."""
        tokens = sorted({token for _, token in sums})
        wide = _vector(i16, 16)
        for part in packed:
            codes = [b.zext(self.codes(b, packed[part], field), wide) for field in range(4)]
            for token in tokens:
                products = [b.mul(codes[f], b.sext(x(token, f), wide)) for f in range(4)]
                total = b.add(b.add(products[0], products[1]), b.add(products[2], products[3]))
                folded = b.add(*(_shuffle(b, total, list(range(k, k + 8))) for k in (0, 8)))  # at most 8 * 2 * 128
                folded = b.add(*(b.sext(_shuffle(b, folded, list(range(k, k + 4))), self.sums) for k in (0, 4)))
                sums[part, token] = b.add(sums[part, token], folded)


MANY = 4  # tokens of a tile, if there are as many
MACHINES = {
    "avx512": _Dpbusd(rows=4, few=4, many=4),
    "avxvnni": _Dpbusd(rows=2, few=2, many=1),
    "avx2": _Maddubsw(rows=2, few=2, many=1),
    "portable": _Portable(rows=1, few=1, many=1),
}
FEW_GROUPS = tuple(MACHINES[path].few for path in PATHS)
MANY_GROUPS = tuple(MACHINES[path].many for path in PATHS)


@intrinsic(prefer_literal=True)
def _tile(
    typing: Any,
    path: Any,
    kind: Any,
    packed: Any,
    x: Any,
    runs: Any,
    sums: Any,
    factors: Any,
    scale: Any,
    scale_step: Any,
    bias: Any,
    bias_step: Any,
    out: Any,
    stride: Any,
    rows: Any,
) -> Any:
    """Multiply groups of rows with tokens.

    path, kind: literals.  kind: 0 for a path's `few` groups and one token, 2 for its `many` groups and `MANY` tokens; 1
    and 3 for a single group.
    packed, x: addresses of the first group and token.  runs: of 64 columns.  sums: of each token's activations, int32.
    factors: of each token, double precision: 1 / s.  scale, bias: float32[4] of the first group; their steps: 1 if each
    row has its own, 0 if these four serve all groups.  out: address of the first row's and token's result, float32.
    stride: bytes from token to token there.  rows: how many of the rows there are; others are not written.
    """
    signature = types.void(path, kind, *([types.int64] * 12))
    machine = MACHINES[PATHS[path.literal_value]]
    G, T = [(machine.few, 1), (1, 1), (machine.many, MANY), (1, MANY)][kind.literal_value]

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        packed, x, runs, sums_at, factors, scale, scale_step, bias, bias_step, out, stride, rows = args[2:]
        length = b.mul(runs, _int(RUN))  # of a group, and of a token
        registers = ROWS // machine.rows
        parts = [(g, r) for g in range(G) for r in range(registers)]
        places = {(part, t): cgutils.alloca_once(b, machine.sums) for part in parts for t in range(T)}
        for place in places.values():
            b.store(_splat(0, machine.sums), place)
        groups_at = [b.add(packed, b.mul(length, _int(g))) for g in range(G)]
        tokens_at = [b.add(x, b.mul(length, _int(t))) for t in range(T)]
        with cgutils.for_range(b, runs) as loop:
            at = b.mul(loop.index, _int(RUN))
            weights = {}
            for g, r in parts:
                weights[g, r] = machine.weights(b, b.add(groups_at[g], b.add(at, _int(16 * machine.rows * r))))
            sums = {cell: b.load(place) for cell, place in places.items()}
            machine.add(b, sums, weights, lambda t, f: machine.activations(b, b.add(tokens_at[t], b.add(at, _int(16 * f)))))
            for cell, place in places.items():
                b.store(sums[cell], place)
        doubles, floats = _vector(f64, ROWS), _vector(f32, ROWS)

        def repeated(value: Value) -> Value:
            lanes = _vector(value.type, ROWS)
            return _shuffle(b, b.insert_element(ir.Constant(lanes, ir.Undefined), value, ir.Constant(i32, 0)), [0] * ROWS)

        for g in range(G):
            here = _int(4 * ROWS * g)
            scales = b.fpext(_load(b, b.add(scale, b.mul(scale_step, here)), floats), doubles)
            offsets = b.fpext(_load(b, b.add(bias, b.mul(bias_step, here)), floats), doubles)
            for t in range(T):
                totals = [machine.totals(b, b.load(places[(g, r), t])) for r in range(registers)]
                while len(totals) > 1:
                    lanes = list(range(2 * totals[0].type.count))
                    totals = [_shuffle(b, totals[i], lanes, totals[i + 1]) for i in range(0, len(totals), 2)]
                token_sum = repeated(_load(b, b.add(sums_at, _int(4 * t)), i32))
                factor = repeated(_load(b, b.add(factors, _int(8 * t)), f64))
                exact = b.sitofp(b.sub(totals[0], token_sum), doubles)
                result = b.fptrunc(b.fadd(b.fmul(exact, b.fmul(scales, factor)), offsets), floats)
                to = b.add(b.add(out, b.mul(stride, _int(t))), here)
                with b.if_else(b.icmp_signed(">=", rows, _int(ROWS * (g + 1)))) as (whole, part):
                    with whole:
                        _store(b, result, to)
                    with part:
                        for lane in range(ROWS):
                            with b.if_then(b.icmp_signed(">", rows, _int(ROWS * g + lane))):
                                _store(b, b.extract_element(result, ir.Constant(i32, lane)), b.add(to, _int(4 * lane)))
        return context.get_dummy_value()

    return signature, emit


LANES = 16  # of the float vectors below
MAGIC = 12582912.0  # 1.5 * 2**23: a float32 of less than 2**22 that is added to it is rounded to an integer, halves to even
MAGIC_BITS = int(np.float32(MAGIC).view(np.int32))


@intrinsic
def _largest(typing: Any, x: Any, count: Any) -> Any:
    """max|x| of float32[count] at an address, count a multiple of 16: the bits of it, in which NaN is above infinity."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lanes = _vector(i32, LANES)
        place = cgutils.alloca_once(b, lanes)
        b.store(_splat(0, lanes), place)
        with cgutils.for_range(b, b.sdiv(args[1], _int(LANES))) as loop:
            bits = _load(b, b.add(args[0], b.mul(loop.index, _int(4 * LANES))), lanes)
            bits = b.and_(bits, _splat(0x7FFFFFFF, lanes))
            so_far = b.load(place)
            b.store(b.select(b.icmp_signed(">", bits, so_far), bits, so_far), place)
        v = b.load(place)
        for half in (8, 4, 2, 1):
            low, high = _shuffle(b, v, list(range(half))), _shuffle(b, v, list(range(half, 2 * half)))
            v = b.select(b.icmp_signed(">", low, high), low, high)
        return b.extract_element(v, ir.Constant(i32, 0))

    return types.int32(types.int64, types.int64), emit


@intrinsic
def _round(typing: Any, x: Any, q: Any, count: Any, factor: Any) -> Any:
    """int8[count] at address q becomes round(x * factor), x: float32[count], count a multiple of 16.  Returns their sum."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, q, count, factor = args
        lanes, floats = _vector(i32, LANES), _vector(f32, LANES)
        factors = b.insert_element(ir.Constant(floats, ir.Undefined), factor, ir.Constant(i32, 0))
        factors = _shuffle(b, factors, [0] * LANES)
        place = cgutils.alloca_once(b, lanes)
        b.store(_splat(0, lanes), place)
        with cgutils.for_range(b, b.sdiv(count, _int(LANES))) as loop:
            product = b.fmul(_load(b, b.add(x, b.mul(loop.index, _int(4 * LANES))), floats), factors)
            bits = b.bitcast(b.fadd(product, _splat(MAGIC, floats)), lanes)
            rounded = b.sub(bits, _splat(MAGIC_BITS, lanes))
            b.store(b.add(b.load(place), rounded), place)
            _store(b, b.trunc(rounded, _vector(i8, LANES)), b.add(q, b.mul(loop.index, _int(LANES))))
        v = b.load(place)
        for half in (8, 4, 2, 1):
            v = b.add(_shuffle(b, v, list(range(half))), _shuffle(b, v, list(range(half, 2 * half))))
        return b.extract_element(v, ir.Constant(i32, 0))

    return types.int32(types.int64, types.int64, types.int64, types.float32), emit


@intrinsic
def _copy(typing: Any, to: Any, from_: Any, count: Any) -> Any:
    """Copy bytes from one address to another."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(b, *(b.inttoptr(a, i8.as_pointer()) for a in args[:2]), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def _float(typing: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], f32)


@njit
def _quantize(x, columns, q, sums, factors, token, end):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    """One token: int8 activations at address q, filled up with zeros to whole runs; their sum, and 1 / s.

    end: float32[COLUMNS], zeros beyond columns % COLUMNS.
    """
    whole = columns // COLUMNS * COLUMNS
    if whole < columns:
        _copy(end.ctypes.data, x + 4 * whole, 4 * (columns - whole))
    largest = _float(max(_largest(x, whole), _largest(end.ctypes.data, COLUMNS)))
    if largest < np.inf:
        # As torch computes 127 / t: the reciprocal, rounded, times 127.
        scale = np.float32(1) / max(largest, np.float32(1e-5)) * np.float32(127)
        factors[token] = 1 / np.float64(scale)
    else:
        scale = np.float32(0)
        factors[token] = np.nan  # so every result of this token is NaN
    total = _round(x, q, whole, scale)
    if whole < columns:
        total += _round(end.ctypes.data, q + whole, COLUMNS, scale)
    sums[token] = total


@njit
def _keep(*arrays):  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    """To be called after the last use of the arrays' addresses: numba frees an array after its last use by name."""
    return len(arrays)


@njit
def _product(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    path, x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last
):
    """Rows first .. last - 1 of the product, for all tokens; see `product`."""
    path = literally(path)
    runs = (columns + COLUMNS - 1) // COLUMNS
    length = runs * RUN
    q = np.empty(min(tokens, TOKENS) * length, np.int8)
    sums, factors = np.empty(TOKENS, np.int32), np.empty(TOKENS, np.float64)
    end = np.zeros(COLUMNS, np.float32)
    q_at, sums_at, factors_at = q.ctypes.data, sums.ctypes.data, factors.ctypes.data
    for start in range(0, tokens, TOKENS):
        count = min(TOKENS, tokens - start)
        for t in range(count):
            _quantize(x + 4 * (start + t) * columns, columns, q_at + t * length, sums, factors, t, end)
        fours = count // MANY * MANY
        row = first
        while row < last and fours:
            p, s, b = packed + row // ROWS * length, scale + 4 * row * scale_step, bias + 4 * row * bias_step
            to = out + 4 * (start * rows + row)
            if last - row > ROWS * (MANY_GROUPS[path] - 1):
                for t in range(0, fours, MANY):
                    a = q_at + t * length, sums_at + 4 * t, factors_at + 8 * t, to + 4 * t * rows
                    _tile(path, 2, p, a[0], runs, a[1], a[2], s, scale_step, b, bias_step, a[3], 4 * rows, last - row)
                row += ROWS * MANY_GROUPS[path]
            else:
                for t in range(0, fours, MANY):
                    a = q_at + t * length, sums_at + 4 * t, factors_at + 8 * t, to + 4 * t * rows
                    _tile(path, 3, p, a[0], runs, a[1], a[2], s, scale_step, b, bias_step, a[3], 4 * rows, last - row)
                row += ROWS
        row = first
        while row < last and fours < count:
            p, s, b = packed + row // ROWS * length, scale + 4 * row * scale_step, bias + 4 * row * bias_step
            to = out + 4 * (start * rows + row)
            if last - row > ROWS * (FEW_GROUPS[path] - 1):
                for t in range(fours, count):
                    a = q_at + t * length, sums_at + 4 * t, factors_at + 8 * t, to + 4 * t * rows
                    _tile(path, 0, p, a[0], runs, a[1], a[2], s, scale_step, b, bias_step, a[3], 4 * rows, last - row)
                row += ROWS * FEW_GROUPS[path]
            else:
                for t in range(fours, count):
                    a = q_at + t * length, sums_at + 4 * t, factors_at + 8 * t, to + 4 * t * rows
                    _tile(path, 1, p, a[0], runs, a[1], a[2], s, scale_step, b, bias_step, a[3], 4 * rows, last - row)
                row += ROWS
    _keep(q, sums, factors, end)


@njit(nogil=True, cache=True)
def _avx512(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last
):
    _product(0, x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last)


@njit(nogil=True, cache=True)
def _avxvnni(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last
):
    _product(1, x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last)


@njit(nogil=True, cache=True)
def _avx2(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last
):
    _product(2, x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last)


@njit(nogil=True, cache=True)
def _portable(  # type: ignore[no-untyped-def]  # pragma: no cover  (compiled)
    x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last
):
    _product(3, x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last)


KERNELS: dict[str, Any] = {"avx512": _avx512, "avxvnni": _avxvnni, "avx2": _avx2, "portable": _portable}


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor,
    rows: int,
    path: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """scale * (W q) / s + bias: float32[..., rows] of x: float32[..., in], contiguous, on the CPU.

    packed: uint8[groups, runs, 64], see the module.  scales, biases: float32[4], or [rows, filled up to a multiple of four].
    path: one of `available()`, else the fastest.  threads: at most so many, else as torch does.
    """
    columns = x.shape[-1]
    out = torch.empty((*x.shape[:-1], rows))
    tokens = x.numel() // columns
    per_row, with_bias = int(scales.numel() > ROWS), int(biases.numel() > ROWS)
    layer = packed.data_ptr(), scales.data_ptr(), per_row, biases.data_ptr(), with_bias
    # Each part rounds the activations for itself: that takes less than to wait for one that does it for all.
    operands = (x.data_ptr(), columns, *layer, out.data_ptr(), tokens, rows)
    in_parts(KERNELS[path or _fastest()], operands, rows, tokens * packed.numel(), threads)
    return out


def in_parts(kernel: Any, operands: tuple[Any, ...], rows: int, work: int, threads: int | None = None) -> None:
    """kernel(*operands, first row, last row), shared among threads if `work`, in bytes, is worth it.

    Each thread takes the next part when it is done with one, the calling thread too: on a busy machine, where another
    thread may come to its turn only after milliseconds, the calling one does most of it, or all.
    """
    threads = threads or torch.get_num_threads()
    if work < WORTH_THREADS or threads < 2:
        kernel(*operands, 0, rows)
        return
    size = SHARE * math.ceil(rows / SHARE / (PARTS * threads))
    parts = iter(range(0, rows, size))

    def take() -> None:
        for first in parts:
            kernel(*operands, first, min(first + size, rows))

    others = [_pool().submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        # Even after an interrupt: a part that has begun writes into memory that the caller gives back.
        for other in others:
            if not other.cancel():
                other.result()


@cache
def _fastest() -> str:
    return available()[0]


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads of our own: numba's cannot be used by several threads at once.  They start as they are needed."""
    return ThreadPoolExecutor(os.cpu_count(), "agentforge-ternary")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
