"""The benchmark of recovery, on a tiny model: it trains, measures what is on disk, and tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.slow
def test_a_run_is_measured_told_and_drawn(
    load_benchmark: Callable[[str], ModuleType], tiny_llama: Path, tmp_path: Path
) -> None:
    benchmark = load_benchmark("recovery")
    small = ["--steps", "20", "--batch", "4", "--context", "32", "--evaluate", "10", "--heldout", "128", "--tokens", "60"]
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_llama), *small, "--work", str(tmp_path / "work"), "--out", str(out)]
    benchmark.main([*arguments, "--name", "one", "--lr", "3e-3"])
    row = json.loads((out / "one.json").read_text())
    assert benchmark.best(row)["kl"] < row["history"][0]["kl"]
    assert row["history"][-1]["tokens"] == 20 * 4 * 32
    for form in ("int8", "floats"):
        assert row["measured"][form]["kl"]["n"] == 60
    assert row["measured"]["int8"]["kl"]["value"] != row["measured"]["floats"]["kl"]["value"]
    text = (out / "recovery.md").read_text()
    assert f"| one | {row['environment']['cpu']}" in text and "2,560" in text and "For reference, not ours" in text
    picture = (out / "recovery.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    benchmark.main(["--report", "--out", str(out)])
    assert (out / "recovery.md").read_text() == text and (out / "recovery.png").read_bytes() == picture
