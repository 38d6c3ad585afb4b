"""What rounding, ternary weights and two of ggml's types have in common: codes on a grid of equally spaced levels, one grid
per group."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..bits import pack_uint
from ..errors import BadInput
from ..planes import Packed, times_power_of_two
from ..stages.base import Stage
from ..stages.ggml import GGML
from ..stages.refined import Refined
from ..stages.rounding import Rounding
from ..stages.ternary import Ternary


class Grid(NamedTuple):
    """w = (code - zero) * scale if there is a zero, else code * scale + minimum.

    codes: uint8[out, in], below 2**bits.  group: columns per group as the stage has it, 0 for one per row.  scale, minimum:
    float32[out, groups], in the weights' own units.
    """

    stage: Stage
    codes: torch.Tensor
    bits: int
    group: int
    scale: torch.Tensor
    zero: int | None
    minimum: torch.Tensor | None

    @property
    def columns(self) -> int:
        """Columns per group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def floats(self) -> list[torch.Tensor]:
        """All that has to be stored as floats."""
        return [self.scale] if self.minimum is None else [self.scale, self.minimum]


def refused(name: str, what: object, holds: str) -> BadInput:
    """A tensor that a format cannot hold, what it is, and what the format holds."""
    return BadInput(f"tensor {name} is {what}; {holds}")


def first_of(stage: Stage) -> Stage:
    """A stage without its lossless refinement."""
    return stage.first if isinstance(stage, Refined) else stage


def grid_of(name: str, stage: Stage, packed: Packed, holds: str) -> Grid:
    """An encoded weight as a grid.  holds: what the format can hold, for the BadInput that is raised for any other stage."""
    stage = first_of(stage)
    if isinstance(stage, Ternary):
        scale = packed["scale"].float().reshape(-1, 1).expand(packed.shape[0], 1)
        if stage.rule != "absmean":
            scale = times_power_of_two(scale, 128 - int(packed["exponent"]))
        return Grid(stage, packed["codes"].to(torch.uint8), 2, 0, scale, 1, None)
    if isinstance(stage, GGML) and stage.type in ("q4_0", "q8_0") and stage.fits(packed.shape[1]):
        blocks = packed["blocks"].reshape(packed.shape[0], -1, stage.form.bytes)  # a half float, then the levels
        scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
        levels, bits = blocks[..., 2:], 4 if stage.type == "q4_0" else 8
        codes = torch.cat([levels & 15, levels >> 4], -1) if bits == 4 else levels ^ 128  # an int8, and 128
        return Grid(stage, codes.flatten(1), bits, stage.form.block, scale, 2 ** (bits - 1), None)
    if not isinstance(stage, Rounding):
        raise refused(name, f"encoded by {stage.brief()}", holds)
    if packed.shape[1] % stage.columns_a_grid(packed.shape[1]):
        raise refused(name, f"of {packed.shape[1]} columns, so that {stage.brief()} leaves its last group shorter", holds)
    exponent = 128 - int(packed["exponent"])
    scale = times_power_of_two(packed["scale"], exponent)
    if stage.symmetric:
        return Grid(stage, packed["codes"], stage.bits, stage.group, scale, 2 ** (stage.bits - 1) - 1, None)
    return Grid(
        stage, packed["codes"], stage.bits, stage.group, scale, None, times_power_of_two(packed["minimum"], exponent)
    )


def halves(name: str, floats: torch.Tensor) -> torch.Tensor:
    """Rounded to float16.  Raises BadInput for what float16 does not reach."""
    half = floats.to(torch.float16)
    if not torch.isfinite(half).all():
        raise BadInput(
            f"tensor {name} has scales up to {float(floats.abs().max()):.3g}; the format has them in float16, up to 65504"
        )
    return half


def fits_halves(floats: torch.Tensor) -> bool:
    """Whether float16 holds all of it exactly."""
    return torch.equal(floats.to(torch.float16).to(floats.dtype), floats)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as words of 32 bits, the first code in the lowest bits: int32[rows, ceil(columns * bits / 32)]."""
    columns = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits if 32 % bits == 0 else 32)))
    return pack_uint(columns, bits).view(torch.int32).reshape(len(codes), -1)
