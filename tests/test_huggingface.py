"""Artifacts in transformers: loaded, run, saved and published by its own functions."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
import yaml
from bs4 import BeautifulSoup
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from markdown_it import MarkdownIt
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

import agentforge as af
import agentforge.huggingface
from agentforge import artifact as artifact_module
from agentforge import lm_eval
from agentforge.artifact import MANIFEST, Artifact, write_manifest
from agentforge.errors import BadArtifact, BadInput
from agentforge.evaluation import Measurement
from agentforge.modelcard import licence, model_card
from agentforge.runtime import TernaryLinear
from agentforge.runtime.layers import PackedEmbedding, PackedLinear, PackedWeight, WithPacked
from agentforge.tensorfiles import (
    describe_files,
    index_folder,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
    write_tensors,
)

if TYPE_CHECKING:
    from agentforge.models import LanguageModel

STAGES = [
    "rounding:bits=4,group=32",
    "rounding:bits=3 | entropy",
    "ternary",
    "seedlm:bits=4",
    "vptq:v=4,k=16",
    "vptq:v=4,k=16,shared=true | entropy",
    "trajectory",
    "curves",
    "ecsq",
    "tcq",
]
SIZES = {"vocab_size": 300, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
DECODER = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(**DECODER, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**DECODER, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma": transformers.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**DECODER, num_key_value_heads=1, head_dim=16, sliding_window=32),
    "mixtral": transformers.MixtralConfig(**DECODER, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}
IDS = torch.arange(2, 42)[None]  # more than the kernels multiply: what is decoded is exactly the dense weight
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # packed layers sum in another order, and add a bias last


@pytest.fixture(scope="module")
def rounded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with its tokenizer, in one weight file."""
    out = tmp_path_factory.mktemp("hf") / "rounded"
    return af.compress(tiny_llama, "rounding:bits=4,group=32", out, progress=False).path


def opened(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def generated(model: Any) -> list[int]:
    ids = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=1, attention_mask=torch.ones_like(IDS))
    return [int(i) for i in ids[0]]


def assert_same_folder(made: Path, saved: Path) -> None:
    """The same files; the manifest of what was saved leaves the tokenizer's to `tokenizer.save_pretrained`."""
    files = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (made, saved)]
    before, after = (json.loads(one.pop("agentforge.json")) for one in files)
    assert files[0] == files[1]
    assert before["files"].keys() - after["files"].keys() <= {"tokenizer.json", "tokenizer_config.json"}
    for manifest in (before, after):
        manifest["files"] = {name: manifest["files"][name] for name in after["files"]}
        del manifest["sha256"]
    assert before == after


def test_what_model_and_tokenizer_save_is_sound_and_can_be_registered(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "m")
    (source / "NOTICE").write_text("made by x")
    (source / "USE_POLICY.md").write_text("for good")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }} tools")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made = af.compress(source, "rounding:bits=8,group=16", tmp_path / "a", progress=False)
    for name in ("NOTICE", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja"):
        assert (made.path / name).read_bytes() == (source / name).read_bytes()
        assert name in made.manifest["files"]
    model, tokenizer = opened(made.path), AutoTokenizer.from_pretrained(made.path)
    assert tokenizer.chat_template.keys() == {"default", "tool_use"}
    tokenizer.add_tokens(["<new>"])  # other bytes than those that were loaded
    for folder in (tmp_path / "b", tmp_path / "b"):  # and once more, over the first
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert any("not checked" in check and "tokenizer.json" in check for check in Artifact(folder).verify())
    assert (tmp_path / "b" / "NOTICE").read_text() == "made by x"
    flipped = made.path / "additional_chat_templates" / "tool_use.jinja"
    flipped.write_text("{{ messages[0].content }} fools")
    with pytest.raises(BadArtifact, match="damaged"):
        af.load(made.path)


@pytest.mark.parametrize(
    ("stage", "embeddings"),
    [*((s, False) for s in STAGES), *((s, True) for s in (STAGES[1], STAGES[5], "ternary:rule=threshold,packing=2bit"))],
)
def test_every_stage_loads_runs_and_is_saved_again(stage: str, embeddings: bool, tiny_llama: Path, tmp_path: Path) -> None:
    made = af.compress(tiny_llama, stage, tmp_path / "a", embeddings=embeddings, progress=False)
    model, packed = opened(made.path), af.load(made.path, "packed").model
    expected = logits(packed)
    assert torch.equal(logits(model), expected)
    assert generated(model) == generated(packed)
    if stage.startswith("ternary"):  # with activations of 8 bits
        assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)
    else:
        assert torch.equal(expected, logits(af.load(made.path).model))
        assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == embeddings
    model.save_pretrained(tmp_path / "b")
    assert_same_folder(made.path, tmp_path / "b")
    Artifact(tmp_path / "b").verify()
    assert torch.equal(logits(opened(tmp_path / "b")), expected)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, embeddings: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(FAMILIES[family])
        for name, parameter in original.named_parameters():
            if name.endswith("bias"):  # zeros would not show whether they are loaded
                torch.nn.init.normal_(parameter)
        original.save_pretrained(tmp_path / "model")
    made = af.compress(tmp_path / "model", "rounding:bits=4,group=32", tmp_path / "a", embeddings=embeddings, progress=False)
    made.verify()
    model, info = opened(made.path, output_loading_info=True)
    assert not any(info.values())
    dense = af.load(made.path).model
    torch.testing.assert_close(logits(model), logits(dense), **SUMS)
    torch.testing.assert_close(logits(af.load(made.path, "packed").model), logits(dense), **SUMS)
    assert generated(model) == generated(dense)
    model.tie_weights()  # lm-eval does so
    torch.testing.assert_close(logits(model), logits(dense), **SUMS)
    model.save_pretrained(tmp_path / "b")
    assert_same_folder(made.path, tmp_path / "b")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, whose files hold each expert's matrices on their own."""
    folder = tmp_path_factory.mktemp("hf") / "mixtral"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(FAMILIES["mixtral"]).save_pretrained(folder)
    return folder


def test_experts_are_one_weight_a_layer(mixtral: Path, tmp_path: Path) -> None:
    original = af.open_model(mixtral)
    weights = {w.name: w for w in original.weights()}
    gate_up = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate_up.shape, gate_up.experts, gate_up.stored_shape) == ((4 * 192, 64), 4, (4, 192, 64))
    assert torch.equal(gate_up.load()[192:384], original.tensor(gate_up.name)[1])
    assert "not a linear layer" in original.kept()["model.layers.0.mlp.gate.weight"]

    made = af.compress(mixtral, "rounding:bits=8,group=32", tmp_path / "a", progress=False)
    row = next(row for row in made.rows if row["name"] == gate_up.name)
    assert row["shape"] == [4, 192, 64] and row["stage"] is not None
    decoded = made.decode(row)
    assert decoded.shape == (4, 192, 64)
    assert torch.allclose(decoded, original.tensor(gate_up.name), atol=0.01)
    kept = sum(row["bytes"] for row in made.rows if row["stage"] is None)
    assert sum(row["bytes"] for row in made.rows) - kept > 0.8 * sum(row["bytes"] for row in made.rows) - kept

    experts = opened(made.path).model.layers[0].mlp.experts
    assert isinstance(experts, WithPacked) and isinstance(experts, type(original.model.model.layers[0].mlp.experts))
    assert isinstance(experts.gate_up_proj, PackedWeight)  # decoded only while it computes


def test_experts_have_no_statistics(mixtral: Path, tmp_path: Path) -> None:
    """They are encoded without, where a stage can do so."""
    original = af.open_model(mixtral)
    statistics = {
        weight.name: af.statistics.InputStatistics(torch.eye(weight.shape[1]), 10)
        for weight in original.weights()
        if not weight.experts
    }
    made = af.compress(original, "vptq:v=4,k=16", tmp_path / "a", statistics=statistics, progress=False)
    assert all(row["stage"] for row in made.rows if ".experts." in row["name"])


def test_transposed_experts(tmp_path: Path) -> None:
    """Stored as [experts, in, out]: a stage sees [out, in] of each, one below the other."""
    sizes = {**DECODER, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).save_pretrained(tmp_path / "model")
    original = af.open_model(tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    weight, stored = next(weight for weight in original.weights() if weight.name == name), original.tensor(name)
    assert weight.stored_shape == stored.shape and weight.shape == (2 * stored.shape[2], stored.shape[1])
    assert torch.equal(weight.load(), torch.cat([one.T for one in stored]))
    made = af.compress(original, "rounding:bits=8,group=32", tmp_path / "a", progress=False)
    row = next(row for row in made.rows if row["name"] == name)
    assert row["transposed"] and row["shape"] == list(stored.shape)
    decoded = made.decode(row)
    assert decoded.shape == stored.shape and torch.allclose(decoded, stored, atol=0.01)
    packed = opened(made.path).model.layers[0].mlp.experts
    assert isinstance(packed, WithPacked) and isinstance(packed.down_proj, PackedWeight)


@pytest.mark.parametrize("shape", [[4, 192, 64, 1], [4, 0, 64], [1 << 23, 192, 64]])
def test_a_manifest_with_impossible_experts_is_refused(shape: list[int], mixtral: Path, tmp_path: Path) -> None:
    made = af.compress(mixtral, "rounding:bits=8,group=32", tmp_path / "a", progress=False)
    row = next(row for row in made.rows if row["name"] == "model.layers.0.mlp.experts.gate_up_proj")
    row["shape"] = shape
    write_manifest(made.path, made.manifest)
    with pytest.raises(BadArtifact, match="shape"):
        Artifact(made.path)


def test_dtypes(rounded: Path, tmp_path: Path) -> None:
    model = opened(rounded, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    stored = index_folder(rounded)
    for name, buffer in model.named_buffers():
        if name in stored:
            assert buffer.dtype == stored[name].dtype
    assert torch.allclose(logits(model).float(), logits(af.load(rounded).model), atol=1.0, rtol=0.1)
    model.save_pretrained(tmp_path / "b")  # what bfloat16 rounds is not taken for a change
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(device_map: Any, rounded: Path) -> None:
    assert torch.equal(logits(opened(rounded, device_map=device_map)), logits(af.load(rounded).model))


def test_shards(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "SHARD_BYTES", 30_000)
    made = af.compress(tiny_llama, "rounding:bits=4,group=32", tmp_path / "a", progress=False)
    assert len(list(made.path.glob("*.safetensors"))) > 2
    model = opened(made.path, device_map="cpu")
    assert torch.equal(logits(model), logits(af.load(made.path).model))
    (tmp_path / "b").mkdir()
    others = tmp_path / "b" / "model.safetensors"
    shutil.copyfile(made.path / "config.json", others)
    with pytest.raises(BadInput, match=r"holds the weights 'model.safetensors', not an artifact's"):
        model.save_pretrained(tmp_path / "b")
    assert others.read_bytes() == (made.path / "config.json").read_bytes()
    others.unlink()
    model.save_pretrained(tmp_path / "b")
    assert_same_folder(made.path, tmp_path / "b")


def test_a_model_without_its_head(rounded: Path) -> None:
    body = AutoModel.from_pretrained(rounded, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(body(IDS)[0], opened(rounded).model(IDS)[0])


def test_streams_and_pipelines(rounded: Path) -> None:
    model, tokenizer = opened(rounded), AutoTokenizer.from_pretrained(rounded)
    inputs = tokenizer("a tiny prompt", return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    expected = tokenizer.decode(af.load(rounded).model.generate(**asked)[0])
    streamer = TextIteratorStreamer(tokenizer)
    thread = Thread(target=model.generate, kwargs={**asked, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    for given in (model, str(rounded)):
        pipe = pipeline("text-generation", model=given, tokenizer=tokenizer, dtype=torch.float32, device="cpu")
        found = pipe("a tiny prompt", max_new_tokens=6, do_sample=False, pad_token_id=1)
        assert found[0]["generated_text"] == tokenizer.decode(
            af.load(rounded).model.generate(**asked)[0], skip_special_tokens=True
        )


def test_lm_eval_scores_it_as_it_scores_the_dense_model(rounded: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=("one two", ending), idx=0)
        for ending in (" three", " four")
    ]
    tokenizer = AutoTokenizer.from_pretrained(rounded)
    models = [str(rounded), opened(rounded), af.load(rounded).model]
    scores = [
        HFLM(pretrained=model, tokenizer=tokenizer, dtype="float32", device="cpu").loglikelihood(asked) for model in models
    ]
    sums = [[score for score, _ in each] for each in scores]
    assert sums[0] == sums[1] == pytest.approx(sums[2], rel=1e-6)
    assert [greedy for _, greedy in scores[0]] == [greedy for _, greedy in scores[2]]


@pytest.mark.slow
def test_lm_eval_from_the_command_line(rounded: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i} and", "choices": [" more", " less", " none"], "answer": i % 3} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "counting.yaml").write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", "agentforge.lm_eval", "run", "--model", "hf", "--tasks", "counting", "--device", "cpu"]
    command += ["--model_args", f"pretrained={rounded},dtype=float32", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    results = read_json(next(tmp_path.glob("out*.json")))["results"]
    assert isinstance(results, dict) and 0 <= results["counting"]["acc,none"] <= 1


def test_a_missing_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stop:
        lm_eval.main()
    assert stop.value.code == 2 and "not installed" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["agentforge.huggingface", "transformers.quantizers.auto"])
def test_registered_in_either_order(first: str) -> None:
    second = ({"agentforge.huggingface", "transformers.quantizers.auto"} - {first}).pop()
    code = f"import {first}, {second}\nimport transformers.quantizers.auto as auto\n"
    code += "print(*(found['agentforge'].__name__ for found in "
    code += "(auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "AgentForgeQuantizer AgentForgeConfig\n"


def test_importing_agentforge_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, agentforge; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_changed_weights_and_settings_are_saved_with_their_hashes(rounded: Path, tmp_path: Path) -> None:
    model = opened(rounded)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0001)
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path / "b")
    saved = Artifact(tmp_path / "b")
    saved.verify()
    changed = [row for row, old in zip(saved.rows, Artifact(rounded).rows, strict=True) if row != old]
    assert [row["name"] for row in changed] == ["model.norm.weight"]
    assert changed[0]["reason"] == "changed after it was loaded"
    assert changed[0]["relative_error"] == pytest.approx(1e-4, rel=0.01)
    assert torch.equal(saved.decode(changed[0]), model.model.norm.weight)
    assert read_json(tmp_path / "b" / "config.json")["pad_token_id"] == 1
    assert torch.equal(logits(opened(tmp_path / "b")), logits(model))


def test_changed_planes_are_not_saved(rounded: Path, tmp_path: Path) -> None:
    model = opened(rounded)
    model.model.layers[0].mlp.up_proj.weight.codes[0] ^= 1
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.up_proj\.weight are not the artifact's"):
        model.save_pretrained(tmp_path / "b")
    assert not any((tmp_path / "b").iterdir())


def test_ternary_layers_with_biases_are_saved_as_they_were_read(tmp_path: Path) -> None:
    """They hold their codes and biases otherwise than the artifact does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(FAMILIES["llama"])
        torch.nn.init.normal_(original.model.layers[0].self_attn.q_proj.bias)
        original.save_pretrained(tmp_path / "model")
    made = af.compress(tmp_path / "model", "ternary", tmp_path / "a", progress=False)
    model = opened(made.path)
    assert torch.equal(logits(model), logits(af.load(made.path, "packed").model))
    model.save_pretrained(tmp_path / "b")
    assert_same_folder(made.path, tmp_path / "b")
    layer = model.model.layers[0].self_attn.q_proj
    layer.biases[0] += 1
    model.save_pretrained(tmp_path / "c")
    changed = [row["name"] for row in Artifact(tmp_path / "c").rows if row.get("reason") == "changed after it was loaded"]
    assert changed == ["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(logits(opened(tmp_path / "c")), logits(model))
    layer.packed[0] ^= 1
    with pytest.raises(BadInput, match=r"q_proj\.weight are not the artifact's"):
        model.save_pretrained(tmp_path / "d")


def test_unknown_options_of_saving_are_refused(rounded: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="max_shard_size is not an option"):
        opened(rounded).save_pretrained(tmp_path / "b", max_shard_size="1MB")
    opened(rounded).save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_push_to_hub(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self: HfApi, *, folder_path: Path, repo_id: str, **_: Any) -> CommitInfo:
        pushed.update({file.name: file.read_bytes() for file in folder_path.iterdir()}, repo=repo_id)
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/abc", commit_message="", commit_description="", oid="abc"
        )

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    measured = Measurement(12.5, "perplexity", 0.25, 100, {"text": "wikitext2"})
    url = opened(rounded).push_to_hub("small", measurements={"perplexity": measured})
    assert url == "https://huggingface.co/someone/small/commit/abc"
    assert pushed.pop("repo") == "someone/small"
    card = pushed.pop("README.md").decode()
    assert pushed == {file.name: file.read_bytes() for file in rounded.iterdir()}
    assert "| perplexity | 12.5 ± 0.25 perplexity (n = 100) | text wikitext2 |" in html.unescape(card)
    assert 'from_pretrained("someone/small")' in card


def test_the_card(rounded: Path) -> None:
    made = Artifact(rounded)
    card = ModelCard(model_card(made))
    assert card.data.license == "unknown" and card.data.tags == ["agentforge", "rounding"]
    assert card.data.base_model is None  # a folder is nothing that the hub could link to
    assert f"{made.ratio:.3f}" in card.text and made.sha256 in card.text
    assert made.manifest["original"]["fingerprint"] in card.text
    assert "- `rounding:bits=4,group=32,symmetric=False,clip=none`: 14 tensors" in card.text
    assert "Not measured." in card.text


HOSTILE = (
    "`` <script>x</script> | </td> [a](javascript:x) `](javascript:x) <img src=x onerror=x>\n---\nlicense: mit\n---\n```\n"
)


def test_the_card_of_a_hostile_model(rounded: Path) -> None:
    """Its texts are shown; they are no markup, and end neither the front matter nor the code."""
    made = Artifact(rounded)
    made.manifest["original"].update(name=HOSTILE, fingerprint=HOSTILE, source={"name": HOSTILE, "licence": HOSTILE})
    measured = Measurement(1.0, HOSTILE, 0.1, 9, {HOSTILE: HOSTILE})
    card = model_card(made, {HOSTILE: measured}, HOSTILE)
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    expected = {"library_name": "transformers", "license": "unknown", "pipeline_tag": "text-generation"}
    assert yaml.safe_load(front) == {**expected, "tags": ["agentforge", "rounding"]}
    renderer = MarkdownIt().enable("table")
    renderer.validateLink = lambda _: True  # type: ignore[method-assign]
    soup = BeautifulSoup(renderer.render(text), "html.parser")
    assert not soup.find_all(["script", "img", "a"]) and len(soup.find_all("pre")) == 1
    assert {key for element in soup.find_all() for key in element.attrs} <= {"class", "style"}
    assert soup.text.count("<script>x</script>") == 8
    assert {len(row.find_all("td")) for row in soup.find_all("tr")} == {0, 3, 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Apache License\n Version 2.0", "apache-2.0"), ("MIT License\n", "mit"), ("All rights reserved", "unknown")],
)
def test_the_licence_comes_from_its_file(text: str, expected: str, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text(text, encoding="utf-8")
    assert licence(af.compress(tmp_path / "model", "curves", tmp_path / "a", progress=False)) == expected


def tampered(rounded: Path, out: Path, what: str) -> None:
    """A copy of the artifact that is not what it says."""
    shutil.copytree(rounded, out)
    manifest: Any = read_json(out / MANIFEST)
    entries = index_folder(out)
    tensors = {name: read_tensor(name, entry) for name, entry in entries.items()}
    row = next(row for row in manifest["tensors"] if row["stage"])
    plane = f"{row['name']}.codes"
    if what == "a larger row":
        row["shape"][0] *= 1 << 10
    elif what == "no manifest":
        (out / MANIFEST).unlink()
        return
    elif what == "an unknown tensor":
        tensors["model.extra.weight"] = torch.zeros(3)
    elif what == "a missing plane":
        del tensors[plane]
    elif what == "a longer plane":
        tensors[plane] = torch.cat([tensors[plane], tensors[plane]])
    elif what == "a plane of another dtype":
        tensors[plane] = tensors[plane].view(torch.int8)
    elif what == "a missing tensor":
        del tensors["model.norm.weight"]
        manifest["tensors"] = [row for row in manifest["tensors"] if row["name"] != "model.norm.weight"]
    elif what == "another model's configuration":
        write_json(out / "config.json", {**read_json(out / "config.json"), "hidden_size": 1 << 20})
    elif what == "two sets of weights":
        shutil.copyfile(out / "model.safetensors", out / "other.safetensors")
        write_json(out / "config.json", {**read_json(out / "config.json"), "transformers_weights": "other.safetensors"})
    elif what == "a huge plane that is not there":
        header = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        write_safetensors(out / "model.safetensors", header, (b"\0" * t.nbytes for t in tensors.values()))
        data = (out / "model.safetensors").read_bytes()
        (out / "model.safetensors").write_bytes(data[:-100])
    if what not in ("a huge plane that is not there", "two sets of weights"):
        write_tensors(out / "model.safetensors", tensors)
    (out / MANIFEST).unlink()
    write_manifest(out, {**manifest, "files": describe_files(out)})  # whoever makes a hostile file can compute a hash, too


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a larger row", "settings and shape give"),
        ("no manifest", "agentforge.json: is missing"),
        ("an unknown tensor", "the weight files hold model.extra.weight, which the manifest does not know"),
        ("a missing plane", "codes is in the manifest and not in the weight files"),
        ("a longer plane", "the manifest says"),
        ("a plane of another dtype", "torch.int8"),
        ("a missing tensor", "tensor model.norm.weight is missing"),
        ("another model's configuration", "config.json asks for"),
        ("two sets of weights", "reads other weight files"),
        ("a huge plane that is not there", "no readable safetensors file"),
    ],
)
def test_hostile_folders_are_refused(what: str, message: str, rounded: Path, tmp_path: Path, bounded: None) -> None:
    tampered(rounded, tmp_path / "bad", what)
    with pytest.raises(BadInput, match=message) as refused:
        opened(tmp_path / "bad")
    assert "\n" not in str(refused.value)


def test_unknown_settings_are_refused(rounded: Path, tmp_path: Path) -> None:
    shutil.copytree(rounded, tmp_path / "bad")
    config: Any = read_json(rounded / "config.json")
    config["quantization_config"]["dequantize"] = True
    write_json(tmp_path / "bad" / "config.json", config)
    with pytest.raises(BadInput, match="'dequantize' is not a setting of agentforge"):
        opened(tmp_path / "bad")


def test_a_flipped_bit_in_the_key_that_transformers_asks_for(rounded: Path, tmp_path: Path) -> None:
    """It never calls the quantizer then, as README says; what reads the folder itself refuses it."""
    shutil.copytree(rounded, tmp_path / "bad")
    config = tmp_path / "bad" / "config.json"
    config.write_text(config.read_text().replace("quantization_config", "quantizatioo_config"))
    for read in (af.load, af.artifact.Artifact):
        with pytest.raises(BadArtifact, match="does not name agentforge"):
            read(tmp_path / "bad")


def test_from_the_hub(rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches the files that it knows; the manifest has to be asked for."""
    cache = tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.copytree(rounded, snapshot)
    (snapshot / MANIFEST).unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    asked = []

    def cached_file(name: str, file: str, *, revision: str, cache_dir: Path) -> None:
        asked.append((name, file, revision, cache_dir))
        shutil.copyfile(rounded / file, snapshot / file)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    model = opened("someone/small", cache_dir=tmp_path)
    assert asked == [("someone/small", MANIFEST, "a" * 40, tmp_path)]
    assert torch.equal(logits(model), logits(af.load(rounded).model))


def test_an_artifact_needs_its_folder(rounded: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(rounded)
    with pytest.raises(BadInput, match="is loaded from its folder"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


@pytest.mark.slow
def test_smollm2(smollm2: LanguageModel, tmp_path: Path) -> None:
    made = af.compress(smollm2, "rounding:bits=4,group=64", tmp_path / "a", progress=False)
    script = Path(__file__).parents[1] / "examples" / "transformers_only.py"
    done = subprocess.run([sys.executable, str(script), str(made.path)], capture_output=True, text=True, check=True)
    lines = [line.partition(":")[2].strip() for line in done.stdout.splitlines()]
    assert lines[0] == lines[1] and "Paris" in lines[0]
    assert lines[2] == "the same tensors"
    card = ModelCard(model_card(made))
    assert card.data.license == "apache-2.0" and card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
