"""Entropy-coded scalar quantisation against numpy, Shannon, Gish and Pierce, and a recursion written otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from conformance import correlated, gaussian, of_heads
from scipy import special
from scipy.stats import norm

from agentforge import stages
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import FLOAT32_MAX, Packed, Plane
from agentforge.stages.ecsq import LARGEST
from agentforge.statistics import InputStatistics

LOSS = math.log2(2 * math.pi * math.e / 12) / 2  # bits above Shannon's at high rates, Gish & Pierce: 0.2546
DEAD_ZONE = 0.44


def integers(packed: Packed) -> np.ndarray:
    """The multiples of the step, from the zigzag codes: 0, -1, 1, -2, ..."""
    zigzag = packed["codes"].numpy().astype(np.int64)
    return np.where(zigzag % 2 == 1, -((zigzag + 1) // 2), zigzag // 2)


def steps(packed: Packed) -> np.ndarray:
    """The step of each value, as the module's text says."""
    rows, columns = (packed[name].numpy().astype(np.float64) - 128 for name in ("rows", "columns"))
    return float(packed["step"]) * 2.0 ** (rows[:, None] / 8) * 2.0 ** (columns / 8)


def entropy_of(values: np.ndarray) -> float:
    """Bits a value, of the histogram."""
    _, counts = np.unique(values, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def bits_of_codes(packed: Packed) -> float:
    (codes,) = (plane for plane in packed if plane.name == "codes")
    return codes.bits / math.prod(packed.shape)


@pytest.mark.parametrize("settings", [{}, {"step": 0.07}, {"step": 2.5, "rounding": 0.5}, {"step": 0.3, "rounding": 0.2}])
def test_without_statistics_it_is_uniform_quantisation_with_a_dead_zone(settings: dict[str, float]) -> None:
    stage = stages.get("ecsq", **settings)
    weight = gaussian((41, 150)) * 0.02
    packed = stage.encode(weight)
    w = weight.double().numpy()
    step = settings.get("step", 0.6) * math.sqrt((w**2).mean())
    assert float(packed["step"]) == pytest.approx(step, rel=1e-6)
    assert (packed["rows"] == 128).all() and (packed["columns"] == 128).all()
    scaled = np.abs(w) / float(packed["step"]) + settings.get("rounding", DEAD_ZONE)
    sure = np.abs(scaled - np.rint(scaled)) > 1e-4  # elsewhere single precision decides
    assert sure.mean() > 0.99
    assert (integers(packed) == np.sign(w) * np.floor(scaled))[sure].all()
    assert np.allclose(stage.decode(packed).numpy(), integers(packed) * step, rtol=1e-5)


def test_codes_are_zigzag_integers_from_zero() -> None:
    weight = torch.tensor([[0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0]])
    step = 1 / math.sqrt(float(weight.double().square().mean()))
    packed = stages.get("ecsq", step=step, rounding=0.5).encode(weight)
    assert packed["codes"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("n", [1, 9, 64, 150])
def test_each_error_goes_into_the_targets_of_the_columns_that_follow(n: int) -> None:
    """The recursion in double precision, column by column: M and D of H from numpy's Cholesky factor of H read backwards."""
    stage = stages.get("ecsq", step=0.5, damping=0.05)
    weight, hessian = gaussian((23, n)), correlated(n)
    packed = stage.encode(weight, InputStatistics(hessian, 99))
    h = hessian.double().numpy() + 0.05 * float(hessian.double().diagonal().mean()) * np.eye(n)
    lower = np.linalg.cholesky(h[::-1, ::-1])
    upper = lower[::-1, ::-1]  # h = upper @ upper.T
    roots = np.diag(upper)
    m, d = upper / roots, roots**2
    assert np.allclose(m @ np.diag(d) @ m.T, h)
    exponents = np.rint(8 * (-np.log2(d) / 2 + np.log2(d).mean() / 2)) + 128
    assert (packed["columns"].numpy() == exponents).all()
    w, step, codes = weight.double().numpy(), steps(packed), integers(packed)
    error = np.zeros_like(w)
    for j in range(n):
        target = w[:, j] + error[:, :j] @ m[:j, j]
        scaled = np.abs(target) / step[:, j] + DEAD_ZONE
        sure = np.abs(scaled - np.rint(scaled)) > 1e-4
        assert sure.mean() > 0.8
        assert (codes[:, j] == np.sign(target) * np.floor(scaled))[sure].all(), f"column {j}"
        error[:, j] = w[:, j] - codes[:, j] * step[:, j]
    # What the feedback is for: tr(E H E^T) is the sum of D_j times the squares of what each rounding by itself left.
    left = error @ m
    assert np.trace(error @ h @ error.T) == pytest.approx((left**2 * d).sum())
    inside = np.abs(left) <= step * (1 - DEAD_ZONE) * (1 + 1e-4)
    assert inside.all(), "a rounding moved its target by more than a step less the dead zone's share"


def test_feedback_loses_less_of_the_outputs_than_rounding_does_in_as_many_bits() -> None:
    weight, hessian = gaussian((200, 96)), correlated(96)
    h = hessian.double().numpy()
    stats = InputStatistics(hessian, 99)

    def damage(stage: stages.Stage, stats: InputStatistics | None) -> tuple[float, float]:
        packed = stage.encode(weight, stats)
        error = stage.decode(packed).double().numpy() - weight.double().numpy()
        return float(np.einsum("ij,jk,ik", error, h, error)), bits_of_codes(packed)

    lost, bits = damage(stages.get("ecsq", step=0.4), stats)
    plain, plain_bits = min((damage(stages.get("ecsq", step=0.4 * 2 ** (k / 8)), None) for k in range(-4, 5)),
                            key=lambda one: abs(one[1] - bits))  # fmt: skip
    assert plain_bits == pytest.approx(bits, abs=0.13)
    # 6 dB a bit: what the few hundredths of a bit between the two are worth is taken out.
    assert lost * 4 ** (bits - plain_bits) < 0.75 * plain
    lost_alike, _ = damage(stages.get("ecsq", step=0.4), InputStatistics(torch.diag(hessian.diagonal()), 99))
    assert lost < lost_alike, "what inputs have in common is made use of, and not their sizes alone"


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2, 0.4])
def test_gaussian_weights_take_about_2_05_bits_less_the_steps_logarithm(step: float) -> None:
    """h(Gaussian) = log2(2 pi e) / 2 = 2.047 bits, of which a step takes its logarithm off; rounding adds its own variance,
    a twelfth of the step's square."""
    packed = stages.get("ecsq", step=step, rounding=0.5).encode(gaussian((512, 512)))
    expected = math.log2(2 * math.pi * math.e * (1 + step**2 / 12)) / 2 - math.log2(step)
    found = entropy_of(integers(packed))
    assert found == pytest.approx(expected, abs=0.005)
    assert found == pytest.approx(2.05 - math.log2(step), abs=0.01)
    assert found <= bits_of_codes(packed) < 1.01 * found  # the coder, histogram included, is within a percent of the entropy
    assert packed.bits == sum(8 * plane.stored().nbytes for plane in packed)


def of_the_normal_distribution(step: float, rounding: float) -> tuple[float, float]:
    """Entropy and squared error of a unit Gaussian's quantiser, from the distribution function; bin k >= 1 is from
    (k - rounding) to (k + 1 - rounding) steps."""
    k = np.arange(1, 60)
    edges = step * (np.arange(60) + 1 - rounding)
    p = np.diff(norm.cdf(edges))
    entropy = -2 * float(special.xlogy(p, p).sum()) / math.log(2)
    middle = 2 * norm.cdf(edges[0]) - 1
    entropy -= middle * math.log2(middle)
    # E[x^2] + E[q^2] - 2 E[x q], with E[x; a < x < b] = pdf(a) - pdf(b)
    error = 1 + 2 * float((p * (k * step) ** 2).sum() - 2 * (k * step * -np.diff(norm.pdf(edges))).sum())
    return entropy, error


@pytest.mark.parametrize("rounding", [0.5, DEAD_ZONE])
def test_three_bits_are_within_0_27_bit_of_shannons_bound_and_not_beyond_it(rounding: float) -> None:
    """D(R) = 4^-R for Gaussian weights of variance one: no code of any kind is below it."""
    stage = stages.get("ecsq", step=0.5, rounding=rounding)
    weight = gaussian((1024, 1024), 3)
    packed = stage.encode(weight)
    distortion = float((stage.decode(packed) - weight).double().square().mean() / weight.double().square().mean())
    rate, possible = bits_of_codes(packed), -math.log2(distortion) / 2
    assert rate == pytest.approx(3.0, abs=0.1)
    assert 0 < rate - possible < 0.271
    entropy, error = of_the_normal_distribution(0.5, rounding)
    assert 0.25 < entropy + math.log2(error) / 2 < 0.27
    assert rate == pytest.approx(entropy, abs=0.003)
    assert distortion == pytest.approx(error, rel=0.01)
    assert rate < packed.bits / weight.numel() < rate + 0.005  # all that is stored


def test_what_is_lost_against_shannons_bound_falls_to_gish_and_pierces_quarter_of_a_bit() -> None:
    losses = [entropy + math.log2(error) / 2 for entropy, error in (of_the_normal_distribution(s, 0.5) for s in (0.5, 0.2))]
    assert losses[0] > losses[1] > LOSS
    weight = gaussian((1024, 512), 6)
    packed = stages.get("ecsq", step=0.05, rounding=0.5).encode(weight)
    error = (integers(packed) * steps(packed) - weight.double().numpy()) / math.sqrt(float(weight.double().square().mean()))
    assert entropy_of(integers(packed)) + math.log2((error**2).mean()) / 2 == pytest.approx(LOSS, abs=0.003)


def test_a_dead_zone_saves_more_than_it_costs() -> None:
    """At 1.2 bits: distance to Shannon's bound with a dead zone against rounding to the nearest."""
    weight = gaussian((512, 512), 4)

    def wasted(rounding: float) -> float:
        stage = stages.get("ecsq", step=1.7, rounding=rounding)
        packed = stage.encode(weight)
        distortion = float((stage.decode(packed) - weight).double().square().mean() / weight.double().square().mean())
        return entropy_of(integers(packed)) + math.log2(distortion) / 2

    assert wasted(DEAD_ZONE) < wasted(0.5) - 0.003


def test_sensitive_rows_have_smaller_steps_in_the_power_of_minus_a_quarter() -> None:
    sensitivity = torch.tensor([1.0, 16.0, 256.0, 4096.0, 65536.0]) * 1e-9
    stats = InputStatistics(torch.eye(6), 10, sensitivity)
    rows = stages.get("ecsq").encode(gaussian((5, 6)), stats)["rows"].tolist()
    # 16 times as sensitive, half the step: an octave.  The least one counts as a thousandth of the mean more.
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert [a - b for a, b in zip(rows[2:], rows[3:], strict=False)] == [8, 8]
    g = sensitivity.double().numpy()
    logarithms = -np.log2(g + 1e-3 * g.mean()) / 4
    assert rows == (np.rint(8 * (logarithms - logarithms.mean())) + 128).astype(int).tolist()
    alike = InputStatistics(torch.eye(6), 10, torch.full((5,), 3e-7))
    assert (stages.get("ecsq").encode(gaussian((5, 6)), alike)["rows"] == 128).all()


def test_rows_of_a_head_make_up_for_each_other_s_errors() -> None:
    """With G = M' D' M'^T and H = M D M^T, by scipy: M'^T E M is what rounding left of each value, within its own step, and
    rows' steps go with D'^-1/2."""
    stats, stage = of_heads(3, 8, 20), stages.get("ecsq", damping=1e-6)
    assert stats.curvature is not None and stats.sensitivity is not None
    weight = gaussian((24, 20))
    packed = stage.encode(weight, stats)
    blocks = stats.curvature.double().numpy() + 0.1 * stats.sensitivity.double().mean().item() * np.eye(8)
    outer, roots = np.zeros((24, 24)), np.empty(24)
    for head, block in enumerate(blocks):
        at = slice(8 * head, 8 * head + 8)
        outer[at, at], roots[at] = upper_factor(block)
    inner, _ = upper_factor(stats.hessian.double().numpy())
    logarithms = -np.log2(roots)
    assert packed["rows"].tolist() == (np.rint(8 * (logarithms - logarithms.mean())) + 128).astype(int).tolist()
    left = outer.T @ (weight - stage.decode(packed)).double().numpy() @ inner / steps(packed)
    assert (np.abs(left) < 1 - DEAD_ZONE + 1e-4).all() and np.abs(left).max() > 0.5


def upper_factor(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U, unit upper triangular, and r of matrix = U diag(r^2) U^T."""
    upper = scipy.linalg.cholesky(matrix[::-1, ::-1], lower=True)[::-1, ::-1]
    return upper / np.diag(upper), np.diag(upper)


def test_columns_of_large_inputs_have_smaller_steps_in_the_power_of_minus_a_half() -> None:
    stats = InputStatistics(torch.diag(torch.tensor([1.0, 4.0, 16.0, 64.0])), 10)
    columns = stages.get("ecsq", damping=1e-6).encode(gaussian((5, 4)), stats)["columns"].tolist()
    assert columns == [140, 132, 124, 116]  # an octave each, around no change
    packed = stages.get("ecsq", damping=1e-6).encode(gaussian((5, 4)), stats)
    assert np.exp(np.log(steps(packed)).mean()) == pytest.approx(float(packed["step"]))  # the geometric mean


@pytest.mark.parametrize("power", [-100, -20, 1, 60])
def test_the_weights_scale_changes_no_code(power: int) -> None:
    stats = InputStatistics(correlated(40), 99, torch.linspace(1, 9, 30))
    for given in (None, stats):
        base, scaled = (stages.get("ecsq").encode(gaussian((30, 40)) * 2.0**k, given) for k in (0, power))
        for name in ("codes", "rows", "columns"):
            assert torch.equal(base[name], scaled[name]), name
        assert float(scaled["step"]) == float(base["step"]) * 2.0**power


@pytest.mark.parametrize("power", [-40, 7, 30])
def test_the_scale_of_the_statistics_changes_no_byte(power: int) -> None:
    stats = [InputStatistics(correlated(40) * f, 99, torch.linspace(1, 9, 30) * f) for f in (1.0, 2.0**power)]
    assert len({stages.get("ecsq").encode(gaussian((30, 40)), one).sha256 for one in stats}) == 1


def test_statistics_that_say_nothing_are_as_good_as_none() -> None:
    weight = gaussian((30, 40))
    expected = stages.get("ecsq").encode(weight).sha256
    silent = [
        InputStatistics(torch.zeros(40, 40), 10),
        InputStatistics(torch.zeros(40, 40), 10, torch.zeros(30)),
        InputStatistics(7 * torch.eye(40), 10, torch.ones(30)),
    ]
    assert {stages.get("ecsq").encode(weight, stats).sha256 for stats in silent} == {expected}


def test_an_input_that_is_never_used_does_no_harm() -> None:
    hessian = correlated(40)
    hessian[:, 7] = hessian[7, :] = 0
    stage = stages.get("ecsq")
    packed = stage.encode(gaussian((30, 40)), InputStatistics(hessian, 99))
    assert torch.isfinite(stage.decode(packed)).all()
    assert int(packed["columns"].argmax()) == 7  # the coarsest of all


def test_second_moments_that_are_none_are_refused() -> None:
    hessian = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    with pytest.raises(BadInput, match="not second moments"):
        stages.get("ecsq").encode(gaussian((3, 2)), InputStatistics(hessian, 9))


def test_a_zero_weight_takes_next_to_nothing() -> None:
    stage = stages.get("ecsq")
    for stats in (None, InputStatistics(correlated(300), 99, torch.linspace(1, 9, 200))):
        packed = stage.encode(torch.zeros(200, 300), stats)
        assert not packed["codes"].any() and float(packed["step"]) == 0
        assert not stage.decode(packed).any()
        assert bits_of_codes(packed) < 0.02


def test_an_outlier_beyond_16_bits_is_kept_and_its_column_coarser() -> None:
    weight = torch.full((200, 400), 1e-3)
    weight[3, 5], weight[4, 6] = 1e3, -1e3
    stage = stages.get("ecsq", step=2**-12)
    packed = stage.encode(weight)
    found = integers(packed)
    assert LARGEST / 3 < found[3, 5] == -found[4, 6] < LARGEST == 32767
    assert int(packed["codes"].max()) < 1 << 16
    decoded = stage.decode(packed)
    assert float(decoded[3, 5]) == pytest.approx(1e3, rel=1e-4)
    assert float(decoded[4, 6]) == -float(decoded[3, 5])
    back = Plane.from_stored("codes", "~uint16", packed.shape, packed.planes[0].stored())
    assert torch.equal(back.values.to(torch.int64), packed["codes"].to(torch.int64))


@pytest.mark.parametrize("step", [2**-12, 0.6, 64.0])
def test_weights_and_statistics_of_any_size_decode_to_numbers(step: float) -> None:
    """Inputs and sensitivities over 24 orders of magnitude, so that some steps are beyond single precision."""
    stats = InputStatistics(torch.diag(torch.logspace(-12, 12, 16)), 10, torch.logspace(-10, 10, 8))
    stage = stages.get("ecsq", step=step)
    for scale in (1e-44, 1e-38, 1.0, 1e30, 1e37, 8e37):
        weight = gaussian((8, 16)) * scale
        decoded = stage.decode(stage.encode(weight, stats))
        assert torch.isfinite(decoded).all(), f"{scale}"


@pytest.mark.parametrize("step", [3e38, -3e38, 0.0, 1e-45])
def test_forged_steps_decode_to_numbers(step: float) -> None:
    stage = stages.get("ecsq")
    packed = stage.encode(gaussian((8, 16)))
    for exponent in (0, 255):
        forged = {"step": torch.tensor([step]), "columns": torch.full((16,), exponent, dtype=torch.uint8)}
        planes = tuple(Plane(p.name, forged.get(p.name, p.values), p.coding) for p in packed)
        decoded = stage.decode(Packed(packed.shape, planes))
        assert float(decoded.abs().nan_to_num(math.inf).max()) <= FLOAT32_MAX
    with pytest.raises(BadArtifact, match="plane step: holds values that are not finite"):
        Plane.from_stored("step", "float32", (1,), torch.tensor([math.nan]))


def test_the_step_is_a_float_of_32_bits_and_the_only_float() -> None:
    packed = stages.get("ecsq").encode(gaussian((8, 16)))
    assert packed["step"].dtype == torch.float32
    assert {plane.name: plane.coding for plane in packed} == {
        "codes": "~uint16", "rows": "~uint8", "columns": "~uint8", "step": "float32",
    }  # fmt: skip
    assert list(packed.floats) == ["step"]


def test_the_weight_is_a_differentiable_function_of_the_step() -> None:
    stage = stages.get("ecsq")
    packed = stage.encode(gaussian((8, 16)), InputStatistics(correlated(16), 99, torch.linspace(1, 9, 8)))
    step = packed["step"].clone().requires_grad_()
    dense = stage.dense(packed, {"step": step})
    assert torch.equal(dense.detach(), stage.decode(packed))
    weights = gaussian((8, 16), 1)
    (dense * weights).sum().backward()
    expected = (integers(packed) * steps(packed) / float(packed["step"]) * weights.double().numpy()).sum()
    assert step.grad is not None and float(step.grad) == pytest.approx(float(expected), rel=1e-4)
    assert stage.trains == "floats"


def test_more_damping_is_less_feedback() -> None:
    stats = InputStatistics(correlated(40), 99)
    weight = gaussian((30, 40))
    plain = integers(stages.get("ecsq").encode(weight))
    differ = [(integers(stages.get("ecsq", damping=d).encode(weight, stats)) != plain).mean() for d in (0.01, 1e2, 1e6)]
    assert differ[0] > differ[1] > differ[2]
    assert differ[2] < 0.002


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, r"^ecsq: step=0\.0; expected 0\.000244 to 64$"),
        ({"step": 65}, r"^ecsq: step=65; expected 0\.000244 to 64$"),
        ({"step": math.nan}, "^ecsq: step=nan; expected a finite number$"),
        ({"step": "fine"}, "^ecsq: step='fine'; expected a finite number$"),
        ({"rounding": 0.0}, r"^ecsq: rounding=0\.0; expected more than 0, at most 0\.5$"),
        ({"rounding": 0.51}, r"^ecsq: rounding=0\.51; expected more than 0, at most 0\.5$"),
        ({"damping": 0.0}, r"^ecsq: damping=0\.0; expected more than 0, at most 1e6$"),
        ({"damping": -1}, "^ecsq: damping=-1; expected more than 0, at most 1e6$"),
        ({"damping": 2e6}, r"^ecsq: damping=2000000\.0; expected more than 0, at most 1e6$"),
        ({"bits": 3}, "^stage ecsq has no setting 'bits'; it has step, rounding, damping, gains$"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.get("ecsq", **settings)
    stages.get("ecsq", step=2**-12, rounding=0.5, damping=1e6)


def test_it_asks_for_statistics_and_for_sensitivities() -> None:
    assert stages.get("ecsq").needs_statistics and stages.get("ecsq").needs_sensitivity
    assert not stages.get("vptq").needs_sensitivity


@pytest.mark.parametrize("text", ["ecsq:step=0.01", "tcq:step=0.005"])
def test_a_value_beyond_all_multiples_makes_its_columns_step_coarser(text: str) -> None:
    """One input is a thousand times as loud as the others, and one weight on it is large: with the step that its damage asks
    for, it would be five times as many multiples as 16 bits hold, and what no multiple reaches would be lost."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 64), np.float32))
    weight[3, 5] = 60.0
    hessian = torch.eye(64)
    hessian[5, 5] = 1e6
    stats = InputStatistics(hessian, 1000, torch.ones(256))
    stage = stages.parse(text)
    error = (stage.decode(stage.encode(weight, stats)) - weight).abs()
    assert float(error[3, 5]) < 0.01
    assert float(error.max()) < 0.03
    size, damage, _ = stage.price(weight, stats, "w", {})
    counted = sum(plane.stored().nbytes for plane in stage.encode(weight, stats).planes)
    lost = float((((error.double() @ hessian.double().sqrt()) ** 2).sum(1)).sum()) / 2
    assert 0.8 < damage / lost < 1.25
    assert 0.9 < size / counted < 1.1
