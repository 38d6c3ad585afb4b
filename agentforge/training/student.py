"""Student layers: what a compressed linear layer becomes while it is trained.

A `Student` computes in its forward pass with what `packed` would store of it, so that what is trained is what is loaded
back from disk.  There are four: `bitlinear.BitLinear` trains the weights themselves, straight through their rounding;
`PlaneLinear` the float planes of a stage, while its integers stay; `GainLinear` those of codes along a trellis, which need
not be in memory; `CodeLinear` the codes of entropy-coded quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .. import stages
from ..artifact import Artifact
from ..bits import unzigzag, zigzag
from ..errors import BadInput
from ..models import LanguageModel, absent
from ..planes import FLOAT32_MAX, Packed, Plane
from ..stages import Stage
from ..stages.ecsq import ECSQ, LARGEST, factors
from ..stages.tcq import TCQ

STILL = "still"  # the name of `GainLinear.still`
SPAN = 5.0  # steps in a unit of the latent parameter: one learning rate serves codes, gains and norms
# Of a step, between a latent value and the border of its code at the start.  The fitted codes make up for each other's
# errors: with a small margin, noise in the first steps of training turns over the codes at the border and undoes that.  With
# this one a code changes only after the gradients of many steps have agreed on it.
MARGIN = 0.2


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

    def packed(self, shrink: float = 1.0) -> Packed:
        """The planes of the forward pass.  shrink: a factor for trained codes first, which makes them smaller."""
        raise NotImplementedError


_S = TypeVar("_S", bound=Student)


def layers_of(module: nn.Module, kind: type[_S]) -> Iterator[tuple[str, _S]]:
    """Name and layer of every student of this kind in `module`."""
    for name, layer in module.named_modules():
        if isinstance(layer, kind):
            yield name, layer


def within(layers: Mapping[str, Student], most: float) -> dict[str, Packed]:
    """The planes of all layers, of at most `most` bytes together: if training has made them larger, all latent values are
    shrunk by the same factor, as little as it takes to a thousandth.

    Raises BadInput if nine tenths of their size are still too large.
    """
    shrink = 1.0
    while True:
        found = {name: layer.packed(shrink) for name, layer in layers.items()}
        size = sum(plane.stored().nbytes for packed in found.values() for plane in packed) if most < math.inf else 0
        if size <= most:
            return found
        shrink -= max(0.001, 0.3 * (1 - most / size))
        if shrink < 0.9:
            raise BadInput(f"recovery: the codes take {size:,} bytes, {most:,} are allowed; lower the learning rate")


def straight_through(value: torch.Tensor, quantised: torch.Tensor, blend: float = 1.0) -> torch.Tensor:
    """value + blend (quantised - value), with a derivative of one with respect to `value`, whatever the blend; at blend 1 it
    is `quantised` to the last bit.  Same shapes."""
    result = _StraightThrough.apply(value, quantised, blend)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


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

    def packed(self, shrink: float = 1.0) -> Packed:
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


def put_codes(model: LanguageModel, artifact: Artifact, module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """Put students in the place of the layers of `module` that the artifact encodes: `GainLinear` if their codes stay, else
    `CodeLinear`.  Gives what is to be put into each absent parameter, by its name.

    Raises BadInput if another weight than one of a linear layer is encoded, or by another stage.
    """
    layers, weights = dict(module.named_modules()), {weight.name: weight for weight in model.weights()}
    for row in artifact.rows:
        if row["stage"]:
            name, owner, stage = row["name"], row["name"].removesuffix(".weight"), stages.from_json(row["stage"])
            if name not in weights:
                raise BadInput(f"{artifact.path}: {name} is encoded; codes are trained in linear layers alone")
            layer, read = layers[owner], cast(Callable[[], Packed], partial(artifact.read, row))
            if isinstance(stage, TCQ):
                module.set_submodule(owner, GainLinear(layer, stage, read))
            else:
                module.set_submodule(owner, CodeLinear(layer, stage, read(), weights[name].load()))
    return {f"{name}.{STILL}": layer.multiples for name, layer in layers_of(module, GainLinear)}


class CodeLinear(Student):
    """A linear layer made from `layer` (nn.Linear or Conv1D), its weight, float[out, in], and ECSQ's planes of it.

    A weight is gain_r * step_rc * q(u_rc), q rounding to a whole number with a dead zone (`stages.ecsq`).  The steps stay as
    they were fitted.  What is trained is u, straight through q: dL/du = dL/dw * gain * step; and the gain of each row, for
    which the derivative is exact.  At the start u is the value nearest to the original weight that has the fitted code and
    keeps a distance from its border.

    latent: u / SPAN, float32[out, in].  gains: float32[out].
    """

    stage: ECSQ

    def __init__(self, layer: nn.Module, stage: Stage, packed: Packed, weight: torch.Tensor) -> None:
        super().__init__()
        if not isinstance(stage, ECSQ):
            raise BadInput(f"recovery: {stage} has other codes; codes are trained of ecsq")
        self.stage, self.planes = replace(stage, gains=True), packed
        self.bias = getattr(layer, "bias", None)
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

    weight = property(lambda self: self.dense())  # for modules that read it instead of calling the layer

    def dense(self) -> torch.Tensor:
        """The weight, as a function of latent values and gains; the gains as they would be stored, straight through."""
        gains = self.gains + (self.gains.detach().half().float() - self.gains.detach())
        found = _Codes.apply(self.latent, gains, self.rows, self.columns, self.stage.rounding)  # type: ignore[no-untyped-call]
        assert isinstance(found, torch.Tensor)
        return found

    @torch.no_grad()
    def packed(self, shrink: float = 1.0) -> Packed:
        """The planes with codes and gains as they are now."""
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
