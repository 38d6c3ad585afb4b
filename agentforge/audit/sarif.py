"""A record as SARIF 2.1.0 (OASIS), the form in which editors take findings: one rule per claim, one result per row."""

from __future__ import annotations

import re
from typing import Any

from .drawing import measured_text
from .record import record_sha256

MARKUP = re.compile(r"<[^>]+>|\*\*")
LEVELS = {"partly": "warning", "refuted": "error"}  # others: none
KINDS = {
    "confirmed": "pass",
    "partly": "fail",
    "refuted": "fail",
    "does not carry over": "notApplicable",
    "not reproducible here": "notApplicable",
    "not tested": "open",
    "error": "review",  # somebody has to look why the probe failed
}


def sarif(record: dict[str, Any], claims_file: str) -> dict[str, Any]:
    """The record as a SARIF log.  claims_file: where the claims stand."""
    rules = [
        {
            "id": row["id"],
            "shortDescription": {"text": row["title"]},
            "properties": {"stage": row["stage"], "section": row["section"], "thresholds": row["thresholds"]},
        }
        for row in record["claims"]
    ]
    results = [
        {
            "ruleId": row["id"],
            "ruleIndex": index,
            "kind": "open" if row["undecided"] else KINDS[row["verdict"]],
            "level": "none" if row["undecided"] else LEVELS.get(row["verdict"], "none"),
            "message": {"text": f"{row['title']}: {row['verdict']}. {MARKUP.sub('', measured_text(row))}"},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": claims_file}}}],
            "partialFingerprints": {"claim": row["id"]},
            "properties": {"verdict": row["verdict"], "measured": row["measured"]},
        }
        for index, row in enumerate(record["claims"])
    ]
    version = record["environment"]["packages"]["agentforge"]
    made = {key: record["git"][key] for key in ("commit", "dirty")} if record["git"]["commit"] else {}
    run = {
        "tool": {"driver": {"name": "agentforge audit", "version": version, "rules": rules}},
        "results": results,
        "properties": made | {"record_sha256": record_sha256(record)},
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
