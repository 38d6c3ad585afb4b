"""The loader of artifacts whose weights stay packed: layers around the planes, never made from dense matrices.

`build` makes the model of an artifact; transformers' `from_pretrained` makes it by the same `replace` and `finish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import stages
from ..artifact import SHARED, Artifact, oriented
from ..errors import BadArtifact, BadInput
from ..models import IN_PLACE
from ..stages.ternary import Ternary
from ..tensorfiles import read_tensor
from .layers import (
    Fixed,
    Half,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    Readable,
    SharedPlanes,
    TiedHead,
    pack_parameter,
)
from .linear import TernaryLinear

if TYPE_CHECKING:
    from ..models import LanguageModel


def build(opened: LanguageModel, artifact: Artifact) -> nn.Module:
    """The torch module of an artifact, on the CPU: TernaryLinear if a weight is ternary, layers around its planes
    for every other stage, embedding and head in the 16 bits in which they were kept, all else in float32."""
    opened.check()
    if not opened.is_classifier:
        opened._hf_config.dtype = torch.float32  # of the rest of the module
    with _EmptyOnMeta():
        module: Any = opened.skeleton(device="cpu")
    replace(module, artifact, torch.float32)
    state = {name: read_tensor(name, entry) for name, entry in artifact.entries.items()}
    module.load_state_dict(state, strict=False, assign=True)
    if not opened.is_classifier:
        module.tie_weights()
    finish(module.float())
    return module.eval()  # type: ignore[no-any-return]


def replace(model: Any, artifact: Artifact, dtype: torch.dtype) -> None:
    """Put layers without memory in place of those whose weights are encoded, or are an embedding or head of 16 bits.

    Each plane has the size that it has on disk.  dtype: what the model computes in.  Raises BadInput for a model that
    changes its weights in place.
    """
    if (kind := getattr(getattr(model, "config", None), "model_type", None)) in IN_PLACE:
        raise BadInput(f"packed weights: {kind} changes its own in place, which planes cannot; load with runtime=dense")
    entries = artifact.entries

    def stored(name: str, layout: Mapping[str, object]) -> dict[str, torch.Tensor]:
        return {plane: _without_memory(entries[f"{name}.{plane}"]) for plane in layout}

    shared = None
    if about := artifact.manifest["shared"]:
        stage = stages.from_json(about["stage"])
        shared = SharedPlanes(stage, stored(SHARED, stage.shared_layout()))
        model.add_module("agentforge", nn.Module())
        model.agentforge.add_module("shared", shared)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    embedding, head = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    modules = dict(model.named_modules())
    placed: dict[str, PackedWeight | Half] = {}
    for row in artifact.rows:
        name = name_in(model, row["name"])
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if row["stage"] is not None and owner is not None:
            stage, shape = stages.from_json(row["stage"]), oriented(row)
            planes = stored(row["name"], stage.layout(shape))
            of_all = shared if stage.shared_layout() else None
            weight = PackedWeight(stage, shape, planes, of_all, dtype, row["transposed"])
            if leaf == "weight" and type(owner) is nn.Embedding:
                _put(model, path, PackedEmbedding(weight))
            elif leaf == "weight" and (type(owner) is nn.Linear or type(owner).__name__ == "Conv1D"):
                _put(model, path, PackedLinear(weight, owner.bias))
            else:
                pack_parameter(owner, leaf, weight, row["shape"])
            placed[name] = weight
        elif (
            row["dtype"] in ("float16", "bfloat16")
            and owner in (embedding, head)
            and _is_plain(owner)
            and (name not in tied.values() or _is_plain(head))
        ):
            placed[name] = Half(_without_memory(entries[row["name"]]), dtype)
            _put(model, path, placed[name])
    for target, source in list(tied.items()):
        if source in placed and target not in placed:
            path = target.rpartition(".")[0]
            _put(model, path, TiedHead(placed[source], getattr(model.get_submodule(path), "bias", None)))
        if source in placed or target in placed:
            del tied[target]
    if isinstance(getattr(model, "_tied_weights_keys", None), dict):  # from which transformers would tie again
        model._tied_weights_keys = {t: s for t, s in model._tied_weights_keys.items() if not {t, s} & set(placed)}
    for module in model.modules():
        if isinstance(module, Fixed | PackedEmbedding | PackedLinear | TiedHead):
            for inner in module.modules():
                # Nothing that transformers is to fill with random numbers.
                inner._is_hf_initialized = True  # type: ignore[assignment]


def finish(model: nn.Module) -> None:
    """What is left to do once the planes are there: ternary layers take the form that is multiplied.

    Raises BadArtifact for codes that are none.
    """
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLinear) or type(layer.weight.stage) is not Ternary:
            continue
        device = layer.weight.device
        if device.type == "meta":
            continue  # offloaded: decoded when it comes back
        try:
            ternary = TernaryLinear.from_packed(layer.cpu().weight.packed, layer.bias)
        except BadArtifact as error:
            raise BadArtifact(f"tensor {path}.weight: {error}") from None
        _put(model, path, ternary.to(device))
    weight = next((module for module in model.modules() if isinstance(module, Readable)), None)
    if weight is not None and next(model.parameters(), None) is None:  # transformers asks for device and dtype of one
        model.register_parameter("no_weight", nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device)))
    model.requires_grad_(False)


def name_in(model: Any, name: str) -> str:
    """The name in `model` of what the artifact calls `name`: a model without its head has no prefix for the rest."""
    prefix = getattr(model, "base_model_prefix", "")
    return name if hasattr(model, prefix) else name.removeprefix(f"{prefix}.")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _is_plain(module: Any) -> bool:
    """Whether its weight is all that there is to an embedding or a head."""
    return (type(module) is nn.Embedding and module.max_norm is None) or (type(module) is nn.Linear and module.bias is None)


def _without_memory(entry: Any) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


class _EmptyOnMeta(TorchFunctionMode):
    """What modules make by torch.empty, their parameters, takes no memory; what they compute (rotary tables) is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))
