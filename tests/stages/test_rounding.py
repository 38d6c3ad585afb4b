from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conformance import through_disk

from agentforge import stages
from agentforge.errors import BadArtifact
from agentforge.planes import Packed, Plane

Maker = Callable[..., torch.Tensor]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Student's t with three degrees of freedom: outliers, as weights have them."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32))


def groups_of(weight: torch.Tensor, group: int) -> list[np.ndarray]:
    """All groups, row by row, in double precision; the last one of a row may be shorter."""
    size = group or weight.shape[1]
    return [row[k : k + size] for row in weight.double().numpy() for k in range(0, len(row), size)]


def decoded(weight: torch.Tensor, **settings: object) -> torch.Tensor:
    stage = stages.get("rounding", **settings)
    return stage.decode(stage.encode(weight))


def group_errors(weight: torch.Tensor, group: int, **settings: object) -> np.ndarray:
    """The squared error of every group."""
    back = decoded(weight, group=group, **settings)
    pairs = zip(groups_of(weight, group), groups_of(back, group), strict=True)
    return np.array([((w - v) ** 2).sum() for w, v in pairs])


def nmse(weight: torch.Tensor, **settings: object) -> float:
    difference = decoded(weight, **settings).double() - weight.double()
    return float(difference.square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 7, 32, 200])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_asymmetric_grids_run_from_end_to_end(bits: int, group: int, make: Maker) -> None:
    weight = make(6, 100)
    stage = stages.get("rounding", bits=bits, group=group)
    packed = stage.encode(weight)
    back = groups_of(stage.decode(packed), group)
    codes = groups_of(packed["codes"], group)
    top = 2**bits - 1
    for w, v, q in zip(groups_of(weight, group), back, codes, strict=True):
        low, high = w.min(), w.max()
        step = (high - low) / top
        exact = (w - low) / step if step else np.zeros_like(w)
        # Half floats move both ends of the grid: the minimum by 2**-11 of itself, the step by 2**-11 of itself.
        moved = 2**-11 * (abs(low) + (high - low))
        assert (abs(w - v) <= step / 2 * (1 + 2**-11) + moved * (1 + 1e-5) + 1e-6 * abs(w).max()).all()
        if step:
            sure = abs(exact - np.floor(exact) - 0.5) > 2 * moved / step
            assert (q[sure] == np.rint(exact)[sure]).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 7, 32, 200])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_symmetric_grids_have_a_level_at_zero(bits: int, group: int, make: Maker) -> None:
    weight = make(6, 100)
    weight[:, ::9] = 0
    stage = stages.get("rounding", bits=bits, group=group, symmetric=True)
    packed = stage.encode(weight)
    back = groups_of(stage.decode(packed), group)
    codes = groups_of(packed["codes"], group)
    zero = 2 ** (bits - 1) - 1
    assert int(packed["codes"].max()) <= 2 * zero
    for w, v, q in zip(groups_of(weight, group), back, codes, strict=True):
        step = abs(w).max() / zero
        exact = w / step if step else np.zeros_like(w)
        moved = 2**-11 * abs(w)
        assert (abs(w - v) <= step / 2 * (1 + 2**-11) + 2**-11 * abs(w).max() + 1e-6 * abs(w).max()).all()
        assert (v[w == 0] == 0).all()
        if step:
            sure = abs(exact - np.floor(exact) - 0.5) > 2 * moved / step
            assert (q[sure] - zero == np.rint(exact)[sure]).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_codes_are_the_nearest_on_the_grid_that_is_stored(symmetric: bool, clip: str) -> None:
    weight = heavy_tailed(5, 96, seed=3)
    stage = stages.get("rounding", bits=3, group=32, symmetric=symmetric, clip=clip)
    packed = stage.encode(weight)
    unit = 2.0 ** (128 - int(packed["exponent"]))
    levels = np.arange(7 if symmetric else 8, dtype=np.float64)
    scales = packed["scale"].double().numpy().reshape(-1)
    origins = -3 * scales if symmetric else packed["minimum"].double().numpy().reshape(-1)
    back = groups_of(stage.decode(packed), 32)
    for w, v, scale, origin in zip(groups_of(weight, 32), back, scales, origins, strict=True):
        grid = (origin + levels * scale) * unit
        best = abs(w[:, None] - grid).min(1)
        assert (abs(w - v) <= best * (1 + 1e-5) + 1e-6 * abs(w)).all()


def test_weights_on_the_grid_come_back_exactly() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 64))
    codes[:, 0], codes[:, 1], codes[:, 32], codes[:, 33] = 0, 15, 0, 15  # both ends of each group
    weight = torch.from_numpy((codes * 0.125 - 0.75).astype(np.float32))
    for clip in ("none", "mse"):
        assert torch.equal(decoded(weight, bits=4, group=32, clip=clip), weight)


def best_symmetric_error(w: np.ndarray, largest: int) -> float:
    """The least squared error of s * q with q in -largest .. largest, by looking at every assignment of codes there is.

    As s falls, the code of |w| steps from k - 1 to k at s = |w| / (k - 0.5).  Between two steps the codes are fixed and
    the best s leaves sum w**2 - (sum w q)**2 / sum q**2.
    """
    a = np.repeat(abs(w), largest)
    k = np.tile(np.arange(1, largest + 1), len(w))
    order = np.argsort(-a / (k - 0.5), kind="stable")
    wq = np.cumsum(a[order])
    qq = np.cumsum(2.0 * k[order] - 1)  # k**2 - (k - 1)**2
    return float((w**2).sum() - (wq**2 / qq).max())


def test_the_symmetric_optimum_itself() -> None:
    w = np.random.default_rng(1).standard_normal(6)
    dense = min(((w - s * np.clip(np.rint(w / s), -3, 3)) ** 2).sum() for s in np.linspace(1e-3, 2, 200_001))
    assert best_symmetric_error(w, 3) == pytest.approx(dense, rel=1e-4)
    assert best_symmetric_error(w, 3) <= dense


# Mean ratio to the optimum over 300 groups of 64, measured (Gaussian, heavy-tailed): 2 bits 1.0002, 1.0019; 3 bits 1.0036,
# 1.0022; 4 bits 1.012, 1.006; 6 bits 1.065, 1.041; 8 bits 1.14, 1.12.  With many levels the error has many narrow valleys,
# and six starts do not see them all; there the whole error is small.
@pytest.mark.parametrize(("bits", "bound"), [(2, 1.005), (3, 1.01), (4, 1.02), (6, 1.08), (8, 1.17)])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_symmetric_clipping_finds_nearly_the_optimum(bits: int, bound: float, make: Maker) -> None:
    weight = make(100, 192, seed=5)
    found = group_errors(weight, 64, bits=bits, symmetric=True, clip="mse")
    best = np.array([best_symmetric_error(w, 2 ** (bits - 1) - 1) for w in groups_of(weight, 64)])
    assert (found >= best * (1 - 1e-4)).all()
    assert (found / best).mean() < bound


def best_asymmetric_error(w: np.ndarray, levels: int) -> float:
    """The least squared error of s * q + m with q in 0 .. levels - 1, over all assignments of codes."""
    codes = np.array(list(itertools.product(range(levels), repeat=len(w))), dtype=np.float64)
    codes -= codes.mean(1, keepdims=True)
    y = w - w.mean()
    spread = (codes**2).sum(1)
    gain = np.divide((codes @ y) ** 2, spread, out=np.zeros_like(spread), where=spread > 0)
    return float((y**2).sum() - gain.max())


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_asymmetric_clipping_finds_nearly_the_optimum(make: Maker) -> None:
    weight = make(50, 36, seed=6)
    found = group_errors(weight, 6, bits=2, clip="mse")
    best = np.array([best_asymmetric_error(w, 4) for w in groups_of(weight, 6)])
    assert (found >= best * (1 - 1e-4) - 1e-7).all()
    # Measured over 300 groups of 6 (Gaussian, heavy-tailed): 1.083, 1.077 in all, the median 1.00001; unclipped 1.73, 1.80.
    assert found.sum() / best.sum() < 1.11
    assert np.median(found / best) < 1.001


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_clipping_never_does_worse_than_not_clipping(bits: int, symmetric: bool, make: Maker) -> None:
    weight = make(40, 160, seed=7)
    clipped = group_errors(weight, 64, bits=bits, symmetric=symmetric, clip="mse")
    plain = group_errors(weight, 64, bits=bits, symmetric=symmetric)
    largest = np.array([abs(w).max() for w in groups_of(weight, 64)])
    count = np.array([len(w) for w in groups_of(weight, 64)])
    # Half floats move a weight by 2**-11 of the group's largest at most, twice.
    slack = 2 * np.sqrt(plain * count) * largest * 2**-11 + count * (largest * 2**-10) ** 2
    assert (clipped <= plain + slack).all()
    assert clipped.sum() < plain.sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_ragged_last_group_is_a_group_of_its_own(symmetric: bool, clip: str) -> None:
    weight = heavy_tailed(4, 70)
    whole = decoded(weight, bits=3, group=32, symmetric=symmetric, clip=clip)
    top = float(weight.abs().max())
    for first in (0, 32, 64):
        part = weight[:, first : first + 32].clone()
        # One more row keeps the tensor's exponent, the only thing that groups share.
        row = torch.full((1, part.shape[1]), top)
        alone = decoded(torch.cat([part, row]), bits=3, group=0, symmetric=symmetric, clip=clip)[:4]
        assert torch.equal(whole[:, first : first + 32], alone)
    packed = stages.get("rounding", group=32).encode(weight)
    assert packed["scale"].shape == (4, 3)


def test_group_0_is_one_grid_a_row() -> None:
    weight = gaussian(5, 37)
    for group in (37, 64, 1000):
        assert torch.equal(decoded(weight, group=0), decoded(weight, group=group))
    assert stages.get("rounding", group=0).encode(weight)["scale"].shape == (5, 1)


@pytest.mark.parametrize("group", [10**6, 2**60])
def test_a_group_beyond_the_row_costs_no_memory(group: int) -> None:
    weight = gaussian(2, 8)
    assert stages.get("rounding", group=group).encode(weight).bits == stages.get("rounding", group=0).encode(weight).bits
    assert torch.equal(decoded(weight, group=group), decoded(weight, group=0))


def test_bits_are_codes_and_half_floats_and_one_exponent() -> None:
    n = 128 * 256
    packed = stages.get("rounding").encode(gaussian(128, 256))
    assert packed.bits_per_weight == 4 + 32 / 64 + 8 / n
    packed = stages.get("rounding", symmetric=True, bits=3, group=32).encode(gaussian(128, 256))
    assert packed.bits_per_weight == 3 + 16 / 32 + 8 / n
    packed = stages.get("rounding", bits=8, group=0).encode(gaussian(128, 256))
    assert packed.bits_per_weight == 8 + 32 / 256 + 8 / n
    packed = stages.get("rounding", bits=3, group=64).encode(gaussian(5, 70))  # ragged: two groups a row
    assert packed.bits == 3 * 350 + 5 * 2 * 32 + 8
    assert sum(plane.stored().nbytes for plane in packed) == math.ceil(3 * 350 / 8) + 5 * 2 * 4 + 1


def test_gaussian_errors_keep_their_order_and_shannons_bound() -> None:
    weight = gaussian(256, 512, seed=8)
    errors = {}
    for bits, clip, symmetric in itertools.product((2, 3, 4), ("none", "mse"), (False, True)):
        stage = stages.get("rounding", bits=bits, clip=clip, symmetric=symmetric)
        errors[bits, clip, symmetric] = error = nmse(weight, bits=bits, clip=clip, symmetric=symmetric)
        assert error > 2 ** (-2 * stage.encode(weight).bits_per_weight)
    for clip, symmetric in itertools.product(("none", "mse"), (False, True)):
        assert errors[4, clip, symmetric] < errors[3, clip, symmetric] < errors[2, clip, symmetric]
    for bits, symmetric in itertools.product((2, 3, 4), (False, True)):
        assert errors[bits, "mse", symmetric] < errors[bits, "none", symmetric]
    for bits, clip in itertools.product((2, 3, 4), ("none", "mse")):
        assert errors[bits, clip, False] < errors[bits, clip, True]
    # The best uniform quantiser of a whole Gaussian: 0.1188, 0.0374, 0.0115 (Max 1960); a grid a group does better, and
    # half a bit more should not do better than the bound by a factor of six.
    assert 0.003 < errors[4, "mse", False] < 0.0115
    assert 0.012 < errors[3, "mse", False] < 0.0374
    assert 0.05 < errors[2, "mse", False] < 0.1188


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_code_that_no_symmetric_grid_has_is_refused(bits: int) -> None:
    stage = stages.get("rounding", bits=bits, symmetric=True)
    packed = through_disk(stage, stage.encode(gaussian(2, 16)))
    stored = packed.planes[0].stored().clone()
    stored[0] = 255
    forged = Plane.from_stored("codes", f"uint{bits}", (2, 16), stored)
    with pytest.raises(BadArtifact, match=f"codes: holds {2**bits - 1}; a symmetric code is at most {2**bits - 2}"):
        stage.decode(Packed(packed.shape, (forged, *packed.planes[1:])))


def test_the_largest_float32_stays_finite() -> None:
    largest = torch.finfo(torch.float32).max
    for weight in (torch.full((1, 8), largest), torch.linspace(-1, 1, 8).unsqueeze(0) * largest):
        assert torch.isfinite(decoded(weight)).all()


def test_groups_far_below_the_largest_weight_lose_little() -> None:
    """All groups share one power of two: half floats still hold scales 2**-22 of the largest."""
    weight = gaussian(2, 64)
    weight[1] *= 2.0**-16
    small = decoded(weight, bits=8)[1].double() - weight[1].double()
    assert float(small.norm() / weight[1].double().norm()) < 0.02
