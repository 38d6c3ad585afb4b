"""Compressing holds no more than a few copies of the largest tensor, however large the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import agentforge


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("streaming")


def test_the_model_is_one_that_opens_and_its_shards_are_small(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SHARD_BYTES", 2_000_000)
    folder = benchmark.make(tmp_path / "model", 0.005, hidden=64, ffn=128)
    opened = agentforge.open_model(folder)
    opened.check()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert all(file.stat().st_size < 2_100_000 for file in folder.glob("*.safetensors"))
    assert {name: entry.shape for name, entry in opened.entries.items()} == benchmark.shapes(
        opened.config["num_hidden_layers"], 64, 128
    )
    assert 0.004e9 < opened.bytes_on_disk < 0.006e9
    assert benchmark.bound(folder) == 3 * 4 * benchmark.VOCABULARY * 64 + 500_000_000


@pytest.mark.slow
def test_peak_memory_keeps_to_its_bound(benchmark: ModuleType, tmp_path: Path) -> None:
    """1 GB in two layers, in processes of their own: this one's memory would be counted as theirs."""
    command = [sys.executable, str(benchmark.__file__), "--size", "1", "--out", str(tmp_path), "--folder", str(tmp_path)]
    subprocess.run(command, check=True, timeout=1800)
    rows = json.loads((tmp_path / "streaming.json").read_text())
    assert [row["stage"] for row in rows] == list(benchmark.STAGES)
    for row in rows:
        assert row["model_bytes"] > 0.9e9
        # How much of the libraries is mapped is the kernel's affair: 250 MB when the bound was set, 390 in a new folder.
        assert row["peak_bytes"] - row["mapped_bytes"] <= row["bound_bytes"] - 250e6, row
        assert 100e6 < row["mapped_bytes"] < 500e6
        assert f"| {row['stage']} | {row['peak_bytes'] / 1e6:,.0f} |" in (tmp_path / "streaming.md").read_text()
