"""Planes: what an encoded weight is made of, and what it costs.

A stage turns a dense weight into a :class:`Packed`: named planes in a fixed order.  A plane is an array of unsigned integers
of a known width, of trits, or of floats.  Its ``coding`` says which, as `bits` lists them; ``~X`` is values of coding X,
entropy-coded, which take as many bits as it takes.

``Packed.bits`` counts all that must be stored to decode; on disk each integer plane is rounded up to a whole byte, so
``8 * bytes - 8 < bits <= 8 * bytes`` holds plane by plane.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from . import entropy
from .bits import FLOATS, bits_per_value, pack, tensor_bytes, unpack
from .errors import BadArtifact, BadInput

FLOAT32_MAX = torch.finfo(torch.float32).max


def is_coded(coding: str) -> bool:
    """Whether planes of this coding are entropy-coded, so that their size is known only from their values."""
    return coding.startswith("~")


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
        return self._coded if is_coded(self.coding) else pack(self.values, self.coding)

    def coded(self) -> Plane:
        """The same values, entropy-coded."""
        return self if is_coded(self.coding) else Plane(self.name, self.values, f"~{self.coding}")

    @cached_property
    def _coded(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(entropy.encode(self.values, self.coding[1:])), dtype=torch.uint8)

    @classmethod
    def from_stored(cls, name: str, coding: str, shape: tuple[int, ...], stored: torch.Tensor) -> Plane:
        """The inverse of `stored`.  `stored` must have exactly the size that coding and shape ask for, if they fix it.

        Raises BadArtifact if it has not, or if it holds what no packer writes: a byte above 242 among trits,
        padding that is not zero, a float that is not finite, a code that does not come out even.
        """
        if is_coded(coding) and (stored.dtype != torch.uint8 or stored.dim() != 1):
            raise BadArtifact(f"plane {name}: {coding} takes uint8[bytes], found {stored.dtype}{list(stored.shape)}")
        try:
            if is_coded(coding):
                values = entropy.decode(bytes(tensor_bytes(stored.cpu())), coding[1:], shape).to(stored.device)
            else:
                values = unpack(stored, coding, shape)
        except BadInput as error:
            raise BadArtifact(f"plane {name}: {error}; fetch or write the artifact again") from None
        plane = cls(name, values, coding)
        if is_coded(coding):
            plane.__dict__["_coded"] = stored  # so that hashing it does not code it again
        return plane


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
    def coded_bytes(self) -> int:
        """Bytes of all planes once entropy-coded, with all that decoding them takes."""
        return sum(plane.coded().stored().numel() for plane in self.planes)

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


def power_of_two_exponent(weight: torch.Tensor) -> int:
    """The e in [-128, 127] that brings max|weight| * 2**e into [2**13, 2**14), so that half floats can hold its scales.

    A half float keeps 11 bits only between 6e-5 and 65504; weights of 1e-30 or 1e30 are legal, too.  Multiplying by a
    power of two loses nothing.
    """
    largest = float(weight.abs().max())
    if largest == 0.0:
        return 0
    return max(-128, min(127, 14 - math.frexp(largest)[1]))


def times_power_of_two(tensor: torch.Tensor, exponent: int, in_place: bool = False) -> torch.Tensor:
    """tensor * 2**exponent in float32, in two steps because one factor alone could overflow; it saturates.

    in_place: into `tensor` itself, which is float32.
    """
    half = exponent // 2
    scaled = tensor.mul_(2.0**half) if in_place else tensor.to(torch.float32) * 2.0**half
    scaled *= 2.0 ** (exponent - half)
    # A scale rounded up to a half float may carry the largest float32 weights just beyond what float32 holds.
    return scaled.clamp_(-FLOAT32_MAX, FLOAT32_MAX) if exponent > 100 else scaled
