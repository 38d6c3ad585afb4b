"""What is written for other programs holds the artifact's numbers, in the bytes that those programs' own tools write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import agentforge as af
from agentforge import open_model, stages
from agentforge.artifact import Artifact
from agentforge.cli import app
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.exports import TO, uniform
from agentforge.exports import gguf as to_gguf
from agentforge.exports.grids import Grid
from agentforge.fit_for import TYPES, fit_for
from agentforge.statistics import Calibration

DATA = Path(__file__).parents[1] / "data" / "quantised"
IDS = torch.arange(24)[None] * 7 % 60
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def wide(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, grouped queries, heads of another size, an untied head, linearly scaled positions; all in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("wide") / "m")
    about = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 264}
    about |= {"tie_word_embeddings": False, "initializer_range": 0.1, "max_position_embeddings": 128}
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(hidden_size=256, intermediate_size=512, rms_norm_eps=1e-5, rope_parameters=rope, **about)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=byte_level()(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0].float()


def packed(model: Path, stage: Any, tmp_path: Path, **options: Any) -> Artifact:
    return af.compress(str(model), stage, tmp_path / "a", progress=False, workers=1, **options)


FORMATS = [
    ("rounding:bits=4,group=32", "gguf", "Q4_1"),
    ("rounding:bits=2,group=64 | entropy", "gguf", "Q4_1"),
    ("rounding:bits=4,group=32,symmetric=true", "gguf", "Q4_0"),
    ("rounding:bits=5,group=0", "gguf", "Q5_1"),
    ("rounding:bits=5,group=32,symmetric=true", "gguf", "Q5_0"),
    ("rounding:bits=8,group=32,symmetric=true", "gguf", "Q8_0"),
    ("ternary:rule=threshold", "gguf", "TQ1_0"),
    ("ternary:rule=threshold,packing=2bit", "gguf", "TQ2_0"),
    ("rounding:bits=4,group=32,symmetric=true", "compressed-tensors", "4 bits"),
    ("rounding:bits=6,group=0,symmetric=true", "compressed-tensors", "8 bits"),
    ("ternary", "compressed-tensors", "4 bits"),
    ("ggml:type=q4_0", "compressed-tensors", "4 bits"),
    ("ggml:type=q8_0", "compressed-tensors", "8 bits"),
    ("ggml:type=q4_0", "mlx", "4 bits"),
    ("ggml:type=q8_0", "gptq", "8 bits"),
    ("rounding:bits=2,group=32,symmetric=true", "gptq", "2 bits"),
    ("rounding:bits=3,group=0,symmetric=true", "gptq", "3 bits"),
    ("rounding:bits=4,group=64,symmetric=true", "gptq", "4 bits"),
    ("rounding:bits=8,group=32,symmetric=true", "gptq", "8 bits"),
    ("rounding:bits=3,group=32", "mlx", "3 bits"),
    ("rounding:bits=6,group=0", "mlx", "6 bits"),
    ("rounding:bits=7,group=128,symmetric=true", "mlx", "8 bits"),
    ("ternary", "mlx", "2 bits"),
    ("ternary:packing=2bit", "bitnet", "ternary, activations not rounded"),
    ("vptq:v=4,k=64", "vptq", "4 weights in 6 bits"),
    ("vptq:v=6,k=50,residual=32,outliers=0.05,outlier_v=3,outlier_k=16,norm=std", "vptq", "6 weights in 11 bits"),
    ("vptq:v=4,k=32,groups=2,shared=true | entropy", "vptq", "4 weights in 5 bits"),
]


CASES = [("tiny_llama", *row) for row in FORMATS if row[1] in ("gguf", "vptq")]
CASES += [("wide", *row) for row in FORMATS if row[1] != "vptq"]


@pytest.mark.parametrize(("source", "stage", "to", "kind"), CASES)
def test_it_opens_again_as_the_same_model(
    source: str, stage: str, to: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = packed(request.getfixturevalue(source), stage, tmp_path)
    found = af.export(artifact.path, to)
    assert found.path == tmp_path / {"gguf": "a.gguf"}.get(to, f"a-{to}")
    assert found.rounded == {} and found.exact == len(artifact.rows) == sum(found.kinds.values())
    again, ours = open_model(found.path), af.load(artifact.path)
    assert torch.equal(logits(again.model), logits(ours.model))
    text = "The quick brown fox, 1234 or naïve?"
    assert again.tokenizer(text)["input_ids"] == ours.tokenizer(text)["input_ids"]
    if to == "gguf":
        assert kind in found.kinds or source == "tiny_llama"
    else:
        assert again.source["precision"] == f"dequantised {to} ({kind})"
        with safe_open(found.path / "model.safetensors", "pt") as file:
            assert file.metadata()["agentforge.manifest_sha256"] == artifact.sha256
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["a", found.path.name]


@pytest.mark.parametrize("stage", ["rounding:bits=4,group=32", "ternary:rule=threshold", "rounding:bits=8,symmetric=true"])
def test_transformers_own_reader_of_gguf_agrees(stage: str, wide: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifact = packed(wide, stage, tmp_path, embeddings=True)
    af.export(artifact, "gguf", tmp_path / "out" / "m.gguf")
    config = json.loads((wide / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="m.gguf", dtype=torch.float32)
    # It leaves out how positions are scaled.
    theirs.model.rotary_emb.inv_freq /= config["rope_parameters"]["factor"]
    torch.testing.assert_close(logits(theirs.eval()), logits(af.load(artifact.path).model), atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    assert tokenizer.convert_ids_to_tokens([0, 1, 70]) == open_model(wide).tokenizer.convert_ids_to_tokens([0, 1, 70])


def test_a_gguf_file_says_what_it_is(wide: Path, tmp_path: Path) -> None:
    artifact = packed(wide, "rounding:bits=4,group=32", tmp_path)
    file = af.export(artifact, "gguf").path
    reader = gguf.GGUFReader(file)

    def said(key: str) -> Any:
        return reader.get_field(key).contents()

    assert said("general.architecture") == "llama" and said("general.quantization_version") == 2
    assert said("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_1
    assert said("agentforge.manifest_sha256") == artifact.sha256
    assert said("llama.rope.scaling.factor") == 2.0 and said("llama.attention.key_length") == 32
    assert len(said("tokenizer.ggml.tokens")) == said("llama.vocab_size") == 264
    assert said("tokenizer.ggml.token_type")[:3] == [3, 3, 1] and said("tokenizer.ggml.token_type")[258:] == [
        1,
        1,
        1,
        1,
        5,
        5,
    ]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["token_embd.weight"], types["output_norm.weight"], types["blk.1.attn_v.weight"]) == ("BF16", "F32", "Q4_1")
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    wanted = af.load(artifact.path).tensor("model.layers.1.mlp.down_proj.weight").numpy()
    assert np.array_equal(gguf.dequantize(down.data, down.tensor_type), wanted)


def test_the_smallest_file_for_llama_cpp_has_ternary_blocks(wide: Path, tmp_path: Path) -> None:
    """They reach a budget that no other types reach, and the file opens as what it holds."""
    text = Text("words", "test", "".join(f"The {i}th word is number {i * i}. " for i in range(100)))
    about = {"calibration": Calibration(text, tokens=128, context=64, sensitivity_tokens=64), "text": text, "tokens": 126}
    out = tmp_path / "a.gguf"
    with pytest.raises(BadInput, match="the smallest candidates"):
        fit_for(wide, "gguf", out, 290_000, types=[t for t in TYPES["gguf"] if t != "tq1_0"], progress=False, **about)
    found = fit_for(wide, "gguf", out, 290_000, progress=False, **about)
    assert found.file.bytes <= 290_000 and found.file.kinds["TQ1_0"] > 5 and "TQ2_0" not in found.file.kinds
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(found.file.path).tensors}
    up = tensors["blk.0.ffn_up.weight"]
    assert np.array_equal(
        open_model(found.file.path).tensor(f"{UP}.weight").numpy(), gguf.dequantize(up.data, up.tensor_type)
    )


def bits_of(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes of rows of words, by single bits."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    single = np.unpackbits(raw, axis=1, bitorder="little")[:, : bits * columns].reshape(len(raw), columns, bits)
    return torch.from_numpy((single << np.arange(bits)).sum(-1).astype(np.uint8))


TOOLS = [
    "ct-pack-4",
    "ct-pack-8",
    "gptq-3",
    "gptq-4",
    "gptq-8-rows",
    *(f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    "bitnet-auto",
]


@pytest.mark.parametrize("name", TOOLS)
def test_the_bytes_are_those_that_the_formats_own_tools_write(name: str) -> None:
    """Codes and scales are taken out of a tool's planes, and packed again by us."""
    stored, config = load_file(DATA / name / "model.safetensors"), json.loads((DATA / name / "config.json").read_text())
    planes = {leaf.removeprefix(f"{UP}."): plane for leaf, plane in stored.items() if leaf.startswith(f"{UP}.")}
    said, stage, rows, columns = config["quantization_config"], stages.parse("rounding"), 128, 64
    if name.startswith("ct"):
        about = said["config_groups"]["group_0"]["weights"]
        bits, group = about["num_bits"], about["group_size"] or 0
        codes = bits_of(planes["weight_packed"], bits, columns)
        made, scheme = uniform.compressed_tensors(
            "w", Grid(stage, codes, bits, group, planes["weight_scale"], 1 << bits - 1, None)
        )
        assert scheme.items() >= {(k, about[k]) for k in ("num_bits", "strategy", "symmetric", "type", "group_size")}
    elif name.startswith("gptq"):
        bits, group = said["bits"], max(0, said["group_size"])
        codes = bits_of(planes["qweight"].T, bits, columns)
        grid = Grid(stage, codes, bits, group, planes["scales"].T, 1 << bits - 1, None)
        made, scheme = uniform.gptq("w", grid)
        assert scheme == {"bits": bits, "group_size": said["group_size"]} and said["checkpoint_format"] == "gptq"
    elif name.startswith("mlx"):
        codes = bits_of(planes["weight"].view(torch.int32), said["bits"], columns)
        grid = Grid(stage, codes, said["bits"], 0, planes["scales"], None, planes["biases"])
        made, scheme = uniform.mlx("w", grid)
        assert scheme == said
    else:
        codes = torch.cat([planes["weight"] >> shift & 3 for shift in (0, 2, 4, 6)])
        grid = Grid(stages.parse("ternary"), codes, 2, 0, planes["weight_scale"].expand(rows, 1), 1, None)
        made, _ = uniform.bitnet("w", grid)
    for leaf, plane in planes.items():
        assert made[leaf].dtype == plane.dtype and torch.equal(made[leaf].reshape(plane.shape), plane), leaf


def test_transformers_itself_opens_what_is_written_for_its_bitnet(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = packed(tiny_llama, "ternary", tmp_path)
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(af.export(artifact, "bitnet").path).eval()
        found = logits(theirs)
    ours = af.load(artifact.path)
    for name, module in theirs.named_modules():
        if type(module).__name__ == "AutoBitLinear":
            assert torch.equal(module.weight * module.weight_scale, ours.tensor(f"{name}.weight"))
    rounded = logits(af.load(artifact.path, runtime="packed").model)  # activations of 8 bits, as theirs
    torch.testing.assert_close(found, rounded, atol=0.05, rtol=0)


def test_weights_of_several_settings(wide: Path, tmp_path: Path) -> None:
    names = [weight.name for weight in open_model(wide).weights()]
    each = {name: stages.parse(f"rounding:bits={2 + 2 * (i % 2)},group={32 << i % 3}") for i, name in enumerate(names)}
    artifact = packed(wide, each, tmp_path)
    for to in ("gguf", "mlx"):
        assert torch.equal(logits(open_model(af.export(artifact, to).path).model), logits(af.load(artifact.path).model))
    each = {name: stages.parse(f"rounding:bits={4 + 4 * (i % 2)},symmetric=true") for i, name in enumerate(names)}
    artifact = packed(wide, each, tmp_path, overwrite=True)
    found = af.export(artifact, "compressed-tensors")
    assert found.kinds == {"bfloat16": 7, "int4": 7, "int8": 7}
    assert torch.equal(logits(open_model(found.path).model), logits(af.load(artifact.path).model))
    with pytest.raises(BadInput, match=r"tensor \S+ is of bits 8 \(\S+: 4\); the format has one setting for all"):
        af.export(artifact, "gptq")


def test_several_schemes_are_said_as_the_formats_own_tool_says_them() -> None:
    config = json.loads((DATA / "ct-pack-mixed" / "config.json").read_text())["quantization_config"]
    theirs = config["config_groups"]
    assert len(theirs) == 2
    said = {stem: group["weights"] for group in theirs.values() for stem in group["targets"]}
    ours = uniform.compressed_tensors_config(said, ["lm_head"])["quantization_config"]
    assert ours.items() <= (config | {"config_groups": ours["config_groups"]}).items()
    assert {name: group | {"format": "pack-quantized"} for name, group in ours["config_groups"].items()} == theirs


REFUSED = [
    (
        "rounding:bits=8,group=32",
        "gguf",
        r"tensor \S+ is encoded by rounding:bits=8,group=32, asymmetric; GGUF holds .*--stage",
    ),
    (
        "rounding:bits=4,group=16",
        "gguf",
        r"is encoded in groups of 16 columns; GGUF holds .*--stage rounding:bits=4,group=32",
    ),
    (
        "rounding:bits=4,group=48",
        "gguf",
        r"is of \d+ columns, so that rounding:group=48 leaves its last group shorter; GGUF",
    ),
    ("curves", "gguf", "is encoded by curves; GGUF holds"),
    ("rounding:bits=4", "compressed-tensors", r"asymmetric; compressed-tensors holds symmetric rounding .*symmetric=true"),
    ("ggml:type=q5_0", "compressed-tensors", r"encoded by ggml:type=q5_0; compressed-tensors holds .* ggml's q4_0 and q8_0"),
    ("rounding:bits=4", "gptq", r"asymmetric; GPTQ holds symmetric rounding .*symmetric=true"),
    ("rounding:bits=4,group=16", "mlx", "is encoded in groups of 16 columns; MLX holds .*group=64"),
    (
        "ternary:rule=threshold",
        "bitnet",
        "is encoded by ternary:rule=threshold, .*; bitnet holds ternary weights of one scale",
    ),
    ("vptq:v=4,k=16,parts=2", "vptq", "is encoded by vptq:v=4,k=16,parts=2; the VPTQ format holds vptq of one part"),
    ("vptq:v=4,k=8,residual=16", "vptq", "the VPTQ format holds .* no more residual centroids than main ones"),
    ("vptq:v=4,k=8,groups=3", "vptq", r"in groups of \[\d+, \d+\] columns; the VPTQ format holds .* groups of equal width"),
    ("ternary", "onnx", "format 'onnx' does not exist; choose from gguf, compressed-tensors"),
]


@pytest.mark.parametrize(("stage", "to", "said"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    stage: str, to: str, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    artifact = packed(tiny_llama, stage, tmp_path)
    with pytest.raises(BadInput, match=said):
        af.export(artifact.path, to, tmp_path / "out" / "x")
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"a"}


def reconfigured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_other_models_than_plain_llamas_are_no_gguf(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    biased = shutil.copytree(tiny_llama, tmp_path / "m")
    config = LlamaConfig.from_pretrained(biased, attention_bias=True)
    LlamaForCausalLM(config).save_pretrained(biased)
    with pytest.raises(BadInput, match=r"tensor model.layers.0.self_attn.\w_proj.bias is not part of a plain Llama"):
        af.export(packed(biased, "ternary", tmp_path), "gguf")
    af.export(tmp_path / "a", "mlx")  # which holds any model
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = shutil.copytree(tiny_llama, tmp_path / "n")
    reconfigured(scaled, rope_parameters={**rope, "original_max_position_embeddings": 64})
    with pytest.raises(BadInput, match="rope_type is 'llama3'; GGUF files are written of default or linear alone"):
        af.export(packed(scaled, "ternary", tmp_path, overwrite=True), "gguf")
    with pytest.raises(BadInput, match="is a classifier"):
        af.export(packed(Path("digits-mlp"), "ternary", tmp_path, overwrite=True), "gguf")


def scaled_by(folder: Path, factor: float, out: Path) -> Path:
    from safetensors.torch import save_file

    copy = shutil.copytree(folder, out)
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {n: t * factor if "proj" in n else t for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    return copy


def test_scales_that_float16_does_not_hold_are_rounded_and_said_to_be(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = packed(tiny_llama, "ternary", tmp_path)
    for to in ("gguf", "gptq"):
        found = af.export(artifact, to)
        assert len(found.rounded) == 14 and found.exact == len(artifact.rows) - 14
        again, ours = open_model(found.path), af.load(artifact.path)
        for name, lost in found.rounded.items():
            wanted = ours.tensor(name)
            assert float((again.tensor(name) - wanted).abs().max()) == lost <= float(wanted.abs().max()) * 2**-11
        assert re.search("14 differ by the rounding of their scales to float16, by at most", "\n".join(found.lines()))
    small = packed(scaled_by(tiny_llama, 1e-5, tmp_path / "small"), "rounding:group=32", tmp_path, overwrite=True)
    found = af.export(small, "gguf", tmp_path / "small.gguf")
    assert found.rounded and max(found.rounded.values()) < 16 * 2**-25
    assert not af.export(small, "mlx").rounded  # which has scales in float32, too
    large = packed(
        scaled_by(tiny_llama, 1e7, tmp_path / "large"), "rounding:symmetric=true,group=32", tmp_path, overwrite=True
    )
    for to in ("gguf", "gptq"):
        with pytest.raises(BadInput, match=r"tensor \S+ has scales up to \S+; the format has them in float16"):
            af.export(large, to, tmp_path / "x")
    assert not af.export(large, "compressed-tensors").rounded


def test_a_file_that_decodes_to_something_else_never_gets_its_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, right = packed(tiny_llama, "rounding:group=32,symmetric=true", tmp_path), to_gguf.blocks

    def wrong(name: str, grid: Grid) -> tuple[str, np.ndarray]:
        kind, made = right(name, grid)
        made[-1, -1] ^= 1
        return kind, made

    monkeypatch.setattr(to_gguf, "blocks", wrong)
    with pytest.raises(BadInput, match=r"tensor \S+: what was written decodes to other values, so that nothing is exported"):
        af.export(artifact, "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_nothing_that_is_there_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = packed(tiny_llama, "ternary", tmp_path)
    (tmp_path / "a.gguf").write_text("mine")
    (tmp_path / "a-mlx").mkdir()
    (tmp_path / "a-mlx" / "mine").write_text("mine")
    for to in ("gguf", "mlx"):
        with pytest.raises(BadInput, match="is in the way; choose another"):
            af.export(artifact, to)
    assert (tmp_path / "a.gguf").read_text() == (tmp_path / "a-mlx" / "mine").read_text() == "mine"


def test_the_same_bytes_each_time(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = packed(tiny_llama, "ternary", tmp_path)
    for to in ("gguf", "mlx"):
        first, second = (af.export(artifact, to, tmp_path / name).path for name in (f"{to}-1", f"{to}-2"))
        files = [first] if to == "gguf" else sorted(first.iterdir())
        assert all(f.read_bytes() == (second if to == "gguf" else second / f.name).read_bytes() for f in files)


def byte_level(*before: Any) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = ["<s>", "</s>", *alphabet, "12", "ab", "'s", "123"]
        merges = [("1", "2"), ("a", "b"), ("'", "s"), ("12", "3")]
        raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any(isinstance(b, str) for b in before))
        parts = [getattr(pre_tokenizers, b[0])(**b[1]) if isinstance(b, tuple) else split(b) for b in before]
        raw.pre_tokenizer = pre_tokenizers.Sequence([*parts, level]) if parts else level
        raw.decoder = decoders.ByteLevel()
        return raw

    return make


def split(rule: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(rule), "isolated")


def pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "w")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("gpt-2", byte_level()),
        ("smollm", byte_level(("Digits", {"individual_digits": True}))),
        ("llama-bpe", byte_level(to_gguf.LLAMA_3)),
        ("default", pieces),
        (None, byte_level(r"\d{2}|.")),
    ],
)
def test_a_tokenizer_goes_into_a_gguf_file_if_its_rule_has_a_name(
    rule: str | None, make: Callable[[], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    about = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>" if rule == "default" else None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), chat_template="{{ messages }}", **about)
    reconfigured(folder, vocab_size=300)
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.embed_tokens.weight": torch.randn(300, 64)}, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    artifact = packed(folder, "ternary:rule=threshold", tmp_path)
    if rule is None:
        with pytest.raises(BadInput, match="its tokenizer is of a kind that no name in a GGUF file stands for"):
            af.export(artifact, "gguf")
        return
    file = af.export(artifact, "gguf").path
    assert gguf.GGUFReader(file).get_field("tokenizer.ggml.pre").contents() == rule
    again = open_model(file).tokenizer
    for text in ("hello world", "it's 12345 ab", "</s>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == "{{ messages }}"


def test_the_command_says_what_was_compared(tiny_llama: Path, tmp_path: Path) -> None:
    packed(tiny_llama, "rounding:group=32,symmetric=true", tmp_path)
    asked = ["export", str(tmp_path / "a"), "--to"]
    said = CliRunner().invoke(app, [*asked, "gguf"], catch_exceptions=False).stdout
    assert "14 Q4_0" in said and "decoded again: 20 tensors are the artifact's, bit for bit" in said
    found = json.loads(CliRunner().invoke(app, [*asked, "mlx", "--out", str(tmp_path / "m"), "--json"]).stdout)
    assert found == found | {"path": str(tmp_path / "m"), "to": "mlx", "exact": 20, "rounded": {}}
    assert isinstance(CliRunner().invoke(app, [*asked, "bitnet"]).exception, BadInput)
    assert all(to in CliRunner().invoke(app, ["export", "--help"]).stdout.replace("\n", " ") for to in TO)
