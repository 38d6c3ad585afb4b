"""agentforge: compress a language model, load it back from disk, and prove what was measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torch and transformers load when a name is first used, so that `import agentforge` takes milliseconds.
_HOMES = {
    "open_model": "models",
    "compress": "pipeline",
    "load": "artifact",
    "perplexity": "evaluation",
    "divergence": "evaluation",
    "accuracy": "evaluation",
}
_MODULES = ("artifact", "audit", "evaluation", "models", "pipeline", "planes", "runtime", "stages", "statistics")
__all__ = ["accuracy", "audit", "compress", "divergence", "load", "open_model", "perplexity", "stages"]

if TYPE_CHECKING:
    from . import audit, stages
    from .artifact import load
    from .evaluation import accuracy, divergence, perplexity
    from .models import open_model
    from .pipeline import compress


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
