"""Runs: real processes on digits-mlp, whatever befalls them, and workspaces that mean harm."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentforge.chain import run_chain
from agentforge.dashboard import frontier, runs
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement
from agentforge.models import LanguageModel
from reports.phase8_compression.dashboard import CHAIN

OWN = "digits.yaml (workspace)"


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    folder = runs.open_workspace(tmp_path / "workspace")
    (folder / "digits.yaml").write_text(CHAIN, encoding="utf-8")
    yield folder
    for name in runs.active(folder):  # a test that failed leaves nobody behind
        os.killpg(runs.read(folder, name).record.pid or 0, signal.SIGKILL)


def status(workspace: Path, name: str = "one") -> str:
    return runs.read(workspace, name).status


def over(workspace: Path, name: str = "one") -> None:
    until(lambda: not runs.active(workspace))


def written(folder: Path, status_of: str, **more: Any) -> None:
    """A run's folder, made by hand."""
    folder.mkdir()
    (folder / "chain.yaml").write_text(CHAIN, encoding="utf-8")
    record = {"model": "digits-mlp", "chain": OWN, "began": [1.0], "pid": None, "asked": status_of, **more}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def test_a_run_is_paused_and_goes_on_to_the_bytes_of_one_that_was_not(workspace: Path, digits: LanguageModel) -> None:
    """By a dashboard that ignores SIGINT, as one that a shell has put into the background does; and then by another one."""
    script = "import signal, sys; from pathlib import Path; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    script += f"from agentforge.dashboard import runs; runs.start(Path(sys.argv[1]), 'one', 'digits-mlp', {OWN!r})"
    subprocess.run([sys.executable, "-c", script, str(workspace)], check=True)
    assert runs.active(workspace) == ["one"] and status(workspace) == "running"
    for what in (runs.resume, lambda w, n: runs.start(w, n, "digits-mlp", OWN)):
        with pytest.raises(BadInput, match=r"is running|is there already"):
            what(workspace, "one")
    until(lambda: "encoding" in runs.log_tail(workspace / "one", 50))
    runs.pause(workspace, "one")
    assert status(workspace) in ("pausing", "paused")
    over(workspace)
    assert status(workspace) == "paused"
    with pytest.raises(BadInput, match="not running"):
        runs.pause(workspace, "one")
    runs.resume(workspace, "one")
    over(workspace)
    run = runs.read(workspace, "one")
    assert run.status == "finished" and [row.step for row in run.accepted] == [1, 2, 3] and len(run.record.began) == 2
    run_chain(digits, workspace / "digits.yaml", workspace / "by-hand", progress=False)
    assert hashes(run.out / "artifact") == hashes(workspace / "by-hand" / "artifact")
    sizes = runs.sizes(run)
    assert [size.bytes for size in sizes] == [2 * digits.parameters, *(s.bytes for s in sizes[1:])]
    assert sizes[3].what == "coarse, try 1: rolled back" and sizes[3].bytes == sizes[1].bytes > sizes[2].bytes
    assert sizes[-1].bytes == (run.out / "artifact" / "model.safetensors").stat().st_size
    assert "asked to pause" in runs.log_tail(run.folder, 50) and "goes on" in runs.log_tail(run.folder, 50)
    with pytest.raises(BadInput, match="is finished"):
        runs.resume(workspace, "one")
    with pytest.raises(BadInput, match="is finished"):
        runs.abort(workspace, "one")
    points = [p for p in frontier.points(workspace, "total_retention") if p.source == frontier.OWN]
    assert points[0].what == "one: rounding:bits=8,group=32"
    assert points[0].bits == pytest.approx(16 / run.accepted[0].measured["touched_ratio"].value)


def test_a_crash_is_seen_and_the_run_goes_on(workspace: Path) -> None:
    runs.start(workspace, "one", "digits-mlp", OWN)
    os.killpg(runs.read(workspace, "one").record.pid or 0, signal.SIGKILL)
    over(workspace)
    run = runs.read(workspace, "one")
    assert run.status == "failed" and run.reason == "its process was killed, or the machine was"
    runs.abort(workspace, "one")  # what has failed can be ended for good
    assert status(workspace) == "aborted"
    with pytest.raises(BadInput, match="is aborted"):
        runs.resume(workspace, "one")


def test_abort_kills_what_does_not_end_by_itself_and_leaves_nothing_half_written(workspace: Path) -> None:
    """A process that ignores SIGINT, with the run's lock."""
    written(workspace / "one", "pause")
    alive = os.open(workspace / "one" / "alive", os.O_RDWR | os.O_CREAT)
    fcntl.flock(alive, fcntl.LOCK_EX)
    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('.', flush=True); time.sleep(60)"
    deaf = subprocess.Popen(
        [sys.executable, "-c", script], pass_fds=(alive,), start_new_session=True, stdout=subprocess.PIPE
    )
    assert deaf.stdout is not None and deaf.stdout.read(1) == b"."
    os.close(alive)
    record = json.loads((workspace / "one" / "run.json").read_text()) | {"pid": deaf.pid, "asked": None}
    (workspace / "one" / "run.json").write_text(json.dumps(record))
    (workspace / "one" / "out" / "step-1.partial" / "tensors").mkdir(parents=True)
    (workspace / "one" / "out" / "step-1.partial" / "recipe.json").write_text('{"recipe": "rounding:bits=4"}')
    assert status(workspace) == "running"
    runs.abort(workspace, "one", grace=0.3)
    assert deaf.wait(5) == -signal.SIGKILL
    assert status(workspace) == "aborted" and not list((workspace / "one" / "out").iterdir())


def test_a_number_that_is_another_processs_is_nobody(workspace: Path) -> None:
    """run.json names a process that lives, but that does not hold the run's lock: it is left alone."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        written(workspace / "one", "pause", pid=stranger.pid)
        assert status(workspace) == "paused"
        with pytest.raises(BadInput, match="not running"):
            runs.pause(workspace, "one")
        runs.abort(workspace, "one", grace=0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_bad_input_is_a_reason(workspace: Path) -> None:
    (workspace / "kl.yaml").write_text(CHAIN.replace("retention >= 0.9", "kl <= 1"))
    runs.start(workspace, "one", "digits-mlp", "kl.yaml (workspace)")
    over(workspace)
    run = runs.read(workspace, "one")
    assert run.status == "failed" and "digits-mlp is a classifier" in run.reason


def journal(doing: str, tensors: int = 4) -> dict[str, Any]:
    row = {"step": 1, "name": "fine", "attempt": 1, "setting": {"stage": "rounding"}}
    now = {**row, "doing": doing, "since": 100.0}
    return {"original": {"name": "m", "tensors": {f"t{i}": 100 for i in range(tensors)}}, "attempts": [], "now": now}


def test_progress_is_what_is_finished_on_disk(workspace: Path) -> None:
    written(workspace / "one", "pause")
    tensors = workspace / "one" / "out" / "step-1.partial" / "tensors"
    tensors.mkdir(parents=True)
    (workspace / "one" / "out" / "journal.json").write_text(json.dumps(journal("encoding")))
    assert runs.progress(runs.read(workspace, "one")) == (0, 4, None, None, None)
    header = b'{"a":1} '
    for i, at in enumerate((90, 102, 104)):  # the first one is from before a pause
        piece = tensors / f"{i:05}.safetensors"
        piece.write_bytes(len(header).to_bytes(8, "little") + header + b"x" * 50)
        os.utime(piece, (at, at))
    (tensors / "00003.safetensors.tmp").write_bytes(b"x")
    run = runs.read(workspace, "one")
    assert runs.progress(run) == (3, 4, "t2", 0.5, None)
    assert runs.progress(run._replace(status="running")) == (3, 4, "t2", 0.5, 2.0)
    assert [size.bytes for size in runs.sizes(run)] == [800, 650, 500, 350]
    (workspace / "one" / "out" / "journal.json").write_text(json.dumps(journal("measuring")))
    for piece in tensors.iterdir():
        piece.unlink()
    assert runs.progress(runs.read(workspace, "one")) == (4, 4, None, None, None)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b", ".hidden", "-x", "x" * 65, "a b", "a\n"]
)
def test_a_name_that_could_lead_anywhere_else_is_refused(workspace: Path, name: str) -> None:
    before = set(workspace.parent.rglob("*"))
    for action in (lambda: runs.start(workspace, name, "digits-mlp", OWN), lambda: runs.read(workspace, name)):
        with pytest.raises(BadInput, match="run name") as error:
            action()
        assert "\n" not in str(error.value)
    assert set(workspace.parent.rglob("*")) == before


def test_models_and_chains_are_those_of_the_lists(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text(CHAIN)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (workspace / "linked.yaml").symlink_to(tmp_path / "outside.yaml")
    (workspace / "linked").symlink_to(tmp_path / "model")
    (workspace / "own").mkdir()
    (workspace / "own" / "config.json").write_text("{}")
    (workspace / "own" / "model.safetensors").symlink_to(tmp_path / "outside.yaml")
    (workspace / "text.yaml").write_text(CHAIN + "text: ../outside.yaml\n")
    (workspace / "inside.txt").write_text("words")
    (workspace / "inside.yaml").write_text(CHAIN + "text: inside.txt\n")
    assert {"digits-mlp", "smollm2-135m", "own"} <= set(runs.models(workspace))
    assert {OWN, "documented.yaml"} <= set(runs.chains(workspace))
    assert runs.chain_named(workspace, "inside.yaml (workspace)").text == str(workspace / "inside.txt")
    for model, chain, says in [
        ("../model", OWN, "model '../model'"),
        (str(tmp_path / "model"), OWN, "nor a folder in the workspace"),
        ("linked", OWN, "leads out of the folder"),
        ("own", OWN, "symbolic link model.safetensors"),
        ("digits-mlp", "../outside.yaml", "chain '../outside.yaml'"),
        ("digits-mlp", "linked.yaml (workspace)", "not an ordinary file"),
        ("digits-mlp", "text.yaml (workspace)", "its text '../outside.yaml' is not in the workspace"),
    ]:
        with pytest.raises(BadInput, match=says.replace("(", r"\(").replace(")", r"\)")):
            runs.start(workspace, "one", model, chain)
    assert runs.names(workspace) == []


@pytest.mark.parametrize("where", ["alive", "out", "out/journal.json", "run.json.tmp", "out/step-1.partial"])
def test_links_in_a_run_are_refused(workspace: Path, tmp_path: Path, where: str) -> None:
    written(workspace / "one", "pause")
    target = tmp_path / "elsewhere"
    target.mkdir()
    (workspace / "one" / where).parent.mkdir(exist_ok=True)
    (workspace / "one" / where).symlink_to(target)
    for action in (runs.read, runs.resume, runs.pause, runs.abort):
        with pytest.raises(BadInput, match="symbolic link"):
            action(workspace, "one")
    assert not list(target.iterdir())
    (workspace / "two").symlink_to(workspace / "one")
    with pytest.raises(BadInput, match="'two' is a symbolic link"):
        runs.read(workspace, "two")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "{"),
        ("run.json", '{"model": 1}'),
        ("run.json", '{"model": "m", "chain": "c", "pid": 0}'),
        ("run.json", '{"model": "m", "chain": "c", "began": [1e300]}'),
        ("chain.yaml", "!!python/object/apply:os.system [echo]"),
        ("out/journal.json", '{"original": {"name": "m", "tensors": []}}'),
        ("out/journal.json", json.dumps(journal("encoding") | {"attempts": [{"step": "../1"}]})),
        ("out/journal.json", json.dumps(journal("dancing"))),
    ],
)
def test_files_that_are_no_runs_are_refused_in_a_sentence(workspace: Path, file: str, text: str) -> None:
    written(workspace / "one", "pause")
    (workspace / "one" / "out").mkdir()
    (workspace / "one" / file).write_text(text)
    with pytest.raises(BadInput) as error:
        runs.read(workspace, "one")
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)


def test_a_log_commands_no_terminal(workspace: Path) -> None:
    written(workspace / "one", "pause")
    (workspace / "one" / "log.txt").write_bytes(b"old\n" * 100 + b"\x1b[31mred\x1b[0m\x07 \xff<b>\nlast")
    assert runs.log_tail(workspace / "one", 2) == "red \ufffd<b>\nlast"


def test_the_frontier_is_what_nothing_else_beats() -> None:
    def point(bits: float, value: float, source: str = "budgets", way: str = "a") -> frontier.Point:
        return frontier.Point("o", f"{bits}", source, bits, value, value - 0.01, value + 0.01, way)

    found = [point(4, 0.1), point(3, 0.5), point(3.5, 0.6), point(2, 2.0), point(2, 3.0), point(1, 0.01, frontier.OWN, "b")]
    front = frontier.front(found, "o", "kl")
    assert [p.bits for p in front.best] == [2, 3, 4]
    assert front.beside == [found[-1]] and front.way == "a"
    assert front.says.startswith("3 points are on the frontier: 3 of budgets.")
    lowest = "the lowest KL is 0.5 (0.49 to 0.51) (3 at 3.00 bits, 5.3x against 16)."
    assert f"At 3 bits per weight or fewer {lowest}" in front.says
    kept = frontier.front([point(4, 0.99), point(3, 0.87), point(2, 0.85)], "o", "total_retention")
    assert [p.bits for p in kept.best] == [2, 3, 4]
    assert "whole 95% interval: 2 at 2.00 bits, 8.0x against 16, 0.85 (0.84 to 0.86)." in kept.says
    assert frontier.front([], "o", "kl").says == "Nothing is measured yet."


def test_the_reports_give_points_of_both_kinds(workspace: Path) -> None:
    names = frontier.originals(workspace)
    assert {"smollm2-135m", "digits-mlp"} <= set(names.values())
    rows = json.loads((frontier.reports_folder() / "fit" / "fit.json").read_text())
    found = [p for p in frontier.points(workspace, "kl") if p.source == "budgets (fit)"]
    assert [(p.bits, p.value) for p in found] == [(r["bits"], r["kl"]["value"]) for r in rows]
    assert [(p.low, p.high) for p in found] == [Measurement(**r["kl"]).bounds for r in rows]
    assert {p.source for p in frontier.points(workspace, "total_retention")} == {"ratios"}
