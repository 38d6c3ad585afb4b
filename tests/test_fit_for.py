"""Files for other programs, fitted to their bytes: they keep to them, and what is measured is the file."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import agentforge as af
from agentforge.cli import app
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.fit_for import fit_for
from agentforge.models import LanguageModel
from agentforge.statistics import Calibration, collect

TEXT = Text("words", "test", "".join(f"The {i}th word is number {i * i}. " for i in range(400)))
CALIBRATION = Calibration(TEXT, tokens=256, context=64, sensitivity_tokens=128)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tiny_llama: Path) -> LanguageModel:
    return af.open_model(tiny_llama)


@pytest.mark.parametrize("most", [68_000, 80_000])
def test_the_whole_file_keeps_to_its_budget_and_is_measured_as_it_is_opened(
    tiny: LanguageModel, most: int, tmp_path: Path
) -> None:
    out = tmp_path / "small.gguf"
    found = fit_for(tiny, "gguf", out, most, calibration=CALIBRATION, text=TEXT, tokens=500, progress=False)
    assert out.stat().st_size == found.file.bytes <= most
    assert out.stat().st_size > 0.93 * most  # the next step of any weight is smaller than that
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["small.gguf"]
    reader = gguf.GGUFReader(out)
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    assert dict(found.file.kinds) == {kind: kinds.count(kind) for kind in set(kinds)}
    assert kinds.count("F32") == 5  # the norms; the embedding is encoded as well
    opened = af.open_model(out)
    again = af.divergence(opened, tiny, text=TEXT, tokens=500, context=tiny.sampled_context, progress=False)
    assert again.kl.value == found.measured.kl.value > 0
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    decoded = torch.from_numpy(np.asarray(gguf.dequantize(embedding.data, embedding.tensor_type)))
    assert torch.equal(opened.tensor("model.embed_tokens.weight"), decoded)


@pytest.mark.parametrize("most", [93_000, 105_000])
def test_a_folder_for_vllm_has_one_type_in_each_layer_that_vllm_makes_of_several(
    tiny: LanguageModel, most: int, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    found = fit_for(tiny, "compressed-tensors", out, most, calibration=CALIBRATION, text=TEXT, tokens=500, progress=False)
    size = (out / "model.safetensors").stat().st_size
    assert size == found.file.bytes <= most and size > 0.95 * most
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["small"]
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    bits = {stem: group["weights"]["num_bits"] for group in groups for stem in group["targets"]}
    assert sorted(f"{stem}.weight" for stem in bits) == sorted(weight.name for weight in tiny.weights())
    for block in (f"model.layers.{i}." for i in range(2)):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[block + part] for part in parts}) == 1
    kinds = {f"int{n}": list(bits.values()).count(n) for n in (4, 8)}
    assert min(kinds.values()) > 0 and found.file.kinds == kinds | {"float16": 1, "float32": 5}
    opened = af.open_model(out)
    again = af.divergence(opened, tiny, text=TEXT, tokens=500, context=tiny.sampled_context, progress=False)
    assert again.kl.value == found.measured.kl.value > 0


def test_what_has_no_groups_of_32_stays_as_it_is_in_a_folder_for_vllm(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = shutil.copytree(tiny_llama, tmp_path / "odd")
    LlamaForCausalLM(LlamaConfig.from_pretrained(odd, intermediate_size=72)).save_pretrained(odd)
    out = tmp_path / "small"
    fit_for(odd, "compressed-tensors", out, 200_000, calibration=CALIBRATION, text=TEXT, tokens=500, progress=False)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]
    down = af.open_model(out).tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(down, af.open_model(odd).tensor("model.layers.1.mlp.down_proj.weight").half())
    LlamaForCausalLM(LlamaConfig.from_pretrained(odd, hidden_size=72, head_dim=18)).save_pretrained(odd)
    with pytest.raises(BadInput, match="no linear layer in its blocks has rows of a multiple of 32"):
        fit_for(odd, "compressed-tensors", tmp_path / "none", 200_000)


def test_more_bytes_do_less_damage_and_the_same_call_gives_the_same_bytes(tiny: LanguageModel, tmp_path: Path) -> None:
    def fitted(name: str, most: int, workers: int) -> tuple[float, float, bytes]:
        about = {"calibration": CALIBRATION, "text": TEXT, "tokens": 500, "workers": workers, "progress": False}
        found = fit_for(tiny, "gguf", tmp_path / name, most, **about)
        return found.predicted, found.measured.kl.value, (tmp_path / name).read_bytes()

    small, large = fitted("a", 68_000, 1), fitted("b", 95_000, 2)
    assert large[0] < 0.3 * small[0] and large[1] < 0.3 * small[1]
    assert fitted("c", 68_000, 3)[2] == small[2]


def test_statistics_of_head_and_embedding_are_those_of_a_plain_pass(tiny: LanguageModel) -> None:
    """H of the head's inputs, and E[p (1 - p)] of its outputs, by transformers' own forward pass.  A tenth of that
    frequency is spread over all tokens."""
    found = collect(tiny, CALIBRATION, progress=False, ends=True)["model.embed_tokens.weight"]
    ids = torch.tensor(tiny.encode(TEXT.text)[:256]).reshape(4, 64)
    with torch.no_grad():
        output = tiny.model(input_ids=ids, output_hidden_states=True)
    x, p = output.hidden_states[-1].flatten(0, 1).double(), output.logits.flatten(0, 1).double().softmax(-1)
    variance = ((p * (1 - p)).mean(0) + 0.1 / p.shape[1]) / 1.1
    assert found.sensitivity is not None
    torch.testing.assert_close(found.sensitivity.double(), variance, rtol=1e-4, atol=1e-9)
    beside = found.hessian.double() - x.T @ x / len(x)  # the embedding's share
    assert beside.diagonal().min() > 0
    torch.testing.assert_close(beside, beside.diagonal().diag(), rtol=0, atol=1e-4)


def test_damage_of_the_embedding_is_the_divergence_that_it_makes(tiny: LanguageModel) -> None:
    """To second order, and with one of both ends changed at a time: the sum is what a tied matrix is charged for."""
    stats = collect(tiny, CALIBRATION, progress=False, ends=True)["model.embed_tokens.weight"]
    ids = torch.tensor(tiny.encode(TEXT.text)[:256]).reshape(4, 64)
    module = tiny.model
    weight = tiny.tensor("model.embed_tokens.weight").float()
    noise = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return module(input_ids=ids).logits.double().log_softmax(-1)

    before = logits()
    lost = 0.0
    for part in (module.lm_head, module.model.embed_tokens):
        own = part.weight
        part.weight = torch.nn.Parameter(weight + noise, requires_grad=False)
        lost += float((before.exp() * (before - logits())).sum(-1).mean())
        part.weight = own
    assert lost / 2.5 < af.allocation.damage(weight, weight + noise, stats) < 2.5 * lost


def test_a_bad_request_is_one_sentence_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"

    def asked(*more: str) -> str:
        result = CliRunner().invoke(app, ["fit", str(tiny_llama), "--out", str(out), *more])
        assert isinstance(result.exception, BadInput)
        return str(result.exception)

    assert "takes --bytes" in asked("--for", "gguf", "--bits", "3")
    assert "takes --bytes" in asked("--for", "gguf", "--bytes", "80kB", "--recover", "5")
    assert "choose from gguf, compressed-tensors" in asked("--for", "mlx", "--bytes", "80kB")
    assert not out.exists()
    with pytest.raises(BadInput, match="the smallest candidates"):
        fit_for(tiny_llama, "gguf", out, 20_000, calibration=CALIBRATION, text=TEXT, tokens=500, progress=False)
    assert not out.exists()
    out.write_bytes(b"mine")
    with pytest.raises(BadInput, match="is in the way"):
        fit_for(tiny_llama, "gguf", out, 80_000)
    assert "no GGUF file of agentforge" in asked("--for", "gguf", "--bytes", "80kB", "--overwrite")
    assert out.read_bytes() == b"mine"
    out.unlink()
    tensors = "compressed-tensors"
    assert "takes --bytes" in asked("--for", tensors, "--max-kl", "1")
    least = re.search(
        "the smallest candidates of 14 weights take ([0-9,]+), all", asked("--for", tensors, "--bytes", "60kB")
    )
    assert least and "14 weights take" in asked("--for", tensors, "--bytes", str(int(least[1].replace(",", "")) - 1))
    out.mkdir()
    (out / "mine").write_bytes(b"mine")
    for more in ([], ["--overwrite"]):
        assert "agentforge" in asked("--for", tensors, "--bytes", "80kB", *more)
    assert (out / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize(("to", "sizes"), [("gguf", (80_000, 70_000)), ("compressed-tensors", (105_000, 90_000))])
def test_the_command_says_what_it_made(to: str, sizes: tuple[int, int], tiny_llama: Path, tmp_path: Path) -> None:
    (words := tmp_path / "words.txt").write_text(TEXT.text)
    out = tmp_path / "small.gguf"
    about = ["--for", to, "--out", str(out), "--text", str(words), "--tokens", "500", "--calibration", str(words), "--json"]
    about += ["--calibration-tokens", "500"]

    def made(most: int, *more: str) -> Any:
        asked = ["fit", str(tiny_llama), "--bytes", str(most), *about, *more]
        found = json.loads(CliRunner().invoke(app, asked, catch_exceptions=False).stdout)
        assert found["bytes"] == (out if to == "gguf" else out / "model.safetensors").stat().st_size <= most
        return found

    found = made(sizes[0])
    assert found["to"] == to and math.isfinite(found["measured"]["kl"]["value"])
    smaller = ["fit", str(tiny_llama), "--bytes", str(sizes[1]), *about]
    more = [*smaller, "--overwrite", "--calibration-tokens", "1000000"]
    assert "1000000 were asked for" in str(CliRunner().invoke(app, more).exception)
    assert "pass --overwrite" in str(CliRunner().invoke(app, smaller).exception)
    made(sizes[1], "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "small.gguf", "words.txt"]
