"""Refinement: all planes of a stage, coded at their entropy: "vptq:bits=3 | entropy".  Nothing is lost.

Re-encoding throws away what the stage before stored, so that only its own bytes count; a refinement works on these planes.
Its ratio multiplies with that of the stage before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import BadInput
from ..planes import Packed, Plane
from .base import Layer, Layout, Stage


@dataclass(frozen=True)
class Refined(Stage):
    """A stage whose planes are entropy-coded.  first: the stage."""

    name: ClassVar[str] = "refined"
    first: Stage

    @property
    def needs_statistics(self) -> bool:
        """Whether the first stage does."""
        return self.first.needs_statistics

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the first stage does."""
        return self.first.needs_sensitivity

    def check(self) -> None:
        """Raise BadInput if the first stage is not valid, or refined itself."""
        self.first.check()
        if isinstance(self.first, Refined):
            raise BadInput(f"refinement of {self.first}: its planes are entropy-coded already")

    def to_json(self) -> dict[str, Any]:
        """The stage, ready for `from_json`.  planes: those refined by stages of their own, as earlier versions could."""
        return {"stage": self.name, "first": self.first.to_json(), "planes": [], "entropy": True}

    def __str__(self) -> str:
        return f"{self.first} | entropy"

    def brief(self) -> str:
        """The stage's text without the settings that are at their defaults, which `parse` takes back."""
        return f"{self.first.brief()} | entropy"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane."""
        return _coded(self.first.layout(shape))

    def shared_layout(self) -> Layout:
        """Coding and shape of each plane that all weights share."""
        return _coded(self.first.shared_layout())

    def fit_shared(self, layers: Sequence[Layer], seed: int = 0) -> Packed:
        """The first stage's, refined."""
        return self.refine(self.first.fit_shared(layers, seed))

    def refine(self, packed: Packed) -> Packed:
        """The planes of the first stage, refined; those that weights share have to be refined on their own."""
        return Packed(packed.shape, tuple(plane.coded() for plane in packed), packed.shared)

    def unrefine(self, packed: Packed, layout: Layout) -> Packed:
        """The first stage's planes, of this layout."""
        return Packed(packed.shape, tuple(Plane(name, packed[name], coding) for name, (coding, _) in layout.items()))

    def _encode(self, weight: torch.Tensor, stats: Any, seed: int) -> Packed:
        return self.refine(self.first._encode(weight, stats, seed))

    def _encode_shared(self, weight: torch.Tensor, stats: Any, seed: int, shared: Packed) -> Packed:
        return self.refine(self.first._encode_shared(weight, stats, seed, shared))

    def _decode(self, packed: Packed) -> torch.Tensor:
        return self.first.decode(packed)


def _coded(layout: Layout) -> Layout:
    return {name: (f"~{coding.removeprefix('~')}", shape) for name, (coding, shape) in layout.items()}
