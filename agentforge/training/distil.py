"""Distillation: a student beside its teacher, and the gradients of their distance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from threading import local
from typing import Any

import torch
from torch import nn

from ..artifact import Artifact
from ..blockwise import Passes, Products, Spill
from ..evaluation.likelihood import relative_entropy
from ..execution import results
from ..models import LanguageModel
from .student import put_codes

ROWS = 32  # of logits that are worked on at a time
SMALL = 2 << 30  # bytes of two models that need not be read block by block


class Pair:
    """A model and its student.

    still: the student's codes, which stay.  What is trained is small then.  On the CPU a window is computed on one thread,
    and gradients are added in the windows' order: the result is the same bits whatever the number of cores.  Models that
    take more than `SMALL` run block by block (`blockwise`): the weights of one block are in memory at a time, and each is
    computed once more on the way back.  Others are in memory, which takes half of the time, and gives the same bits.
    Without it the student is a copy, to be changed.

    at_once: inputs that are computed together.  half: whether to use bfloat16.
    """

    def __init__(self, model: LanguageModel, still: Artifact | None, device: torch.device, at_once: int, half: bool) -> None:
        self.device, self.at_once, self.half = device, at_once, half
        self.by_window = still is not None and device.type == "cpu" and not model.is_classifier
        self.passes: tuple[Passes, Passes] | None = None
        if still and self.by_window and model.in_blocks and 2 * 4 * model.parameters > SMALL:
            self.passes = Passes(model), Passes(model, partial(_spilled, still))
            self.student: Any = self.passes[1].module
            return
        # The model is the caller's: it stays where it is, and as it is.
        here = next(model.model.parameters()).device == device
        self.teacher = model.model if here else copy.deepcopy(model.model).to(device)
        self.student = copy.deepcopy(self.teacher).requires_grad_(False)
        if still:
            for name, read in put_codes(still, self.student).items():
                self.student.get_parameter(name).data = read().to(torch.bfloat16 if half else torch.float32)
            self.student.to(device)

    def gradients(self, inputs: torch.Tensor) -> float:
        """The mean loss over the inputs, [windows, ...]; its gradients in whatever requires some are left in `.grad`."""
        self.student.train(not self.by_window)  # what is computed twice drops nothing out
        parts = len(inputs) if self.by_window else len(inputs) / self.at_once
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        sums: dict[str, torch.Tensor] = {}
        mine = local()

        def back(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
            loss = distillation(ours, theirs) / parts
            vars(mine).clear()
            loss.backward()
            return float(loss.detach()), dict(vars(mine))

        with ExitStack() as stack:
            for name, parameter in trained.items() if self.by_window else ():
                hook = parameter.register_hook(lambda gradient, name=name: vars(mine).update({name: gradient}))
                stack.callback(hook.remove)
            total = 0.0
            for loss, found in self._map(back, inputs, backward=True):
                total += loss
                for name, gradient in found.items():
                    sums[name] = sums[name] + gradient if name in sums else gradient
        for name, gradient in sums.items():
            trained[name].grad = gradient  # instead of what was added up in any order
        return total

    def beside(self, inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`agreement` on some inputs at a time."""
        self.student.eval()
        return self._map(agreement, inputs)

    def _map(self, work: Callable[..., Any], inputs: torch.Tensor, backward: bool = False) -> Iterator[Any]:
        """`work(ours, theirs)` of some outputs at a time: of one window, or of all that are computed together."""

        def both(part: torch.Tensor) -> Any:
            with nullcontext() if self.half or not self.by_window else Products():  # type: ignore[no-untyped-call]
                theirs = self._outputs(self.teacher, part)
                return work(self._outputs(self.student, part, backward), theirs)

        for part in inputs.to(self.device).split(self.at_once):
            if self.passes is None:
                yield from (
                    _each_on_one_thread(partial(both, one) for one in part.split(1)) if self.by_window else (both(part),)
                )
                continue
            with Spill() as kept:  # the teacher's answers

                def answer(module: nn.Module, window: torch.Tensor, kept: Spill = kept) -> Callable[[], torch.Tensor]:
                    return kept.put(self._outputs(module, window))

                def compare(module: nn.Module, both: tuple[torch.Tensor, Callable[[], torch.Tensor]]) -> Any:
                    return work(self._outputs(module, both[0], backward), both[1]())

                pairs = list(zip(part.split(1), self.passes[0].map(answer, part.split(1)), strict=True))
                yield from self.passes[1].map(compare, pairs, backward=backward)

    def _outputs(self, module: Any, inputs: torch.Tensor, gradients: bool = False) -> torch.Tensor:
        """Logits, [rows, classes]."""
        cast = torch.autocast(self.device.type, torch.bfloat16, self.half, cache_enabled=False)
        with torch.set_grad_enabled(gradients), cast:
            if inputs.is_floating_point():
                return module(inputs)  # type: ignore[no-any-return]
            return module(input_ids=inputs, use_cache=False).logits.flatten(0, 1)  # type: ignore[no-any-return]


def _each_on_one_thread(tasks: Iterator[Callable[[], Any]]) -> Iterator[Any]:
    """What the tasks give, in their order, as many at the same moment as there are cores."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        yield from results(tasks, None, None)


def _spilled(still: Artifact, module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """`put_codes`, of which each tensor is decoded once and waits on the disk: decoding takes longer than reading."""
    read, spill = put_codes(still, module), Spill()
    waiting = cache(lambda name: spill.put(read[name]()))
    return {name: partial(lambda name: waiting(name)(), name) for name in read}


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(theirs || ours) of each row of the logits, and whether both have the same most likely class: float64[rows]."""
    kl = [relative_entropy(p.float().log_softmax(-1), q.float().log_softmax(-1)) for p, q in _rows(theirs, ours)]
    return torch.cat(kl).double().cpu(), (theirs.argmax(-1) == ours.argmax(-1)).double().cpu()


def _rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = ROWS if tensors[0].device.type == "cpu" else len(tensors[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def distillation(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) in nats, the mean over rows of logits, float[rows, classes]; differentiable in `ours` alone.

    The gradient in logits is softmax(ours) - softmax(theirs).  It is found in the forward pass, a few rows at a time, so
    that no other array of the logits' size is kept or walked through more than once.
    """
    return _Distillation.apply(ours, theirs)  # type: ignore[no-any-return, no-untyped-call]


class _Distillation(torch.autograd.Function):
    """KL divergence with its gradient, in blocks of rows that stay in the processor's cache."""

    @staticmethod
    def forward(context: Any, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """The mean KL divergence; the gradient is kept for `backward`."""
        gradient, total = torch.empty_like(ours), torch.zeros((), dtype=torch.float32, device=ours.device)
        for mine, other, out in _rows(ours, theirs, gradient):
            log_q, log_p = mine.float().log_softmax(-1), other.float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q).masked_fill_(p == 0, 0.0)).sum()
            torch.sub(log_q.exp_(), p, out=p)
            out.copy_(p.div_(len(ours)))
        context.save_for_backward(gradient)
        return total / len(ours)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient in our logits alone."""
        (found,) = context.saved_tensors
        return found * gradient, None
