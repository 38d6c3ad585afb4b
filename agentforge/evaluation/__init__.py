"""Evaluation: what a model does, as Measurements."""

from .classification import accuracy, accuracy_retention
from .likelihood import Divergence, divergence, divergences, perplexity
from .measurement import Measurement
from .texts import Text, find_text

__all__ = [
    "Divergence",
    "Measurement",
    "Text",
    "accuracy",
    "accuracy_retention",
    "divergence",
    "divergences",
    "find_text",
    "perplexity",
]
