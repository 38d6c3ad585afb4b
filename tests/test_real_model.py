"""The default model, compressed on disk, loaded back and measured: the figures that this project was founded on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import agentforge as af

if TYPE_CHECKING:
    from agentforge.evaluation import Text
    from agentforge.models import LanguageModel

pytestmark = pytest.mark.slow


def test_the_known_perplexity(smollm2: LanguageModel, beginning: Callable[[int], Text]) -> None:
    found = af.perplexity(smollm2, beginning(5 * 2048), context=2048, progress=False)
    assert found.value == pytest.approx(23.80, abs=0.02)
    assert found.n == 10235


def test_int8_in_groups_of_64(smollm2: LanguageModel, beginning: Callable[[int], Text], tmp_path: Path) -> None:
    artifact = af.compress(smollm2, "rounding:bits=8,group=64", tmp_path / "a", progress=False)
    measured = af.perplexity(af.load(artifact.path), beginning(5 * 2048), progress=False)
    assert measured.n == 10235
    assert measured.value == pytest.approx(23.83, abs=0.05)


def test_ternary_costs_a_fifth_of_a_byte_a_weight_and_one_scale(smollm2: LanguageModel, tmp_path: Path) -> None:
    artifact = af.compress(smollm2, "ternary:rule=absmean,packing=trits", tmp_path / "a", progress=False)
    touched = {row["name"]: row for row in artifact.rows if row["stage"]}
    assert len(touched) == 210
    for weight in smollm2.weights():
        row = touched[weight.name]
        count = weight.shape[0] * weight.shape[1]
        assert row["bits"] == math.ceil(count * 8 / 5) + 32
        assert row["bytes"] == math.ceil(count / 5) + 4
        assert 0 <= 8 * row["bytes"] - row["bits"] < 8 * 2
    weights = sum(w.shape[0] * w.shape[1] for w in smollm2.weights())
    scales = 32 * 210
    assert sum(row["bits"] for row in touched.values()) == pytest.approx(1.6 * weights + scales, abs=210)
    # What is on disk beside the planes is the kept tensors and the header.
    kept = sum(row["bytes"] for row in artifact.rows if not row["stage"])
    header = artifact.weight_bytes - kept - sum(row["bytes"] for row in touched.values())
    with open(artifact.path / "model.safetensors", "rb") as file:
        assert header == 8 + int.from_bytes(file.read(8), "little")
    assert artifact.verify()
