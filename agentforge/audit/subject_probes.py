"""Probes for claims about any model: a folder that somebody else compressed, one of our artifacts, a GGUF file.

The subject is the model that is audited; the workshop's model is its original, or the subject itself if none is named.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import pydantic
import torch

from .. import evaluation
from ..errors import BadInput
from ..evaluation import Divergence, Measurement, intervals
from ..evaluation.tasks import SUITES, TaskResult, evaluate_tasks
from ..models import LanguageModel
from .probes import Count, probe
from .workshop import Unmeasured, Workshop

# What says who cannot measure here.
ABSENT = ("not installed", "is neither in", "--allow-generated-code", "cannot be confined here")


def _task(name: str) -> str:
    if name not in SUITES:
        raise ValueError(f"there is no such suite; expected one of {', '.join(SUITES)}")
    return name


TaskName = Annotated[str, pydantic.AfterValidator(_task)]


def subject_of(workshop: Workshop, compares: bool = True) -> LanguageModel:
    """The model that is audited.  compares: whether it has to be another one than its original.

    Raises BadInput if there is none.
    """
    if workshop.subject is None:
        raise BadInput("this probe is about a model that was made elsewhere; run it with --claims and --model")
    if compares and workshop.subject.fingerprint == workshop.model.fingerprint:
        raise BadInput(f"{workshop.subject.name}: is compared with its original; name that one with --against")
    return workshop.on_device(workshop.subject)


def _divergence(workshop: Workshop) -> Divergence:
    subject = subject_of(workshop)

    def make() -> dict[str, Any]:
        found = evaluation.divergence(
            subject,
            workshop.on_device(workshop.model),
            workshop.text,
            context=min(workshop.context, subject.usual_context),
            tokens=workshop.tokens,
            progress=False,
        )
        return {name: m.to_json() for name, m in found._asdict().items()}

    kept = workshop.remember("divergence of the subject", {}, make)
    return Divergence(**{name: Measurement(**kept[name]) for name in Divergence._fields})


@probe("x", compares=True)
def ratio_on_disk(workshop: Workshop, bits: Count = 16) -> Measurement:
    """The original's parameters at `bits` each over the bytes of the subject's weight files, headers included."""
    subject = subject_of(workshop)
    original = workshop.model.parameters * bits // 8
    against = f"all {workshop.model.parameters:,} parameters at {bits} bits"
    return _size(workshop, original / subject.opened_bytes, "x", against)


@probe("bits/parameter")
def bits_on_disk(workshop: Workshop) -> Measurement:
    """Bits of the subject's weight files over the original's number of parameters (its own, if no original is named)."""
    subject = subject_of(workshop, compares=False)
    count = workshop.model.parameters
    return _size(workshop, 8 * subject.opened_bytes / count, "bits/parameter", f"all {count:,} parameters")


@probe("MB")
def megabytes_on_disk(workshop: Workshop) -> Measurement:
    """Bytes of the subject's weight files, in millions."""
    return _size(workshop, subject_of(workshop, compares=False).opened_bytes / 1e6, "MB", "none")


def _size(workshop: Workshop, value: float, unit: str, denominator: str) -> Measurement:
    assert workshop.subject is not None
    size = workshop.subject.opened_bytes
    protocol = {"metric": "size of the weight files on disk", "denominator": denominator, "bytes": size}
    inputs = {"model": workshop.subject.fingerprint, "original": workshop.model.fingerprint}
    return Measurement(value, unit, None, size, protocol, inputs=inputs)


@probe("perplexity")
def perplexity(workshop: Workshop) -> Measurement:
    """The subject's perplexity on the workshop's text."""
    subject = subject_of(workshop, compares=False)
    context = min(workshop.context, subject.usual_context)
    return evaluation.perplexity(subject, workshop.text, context=context, tokens=workshop.tokens, progress=False)


@probe("nats/token", compares=True)
def kl(workshop: Workshop) -> Measurement:
    """KL(original || subject), nats per token."""
    return _divergence(workshop).kl


@probe("share of tokens", compares=True)
def same_top_token(workshop: Workshop) -> Measurement:
    """Share of tokens at which subject and original have the same most likely next token."""
    return _divergence(workshop).top1


@probe("share", compares=True)
def accuracy_kept(workshop: Workshop) -> Measurement:
    """Accuracy over the original's: of the next token, or of digits for classifiers; the error is that of pairs."""
    subject = subject_of(workshop)
    kept = (
        evaluation.accuracy_retention(subject, workshop.model) if subject.is_classifier else _divergence(workshop).retention
    )
    if math.isnan(kept.value):
        raise Unmeasured("an original that gets something right: of nothing nothing can be kept")
    return kept


@probe("share", compares=True)
def perplexity_kept(workshop: Workshop) -> Measurement:
    """The original's perplexity over the subject's, on the same tokens; the error is that of pairs."""
    return _divergence(workshop).perplexity_retention


@probe("tokens/s")
def tokens_a_second(workshop: Workshop, tokens: Count = 32, runs: Count = 6) -> Measurement:
    """Tokens that the subject generates per second, batch 1, greedy, as it is loaded (float32 on a CPU); median of runs."""
    rates = _rates(workshop, subject_of(workshop, compares=False), tokens, runs)
    return _speed(workshop, rates, "tokens/s", tokens)


@probe("x", compares=True)
def times_as_fast(workshop: Workshop, tokens: Count = 32, runs: Count = 6) -> Measurement:
    """Tokens per second of the subject over those of its original, both as they are loaded; median of pairs of runs."""
    subject, original = subject_of(workshop), workshop.on_device(workshop.model)
    pairs = [(_rates(workshop, subject, tokens, 1)[0], _rates(workshop, original, tokens, 1)[0]) for _ in range(runs)]
    return _speed(workshop, [ours / theirs for ours, theirs in pairs], "x", tokens)


def _rates(workshop: Workshop, model: LanguageModel, tokens: int, runs: int) -> list[float]:
    module = model.model
    ids = torch.tensor([model.encode("The capital of France is", special=True)], device=module.device)
    settings: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    rates = []
    with torch.inference_mode():
        module.generate(ids, **{**settings, "min_new_tokens": 1, "max_new_tokens": 1})  # what is built at the first call
        for _ in range(runs):
            began = time.perf_counter()
            module.generate(ids, **settings)
            rates.append(tokens / (time.perf_counter() - began))
    return rates


def _speed(workshop: Workshop, rates: list[float], unit: str, tokens: int) -> Measurement:
    assert workshop.subject is not None
    protocol = {"metric": "generation", "tokens": tokens, "threads": torch.get_num_threads(), "device": workshop.device}
    inputs = {"model": workshop.subject.fingerprint, "original": workshop.model.fingerprint}
    return Measurement(unit=unit, protocol=protocol, inputs=inputs, **intervals.median(rates))


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
