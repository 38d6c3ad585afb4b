"""Claims as data: read, checked against the schema and for sense, and judged.

A claim with a probe is judged by what was measured alone, against intervals that stand in the claims file before anything
is run.  The whole 95% interval of the measurement counts: inside `confirmed` it is confirmed, inside `partly` and outside
`confirmed` partly so, outside of both refuted; across a threshold it is partly so and undecided.  What is claimed of another
model or size and lies outside `confirmed` here "does not carry over".  A probe that fails is an error, which says nothing
about the claim.  A claim without a probe is "not tested", or "not reproducible here", and says what it would take.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import schemas, stages
from ..errors import BadInput
from ..evaluation.measurement import Measurement
from ..names import find_report
from ..yamlfiles import read_yaml
from .probes import import_probes, mistake

Verdict = Literal["confirmed", "partly", "refuted", "does not carry over", "not reproducible here", "not tested", "error"]
COLOURS: dict[str, str] = {
    "confirmed": "GREEN",
    "partly": "YELLOW",
    "refuted": "RED",
    "does not carry over": "GREY",
    "not reproducible here": "GREY",
    "not tested": "GREY",
    "error": "ERROR",
}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """One row: what is claimed, by whom, and how it is measured.

    stage: what it is about.  claimed: the claim as a number, if it is one: `by` whom, `value` (or from and to), `unit`.
    protocol: what is measured, on what, against which denominator.  about_other: the other model or size that the number is
    about.  measures: what answers the row: the documented algorithm, agentforge, or arithmetic alone.
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
    about_other: str = ""
    measures: str = ""


@dataclass(frozen=True)
class ClaimsFile:
    """All claims of one report.  source: the audit they were taken from.  model: what they are measured on.  against: the
    original that it was made from, for claims that compare the two.  baselines: stages that are measured beside those of
    the claims, to read them against.  file: its name.  folder: that of the report, if it has one, with probes.py and
    template.ipynb.  places: file and line of each claim, for messages."""

    report: str
    title: str
    about: str
    source: str
    model: str
    claims: tuple[Claim, ...]
    baselines: tuple[str, ...] = ()
    against: str | None = None
    file: str = ""
    folder: Path | None = None
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and the measurement it rests on.  undecided: its 95% interval holds a threshold.  decides_at:
    the n at which it probably would hold none.  failure: what the probe failed with.  missing: what it would have needed."""

    claim: Claim
    verdict: Verdict
    measured: Measurement | None
    undecided: bool = False
    decides_at: int | None = None
    failure: str = ""
    missing: str = ""

    @property
    def colour(self) -> str:
        """GREEN, YELLOW, RED, GREY or ERROR."""
        return COLOURS[self.verdict]


def read_claims(name_or_path: str | Path) -> ClaimsFile:
    """The claims of a report: by its name, if it is one of the checkout's, by the path of its folder, or by the path of a
    YAML file alone.  The probes of a folder are imported, which runs them; of a file nothing is run.

    Raises BadInput, naming the place, for a file that is missing, no YAML, or not as the schema asks.
    """
    path, folder = find_report(name_or_path)
    if folder:
        import_probes(folder)
    data, line = read_yaml(path, "a file of claims")

    def at(*where: Any) -> str:
        return f"{path}, line {line(where)}"

    if problem := schemas.first_error(Path(__file__).parent / "schema.json", data):
        where = list(problem.absolute_path)
        raise BadInput(f"{at(*where)}: {_place(data, where)}: {problem.message:.300}")
    claims = tuple(_claim(row) for row in data["claims"])
    places: dict[str, str] = {}
    for number, claim in enumerate(claims):
        if claim.id in places:
            raise BadInput(f"{at('claims', number)}: claim {claim.id} is there twice")
        unit = claim.claimed["unit"] if claim.claimed else None
        if found := _nonsense(claim) or (mistake(claim.probe, claim.parameters, unit) if claim.probe else None):
            part, why = found
            raise BadInput(f"{at('claims', number, *part)}: claim {claim.id}, {', '.join(part)}: {why}")
        places[claim.id] = f"{at('claims', number, 'probe')}: claim {claim.id}"
    baselines = tuple(data.get("baselines", ()))
    for number, stage in enumerate(baselines):
        try:
            stages.parse(stage)
        except BadInput as error:
            raise BadInput(f"{at('baselines', number)}: {error}") from None
    rest = {key: value for key, value in data.items() if key not in ("claims", "baselines")}
    return ClaimsFile(claims=claims, baselines=baselines, file=path.name, folder=folder, places=places, **rest)


def claims_sha256(claims: Iterable[Claim]) -> str:
    """The hash of all that the claims say: a record names the claims, and the thresholds, that it was judged by."""
    rows = [dataclasses.asdict(claim) for claim in claims]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def judge(claim: Claim, measured: Measurement | None, failure: str = "", missing: str = "") -> Judged:
    """The verdict on a claim, from the measurement and the claim's own thresholds; an error if its probe failed, or gave
    what is not a number, or one in another unit than the claim's."""
    if claim.probe is not None and measured is not None and not failure:
        low, high = measured.bounds
        if not math.isfinite(measured.value):
            failure = f"the measured value is {measured.value}"
        elif not low <= measured.value <= high:  # NaN, too
            failure = f"the measured value {measured.value:g} is not in its interval, {low:g} to {high:g}"
        elif claim.claimed and claim.claimed["unit"] != measured.unit:
            failure = f"{measured.unit} were measured, {claim.claimed['unit']} are claimed"
    if claim.probe is not None and failure:
        return Judged(claim, "error", None, failure=failure)
    if claim.probe is None or measured is None:
        return Judged(
            claim, "not reproducible here" if claim.not_here else "not tested", None, missing=missing or claim.needs
        )
    verdict, undecided = _verdict_of(claim, measured)
    far = reach(claim, measured)
    needed = measured.n * far * far if undecided else math.inf
    return Judged(claim, verdict, measured, undecided, _two_digits(needed) if math.isfinite(needed) else None)


def _verdict_of(claim: Claim, measured: Measurement) -> tuple[Verdict, bool]:
    """What a measurement means under the thresholds of a claim, and whether it is undecided between two verdicts."""
    near = measured.within(*claim.confirmed) if claim.confirmed else "outside"
    if near == "inside":
        return "confirmed", False
    if near == "outside" and claim.about_other:
        return "does not carry over", False
    wide = _around(claim.confirmed, claim.partly)
    around = measured.within(*wide) if wide else "outside"
    return ("refuted", False) if around == "outside" else ("partly", "undecided" in (near, around))


def _around(*intervals: Interval | None) -> Interval | None:
    """The interval from the least to the greatest bound of those that there are."""
    bounds = [bound for one in intervals for bound in one or ()]
    return (min(bounds), max(bounds)) if bounds else None


def _two_digits(n: float) -> int:
    """n rounded up to its first two digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return math.ceil(n / unit) * unit


def reach(claim: Claim, measured: Measurement) -> float:
    """How far the 95% interval reaches: its arm over the way from the value to a threshold of the claim, for the threshold
    that is nearest in these terms.  Below 1 it reaches none; infinite if the value lies on one."""
    low, high = measured.bounds
    intervals = (claim.confirmed, None if claim.about_other else _around(claim.confirmed, claim.partly))
    found = 0.0
    for edge in (edge for one in intervals for edge in one or () if math.isfinite(edge)):
        way = abs(edge - measured.value)
        arm = measured.value - low if edge < measured.value else high - measured.value
        found = max(found, arm / way if way else math.inf)
    return found


def false_discoveries(reaches: Sequence[float], rate: float = 0.05) -> int:
    """How many of the verdicts that each for itself is decided at 95% would be undecided if of all decided ones together at
    most a share of `rate` may be wrong (Benjamini and Hochberg 1995).  reaches: of the measurements, as `reach` has them.

    The p of a verdict is that of the nearest threshold: 0.05 if the interval just reaches it, by a normal distribution.
    """
    normal = statistics.NormalDist()
    ps = sorted(2 * normal.cdf(-normal.inv_cdf(0.975) / r) if r else 0.0 for r in reaches)
    kept = max((rank for rank, p in enumerate(ps, 1) if p <= rate * rank / len(ps)), default=0)
    return max(0, sum(r < 1 for r in reaches) - kept)


def interval(bounds: Sequence[float | None] | None) -> Interval | None:
    """Thresholds from a file, in which null is no bound on that side."""
    if bounds is None:
        return None
    low, high = bounds
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _claim(row: dict[str, Any]) -> Claim:
    probe = row.get("probe") or {}
    thresholds = {key: interval(row.get(key)) for key in ("confirmed", "partly")}
    return Claim(**row | thresholds | {"probe": probe.get("name"), "parameters": probe.get("parameters", {})})


def _nonsense(claim: Claim) -> tuple[tuple[str, ...], str] | None:
    """The part of a claim that makes no sense, and why."""
    for key, bounds in (("confirmed", claim.confirmed), ("partly", claim.partly)):
        if bounds and bounds[0] > bounds[1]:
            return (key,), f"{bounds[0]:g} to {bounds[1]:g} holds nothing; expected the smaller bound first"
        if bounds == (-math.inf, math.inf):
            return (key,), "holds every value; expected a bound, or two"
    if claim.claimed and claim.confirmed:
        value = claim.claimed["value"]
        ends = value if isinstance(value, list) else [value, value]
        if not claim.confirmed[0] <= ends[0] <= ends[1] <= claim.confirmed[1]:
            return ("claimed",), (
                f"{value} is claimed, and would not be confirmed ({claim.confirmed[0]:g} to {claim.confirmed[1]:g}); "
                "expected `confirmed` around what is claimed"
            )
    return None


def _place(data: Any, path: list[Any]) -> str:
    """Where in the file something is wrong, in a reader's words."""
    if len(path) >= 2 and path[0] == "claims":
        claim, number = data["claims"][path[1]], f"number {path[1] + 1}"
        name = claim.get("id", number) if isinstance(claim, dict) else number
        return f"claim {name}" + "".join(f", {part}" for part in path[2:])
    return ", ".join(map(str, path)) or "top level"
