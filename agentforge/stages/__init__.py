"""The stages, one file each, and the registry that knows them by name."""

from . import curves, ecsq, refined, rounding, seedlm, ternary, trajectory, vptq
from .base import InputStatistics, Layer, Stage, register
from .text import from_json, get, names, parse

__all__ = [
    "InputStatistics",
    "Layer",
    "Stage",
    "curves",
    "ecsq",
    "from_json",
    "get",
    "names",
    "parse",
    "refined",
    "register",
    "rounding",
    "seedlm",
    "ternary",
    "trajectory",
    "vptq",
]
