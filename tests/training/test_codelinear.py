"""Codes that are trained: the forward pass is what is stored, the gradients are right, and the bytes are kept to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import agentforge as af
from agentforge import stages
from agentforge.allocation import Budget, fit
from agentforge.artifact import Artifact
from agentforge.bits import unzigzag
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.planes import Packed
from agentforge.stages.ecsq import ECSQ, factors
from agentforge.statistics import Calibration
from agentforge.training import recover as module
from agentforge.training.distil import distillation
from agentforge.training.recover import Settings, recover
from agentforge.training.student import MARGIN, SPAN, CodeLinear, _nearest, within

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)
QUICK = Settings(steps=30, batch=4, context=32, lr=1e-2, evaluate=10, heldout=64)
CALIBRATION = Calibration("selftext", 512, 64, 256)


def layer_of(
    step: float = 0.8, rounding: float = 0.44, gains: bool = False, seed: int = 0
) -> tuple[CodeLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(48, 40)
    weight = torch.randn(40, 48, generator=generator) * torch.rand(40, 1, generator=generator)
    stage = ECSQ(step=step, gains=gains)
    return CodeLinear(dense, stage, stage.encode(weight), weight), weight


@pytest.mark.parametrize("gains", [False, True])
def test_at_the_start_the_layer_computes_what_is_stored(gains: bool) -> None:
    layer, _ = layer_of(gains=gains)
    stored = dataclasses.replace(layer.stage, gains=gains).decode(layer.planes)
    assert torch.equal(layer.dense().detach(), stored)
    packed = layer.packed()
    assert torch.equal(packed["codes"].to(torch.int64), layer.planes["codes"].to(torch.int64))
    assert torch.equal(layer.stage.decode(packed), stored)
    x = torch.randn(3, 48)
    assert torch.allclose(layer(x), nn.functional.linear(x, stored, layer.bias), atol=1e-6)


def test_latent_values_are_the_nearest_that_give_the_codes() -> None:
    """Against a search over a fine grid of the code's own cell."""
    generator = torch.Generator().manual_seed(1)
    values, codes = 3 * torch.randn(200, generator=generator), torch.randint(-3, 4, (200,), generator=generator).float()
    found = _nearest(values, codes, 0.44)
    grid = torch.linspace(-6, 6, 24001)
    rounded = (grid.abs() + 0.44).floor().copysign(grid)
    assert torch.equal((found.abs() + 0.44).floor().copysign(found) + 0.0, codes)
    for value, code, mine in zip(values.tolist(), codes.tolist(), found.tolist(), strict=True):
        cell = grid[rounded == code]
        best = min(abs(value - float(cell.min())), abs(value - float(cell.max())))
        best = 0.0 if cell.min() <= value <= cell.max() else best
        assert best - 2e-3 <= abs(value - mine) <= best + MARGIN + 2e-3


def test_gradients_straight_through_codes_and_exact_in_gains() -> None:
    layer, _ = layer_of()
    with torch.no_grad():
        layer.gains.copy_(torch.linspace(0.5, 1.5, 40).half().float())
    upstream = torch.randn(40, 48, generator=torch.Generator().manual_seed(2))
    (layer.dense() * upstream).sum().backward()
    rows, columns = factors(layer.planes)
    step = rows[:, None] * columns * layer.planes["step"]
    assert layer.latent.grad is not None and layer.gains.grad is not None
    torch.testing.assert_close(layer.latent.grad, upstream * step * layer.gains.detach()[:, None] * SPAN)
    codes = unzigzag(layer.planes["codes"]).float()
    torch.testing.assert_close(layer.gains.grad, (upstream * codes * step).sum(1), rtol=1e-4, atol=1e-5)


def test_what_is_stored_is_the_forward_pass_after_training() -> None:
    layer, _ = layer_of()
    with torch.no_grad():
        layer.latent.add_(0.03 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3)))
        layer.gains.mul_(1.2345)
    packed = layer.packed()
    assert not torch.equal(packed["codes"].long(), layer.planes["codes"].long())
    torch.testing.assert_close(layer.stage.decode(packed), layer.dense().detach(), rtol=1e-6, atol=0)


def test_bytes_are_kept_to_by_shrinking_latent_values() -> None:
    layers = {str(seed): layer_of(seed=seed, step=0.2)[0] for seed in range(3)}
    whole = within(layers, 1 << 40)
    assert all(torch.equal(whole[name]["codes"], layer.packed()["codes"]) for name, layer in layers.items())
    size = sum(plane.stored().nbytes for packed in whole.values() for plane in packed)
    less = within(layers, size - 40)
    assert sum(plane.stored().nbytes for packed in less.values() for plane in packed) <= size - 40
    before, after = (sum(int(unzigzag(p["codes"]).abs().sum()) for p in found.values()) for found in (whole, less))
    assert 0.9 * before < after < before
    with pytest.raises(BadInput, match="lower the learning rate"):
        within(layers, size // 2)


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


@pytest.fixture(scope="module")
def fitted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("fitted") / "fit"
    return fit(
        af.open_model(tiny_llama),
        out,
        Budget(bits=2.2),
        ladder=[stages.get("ecsq", step=round(0.6 * 2 ** (k / 2), 6)) for k in range(-7, 4)],
        embeddings="keep",
        calibration=CALIBRATION,
        text="selftext",
        tokens=127,
        progress=False,
    ).artifact


def planes_of(artifact: Artifact) -> int:
    return sum(row["bytes"] for row in artifact.rows if row["stage"])


def test_a_fitted_model_recovers_within_its_bytes(fitted: Artifact, tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    most = planes_of(fitted) + 2 * sum(w.shape[0] for w in model.weights()) - 100
    done = recover(
        model, tmp_path / "out", None, QUICK, start=fitted, most_bytes=most, text=TEXT, device="cpu", progress=False
    )
    assert done.after.kl < 0.8 * done.before.kl
    assert planes_of(done.artifact) <= most
    assert done.artifact.verify()
    assert all(stages.from_json(row["stage"]).gains for row in done.artifact.rows if row["stage"])  # type: ignore[attr-defined]
    found, before = (
        af.divergence(af.load(one.path), model, text=TEXT, context=32, tokens=200, progress=False).kl.value
        for one in (done.artifact, fitted)
    )
    assert found < 0.8 * before
    assert found == pytest.approx(done.after.kl, rel=0.35)  # other windows of the same text


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


def test_a_killed_run_goes_on_to_the_same_bytes(
    fitted: Artifact, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = af.open_model(tiny_llama)
    quick = dataclasses.replace(QUICK, steps=8, evaluate=3)
    whole = recover(model, tmp_path / "whole", None, quick, start=fitted, text=TEXT, device="cpu", progress=False)
    step = module._Run._one_step

    def killed(run: module._Run) -> float:
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_one_step", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(model, tmp_path / "parts", None, quick, start=fitted, text=TEXT, device="cpu", progress=False)
    parts = recover(model, tmp_path / "parts", None, quick, start=fitted, text=TEXT, device="cpu", progress=False)
    assert [row["sha256"] for row in parts.artifact.rows] == [row["sha256"] for row in whole.artifact.rows]


def test_what_cannot_be_trained_is_refused(fitted: Artifact, tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    other = af.compress(model, "rounding:bits=4", out=tmp_path / "rounded", progress=False)
    ends = af.compress(model, "ecsq", out=tmp_path / "ends", embeddings=True, calibration=CALIBRATION, progress=False)
    for settings, words in (
        ({"start": other}, "codes are trained of ecsq"),
        ({"start": ends}, "encodes model.embed_tokens.weight; recovery trains linear layers"),
        ({}, "no artifact to start with"),
        ({"start": fitted, "names": [model.weights()[0].name]}, "names=None"),
    ):
        with pytest.raises(BadInput, match=words):
            recover(model, tmp_path / "no", None, QUICK, text=TEXT, progress=False, **settings)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("no")]
    with pytest.raises(BadInput, match="most_bytes"):
        recover(model, tmp_path / "no", "ternary", QUICK, text=TEXT, most_bytes=10, progress=False)
