"""Probes of the task suites that the documentation names: which of them measure here, and what a stage keeps of one."""

from __future__ import annotations

import dataclasses
import math

from agentforge.audit.probes import StageText, probe
from agentforge.audit.subject_probes import TaskName, kept_of, on_suite
from agentforge.audit.workshop import Unmeasured, Workshop
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement
from agentforge.opening import load

QUESTIONS = {"smoke": 8, "standard": 12, "full": 200}


@probe("share of suites", slow=True)
def suites_that_measure(workshop: Workshop, tasks: list[TaskName]) -> Measurement:
    """Share of the suites that give the original's accuracy with a finite standard error, from two questions each; what
    the others lack stands in the protocol.  Those that cannot be tried here may be either: the interval holds both."""
    lacking, untried = {}, {}
    for task in tasks:
        try:
            found = on_suite(workshop, workshop.model, task, 2, None, shots=0).accuracy
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
    found = on_suite(workshop, compressed, task, QUESTIONS[workshop.effort.name], workshop.model)
    return kept_of(found, task)
