"""Packed layers that compute without first becoming dense."""

from .decoding import PackedEmbedding, PackedLinear
from .linear import TernaryLinear

__all__ = ["PackedEmbedding", "PackedLinear", "TernaryLinear"]
