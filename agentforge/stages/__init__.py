"""The stages, one file each, and the registry that knows them by name."""

from . import curves, ecsq, refined, rounding, seedlm, ternary, trajectory, vptq
from .base import Layer, Stage, from_json, get, names, parse, register

__all__ = [
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
