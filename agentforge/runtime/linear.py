"""A linear layer of ternary weights that stay packed: two bits per weight, and never a whole dense matrix.

    y = scale * (W q) / s + bias,   s = 127 / max|x|,   q = round(x * s)

as BitNet b1.58 computes at inference (arXiv 2402.17764; the authors' code): activations of 8 bits, one scale per token,
halves to even, max|x| at least 1e-5.  W q is an exact integer; the rest is in double precision, rounded once.  The
result depends on neither the machine, the kernel nor the number of threads.  A token with NaN or infinity gives NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import BadArtifact, BadInput
from ..planes import Packed, Plane
from ..stages.ternary import Ternary
from .layers import Fixed
from .ternary_cpu import COLUMNS, LIMIT, ROWS, product

FIELDS = 4  # weights per byte
PART = 1 << 24  # weights that are unpacked at a time elsewhere than on the CPU
EXACT = 1 << 17  # columns up to which a sum of so many times 127 fits into a float32


class TernaryLinear(Fixed):
    """x -> x W^T scale + bias for ternary W, with activations of 8 bits; for inference, it has no gradient.

    Buffers: `packed`, uint8[ceil(out / 4), ceil(in / 64), 64], laid out as ternary_cpu says.  `scales`: float32[4], four
    times the same, if the tensor has one scale, or one per row, filled up to a multiple of four.  `biases`: one per row,
    filled up, or float32[4] of zeros.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """codes: uint8[out, in], 0, 1, 2 for -1, 0, +1.  scale: float32[1] or [out].  bias: float[out]."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        if not 0 < self.in_features <= LIMIT or not self.out_features:
            raise BadInput(f"ternary weights {list(codes.shape)}: expected 1 to {LIMIT} inputs and at least one output")
        if scale.shape not in ((1,), (self.out_features,)) or (bias is not None and bias.shape != (self.out_features,)):
            found = [list(t.shape) for t in (scale, bias) if t is not None]
            raise BadInput(
                f"scale and bias of shape {found}: expected one scale, or one per row, and {self.out_features} biases"
            )
        self.has_bias, self.per_row = bias is not None, scale.shape != (1,)
        self.register_buffer("packed", pack(codes))
        self.register_buffer("scales", _fours(scale))
        self.register_buffer("biases", torch.zeros(ROWS) if bias is None else _fours(bias))

    @classmethod
    def from_linear(cls, linear: nn.Module) -> TernaryLinear:
        """The layer with its weight rounded by BitNet b1.58's rule (absmean); nn.Linear or GPT-2's Conv1D."""
        weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
        conv = type(linear).__name__ == "Conv1D"
        if not isinstance(weight, torch.Tensor) or not (conv or isinstance(linear, nn.Linear)):
            raise BadInput(f"{type(linear).__name__}: expected a linear layer (torch's Linear or transformers' Conv1D)")
        weight = weight.detach().T if conv else weight.detach()
        layer = cls.from_packed(Ternary(packing="2bit").encode(weight), None if bias is None else bias.detach())
        return layer.to(weight.device)

    @classmethod
    def from_packed(cls, packed: Packed, bias: torch.Tensor | None = None) -> TernaryLinear:
        """The layer of a weight that the stage "ternary" encoded, by any rule.

        Raises BadInput for planes of another stage, BadArtifact for codes that are none.
        """
        names = [plane.name for plane in packed]
        if names not in (["codes", "scale"], ["codes", "scale", "exponent"]):
            raise BadInput(f"planes {', '.join(names)}: not those of a ternary weight (codes, scale)")
        codes = packed["codes"]
        if int(codes.max()) > 2:
            raise BadArtifact("plane codes: holds 3; a ternary code is 0, 1 or 2")
        # The stage itself says what its scales stand for: the decoded column of a weight that is +1 in every row.  All rules
        # but absmean have the planes of "threshold".
        stage = Ternary(rule="threshold" if len(names) == 3 else "absmean")
        column = Plane("codes", torch.full((packed.shape[0], 1), 2, dtype=torch.uint8), "uint2")
        scale = stage.decode(Packed((packed.shape[0], 1), (column, *packed.planes[1:]))).reshape(-1)
        return cls(codes, scale[:1] if stage.rule == "absmean" else scale, bias)

    @property
    def scale(self) -> torch.Tensor:
        """float32[1], or float32[out] if each row has its own."""
        return self.scales[: self.out_features] if self.per_row else self.scales[:1]

    @property
    def bias(self) -> torch.Tensor | None:
        """float32[out]."""
        return self.biases[: self.out_features] if self.has_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """float32[out, in], decoded, to modules that read it."""
        return unpack(self.packed)[: self.out_features, : self.in_features] * self.scale.unsqueeze(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float[..., in].  Returns [..., out] in x's dtype, computed in float32 from an x of fewer bits.

        Raises BadInput if x has another size, or gradients are asked for.
        """
        if x.shape[-1] != self.in_features:
            raise BadInput(f"TernaryLinear: expected inputs [..., {self.in_features}], found {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise BadInput("TernaryLinear has no gradient; call it under torch.inference_mode() or torch.no_grad()")
        dtype = x.dtype
        if dtype != torch.float32:
            x = x.to(torch.float32)
        buffers: Any = self._buffers  # not self.packed: a module's __getattr__ would take as long as a small product
        layer = x.contiguous(), buffers["packed"], buffers["scales"], buffers["biases"], self.out_features
        out = product(*layer) if x.is_cpu else product_elsewhere(*layer)
        return out if dtype == torch.float32 else out.to(dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        scales = "one a row" if self.per_row else "one"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, scales={scales}"


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8[out, in] of 0, 1, 2 to uint8[ceil(out / 4), ceil(in / 64), 64]; what fills it up is code 1, a weight of 0."""
    rows, columns = codes.shape
    padded = nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS), value=1)
    shape = (padded.shape[0] // ROWS, ROWS, padded.shape[1] // COLUMNS, FIELDS, COLUMNS // FIELDS)
    fields = padded.reshape(shape).permute(3, 0, 2, 1, 4)  # field, group, run, row, byte
    packed = fields[0].clone()
    for field in range(1, FIELDS):
        packed |= fields[field] << (2 * field)
    return packed.reshape(shape[0], shape[2], COLUMNS)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights -1, 0 and 1 of packed codes, filled up as `pack` does: int8[4 groups, 64 runs]."""
    groups, runs, _ = packed.shape
    fields = torch.stack([packed >> (2 * field) & 3 for field in range(FIELDS)]).to(torch.int8) - 1
    return fields.reshape(FIELDS, groups, runs, ROWS, -1).permute(1, 3, 2, 0, 4).reshape(groups * ROWS, runs * COLUMNS)


def product_elsewhere(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, rows: int
) -> torch.Tensor:
    """`ternary_cpu.product` in torch, with its results on any device: some rows at a time are unpacked."""
    columns = x.shape[-1]
    largest = x.abs().amax(-1, keepdim=True)
    s = largest.clamp(min=1e-5).reciprocal() * 127
    kind = torch.float32 if columns <= EXACT else torch.float64
    q = torch.where(largest.isfinite(), (x * s).round(), torch.nan).to(kind)  # so every result of this token is NaN
    parts = packed.split(max(1, PART // (ROWS * columns)))
    exact = torch.cat([q @ unpack(part)[:, :columns].to(kind).T for part in parts], -1)[..., :rows].double()
    scale, bias = ((t if len(t) > ROWS else t[:1]).double()[:rows] for t in (scales, biases))
    return (exact * (scale * s.double().reciprocal()) + bias).to(torch.float32)


def _fours(values: torch.Tensor) -> torch.Tensor:
    """float32 of a length that is a multiple of four: one value four times, else filled up with zeros."""
    values = values.detach().to(torch.float32)
    return values.repeat(ROWS) if len(values) == 1 else nn.functional.pad(values, (0, -len(values) % ROWS))
