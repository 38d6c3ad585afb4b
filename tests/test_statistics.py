"""Input statistics against hooks written otherwise, and what compress does with them and with shared planes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge
from agentforge.artifact import Artifact, write_manifest
from agentforge.errors import BadArtifact, BadInput
from agentforge.evaluation import Text
from agentforge.models import LanguageModel
from agentforge.opening import load
from agentforge.pipeline import compress
from agentforge.statistics import Calibration, InputStatistics, collect

SHARED = "vptq:v=4,k=16,shared=true,refine=1"
CALIBRATION = Calibration(tokens=300, context=64)


@pytest.fixture
def model(tiny_llama: Path) -> LanguageModel:
    return agentforge.open_model(str(tiny_llama))


def test_second_moments_of_a_language_model(model: LanguageModel) -> None:
    """The same by recording all inputs and one product in double precision."""
    found = collect(model, CALIBRATION, progress=False)
    ids = model.tokenizer(CALIBRATION.find().text[:20000])["input_ids"][:300]
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for first in range(0, 300, 64):
            model.model(torch.tensor([ids[first : first + 64]]))
    assert set(found) == {weight.name for weight in model.weights()}
    for name, stats in found.items():
        x = torch.cat(inputs[name.removesuffix(".weight")]).double()
        assert stats.n == len(x) == 300
        assert torch.allclose(stats.hessian.double(), x.T @ x / 300, rtol=1e-4, atol=1e-5)
        assert torch.equal(stats.hessian, stats.hessian.T)
        assert torch.equal(stats.diagonal, stats.hessian.diagonal())


def test_layers_that_are_fed_the_same_share_their_statistics(model: LanguageModel) -> None:
    found = collect(model, CALIBRATION, progress=False)
    by_kind = {name.split(".")[-2]: stats for name, stats in found.items() if ".layers.0." in name}
    assert by_kind["q_proj"] is by_kind["k_proj"] is by_kind["v_proj"]
    assert by_kind["gate_proj"] is by_kind["up_proj"]
    assert len({id(by_kind[kind]) for kind in ("q_proj", "o_proj", "gate_proj", "down_proj")}) == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_threads_change_no_bit(model: LanguageModel, workers: int) -> None:
    expected = collect(model, CALIBRATION, 2, progress=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = collect(model, CALIBRATION, workers, progress=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name].hessian, expected[name].hessian) for name in expected)


def test_a_classifier_is_calibrated_on_its_training_pictures(digits: LanguageModel) -> None:
    found = collect(digits, progress=False)
    pixels = agentforge.models.digits.data()[0].double()
    first = found["layers.0.weight"]
    assert first.n == len(pixels)
    assert torch.allclose(first.hessian.double(), pixels.T @ pixels / len(pixels), atol=1e-5)


def test_an_error_in_a_window_is_raised_and_nothing_waits_for_it(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, bounded: None
) -> None:
    layer = model.model.model.layers[1].mlp
    monkeypatch.setattr(layer, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("broken")) if x.shape[1] > 4 else x)
    with pytest.raises(RuntimeError, match="broken"):
        collect(model, CALIBRATION, progress=False)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration(tokens=0), "tokens=0"),
        (Calibration(context=0), "context=0"),
        (Calibration(text="nowhere.txt"), "'nowhere.txt' does not exist"),
        (Calibration(Text("short", "test", "one two"), tokens=10**8), "has .* tokens; 100000000 were asked for"),
    ],
)
def test_bad_calibrations(model: LanguageModel, calibration: Calibration, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        collect(model, calibration, progress=False)


def test_named_texts_are_taken_from_the_split_that_is_not_measured_on(wikitext2: Any) -> None:
    assert Calibration().find().split == "calibration"
    assert Calibration(text="wikitext2").find().split == "validation"


def test_statistics_that_do_not_fit_are_refused() -> None:
    weight = torch.ones(4, 6)
    stage = agentforge.stages.get("vptq", v=2, k=4)
    with pytest.raises(BadInput, match=r"layers\.1: has 6 inputs, its statistics are \[5, 5\]"):
        stage.encode(weight, InputStatistics(torch.eye(5), 10), name="layers.1")
    with pytest.raises(BadInput, match=r"layers\.1: its statistics hold values that are not finite"):
        stage.encode(weight, InputStatistics(torch.full((6, 6), torch.inf), 10), name="layers.1")


def test_compress_calibrates_once_and_says_on_what(model: LanguageModel, tmp_path: Path) -> None:
    stage = "vptq:v=4,k=16,refine=1"
    artifact = compress(model, stage, tmp_path / "a", calibration=CALIBRATION, progress=False)
    recipe = artifact.manifest["recipe"]["calibration"]
    assert recipe == CALIBRATION.to_json()
    assert (recipe["text"], recipe["tokens"], recipe["context"]) == ("selftext/calibration", 300, 64)
    given = compress(
        model, stage, tmp_path / "b", calibration=CALIBRATION, statistics=collect(model, CALIBRATION, progress=False),
        progress=False,
    )  # fmt: skip
    assert files(artifact) == files(given)
    other = compress(model, stage, tmp_path / "c", calibration=Calibration(tokens=200), progress=False)
    assert files(artifact) != files(other)
    plain = compress(model, "rounding", tmp_path / "d", calibration=CALIBRATION, progress=False)
    assert "calibration" not in plain.manifest["recipe"]


def test_another_calibration_is_another_recipe(model: LanguageModel, tmp_path: Path) -> None:
    compress(model, SHARED, tmp_path / "a", calibration=CALIBRATION, progress=False)
    with pytest.raises(BadInput, match=r"tokens.*300.*200"):
        compress(model, SHARED, tmp_path / "a", calibration=Calibration(tokens=200, context=64), progress=False)


def files(artifact: Artifact) -> dict[str, str]:
    return {name: about["sha256"] for name, about in artifact.manifest["files"].items() if name.endswith("safetensors")}


def shared_artifact(model: LanguageModel, out: Path, workers: int | None = None) -> Artifact:
    return compress(model, SHARED, out, calibration=CALIBRATION, progress=False, workers=workers)


def test_planes_that_all_weights_share_are_stored_and_counted_once(model: LanguageModel, tmp_path: Path) -> None:
    artifact = shared_artifact(model, tmp_path / "a")
    assert len(artifact.verify()) == 3
    shared = artifact.manifest["shared"]
    assert shared["bits"] == 16 * 4 * 16  # k x v half floats
    touched = [row for row in artifact.rows if row["stage"]]
    ratio = next(r for r in artifact.ratios if r.what == "touched tensors")
    assert ratio.bytes == shared["bytes"] + sum(row["bytes"] for row in touched)
    stored = [name for name in artifact.entries if name.startswith("agentforge.shared.")]
    assert stored and sum(artifact.entries[name].bytes for name in stored) == shared["bytes"]
    for row in touched:
        decoded = artifact.decode(row)
        original = model.tensor(row["name"]).float()
        assert float((decoded - original).norm() / original.norm()) == pytest.approx(row["relative_error"], rel=1e-5)
    logits = load(artifact.path).model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_shared_planes_are_the_same_bytes_for_any_number_of_workers(model: LanguageModel, tmp_path: Path) -> None:
    assert files(shared_artifact(model, tmp_path / "a", 1)) == files(shared_artifact(model, tmp_path / "b", 3))


def test_an_interrupted_run_keeps_its_shared_planes(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(shared_artifact(model, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(agentforge.artifact.Writer, "put_kept", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shared_artifact(model, tmp_path / "a", 1)
    assert (tmp_path / "a.partial/tensors/shared.safetensors").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(agentforge.stages.vptq.Vptq, "fit_shared", None)  # must not be needed again
        assert files(shared_artifact(model, tmp_path / "a")) == expected


def test_a_stage_that_shares_says_so_when_it_is_alone() -> None:
    stage = agentforge.stages.parse(SHARED)
    with pytest.raises(BadInput, match=r"q: vptq shares planes between weights; compress a model, or pass"):
        stage.encode(torch.ones(4, 4), name="q")


def _gone(manifest: dict[str, Any]) -> None:
    manifest["shared"] = None


def _of_another_stage(manifest: dict[str, Any]) -> None:
    manifest["shared"]["stage"]["k"] = 32
    manifest["shared"]["bytes"] = manifest["shared"]["bytes"] * 2
    manifest["shared"]["bits"] = manifest["shared"]["bits"] * 2


def _of_a_stage_without_any(manifest: dict[str, Any]) -> None:
    manifest["shared"]["stage"] = {"stage": "rounding"}


def _too_large(manifest: dict[str, Any]) -> None:
    manifest["shared"]["bytes"] += 1


def _no_table(manifest: dict[str, Any]) -> None:
    manifest["shared"] = [1]


def _other_bytes(manifest: dict[str, Any]) -> None:
    manifest["shared"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_gone, "the planes that its stage shares are missing"),
        (_of_another_stage, "the planes that its stage shares are missing"),
        (_of_a_stage_without_any, "shared: .* settings and shape give"),
        (_too_large, "shared: .* bytes, .* bits; settings and shape give"),
        (_no_table, "shared: expected an object"),
        (_other_bytes, "share are not those that were fitted"),
    ],
)
def test_hostile_shared_planes_are_refused(model: LanguageModel, tmp_path: Path, spoil: Any, message: str) -> None:
    artifact = shared_artifact(model, tmp_path / "a")
    manifest = json.loads((artifact.path / "agentforge.json").read_text())
    spoil(manifest)
    write_manifest(artifact.path, manifest)  # with its hash: whoever damages it on purpose can do that, too
    with pytest.raises(BadArtifact, match=message):
        Artifact(artifact.path).verify()


def test_the_command_line_names_text_and_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from agentforge.cli import app

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    arguments = ["compress", str(tiny_llama), "--stage", SHARED, "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--calibration", str(text), "--calibration-tokens", "100"])
    assert done.exit_code == 0, done.output
    recipe = Artifact(tmp_path / "out").manifest["recipe"]["calibration"]
    assert (recipe["text"], recipe["tokens"]) == ("text.txt/file", 100)
