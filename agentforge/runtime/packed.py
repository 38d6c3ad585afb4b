"""An artifact as a model whose weights stay packed: built around the planes, never from dense matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import stages
from ..errors import BadArtifact
from ..planes import Packed
from .decoding import PackedEmbedding, PackedLinear, PackedWeight, SharedPlanes
from .holding import Holding, is_linear, place
from .linear import TernaryLinear

if TYPE_CHECKING:
    from ..artifact import Artifact
    from ..models import LanguageModel


def build(opened: LanguageModel, artifact: Artifact) -> nn.Module:
    """The torch module of an artifact, on the CPU: TernaryLinear if a weight is ternary, layers around its planes
    for every other stage, embedding and head in the 16 bits in which they were kept, all else in float32."""
    opened.check()
    if not opened.is_classifier:
        from . import half

        opened._hf_config.dtype = torch.float32  # of the rest of the module
    with _EmptyOnMeta():
        module = opened.skeleton(device="cpu")
    kept: dict[str, torch.Tensor] = {}
    for row in artifact.rows:
        if row["stage"] is None:
            kept[row["name"]] = artifact.decode(row)
    shared = shared_planes(artifact)
    if shared is not None:
        module.add_module("agentforge", nn.Module())
        module.get_submodule("agentforge").add_module("shared", shared)
    for row in artifact.rows:
        if row["stage"] is not None:
            _place(module, artifact, row, kept, shared)
    module.load_state_dict(kept, strict=False, assign=True)
    if not opened.is_classifier:
        _tie(module, opened._hf_config)
        half.adopt(module)
    return module.float().requires_grad_(False).eval()


def shared_planes(artifact: Artifact) -> SharedPlanes | None:
    """The planes that all encoded weights share, None if there are none."""
    about = artifact.manifest["shared"]
    if about is None:
        return None
    return SharedPlanes(stages.from_json(about["stage"]), {plane.name: plane.stored() for plane in artifact.shared})


def _place(
    module: nn.Module,
    artifact: Artifact,
    row: dict[str, Any],
    kept: dict[str, torch.Tensor],
    shared: SharedPlanes | None,
) -> None:
    """Put a row's weight into its module; TernaryLinear takes its bias out of `kept`."""
    packed, stage, name = artifact.read(row), stages.from_json(row["stage"]), row["name"]
    assert isinstance(packed, Packed)
    path = name.rpartition(".")[0]
    if stage.name == "ternary" and is_linear(module.get_submodule(path)):
        parent, _, leaf = path.rpartition(".")
        try:
            layer = TernaryLinear.from_packed(packed, kept.pop(f"{path}.bias", None))
        except BadArtifact as error:
            raise BadArtifact(f"{artifact.path}: tensor {name}: {error}") from None
        setattr(module.get_submodule(parent), leaf, layer)
        return
    weight = PackedWeight(
        stage, packed.shape, {plane.name: plane.stored() for plane in packed}, shared if stage.shared_layout() else None
    )
    place(module, name, weight, row["shape"], torch.float32)


def _tie(module: Any, config: Any) -> None:
    """Give the head the embedding's weight if the configuration says so, packed or not."""
    embedding = module.get_input_embeddings()
    if not isinstance(embedding, PackedEmbedding | Holding):
        module.tie_weights()
    elif config.get_text_config().tie_word_embeddings:
        weight = embedding.get_submodule("weight")
        assert isinstance(weight, PackedWeight)
        module.set_output_embeddings(PackedLinear(weight))


class _EmptyOnMeta(TorchFunctionMode):
    """What modules make by torch.empty, their parameters, takes no memory; what they compute (rotary tables) is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))
