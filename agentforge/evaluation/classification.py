"""Accuracy of digits-mlp on its 450 held-out pictures."""

from __future__ import annotations

import torch

from .. import digits
from ..errors import BadInput
from ..models import LanguageModel
from . import intervals
from .measurement import Measurement

DATA = "scikit-learn digits, 450 held out, stratified, random_state 0"


def accuracy(model: LanguageModel) -> Measurement:
    """Share of the held-out digits that are named rightly, with its exact binomial interval.

    Raises BadInput for a model that is not a classifier of digits.
    """
    protocol = {"metric": "accuracy", "data": DATA}
    return intervals.measured(intervals.share(_hits(model)), "accuracy", protocol, model, seed=0)


def accuracy_retention(model: LanguageModel, original: LanguageModel) -> Measurement:
    """Accuracy over the original's, on the same held-out digits, with the error of pairs.

    Raises BadInput for a model that is not a classifier of digits.
    """
    protocol = {"metric": "accuracy / original accuracy", "data": DATA}
    return intervals.measured(intervals.pairs(_hits(model), _hits(original)), "share", protocol, model, original)


def _hits(model: LanguageModel) -> torch.Tensor:
    """1 for each held-out digit that is named rightly, else 0: float64[450]."""
    if not model.is_classifier:
        raise BadInput(f"{model.name} is not a classifier; measure its perplexity")
    _, _, pixels, labels = digits.data()
    module = model.model  # built outside of inference mode, so that it can still be trained
    device = next(module.parameters()).device
    with torch.inference_mode():
        hits: torch.Tensor = (module(pixels.to(device)).argmax(1).cpu() == labels).double()
    return hits
