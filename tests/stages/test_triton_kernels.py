"""On a GPU where there is one, else in Triton's interpreter (conftest.py asks for it)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agentforge.stages import kmeans

pytest.importorskip("triton", reason="Triton is not installed: it is for Linux on x86-64")
from agentforge.stages import triton_kernels as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gaussian(n: int, v: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, v)).astype(np.float32)


def small_integers(n: int, v: int, seed: int) -> np.ndarray:
    """Few different vectors: many centroids are equal, and all arithmetic is exact."""
    return np.random.default_rng(seed).integers(-2, 3, (n, v)).astype(np.float32)


def found(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    return kernels.nearest(torch.from_numpy(x).to(DEVICE), torch.from_numpy(c).to(DEVICE)).cpu().numpy()


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["two steps", "exact step alone"])
@pytest.mark.parametrize(
    ("n", "k", "v"), [(300, 1000, 8), (1, 129, 2), (129, 128, 4), (140, 700, 6), (70, 300, 12), (40, 300, 16)]
)
def test_nearest_centroids_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, few: int, n: int, k: int, v: int) -> None:
    monkeypatch.setattr(kernels, "FEW", few)
    x, c = gaussian(n, v, 0), gaussian(k, v, 1)
    result = found(x, c)
    assert result.dtype == np.int32
    assert (result == kmeans.nearest(x, c)).all()
    squares = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(2)
    assert (result == squares.argmin(1)).all()


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["two steps", "exact step alone"])
@pytest.mark.parametrize("v", [2, 3, 8])
def test_of_equal_centroids_the_first_is_taken(monkeypatch: pytest.MonkeyPatch, few: int, v: int) -> None:
    monkeypatch.setattr(kernels, "FEW", few)
    x, c = small_integers(200, v, 0), small_integers(900, v, 1)
    squares = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(2)
    assert ((squares == squares.min(1, keepdims=True)).sum(1) > 1).mean() > 0.3  # ties are common
    assert (found(x, c) == squares.argmin(1)).all()


def test_only_what_is_too_close_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW", 0)
    again = []
    exact = kernels._exact

    def watched(x: torch.Tensor, *rest: object) -> None:
        again.append((len(x), rest[3]))
        exact(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_exact", watched)
    x, c = gaussian(400, 8, 2), gaussian(1000, 8, 3)
    assert (found(x, c) == kmeans.nearest(x, c)).all()
    assert again[0] == (400, 1) and sum(n for n, _ in again[1:]) < 20
    again.clear()
    c[900] = c[17]  # a copy in another block
    x[:50] = c[17]
    assert (found(x, c)[:50] == 17).all()
    assert again[1][0] >= 50 and again[1][1] == 8


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_scales_and_outliers(monkeypatch: pytest.MonkeyPatch, scale: float, outlier: float) -> None:
    monkeypatch.setattr(kernels, "FEW", 0)
    x, c = gaussian(150, 8, 4), gaussian(500, 8, 5)
    x[3], c[100] = x[3] * outlier, c[100] * outlier
    x, c = (x * np.float32(scale)).astype(np.float32), (c * np.float32(scale)).astype(np.float32)
    assert (found(x, c) == kmeans.nearest(x, c)).all()


def test_nothing_to_do() -> None:
    assert found(gaussian(0, 8, 0), gaussian(5, 8, 0)).shape == (0,)
    assert (found(gaussian(3, 8, 0), gaussian(1, 8, 0)) == 0).all()


def truncated(value: np.ndarray) -> np.ndarray:
    """Cut to 24 significant bits, as a tensor core may."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)


@pytest.mark.parametrize("v", [2, 8, 16])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_scores_of_the_first_step_are_within_the_stated_error(v: int, outlier: float) -> None:
    """With every partial sum truncated, and products of operands that TF32 holds exactly."""
    x, c = gaussian(50, v, 6), gaussian(256, v, 7)
    c[5] *= outlier
    halves = torch.from_numpy(kmeans.Codebook.of(c).halves.reshape(-1))
    right = kernels._right(torch.from_numpy(c), halves)
    left = kernels._left(torch.from_numpy(x), right.shape[1])
    for operand in (left, right):
        assert torch.equal(kernels._tf32(operand), operand)
    total = np.zeros((len(x), len(halves)))
    for a, b in zip(left.double().numpy().T, right.double().numpy().T, strict=True):
        total = truncated(total + a[:, None] * b[None, :])
    total = total[:, : len(c)]
    exact = x.astype(np.float64) @ c.T.astype(np.float64) - (c.astype(np.float64) ** 2).sum(1) / 2
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(c, axis=1) + (c.astype(np.float64) ** 2).sum(1) / 2
    worst = float((abs(total - exact) / size).max())
    assert worst < kernels.ERROR / 2
    # High parts alone would not do.
    high = kernels._tf32(torch.from_numpy(x)).double().numpy() @ kernels._tf32(torch.from_numpy(c)).double().numpy().T
    assert float((abs(high - x.astype(np.float64) @ c.T) / size).max()) > kernels.ERROR
    # The margin of a vector covers the errors of the two scores that could be confused: those within its reach.
    norms = torch.from_numpy(c).norm(dim=1)
    margins = kernels._margins(torch.from_numpy(x), norms).double().numpy()
    order = np.argsort(-exact, axis=1)[:, :2]
    wrong = np.take_along_axis(abs(total - exact), order, axis=1).sum(1)
    assert (wrong <= margins).all()


def test_tf32_keeps_eleven_bits_rounded() -> None:
    x = torch.from_numpy(gaussian(1000, 1, 8))
    high = kernels._tf32(x).double()
    mantissa, _ = np.frexp(high.numpy())
    assert (mantissa * 2**11 == np.rint(mantissa * 2**11)).all()
    assert float(((high - x.double()) / x.double()).abs().max()) <= 2**-11
    assert math.isclose(float(kernels._tf32(torch.tensor([1 + 2**-11 + 2**-20]))), 1 + 2**-10)
