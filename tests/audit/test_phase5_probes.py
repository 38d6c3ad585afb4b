"""The probes of the Phase 5 checks: what they compare, and which of the stages they take."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agentforge import audit
from agentforge.audit import judge, probes
from agentforge.audit import workshop as shops
from agentforge.audit.workshop import Workshop
from agentforge.evaluation import Measurement
from reports.claims_vs_measurements import phase5

RIGHT = {
    "original": 30,
    "rounding:bits=8": 29,
    "rounding:bits=4": 26,
    "rounding:bits=2": 12,
}  # of 40 questions: 75, 72.5, 65 and 30%
CLAIMS = {claim.id: claim for claim in audit.read_claims("claims_vs_measurements").claims}


class Named:
    """A model, or an artifact, by its stage alone."""

    def __init__(self, name: str) -> None:
        self.name = self.path = self.fingerprint = name


@pytest.fixture
def workshop(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop whose models have known numbers of answers right, each those of a better one but for some."""
    made = audit.workshop_for(str(tiny_llama), tmp_path, "selftext", 127, 128)
    made.effort = shops.EFFORTS["smoke"]
    original: Any = Named("original")
    made.model = original
    level = Measurement(19.0, "level", 2.0, 80, {"on_scale": True})
    found = type("Found", (), {"level": level, "at": 19})
    monkeypatch.setattr(Workshop, "artifact", lambda _, stage: Named(stage))
    monkeypatch.setattr(phase5, "load", Named)
    monkeypatch.setattr(phase5, "edge_of_chaos", lambda *_, **__: found)

    def answers(model: Named, asked: list[Any], progress: bool) -> torch.Tensor:
        assert len(asked) == 40 and {question.level for question in asked} == {19}
        return (torch.arange(40) < RIGHT[model.name]).double()

    monkeypatch.setattr(phase5, "right_answers", answers)
    return made


def exactly(measured: Measurement) -> Measurement:
    """The same value, as if it were of all questions that there are and not of forty."""
    return dataclasses.replace(measured, stderr=None, interval=None, error="exact")


def test_accuracy_and_what_is_kept_are_of_the_same_questions(workshop: Workshop) -> None:
    assert probes.run(workshop, "edge_accuracy", {}).value == 30 / 40
    found = probes.run(workshop, "edge_accuracy", {"stage": "rounding:bits=8"})
    assert (found.value, found.n) == (29 / 40, 40)
    assert found.stderr == pytest.approx(math.sqrt(0.725 * 0.275 / 40))
    kept = probes.run(workshop, "edge_kept", {"stage": "rounding:bits=4"})
    assert kept.value == pytest.approx(26 / 30)
    # By hand: four of 40 pairs differ; the ratio's residuals are 1 - r where both are right, -r where only the first is.
    r = 26 / 30
    assert kept.stderr == pytest.approx(math.sqrt((26 * (1 - r) ** 2 + 4 * r**2) / 39) / (0.75 * math.sqrt(40)))


def test_the_lowest_of_what_keeps_enough_is_taken(workshop: Workshop) -> None:
    found = probes.run(
        workshop, "edge_of_what_passes", {"stages": ["rounding:bits=8", "rounding:bits=4", "rounding:bits=2"], "least": 0.84}
    )
    assert found.value == 26 / 40  # 87% kept, and yet below 70%; 40% kept does not count
    assert found.protocol["kept"] == pytest.approx(
        {"rounding:bits=8": 29 / 30, "rounding:bits=4": 26 / 30, "rounding:bits=2": 0.4}
    )
    assert judge(CLAIMS["contradiction_11.measured"], exactly(found)).verdict == "refuted"
    alone = probes.run(workshop, "edge_of_what_passes", {"stages": ["rounding:bits=8"], "least": 0.84})
    assert judge(CLAIMS["contradiction_11.measured"], exactly(alone)).verdict == "confirmed"
    with pytest.raises(audit.Unmeasured, match="keeps 84%"):
        probes.run(workshop, "edge_of_what_passes", {"stages": ["rounding:bits=2"], "least": 0.84})


def test_a_model_that_forgot_everything_turns_the_gate_red(workshop: Workshop) -> None:
    row = CLAIMS["p8_25.edge_4_bits"]
    for stage, verdict in (("rounding:bits=8", "confirmed"), ("rounding:bits=4", "partly"), ("rounding:bits=2", "refuted")):
        assert judge(row, exactly(probes.run(workshop, "edge_accuracy", {"stage": stage}))).verdict == verdict
