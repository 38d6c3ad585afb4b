"""Packed layers that compute without becoming dense first."""

from .layers import PackedEmbedding, PackedLinear, PackedWeight, SharedPlanes, held_bytes
from .linear import TernaryLinear

__all__ = ["PackedEmbedding", "PackedLinear", "PackedWeight", "SharedPlanes", "TernaryLinear", "held_bytes"]
