"""Weights go in at one end, evidence comes out at the other, and no import flows backwards."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "agentforge"
# From the bottom to the top: a file imports only files of its own line and of the lines above this one in the list.
LAYERS = (
    ("errors", "version", "escaping", "schemas", "digits", "names", "progress"),
    ("bits", "cells", "trellis", "entropy", "planes", "tensorfiles", "folders", "yamlfiles"),
    ("stages",),
    ("models", "quantised", "adapters", "gguf_import", "cache"),
    ("artifact",),
    ("runtime",),
    ("opening",),
    ("blockwise", "evaluation", "statistics"),
    ("execution", "pipeline", "sequential", "tracking", "modelcard", "huggingface", "exports"),
    ("chain",),
    ("training", "handoff", "registry", "allocation", "fit_for"),
    ("cli", "audit", "dashboard", "lm_eval", "__main__", ""),
)


def imports(file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a file imports, wherever: inside functions and under TYPE_CHECKING, too."""
    package = ("agentforge", *file.relative_to(PACKAGE).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module or ""]
            )
            found.update(f"{base}.{name.name}" if f"{base}.{name.name}" in modules else base for name in node.names)
    return found & modules.keys()


def graph() -> dict[str, set[str]]:
    modules = {
        ".".join(("agentforge", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    return {name: imports(file, modules) - {name} for name, file in modules.items()}


def test_no_import_comes_back_to_where_it_began() -> None:
    found = graph()
    assert len(found) > 60
    assert found["agentforge.opening"] >= {"agentforge.runtime.packed", "agentforge.gguf_import"}  # both inside functions
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError, which names the files


def test_every_import_points_down() -> None:
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    ranks = {name: layer[f"{name}.".split(".")[1]] for name in graph()}
    assert [(a, b) for a, imported in graph().items() for b in imported if ranks[b] > ranks[a]] == []


def test_the_documentation_draws_these_layers() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.partition("```text\n")[2].partition("```")[0]
    rows = [line for line in drawn.splitlines() if line.strip(" |")]
    merged: list[list[str]] = []
    for line in rows:
        names = [word.rstrip("/:") for word in line[15:].partition(": ")[0].split()]
        if line[:15].strip(" |"):
            merged.append(names)
        else:  # a layer of two lines
            merged[-1] += names
    assert merged == [[name for name in layer if name not in ("__main__", "")] for layer in LAYERS]
