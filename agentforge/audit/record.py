"""The record of a report: one JSON object from which everything a reader sees is drawn."""

from __future__ import annotations

import datetime
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..evaluation.measurement import environment
from .claims import COLOURS, ClaimsFile, Judged, judge
from .probes import Workshop, bits_per_weight, run

RECORD_FORMAT = 1


def measure(claims: ClaimsFile, workshop: Workshop, say: Any = print) -> dict[str, Any]:
    """Measure every claim that has a probe, judge all of them, and return the record.

    A probe with the same parameters runs once, however many claims rest on it.  say: called with a line of progress
    for each claim measured, with an estimate of what is left.
    """
    start = time.perf_counter()
    scored = [c.parameters["stage"] for c in claims.claims if c.probe in ("perplexity_factor", "top1_agreement")]
    compared = list(dict.fromkeys([*claims.baselines, *scored]))
    say(f"[0/{len(compared)}] scoring the original and {len(compared)} compressed models on the text", flush=True)
    workshop.compare(compared)
    taken: dict[str, Any] = {}
    rows = []
    probed = [claim for claim in claims.claims if claim.probe]
    for claim in claims.claims:
        measured, seconds = None, 0.0
        if claim.probe:
            key = f"{claim.probe} {sorted(claim.parameters.items())}"
            if key not in taken:
                began = time.perf_counter()
                taken[key] = (run(workshop, claim.probe, claim.parameters), time.perf_counter() - began)
            measured, seconds = taken[key]
            done = probed.index(claim) + 1
            elapsed = time.perf_counter() - start
            left = elapsed / done * (len(probed) - done)
            say(f"[{done}/{len(probed)}] {claim.id}: {measured}   {elapsed:.0f} s, about {left:.0f} s left", flush=True)
        rows.append(_row(judge(claim, measured), seconds))
    return {
        "format": RECORD_FORMAT,
        "report": claims.report,
        "title": claims.title,
        "about": claims.about,
        "source": claims.source,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "git": git_state(),
        "environment": environment(),
        "model": {
            "name": workshop.model.name,
            "parameters": workshop.model.parameters,
            "fingerprint": workshop.model.fingerprint,
            "source": workshop.model.source,
        },
        "text": {
            "name": workshop.text.name,
            "split": workshop.text.split,
            "origin": workshop.text.origin,
            "sha256": workshop.text.sha256,
            "scored_tokens": workshop.tokens,
            "context": workshop.context,
            "skipped": list(workshop.text.skipped),
        },
        "stages": [_stage_row(workshop, stage) for stage in compared],
        "summary": {verdict: Counter(row["verdict"] for row in rows)[verdict] for verdict in COLOURS},
        "claims": rows,
    }


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout, or nulls where there is none."""
    folder = Path(__file__).parent
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


def _stage_row(workshop: Workshop, stage: str) -> dict[str, Any]:
    """What a stage makes of the model: size and likelihoods, for the table that claims are read against."""
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


def _row(judged: Judged, seconds: float) -> dict[str, Any]:
    claim = judged.claim
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
        "measured": judged.measured.to_json() if judged.measured else None,
        "seconds": round(seconds, 2),
        "needs": claim.needs,
        "remark": claim.remark,
    }


def _interval(interval: tuple[float, float] | None) -> list[float | None] | None:
    if interval is None:
        return None
    return [None if abs(bound) == float("inf") else bound for bound in interval]
