"""Probes: functions that measure what a claim is about.

A probe gets the workshop (the original model, a folder for artifacts, how much text to score) and the parameters in
the claim; it returns a Measurement, or raises Unmeasured if something is missing that it needs.  What it
measures is always loaded back from disk.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
import torch

from .. import evaluation, stages
from ..errors import BadInput
from ..evaluation import Measurement, Text
from ..opening import open_model
from ..pipeline import compress
from ..stages.ternary import zero_fraction
from .workshop import Workshop

Probe = Callable[..., Measurement]
PROBES: dict[str, Probe] = {}
UNITS: dict[str, str] = {}  # of what a probe measures, unless its parameters say it
COMPARES: set[str] = set()  # the probes that need an original to compare with


def _stage(text: str) -> str:
    stages.parse(text)
    return text


StageText = Annotated[str, pydantic.AfterValidator(_stage)]  # as `stages.parse` takes it
# Numbers by their range, which is looked at before anything runs.
Count = Annotated[int, pydantic.Field(ge=1)]
Natural = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


def probe(unit: str = "", compares: bool = False) -> Callable[[Probe], Probe]:
    """Decorator: makes a probe known under its function's name, which no other has.

    unit: of what it measures; "" if that depends on its parameters.  compares: whether it needs an original.
    """

    def know(function: Probe) -> Probe:
        name = function.__name__
        assert name not in PROBES, f"there are two probes called {name}"
        PROBES[name] = function
        UNITS[name] = unit
        COMPARES.update([name] * compares)
        return function

    return know


def mistake(name: str, parameters: dict[str, Any], unit: str | None = None) -> tuple[tuple[str, ...], str] | None:
    """What is wrong with a call of a probe, as a place in the claim and why, before anything runs; None if nothing is.

    unit: in which the claim is made.
    """
    if name not in PROBES:
        return ("probe", "name"), f"probe {name!r} does not exist; choose from {', '.join(sorted(PROBES))}"
    signature = inspect.signature(PROBES[name], eval_str=True)
    taken = list(signature.parameters.values())[1:]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
    known = {parameter.name: parameter.annotation for parameter in taken if parameter.kind is not parameter.VAR_KEYWORD}
    for key, value in parameters.items():
        if key not in known and not open_ended:
            return ("probe", "parameters", key), f"probe {name} takes no {key!r}; expected {', '.join(known) or 'none'}"
        try:
            pydantic.TypeAdapter(known.get(key, Any)).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            return ("probe", "parameters", key), f"probe {name}: {key}={value!r:.100}: {why}"
    if lacking := [p.name for p in taken if p.default is p.empty and p.name in known and p.name not in parameters]:
        return ("probe", "parameters"), f"probe {name} needs {lacking[0]!r}"
    measures = parameters.get("unit") if "unit" in known else UNITS.get(name)
    if unit and measures and unit != measures:
        return ("claimed", "unit"), f"{unit!r} is claimed, and probe {name} measures {measures!r}; expected that"
    return None


def run(workshop: Workshop, name: str, parameters: dict[str, Any]) -> Measurement:
    """Run a probe.  Raises BadInput for an unknown probe, or parameters that it does not take."""
    if found := mistake(name, parameters):
        raise BadInput(found[1])
    return PROBES[name](workshop, **parameters)


@probe("share of weights")
def ternary_values(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of decoded weights that are -s, 0 or +s, s being the largest magnitude in their row."""
    artifact = workshop.artifact(stage)
    good = total = 0
    for row in artifact.rows:
        if row["stage"]:
            dense = artifact.decode(row)
            largest = dense.abs().amax(1, keepdim=True)
            good += int(((dense == 0) | (dense.abs() == largest)).sum())
            total += dense.numel()
    return workshop.exact(good / total, "share of weights", total, "weights of value -s, 0, +s", stage=stage)


@probe("share of weights")
def zero_share(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of ternary weights that are zero."""
    zeros = total = 0.0
    for _, packed in workshop.encoded(stage):
        count = math.prod(packed.shape)
        zeros += zero_fraction(packed) * count
        total += count
    return workshop.exact(zeros / total, "share of weights", int(total), "weights of value zero", stage=stage)


@probe("share of weights")
def code_agreement(workshop: Workshop, stage: StageText, reference: StageText) -> Measurement:
    """Share of weights to which two ternary rules give the same code."""
    same = total = 0
    for (_, ours), (_, theirs) in zip(workshop.encoded(stage), workshop.encoded(reference), strict=True):
        same += int((ours["codes"] == theirs["codes"]).sum())
        total += math.prod(ours.shape)
    return workshop.exact(same / total, "share of weights", total, "equal codes", stage=stage, reference=reference)


@probe("relative deviation")
def row_scale_error(workshop: Workshop, stage: StageText) -> Measurement:
    """Largest relative deviation of a stored row scale from that row's mean |w|."""
    worst, rows = 0.0, 0
    weights = {weight.name: weight for weight in workshop.model.weights()}
    artifact = workshop.artifact(stage)
    for row in artifact.rows:
        if row["stage"]:
            scale = artifact.decode(row).abs().amax(1).double()
            mean = weights[row["name"]].load().double().abs().mean(1)
            if weights[row["name"]].transposed:
                raise BadInput("row_scale_error: expected a model with nn.Linear layers")
            used = scale > 0
            worst = max(worst, float(((scale - mean).abs() / mean)[used].max()))
            rows += int(used.sum())
    return workshop.exact(worst, "relative deviation", rows, "row scale against mean |w|", stage=stage)


@probe("x")
def ratio(
    workshop: Workshop, stage: StageText, of: Literal["whole model", "touched tensors"], bits: Literal[16, 32]
) -> Measurement:
    """Bytes on disk of the whole model, or of the touched tensors, against `bits` per parameter."""
    for candidate in workshop.artifact(stage).ratios:
        if candidate.what == of and candidate.denominator.endswith(f"at {bits} bits"):
            return workshop.exact(
                candidate.ratio,
                "x",
                candidate.bytes,
                "compression ratio",
                stage=stage,
                of=of,
                denominator=candidate.denominator,
                denominator_bytes=candidate.denominator_bytes,
            )
    raise BadInput(f"ratio: of={of!r}, bits={bits}; expected 'whole model' or 'touched tensors', and 16 or 32")


@probe("x")
def ratio_of(workshop: Workshop, model: str, stage: StageText, bits: Count) -> Measurement:
    """As `ratio` of the whole model, for another model than the workshop's."""
    opened = open_model(model)
    artifact = compress(opened, stage, workshop.folder / f"ratio-of-{opened.name}", overwrite=True, progress=False)
    protocol = {"metric": "compression ratio", "model": opened.name, "stage": stage, "denominator": f"at {bits} bits"}
    inputs = {"model": opened.fingerprint, "artifact": artifact.sha256}
    return Measurement(artifact.ratio_to(bits), "x", None, artifact.weight_bytes, protocol, inputs=inputs)


@probe("bits/weight")
def bits_per_weight(workshop: Workshop, stage: StageText) -> Measurement:
    """Bytes of the planes on disk, in bits, over the number of weights they encode."""
    rows = [row for row in workshop.artifact(stage).rows if row["stage"]]
    count = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(8 * sum(row["bytes"] for row in rows) / count, "bits/weight", count, "bits on disk", stage=stage)


@probe("share of parameters")
def kept_in_16_bits(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of the parameters outside the touched weights (embedding, head, norms, biases) stored with 16 bits or more."""
    rows = [row for row in workshop.artifact(stage).rows if not row["stage"]]
    wide = sum(math.prod(row["shape"]) for row in rows if row["dtype"] in ("float16", "bfloat16", "float32"))
    total = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(wide / total, "share of parameters", total, "kept at 16 bits or more", stage=stage)


@probe("x")
def perplexity_factor(workshop: Workshop, stage: StageText) -> Measurement:
    """Perplexity of the compressed model over that of the original, on the same tokens."""
    kept = workshop.divergence(stage).perplexity_retention  # its error is of pairs, window by window
    return kept.through(lambda x: 1 / x, "x", metric="perplexity / original perplexity", stage=stage)


@probe("share of tokens")
def top1_agreement(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of tokens at which the compressed model and the original have the same most likely next token."""
    return workshop.divergence(stage).top1


@probe("relative difference")
def perplexity_formula(workshop: Workshop, tokens: Count = 511) -> Measurement:
    """Relative difference between our perplexity and the one from transformers' own loss, on one window."""
    text, ids = short_text(workshop, min(tokens, workshop.tokens, workshop.context - 1))
    ours = evaluation.perplexity(workshop.model, text, context=len(ids), progress=workshop.progress)
    batch = torch.tensor([ids])
    with torch.inference_mode():
        theirs = math.exp(float(workshop.model.model(input_ids=batch, labels=batch).loss))
    return workshop.exact(
        abs(ours.value / theirs - 1),
        "relative difference",
        len(ids) - 1,
        "perplexity against transformers' loss",
        text=workshop.text.name,
    )


def short_text(workshop: Workshop, tokens: int) -> tuple[Text, list[int]]:
    """The beginning of the workshop's text, of about so many tokens but never more, and its ids: one window, whatever part
    of a longer text would be sampled."""
    ids = workshop.model.encode(workshop.text.text[: 20 * tokens])
    for count in range(tokens, 1, -1):  # a cut may fall where tokens are others, and more
        text = workshop.model.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if len(again := workshop.model.encode(text)) <= tokens:
            return Text(f"beginning of {workshop.text.name}", workshop.text.split, text), again
    raise BadInput(f"text {workshop.text.name}: is too short to take a window of it")
