"""A record as SARIF 2.1.0 (OASIS), the form in which editors take findings: one rule per claim, one result per row."""

from __future__ import annotations

from typing import Any

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


def sarif(record: dict[str, Any], claims_file: str, text_of: Any) -> dict[str, Any]:
    """The record as a SARIF log.  claims_file: where the claims stand.  text_of: gives a row's finding in words."""
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
            "message": {"text": f"{row['title']}: {row['verdict']}. {text_of(row)}"},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": claims_file}}}],
            "partialFingerprints": {"claim": row["id"]},
            "properties": {"verdict": row["verdict"], "measured": row["measured"]},
        }
        for index, row in enumerate(record["claims"])
    ]
    driver = {
        "name": "agentforge audit",
        "version": record["environment"]["packages"]["agentforge"],
        "rules": rules,
    }
    run: dict[str, Any] = {"tool": {"driver": driver}, "results": results}
    if record["git"]["commit"]:
        run["properties"] = {"commit": record["git"]["commit"], "dirty": record["git"]["dirty"]}
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
