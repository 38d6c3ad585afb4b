"""Refinement: stages that work on the planes of the one before, instead of on the weights that these stand for.

    vptq:bits=3 | entropy                                  all planes, coded at their entropy: lossless
    vptq:bits=3 | codebook=curves:degree=3,segment=8       the codebook itself as curves
    seedlm | coefficients=vptq:v=3,k=256 | entropy         the coefficients as entries of a codebook

Re-encoding throws away what the stage before stored, so that only its own bytes count; a refinement keeps the planes that it
does not name and replaces those that it does.  Its ratio multiplies with that of the stage before it by exactly the share
that these planes have in its bytes.

A plane is a matrix to the stage that refines it: a column holds what lies along its last dimension (the coordinates of a
centroid, the coefficients of a block), so that a row is of one kind; a plane of one dimension is a row.  Integers are
numbers, and what comes back is rounded to integers of the plane's width, or to its float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..bits import FLOATS
from ..errors import BadArtifact, BadInput
from ..planes import Packed, Plane, is_coded
from .base import Layer, Stage

Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Refined(Stage):
    """A stage whose planes are refined.

    first: the stage.  planes: names of planes, of a weight's or of those that all share, each with the stage that encodes
    it.  entropy: whether all planes are entropy-coded then.
    """

    name: ClassVar[str] = "refined"
    first: Stage
    planes: tuple[tuple[str, Stage], ...] = ()
    entropy: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether the first stage does."""
        return self.first.needs_statistics

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the first stage does."""
        return self.first.needs_sensitivity

    def check(self) -> None:
        """Raise BadInput if a stage is not valid, refines itself, or has planes that all tensors share."""
        self.first.check()
        for plane, by in self.planes:
            by.check()
            if isinstance(by, Refined) or by.shared_layout():
                raise BadInput(f"refinement {plane}={by}: expected a stage on its own, without shared planes")
        if isinstance(self.first, Refined):
            raise BadInput(f"refinement of {self.first}: is refined already; name all refinements after its first stage")
        if len({plane for plane, _ in self.planes}) < len(self.planes):
            raise BadInput(f"refinement {self}: names a plane twice")
        if not self.planes and not self.entropy:
            raise BadInput(f"refinement of {self.first}: names nothing; expected entropy, or plane=stage")

    def to_json(self) -> dict[str, Any]:
        """The stages, ready for `from_json`."""
        planes = [[plane, by.to_json()] for plane, by in self.planes]
        return {"stage": self.name, "first": self.first.to_json(), "planes": planes, "entropy": self.entropy}

    def __str__(self) -> str:
        return " | ".join([str(self.first), *(f"{plane}={by}" for plane, by in self.planes), *["entropy"] * self.entropy])

    def brief(self) -> str:
        """All its stages' texts without the settings that are at their defaults, which `parse` takes back."""
        planes = (f"{plane}={by.brief()}" for plane, by in self.planes)
        return " | ".join([self.first.brief(), *planes, *["entropy"] * self.entropy])

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Coding and shape of each plane; those of a refined plane have its name before theirs."""
        first = self.first.layout(shape)
        known = [*first, *self.first.shared_layout()]
        for plane, _ in self.planes:
            if plane not in known:
                raise BadInput(f"refinement {plane}: {self.first.name} has no such plane; it has {', '.join(known)}")
        return self._refined_layout(first)

    def shared_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Coding and shape of each plane that all weights share."""
        return self._refined_layout(self.first.shared_layout())

    def _refined_layout(self, first: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
        by = dict(self.planes)
        found = {}
        for plane, (coding, shape) in first.items():
            parts = {plane: (coding, shape)}
            if plane in by:
                parts = {f"{plane}.{name}": about for name, about in by[plane].layout(_as_matrix(shape)).items()}
            found.update(parts)
        return {name: (self._coding(coding), shape) for name, (coding, shape) in found.items()}

    def _coding(self, coding: str) -> str:
        return f"~{coding}" if self.entropy and not is_coded(coding) else coding

    def fit_shared(self, layers: Sequence[Layer], seed: int = 0) -> Packed:
        """The first stage's, refined."""
        return self.refine(self.first.fit_shared(layers, seed))

    def refine(self, packed: Packed) -> Packed:
        """The planes of the first stage, refined; those that weights share have to be refined on their own.

        Planes that have been refined already, by the first of `planes`, stay as they are.

        Raises BadInput if a stage cannot encode a plane.
        """
        if packed.shape != (0, 0):  # which planes that weights share have
            self.layout(packed.shape)  # refuses names of planes that are not there
        by = dict(self.planes)
        found: list[Plane] = []
        for plane in packed:
            if plane.name in by:
                values = plane.values.to(torch.float32)
                matrix = values.reshape(-1, values.shape[-1]).T.contiguous() if values.dim() > 1 else values[None]
                parts = by[plane.name].encode(matrix, name=f"plane {plane.name}")
                found += [Plane(f"{plane.name}.{part.name}", part.values, part.coding) for part in parts]
            else:
                found.append(plane)
        return Packed(packed.shape, tuple(Plane(p.name, p.values, self._coding(p.coding)) for p in found), packed.shared)

    def unrefine(self, packed: Packed, layout: Layout) -> Packed:
        """The first stage's planes, of this layout, as the refined ones stand for them."""
        by = dict(self.planes)
        found = []
        for plane, (coding, shape) in layout.items():
            values = self._unrefined(plane, by[plane], packed, coding, shape) if plane in by else packed[plane]
            found.append(Plane(plane, values, coding))
        return Packed(packed.shape, tuple(found))

    def _unrefined(self, name: str, by: Stage, packed: Packed, coding: str, shape: tuple[int, ...]) -> torch.Tensor:
        parts = [p for p in packed if p.name.startswith(f"{name}.")]
        planes = tuple(Plane(p.name.removeprefix(f"{name}."), p.values, p.coding) for p in parts)
        matrix = by.decode(Packed(_as_matrix(shape), planes))
        values = (matrix.T if len(shape) > 1 else matrix).reshape(shape)
        if not torch.isfinite(values).all():
            raise BadArtifact(f"plane {name}: decodes to values that are not finite")
        kind = coding.strip("~")
        if kind in FLOATS:
            dtype = FLOATS[kind]
            largest = torch.finfo(dtype).max
            return values.clamp(-largest, largest).to(dtype)
        width = 8 if kind == "trit" else int(kind[4:])
        highest = 2 if kind == "trit" else (1 << width) - 1
        whole = values.double().round().clamp(0, highest)
        return whole.to(torch.uint8 if width <= 8 else torch.int32 if width < 32 else torch.int64)

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        return self.refine(self.first._encode(weight, stats, seed))

    def _encode_shared(self, weight: torch.Tensor, stats: Any, seed: int, shared: Packed) -> Packed:
        plain = self.unrefine(shared, self.first.shared_layout())
        return self.refine(self.first._encode_shared(weight, stats, seed, plain))

    def _decode(self, packed: Packed) -> torch.Tensor:
        plain = self.unrefine(packed, self.first.layout(packed.shape))
        shared = packed.shared and self.unrefine(packed.shared, self.first.shared_layout())
        return self.first.decode(Packed(plain.shape, plain.planes, shared))


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the matrix that a plane of this shape is to the stage that refines it."""
    return (shape[-1], math.prod(shape[:-1])) if len(shape) > 1 else (1, shape[0])
