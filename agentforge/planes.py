"""Planes: what an encoded weight is made of, and what it costs.

A stage turns a dense weight into a :class:`Packed`: named planes in a fixed order.  A plane is either an array of
unsigned integers of a known width, an array of trits, or an array of floats.  Its ``coding`` says which:

===========  ==============================================  =========================
coding       values                                          bits per value
===========  ==============================================  =========================
``uint1`` .. ``uint32``  unsigned integers below 2**w, least significant bit first  w
``trit``     0, 1 or 2; five to a byte, as 3**5 = 243 < 256  8/5
``float16``  IEEE half                                       16
``bfloat16`` bfloat16                                        16
``float32``  IEEE single                                     32
``~X``       values of coding X, entropy-coded               as many as it takes
===========  ==============================================  =========================

``Packed.bits`` counts all that must be stored to decode; on disk each integer plane is rounded up to a whole byte, so
``8 * bytes - 8 < bits <= 8 * bytes`` holds plane by plane.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch

from .errors import BadArtifact, BadInput

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FLOAT32_MAX = torch.finfo(torch.float32).max
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
    if re.fullmatch(r"uint([1-9]|[12][0-9]|3[0-2])", coding):
        return Fraction(int(coding[4:]))
    raise BadInput(f"coding {coding!r} does not exist; expected uint1 to uint32, trit, {', '.join(FLOATS)}")


def is_coded(coding: str) -> bool:
    """Whether planes of this coding are entropy-coded, so that their size is known only from their values."""
    return coding.startswith("~")


def stored_bytes(coding: str, count: int) -> int:
    """Bytes on disk of `count` values: their bits, rounded up to a whole byte."""
    return math.ceil(bits_per_value(coding) * count / 8)


@dataclass(frozen=True, eq=False)
class Plane:
    """One array of an encoded weight.

    name: unique within its Packed.  values: any shape; integers (any torch integer dtype) or, for a float coding, that
    float dtype.  coding: see the module's table.
    """

    name: str
    values: torch.Tensor
    coding: str

    @property
    def bits(self) -> int:
        """Bits that the values occupy, before the last byte is filled up."""
        if is_coded(self.coding):
            return 8 * self._coded.numel()
        return math.ceil(bits_per_value(self.coding) * self.values.numel())

    def stored(self) -> torch.Tensor:
        """The tensor that goes to disk: uint8[bytes] for integers and what is coded, the floats themselves otherwise."""
        if is_coded(self.coding):
            return self._coded
        if self.coding in FLOATS:
            return self.values.contiguous()
        if self.coding == "trit":
            return pack_trits(self.values)
        return pack_uint(self.values, int(self.coding[4:]))

    @cached_property
    def _coded(self) -> torch.Tensor:
        from .stages import entropy  # which builds on planes, too

        return torch.frombuffer(bytearray(entropy.encode(Plane(self.name, self.values, self.coding[1:]))), dtype=torch.uint8)

    @classmethod
    def from_stored(cls, name: str, coding: str, shape: tuple[int, ...], stored: torch.Tensor) -> Plane:
        """The inverse of `stored`.  `stored` must have exactly the size that coding and shape ask for, if they fix it.

        Raises BadArtifact if it has not, or if it holds what no packer writes: a byte above 242 among trits,
        padding that is not zero, a float that is not finite, a code that does not come out even.
        """
        count = math.prod(shape)
        if is_coded(coding):
            from .stages import entropy

            if stored.dtype != torch.uint8 or stored.dim() != 1:
                raise BadArtifact(f"plane {name}: {coding} takes uint8[bytes], found {stored.dtype}{list(stored.shape)}")
            values = entropy.decode(bytes(tensor_bytes(stored.cpu())), name, coding[1:], shape).values
            plane = cls(name, values.to(stored.device), coding)
            plane.__dict__["_coded"] = stored  # so that hashing it does not code it again
            return plane
        if coding in FLOATS:
            if stored.dtype != FLOATS[coding] or tuple(stored.shape) != shape:
                raise BadArtifact(
                    f"plane {name}: expected {coding}{list(shape)}, found "
                    f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"
                )
            if not torch.isfinite(stored).all():
                raise BadArtifact(f"plane {name}: holds values that are not finite")
            return cls(name, stored, coding)
        expected = stored_bytes(coding, count)
        if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() != expected:
            raise BadArtifact(
                f"plane {name}: {coding}{list(shape)} takes uint8[{expected}], found "
                f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"
            )
        try:
            values = unpack_trits(stored, count) if coding == "trit" else unpack_uint(stored, int(coding[4:]), count)
        except BadInput as error:
            raise BadArtifact(f"plane {name}: {error}") from None
        return cls(name, values.reshape(shape), coding)


@dataclass(frozen=True, eq=False)
class Packed:
    """An encoded weight: its shape (out, in) and all the planes that `Stage.decode` needs.

    shared: planes that all the weights of a model have in common (a codebook), if the stage shares any.  They are
    stored once per model, and not part of `bits` and `sha256`.
    """

    shape: tuple[int, int]
    planes: tuple[Plane, ...]
    shared: Packed | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        for plane in self.planes:
            if plane.name == name:
                return plane.values
        raise BadArtifact(f"plane {name!r} is missing; found {', '.join(p.name for p in self.planes) or 'none'}")

    def __iter__(self) -> Iterator[Plane]:
        return iter(self.planes)

    @property
    def floats(self) -> dict[str, torch.Tensor]:
        """The float planes as float32, by name."""
        return {plane.name: plane.values.to(torch.float32) for plane in self.planes if plane.coding.strip("~") in FLOATS}

    @property
    def bits(self) -> int:
        """Bits of all planes together."""
        return sum(plane.bits for plane in self.planes)

    @property
    def bits_per_weight(self) -> float:
        """Bits divided by the number of weights that were encoded."""
        return self.bits / math.prod(self.shape)

    @property
    def sha256(self) -> str:
        """A hash over names, codings, shapes and stored bytes of all planes."""
        return self.hash_of(plane.stored() for plane in self.planes)

    def hash_of(self, stored: Iterable[torch.Tensor]) -> str:
        """`sha256`, from what `Plane.stored` gave for each plane in turn: packing takes longer than hashing."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for plane, tensor in zip(self.planes, stored, strict=True):
            digest.update(f"{plane.name} {plane.coding} {tuple(plane.values.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, as they lie in memory (little endian on every machine that torch supports)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def power_of_two_exponent(weight: torch.Tensor) -> int:
    """The e in [-128, 127] that brings max|weight| * 2**e into [2**13, 2**14), so that half floats can hold its scales.

    A half float keeps 11 bits only between 6e-5 and 65504; weights of 1e-30 or 1e30 are legal, too.  Multiplying by a
    power of two loses nothing.
    """
    largest = float(weight.abs().max())
    if largest == 0.0:
        return 0
    return max(-128, min(127, 14 - math.frexp(largest)[1]))


def exponent_plane(exponent: int) -> Plane:
    """The exponent of `power_of_two_exponent` as a plane of one byte."""
    return Plane("exponent", torch.tensor([exponent + 128], dtype=torch.uint8), "uint8")


def times_power_of_two(tensor: torch.Tensor, exponent: int, in_place: bool = False) -> torch.Tensor:
    """tensor * 2**exponent in float32, in two steps because one factor alone could overflow; it saturates.

    in_place: into `tensor` itself, which is float32.
    """
    half = exponent // 2
    scaled = tensor.mul_(2.0**half) if in_place else tensor.to(torch.float32) * 2.0**half
    scaled *= 2.0 ** (exponent - half)
    # A scale rounded up to a half float may carry the largest float32 weights just beyond what float32 holds.
    return scaled.clamp_(-FLOAT32_MAX, FLOAT32_MAX) if exponent > 100 else scaled


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
    # Eight values fill `width` whole bytes: one word of 64 bits if they fit, else byte by byte.
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
        raise BadInput(f"byte {int(stored.max())} is not a group of five trits (at most 242)")
    powers = torch.tensor([3**j for j in range(TRITS_PER_BYTE)])
    # A group's five values, as the five low bytes of one word: looking up words is faster than looking up rows.
    digits_of = (torch.arange(3**TRITS_PER_BYTE).unsqueeze(1) // powers % 3).to(stored.device, torch.uint8)
    words = torch.nn.functional.pad(digits_of, (0, 8 - TRITS_PER_BYTE)).view(torch.int64).reshape(-1)
    digits = words[stored.int()].view(torch.uint8).reshape(-1, 8)[:, :TRITS_PER_BYTE].reshape(-1)
    if digits[count:].any():
        raise BadInput("the padding of its last byte is not zero")
    return digits[:count]
