"""Gains of rows: those of least damage, and trained while the codes stay, within the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import agentforge as af
from agentforge import stages
from agentforge.allocation import Budget, fit
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.planes import Packed
from agentforge.statistics import Calibration
from agentforge.training.distil import distillation
from agentforge.training.recover import Settings, recover

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)
QUICK = Settings(steps=30, batch=4, context=32, lr=1e-2, evaluate=10, heldout=64)
CALIBRATION = Calibration("selftext", 512, 64, 256)


def test_gains_are_the_factors_of_least_damage() -> None:
    """No other gain of a row leaves less of tr(E H E^T), by brute force over a grid around it."""
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(12, 32, generator=generator), torch.randn(256, 32, generator=generator)
    stats = af.statistics.InputStatistics(inputs.T @ inputs / 256, 256)
    stage = stages.get("ecsq", step=1.5, gains=True)
    packed = stage.encode(weight, stats)
    base = dataclasses.replace(stage, gains=False)
    plain = base.decode(base.packed(packed.shape, {p.name: p.values for p in packed})).double()

    def lost(gains: torch.Tensor) -> torch.Tensor:
        error = plain * gains[:, None] - weight
        return ((error @ stats.hessian.double()) * error).sum(1)

    found = packed["gains"].double()
    best = torch.stack([lost(torch.full((12,), g, dtype=torch.float64)) for g in torch.linspace(0.5, 2, 3001).tolist()])
    assert (lost(found) <= best.amin(0) * (1 + 1e-4)).all()
    assert lost(found).sum() < 0.995 * lost(torch.ones(12, dtype=torch.float64)).sum()
    assert sum(p.bits for p in packed if p.name == "gains") == 16 * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    ours, theirs = (3 * torch.randn(100, 257, generator=generator, dtype=torch.float32) for _ in range(2))
    ours, theirs = ours.to(dtype).requires_grad_(), theirs.to(dtype)
    loss = distillation(ours, theirs)
    (2 * loss).backward()
    again = ours.detach().float().requires_grad_()
    expected = nn.functional.kl_div(
        again.log_softmax(-1), theirs.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (2 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None and again.grad is not None
    exact = 1e-6 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(ours.grad.float(), again.grad, rtol=exact, atol=1e-7 if dtype == torch.float32 else 1e-6)


def test_gains_recover_within_the_budget_while_the_codes_of_a_trellis_stay(tiny_llama: Path, tmp_path: Path) -> None:
    model, about = af.open_model(tiny_llama), {"calibration": CALIBRATION, "text": TEXT, "tokens": 200, "progress": False}
    plain = fit(model, tmp_path / "plain", Budget(bits=2.2), embeddings="keep", **about)  # type: ignore[arg-type]
    gains = 16 * sum(w.shape[0] for w in model.weights()) / sum(w.shape[0] * w.shape[1] for w in model.weights())
    made = fit(model, tmp_path / "made", Budget(bits=2.2 + gains), recovery=QUICK, **about)  # type: ignore[arg-type]
    assert made.bits <= 2.2 + gains
    assert made.measured.kl.value < 0.9 * plain.measured.kl.value
    for row, other in zip(made.artifact.rows, plain.artifact.rows, strict=True):
        if row["stage"]:
            assert row["stage"] == other["stage"] | {"gains": True} and row["stage"]["stage"] == "tcq"
            found, before = made.artifact.read(row), plain.artifact.read(other)
            assert isinstance(found, Packed) and isinstance(before, Packed)
            assert torch.equal(found["codes"], before["codes"])
            assert (found["gains"] != 1).any()


def test_what_cannot_be_trained_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    other = af.compress(model, "rounding:bits=4", out=tmp_path / "rounded", progress=False)
    codes = af.compress(model, "ecsq", out=tmp_path / "ecsq", calibration=CALIBRATION, progress=False)
    ends = af.compress(model, "ecsq", out=tmp_path / "ends", embeddings=True, calibration=CALIBRATION, progress=False)
    for settings, words in (
        ({"start": other}, "rounding:.* has no codes along a trellis"),
        ({"start": codes}, "ecsq:.* has no codes along a trellis"),
        ({"start": ends}, "encodes model.embed_tokens.weight; recovery trains linear layers"),
        ({}, "no artifact to start with"),
        ({"start": ends, "names": [model.weights()[0].name]}, "names=None"),
    ):
        with pytest.raises(BadInput, match=words):
            recover(model, tmp_path / "no", None, QUICK, text=TEXT, progress=False, **settings)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("no")]
    with pytest.raises(BadInput, match="most_bytes"):
        recover(model, tmp_path / "no", "ternary", QUICK, text=TEXT, most_bytes=10, progress=False)
