"""Refined stages: what is written is read, what is lossless is so to the bit, and what makes no sense is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from agentforge import stages
from agentforge.errors import BadInput
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


@pytest.mark.parametrize("text", ["vptq:v=4,k=16|entropy", "ternary | entropy"])
def test_text_and_json_come_back(text: str) -> None:
    stage = stages.parse(text)
    assert stages.parse(str(stage)) == stage
    assert stages.from_json(json.loads(json.dumps(stage.to_json()))) == stage
    assert stage.encode(WEIGHT).sha256 == stages.from_json(stage.to_json()).encode(WEIGHT).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounding | zip", "refinement 'zip'; expected entropy"),
        ("rounding | entropy | entropy", "expected entropy"),
        ("rounding | ", "expected entropy"),
        ("rounding | scale=ternary", "expected entropy"),
        ("nothing | entropy", "stage 'nothing' does not exist"),
    ],
)
def test_text_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.parse(text)


def test_what_is_refined_is_not_refined_again() -> None:
    with pytest.raises(BadInput, match="entropy-coded already"):
        Refined(stages.parse("rounding | entropy")).check()


@pytest.mark.parametrize(
    "change",
    [
        {"entropy": 1},
        {"planes": None},
        {"planes": [["scale", {"stage": "ternary"}]]},  # as earlier versions wrote them
        {"entropy": False},
        {"first": {"stage": "refined"}},
        {"first": "rounding"},
        {"more": 1},
    ],
)
def test_hostile_json_is_refused(change: dict[str, Any]) -> None:
    data = stages.parse("rounding | entropy").to_json()
    stages.from_json(data)
    with pytest.raises(BadInput):
        stages.from_json({**data, **change})
