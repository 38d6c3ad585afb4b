"""The reports in reports/: complete, of today's claims, and drawn from their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentforge.audit import PROBES, read_claims, report
from agentforge.audit.record import check_record

REPORTS = Path(__file__).parents[2] / "reports"
# A count, a size, a formula: what has no sampling error says so by its standard error of none.
MEASURED = ("confirmed", "partly", "refuted", "does not carry over")


def record_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REPORTS / name / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", report.NAMES)
def test_no_verdict_without_a_measurement_and_no_measurement_without_its_circumstances(name: str) -> None:
    record = record_of(name)
    check_record(record, read_claims(name))
    for row in record["claims"]:
        assert row["verdict"] != "error", f"{row['id']}: {row['failure']}"
        if row["verdict"] not in MEASURED:
            assert row["measured"] is None and row["needs"], row["id"]
            continue
        measured = row["measured"]
        assert measured["n"] >= 1 and measured["unit"] and measured["protocol"]["metric"], row["id"]
        assert "stderr" in measured, row["id"]
        inputs = dict(measured["inputs"])
        assert row["provenance"]["commit"] and not row["provenance"]["dirty"], row["id"]
        hashes = [*inputs.pop("artifacts").values(), *(v for v in inputs.values() if isinstance(v, str))]
        assert all(len(value) >= 16 for value in hashes), row["id"]
        # What is sampled is sampled from something: a file with a hash, or a generator with a seed.
        assert measured["stderr"] is None or hashes or measured["seed"] is not None, row["id"]
        assert row["protocol"], row["id"]


@pytest.mark.parametrize("name", report.NAMES)
def test_every_probe_of_a_report_exists_and_is_documented(name: str) -> None:
    for claim in read_claims(name).claims:
        if claim.probe is not None:
            assert claim.probe in PROBES, claim.id
            assert (PROBES[claim.probe].__doc__ or "").strip(), claim.probe


@pytest.mark.slow
def test_reports_are_what_their_records_give() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentforge", "audit", "--check"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPORTS.parent,
        env={**os.environ, "MPLBACKEND": "Agg"},  # which must not keep the pictures out
    )
    assert done.returncode == 0, done.stdout + done.stderr
