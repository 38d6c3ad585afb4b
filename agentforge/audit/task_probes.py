"""Probes that run task suites: which of them give a measurement here, and what a model keeps of one."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import pydantic

from ..errors import BadInput
from ..evaluation import Measurement
from ..evaluation.tasks import SUITES, TaskResult, evaluate_tasks
from ..models import LanguageModel
from ..opening import load
from .probes import Count, StageText, probe
from .subject_probes import subject_of
from .workshop import Unmeasured, Workshop


def _task(name: str) -> str:
    if name not in SUITES:
        raise ValueError(f"there is no such suite; expected one of {', '.join(SUITES)}")
    return name


ABSENT = (
    "not installed",
    "is neither in",
    "--allow-generated-code",
    "cannot be confined here",
)  # says who cannot measure here
TaskName = Annotated[str, pydantic.AfterValidator(_task)]
QUESTIONS = {"smoke": 8, "standard": 12, "full": 200}


@probe("share of suites", slow=True)
def suites_that_measure(workshop: Workshop, tasks: list[TaskName]) -> Measurement:
    """Share of the suites that give the original's accuracy with a finite standard error, from two questions each; what
    the others lack stands in the protocol.  Those that cannot be tried here may be either: the interval holds both."""
    lacking, untried = {}, {}
    for task in tasks:
        try:
            found = _on_suite(workshop, workshop.model, task, 2, None, shots=0).accuracy
        except Unmeasured as error:
            untried[task] = str(error)
            continue
        except BadInput as error:
            lacking[task] = str(error)
            continue
        if found.n != 2 or found.stderr is None or not math.isfinite(found.stderr):
            lacking[task] = f"n = {found.n}, standard error {found.stderr}"
    if len(untried) == len(tasks):
        raise Unmeasured("; ".join(dict.fromkeys(untried.values())))
    value = 1 - (len(lacking) + len(untried)) / len(tasks)
    about = {"tasks": tasks, "lacking": lacking, "untried": untried}
    share = workshop.exact(value, "share of suites", len(tasks), "suites that measure", **about)
    if not untried:
        return share
    return dataclasses.replace(
        share, interval=(value, value + len(untried) / len(tasks)), error="suites that were not tried"
    )


@probe("share", slow=True)
def suite_retention(workshop: Workshop, task: TaskName, stage: StageText) -> Measurement:
    """Accuracy on a suite that the model compressed with `stage` keeps, in pairs; as many questions as the effort says."""
    compressed = load(workshop.artifact(stage).path)
    found = _on_suite(workshop, compressed, task, QUESTIONS[workshop.effort.name], workshop.model)
    return _kept(found, task)


@probe("accuracy")
def task_accuracy(workshop: Workshop, task: TaskName, limit: Count | None = None) -> Measurement:
    """The subject's accuracy on a suite by name (`evaluation.tasks.SUITES`), with its binomial standard error."""
    return _on_suite(workshop, subject_of(workshop, compares=False), task, limit, None).accuracy


@probe("share", compares=True)
def task_accuracy_kept(workshop: Workshop, task: TaskName, limit: Count | None = None) -> Measurement:
    """The subject's accuracy on a suite over its original's; the error is that of pairs."""
    return _kept(_on_suite(workshop, subject_of(workshop), task, limit, workshop.model), task)


def _on_suite(
    workshop: Workshop,
    model: LanguageModel,
    task: TaskName,
    limit: int | None,
    original: LanguageModel | None,
    shots: int | None = None,
) -> TaskResult:
    try:
        return evaluate_tasks(model, [task], original=original, limit=limit, shots=shots, progress=False)[task]
    except BadInput as error:
        if any(words in str(error) for words in ABSENT):
            raise Unmeasured(str(error)) from None
        raise


def _kept(found: TaskResult, task: TaskName) -> Measurement:
    if found.retention is None or not found.signal:
        raise Unmeasured(f"an original that is above chance on {task}: of what it guesses nothing can be kept")
    return found.retention
