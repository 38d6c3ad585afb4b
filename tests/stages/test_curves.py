from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance import through_disk
from scipy.interpolate import BPoly
from scipy.special import eval_legendre

from agentforge import stages
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane
from agentforge.stages import Stage
from agentforge.stages.curves import Curves, choose, r_squared


def make(**settings: Any) -> Stage:
    return stages.get("curves", **settings)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decoded(weight: torch.Tensor, **settings: Any) -> np.ndarray:
    stage = make(**settings)
    return stage.decode(through_disk(stage, stage.encode(weight))).double().numpy().reshape(-1)


def fitted(values: np.ndarray, degree: int) -> np.ndarray:
    """The least-squares polynomial through equally spaced values, by scipy's Legendre polynomials and numpy's solver."""
    x = np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)
    basis = np.stack([eval_legendre(k, x) for k in range(degree + 1)], 1)
    return basis @ np.linalg.lstsq(basis, values, rcond=None)[0]


@pytest.mark.parametrize("kind", ["bezier", "polynomial"])
@pytest.mark.parametrize(("degree", "segment"), [(0, 1), (0, 9), (1, 2), (3, 20), (7, 64), (7, 1000), (10, 50)])
def test_a_segment_becomes_its_least_squares_polynomial(kind: str, degree: int, segment: int) -> None:
    weight = gaussian(20, 51)  # 1020 weights: most segment lengths leave a shorter last one
    found = decoded(weight, kind=kind, degree=degree, segment=segment)
    values = weight.double().numpy().reshape(-1)
    expected = np.concatenate([fitted(values[i : i + segment], degree) for i in range(0, 1020, segment)])
    # Half floats: 2**-11 of a number each; Bezier points of high degree lie far outside the curve.
    largest = {0: 4, 1: 4, 3: 4, 7: 40, 10: 400}[degree] if kind == "bezier" else 4 * math.sqrt(degree + 1)
    np.testing.assert_allclose(found, expected, atol=largest * 2**-11)


def test_the_points_of_a_bezier_curve_come_back() -> None:
    points = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, -0.5])
    t = np.linspace(0, 1, 80)
    curve = points[:, None] * np.ones(80)
    while len(curve) > 1:  # de Casteljau
        curve = (1 - t) * curve[:-1] + t * curve[1:]
    weight = torch.from_numpy(np.stack([curve[0], 2 * curve[0]]).astype(np.float32))
    packed = make(degree=7, segment=80).encode(weight)
    unit = 2.0 ** (128 - int(packed["exponent"]))
    np.testing.assert_allclose(packed["points"].double().numpy() * unit, [points, 2 * points], rtol=2**-10, atol=1e-4)
    assert r_squared(weight, make(degree=7, segment=80).decode(packed)) > 1 - 1e-6


def test_bezier_points_evaluate_as_scipy_evaluates_them() -> None:
    stage = make(degree=5, segment=33)
    packed = stage.encode(gaussian(6, 33))
    unit = 2.0 ** (128 - int(packed["exponent"]))
    points = packed["points"].double().numpy() * unit
    expected = BPoly(points.T[:, None, :], [0, 1])(np.linspace(0, 1, 33)).T
    np.testing.assert_allclose(stage.decode(packed).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["bezier", "polynomial"])
def test_decoding_is_the_inverse_of_the_fit_whatever_the_remainder(kind: str) -> None:
    """The audited code cut by floor when it fitted and by ceil when it decoded: 0.982 of the variance became 0.627."""
    x = torch.linspace(0, 25, 100 * 101)
    weight = (torch.sin(x) + 0.1 * torch.cos(3 * x)).reshape(100, 101)
    values = weight.double().numpy().reshape(-1)
    length = math.ceil(len(values) / 16)
    expected = np.concatenate([fitted(values[i : i + length], 7) for i in range(0, len(values), length)])
    best = r_squared(weight, torch.from_numpy(expected).reshape(100, 101))
    stage = make(kind=kind, segments=16)
    packed = stage.encode(weight)
    assert packed["points"].shape == (16, 8)
    assert best > 0.999
    assert r_squared(weight, stage.decode(packed)) == pytest.approx(best, abs=1e-5)


def test_a_curve_keeps_its_share_of_noise_and_no_more() -> None:
    weight = gaussian(256, 512)
    for degree, segment in ((7, 64), (3, 16), (0, 2)):
        found = r_squared(weight, torch.from_numpy(decoded(weight, degree=degree, segment=segment)).reshape(256, 512))
        assert found == pytest.approx((degree + 1) / segment, rel=0.05)
    documented = make(kind="bezier", degree=7, segments=16)
    packed = documented.encode(weight)
    assert packed.bits == 16 * 8 * 16 + 8  # whatever the size of the tensor
    assert abs(r_squared(weight, documented.decode(packed))) < 0.003


@pytest.mark.parametrize("length", [2, 3, 16, 17, 64, 1000, 1023])
@pytest.mark.parametrize("sort", ["segment", "tensor"])
def test_sorted_weights_come_back_in_their_places(sort: str, length: int) -> None:
    weight = gaussian(31, 33)  # 1023 weights
    values = weight.double().numpy().reshape(-1)
    found = decoded(weight, kind="polynomial", degree=1, segment=length, sort=sort)
    if sort == "tensor":
        order = np.argsort(values, kind="stable")
        curve = decoded(torch.from_numpy(values[order]).float().reshape(31, 33), kind="polynomial", degree=1, segment=length)
        expected = np.empty(1023)
        expected[order] = curve
    else:
        expected = np.empty(1023)
        for i in range(0, 1023, length):
            order = np.argsort(values[i : i + length])
            expected[i : i + length][order] = fitted(values[i : i + length][order], 1)
    np.testing.assert_allclose(found, expected, atol=8 * 2**-11)


def test_sorting_makes_curves_fit_and_its_permutation_costs_what_it_brings() -> None:
    weight = gaussian(128, 256)
    count = weight.numel()
    plain = make(degree=7, segment=64).encode(weight)
    assert plain.bits == 16 * 8 * count // 64 + 8
    for sort, bits in (("segment", 6), ("tensor", 15)):
        stage = make(degree=7, segment=64, sort=sort)
        packed = stage.encode(weight)
        assert packed.bits == plain.bits + bits * count
        assert r_squared(weight, stage.decode(packed)) > 0.98
        # Even an ideal code for permutations would need more bits than rounding of the same error takes.
        length = 64 if sort == "segment" else count
        assert math.lgamma(length + 1) / math.log(2) / length > bits - 1.45
    rounding = stages.get("rounding", bits=6, group=64)
    packed = rounding.encode(weight)
    curves = make(degree=7, segment=64, sort="segment")
    assert packed.bits < curves.encode(weight).bits
    assert r_squared(weight, rounding.decode(packed)) > r_squared(weight, curves.decode(curves.encode(weight)))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.6, 2.0, 5.0, 7.5])
def test_the_choice_keeps_the_budget_and_is_the_best(budget: float, smooth: bool) -> None:
    weight = gaussian(20, 60)
    if smooth:
        weight = weight.reshape(-1).cumsum(0).reshape(20, 60)
    found = choose(weight, budget)
    packed = found.encode(weight)
    assert packed.bits <= budget * 1200
    best = r_squared(weight, found.decode(packed))
    for degree in range(16):
        for length in [*range(degree + 1, 200), 300, 400, 600, 1200]:
            stage = Curves("polynomial", degree, length)
            if 16 * (degree + 1) * math.ceil(1200 / length) + 8 <= budget * 1200:
                assert r_squared(weight, stage.decode(stage.encode(weight))) < best + 0.03


def test_a_budget_for_nothing_is_refused() -> None:
    weight = gaussian(4, 4)
    assert choose(weight, 1.5) == Curves("polynomial", 0, 16)
    for bits in (1.49, 0.0, -1.0):
        with pytest.raises(BadInput, match=r"at least 1\.5 for 16 weights"):
            choose(weight, bits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree": -1}, "degree=-1; expected 0 to 15"),
        ({"degree": 16}, "degree=16; expected 0 to 15"),
        ({"segment": 7}, "segment=7; expected more than degree=7"),
        ({"segments": -16}, "segments=-16; expected 1 or more"),
        ({"kind": "spline"}, "expected one of bezier, polynomial"),
        ({"sort": "all"}, "expected one of none, segment, tensor"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(**settings)


@pytest.mark.parametrize("sort", ["segment", "tensor"])
def test_an_order_that_is_no_permutation_is_refused(sort: str) -> None:
    stage = make(degree=3, segment=50, sort=sort)
    packed = stage.encode(gaussian(10, 13))  # 130 weights: two segments and one of 30
    places = 130 if sort == "tensor" else 30
    for value in (int(packed["order"][-2]), places):
        order = packed["order"].clone()
        order[-1] = value
        planes = tuple(Plane(p.name, order if p.name == "order" else p.values, p.coding) for p in packed)
        with pytest.raises(BadArtifact, match=f"expected permutations of {places} places"):
            stage.decode(Packed(packed.shape, planes))
