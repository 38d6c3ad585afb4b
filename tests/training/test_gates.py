"""Gates, tracking and hand-offs: each of them has to say no, too."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import agentforge as af
from agentforge import handoff, tracking
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.evaluation import Measurement, Text
from agentforge.models import LanguageModel
from agentforge.training import gates
from agentforge.training.bitlinear import convert
from agentforge.training.phase import SIZES, adaptive, phase, size_of
from agentforge.training.recover import Settings

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)


def test_gradients_reach_every_tensor_of_a_ternary_model(tiny_llama: Path) -> None:
    student = copy.deepcopy(af.open_model(tiny_llama).model)
    convert(student)
    flow = gates.gradient_flow(student, torch.randint(2, 100, (2, 16)))
    assert flow.passed and len(flow.norms) == 20  # 14 matrices, 5 norms, the tied embedding
    assert str(flow) == "gradients flow to all 20 trainable tensors"
    assert all(p.grad is None for p in student.parameters())


def test_dead_tensors_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten, self.cut = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
            self.broken = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + 0 * self.cut(x) + torch.sqrt(self.broken)

    flow = gates.gradient_flow(Odd(), torch.randn(5, 4))
    assert flow.missing == ["forgotten.weight", "forgotten.bias"]
    assert flow.zero == ["cut.weight", "cut.bias"]
    assert flow.infinite == ["broken"]
    assert set(flow.norms) == {"used.weight", "used.bias"}
    assert not flow.passed
    assert "2 missing (forgotten.weight, forgotten.bias)" in str(flow)
    frozen = nn.Linear(4, 3).requires_grad_(False)
    assert "nothing is trainable" in str(gates.gradient_flow(frozen, torch.randn(5, 4)))


def test_a_gate_fails_on_either_side_and_on_nan() -> None:
    def exact(value: float) -> Measurement:
        return Measurement(value, "share", None, 1, {})

    assert gates.Gate("drop", exact(0.1), "<=", 0.1).passed
    assert not gates.Gate("drop", exact(0.1001), "<=", 0.1).passed
    assert gates.Gate("agreement", exact(0.995), ">=", 0.995).passed
    assert not gates.Gate("agreement", exact(0.99), ">=", 0.995).passed
    assert not gates.Gate("drop", exact(float("nan")), "<=", 0.1).passed
    assert str(gates.Gate("drop", exact(0.2), "<=", 0.1)) == "drop: 0.2 <= 0.1: FAILED"


def test_a_gate_is_passed_by_the_whole_interval() -> None:
    def agreement(high: float) -> gates.Gate:
        found = Measurement(0.999, "share", 0.001, 450, {}, interval=(high - 0.006, high))
        return gates.Gate("agreement", found, ">=", 0.995)

    assert agreement(1.003).passed and agreement(1.003).decision == "passed"
    assert agreement(0.999).decision == "undecided" and not agreement(0.999).passed
    assert "(0.993 to 0.999) >= 0.995: FAILED: undecided at this n" in str(agreement(0.999))
    assert agreement(0.994).decision == "failed"


def test_the_size_table() -> None:
    assert [size_of(n).name for n in (1, 49_999_999, 50_000_000, 5 * 10**8, 2 * 10**9)] == [
        "tiny",
        "tiny",
        "small",
        "medium",
        "large",
    ]
    assert [(size.tau, size.ratio) for size in SIZES] == [(0.05, 6.0), (0.10, 8.0), (0.15, 10.0), (0.20, 12.0)]


def test_nineteen_metrics_are_there_and_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(tracking.METRICS)) == 19
    monkeypatch.delenv("WANDB_MODE", raising=False)
    values = {name: float(i) for i, name in enumerate(tracking.METRICS)}
    with tracking.Run(tmp_path, "test", {"model": "tiny"}) as run:
        run.log(values)
        with pytest.raises(BadInput, match=r"metric compression/ratio: nan; expected a finite number"):
            run.log({"compression/ratio": float("nan")})
    assert tracking.read(tmp_path) == values
    pytest.importorskip("wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[str, float] = {}
    until = time.monotonic() + 30  # W&B's own process writes the last block a moment later, on a busy machine some seconds
    while not found and time.monotonic() < until:
        found = {key: value for row in history(file) for key, value in row.items() if not key.startswith("_")}
        time.sleep(0.1)
    assert found == values


def history(file: Path) -> list[dict[str, float]]:
    """The rows that were logged, from W&B's own offline file."""
    rows = [record.history.item for record in records(file, "history")]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]


def records(file: Path, kind: str) -> list[Any]:
    """The records of one kind in W&B's own offline file: in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, found = file.read_bytes(), 7, b"", []
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, fragment = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if fragment in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == kind:
                found.append(record)
    return found


def test_a_run_names_the_artifact_by_the_registrys_hashes(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    artifact = af.compress(digits, "rounding:bits=4,group=64", tmp_path / "artifact", progress=False)
    with tracking.Run(tmp_path / "run", "test") as run:
        run.artifact("artifact", artifact)
    about = {"manifest_sha256": artifact.sha256, "original_sha256": digits.fingerprint}
    pytest.importorskip("wandb")
    (file,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    found: list[Any] = []
    until = time.monotonic() + 30
    while not found and time.monotonic() < until:
        found = [record.request.log_artifact.artifact for record in records(file, "request")]
        found += [record.artifact for record in records(file, "artifact")]
        time.sleep(0.1)
    (logged,) = found
    assert json.loads(logged.metadata) == about
    (entry,) = logged.manifest.contents
    manifest = (artifact.path / "agentforge.json").read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == artifact.sha256
    assert (entry.path, entry.size) == ("agentforge.json", len(manifest))
    assert base64.b64decode(entry.digest) == hashlib.md5(manifest, usedforsecurity=False).digest()


QUICK = Settings(steps=30, batch=4, context=32, lr=3e-3, evaluate=15, heldout=64)


@pytest.fixture(scope="module")
def fox(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, taught its one sentence: a model that has something to lose."""
    model = af.open_model(tiny_llama)
    folder = tmp_path_factory.mktemp("fox") / "fox"
    ids = torch.tensor(model.tokenizer(TEXT.text)["input_ids"])
    module = model.model.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(120):
        batch = torch.stack([ids[i : i + 48] for i in range(step % 45, step % 45 + 180, 45)])
        optimizer.zero_grad()
        module(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    module.eval().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(fox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phase") / "out"
    result = phase(fox, out, QUICK, text=TEXT, training_text=TEXT, tokens=200, progress=False)
    assert result.trained  # ternary without training raises the perplexity of any model by more than 5%
    return out


def test_the_phase_leaves_two_models_that_say_the_same(done: Path, fox: Path) -> None:
    result = json.loads((done / "phase.json").read_text())
    metrics = result["metrics"]
    assert set(metrics) == set(tracking.METRICS)
    assert tracking.read(done / "tracking") == metrics
    assert {path.name for path in done.iterdir()} == {
        "quantized",
        "dequantized",
        "tracking",
        "handoff.json",
        "phase.json",
    }
    packed, dense = af.load(done / "quantized"), af.open_model(done / "dequantized")
    for name in dense.entries:
        torch.testing.assert_close(dense.tensor(name).float(), packed.tensor(name).float(), rtol=1e-3, atol=1e-6)
        assert dense.entries[name].dtype == torch.float16
    assert metrics["compression/dequantization_accuracy"] >= 0.99
    model = af.open_model(fox)
    assert metrics["compression/total_params"] == model.parameters
    assert metrics["compression/layers_compressed"] == 2
    assert metrics["compression/layers_quantized"] == 14
    assert metrics["compression/gradient_flow_test_passed"] == 1
    assert metrics["compression/pre_perplexity"] == pytest.approx(
        af.perplexity(model, TEXT, tokens=200, progress=False, context=128).value
    )
    assert metrics["compression/perplexity_degradation"] > 0.05
    assert 0.5 < metrics["compression/perplexity_recovery"] < 1.1
    assert metrics["compression/ratio"] == pytest.approx(4 * model.parameters / packed.bytes_on_disk)
    assert {gate["name"]: gate["passed"] for gate in result["gates"]}["tensors without a gradient"]


def test_handoff_is_measured_again_by_the_receiver(done: Path) -> None:
    checks = handoff.check_handoff(done, 4, TEXT, progress=False)
    assert any("as handed over" in check for check in checks)
    other = handoff.check_handoff(done, 4, progress=False)
    assert any("quality not measured again" in check for check in other)


@pytest.mark.parametrize("what", ["phase", "file", "missing", "token", "quality", "empty", "outside"])
def test_handoff_refuses_with_a_reason(what: str, done: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "handed"
    shutil.copytree(done, folder)
    path = folder / "handoff.json"
    data = json.loads(path.read_text())
    reason = {
        "phase": "is not a hand-off of phase 5",
        "file": "is damaged or was changed",
        "missing": "tokenizer.json: is missing",
        "token": "special_tokens is .*, handed over was",
        "quality": "handed over was",
        "empty": "hands over no model",
        "outside": "handoff",
    }[what]
    if what == "file":
        with open(folder / "dequantized/model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
    elif what == "missing":
        (folder / "dequantized/tokenizer.json").unlink()
    elif what == "token":
        data["models"]["dequantized"]["special_tokens"]["<s>"] = 7
    elif what == "quality":
        data["models"]["dequantized"]["quality"]["value"] *= 0.9
    elif what == "empty":
        data["models"] = {}
    elif what == "outside":
        data["models"] = {"../elsewhere": data["models"]["dequantized"]}
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=reason if what != "outside" else "elsewhere"):
        handoff.check_handoff(folder, 5 if what == "phase" else 4, TEXT, progress=False)


def test_a_model_that_is_not_sound_does_not_come_in(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"tensor model\.norm\.weight holds values that are not finite"):
        phase(folder, tmp_path / "out", QUICK, text=TEXT)
    assert not (tmp_path / "out").exists()


def test_the_phase_of_a_classifier(digits: LanguageModel, tmp_path: Path) -> None:
    assert str(adaptive(digits)).startswith("ternary:rule=threshold,tau=0.05")
    settings = Settings(steps=150, batch=128, lr=5e-3, evaluate=50)
    result = phase(digits, tmp_path / "out", settings, progress=False)
    assert result.metrics["compression/accuracy_preserved"] > 0.9
    assert [gate.passed for gate in result.gates if gate.name == "drop of accuracy"] == [True]
    assert handoff.check_handoff(tmp_path / "out", 4, progress=False)


def test_a_model_that_keeps_its_quality_is_not_trained_and_nothing_stale_is_handed_over(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "TRIGGER", 1e9)
    first = phase(digits, tmp_path / "out", progress=False)
    assert not first.trained
    assert first.metrics["compression/post_finetune_perplexity"] == first.metrics["compression/post_perplexity"]
    with pytest.raises(BadInput, match="pass --overwrite"):
        phase(digits, tmp_path / "out", stage="ternary:rule=threshold,tau=0.1", progress=False)
    other = phase(digits, tmp_path / "out", stage="ternary:rule=threshold,tau=0.1", overwrite=True, progress=False)
    assert other.metrics["compression/sparsity_ratio"] != first.metrics["compression/sparsity_ratio"]
    stages = {row["stage"]["rule"] for row in Artifact(tmp_path / "out/quantized").rows if row["stage"]}
    assert stages == {"threshold"}


def test_another_stage_is_refused(digits: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected the stage ternary, found rounding"):
        phase(digits, tmp_path / "out", stage="rounding")  # type: ignore[arg-type]


def test_the_command_line_prints_the_gates_and_fails_with_them(
    digits: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentforge import cli

    def run(*more: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["agentforge", "recover", "digits-mlp", "--out", str(tmp_path / "out"), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    code, printed = run("--steps", "1", "--batch", "8", "--json")
    result = json.loads(printed)
    assert code == (0 if result["passed"] else 1)
    assert len(result["metrics"]) == 19
    assert result["metrics"]["compression/layers_compressed"] == 2
    monkeypatch.setattr(gates, "MAX_ACCURACY_DROP", -1.0)
    code, printed = run("--steps", "1", "--batch", "8")
    assert code == 1
    assert "drop of accuracy" in printed and "FAILED" in printed
