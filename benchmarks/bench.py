"""What the tables of this folder share: options, rows that are kept, processes, times, Markdown and pictures.

Nothing large is imported before it is needed: the peak memory of a process is counted from its parent's.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentforge.artifact import Artifact
    from agentforge.evaluation import Measurement
    from agentforge.planes import Plane

Row = dict[str, Any]
MODEL = "smollm2-135m"
PROMPT = "Once upon a time, in a village by the sea, there lived"  # to generate from


def options(arguments: list[str] | None, about: str | None, out: str, **defaults: Any) -> argparse.Namespace:
    """--out, --report, and an option for each default, named as it is.

    False: a flag.  []: may be given more than once.  Another list: several values.  None: a text.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write tables and pictures again, measure nothing")
    for name, default in {"out": Path(out), **defaults}.items():
        how: Row = {"default": default, "help": "default: %(default)s"}
        if default is False:
            how["action"] = "store_true"
        elif default == []:
            how["action"] = "append"
        else:
            one = default[0] if isinstance(default, list) else default
            how |= {"type": str if one is None else type(one), "nargs": "*" if isinstance(default, list) else None}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser.parse_args(arguments)


def read(file: Path) -> Any:
    """A record, or [] if there is none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def save(folder: Path, files: dict[str, Any]) -> None:
    """Each file replaced in one step: bytes and text as they are, other data as JSON."""
    from agentforge.tensorfiles import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        text = data if isinstance(data, (str, bytes)) else json.dumps(data, indent=1) + "\n"
        write_atomic(folder / name, [text.encode() if isinstance(text, str) else text])


def say(text: str) -> None:
    """To the standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def run(
    rows: list[Row],
    wanted: dict[str, Row],
    measure: Callable[[str], Row | None],
    keep: Callable[[list[Row]], object],
    same: Callable[[Row], object] = lambda recipe: recipe,
    only: Sequence[str] = (),
) -> list[Row]:
    """Take what is missing of `wanted`, recipes by name, and `keep` all rows after each; a failed row is tried again.

    A row replaces those whose recipe is the `same`.  Order: others, then as wanted.  only: how the names begin.  The table
    ends where `measure` gives None: its time is over.
    """
    order, failed = [same(recipe) for recipe in wanted.values()], []
    for name, recipe in wanted.items():
        done = any(row["recipe"] == recipe and "failed" not in row for row in rows)
        if done or not name.startswith(tuple(only) or ""):
            continue
        say(f"{name} ...")
        try:
            found = measure(name)
        except Exception as error:  # the other rows are taken all the same
            failed.append(f"{name}: {type(error).__name__}: {error}")
            say(failed[-1])
            continue
        if found is None:
            say("out of time; the same command goes on")
            break
        row = {"recipe": recipe, **found}
        rows = [r for r in rows if same(r["recipe"]) != same(recipe)] + [row]
        rows.sort(key=lambda r: order.index(same(r["recipe"])) if same(r["recipe"]) in order else -1)
        keep(rows)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))
    return rows


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a fresh process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def process(*command: Any, fine: Sequence[int] = (0,)) -> tuple[str, Row]:
    """What a command writes to its standard output, and its seconds, memory and traffic with the disk.

    Raises CalledProcessError for an exit code that is not among `fine`.
    """
    words, mapped, done = [str(word) for word in command], 0, 0
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        running = subprocess.Popen(words, stdout=said)
        while not done:
            mapped = max(mapped, _mapped_bytes(running.pid))
            time.sleep(0.05)
            done, status, used = os.wait4(running.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode not in fine:
            raise subprocess.CalledProcessError(running.returncode, words)
        said.seek(0)
        text = said.read()
    times = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}
    memory = {"peak_bytes": used.ru_maxrss * 1024, "mapped_bytes": mapped}
    return text, times | memory | {"read_bytes": used.ru_inblock * 512, "written_bytes": used.ru_oublock * 512}


def _mapped_bytes(process: int) -> int:
    """Resident bytes of a process that are pages of mapped files, which the system shares and takes back."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:")), 0)


Clock = Callable[[], float]


def in_turn(
    work: dict[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    block: float = 0.0,
    clock: Clock = time.perf_counter,
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
            times[name].append(once(call, calls[name], clock))
    return times


def once(call: Callable[[], object], calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call of so many."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def read_bandwidth(clock: Clock = time.perf_counter) -> float:
    """Bytes per second that torch adds up, of 256 MB; the best of seven."""
    import torch

    values = torch.ones(64 << 20)
    return values.nbytes / min(once(values.sum, clock=clock) for _ in range(7))


def mean(values: list[float]) -> Row:
    """Mean, standard error and n."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": statistics.fmean(values), "stderr": error, "n": len(values)}


def measurement(found: Row) -> Measurement:
    """A measurement of a record: what gates and intervals look at."""
    from agentforge.evaluation import Measurement

    about = {"environment": {}, "interval": found.get("interval")}
    return Measurement(found["value"], found.get("unit", ""), found["stderr"], found.get("n", 0), {}, **about)


def to_json(found: Any) -> dict[str, Row]:
    """Measurements of a named tuple, as they are kept."""
    return {name: value.to_json() for name, value in found._asdict().items()}


def with_error(found: Row, digits: str = ".4g", error: str = ".2g") -> str:
    """A value and its standard error."""
    return f"{found['value']:{digits}}" + ("" if found["stderr"] is None else f" ± {found['stderr']:{error}}")


def with_interval(found: Row, digits: str = ".3g") -> str:
    """A value and its 95% interval."""
    low, high = measurement(found).bounds
    return f"{found['value']:{digits}} [{low:{digits}}, {high:{digits}}]"


def bars(found: list[Row]) -> list[list[float]]:
    """How far the 95% intervals go down and up, as matplotlib takes them."""
    bounds = [(each["value"], *measurement(each).bounds) for each in found]
    return [[value - low for value, low, _ in bounds], [high - value for value, _, high in bounds]]


def table(head: str, rows: Iterable[Sequence[str] | str], sides: str = "l") -> str:
    """A Markdown table.  head: the columns, as in "a | b".  sides: l or r for each column, the last one for the rest."""
    sides = sides.ljust(head.count(" | ") + 1, sides[-1])
    rule = "|" + "|".join("---:" if side == "r" else "---" for side in sides) + "|"
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def page(*parts: str) -> str:
    """Markdown of parts: the lines of a paragraph are joined, and nothing is indented."""
    lines = [""]
    for line in map(str.strip, "\n\n".join(part.strip("\n ") for part in parts if part).splitlines()):
        if line and lines[-1] and not re.match(r"[|#]|\*\*|\* |!\[", line):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines[1:]) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"* {line}" for line in lines)


def png(figure: Any, dpi: int = 110) -> bytes:
    """A picture, the same bytes from the same data."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def coded_bytes(artifact: Artifact) -> int:
    """Bytes of all planes once coded, each of which must come back."""
    from agentforge.planes import Packed

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
    back = type(plane).from_stored(plane.name, coded.coding, tuple(plane.values.shape), coded.stored())
    if not back.values.equal(plane.values):
        raise AssertionError(f"plane {plane.name} does not come back from its code")
    return coded.stored().numel()
