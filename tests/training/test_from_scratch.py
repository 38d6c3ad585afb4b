"""The benchmark from scratch in its smoke form: both arms learn, intervals are Student's, a second call takes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

SMALL = [
    "--vocabulary",
    "300",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--heldout",
    "1024",
    "--steps",
    "8",
    "--rates",
    "0.003",
    "0.01",
    "--seeds",
    "2",
]


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("from_scratch")


@pytest.mark.slow
def test_both_arms_learn_and_nothing_is_measured_twice(benchmark: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--out", str(tmp_path)]
    benchmark.main(arguments)
    rows = json.loads((tmp_path / "from_scratch.json").read_text())
    assert len(rows) == 4 + 4
    for row in rows:
        assert row["loss"] < math.log(300)
        assert row["tokens"] == row["steps"] * 8 * 256
    full, ternary = ([row for row in rows if row["arm"] == arm and row["steps"] == 8] for arm in benchmark.ARMS)
    assert [row["seed"] for row in full] == [row["seed"] for row in ternary] == [0, 1]
    before = (tmp_path / "from_scratch.json").read_bytes()
    benchmark.main(arguments)
    assert (tmp_path / "from_scratch.json").read_bytes() == before
    text = (tmp_path / "from_scratch.md").read_text()
    assert "Difference, seed by seed" in text and "n = 2" in text


def test_the_interval_is_scipys(benchmark: ModuleType) -> None:
    values = [3.1, 3.3, 2.9]
    mean, half = benchmark.interval(values)
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert benchmark.interval([1.0]) == (1.0, math.inf)
