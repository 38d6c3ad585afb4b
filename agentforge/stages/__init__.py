"""The stages, one file each, and the registry that knows them by name."""

from . import rounding, ternary
from .base import Stage, from_json, get, names, parse, register

__all__ = ["Stage", "from_json", "get", "names", "parse", "register", "rounding", "ternary"]
