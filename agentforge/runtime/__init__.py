"""Packed layers that compute without becoming dense first."""

from .layers import PackedEmbedding, PackedLinear, PackedWeight, SharedPlanes, resident_bytes
from .linear import TernaryLinear

__all__ = ["PackedEmbedding", "PackedLinear", "PackedWeight", "SharedPlanes", "TernaryLinear", "resident_bytes"]
