"""Samples are drawn anew from the sums that reports/coverage keeps: do their intervals hold the whole text's value?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from agentforge.evaluation import intervals

REPORT = Path(__file__).parents[2] / "reports/coverage"
PROMISED = ("kl", "perplexity", "top1", "retention")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REPORT / "coverage.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("intervals")


@pytest.mark.parametrize("placed", ["one at random of each twelfth", "random windows"])
def test_intervals_hold_the_whole_texts_value(benchmark: ModuleType, record: dict[str, Any], placed: str) -> None:
    found = benchmark.covered(torch.tensor(record["sums"], dtype=torch.float64), placed)
    assert {name: found[name] for name in PROMISED if not 0.9 <= found[name] <= 0.99} == {}


def test_errors_that_take_tokens_as_independent_would_not(
    benchmark: ModuleType, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as they were once computed, nor from our own intervals at the half width that tokens would give them."""
    assert all(share < 0.8 for share in benchmark.covered_by_tokens(record).values())
    student = intervals.student
    monkeypatch.setattr(intervals, "student", lambda freedom: student(freedom) / 2)
    found = benchmark.covered(torch.tensor(record["sums"], dtype=torch.float64), "random windows")
    assert all(found[name] < 0.9 for name in ("kl", "perplexity", "retention"))
