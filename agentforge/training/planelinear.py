"""PlaneLinear: a linear layer that decodes from planes whose floats can be trained, while their integers stay.

The floats are codebooks, scales, means and minima.  The forward pass decodes with them as they would be stored (a half
float is rounded to a half float, straight through), so that what is trained is what is loaded back from disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from .. import stages
from ..artifact import Artifact
from ..errors import BadInput
from ..folders import remove
from ..models import LanguageModel
from ..pipeline import compress
from ..planes import Packed, Plane
from .bitlinear import straight_through


class PlaneLinear(nn.Module):
    """A linear layer made from `layer` (nn.Linear or Conv1D) and the planes of its weight.

    floats: the float planes, float32, by their names, in units of each plane's root mean square: what is trained.  (Stages
    store scales in units that suit half floats, a thousand times those of the weights; one learning rate has to serve all.)
    """

    def __init__(self, layer: nn.Module, stage: stages.Stage, packed: Packed) -> None:
        super().__init__()
        if packed.shared is not None:
            raise BadInput(f"recovery: {stage} shares its codebooks between layers; train with shared=false")
        self.stage, self.codes = stage, packed
        self.transposed = type(layer).__name__ == "Conv1D"
        self.bias: nn.Parameter | None = getattr(layer, "bias", None)
        planes = packed.floats
        # A power of two, so that what is not trained comes back to the last bit.
        self.unit = {name: 2.0 ** round(math.log2(max(float(v.square().mean()), 1e-30)) / 2) for name, v in planes.items()}
        self.floats = nn.ParameterDict({name: nn.Parameter(v / self.unit[name]) for name, v in planes.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias: float[..., in] -> float[..., out]."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def dense(self) -> torch.Tensor:
        """The weight that the planes decode to, float32[out, in], as a function of the floats."""
        floats = {}
        for name, unit in self.unit.items():
            value = self.floats[name] * unit
            floats[name] = straight_through(value, value.detach().to(self.codes[name].dtype).float())
        return self.stage.dense(self.codes, floats)

    def packed(self) -> Packed:
        """The planes with the floats as they are now."""
        planes = [
            Plane(
                plane.name,
                (self.floats[plane.name].detach().cpu() * self.unit[plane.name]).to(plane.values.dtype),
                plane.coding,
            )
            if plane.name in self.unit
            else plane
            for plane in self.codes
        ]
        return Packed(self.codes.shape, tuple(planes))


def plane_linears(module: nn.Module) -> Iterator[tuple[str, PlaneLinear]]:
    """Name and layer of every PlaneLinear in `module`."""
    for name, layer in module.named_modules():
        if isinstance(layer, PlaneLinear):
            yield name, layer


def to_planes(
    module: nn.Module,
    model: LanguageModel,
    stage: stages.Stage,
    names: Iterable[str],
    start: Artifact | str | Path | None,
    folder: Path,
) -> None:
    """Replace the layers of the weights `names` by PlaneLinear, in place.

    start: an artifact of `model` with this stage; without one it is made in `folder`, which is removed again.
    """
    if not stage.trains_floats():
        able = [name for name in stages.names() if type(stages.get(name)).trains_floats()]
        raise BadInput(
            f"recovery: {stage.name} has no float planes that can be trained; choose from {', '.join(['ternary', *able])}"
        )
    if start is None:
        artifact = compress(model, stage, folder, overwrite=True)
    else:
        artifact = start if isinstance(start, Artifact) else Artifact(start)
        if artifact.manifest["recipe"]["stage"] != stage.to_json():
            raise BadInput(f"{artifact.path}: was not made with {stage}; pass the stage it was made with")
    rows = {row["name"]: row for row in artifact.rows if row["stage"]}
    layers = dict(module.named_modules())
    for name in names:
        packed = artifact.read(rows[name])
        assert isinstance(packed, Packed)
        owner = name.removesuffix(".weight")
        parent, _, leaf = owner.rpartition(".")
        setattr(layers[parent], leaf, PlaneLinear(layers[owner], stage, packed))
    if start is None:
        remove(folder)
