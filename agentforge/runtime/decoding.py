"""Layers that hold a weight as its planes, of any stage, and decode it whenever they compute.

Between two products nothing dense is kept: a model takes the memory of its planes, and of one decoded weight at a time.
State dictionaries name the planes as an artifact does (`...q_proj.weight.codes`), and hold the tensors that are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..planes import Packed, Plane
from ..stages import Stage


class PackedWeight(nn.Module):
    """A weight float[out, in] as the planes of a stage, which `dense` decodes.

    Buffers: a plane each, as stored (`Plane.stored`), under its name; where that has a dot, in modules of their own.
    """

    def __init__(
        self, stage: Stage, shape: tuple[int, int], stored: Mapping[str, torch.Tensor], shared: SharedPlanes | None = None
    ) -> None:
        """stored: the planes by name, in the order of `stage.layout(shape)`.  shared: those that all weights share."""
        super().__init__()
        self.stage, self.out_features, self.in_features = stage, shape[0], shape[1]
        _hang(self, stored)
        self._shared = (shared,)  # in a tuple: it belongs to the model, not to each weight

    @property
    def packed(self) -> Packed:
        """The planes, checked.  Raises BadArtifact where a buffer holds what no stage writes."""
        shape = (self.out_features, self.in_features)
        shared = self._shared[0]
        return Packed(shape, _planes(self, self.stage.layout(shape)), None if shared is None else shared.packed)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The decoded weight: dtype[out, in]."""
        return self.stage.decode(self.packed).to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return _keeping_dtypes(self, fn, super()._apply, recurse)

    def extra_repr(self) -> str:
        """Sizes and stage, for `print(model)`."""
        return f"{self.out_features} x {self.in_features}, {self.stage.brief()}"


class SharedPlanes(nn.Module):
    """The planes that all weights of a model share."""

    def __init__(self, stage: Stage, stored: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.stage = stage
        _hang(self, stored)

    @property
    def packed(self) -> Packed:
        """The planes, checked as those of a weight are."""
        return Packed((0, 0), _planes(self, self.stage.shared_layout()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return _keeping_dtypes(self, fn, super()._apply, recurse)


class PackedLinear(nn.Module):
    """x -> x W^T + bias, W decoded for each call; in the place of torch's Linear or GPT-2's Conv1D.  No gradient for W."""

    bias: torch.Tensor | None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        """Inputs, as torch's Linear says."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """Outputs, as torch's Linear says."""
        return self.weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float[..., in].  Returns [..., out] in x's dtype; W is decoded to float32 and rounded to that dtype."""
        return nn.functional.linear(x, self.weight.dense(x.dtype), self.bias)


class PackedEmbedding(nn.Module):
    """ids -> rows of W, decoded for each call; `like` holds the dtype that the model computes in."""

    like: torch.Tensor

    def __init__(self, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int[...].  Returns [..., size]."""
        return nn.functional.embedding(ids, self.weight.dense(self.like.dtype))


def _hang(module: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Register tensors as buffers; a dotted name makes modules on the way."""
    for name, tensor in stored.items():
        *way, leaf = name.split(".")
        owner = module
        for part in way:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, tensor)


def _planes(module: nn.Module, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[Plane, ...]:
    return tuple(Plane.from_stored(name, coding, shape, module.get_buffer(name)) for name, (coding, shape) in layout.items())


def _keeping_dtypes(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], apply: Any, recurse: bool) -> Any:
    """nn.Module._apply that lets buffers follow to another device, and never to another dtype: planes are not numbers."""
    kept = dict(module.named_buffers())
    apply(fn, recurse)
    for name, tensor in kept.items():
        moved = module.get_buffer(name)
        if moved.dtype != tensor.dtype:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, tensor.to(moved.device))
    return module
