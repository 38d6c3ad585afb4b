"""Rate against quality: what the reports measured, and what the runs of a workspace did, in one form.

Points lie in one plane only if they were measured in the same way: of the same original, on the same text, windows and
number of tokens.  The frontier is taken over those of the reports' way; the others are beside it, and said to be.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import stages
from ..audit.report import reports_folder
from ..errors import AgentForgeError, BadInput
from ..evaluation import Measurement
from . import runs

Quality = Literal["kl", "total_retention"]
UNITS: dict[Quality, str] = {"kl": "KL from the original (nats per token)", "total_retention": "share of the accuracy kept"}
OWN = "runs of this workspace"
KEPT = 0.84  # of the accuracy: what the documentation promises at its 280x
OWN_GRID = 1e-3  # relative error below which a stage has found the grid that the weights lie on already


class Point(NamedTuple):
    """A compressed model.  bits: per weight of the encoded tensors.  low, high: the value's 95% interval.  way: how it was
    measured, in words.  original: the fingerprint of what it was made from."""

    original: str
    what: str
    source: str
    bits: float
    value: float
    low: float
    high: float
    way: str


class Front(NamedTuple):
    """points: all of one original.  best: of the reports' way, those that no other one beats in bits and quality.  way: that
    way.  beside: points that were measured otherwise.  says: what comes out, in a sentence."""

    points: list[Point]
    best: list[Point]
    way: str
    beside: list[Point]
    says: str


def originals(workspace: Path) -> dict[str, str]:
    """The fingerprints of the models that there are points of, and their names.

    Raises BadInput, as `points` does, for a report's record that is none.
    """
    found = {}
    with _record("ratios") as record:
        for name, rows in (record or {}).get("points", {}).items():
            found.update({row["retention"]["inputs"]["original"]: name for row in rows if "inputs" in row["retention"]})
    for run, row in _accepted(workspace):
        known = next((m.inputs["original"] for m in row.measured.values() if "original" in m.inputs), None)
        if known is not None:
            found.setdefault(known, run.journal.original.name)
    twice = {name for name, count in Counter(found.values()).items() if count > 1}
    return {key: f"{name} ({key[:8]})" if name in twice else name for key, name in found.items()}


def points(workspace: Path, quality: Quality) -> list[Point]:
    """Every point there is: of the reports' single stages, budgets and ratios, and of the accepted steps of the runs.

    Left out are stages that only found the grid on which the weights lie already, and values without their protocol.
    """
    found = []
    if quality == "kl":
        with _record("stages") as record:
            for row in record or []:
                if row["relative_error"] >= OWN_GRID:
                    stage = stages.from_json(row["recipe"]["stage"]).brief()
                    found.append(_point(Measurement(**row["kl"]), row["bits"], stage, "single stages"))
        with _record("fit") as record:
            for row in record or []:
                what = f"fit to {row['recipe']['bits']:g} bits{', trained' if 'recovery' in row['recipe'] else ''}"
                found.append(_point(Measurement(**row["kl"]), row["bits"], what, "budgets (fit)"))
    else:
        with _record("ratios") as record:
            for row in [row for rows in (record or {}).get("points", {}).values() for row in rows]:
                if row["error"] >= OWN_GRID and "protocol" in row["retention"]:
                    found.append(_point(Measurement(**row["retention"]), row["bits"], row["setting"], "ratios"))
    for run, done in _accepted(workspace):
        measured = done.measured
        if {quality, "touched_ratio", "error"} <= set(measured) and measured["error"].value >= OWN_GRID:
            bits = run.chain.bits / measured["touched_ratio"].value
            found.append(_point(measured[quality], bits, f"{run.name}: {done.stage}", OWN))
    return found


def front(found: list[Point], original: str, quality: Quality) -> Front:
    """The frontier of one original's points, and what it says."""
    mine = [point for point in found if point.original == original]
    reported = Counter(point.way for point in mine if point.source != OWN) or Counter(p.way for p in mine)
    way = reported.most_common(1)[0][0] if reported else ""
    best: list[Point] = []
    for point in sorted((p for p in mine if p.way == way), key=lambda p: (p.bits, _badness(p, quality))):
        if not best or _badness(point, quality) < _badness(best[-1], quality):
            best.append(point)
    beside = [point for point in mine if point.way != way]
    return Front(mine, best, way, beside, _finding(best, quality))


def _badness(point: Point, quality: Quality) -> float:
    return point.value if quality == "kl" else -point.value


def _finding(best: list[Point], quality: Quality) -> str:
    if not best:
        return "Nothing is measured yet."
    sources = ", ".join(f"{count} of {source}" for source, count in Counter(p.source for p in best).most_common())
    says = f"{len(best)} points are on the frontier: {sources}."
    if quality == "kl":
        for bits in (4, 3, 2):
            if under := [point for point in best if point.bits <= bits]:
                says += f" At {bits} bits per weight or fewer the lowest KL is {shown(under[-1])} ({_where(under[-1])})."
        return says
    holds = [point for point in best if point.low >= KEPT]
    if not holds:
        return f"{says} None keeps {KEPT:.0%} of the accuracy by its whole 95% interval."
    fewest = f"{_where(holds[0])}, {shown(holds[0])}"
    return f"{says} The fewest bits that keep {KEPT:.0%} of the accuracy by the whole 95% interval: {fewest}."


def shown(point: Point) -> str:
    """The value of a point, and its interval."""
    return f"{point.value:.3g} ({point.low:.3g} to {point.high:.3g})"


def _where(point: Point) -> str:
    return f"{point.what} at {point.bits:.2f} bits, {16 / point.bits:.1f}x against 16"


def _point(found: Measurement, bits: float, what: str, source: str) -> Point:
    return Point(found.inputs.get("original", ""), what, source, bits, found.value, *found.bounds, way(found.protocol))


def way(protocol: dict[str, Any]) -> str:
    """What a quality was measured on, in words."""
    if "scored_tokens" not in protocol:
        return str(protocol.get("data", "what no protocol says"))
    text = f"{protocol['scored_tokens']:,} tokens of {protocol.get('text')} ({protocol.get('split')})"
    return f"{text}, windows of {protocol.get('context')}, BOS {protocol.get('bos')}"


def _accepted(workspace: Path) -> Iterator[tuple[runs.Run, runs.Done]]:
    """The accepted steps of the runs that can be read; the others say on their own page what is wrong."""
    for name in runs.names(workspace):
        try:
            run = runs.read(workspace, name)
        except AgentForgeError:
            continue
        for row in run.accepted:
            yield run, row


@contextlib.contextmanager
def _record(report: str) -> Iterator[Any]:
    """What a report's JSON file says, None if there is none; whatever is odd about it is said in a sentence."""
    file = reports_folder() / report / f"{report}.json"
    try:
        yield json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file}: is not a record of agentforge's reports ({type(error).__name__}: {error})") from None
