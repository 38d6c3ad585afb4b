"""Probes of the project itself: its code, its tests' coverage, and the figures that it prints."""

from __future__ import annotations

import ast
import json
import math
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentforge import evaluation, registry
from agentforge.artifact import Artifact
from agentforge.audit.probes import Count, bits_per_weight, probe
from agentforge.audit.workshop import PACKAGE, Unmeasured, Workshop
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement
from agentforge.evaluation.texts import CHECKOUT
from agentforge.opening import load, open_model
from agentforge.pipeline import compress
from agentforge.tensorfiles import write_json


@probe("share of lines", kept=False)
def coverage(workshop: Workshop, files: str = "") -> Measurement:
    """Share of the package's lines that the last whole test run executed, from coverage.py's data (`make test` writes it).

    files: only those whose path within the package begins so.
    """
    try:
        import coverage as coverage_py
    except ImportError:
        raise Unmeasured("coverage.py, and a whole test run: make test") from None
    data = CHECKOUT / ".coverage"
    if not data.is_file():
        raise Unmeasured("coverage data of a whole test run: make test, then audit again")
    measuring = coverage_py.Coverage(data_file=str(data), config_file=str(CHECKOUT / "pyproject.toml"))
    measuring.load()
    lines = missing = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.relative_to(PACKAGE).as_posix().startswith(files):
            continue
        if path.stat().st_mtime > data.stat().st_mtime:
            raise Unmeasured(f"coverage data that is younger than {path.name}: make test, then audit again")
        _, statements, _, unexecuted, _ = measuring.analysis2(str(path))
        lines, missing = lines + len(statements), missing + len(unexecuted)
    if not lines:
        raise Unmeasured(f"files of the package whose path begins with {files!r}")
    return workshop.exact(1 - missing / lines, "share of lines", lines, "lines executed by the tests", files=files or "all")


@probe("share of figures", slow=True, kept=False)
def figures_that_come_back(workshop: Workshop) -> Measurement:
    """Share of the figures in README's table of stages that come back when they are measured again.

    Bits and ratios to the last digit that is printed.  Perplexities and divergences within two standard errors, theirs and
    ours together, if README's were measured on as many tokens as are scored here; else they do not count.
    """
    readme = CHECKOUT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")]
    header = next((line for line in lines if line[0] == "Stage"), [])
    rows = [dict(zip(header, line, strict=True)) for line in lines if ":" in line[0] and len(line) == len(header)]
    if not rows or workshop.model.name != "smollm2-135m":
        raise Unmeasured("README's table of stages, and smollm2-135m, which it is about")
    said = rf"(Likelihoods of stages|all likelihoods): {workshop.tokens:,} tokens of {workshop.text.name}"
    likelihoods = re.search(said, text) is not None
    came = total = 0
    for row in rows:
        stage = row["Stage"]
        sizes = workshop.remember("sizes", {"stage": stage}, partial(_sizes, workshop, stage))
        workshop.used[stage] = sizes["sha256"]
        same = [
            row["Bits per weight"] == f"{sizes['bits']:.3f}",
            row["Touched tensors, to 16 bits"] == f"{sizes['touched tensors']:.2f}x",
            row["Whole model, to 16 bits"] == f"{sizes['whole model']:.2f}x",
        ]
        if likelihoods:
            found = workshop.divergence(stage)
            same += [_near(row["Perplexity"], found.perplexity), _near(row["KL (nats per token)"], found.kl)]
        came, total = came + sum(same), total + len(same)
    return workshop.exact(
        came / total, "share of figures", total, "README's figures measured again", likelihoods=likelihoods
    )


def _sizes(workshop: Workshop, stage: str) -> dict[str, Any]:
    """Bits per weight, ratios against 16 bits, and hash of the model compressed with `stage`, on disk."""
    made = workshop.artifact(stage)
    ratios = {r.what: r.ratio for r in made.ratios if r.denominator.endswith("at 16 bits")}
    return {"bits": bits_per_weight(workshop, stage).value, "sha256": made.sha256, **ratios}


def _near(printed: str, measured: Measurement) -> bool:
    value, spread = (float(part) for part in printed.split("±"))
    return abs(value - measured.value) <= 2 * math.hypot(spread, measured.stderr or 0.0)


@probe("share of facts")
def registry_facts(workshop: Workshop) -> Measurement:
    """Share of facts that MLflow's own client reads back of two artifacts of digits-mlp, the second made from the first.

    In a registry of their own: both forms there, the dequantised one naming the packed, hash, base, parent, a measured
    accuracy, sources that hold what the hashes say, and no second version when the first is registered again."""
    model = open_model("digits-mlp")
    first = compress(model, "rounding:bits=4,group=64", workshop.folder / "registry-a", overwrite=True, progress=False)
    second = compress(load(first.path), "ternary", workshop.folder / "registry-b", overwrite=True, progress=False)
    right: list[bool] = []
    with tempfile.TemporaryDirectory(dir=workshop.folder) as scratch:
        uri = f"sqlite:///{Path(scratch).absolute() / 'mlflow.db'}"
        for artifact, parent in ((first, None), (second, "digits-mlp/1"), (first, None)):
            measured = evaluation.accuracy(load(artifact.path))
            record = Path(scratch) / "record.json"
            write_json(record, {"measurements": {"accuracy": measured.to_json()}})
            try:
                registry.register(artifact.path, uri=uri, record=record)
            except BadInput as error:
                if "the registry needs the package" in str(error):
                    raise Unmeasured("MLflow: pip install 'agentforge[registry]'") from None
                raise
            right += _facts_read_back(uri, artifact, model.fingerprint, parent, measured.value)
        versions = _mlflow_client(uri).search_model_versions("name = 'digits-mlp'")
        right.append(len(versions) == 2)
    return workshop.exact(sum(right) / len(right), "share of facts", len(right), "facts read back", model="digits-mlp")


def _mlflow_client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def _facts_read_back(uri: str, artifact: Artifact, base: str, parent: str | None, accuracy: float) -> list[bool]:
    """What stands in the registry of both forms of an artifact, one truth value per fact; all false if one is missing."""
    found = _mlflow_client(uri).search_model_versions(f"tags.manifest_sha256 = '{artifact.sha256}'")
    if len(found) != 1:
        return [False] * 7
    version, same = found[0], load(artifact.path).state_dict()
    opened = open_model(version.tags["dequantised_source"])
    return [
        opened.source.get("artifact_manifest_sha256") == artifact.sha256,
        version.tags["base_sha256"] == base,
        version.tags.get("parent_version") == parent,
        json.loads(version.tags["metric.accuracy"])["value"] == accuracy,
        Artifact(version.source).sha256 == artifact.sha256,
        opened.fingerprint == version.tags["dequantised_fingerprint"],
        all(torch.equal(opened.tensor(name), tensor.float()) for name, tensor in same.items()),
    ]


@probe("share of functions")
def short_functions(workshop: Workshop, lines: Count = 60) -> Measurement:
    """Share of the package's functions that are at most `lines` lines long."""
    functions = [f for _, f in _functions()]
    short = sum((f.end_lineno or f.lineno) - f.lineno + 1 <= lines for f in functions)
    return workshop.exact(short / len(functions), "share of functions", len(functions), f"at most {lines} lines")


@probe("share of functions")
def typed_functions(workshop: Workshop) -> Measurement:
    """Share of the package's public functions whose arguments and result all have type hints."""
    functions = [(inside, f) for inside, f in _functions() if not f.name.startswith("_")]
    typed = 0
    for inside_class, f in functions:
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs][1 if inside_class else 0 :]
        typed += f.returns is not None and all(a.annotation is not None for a in arguments)
    return workshop.exact(typed / len(functions), "share of functions", len(functions), "public and fully typed")


@probe("share of functions")
def documented_functions(workshop: Workshop) -> Measurement:
    """Share of the package's public functions that have a docstring."""
    functions = [f for _, f in _functions() if not f.name.startswith("_")]
    documented = sum(ast.get_docstring(f) is not None for f in functions)
    return workshop.exact(documented / len(functions), "share of functions", len(functions), "public and documented")


def _functions() -> list[tuple[bool, ast.FunctionDef]]:
    """Every function of the package that is not nested in another, and whether it is a method."""
    found: list[tuple[bool, ast.FunctionDef]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
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
