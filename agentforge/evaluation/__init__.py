"""Evaluation: what a model does, as Measurements."""

from .classification import accuracy, accuracy_retention
from .likelihood import Divergence, check_causal, divergence, divergences, perplexity
from .measurement import Measurement
from .phase5 import edge_of_chaos, eudaimonia
from .tasks import evaluate_tasks
from .texts import Text, find_text

__all__ = [
    "Divergence",
    "Measurement",
    "Text",
    "accuracy",
    "accuracy_retention",
    "check_causal",
    "divergence",
    "divergences",
    "edge_of_chaos",
    "eudaimonia",
    "evaluate_tasks",
    "find_text",
    "perplexity",
]
