"""The audit: claims as data, probes that measure them, verdicts, and the record every report is drawn from.

`agentforge.audit(report)` runs a report; the module is callable so that the verb and the subpackage can share a name.
"""

import sys
import types
from pathlib import Path
from typing import Any

from . import subject_probes  # noqa: F401  (its probes register themselves)
from .claims import Claim, ClaimsFile, Judged, judge, read_claims
from .probes import PROBES
from .record import measure
from .report import run
from .workshop import Unmeasured, Workshop, workshop_for

__all__ = [
    "PROBES",
    "Claim",
    "ClaimsFile",
    "Judged",
    "Unmeasured",
    "Workshop",
    "judge",
    "measure",
    "read_claims",
    "run",
    "workshop_for",
]


class _Verb(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Path:
        return run(*args, **settings)


sys.modules[__name__].__class__ = _Verb
