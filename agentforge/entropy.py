"""Lossless coding of planes: what can still be saved once a stage has chosen its integers.

A code that is more frequent than others deserves fewer bits.  No lossless code of independent values takes fewer than
their entropy, -sum p log2 p bits per value (Shannon 1948, theorem 9); range coding (Martin 1979; here the library
constriction) comes within a word of it for the histogram it is given.  A plane's values are cut into digits, and each
digit is coded in the cheapest of these ways:

* PACKED: no model, its width in bits per value;
* ONE: one histogram for the whole plane;
* ROWS, COLUMNS: the plane's rows (or columns) are sorted by how concentrated their values are and cut into eight classes
  of equal size, each with a histogram of its own.  It pays if one scale serves rows or columns of unequal size;
* CELLS: of paths alone, rows and columns have a scale each, whose sum gives a value's cell, and histograms are functions of
  three numbers (`cells`).

Values of up to 16 bits may be one digit; a histogram may, however, be larger than what it describes, so that all of more
than 8 bits are also tried as digits of 8 bits from the top, the last one shorter.  Floats are coded as their bit
patterns: the exponents of scales have little entropy.

A coded plane is one of

    RAW, the plane as it is stored (if coding does not pay: one byte more than the plane)
    WHOLE, CRC-32 of the rest, section
    SPLIT, CRC-32 of the rest, one section per digit from the most significant, all but the last prefixed by length (4 bytes)

    section: PACKED, values as `pack_uint` packs them
    section: kind, largest value (2 bytes), one histogram per class (14 bits per frequency), the class of each row or column
             (3 bits; not in ONE), words of the range coder
    section of a path: kind, frequencies in a histogram less one (2 bytes), two histograms per class, classes as above, how
             many even ones each class has (4 bytes each), words of the range coder

All choices and models come from integers, so the bytes are the same on every machine.  Nothing in a file is
trusted: sizes are checked before anything is allocated, and as no histogram gives a value more than 255/256, a byte
cannot stand for more than `VALUES_A_BYTE` values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import cells, trellis
from .bits import FLOATS, TRELLISES, bits_per_value, pack, pack_uint, stored_bytes, tensor_bytes, unpack, unpack_uint
from .errors import BadInput

RAW, WHOLE, SPLIT = range(3)
PACKED, ONE, ROWS, COLUMNS, CELLS = range(5)
CLASSES, CLASS_BITS = 8, 3
WIDEST = 16  # bits of the widest digit with a histogram
FREQUENCY_BITS = 14
FINE_BITS = 24  # of frequencies that are not written down
NUMBERS = (8, 3, 4)  # bits of a cell's numbers
LIKELIEST = 255  # a value may be this many times as frequent as all others together
VALUES_A_BYTE = 1420  # 8 / log2(256 / 255) = 1416.8

Array = np.ndarray[Any, Any]


def encode(values: torch.Tensor, coding: str) -> bytes:
    """Values of a coding in the fewest bytes that the ways above find, at most one more than `bits.pack` takes.

    Raises BadInput if a value does not fit its coding.
    """
    odd = None
    if coding in TRELLISES:
        (values, odd), coding = trellis.split(values, coding), "uint16"
    stored, shape = pack(values, coding), tuple(values.shape)
    coded = [bytes([RAW]) + bytes(tensor_bytes(stored))]
    if values.numel():
        width = _width(coding)
        patterns = np.frombuffer(tensor_bytes(unpack(stored, coding, shape)), _dtype(coding))  # of floats, their bits
        lines = patterns.reshape(_rows(shape), -1)
        if width <= WIDEST:
            coded.append(_sealed(WHOLE, _encode_digit(lines.astype(np.int32) & (1 << width) - 1, width, odd)))
        if width > 8:
            *upper, lowest = [((lines >> low & (1 << bits) - 1).astype(np.int32), bits) for low, bits in _digits(width)]
            before = [_encode_digit(*digit) for digit in upper]
            sections = *(len(section).to_bytes(4, "little") + section for section in before), _encode_digit(*lowest, odd)
            coded.append(_sealed(SPLIT, b"".join(sections)))
    return min(coded, key=len)


def decode(data: bytes, coding: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `encode`; coding and shape as `Stage.layout` gives them.

    Raises BadInput if `data` is nothing that `encode` writes for this coding and shape.
    """
    if coding in TRELLISES:
        return trellis.join(_decode(data, "uint16", shape, trellis.successors(trellis.states_of(coding))), coding)
    return _decode(data, coding, shape, None)


def _decode(data: bytes, coding: str, shape: tuple[int, ...], following: Array | None) -> torch.Tensor:
    """`decode`; following: of a trellis, the state after each state and bit."""
    count = math.prod(shape)
    if data[:1] == bytes([RAW]):
        if len(data) - 1 != stored_bytes(coding, count):
            raise BadInput(f"{coding}{list(shape)} takes {stored_bytes(coding, count)} bytes, found {len(data) - 1}")
        patterns = np.frombuffer(data, _dtype(coding) if coding in FLOATS else np.uint8, offset=1).copy()
    else:
        if data[5:] == b"" or data[1:5] != zlib.crc32(data[5:]).to_bytes(4, "little"):
            raise BadInput("its checksum does not fit")
        if not 0 < count <= VALUES_A_BYTE * len(data):
            raise BadInput(f"{len(data)} bytes do not hold {count} values")
        patterns = _decode_digits(data[0], data[5:], _rows(shape), count, coding, following)
    stored = torch.from_numpy(np.ascontiguousarray(patterns))
    if coding in FLOATS:
        return unpack(stored.view(FLOATS[coding]).reshape(shape), coding, shape)
    return unpack(stored, coding, shape) if data[0] == RAW else stored.reshape(shape)


def _width(coding: str) -> int:
    """Bits of a value's pattern."""
    return 2 if coding == "trit" else int(bits_per_value(coding))


def _rows(shape: tuple[int, ...]) -> int:
    """Rows of a plane as a matrix: its first dimension, or one if it has no second."""
    return shape[0] if len(shape) > 1 else 1


def _digits(width: int) -> list[tuple[int, int]]:
    """Lowest bit and number of bits of each digit, from the top; all but the last have 8 bits."""
    return [(max(top - 8, 0), min(top, 8)) for top in range(width, 0, -8)]


def _sealed(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + zlib.crc32(body).to_bytes(4, "little") + body


def _encode_digit(lines: Array, width: int, odd: Array | None = None) -> bytes:
    """The shortest section for a digit, int32[rows, columns] below 2**width, as far as the histograms tell beforehand.

    odd: the parities of a path.
    """
    if odd is not None:
        # 2 |m| or 2 m + 1, whichever is not negative, of digits of zigzag numbers m and parities.
        sizes = (lines + 1 - odd) // 2 * 2 + odd
        bits, kind, these, classes, counts = _best_way(sizes, 2)
        found = _cells(sizes)
        if found and (found.size + sum(_beside(found))) << 16 < bits:
            return _of_cells(lines, odd, found, int(sizes.max()) // 2 + 1)
        turned = lines.T if kind == COLUMNS else lines
        return _modelled(kind, turned, classes, counts, these & 1)
    best = _best_way(lines)
    packed = bytes([PACKED]) + bytes(tensor_bytes(pack_uint(torch.from_numpy(lines), width)))
    return min(packed, _modelled(*best[1:]), key=len)


def _cells(sizes: Array) -> cells.Cells | None:
    """The cells of absolute values; None if there are too few lines, or values are too large."""
    return None if min(sizes.shape) < CLASSES or sizes.max() >= 2 * cells.LARGEST else cells.cells_of(sizes)


def _beside(found: cells.Cells) -> tuple[int, int]:
    """Bits of what is written down beside words: of the scales of rows, and of the rest."""
    of_rows, of_columns = (8 * len(_section_of(scales)) for scales in found[:2])
    return of_rows, of_columns + found.many * (sum(NUMBERS) + 32)


def _section_of(scales: Array) -> bytes:
    """Scales of lines, as a digit."""
    return _encode_digit(scales[None].astype(np.int32), 8)


def _of_cells(lines: Array, odd: Array, found: cells.Cells, size: int) -> bytes:
    """A section of cells of the last digits of a path, with their parities.  size: frequencies in a histogram."""
    queues = (2 * cells.numbered(found.of_rows, found.of_columns, found.low, found.many) + odd).reshape(-1)
    order, counts = np.argsort(queues, kind="stable"), np.bincount(queues, minlength=2 * found.many)
    values, coder = np.split(lines.reshape(-1)[order], np.cumsum(counts)[:-1]), _library().stream.queue.RangeEncoder()
    for n, (some, frequencies) in enumerate(zip(values, cells.frequencies(found.numbers, size), strict=True)):
        coder.encode(some, _model(_signed(_frequencies(frequencies, FINE_BITS), n % 2)))
    header = bytes([CELLS]) + (size - 1).to_bytes(2, "little") + bytes([found.low, found.many - 1])
    for scales in found[:2]:
        section = _section_of(scales)
        header += len(section).to_bytes(2, "little") + section
    for numbers, width in zip(found.numbers, NUMBERS, strict=True):
        header += bytes(tensor_bytes(pack_uint(torch.from_numpy(numbers), width)))
    header += counts[::2].astype("<u4").tobytes()
    return header + coder.get_compressed().astype("<u4").tobytes()  # type: ignore[no-any-return]


def _best_way(lines: Array, parities: int = 1) -> tuple[int, int, Array, Array, Array]:
    """The one of `_ways` that takes least."""
    return min(_ways(lines, len(lines), int(lines.max()), parities), key=lambda way: way[0])


def _ways(lines: Array, rows: int, largest: int, parities: int = 1) -> list[tuple[int, int, Array, Array, Array]]:
    """How a digit can be modelled: `_coded_size`, kind, lines, the class of each, and their counts.

    lines: int32[n, columns], all of the `rows` rows or a sample.  largest: value in all of them.  parities: 2 if odd values
    have histograms of their own.
    """
    columns, times = lines.shape[1], rows / len(lines)
    ways = []
    for kind, these, count, length in ((ONE, lines, 0, 0), (ROWS, lines, rows, columns), (COLUMNS, lines.T, columns, rows)):
        # More values than frequencies in a line.
        if kind == ONE or (min(these.shape) >= CLASSES and largest < length):
            classes = np.zeros(len(these), np.int64) if kind == ONE else _classes(these)
            counts = _counts(these, classes, parities)
            ways.append((_coded_size(counts, count, max(largest // parities + 1, 2), times), kind, these, classes, counts))
    return ways


def expected_bytes(sample: Array, rows: int, largest: int) -> float:
    """About the bytes of `encode` for a plane of uint16, without coding it.

    sample: int32[n, columns], some of its `rows` rows.  largest: value in all of them.
    """
    ways = [[(sample, largest)]]
    if largest > LIKELIEST:
        ways.append([(sample >> 8, largest >> 8), (sample & LIKELIEST, LIKELIEST)])
    return min(sum(min(way[0] for way in _ways(lines, rows, top)) for lines, top in digits) for digits in ways) / (8 << 16)


def expected_path_bytes(sample: Array, rows: int, largest: int) -> float:
    """`expected_bytes`, if each row and each column has a scale: about what a path takes that does as well.  Arguments as
    there, of zigzag numbers."""
    plain, sizes = expected_bytes(sample, rows, largest), (sample + 1) // 2
    if not (found := _cells(2 * sizes)):
        return plain
    of_rows, rest = _beside(found)
    return min(plain, ((found.size + np.count_nonzero(sizes) + of_rows) * rows / len(sample) + rest) / 8)


def path_costs(sizes: Array, values: int) -> tuple[Array, Array, Array]:
    """What the last digit of a path would take, by its absolute value.

    sizes: absolute values, int32[rows, columns].  values: how many a table has; those beyond count as the last one.  Returns
    int[rows] and int[columns], the sum of which is the number of a value's table, and the tables of bits, signs included:
    float64[tables, values], in steps of 2**-16.
    """
    sizes = np.minimum(sizes, values - 1)
    if found := _cells(sizes):
        every = np.arange(int(found.of_rows.max() + found.of_columns.max()) + 1)
        bits = _bits_of(np.stack(cells.frequencies(found.numbers, values // 2)), values)
        return found.of_rows, found.of_columns, bits[(every - found.low).clip(0, found.many - 1)]
    _, kind, these, classes, counts = _best_way(sizes, 2)
    frequencies = np.full((len(counts), values // 2), 0.5)
    frequencies[:, : counts.shape[1]] += counts
    bits, one = _bits_of(frequencies, values), np.zeros(these.shape[1], np.int64)
    return (one, classes, bits) if kind == COLUMNS else (classes, one, bits)


def _bits_of(frequencies: Array, values: int) -> Array:
    """Tables of `path_costs` from frequencies by parity, [2 * tables, values / 2]."""
    bits = np.rint(65536 * np.log2(frequencies.sum(1, keepdims=True) / frequencies)) / 65536
    bits = bits.reshape(-1, 2, values // 2).swapaxes(1, 2).reshape(-1, values)
    bits[:, 1:] += 1
    return np.asarray(bits)


def _counts(lines: Array, classes: Array, parities: int = 1) -> Array:
    """How often each value is in each class of lines: int[classes * parities, values / parities]."""
    size = max(int(lines.max()) // parities + 1, 2)
    each = (np.bincount(lines[classes == k].reshape(-1), minlength=parities * size) for k in range(int(classes.max()) + 1))
    counts = np.concatenate([found.reshape(size, parities).T for found in each])
    counts[counts.sum(1) == 0, 0] = 1  # a class without odd values
    return counts


def _coded_size(counts: Array, lines: int, values: int, times: float) -> int:
    """About the size of a section, in 2**-16 bits; the logarithms are rounded, so that it is the same on every machine.

    lines: that have a class.  values: in a histogram.  times: how often what was counted is there.
    """
    frequencies = np.stack([_frequencies(row) for row in counts])
    bits = np.rint(65536 * np.log2(frequencies.sum(1, keepdims=True) / np.maximum(frequencies, 1))).astype(np.int64)
    header = len(counts) * values * FREQUENCY_BITS + lines * CLASS_BITS
    return int((counts * bits).sum() * times) + (header << 16)


def _classes(lines: Array) -> Array:
    """The class of each line: lines sorted by the sum of their squared counts, and cut into classes of equal size."""
    size = int(lines.max()) + 1
    flat = (lines + np.arange(len(lines))[:, None] * size).reshape(-1)
    counts = np.bincount(flat, minlength=len(lines) * size).reshape(len(lines), size)
    classes = np.empty(len(lines), np.int64)
    classes[np.argsort((counts * counts).sum(1), kind="stable")] = np.arange(len(lines)) * CLASSES // len(lines)
    return classes


def _modelled(kind: int, lines: Array, classes: Array, counts: Array, odd: Array | None = None) -> bytes:
    """A section with a histogram for each class of lines, from its counts, or with two.  odd: the parities of a path."""
    size = counts.shape[1]
    coder: Any = _library().stream.queue.RangeEncoder()
    histograms, evens = [], b""
    for n, found in enumerate(counts):
        histograms.append(_frequencies(found))
        chosen, parity = classes == (n if odd is None else n // 2), n % 2
        values = lines[chosen].reshape(-1)
        if odd is not None:
            values = values[odd[chosen].reshape(-1) == parity]
            evens += b"" if parity else len(values).to_bytes(4, "little")
        coder.encode(values, _model(histograms[-1] if odd is None else _signed(histograms[-1], parity)))
    header = bytes([kind]) + (size - 1).to_bytes(2, "little")
    header += bytes(tensor_bytes(pack_uint(torch.from_numpy(np.stack(histograms)), FREQUENCY_BITS)))
    if kind != ONE:
        header += bytes(tensor_bytes(pack_uint(torch.from_numpy(classes), CLASS_BITS)))
    words: Array = coder.get_compressed()
    return bytes(header + evens + words.astype("<u4").tobytes())


def _signed(frequencies: Array, parity: int) -> Array:
    """Frequencies of zigzag numbers m from those of |2 m + parity|: the signs are as likely as each other."""
    return np.repeat(frequencies, 2) if parity else np.concatenate([2 * frequencies[:1], np.repeat(frequencies[1:], 2)])


def _frequencies(counts: Array, width: int = FREQUENCY_BITS) -> Array:
    """Counts scaled so that the largest is 2**width - 1, rounded up; if it outweighs the rest too far, a neighbour gains."""
    largest = int(counts.max())
    frequencies = -(-counts * ((1 << width) - 1) // largest)
    mode = int(frequencies.argmax())
    missing = -(-int(frequencies[mode]) // LIKELIEST) - int(frequencies.sum() - frequencies[mode])
    frequencies[mode - 1 if mode else 1] += max(missing, 0)
    return frequencies


def _library() -> Any:
    """The range coder's library, which is not there on every platform.  Raises BadInput if it is not."""
    try:
        import constriction
    except ImportError:
        raise BadInput(
            "entropy coding needs the package constriction, which has no wheel for this platform; build it"
        ) from None
    return constriction


def _model(frequencies: Array) -> Any:
    """The coder's model: fixed point of 24 bits, no value impossible.  Sums of integers are exact in float64."""
    return _library().stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _decode_digits(kind: int, body: bytes, rows: int, count: int, coding: str, following: Array | None) -> Array:
    """The patterns, [rows, count / rows] in the dtype that `bits.unpack` gives, from all sections."""
    width = _width(coding)
    if kind == WHOLE and width <= WIDEST:
        limit = 3 if coding == "trit" else 1 << width
        return _decode_digit(body, rows, count, limit, following).astype(_dtype(coding))
    if kind != SPLIT or width <= 8:
        raise BadInput(f"kind {kind} does not go with {coding}")
    values = np.zeros((rows, count // rows), np.int64)
    for low, bits in _digits(width):
        end = len(body)
        if low:
            end, body = int.from_bytes(body[:4], "little"), body[4:]
        digit = _decode_digit(body[:end], rows, count, 1 << bits, None if low else following)
        values |= digit.astype(np.int64) << low
        body = body[end:]
    return values.astype(_dtype(coding))


def _dtype(coding: str) -> Any:
    width = _width(coding)
    if coding in FLOATS:
        return np.dtype(f"int{width}")
    return np.uint8 if width <= 8 else np.int32 if width < 32 else np.int64


def _decode_digit(section: bytes, rows: int, count: int, limit: int, following: Array | None) -> Array:
    """A digit, int[rows, count / rows] below `limit`, from its section.  following: as `_decode` has it, of the last one."""
    kind, body, width, parities = section[:1], section[1:], (limit - 1).bit_length(), 1 if following is None else 2
    if kind == bytes([PACKED]) and following is None:
        if len(body) != stored_bytes(f"uint{width}", count) or limit != 1 << width:
            raise BadInput(f"{len(body)} bytes do not hold {count} values of {width} bits")
        return _take(body, width, count)[0].reshape(rows, -1)
    if kind not in (bytes([ONE]), bytes([ROWS]), bytes([COLUMNS]), bytes([CELLS])) or len(body) < 2:
        raise BadInput("a section is of no known kind")
    if kind == bytes([CELLS]):
        if following is None:
            raise BadInput("cells are of paths alone")
        return _decode_cells(body, (rows, count // rows), limit, following)
    shape = (rows, count // rows) if kind != bytes([COLUMNS]) else (count // rows, rows)
    size, models = int.from_bytes(body[:2], "little") + 1, 1 if kind == bytes([ONE]) else CLASSES
    most = limit // parities + parities - 1
    if not 2 <= size <= most:
        raise BadInput(f"an alphabet of {size} values, expected 2 to {most}")
    frequencies, body = _take(body[2:], FREQUENCY_BITS, models * parities * size)
    classes, transposed = np.zeros(shape[0], np.int64), kind == bytes([COLUMNS])
    histograms = list(frequencies.reshape(-1, size))
    if models > 1:
        classes, body = _take(body, CLASS_BITS, shape[0])
    if following is None:
        values = np.empty(shape, np.int32)
        for k, queue in enumerate(_decode_words(body, histograms, np.bincount(classes, minlength=models) * shape[1])):
            values[classes == k] = queue.reshape(-1, shape[1])
    else:
        cell = classes, np.zeros(shape[1], np.int64), 0
        values = _decode_path(body, histograms, cell, transposed, following, limit)
    return values.T if transposed else values


def _decode_cells(body: bytes, shape: tuple[int, int], limit: int, following: Array) -> Array:
    """The last digits of a path, int[rows, columns] below `limit`, from what follows the kind of a section of cells."""
    if len(body) < 4:
        raise BadInput("a section of cells ends early")
    size, low, many = int.from_bytes(body[:2], "little") + 1, body[2], body[3] + 1
    if not 2 <= size <= min(limit // 2 + 1, cells.LARGEST):
        raise BadInput(f"an alphabet of {size} values, expected 2 to {min(limit // 2 + 1, cells.LARGEST)}")
    body, scales, numbers = body[4:], [], []
    for lines in shape:
        end = 2 + int.from_bytes(body[:2], "little")
        scales.append(_decode_digit(body[2:end], 1, lines, 256, None).reshape(-1).astype(np.int64))
        body = body[end:]
    for width in NUMBERS:
        found, body = _take(body, width, many)
        numbers.append(found)
    histograms = [_frequencies(found, FINE_BITS) for found in cells.frequencies(np.stack(numbers), size)]
    return _decode_path(body, histograms, (scales[0], scales[1], low), False, following, limit)


def _decode_path(
    body: bytes, histograms: list[Array], cell: tuple[Array, Array, int], transposed: bool, following: Array, limit: int
) -> Array:
    """The last digits of a path, int[lines, n] below `limit`, from what follows histograms: of each class of values two.

    cell: the class of a value is the sum of its line's number and of its place's, less the last number.
    """
    of_lines, across, low = cell
    evens, body = _take(body, 32, many := len(histograms) // 2)
    counts = np.bincount(cells.numbered(of_lines, across, low, many).reshape(-1), minlength=many)
    if (evens > counts).any():
        raise BadInput("a class has more even values than values")
    counts = np.stack([evens, counts - evens], 1).reshape(-1)
    queues = _decode_words(body, [_signed(found, n % 2) for n, found in enumerate(histograms)], counts)
    values, at = np.empty((len(of_lines), len(across)), np.int32), np.concatenate([[0], np.cumsum(counts)])
    if not trellis.place(np.concatenate(queues), at, (of_lines - low, across, many - 1), transposed, following, values):
        raise BadInput("its values are no path")
    if values.max() >= limit:
        raise BadInput(f"a value of {values.max()}, expected less than {limit}")
    return values


def _take(body: bytes, width: int, count: int) -> tuple[Array, bytes]:
    """`count` integers of `width` bits from the front, and what comes after."""
    end = stored_bytes(f"uint{width}", count)
    if len(body) < end:
        raise BadInput(f"a section ends {end - len(body)} bytes early")
    values = unpack_uint(torch.from_numpy(np.frombuffer(body[:end], np.uint8).copy()), width, count)
    return values.to(torch.int64).numpy(), body[end:]


def _decode_words(body: bytes, histograms: Sequence[Array], counts: Array) -> list[Array]:
    """int32[count] for each histogram from the coder's words, one after the other."""
    if len(body) % 4:
        raise BadInput("a section does not end with a whole word")
    words = np.frombuffer(body, "<u4").astype(np.uint32)
    decoder, queues = _library().stream.queue.RangeDecoder(words), []
    for frequencies, count in zip(histograms, counts.tolist(), strict=True):
        if not 0 < frequencies.max() <= LIKELIEST * (frequencies.sum() - frequencies.max()):
            raise BadInput("a histogram that is too concentrated")
        try:
            queues.append(decoder.decode(_model(frequencies), count))
        except AssertionError:  # what the library raises for words that no encoder of this model writes
            raise BadInput("its words do not belong to its histogram") from None
    if not decoder.maybe_exhausted():
        raise BadInput("a section holds more words than values")
    return queues
