"""Layer by layer: what earlier layers lost is made up for by later ones.

A layer of a compressed model sees x' in place of x, because everything before it errs.  Encoded with H = E[x' x'^T], its
own errors weigh as they will, and the weight that it is to come closest to is not W but

    W + (W E[(x - x') x'^T] + E[R x'^T] / c) (E[x' x'^T] + ridge)^-1,

the least-squares fit of W x + R / c to x' (Qronos, arXiv 2505.11695; WaterSIC, arXiv 2603.04956).  R is what the residual
stream has lost so far, if the layer's output is added to it, and c what that is multiplied by, 1 in most models.  So both
models run side by side, as the two halves of one batch, and when all windows have arrived at a layer, it is encoded.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import local
from typing import Any

import torch
from torch import nn

from .artifact import Encoded, relative_error
from .blockwise import Passes
from .errors import BadInput
from .models import LanguageModel, Weight, absent
from .progress import progress_bar
from .stages import Stage
from .stages.base import InputStatistics
from .statistics import Calibration, _add_to, _windows

OWN, CROSS, LOST = "x'^T x' of", "x^T x' of", "R^T x' / c of"  # before a name
RIDGE = 1.0  # of the mean of E[x'^2]: what the text says of rare directions does not carry over to others
CLOSE = 1e-3  # relative error with which a residual stream is taken to be a sum of outputs


class Both(nn.Module):
    """A layer of two models, each of which has half of the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.small = layer, copy.deepcopy(layer)
        self.small.weight = nn.Parameter(absent(layer.weight.shape), requires_grad=False)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of x[:n] by the model, and of x[n:] by the compressed one: [2 n, ...] -> [2 n, ...]."""
        ours, theirs = x.chunk(2)
        return torch.cat([self.model(ours), self.small(theirs)])


def encode_in_order(
    model: LanguageModel,
    plan: Mapping[str, Stage],
    others: Mapping[str, Callable[[], torch.Tensor]],
    statistics: Mapping[str, InputStatistics],
    calibration: Calibration,
    keep: Callable[[str, Encoded], Any],
    progress: bool = True,
) -> None:
    """Encode the linear layers of `plan`, in the model's own order; `keep(name, encoded)` gets each.

    others: what gives the decoded weights, as the model has them, of layers that are compressed already (an embedding).
    statistics: sensitivities are taken from there.  calibration: the text to run.

    Raises BadInput for a model whose layers do not add to a residual stream, and if a weight cannot be encoded.
    """
    weights = {weight.name: weight for weight in model.weights(embeddings=True)}
    if experts := [name for name in plan if weights[name].experts]:
        raise BadInput(f"{model.name}: {experts[0]} is of experts, which see other tokens each; leave out --sequential")
    windows = _windows(model, calibration)
    adding = _adding(model, list(plan), windows[0][:, : min(64, windows[0].shape[1])])
    sums: dict[Any, dict[str, tuple[torch.Tensor, int]]] = {}  # of the open block alone
    running: dict[str, Future[tuple[Encoded, torch.Tensor]]] = {}
    same = {name: getattr(statistics, "keys_of", {}).get(name, name) for name in plan}
    keys = {name: key if key in plan else name for name, key in same.items()}  # which of them sees a tensor first
    mine = local()

    def small(name: str) -> torch.Tensor:
        if name not in running:
            (found,) = sums.values()
            own, cross = (found[f"{what} {keys[name]}"] for what in (OWN, CROSS))
            for other in [n for n in plan if keys[n] == keys[name]]:
                about = weights[other], plan[other], statistics[other], own, cross, found.get(f"{LOST} {other}")
                running[other] = pool.submit(_encode, *about)
        encoded, decoded = running.pop(name).result()
        keep(name, encoded)
        return decoded.T if weights[name].transposed else decoded

    def change(module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for name in (*plan, *others):
            owner = name.rpartition(".")[0]
            module.set_submodule(owner, Both(module.get_submodule(owner)))
            readers[f"{owner}.model.weight"] = partial(model.tensor, name)
            readers[f"{owner}.small.weight"] = others[name] if name in others else partial(small, name)
        return readers

    def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
        mine.block, mine.stream = block, args[0] if args else kwargs["hidden_states"]

    def see(name: str, x: torch.Tensor) -> None:
        if x.shape[:-1].numel() != 2 * mine.tokens:
            raise BadInput(f"{model.name}: {name} does not see every token once; leave out --sequential")
        ours, theirs = x.detach().to(torch.float32).reshape(2, mine.tokens, -1)
        if keys[name] == name:
            mine.sums |= {f"{OWN} {name}": theirs.T @ theirs, f"{CROSS} {name}": ours.T @ theirs}
        if name in adding:
            both = mine.stream.reshape(2, mine.tokens, -1)
            mine.sums[f"{LOST} {name}"] = ((both[0] - both[1]) / adding[name]).T @ theirs

    def go_on(name: str, y: torch.Tensor) -> None:
        if name in adding:
            mine.stream = mine.stream + adding[name] * y.reshape(mine.stream.shape)

    def run(module: nn.Module, window: torch.Tensor) -> None:
        mine.sums, mine.block, mine.tokens = {}, None, window.numel()
        _stream(module, window.expand(2, -1))

    def passed(_: nn.Module) -> None:
        if mine.block not in sums:
            sums.clear()
            sums[mine.block] = {}
        for key, product in mine.sums.items():
            _add_to(sums[mine.block], key, product, mine.tokens)
        mine.sums = {}

    passes = Passes(model, change, by_layer=True)
    layers = dict(passes.module.named_modules())
    title = f"encoding in order: {model.name}" if progress else None
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(title, passes.steps, "layer") as bar:
        for block in passes.blocks:
            block.register_forward_pre_hook(begin, with_kwargs=True)
        for name in plan:
            layer = layers[name.rpartition(".")[0]]
            layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            layer.register_forward_hook(lambda _, __, y, name=name: go_on(name, y))
        list(passes.map(run, windows, bar, passed=passed))


def _encode(
    weight: Weight,
    stage: Stage,
    known: InputStatistics,
    own: tuple[torch.Tensor, int],
    cross: tuple[torch.Tensor, int],
    lost: tuple[torch.Tensor, int] | None,
) -> tuple[Encoded, torch.Tensor]:
    """The weight, encoded to make up for what was lost before it, and what it decodes to, float32[out, in].

    own, cross, lost: sums of x'^T x', x^T x' and R^T x' / c, and over how many tokens.
    """
    dense = weight.load().to(torch.float32)
    moments, n = own[0] / own[1], own[1]
    hessian = moments.double()
    missing = dense.double() @ (cross[0] / n - hessian)
    if lost:
        missing += lost[0] / n
    ridge = RIDGE * hessian.diagonal().mean().clamp(min=1e-30) * torch.eye(len(hessian), dtype=torch.float64)
    target = dense + torch.linalg.solve(hessian + ridge, missing.T).T.to(torch.float32)
    packed = stage.encode(target, dataclasses.replace(known, hessian=moments, n=n), name=weight.name)
    decoded = stage.decode(packed)
    return Encoded.of(stage, packed, relative_error(dense, decoded)), decoded


def _adding(model: LanguageModel, names: list[str], window: torch.Tensor) -> dict[str, float]:
    """The layers whose outputs are what a block adds to the residual stream, and what they are multiplied by there, found by
    running the model.

    Raises BadInput if a block adds anything else.
    """
    passes, found = Passes(model), dict[str, float]()
    layers, inside = dict(passes.module.named_modules()), dict[str, torch.Tensor]()

    def compare(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, torch.Tensor) else output[0]
        some = {name: y.flatten().double() for name, y in inside.items() if y.numel() == before.numel()}
        inside.clear()
        added = (after - before).flatten().double() if isinstance(after, torch.Tensor) else None
        if added is None or not some:
            raise BadInput(f"{model.name}: no layer of a block adds to a residual stream; leave out --sequential")
        outputs = torch.stack([*some.values()], 1)
        parts = torch.linalg.lstsq(outputs, added[:, None]).solution[:, 0]
        if not (outputs @ parts - added).norm() < CLOSE * added.norm():
            raise BadInput(f"{model.name}: a block adds more than its layers give; leave out --sequential")
        found.update((name, float(part)) for name, part in zip(some, parts, strict=True) if abs(part) > CLOSE)

    with ExitStack() as stack:
        for block in passes.blocks:
            stack.callback(block.register_forward_hook(compare, with_kwargs=True).remove)
        for name in names:
            layer = layers[name.rpartition(".")[0]]
            hook = layer.register_forward_hook(lambda _, __, y, name=name: inside.update({name: y.detach()}))
            stack.callback(hook.remove)
        list(passes.map(_stream, [window]))
    return found


def _stream(module: nn.Module, ids: torch.Tensor) -> None:
    """Run all blocks, without gradients, and no output head."""
    with torch.no_grad():
        getattr(module, "base_model", module)(ids, use_cache=False)
