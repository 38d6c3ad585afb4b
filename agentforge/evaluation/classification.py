"""Accuracy of digits-mlp on its 450 held-out pictures."""

from __future__ import annotations

import math

import torch

from .. import digits
from ..errors import BadInput
from ..models import LanguageModel
from .measurement import Measurement


def accuracy(model: LanguageModel) -> Measurement:
    """Share of the held-out digits that are named rightly, with its binomial standard error.

    Raises BadInput for a model that is no classifier of digits.
    """
    if not model.is_classifier:
        raise BadInput(f"{model.name} is no classifier; measure its perplexity")
    _, _, pixels, labels = digits.data()
    module = model.model  # built outside of inference mode, so that it can still be trained
    with torch.inference_mode():
        share = float((module(pixels).argmax(1) == labels).double().mean())
    n = len(labels)
    return Measurement(
        value=share,
        unit="accuracy",
        stderr=math.sqrt(share * (1 - share) / n),
        n=n,
        protocol={"metric": "accuracy", "data": "scikit-learn digits, 450 held out, stratified, random_state 0"},
        seed=0,
        inputs={"model": model.fingerprint},
    )
