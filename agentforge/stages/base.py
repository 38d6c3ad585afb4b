"""The Stage contract: settings in, planes out, and back.

A stage is a frozen dataclass of its settings.  `encode` and `decode` here hold what is the same for every stage (the
checks); a stage file has `_check`, `_encode` and `_decode`, to be read beside its paper.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from ..errors import BadInput
from ..planes import Packed, Plane

SAMPLED = 96  # rows that a price is estimated from
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REGISTRY: dict[str, type[Stage]] = {}
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (coding, shape) of each plane, in order
_S = TypeVar("_S", bound="type[Stage]")


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Second moments of a layer's inputs.  hessian: E[x x^T], float32[in, in].  n: tokens that were averaged over.

    sensitivity: E[g_i^2], float32[out], g the gradient in the layer's outputs of the log-likelihood, summed over a window,
    of tokens that the model itself predicts: the diagonal of Fisher's information, and of the curvature of
    KL(model || changed model) in these outputs.  None where it was not asked for.

    curvature: E[g g^T] of the outputs of one attention head, float32[heads, size, size], for queries and keys: of other
    layers too few tokens are seen to know more than the diagonal.
    """

    hessian: torch.Tensor
    n: int
    sensitivity: torch.Tensor | None = None
    curvature: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As arrays: torch would hand its tensors over in this machine's shared memory."""
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An array that came from another process may be read-only, which torch does not know."""
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        vars(self).update(state, **{n: torch.from_numpy(np.require(a, requirements="W")) for n, a in arrays.items()})

    @property
    def diagonal(self) -> torch.Tensor:
        """E[x_j^2] of each input: float32[in]."""
        return self.hessian.diagonal()

    def check(self, shape: tuple[int, int], name: str) -> None:
        """Raise BadInput if this is not what a weight of this shape, [out, in], needs."""
        rows, columns = shape
        if tuple(self.hessian.shape) != (columns, columns):
            raise BadInput(f"{name}: has {columns} inputs, its statistics are {list(self.hessian.shape)}")
        if self.sensitivity is not None and tuple(self.sensitivity.shape) != (rows,):
            raise BadInput(f"{name}: has {rows} outputs, its sensitivity is {list(self.sensitivity.shape)}")
        if self.curvature is not None and self.curvature.shape[0] * self.curvature.shape[1] != rows:
            raise BadInput(f"{name}: has {rows} outputs, their curvature is {list(self.curvature.shape)}")
        found = [self.hessian, self.sensitivity, self.curvature]
        if not all(torch.isfinite(moments).all() for moments in found if moments is not None):
            raise BadInput(f"{name}: its statistics hold values that are not finite; is the model sound on this text?")


class Layer(NamedTuple):
    """A weight as `Stage.fit_shared` sees it.  load: gives float32[out, in]."""

    name: str
    load: Callable[[], torch.Tensor]
    stats: InputStatistics | None


def damage(weight: torch.Tensor, decoded: torch.Tensor, stats: InputStatistics) -> float:
    """1/2 tr(G E H E^T) of E = decoded - weight, float[out, in]: predicted KL divergence, nats per token.

    Without a sensitivity, G is the identity: not nats, but still in proportion to what the outputs lose.  With a curvature,
    it has one block per head.
    """
    error = decoded.double() - weight.double()
    through = error @ stats.hessian.double()
    if stats.curvature is not None:
        heads = stats.curvature.shape[:2]
        of_heads = through.unflatten(0, heads) @ error.unflatten(0, heads).mT
        return float((of_heads * stats.curvature.double()).sum()) / 2
    lost = (through * error).sum(1)
    if stats.sensitivity is not None:
        lost = lost * stats.sensitivity.double()
    return float(lost.sum()) / 2


def represented(loudness: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows in the order of their loudness, float[out], cut into `SAMPLED` parts: the rows of each part, and the one in its
    middle that stands for them."""
    parts = np.array_split(np.argsort(loudness, kind="stable"), SAMPLED)
    return parts, np.array([part[len(part) // 2] for part in parts])


@dataclass(frozen=True)
class Stage:
    """One way to encode a weight.  Subclasses add settings as fields and a class variable `name`."""

    name: ClassVar[str]
    uses_gpu: ClassVar[bool] = False  # whether `_encode` has kernels for a weight on a GPU, with the CPU's results
    trains: ClassVar[Literal["", "weights", "floats"]] = ""  # what training moves: see `training.student`

    @property
    def needs_statistics(self) -> bool:
        """Whether these settings make use of `stats`, so that a model has to be calibrated first."""
        return False

    @property
    def needs_sensitivity(self) -> bool:
        """Whether they make use of `stats.sensitivity`, too, which takes backward passes."""
        return False

    def encode(
        self,
        weight: torch.Tensor,
        stats: InputStatistics | None = None,
        seed: int = 0,
        *,
        name: str = "weight",
        shared: Packed | None = None,
    ) -> Packed:
        """Encode `weight`, float[out, in], into planes.

        stats: the layer's input statistics from calibration text, for stages that use them.  seed: for stages that draw
        random numbers.  name: the tensor's name, for messages.  shared: what `fit_shared` gave, for stages that share
        planes between weights.  Same arguments, same planes, bit for bit, whatever the number of threads.

        A weight on a GPU is searched there by the stages that can (SeedLM's seeds, VPTQ's k-means); the planes are the same.

        Raises BadInput for settings out of range, for a weight that is not a finite, non-empty float matrix, and for
        statistics of another size.
        """
        values = self._checked(weight, stats, name)
        if not self.shared_layout():
            # Handed over, not lent: if the caller keeps no reference either, `_encode` may drop the only one.
            handed = [values]
            del weight, values
            return self._encode(handed.pop(), stats, seed)
        if shared is None:
            raise BadInput(f"{name}: {self.name} shares planes between weights; compress a model, or pass fit_shared's")
        packed = self._encode_shared(values, stats, seed, shared)
        return Packed(packed.shape, packed.planes, shared)

    def _checked(self, weight: torch.Tensor, stats: InputStatistics | None, name: str) -> torch.Tensor:
        """The weight as `_encode` takes it, float32, contiguous.  Raises BadInput as `encode` does."""
        self.check()
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.numel() == 0:
            shape = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise BadInput(f"{name}: expected a non-empty matrix [out, in], found {shape}")
        if weight.dtype not in FLOAT_DTYPES:
            raise BadInput(f"{name}: expected a float dtype, found {weight.dtype}")
        values = weight.detach().to(weight.device if self.uses_gpu else "cpu", torch.float32).contiguous()
        low, high = torch.aminmax(values)  # either is NaN if any value is; faster than asking each
        if not math.isfinite(float(low)) or not math.isfinite(float(high)):
            nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
            raise BadInput(
                f"{name}: {nan} NaN and {inf} infinite values among {values.numel()} "
                "(float32); fix the weight or leave it out"
            )
        if stats is not None:
            stats.check((weight.shape[0], weight.shape[1]), name)
        return values

    def price(
        self, weight: torch.Tensor, stats: InputStatistics, name: str, scratch: dict[str, Any]
    ) -> tuple[int, float, bool]:
        """What this stage would cost: bytes of planes on disk, `damage`, and whether the bytes were counted, not estimated.

        weight: float32[out, in].  scratch: where a stage leaves what it need not find out again about the same weight.
        Raises BadInput as `encode` does.
        """
        packed = self.encode(weight, stats, name=name)
        lost = damage(weight.cpu(), self.decode(packed).cpu(), stats)
        return sum(plane.stored().nbytes for plane in packed), lost, True

    def between(self, other: Stage, share: float) -> Stage | None:
        """The stage that is this share of the way to another one, if there are settings between theirs."""
        return None

    def fit_shared(self, layers: Sequence[Layer], seed: int = 0) -> Packed:
        """The planes that all these layers share, as `shared_layout` says.

        layers: name, function that loads the weight, and statistics or None, of each.  Deterministic, as `encode` is.
        """
        raise NotImplementedError

    def decode(self, packed: Packed) -> torch.Tensor:
        """The weight that the planes stand for: float32[out, in]."""
        return self._decode(packed)

    def dense(self, packed: Packed, floats: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`decode` with other values in the float planes, float32 tensors by name, as a differentiable function of these.

        Only stages that train their float planes have it.
        """
        raise NotImplementedError

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Coding and shape of each plane that `encode` gives for a weight of this shape.

        A reader checks a file against it before it allocates anything.
        """
        raise NotImplementedError

    def packed(self, shape: tuple[int, int], planes: Mapping[str, Any], exponent: int | None = None) -> Packed:
        """The planes of `layout`, of tensors or arrays by name.  exponent: of `power_of_two_exponent`, if there is one, as a
        plane of one byte."""
        if exponent is not None:
            planes = {**planes, "exponent": torch.tensor([exponent + 128], dtype=torch.uint8)}
        values = {name: torch.as_tensor(planes[name]).contiguous() for name in self.layout(shape)}
        return Packed(shape, tuple(Plane(name, values[name], coding) for name, (coding, _) in self.layout(shape).items()))

    def row_blocks(self, shape: tuple[int, int]) -> tuple[int, dict[str, int]]:
        """How many rows can be decoded without the others, and how many values of each plane belong to them; planes that
        are not named are needed for all.  Such a part decodes as a weight of its own.  (0, {}): only all rows together can.
        """
        return 0, {}

    def shared_layout(self) -> Layout:
        """Coding and shape of each plane that all weights of a model share; empty if the stage shares none."""
        return {}

    def check(self) -> None:
        """Raise BadInput if a setting has the wrong type or is out of range."""
        hints = setting_types(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if typing.get_origin(hint) is typing.Literal:
                choices = typing.get_args(hint)
                if value not in choices:
                    raise BadInput(f"{self.name}: {field.name}={value!r}; expected one of {', '.join(map(str, choices))}")
            elif hint is float and not _finite(value):
                raise BadInput(f"{self.name}: {field.name}={value!r}; expected a finite number")
            elif hint in (int, bool) and type(value) is not hint:
                raise BadInput(f"{self.name}: {field.name}={value!r}; expected {hint.__name__}")
        self._check()

    def to_json(self) -> dict[str, Any]:
        """The stage's name and all its settings, ready for `from_json`."""
        return {"stage": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items())
        return f"{self.name}:{settings}" if settings else self.name

    def brief(self) -> str:
        """The stage's text without the settings that are at their defaults, which `parse` takes back."""
        usual = type(self)()
        pairs = [(key, value) for key, value in dataclasses.asdict(self).items() if value != getattr(usual, key)]
        return self.name + (":" + ",".join(f"{key}={value}" for key, value in pairs) if pairs else "")

    def _check(self) -> None:
        """Ranges and combinations of settings; overridden if there are any."""

    def _expect(self, right: bool, setting: str, expected: str) -> None:
        """Raise BadInput if the setting is not right."""
        if not right:
            raise BadInput(f"{self.name}: {setting}={getattr(self, setting)}; expected {expected}")

    def _encode(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int) -> Packed:
        raise NotImplementedError

    def _encode_shared(self, weight: torch.Tensor, stats: InputStatistics | None, seed: int, shared: Packed) -> Packed:
        raise NotImplementedError

    def _decode(self, packed: Packed) -> torch.Tensor:
        raise NotImplementedError


def register(cls: _S) -> _S:
    """Class decorator: makes a stage known under its `name`."""
    REGISTRY[cls.name] = cls
    return cls


# The types of a stage's settings, by name: evaluating annotations takes longer than decoding a small weight.
setting_types: Callable[[Any], dict[str, Any]] = cache(typing.get_type_hints)


def _finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max
