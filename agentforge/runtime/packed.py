"""An artifact as a model whose ternary layers stay packed: built around the planes, never from dense matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import BadArtifact, BadInput
from ..planes import Packed
from .linear import TernaryLinear

if TYPE_CHECKING:
    from ..artifact import Artifact
    from ..models import LanguageModel

STAGES = ("ternary",)  # that have a layer of their own here


def check(opened: LanguageModel, artifact: Artifact) -> None:
    """Raise BadInput where something is encoded for which there is no packed layer."""
    linear = {weight.name for weight in opened.weights(embeddings=True) if weight.module != "Embedding"}
    for row in artifact.rows:
        if row["stage"] is None:
            continue
        name, stage = row["name"], row["stage"]["stage"]
        if stage not in STAGES or name not in linear:
            what = f"encoded by {stage}" if stage not in STAGES else "encoded and not the weight of a linear layer"
            raise BadInput(
                f"{artifact.path}: tensor {name} is {what}; runtime packed computes linear layers of {', '.join(STAGES)}, "
                "runtime dense decodes everything"
            )


def build(opened: LanguageModel, artifact: Artifact) -> nn.Module:
    """The torch module of an artifact that `check` let through, on the CPU: TernaryLinear where a weight is encoded,
    embedding and head in the 16 bits in which they were kept, everything else in float32."""
    opened.check()
    if not opened.is_classifier:
        from . import half, llama  # only here: it imports transformers

        opened._hf_config.dtype = torch.float32  # of the rest of the module
    with _EmptyOnMeta():
        module = opened.skeleton(device="cpu")
    kept: dict[str, torch.Tensor] = {}
    for row in artifact.rows:
        if row["stage"] is None:
            kept[row["name"]] = artifact.decode(row)
    for row in artifact.rows:
        if row["stage"] is not None:
            path = row["name"].removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            packed = artifact.read(row)
            assert isinstance(packed, Packed)
            try:
                layer = TernaryLinear.from_packed(packed, kept.pop(f"{path}.bias", None))
            except BadArtifact as error:
                raise BadArtifact(f"{artifact.path}: tensor {row['name']}: {error}") from None
            setattr(module.get_submodule(parent), leaf, layer)
    module.load_state_dict(kept, strict=False, assign=True)
    if not opened.is_classifier:
        module.tie_weights()  # type: ignore[operator]
        half.adopt(module)
        llama.adopt(module)
    return module.float().requires_grad_(False).eval()


class _EmptyOnMeta(TorchFunctionMode):
    """What modules make by torch.empty, their parameters, takes no memory; what they compute (rotary tables) is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))
