"""How far long work is: a bar in a terminal; in a file, a line now and then."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from .escaping import printable

QUIET = 30.0  # seconds between lines, however long a step takes, and however many short bars there are
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, about {remaining} left{postfix}"
_said = time.monotonic()


@contextmanager
def progress_bar(title: str | None, total: int, unit: str, done: int = 0) -> Iterator[Any]:
    """A bar of so many steps, of which `done` were done before; without a title there is none to be seen.  The time that is
    left is that of the steps left at the pace so far, which is unknown, a question mark, before the first one."""
    about: dict[str, Any] = {"total": total, "initial": done, "unit": unit, "leave": False, "desc": title}
    if title is None or sys.stderr.isatty() or sys.stderr is not sys.__stderr__:  # the last: a notebook, or a test
        with tqdm(**about, disable=None if title else True) as bar:
            yield bar
        return
    ended = threading.Event()
    with tqdm(**about, file=io.StringIO(), bar_format=LINE, smoothing=0) as bar:
        threading.Thread(target=_lines, args=(bar, ended), daemon=True).start()
        try:
            yield bar
        finally:
            ended.set()


def _lines(bar: Any, ended: threading.Event) -> None:
    global _said
    while not ended.is_set():
        if time.monotonic() - _said >= QUIET:
            _said = time.monotonic()
            print(printable(bar), file=sys.stderr, flush=True)
        ended.wait(min(1.0, QUIET))
