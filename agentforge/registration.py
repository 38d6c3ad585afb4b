"""Tells transformers of artifacts, without importing it: `import agentforge` stays fast, and the order does not matter."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Register artifacts with transformers' quantizers: now if these are imported already, else right after they are."""
    if QUANTIZERS in sys.modules:
        from . import huggingface  # noqa: F401  (registers)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; has the module that the other finders find registered with, once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that another finder has for transformers' quantizers, whose loader then registers, too; else None."""
        if name != QUANTIZERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
