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
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, literally, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

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


def features() -> set[str]:
    """The machine's instructions that the code numba makes can use, by LLVM's names."""
    if numba.config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES, or "" for NUMBA_CPU_NAME=generic
        return {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


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


def _spread(b: Any, value: Value, lanes: int) -> Value:
    """A value in every lane."""
    first = b.insert_element(ir.Constant(_vector(value.type, lanes), ir.Undefined), value, ir.Constant(i32, 0))
    return _shuffle(b, first, [0] * lanes)


def _codes(b: Any, packed: Value, field: int) -> Value:
    """The codes in one of the four fields of each byte.  Bits that come from the neighbouring byte are masked away."""
    wide = _vector(i16, packed.type.count // 2)
    shifted = b.bitcast(b.lshr(b.bitcast(packed, wide), _splat(2 * field, wide)), packed.type) if field else packed
    return b.and_(shifted, _splat(3, packed.type))


Sums = dict[Any, Value]  # by part, which rows share a register, and token
Activations = Callable[[int, int], Value]  # of a token and a field


def _dpbusd(b: Any, sums: Sums, packed: dict[Any, Value], x: Activations) -> None:
    """Sums of products of four neighbours, in one instruction."""
    for field in range(4):
        codes = {part: _codes(b, bytes_, field) for part, bytes_ in packed.items()}
        for part, token in sums:
            total = sums[part, token]
            operands = (b.bitcast(value, total.type) for value in (codes[part], x(token, field)))
            name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
            sums[part, token] = _call(b, name, total.type, total, *operands)


def _maddubsw(b: Any, sums: Sums, packed: dict[Any, Value], x: Activations) -> None:
    """Products of pairs in 16 bits, then sums of four in 32."""
    for part, bytes_ in packed.items():
        codes, wide = [_codes(b, bytes_, field) for field in range(4)], _vector(i16, bytes_.type.count // 2)
        for token in range(len(sums) // len(packed)):
            total = sums[part, token]
            pairs = [_call(b, "llvm.x86.avx2.pmadd.ub.sw", wide, codes[f], x(token, f)) for f in range(4)]
            four = b.add(b.add(pairs[0], pairs[1]), b.add(pairs[2], pairs[3]))  # at most 4 * 2 * 2 * 128
            more = _call(b, "llvm.x86.avx2.pmadd.wd", total.type, four, _splat(1, wide))
            sums[part, token] = b.add(total, more)


def _portable(b: Any, sums: Sums, packed: dict[Any, Value], x: Activations) -> None:
    """Plain products and sums, which every compiler knows."""
    wide = _vector(i16, 16)
    for part, bytes_ in packed.items():
        codes = [b.zext(_codes(b, bytes_, field), wide) for field in range(4)]
        for token in range(len(sums) // len(packed)):
            total = sums[part, token]
            products = [b.mul(codes[f], b.sext(x(token, f), wide)) for f in range(4)]
            four = b.add(b.add(products[0], products[1]), b.add(products[2], products[3]))
            folded = b.add(*(_shuffle(b, four, list(range(k, k + 8))) for k in (0, 8)))  # at most 8 * 2 * 128
            folded = b.add(*(b.sext(_shuffle(b, folded, list(range(k, k + 4))), total.type) for k in (0, 4)))
            sums[part, token] = b.add(total, folded)


class _Machine(NamedTuple):
    """How one kind of machine does it.

    needs: sets of LLVM's features, one of which has to be there.  add: adds the products of a run.  rows: of a group that
    share a register.  few, many: groups that are multiplied at a time with one token, and with `MANY`: as many sums as fit
    into the registers.
    """

    needs: tuple[set[str], ...]
    add: Callable[[Any, Sums, dict[Any, Value], Activations], None]
    rows: int
    few: int
    many: int


MANY = 4  # tokens of a tile, if there are as many
MACHINES = {  # the fastest first
    "avx512": _Machine(({"avx512f", "avx512bw", "avx512vnni"},), _dpbusd, rows=4, few=4, many=4),
    "avxvnni": _Machine(({"avx2", "avxvnni"}, {"avx2", "avx512vl", "avx512vnni"}), _dpbusd, rows=2, few=2, many=1),
    "avx2": _Machine(({"avx2"},), _maddubsw, rows=2, few=2, many=1),
    "portable": _Machine((set(),), _portable, rows=1, few=1, many=1),
}
PATHS = tuple(MACHINES)


def available() -> tuple[str, ...]:
    """The paths that can be taken on this machine, the fastest first."""
    has = features()
    return tuple(path for path, machine in MACHINES.items() if any(need <= has for need in machine.needs))


@intrinsic(prefer_literal=True)
def _tile(_, path, groups, tokens, packed, x, runs, sums, factors, scale, scale_step, bias, bias_step, out, stride, rows):  # type: ignore[no-untyped-def]
    """Multiply groups of rows with tokens.

    path, groups, tokens: literals.
    packed, x: addresses of the first group and token.  runs: of 64 columns.  sums: of each token's activations, int32.
    factors: of each token, double precision: 1 / s.  scale, bias: float32[4] of the first group; their steps: 1 if each
    row has its own, 0 if these four serve all groups.  out: address of the first row's and token's result, float32.
    stride: bytes from token to token there.  rows: how many of the rows there are; others are not written.
    """
    signature = types.void(path, groups, tokens, *([types.int64] * 12))
    machine = MACHINES[PATHS[path.literal_value]]
    G, T = groups.literal_value, tokens.literal_value

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        packed, x, runs, sums_at, factors, scale, scale_step, bias, bias_step, out, stride, rows = args[3:]
        length = b.mul(runs, _int(RUN))  # of a group, and of a token
        registers, lanes = ROWS // machine.rows, 4 * machine.rows
        parts = [(g, r) for g in range(G) for r in range(registers)]
        places = {(part, t): cgutils.alloca_once(b, _vector(i32, lanes), zfill=True) for t in range(T) for part in parts}
        groups_at = [b.add(packed, b.mul(length, _int(g))) for g in range(G)]
        tokens_at = [b.add(x, b.mul(length, _int(t))) for t in range(T)]
        with cgutils.for_range(b, runs) as loop:
            at = b.mul(loop.index, _int(RUN))
            weights = {}
            for g, r in parts:
                place = b.add(groups_at[g], b.add(at, _int(4 * lanes * r)))
                weights[g, r] = _load(b, place, _vector(i8, 4 * lanes))

            def activations(token: int, field: int) -> Value:
                """Sixteen of them, repeated for every row."""
                sixteen = _load(b, b.add(tokens_at[token], b.add(at, _int(16 * field))), _vector(i8, 16))
                return _shuffle(b, sixteen, list(range(16)) * machine.rows)

            sums = {cell: b.load(place) for cell, place in places.items()}
            machine.add(b, sums, weights, activations)
            for cell, place in places.items():
                b.store(sums[cell], place)
        doubles, floats = _vector(f64, ROWS), _vector(f32, ROWS)

        def total(sums: Value) -> Value:
            """The sum of each row: i32[rows]."""
            fours = [_shuffle(b, sums, list(range(lane, lanes, 4))) for lane in range(4)]
            return b.add(b.add(fours[0], fours[1]), b.add(fours[2], fours[3]))

        for g in range(G):
            here = _int(4 * ROWS * g)
            scales = b.fpext(_load(b, b.add(scale, b.mul(scale_step, here)), floats), doubles)
            offsets = b.fpext(_load(b, b.add(bias, b.mul(bias_step, here)), floats), doubles)
            for t in range(T):
                totals = [total(b.load(places[(g, r), t])) for r in range(registers)]
                while len(totals) > 1:
                    both = list(range(2 * totals[0].type.count))
                    totals = [_shuffle(b, totals[i], both, totals[i + 1]) for i in range(0, len(totals), 2)]
                token_sum = _spread(b, _load(b, b.add(sums_at, _int(4 * t)), i32), ROWS)
                factor = _spread(b, _load(b, b.add(factors, _int(8 * t)), f64), ROWS)
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


MAGIC = np.float32(12582912)  # 1.5 * 2**23: a float32 below 2**22 to which it is added is rounded, halves to even
INFINITY = 0x7F800000  # the bits of a float32


def _pointer(kind: Any, of: ir.Type) -> Any:
    """A function that takes an address for a pointer to this kind, numba's and LLVM's."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        signature = types.CPointer(kind)(types.int64)
        return signature, lambda context, b, signature, args: b.inttoptr(args[0], of.as_pointer())

    return pointer


_floats = _pointer(types.float32, f32)


@njit
def _quantize(x, q, sums, factors, token):  # type: ignore[no-untyped-def]
    """x: float32[columns] of one token, rounded to int8 at the beginning of q; their sum, and 1 / s."""
    bits: Any = x.view(np.int32)
    largest = 0
    for i in range(len(x)):
        largest = max(largest, bits[i] & 0x7FFFFFFF)  # |x|, in whose order NaN is above infinity
    total: Any = 0
    if largest < INFINITY:
        # As torch computes 127 / t: the reciprocal, rounded, times 127.
        scale = np.float32(1) / max(np.int32(largest).view(np.float32), np.float32(1e-5)) * np.float32(127)
        for i in range(len(x)):
            rounded = np.int32((x[i] * scale + MAGIC) - MAGIC)
            q[i] = rounded
            total += rounded
        factors[token] = 1 / np.float64(scale)
    else:
        q[: len(x)] = 0
        factors[token] = np.nan  # so every result of this token is NaN
    sums[token] = total


@njit
def _keep(*arrays):  # type: ignore[no-untyped-def]
    """To be called after the last use of the arrays' addresses: numba frees an array after its last use by name."""
    return len(arrays)


@njit
def _tokens(path, groups, step, begin, end, q, sums, factors, runs, layer, out, rows, first, last):  # type: ignore[no-untyped-def]
    """Rows first .. last - 1 of tokens begin .. end - 1, `step` at a time; `groups` groups of rows together, then single."""
    path = literally(path)
    groups = literally(groups)
    step = literally(step)
    packed, scale, scale_step, bias, bias_step = layer
    length, row = runs * RUN, first
    while row < last and begin < end:
        p, s, b = packed + row // ROWS * length, scale + 4 * row * scale_step, bias + 4 * row * bias_step
        together = last - row > ROWS * (groups - 1)
        for t in range(begin, end, step):
            x, total, factor, to = q + t * length, sums + 4 * t, factors + 8 * t, out + 4 * (t * rows + row)
            if together:
                _tile(path, groups, step, p, x, runs, total, factor, s, scale_step, b, bias_step, to, 4 * rows, last - row)
            else:
                _tile(path, 1, step, p, x, runs, total, factor, s, scale_step, b, bias_step, to, 4 * rows, last - row)
        row += ROWS * groups if together else ROWS


@cache
def _kernel(path: str | None) -> Any:
    """Rows first .. last - 1 of the product, for all tokens; see `product`."""
    path = path or available()[0]
    number, few, many = PATHS.index(path), MACHINES[path].few, MACHINES[path].many

    @njit(nogil=True, cache=True)
    def kernel(x, columns, packed, scale, scale_step, bias, bias_step, out, tokens, rows, first, last):  # type: ignore[no-untyped-def]
        runs = (columns + COLUMNS - 1) // COLUMNS
        q = np.zeros((min(tokens, TOKENS), runs * RUN), np.int8)
        sums, factors = np.empty(TOKENS, np.int32), np.empty(TOKENS, np.float64)
        a, b, c = q.ctypes.data, sums.ctypes.data, factors.ctypes.data
        for start in range(0, tokens, TOKENS):
            count = min(TOKENS, tokens - start)
            for t in range(count):
                _quantize(carray(_floats(x + 4 * (start + t) * columns), columns), q[t], sums, factors, t)
            fours, to = count // MANY * MANY, out + 4 * start * rows
            layer = packed, scale, scale_step, bias, bias_step
            _tokens(number, many, MANY, 0, fours, a, b, c, runs, layer, to, rows, first, last)
            _tokens(number, few, 1, fours, count, a, b, c, runs, layer, to, rows, first, last)
        _keep(q, sums, factors)

    return kernel


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
    in_parts(_kernel(path), operands, rows, tokens * packed.numel(), threads)
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
def _pool() -> ThreadPoolExecutor:
    """Threads of our own: numba's cannot be used by several threads at once.  They start as they are needed."""
    return ThreadPoolExecutor(os.cpu_count(), "agentforge-ternary")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
