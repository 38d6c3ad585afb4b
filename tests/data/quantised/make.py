"""Makes the folders beside it, and logits.safetensors, with the tools themselves; README.md says which.

Each tool writes its folder from one tiny Llama; then it reads it, dequantises each matrix in float32 by its own code, and a
plain Llama of transformers computes the logits of IDS from those.  Nothing of agentforge is used.
"""

import json
import math
import random
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE, WORK = Path(__file__).parent, Path(tempfile.mkdtemp())
BASE, IDS = WORK / "base", torch.arange(16)[None] * 7 % 64
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=1,
)


def base(tokenizer: Path) -> None:
    """tokenizer: a folder with any tokenizer of at most 64 tokens, or of more: the tools only want one to be there."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.float16).save_pretrained(BASE)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, BASE)


def of_modules(stored, leaf, of=""):
    return sorted(name.removesuffix(f".{leaf}") for name in stored if name.endswith(f"{of}.{leaf}"))


def written(folder, tensors, **settings):
    """A folder whose file we write ourselves, around planes that a tool made."""
    folder.mkdir()
    config = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}, indent=2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def gptq(folder, **settings):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    random.seed(0)
    texts = [{"input_ids": [random.randrange(64) for _ in range(60)], "attention_mask": [1] * 60} for _ in range(64)]
    model = GPTQModel.load(str(BASE), QuantizeConfig(**settings))
    model.quantize(texts, batch_size=8)
    model.save(str(folder))
    again = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    found = {}
    for name, module in again.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            found[f"{name}.weight"] = module.dequantize_weight().T.float()
    return found


def awq(folder, source):
    """source: the unpacked sdist of autoawq, whose package no longer imports with transformers 5."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(source) / name.replace(".", "/"))]
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    stored, found = load_file(BASE / "model.safetensors"), {}
    for name in of_modules(stored, "weight", "_proj"):
        weight = stored.pop(f"{name}.weight").float()
        groups = weight.reshape(weight.shape[0], -1, 32)
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight
        packed = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        stored |= {f"{name}.{leaf}": getattr(packed, leaf) for leaf in ("qweight", "qzeros", "scales")}
        planes = packed.qweight, packed.qzeros, packed.scales.float()
        found[f"{name}.weight"] = dequantize_gemm(*planes, 4, 32).T
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    written(folder, stored, quantization_config={**said, "modules_to_not_convert": None})
    return found


def compressed_tensors(folder, activations=None, form=None, wide=(), **settings):
    """wide: how the names of modules end that get 8 bits; each scheme then has the names of its own."""
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model, args = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float16), QuantizationArgs(**settings)
    inputs = QuantizationArgs(dynamic=True, symmetric=True, **activations) if activations else None
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)}
    if wide:
        names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
        groups["group_0"].targets = [name for name in names if not name.endswith(wide)]
        eight = QuantizationArgs(**settings | {"num_bits": 8})
        groups["group_1"] = QuantizationScheme(targets=[name for name in names if name.endswith(wide)], weights=eight)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    schemes = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            rows, columns = module.weight.shape
            args = module.quantization_scheme.weights
            a, b = {
                "tensor": (rows, columns),
                "channel": (1, columns),
                "group": (1, args.group_size),
                "block": args.block_structure,
            }[args.strategy]
            blocks = module.weight.data.float().reshape(rows // a, a, columns // b, b)
            scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero.reshape(module.weight_scale.shape).to(module.weight_zero_point.dtype)
            schemes[name] = module.quantization_scheme
    compressor = ModelCompressor.from_pretrained_model(model, form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    stored, found = load_file(folder / "model.safetensors"), {}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    for name, scheme in schemes.items():
        own = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")}
        own["weight_scale"] = own["weight_scale"].float()
        found[f"{name}.weight"] = BaseCompressor.get_value_from_registry(said).decompress(own, scheme)["weight"].float()
    return found


def bitsandbytes(folder, **settings):
    import bitsandbytes as bnb

    said = BitsAndBytesConfig(**settings)
    model = LlamaForCausalLM.from_pretrained(BASE, quantization_config=said, dtype=torch.float16, device_map={"": "cpu"})
    model.save_pretrained(folder)
    again, found = LlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}), {}
    for name, module in again.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


def fp8(folder, **settings):
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    said = types.SimpleNamespace(quantization_config=FineGrainedFP8Config(**settings))
    stored, found = load_file(BASE / "model.safetensors"), {}
    for key in [f"{name}.weight" for name in of_modules(stored, "weight", "_proj")]:
        stored |= Fp8Quantize(said).convert({key: stored.pop(key)})
        found[key] = Fp8Dequantize(said)._dequantize_one(stored[key], stored[f"{key}_scale_inv"], torch.float32)
    written(folder, stored, quantization_config=said.quantization_config.to_dict())
    return found


def mlx(folder, bits, group):
    import mlx.core as mx
    import numpy as np
    from mlx_lm import convert

    convert(hf_path=str(BASE), mlx_path=str(folder), quantize=True, q_bits=bits, q_group_size=group, dtype="float16")
    stored, found = mx.load(str(folder / "model.safetensors")), {}
    for name in of_modules(stored, "scales"):
        scales, biases = (stored[f"{name}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases"))
        weight = mx.dequantize(stored[f"{name}.weight"], scales, biases, group_size=group, bits=bits)
        found[f"{name}.weight"] = torch.from_numpy(np.array(weight))
    return found


def bitnet(folder, kind):
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    stored, found = load_file(BASE / "model.safetensors"), {}
    for name in of_modules(stored, "weight", "_proj"):
        weight = stored.pop(f"{name}.weight").float()
        scale = weight.abs().mean()
        stored[f"{name}.weight"] = pack_weights((weight / scale).round().clamp(-1, 1))
        stored[f"{name}.weight_scale"] = (1 / scale if kind == "bitlinear" else scale).reshape(1)
        with torch.compiler.set_stance("force_eager"):
            codes = unpack_weights(stored[f"{name}.weight"], torch.float32)
        found[f"{name}.weight"] = codes / stored[f"{name}.weight_scale"] if kind == "bitlinear" else codes * scale
    said = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
    written(folder, stored, quantization_config={**said, "modules_to_not_convert": ["lm_head"]})
    return found


def vptq(folder, groups, outliers, residual):
    for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):
        sys.modules[name] = types.ModuleType(name)  # which vptq imports and does not need here
    sys.modules["sentence_transformers.SentenceTransformer"].SentenceTransformer = object
    from vptq.layers.vqlinear import VQuantLinear
    from vptq.utils.pack import pack_index

    stored, found, layers = load_file(BASE / "model.safetensors"), {}, {}
    for name in of_modules(stored, "weight", "_proj"):
        rows, columns = stored.pop(f"{name}.weight").shape
        said = {"in_features": columns, "out_features": rows, "group_num": groups, "outlier_size": outliers, "bias": False}
        said |= {"group_size": (columns - outliers) // groups, "vector_lens": [3 if outliers else -1, 6]}
        said |= {"num_centroids": [16 if outliers else -1, 64], "num_res_centroids": [-1, residual], "enable_perm": True}
        said |= {"enable_norm": True, "indices_as_float": False, "is_indice_packed": True}
        layer = VQuantLinear(**said, enable_proxy_error=False, dtype=torch.float16)
        for leaf, plane in layer.state_dict().items():
            if plane.is_floating_point():
                plane.copy_(torch.randn(plane.shape) * 0.1 + (1 if leaf == "weight_scale" else 0))
        chunks = math.ceil(rows / 6)

        def drawn(below, *shape):
            return torch.randint(below, shape).to(torch.uint16)

        main, rest = (drawn(k, groups, chunks, said["group_size"]) for k in (64, max(residual, 1)))
        bits = int(math.log2(residual)) if residual > 0 else 0
        layer.indices.data = pack_index(main, 6, rest if bits else None, bits)
        layer.perm.data = torch.randperm(columns).to(torch.uint16).view(torch.int16)
        if outliers:
            layer.outlier_indices.data = drawn(16, 1, math.ceil(rows / 3), outliers).view(torch.int16)
        stored |= {f"{name}.{leaf}": plane for leaf, plane in layer.state_dict().items()}
        with torch.inference_mode():
            found[f"{name}.weight"] = layer.float()(torch.eye(columns)).T.contiguous()
        layers[name] = said
    said = {"quant_method": "vptq", "config_for_layers": layers, "shared_layer_config": {}, "enable_proxy_error": False}
    written(folder, stored, quantization_config={**said, "modules_to_not_convert": ["lm_head"]})
    return found


def hqq(folder, axis=1, **settings):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    stored, found = load_file(BASE / "model.safetensors"), {}
    said = BaseQuantizeConfig(axis=axis, **settings)
    for name in of_modules(stored, "weight", "_proj"):
        weight = stored.pop(f"{name}.weight")
        layer = HQQLinear.from_weights(weight, None, said, compute_dtype=torch.float16, device="cpu")
        stored |= {f"{name}.{leaf}": plane.detach().clone() for leaf, plane in layer.state_dict().items()}
        layer.meta |= {leaf: layer.meta[leaf].float() for leaf in ("scale", "zero")} | {"compute_dtype": torch.float32}
        found[f"{name}.weight"] = layer.dequantize()
    written(folder, stored, quantization_config={"quant_method": "hqq", "quant_config": said, "skip_modules": ["lm_head"]})
    return found


RUNS = {
    "gptq-4": lambda f: gptq(f, bits=4, group_size=32, desc_act=False, sym=True),
    "gptq-2-ordered": lambda f: gptq(f, bits=2, group_size=32, desc_act=True, sym=True),
    "gptq-3-v2-asym": lambda f: gptq(f, bits=3, group_size=32, desc_act=False, sym=False, format="gptq_v2"),
    "gptq-3": lambda f: gptq(f, bits=3, group_size=32, desc_act=False, sym=True),
    "gptq-4-asym-ordered": lambda f: gptq(f, bits=4, group_size=32, desc_act=True, sym=False),
    "gptq-8-rows": lambda f: gptq(f, bits=8, group_size=-1, desc_act=False, sym=True, act_group_aware=False),
    "awq": lambda f: awq(f, sys.argv[2]),
    "ct-pack-4": lambda f: compressed_tensors(f, num_bits=4, strategy="group", group_size=32, symmetric=True),
    "ct-pack-4-asym": lambda f: compressed_tensors(f, num_bits=4, strategy="group", group_size=32, symmetric=False),
    "ct-pack-8": lambda f: compressed_tensors(f, num_bits=8, strategy="channel", symmetric=True),
    "ct-pack-mixed": lambda f: compressed_tensors(
        f, wide=("q_proj", "k_proj", "v_proj", "down_proj"), num_bits=4, strategy="group", group_size=32, symmetric=True
    ),
    "ct-int": lambda f: compressed_tensors(
        f, {"num_bits": 8, "strategy": "token"}, num_bits=8, strategy="channel", symmetric=True
    ),
    "ct-naive": lambda f: compressed_tensors(
        f, form="naive-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "ct-fp8": lambda f: compressed_tensors(
        f, {"num_bits": 8, "type": "float", "strategy": "token"}, num_bits=8, type="float", strategy="tensor"
    ),
    "ct-fp8-blocks": lambda f: compressed_tensors(f, num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    "bnb-nf4": lambda f: bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-double": lambda f: bitsandbytes(
        f, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bnb-fp4": lambda f: bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": lambda f: bitsandbytes(f, load_in_8bit=True),
    "fp8-blocks": lambda f: fp8(f, weight_block_size=[32, 64]),
    "fp8": lambda f: fp8(f, weight_block_size=None),
    "bitnet": lambda f: bitnet(f, "bitlinear"),
    "bitnet-auto": lambda f: bitnet(f, "autobitlinear"),
    "hqq-1": lambda f: hqq(f, nbits=1, group_size=8),
    "hqq-2-down": lambda f: hqq(f, axis=0, nbits=2, group_size=32),
    "hqq-3": lambda f: hqq(f, nbits=3, group_size=64),
    "hqq-3-down": lambda f: hqq(f, axis=0, nbits=3, group_size=64),
    "hqq-4": lambda f: hqq(f, nbits=4, group_size=32),
    "hqq-8": lambda f: hqq(f, nbits=8, group_size=64),
    "vptq": lambda f: vptq(f, 2, 0, -1),
    "vptq-outliers": lambda f: vptq(f, 1, 4, 32),
    **{f"mlx-{bits}": lambda f, bits=bits: mlx(f, bits, 64 if bits == 3 else 32) for bits in (2, 3, 4, 5, 6, 8)},
}

if __name__ == "__main__":
    base(Path(sys.argv[1]))
    file = HERE / "logits.safetensors"
    logits = load_file(file) if file.exists() else {}
    for name, run in RUNS.items():
        if (HERE / name).exists():
            continue
        found = run(WORK / name)
        weights = {**load_file(WORK / name / "model.safetensors"), **found}
        model = LlamaForCausalLM(CONFIG).float().eval()
        model.load_state_dict({n: weights[n].float() for n in model.state_dict() if n != "lm_head.weight"}, strict=False)
        model.tie_weights()
        with torch.inference_mode():
            logits[name] = model(IDS).logits[0]
        (HERE / name).mkdir()
        for part in ("config.json", "model.safetensors"):
            shutil.copy(WORK / name / part, HERE / name)
        save_file(logits, file)
        print(name, flush=True)
