"""On a GPU where there is one, else on the CPU: the code is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentforge import stages
from agentforge.planes import times_power_of_two
from agentforge.stages import gpu_search, kmeans, seedlm
from agentforge.stages import seedlm_search as search
from agentforge.statistics import InputStatistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gaussian(n: int, v: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, v)).astype(np.float32)


def small_integers(n: int, v: int, seed: int) -> np.ndarray:
    """Few different vectors: many centroids are equal, and all arithmetic is exact."""
    return np.random.default_rng(seed).integers(-2, 3, (n, v)).astype(np.float32)


def found(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    return gpu_search.nearest(torch.from_numpy(x).to(DEVICE), torch.from_numpy(c).to(DEVICE)).cpu().numpy()


@pytest.mark.parametrize(
    ("n", "k", "v"), [(140, 520, 8), (1, 129, 2), (129, 128, 4), (40, 300, 6), (70, 300, 12), (40, 300, 16), (30, 90, 64)]
)
def test_nearest_centroids_are_those_of_the_cpu(n: int, k: int, v: int) -> None:
    x, c = gaussian(n, v, 0), gaussian(k, v, 1)
    result = found(x, c)
    assert result.dtype == np.int32
    assert (result == kmeans.nearest(x, c)).all()
    squares = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(2)
    assert (result == squares.argmin(1)).all()


@pytest.mark.parametrize("v", [2, 3, 8])
def test_of_equal_centroids_the_first_is_taken(v: int) -> None:
    x, c = small_integers(100, v, 0), small_integers(500, v, 1)
    squares = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(2)
    assert ((squares == squares.min(1, keepdims=True)).sum(1) > 1).mean() > 0.2  # ties are common
    assert (found(x, c) == squares.argmin(1)).all()


def test_only_what_is_too_close_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    exact = gpu_search.nearest_kernel

    def watched(x: np.ndarray, *rest: object) -> None:
        again.append(len(x))
        exact(x, *rest)

    monkeypatch.setattr(gpu_search, "nearest_kernel", watched)
    x, c = gaussian(150, 8, 2), gaussian(1000, 8, 3)
    assert (found(x, c) == kmeans.nearest(x, c)).all()
    assert sum(again) < 3
    again.clear()
    c[900] = c[17]  # a copy
    x[:50] = c[17]
    assert (found(x, c)[:50] == 17).all()
    assert 50 <= sum(again) < 60
    monkeypatch.setattr(gpu_search, "SCORES", 7000)
    again.clear()
    assert (found(x, c) == kmeans.nearest(x, c)).all() and len(again) == 22  # seven vectors at a time


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_scales_and_outliers(scale: float, outlier: float) -> None:
    x, c = gaussian(150, 8, 4), gaussian(500, 8, 5)
    x[3], c[100] = x[3] * outlier, c[100] * outlier
    x, c = (x * np.float32(scale)).astype(np.float32), (c * np.float32(scale)).astype(np.float32)
    assert (found(x, c) == kmeans.nearest(x, c)).all()


def test_nothing_to_do() -> None:
    assert found(gaussian(0, 8, 0), gaussian(5, 8, 0)).shape == (0,)
    assert (found(gaussian(3, 8, 0), gaussian(1, 8, 0)) == 0).all()


@pytest.mark.parametrize("v", [2, 8, 64])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_the_margin_covers_what_the_cpu_loses(v: int, outlier: float) -> None:
    """Scores summed in float32, one product after the other, of the two centroids that could be confused."""
    x, c = gaussian(500, v, 6), gaussian(256, v, 7)
    c[5] *= outlier
    exact = (c.astype(np.float64) ** 2).sum(1) / 2 - x.astype(np.float64) @ c.T.astype(np.float64)
    scores = np.broadcast_to(((c.astype(np.float64) ** 2).sum(1) / 2).astype(np.float32), exact.shape)
    for d in range(v):
        scores = scores - x[:, d : d + 1] * c[:, d]
    margins = gpu_search._margins(torch.from_numpy(x), torch.from_numpy(c).double().norm(dim=1)).numpy()
    wrong = np.take_along_axis(abs(scores - exact), np.argsort(exact, axis=1)[:, :2], axis=1).sum(1)
    assert (wrong.max() > 0) and (wrong <= margins).all()
    assert np.median(margins / wrong) < 3000  # and does not call everything close


ONES = np.ones(8)
PLAIN, PRINTED, REFINED = ((search.LEAST_EXPONENT, search.LARGEST_EXPONENT, *rest) for rest in ((-2, 0), (0, 0), (-2, 1)))


def brute_force(
    blocks: np.ndarray, h: np.ndarray, K: int, P: int, rule: tuple[int, int, int, int]
) -> tuple[np.ndarray, ...]:
    """Every seed of every block, fitted by the CPU's own function: seeds, exponents and coefficients."""
    count, C = (1 << K) - 1, blocks.shape[1]
    states = [1, *search.lfsr(K, 1, count + C * P).tolist()]
    values = search.to_unit(np.array(states, np.float64), K)
    seeds, codes, fit = [], [], np.empty(P + 1, np.int64)
    for w in blocks:
        square = float((h * w.astype(np.float64) ** 2).sum())
        best: tuple[float, int, list[int]] = (math.inf, 0, [])
        for position in range(count):
            error = search.fit_seed(w, h, values, position + 1, P, rule, fit) / square
            best = min(best, (error, states[position], fit.tolist()))
        seeds.append(best[1])
        codes.append(best[2])
    return np.array(seeds, np.uint32), np.array(codes, np.int8)


@pytest.mark.parametrize(
    ("K", "C", "P", "rule"),
    [
        (8, 8, 3, PLAIN),
        (9, 8, 3, REFINED),
        (8, 8, 3, PRINTED),
        (7, 12, 4, PLAIN),
        (8, 4, 3, PLAIN),
        (8, 16, 3, PLAIN),
        (5, 6, 2, PLAIN),
    ],
)
def test_seeds_are_those_of_brute_force(K: int, C: int, P: int, rule: tuple[int, int, int, int]) -> None:
    blocks = gaussian(12, C, K)
    blocks[3] *= 1e-3
    blocks[4] = np.eye(C, dtype=np.float32)[1] * 3
    blocks[5] = 1.0
    h = np.random.default_rng(0).uniform(0.1, 4.0, C)
    for weights in (np.ones(C), h):
        seeds, codes = gpu_search.search(blocks, weights, K, P, rule, DEVICE)
        expected = brute_force(blocks, weights, K, P, rule)
        assert (seeds == expected[0]).all()
        assert (codes == expected[1]).all()


@pytest.mark.parametrize(
    "settings", [{"K": 9}, {"K": 9, "refine": True}, {"K": 9, "C": 12, "P": 4}, {"K": 9, "exponent": "printed"}]
)
def test_planes_are_those_of_the_stage(settings: dict[str, Any]) -> None:
    stage = seedlm.SeedLM(**settings)
    C, P = stage.geometry
    weight = torch.from_numpy(gaussian(6, 8 * C, 1))
    weight[3:5] = 0  # whole blocks of zeros
    packed = stage.encode(weight)
    scaled = times_power_of_two(weight, int(packed["exponent"]) - 128).numpy()
    rule = PRINTED if stage.exponent == "printed" else REFINED if stage.refine else PLAIN
    seeds, codes = gpu_search.search(seedlm._blocks(scaled, C), np.ones(C), stage.K, P, rule, DEVICE)
    assert (seeds == packed["seeds"].numpy()).all()
    assert (codes[:, 0] & 15 == packed["exponents"].numpy()).all()
    assert (codes[:, 1:] & 15 == packed["coefficients"].numpy()).all()


@pytest.mark.parametrize(
    "spec",
    ["seedlm:K=9,C=8,P=3", "seedlm:K=8,C=8,P=3,weighted=true", "vptq:v=2,k=16,residual=4", "vptq:v=2,k=16,shared=true"],
)
def test_a_stage_encodes_to_the_same_planes(
    spec: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU by its device alone; without one, these searches are told that they are on one."""
    stage: Any = stages.parse(spec)
    weight = torch.from_numpy(gaussian(24, 16, 5))
    seen = InputStatistics(torch.from_numpy((x := gaussian(64, 16, 6)).T @ x / 64), 64)
    layers = [stages.Layer("a", weight.clone, seen), stages.Layer("b", lambda: 2 * weight.flip(0), seen)]
    shared = stage.fit_shared(layers) if stage.shared_layout() else None
    expected = stage.encode(weight, seen, shared=shared)
    calls = []

    def watched(name: str) -> Any:
        inner = getattr(gpu_search, name)
        return lambda *args: calls.append(name) or inner(*args)

    for name in ("search", "nearest"):
        monkeypatch.setattr(gpu_search, name, watched(name))
    monkeypatch.setattr(gpu_search, "CPU", torch.device("meta"))  # what is on the CPU is on another device then
    moved = [layer._replace(load=lambda layer=layer: layer.load().to(DEVICE)) for layer in layers]
    if shared is not None:
        again = stage.fit_shared(moved)
        assert again.sha256 == shared.sha256
    assert stage.encode(weight.to(DEVICE), seen, shared=shared).sha256 == expected.sha256
    assert calls


def test_blocks_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = gaussian(137, 8, 2)
    whole = gpu_search.search(blocks, ONES, 8, 3, PLAIN, DEVICE)
    monkeypatch.setattr(gpu_search, "SCORES", 30 * 255)
    monkeypatch.setattr(gpu_search, "PAIRS", 50)
    for a, b in zip(whole, gpu_search.search(blocks, ONES, 8, 3, PLAIN, DEVICE), strict=True):
        assert (a == b).all()


def test_few_seeds_reach_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    survivors = gpu_search._survivors
    monkeypatch.setattr(gpu_search, "_survivors", lambda *args: kept.append(survivors(*args)) or kept[-1])
    gpu_search.search(gaussian(60, 8, 3), ONES, 11, 3, PLAIN, DEVICE)
    ((owners, _),) = kept
    assert (owners.bincount() >= 1).all() and len(owners) < 90  # of 2047 a block
    assert (owners.diff() >= 0).all()


@pytest.mark.parametrize(("C", "P"), [(8, 3), (12, 4), (4, 3)])
def test_energies_are_those_of_the_best_fits(C: int, P: int) -> None:
    job = gpu_search._Job.of(np.ones(C), 9, C, P, PLAIN, DEVICE)
    x = gaussian(64, C, 4).astype(np.float64)
    energies = np.square(x @ job.bases.cpu().numpy().transpose(0, 2, 1)).sum(2)
    for position in range(511):
        u = search.basis(9, C, P, int(job.states[position]))
        fit, *_ = np.linalg.lstsq(u, x.T, rcond=None)
        np.testing.assert_allclose(energies[position], ((u @ fit) ** 2).sum(0), rtol=1e-9)


def test_errors_that_are_certain_are_those_of_the_cpu() -> None:
    blocks = gaussian(30, 8, 5)
    job = gpu_search._Job.of(ONES, 8, 8, 3, PLAIN, DEVICE)
    owners = torch.arange(30).repeat_interleave(255).to(DEVICE)
    positions = torch.arange(255).repeat(30).to(DEVICE)
    errors, certain = gpu_search._plain_errors(job, torch.from_numpy(blocks).double().to(DEVICE), owners, positions)
    fit = np.empty(4, np.int64)
    for owner, position, error, sure in zip(
        owners.tolist(), positions.tolist(), errors.tolist(), certain.tolist(), strict=True
    ):
        w = blocks[owner]
        expected = search.fit_seed(w, ONES, job.values, position + 1, 3, PLAIN, fit) / float(
            (w.astype(np.float64) ** 2).sum()
        )
        assert not sure or error == pytest.approx(expected, rel=1e-11)
    assert certain.double().mean() > 0.99


def test_a_number_about_to_be_rounded_is_not_certain() -> None:
    """Blocks that are exactly half-way between two codes of a seed."""
    job = gpu_search._Job.of(ONES, 8, 8, 3, PLAIN, DEVICE)
    u = search.basis(8, 8, 3, int(job.states[11]))
    halves = (u @ np.array([[4.5, 2.0, 1.0], [4.25, 2.0, 1.0]]).T).T.astype(np.float32)
    _, certain = gpu_search._plain_errors(
        job,
        torch.from_numpy(halves).double().to(DEVICE),
        torch.arange(2, device=DEVICE),
        torch.full((2,), 11, device=DEVICE),
    )
    assert certain.tolist() == [False, True]
