"""Trellis-coded quantisation against Shannon's bound, all paths tried one by one, and the code's own parity check."""

from __future__ import annotations

import itertools
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conformance import correlated, gaussian, of_heads

from agentforge import cells, entropy, stages
from agentforge.bits import pack_uint, tensor_bytes, unzigzag, zigzag
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane
from agentforge.stages import tcq
from agentforge.stages.base import damage
from agentforge.stages.ecsq import DIAGONAL
from agentforge.statistics import InputStatistics
from agentforge.trellis import POLYNOMIALS, RESTART, join, split, successors

STATES = sorted(POLYNOMIALS)


def paths(shape: tuple[int, int], states: int = 8, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Zigzag integers along paths, of any m."""
    return join(zigzag((gaussian(shape, seed) * spread).round().int()), f"trellis{states}")


def coded(values: torch.Tensor, states: int = 8) -> Plane:
    return Plane("codes", values, f"~trellis{states}")


def back(data: bytes, shape: tuple[int, int], states: int = 8) -> Plane:
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Plane.from_stored("codes", f"~trellis{states}", shape, stored)


def bits_of_codes(packed: Packed) -> float:
    return packed.planes[0].bits / math.prod(packed.shape)


@pytest.mark.parametrize("states", STATES)
def test_paths_satisfy_the_parity_check_of_the_code(states: int) -> None:
    """sum_i h0_i z_{t-i} + h1_i u_{t-i} is even, with z the lowest bit of k and u the one above."""
    k = unzigzag(paths((RESTART + 300, 5), states)).numpy()
    h0, h1 = POLYNOMIALS[states]
    memory = states.bit_length() - 1
    assert h0.bit_length() == memory + 1 and h0 & 1 and h1.bit_length() <= memory and not h1 & 1
    for block in (k[:RESTART], k[RESTART:]):
        z, u = block & 1, block >> 1 & 1
        before = np.zeros((memory, 5), np.int64)
        z, u = np.vstack([before, z]), np.vstack([before, u])
        check = sum(
            (h0 >> i & 1) * z[memory - i : len(z) - i] + (h1 >> i & 1) * u[memory - i : len(u) - i]
            for i in range(memory + 1)
        )
        assert not (np.asarray(check) % 2).any()


@pytest.mark.parametrize(("states", "distance"), [(8, 10), (32, 13), (256, 16)])
def test_the_codes_have_the_free_distances_of_ungerboecks_table(states: int, distance: int) -> None:
    """Squared distance, in steps, of the nearest two paths: Ungerboeck 1982, table I, has 10, 13 and 16."""
    following = successors(states)
    s, t = np.nonzero(~np.eye(states, dtype=bool))
    best = np.full((states, states), 99)  # of two paths in these states, which have parted
    best[following[0, 0], following[0, 1]] = 4
    for _ in range(40):
        new = best.copy()
        for a, b in itertools.product(range(2), repeat=2):
            apart = np.abs((2 * a + (s & 1)) - (2 * b + (t & 1)))
            np.minimum.at(new, (following[s, a], following[t, b]), best[s, t] + np.minimum(apart, 4 - apart) ** 2)
        if (new == best).all():
            break
        best = new
    assert min(4**2, *best.diagonal()) == distance  # or two values of one class, which are 4 apart


@pytest.mark.parametrize("states", STATES)
def test_viterbi_finds_the_best_of_all_paths(states: int) -> None:
    rng = np.random.default_rng(states)
    following = successors(states)
    for n in (1, 2, 7, 10):
        for _ in range(10):
            cost = rng.exponential(size=(4, n)).astype(np.float32)
            choices = rng.integers(-5, 5, (4, n)).astype(np.int32) * 4 + np.arange(4, dtype=np.int32)[:, None]
            found = np.zeros(n, np.int32)
            tcq._viterbi(cost, choices, tcq._predecessors(states), found)
            totals = {}
            for bits in itertools.product(range(2), repeat=n):
                s, total, path = 0, 0.0, []
                for r, bit in enumerate(bits):
                    c = 2 * bit + (s & 1)
                    total += float(cost[c, r])
                    path.append(int(choices[c, r]))
                    s = int(following[s, bit])
                totals[tuple(path)] = total
            assert tuple(found) in totals, "not a path"
            assert totals[tuple(found)] == pytest.approx(min(totals.values()), rel=1e-6)


def is_path(k: tuple[int, ...]) -> bool:
    try:
        split(zigzag(torch.tensor(k)[:, None]), "trellis8")
    except BadInput:
        return False
    return True


def test_one_column_is_the_best_of_all_sequences_of_integers() -> None:
    """The whole kernel: every sequence of integers from -4 to 4 that is a path; squared errors, bits and importances."""
    rng = np.random.default_rng(0)
    n, bits = 4, np.abs(rng.standard_normal((2, tcq.COUNTED))).cumsum(1)
    tables, ones = np.arange(n) % 2, np.ones(n, np.float32)
    allowed = np.array([k for k in itertools.product(range(-4, 5), repeat=n) if is_path(k)])
    assert len(allowed) < 9**n / 2 ** (n - 1)
    for _ in range(20):
        x, w = (rng.standard_normal((1, n)) * 1.3).astype(np.float32), rng.exponential(size=n).astype(np.float32)
        ways = (tables, np.zeros(1, np.int64), bits)
        found = tcq._quantise((x, np.zeros((1, 1), np.float32), ones, ones[:1], DIAGONAL), w, ways, 8)
        every = np.concatenate([found, allowed])
        costs = (w * (x - every) ** 2).sum(1) + tcq.WORTH * bits[tables, np.abs(every)].sum(1)
        assert is_path(tuple(found[0]))
        assert costs[0] == pytest.approx(costs.min(), rel=1e-5)


@pytest.mark.parametrize(("states", "most"), [(8, 0.085), (32, 0.06)])
@pytest.mark.parametrize(("step", "rate"), [(1.02, 1.0), (0.67, 1.6), (0.5, 2.0), (0.34, 2.6), (0.08, 4.7)])
def test_a_gaussian_is_nearer_to_shannons_bound_than_scalars_come(
    states: int, most: float, step: float, rate: float
) -> None:
    """D(R) = 4^-R: no code of any kind is below it, and scalars are 0.25 bit above.  Bits are those of the file.

    Distortion is what one factor for all values leaves, which takes no bits: the stage shrinks them less than that.
    """
    stage, weight = stages.get("tcq", step=step, states=states), gaussian((1024, 640), 3)
    packed = stage.encode(weight)
    assert len(packed.planes[0].stored()) * 8 / weight.numel() == bits_of_codes(packed)
    found = back(bytes(tensor_bytes(packed.planes[0].stored())), (1024, 640), states)
    assert torch.equal(found.values, packed["codes"])
    w, decoded = weight.double(), stage.decode(packed).double()
    distortion = 1 - float((w * decoded).sum().square() / (w.square().sum() * decoded.square().sum()))
    assert bits_of_codes(packed) == pytest.approx(rate, abs=0.1)
    assert 0 < bits_of_codes(packed) + math.log2(distortion) / 2 < most
    if rate > 1.5:  # without that factor, too
        assert bits_of_codes(packed) + math.log2(float((decoded - w).square().sum() / w.square().sum())) / 2 < most + 0.015


def test_it_does_less_damage_than_scalars_in_as_many_bits_with_feedback_and_unequal_rows() -> None:
    weight, hessian = gaussian((384, 96)), correlated(96)
    sensitivity = torch.logspace(-1, 1, 384)[torch.randperm(384, generator=torch.Generator().manual_seed(0))]
    stats = InputStatistics(hessian, 99, sensitivity)

    def damage(text: str) -> tuple[float, float]:
        packed = stages.parse(text).encode(weight, stats)
        error = stages.parse(text).decode(packed).double() - weight.double()
        return float(((error @ hessian.double()) * error).sum(1) @ sensitivity.double()), bits_of_codes(packed)

    for step in (0.35, 0.6):
        (lost, bits), (scalar, scalar_bits) = damage(f"tcq:step={step}"), damage(f"ecsq:step={2 * step}")
        # Rows and columns both count for paths, and for scalars one of the two, with histograms that are written down.
        assert scalar_bits - 0.25 < bits < scalar_bits + 0.1
        # 6 dB a bit: what the few hundredths of a bit between the two are worth is taken out.
        assert lost * 4 ** (bits - scalar_bits) < 0.82 * scalar


@pytest.mark.parametrize("states", STATES)
def test_heads_that_tell_each_other_nothing_change_no_code(states: int) -> None:
    """The search that follows what each path tells its rows, of heads without correlations, against the one that has none;
    more rows than a path has, and heads that begin in one path and end in the next."""
    values, factor = gaussian((20, RESTART + 176)).numpy(), np.zeros((20, 20), np.float32)
    rows, columns = np.exp(gaussian((1, RESTART + 176), 1)[0].numpy() / 3), np.full(20, 0.3, np.float32)
    bits = entropy.path_costs(abs(np.rint(values / rows / columns[:, None]).astype(np.int32).T), tcq.COUNTED)
    silent = np.zeros(((RESTART + 176) // 48, 48, 48), np.float32)
    assert RESTART % 48
    found = [
        tcq._quantise((values, factor, rows, columns, heads), np.square(rows), bits, states) for heads in (DIAGONAL, silent)
    ]
    np.testing.assert_array_equal(*found)


def test_the_path_of_a_short_head_is_the_best_of_all() -> None:
    """All paths of a head of five rows: their cost (x - k)^T G (x - k), G = M' M'^T."""
    rng = np.random.default_rng(4)
    allowed = [np.array(k) for k in itertools.product(range(-4, 5), repeat=5) if is_path(k)]
    for _ in range(20):
        unit = np.triu(rng.normal(0, 0.3, (5, 5)), 1).astype(np.float32)
        values, ones = rng.normal(0, 1, (1, 5)).astype(np.float32), np.ones(5, np.float32)
        free = np.zeros(5, np.int64), np.zeros(1, np.int64), np.zeros((1, tcq.COUNTED), np.float32)
        found = tcq._quantise((values, np.zeros((1, 1), np.float32), ones, ones[:1], unit[None]), ones, free, 8)[0]

        def cost(k: Any, values: Any = values[0], unit: Any = unit) -> float:
            return float(np.square((np.eye(5) + unit).T @ (values - k)).sum())

        assert cost(found) == pytest.approx(min(map(cost, allowed)), rel=1e-4)


def test_rows_of_a_head_make_up_for_each_other_s_errors() -> None:
    """With what is known of heads there is less damage, counted by Kronecker's product, in as many bits."""
    weight, stats = gaussian((384, 40)), of_heads(8, 48, 40)
    assert stats.curvature is not None
    kron = torch.block_diag(*stats.curvature.double()), stats.hessian.double()
    lost = []
    for given in (stats, replace(stats, curvature=None)):
        packed = stages.parse("tcq").encode(weight, given)
        error = stages.parse("tcq").decode(packed).double() - weight.double()
        by_hand = float((kron[0] @ error @ kron[1] * error).sum()) / 2
        assert damage(weight, weight + error, stats) == pytest.approx(by_hand, rel=1e-5)
        lost.append(by_hand * 4 ** bits_of_codes(packed))
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("states", STATES)
def test_planes_of_paths_come_back(states: int) -> None:
    for shape in ((1, 1), (1, 9), (5, 3), (RESTART + 30, 24), (40, 600)):
        for spread in (0.0, 0.3, 3.0, 400.0, 6000.0):
            plane = coded(paths(shape, states, spread), states)
            found = back(bytes(tensor_bytes(plane.stored())), shape, states)
            assert torch.equal(found.values, plane.values)
            assert len(plane.stored()) <= 2 * math.prod(shape) + 1


def scaled(shape: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """Gaussians whose spread goes with their row and with their column, each the nearest value that the path allows, and
    the bits that these take if every spread is known: -log2 of each one's probability given its parity."""
    spread = np.logspace(-0.2, 1, shape[0])[:, None] * np.logspace(-0.3, 0.3, shape[1])
    order = np.random.default_rng(0)
    spread = spread[order.permutation(shape[0])][:, order.permutation(shape[1])]
    targets, k, state = gaussian(shape).numpy() * spread, np.empty(shape, np.int64), np.zeros(shape[1], np.int64)
    for r in range(shape[0]):
        k[r] = 2 * np.rint((targets[r] - (state & 1)) / 2) + (state & 1)
        state = successors(8)[state, k[r] >> 1 & 1]
    inside = scipy.stats.norm.cdf((k + 1) / spread) - scipy.stats.norm.cdf((k - 1) / spread)
    return zigzag(torch.from_numpy(k.astype(np.int32))), -float(np.log2(inside).sum())


def test_every_kind_of_section_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns alone in files of before, of which cells take less."""
    scale = torch.linspace(0.3, 3, 320)
    by_columns = join(zigzag((gaussian((320, 300)) * scale[:300]).round().int()), "trellis8")
    by_rows = join(zigzag((gaussian((320, 300)) * scale[:, None]).round().int()), "trellis8")
    wide = gaussian((64, 300)).round().int()
    wide[3, 5] = 30000
    kinds = [(by_columns, 1, entropy.COLUMNS), (by_rows, 1, entropy.ROWS), (paths((320, 300)), 1, entropy.ONE)]
    sizes = []
    for values, kind, section in [*kinds, (join(zigzag(wide), "trellis8"), entropy.SPLIT, None)]:
        with monkeypatch.context() as before:
            before.setattr(entropy, "_cells", lambda sizes: None)
            stored = bytes(tensor_bytes(coded(values).stored()))
        assert stored[0] == kind
        assert section is None or stored[5] == section
        assert torch.equal(back(stored, (len(values), 300)).values, values)
        sizes.append(len(stored))
    assert all(len(coded(values).stored()) <= size for (values, *_), size in zip(kinds, sizes, strict=False))
    for shape in ((320, 300), (100, 500), (600, 80)):
        stored = bytes(tensor_bytes(coded(values := scaled(shape)[0]).stored()))
        assert (stored[0], stored[5]) == (entropy.WHOLE, entropy.CELLS)
        assert torch.equal(back(stored, shape).values, values)


def test_cells_take_the_entropy_of_values_of_known_spreads() -> None:
    values, bits = scaled((512, 400))
    assert bits / values.numel() > 1.5
    assert len(coded(values).stored()) * 8 == pytest.approx(bits, rel=0.015)


def test_frequencies_of_cells_are_those_of_generalised_gaussians() -> None:
    """Against scipy's gennorm, whose width and shape are those of the numbers."""
    for a, b, w in ((20, 2, 8), (31, 4, 3), (44, 6, 10), (70, 1, 8)):
        even, odd = cells.frequencies(np.array([[a], [b], [w]]), 400)
        density = scipy.stats.gennorm(cells.SHAPES[b], scale=2 ** (a / 8 - 2)).pdf(np.arange(800))
        density /= density[0]
        assert even[0] == pytest.approx(cells.ONE * cells.ZEROS[w] / 16, abs=2)
        assert even[1:] == pytest.approx(np.maximum(2 * cells.ONE * density[2::2], 1), abs=2)
        assert odd == pytest.approx(np.maximum(2 * cells.ONE * density[1::2], 1), abs=2)


def test_forged_cells_are_refused_or_are_other_paths() -> None:
    """Bytes of what comes before the words, set to other values, with a checksum that fits."""
    shape = (40, 60)
    stored = bytes(tensor_bytes(coded(scaled(shape)[0]).stored()))
    assert stored[5] == entropy.CELLS

    def read(body: bytes) -> torch.Tensor:
        return entropy.decode(bytes([entropy.WHOLE]) + zlib.crc32(body).to_bytes(4, "little") + body, "trellis8", shape)

    refused = 0
    for at in range(6, 160):
        for other in (0, 255, stored[at] ^ 1):
            try:
                assert read(stored[5:at] + bytes([other]) + stored[at + 1 :]).shape == shape
            except BadInput:
                refused += 1
    assert refused > 250
    for end in (6, 8, 9, 12, 60, len(stored) - 4):
        with pytest.raises(BadInput):
            read(stored[5:end])
    with pytest.raises(BadInput, match="cells are of paths alone"):
        entropy.decode(stored, "uint16", shape)


def test_parities_take_no_bits_and_make_the_rest_cheaper() -> None:
    """The conditional entropy of m, given the parity, signs as likely as each other; less than that of m alone."""
    packed = stages.get("tcq", step=0.8).encode(gaussian((512, 512), 1))
    k = unzigzag(packed["codes"]).numpy()
    conditional, m = 0.0, (k >> 1).reshape(-1)
    for parity in range(2):
        _, counts = np.unique(k[k & 1 == parity], return_counts=True)
        conditional -= (counts * np.log2(counts / counts.sum())).sum() / k.size
    _, counts = np.unique(m, return_counts=True)
    alone = -(counts * np.log2(counts / counts.sum())).sum() / k.size
    assert conditional < alone - 0.05
    assert bits_of_codes(packed) == pytest.approx(conditional, rel=0.002)


def test_what_is_no_path_is_refused() -> None:
    for values in (torch.tensor([[1]]), paths((50, 9)) ^ 1):
        with pytest.raises(BadInput, match="no path of trellis8"):
            coded(values).stored()
    with pytest.raises(BadInput, match="a value of 65536 does not fit"):
        coded(zigzag(torch.tensor([[65536]]))).stored()


def test_outliers_beyond_16_bits_are_kept_and_their_columns_coarser() -> None:
    weight = torch.full((200, 40), 1e-3)
    weight[3, 5], weight[4, 6] = 1e3, -1e3
    stage = stages.get("tcq", step=2**-12)
    packed = stage.encode(weight)
    found = unzigzag(packed["codes"])
    assert 20000 < int(found[3, 5]) < 65536 and -65536 < int(found[4, 6]) < -20000
    stored = packed.planes[0].stored()
    assert torch.equal(back(bytes(tensor_bytes(stored)), (200, 40)).values, packed["codes"])
    assert float(stage.decode(packed)[3, 5]) == pytest.approx(1e3, rel=1e-4)


@pytest.mark.parametrize("step", [2**-12, 0.3, 64.0])
def test_weights_and_statistics_of_any_size_decode_to_numbers(step: float) -> None:
    stats = InputStatistics(torch.diag(torch.logspace(-12, 12, 16)), 10, torch.logspace(-10, 10, 8))
    stage = stages.get("tcq", step=step)
    for scale in (1e-44, 1e-38, 1.0, 1e30, 1e37, 8e37):
        packed = stage.encode(gaussian((8, 16)) * scale, stats)
        assert torch.isfinite(stage.decode(packed)).all(), f"{scale}"
        packed.planes[0].stored()


def test_the_same_bytes_from_any_thread() -> None:
    """A large weight, with all that is counted from the pass before."""
    stats = InputStatistics(correlated(130), 99, torch.logspace(-1, 1, RESTART + 200))
    weight = gaussian((RESTART + 200, 130))
    encode = stages.get("tcq", step=0.3).encode
    with ThreadPoolExecutor(3) as pool:
        assert len({encode(weight, stats).sha256, *pool.map(lambda _: encode(weight, stats).sha256, range(3))}) == 1


SHAPE = (40, 300)


def sealed(body: bytes, kind: int = entropy.WHOLE) -> bytes:
    return bytes([kind]) + entropy.zlib.crc32(body).to_bytes(4, "little") + body


def section(frequencies: list[int], evens: int, words: bytes, size: int | None = None) -> bytes:
    """Of kind ONE."""
    packed = bytes(tensor_bytes(pack_uint(torch.tensor(frequencies), entropy.FREQUENCY_BITS)))
    head = bytes([entropy.ONE]) + ((size or len(frequencies) // 2) - 1).to_bytes(2, "little")
    return head + packed + evens.to_bytes(4, "little") + words


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (section([9, 9, 9, 9], 12001, bytes(4)), "more even values than values"),
        (section([9, 9, 9, 9], 2**32 - 1, bytes(4)), "more even values than values"),
        (section([9, 0, 9, 9], 6000, bytes(4)), "too concentrated"),
        (section([0, 0, 9, 9], 6000, bytes(4)), "too concentrated"),
        (section([9, 9, 9, 9], 6000, bytes(3)), "whole word"),
        (section([9, 9, 9, 9], 6000, bytes(9000)), "more words than values"),
        (section([9, 9, 9, 9], 6000, b"\xff" * 8), "do not belong to its histogram"),
        (section([9, 9, 9, 9], 0, b""), "no path"),  # where the first value is even
        (section([9, 9, 9, 9], 6000, bytes(4), 60000), "an alphabet of 60000 values, expected 2 to 32769"),
        (section([9, 9, 9, 9], 6000, b"", 20000), "ends .* bytes early"),
        (bytes([entropy.PACKED]) + bytes(24000), "no known kind"),
    ],
)
def test_forged_sections(body: bytes, message: str) -> None:
    with pytest.raises(BadArtifact, match=f"^plane codes: .*{message}"):
        back(sealed(body), SHAPE)


def test_sizes_are_checked_before_memory_is_taken() -> None:
    data = bytes(tensor_bytes(coded(paths(SHAPE)).stored()))
    for shape in ((1 << 24, 1 << 24), (1 << 62, 4)):
        with pytest.raises(BadArtifact, match="do not hold"):
            back(data, shape)


@pytest.mark.parametrize("spread", [0.5, 3.0, 300.0])
def test_forged_bytes_give_a_path_or_none(spread: float) -> None:
    """Whoever can write a file can write its checksum: nothing but BadArtifact, and no value beyond the coding."""
    stored = bytes(tensor_bytes(coded(paths(SHAPE, spread=spread)).stored()))
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        forged = bytearray(stored[5:])
        for _ in range(1 + trial % 3):
            forged[int(rng.integers(0, len(forged) if trial % 2 else 40))] = int(rng.integers(0, 256))
        try:
            found = back(sealed(forged[: int(rng.integers(0, len(forged)))] if trial % 5 == 0 else forged, stored[0]), SHAPE)
        except BadArtifact:
            refused += 1
        else:
            split(found.values, "trellis8")
    assert refused > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, r"^tcq: step=0\.0; expected 0\.000244 to 64$"),
        ({"states": 16}, r"^tcq: states=16; expected one of 8, 32, 256$"),
        ({"damping": 0.0}, r"^tcq: damping=0\.0; expected more than 0, at most 1e6$"),
        ({"rounding": 0.4}, "^stage tcq has no setting 'rounding'; it has step, states, damping, gains$"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.get("tcq", **settings)
