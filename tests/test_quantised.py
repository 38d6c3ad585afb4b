"""Folders that other tools wrote give what those tools compute; what is not exactly known is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_llama
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import agentforge as af
from agentforge import open_model
from agentforge.artifact import dequantize
from agentforge.cli import app
from agentforge.errors import BadInput
from agentforge.evaluation import Text, divergence, perplexity

DATA = Path(__file__).parent / "data" / "quantised"
IDS = torch.arange(16)[None] * 7 % 64
TEXT = Text("a text", "all", "The quick brown fox jumps over the lazy dog; 12 x 34 = 408. " * 40)
PROJ, UP = "model.layers.0.mlp.", "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return open_model(folder).model(input_ids=IDS).logits[0]


@pytest.mark.parametrize("name", sorted(load_file(DATA / "logits.safetensors")))
def test_a_folder_gives_what_its_own_tool_computes(name: str) -> None:
    torch.testing.assert_close(logits(DATA / name), load_file(DATA / "logits.safetensors")[name], rtol=0, atol=1e-4)
    opened = open_model(DATA / name)
    assert opened.parameters == 64 * 64 + 3 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    assert opened.opened_bytes == opened.bytes_on_disk == (DATA / name / "model.safetensors").stat().st_size
    assert all(torch.equal(opened.reader(n)(), opened.tensor(n)) for n in opened.entries)


def test_the_precision_says_how_it_was_quantised() -> None:
    assert open_model(DATA / "gptq-3").source["precision"] == "dequantised gptq (3 bits)"
    assert open_model(DATA / "bnb-int8").source["precision"] == "dequantised bitsandbytes (8 bits, activations not rounded)"


def fp8_rows(folder: Path, copy: Path) -> tuple[Path, Path]:
    """The folder as fbgemm packs it, a scale per row, in `copy`; and what that stands for, in a folder beside it."""
    plain = shutil.copytree(shutil.copytree(folder, copy, dirs_exist_ok=True), copy.with_name("plain"))
    packed, dense = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [n for n in packed if n.endswith("proj.weight") or ".experts." in n]:
        scale = dense[name].abs().amax(1, keepdim=True) / 448
        packed[name] = (dense[name] / scale).to(torch.float8_e4m3fn)
        packed[f"{name}_scale"] = scale
        packed[f"{name.removesuffix('weight')}input_scale_ub"] = torch.tensor([1200.0])
        dense[name] = packed[name].float() * scale
    save_file(packed, copy / "model.safetensors", {"format": "pt"})
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    configure(copy, quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    (copy / "quantize_config.json").write_text("{}")
    return copy, plain


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_it_is_measured_and_compressed_as_what_it_stands_for(tiny_llama: Path, tmp_path: Path) -> None:
    packed, plain = (open_model(folder) for folder in fp8_rows(tiny_llama, tmp_path / "packed"))
    assert perplexity(packed, TEXT).value == perplexity(plain, TEXT).value
    assert divergence(packed, plain, TEXT).kl.value == 0
    assert packed.bytes_on_disk < 0.5 * plain.bytes_on_disk
    made = [
        af.compress(model, "rounding:bits=4,group=32", tmp_path / name, workers=workers, progress=False)
        for model, name, workers in ((packed, "a", 1), (plain, "b", 1), (packed, "c", 2))
    ]
    assert len({(one.path / "model.safetensors").read_bytes() for one in made}) == 1
    original = made[0].manifest["original"]
    assert original["source"]["precision"] == "dequantised fbgemm_fp8 (FP8, activations not rounded)"
    assert original["bytes"] == packed.bytes_on_disk
    assert not (made[0].path / "quantize_config.json").exists()
    dense = open_model(dequantize(made[0], tmp_path / "dense"))  # whose config.json speaks of no quantiser
    assert dense.entries.keys() == packed.entries.keys()


def test_the_command_line_measures_it(tiny_llama: Path, tmp_path: Path) -> None:
    packed, _ = fp8_rows(tiny_llama, tmp_path / "packed")
    (tmp_path / "t.txt").write_text(TEXT.text)
    asked = ["evaluate", str(packed), "--against", str(tiny_llama), "--text", str(tmp_path / "t.txt"), "--json"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--context", "64"]).stdout)["measurements"]
    assert 0 < found["KL(original || model)"]["value"] < 0.1


def test_experts_under_the_names_of_the_file(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)).save_pretrained(
        tmp_path / "made"
    )
    packed, plain = fp8_rows(tmp_path / "made", tmp_path / "packed")
    assert torch.equal(logits(packed), logits(plain))
    assert open_model(packed).bytes_on_disk == (packed / "model.safetensors").stat().st_size


def test_biases_of_zeros_that_no_layer_has_are_left_out(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "gptq-4", tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"{UP}.bias": torch.zeros(128)}, folder / "model.safetensors")
    assert torch.equal(logits(folder), logits(DATA / "gptq-4"))
    save_file({**tensors, f"{UP}.bias": torch.ones(128)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"tensor model.layers.0.mlp.up_proj.bias is not part of"):
        open_model(folder)


def test_a_module_of_mlx_may_have_its_own_bits(tmp_path: Path) -> None:
    """The parts of two folders in one, as mlx-lm mixes them."""
    folder = shutil.copytree(DATA / "mlx-4", tmp_path / "f")
    other = {n: t for n, t in load_file(DATA / "mlx-6" / "model.safetensors").items() if n.startswith(UP)}
    save_file({**load_file(folder / "model.safetensors"), **other}, folder / "model.safetensors")
    said = {"bits": 4, "group_size": 32, "mode": "affine", UP: {"bits": 6, "group_size": 32}, f"{PROJ}gate": False}
    configure(folder, quantization=said, quantization_config=said)
    mixed = open_model(folder)
    assert torch.equal(mixed.tensor(f"{UP}.weight"), open_model(DATA / "mlx-6").tensor(f"{UP}.weight"))
    assert mixed.source["precision"] == "dequantised mlx (4 bits and 6 bits)"


def test_a_folder_of_hqq_may_say_nothing_of_it(tmp_path: Path) -> None:
    """Its own writer leaves config.json as it was: all settings lie beside the planes.  Its pickles stay closed."""
    folder = shutil.copytree(DATA / "hqq-3", tmp_path / "f")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(folder), logits(DATA / "hqq-3"))
    assert open_model(folder).source["precision"] == "dequantised hqq (3 bits)"
    (folder / "model.safetensors").rename(folder / "qmodel.pt")
    with pytest.raises(BadInput, match=r"pickled \(qmodel\.pt\)"):
        open_model(folder)


@pytest.mark.parametrize(
    ("name", "scheme", "said"),
    [
        (
            "ct-int",
            {"input_activations": {"num_bits": 8, "dynamic": False}},
            "activations are rounded by scales from the file",
        ),
        ("ct-int", {"output_activations": {"num_bits": 8}}, "'output_activations' is"),
        ("ct-pack-8", {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}, "packed numbers are floats"),
        ("ct-pack-4", {"weights": {"num_bits": 4, "strategy": "token"}}, "'strategy' is 'token'"),
    ],
)
def test_schemes_that_are_not_followed_are_refused(tmp_path: Path, name: str, scheme: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(DATA / name, tmp_path / "f")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"] |= scheme
    configure(folder, quantization_config=config)
    with pytest.raises(BadInput, match=said):
        open_model(folder)


@pytest.mark.parametrize("name", ["awq", "mlx-4"])
def test_a_matrix_of_zeros_alone_is_refused(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(DATA / name, tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    for leaf in ("qweight", "qzeros", "proj.weight", "biases"):
        tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith(leaf)}
    save_file(tensors, folder / "model.safetensors")
    opened = open_model(folder)
    with pytest.raises(BadInput, match="already quantised by another tool: its matrix holds nothing but zeros"):
        opened.tensor(opened.weights()[0].name)


def test_layers_of_gpt2_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    name = "transformer.h.0.attn.c_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "f" / "model.safetensors")
    configure(tmp_path / "f", quantization_config={"quant_method": "fbgemm_fp8"})
    with pytest.raises(BadInput, match=r"GPT-2's kind"):
        open_model(tmp_path / "f")


def without(leaf: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"{UP}.{leaf}"}


def changed(leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: change(t).contiguous() if n == f"{UP}.{leaf}" else t for n, t in tensors.items()}


def state(text: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: torch.frombuffer(bytearray(text), dtype=torch.uint8)


NF4 = "weight.quant_state.bitsandbytes__nf4"
HUGE = b'{"quant_type": "nf4", "blocksize": 64, "shape": [2000000000, 2000000000]}'
DOWN = f"{PROJ}down_proj"
HUGE_LAYER = {"in_features": 128, "out_features": 1 << 22, "group_num": 2, "group_size": 64, "outlier_size": 0}
HUGE_LAYER |= {"vector_lens": [-1, 6], "num_centroids": [-1, 64], "num_res_centroids": [-1, -1]}
HOSTILE: dict[str, tuple[str, Callable[[Tensors], Tensors] | dict[str, Any], str]] = {
    "no scales": ("gptq-4", without("scales"), "scales is missing"),
    "the weight, too": ("gptq-4", lambda tensors: tensors | {f"{UP}.weight": torch.ones(128, 64)}, "quantised and as it is"),
    "no order": ("gptq-2-ordered", without("g_idx"), "g_idx is missing"),
    "zeros of another shape": ("gptq-4", changed("qzeros", lambda t: t[:, 1:]), r"\[2, 15\], expected int32\[2, 16\]"),
    "codes of another dtype": ("awq", changed("qweight", lambda t: t.long()), r"qweight is int64\[64, 16\], expected int32"),
    "codes in three dimensions": ("awq", changed("qweight", lambda t: t[None]), r"is \[1, 64, 16\], expected a matrix"),
    "nothing at all": ("gptq-4", changed("qweight", lambda t: t[:, :0]), r"is \[8, 0\], expected a matrix"),
    "groups that lie": ("gptq-4", {"group_size": 16}, r"qzeros is int32\[4, 8\], expected int32\[8, 8\]"),
    "groups of nothing": ("gptq-4", {"group_size": 0}, "group_size is 0, expected a positive number"),
    "groups of MLX that lie": ("mlx-4", {"group_size": 64}, r"is uint32\[64, 8\], expected uint32\[64, 16\]"),
    "bits that lie": ("mlx-4", {"bits": 8}, "expected uint32"),
    "bits of no kind": ("gptq-4", {"bits": "4"}, "bits is '4', expected"),
    "another order than said": ("gptq-2-ordered", {"desc_act": False}, "desc_act says there is none"),
    "groups that do not exist": ("gptq-2-ordered", changed("g_idx", lambda t: t + 7), "leads out of the 2 groups"),
    "another packing": ("gptq-4", {"checkpoint_format": "marlin", "format": "marlin"}, "format' is 'marlin', which is not"),
    "two versions": ("gptq-4", {"checkpoint_format": "gptq_v2"}, "checkpoint_format and format are not the same"),
    "an unknown setting": ("awq", {"rotation": "hadamard"}, "'rotation' is 'hadamard', which is not supported"),
    "AWQ without zero points": ("awq", {"zero_point": False}, "'zero_point' is False"),
    "static activations": ("fp8", {"activation_scheme": "static"}, "'activation_scheme' is 'static'"),
    "a cache of its own": ("ct-pack-4", {"kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme' is"),
    "two schemes": (
        "ct-pack-4",
        {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
        "several schemes",
    ),
    "no schemes": ("ct-pack-4", {"config_groups": None}, "config_groups are missing"),
    "the format of another": (
        "ct-pack-4",
        {"format": "int-quantized"},
        "tensors model.layers.0.mlp.down_proj.. are",
    ),
    "a shape that lies": ("ct-pack-4", changed("weight_shape", lambda t: t * 1000), "weight_packed is int32"),
    "a shape below zero": ("ct-pack-4", changed("weight_shape", lambda t: -t), "expected two positive numbers"),
    "packed, no scales": ("ct-pack-4", without("weight_scale"), "weight_scale is missing"),
    "bytes, no scales": ("ct-int", without("weight_scale"), "up_proj.weight is int8, which nothing explains"),
    "no state": ("bnb-nf4", without(NF4), "is missing"),
    "a state that is none": ("bnb-nf4", changed(NF4, state(b"[" * 9000)), "does not describe a matrix"),
    "a state that is a list": ("bnb-nf4", changed(NF4, state(b"[]")), "does not describe a matrix"),
    "a huge matrix": ("bnb-nf4", changed(NF4, state(HUGE)), r"weight is uint8\[4096, 1\], expected uint8\[20000"),
    "a state of the other kind": ("bnb-nf4", changed(NF4, state(HUGE.replace(b"nf4", b"fp4"))), "does not describe"),
    "rows in another order": ("bnb-int8", changed("weight_format", lambda t: t + 1), "rows are not in order"),
    "blocks of no kind": ("fp8-blocks", {"weight_block_size": [0, 64]}, "expected two positive numbers"),
    "blocks that lie": ("fp8-blocks", {"weight_block_size": [16, 64]}, "weight_scale_inv is float32"),
    "a code that is no trit": ("bitnet-auto", changed("weight", lambda t: t | 255), "a code is 3, expected 0 to 2"),
    "ternary weights that are still trained": ("bitnet", {"quantization_mode": "online"}, "'quantization_mode' is 'online'"),
    "a norm of its own": ("bitnet", {"use_rms_norm": True}, "'use_rms_norm' is True"),
    "layers of which nothing is said": (
        "vptq",
        {"config_for_layers": {}},
        "config_for_layers says nothing of model.layers.0",
    ),
    "a huge layer": (
        "vptq",
        {"config_for_layers": {DOWN: HUGE_LAYER}},
        r"indices is int32\[2, 11, 12\], expected int32\[2, 699051",
    ),
    "columns that lie": (
        "vptq",
        {"config_for_layers": {DOWN: HUGE_LAYER | {"group_size": 9}}},
        "2 groups of 9 columns and 0",
    ),
    "books that lie": ("vptq", {"config_for_layers": {DOWN: HUGE_LAYER | {"num_centroids": [0, 65]}}}, "centroids of"),
    "lengths of no kind": ("vptq", {"config_for_layers": {DOWN: HUGE_LAYER | {"vector_lens": 4}}}, "expected two numbers"),
    "an order that is none": ("vptq", changed("perm", torch.zeros_like), "perm is no order of the columns"),
    "outliers that lead out": (
        "vptq-outliers",
        changed("outlier_indices", lambda t: t * 0 - 1),
        "lead out of their codebook",
    ),
    "an HQQ packing of no kind": ("hqq-4", changed("packing", state(b"4bit_u9")), "packing is b'4bit_u9', which is not"),
    "groups of HQQ that lie": ("hqq-4", changed("group_size", lambda t: t * 0 + 48), "128 x 64 numbers are no whole groups"),
    "groups of HQQ that are too long": ("hqq-4", changed("group_size", lambda t: t * 2), r"expected uint8\[64, 64\]"),
    "a huge HQQ matrix": ("hqq-4", changed("shape", lambda t: t << 20), r"expected uint8\[140737488355328, 32\]"),
    "an HQQ shape of no matrix": ("hqq-4", changed("shape", lambda t: t[:1]), "expected three positive numbers"),
    "HQQ codes seen as floats": ("hqq-4", changed("view_as_float", lambda t: t + 1), "'view_as_float' is 1, which is not"),
    "HQQ scales that are quantised": ("hqq-4", changed("quant_scale", lambda t: t + 1), "'quant_scale' is 1, which is not"),
    "no HQQ zero points": ("hqq-4", without("zero"), "zero is missing"),
    "no HQQ bits": ("hqq-4", without("nbits"), "nbits is missing"),
    "an unknown tool": ("awq", {"quant_method": "quark"}, "in a way that is not known.*'quark'"),
    "not even a name": ("awq", {"quant_method": ["awq"]}, "in a way that is not known"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.usefixtures("bounded")
def test_what_is_not_exactly_known_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    name, change, said = HOSTILE[what]
    folder = shutil.copytree(DATA / name, tmp_path / "f")
    if isinstance(change, dict):
        config = json.loads((folder / "config.json").read_text())
        keys = {"quantization_config", "quantization"} & config.keys()
        configure(folder, **{key: {**config[key], **change} for key in keys})
    else:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(BadInput, match=rf"already quantised by another tool.*{said}.*; open the model it was made from$"):
        open_model(folder).state_dict()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_that_a_wrapper_made_longer_are_refused(tiny_llama: Path, tmp_path: Path, prefix: str) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "f")
    tensors = {f"{prefix}{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"tensor \S+ is (missing|not part of)"):
        open_model(folder)


def test_shards_without_an_index_and_a_byte_order_mark_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "f")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(BadInput, match=r"model.safetensors is missing"):
        open_model(folder)
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    with pytest.raises(BadInput, match=r"no valid JSON \(Unexpected UTF-8 BOM"):
        open_model(folder)
