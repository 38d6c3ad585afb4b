"""The probes that the claims of this report name."""

from ..claims_vs_measurements import paper, phase5
from ..phase4_bitnet import project
from . import chain, dashboard, stages, suites

__all__ = ["chain", "dashboard", "paper", "phase5", "project", "stages", "suites"]
