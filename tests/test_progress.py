"""How far long work is: lines in a file, nothing for a notebook or without a title, and an estimate that can be checked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentforge import progress

WORK = """
import time
from agentforge import progress
progress.QUIET = {quiet}
with progress.progress_bar({title!r}, 110, "tensor", 10) as bar:
    for _ in range(25):
        time.sleep(0.04)
        bar.update()
    time.sleep({last})
"""


def lines(tmp_path: Path, **settings: object) -> list[str]:
    """What the work leaves in the file that its standard error goes to."""
    with open(tmp_path / "log.txt", "w") as log:
        code = WORK.format(**settings)
        subprocess.run([sys.executable, "-c", code], stderr=log, stdout=log, check=True)
    return (tmp_path / "log.txt").read_text().splitlines()


def test_a_file_has_lines_with_an_honest_estimate(tmp_path: Path) -> None:
    found = lines(tmp_path, quiet=0.2, title="encoding a\x1b[31mmodel", last=6)
    assert len(found) >= 8  # during the last step, too
    assert all(line.startswith("encoding a\\x1b[31mmodel: ") for line in found)
    done, total, spent, left = re.fullmatch(
        r".*: (\d+) of (\d+) tensors in 00:(\d\d), about (?:\d\d:)?(\d\d:\d\d) left", found[-1]
    ).groups()  # type: ignore[union-attr]
    minutes, seconds = map(int, left.split(":"))
    assert (int(done), int(total)) == (35, 110)
    # 25 steps took all the time so far, not the 10 from before; 75 are left.
    assert abs(60 * minutes + seconds - int(spent) * 75 / 25) <= 4


def test_short_work_and_work_without_a_title_say_nothing(tmp_path: Path) -> None:
    assert lines(tmp_path, quiet=30, title="encoding", last=0) == []
    assert lines(tmp_path, quiet=0.1, title=None, last=0) == []


def test_many_short_bars_are_not_silent(tmp_path: Path) -> None:
    with open(tmp_path / "log.txt", "w") as log:
        code = "import time\nfrom agentforge import progress\nprogress.QUIET = 0.5\n"
        code += "for i in range(12):\n    with progress.progress_bar(f'part {i}', 1, 'step'):\n        time.sleep(0.3)"
        subprocess.run([sys.executable, "-c", code], stderr=log, check=True)
    found = (tmp_path / "log.txt").read_text().splitlines()
    assert 2 <= len(found) <= 8 and "about ? left" in found[0]


def test_a_notebook_gets_no_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """There, as under pytest, standard error is not the process's own."""
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with progress.progress_bar("encoding", 2, "tensor") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
