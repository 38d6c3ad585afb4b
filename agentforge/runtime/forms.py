"""How the planes of a stage are multiplied: straight from their bits where `packed_cpu` has a form for them, else decoded.

`product` gives None for everything that no kernel knows: another device, too many vectors, settings or sizes, a machine
without the instructions.  Then the caller decodes, a part after the other (`Ready.rows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..bits import FLOATS, unpack_trits, unpack_uint
from ..planes import FLOAT32_MAX, Packed, Plane, times_power_of_two
from ..stages import Stage
from ..stages.ecsq import Stepped, factors
from ..stages.rounding import Rounding
from ..stages.trajectory import Trajectory
from ..stages.vptq import LEVELS, Vptq
from . import packed_cpu

PART = 1 << 18  # weights that are decoded at a time, a megabyte of float32: what is decoded is still in the cache
FEW = 16  # vectors up to which the kernels are used: for more, decoding once is faster
GRID_FEW = 32  # of grids
EXPONENTS = 60  # the largest power of two beside the weights for which float32 sums keep their range


class Loaded(NamedTuple):
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
    planes: dict[str, Loaded]
    shared: Packed | None
    block: int  # rows that can be decoded by themselves, 0 where only all can
    sizes: dict[str, int]  # values of a plane that belong to a block; the planes that are not named serve all rows
    book: torch.Tensor | None  # a trajectory's points, float32[k, K]
    grid: packed_cpu.Grid | None  # what `packed_cpu` multiplies, instead of the planes if they are entropy-coded codes

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that products read."""
        beside = [] if self.grid is None else self.grid.tensors
        return [*(plane.stored for plane in self.planes.values()), *beside, *([] if self.book is None else [self.book])]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """float32[last - first, in], decoded; both are places where a part begins or ends."""
        if self.grid is not None:
            return packed_cpu.decode(self.grid, first, last)
        shape = (last - first, self.shape[1])
        layout, planes = self.stage.layout(shape), []
        for name, loaded in self.planes.items():
            size = loaded.shape
            if name in self.sizes:
                size = layout[name][1]
                values = loaded.values(first // self.block * self.sizes[name], math.prod(size))
            else:
                values = loaded.values(0, math.prod(size))
            planes.append(Plane(name, values.reshape(size), loaded.coding))
        return self.stage.decode(Packed(shape, tuple(planes), self.shared))

    def size(self, weights: int) -> int:
        """Rows of a part that is decoded at a time: so many weights, but whole bytes of planes.

        On a GPU all rows are one part: there starting a kernel takes as long as decoding so much.
        """
        rows, columns = self.shape
        if not self.block or not self.tensors[0].is_cpu:
            return rows
        least = 40 * self.block  # whole bytes of any width, and of trits
        return least * max(1, weights // (least * columns))

    def parts(self) -> list[tuple[int, int]]:
        """The first and last row of each part of some `PART` weights."""
        rows, size = self.shape[0], self.size(PART)
        return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def book(stage: Stage, packed: Packed) -> torch.Tensor | None:
    """The points of a trajectory, which take too long to make at each call."""
    return stage.book(packed) if isinstance(stage, Trajectory) else None


def fill_words(stage: Stage, plane: Plane) -> bool:
    """Whether a kernel reads the plane in words."""
    return isinstance(stage, Rounding) and plane.name == "codes"


def of_codes(stage: Stage, packed: Packed) -> packed_cpu.Grid | None:
    """What `packed_cpu` multiplies and decodes in place of the planes of ecsq and tcq.

    None for other stages, on another device, and of weights that almost leave float32.
    """
    if not isinstance(stage, Stepped) or not packed["codes"].is_cpu:
        return None
    rows, columns = factors(packed)
    floats = packed.floats
    columns = (columns * floats["step"]).clamp(-FLOAT32_MAX, FLOAT32_MAX)
    gains = floats["gains"] if stage.gains else None
    largest = float(packed["codes"].max()) * float(rows.max()) * max(1.0, float(columns.max()))
    if largest * (1.0 if gains is None else max(1.0, float(gains.max()))) > FLOAT32_MAX:
        return None
    return packed_cpu.narrow(packed["codes"], rows, columns, gains)


def of_planes(stage: Stage, shape: tuple[int, int], planes: Mapping[str, Loaded]) -> packed_cpu.Grid | None:
    """What `packed_cpu` multiplies and decodes of rounding: the planes themselves."""
    if not isinstance(stage, Rounding):
        return None
    codes, exponent = planes["codes"], _exponent(planes)
    if not codes.stored.is_cpu or abs(exponent) > EXPONENTS:
        return None
    width, group, rows = int(codes.coding[4:]), stage.columns_a_grid(shape[1]), torch.full((shape[0],), 2.0**exponent)
    zero, minimum = (2 ** (stage.bits - 1) - 1, None) if stage.symmetric else (0, planes["minimum"].stored)
    return packed_cpu.grouped(codes.stored, shape, width, group, zero, rows, planes["scale"].stored, minimum)


def product(ready: Ready, x: torch.Tensor) -> torch.Tensor | None:
    """x W^T, float32[tokens, out] of x: float[tokens, in], or None if W has to be decoded."""
    if not x.is_cpu or not 0 < len(x) <= (FEW if ready.grid is None else GRID_FEW):
        return None
    if ready.grid is not None:
        return packed_cpu.grid(x.to(torch.float32), ready.grid)
    forms: dict[type[Stage], Any] = {Vptq: _vptq, Trajectory: _trajectory}
    known = next((form for kind, form in forms.items() if isinstance(ready.stage, kind)), None)
    found: torch.Tensor | None = None if known is None else known(ready, ready.stage, x.to(torch.float32))
    return found


def _small(ready: Ready, name: str) -> torch.Tensor:
    """All values of a float plane, as float32."""
    loaded = ready.planes[name]
    return loaded.values(0, math.prod(loaded.shape)).reshape(loaded.shape).to(torch.float32)


def _exponent(planes: Mapping[str, Loaded]) -> int:
    return 128 - int(planes["exponent"].stored)


def _vptq(ready: Ready, stage: Vptq, x: torch.Tensor) -> torch.Tensor | None:
    """x has the columns' scales, which belong to the weight; the columns' means are one product more."""
    rows, columns = ready.shape
    segments, exponent = stage.segments(ready.shape), _exponent(ready.planes)
    if len(segments) > 1 or stage.parts > 1 or abs(exponent) > EXPONENTS:
        return None
    lines = math.ceil(rows / segments[0].v)
    scaled = x * _small(ready, "scale") if "scale" in ready.planes else x
    out: torch.Tensor | None = None
    for level in LEVELS[: len(segments[0].sizes)]:
        indices = ready.planes[f"{level}indices"]
        width = int(indices.coding[4:])
        if not packed_cpu.fits_vectors(width, lines, columns):
            return None
        name = f"{level}codebook"
        book = _small(ready, name) if ready.shared is None else ready.shared[name]
        part = packed_cpu.vectors(scaled, indices.stored, width, lines, columns, book[0, 0], along=False)
        out = part if out is None else out.add_(part)
    assert out is not None
    if "mean" in ready.planes:
        out.add_(x @ _small(ready, "mean").unsqueeze(1))
    return times_power_of_two(out[:, :rows], exponent, in_place=True)


def _trajectory(ready: Ready, stage: Trajectory, x: torch.Tensor) -> torch.Tensor | None:
    (rows, columns), indices = ready.shape, ready.planes["indices"]
    width = int(indices.coding[4:])
    if columns % stage.K or not packed_cpu.fits_vectors(width, rows, columns // stage.K):
        return None
    assert ready.book is not None
    return packed_cpu.vectors(x, indices.stored, width, rows, columns // stage.K, ready.book, along=True)
