"""Codes that stay: window by window and block by block give the loss and the gradients of the whole models."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import agentforge as af
from agentforge import stages
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.planes import Packed
from agentforge.stages.tcq import TCQ
from agentforge.statistics import Calibration
from agentforge.training import distil
from agentforge.training import recover as module
from agentforge.training.distil import Pair
from agentforge.training.recover import Settings, recover
from agentforge.training.student import GainLinear, put_codes

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)
QUICK = Settings(steps=8, batch=4, context=32, lr=1e-2, evaluate=3, heldout=64)
WINDOWS = torch.stack([torch.arange(i, i + 24) % 60 for i in range(4)])


@pytest.fixture(scope="module")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    calibration = Calibration(TEXT, 128, 32, 64)
    out = tmp_path_factory.mktemp("trellis") / "start"
    return af.compress(af.open_model(tiny_llama), "tcq:step=0.8", out, calibration=calibration, progress=False)


@pytest.fixture
def blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is small."""
    monkeypatch.setattr(distil, "SMALL", 0)


def trained(pair: Pair) -> Pair:
    """With all vectors of the blocks and the layers to be trained."""
    for name, parameter in pair.student.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1 and ".layers." in name)
    return pair


def paired(folder: Path, start: Artifact, *how: Any) -> Pair:
    return trained(Pair(af.open_model(folder), start, torch.device("cpu"), *how))


def whole_pair(folder: Path, start: Artifact, at_once: int) -> Pair:
    """In memory, some windows together, as models without an artifact are trained."""
    pair = Pair(af.open_model(folder), None, torch.device("cpu"), at_once, False)
    for name, read in put_codes(start, pair.student).items():
        pair.student.get_parameter(name).data = read()
    return trained(pair)


def gradients(pair: Pair) -> tuple[float, dict[str, torch.Tensor]]:
    loss = pair.gradients(WINDOWS)
    return loss, {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}


def resident(student: nn.Module) -> set[str]:
    """The blocks that have matrices in memory."""
    there = [name for name, p in student.named_parameters() if p.dim() > 1 and any(p.stride())]
    return {".".join(name.split(".")[:3]) for name in there}


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_gradients_are_those_of_the_whole_models(tiny_llama: Path, start: Artifact, at_once: int) -> None:
    whole, windows = whole_pair(tiny_llama, start, at_once), paired(tiny_llama, start, at_once, False)
    (loss, expected), (found_loss, found) = gradients(whole), gradients(windows)
    assert found_loss == pytest.approx(loss, rel=1e-5) and loss > 1e-4
    assert found.keys() == expected.keys() and sum("gains" in name for name in found) == 14
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    for one, other in zip(zip(*whole.beside(WINDOWS), strict=True), zip(*windows.beside(WINDOWS), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_block_by_block_is_the_same_bits(
    tiny_llama: Path, start: Artifact, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = paired(tiny_llama, start, 2, half)
    monkeypatch.setattr(distil, "SMALL", 0)
    blocks = paired(tiny_llama, start, 2, half)
    assert windows.passes is None and blocks.passes is not None
    (loss, expected), (found_loss, found) = gradients(windows), gradients(blocks)
    assert loss == found_loss and found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    for one, other in zip(windows.beside(WINDOWS), blocks.beside(WINDOWS), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.usefixtures("blockwise")
def test_what_is_computed_once_more_is_computed_in_half_floats_too(tiny_llama: Path, start: Artifact) -> None:
    blocks = paired(tiny_llama, start, 4, True)
    seen: list[tuple[bool, torch.dtype]] = []
    layer = blocks.student.get_submodule("model.layers.1.mlp.down_proj")
    with layer.register_forward_hook(lambda _, __, y: seen.append((torch.is_grad_enabled(), y.dtype))):
        found = gradients(blocks)[1]
    assert sorted(seen, key=str) == [(False, torch.bfloat16)] * 4 + [(True, torch.bfloat16)] * 4
    exact = gradients(whole_pair(tiny_llama, start, 4))[1]
    one, other = (torch.cat([by[name] for name in sorted(exact)]) for by in (exact, found))
    assert 0 < (one - other).norm() < 0.05 * one.norm()


@pytest.mark.usefixtures("blockwise")
def test_one_block_is_in_memory_at_a_time(tiny_llama: Path, start: Artifact) -> None:
    blocks = paired(tiny_llama, start, 4, False)
    seen: list[set[str]] = []
    assert blocks.passes is not None
    for block in blocks.passes[1].blocks:
        block.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: seen.append(resident(blocks.student)))
    gradients(blocks)
    assert len(seen) == 2 * 2 * len(WINDOWS)  # blocks, there and back
    assert {name for names in seen for name in names} == {"model.layers.0", "model.layers.1"}
    assert all(len(names) == 1 for names in seen)
    assert not resident(blocks.student)


def test_a_layer_computes_what_is_stored_and_its_gradients_are_those_of_its_weight(start: Artifact) -> None:
    row = next(row for row in start.rows if row["stage"])
    stage, packed = stages.from_json(row["stage"]), start.read(row)
    assert isinstance(stage, TCQ) and isinstance(packed, Packed)
    linear = nn.Linear(*reversed(packed.shape))
    layer = GainLinear(linear, stage, lambda: packed)
    layer.still.data = layer.multiples()
    assert torch.equal(stage.decode(packed), layer.stage.decode(layer.packed()))
    with torch.no_grad():
        layer.floats["gains"] *= torch.linspace(0.8, 1.25, packed.shape[0])
        layer.floats["step"] *= 1.1
    x = torch.randn(7, packed.shape[1], generator=torch.Generator().manual_seed(0))
    decoded = layer.stage.decode(layer.packed()).requires_grad_()
    expected, y = nn.functional.linear(x, decoded, linear.bias), layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight, decoded)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(direction)
    expected.backward(direction)
    assert decoded.grad is not None
    of_rows = (decoded.grad * decoded).sum(1)  # times a factor of a row, which multiplies the weight
    for name, expected_ in (("gains", of_rows), ("step", of_rows.sum(0, keepdim=True))):
        value = layer.floats[name]
        torch.testing.assert_close(value.grad * value, expected_, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("small", [0, distil.SMALL])
def test_cores_change_no_byte_and_a_killed_run_goes_on(
    start: Artifact, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(distil, "SMALL", small)
    model, step = af.open_model(tiny_llama), module._Run._one_step
    settings = dataclasses.replace(QUICK, dtype="bfloat16")

    def bytes_of(name: str, cores: int) -> bytes:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        recover(model, tmp_path / name, None, settings, start=start, text=TEXT, device="cpu", progress=False)
        return (tmp_path / name / "model.safetensors").read_bytes()

    def killed(run: module._Run) -> float:
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run)

    few: dict[str, Any] = {"start": start, "most_bytes": sum(row["bytes"] for row in start.rows if row["stage"])}
    with pytest.raises(BadInput, match="are allowed; start with fewer"):  # no room for gains
        recover(model, tmp_path / "no", None, settings, text=TEXT, device="cpu", progress=False, **few)
    whole = bytes_of("whole", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_one_step", killed)
        with pytest.raises(KeyboardInterrupt):
            bytes_of("parts", 4)
    assert bytes_of("parts", 4) == whole
    assert ("model" in vars(model)) == bool(small)  # block by block nothing is built
