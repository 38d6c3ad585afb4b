"""Claims are refused where they are not as the schema asks, and judged by their thresholds alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentforge.audit import PROBES, judge, read_claims
from agentforge.audit.claims import COLOURS, Claim
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement


def measured(value: float, stderr: float | None = None) -> Measurement:
    return Measurement(value, "x", stderr, 10, {"metric": "test"}, environment={})


def file_with(tmp_path: Path, **changes: Any) -> Path:
    row = {"id": "a.b", "stage": "ternary", "section": "S", "title": "T", "audit": "GREEN", "probe": {"name": "ratio"}}
    row |= {"protocol": "P", "confirmed": [1, 2]}
    row.update(changes)
    row = {key: value for key, value in row.items() if value is not None}
    path = tmp_path / "claims.yaml"
    head = {"report": "r", "title": "T", "about": "A", "source": "S", "model": "m"}
    path.write_text(yaml.safe_dump({**head, "claims": [row]}))
    return path


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.9, "partly"), (1.0, "confirmed"), (1.5, "confirmed"), (2.0, "confirmed"), (2.1, "refuted"), (0.4, "refuted")],
)
def test_verdicts_follow_the_thresholds(value: float, verdict: str) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, 2.0), partly=(0.5, 2.0))
    judged = judge(claim, measured(value))
    assert judged.verdict == verdict
    assert judged.colour == COLOURS[verdict]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_confirms_nothing(value: float) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(-math.inf, math.inf))
    assert judge(claim, measured(value)).verdict == "refuted"


def test_a_value_near_a_threshold_is_marked_close() -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, 2.0))
    assert judge(claim, measured(1.1, stderr=0.06)).close
    assert not judge(claim, measured(1.1, stderr=0.04)).close
    assert not judge(claim, measured(1.0)).close


def test_no_verdict_without_a_measurement() -> None:
    assert judge(Claim("i", "ternary", "s", "t", needs="x"), None).verdict == "not tested"
    assert judge(Claim("i", "ternary", "s", "t", needs="x", not_here=True), None).verdict == "not reproducible here"
    assert judge(Claim("i", "ternary", "s", "t", needs="x"), measured(1.0)).measured is None


def test_a_good_file_is_read(tmp_path: Path) -> None:
    (claim,) = read_claims(file_with(tmp_path, partly=[None, 3])).claims
    assert claim.confirmed == (1.0, 2.0)
    assert claim.partly == (-math.inf, 3.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"confirmed": [1]}, "claim a.b, confirmed"),
        ({"confirmed": ["a", "b"]}, "claim a.b, confirmed"),
        ({"confirmed": None}, "claim a.b"),
        ({"probe": None}, "claim a.b"),
        ({"needs": "both a probe and a need"}, "claim a.b"),
        ({"surplus": 1}, "surplus"),
        ({"title": None}, "title"),
        ({"protocol": None}, "claim a.b"),
        ({"stage": "magic"}, "claim a.b, stage"),
        ({"audit": None}, "claim a.b"),
        ({"claimed": {"by": "nobody", "value": 1, "unit": "x"}}, "claim a.b, claimed, by"),
        ({"id": "No Spaces"}, "does not match"),
    ],
)
def test_a_bad_row_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_claims(file_with(tmp_path, **changes))


def test_what_is_refused_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    head = "report: r\ntitle: T\nabout: A\nsource: S\nmodel: m\nclaims:\n"
    good = "  - {id: a, stage: vptq, section: S, title: T, paper: P, needs: more}\n"
    path.write_text(head + good + "  - id: b\n    stage: vptq\n    section: [1]\n    title: T\n    paper: P\n    needs: x\n")
    with pytest.raises(BadInput, match="line 10: claim b, section"):
        read_claims(path)
    path.write_text(head + good + good)
    with pytest.raises(BadInput, match="line 8: claim a is there twice"):
        read_claims(path)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "report: x", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_claims_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(BadInput):
        read_claims(path)


def test_an_unknown_report_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="phase4_bitnet"):
        read_claims("phase5")


def test_twice_the_same_claim_is_refused(tmp_path: Path) -> None:
    path = file_with(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["claims"] *= 2
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BadInput, match=r"a\.b is there twice"):
        read_claims(path)


def test_the_phase_4_audit_is_there_row_by_row() -> None:
    """The tables of the audit, by section and number of rows; a section may have more rows where one claim became two."""
    claims = read_claims("phase4_bitnet").claims
    rows = {
        "Executive summary": 5,
        "1.1 Core components": 7,
        "1.2 Algorithm implementation": 6,
        "2 Quantisation and compression": 5,
        "2 Quality and training": 8,
        "2 Integration and monitoring": 7,
        "3 Key parameters": 9,
        "3 Size-adaptive configuration": 4,
        "4 Code quality": 7 + 4,
        "5 Red flags": 3,
        "5 Yellow flags": 3,
        "5 Green flags": 4,
        "6 Recommendations": 3 + 3 + 3,
        "7 Conclusion": 6,
        "Beside the audit: the documentation's perplexities": 2,
    }
    for section, count in rows.items():
        assert sum(claim.section == section for claim in claims) >= count, section
    assert {claim.section for claim in claims} == set(rows)
    assert all(claim.probe is None or claim.probe in PROBES for claim in claims)
