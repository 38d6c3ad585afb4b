"""Probes: functions that measure what a claim is about.

A probe gets the workshop (the original model, a folder for artifacts, how much text to score) and the parameters in
the claim; it returns a Measurement, or raises Unmeasured if something is missing that it needs.  What it
measures is always loaded back from disk.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import math
import operator
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from .. import stages
from ..errors import BadInput
from ..evaluation import Measurement
from ..names import REPORTS
from ..stages.ternary import zero_fraction
from .workshop import LEFT_OUT, Unmeasured, Workshop

Probe = Callable[..., Measurement]
PROBES: dict[str, Probe] = {}
POINTS = {"confirmed": 1.0, "partly": 0.5, "refuted": 0.0}
UNITS: dict[str, str] = {}  # of what a probe measures, unless its parameters say it
COMPARES: set[str] = set()  # the probes that need an original to compare with
ONE_PASS: set[str] = set()  # those of how a stage changes predictions: all their stages are scored in one pass over the text
SLOW: set[str] = set()  # those that take longer than the quick budget has for everything
UNKEPT: set[str] = set()  # those that read what no hash covers: other rows, the coverage data, the README


def _stage(text: str) -> str:
    stages.parse(text)
    return text


StageText = Annotated[str, pydantic.AfterValidator(_stage)]  # as `stages.parse` takes it
# Numbers by their range, which is looked at before anything runs.
Count = Annotated[int, pydantic.Field(ge=1)]
Natural = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


def probe(
    unit: str = "", compares: bool = False, slow: bool = False, kept: bool = True, one_pass: bool = False
) -> Callable[[Probe], Probe]:
    """Decorator: makes a probe known under its function's name, which no other has.

    unit: of what it measures; "" if that depends on its parameters.  compares: whether it needs an original.  slow: whether
    the quick budget leaves it out.  kept: whether what it measured once can be taken from the cache.  one_pass: whether
    all its stages are scored together.
    """

    def know(function: Probe) -> Probe:
        name = function.__name__
        assert name not in PROBES, f"there are two probes called {name}"
        PROBES[name] = function
        UNITS[name] = unit
        COMPARES.update([name] * compares)
        ONE_PASS.update([name] * one_pass)
        SLOW.update([name] * slow)
        UNKEPT.update([name] * (not kept))
        return function

    return know


def import_probes(folder: Path) -> types.ModuleType | None:
    """Import `probes.py` of a report's folder, which registers its probes; None if it has none.

    This runs code, so the folder has to be trusted.  Reports of one folder are one package, and can share probes; those
    of the checkout are the package `reports`.  Raises BadInput if the import fails.
    """
    file, parent = folder / "probes.py", folder.parent
    if not file.is_file():
        return None
    package = "reports" if parent == REPORTS else f"reports_{hashlib.sha256(str(parent).encode()).hexdigest()[:16]}"
    if package not in sys.modules:
        sys.modules[package] = module = types.ModuleType(package)
        module.__path__ = [str(parent)]
    try:
        return importlib.import_module(f"{package}.{folder.name}.probes")
    except Exception as error:
        raise BadInput(f"{file}: cannot be imported ({type(error).__name__}: {error})") from None


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


def share(workshop: Workshop, right: list[bool], what: str, metric: str, **protocol: Any) -> Measurement:
    """The share of cases that came out right."""
    return workshop.exact(sum(right) / len(right), f"share of {what}", len(right), metric, **protocol)


@probe()
def arithmetic(workshop: Workshop, expression: str, unit: str) -> Measurement:
    """An expression of numbers, + - * / **, log2, min and max: what follows from a claim's own figures."""
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body, expression)
    except BadInput:
        raise
    except (SyntaxError, ArithmeticError, ValueError, TypeError) as error:
        raise BadInput(f"arithmetic: {expression!r} has no value ({error})") from None
    return Measurement(value, unit, None, 1, {"metric": "arithmetic", "expression": expression})


_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"log2": math.log2, "min": min, "max": max}


def _evaluate(node: ast.expr, text: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return float(_OPERATORS[type(op)](_evaluate(left, text), _evaluate(right, text)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, text)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return float(_FUNCTIONS[name](*(_evaluate(argument, text) for argument in arguments)))
    raise BadInput(f"arithmetic: {text!r} holds {ast.unparse(node)!r}; expected numbers, + - * / **, log2, min and max")


@probe("share of points", kept=False)
def score(workshop: Workshop, sections: list[str] | None = None, stages: list[str] | None = None) -> Measurement:
    """Share of points over the rows of some sections (default: all), about some stages: confirmed 1, partly 1/2, refuted 0.

    Rows without a verdict do not count; their number is in the protocol.  Scores are not rows of other scores.
    A score is not computed from what a small budget leaves over.
    """
    rows = [
        row
        for row in workshop.rows
        if row["probe"] != "score"
        and (sections is None or row["section"] in sections)
        and (stages is None or row["stage"] in stages)
    ]
    if left_out := sum(row["needs"].endswith(LEFT_OUT) for row in rows):
        raise Unmeasured(f"the {left_out} of its rows that a small budget leaves out; {LEFT_OUT}")
    points = [POINTS[row["verdict"]] for row in rows if row["verdict"] in POINTS]
    if not points:
        raise Unmeasured("at least one row with a verdict among those that the score counts")
    counted = {"sections": sections or "all", "stages": stages or "all", "without a verdict": len(rows) - len(points)}
    return workshop.exact(sum(points) / len(points), "share of points", len(points), "points over rows", **counted)


@probe("share of weights")
def zero_share(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of ternary weights that are zero."""
    zeros = total = 0.0
    for _, packed in workshop.encoded(stage):
        count = math.prod(packed.shape)
        zeros += zero_fraction(packed) * count
        total += count
    return workshop.exact(zeros / total, "share of weights", int(total), "weights of value zero", stage=stage)


@probe("x")
def ratio(
    workshop: Workshop, stage: StageText, of: Literal["whole model", "touched tensors"], bits: Literal[16, 32]
) -> Measurement:
    """Bytes on disk of the whole model, or of the touched tensors, against `bits` per parameter."""
    found = workshop.artifact(stage).ratios.of(of, bits)
    against = {"denominator": found.denominator, "denominator_bytes": found.denominator_bytes}
    return workshop.exact(found.ratio, "x", found.bytes, "compression ratio", stage=stage, of=of, **against)


@probe("bits/weight")
def bits_per_weight(workshop: Workshop, stage: StageText) -> Measurement:
    """Bytes of the planes on disk, in bits, over the number of weights they encode."""
    rows = [row for row in workshop.artifact(stage).rows if row["stage"]]
    count = sum(math.prod(row["shape"]) for row in rows)
    return workshop.exact(8 * sum(row["bytes"] for row in rows) / count, "bits/weight", count, "bits on disk", stage=stage)


@probe("x", one_pass=True)
def perplexity_factor(workshop: Workshop, stage: StageText) -> Measurement:
    """Perplexity of the compressed model over that of the original, on the same tokens."""
    kept = workshop.divergence(stage).perplexity_retention  # its error is of pairs, window by window
    return kept.through(lambda x: 1 / x, "x", metric="perplexity / original perplexity", stage=stage)


@probe("share of tokens", one_pass=True)
def top1_agreement(workshop: Workshop, stage: StageText) -> Measurement:
    """Share of tokens at which the compressed model and the original have the same most likely next token."""
    return workshop.divergence(stage).top1
