"""agentforge: compress a language model, load it back from disk, and prove what was measured."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import TYPE_CHECKING, Any

from .errors import AgentForgeError
from .version import __version__ as __version__

# torch and transformers load when a name is first used, so that `import agentforge` takes milliseconds.
_HOMES = {
    "open_model": "opening",
    "load": "opening",
    "export": "exports",
    "fit": "allocation",
    "perplexity": "evaluation",
    "divergence": "evaluation",
    "evaluate_tasks": "evaluation",
    "accuracy": "evaluation",
}
_MODULES = {module.name for module in pkgutil.iter_modules(__path__)} - {"__main__"}
__all__ = [
    "accuracy",
    "audit",
    "compress",
    "divergence",
    "evaluate_tasks",
    "export",
    "fit",
    "load",
    "open_model",
    "perplexity",
    "stages",
]

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from . import audit, stages
    from .allocation import fit
    from .artifact import Artifact
    from .chain import Chain
    from .evaluation import accuracy, divergence, evaluate_tasks, perplexity
    from .exports import export
    from .models import LanguageModel
    from .opening import load, open_model
    from .stages import Stage


def compress(
    model: LanguageModel | str | Path,
    stage: Stage | Mapping[str, Stage] | Chain | str | Path,
    out: str | Path,
    **options: Any,
) -> Artifact:
    """Compress `model` with one stage, or with a chain of stages behind gates, into the folder `out`.

    stage: a stage or its text, such as "rounding:bits=4,group=64 | entropy"; a stage for each weight by its name; or a
    Chain, or the path of one (.yaml, .yml).
    options: of `pipeline.compress` for a stage, of `chain.run_chain` for a chain.

    A chain gives the last artifact that passed its gates, and raises AgentForgeError if none did.  Raises BadInput if
    model, stage, chain or `out` cannot be used.
    """
    from . import chain, pipeline

    if isinstance(stage, chain.Chain | os.PathLike) or (isinstance(stage, str) and stage.endswith((".yaml", ".yml"))):
        result = chain.run_chain(model, stage, out, **options)
        if result.artifact is None:
            last = result.attempts[-1]
            raise AgentForgeError(
                f"{out}: no step of the chain was accepted; {last['name']}, the last one tried: {last['reason']}"
            )
        return result.artifact
    return pipeline.compress(model, stage, out, **options)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'agentforge' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
