"""Run windows through a model block by block: the weights of one block are in memory at a time, whatever their number.

Every window runs through the model's own forward pass in a thread of its own, so that nothing is assumed about the
architecture.  The threads wait for each other in front of each block: when all windows have arrived, its weights are read;
when all have passed, the memory is given back.  What a waiting window keeps is its residual stream.

A matrix that is not in memory is NaN throughout, in no bytes: if a module read it outside its own forward pass, the result
would be NaN, and could not be taken for one.
"""

from __future__ import annotations

import copy
import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .bits import tensor_bytes
from .errors import BadInput
from .models import LanguageModel, absent, cache_dir
from .tensorfiles import trim

T = TypeVar("T")
R = TypeVar("R")
Notice = Callable[[nn.Module], None]
Readers = Mapping[str, Callable[[], torch.Tensor]]

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
OWN_BLOCK = 4 << 20  # bytes from which a block is returned as soon as it is freed
OPERANDS: dict[Any, Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {
    torch.ops.aten.linear.default: lambda x, weight, bias=None: (x, weight, bias),
    torch.ops.aten.mm.default: lambda x, y: (x, y.T, None),
    torch.ops.aten.addmm.default: lambda bias, x, y: (x, y.T, bias),
}
TRIM = 8  # units after which smaller ones are: each time costs page faults


class Passes:
    """The module of a model, and how windows run through it.

    module: to hang hooks on.  Its matrices are there while their unit's turn lasts, unless the model was built before.
    blocks: of the decoder.  change: puts other modules into a copy of its own, and says how to read the parameters of these
    that are not there yet, by their names.  by_layer: layers with such parameters take turns of their own, not their blocks.
    """

    def __init__(
        self, model: LanguageModel, change: Callable[[nn.Module], Readers] | None = None, by_layer: bool = False
    ) -> None:
        self.module, hollow = model.hollow()
        self._read: dict[str, Callable[[], torch.Tensor]] = {name: partial(model.tensor, name) for name in hollow}
        self._mine, self._turns, changed = threading.local(), 0, dict[str, Any]()
        if change is not None:
            self.module = self.module if hollow else copy.deepcopy(self.module).requires_grad_(False)
            self._read |= (changed := dict(change(self.module)))
        lists = [inner for inner in self.module.modules() if isinstance(inner, nn.ModuleList)]
        nested = {inner for outer in lists for inner in list(outer.modules())[1:]}
        self.blocks = [block for outer in lists if outer not in nested for block in outer]
        inside = {inner: block for block in self.blocks for inner in block.modules()}
        # What takes its turn, and the names of its matrices: blocks, and layers outside them.
        self._units: dict[nn.Module, list[str]] = {block: [] for block in self.blocks if not by_layer}
        there = dict(self.module.named_parameters(remove_duplicate=False))
        names = {there[name]: name for name in self._read if name in there}  # a tied one has two owners
        for owner in self.module.modules():
            own = [names[tensor] for tensor in owner.parameters(recurse=False) if tensor in names]
            if by_layer and owner in inside:
                unit = owner if changed.keys() & own else None  # what is no changed layer is small
            else:
                unit = inside.get(owner, None if [*owner.children()] else owner)
            if own and unit is not None:
                self._units.setdefault(unit, []).extend(own)
            else:  # of a module that is open while others are
                self._fill(own)

    @property
    def recomputing(self) -> bool:
        """Whether this thread computes a unit once more, on its way back."""
        return getattr(self._mine, "back", False)

    @property
    def steps(self) -> int:
        """How many units there are, each of which is one step of a bar; going back takes as many again."""
        return len(self._units)

    def map(
        self,
        work: Callable[[nn.Module, T], R],
        inputs: Sequence[T],
        bar: Any = None,
        workers: int | None = None,
        passed: Notice = lambda unit: None,
        closed: Notice = lambda unit: None,
        backward: bool = False,
        within: AbstractContextManager[Any] | None = None,
        threads: int = 1,
    ) -> Iterator[R]:
        """`work(module, input)` of each input, in their order.

        bar: to be moved on at each unit (see `steps`).  workers: windows that compute at the same moment (default: one per
        core, at most 4; on a GPU one).  passed: called in a window's thread when it leaves a unit, one window after another,
        in their order.  closed: called when all of them have.  backward: `work` also goes back through the units, each of
        which is computed once more when its turn comes.  within: to be entered by each thread that computes.  threads: that
        a window computes on; 0 for its share of the cores.  On one thread the result is the same bits whatever the number of
        workers.
        """
        give_back_freed_memory()
        on_gpu = next(self.module.parameters()).device.type != "cpu"
        cores = os.cpu_count() or 1
        most = 1 if on_gpu else min(workers or cores, 4)
        gate = _Gate(self, len(inputs), most, passed, closed, bar, within or nullcontext())
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads or max(cores // min(len(inputs), most), 1))
            kept = stack.enter_context(Spill()) if backward else None
            for unit in self._units:
                stack.callback(self._turn, unit, over=True)
                stack.enter_context(unit.register_forward_pre_hook(lambda unit, _: gate.enter(unit)))
                stack.enter_context(unit.register_forward_hook(lambda unit, *_: gate.leave(unit)))
                if kept:
                    # Gone from the instance afterwards: a copy of the module would call what is bound to this one.
                    stack.callback(vars(unit).pop, "forward")
                    unit.forward = partial(_recomputed, unit, unit.forward, gate, kept, unit in self.blocks)
            pool = stack.enter_context(ThreadPoolExecutor(max(len(inputs), 1)))
            stack.callback(gate.stop)
            running = [pool.submit(gate.run, i, partial(work, self.module, one)) for i, one in enumerate(inputs)]
            while running:
                try:
                    yield running.pop(0).result()
                except _Stopped:
                    raise gate.error or AssertionError from None

    def _turn(self, unit: nn.Module, over: bool = False) -> None:
        """Read the unit's matrices; over: give their memory back."""
        self._fill(self._units[unit], over)
        self._turns += over
        if over and self._turns % TRIM == 0:
            give_back_freed_memory()

    def _fill(self, names: list[str], hollow: bool = False) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name in names:
                owner, _, leaf = name.rpartition(".")
                here = getattr(self.module.get_submodule(owner), leaf)
                here.data = absent(here.shape) if hollow else self._read[name]().to(torch.float32)


class _Stopped(Exception):
    """Another window of the same pass has ended with an error."""


class _Gate:
    """Where the windows of one `Passes.map` wait for each other."""

    def __init__(
        self, passes: Passes, windows: int, most: int, passed: Notice, closed: Notice, bar: Any, within: Any
    ) -> None:
        self.most, self.passed, self.closed, self.bar, self.within = most, passed, closed, bar, within
        self.turn, self.mine = passes._turn, passes._mine
        self.changed = threading.Condition()
        self.open: nn.Module | None = None  # the unit whose turn it is
        self.waiting: dict[int, nn.Module | None] = dict.fromkeys(range(windows))  # None: to begin
        self.inside: set[int] = set()
        self.computing = 0
        self.stopped, self.error = False, None  # type: bool, BaseException | None

    def run(self, window: int, work: Callable[[], R]) -> R:
        """The work of a window, in a thread of its own."""
        self.mine.window = window
        try:
            self._begin(None)
            with self.within, Products():  # type: ignore[no-untyped-call]
                result = work()
            with self.changed:
                self.computing -= 1
                self._next()
        except BaseException as error:
            self.stop(error)
            raise
        return result

    def stop(self, error: BaseException | None = None) -> None:
        """Let every window end where it waits next."""
        with self.changed:
            self.stopped, self.error = True, self.error or error
            self.changed.notify_all()

    def enter(self, unit: nn.Module) -> None:
        """Wait until it is the unit's turn, and fewer than `most` compute."""
        with self.changed:
            self.computing -= 1
            self.waiting[self.mine.window] = unit
            self._next()
        self._begin(unit)

    def leave(self, unit: nn.Module) -> None:
        """Wait until the windows before this one have left the unit."""
        window = self.mine.window
        with self.changed:
            self._wait(lambda: window == min(self.inside))
        self.passed(unit)
        with self.changed:
            self.inside.remove(window)
            self.changed.notify_all()

    def _begin(self, unit: nn.Module | None) -> None:
        window = self.mine.window
        with self.changed:
            self._wait(
                lambda: (
                    self.open is unit
                    and self.computing < self.most
                    and window == min(i for i, wanted in self.waiting.items() if wanted is unit)
                )
            )
            del self.waiting[window]
            self.computing += 1
            if unit is not None:
                self.inside.add(window)
            self.changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        self.changed.wait_for(lambda: self.stopped or until())
        if self.stopped:
            raise _Stopped

    def _next(self) -> None:
        """End the open unit's turn if no window computes or waits for it; next comes what the first window waits for."""
        if not self.computing and self.open not in self.waiting.values():
            if self.open is not None:
                self.closed(self.open)
                self.turn(self.open, over=True)
                if self.bar is not None:
                    self.bar.update()
            self.open = self.waiting[min(self.waiting)] if self.waiting else None
            if self.open is not None:
                self.turn(self.open)
        self.changed.notify_all()


class Products(TorchDispatchMode):
    """Matrix products in float32 by oneDNN, which takes all of a processor's vector registers.

    MKL takes half of them on any but Intel's: 105 against 228 GFLOP/s on one thread of a Zen 5 (1,024 rows, 576 x 1,536).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERANDS and not kwargs and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            x, weight, bias = OPERANDS[func](*args)
            floats = x.dtype is weight.dtype is torch.float32 and x.device.type == "cpu"
            if floats and x.numel() and x.dim() > 1 and (bias is None or bias.dim() == 1):
                if not (weight.is_contiguous() or weight.T.is_contiguous()):  # oneDNN would take its reference: 100 times
                    weight = weight.contiguous()
                return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


class Spill:
    """Tensors that wait on the disk, in a file without a name, which is gone with the process.

    Raises BadInput if the disk is full.
    """

    def __init__(self) -> None:
        # Not where temporary files are by default: that is often memory.
        self._place = cache_dir()
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._place, buffering=0)  # noqa: SIM115  (open while this object is)
        except OSError:
            self._place = Path(tempfile.gettempdir())
            self._file = tempfile.TemporaryFile(dir=self._place, buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Write the tensor, of the CPU; what comes back reads it."""
        data = memoryview(tensor_bytes(tensor))
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError as error:
                raise BadInput(f"{self._place}: cannot be written ({error.strerror}); make room there") from None
        return partial(self._get, start, tensor.shape, tensor.dtype)

    def _get(self, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        data = memoryview(tensor_bytes(tensor))
        with self._lock:
            self._file.seek(start)
            while data:
                data = data[self._file.readinto(data) :]
        return tensor


def _recomputed(
    unit: nn.Module, forward: Callable[..., Any], gate: _Gate, kept: Spill, is_block: bool, *args: Any, **kwargs: Any
) -> Any:
    """The unit's output, from which gradients flow back without anything but its inputs having been kept."""
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    floats = [leaves[i] for i in places]
    if not torch.is_grad_enabled() or not (is_block or any(leaf.requires_grad for leaf in floats)):
        return forward(*args, **kwargs)
    for i in places:  # what `call` refers to stays in memory until the way back
        leaves[i] = None
    shape: list[Any] = []

    def call(given: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        these = list(leaves)
        for i, one in zip(places, given, strict=True):
            these[i] = one
        args, kwargs = _pytree.tree_unflatten(these, spec)
        found, shape[:] = (lambda flat: (flat[0], [flat[1]]))(_pytree.tree_flatten(forward(*args, **kwargs)))
        return tuple(found)

    found: Any = _Again.apply((unit, gate, call), kept, torch.ones((), requires_grad=True), *floats)  # type: ignore[no-untyped-call]
    return _pytree.tree_unflatten(list(found), shape[0])


class _Again(torch.autograd.Function):
    """Compute a unit once more when its gradient is asked for (gradient checkpointing: Chen et al. 2016), at its turn."""

    @staticmethod
    def forward(ctx: Any, about: tuple[nn.Module, _Gate, Any], kept: Spill, _: torch.Tensor, *floats: torch.Tensor) -> Any:
        """What the unit gives; its inputs are kept, those that were computed on the disk."""
        ctx.about, call = about, about[2]
        wanted = ctx.needs_input_grad[3:]
        ctx.given = [kept.put(x.detach()) if want else x for x, want in zip(floats, wanted, strict=True)]
        kind = next((x.device.type for x in floats), "cpu")
        how = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.cast = partial(torch.autocast, kind, *how, cache_enabled=False)  # which may hold what has no gradients
        return call(floats)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Gradients of the inputs, for those of the outputs."""
        unit, gate, call = ctx.about
        gate.enter(unit)
        given = [x().requires_grad_() if callable(x) else x for x in ctx.given]
        gate.mine.back = True
        with gate.within, Products(), ctx.cast(), torch.enable_grad():  # type: ignore[no-untyped-call]  # the engine has left
            found = call(given)
        gate.mine.back = False
        pairs = [(x, g) for x, g in zip(found, gradients, strict=True) if isinstance(x, torch.Tensor) and x.requires_grad]
        del found
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        gate.leave(unit)
        wanted = ctx.needs_input_grad[3:]
        return *[None] * 3, *(x.grad if want else None for x, want in zip(given, wanted, strict=True))


def give_back_freed_memory() -> None:
    """Have the C library return what is free to the system: what is there now, and large blocks at once from here on.

    glibc raises the size from which it asks the system for a block of its own up to 32 MB, and serves smaller ones from
    heaps of each thread.  Freed ones become holes there, and holes side by side even take in the largest tensors, which then
    stay resident: without this, memory grows with every block that is read, whatever its size.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have none
        library.mallopt(M_MMAP_THRESHOLD, OWN_BLOCK)
    trim()
