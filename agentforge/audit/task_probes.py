"""Probes that run task suites: what a model gets right, and what it keeps of its original."""

from __future__ import annotations

from typing import Annotated

import pydantic

from ..errors import BadInput
from ..evaluation import Measurement
from ..evaluation.tasks import SUITES, TaskResult, evaluate_tasks
from ..models import LanguageModel
from .probes import Count, probe
from .subject_probes import subject_of
from .workshop import Unmeasured, Workshop


def _task(name: str) -> str:
    if name not in SUITES:
        raise ValueError(f"there is no such suite; expected one of {', '.join(SUITES)}")
    return name


# What says who cannot measure here.
ABSENT = ("not installed", "is neither in", "--allow-generated-code", "cannot be confined here")
TaskName = Annotated[str, pydantic.AfterValidator(_task)]


@probe("accuracy")
def task_accuracy(workshop: Workshop, task: TaskName, limit: Count | None = None) -> Measurement:
    """The subject's accuracy on a suite by name (`evaluation.tasks.SUITES`), with its binomial standard error."""
    return on_suite(workshop, subject_of(workshop, compares=False), task, limit, None).accuracy


@probe("share", compares=True)
def task_accuracy_kept(workshop: Workshop, task: TaskName, limit: Count | None = None) -> Measurement:
    """The subject's accuracy on a suite over its original's; the error is that of pairs."""
    return kept_of(on_suite(workshop, subject_of(workshop), task, limit, workshop.model), task)


def on_suite(
    workshop: Workshop,
    model: LanguageModel,
    task: TaskName,
    limit: int | None,
    original: LanguageModel | None,
    shots: int | None = None,
) -> TaskResult:
    """What a model gets of one suite.  Raises Unmeasured if questions or packages for it are not here."""
    try:
        return evaluate_tasks(model, [task], original=original, limit=limit, shots=shots, progress=False)[task]
    except BadInput as error:
        if any(words in str(error) for words in ABSENT):
            raise Unmeasured(str(error)) from None
        raise


def kept_of(found: TaskResult, task: TaskName) -> Measurement:
    """Accuracy over the original's.  Raises Unmeasured if that one guesses."""
    if found.retention is None or not found.signal:
        raise Unmeasured(f"an original that is above chance on {task}: of what it guesses nothing can be kept")
    return found.retention
