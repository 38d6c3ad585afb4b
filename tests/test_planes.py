from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from agentforge import stages
from agentforge.bits import bits_per_value, pack_trits, pack_uint, stored_bytes, unpack_trits, unpack_uint
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane, power_of_two_exponent, times_power_of_two

COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 13, 31, 64, 101)
FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT32_LEAST = 2.0**-149


def bit_stream(values: list[int], width: int) -> bytes:
    """All values as one big integer, the first one in its lowest bits."""
    stream = sum(value << (i * width) for i, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * width // 8), "little")


def trit_bytes(values: list[int]) -> bytes:
    """Each five values read as a number in base 3 whose last digit is the first value."""
    return bytes(int("".join(map(str, reversed(values[i : i + 5]))), 3) for i in range(0, len(values), 5))


def drawn(width: int, count: int) -> list[int]:
    """Random values of all sizes, with both ends of the range among them."""
    source = random.Random(width * 1000 + count)
    top = (1 << width) - 1
    return [source.choice((0, top, source.randint(0, top), source.randint(0, top))) for _ in range(count)]


def raw(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize("width", range(1, 33))
def test_uints_are_one_little_endian_bit_stream(width: int) -> None:
    for count in COUNTS:
        values = drawn(width, count)
        packed = pack_uint(torch.tensor(values, dtype=torch.int64), width)
        assert packed.dtype == torch.uint8
        assert bytes(packed.tolist()) == bit_stream(values, width)
        assert packed.numel() == stored_bytes(f"uint{width}", count) == math.ceil(width * count / 8)
        assert unpack_uint(raw(bit_stream(values, width)), width, count).tolist() == values


@pytest.mark.parametrize("width", range(1, 9))
def test_narrow_uints_agree_with_numpy_packbits(width: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, 97, dtype=np.uint8)
    bits = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :width]
    expected = np.packbits(bits.reshape(-1), bitorder="little")
    assert pack_uint(torch.from_numpy(values), width).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
def test_values_of_any_integer_dtype(dtype: torch.dtype) -> None:
    values = [0, 1, 2, 100, 127]
    for width in (7, 8, 11):
        assert bytes(pack_uint(torch.tensor(values, dtype=dtype), width).tolist()) == bit_stream(values, width)


def test_unpacked_dtypes_hold_the_largest_value() -> None:
    assert {unpack_uint(raw(b"\xff" * w), w, 8).dtype for w in range(1, 9)} == {torch.uint8}
    assert {unpack_uint(raw(b"\xff" * w), w, 8).dtype for w in range(9, 32)} == {torch.int32}
    assert unpack_uint(raw(b"\xff" * 32), 32, 8).tolist() == [2**32 - 1] * 8


@pytest.mark.parametrize("width", [1, 3, 8, 13, 32])
@pytest.mark.parametrize("bad", [-1, "one more"])
def test_uints_that_do_not_fit(width: int, bad: int | str) -> None:
    value = bad if isinstance(bad, int) else 1 << width
    with pytest.raises(BadInput, match=rf"{value}.* do not fit into {width} bits"):
        pack_uint(torch.tensor([0, value]), width)


def test_trits_are_base_three_numbers() -> None:
    source = random.Random(0)
    for count in (*COUNTS, 10, 250):
        values = [source.randint(0, 2) for _ in range(count)]
        packed = pack_trits(torch.tensor(values, dtype=torch.uint8))
        assert bytes(packed.tolist()) == trit_bytes(values)
        assert packed.numel() == stored_bytes("trit", count) == math.ceil(count / 5)
        assert unpack_trits(raw(trit_bytes(values)), count).tolist() == values
    assert pack_trits(torch.full((5,), 2)).tolist() == [242]


@pytest.mark.parametrize("bad", [-1, 3])
def test_no_trits(bad: int) -> None:
    with pytest.raises(BadInput, match=f"{bad}.* are not trits"):
        pack_trits(torch.tensor([1, bad]))


def test_bits_per_value() -> None:
    assert [bits_per_value(f"uint{w}") for w in range(1, 33)] == list(range(1, 33))
    assert bits_per_value("trit") == Fraction(8, 5)
    assert [bits_per_value(c) for c in ("float16", "bfloat16", "float32")] == [16, 16, 32]


@pytest.mark.parametrize(
    "coding", ["", "uint", "uint0", "uint33", "uint04", "uint-1", "uint4 ", "int4", "trits", "float64", "uint٣", "uint4\n"]
)
def test_unknown_codings(coding: str) -> None:
    with pytest.raises(BadInput, match="expected uint1 to uint32, trit, float16, bfloat16, float32"):
        bits_per_value(coding)


@pytest.mark.parametrize(
    ("coding", "count", "bits", "size"),
    [
        ("uint1", 0, 0, 0),
        ("uint1", 1, 1, 1),
        ("uint3", 3, 9, 2),
        ("uint4", 7, 28, 4),
        ("uint13", 5, 65, 9),
        ("uint32", 3, 96, 12),
        ("trit", 0, 0, 0),
        ("trit", 1, 2, 1),
        ("trit", 5, 8, 1),
        ("trit", 6, 10, 2),
        ("trit", 4096 * 4095, 26836992, 3354624),
        ("float16", 3, 48, 6),
        ("bfloat16", 3, 48, 6),
        ("float32", 3, 96, 12),
    ],
)
def test_exact_bits_and_bytes(coding: str, count: int, bits: int, size: int) -> None:
    dtype = getattr(torch, coding) if "float" in coding else torch.uint8
    plane = Plane("p", torch.zeros(count, dtype=dtype), coding)
    assert plane.bits == bits
    assert stored_bytes(coding, count) == size
    assert plane.stored().nbytes == size


@pytest.mark.parametrize("coding", ["uint1", "uint3", "uint4", "uint8", "uint12", "uint32", "trit"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 7)])
def test_integer_plane_round_trip(coding: str, shape: tuple[int, ...]) -> None:
    top = 3 if coding == "trit" else 1 << int(coding[4:])
    values = torch.randint(0, top, shape, generator=torch.Generator().manual_seed(1))
    back = Plane.from_stored("p", coding, shape, Plane("p", values, coding).stored())
    assert back.values.shape == shape
    assert torch.equal(back.values.to(torch.int64), values)


@pytest.mark.parametrize("coding", ["float16", "bfloat16", "float32"])
def test_float_plane_round_trip(coding: str) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(getattr(torch, coding))
    plane = Plane("p", values.T, coding)
    assert plane.stored().is_contiguous()
    back = Plane.from_stored("p", coding, (5, 3), plane.stored())
    assert torch.equal(back.values, values.T)


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("coding", ["uint4", "trit"])
def test_stored_planes_of_a_wrong_size(coding: str, size: int) -> None:
    shape = (3,) if coding == "uint4" else (7,)  # both take two bytes
    with pytest.raises(BadArtifact, match=rf"plane p: {coding}\[{shape[0]}\] takes uint8\[2\], found uint8\[{size}\]"):
        Plane.from_stored("p", coding, shape, torch.zeros(size, dtype=torch.uint8))


@pytest.mark.parametrize("stored", [torch.zeros(2, dtype=torch.int8), torch.zeros(2), torch.zeros(2, 1, dtype=torch.uint8)])
def test_stored_integers_that_are_no_list_of_bytes(stored: torch.Tensor) -> None:
    with pytest.raises(BadArtifact, match=r"plane p: .*found"):
        Plane.from_stored("p", "uint4", (4,), stored)


@pytest.mark.parametrize(
    "stored",
    [
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(2, 2, dtype=torch.float16),
        torch.zeros(4, dtype=torch.uint8),
    ],
)
def test_stored_floats_of_a_wrong_dtype_or_shape(stored: torch.Tensor) -> None:
    with pytest.raises(BadArtifact, match=r"plane p: expected float16\[4\], found"):
        Plane.from_stored("p", "float16", (4,), stored)


@pytest.mark.parametrize("coding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_stored_floats_that_are_not_finite(coding: str, bad: float) -> None:
    stored = torch.tensor([1.0, bad], dtype=getattr(torch, coding))
    with pytest.raises(BadArtifact, match=r"plane p: .*not finite"):
        Plane.from_stored("p", coding, (2,), stored)


@pytest.mark.parametrize("byte", [243, 255])
def test_bytes_that_no_trit_packer_writes(byte: int) -> None:
    with pytest.raises(BadArtifact, match=f"plane p: byte {byte}"):
        Plane.from_stored("p", "trit", (10,), raw(bytes([0, byte])))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_trit_padding_that_is_not_zero(count: int) -> None:
    with pytest.raises(BadArtifact, match=r"plane p: .*padding"):
        Plane.from_stored("p", "trit", (count,), raw(bytes([3**count])))
    assert Plane.from_stored("p", "trit", (count,), raw(bytes([3**count - 1]))).values.tolist() == [2] * count


@pytest.mark.parametrize("width", range(1, 33))
def test_uint_padding_that_is_not_zero(width: int) -> None:
    for count in range(1, 9):
        spare = -count * width % 8
        for bit in range(8 - spare, 8):
            stored = bytearray(bit_stream(drawn(width, count), width))
            stored[-1] |= 1 << bit
            with pytest.raises(BadArtifact, match=r"plane p: .*padding"):
                Plane.from_stored("p", f"uint{width}", (count,), raw(bytes(stored)))


def test_packed_counts_all_its_planes() -> None:
    codes = Plane("codes", torch.ones(3, 7, dtype=torch.uint8), "uint3")
    exponent = Plane("exponent", torch.zeros(1, dtype=torch.uint8), "uint8")
    packed = Packed((3, 7), (codes, Plane("scale", torch.ones(3, dtype=torch.float16), "float16"), exponent))
    assert packed.bits == 3 * 21 + 48 + 8
    assert packed.bits_per_weight == (3 * 21 + 48 + 8) / 21
    assert [plane.name for plane in packed] == ["codes", "scale", "exponent"]
    assert packed["exponent"].tolist() == [0]
    with pytest.raises(BadArtifact, match="'minimum' is missing; found codes, scale, exponent"):
        packed["minimum"]


def test_the_hash_tells_any_change() -> None:
    def packed(value: int = 1, name: str = "codes", coding: str = "uint4", shape: tuple[int, int] = (2, 3)) -> str:
        return Packed(shape, (Plane(name, torch.full(shape, value, dtype=torch.uint8), coding),)).sha256

    assert packed() == packed()
    others = {packed(), packed(value=2), packed(name="code"), packed(coding="uint8"), packed(shape=(3, 2))}
    row = Packed((2, 3), (Plane("codes", torch.full((1, 6), 1, dtype=torch.uint8), "uint4"),)).sha256
    assert len({*others, row}) == 6


@pytest.mark.parametrize("value", [1.0, -3e-30, 1e30, 0.75, 2.0**-100, 8191.99, 2.0**13, 2.0**14, FLOAT32_MAX])
def test_the_exponent_brings_the_largest_weight_under_2_to_14(value: float) -> None:
    weight = torch.tensor([[value, value / 3, 0.0]])
    exponent = power_of_two_exponent(weight)
    assert 2**13 <= abs(math.ldexp(float(weight[0, 0]), exponent)) < 2**14
    packed = stages.get("rounding", bits=2).encode(weight)
    assert packed["exponent"].tolist() == [exponent + 128]


def test_the_exponent_at_the_ends_of_float32() -> None:
    assert power_of_two_exponent(torch.zeros(2, 2)) == 0
    assert power_of_two_exponent(torch.tensor([[FLOAT32_LEAST]])) == 127
    assert power_of_two_exponent(torch.tensor([[2.0**-113]])) == 126
    assert power_of_two_exponent(torch.tensor([[FLOAT32_MAX]])) == -114


@pytest.mark.parametrize("exponent", [-128, -127, -64, -1, 0, 1, 63, 126, 127])
def test_times_power_of_two_is_exact(exponent: int) -> None:
    values = [0.0, 1.0, -1.5, 1 / 3, 2.0**100, 2.0**-100, FLOAT32_MAX, 2.0**-126, FLOAT32_LEAST]
    for value in torch.tensor(values).tolist():
        expected = math.ldexp(value, exponent)
        if abs(expected) <= FLOAT32_MAX and expected == float(np.float32(expected)):
            assert float(times_power_of_two(torch.tensor([value]), exponent)) == expected


@pytest.mark.parametrize("scale", [FLOAT32_LEAST, 1e-44, 1e-38, 1e-30, 1.0, 1e30, 2e38])
def test_there_and_back_by_a_power_of_two(scale: float) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).clamp(-1, 1) * scale
    exponent = power_of_two_exponent(weight)
    assert torch.equal(times_power_of_two(times_power_of_two(weight, exponent), -exponent), weight)
