"""What the audit itself rests on: texts apart, picks, commits, the cache, drops, parameters, samples and directions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentforge import audit, evaluation
from agentforge.audit import probes
from agentforge.audit import workshop as shops
from agentforge.errors import AgentForgeError
from agentforge.evaluation import Text, find_text
from agentforge.evaluation.texts import selftexts
from agentforge.opening import load, open_model
from agentforge.pipeline import compress
from agentforge.statistics import Calibration
from agentforge.training.phase import Phase
from reports.claims_vs_measurements.own import PIECE, calibration_windows
from reports.phase4_bitnet import training

CLAIMS = [claim for claim in audit.read_claims("claims_vs_measurements").claims if claim.id.startswith("self.")]


@pytest.fixture(scope="module")
def workshop(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> shops.Workshop:
    return audit.workshop_for(str(tiny_llama), tmp_path_factory.mktemp("self"), "selftext", 127, 128)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_what_the_audit_rests_on_holds(workshop: shops.Workshop, claim: audit.Claim) -> None:
    """That each of these rows sees its fault is in test_mutations.py."""
    assert claim.probe is not None
    assert audit.judge(claim, probes.run(workshop, claim.probe, claim.parameters)).verdict == "confirmed"


def test_a_row_about_speed_says_what_llama_cpp_does_on_the_same_model() -> None:
    """As reports/runtime.md has it: megabytes held, and the time of a token in units of bfloat16's."""
    table = (Path(__file__).parents[2] / "reports" / "runtime" / "runtime.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| `llama.cpp")]
    said = training._in_llama_cpp()
    assert len(rows) == 3 and "AMD EPYC" in said
    for row in rows:
        size, times = re.search(rf"({row[3]}) MB ([\d.]+)x", said).groups()  # type: ignore[union-attr]
        assert float(times) == pytest.approx(1 / float(row[7].split()[0]), rel=0.03), size


def test_the_splits_of_a_text_share_no_text() -> None:
    scored, calibrated = find_text("selftext"), Calibration().find()
    assert scored.sha256 != calibrated.sha256
    assert not set(selftexts("heldout")) & set(selftexts("calibration"))
    begin = [text[:PIECE] for text in selftexts("calibration") if len(text) >= PIECE]
    assert sum(piece in scored.text for piece in begin) < len(begin) / 1000  # "Once upon a time", not a text twice


def test_a_calibration_text_is_found_wherever_it_stands_in_the_scored_one(workshop: shops.Workshop) -> None:
    """Its own text holds all of it, whatever hash and name the scored one has; half of it half."""
    calibrated = Calibration().find().text
    for text, low, high in ((f"Preface. {calibrated}", 1.0, 1.0), (calibrated[:2000], 0.3, 0.7)):
        here = dataclasses.replace(workshop, text=Text("another", "file", text))
        assert low <= probes.run(here, "calibration_in_the_scored_text", {}).value <= high
    windows = calibration_windows(workshop)
    assert sum(window.numel() for window in windows) > workshop.effort.calibration


def test_a_probe_that_calibrates_no_more_is_noticed(workshop: shops.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shops.Workshop, "artifact", lambda *_: None)
    with pytest.raises(AgentForgeError, match="without collecting statistics"):
        calibration_windows(workshop)


def test_the_sample_has_all_kinds_of_matrices_and_all_depths() -> None:
    """Of 30 blocks of seven matrices, as the default model has them, and of blocks of four."""
    for kinds, blocks in ((7, 30), (4, 12)):
        weights = [SimpleNamespace(name=f"{block}.{kind}") for block in range(blocks) for kind in range(kinds)]
        model = cast(Any, SimpleNamespace(weights=lambda weights=weights: weights))
        for effort in (shops.EFFORTS["standard"], shops.EFFORTS["full"]):
            shop = shops.Workshop(model, Path(), Text("none", "file", ""), 2, effort=effort)
            names = [weight.name.split(".") for weight in shop.sample()]
            if len(names) >= kinds:
                assert len({kind for _, kind in names}) == kinds
            assert {3 * int(block) // blocks for block, _ in names} == {0, 1, 2}


def test_a_drop_of_accuracy_varies(workshop: shops.Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse and fine artifacts of digits-mlp, their hits counted from logits."""
    model, drops = open_model("digits-mlp"), []
    for name, stage in (("fine", "rounding:bits=8"), ("coarse", "ternary:rule=threshold,tau=2.0")):
        made = compress(model, stage, tmp_path / name / "quantized", progress=False)
        kept = evaluation.accuracy(load(made.path)).value / evaluation.accuracy(model).value
        done = Phase(tmp_path / name, {}, [], True)
        monkeypatch.setattr(training, "_digits_phase", lambda _, done=done: done)
        drops.append(probes.run(workshop, "accuracy_drop", {}).value)
        assert drops[-1] == pytest.approx(1 - kept, abs=1e-12)
    assert drops[0] < 0.02 and drops[1] > 0.1
