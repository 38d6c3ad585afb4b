"""Encoding in the model's order: targets are the least-squares fit to what was lost, in as many bytes."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge import stages
from agentforge.allocation import Budget, fit
from agentforge.artifact import Encoded
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.models import as_matrix
from agentforge.sequential import RIDGE, encode_in_order
from agentforge.statistics import Calibration, collect
from tests.architectures import make
from tests.test_cli import Run, run

__all__ = ["run"]

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)
CALIBRATION = Calibration(TEXT, 120, 48, 48)
STAGE = stages.get("tcq", step=0.8)


def in_order(model: Any, plan: dict[str, stages.Stage] | None = None) -> dict[str, Encoded]:
    plan = plan or {weight.name: STAGE for weight in model.weights()}
    found: dict[str, Encoded] = {}
    known = collect(model, CALIBRATION, progress=False)
    encode_in_order(model, plan, {}, known, CALIBRATION, found.__setitem__, progress=False)
    return found


ADDING = {  # layers that add to the residual stream, and the norms that read it before they do
    "Llama": (("o_proj", "down_proj"), ("input_layernorm", "post_attention_layernorm")),
    "GPT2": (("attn.c_proj", "mlp.c_proj"), ("ln_1", "ln_2")),
    "OPT": (("out_proj", "fc2"), ("self_attn_layer_norm", "final_layer_norm")),
    "MiniCPM3": (("o_proj", "down_proj"), ("input_layernorm", "post_attention_layernorm")),  # times 2.1
}


@pytest.mark.parametrize("kind", ADDING)
def test_targets_are_the_least_squares_fit_to_what_was_lost(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models whole, one layer after the other, and a stacked system for lstsq in place of moments."""
    scaled = {"scale_depth": 3.0} if kind == "MiniCPM3" else {}
    model = af.open_model(make(kind, tmp_path / kind, max_position_embeddings=64, **scaled))
    seen: dict[str, tuple[torch.Tensor, Any, torch.Tensor]] = {}
    encode = stages.Stage.encode

    def watched(stage: Any, weight: torch.Tensor, stats: Any = None, *rest: Any, **about: Any) -> Any:
        packed = encode(stage, weight, stats, *rest, **about)
        seen[about["name"]] = weight, stats, stage.decode(packed)
        return packed

    monkeypatch.setattr(stages.Stage, "encode", watched)
    assert in_order(model).keys() == seen.keys()
    ours = model.model
    theirs = copy.deepcopy(ours)
    ids = model.encode(TEXT.text)[:120]
    windows = [torch.tensor([ids[i : i + 48]]) for i in range(0, 120, 48)]
    weights = {weight.name: weight for weight in model.weights()}
    adds, norms = ADDING[kind]
    part = model.config["scale_depth"] / model.config["num_hidden_layers"] ** 0.5 if "scale_depth" in model.config else 1
    order: list[str] = []
    for name in weights:
        ours.get_submodule(name.removesuffix(".weight")).register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        ours(windows[0])
        for name, weight in [(name, weights[name]) for name in list(order)]:
            owner = name.removesuffix(".weight")
            block = owner[: owner.index(".", owner.index("0" if ".0." in owner else "1"))]
            which = norms[[owner.endswith(end) for end in adds].index(True)] if owner.endswith(adds) else None
            inputs: list[list[torch.Tensor]] = []
            streams: list[list[torch.Tensor]] = []
            for module in (ours, theirs):
                x, r = [], []  # type: ignore[var-annotated]
                hooks = [
                    module.get_submodule(owner).register_forward_pre_hook(lambda _, a, x=x: x.append(a[0].flatten(0, -2)))
                ]
                if which:
                    norm = module.get_submodule(f"{block}.{which}")
                    hooks.append(norm.register_forward_pre_hook(lambda _, a, r=r: r.append(a[0].flatten(0, -2))))
                for window in windows:
                    module(window)
                for hook in hooks:
                    hook.remove()
                inputs.append(x)
                streams.append(r)
            dense = weight.load().double()
            x, small = (torch.cat(each).double() for each in inputs)
            wanted = x @ dense.T
            if which:
                wanted += (torch.cat(streams[0]) - torch.cat(streams[1])).double() / part
            root = (RIDGE * small.square().mean() * len(small)).sqrt()
            stacked = torch.cat([small, root * torch.eye(small.shape[1])])
            expected = torch.linalg.lstsq(stacked, torch.cat([wanted, root * dense.T])).solution.T
            target, stats, decoded = seen[name]
            torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-4 * float(dense.abs().max()))
            torch.testing.assert_close(stats.hessian.double(), small.T @ small / len(small), rtol=1e-4, atol=1e-5)
            theirs.get_parameter(name).copy_(as_matrix(decoded, weight.transposed))
    assert any((target - weights[name].load()).norm() > 0.05 * target.norm() for name, (target, *_) in seen.items())


def test_cores_and_blocks_in_memory_change_no_byte(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = af.open_model(tiny_llama)
    assert whole.model is not None
    found = in_order(af.open_model(tiny_llama))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert {name: one.sha256 for name, one in in_order(whole).items()} == {n: one.sha256 for n, one in found.items()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.model.modules())


@pytest.mark.parametrize("budget", [Budget(bits=2.4), Budget(bytes=400_000)])
def test_fit_in_order_is_closer_to_the_original_in_as_many_bytes(tiny_llama: Path, tmp_path: Path, budget: Budget) -> None:
    about: dict[str, Any] = {"calibration": Calibration(TEXT, 480, 48, 96), "text": TEXT, "tokens": 400, "progress": False}
    about["embeddings"] = "keep" if budget.bits else None
    plain = fit(tiny_llama, tmp_path / "plain", budget, **about)
    made = fit(tiny_llama, tmp_path / "made", budget, sequential=True, **about)
    if budget.bits:
        assert made.bits <= budget.bits
    assert made.artifact.weight_bytes <= (budget.bytes or plain.artifact.weight_bytes + 100)
    assert made.measured.kl.value < 0.9 * plain.measured.kl.value
    assert made.artifact.manifest["recipe"]["ready_by"] == "sequential" and made.artifact.verify()
    again = fit(tiny_llama, tmp_path / "again", budget, sequential=True, **about)
    assert again.artifact.sha256 == made.artifact.sha256


def test_a_model_that_is_too_large_in_order_is_allocated_less(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    in_order_ = af.allocation.Search._in_order

    def larger(*about: Any) -> int:
        sizes.append(in_order_(*about) + (500 if not sizes else 0))
        return sizes[-1]

    monkeypatch.setattr(af.allocation.Search, "_in_order", larger)
    about: dict[str, Any] = {
        "embeddings": "keep",
        "calibration": CALIBRATION,
        "text": TEXT,
        "tokens": 100,
        "progress": False,
    }
    found = fit(tiny_llama, tmp_path / "out", Budget(bits=2.4), sequential=True, **about)
    assert found.bits <= 2.4 and len(sizes) > 1 and sizes[-1] < sizes[0] - 500


@pytest.mark.parametrize(
    ("kind", "words"),
    [("Gemma2", "adds more than its layers give"), ("Mixtral", "is of experts")],
)
def test_models_that_do_not_add_up_are_refused(kind: str, words: str, tmp_path: Path) -> None:
    model = af.open_model(make(kind, tmp_path / kind, max_position_embeddings=64))
    with pytest.raises(BadInput, match=words):
        in_order(model)


def test_what_does_not_go_together_is_refused_before_anything_is_read(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, _, error = run("fit", str(tiny_llama), "--sequential", "--for", "gguf", "--bytes", "1MB", "--out", out)
    assert code == 2 and "no other limit, stage, order or training" in error
    with pytest.raises(BadInput, match="cuda"):
        fit(tiny_llama, out, Budget(bits=3.0), sequential=True, device="cuda", progress=False)


def test_the_command_line_encodes_in_order(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    how = ("--calibration-tokens", "256", "--tokens", "100", "--bits", "3", "--embeddings", "keep")
    code, _, error = run("fit", str(tiny_llama), *how, "--sequential", "--out", str(tmp_path / "out"))
    assert code == 0, error
    assert af.artifact.Artifact(tmp_path / "out").manifest["recipe"]["ready_by"] == "sequential"
