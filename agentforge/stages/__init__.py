"""The stages, one file each, and the registry that knows them by name."""

import importlib
import pkgutil

from .base import InputStatistics, Layer, Stage, register
from .text import from_json, get, names, parse

__all__ = ["InputStatistics", "Layer", "Stage", "from_json", "get", "names", "parse", "register"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
