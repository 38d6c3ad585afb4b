"""The probes that the claims of this report name."""

from ..phase4_bitnet import training
from ..phase8_compression import stages
from . import own, paper, phase5

__all__ = ["own", "paper", "phase5", "stages", "training"]
