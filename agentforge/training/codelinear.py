"""CodeLinear: a linear layer that computes with the codes of entropy-coded quantisation, and learns through their rounding.

A weight is gain_r * step_rc * q(u_rc), q rounding to a whole number with a dead zone (`stages.ecsq`).  The steps stay as
they were fitted.  What is trained is u, straight through q: dL/du = dL/dw * gain * step; and the gain of each row, for
which the derivative is exact.  At the start u is the value nearest to the original weight that has the fitted code and
keeps a distance from its border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..artifact import Artifact
from ..errors import BadInput
from ..models import LanguageModel
from ..planes import FLOAT32_MAX, Packed
from ..stages.ecsq import ECSQ, LARGEST, factors, unzigzag, zigzag
from ..stages.text import from_json

SPAN = 5.0  # steps in a unit of the latent parameter: one learning rate serves codes, gains and norms
# Of a step, between a latent value and the border of its code at the start.  The fitted codes make up for each other's
# errors: with a small margin, noise in the first steps of training turns over the codes at the border and undoes that.  With
# this one a code changes only after the gradients of many steps have agreed on it.
MARGIN = 0.2


class CodeLinear(nn.Module):
    """A linear layer made from `layer` (nn.Linear or Conv1D), its weight, float[out, in], and ECSQ's planes of it.

    latent: u / SPAN, float32[out, in].  gains: float32[out].  Both are trained.
    """

    def __init__(self, layer: nn.Module, stage: ECSQ, packed: Packed, weight: torch.Tensor) -> None:
        super().__init__()
        self.stage, self.planes = replace(stage, gains=True), packed
        self.bias: nn.Parameter | None = getattr(layer, "bias", None)
        rows, columns = factors(packed)
        columns = (columns * packed["step"]).clamp(max=FLOAT32_MAX)
        steps = (rows[:, None] * columns).clamp(min=1e-30)
        codes = unzigzag(packed["codes"]).to(torch.float32)
        latent = _nearest(weight.to(torch.float32) / steps, codes, stage.rounding)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.latent = nn.Parameter(latent / SPAN)
        gains = packed["gains"].float() if stage.gains else torch.ones(len(rows))
        self.gains = nn.Parameter(gains)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias: float[..., in] -> float[..., out]."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def dense(self) -> torch.Tensor:
        """The weight that the codes stand for, float32[out, in], as a function of latent values and gains."""
        gains, rounding = self._gains(), self.stage.rounding
        found = _Codes.apply(self.latent, gains, self.rows, self.columns, rounding)  # type: ignore[no-untyped-call]
        assert isinstance(found, torch.Tensor)
        return found

    def _gains(self) -> torch.Tensor:
        """The gains as they would be stored, straight through."""
        return self.gains + (self.gains.detach().half().float() - self.gains.detach())

    @torch.no_grad()
    def packed(self, shrink: float = 1.0) -> Packed:
        """The planes of the forward pass; shrink: a factor for the latent values first, which makes codes smaller."""
        codes = _round(self.latent.detach().cpu() * (SPAN * shrink), self.stage.rounding)
        planes = {plane.name: plane.values for plane in self.planes}
        planes |= {"codes": zigzag(codes.to(torch.int32)), "gains": self.gains.detach().cpu().half()}
        return self.stage.packed(self.planes.shape, planes)


class _Codes(torch.autograd.Function):
    """gain * step * q(u), with q's derivative taken as one."""

    @staticmethod
    def forward(
        context: Any, latent: torch.Tensor, gains: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, rounding: float
    ) -> torch.Tensor:
        """gain * step * q(u): float32[out, in]."""
        codes = _round(latent * SPAN, rounding).mul_(rows[:, None]).mul_(columns)
        context.save_for_backward(codes, gains, rows, columns)
        return codes * gains[:, None]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients in latent values and gains."""
        codes, gains, rows, columns = context.saved_tensors
        of_gains = torch.einsum("oi,oi->o", gradient, codes)
        of_latent = gradient * (SPAN * rows * gains)[:, None]
        return of_latent.mul_(columns), of_gains, None, None, None


def _round(values: torch.Tensor, rounding: float) -> torch.Tensor:
    """Whole numbers, towards zero from `rounding` below the next one: as ECSQ rounds."""
    return (values.abs() + rounding).floor_().clamp_(max=float(LARGEST)).copysign_(values)


def _nearest(values: torch.Tensor, codes: torch.Tensor, rounding: float) -> torch.Tensor:
    """The values, moved as little as it takes for `_round` to give `codes`; all float32[out, in]."""
    sign = torch.where(codes == 0, torch.ones_like(codes), codes.sign())
    size = codes.abs()
    low = torch.where(codes == 0, -(1 - rounding), size - rounding) + MARGIN
    high = size + 1 - rounding - MARGIN
    return torch.minimum(torch.maximum(values * sign, low), high) * sign


def code_linears(module: nn.Module) -> Iterator[tuple[str, CodeLinear]]:
    """Name and layer of every CodeLinear in `module`."""
    for name, layer in module.named_modules():
        if isinstance(layer, CodeLinear):
            yield name, layer


def to_codes(module: nn.Module, model: LanguageModel, start: Artifact) -> None:
    """Replace the layers of all weights that `start` encodes by CodeLinear, in place.

    Raises BadInput if it encodes one with another stage than ecsq, or outside of linear layers.
    """
    weights = {weight.name: weight for weight in model.weights()}
    layers = dict(module.named_modules())
    for row in start.rows:
        if not row["stage"]:
            continue
        stage, name = from_json(row["stage"]), row["name"].removesuffix(".weight")
        if not isinstance(stage, ECSQ) or row["name"] not in weights:
            raise BadInput(
                f"{start.path}: {row['name']} is encoded with {stage}; codes are trained of ecsq, in linear layers"
            )
        packed = start.read(row)
        assert isinstance(packed, Packed)
        parent, _, leaf = name.rpartition(".")
        weight = weights[row["name"]].load()  # as [out, in], also of a Conv1D
        setattr(layers[parent], leaf, CodeLinear(layers[name], stage, packed, weight))


def within(layers: Mapping[str, CodeLinear], most: int) -> dict[str, Packed]:
    """The planes of all layers, of at most `most` bytes together: if training has made them larger, all latent values are
    shrunk by the same factor, as little as it takes to a thousandth.

    Raises BadInput if nine tenths of their size are still too large.
    """
    shrink = 1.0
    while True:
        found = {name: layer.packed(shrink) for name, layer in layers.items()}
        size = sum(plane.stored().nbytes for packed in found.values() for plane in packed)
        if size <= most:
            return found
        shrink -= max(0.001, 0.3 * (1 - most / size))
        if shrink < 0.9:
            raise BadInput(f"recovery: the codes take {size:,} bytes, {most:,} are allowed; lower the learning rate")
