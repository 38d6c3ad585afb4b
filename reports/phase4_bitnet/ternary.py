"""Probes of ternary models, of what is kept beside their weights, and of the perplexity that they are measured by."""

from __future__ import annotations

import math

import torch

from agentforge import evaluation
from agentforge.audit.probes import Count, StageText, probe
from agentforge.audit.workshop import Workshop
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement, Text
from agentforge.opening import open_model
from agentforge.pipeline import compress


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
def ratio_of(workshop: Workshop, model: str, stage: StageText, bits: Count) -> Measurement:
    """As `ratio` of the whole model, for another model than the workshop's."""
    opened = open_model(model)
    artifact = compress(opened, stage, workshop.folder / f"ratio-of-{opened.name}", overwrite=True, progress=False)
    protocol = {"metric": "compression ratio", "model": opened.name, "stage": stage, "denominator": f"at {bits} bits"}
    inputs = {"model": opened.fingerprint, "artifact": artifact.sha256}
    return Measurement(artifact.ratio_to(bits), "x", None, artifact.weight_bytes, protocol, inputs=inputs)


@probe("share of parameters")
def kept_in_16_bits(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of the parameters outside the touched weights (embedding, head, norms, biases) stored with 16 bits or more."""
    rows = [row for row in workshop.artifact(stage).rows if not row["stage"]]
    wide = sum(math.prod(row["shape"]) for row in rows if row["dtype"] in ("float16", "bfloat16", "float32"))
    total = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(wide / total, "share of parameters", total, "kept at 16 bits or more", stage=stage)


@probe("relative difference")
def perplexity_formula(workshop: Workshop, tokens: Count = 511) -> Measurement:
    """Relative difference between our perplexity and the one from transformers' own loss, on one window."""
    text, ids = short_text(workshop, min(tokens, workshop.tokens, workshop.context - 1))
    ours = evaluation.perplexity(workshop.model, text, context=len(ids), progress=False)
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
