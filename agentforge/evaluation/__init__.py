"""Evaluation: what a model does, as Measurements."""

from .classification import accuracy, accuracy_retention
from .likelihood import Divergence, divergence, divergences, perplexity
from .measurement import Measurement
from .tasks import TaskResult, evaluate_tasks
from .texts import Text, find_text

__all__ = [
    "Divergence",
    "Measurement",
    "TaskResult",
    "Text",
    "accuracy",
    "accuracy_retention",
    "divergence",
    "divergences",
    "evaluate_tasks",
    "find_text",
    "perplexity",
]
