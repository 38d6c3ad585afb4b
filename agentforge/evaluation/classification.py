"""Accuracy of digits-mlp on its 450 held-out pictures."""

from __future__ import annotations

import math

import torch

from .. import digits
from ..errors import BadInput
from ..models import LanguageModel
from .likelihood import retention
from .measurement import Measurement

DATA = "scikit-learn digits, 450 held out, stratified, random_state 0"


def accuracy(model: LanguageModel) -> Measurement:
    """Share of the held-out digits that are named rightly, with its binomial standard error.

    Raises BadInput for a model that is no classifier of digits.
    """
    hits = _hits(model)
    share, n = float(hits.mean()), len(hits)
    return Measurement(
        value=share,
        unit="accuracy",
        stderr=math.sqrt(share * (1 - share) / n),
        n=n,
        protocol={"metric": "accuracy", "data": DATA},
        seed=0,
        inputs={"model": model.fingerprint},
    )


def accuracy_retention(model: LanguageModel, original: LanguageModel) -> Measurement:
    """Accuracy over the original's, on the same held-out digits, with a standard error of pairs.

    Raises BadInput for a model that is no classifier of digits.
    """
    inputs = {"model": model.fingerprint, "original": original.fingerprint}
    protocol = {"metric": "accuracy / original accuracy", "data": DATA}
    return retention(_hits(model), _hits(original), protocol, inputs)


def _hits(model: LanguageModel) -> torch.Tensor:
    """1 for each held-out digit that is named rightly, else 0: float64[450]."""
    if not model.is_classifier:
        raise BadInput(f"{model.name} is no classifier; measure its perplexity")
    _, _, pixels, labels = digits.data()
    module = model.model  # built outside of inference mode, so that it can still be trained
    device = next(module.parameters()).device
    with torch.inference_mode():
        hits: torch.Tensor = (module(pixels.to(device)).argmax(1).cpu() == labels).double()
    return hits
