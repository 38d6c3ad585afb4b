"""Evaluation: what a model does, as Measurements."""

from .accuracy import accuracy
from .likelihood import Divergence, divergence, perplexity
from .measurement import Measurement
from .texts import Text, find_text

__all__ = ["Divergence", "Measurement", "Text", "accuracy", "divergence", "find_text", "perplexity"]
