"""The record of a report: one JSON object from which everything a reader sees is drawn."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from ..errors import BadInput
from ..evaluation import Measurement
from ..evaluation.measurement import environment, peak_memory
from .claims import COLOURS, Claim, ClaimsFile, Judged, claims_sha256, judge, verdict_of
from .probes import bits_per_weight, run
from .workshop import Unmeasured, Workshop, source_sha256

RECORD_FORMAT = 2
SCHEMA = Path(__file__).parent / "record.schema.json"
# Probes of how a stage changes predictions: all their stages are scored in one pass over the text.
COMPARING = ("perplexity_factor", "retention", "top1_agreement")
# What these read lies outside of the package: other rows, the coverage data, the README.
NEVER_KEPT = ("score", "coverage", "figures_that_come_back")
Taken = tuple[Measurement | None, str, str, float]  # measurement, failure, what was missing, seconds


def measure(
    claims: ClaimsFile, workshop: Workshop, say: Any = print, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measure every claim that has a probe, judge all of them, and return the record.

    A probe with the same parameters runs once, however many claims rest on it.  Scores come last: they are computed from
    the other rows.  say: called with a line of progress for each claim measured, with an estimate of what is left.
    before: a record (checked) whose measurements are kept where a claim asks for the same.

    Raises BadInput where `before` was made from another model, text or budget.
    """
    start = time.perf_counter()
    taken = _kept(before, claims, workshop) if before else {}
    kept = {"rows": len(taken), "commit": before["git"]["commit"], "created": before["created"]} if before else {}
    stages_before = {row["stage"]: row for row in before["stages"]} if before else {}
    comparing = [claim for claim in claims.claims if claim.probe in COMPARING]
    compared = list(dict.fromkeys([*claims.baselines, *(claim.parameters["stage"] for claim in comparing)]))
    asked = {claim.parameters["stage"] for claim in comparing if _key(claim) not in taken}
    new = [stage for stage in compared if stage in asked or stage not in stages_before]
    if new:
        say(f"[0/{len(new)}] scoring the original and {len(new)} compressed models on the text", flush=True)
        workshop.compare(new)
    rows = {claim.id: _row(judge(claim, None), 0.0) for claim in claims.claims if not claim.probe}
    probed = [claim for claim in claims.claims if claim.probe]
    probed.sort(key=lambda claim: claim.probe == "score")
    for done, claim in enumerate(probed, 1):
        workshop.rows = list(rows.values())
        if (key := _key(claim)) not in taken:
            taken[key] = take(workshop, claim)
        measured, failure, missing, seconds = taken[key]
        rows[claim.id] = _row(judge(claim, measured, failure, missing), seconds)
        elapsed = time.perf_counter() - start
        left = elapsed / done * (len(probed) - done)
        found = measured or failure or missing
        say(f"[{done}/{len(probed)}] {claim.id}: {found}   {elapsed:.0f} s, about {left:.0f} s left", flush=True)
    ordered = [rows[claim.id] for claim in claims.claims]
    stage_rows = [
        workshop.remember("stage", {"stage": stage}, _stage_row(workshop, stage)) if stage in new else stages_before[stage]
        for stage in compared
    ]
    artifacts: dict[str, str] = {}
    for row in ordered:
        artifacts |= (row["measured"] or {}).get("inputs", {}).get("artifacts", {})
    return {
        "format": RECORD_FORMAT,
        "report": claims.report,
        "title": claims.title,
        "about": claims.about,
        "source": claims.source,
        "claims_sha256": claims_sha256(claims.claims),
        "budget": workshop.effort.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": peak_memory(),
        "git": git_state(),
        **({"kept": kept} if kept else {}),
        "environment": environment(),
        "device": workshop.device,
        "model": _model(workshop.model),
        "subject": _model(workshop.subject) if workshop.subject else None,
        "text": {
            "name": workshop.text.name,
            "split": workshop.text.split,
            "origin": workshop.text.origin,
            "sha256": workshop.text.sha256,
            "scored_tokens": workshop.tokens,
            "context": workshop.context,
            "skipped": list(workshop.text.skipped),
        },
        "artifacts": dict(sorted(artifacts.items())),
        "stages": stage_rows,
        "figures": {},
        "summary": {verdict: Counter(row["verdict"] for row in ordered)[verdict] for verdict in COLOURS},
        "claims": ordered,
    }


def _key(claim: Claim) -> str:
    return f"{claim.probe} {json.dumps(claim.parameters, sort_keys=True)}"


def _kept(before: dict[str, Any], claims: ClaimsFile, workshop: Workshop) -> dict[str, Taken]:
    """What the record of before has measured and the claims still ask for, with the source and the machine that took it."""
    text = before["text"]
    for what, found, wanted in (
        ("model", before["model"]["fingerprint"], workshop.model.fingerprint),
        ("text", text["sha256"], workshop.text.sha256),
        ("tokens", (text["scored_tokens"], text["context"]), (workshop.tokens, workshop.context)),
        ("budget", before["budget"], workshop.effort.name),
        ("device", before["device"], workshop.device),
    ):
        if found != wanted:
            raise BadInput(f"report {before['report']}: its {what} is {found}, asked for is {wanted}; run without --keep")
    rows = {
        (row["probe"], json.dumps(row["parameters"], sort_keys=True)): row for row in before["claims"] if row["measured"]
    }
    taken: dict[str, Taken] = {}
    for claim in claims.claims:
        row = rows.get((claim.probe, json.dumps(claim.parameters, sort_keys=True)))
        if row and claim.probe not in NEVER_KEPT:
            measured = {"environment": before["environment"], **row["measured"]}
            taken[_key(claim)] = Measurement(**measured), "", "", row["seconds"]
    return taken


def take(workshop: Workshop, claim: Claim) -> Taken:
    """Run a claim's probe, or take what it gave before: the measurement, or why there is none.

    A probe that fails, in whatever way, is a finding like any other: the audit goes on, and the claim is refuted.
    """
    assert claim.probe is not None
    name, parameters = claim.probe, claim.parameters

    def make() -> dict[str, Any]:
        workshop.used = {}
        measured = run(workshop, name, parameters)
        found = measured.to_json() | {"inputs": {**measured.inputs, "artifacts": dict(workshop.used)}}
        if measured.stderr is not None and not math.isfinite(measured.stderr):
            found["stderr"] = None  # of a single observation nothing is known of the error
        return {"measured": found}

    began = time.perf_counter()
    try:
        if name in NEVER_KEPT:
            kept = make()
        else:
            kept = workshop.remember(f"probe {name}", parameters, make)
    except Unmeasured as error:
        return None, "", str(error), time.perf_counter() - began
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return None, text[:300], "", time.perf_counter() - began
    inputs = {"source": source_sha256(), **kept["measured"]["inputs"]}
    return Measurement(**kept["measured"] | {"inputs": inputs}), "", "", kept.get("seconds", time.perf_counter() - began)


def _model(model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "parameters": model.parameters,
        "fingerprint": model.fingerprint,
        "source": model.source,
    }


def git_state(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds `folder`, or nulls if there is none."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        # What a report writes is no change to what it measures.
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)reports", ":(top,exclude)README.md"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def _stage_row(workshop: Workshop, stage: str) -> Callable[[], dict[str, Any]]:
    """What a stage makes of the model: size and likelihoods, for the table that claims are read against."""

    def make() -> dict[str, Any]:
        artifact, result = workshop.artifact(stage), workshop.divergence(stage)
        return {
            "stage": stage,
            "bits_per_weight": bits_per_weight(workshop, stage).value,
            "ratios": [ratio.to_json() for ratio in artifact.ratios],
            "perplexity": result.perplexity.to_json(),
            "original_perplexity": result.original_perplexity.to_json(),
            "kl": result.kl.to_json(),
            "top1": result.top1.to_json(),
        }

    return make


def _row(judged: Judged, seconds: float) -> dict[str, Any]:
    claim = judged.claim
    measured = judged.measured.to_json() if judged.measured else None
    if measured and measured["environment"] == environment():
        del measured["environment"]  # the record's own; what was taken elsewhere keeps its own
    return {
        "id": claim.id,
        "stage": claim.stage,
        "section": claim.section,
        "title": claim.title,
        "paper": claim.paper,
        "documentation": claim.documentation,
        "code": claim.code,
        "audit": claim.audit,
        "claimed": claim.claimed,
        "verdict": judged.verdict,
        "colour": judged.colour,
        "close": judged.close,
        "probe": claim.probe,
        "parameters": claim.parameters,
        "protocol": claim.protocol,
        "thresholds": {"confirmed": _interval(claim.confirmed), "partly": _interval(claim.partly)} if claim.probe else None,
        "measured": measured,
        "failure": judged.failure,
        "seconds": round(seconds, 2),
        "needs": judged.missing,
        "remark": claim.remark,
    }


def _interval(interval: tuple[float, float] | None) -> list[float | None] | None:
    if interval is None:
        return None
    return [None if abs(bound) == float("inf") else bound for bound in interval]


def record_sha256(record: dict[str, Any]) -> str:
    """The hash of a record, which every form that is drawn from it carries."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_record(record: Any, claims: ClaimsFile | None = None) -> None:
    """Raise BadInput where a record is not as its schema asks, or a verdict does not follow from its measurement.

    claims: the file that it was made from; thresholds and claims must be those that stand there.
    """
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(record))
    if problem is not None:
        where = ", ".join(map(str, problem.absolute_path)) or "top level"
        raise BadInput(f"record: {where}: {problem.message:.300}")
    report = record["report"]
    for row in record["claims"]:
        if (verdict := _verdict_again(row)) != row["verdict"] or COLOURS[row["verdict"]] != row["colour"]:
            raise BadInput(f"report {report}: claim {row['id']} is {row['verdict']}; what was measured says {verdict}")
    counts = Counter(row["verdict"] for row in record["claims"])
    if record["summary"] != {verdict: counts[verdict] for verdict in COLOURS}:
        raise BadInput(f"report {report}: its summary does not count its rows; make the report again")
    if claims is not None and record["claims_sha256"] != claims_sha256(claims.claims):
        raise BadInput(f"report {report}: was made from other claims than those of its file; make the report again")


def _verdict_again(row: dict[str, Any]) -> str:
    if row["measured"] is None:
        if row["failure"]:
            return "refuted"
        return row["verdict"] if row["verdict"] in ("not tested", "not reproducible here") else "nothing"
    intervals = []
    for name in ("confirmed", "partly"):
        found = row["thresholds"][name]
        low, high = found or (None, None)
        intervals.append(found and (-math.inf if low is None else low, math.inf if high is None else high))
    return verdict_of(row["measured"]["value"], *intervals)
