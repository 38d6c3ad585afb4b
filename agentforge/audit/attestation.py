"""A record's provenance as an in-toto statement with SLSA's predicate."""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import BadInput

# The project has no address on the web: these names lead nowhere, by RFC 2606.
BUILDER, BUILD = "https://agentforge.invalid/unsigned", "https://agentforge.invalid/audit/record"


def attestation(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """The statement about `file`, which holds the record, drawn from the record alone.

    It is not signed: it says what can be compared, and proves nothing about who wrote it.  A model's digest is that of the
    one file it came in, else its fingerprint (`models.Model.fingerprint`).
    """
    rows = [row for row in record["claims"] if row["provenance"]]
    ended = [(record["created"], record["seconds"]), *((row["provenance"]["created"], row["seconds"]) for row in rows)]
    try:
        times = [datetime.datetime.fromisoformat(at).astimezone(datetime.UTC) for at, _ in ended]
        began = min(at - datetime.timedelta(seconds=seconds) for at, (_, seconds) in zip(times, ended, strict=True))
    except (ValueError, OverflowError):
        raise BadInput("record: a time in it is none; make the report again") from None
    commits = Counter(tuple(row["provenance"][key] for key in ("commit", "source", "dirty")) for row in rows)
    inputs = [
        {
            "name": "agentforge",
            "digest": {"gitCommit": commit} if commit else {"sha256": source},
            "annotations": {"sourceSha256": source, "uncommittedChanges": dirty, "rows": count},
        }
        for (commit, source, dirty), count in commits.items()
    ]
    for model in filter(None, (record["model"], record["subject"])):
        digest = {"sha256": model["source"].get("sha256") or model["fingerprint"]}
        inputs.append({"name": model["name"], "digest": digest, "annotations": {"fingerprint": model["fingerprint"]}})
    text = record["text"]
    inputs.append({"name": f"{text['name']}, {text['split']}", "digest": {"sha256": text["sha256"]}})
    asked = {key: record[key] for key in ("report", "budget", "device")}
    asked |= {"claimsSha256": record["claims_sha256"], "tokens": text["scored_tokens"], "context": text["context"]}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file.name, "digest": {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILD}/{record['format']}",
                "externalParameters": asked,
                "internalParameters": {"environment": record["environment"]},
                "resolvedDependencies": inputs,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"agentforge": record["environment"]["packages"]["agentforge"]}},
                "metadata": {"startedOn": f"{began:%Y-%m-%dT%H:%M:%SZ}", "finishedOn": f"{times[0]:%Y-%m-%dT%H:%M:%SZ}"},
                "byproducts": [{"name": name, "digest": {"sha256": found}} for name, found in record["artifacts"].items()],
            },
        },
    }
