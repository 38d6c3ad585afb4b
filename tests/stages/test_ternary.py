from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance import through_disk

from agentforge import stages
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane
from agentforge.stages.ternary import absmean, zero_fraction
from agentforge.statistics import InputStatistics

MEAN = math.sqrt(2 / math.pi)  # E|w| of a unit Gaussian


def matrix(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def zeros_in_theory(cut: float) -> float:
    """P(|w| < cut) for a unit Gaussian."""
    return math.erf(cut / math.sqrt(2))


def error_in_theory(cut: float) -> float:
    """E (w - a q)**2 for a unit Gaussian, with a = E|w| and q = sign(w) where |w| > cut, else 0."""
    return 1 - 2 * MEAN * MEAN * math.exp(-cut * cut / 2) + MEAN * MEAN * (1 - zeros_in_theory(cut))


def relative_error(decoded: torch.Tensor, weight: torch.Tensor) -> float:
    return float((decoded - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_absmean_is_bitnets_formula(seed: int, scale: float) -> None:
    w = matrix(67, 129, seed, scale)
    reciprocal = 1 / w.abs().mean().clamp_(min=1e-5)
    expected = (w * reciprocal).round().clamp_(-1, 1)
    stage = stages.get("ternary")
    packed = stage.encode(w)
    codes = packed["codes"].to(torch.float32) - 1
    # Their mean is a float32 sum in any order; only weights that lie on the edge of the zero band may differ for it.
    on_the_edge = ((w * reciprocal).abs() - 0.5).abs() < 1e-5
    assert on_the_edge.sum() < 5
    assert torch.equal(codes[~on_the_edge], expected[~on_the_edge])
    torch.testing.assert_close(stage.decode(packed), codes / reciprocal, rtol=1e-6, atol=0)
    assert float(packed["scale"]) == pytest.approx(float(w.double().abs().mean()), rel=1e-7)


def test_halves_go_to_even() -> None:
    # mean |w| is 1: both halves round to 0, and 1.5 is clipped to 1.
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    assert (stages.get("ternary").encode(w)["codes"].int() - 1).tolist() == [[0, 0, 1, -1]]


def test_the_clamp_of_the_mean_makes_tiny_weights_zero() -> None:
    w = matrix(20, 30, scale=1e-7)
    clamped = stages.get("ternary")
    assert not clamped.decode(clamped.encode(w)).any()
    assert float(clamped.encode(w)["scale"]) == pytest.approx(1e-5, rel=1e-6)
    lower = stages.get("ternary", eps=1e-12)
    assert torch.equal(lower.encode(w)["codes"], clamped.encode(w * 1e7)["codes"])
    assert relative_error(lower.decode(lower.encode(w)) * 1e7, w * 1e7) == pytest.approx(0.263, abs=0.03)


def test_tiny_weights_of_1e_30_with_a_lower_eps() -> None:
    w = matrix(20, 30)
    lower = stages.get("ternary", eps=1e-36)
    differing = lower.encode(w * 1e-30)["codes"] != lower.encode(w)["codes"]
    assert differing.sum() == 0


@pytest.mark.parametrize("eps", [1e-38, 1e-39, 1e-40, 1e-45, 1e-50])
def test_an_eps_whose_reciprocal_is_no_float32_is_refused_or_harmless(eps: float) -> None:
    w = torch.zeros(4, 5)
    try:
        stage = stages.get("ternary", eps=eps)
    except BadInput:
        return
    assert not stage.decode(stage.encode(w)).any()


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.7, 2.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e20])
def test_threshold_is_a_plain_loop(tau: float, scale: float) -> None:
    w = matrix(9, 41, seed=2, scale=scale)
    stage = stages.get("ternary", rule="threshold", tau=tau)
    packed = stage.encode(w)
    decoded = stage.decode(packed)
    for i, row in enumerate(w.numpy().astype(np.float64)):
        alpha = max(sum(abs(x) for x in row) / len(row), 1e-8)
        for j, x in enumerate(row):
            expected = 0 if abs(x) < tau * alpha else int(np.sign(x))
            if abs(abs(x) - tau * alpha) > 1e-6 * alpha:
                assert int(packed["codes"][i, j]) - 1 == expected
                # Half a unit in the last place of a half float.
                assert float(decoded[i, j]) == pytest.approx(expected * alpha, rel=2**-11)


def test_threshold_keeps_a_weight_on_the_edge_and_zeros() -> None:
    w = torch.tensor([[1.0, -1.0, 0.25, -0.25, 0.0, 3.5]])  # mean |w| is 1
    codes = stages.get("ternary", rule="threshold", tau=0.25).encode(w)["codes"].int() - 1
    assert codes.tolist() == [[1, -1, 1, -1, 0, 1]]
    codes = stages.get("ternary", rule="threshold", tau=0.0).encode(w)["codes"].int() - 1
    assert codes.tolist() == [[1, -1, 1, -1, 0, 1]]


def test_threshold_has_a_scale_a_row() -> None:
    w = matrix(8, 200, seed=4) * torch.tensor([2.0**k for k in range(8)]).unsqueeze(1)
    stage = stages.get("ternary", rule="threshold")
    levels = stage.decode(stage.encode(w)).abs().amax(1)
    torch.testing.assert_close(levels, w.abs().mean(1), rtol=2**-10, atol=0)


def test_threshold_clamps_the_scale_of_tiny_rows() -> None:
    stage = stages.get("ternary", rule="threshold")
    assert not stage.decode(stage.encode(matrix(3, 20, scale=1e-12))).any()


@pytest.mark.parametrize(
    ("settings", "cut", "zeros", "error"),
    [
        ({}, 0.5, 0.310, 0.263),
        ({"rule": "threshold", "tau": 0.05}, 0.05, 0.032, 0.344),
        ({"rule": "threshold", "tau": 0.10}, 0.10, 0.064, 0.327),
        ({"rule": "threshold", "tau": 0.15}, 0.15, 0.095, 0.312),
        ({"rule": "threshold", "tau": 0.20}, 0.20, 0.127, 0.299),
    ],
)
def test_gaussian_weights_follow_theory(settings: dict[str, object], cut: float, zeros: float, error: float) -> None:
    assert zeros_in_theory(cut * MEAN) == pytest.approx(zeros, abs=6e-4)
    assert error_in_theory(cut * MEAN) == pytest.approx(error, abs=6e-4)
    w = matrix(512, 1024, seed=11)
    stage = stages.get("ternary", **settings)
    packed = stage.encode(w)
    p = zeros_in_theory(cut * MEAN)
    assert abs(zero_fraction(packed) - p) < 4 * math.sqrt(p * (1 - p) / w.numel())
    # A squared error's standard deviation is below 1, so five standard errors over 524,288 weights are below 0.007;
    # 0.002 holds because the error is bounded for most weights.
    assert relative_error(stage.decode(packed), w) == pytest.approx(error_in_theory(cut * MEAN), abs=0.002)


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (7, 15), (128, 320)])
def test_trits_cost_1_6_bits_and_one_scale(rows: int, columns: int) -> None:
    n = rows * columns
    packed = stages.get("ternary").encode(matrix(rows, columns))
    assert packed.bits == 8 * n // 5 + 32
    assert [plane.stored().nbytes for plane in packed] == [n // 5, 4]


def test_trits_of_a_size_that_fives_do_not_divide() -> None:
    packed = stages.get("ternary").encode(matrix(3, 7))
    assert packed.bits == 34 + 32  # 21 * 8 / 5 = 33.6
    assert [plane.stored().nbytes for plane in packed] == [5, 4]


def test_2bit_packing_holds_the_same_codes() -> None:
    w = matrix(6, 11)
    trits, pairs = stages.get("ternary"), stages.get("ternary", packing="2bit")
    assert torch.equal(trits.decode(trits.encode(w)), pairs.decode(pairs.encode(w)))
    packed = pairs.encode(w)
    assert packed.bits == 2 * 66 + 32
    assert packed.planes[0].stored().nbytes == 17
    codes = packed["codes"].reshape(-1).tolist()
    first = sum(code << (2 * i) for i, code in enumerate(codes[:4]))
    assert int(packed.planes[0].stored()[0]) == first


def test_threshold_costs_a_half_a_row_and_one_exponent() -> None:
    packed = stages.get("ternary", rule="threshold").encode(matrix(6, 10))
    assert packed.bits == 96 + 6 * 16 + 8


@pytest.mark.parametrize("rule", ["absmean", "threshold"])
def test_a_code_of_3_on_disk_is_refused(rule: str) -> None:
    stage = stages.get("ternary", rule=rule, packing="2bit")
    packed = through_disk(stage, stage.encode(matrix(2, 8)))
    stored = packed.planes[0].stored().clone()
    stored[1] |= 3
    forged = Plane.from_stored("codes", "uint2", (2, 8), stored)
    with pytest.raises(BadArtifact, match="codes: holds 3"):
        stage.decode(Packed(packed.shape, (forged, *packed.planes[1:])))


def test_a_missing_plane_is_refused() -> None:
    stage = stages.get("ternary")
    packed = stage.encode(matrix(2, 8))
    with pytest.raises(BadArtifact, match="'scale' is missing"):
        stage.decode(Packed(packed.shape, packed.planes[:1]))


def test_zero_fraction_counts_zeros() -> None:
    codes = torch.tensor([[0, 1, 2, 1], [1, 1, 0, 2]], dtype=torch.uint8)
    assert zero_fraction(Packed((2, 4), (Plane("codes", codes, "trit"),))) == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_absmean_adds_up_in_double_precision(seed: int) -> None:
    w = matrix(99, 101, seed)
    exact = math.fsum(abs(x) for x in w.reshape(-1).tolist()) / w.numel()
    assert absmean(w).tolist() == [float(np.float32(exact))]
    assert absmean(w, eps=3.0).tolist() == [3.0]


def output_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    gap = (weight - decoded).double()
    return float(((gap @ hessian.double()) * gap).sum() / ((weight.double() @ hessian.double()) * weight.double()).sum())


def moments(columns: int, n: int = 400) -> InputStatistics:
    x = matrix(n, columns, seed=7) @ matrix(columns, columns, seed=8) + 0.5
    return InputStatistics((x.T @ x) / n, n)


def test_calibrated_scales_are_least_squares() -> None:
    """Each row's scale against numpy's least squares on inputs whose second moments are H."""
    weight, columns = matrix(6, 24), 24
    stats = moments(columns)
    stage = stages.get("ternary", rule="calibrated")
    packed = stage.encode(weight, stats)
    root = np.linalg.cholesky(stats.hessian.double().numpy() + 1e-9 * np.eye(columns))
    codes = packed["codes"].double().numpy() - 1
    decoded = stage.decode(packed).double().numpy()
    for c, w, got in zip(codes, weight.double().numpy(), decoded, strict=True):
        scale = np.linalg.lstsq((root.T @ c)[:, None], root.T @ w, rcond=None)[0][0]
        assert np.abs(got).max() == pytest.approx(scale, rel=1e-3)


def test_calibrated_rule_has_the_least_output_error_of_all_thresholds_and_scales() -> None:
    weight = matrix(48, 64, scale=0.03)
    stats = moments(64)
    found = {}
    for name, stage in {
        "calibrated": stages.get("ternary", rule="calibrated"),
        "absmean": stages.get("ternary"),
        **{f"tau {tau}": stages.get("ternary", rule="threshold", tau=tau) for tau in (0.1, 0.3, 0.5, 0.7, 0.9)},
    }.items():
        found[name] = output_error(weight, stage.decode(stage.encode(weight, stats)), stats.hessian)
    assert min(found, key=found.__getitem__) == "calibrated"
    blind = stages.get("ternary", rule="calibrated")
    assert found["calibrated"] < output_error(weight, blind.decode(blind.encode(weight)), stats.hessian)


def test_calibrated_rule_without_statistics_is_least_squares_on_the_weights() -> None:
    weight = matrix(200, 300)
    stage = stages.get("ternary", rule="calibrated")
    error = relative_error(stage.decode(stage.encode(weight)), weight)
    # The best ternary quantiser of a Gaussian keeps 1 - .1902 of the energy (Max 1960, table I, three levels: cut .612).
    assert error == pytest.approx(0.1902, abs=0.004)
    assert stage.needs_statistics and not stages.get("ternary").needs_statistics
    dead = InputStatistics(torch.zeros(300, 300), 5)
    assert torch.equal(stage.decode(stage.encode(weight, dead)), torch.zeros(200, 300))
