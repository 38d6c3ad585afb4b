"""Claims as data: read, checked against the schema, and judged.

A claim with a probe is judged by the measured value alone, against intervals that stand in the claims file before
anything is run: inside `confirmed` it is confirmed, inside `partly` partly so, anywhere else it is refuted.  A claim
without a probe has no verdict but "not tested", or "not reproducible here", and says what it would take.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonschema
import yaml

from ..errors import BadInput
from ..evaluation.measurement import Measurement

CLAIMS = Path(__file__).parent / "claims"
Verdict = Literal["confirmed", "partly", "refuted", "not reproducible here", "not tested"]
COLOURS: dict[str, str] = {
    "confirmed": "GREEN",
    "partly": "YELLOW",
    "refuted": "RED",
    "not reproducible here": "GREY",
    "not tested": "GREY",
}
CONFIRMED: Verdict = "confirmed"
PARTLY: Verdict = "partly"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """One row: what is claimed, by whom, and how it is measured.

    stage: what it is about.  claimed: the claim as a number, where it is one: `by` whom, `value` (or from and to), `unit`.
    protocol: what is measured, on what, against which denominator.
    """

    id: str
    stage: str
    section: str
    title: str
    paper: str = ""
    documentation: str = ""
    code: str = ""
    audit: str = ""
    claimed: dict[str, Any] | None = None
    probe: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    confirmed: Interval | None = None
    partly: Interval | None = None
    needs: str = ""
    not_here: bool = False
    remark: str = ""


@dataclass(frozen=True)
class ClaimsFile:
    """All claims of one report.  source: the audit they were taken from.  model: what they are measured on.  against: the
    original that it was made from, for claims that compare the two.  baselines: stages that are measured beside those of
    the claims, to read them against."""

    report: str
    title: str
    about: str
    source: str
    model: str
    claims: tuple[Claim, ...]
    baselines: tuple[str, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and the measurement it rests on.  close: the value is within two standard errors of a
    threshold, so that another sample might be judged otherwise.  failure: what the probe failed with, where it did: what
    cannot be done is not there, so that the claim is refuted.  missing: what the probe would have needed."""

    claim: Claim
    verdict: Verdict
    measured: Measurement | None
    close: bool = False
    failure: str = ""
    missing: str = ""

    @property
    def colour(self) -> str:
        """GREEN, YELLOW, RED or GREY."""
        return COLOURS[self.verdict]


def read_claims(name_or_path: str | Path) -> ClaimsFile:
    """A claims file by its report's name, or by path.

    Raises BadInput, naming the place, for a file that is missing, no YAML, or not as the schema asks.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CLAIMS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CLAIMS.glob("*.yaml")))
        raise BadInput(f"report {str(name_or_path)!r} does not exist; expected a .yaml file of claims or one of {known}")
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: no valid YAML ({' '.join(str(error).split())[:200]})") from None
    schema = json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if problem is not None:
        where = list(problem.absolute_path)
        raise BadInput(f"{path}, line {_line(text, where)}: {_place(data, where)}: {problem.message:.300}")
    claims = tuple(_claim(row) for row in data.pop("claims"))
    ids = [claim.id for claim in claims]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        line = _line(text, ["claims", len(ids) - 1 - ids[::-1].index(twice[0])])
        raise BadInput(f"{path}, line {line}: claim {twice[0]} is there twice")
    return ClaimsFile(claims=claims, baselines=tuple(data.pop("baselines", ())), **data)


def claims_sha256(claims: Iterable[Claim]) -> str:
    """The hash of all that the claims say: a record names the claims, and the thresholds, that it was judged by."""
    rows = [dataclasses.asdict(claim) for claim in claims]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def judge(claim: Claim, measured: Measurement | None, failure: str = "", missing: str = "") -> Judged:
    """The verdict on a claim, from the measured value and the claim's own thresholds; or from the probe's failure."""
    if claim.probe is not None and (failure or (measured is not None and not math.isfinite(measured.value))):
        return Judged(claim, "refuted", None, failure=failure or f"the measured value is {measured and measured.value}")
    if claim.probe is None or measured is None:
        return Judged(
            claim, "not reproducible here" if claim.not_here else "not tested", None, missing=missing or claim.needs
        )
    verdict = verdict_of(measured.value, claim.confirmed, claim.partly)
    spread = 2 * (measured.stderr or 0.0)
    around = [verdict_of(measured.value + d, claim.confirmed, claim.partly) for d in (-spread, spread)]
    return Judged(claim, verdict, measured, any(other != verdict for other in around))


def verdict_of(value: float, confirmed: Interval | None, partly: Interval | None) -> Verdict:
    """What a value means under the thresholds of a claim."""
    for interval, verdict in ((confirmed, CONFIRMED), (partly, PARTLY)):
        if interval is not None and interval[0] <= value <= interval[1]:
            return verdict
    return "refuted"


def _claim(row: dict[str, Any]) -> Claim:
    row = dict(row)
    probe = row.pop("probe", None)
    for key in ("confirmed", "partly"):
        if key in row:
            low, high = row[key]
            row[key] = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    return Claim(probe=probe["name"] if probe else None, parameters=(probe or {}).get("parameters", {}), **row)


def _place(data: Any, path: list[Any]) -> str:
    """Where in the file something is wrong, in a reader's words."""
    if len(path) >= 2 and path[0] == "claims":
        claim = data["claims"][path[1]]
        name = claim.get("id", f"number {path[1] + 1}") if isinstance(claim, dict) else f"number {path[1] + 1}"
        return f"claim {name}" + "".join(f", {part}" for part in path[2:])
    return ", ".join(map(str, path)) or "top level"


def _line(text: str, path: list[Any]) -> int:
    """The line, from 1, on which the value at a path begins; of its nearest parent where the value is not there."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for step in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode) and (found := [v for k, v in node.value if k.value == step]):
            node = found[0]
    return int(node.start_mark.line) + 1 if node is not None else 1
