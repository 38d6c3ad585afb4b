"""Layers that hold a weight as its planes, of any stage, and compute from them.

Nothing dense is kept: a model takes the memory of its planes, and, if no kernel reads them directly, of one decoded part
of a weight at a time (of a whole weight with curves, whose segments know no rows).
State dictionaries name the planes as an artifact does (`...q_proj.weight.codes`), and hold the tensors that are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..bits import FLOATS
from ..errors import BadInput
from ..models import as_stored
from ..planes import Packed, Plane, is_coded
from ..stages import Stage
from ..stages.refined import Refined
from ..tensorfiles import trim
from . import forms, packed_cpu
from .forms import Loaded, Ready

# What modules read of a weight, beside device, dtype and shape.  (Planes have names that tensors have, too, such as min.)
READ = {*["T", "mT", "t", "transpose", "view", "reshape", "unsqueeze", "chunk", "split", "detach", "data", "size", "dim"]}
# What modules that compute in this thread have decoded, by the module's id and the tensor's name.
_decoded: ContextVar[Mapping[tuple[int, str], torch.Tensor]] = ContextVar("decoded", default={})  # noqa: B039 (never changed)


class Fixed(nn.Module):
    """A module whose buffers follow to another device, and never to another dtype (but `like`, which holds the model's).

    _ready: what was made of the buffers; they are looked at again after they were loaded or moved.
    """

    _ready: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}  # a copy has buffers of its own, at other addresses

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._ready = None
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype and name != "like":
                self._buffers[name] = tensor.to(moved.device)
        return self


class Readable(Fixed):
    """A weight that is a tensor to modules that read the weight of a layer, instead of calling the layer: it says device,
    dtype and shape, and is made dense, by `as_tensor`, for what else torch does with it.

    like: empty, in what the model computes in.  Some modules round what they multiply to the dtype that a weight says.
    """

    like: torch.Tensor

    def __init__(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """stored: what is on disk, by name."""
        super().__init__()
        self._buffers.update(stored)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def shape(self) -> torch.Size:
        """As the model has it."""
        raise NotImplementedError

    def as_tensor(self) -> torch.Tensor:
        """The dense weight, of this shape and dtype."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, as its other weights say."""
        return self.like.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.endswith("_") and not name.startswith("_") and hasattr(torch.Tensor, name):
                raise BadInput(
                    f"packed weights: a module changes them in place ({name}), which planes cannot; load with runtime=dense"
                ) from None
            if name not in READ:
                raise
            return getattr(self.as_tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Readable, lambda weight: weight.as_tensor(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __matmul__(self, other: Any) -> Any:
        return self.as_tensor() @ other

    def __getitem__(self, index: Any) -> Any:
        return self.as_tensor()[index]


class PackedWeight(Readable):
    """A weight float[out, in] as the planes of a stage, from which products are computed.

    Buffers: a plane each, as stored (`Plane.stored`), under its name.

    Planes are checked when they are first used, and again after they were loaded or moved.  If they are entropy-coded or
    refined, or in 3, 5, 6 or 7 bits, they are kept a second time, as packed integers, and `resident_bytes` counts both.
    With the entropy code decoded at each call, SmolLM2 at 4 bits gave 0.19 tokens per second; with this copy, 70.

    Nothing is decoded ahead in another thread: on two cores decoding the next layer during this one's product saved 6 to
    10% of the linear layers' time for 512 tokens (rounding, trajectory, vptq), for a second decoded weight.
    """

    def __init__(
        self,
        stage: Stage,
        shape: tuple[int, int],
        stored: Mapping[str, torch.Tensor],
        shared: SharedPlanes | None = None,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        """stored: the planes by name, in the order of `stage.layout(shape)`.  shared: those that all weights share.  dtype:
        what the model computes in.  transposed: whether the model has it as [in, out]."""
        super().__init__(stored, dtype)
        self.stage, self.out_features, self.in_features, self.transposed = stage, shape[0], shape[1], transposed
        self._shared = (shared,)  # in a tuple: it belongs to the model, not to each weight

    @property
    def packed(self) -> Packed:
        """The planes, checked.  Raises BadArtifact if a buffer holds what no stage writes."""
        shape = (self.out_features, self.in_features)
        shared = self._shared[0]
        return Packed(shape, _planes(self, self.stage.layout(shape)), None if shared is None else shared.packed)

    @property
    def ready(self) -> Ready:
        """The planes as products need them, checked once.  Raises BadArtifact as `packed` does."""
        if self._ready is None:
            stage, packed, shared = self.stage, self.packed, self._shared[0]
            plain = None if shared is None else shared.plain
            if isinstance(stage, Refined):
                packed = stage.unrefine(packed, stage.first.layout(packed.shape))
                stage = stage.first
            packed = Packed(packed.shape, packed.planes, plain)
            layout = self.stage.layout(packed.shape)
            grid, loaded = forms.of_codes(stage, packed), {}
            if grid is None:
                stage.decode(packed)  # the stage's own checks
                for plane in packed:
                    fill = forms.fill_words(stage, plane)
                    if is_coded(layout[plane.name][0]) or (fill and plane.coding not in ("uint2", "uint4", "uint8")):
                        loaded[plane.name] = _loaded(plane, fill)
                    else:  # the buffer itself
                        loaded[plane.name] = Loaded(plane.coding, tuple(plane.values.shape), self.get_buffer(plane.name))
                grid = forms.of_planes(stage, packed.shape, loaded)
            about = stage.row_blocks(packed.shape)
            self._ready = Ready(stage, packed.shape, loaded, plain, *about, forms.book(stage, packed), grid)
            if any(is_coded(coding) for coding, _ in layout.values()):
                del packed
                trim()  # else what was decoded on the way stays: a gigabyte, of 210 weights
        return self._ready  # type: ignore[no-any-return]

    @property
    def shape(self) -> torch.Size:
        """As the model has it."""
        rows, columns = self.out_features, self.in_features
        return torch.Size((columns, rows) if self.transposed else (rows, columns))

    def as_tensor(self) -> torch.Tensor:
        """The decoded weight, of this shape and dtype."""
        found = self.dense(self.dtype)
        return found.T if self.transposed else found

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The decoded weight: dtype[out, in]."""
        out = torch.empty(self.ready.shape, dtype=dtype, device=self.device)
        for first, last in self.ready.parts():
            out[first:last] = self.ready.rows(first, last)
        return out

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T in x's dtype, x: float[..., in].

        Up to `forms.FEW` vectors are multiplied with the bits themselves if the stage and the machine have a kernel (see
        `packed_cpu`; in float32).  Else W is decoded to float32 a part after the other, each rounded to x's dtype.
        """
        ready = self.ready
        found = forms.product(ready, x.reshape(-1, self.in_features))
        if found is not None:
            return found.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return torch.cat([nn.functional.linear(x, ready.rows(*part).to(x.dtype)) for part in ready.parts()], dim=-1)

    def lines(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight, dtype[..., in] for ids: int[...]; only the parts that hold some of them are decoded."""
        ready = self.ready
        size, out = ready.size(1), torch.empty((*ids.shape, self.in_features), dtype=dtype, device=ids.device)
        parts = ids // size
        for part in parts.unique().tolist():
            here, first = parts == part, part * size
            out[here] = ready.rows(first, min(first + size, self.out_features)).to(dtype)[ids[here] - first]
        return out

    def extra_repr(self) -> str:
        """Sizes and stage, for `print(model)`."""
        return f"{self.out_features} x {self.in_features}, {self.stage.brief()}"


class SharedPlanes(Fixed):
    """The planes that all weights of a model share."""

    def __init__(self, stage: Stage, stored: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.stage = stage
        self._buffers.update(stored)

    @property
    def packed(self) -> Packed:
        """The planes, checked as those of a weight are."""
        return Packed((0, 0), _planes(self, self.stage.shared_layout()))

    @property
    def plain(self) -> Packed:
        """The planes without refinements, floats as float32, checked once."""
        if self._ready is None:
            packed = self.packed
            if isinstance(self.stage, Refined):
                packed = self.stage.unrefine(packed, self.stage.first.shared_layout())
            floats = packed.floats
            planes = (Plane(p.name, floats[p.name], "float32") if p.name in floats else p for p in packed)
            self._ready = Packed(packed.shape, tuple(planes))
        return self._ready  # type: ignore[no-any-return]


class PackedLinear(nn.Module):
    """x -> x W^T + bias from the planes of W; in place of torch's Linear or GPT-2's Conv1D.  No gradient."""

    bias: torch.Tensor | None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float[..., in].  Returns [..., out] in x's dtype; see `PackedWeight.product`."""
        out = self.weight.product(x)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class PackedEmbedding(nn.Module):
    """ids -> rows of W, from its planes."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int[...].  Returns [..., size]."""
        return self.weight.lines(ids, self.weight.dtype)


class Half(Readable):
    """A token embedding or an output head whose matrix stays in 16 bits.  dtype: what the model computes in."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__({"weight": weight.detach()}, dtype)

    @property
    def weight(self) -> Half:
        """Itself, to modules that read it."""
        return self

    @property
    def shape(self) -> torch.Size:
        """As the model has it."""
        return self._stored.shape

    def as_tensor(self) -> torch.Tensor:
        """The matrix in what the model computes in."""
        return self._stored.to(self.dtype)

    @property
    def _stored(self) -> torch.Tensor:
        return cast(torch.Tensor, self._buffers["weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix for ids, x: int[...]; their products with vectors, in x's dtype, for x: float[..., in]."""
        return self.product(x) if x.is_floating_point() else nn.functional.embedding(x, self._stored).to(self.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T in x's dtype, x: float[..., in]."""
        return packed_cpu.half(x, self._stored)

    def extra_repr(self) -> str:
        """Shape and dtype, for `print(model)`."""
        return f"{list(self._stored.shape)}, {str(self._stored.dtype).removeprefix('torch.')}"


class TiedHead(nn.Module):
    """The output head whose weight is that of an embedding, which alone holds it."""

    def __init__(self, weight: PackedWeight | Half, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._weight = (weight,)  # in a tuple, so that state dictionaries have its planes once
        self.bias = bias

    @property
    def weight(self) -> PackedWeight | Half:
        """The embedding's, to modules that read it."""
        return self._weight[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float[..., in].  Returns [..., vocabulary] in x's dtype."""
        out = self.weight.product(x.to(self.weight.device)).to(x.device)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class WithPacked(nn.Module):
    """A module with packed tensors.  packed_shapes: of each, by name."""

    packed_shapes: dict[str, tuple[int, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with packed tensors decoded to the dtype of the input, or to the model's if that is no float."""
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        like = next(inputs, None)
        found = dict(_decoded.get())
        for name, shape in self.packed_shapes.items():
            weight = self._modules[name]
            assert isinstance(weight, PackedWeight)
            dense = weight.dense(weight.dtype if like is None else like.dtype)
            found[id(self), name] = as_stored(dense, shape, weight.transposed)
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

    return type(f"Packed{own.__name__}", (WithPacked, own), {name: tensor(name) for name in names})


def pack_parameter(module: nn.Module, name: str, weight: PackedWeight, shape: Sequence[int]) -> None:
    """Put `weight` in place of the module's parameter `name`, which has this shape; its class becomes a `WithPacked`."""
    own: Any = type(module)
    packed_shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, WithPacked):
        own, packed_shapes = type(module).__bases__[1], module.packed_shapes
    del module._parameters[name]
    module._modules[name] = weight
    packed_shapes = {**packed_shapes, name: tuple(shape)}
    module.__class__ = _class_of(own, tuple(packed_shapes))
    cast(WithPacked, module).packed_shapes = packed_shapes


def resident_bytes(model: nn.Module) -> int:
    """Bytes that a model holds between two calls: parameters, buffers, and what packed weights keep beside their buffers."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, PackedWeight) and module._ready is not None:
            tensors += module._ready.tensors
        elif isinstance(module, SharedPlanes) and module._ready is not None:
            tensors += [plane.values for plane in module._ready]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _planes(module: nn.Module, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[Plane, ...]:
    return tuple(Plane.from_stored(name, coding, shape, module.get_buffer(name)) for name, (coding, shape) in layout.items())


def _loaded(plane: Plane, fill: bool) -> Loaded:
    """A plane that is not stored as it is used: floats as they are, integers in as many bits as the largest one takes.

    fill: whether they have to fill words, which they do in 1, 2, 4, 8 or 16 bits.
    """
    kind = plane.coding.lstrip("~")
    if kind not in FLOATS and kind != "trit":
        width = max(1, int(plane.values.max()).bit_length())
        kind = f"uint{1 << (width - 1).bit_length() if fill else width}"
    plane = Plane(plane.name, plane.values, kind)
    return Loaded(kind, tuple(plane.values.shape), plane.stored())
