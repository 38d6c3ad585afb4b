"""What the tables of this folder share: rows that are kept, files that are replaced in one step, tables in Markdown."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from agentforge.artifact import Artifact
from agentforge.evaluation import Measurement
from agentforge.planes import Packed, Plane
from agentforge.tensorfiles import write_atomic

PROMPT = "Once upon a time, in a village by the sea, there lived"  # to generate from
Row = dict[str, Any]
# Under tables whose record does not say that transformers' own decoder layers ran.
FUSED = """\
The generation speed of {} was measured with a Llama layer that computed a new token by two kernels of its own; that code is
gone. Without it a token of this model takes about 1.3 times as long."""


def parser(description: str, out: str | None) -> argparse.ArgumentParser:
    """Arguments with --out: the folder of table and record."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=None if out is None else Path(out))
    return made


def read(file: Path) -> Any:
    """A record, or [] if there is none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def save(folder: Path, files: dict[str, Any]) -> None:
    """Each file replaced in one step: bytes and text as they are, other data as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        text = data if isinstance(data, (str, bytes)) else json.dumps(data, indent=1) + "\n"
        write_atomic(folder / name, [text.encode() if isinstance(text, str) else text])


def table(head: str, rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """Lines of a Markdown table.  head: the columns, as in "a | b"; sides: l or r for each of them."""
    rule = "|" + "|".join("---:" if side == "r" else "---" for side in sides) + "|"
    return [f"| {head} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def measurement(found: Row) -> Measurement:
    """A measurement of a record: what gates and intervals look at."""
    about = {"environment": {}, "interval": found.get("interval")}
    return Measurement(found["value"], found.get("unit", ""), found["stderr"], found.get("n", 0), {}, **about)


def in_turn(
    work: dict[str, Callable[[], object]], seconds: float, least: int = 5, block: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of a call, from blocks of calls: a block of each contestant in turn, for about so long in all.

    A block takes `block` seconds or one call: what a contestant leaves behind (threads that still spin, caches) is not the
    next one's.
    """
    calls = {name: max(1, round(block / min(once(call), once(call)))) for name, call in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or any(len(found) < least for found in times.values()):
        for name, call in work.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def once(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, all that it asked of the device included."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def mean(values: list[float]) -> Row:
    """Mean, standard error and n."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": statistics.fmean(values), "stderr": error, "n": len(values)}


def coded_bytes(artifact: Artifact) -> int:
    """Bytes of all planes once coded, each of which must come back."""
    shared: tuple[Plane, ...] | None = None
    total = 0
    for row in artifact.rows:
        packed = artifact.read(row)
        if isinstance(packed, Packed):
            shared = packed.shared
            total += sum(map(_coded, packed))
    return total + sum(map(_coded, shared or ()))


def _coded(plane: Plane) -> int:
    coded = plane.coded()
    back = Plane.from_stored(plane.name, coded.coding, tuple(plane.values.shape), coded.stored())
    if not torch.equal(back.values, plane.values):
        raise AssertionError(f"plane {plane.name} does not come back from its code")
    return coded.stored().numel()
