"""BitLinear: a linear layer that computes with ternary weights and int8 activations, and learns through both.

BitNet b1.58 (arXiv 2402.17764, section 2) and its Training Tips, Code and FAQ.  Forward:

    W_q = clip(round(W / gamma), -1, 1) * gamma       gamma = mean|W|, one for the whole matrix (`stages.ternary`)
    x_q = clip(round(x * s), -128, 127) / s           s = 127 / max|x|, one for each token
    y   = x_q W_q^T + bias

Rounding has a derivative of zero almost everywhere.  The straight-through estimator takes the derivative of both
quantisers as one, round and clip alike: dL/dW = (dL/dy)^T x_q and dL/dx = (dL/dy) W_q.  The optimizer moves the latent
W, in full precision; small steps add up there until a code flips.

A trained model is not thrown into this at once: `blend` = lambda goes from 0 to 1, and the layer computes with
x + lambda (x_q - x) and W + lambda (W_q - W) (Hugging Face, "Fine-tuning LLMs to 1.58bit").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from ..errors import BadInput
from ..planes import Packed
from ..stages import Stage
from ..stages.ternary import Ternary, absmean
from .student import Student, layers_of, straight_through

Norm = Literal["none", "inside"]
ABSMEAN = Ternary()


class BitLinear(Student):
    """A linear layer with straight-through quantisation, made from a dense one.

    layer: an nn.Linear or a Conv1D of transformers; its parameters are taken over, not copied, under the same names and
    shapes, so that state dicts fit.  activations: quantise them to int8, too.  norm: "inside" puts an RMSNorm without
    weights before the quantisation, as the authors' BitLinear does; a model trained so needs its own norms before
    attention and feed-forward taken out.  stage: of `packed`.  blend: lambda.
    """

    stage: Ternary

    def __init__(self, layer: nn.Module, activations: bool = True, norm: Norm = "none", stage: Stage = ABSMEAN) -> None:
        super().__init__()
        if not isinstance(stage, Ternary) or stage.rule != "absmean":
            raise BadInput(f"recovery: {stage} cannot be trained through; expected rule=absmean")
        weight = layer.weight
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise BadInput(f"{type(layer).__name__}: expected a linear layer with a matrix of weights")
        self.weight = weight
        self.bias = getattr(layer, "bias", None)
        self.transposed = type(layer).__name__ == "Conv1D"
        self.activations, self.norm, self.stage = activations, norm, stage
        self.blend = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x_q W_q^T + bias: float[..., in] -> float[..., out]."""
        if self.norm == "inside":
            x = nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
        if self.activations:
            x = straight_through(x, quantize_activations(x.detach()), self.blend)
        weight = straight_through(self.weight, self.quantized(), self.blend)
        return nn.functional.linear(x, weight.T if self.transposed else weight, self.bias)

    @torch.no_grad()
    def quantized(self) -> torch.Tensor:
        """W_q as the forward pass uses it, in the shape of `weight`."""
        gamma = self.scale()
        return self._codes(gamma).mul_(gamma)

    def scale(self) -> torch.Tensor:
        """gamma: float32[1].  On the CPU, bit for bit what the ternary stage takes."""
        weight = self.weight.detach()
        if weight.device.type == "cpu":
            return absmean(weight.float(), self.stage.eps)
        return weight.abs().mean(dtype=torch.float64).clamp(min=self.stage.eps).float().reshape(1)

    def _codes(self, gamma: torch.Tensor) -> torch.Tensor:
        return (self.weight.detach().float() * (1.0 / gamma)).round_().clamp_(-1, 1)

    @torch.no_grad()
    def packed(self) -> Packed:
        """The codes and the scale of the forward pass as the planes of the stage."""
        gamma = self.scale()
        codes = (self._codes(gamma) + 1).to("cpu", torch.uint8)
        codes = codes.T.contiguous() if self.transposed else codes
        return self.stage.packed((codes.shape[0], codes.shape[1]), {"codes": codes, "scale": gamma.cpu()})


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """x with each token (the last dimension) rounded to 8 bits: clip(round(x s), -128, 127) / s, s = 127 / max|x|, the
    maximum at least 1e-5.  Same shape and dtype."""
    scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-5)
    return ((x * scale).round_().clamp_(-128, 127) / scale).to(x.dtype)


def convert(
    module: nn.Module,
    names: Iterable[str] | None = None,
    activations: bool = True,
    norm: Norm = "none",
    stage: Stage = ABSMEAN,
) -> list[str]:
    """Replace linear layers of `module` by BitLinear, in place, and return their names.

    names: of the layers, or of their weights (default: every nn.Linear and Conv1D inside the decoder's blocks; never the
    output head).  Raises BadInput for a name that is not there or no linear layer.
    """
    layers = dict(module.named_modules())
    chosen = list(_linears(module)) if names is None else [name.removesuffix(".weight") for name in names]
    for name in chosen:
        layer = layers.get(name)
        if layer is None or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            raise BadInput(f"{name}: expected a linear layer, found {type(layer).__name__ if layer else 'nothing'}")
        module.set_submodule(name, BitLinear(layer, activations, norm, stage))
    return chosen


def set_blend(module: nn.Module, blend: float) -> None:
    """Set lambda in every BitLinear.  Raises BadInput outside 0 to 1."""
    if not 0.0 <= blend <= 1.0:
        raise BadInput(f"blend={blend}; expected 0 (as it was) to 1 (quantised)")
    for _, layer in layers_of(module, BitLinear):
        layer.blend = blend


def _linears(module: nn.Module) -> Iterator[str]:
    """Names of the linear layers inside the blocks of `module`, or anywhere if it has no blocks."""
    blocks = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child)]
    for name, layer in module.named_modules():
        linear = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
        if linear and (not blocks or any(name.startswith(f"{block}.") for block in blocks)):
            yield name
