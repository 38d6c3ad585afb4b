"""LoRA adapters that peft wrote: merged into their base, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentforge.adapters import AdapterModel
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.opening import load, open_model
from agentforge.pipeline import compress

DATA = Path(__file__).parent / "data" / "adapters"


@pytest.fixture(autouse=True)
def beside_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("name", ["plain", "ranks", "head", "conv"])
def test_it_computes_what_peft_computes(name: str) -> None:
    expected = load_file(DATA / "logits.safetensors")
    model = open_model(name)
    assert isinstance(model, AdapterModel)
    base = open_model(json.loads((DATA / name / "adapter_config.json").read_text())["base_model_name_or_path"])
    with torch.inference_mode():
        torch.testing.assert_close(model.model(expected["ids"]).logits, expected[name], rtol=1e-5, atol=2e-5)
        assert (base.model(expected["ids"]).logits - expected[name]).abs().max() > 0.1  # it does something
    assert model.fingerprint != base.fingerprint


def test_it_is_compressed_as_merged(tmp_path: Path) -> None:
    """In other processes, too: a weight is read as base and adapter together."""
    model = open_model("plain")
    done = compress(model, "rounding:bits=8,group=16", tmp_path / "out", workers=2, progress=False)
    assert isinstance(done, Artifact)
    name = "model.layers.1.self_attn.q_proj.weight"
    merged, found = model.tensor(name), load(tmp_path / "out").tensor(name)
    assert (found - merged).abs().max() < 0.02
    assert (found - open_model("llama").tensor(name)).abs().max() > 0.1
    assert torch.equal(model.reader(name)(), merged)


@pytest.mark.parametrize(
    ("name", "said"),
    [("dora", "use_dora"), ("saved", "modules_to_save"), ("biased", "bias"), ("pissa", "init_lora_weights")],
)
def test_other_kinds_are_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(BadInput, match=rf"has '{said}'=.*merge it into its base first"):
        open_model(name)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "IA3", "kind 'IA3'"),
        ("lora_alpha", "six", "lora_alpha='six', expected a number"),
        ("lora_alpha", 10**400, "lora_alpha=1000.*, expected a number"),
        ("lora_alpha", float("nan"), "lora_alpha=nan, expected a number"),
        ("alpha_pattern", {"(a+)+b": 3}, "'alpha_pattern'"),
        ("something_new", 1, "'something_new'=1"),
        ("base_model_name_or_path", "nobody/nothing", "holds an adapter .* for 'nobody/nothing', not a model; .* or fetch"),
        ("base_model_name_or_path", None, "holds an adapter"),
        ("base_model_name_or_path", "plain", "holds an adapter"),  # an adapter of an adapter, for ever
        ("base_model_name_or_path", "gpt2", "does not belong to a LoRA of a linear layer of gpt2"),
    ],
)
def test_a_setting_that_is_not_known(adapter: Path, key: str, value: object, said: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=said):
        open_model(adapter)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A: torch.zeros(4, 15)}, r"\[4, 15\] and \[16, 4\] do not fit"),
        ({A: torch.zeros(0, 16)}, "do not fit"),
        ({A: torch.zeros(4)}, "do not fit"),
        ({A: torch.zeros(4, 16, dtype=torch.int8)}, "expected floats"),
        ({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(1)}, "lora_magnitude_vector.* does not belong"),
        ({A.replace("layers.0", "layers.7"): torch.zeros(4, 16)}, "layers.7.* does not belong"),
    ],
)
def test_a_tensor_that_does_not_fit(adapter: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    save_file(load_file(adapter / "adapter_model.safetensors") | tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=said):
        open_model(adapter)


def test_without_its_matrices_or_pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors is missing"):
        open_model(adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="holds no LoRA"):
        open_model(adapter)
