"""Student layers: what a compressed linear layer becomes while it is trained.

A `Student` computes in its forward pass with what `packed` would store of it, so that what is trained is what is loaded
back from disk.  There are three: `bitlinear.BitLinear` trains the weights themselves, straight through their rounding;
`PlaneLinear` the float planes of a stage, while its integers stay; `GainLinear` those of codes along a trellis, which need
not be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .. import stages
from ..artifact import Artifact
from ..errors import BadInput
from ..models import absent
from ..planes import Packed, Plane
from ..stages import Stage
from ..stages.tcq import TCQ

STILL = "still"  # the name of `GainLinear.still`


class Student(nn.Module):
    """A linear layer that learns through a stage.  stage: the one that decodes what `packed` gives."""

    stage: Stage
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias: float[..., in] -> float[..., out]."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def dense(self) -> torch.Tensor:
        """The weight that the planes decode to, float32[out, in], as a function of what is trained."""
        raise NotImplementedError

    def packed(self) -> Packed:
        """The planes of the forward pass."""
        raise NotImplementedError


_S = TypeVar("_S", bound=Student)


def layers_of(module: nn.Module, kind: type[_S]) -> Iterator[tuple[str, _S]]:
    """Name and layer of every student of this kind in `module`."""
    for name, layer in module.named_modules():
        if isinstance(layer, kind):
            yield name, layer


def straight_through(value: torch.Tensor, quantised: torch.Tensor, blend: float = 1.0) -> torch.Tensor:
    """value + blend (quantised - value), with a derivative of one with respect to `value`, whatever the blend; at blend 1 it
    is `quantised` to the last bit.  Same shapes."""
    return _StraightThrough.apply(value, quantised, blend)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: torch.Tensor, quantised: torch.Tensor, blend: float) -> torch.Tensor:
        """Between value and quantised."""
        quantised = quantised.to(value.dtype)
        return quantised if blend == 1.0 else torch.lerp(value, quantised, blend)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The identity for `value`; the quantised one is a function of it, and gets none."""
        return gradient, None, None


class PlaneLinear(Student):
    """A linear layer made from `layer` (nn.Linear or Conv1D) and the planes of its weight: codebooks, scales, means and
    minima are trained, as they would be stored (a half float is rounded to a half float, straight through).

    floats: the float planes, float32, by their names, in units of each plane's root mean square: what is trained.  (Stages
    store scales in units that suit half floats, a thousand times those of the weights; one learning rate has to serve all.)
    """

    read: Callable[[], Packed]

    def __init__(self, layer: nn.Module, stage: Stage, packed: Packed) -> None:
        super().__init__()
        if packed.shared is not None:
            raise BadInput(f"recovery: {stage} shares its codebooks between layers; train with shared=false")
        self.stage, self.read = stage, lambda: packed
        self.bias = getattr(layer, "bias", None)
        planes = packed.floats
        self.dtypes = {name: packed[name].dtype for name in planes}
        # A power of two, so that what is not trained comes back to the last bit.
        self.unit = {name: 2.0 ** round(math.log2(max(float(v.square().mean()), 1e-30)) / 2) for name, v in planes.items()}
        self.floats = nn.ParameterDict({name: nn.Parameter(v / self.unit[name]) for name, v in planes.items()})

    weight = property(lambda self: self.dense())  # for modules that read it instead of calling the layer

    def values(self) -> dict[str, torch.Tensor]:
        """The float planes as they would be stored, straight through."""
        now = {name: self.floats[name] * unit for name, unit in self.unit.items()}
        return {name: straight_through(v, v.detach().to(self.dtypes[name]).float()) for name, v in now.items()}

    def dense(self) -> torch.Tensor:
        """The weight, as a function of the floats."""
        return self.stage.dense(self.read(), self.values())

    def packed(self) -> Packed:
        """The planes with the floats as they are now."""
        now = {name: v.detach().cpu().to(self.dtypes[name]) for name, v in self.values().items()}
        packed = self.read()  # planes that are handed on as they are need not be coded again
        planes = (Plane(p.name, now[p.name], p.coding) if p.name in now else p for p in packed)
        return Packed(packed.shape, tuple(planes))


class GainLinear(PlaneLinear):
    """A linear layer made from `layer` (nn.Linear or Conv1D), whose codes along a trellis stay and need not be in memory.

    y_r = gain_r * step * (still x)_r + bias_r: as outputs are multiplied, and not weights, no gradient of a matrix is
    computed, which is a third of all products.

    read: gives the planes, each time.  still: the multiples of the step, float32[out, in]; absent until somebody puts
    `multiples()` there.
    """

    stage: TCQ

    def __init__(self, layer: nn.Module, stage: TCQ, read: Callable[[], Packed]) -> None:
        def planes() -> Packed:
            found = read()
            ones = torch.ones(found.shape[0], dtype=torch.float16)
            return found if stage.gains else Packed(found.shape, (*found, Plane("gains", ones, "float16")))

        first = planes()
        super().__init__(layer, replace(stage, gains=True), first)
        self.read = planes
        self.still = nn.Parameter(absent(first.shape), requires_grad=False)

    def multiples(self) -> torch.Tensor:
        """What `still` is to hold."""
        return replace(self.stage, gains=False).dense(self.read(), {"step": torch.tensor([self.unit["step"]])})

    def factors(self) -> torch.Tensor:
        """What the rows of `still` are multiplied by, float32[out], as a function of the floats."""
        found: torch.Tensor = self.values()["gains"] * self.floats["step"]
        return found

    def dense(self) -> torch.Tensor:
        """The weight, as a function of the floats."""
        return self.still * self.factors()[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias: float[..., in] -> float[..., out]."""
        y = nn.functional.linear(x, self.still)
        scaled = y * self.factors()
        return (scaled if self.bias is None else scaled + self.bias).to(y.dtype)


def put_codes(artifact: Artifact, module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """Put `GainLinear` in the place of the layers of `module` that the artifact encodes.  Gives what is to be put into each
    absent parameter, by its name.

    Raises BadInput if a weight is encoded by another stage than tcq.
    """
    layers = dict(module.named_modules())
    for row in artifact.rows:
        if row["stage"]:
            owner, stage = row["name"].removesuffix(".weight"), stages.from_json(row["stage"])
            if not isinstance(stage, TCQ):
                raise BadInput(f"recovery: {stage} has no codes along a trellis; name the stage, or start with tcq")
            read = cast(Callable[[], Packed], partial(artifact.read, row))
            module.set_submodule(owner, GainLinear(layers[owner], stage, read))
    return {f"{name}.{STILL}": layer.multiples for name, layer in layers_of(module, GainLinear)}
