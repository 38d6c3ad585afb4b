"""A weight's planes as products read them: checked once, without entropy code and refinements."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..bits import FLOATS, unpack_trits, unpack_uint
from ..planes import Packed, Plane
from ..stages import Stage

PART = 1 << 18  # weights that are decoded at a time, a megabyte of float32: what is decoded is still in the cache


class Held(NamedTuple):
    """A plane that products read: `stored` is what `Plane.stored` gives for a coding that is not entropy-coded."""

    coding: str
    shape: tuple[int, ...]
    stored: torch.Tensor

    def values(self, first: int, count: int) -> torch.Tensor:
        """Some of the values, flat; `first` begins a whole byte."""
        if self.coding in FLOATS:
            return self.stored.reshape(-1)[first : first + count]
        if self.coding == "trit":
            return unpack_trits(self.stored[first // 5 : -(-(first + count) // 5)], count)
        width = int(self.coding[4:])
        return unpack_uint(self.stored[first * width // 8 : -(-(first + count) * width // 8)], width, count)


class Ready(NamedTuple):
    """What products need of a weight: the stage that decodes it, its planes, and the planes that weights share."""

    stage: Stage
    shape: tuple[int, int]
    planes: dict[str, Held]
    shared: Packed | None
    block: int  # rows that can be decoded by themselves, 0 where only all can
    sizes: dict[str, int]  # values of a plane that belong to a block; the planes that are not named serve all rows
    prepared: dict[str, torch.Tensor]  # what `fused.prepare` gave

    def rows(self, first: int, last: int) -> torch.Tensor:
        """float32[last - first, in], decoded; both are places where a part begins or ends."""
        shape = (last - first, self.shape[1])
        layout, planes = self.stage.layout(shape), []
        for name, held in self.planes.items():
            size = held.shape
            if name in self.sizes:
                size = layout[name][1]
                values = held.values(first // self.block * self.sizes[name], math.prod(size))
            else:
                values = held.values(0, math.prod(size))
            planes.append(Plane(name, values.reshape(size), held.coding))
        return self.stage.decode(Packed(shape, tuple(planes), self.shared))

    def parts(self) -> list[tuple[int, int]]:
        """The first and last row of each part that is decoded at a time: some `PART` weights, and whole bytes of planes.

        On a GPU all rows are one part: there starting a kernel takes as long as decoding so much.
        """
        rows, columns = self.shape
        if not self.block or not next(iter(self.planes.values())).stored.is_cpu:
            return [(0, rows)]
        least = 40 * self.block  # whole bytes of any width, and of trits
        size = least * max(1, PART // (least * columns))
        return [(first, min(first + size, rows)) for first in range(0, rows, size)]
