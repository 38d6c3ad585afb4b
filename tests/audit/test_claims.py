"""Claims are refused where they are not as the schema asks, and judged by their thresholds alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.stats
import yaml

from agentforge.audit import PROBES, judge, read_claims
from agentforge.audit.claims import COLOURS, Claim, false_discoveries
from agentforge.audit.probes import import_probes
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement
from agentforge.names import REPORTS
from agentforge.yamlfiles import read_yaml

import_probes(REPORTS / "claims_vs_measurements")  # rows below name probes of its own


def measured(value: float, stderr: float | None = None) -> Measurement:
    return Measurement(value, "x", stderr, 10, {"metric": "test"}, environment={})


PROBE = {"name": "ratio", "parameters": {"stage": "ternary", "of": "whole model", "bits": 16}}


def file_with(tmp_path: Path, **changes: Any) -> Path:
    row = {"id": "a.b", "stage": "ternary", "section": "S", "title": "T", "audit": "GREEN", "probe": dict(PROBE)}
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
def test_what_is_not_finite_is_an_error(value: float) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, math.inf))
    judged = judge(claim, measured(value))
    assert (judged.verdict, judged.measured) == ("error", None) and str(value) in judged.failure


def test_another_unit_than_the_claims_is_an_error() -> None:
    claimed = {"by": "paper", "value": 1.0, "unit": "MB"}
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, math.inf), claimed=claimed)
    assert judge(claim, measured(1.0)).failure == "x were measured, MB are claimed"


@pytest.mark.parametrize("interval", [(math.nan, math.nan), (2.0, 3.0)])
def test_a_value_that_its_own_interval_does_not_hold_is_an_error(interval: tuple[float, float]) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="ratio", confirmed=(0, 5))
    judged = judge(claim, dataclasses.replace(measured(1.0), interval=interval))
    assert judged.verdict == "error" and "is not in its interval" in judged.failure


def test_an_interval_of_any_size_is_judged() -> None:
    claim = Claim("i", "ternary", "s", "t", probe="ratio", confirmed=(0, 1 + 1e-12))
    judged = judge(claim, dataclasses.replace(measured(1.0), interval=(-1e300, 1e300)))
    assert (judged.verdict, judged.undecided, judged.decides_at) == ("partly", True, None)


@pytest.mark.parametrize(
    ("value", "verdict", "undecided", "decides_at"),
    [
        (1.5, "confirmed", False, None),
        (1.2, "confirmed", False, None),  # the interval just touches 1
        (1.15, "partly", True, 18),
        (1.1, "partly", True, 40),
        (1.01, "partly", True, 4000),
        (1.0, "partly", True, None),  # on the threshold no n decides
        (0.97, "partly", True, 450),
        (0.75, "partly", False, None),
        (0.47, "partly", True, 450),
        (0.2, "refuted", False, None),
        (2.3, "refuted", False, None),
        (2.1, "partly", True, 40),
    ],
)
def test_a_verdict_needs_the_whole_interval(value: float, verdict: str, undecided: bool, decides_at: int | None) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, 2.0), partly=(0.5, 2.0))
    judged = judge(claim, measured(value, stderr=0.1))
    assert (judged.verdict, judged.undecided) == (verdict, undecided)
    assert judged.decides_at == decides_at


@pytest.mark.parametrize(
    ("value", "verdict", "undecided"),
    [
        (1.5, "confirmed", False),
        (1.1, "partly", True),
        (0.75, "does not carry over", False),
        (9, "does not carry over", False),
    ],
)
def test_a_claim_about_another_model_is_not_refuted_here(value: float, verdict: str, undecided: bool) -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, 2.0), partly=(0.5, 2.0), about_other="Llama-2-7B")
    judged = judge(claim, measured(value, stderr=0.1))
    assert (judged.verdict, judged.undecided, judged.colour == "GREY") == (verdict, undecided, "carry" in verdict)
    assert judged.measured is not None


def test_an_unknown_error_is_judged_by_its_value() -> None:
    claim = Claim("i", "ternary", "s", "t", probe="p", confirmed=(1.0, 2.0))
    assert judge(claim, Measurement(1.0, "x", None, 1, {}, environment={}, error="unknown")).verdict == "confirmed"


def test_false_discoveries_are_those_of_scipy() -> None:
    """The worked example of Benjamini and Hochberg (1995), section 3.2, and random ones."""
    examples = [
        [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590]
    ]
    examples += [list(numpy.random.default_rng(seed).uniform(0, 0.2, 40) ** 2) for seed in range(20)]
    normal = statistics.NormalDist()
    for ps in examples:
        reaches = [normal.inv_cdf(0.975) / -normal.inv_cdf(p / 2) for p in ps]
        kept = int((scipy.stats.false_discovery_control(ps) <= 0.05).sum())
        assert false_discoveries(reaches) == sum(p < 0.05 for p in ps) - kept
    assert false_discoveries([]) == 0 and false_discoveries([0.0, 0.5, math.inf]) == 0


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
        ({"confirmed": [2, 1]}, r"line \d: claim a.b, confirmed: 2 to 1 holds nothing"),
        ({"partly": [2, 1]}, "claim a.b, partly: 2 to 1 holds nothing"),
        ({"confirmed": [None, None]}, "claim a.b, confirmed: holds every value"),
        ({"confirmed": [math.nan, 1]}, "not a finite number"),
        ({"confirmed": [0, math.inf]}, "not a finite number"),
        ({"claimed": {"by": "paper", "value": 2.5, "unit": "x"}}, "claim a.b, claimed: 2.5 is claimed, and would not be"),
        ({"claimed": {"by": "paper", "value": [1, 3], "unit": "x"}}, "claim a.b, claimed"),
        ({"claimed": {"by": "paper", "value": [2, 1], "unit": "x"}}, "claim a.b, claimed"),
        (
            {"claimed": {"by": "paper", "value": 1, "unit": "MB"}},
            "claim a.b, claimed, unit: 'MB' is claimed, and probe ratio",
        ),
        ({"probe": {"name": "ration"}}, "claim a.b, probe, name: probe 'ration' does not exist; choose from"),
        ({"probe": PROBE | {"parameters": {"stage": "ternary"}}}, "claim a.b, probe, parameters: probe ratio needs 'of'"),
        (
            {"probe": {"name": "ratio_on_disk", "parameters": {"bit": 16}}},
            "parameters, bit: probe ratio_on_disk takes no 'bit'",
        ),
        ({"probe": {"name": "ratio_on_disk", "parameters": {"bits": "16"}}}, "bits='16': Input should be a valid integer"),
        (
            {"probe": {"name": "ratio_on_disk", "parameters": {"bits": -16}}},
            "bits=-16: Input should be greater than",
        ),
        ({"probe": {"name": "task_accuracy", "parameters": {"task": "arc_easy", "limit": 0}}}, "limit=0: Input should be"),
        (
            {"probe": {"name": "threshold_for_zeros", "parameters": {"share": 1.5, "source": "gaussian"}}},
            "parameters, share: probe threshold_for_zeros: share=1.5: Input should be less than or equal to 1",
        ),
        ({"probe": {"name": "sparse_gain", "parameters": {"tau": -1.0}}}, "tau=-1.0: Input should be greater than 0"),
        ({"probe": {"name": "zero_share", "parameters": {"stage": "roundng:bits=4"}}}, "stage 'roundng' does not exist"),
        ({"probe": {"name": "zero_share", "parameters": {"stage": 4}}}, "stage=4: Input should be a valid string"),
        ({"probe": {"name": "edge_of_what_passes", "parameters": {"stages": ["ternary", "magic"], "least": 1}}}, "'magic'"),
        ({"probe": {"name": "coded_bits", "parameters": {"coder": "v1_seedlm:blok=3"}}}, "coder='v1_seedlm:blok=3'"),
        (
            {"probe": {"name": "filter_gain", "parameters": {"filter": "low", "signal": "steep"}}},
            "'constant' or 'alternating'",
        ),
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


BOMB = "k0: &k0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is there twice"),
        ("a: &a\n  b: *a\n", "line 1: is a part of itself"),
        (BOMB, "line 6: stands for more than 200,000 values"),
        ("a: 1\nb: " + "[" * 3000, "line 2: is nested more than 40 deep"),
        ("a: 1\nb: 1" + "0" * 400, "line 2: 1000"),
        ("a: 1\nb: 1" + "0" * 5000, "line 2: 1000"),
        ("a: 1\nb: -.inf", "line 2: -.inf is not a finite number"),
        ("a: 1\nb: !!bool perhaps", "line 2: perhaps is no"),
        ("a: 1\nb: 2020-01-01", "line 2: 'timestamp' is not plain data"),
        ("a: 1\nb: 2020-99-01", "line 2: 'timestamp' is not plain data"),
        ("1: a", "line 1: a key is not text"),
        ("a: 1\n? !!str [b]\n: 2", "line 2: a key is not text"),
        ("a: 1\nb: *c", "line 2: no valid YAML"),
        ("a: 1\nb: [", "no valid YAML"),
        ("a: " + "x" * (5 << 20), "bytes; expected"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words):
        read_yaml(path, "a file of claims")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: [2, .5]}\nb: *a\nc: {<<: *a, x: 3}\n")
    data, line = read_yaml(path, "anything")
    assert data == {"a": {"x": 1, "y": [2, 0.5]}, "b": {"x": 1, "y": [2, 0.5]}, "c": {"x": 3, "y": [2, 0.5]}}
    assert line(["c", "x"]) == 3


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


OURS = ("phase4_bitnet", "phase8_compression", "claims_vs_measurements")


@pytest.mark.parametrize("report", OURS)
def test_every_measured_row_of_ours_says_what_answers_it(report: str) -> None:
    for claim in read_claims(report).claims:
        assert bool(claim.measures) == bool(claim.probe), claim.id


@pytest.mark.parametrize("report", OURS)
def test_one_number_is_not_judged_both_ways(report: str) -> None:
    """Rows that rest on one measurement have the same thresholds, unless other numbers are claimed; and one badge."""
    thresholds: dict[str, Any] = {}
    badges: dict[str, str] = {}
    for claim in (claim for claim in read_claims(report).claims if claim.probe):
        call = f"{claim.probe} {claim.parameters}"
        number = str(claim.claimed["value"]) if claim.claimed else ""
        first = thresholds.setdefault(f"{call} {number}", (claim.confirmed, claim.partly))
        assert first == (claim.confirmed, claim.partly), claim.id
        assert badges.setdefault(call, claim.measures) == claim.measures, claim.id


# What a probe gives if there is nothing: all weights zero, a cast to 16 bits, a model that has learned nothing.  A row that
# is confirmed by it cannot fail.
NOTHING = {
    "zero_share": 0.0,
    "relative_squared_error": 1.0,
    "recovery": 0.0,
    "explained": 0.0,
    "explained_variance": 0.0,
    "retention": 0.0,
    "top1_agreement": 0.0,
    "errors_compared": math.inf,
    "error_ratio": 1.0,
    "output_error_ratio": 1.0,
    "output_errors_compared": 1.0,
    "codebook_gain_of_filter": 1.0,
    "recovery_gain_of_filter": 1.0,
    "calibration_gain": 1.0,
    "filter_gain": 0.0,
}


@pytest.mark.parametrize("report", OURS)
def test_nothing_is_confirmed_by_doing_nothing(report: str) -> None:
    for claim in read_claims(report).claims:
        null = NOTHING.get(claim.probe or "")
        if claim.probe in ("ratio", "stage_ratio") and claim.parameters.get("bits", 32) == 32:
            null = 2.0  # x of 32 bits: a cast
        if null is not None and claim.confirmed:
            assert not claim.confirmed[0] <= null <= claim.confirmed[1], claim.id


@pytest.mark.parametrize("report", OURS)
def test_what_others_did_not_claim_is_not_theirs(report: str) -> None:
    """A row whose own words say that the paper claims no such thing is ours; a paper's number is about what is measured."""
    for claim in read_claims(report).claims:
        by = claim.claimed["by"] if claim.claimed else ""
        words = f"{claim.paper} {claim.remark}".lower()
        if any(text in words for text in ("no claim of the paper", "not compared", "no such figure")):
            assert by == "ours", claim.id
        if by == "paper" and "model that is here" in claim.title and claim.probe:
            assert claim.about_other, claim.id
