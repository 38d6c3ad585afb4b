"""Integers and trits to bytes and back, and what a value costs: all that knows nothing but bits.

A coding says how values are stored:

===========  ==============================================  =========================
coding       values                                          bits per value
===========  ==============================================  =========================
``uint1`` .. ``uint32``  unsigned integers below 2**w, least significant bit first  w
``trit``     0, 1 or 2; five to a byte, as 3**5 = 243 < 256  8/5
``float16``  IEEE half                                       16
``bfloat16`` bfloat16                                        16
``float32``  IEEE single                                     32
``trellis8``, ``trellis32``, ``trellis256``  zigzag integers along a path (`trellis`), entropy-coded only  16
===========  ==============================================  =========================
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import torch

from .errors import BadInput

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TRELLISES = ("trellis8", "trellis32", "trellis256")
TRITS_PER_BYTE = 5
PACK_BLOCK = 1 << 18  # values that are packed or unpacked at a time; whole bytes at any width


def bits_per_value(coding: str) -> Fraction:
    """Bits that one value of this coding costs, exactly.

    Raises BadInput for a coding that does not exist, or that is entropy-coded: there the values decide.
    """
    if coding in FLOATS:
        return Fraction(FLOATS[coding].itemsize * 8)
    if coding == "trit":
        return Fraction(8, TRITS_PER_BYTE)
    if coding in TRELLISES:
        return Fraction(16)
    if re.fullmatch(r"uint([1-9]|[12][0-9]|3[0-2])", coding):
        return Fraction(int(coding[4:]))
    raise BadInput(f"coding {coding!r} does not exist; expected uint1 to uint32, trit, {', '.join(FLOATS)}")


def stored_bytes(coding: str, count: int) -> int:
    """Bytes on disk of `count` values: their bits, rounded up to a whole byte."""
    return math.ceil(bits_per_value(coding) * count / 8)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, as they lie in memory (little endian on every machine that torch supports)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def pack(values: torch.Tensor, coding: str) -> torch.Tensor:
    """Values as they are stored: uint8[bytes] for integers and trits, the floats themselves otherwise.

    Raises BadInput if a value does not fit.
    """
    if coding in FLOATS:
        return values.contiguous()
    return pack_trits(values) if coding == "trit" else pack_uint(values, int(coding[4:]))


def unpack(stored: torch.Tensor, coding: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack`.  Raises BadInput for another dtype or size, and for what no packer writes."""
    floats, count = FLOATS.get(coding), math.prod(shape)
    expected = (floats, shape) if floats else (torch.uint8, (stored_bytes(coding, count),))
    if (stored.dtype, tuple(stored.shape)) != expected:
        wanted = f"expected {coding}{list(shape)}" if floats else f"{coding}{list(shape)} takes uint8{list(expected[1])}"
        raise BadInput(f"{wanted}, found {str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}")
    if floats:
        if not torch.isfinite(stored).all():
            raise BadInput("holds values that are not finite")
        return stored
    values = unpack_trits(stored, count) if coding == "trit" else unpack_uint(stored, int(coding[4:]), count)
    return values.reshape(shape)


def _countable(values: torch.Tensor) -> torch.Tensor:
    """Flat, and of a dtype that torch can compare: its wide unsigned ones cannot do that yet."""
    flat = values.reshape(-1)
    return flat.to(torch.int64) if flat.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool) else flat


def pack_uint(values: torch.Tensor, width: int) -> torch.Tensor:
    """Unsigned integers below 2**width to bytes: value i takes bits i*width to (i+1)*width - 1 of a little-endian stream.

    values: integers of any shape.  Returns uint8[ceil(n * width / 8)]; the bits that fill the last byte are zero.
    Raises BadInput if a value does not fit.
    """
    flat = _countable(values)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << width):
        raise BadInput(f"values from {int(flat.min())} to {int(flat.max())} do not fit into {width} bits")
    if width == 8:
        return flat.to(torch.uint8)
    # By blocks that fill whole bytes: what the shifts take would otherwise be several times what they give.
    blocks = [_pack_block(block, width) for block in flat.split(PACK_BLOCK)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _pack_block(flat: torch.Tensor, width: int) -> torch.Tensor:
    count = flat.numel()
    if 8 % width == 0:
        columns = torch.nn.functional.pad(flat.to(torch.uint8), (0, -count % (8 // width))).reshape(-1, 8 // width)
        packed = columns[:, 0].clone()
        for j in range(1, 8 // width):
            packed |= columns[:, j] << (j * width)
        return packed
    # Eight values fill `width` whole bytes: one word of 64 bits where they fit, else byte by byte.
    columns = torch.nn.functional.pad(flat.to(torch.int64), (0, -count % 8)).reshape(-1, 8)
    if width < 8:
        words = torch.zeros(len(columns), dtype=torch.int64, device=columns.device)
        for j in range(8):
            words |= columns[:, j] << (j * width)
        packed = words.view(torch.uint8).reshape(-1, 8)[:, :width]
    else:
        packed = torch.zeros(len(columns), width, dtype=torch.uint8, device=columns.device)
        for byte in range(width):
            for j in range(8):
                shift = j * width - byte * 8
                if -width < shift < 8:
                    part = columns[:, j] << shift if shift >= 0 else columns[:, j] >> -shift
                    packed[:, byte] |= (part & 255).to(torch.uint8)
    return packed.reshape(-1)[: stored_bytes(f"uint{width}", count)].contiguous()


def unpack_uint(stored: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The inverse of `pack_uint`: uint8 for widths up to 8, int32 up to 31 and int64 for 32.

    Raises BadInput if the bits that fill the last byte are not zero.
    """
    spare = stored.numel() * 8 - count * width
    if stored.numel() and spare and int(stored[-1]) >> (8 - spare):
        raise BadInput("the padding of its last byte is not zero")
    if width == 8:
        return stored
    blocks = [
        _unpack_block(part, width, min(PACK_BLOCK, count - i * PACK_BLOCK))
        for i, part in enumerate(stored.split(PACK_BLOCK * width // 8))
    ]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _unpack_block(stored: torch.Tensor, width: int, count: int) -> torch.Tensor:
    mask = (1 << width) - 1
    if 8 % width == 0:
        parts = [(stored >> (j * width)) & mask for j in range(8 // width)]
        return torch.stack(parts, 1).reshape(-1)[:count]
    groups = torch.nn.functional.pad(stored, (0, -stored.numel() % width)).reshape(-1, width)
    if width < 8:
        words = torch.nn.functional.pad(groups, (0, 8 - width)).view(torch.int64)
        parts = [((words >> (j * width)) & mask).to(torch.uint8) for j in range(8)]
        return torch.cat(parts, 1).reshape(-1)[:count]
    wide = groups.to(torch.int64)
    values = []
    for j in range(8):
        value = torch.zeros(len(wide), dtype=torch.int64, device=wide.device)
        for byte in range(width):
            shift = byte * 8 - j * width
            if -8 < shift < width:
                value |= wide[:, byte] << shift if shift >= 0 else wide[:, byte] >> -shift
        values.append(value & mask)
    return torch.stack(values, 1).to(torch.int32 if width < 32 else torch.int64).reshape(-1)[:count]


def zigzag(codes: torch.Tensor) -> torch.Tensor:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: int32 both."""
    return (codes << 1) ^ (codes >> 31)


def unzigzag(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `zigzag`: int32."""
    stored = stored.to(torch.int32)
    return (stored >> 1) ^ -(stored & 1)


def pack_trits(values: torch.Tensor) -> torch.Tensor:
    """Five values of 0, 1 or 2 to a byte, the first one the least significant: uint8[ceil(n / 5)].

    Raises BadInput for any other value.
    """
    flat = _countable(values)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) > 2):
        raise BadInput(f"values from {int(flat.min())} to {int(flat.max())} are not trits")
    flat = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % TRITS_PER_BYTE))
    digits = flat.reshape(-1, TRITS_PER_BYTE)
    packed = digits[:, -1].clone()
    for j in reversed(range(TRITS_PER_BYTE - 1)):
        packed = packed * 3 + digits[:, j]
    return packed


def unpack_trits(stored: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_trits`: uint8[count].  Raises BadInput for bytes above 242 and non-zero padding."""
    if stored.numel() and int(stored.max()) >= 3**TRITS_PER_BYTE:
        raise BadInput(f"byte {int(stored.max())} is no group of five trits (at most 242)")
    powers = torch.tensor([3**j for j in range(TRITS_PER_BYTE)])
    # A group's five values, as the five low bytes of one word: looking up words is faster than looking up rows.
    digits_of = (torch.arange(3**TRITS_PER_BYTE).unsqueeze(1) // powers % 3).to(stored.device, torch.uint8)
    words = torch.nn.functional.pad(digits_of, (0, 8 - TRITS_PER_BYTE)).view(torch.int64).reshape(-1)
    digits = words[stored.int()].view(torch.uint8).reshape(-1, 8)[:, :TRITS_PER_BYTE].reshape(-1)
    if digits[count:].any():
        raise BadInput("the padding of its last byte is not zero")
    return digits[:count]
