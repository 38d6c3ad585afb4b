"""SeedLM held against the paper's worked examples and brute force over all seeds and coefficients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from agentforge import stages
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane
from agentforge.stages import seedlm_search as search
from agentforge.stages.seedlm import SeedLM
from agentforge.statistics import InputStatistics


def gaussian_blocks(count: int, C: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, C, generator=torch.Generator().manual_seed(seed))


def error(stage: SeedLM, weight: torch.Tensor, stats: InputStatistics | None = None) -> float:
    """|w - decoded|^2 / |w|^2."""
    decoded = stage.decode(stage.encode(weight, stats))
    return float((weight.double() - decoded.double()).square().sum() / weight.double().square().sum())


def brute_force(
    w: np.ndarray, K: int, C: int, P: int, shift: int = -2, h: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 to the letter: every seed, its pseudo-inverse, its quantised fit.  Returns errors and lowest seeds."""
    h = np.ones(C) if h is None else h
    root = np.sqrt(h)
    best, seeds = np.full(len(w), np.inf), np.zeros(len(w), int)
    for seed in range(1, 1 << K):
        U = search.basis(K, C, P, seed)
        t = np.linalg.pinv(U * root[:, None], rcond=1e-9) @ (w * root).T
        largest = np.abs(t).max(axis=0)
        e = np.clip(np.floor(np.log2(np.where(largest > 0, largest, 2.0**-20))) + shift, -8, 7)
        t_hat = np.clip(np.rint(t / 2**e), -8, 7) * 2**e
        errors = (h * (w - (U @ t_hat).T) ** 2).sum(axis=1)
        better = errors < best
        best[better], seeds[better] = errors[better], seed
    return best, seeds


def stored_error(w: np.ndarray, packed: Packed, K: int, C: int, P: int, h: np.ndarray | None = None) -> np.ndarray:
    """The error of what is in the planes, by `basis` and the definition of the code; weights times 2^exponent."""
    q = packed["coefficients"].numpy().astype(int)
    e = packed["exponents"].numpy().astype(int)
    q, e = np.where(q > 7, q - 16, q), np.where(e > 7, e - 16, e)
    w = w * 2.0 ** (int(packed["exponent"]) - 128)
    decoded = np.stack(
        [search.basis(K, C, P, int(s)) @ (qi * 2.0**ei) for s, qi, ei in zip(packed["seeds"], q, e, strict=True)]
    )
    return ((w - decoded) ** 2 * (1.0 if h is None else h)).sum(axis=1)


def test_figure_3() -> None:
    assert search.lfsr(3, 4, 7).tolist() == [2, 5, 6, 7, 3, 1, 4]
    V = search.basis(3, 4, 2, 4) * 3 + 4
    assert V.tolist() == [[2, 5], [6, 7], [3, 1], [4, 2]]


def test_sequence_of_the_16_bit_register() -> None:
    expected = [32768, 16384, 8192, 4096, 34816, 17408, 8704, 4352, 34944, 17472, 8736, 4368]
    assert search.lfsr(16, 1, 12).tolist() == expected


@pytest.mark.parametrize("K", sorted(search.TAPS))
def test_table_6_gives_a_full_period(K: int) -> None:
    if K > 20:  # the polynomial's order from its prime factors, without walking the cycle: x^n = 1 only for n = 2^K - 1
        assert order_is_full(K)
        return
    states = search.lfsr(K, 1, (1 << K) - 1)
    assert len(np.unique(states)) == (1 << K) - 1
    assert states.min() == 1 and states[-1] == 1


def order_is_full(K: int) -> bool:
    """Whether the step matrix of the register has order 2^K - 1 over GF(2)."""
    n = (1 << K) - 1
    step = np.zeros((K, K), np.int64)
    for j in range(K - 1):
        step[j, j + 1] = 1
    for j in search.TAPS[K]:
        step[K - 1, j] = 1

    def power(exponent: int) -> np.ndarray:
        result, square = np.eye(K, dtype=np.int64), step
        while exponent:
            if exponent & 1:
                result = result @ square % 2
            square = square @ square % 2
            exponent >>= 1
        return result

    primes = [p for p in range(2, math.isqrt(n) + 1) if n % p == 0 and all(p % d for d in range(2, math.isqrt(p) + 1))]
    rest = n
    for p in primes:
        while rest % p == 0:
            rest //= p
    primes += [rest] if rest > 1 else []
    identity = np.eye(K, dtype=np.int64)
    return np.array_equal(power(n), identity) and not any(np.array_equal(power(n // p), identity) for p in primes)


def test_register_without_taps_and_seed_zero_are_refused() -> None:
    with pytest.raises(BadInput, match=r"K=25; expected 2 to 24"):
        search.lfsr(25, 1, 3)
    for seed in (0, 8, -1):
        with pytest.raises(BadInput, match=f"seed {seed}; expected 1 to 7"):
            search.lfsr(3, seed, 3)


def test_equation_1_ends() -> None:
    U = search.basis(8, 85, 3, 77)  # the whole cycle
    assert U.max() == 1.0 and U.min() == -1.0
    assert len(np.unique(U)) == 255


@pytest.mark.parametrize(
    ("settings", "bits"),
    [({}, 4), ({"bits": 4}, 4), ({"bits": 3}, 3), ({"bits": 2}, 2), ({"bits": 8}, 8), ({"C": 12, "P": 4, "K": 12}, 32 / 12)],
)
def test_equation_4_bits(settings: dict[str, int], bits: float) -> None:
    stage = stages.get("seedlm", **settings)
    layout = stage.layout((240, 240))
    stored = sum(int(coding[4:]) * math.prod(shape) for coding, shape in layout.values())
    assert stored == bits * 240 * 240 + 8  # and the tensor's power of two
    K, (C, P) = stage.K, stage.geometry  # type: ignore[attr-defined]
    assert bits == (K + 4 + 4 * P) / C


@pytest.mark.parametrize(
    ("K", "C", "P"), [(8, 8, 3), (10, 12, 4), (9, 4, 3), (8, 5, 1), (7, 16, 3), (10, 6, 5), (2, 4, 2), (3, 3, 2)]
)
@pytest.mark.parametrize("printed", [False, True])
def test_search_is_exact(K: int, C: int, P: int, printed: bool) -> None:
    weight = gaussian_blocks(300, C, seed=K)
    stage = SeedLM(K=K, C=C, P=P, exponent="printed" if printed else "corrected")
    packed = stage.encode(weight)
    w = weight.double().numpy()
    power = 2.0 ** (int(packed["exponent"]) - 128)
    best, _ = brute_force(w * power, K, C, P, shift=0 if printed else -2)
    np.testing.assert_allclose(stored_error(w, packed, K, C, P), best, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "count"), [(12, 10_000), (16, 300)])
def test_search_is_exact_on_many_blocks(K: int, count: int) -> None:
    """All seeds by brute force in matrix form; C and P of the paper's 4-bit setting."""
    weight, N = gaussian_blocks(count, 8), (1 << K) - 1
    packed = SeedLM(K=K, C=8, P=3).encode(weight)
    w = weight.double() * 2.0 ** (int(packed["exponent"]) - 128)
    cycle = torch.from_numpy(search.basis(K, N, 1, 1)[:, 0])
    rows = torch.arange(N).view(-1, 1, 1) + 3 * torch.arange(8).view(-1, 1) + torch.arange(3)
    best = torch.full((count,), torch.inf, dtype=torch.float64)
    for U in cycle[rows % N].split(64):
        t = torch.linalg.pinv(U) @ w.T
        scale = 2.0 ** (t.abs().amax(1, keepdim=True).log2().floor() - 2).clamp(-8, 7)
        t_hat = (t / scale).round().clamp(-8, 7) * scale
        best = torch.minimum(best, (w.T - U @ t_hat).square().sum(1).amin(0))
    np.testing.assert_allclose(stored_error(weight.double().numpy(), packed, K, 8, 3), best.numpy(), rtol=1e-9)


def test_ties_go_to_the_lowest_seed() -> None:
    w = torch.zeros(3, 8)
    w[1] = torch.from_numpy(search.basis(8, 8, 3, 200)[:, 0] * 3.0)
    packed = SeedLM(K=8, C=8, P=3).encode(w)
    assert packed["seeds"][0] == 1 and not packed["coefficients"][0].any()
    power = 2.0 ** (int(packed["exponent"]) - 128)
    best, seeds = brute_force(w.double().numpy()[1:2] * power, 8, 8, 3)
    assert int(packed["seeds"][1]) == int(seeds[0])
    assert best[0] < 1e-12  # the column is a multiple of what several windows hold


@pytest.mark.parametrize(
    ("settings", "target", "margin"),
    [
        ({"bits": 4}, 0.0149, 0.0005),
        ({"bits": 3}, 0.0504, 0.001),
        ({"bits": 4, "exponent": "printed"}, 0.0364, 0.002),
        ({"bits": 4, "refine": True}, 0.0140, 0.0002),
    ],
)
@pytest.mark.slow
def test_error_on_gaussian_weights(settings: dict[str, object], target: float, margin: float) -> None:
    """20,000 blocks of Table 1's settings; the targets are an independent computation's."""
    stage = stages.get("seedlm", **settings)
    weight = gaussian_blocks(20_000, stage.geometry[0])  # type: ignore[attr-defined]
    assert error(stage, weight) == pytest.approx(target, abs=margin)  # type: ignore[arg-type]


def test_refined_coefficients_are_the_best_there_are() -> None:
    K, C, P = 5, 6, 2
    weight = gaussian_blocks(60, C, seed=3)
    packed = SeedLM(K=K, C=C, P=P, refine=True).encode(weight)
    w = weight.double().numpy() * 2.0 ** (int(packed["exponent"]) - 128)
    all_q = np.array(list(itertools.product(range(-8, 8), repeat=P)))
    best = np.full(len(w), np.inf)
    for seed in range(1, 1 << K):
        U = search.basis(K, C, P, seed)
        t = np.linalg.pinv(U) @ w.T
        e = np.floor(np.log2(np.abs(t).max(axis=0))) - 2
        for step in (-1, 0, 1):
            scale = 2.0 ** np.clip(e + step, -8, 7)
            fits = np.einsum("cp,qp,b->bqc", U, all_q, scale)
            best = np.minimum(best, np.square(w[:, None] - fits).sum(axis=2).min(axis=1))
    np.testing.assert_allclose(stored_error(weight.double().numpy(), packed, K, C, P), best, rtol=1e-9)
    assert best.sum() < stored_error(weight.double().numpy(), SeedLM(K=K, C=C, P=P).encode(weight), K, C, P).sum()


def statistics(columns: int, seed: int = 0) -> InputStatistics:
    x = torch.randn(400, columns, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, columns)
    return InputStatistics(x.T @ x / 400, 400)


@pytest.mark.parametrize(("columns", "C", "P"), [(24, 8, 3), (20, 8, 3), (12, 5, 2), (7, 4, 3)])
def test_weighted_search_is_exact(columns: int, C: int, P: int) -> None:
    """Blocks that begin at other columns have other importances, also where a block runs on into the next row."""
    K, rows = 7, 20
    weight = gaussian_blocks(rows, columns, seed=columns)
    stats = statistics(columns)
    packed = SeedLM(K=K, C=C, P=P, weighted=True).encode(weight, stats)
    h = stats.diagonal.double().numpy()
    h = np.maximum(h / h.mean(), 0.01)
    flat = np.zeros(math.ceil(rows * columns / C) * C)
    flat[: rows * columns] = weight.double().numpy().reshape(-1)
    power = 2.0 ** (int(packed["exponent"]) - 128)
    for block, w in enumerate(flat.reshape(-1, C)):
        mine = h[(block * C + np.arange(C)) % columns]
        best, _ = brute_force(w[None] * power, K, C, P, h=mine)
        one = Packed(
            (1, C),
            tuple(
                Plane(p.name, p.values[block : block + 1] if p.name != "exponent" else p.values, p.coding) for p in packed
            ),
        )
        assert stored_error(w[None], one, K, C, P, mine) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_weighted_error_is_smaller_where_it_counts() -> None:
    weight, stats = gaussian_blocks(64, 48), statistics(48)
    h = stats.diagonal.double()

    def output_error(stage: SeedLM) -> float:
        difference = weight.double() - stage.decode(stage.encode(weight, stats)).double()
        return float((difference.square() * h).sum())

    assert output_error(SeedLM(K=10, C=8, P=3, weighted=True)) < 0.95 * output_error(SeedLM(K=10, C=8, P=3))
    with pytest.raises(BadInput, match="needs the layer's input statistics"):
        SeedLM(weighted=True).encode(weight)


def test_decoding_needs_the_register_alone() -> None:
    weight = gaussian_blocks(5, 24)
    stage = SeedLM(bits=3)
    packed = stage.encode(weight)
    expected = []
    for seed, e, q in zip(packed["seeds"], packed["exponents"], packed["coefficients"], strict=True):
        t = torch.where(q > 7, q.int() - 16, q.int()).double() * 2.0 ** float(e if e < 8 else int(e) - 16)
        expected.append(torch.from_numpy(search.basis(16, 12, 4, int(seed))) @ t)
    dense = torch.cat(expected)[: weight.numel()].reshape(weight.shape) * 2.0 ** (128 - int(packed["exponent"]))
    assert torch.allclose(stage.decode(packed).double(), dense, rtol=1e-6, atol=1e-9)


def test_a_seed_of_zero_is_refused() -> None:
    stage = SeedLM(K=8, C=8, P=3)
    packed = stage.encode(gaussian_blocks(4, 8))
    planes = [Plane(p.name, p.values * 0 if p.name == "seeds" else p.values, p.coding) for p in packed]
    with pytest.raises(BadArtifact, match="seeds: holds 0"):
        stage.decode(Packed(packed.shape, tuple(planes)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5; expected one of 2, 3, 4, 8"),
        ({"bits": 4, "C": 8, "P": 3}, "either bits or C and P"),
        ({"C": 8}, "P=0; expected 1 <= P"),
        ({"C": 4, "P": 4}, "P < C"),
        ({"K": 21}, "K=21; expected 2 to 20"),
        ({"K": 1}, "K=1; expected 2 to 20"),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.get("seedlm", **settings)
