"""On a GPU where there is one, else in Triton's interpreter (conftest.py asks for it)."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentforge import stages
from agentforge.errors import BadInput
from agentforge.planes import times_power_of_two
from agentforge.stages import base, codebook, kmeans, seedlm
from agentforge.stages import seedlm_search as search
from agentforge.statistics import InputStatistics

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
    ("n", "k", "v"), [(140, 520, 8), (1, 129, 2), (129, 128, 4), (40, 300, 6), (70, 300, 12), (40, 300, 16)]
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
    x, c = small_integers(100, v, 0), small_integers(500, v, 1)
    squares = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(2)
    assert ((squares == squares.min(1, keepdims=True)).sum(1) > 1).mean() > 0.2  # ties are common
    assert (found(x, c) == squares.argmin(1)).all()


def test_only_what_is_too_close_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW", 0)
    again = []
    exact = kernels._exact

    def watched(x: torch.Tensor, *rest: object) -> None:
        again.append((len(x), rest[3]))
        exact(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_exact", watched)
    x, c = gaussian(150, 8, 2), gaussian(1000, 8, 3)
    assert (found(x, c) == kmeans.nearest(x, c)).all()
    assert again[0] == (150, 1) and sum(n for n, _ in again[1:]) < 20
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
    halves = torch.from_numpy(codebook.Codebook.of(c).halves.reshape(-1))
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
        seeds, codes = kernels.search(blocks, weights, K, P, rule, DEVICE)
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
    seeds, codes = kernels.search(seedlm._blocks(scaled, C), np.ones(C), stage.K, P, rule, DEVICE)
    assert (seeds == packed["seeds"].numpy()).all()
    assert (codes[:, 0] & 15 == packed["exponents"].numpy()).all()
    assert (codes[:, 1:] & 15 == packed["coefficients"].numpy()).all()


@pytest.mark.parametrize(
    "spec",
    ["seedlm:K=9,C=8,P=3", "seedlm:K=8,C=8,P=3,weighted=true", "vptq:v=2,k=16,residual=4", "vptq:v=2,k=16,shared=true"],
)
def test_a_stage_encodes_to_the_same_planes_by_these_kernels(
    spec: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU by its device alone; without one, the interpreter's kernels take the place of the CPU's."""
    stage, device = stages.parse(spec), torch.device(DEVICE)
    weight = torch.from_numpy(gaussian(24, 16, 5))
    seen = InputStatistics(torch.from_numpy((x := gaussian(64, 16, 6)).T @ x / 64), 64)
    layers = [stages.Layer("a", weight.clone, seen), stages.Layer("b", lambda: 2 * weight.flip(0), seen)]
    shared = stage.fit_shared(layers) if stage.shared_layout() else None
    expected = stage.encode(weight, seen, shared=shared)
    calls = []

    def kernels_for(asked: torch.device) -> object:
        assert asked.type == DEVICE
        calls.append(asked)
        return kernels

    for module in (seedlm, kmeans):
        monkeypatch.setattr(module, "kernels_for", kernels_for)
    moved = [layer._replace(load=lambda layer=layer: layer.load().to(device)) for layer in layers]
    if shared is not None:
        again = stage.fit_shared(moved)
        assert again.sha256 == shared.sha256
    assert stage.encode(weight.to(device), seen, shared=shared).sha256 == expected.sha256
    assert calls


def test_a_weight_on_the_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.kernels_for(torch.device("cpu")) is None
    assert base.kernels_for(torch.device("cuda")) is kernels
    monkeypatch.setitem(sys.modules, "agentforge.stages.triton_kernels", None)
    monkeypatch.delattr(stages, "triton_kernels")
    with pytest.raises(BadInput, match="device cuda: Triton is not installed"):
        base.kernels_for(torch.device("cuda"))


def test_blocks_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = gaussian(kernels.ROWS + 9, 8, 2)
    whole = kernels.search(blocks, ONES, 8, 3, PLAIN, DEVICE)
    monkeypatch.setattr(kernels, "ENERGIES", 1)
    monkeypatch.setattr(kernels, "PAIRS", 50)
    for a, b in zip(whole, kernels.search(blocks, ONES, 8, 3, PLAIN, DEVICE), strict=True):
        assert (a == b).all()


def test_few_seeds_reach_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    survivors = kernels._survivors
    monkeypatch.setattr(kernels, "_survivors", lambda *args: kept.append(survivors(*args)) or kept[-1])
    kernels.search(gaussian(60, 8, 3), ONES, 11, 3, PLAIN, DEVICE)
    ((owners, _),) = kept
    assert (owners.bincount() >= 1).all() and len(owners) < 90  # of 2047 a block
    assert (owners.diff() >= 0).all()


@pytest.mark.parametrize(("C", "P"), [(8, 3), (12, 4), (4, 3)])
def test_energies_of_the_first_step_are_within_the_stated_error(C: int, P: int) -> None:
    job = kernels._Job.of(np.ones(C), 9, C, P, PLAIN, DEVICE)
    x = gaussian(64, C, 4).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    exact = []
    for position in range(511):
        u = search.basis(9, C, P, int(job.states[position]))
        fit, *_ = np.linalg.lstsq(u, x.T, rcond=None)
        exact.append(((u @ fit) ** 2).sum(0))
    energies = np.zeros((4 * kernels.SEEDS, len(x)))
    energies[:511] = exact
    single = torch.from_numpy(x.astype(np.float32)).to(DEVICE)
    largest = energies.reshape(4, kernels.SEEDS, -1).max(1)
    rough = kernels._chunk_energies(single, job.right).cpu().double().numpy()
    wrong = abs(np.sqrt(rough) - np.sqrt(largest)).max()
    assert kernels.SLACK < wrong < 2**-11 * math.sqrt(P) + kernels.SLACK  # the second step is needed, and enough
    owners, chunks = (i.reshape(-1).to(DEVICE) for i in torch.meshgrid(torch.arange(64), torch.arange(4), indexing="ij"))
    fine = kernels._pair_energies(single, job.table, owners, chunks).cpu().double().numpy()
    assert abs(np.sqrt(fine.reshape(64, -1).T) - np.sqrt(energies)).max() < kernels.SLACK / 3


def test_errors_that_are_certain_are_those_of_the_cpu() -> None:
    blocks = gaussian(30, 8, 5)
    job = kernels._Job.of(ONES, 8, 8, 3, PLAIN, DEVICE)
    owners = torch.arange(30).repeat_interleave(255).to(DEVICE)
    positions = torch.arange(255).repeat(30).to(DEVICE)
    errors, certain = kernels._plain_errors(job, torch.from_numpy(blocks).to(DEVICE), owners, positions)
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
    job = kernels._Job.of(ONES, 8, 8, 3, PLAIN, DEVICE)
    u = search.basis(8, 8, 3, int(job.states[11]))
    halves = (u @ np.array([[4.5, 2.0, 1.0], [4.25, 2.0, 1.0]]).T).T.astype(np.float32)
    _, certain = kernels._plain_errors(
        job, torch.from_numpy(halves).to(DEVICE), torch.arange(2, device=DEVICE), torch.full((2,), 11, device=DEVICE)
    )
    assert certain.tolist() == [False, True]
