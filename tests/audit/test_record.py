"""A record is complete, measured once, and nothing is drawn that it does not give."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from agentforge import audit
from agentforge.audit import drawing, probes, report, workshop
from agentforge.audit import record as record_module
from agentforge.audit.attestation import attestation
from agentforge.audit.claims import read_claims
from agentforge.audit.record import check_record, expected_seconds, measure, record_sha256
from agentforge.audit.sarif import sarif
from agentforge.cli import app
from agentforge.errors import AgentForgeError, BadInput
from agentforge.evaluation import Measurement
from agentforge.pipeline import compress
from agentforge.tensorfiles import read_json

HEAD = {"report": "mine", "title": "Mine", "about": "About.", "source": "nobody", "model": "digits-mlp"}
CLAIMS: list[dict[str, Any]] = [
    {"id": "zeros", "probe": {"name": "zero_share", "parameters": {"stage": "ternary"}}, "confirmed": [0.2, 0.5]},
    {"id": "bits", "probe": {"name": "bits_per_weight", "parameters": {"stage": "ternary"}}, "confirmed": [0, 1.5],
     "partly": [0, 1.7]},
    {"id": "small", "probe": {"name": "bits_per_weight", "parameters": {"stage": "ternary"}}, "confirmed": [0, 1]},
    {"id": "broken", "probe": {"name": "breaks", "parameters": {}}, "confirmed": [0, 1]},
    {"id": "absent", "probe": {"name": "nothing_here", "parameters": {}}, "confirmed": [0, 1]},
    {"id": "later", "needs": "more time"},
    {"id": "total", "section": "Summary", "probe": {"name": "score", "parameters": {"sections": ["S"]}},
     "confirmed": [0.9, 1]},
]  # fmt: skip


def claims_file(folder: Path, rows: list[dict[str, Any]] = CLAIMS, **head: Any) -> Path:
    rows = [{"stage": "ternary", "section": "S", "title": row["id"].title(), "audit": "GREEN", **row} for row in rows]
    rows = [row | ({"protocol": "how."} if "probe" in row else {}) for row in rows]
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**HEAD, **head, "claims": rows}))
    return path


def shop(folder: Path, **settings: Any) -> workshop.Workshop:
    return audit.workshop_for("digits-mlp", folder, "selftext", 127, **settings)


def quiet(*_: Any, **__: Any) -> None:
    pass


@pytest.fixture(autouse=True)
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that finds nothing to measure with, and one that fails."""

    def nothing_here(_: workshop.Workshop) -> Measurement:
        raise audit.Unmeasured("a thing that is not there")

    def breaks(_: workshop.Workshop) -> Measurement:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setitem(probes.PROBES, "nothing_here", nothing_here)
    monkeypatch.setitem(probes.PROBES, "breaks", breaks)


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return measure(read_claims(claims_file(tmp_path)), shop(tmp_path / "artifacts"), quiet)


def row_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in record["claims"] if row["id"] == name)


def test_verdicts_failures_and_what_is_missing(record: dict[str, Any]) -> None:
    verdicts = {row["id"]: row["verdict"] for row in record["claims"]}
    assert verdicts == {
        "zeros": "confirmed",
        "bits": "partly",
        "small": "refuted",
        "broken": "error",
        "absent": "not tested",
        "later": "not tested",
        "total": "refuted",
    }
    assert "no space left" in row_of(record, "broken")["failure"]
    assert row_of(record, "broken")["colour"] == "ERROR" and record["summary"]["error"] == 1
    assert row_of(record, "broken")["measured"] is None
    assert row_of(record, "absent")["needs"] == "a thing that is not there"
    check_record(json.loads(json.dumps(record, allow_nan=False)))


def test_a_score_is_the_points_of_the_rows_that_have_a_verdict(record: dict[str, Any]) -> None:
    """1 + 1/2 + 0 points of three rows; three rows have no verdict."""
    total = row_of(record, "total")["measured"]
    assert total["value"] == pytest.approx(1.5 / 3)
    assert total["n"] == 3
    assert total["protocol"]["without a verdict"] == 3


def test_every_measurement_says_how_it_was_taken_and_from_what(record: dict[str, Any]) -> None:
    for row in record["claims"]:
        if row["measured"] is not None:
            assert row["measured"]["n"] >= 1
            assert row["measured"]["protocol"]["metric"]
            assert row["measured"]["inputs"]["model"] == record["model"]["fingerprint"]
    (artifact,) = row_of(record, "zeros")["measured"]["inputs"]["artifacts"].values()
    assert record["artifacts"] == {"ternary": artifact}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: row_of(r, "zeros").update(verdict="refuted", colour="RED"), "zeros is refuted"),
        (lambda r: row_of(r, "zeros")["measured"].update(value=0.9), "zeros is confirmed"),
        (lambda r: row_of(r, "bits")["thresholds"].update(partly=None), "bits is partly"),
        (lambda r: row_of(r, "small").update(colour="GREEN"), "small"),
        (lambda r: row_of(r, "small")["thresholds"].update(partly=[0, 10**400]), "thresholds, partly, 1: 1000"),
        (lambda r: row_of(r, "zeros").update(measured=None), "record"),
        (lambda r: row_of(r, "later").update(verdict="confirmed", colour="GREEN"), "record"),
        (lambda r: row_of(r, "absent").update(needs=""), "record"),
        (lambda r: row_of(r, "zeros")["measured"].pop("n"), "'n' is a required"),
        (lambda r: row_of(r, "zeros")["measured"]["protocol"].clear(), "metric"),
        (lambda r: row_of(r, "zeros")["measured"]["inputs"].clear(), "record"),
        (lambda r: r["summary"].update(confirmed=5), "summary"),
        (lambda r: r.update(surplus=1), "surplus"),
        (lambda r: r.update(format=1), "format"),
        (lambda r: r["text"].update(sha256="x"), "sha256"),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(record: dict[str, Any], damage: Any, words: str) -> None:
    tampered = copy.deepcopy(record)
    damage(tampered)
    with pytest.raises(BadInput, match=words):
        check_record(tampered)


def test_a_record_of_other_claims_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    claims = read_claims(tmp_path / "mine.yaml")
    check_record(record, claims)
    rows = copy.deepcopy(CLAIMS)
    rows[0]["confirmed"] = [0.1, 0.5]
    with pytest.raises(BadInput, match="other claims"):
        check_record(record, read_claims(claims_file(tmp_path, rows)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Which probes really run, with a cache of their own."""
    names: list[str] = []
    run = probes.run

    def count(shop: workshop.Workshop, name: str, parameters: dict[str, Any]) -> Measurement:
        names.append(name)
        return run(shop, name, parameters)

    # digits-mlp lives in the same cache: train it before the cache is another one.
    model = audit.workshop_for("digits-mlp", tmp_path, "selftext", 127).model.path
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "cache" / model.name)
    monkeypatch.setattr("agentforge.audit.record.run", count)
    return names


def test_what_nothing_has_changed_for_is_not_measured_again(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = read_claims(claims_file(tmp_path))
    first = measure(claims, shop(tmp_path / "a", memory=True), quiet)
    assert sorted(asked) == ["bits_per_weight", "breaks", "nothing_here", "score", "zero_share"]
    asked.clear()
    second = measure(claims, shop(tmp_path / "b", memory=True), quiet)
    # What failed, what was missing and what reads other rows is tried again.
    assert sorted(asked) == ["breaks", "nothing_here", "score"]
    assert [row["measured"] for row in first["claims"]] == [row["measured"] for row in second["claims"]]
    changes: list[Any] = [
        lambda: shop(tmp_path / "c", memory=True, effort="smoke"),
        lambda: audit.workshop_for("digits-mlp", tmp_path / "d", "selftext", 126, memory=True),
        lambda: shop(tmp_path / "e"),
    ]
    for change in changes:
        asked.clear()
        measure(claims, change(), quiet)
        assert asked.count("bits_per_weight") == 1
    asked.clear()
    monkeypatch.setattr(workshop, "source_sha256", lambda: "other code")
    measure(claims, shop(tmp_path / "f", memory=True), quiet)
    assert asked.count("bits_per_weight") == 1


def test_a_damaged_cache_is_measured_past(tmp_path: Path, asked: list[str]) -> None:
    claims = read_claims(claims_file(tmp_path, CLAIMS[:1]))
    sound = measure(claims, shop(tmp_path / "a", memory=True), quiet)
    (file,) = (tmp_path / "cache" / "measurements").iterdir()
    text = file.read_text()
    value = json.dumps(row_of(sound, "zeros")["measured"]["value"])
    damages = ["", "{", "[]", "3", "null", "{}", '{"found": {}}', json.dumps(json.loads(text)["found"]), "[" * 100_000]
    for damaged in [*damages, text.replace(value, "0.9"), text.replace('"form": 2', '"form": 1'), text[:-9]]:
        assert damaged != text
        file.write_text(damaged)
        asked.clear()
        again = measure(claims, shop(tmp_path / "b", memory=True), quiet)
        assert row_of(again, "zeros")["measured"] == row_of(sound, "zeros")["measured"]
        assert asked == ["zero_share"]
    asked.clear()
    measure(claims, shop(tmp_path / "b", memory=True), quiet)
    assert asked == []


# Imports once, then forks: audits that begin at the same moment, without 24 times the seconds of importing torch.
AT_ONCE = """
import gc, os, sys
import sklearn.datasets, sklearn.model_selection, torch, torch._dynamo, transformers
import agentforge.audit.record, agentforge.audit.report, agentforge.evaluation, agentforge.opening, agentforge.stages
from agentforge import cli

folder, count = sys.argv.pop(1), int(sys.argv.pop(1))
gc.freeze()  # else each child copies what its collector looks at
children = []
for i in range(count):
    if not (child := os.fork()):
        for number in (1, 2):
            os.dup2(os.open(f"{folder}/{number}-{i}", os.O_WRONLY | os.O_CREAT), number)
        cli.main()
    children.append(child)
sys.exit(max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], key=abs))
"""


def concurrently(folder: Path, count: int, claims: Path) -> list[list[tuple[str, str]]]:
    """The verdicts of `count` audits that run at once on one empty cache."""
    command = [sys.executable, "-c", AT_ONCE, str(folder), str(count)]
    command += ["audit", "--claims", str(claims), "--json", "--text", "selftext"]
    command += [word for row in CLAIMS[:3] for word in ("--only", row["id"])]
    environment = {**os.environ, "AGENTFORGE_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, [done.stderr.decode(), *((folder / f"2-{i}").read_text() for i in range(count))]
    assert not list(folder.rglob("*.tmp"))
    outputs = [json.loads((folder / f"1-{i}").read_text()) for i in range(count)]
    return [[(row["id"], row["verdict"]) for row in out["claims"]] for out in outputs]


@pytest.mark.parametrize("count", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_audits_that_share_a_cache_do_not_disturb_each_other(tmp_path: Path, count: int) -> None:
    claims = claims_file(tmp_path, CLAIMS[:3])
    assert (
        concurrently(tmp_path, count, claims) == [[("zeros", "confirmed"), ("bits", "partly"), ("small", "refuted")]] * count
    )


def test_the_cache_hash_follows_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = tmp_path / "agentforge"
    shutil.copytree(workshop.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    shutil.copytree(workshop.CHECKOUT / "reports" / "phase4_bitnet", tmp_path / "reports" / "phase4_bitnet")
    (own := tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    (own / "probes.py").write_text("")
    monkeypatch.setattr(workshop, "PACKAGE", copied)
    monkeypatch.setattr(workshop, "CHECKOUT", tmp_path)
    workshop.source_sha256.cache_clear()
    try:
        before = workshop.source_sha256(own)
        # What judges and draws, too: probes measure these as well.  And probes of reports, a user's own included.
        for name in (
            *("cli.py", "audit/report.py", "audit/claims.py", "stages/ternary.py", "audit/probes.py"),
            *("../reports/phase4_bitnet/training.py", "../elsewhere/mine/probes.py"),
        ):
            with open(copied / name, "a") as file:
                file.write("# other\n")
            workshop.source_sha256.cache_clear()
            after = workshop.source_sha256(own)
            assert after != before, name
            before = after
    finally:
        workshop.source_sha256.cache_clear()


SARIF = {  # what SARIF 2.1.0 asks of the parts that are used here
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "properties": {"driver": {"type": "object", "required": ["name", "rules"]}},
                    },
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message", "ruleId", "kind", "level"],
                            "properties": {
                                "kind": {"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "message": {"type": "object", "required": ["text"]},
                            },
                            # 3.27.9 and 3.27.10: a level other than none is of failures alone
                            "if": {"properties": {"kind": {"const": "fail"}}},
                            "then": {"properties": {"level": {"enum": ["note", "warning", "error"]}}},
                            "else": {"properties": {"level": {"const": "none"}}},
                        },
                    },
                },
            },
        },
    },
}


def test_sarif_has_a_result_a_row(record: dict[str, Any]) -> None:
    log = sarif(record, "claims.yaml")
    jsonschema.validate(log, SARIF)
    (run,) = log["runs"]
    assert [result["ruleId"] for result in run["results"]] == [row["id"] for row in record["claims"]]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [row["id"] for row in record["claims"]]
    levels = {result["ruleId"]: result["level"] for result in run["results"]}
    assert levels == {
        "zeros": "none", "bits": "warning", "small": "error", "broken": "none", "absent": "none", "later": "none",
        "total": "error",
    }  # fmt: skip


# What in-toto's Statement v1 and SLSA's provenance v1 require, written down from their specifications.
DIGEST = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{40,64}$"}}
RESOURCES = {
    "type": "array",
    "items": {
        "required": ["digest"],
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "digest": DIGEST, "annotations": {"type": "object"}},
    },
}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"}
STATEMENT = {
    "required": ["_type", "subject", "predicateType", "predicate"],
    "additionalProperties": False,
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": RESOURCES | {"minItems": 1},
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": {
            "required": ["buildDefinition", "runDetails"],
            "properties": {
                "buildDefinition": {
                    "required": ["buildType", "externalParameters"],
                    "properties": {
                        "buildType": {"pattern": "^https://"},
                        "resolvedDependencies": RESOURCES | {"minItems": 3},
                    },
                },
                "runDetails": {
                    "required": ["builder", "metadata", "byproducts"],
                    "properties": {
                        "builder": {"required": ["id"], "properties": {"id": {"pattern": "^https://"}}},
                        "metadata": {"required": ["startedOn", "finishedOn"], "additionalProperties": TIME},
                        "byproducts": RESOURCES,
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("name", report.NAMES)
def test_a_statement_beside_each_record_names_it_and_what_it_was_made_from(name: str) -> None:
    file = report.REPORTS / name / f"{name}.json"
    said: Any = json.loads(file.with_suffix(".intoto.json").read_text())
    jsonschema.validate(said, STATEMENT)
    assert said["subject"] == [{"name": file.name, "digest": {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}]
    record: Any = read_json(file)
    assert said == attestation(record, file)
    definition, metadata = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]["metadata"]
    hashes = [value for one in definition["resolvedDependencies"] for value in one["digest"].values()]
    commits = {row["provenance"]["commit"] for row in record["claims"] if row["provenance"]}
    assert {record["text"]["sha256"], record["model"]["source"]["sha256"], *commits} == set(hashes)
    assert metadata["startedOn"] < metadata["finishedOn"] == record["created"].replace("+00:00", "Z")
    with pytest.raises(BadInput, match="a time in it is none"):
        attestation(record | {"created": "yesterday"}, file)


def test_only_a_few_claims(tmp_path: Path) -> None:
    path = claims_file(tmp_path)
    settings = dict.fromkeys(("model", "against"), None) | {"text": "selftext", "tokens": 127, "budget": "smoke"}
    settings |= {"device": "cpu", "fresh": True}
    rows = report.only(path, ["bits", "zeros"], settings)
    assert [(row["id"], row["verdict"]) for row in rows] == [("bits", "partly"), ("zeros", "confirmed")]
    with pytest.raises(BadInput, match="'nought' is not in mine; choose from absent, bits"):
        report.only(path, ["nought"], settings)
    with pytest.raises(BadInput, match="claim total: counts the verdicts of other rows; measure the whole report"):
        report.only(path, ["zeros", "total"], settings)


def test_what_was_measured_of_another_model_does_not_stay(record: dict[str, Any], tmp_path: Path) -> None:
    before = {**record, "subject": {**record["model"], "fingerprint": "0" * 64}}
    with pytest.raises(BadInput, match="report mine: its model is 0000"):
        measure(read_claims(claims_file(tmp_path)), shop(tmp_path / "a"), quiet, before)


def test_a_record_that_says_other_than_its_claims_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    """Verdicts that follow from thresholds that the record made up, and rows that it left out."""
    claims = read_claims(claims_file(tmp_path))
    check_record(json.loads(json.dumps(record)), claims)
    wider, fewer = json.loads(json.dumps(record)), json.loads(json.dumps(record))
    row_of(wider, "small").update(
        {"thresholds": {"confirmed": [0, 9], "partly": None}, "verdict": "confirmed", "colour": "GREEN"}
    )
    fewer["claims"] = [row for row in fewer["claims"] if row["verdict"] != "refuted"]
    for forged in (wider, fewer):
        forged["summary"] = {v: sum(row["verdict"] == v for row in forged["claims"]) for v in forged["summary"]}
        forged["false_discovery"] = record_module._false_discovery(forged["claims"])
        check_record(forged)
        with pytest.raises(BadInput, match="was made from other claims than those of its file"):
            check_record(forged, claims)


def test_a_comparison_that_fails_fails_in_its_own_row(tmp_path: Path) -> None:
    """digits-mlp has no likelihoods; the row beside it is measured all the same."""
    probe = {"name": "top1_agreement", "parameters": {"stage": "ternary"}}
    rows = [CLAIMS[0], {"id": "same", "probe": probe, "confirmed": [0, 1]}]
    record = measure(read_claims(claims_file(tmp_path, rows)), shop(tmp_path / "a"), quiet)
    assert [row["verdict"] for row in record["claims"]] == ["confirmed", "error"]
    assert record["stages"] == []


def test_measurements_depend_on_all_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shop(tmp_path / "a")
    monkeypatch.setenv("AGENTFORGE_DATA", str(tmp_path / "data"))
    entries = {made._file("probe", {})}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arc.jsonl").write_text("{}")
    entries.add(made._file("probe", {}))
    assert len(entries) == 2


def test_what_was_measured_before_can_stay(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds judge again, rows without a measurement are measured, and the rest keeps value, source and machine."""
    before = json.loads(json.dumps(record))
    row_of(before, "zeros")["provenance"] |= {"source": "0" * 64, "commit": "1" * 40, "dirty": False}
    before["environment"]["cpu"] = "another"
    rows = [dict(row) for row in CLAIMS]
    rows[1] |= {"confirmed": [0, 1.7]}
    rows[5] = {"id": "later", "probe": {"name": "zero_share", "parameters": {"stage": "ternary:rule=threshold"}},
               "confirmed": [0, 1]}  # fmt: skip
    taken: list[str] = []
    monkeypatch.setattr(
        "agentforge.audit.record.run",
        lambda shop, name, given: taken.append(f"{name} {given}") or probes.run(shop, name, given),
    )
    again = measure(read_claims(claims_file(tmp_path, rows)), shop(tmp_path / "artifacts"), quiet, before)
    assert sorted(taken) == sorted([
        "breaks {}", "nothing_here {}", "zero_share {'stage': 'ternary:rule=threshold'}",
        "score {'sections': ['S']}",
    ])  # fmt: skip
    assert [row["verdict"] for row in again["claims"][:3]] == ["confirmed", "confirmed", "refuted"]
    assert row_of(again, "later")["verdict"] == "confirmed"
    check_record(json.loads(json.dumps(again, allow_nan=False)))
    # Kept again by a later run, a row still names what took it.
    third = measure(read_claims(claims_file(tmp_path, rows)), shop(tmp_path / "artifacts"), quiet, again)
    for record in (again, third):
        zeros = row_of(record, "zeros")["provenance"]
        assert (zeros["source"], zeros["commit"]) == ("0" * 64, "1" * 40) and zeros["environment"]["cpu"] == "another"
    assert row_of(third, "later")["provenance"] == row_of(again, "later")["provenance"]
    assert "environment" not in row_of(third, "later")["provenance"]
    assert "`111111111111` (source `000000000000`): 1" in drawing.provenance(third)
    with pytest.raises(
        BadInput, match=r"report mine: its tokens is \(127, 128\), asked for is \(63, 64\); run without --keep"
    ):
        measure(
            read_claims(claims_file(tmp_path)),
            audit.workshop_for("digits-mlp", tmp_path, "selftext", 63),
            quiet,
            before,
        )


@pytest.mark.slow
def test_a_report_of_own_claims_is_made_and_held_against_its_record(tmp_path: Path) -> None:
    path = claims_file(tmp_path, [row for row in CLAIMS if row["id"] not in ("absent", "broken")])
    folder = report.run(path, text="selftext", tokens=127, out=tmp_path / "reports", fresh=True, progress=False)
    assert sorted(file.name for file in folder.iterdir()) == [
        f"mine.{e}" for e in ("html", "intoto.json", "ipynb", "json", "md", "sarif")
    ]
    claims = read_claims(path)
    report.check(folder, claims)
    report.run(path, text="selftext", tokens=127, out=tmp_path / "reports", keep=True, progress=False)
    report.check(folder, claims)
    with pytest.raises(BadInput, match="there is no report to keep anything of; run without --keep"):
        report.run(path, text="selftext", tokens=127, out=tmp_path / "elsewhere", keep=True, progress=False)
    made = {file.name: file.read_text() for file in folder.iterdir()}
    sha256 = record_sha256(json.loads(made["mine.json"]))
    assert all(sha256 in text for name, text in made.items() if not name.endswith(".json"))
    assert str(tmp_path) not in made["mine.ipynb"]
    assert "<details>" in made["mine.html"] and "agentforge audit --claims" in made["mine.html"]
    for name, old, new in (
        ("mine.html", "confirmed", "confirmed!"),
        ("mine.md", "RED refuted", "GREEN confirmed"),
        ("mine.sarif", '"level": "error"', '"level": "none"'),
        ("mine.ipynb", "refuted", "confirmed"),
        ("mine.intoto.json", "selftext", "wikitext2"),
    ):
        (folder / name).write_text(made[name].replace(old, new, 1))
        with pytest.raises(BadInput, match=f"{name}: is not what its record gives"):
            report.check(folder, claims)
        (folder / name).write_text(made[name])
    (folder / "mine.md").unlink()
    with pytest.raises(BadInput, match=r"mine\.md: is missing"):
        report.check(folder, claims)


def test_settings_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = claims_file(tmp_path)
    for settings, words in (
        ({"budget": "huge"}, "smoke, quick, standard, full"),
        ({"tokens": 1}, "tokens=1"),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(AgentForgeError, match=words):
            report.run(path, out=tmp_path / "reports", progress=False, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "reports").exists()


OWN = """from agentforge.audit.probes import probe
from agentforge.evaluation import Measurement


@probe("fingers")
def fingers(workshop, hands: int) -> Measurement:
    return Measurement(5 * hands, "fingers", None, 1, {"metric": "count"})


FIGURES = ()
"""


def test_a_folder_of_own_is_a_report_with_its_own_probes_beside_its_sources(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    rows = [{"id": "hands", "probe": {"name": "fingers", "parameters": {"hands": 2}}, "confirmed": [10, 10]}]
    claims_file(mine, rows).rename(mine / "claims.yaml")
    (mine / "probes.py").write_text(OWN)
    with pytest.raises(BadInput, match=r"probe 'fingers' does not exist"):  # of a file alone, nothing beside it is run
        read_claims(mine / "claims.yaml")
    template = json.loads(report.TEMPLATE.read_text())
    template["cells"].append({"cell_type": "markdown", "id": "end", "metadata": {}, "source": "The end of mine."})
    (mine / "template.ipynb").write_text(json.dumps(template))
    sources = {name: (mine / name).read_bytes() for name in ("claims.yaml", "probes.py", "template.ipynb")}
    (mine / "mine.md").write_text("![](figure-7.png)")
    for name in ("figure-7.png", "figure-8.png"):  # one of a report before, one of the user's
        (mine / name).write_bytes(b"")
    (mine / "notes.txt").write_text("the user's")
    folder = report.run(mine, text="selftext", tokens=127, out=tmp_path, fresh=True, progress=False)
    assert folder == mine and {name: (mine / name).read_bytes() for name in sources} == sources
    made = {f"mine.{end}" for end in ("html", "intoto.json", "ipynb", "json", "md", "sarif")}
    assert {file.name for file in mine.iterdir()} - {"__pycache__"} == made | sources.keys() | {"notes.txt", "figure-8.png"}
    (row,) = read_json(mine / "mine.json")["claims"]
    assert row["provenance"]["source"] == workshop.source_sha256(mine) != workshop.source_sha256()
    assert (row["verdict"], row["measured"]["value"]) == ("confirmed", 10)
    assert "The end of mine." in (mine / "mine.html").read_text()
    report.check(mine, read_claims(mine))
    shutil.copytree(mine, other := tmp_path / "elsewhere" / "mine")
    (other / "probes.py").write_text("1 / 0\n")
    with pytest.raises(BadInput, match=r"elsewhere/mine/probes\.py: cannot be imported \(ZeroDivisionError"):
        read_claims(other)


def test_the_quick_budget_leaves_slow_rows_untested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentforge.audit.record.SLOW", ("zero_share",))
    claims = read_claims(claims_file(tmp_path))
    quick = measure(claims, shop(tmp_path / "a", effort="quick"), quiet)
    for name in ("zeros", "total"):  # the row, and the score that would count it
        assert row_of(quick, name)["verdict"] == "not tested"
        assert "standard and full measure it" in row_of(quick, name)["needs"]
    standard = measure(claims, shop(tmp_path / "b", effort="standard"), quiet)
    assert row_of(standard, "zeros")["verdict"] == "confirmed"
    assert row_of(standard, "total")["measured"]


def test_the_quick_budget_encodes_language_models_by_plain_stages_only(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [
        {"id": stage[:6], "probe": {"name": "perplexity_factor", "parameters": {"stage": stage}}, "confirmed": [0, 2]}
        for stage in ("rounding:bits=4", "seedlm:bits=4")
    ]
    claims = read_claims(claims_file(tmp_path, rows, baselines=["rounding:bits=8", "vptq:bits=2"]))
    made = audit.workshop_for(str(tiny_llama), tmp_path / "a", "selftext", 127, effort="quick")
    record = measure(claims, made, quiet)
    assert [row["stage"] for row in record["stages"]] == ["rounding:bits=8", "rounding:bits=4"]
    assert row_of(record, "roundi")["measured"]
    assert row_of(record, "seedlm")["verdict"] == "not tested"
    assert shop(tmp_path / "b", effort="quick").has_time_for("seedlm:bits=4")


def test_what_is_left_is_weighed_by_how_long_rows_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time, by the last record, is the first row's: after it as much is left as has passed."""
    rows = [
        {"id": f"c{i}", "probe": {"name": "nothing_here", "parameters": {}}, "confirmed": [0, 1]}
        if i == 0
        else {"id": f"c{i}", "probe": {"name": "arithmetic_of", "parameters": {"number": i}}, "confirmed": [0, 100]}
        for i in range(11)
    ]

    def arithmetic_of(shop: workshop.Workshop, number: int) -> Measurement:
        return shop.exact(number, "x", 1, "number")

    monkeypatch.setitem(probes.PROBES, "arithmetic_of", arithmetic_of)
    claims = read_claims(claims_file(tmp_path, rows))
    seconds = {"nothing_here": 10.0, "arithmetic_of": 1.0}
    last = {
        "claims": [{"probe": c.probe, "parameters": c.parameters, "seconds": seconds[str(c.probe)]} for c in claims.claims]
    }
    assert sum(expected_seconds(claims, "quick", last).values()) == 20.0
    larger = expected_seconds(claims, "quick", {**last, "budget": "full"})
    assert sum(larger.values()) == pytest.approx(20 * 1022 / 6132, abs=0.02)
    lines: list[str] = []
    made = shop(tmp_path / "a", effort="quick")
    now = {"time": 0.0}
    real = record_module.take

    def slow(*args: Any) -> Any:
        taken = real(*args)
        now["time"] += 60 if args[1].probe == "nothing_here" else 6
        return taken

    monkeypatch.setattr(record_module, "take", slow)
    monkeypatch.setattr(record_module.time, "perf_counter", lambda: now["time"])
    measure(claims, made, lambda line, **_: lines.append(line), last=last)
    left = [line.rpartition("(")[2] for line in lines if " left)" in line]
    assert left[0] == "about 60 s left)"
    assert left[-1] == "about 6 s left)"
    assert len(left) == 10


def without_times(found: Any) -> Any:
    """A record, or a row, without what differs from run to run."""
    if isinstance(found, dict):
        return {
            key: without_times(value)
            for key, value in found.items()
            if key not in ("seconds", "created", "peak_memory_bytes")
        }
    return [without_times(value) for value in found] if isinstance(found, list) else found


@pytest.mark.slow
def test_a_command_audits_what_it_names_from_whatever_folder(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command in three folders; in two of them, and beside the checkout, lie other models under the same name."""
    rows = [{"id": "size", "probe": {"name": "megabytes_on_disk"}, "confirmed": [0, 1]}]
    made = {}
    for place, stage in (("one", "rounding:bits=3"), ("two", "rounding:bits=8"), ("two/deep/er", "rounding:bits=3")):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        compress(digits, stage, out=folder / "small", progress=False)
        claims_file(folder, rows)
        (folder / "text.txt").write_text("a text " * 100)
        monkeypatch.chdir(folder)
        command = ["audit", "--claims", "mine.yaml", "--model", "small", "--text", "text.txt", "--json"]
        app([*command, "--only", "size"], standalone_mode=False)
        (row,) = json.loads(capsys.readouterr().out)["claims"]
        app([*command, "--out", "out"], standalone_mode=False)
        capsys.readouterr()
        record = json.loads((folder / "out/mine/mine.json").read_text())
        assert without_times(record["claims"]) == without_times([row])
        record["text"]["origin"] = record["text"]["origin"].replace(str(folder), "")
        made[place] = without_times(record)
    assert made["one"] == made["two/deep/er"]
    sizes = [made[place]["claims"][0]["measured"]["value"] for place in ("one", "two")]
    assert sizes[0] < sizes[1]


def test_a_relative_name_is_looked_for_in_the_current_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = read_claims(claims_file(tmp_path, CLAIMS[:1], against="tests"))
    settings = {"model": "agentforge/audit", "text": None, "against": None}
    monkeypatch.chdir(tmp_path)
    assert report._places(claims, settings) == ["agentforge/audit", "tests", None]
    (tmp_path / "tests").mkdir()
    (tmp_path / "smollm2-135m").mkdir()
    assert report._places(claims, settings | {"model": "smollm2-135m"}) == ["smollm2-135m", str(tmp_path / "tests"), None]


def test_mistakes_in_a_claims_file_end_the_command_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*CLAIMS[:1], {"id": "kl", "probe": {"name": "kl"}, "confirmed": [0, 1]}]
    settings = dict.fromkeys(("model", "against"), None) | {"text": "selftext", "tokens": 127, "budget": "smoke"}
    with pytest.raises(BadInput, match=r"mine.yaml, line \d+: claim kl: probe kl compares with an original; .* --against"):
        report.only(claims_file(tmp_path, rows), ["kl"], settings | {"device": "cpu", "fresh": True})
    with pytest.raises(BadInput, match="text 'nought' does not exist"):
        report.only(claims_file(tmp_path), ["zeros"], settings | {"device": "cpu", "fresh": True, "text": "nought"})


def test_a_probe_that_fails_ends_in_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--claims", str(claims_file(tmp_path)), "--text", "selftext", "--fresh", "--json", "--only"]
    assert app([*command, "broken"], standalone_mode=False) == 1
    (row,) = json.loads(capsys.readouterr().out)["claims"]
    assert (row["verdict"], row["measured"]) == ("error", None)
    assert not app([*command, "small"], standalone_mode=False)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (MemoryError(), "error"),
        (OSError(errno.EMFILE, "too many open files"), "error"),
        (BadInput("a parameter that is not right"), "error"),
        (AssertionError(), "error"),
        (ModuleNotFoundError("no agentforge.nowhere", name="agentforge.nowhere"), "error"),
        (ModuleNotFoundError("no elsewhere", name="elsewhere"), "not tested"),
        (audit.Unmeasured("a folder"), "not tested"),
    ],
)
def test_what_a_probe_raises_is_never_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str
) -> None:
    def raises(_: workshop.Workshop) -> Measurement:
        raise error

    monkeypatch.setitem(probes.PROBES, "breaks", raises)
    (row,) = measure(read_claims(claims_file(tmp_path, [CLAIMS[3]])), shop(tmp_path), quiet)["claims"]
    assert row["verdict"] == verdict and row["measured"] is None
    assert (row["needs"] if verdict == "not tested" else row["failure"]).strip(": ")
