"""SIGKILL at seeded random moments while an artifact is written; the same command then ends with the same bytes.

AGENTFORGE_KILLS says how many kills the long test deals out (default 5).  As a script, it does the same to any model:

    python tests/test_kill.py MODEL STAGE FOLDER KILLS
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DEADLINE = 600  # seconds until a run that does not end is given up


def start(model: str, stage: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentforge", "compress", model, "--stage", stage, "--out", str(out), "--json"]
    return subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def wait_for_the_writer(process: subprocess.Popen[bytes], out: Path) -> None:
    """Return when the run has taken its .partial folder (its lock file is new), or has ended."""
    lock = partial_of(out) / "lock"
    before = lock.stat().st_mtime_ns if lock.exists() else None
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None:
        try:
            if lock.stat().st_mtime_ns != before:
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.001)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for a run that must succeed; returns what it printed."""
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err.decode()
    said: dict[str, Any] = json.loads(out)
    return said


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def undisturbed(model: str, stage: str, out: Path) -> float:
    """A run without kills; returns the seconds from the first file of .partial to the end."""
    process = start(model, stage, out)
    wait_for_the_writer(process, out)
    begun = time.monotonic()
    finish(process)
    return time.monotonic() - begun


def kill_again_and_again(model: str, stage: str, out: Path, kills: int, seconds: float, rng: random.Random) -> list[int]:
    """Start and kill `kills` times, within `seconds` of the writer's start.  Returns how many tensors were finished at
    each kill.  A run that ends before its kill is thrown away and another one begun."""
    found: list[int] = []
    while len(found) < kills:
        process = start(model, stage, out)
        wait_for_the_writer(process, out)
        # Every run goes on from the one before: the earlier kills come soon, so that something is left for the later ones.
        time.sleep(rng.uniform(0, seconds / kills if len(found) % 2 == 0 else seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            assert out.is_dir()
            shutil.rmtree(out)
            continue
        assert process.returncode == -signal.SIGKILL
        if out.exists():
            # Between the rename and the clean-up: what is there must be whole.
            assert (out / "agentforge.json").is_file()
        found.append(len(list((partial_of(out) / "tensors").glob("*.safetensors"))))
    return found


def assert_kills_leave_no_trace(model: str, stage: str, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    seconds = undisturbed(model, stage, folder / "whole")
    tensors = kill_again_and_again(model, stage, folder / "killed", kills, seconds, random.Random(seed))
    finish(start(model, stage, folder / "killed"))
    expected = hashes(folder / "whole")
    assert len(expected) > 2
    assert hashes(folder / "killed") == expected
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(("whole", "killed"))) == ["killed", "whole"]
    return {"seconds": seconds, "tensors finished at each kill": tensors, "files": len(expected)}


@pytest.fixture(scope="session")
def longer_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of random weights: a second or so of work, so that there is something to kill."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("longer") / "model"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


STAGE = "rounding:bits=4,group=64,clip=mse"


def test_a_killed_run_is_finished_by_the_same_command(longer_llama: Path, tmp_path: Path) -> None:
    """One kill in the midst of the tensors, at a moment that the files tell and not the clock."""
    import agentforge

    stage = "rounding:bits=4,group=64"
    agentforge.compress(longer_llama, stage, tmp_path / "whole", progress=False)
    out = tmp_path / "killed"
    process = start(str(longer_llama), stage, out)
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and len(list((partial_of(out) / "tensors").glob("*.safetensors"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (partial_of(out) / "tensors").glob("*.safetensors")}
    assert 5 <= len(finished) < 75
    agentforge.compress(longer_llama, stage, out, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not partial_of(out).exists()


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(longer_llama: Path, tmp_path: Path) -> None:
    assert_kills_leave_no_trace(str(longer_llama), STAGE, tmp_path, int(os.environ.get("AGENTFORGE_KILLS", "5")))


if __name__ == "__main__":
    target = Path(sys.argv[3])
    target.mkdir(parents=True, exist_ok=True)
    print(json.dumps(assert_kills_leave_no_trace(sys.argv[1], sys.argv[2], target, int(sys.argv[4])), indent=2))
