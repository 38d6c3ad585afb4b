"""Packed layers that compute without first becoming dense."""

from .linear import TernaryLinear

__all__ = ["TernaryLinear"]
