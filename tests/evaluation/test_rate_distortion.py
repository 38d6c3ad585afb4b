from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from agentforge import stages
from agentforge.evaluation import rate_distortion as rd


def test_shannons_bound_is_what_the_best_channel_reaches() -> None:
    """Blahut and Arimoto's algorithm (1972) on a fine grid of a Gaussian, at three slopes."""
    x = np.linspace(-6, 6, 241)
    p = stats.norm.pdf(x) / stats.norm.pdf(x).sum()
    distance = (x[:, None] - x[None, :]) ** 2
    for slope in (1.0, 2.0, 6.0):
        q = np.full(len(x), 1 / len(x))
        kernel = np.exp(-slope * distance)
        for _ in range(300):
            channel = kernel * q
            channel /= channel.sum(1, keepdims=True)
            q = p @ channel
        error = float(p @ (channel * distance).sum(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = float(p @ np.nansum(channel * np.log2(channel / q), axis=1))
        assert rd.shannon(bits) == pytest.approx(error, rel=0.01)
    assert [rd.shannon(b) for b in (0, 1, 2)] == [1, 0.25, 0.0625]


def test_rows_say_what_was_measured() -> None:
    weights = {
        "gaussian": rd.gaussian(40, 256, seed=3),
        "heavy": torch.from_numpy(np.random.default_rng(0).standard_t(3, (30, 128))),
    }
    rows = rd.measure(["rounding:bits=3,group=32", stages.get("ternary")], weights, seed=5)
    assert [(row.stage.partition(":")[0], row.weight) for row in rows] == [
        (stage, weight) for stage in ("rounding", "ternary") for weight in weights
    ]
    for row in rows:
        stage, weight = stages.parse(row.stage), weights[row.weight].float()
        packed = stage.encode(weight)
        back = stage.decode(packed).double()
        share = float((back - weight.double()).square().sum() / weight.double().square().sum())
        assert row.error.value == pytest.approx(share, rel=1e-12)
        assert row.bits.value == packed.bits_per_weight and row.bits.stderr is None
        assert (
            row.coded_bits.value
            == 8 * packed.coded_bytes / weight.numel()
            <= row.bits.value + 8 * len(packed.planes) / weight.numel()
        )
        assert row.error.n == len(weight) and row.bits.n == weight.numel()
        assert row.error.seed == 5 and row.error.protocol["stage"] == stage.to_json()
        assert len(row.error.inputs["weight_sha256"]) == 64
        json.dumps(row.error.to_json())
    assert rows[0].error.inputs != rows[1].error.inputs
    assert torch.equal(rd.gaussian(4, 5, seed=1), rd.gaussian(4, 5, seed=1))
    assert not torch.equal(rd.gaussian(4, 5, seed=1), rd.gaussian(4, 5, seed=2))


def test_the_standard_error_is_the_spread_over_repetitions() -> None:
    rows = [rd.measure(["rounding:bits=2,group=16"], {"w": rd.gaussian(64, 48, seed)})[0].error for seed in range(40)]
    spread = np.std([row.value for row in rows], ddof=1)
    assert np.mean([row.stderr for row in rows]) == pytest.approx(spread, rel=0.35)


def test_gaussian_rows_fall_between_shannon_and_what_their_quantiser_reaches() -> None:
    weight = rd.gaussian(256, 512)
    rows = rd.measure(["rounding:bits=2,clip=mse", "rounding:bits=4,clip=mse", "ternary"], {"w": weight})
    for row in rows:
        assert row.error.value > rd.shannon(row.coded_bits.value)
        assert 0.1 < row.coded_bits.value + math.log2(row.error.value) / 2 < 0.7
    # A scale for all: ternary codes of a Gaussian are the best quantiser of three levels up to the choice of the scale.
    assert 0.1902 < rows[2].error.value < 1.4 * 0.1902  # Max (1960), table I


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_weights_of_any_size(scale: float) -> None:
    (row,) = rd.measure(["rounding:bits=4,group=0"], {"w": rd.gaussian(8, 64) * scale})
    (unit,) = rd.measure(["rounding:bits=4,group=0"], {"w": rd.gaussian(8, 64)})
    assert row.error.value == pytest.approx(unit.error.value if scale else 0.0, rel=1e-3)
    (single,) = rd.measure(["rounding:bits=4,group=0"], {"w": torch.ones(1, 3)})
    assert single.error.stderr is None
