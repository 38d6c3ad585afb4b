from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from agentforge import entropy, stages
from agentforge.bits import FLOATS, tensor_bytes
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane

CODINGS = ["trit", *(f"uint{width}" for width in (1, 2, 3, 5, 8, 9, 11, 12, 13, 16, 17, 24, 31, 32)), *FLOATS]
SHAPES: list[tuple[int, ...]] = [(1,), (1, 1), (0, 4), (7,), (13, 37), (16, 64), (40, 9, 11), (64, 300)]
Values = Callable[[int, np.random.Generator, tuple[int, ...]], np.ndarray]


def uniform(limit: int, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, limit, shape)


def peaked(limit: int, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.minimum(rng.geometric(0.3, shape) - 1, limit - 1)


def by_rows(limit: int, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    spread = np.linspace(0, 1, math.prod(shape[:1])).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.random(shape) ** 3 * spread * (limit - 1)).astype(np.int64)


def make(coding: str, shape: tuple[int, ...], values: Values = peaked, seed: int = 0) -> Plane:
    rng = np.random.default_rng(seed)
    if coding in FLOATS:
        return Plane("p", torch.from_numpy(rng.standard_normal(shape)).to(FLOATS[coding]), coding)
    limit = 3 if coding == "trit" else 1 << int(coding[4:])
    return Plane("p", torch.from_numpy(values(limit, rng, shape)), coding)


def encode(plane: Plane) -> bytes:
    return entropy.encode(plane.values, plane.coding)


def decode(data: bytes, name: str, coding: str, shape: tuple[int, ...]) -> Plane:
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    coded = Plane.from_stored(name, f"~{coding}", shape, stored)
    return Plane(name, coded.values, coding)


def bits_a_value(plane: Plane) -> float:
    return 8 * len(encode(plane)) / plane.values.numel()


def check_round_trip(plane: Plane) -> bytes:
    data, shape = encode(plane), tuple(plane.values.shape)
    stored = plane.stored()
    assert len(data) <= stored.nbytes + 1
    back = decode(data, plane.name, plane.coding, shape)
    expected = Plane.from_stored(plane.name, plane.coding, shape, stored)
    assert back.values.dtype == expected.values.dtype
    assert torch.equal(back.values, expected.values)
    assert bytes(tensor_bytes(back.stored())) == bytes(tensor_bytes(stored))  # negative zeros, too
    return data


@pytest.mark.parametrize("coding", CODINGS)
def test_planes_come_back(coding: str) -> None:
    for shape in SHAPES:
        for values in (uniform, peaked, by_rows):
            check_round_trip(make(coding, shape, values))


def test_every_kind_of_section_is_taken_where_it_is_the_shortest() -> None:
    rows = make("uint4", (64, 300), by_rows)
    kinds = {
        "uniform": (make("uint4", (64, 300), uniform), entropy.RAW, None),
        "peaked": (make("uint4", (64, 300), peaked), entropy.WHOLE, entropy.ONE),
        "rows": (rows, entropy.WHOLE, entropy.ROWS),
        "columns": (Plane("p", rows.values.T.contiguous(), "uint4"), entropy.WHOLE, entropy.COLUMNS),
        "wide": (make("uint16", (64, 300), peaked), entropy.WHOLE, entropy.ONE),
        "wider": (make("uint17", (64, 300), peaked), entropy.SPLIT, None),
        "float": (make("float16", (64, 300)), entropy.SPLIT, None),
    }
    for name, (plane, kind, section) in kinds.items():
        data = check_round_trip(plane)
        assert data[0] == kind, name
        assert section is None or data[5] == section, name


@pytest.mark.parametrize("constant", [0, 1, 6, 7])
def test_constant_planes_take_next_to_nothing(constant: int) -> None:
    plane = Plane("p", torch.full((300, 400), constant), "uint3")
    data = check_round_trip(plane)
    assert len(data) < 0.003 * plane.stored().nbytes + 30  # 1/177 bit a value, so that a byte cannot stand for any number
    assert len(check_round_trip(Plane("p", torch.tensor([[constant]]), "uint3"))) == 2
    assert plane.values.numel() < entropy.VALUES_A_BYTE * len(data)


def test_the_most_that_a_byte_stands_for() -> None:
    most = 8 / math.log2(256 / 255)
    assert most < entropy.VALUES_A_BYTE < 1.01 * most
    plane = Plane("p", torch.zeros(800, 1500, dtype=torch.uint8), "uint1")
    assert plane.values.numel() / len(encode(plane)) == pytest.approx(entropy.VALUES_A_BYTE, rel=0.06)


@pytest.mark.parametrize(
    "stage",
    ["ternary", "ternary:rule=threshold,tau=1.0", "rounding:bits=2", "rounding:bits=4,clip=mse", "rounding:bits=8,group=0"],
)
def test_coded_gaussian_weights_take_their_entropy(stage: str) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codes = stages.parse(stage).encode(weight).planes[0]
    expected = stats.entropy(np.bincount(codes.values.numpy().reshape(-1)), base=2)
    assert bits_a_value(codes) == pytest.approx(expected, rel=0.01)
    check_round_trip(codes)


def test_ternary_codes_of_a_gaussian_take_what_the_normal_distribution_says() -> None:
    """Absmean rounding gives zero where |w| < E|w| / 2 = sqrt(2 / pi) / 2 standard deviations."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    tail = stats.norm.sf(math.sqrt(2 / math.pi) / 2)
    expected = stats.entropy([tail, 1 - 2 * tail, tail], base=2)
    assert expected == pytest.approx(1.5832, abs=1e-4) and expected < math.log2(3)
    codes = stages.get("ternary").encode(weight).planes[0]
    assert bits_a_value(codes) == pytest.approx(expected, rel=0.002)


def test_histograms_by_rows_come_near_the_entropy_given_the_row() -> None:
    rng = np.random.default_rng(0)
    p = np.repeat(np.linspace(0.01, 0.5, 8), 40)  # eight kinds of rows, shuffled
    rng.shuffle(p)
    plane = Plane("p", torch.from_numpy((rng.random((320, 500)) < p[:, None]).astype(np.uint8)), "uint1")
    given = float(np.mean(stats.entropy([p, 1 - p], base=2)))
    together = float(stats.entropy([p.mean(), 1 - p.mean()], base=2))
    assert given == pytest.approx(bits_a_value(plane), rel=0.03)
    assert bits_a_value(plane) < 0.9 * together


def test_coded_bytes_counts_all_planes() -> None:
    packed = stages.get("rounding", bits=4, group=32).encode(
        torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    )
    assert packed.coded_bytes == sum(len(check_round_trip(plane)) for plane in packed)
    assert packed.coded_bytes < packed.bits / 8
    assert Packed((1, 1), (make("uint4", (1,)),)).coded_bytes == 2


def test_bytes_are_the_same_everywhere() -> None:
    """Taken once, with constriction 0.4.2 and 0.5.0: a library that gives others cannot read what was written before."""
    digest = hashlib.sha256()
    for coding in CODINGS:
        for values in (uniform, peaked, by_rows):
            # Integers from a formula, as a random generator may change.
            shape = (40, 100)
            limit = 3 if coding == "trit" else 1 << (int(coding[4:]) if coding.startswith("uint") else 11)
            i = np.arange(4000).reshape(shape)
            grid = {
                uniform: i * 2654435761 % limit,
                peaked: i * i % 7 * (i % 3) % limit,
                by_rows: i % (i // 100 + 1) % limit,
            }
            floats = FLOATS.get(coding)
            tensor = torch.from_numpy(grid[values])
            digest.update(encode(Plane("p", tensor.to(floats) if floats else tensor, coding)))
    assert digest.hexdigest() == "5a3c86f9ecaf076a30625bca486366e1f1c87da2e7cbabf39d72aca2d45f6d40"


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match="do not fit into 2 bits"):
        encode(Plane("p", torch.tensor([4]), "uint2"))
    with pytest.raises(BadInput, match="not trits"):
        encode(Plane("p", torch.tensor([3]), "trit"))


HOSTILE = [
    ("trit", (30, 50), peaked),
    ("uint4", (30, 50), by_rows),
    ("uint4", (64, 300), by_rows),
    ("uint11", (30, 50), peaked),
    ("uint16", (30, 50), peaked),
    ("float16", (30, 50), peaked),
    ("uint8", (5,), uniform),
]


@pytest.mark.parametrize(("coding", "shape", "values"), HOSTILE)
def test_damaged_bytes_are_noticed(coding: str, shape: tuple[int, ...], values: Values) -> None:
    data = encode(make(coding, shape, values))
    for end in [*range(min(len(data), 300)), len(data) - 4, len(data) - 1]:
        with pytest.raises(BadArtifact, match=r"^plane p: "):
            decode(data[:end], "p", coding, shape)
    with pytest.raises(BadArtifact, match=r"^plane p: "):
        decode(data + b"\0\0\0\0", "p", coding, shape)
    if data[0] == entropy.RAW:
        return  # a plane as it is stored: the manifest's hash watches over it
    rng = np.random.default_rng(0)
    for bit in {*range(8 * min(len(data), 20)), *rng.integers(0, 8 * len(data), 100).tolist()}:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadArtifact, match=r"^plane p: "):
            decode(bytes(flipped), "p", coding, shape)


@pytest.mark.parametrize(("coding", "shape", "values"), HOSTILE[:-1])
def test_forged_bytes_give_a_valid_plane_or_none(coding: str, shape: tuple[int, ...], values: Values) -> None:
    """Whoever can write a file can write its checksum: nothing but BadArtifact, and no value beyond the coding."""
    body = encode(make(coding, shape, values))[5:]
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        forged = bytearray(body)
        for _ in range(1 + trial % 3):
            at = int(rng.integers(0, len(forged) if trial % 2 else 40))
            forged[at] = int(rng.integers(0, 256))
        if trial % 5 == 0:
            forged = forged[: int(rng.integers(0, len(forged)))]
        kind = bytes([entropy.WHOLE if trial % 7 else entropy.SPLIT])
        try:
            plane = decode(kind + zlib.crc32(forged).to_bytes(4, "little") + forged, "p", coding, shape)
        except BadArtifact:
            refused += 1
        else:
            assert tuple(plane.values.shape) == shape
            plane.stored()  # raises where a value does not fit
    assert refused > 50


def test_a_size_is_checked_before_memory_is_taken() -> None:
    data = encode(make("uint4", (30, 50)))
    for shape in ((1 << 24, 1 << 24), (1 << 62, 4), (1 << 15, 1 << 12)):
        with pytest.raises(BadArtifact, match="do not hold"):
            decode(data, "p", "uint4", shape)
    for shape in ((0, 4), (30, 49), (30, 51), (1, 1)):
        with pytest.raises(BadArtifact):
            decode(data, "p", "uint4", shape)
    with pytest.raises(BadArtifact, match="takes 140737488355328 bytes"):
        decode(b"\0" + data, "p", "uint4", (1 << 24, 1 << 24))


def sealed(body: bytes, kind: int = entropy.WHOLE) -> bytes:
    return bytes([kind]) + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("body", "coding", "message"),
    [
        (bytes([9, 1, 0]), "uint4", "no known kind"),
        (bytes([entropy.ONE, 16, 0]), "uint4", "an alphabet of 17 values, expected 2 to 16"),
        (bytes([entropy.ONE, 3, 0]), "trit", "an alphabet of 4 values, expected 2 to 3"),
        (bytes([entropy.ONE, 0, 0]), "uint4", "an alphabet of 1 values"),
        (bytes([entropy.ONE, 1, 0, 0, 0]), "uint4", "ends 2 bytes early"),
        (bytes([entropy.ONE, 1, 0, 0, 0, 0, 0]), "uint4", "too concentrated"),  # frequencies 0 and 0
        (bytes([entropy.ONE, 1, 0, 255, 255, 255, 15]), "uint4", None),
        (bytes([entropy.ONE, 1, 0, 255, 63, 0, 0]), "uint4", "too concentrated"),  # 16383 and 0
        (bytes([entropy.ONE, 1, 0, 255, 255, 255, 15, 7]), "uint4", "whole word"),
        (bytes([entropy.ONE, 1, 0, 255, 255, 255, 15]) + bytes(400), "uint4", "more words than values"),
        (bytes([entropy.ONE, 1, 0, 255, 255, 255, 15]) + b"\xff" * 8, "uint4", "do not belong to its histogram"),
        (bytes([entropy.PACKED]) + bytes(9), "uint4", "do not hold"),
        (bytes([entropy.PACKED]) + bytes(5), "trit", "do not hold"),
    ],
)
def test_forged_sections(body: bytes, coding: str, message: str | None) -> None:
    if message is None:
        assert decode(sealed(body), "p", coding, (20,)).values.max() <= 1
    else:
        with pytest.raises(BadArtifact, match=message):
            decode(sealed(body), "p", coding, (20,))


def test_kinds_go_with_their_codings_only() -> None:
    data = encode(make("uint4", (30, 50)))
    for coding in ("uint17", "float32"):
        with pytest.raises(BadArtifact, match=f"kind 1 does not go with {coding}"):
            decode(data, "p", coding, (30, 50))
    with pytest.raises(BadArtifact, match="kind 2 does not go with uint4"):
        decode(sealed(data[5:], entropy.SPLIT), "p", "uint4", (30, 50))
    with pytest.raises(BadArtifact, match="kind 77"):
        decode(sealed(data[5:], 77), "p", "uint4", (30, 50))


def test_floats_that_are_not_finite_are_refused() -> None:
    plane = make("float16", (64, 300))
    data = encode(Plane("p", plane.values.view(torch.int16).int() & 0xFFFF, "uint16"))
    assert torch.equal(decode(data, "p", "float16", (64, 300)).values, plane.values)
    infinite = Plane("p", torch.full((64, 300), 0x7C00), "uint16")
    with pytest.raises(BadArtifact, match="not finite"):
        decode(encode(infinite), "p", "float16", (64, 300))
