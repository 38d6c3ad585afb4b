"""The stages, one file each, and the registry that knows them by name."""

from . import rounding, ternary, trajectory, vptq
from .base import Layer, Stage, from_json, get, names, parse, register

__all__ = ["Layer", "Stage", "from_json", "get", "names", "parse", "register", "rounding", "ternary", "trajectory", "vptq"]
