from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from agentforge import stages
from agentforge.errors import BadInput
from agentforge.evaluation import rate_distortion as rd

# Max (1960), tables I and II: levels, error of the best quantiser, error and spacing of the best uniform one.
MAX = [
    (1, 1.0, 1.0, None),
    (2, 0.3634, 0.3634, 1.596),
    (3, 0.1902, 0.1902, 1.224),
    (4, 0.1175, 0.1188, 0.9957),
    (8, 0.03454, 0.03744, 0.5860),
    (16, 0.009497, 0.01154, 0.3352),
    (32, 0.002499, 0.003490, 0.1881),
]


def error_of(levels: np.ndarray) -> float:
    """Mean squared error of the nearest of these levels on a unit Gaussian, by quadrature."""
    cuts = [-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf]
    parts = [
        integrate.quad(lambda x, level=level: (x - level) ** 2 * math.exp(-x * x / 2), a, b, epsabs=1e-13)[0]
        for level, a, b in zip(levels, cuts, cuts[1:], strict=False)
    ]
    return sum(parts) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("levels", "best", "uniform", "spacing"), MAX)
def test_the_published_tables(levels: int, best: float, uniform: float, spacing: float | None) -> None:
    # The last of the printed digits is off by up to 6 in 1960.
    assert rd.lloyd_max(levels).error == pytest.approx(best, rel=3e-3)
    found = rd.uniform(levels)
    assert found.error == pytest.approx(uniform, rel=2e-3)
    if spacing is not None:
        assert np.diff(found.levels) == pytest.approx(spacing, rel=3e-4)


@pytest.mark.parametrize("levels", [1, 2, 5, 8, 16])
def test_quantisers_against_quadrature_and_a_general_optimiser(levels: int) -> None:
    best = rd.lloyd_max(levels)
    assert best.error == pytest.approx(error_of(best.levels), abs=1e-9)
    cuts = [-np.inf, *(best.levels[1:] + best.levels[:-1]) / 2, np.inf]
    means = [stats.truncnorm.mean(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert best.levels == pytest.approx(means, abs=1e-6)
    assert (best.levels == -best.levels[::-1]).all()
    uniform = rd.uniform(levels)
    assert uniform.error == pytest.approx(error_of(uniform.levels), abs=1e-9)
    if levels > 1:
        grid = np.arange(levels) - (levels - 1) / 2
        found = optimize.minimize_scalar(lambda s: error_of(grid * s), bounds=(0.1, 3), method="bounded")
        assert uniform.error <= found.fun + 1e-9
        assert np.diff(uniform.levels) == pytest.approx(found.x, rel=1e-3)


def test_many_levels_follow_the_asymptotic_law() -> None:
    """Panter and Dite (1951): sqrt(3) pi / 2 / levels**2."""
    for levels in (64, 256):
        assert rd.lloyd_max(levels).error * levels**2 == pytest.approx(math.sqrt(3) * math.pi / 2, rel=2.5 / levels)
    for levels in (0, -1, rd.MOST_LEVELS + 1):
        with pytest.raises(BadInput, match=f"levels={levels}; expected 1 to 512"):
            rd.lloyd_max(levels)
        with pytest.raises(BadInput, match=f"levels={levels}"):
            rd.uniform(levels)


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
        assert row.above_shannon == pytest.approx(row.coded_bits.value - math.log2(1 / math.sqrt(share)))
        json.dumps(row.to_json())
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
        assert 0.1 < row.above_shannon < 0.7
    # A scale for all: ternary codes of a Gaussian are the best quantiser of three levels up to the choice of the scale.
    assert rd.lloyd_max(3).error < rows[2].error.value < 1.4 * rd.lloyd_max(3).error


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_weights_of_any_size(scale: float) -> None:
    (row,) = rd.measure(["rounding:bits=4,group=0"], {"w": rd.gaussian(8, 64) * scale})
    (unit,) = rd.measure(["rounding:bits=4,group=0"], {"w": rd.gaussian(8, 64)})
    assert row.error.value == pytest.approx(unit.error.value if scale else 0.0, rel=1e-3)
    assert math.isfinite(row.above_shannon)
    (single,) = rd.measure(["rounding:bits=4,group=0"], {"w": torch.ones(1, 3)})
    assert single.error.stderr is None


def test_the_plot_shows_every_row_and_states_the_finding() -> None:
    rows = rd.measure(["rounding:bits=2", "rounding:bits=4", "ternary"], {"gaussian": rd.gaussian(32, 128)})
    figure = rd.plot(rows)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "bits per weight" and axes.get_yscale() == "log"
    drawn = {(float(x), float(y)) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    for row in rows:
        assert (row.bits.value, row.error.value) in drawn and (row.coded_bits.value, row.error.value) in drawn
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[2:] == ["rounding", "ternary", "gaussian", "entropy coded"]
    nearest = min(rows, key=lambda row: row.above_shannon)
    caption = figure.get_suptitle()
    assert nearest.stage in caption and f"{nearest.above_shannon:.2f} bits" in caption
    figure.canvas.draw()


def test_a_plot_of_nothing_and_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no rows"):
        rd.plot([])
    blocked: dict[str, Any] = {"matplotlib.figure": None}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", blocked["matplotlib.figure"])
    with pytest.raises(BadInput, match="agentforge\\[lab\\]"):
        rd.plot([])
