"""The record of a report: one JSON object from which everything a reader sees is drawn."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import schemas
from ..errors import BadInput
from ..evaluation import Measurement
from ..evaluation.measurement import environment, peak_memory
from .claims import COLOURS, Claim, ClaimsFile, claims_sha256, false_discoveries, interval, judge, reach
from .probes import ONE_PASS, SLOW, UNKEPT, bits_per_weight, run
from .workshop import EFFORTS, LEFT_OUT, Unmeasured, Workshop, source_sha256

RECORD_FORMAT = 3
# What reports and benchmarks write, for git.
WRITTEN = [f":(top,exclude,glob)reports/**/*.{end}" for end in ("json", "ipynb", "html", "md", "sarif", "png")]


class Taken(NamedTuple):
    """What came of a probe: a measurement and what took it, or why there is none."""

    measured: Measurement | None = None
    provenance: dict[str, Any] | None = None
    seconds: float = 0.0
    failure: str = ""
    missing: str = ""


def measure(
    claims: ClaimsFile,
    workshop: Workshop,
    say: Any = print,
    before: dict[str, Any] | None = None,
    last: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every claim that has a probe, judge all of them, and return the record.

    A probe with the same parameters runs once, however many claims rest on it.  Scores come last: they are computed from
    the other rows.  say: called with a line of progress for each claim measured, and with "[now] ..." before.
    before: a record (checked) whose measurements are kept if a claim asks for the same.  last: a record of the same
    claims; how long its rows took says how much is left.

    Raises BadInput if `before` was made from another model, text or budget.
    """
    start = time.perf_counter()
    taken = _kept(before, claims, workshop) if before else {}
    stages_before = {row["stage"]: row for row in before["stages"]} if before else {}
    comparing = [claim for claim in claims.claims if claim.probe in ONE_PASS]
    compared = list(dict.fromkeys([*claims.baselines, *(claim.parameters["stage"] for claim in comparing)]))
    asked = {claim.parameters["stage"] for claim in comparing if _key(claim.probe, claim.parameters) not in taken}
    compared = [stage for stage in compared if workshop.has_time_for(stage)]
    new = [stage for stage in compared if stage in asked or stage not in stages_before]
    if new:
        say(f"[0/{len(claims.claims)}] scoring the original and {len(new)} compressed models on the text", flush=True)
        with contextlib.suppress(Exception):  # what fails here fails again in the rows that need it, which say so
            workshop.compare(new)
    rows = {claim.id: _row(claim, Taken()) for claim in claims.claims if not claim.probe}
    probed = [claim for claim in claims.claims if claim.probe]
    probed.sort(key=lambda claim: claim.probe == "score")
    ahead = expected_seconds(claims, workshop.effort.name, last) if last else {}
    ahead = {key: seconds for key, seconds in ahead.items() if key not in taken}
    whole, began = sum(ahead.values()), time.perf_counter()
    for done, claim in enumerate(probed, 1):
        say(f"[now] {claim.title}", flush=True)
        workshop.rows = list(rows.values())
        if (key := _key(claim.probe, claim.parameters)) not in taken:
            taken[key] = take(workshop, claim)
        ahead.pop(key, None)
        row = rows[claim.id] = _row(claim, taken[key])
        found = taken[key].measured or taken[key].failure or taken[key].missing
        elapsed, past = time.perf_counter() - began, whole - sum(ahead.values())
        # An estimate means nothing before a tenth of the work, by the time that it took before, is done.
        known = elapsed > 10 and past > whole / 10
        left = f" ({duration(elapsed / past * (whole - past))} left)" if known and past < whole else ""
        say(f"[{done}/{len(probed)}] {row['verdict']}: {claim.title}: {found}{left}", flush=True)
    say("[now] drawing the report", flush=True)
    ordered = [rows[claim.id] for claim in claims.claims]
    stage_rows = [stages_before[stage] for stage in compared if stage not in new]
    for stage in new:
        with contextlib.suppress(Exception):  # likewise
            stage_rows.append(workshop.remember("stage", {"stage": stage}, partial(_stage_row, workshop, stage)))
    stage_rows.sort(key=lambda row: compared.index(row["stage"]))
    artifacts: dict[str, str] = {}
    for row in ordered:
        artifacts |= (row["measured"] or {}).get("inputs", {}).get("artifacts", {})
    return {
        "format": RECORD_FORMAT,
        **{key: getattr(claims, key) for key in ("report", "title", "about", "source")},
        "claims_file": claims.file,
        "claims_sha256": claims_sha256(claims.claims),
        "budget": workshop.effort.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": peak_memory(),
        "git": git_state(),
        "environment": environment(),
        "device": workshop.device,
        "model": _model(workshop.model),
        "subject": _model(workshop.subject) if workshop.subject else None,
        "text": {
            **{key: getattr(workshop.text, key) for key in ("name", "split", "origin", "sha256")},
            "scored_tokens": workshop.tokens,
            "context": workshop.context,
            "skipped": list(workshop.text.skipped),
        },
        "artifacts": dict(sorted(artifacts.items())),
        "stages": stage_rows,
        "figures": {},
        "summary": {verdict: Counter(row["verdict"] for row in ordered)[verdict] for verdict in COLOURS},
        "false_discovery": _false_discovery(ordered),
        "claims": ordered,
    }


def _key(probe: str | None, parameters: dict[str, Any]) -> str:
    return f"{probe} {json.dumps(parameters, sort_keys=True)}"


def expected_seconds(claims: ClaimsFile, budget: str, last: dict[str, Any]) -> dict[str, float]:
    """About how long each probe of the claims takes at a budget, as far as a record says: of this budget, or of another one,
    whose seconds are scaled as the tokens that the two score."""
    rows = {_key(row["probe"], row["parameters"]): row["seconds"] for row in last["claims"]}
    wanted = [claim for claim in claims.claims if claim.probe and not (budget == "quick" and claim.probe in SLOW)]
    scale = EFFORTS[budget].tokens / EFFORTS[last.get("budget", budget)].tokens
    keys = [_key(claim.probe, claim.parameters) for claim in wanted]
    return {key: max(rows.get(key, 0.0) * scale, 0.01) for key in keys}


def duration(seconds: float) -> str:
    """A length of time in words."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _kept(before: dict[str, Any], claims: ClaimsFile, workshop: Workshop) -> dict[str, Taken]:
    """What the record of before has measured and the claims still ask for, with the source and the machine that took it."""
    text = before["text"]
    for what, found, wanted in (
        ("original", before["model"]["fingerprint"], workshop.model.fingerprint),
        ("model", (before["subject"] or {}).get("fingerprint"), workshop.subject and workshop.subject.fingerprint),
        ("text", text["sha256"], workshop.text.sha256),
        ("tokens", (text["scored_tokens"], text["context"]), (workshop.tokens, workshop.context)),
        ("budget", before["budget"], workshop.effort.name),
        ("device", before["device"], workshop.device),
    ):
        if found != wanted:
            raise BadInput(f"report {before['report']}: its {what} is {found}, asked for is {wanted}; run without --keep")
    asked = {_key(claim.probe, claim.parameters) for claim in claims.claims}
    taken: dict[str, Taken] = {}
    for row in before["claims"]:
        key = _key(row["probe"], row["parameters"])
        if key in asked and row["measured"] and row["probe"] not in UNKEPT:
            provenance = {"environment": before["environment"], **row["provenance"]}
            measured = Measurement(**row["measured"], environment=provenance["environment"])
            taken[key] = Taken(measured, provenance, row["seconds"])
    return taken


def take(workshop: Workshop, claim: Claim) -> Taken:
    """Run a claim's probe, or take what it gave before.

    A probe that fails, in whatever way, says nothing about the claim: the audit continues, and the row is an error.
    """
    assert claim.probe is not None
    name, parameters = claim.probe, claim.parameters
    if name in SLOW and workshop.effort.name == "quick":
        return Taken(missing=f"more time than the quick budget has; {LEFT_OUT}")

    def make() -> dict[str, Any]:
        workshop.used = {}
        measured = run(workshop, name, parameters)
        found = measured.to_json() | {"inputs": {**measured.inputs, "artifacts": dict(workshop.used)}}
        if measured.stderr is not None and not math.isfinite(measured.stderr):
            found |= {"stderr": None, "error": "unknown"}  # of a single observation nothing is known of the error
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"measured": found, "provenance": {**git_state(), "source": source_sha256(workshop.own), "created": created}}

    began = time.perf_counter()
    try:
        if name in UNKEPT or "model" in parameters:  # a folder, whose files may be others by now
            kept = make()
        else:
            kept = workshop.remember(f"probe {name}", parameters, make)
    except Unmeasured as error:
        return Taken(missing=str(error), seconds=time.perf_counter() - began)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "agentforge").startswith("agentforge"):
            return Taken(missing=f"the package {error.name}; install it", seconds=time.perf_counter() - began)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Taken(failure=text[:300], seconds=time.perf_counter() - began)
    measured = Measurement(**kept["measured"])
    return Taken(measured, kept["provenance"], kept.get("seconds", time.perf_counter() - began))


def _model(model: Any) -> dict[str, Any]:
    """A model by name, size and hashes; of where it lies on this machine, the last part alone."""

    def short(name: str) -> str:
        return Path(name).name if os.path.isabs(name) else name

    source = {key: short(value) if isinstance(value, str) else value for key, value in model.source.items()}
    about = {"name": short(model.name), "parameters": model.parameters, "fingerprint": model.fingerprint}
    return about | {"source": source}


def git_state(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds `folder`, or nulls if there is none."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # What a report writes is not a change to what it measures.
        changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)README.md", *WRITTEN)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _stage_row(workshop: Workshop, stage: str) -> dict[str, Any]:
    """What a stage makes of the model: size and likelihoods, for the table that claims are read against."""
    ratios = workshop.artifact(stage).ratios
    result, measured = workshop.divergence(stage), ("perplexity", "original_perplexity", "kl", "top1")
    return {
        "stage": stage,
        "bits_per_weight": bits_per_weight(workshop, stage).value,
        "ratios": [ratio.to_json() for ratio in ratios],
    } | {name: getattr(result, name).to_json() for name in measured}


def _row(claim: Claim, taken: Taken) -> dict[str, Any]:
    judged = judge(claim, taken.measured, taken.failure, taken.missing)
    measured, provenance = None, None
    if judged.measured is not None and taken.provenance is not None:
        measured = judged.measured.to_json()
        provenance = {**taken.provenance, "environment": measured.pop("environment")}
        if provenance["environment"] == environment():
            del provenance["environment"]  # the record's own; what was taken elsewhere keeps its own
    return {
        **_said(claim),
        "verdict": judged.verdict,
        "colour": judged.colour,
        "undecided": judged.undecided,
        "decides_at": judged.decides_at,
        "measured": measured,
        "provenance": provenance,
        "failure": judged.failure,
        "seconds": round(taken.seconds, 2),
        "needs": judged.missing,
    }


def _said(claim: Claim) -> dict[str, Any]:
    """What a row has from its claim alone."""
    about = ("id", "stage", "section", "title", "paper", "documentation", "code", "audit", "claimed", "about_other")
    thresholds = {
        name: bounds and [bound if math.isfinite(bound) else None for bound in bounds]
        for name, bounds in (("confirmed", claim.confirmed), ("partly", claim.partly))
    }
    how = ("measures", "probe", "parameters", "protocol", "remark")
    return {name: getattr(claim, name) for name in (*about, *how)} | {"thresholds": thresholds if claim.probe else None}


def record_sha256(record: dict[str, Any]) -> str:
    """The hash of a record, which every form that is drawn from it carries."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_record(record: Any, claims: ClaimsFile | None = None) -> None:
    """Raise BadInput if a record is not as its schema asks, or a verdict does not follow from its measurement.

    claims: the file that it was made from; thresholds and claims must be those that stand there.
    """
    if problem := schemas.first_error(Path(__file__).parent / "record.schema.json", record):
        where = ", ".join(map(str, problem.absolute_path)) or "top level"
        raise BadInput(f"record: {where}: {problem.message:.300}")
    report = record["report"]
    for row in record["claims"]:
        again = judge(*_said_again(row), failure=row["failure"])
        if (again.verdict, again.colour) != (row["verdict"], row["colour"]):
            raise BadInput(f"report {report}: claim {row['id']} is {row['verdict']}; what was measured says {again.verdict}")
        if (again.undecided, again.decides_at) != (row["undecided"], row["decides_at"]):
            raise BadInput(f"report {report}: claim {row['id']} is said to be decided otherwise than its measurement does")
    counts = Counter(row["verdict"] for row in record["claims"])
    if record["summary"] != {verdict: counts[verdict] for verdict in COLOURS}:
        raise BadInput(f"report {report}: its summary does not count its rows; make the report again")
    if record["false_discovery"] != _false_discovery(record["claims"]):
        raise BadInput(f"report {report}: its false-discovery count is not that of its rows; make the report again")
    if claims is not None:
        said = json.loads(json.dumps([_said(claim) for claim in claims.claims]))
        found = [{key: row[key] for key in said[0]} for row in record["claims"]]
        if record["claims_sha256"] != claims_sha256(claims.claims) or found != said:
            raise BadInput(f"report {report}: was made from other claims than those of its file; make the report again")


def _said_again(row: dict[str, Any]) -> tuple[Claim, Measurement | None]:
    """The claim of a row, as far as a verdict needs it, and the measurement."""
    named = ("id", "stage", "section", "title", "claimed", "about_other", "probe")
    given: dict[str, Any] = {name: row[name] for name in named}
    given |= {name: interval(bounds) for name, bounds in (row["thresholds"] or {}).items()}
    claim = Claim(**given, not_here=row["verdict"] == "not reproducible here")  # the one thing that no measurement says
    return claim, row["measured"] and Measurement(**row["measured"], environment={})


def _false_discovery(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many verdicts of rows with an error would be undecided at one rate of false discoveries for all."""
    pairs = [(claim, measured) for claim, measured in map(_said_again, rows) if measured and len({*measured.bounds}) == 2]
    reaches = [reach(claim, measured) for claim, measured in pairs]
    decided, would_flip = sum(r < 1 for r in reaches), false_discoveries(reaches)
    return {"rows": len(pairs), "decided": decided, "would_flip": would_flip, "rate": 0.05}
