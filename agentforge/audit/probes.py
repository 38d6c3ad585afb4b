"""Probes: functions that measure what a claim is about.

A probe gets the workshop (the original model, a folder for artifacts, how much text to score) and the parameters that
stand in the claim; it returns a Measurement.  What it measures is always loaded back from disk.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import evaluation, stages
from ..artifact import Artifact, load
from ..errors import BadInput
from ..evaluation import Divergence, Measurement, Text
from ..models import LanguageModel, Weight, open_model
from ..pipeline import compress
from ..planes import Packed
from ..stages.ternary import zero_fraction

Probe = Callable[..., Measurement]
PROBES: dict[str, Probe] = {}


@dataclass(frozen=True)
class Effort:
    """How much is measured.  tokens: scored for likelihoods.  every: of the model's matrices, one in so many is in the
    sample that slow probes take.  seeds: of probes with randomness."""

    name: str
    tokens: int
    every: int
    seeds: int


EFFORTS = {e.name: e for e in (Effort("smoke", 511, 42, 2), Effort("standard", 2047, 14, 3), Effort("full", 6141, 1, 5))}


@dataclass
class Workshop:
    """What probes share, so that each artifact is made, and each text scored, once.

    model: the original.  folder: where artifacts go.  text, tokens, context: how likelihoods are measured.
    effort: how large samples are.
    """

    model: LanguageModel
    folder: Path
    text: Text
    tokens: int
    context: int = 2048
    progress: bool = True
    effort: Effort = EFFORTS["standard"]
    _divergences: dict[str, Divergence] = field(default_factory=dict)

    def artifact(self, stage: str, embeddings: bool = False) -> Artifact:
        """The model compressed with `stage`, on disk."""
        parsed = stages.parse(stage)
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{parsed}{'+embeddings' if embeddings else ''}")
        return compress(
            self.model,
            parsed,
            self.folder / f"{self.model.name}-{name}",
            embeddings=embeddings,
            overwrite=True,
            progress=self.progress,
        )

    def compare(self, stages: list[str]) -> None:
        """Take `divergence` of several stages in one pass over the text."""
        missing = [stage for stage in dict.fromkeys(stages) if stage not in self._divergences]
        if missing:
            results = evaluation.divergences(
                [load(self.artifact(stage).path) for stage in missing],
                self.model,
                text=self.text,
                tokens=self.tokens,
                context=self.context,
                progress=self.progress,
            )
            self._divergences.update(zip(missing, results, strict=True))

    def divergence(self, stage: str) -> Divergence:
        """KL, agreement and both perplexities of the model compressed with `stage`, loaded back from disk."""
        self.compare([stage])
        return self._divergences[stage]

    def encoded(self, stage: str) -> list[tuple[str, Packed]]:
        """Name and planes of every encoded tensor, read back from disk."""
        artifact = self.artifact(stage)
        return [(row["name"], p) for row in artifact.rows if row["stage"] and isinstance(p := artifact.read(row), Packed)]

    def sample(self) -> list[Weight]:
        """The matrices that slow probes look at: one in `effort.every`, of all depths and kinds."""
        weights = self.model.weights()
        # A step that shares no divisor with the number of kinds in a block visits all of them.
        return weights[:: self.effort.every + (self.effort.every % 7 == 0)] if self.effort.every > 1 else weights

    def exact(self, value: float, unit: str, n: int, metric: str, **protocol: Any) -> Measurement:
        """A measurement without sampling error: a count, or a size."""
        return Measurement(value, unit, None, n, {"metric": metric, **protocol}, inputs={"model": self.model.fingerprint})


def probe(function: Probe) -> Probe:
    """Decorator: makes a probe known under its function's name."""
    PROBES[function.__name__] = function
    return function


def run(workshop: Workshop, name: str, parameters: dict[str, Any]) -> Measurement:
    """Run a probe.  Raises BadInput for an unknown probe, or parameters that it does not take."""
    if name not in PROBES:
        raise BadInput(f"probe {name!r} does not exist; there are {', '.join(sorted(PROBES))}")
    try:
        inspect.signature(PROBES[name]).bind(workshop, **parameters)
    except TypeError as error:
        raise BadInput(f"probe {name}: {error}") from None
    return PROBES[name](workshop, **parameters)


@probe
def ternary_values(workshop: Workshop, stage: str) -> Measurement:
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


@probe
def zero_share(workshop: Workshop, stage: str) -> Measurement:
    """Share of ternary weights that are zero."""
    zeros = total = 0.0
    for _, packed in workshop.encoded(stage):
        count = math.prod(packed.shape)
        zeros += zero_fraction(packed) * count
        total += count
    return workshop.exact(zeros / total, "share of weights", int(total), "weights of value zero", stage=stage)


@probe
def code_agreement(workshop: Workshop, stage: str, reference: str) -> Measurement:
    """Share of weights to which two ternary rules give the same code."""
    same = total = 0
    for (_, ours), (_, theirs) in zip(workshop.encoded(stage), workshop.encoded(reference), strict=True):
        same += int((ours["codes"] == theirs["codes"]).sum())
        total += math.prod(ours.shape)
    return workshop.exact(same / total, "share of weights", total, "equal codes", stage=stage, reference=reference)


@probe
def row_scale_error(workshop: Workshop, stage: str) -> Measurement:
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


@probe
def ratio(workshop: Workshop, stage: str, of: str, bits: int) -> Measurement:
    """Bytes on disk of the whole model, or of the touched tensors, against `bits` a parameter."""
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


@probe
def bits_per_weight(workshop: Workshop, stage: str) -> Measurement:
    """Bytes of the planes on disk, in bits, over the number of weights they encode."""
    rows = [row for row in workshop.artifact(stage).rows if row["stage"]]
    count = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(8 * sum(row["bytes"] for row in rows) / count, "bits/weight", count, "bits on disk", stage=stage)


@probe
def kept_in_16_bits(workshop: Workshop, stage: str) -> Measurement:
    """Share of the parameters outside the touched weights (embedding, head, norms, biases) stored with 16 bits or more."""
    rows = [row for row in workshop.artifact(stage).rows if not row["stage"]]
    wide = sum(math.prod(row["shape"]) for row in rows if row["dtype"] in ("float16", "bfloat16", "float32"))
    total = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(wide / total, "share of parameters", total, "kept at 16 bits or more", stage=stage)


@probe
def perplexity_factor(workshop: Workshop, stage: str) -> Measurement:
    """Perplexity of the compressed model over that of the original, on the same tokens."""
    result = workshop.divergence(stage)
    after, before = result.perplexity, result.original_perplexity
    value = after.value / before.value
    # Both errors come from the same tokens; taking them as independent overstates the spread of the ratio.
    spread = value * math.hypot((after.stderr or 0) / after.value, (before.stderr or 0) / before.value)
    return Measurement(
        value,
        "x",
        spread,
        after.n,
        {**after.protocol, "metric": "perplexity ratio", "stage": stage},
        inputs={**after.inputs, "original": before.inputs["model"]},
    )


@probe
def top1_agreement(workshop: Workshop, stage: str) -> Measurement:
    """Share of tokens at which the compressed model and the original have the same most likely next token."""
    return workshop.divergence(stage).top1


@probe
def perplexity_formula(workshop: Workshop, tokens: int = 1023) -> Measurement:
    """Relative difference between our perplexity and the one from transformers' own loss, on one window."""
    tokens = min(tokens, workshop.tokens, workshop.context - 1)
    ours = evaluation.perplexity(
        workshop.model, workshop.text, context=tokens + 1, tokens=tokens, progress=workshop.progress
    )
    ids = workshop.model.tokenizer(workshop.text.text, add_special_tokens=False, verbose=False)["input_ids"][: tokens + 1]
    batch = torch.tensor([ids])
    with torch.inference_mode():
        theirs = math.exp(float(workshop.model.model(input_ids=batch, labels=batch).loss))
    return workshop.exact(
        abs(ours.value / theirs - 1),
        "relative difference",
        tokens,
        "perplexity against transformers' loss",
        text=workshop.text.name,
    )


@probe
def short_functions(workshop: Workshop, lines: int = 60) -> Measurement:
    """Share of the package's functions that are at most `lines` lines long."""
    functions = [f for _, f in _functions()]
    short = sum((f.end_lineno or f.lineno) - f.lineno + 1 <= lines for f in functions)
    return workshop.exact(short / len(functions), "share of functions", len(functions), f"at most {lines} lines")


@probe
def typed_functions(workshop: Workshop) -> Measurement:
    """Share of the package's public functions whose arguments and result all have type hints."""
    functions = [(inside, f) for inside, f in _functions() if not f.name.startswith("_")]
    typed = 0
    for inside_class, f in functions:
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs][1 if inside_class else 0 :]
        typed += f.returns is not None and all(a.annotation is not None for a in arguments)
    return workshop.exact(typed / len(functions), "share of functions", len(functions), "public and fully typed")


@probe
def documented_functions(workshop: Workshop) -> Measurement:
    """Share of the package's public functions that have a docstring."""
    functions = [f for _, f in _functions() if not f.name.startswith("_")]
    documented = sum(ast.get_docstring(f) is not None for f in functions)
    return workshop.exact(documented / len(functions), "share of functions", len(functions), "public and documented")


def _functions() -> list[tuple[bool, ast.FunctionDef]]:
    """Every function of the package that is not nested in another, and whether it is a method."""
    found: list[tuple[bool, ast.FunctionDef]] = []
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.append((False, node))
            elif isinstance(node, ast.ClassDef):
                for item in node.body:
                    # What @overload marks has no code of its own.
                    if isinstance(item, ast.FunctionDef) and not any(_named(d, "overload") for d in item.decorator_list):
                        static = any(_named(d, "staticmethod") for d in item.decorator_list)
                        found.append((not static, item))
    return found


def _named(decorator: ast.expr, name: str) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == name


def workshop_for(
    model: str, folder: Path, text: str | None, tokens: int, context: int = 2048, progress: bool = True
) -> Workshop:
    """A workshop around a model by name, with a text by name (or the first of the chain that is there)."""
    return Workshop(open_model(model), folder, evaluation.find_text(text), tokens, context, progress)
