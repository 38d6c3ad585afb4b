"""Modules that use their tensors in ways of their own, such as layers of experts and scaled embeddings, with these packed.

Such a module keeps its code.  While it computes, the names of its packed tensors give decoded ones; at any other time
they give the `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from .decoding import PackedEmbedding, PackedLinear, PackedWeight

# What modules that compute in this thread have decoded, by the module's id and the tensor's name.
_decoded: ContextVar[Mapping[tuple[int, str], torch.Tensor]] = ContextVar("decoded", default={})  # noqa: B039 (never changed)


class Holding(nn.Module):
    """A module with packed tensors.  held: their names and shapes.  like: holds the dtype that the model computes in."""

    held: dict[str, tuple[int, ...]]
    like: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with packed tensors decoded to the dtype of the input, or of `like` if that is not a float."""
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        dtype = next(inputs, self.like).dtype
        found = dict(_decoded.get())
        for name, shape in self.held.items():
            weight = self._modules[name]
            assert isinstance(weight, PackedWeight)
            found[id(self), name] = weight.dense(dtype).reshape(shape)
        token = _decoded.set(found)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _decoded.reset(token)


@cache
def _class_of(own: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """`own` with these tensors packed."""

    def tensor(name: str) -> property:
        return property(lambda self: _decoded.get().get((id(self), name), self._modules[name]))

    return type(f"Packed{own.__name__}", (Holding, own), {name: tensor(name) for name in names})


def hold(module: nn.Module, name: str, weight: PackedWeight, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Put `weight` in place of the module's parameter `name`, which has this shape; its class becomes a `Holding`."""
    own: Any = type(module)
    held: dict[str, tuple[int, ...]] = {}
    if isinstance(module, Holding):
        own, held = type(module).__bases__[1], module.held
    else:
        module.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
    del module._parameters[name]
    module._modules[name] = weight
    held = {**held, name: tuple(shape)}
    module.__class__ = _class_of(own, tuple(held))
    cast(Holding, module).held = held


def place(module: nn.Module, name: str, weight: PackedWeight, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Put `weight` in place of the parameter `name` of `module`: torch's linear layers and embeddings, and GPT-2's
    Conv1D, are replaced, any other module becomes a `Holding`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    layer: nn.Module
    if leaf == "weight" and type(owner) is nn.Embedding:
        layer = PackedEmbedding(weight, dtype)
    elif leaf == "weight" and is_linear(owner):
        bias = owner.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        layer = PackedLinear(weight, bias)
    else:
        hold(owner, leaf, weight, shape, dtype)
        return
    parent, _, own = path.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


def is_linear(module: nn.Module) -> bool:
    """Whether it is torch's Linear or GPT-2's Conv1D, which a packed layer can replace."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
