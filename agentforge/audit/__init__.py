"""The audit: claims as data, probes that measure them, verdicts, and the record every report is drawn from."""

from .claims import Claim, ClaimsFile, Judged, judge, read_claims
from .probes import PROBES, Workshop, workshop_for
from .record import measure
from .report import audit as run

__all__ = ["PROBES", "Claim", "ClaimsFile", "Judged", "Workshop", "judge", "measure", "read_claims", "run", "workshop_for"]
