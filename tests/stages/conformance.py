"""The conformance suite that every registered stage passes, after scikit-learn's check_estimator.

`checks(stage)` yields the names and functions of all checks; a function takes nothing and fails with an AssertionError
that says what it saw.  `SETTINGS` lists the settings under which each registered stage is put through them, `REFINED` the
refined stages that are, too.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentforge import entropy, stages
from agentforge.bits import FLOATS
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane, is_coded
from agentforge.stages import Stage
from agentforge.stages.ggml import FORMS
from agentforge.stages.refined import Refined
from agentforge.statistics import InputStatistics
from agentforge.tensorfiles import write_tensors

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "curves": [
        {},
        {"segments": 16},
        {"kind": "polynomial", "degree": 0, "segment": 1},
        {"kind": "polynomial", "degree": 15, "segment": 33, "sort": "segment"},
        {"degree": 3, "segment": 50, "sort": "tensor"},
        {"kind": "polynomial", "degree": 2, "segments": 1, "sort": "segment"},
    ],
    "ecsq": [{}, {"step": 0.1, "damping": 1.0}, {"step": 3.0, "rounding": 0.5}, {"gains": True}],
    "ggml": [{"type": kind} for kind in FORMS],
    "rounding": [
        {},
        {"bits": 2, "clip": "mse"},
        {"bits": 3, "group": 5},
        {"bits": 4, "group": 16, "symmetric": True},
        {"bits": 5, "group": 1},
        {"bits": 8, "group": 0},
        {"bits": 3, "group": 0, "symmetric": True, "clip": "mse"},
    ],
    "seedlm": [
        {},
        {"K": 9, "C": 12, "P": 4, "refine": True},
        {"K": 8, "C": 7, "P": 2, "exponent": "printed"},
        {"K": 2, "C": 2, "P": 1},
        {"K": 3, "C": 5, "P": 4},
        {"K": 10, "bits": 8},
    ],
    "trajectory": [
        {},
        {"U": 225, "M": 0, "select": False},
        {"U": 361, "U_first": 225, "M": 2, "loss": 0.05, "l": 1.0},
        {"U": 100, "variant": "printed", "select": False},
        {"U": 255, "variant": "korobov", "M": 0, "l": 0.0},
        {"U": 4095, "variant": "korobov", "centred": True, "l": 0.0},
        {"U": 300, "M": 1, "l": 2.0, "select": False},
        {"U": 16, "K": 1, "centred": True, "l": 0.0, "select": False},
    ],
    "tcq": [{}, {"step": 0.05, "damping": 1.0, "states": 32}, {"step": 1.5, "states": 256}, {"gains": True}],
    "ternary": [
        {"rule": "calibrated"},
        {},
        {"packing": "2bit"},
        {"eps": 1e-37},
        {"rule": "threshold"},
        {"rule": "threshold", "tau": 0.0, "packing": "2bit"},
        {"rule": "threshold", "tau": 1.5},
    ],
    "vptq": [
        {"v": 4, "k": 16, "residual": 8, "norm": "std", "refine": 2},
        {"v": 4, "k": 16, "parts": 2, "outliers": 0.05, "outlier_v": 2, "outlier_k": 32, "groups": 3},
        {"v": 2, "k": 16, "permute": False, "propagate": False, "weighted": False, "refine": 0},
    ],
}
REFINED = [
    "ternary | entropy",
    "rounding:bits=3,group=5 | entropy",
    "vptq:v=4,k=16 | entropy",
]
# Stages whose relative error does not depend on the scale of the weight.
SCALE_FREE = {"curves", "ecsq", "rounding", "tcq"}
SHAPES = ((1, 1), (1, 7), (7, 1), (13, 37), (3, 130), (64, 64))


def every_stage() -> list[Stage]:
    found = [stages.get(name, **settings) for name in stages.names() for settings in SETTINGS.get(name, [])]
    return found + [stages.parse(text) for text in REFINED]


def gaussian(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, seed: int = 5) -> torch.Tensor:
    """Second moments of inputs of unequal sizes that have much in common."""
    x = gaussian((4 * n, n), seed) @ (torch.eye(n) + 0.7 * gaussian((n, n), seed + 1) / math.sqrt(n))
    x = x * torch.linspace(0.3, 3, n) + gaussian((4 * n, 1), seed + 2)
    return x.T @ x / (4 * n)


def of_heads(heads: int, size: int, columns: int) -> InputStatistics:
    """Statistics whose outputs' curvature is that of heads."""
    blocks = torch.stack([correlated(size, 20 + head) for head in range(heads)])
    diagonal = blocks.diagonal(dim1=1, dim2=2).reshape(-1)
    return InputStatistics(correlated(columns), 99, diagonal.contiguous(), blocks)


def through_disk(stage: Stage, packed: Packed) -> Packed:
    """What a reader who knows only the stage and the shape gets back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "planes.safetensors"
        write_tensors(path, {plane.name: plane.stored() for plane in packed})
        stored = load_file(path)
    layout = stage.layout(packed.shape)
    assert stored.keys() == layout.keys()
    planes = tuple(Plane.from_stored(name, coding, shape, stored[name]) for name, (coding, shape) in layout.items())
    return Packed(packed.shape, planes)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a.view(torch.int32) == b.view(torch.int32)).all())


def plane_bits(coding: str, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if coding.strip("~") == "trit":
        return -(-8 * count // 5)
    if coding.startswith("~trellis"):
        return 16 * count  # and a parity, which follows from the values before
    return count * int(re.sub(r"\D", "", coding))


def check_round_trip_through_disk(stage: Stage) -> None:
    for shape in SHAPES:
        packed = stage.encode(gaussian(shape))
        back = through_disk(stage, packed)
        assert back.sha256 == packed.sha256, f"{shape}: other planes came back"
        decoded = stage.decode(packed)
        assert decoded.shape == shape
        assert decoded.dtype == torch.float32
        assert same_bits(stage.decode(back), decoded), f"{shape}: the planes from disk decode to something else"


def check_exact_bits(stage: Stage) -> None:
    for shape in SHAPES:
        packed = stage.encode(gaussian(shape))
        layout = stage.layout(shape)
        expected = [coded_bits(plane) if is_coded(plane.coding) else plane_bits(*layout[plane.name]) for plane in packed]
        assert [plane.bits for plane in packed] == expected, f"{shape}"
        assert packed.bits == sum(expected)
        assert packed.bits_per_weight == packed.bits / (shape[0] * shape[1])
        for plane in packed:
            assert 8 * plane.stored().nbytes - 8 < plane.bits <= 8 * plane.stored().nbytes, f"{shape}: {plane.name}"


def coded_bits(plane: Plane) -> int:
    """What the coder gives for the values by themselves, which is all that goes to disk, and never more than a byte longer
    than they are uncoded."""
    alone = entropy.encode(plane.values, plane.coding[1:])
    assert plane.stored().dtype == torch.uint8
    assert plane.stored().numpy().tobytes() == alone, plane.name
    assert 8 * len(alone) < plane_bits(plane.coding, tuple(plane.values.shape)) + 8 + 8, plane.name
    return 8 * len(alone)


def check_damaged_codes_are_refused(stage: Stage) -> None:
    """A checksum watches over a code.  A plane that coding did not make shorter is as it is, and only its size can tell."""
    packed = stage.encode(gaussian((13, 37)))
    for plane in (plane for plane in packed if is_coded(plane.coding)):
        stored, shape = plane.stored(), tuple(plane.values.shape)
        whole = stored.numel()
        wrong = [stored[:0], stored[:1], stored[: whole // 2], stored[: whole - 1], torch.cat([stored, stored[:4]])]
        wrong += [stored.to(torch.int16), stored[None]]
        if stored[0] != entropy.RAW:
            for at in {0, 1, 4, 5, 6, whole // 2, whole - 1}:
                flipped = stored.clone()
                flipped[at] ^= 16
                wrong.append(flipped)
        for one in wrong:
            with pytest.raises(BadArtifact, match=rf"^plane {re.escape(plane.name)}: ") as caught:
                Plane.from_stored(plane.name, plane.coding, shape, one)
            assert len(str(caught.value).splitlines()) == 1


def check_entropy_coding_loses_nothing(stage: Stage) -> None:
    """The codes of a stage stand for exactly the weight that its plain planes stand for."""
    assert isinstance(stage, Refined)
    plain = stage.first
    for shape in SHAPES:
        packed, expected = stage.encode(gaussian(shape)), plain.encode(gaussian(shape))
        assert [plane.name for plane in packed] == [plane.name for plane in expected]
        for coded, plane in zip(packed, expected, strict=True):
            assert coded.coding == "~" + plane.coding.removeprefix("~")
            assert torch.equal(coded.values, plane.values), f"{shape}: {plane.name}"
        assert same_bits(stage.decode(through_disk(stage, packed)), plain.decode(expected)), f"{shape}"


def check_planes_are_of_their_coding(stage: Stage) -> None:
    """Of what a reader gets: floats of their width, and integers that are not below zero nor beyond their width."""
    for plane in through_disk(stage, stage.encode(gaussian((13, 37)))):
        coding = plane.coding.removeprefix("~")
        if coding in FLOATS:
            assert plane.values.dtype == FLOATS[coding], plane.name
        else:
            limit = 3 if coding == "trit" else 1 << 17 if coding.startswith("trellis") else 1 << int(coding[4:])
            assert not plane.values.is_floating_point(), plane.name
            assert 0 <= int(plane.values.long().min()) <= int(plane.values.long().max()) < limit, plane.name


def check_statistics_change_no_determinism(stage: Stage) -> None:
    """With second moments and sensitivities: the same bytes from any number of threads, and both are left as they were."""
    x = gaussian((80, 37), 1) @ gaussian((37, 37), 2)
    for dtype in (torch.float32, torch.float64):
        moments, sensitivity = (x.T @ x / 80).to(dtype), gaussian((1, 13), 3)[0].exp().to(dtype)
        stats = InputStatistics(moments.clone(), 80, sensitivity.clone())
        expected = stage.encode(gaussian((13, 37)), stats).sha256
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: stage.encode(gaussian((13, 37)), stats).sha256, range(3)))  # noqa: B023
        assert set(found) == {expected}
        assert torch.equal(stats.hessian, moments), f"encode changed the second moments, {dtype}"
        assert stats.sensitivity is not None and torch.equal(stats.sensitivity, sensitivity), f"{dtype}"


def check_layout(stage: Stage) -> None:
    for shape in SHAPES:
        packed = stage.encode(gaussian(shape))
        found = {plane.name: (plane.coding, tuple(plane.values.shape)) for plane in packed}
        assert list(found.items()) == list(stage.layout(shape).items()), f"{shape}"
        assert packed.shape == shape


def check_deterministic(stage: Stage) -> None:
    weights = [gaussian(shape, seed) for seed in range(2) for shape in SHAPES]
    first = [stage.encode(weight, seed=7).sha256 for weight in weights]
    assert [stage.encode(weight, seed=7).sha256 for weight in weights] == first, "a second call gave other bytes"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hashes = [stage.encode(weight, seed=7).sha256 for weight in weights]
            assert hashes == first, f"{threads} threads gave other bytes"
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda weight: stage.encode(weight, seed=7).sha256, weights)) == first


def check_thread_count_on_a_large_weight(stage: Stage) -> None:
    weight = gaussian((300, 400))  # enough for torch to share the work
    before = torch.get_num_threads()
    hashes = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed = stage.encode(weight)
            hashes.add((packed.sha256, stage.decode(packed).view(torch.int32).sum(dtype=torch.int64).item()))
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


def check_zero_weights(stage: Stage) -> None:
    for shape in SHAPES:
        assert not stage.decode(stage.encode(torch.zeros(shape))).any(), f"{shape}: zeros decode to something else"


def check_constant_weights(stage: Stage) -> None:
    for shape in SHAPES:
        for constant in (1.0, -1.0, 0.1, -3e4):
            decoded = stage.decode(stage.encode(torch.full(shape, constant)))
            assert torch.isfinite(decoded).all(), f"{shape}: {constant} decodes to {decoded}"


def check_tiny_and_huge_weights(stage: Stage) -> None:
    for shape in SHAPES:
        for scale in (1e-30, 1e-3, 1e30):
            decoded = stage.decode(through_disk(stage, stage.encode(gaussian(shape) * scale)))
            assert torch.isfinite(decoded).all(), f"{shape}: not finite at {scale}"


def check_error_does_not_depend_on_scale(stage: Stage) -> None:
    errors = {}
    for scale in (1.0, 1e-30, 1e-3, 1e30):
        weight = gaussian((64, 256)) * scale
        difference = (stage.decode(stage.encode(weight)).double() - weight.double()) / scale
        errors[scale] = float(difference.square().sum().sqrt() / (weight.double() / scale).square().sum().sqrt())
    # 1e-5: half-float rounding falls otherwise at every scale; with group=1 there is no other error (2e-4 in all).
    for scale, error in errors.items():
        assert error == pytest.approx(errors[1.0], rel=0.01, abs=1e-5), f"relative errors {errors}, at {scale}"


def check_input_dtypes(stage: Stage) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weight = gaussian((13, 37)).to(dtype)
        assert stage.encode(weight).sha256 == stage.encode(weight.to(torch.float32)).sha256, f"{dtype}"


def check_other_strides(stage: Stage) -> None:
    weight = gaussian((37, 13))
    assert stage.encode(weight.T).sha256 == stage.encode(weight.T.contiguous()).sha256
    assert stage.encode(torch.nn.Parameter(weight)).sha256 == stage.encode(weight).sha256


def check_input_is_not_modified(stage: Stage) -> None:
    for dtype in (torch.float32, torch.float64):
        weight = gaussian((13, 37)).to(dtype)
        before = weight.clone()
        packed = stage.encode(weight)
        planes = {plane.name: plane.values.clone() for plane in packed}
        stage.decode(packed).zero_()
        assert torch.equal(weight, before)
        assert all(torch.equal(plane.values, planes[plane.name]) for plane in packed), "decode changed the planes"


def check_not_finite(stage: Stage) -> None:
    weight = gaussian((13, 37))
    weight[0, :2] = math.nan
    weight[1, 0], weight[1, 1], weight[12, 36] = math.inf, -math.inf, math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(BadInput) as caught:
            stage.encode(weight.to(dtype), name="layers.3.q_proj")
        message = str(caught.value)
        assert all(part in message for part in ("layers.3.q_proj", "2 NaN", "3 infinite", str(13 * 37))), message
    with pytest.raises(BadInput, match="1 infinite"):
        stage.encode(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


def check_no_matrix(stage: Stage) -> None:
    wrong: list[tuple[Any, str]] = [
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(()), r"\[\]"),
        (torch.zeros(2, 2, 2), r"\[2, 2, 2\]"),
        (torch.zeros(0, 4), r"\[0, 4\]"),
        (torch.zeros(4, 0), r"\[4, 0\]"),
        ([[1.0]], "list"),
        (torch.zeros(2, 2, dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 2, dtype=torch.bool), "torch.bool"),
        (torch.zeros(2, 2, dtype=torch.complex64), "torch.complex64"),
    ]
    for weight, found in wrong:
        with pytest.raises(BadInput, match=rf"^layers.3.q_proj: .*{found}"):
            stage.encode(weight, name="layers.3.q_proj")


def check_json_round_trip(stage: Stage) -> None:
    assert stages.from_json(json.loads(json.dumps(stage.to_json()))) == stage
    assert stage.to_json()["stage"] == stage.name


def check_parse_round_trip(stage: Stage) -> None:
    assert stages.parse(str(stage)) == stage
    if isinstance(stage, Refined):
        assert type(stages.parse(f"{stage.first} | entropy")) is Refined
    else:
        assert type(stages.parse(stage.name)) is type(stage)


CHECKS: tuple[Callable[[Stage], None], ...] = (
    check_round_trip_through_disk,
    check_exact_bits,
    check_damaged_codes_are_refused,
    check_entropy_coding_loses_nothing,
    check_planes_are_of_their_coding,
    check_statistics_change_no_determinism,
    check_layout,
    check_deterministic,
    check_thread_count_on_a_large_weight,
    check_zero_weights,
    check_constant_weights,
    check_tiny_and_huge_weights,
    check_error_does_not_depend_on_scale,
    check_input_dtypes,
    check_other_strides,
    check_input_is_not_modified,
    check_not_finite,
    check_no_matrix,
    check_json_round_trip,
    check_parse_round_trip,
)


def checks(stage: Stage) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of every check that applies to this stage."""
    for check in CHECKS:
        if check is check_error_does_not_depend_on_scale and stage.name not in SCALE_FREE:
            continue
        if check is check_entropy_coding_loses_nothing and not isinstance(stage, Refined):
            continue
        if check is check_damaged_codes_are_refused and not any(is_coded(c) for c, _ in stage.layout((13, 37)).values()):
            continue
        yield check.__name__.removeprefix("check_"), partial(check, stage)
