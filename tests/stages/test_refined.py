"""Refined stages: what is written is read, what is lossless is so to the bit, and what makes no sense is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from agentforge import stages
from agentforge.errors import BadArtifact, BadInput
from agentforge.planes import Packed, Plane, is_coded
from agentforge.stages.refined import Refined

WEIGHT = 0.1 * torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
LOSSLESS = ["rounding:bits=4,group=8", "ternary", "vptq:v=4,k=16", "trajectory:U=225", "curves:segment=16", "ecsq"]


@pytest.mark.parametrize("text", LOSSLESS)
def test_entropy_coding_is_lossless(text: str) -> None:
    first, both = stages.parse(text), stages.parse(f"{text} | entropy")
    packed, refined = first.encode(WEIGHT), both.encode(WEIGHT)
    assert torch.equal(first.decode(packed), both.decode(refined))
    assert all(is_coded(plane.coding) for plane in refined)
    found = {plane.name: (plane.coding, tuple(plane.values.shape)) for plane in refined}
    assert list(found.items()) == list(both.layout((24, 40)).items())
    back = tuple(Plane.from_stored(n, coding, shape, refined_plane(refined, n)) for n, (coding, shape) in found.items())
    assert Packed((24, 40), back).sha256 == refined.sha256
    assert torch.equal(both.decode(Packed((24, 40), back)), both.decode(refined))
    assert refined.bits <= packed.bits + 8 * 2 * len(packed.planes)  # a byte for each kind, and the last one's rest


def refined_plane(packed: Packed, name: str) -> torch.Tensor:
    return next(plane.stored() for plane in packed if plane.name == name)


@pytest.mark.parametrize("text", ["vptq:v=4,k=16|codebook=rounding:bits=8,group=0 |entropy", "ternary | entropy"])
def test_text_and_json_come_back(text: str) -> None:
    stage = stages.parse(text)
    assert stages.parse(str(stage)) == stage
    assert stages.from_json(json.loads(json.dumps(stage.to_json()))) == stage
    assert stage.encode(WEIGHT).sha256 == stages.from_json(stage.to_json()).encode(WEIGHT).sha256


def test_only_the_named_planes_change() -> None:
    first = stages.parse("vptq:v=4,k=16")
    both = stages.parse("vptq:v=4,k=16 | codebook=rounding:bits=8,group=0")
    packed, refined = first.encode(WEIGHT), both.encode(WEIGHT)
    assert torch.equal(packed["indices"], refined["indices"])
    book = packed["codebook"].float().reshape(-1, 4).T.contiguous()
    by = stages.parse("rounding:bits=8,group=0")
    assert refined.bits == packed.bits - 16 * book.numel() + by.encode(book).bits
    # The weights are those that the first stage decodes from the rounded codebook.
    rounded = by.decode(by.encode(book)).T.reshape(packed["codebook"].shape).half()
    planes = tuple(Plane(p.name, rounded if p.name == "codebook" else p.values, p.coding) for p in packed)
    assert torch.equal(both.decode(refined), first.decode(Packed(packed.shape, planes)))


def test_integers_come_back_as_integers_of_their_width() -> None:
    both = stages.parse("rounding:bits=3,group=0 | codes=curves:degree=7,segment=8")
    packed = stages.parse("rounding:bits=3,group=0").encode(WEIGHT)
    back = both.unrefine(both.refine(packed), stages.parse("rounding:bits=3,group=0").layout((24, 40)))
    assert back["codes"].dtype == torch.uint8 and int(back["codes"].max()) <= 7
    assert (back["codes"].int() - packed["codes"].int()).abs().max() <= 1  # eight numbers, eight points
    over = stages.parse("rounding:bits=3,group=0 | codes=curves:degree=0,segment=960")
    assert (
        stages.parse("rounding:bits=3").decode(packed).isfinite().all() and over.decode(over.encode(WEIGHT)).isfinite().all()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounding | zip", "expected plane=stage, or entropy"),
        ("rounding | entropy | scale=ternary", "expected plane=stage, or entropy"),
        ("rounding | ", "expected plane=stage, or entropy"),
        ("rounding | scale=nothing", "stage 'nothing' does not exist"),
        ("rounding | scale=rounding:bits=8 | scale=ternary", "names a plane twice"),
        ("rounding | scale=vptq:v=4,k=16,shared=true", "without shared planes"),
        ("nothing | entropy", "stage 'nothing' does not exist"),
    ],
)
def test_text_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.parse(text)


def test_an_unknown_plane_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BadInput, match="rounding has no such plane; it has codes, scale, minimum, exponent"):
        stages.parse("rounding | codebook=ternary").encode(WEIGHT)
    with pytest.raises(BadInput, match="refined already"):
        Refined(stages.parse("rounding | entropy"), entropy=True).check()
    with pytest.raises(BadInput, match="names nothing"):
        Refined(stages.parse("rounding")).check()


@pytest.mark.parametrize(
    "change",
    [
        {"entropy": 1},
        {"planes": None},
        {"planes": [["scale"]]},
        {"planes": [[3, {"stage": "ternary"}]]},
        {"first": {"stage": "refined"}},
        {"planes": [["scale", {"stage": "refined"}]]},
        {"first": "rounding"},
        {"more": 1},
    ],
)
def test_hostile_json_is_refused(change: dict[str, Any]) -> None:
    data = stages.parse("rounding | scale=rounding:bits=8 | entropy").to_json()
    with pytest.raises(BadInput):
        stages.from_json({**data, **change})


def test_a_plane_that_decodes_to_nan_is_refused() -> None:
    stage = stages.parse("rounding:bits=4,group=0 | scale=rounding:bits=8,group=0")
    packed = stage.encode(WEIGHT)
    bad = {"scale.scale": torch.full_like(packed["scale.scale"], float("nan"))}
    planes = tuple(Plane(p.name, bad.get(p.name, p.values), p.coding) for p in packed)
    with pytest.raises(BadArtifact, match="plane scale"):
        stage.decode(Packed(packed.shape, planes))
