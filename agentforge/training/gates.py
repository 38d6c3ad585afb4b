"""Gates: what a compressed model has to pass before it is handed over.

A gate is a measurement, its whole 95% interval, checked against a limit that was fixed before.  The limits are those of the
documentation of phase 4: gradients flow, accuracy falls by at most 10%, training is triggered from 5% of perplexity on, and
the two outputs agree on 99.5% of the tokens.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..chain import Condition, Decision
from ..evaluation import Measurement

MAX_ACCURACY_DROP = 0.10
MAX_PERPLEXITY_RISE = 0.10
TRIGGER = 0.05
MIN_AGREEMENT = 0.995


class Gate(NamedTuple):
    """name: what was measured.  sense: on which side of the limit it has to be."""

    name: str
    measured: Measurement
    sense: Literal["<=", ">="]
    limit: float

    @property
    def decision(self) -> Decision:
        """Whether the 95% interval keeps to the limit, misses it, or neither; NaN misses it."""
        return Condition(self.name, self.sense, self.limit).decide(self.measured)

    @property
    def passed(self) -> bool:
        """Whether all of the interval keeps to the limit."""
        return self.decision == "passed"

    def to_json(self) -> dict[str, Any]:
        """All fields, of the measurement value and interval, and whether it was passed."""
        value = {"value": self.measured.value, "interval": self.measured.bounds}
        return {"name": self.name, **value, "sense": self.sense, "limit": self.limit, "passed": self.passed}

    def __str__(self) -> str:
        low, high = self.measured.bounds
        of = "" if low == high else f" ({low:.4g} to {high:.4g})"
        said = {"passed": "passed", "failed": "FAILED", "undecided": "FAILED: undecided at this n"}[self.decision]
        return f"{self.name}: {self.measured.value:.4g}{of} {self.sense} {self.limit:.4g}: {said}"


class GradientFlow(NamedTuple):
    """Names of trainable tensors whose gradient is missing, zero everywhere, or not finite, and the norm of each other."""

    missing: list[str]
    zero: list[str]
    infinite: list[str]
    norms: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every trainable tensor got a finite gradient that is not zero, and there is at least one."""
        return bool(self.norms) and not (self.missing or self.zero or self.infinite)

    def __str__(self) -> str:
        if self.passed:
            return f"gradients flow to all {len(self.norms)} trainable tensors"
        bad = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", self.missing), ("zero", self.zero), ("not finite", self.infinite))
            if names
        ]
        return "gradients do not flow: " + "; ".join(bad or ["nothing is trainable"])


def gradient_flow(module: nn.Module, inputs: torch.Tensor) -> GradientFlow:
    """Send one batch forward and its loss back, and look at the gradient of every trainable tensor.

    inputs: int[windows, context] for a language model, whose loss is that of the next token; float[n, 64] for a
    classifier, whose loss is that of its own most likely class.  Gradients that are there before are left alone.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if inputs.is_floating_point():
        logits = module(inputs)
        loss = nn.functional.cross_entropy(logits, logits.detach().argmax(-1))
    else:
        loss = module(input_ids=inputs, labels=inputs, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True) if trainable else ()
    found = GradientFlow([], [], [], {})
    for name, gradient in zip(trainable, gradients, strict=True):
        if gradient is None:
            found.missing.append(name)
        elif not torch.isfinite(gradient).all():
            found.infinite.append(name)
        elif not gradient.any():
            found.zero.append(name)
        else:
            found.norms[name] = float(gradient.norm())
    return found
