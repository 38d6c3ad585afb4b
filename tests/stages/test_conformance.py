from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conformance import SETTINGS, checks, every_stage

from agentforge import stages
from agentforge.errors import BadInput
from agentforge.planes import Packed, Plane
from agentforge.stages import Stage

CASES = [pytest.param(check, id=f"{stage}-{name}") for stage in every_stage() for name, check in checks(stage)]


@pytest.mark.parametrize("check", CASES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_every_registered_stage_is_put_through_the_suite() -> None:
    assert {name for name, settings in SETTINGS.items() if settings} == set(stages.names())


@dataclass(frozen=True)
class Careless(Stage):
    """Does nearly everything wrong: the suite must notice."""

    name: ClassVar[str] = "careless"
    calls: ClassVar[list[int]] = []

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"codes": ("uint4", shape)}

    def encode(self, weight: torch.Tensor, stats: object = None, seed: int = 0, *, name: str = "weight") -> Packed:
        self.calls.append(1)
        weight.mul_(2)
        codes = torch.full_like(weight, 1 + len(self.calls) % 14)
        return Packed((weight.shape[0], weight.shape[1]), (Plane("codes", codes.to(torch.uint8), "uint8"),))

    def decode(self, packed: Packed) -> torch.Tensor:
        return packed["codes"].to(torch.float32) / 0


@pytest.mark.parametrize(("name", "check"), list(checks(Careless())))
def test_the_suite_notices_a_careless_stage(name: str, check: Callable[[], None]) -> None:
    with pytest.raises((AssertionError, LookupError, BadInput, pytest.fail.Exception)):
        check()
