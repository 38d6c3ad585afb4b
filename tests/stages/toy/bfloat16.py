"""Every weight as a bfloat16: the smallest stage, for CONTRIBUTING.md and `test_a_new_stage_is_one_file`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from agentforge.planes import Packed, Plane
from agentforge.stages.base import InputStatistics, Stage, register


@register
@dataclass(frozen=True)
class BFloat16(Stage):
    name: ClassVar[str] = "bfloat16"

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"values": ("bfloat16", shape)}

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        return Packed(shape, (Plane("values", weight.to(torch.bfloat16), "bfloat16"),))

    def _decode(self, packed: Packed) -> torch.Tensor:
        return packed["values"].to(torch.float32)
