"""Draw the reports of reports/ again from their records, without measuring: after a change of what a page looks like.

python tools/draw_reports.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from agentforge.audit import read_claims, report
from agentforge.audit.record import check_record
from agentforge.names import REPORTS
from agentforge.tensorfiles import read_json

if __name__ == "__main__":
    for name in sys.argv[1:] or report.NAMES:
        record, claims = read_json(REPORTS / name / f"{name}.json"), read_claims(name)
        check_record(record, claims)
        with tempfile.TemporaryDirectory(dir=REPORTS, prefix=f".{name}-") as scratch:
            report.put(report.draw(record, claims, Path(scratch)), REPORTS / name)
