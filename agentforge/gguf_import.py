"""A GGUF file of the Llama family, dequantised into a Hugging Face folder.

The weights go straight from the file's blocks into safetensors, one tensor at a time.  Three traps on the way:
llama.cpp permutes the rows of the query and key projections (its rotary embedding pairs neighbours, transformers' pairs
halves), the tokenizer's splitting rule is only a name in the file, and float32 numbers in the metadata come back as
doubles such as 9.999999747378752e-06.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .bits import tensor_bytes
from .errors import BadInput
from .models import first_line, quiet_transformers
from .tensorfiles import write_json, write_safetensors

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
FLOATS_AS_THEY_ARE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
# What the metadata may say of the computation: keys that are followed, and others by the values that change nothing.
FOLLOWED = {
    *("embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon"),
    *("rope.scale_linear", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}


def convert(source: Path, folder: Path) -> dict[str, Any]:
    """Write `folder` (config.json, model.safetensors, tokenizer) from the GGUF file `source`, or its parts.

    Quantised tensors become float32, exactly; float tensors keep their dtype.  Returns what the file says about itself:
    its name, licence and the quantisation of each kind of tensor.

    Raises BadInput for a file that is not a GGUF file, of another architecture, or with tensors that a Llama does not have.
    """
    try:
        return _convert(source, folder)
    except (BadInput, OSError):
        raise
    except Exception as error:  # whatever a lying file makes the reader, the tokenizer or the arithmetic say
        raise BadInput(f"{source}: no readable GGUF file of a Llama ({first_line(error)})") from None


def parts_of(source: Path) -> list[Path]:
    """The files of a model that was split, by the name of the first; of any other, itself.

    Raises BadInput for a later part, and if one is missing.
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", source.name)
    if match is None:
        return [source]
    parts = [source.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]
    if source not in parts[:1]:
        raise BadInput(f"{source}: is part {int(match[2])} of a file that was split into {len(parts)}; open the first part")
    for part in parts:
        if not part.is_file():
            raise BadInput(
                f"{source}: was split into {len(parts)}, of which {part.name} is missing; fetch all into one folder"
            )
    return parts


def reader_of(source: Path) -> Any:
    """The library's reader, made safe.  Raises BadInput for a file that ends before what it announces."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        """The library's reader slices its memory map beyond the end without a word, and then loops 2**60 times; and it makes
        two arrays for each string of a vocabulary, gigabytes for millions."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise BadInput(f"{source}: ends before what it announces; fetch it again")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            scalar = self.gguf_scalar_to_np.get(GGUFValueType(kind))
            values: Any
            if scalar is not None:
                values = self._get(orig_offs + 12, scalar, count)
                size = values.nbytes
            elif kind == GGUFValueType.STRING and self.byte_order == "I":
                values, size = strings(self.data.data, orig_offs + 12, count)
            else:
                raise BadInput(f"{source}: an array of type {kind} in the metadata; expected numbers or text")
            return 12 + size, [values], [0], [GGUFValueType.ARRAY, GGUFValueType(kind)]

    def strings(data: memoryview, start: int, count: int) -> tuple[list[str], int]:
        """`count` strings, each behind its length, from `start` on, and the bytes that they take."""
        found, at = [], start
        if count > (len(data) - start) // 8:
            raise BadInput(f"{source}: ends before what it announces; fetch it again")
        for _ in range(count):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if end > len(data):
                raise BadInput(f"{source}: ends before what it announces; fetch it again")
            found.append(str(data[at + 8 : end], "utf-8"))
            at = end
        return found, at - start

    return Reader(source)


def metadata_of(source: Path, reader: Any) -> Callable[..., Any]:
    """What gives a value of the metadata by its key, or a default.  It raises BadInput for a missing one without."""
    from gguf import GGUFValueType

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        if found is None:
            if default is None:
                raise BadInput(f"{source}: the metadata lack {key}")
            return default
        if found.types[0] == GGUFValueType.ARRAY:
            values = found.parts[-1]
            return values if isinstance(values, list) else values.tolist()
        return found.contents()

    return field


def _convert(source: Path, folder: Path) -> dict[str, Any]:
    parts = parts_of(source)
    readers = [reader_of(part) for part in parts]
    reader = readers[0]
    field = metadata_of(source, reader)
    for index, (part, one) in enumerate(zip(parts, readers, strict=True)):
        number, count = (int(found.contents()) if (found := one.get_field(f"split.{key}")) else 0 for key in ("no", "count"))
        if (number, max(count, 1)) != (index, len(parts)):
            raise BadInput(
                f"{part}: is part {number + 1} of a file that was split into {count}, by its name another; open the first "
                "part under its own name, or join them (llama-gguf-split --merge)"
            )
    architecture = field("general.architecture")
    if architecture != "llama":
        raise BadInput(
            f"{source}: architecture {architecture!r}; expected 'llama' (convert others to a Hugging Face folder)"
        )
    for part, one in zip(parts, readers, strict=True):
        end = one.data_offset
        for tensor in sorted(one.tensors, key=lambda t: int(t.data_offset)):
            start = int(tensor.data_offset)  # an offset of 2**64 - 32 wraps around to before the data
            if start < end or (start - one.data_offset) % one.alignment:
                raise BadInput(f"{part}: tensor {tensor.name!a:.80} overlaps another or is not aligned; fetch it again")
            end = start + int(tensor.n_bytes)
    tensors = sorted((tensor for one in readers for tensor in one.tensors), key=lambda t: t.name)
    names = {tensor.name for tensor in tensors}
    if "rope_freqs.weight" in names:
        raise BadInput(
            f"{source}: scaled rotary embeddings (rope_freqs.weight) are not supported; use the safetensors model"
        )
    config = _config(field, names, tensors)
    _refuse_unknown(source, field, reader, config)
    layers = {int(match[1]) for name in names if (match := re.match(r"blk\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or len(layers) != config["num_hidden_layers"]:
        raise BadInput(f"{source}: has {len(layers)} layers of tensors, its metadata say {config['num_hidden_layers']}")
    targets = [(hf_name(t.name, source), t) for t in tensors]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        folder / "model.safetensors",
        [(name, _dtype(t), tuple(int(n) for n in reversed(t.shape))) for name, t in targets],
        (tensor_bytes(dequantised(name, t, heads)) for name, t in targets),
    )
    write_json(folder / "config.json", config)
    tokenizer_of(source, field).save_pretrained(folder)
    return {
        "title": field("general.name", "unknown"),
        "licence": field("general.license", "unknown"),
        "types": dict(sorted(Counter(t.tensor_type.name for t in tensors).items())),
    }


def _config(field: Any, names: set[str], tensors: list[Any]) -> dict[str, Any]:
    """config.json of the same Llama."""
    hidden, heads = int(field("llama.embedding_length")), int(field("llama.attention.head_count"))
    vocabulary = next(int(t.shape[1]) for t in tensors if t.name == "token_embd.weight")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": int(field("llama.feed_forward_length")),
        "num_hidden_layers": int(field("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field("llama.attention.head_count_kv", heads)),
        "head_dim": int(field("llama.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": _short(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(field("llama.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
    }
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    factor = field("llama.rope.scaling.factor", field("llama.rope.scale_linear", 0.0))
    if factor not in (0.0, 1.0) and field("llama.rope.scaling.type", "linear") == "linear":  # as llama.cpp reads them
        config["rope_parameters"] |= {"rope_type": "linear", "factor": _short(factor)}
    for key, name in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        token = field(f"tokenizer.ggml.{name}_token_id", -1)
        if token >= 0:
            config[key] = int(token)
    return config


def _refuse_unknown(source: Path, field: Any, reader: Any, config: dict[str, Any]) -> None:
    """Raise BadInput, naming the key, if the metadata ask for a computation that `config` does not describe."""
    head = config["head_dim"]
    same = {"rope.dimension_count": (head,), "attention.value_length": (head,)}
    for name in reader.fields:
        key = name.removeprefix("llama.")
        if name == key or key in FOLLOWED:
            continue
        value = field(name)
        if value not in (same | NEUTRAL).get(key, ()):
            raise BadInput(f"{source}: asks for {name} = {value!r:.60}, which is not supported; use the safetensors model")


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def hf_name(name: str, source: Path) -> str:
    """A tensor's name in transformers.  Raises BadInput for one that a Llama does not have."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    raise BadInput(f"{source}: tensor {name} is not part of a Llama; only plain Llama models can be opened from GGUF")


def _dtype(tensor: Any) -> torch.dtype:
    return FLOATS_AS_THEY_ARE.get(tensor.tensor_type.name, torch.float32)


def dequantised(name: str, tensor: Any, heads: dict[str, int]) -> torch.Tensor:
    """The tensor in transformers' layout: the floats as they are, everything else as float32."""
    from gguf import dequantize

    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type.name in FLOATS_AS_THEY_ARE:
        values = torch.from_numpy(np.array(tensor.data)).view(_dtype(tensor))
    else:
        values = torch.from_numpy(np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
    values = values.reshape(shape)
    for part, count in heads.items():
        if name.endswith(f"self_attn.{part}.weight"):
            values = values.reshape(count, shape[0] // count // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    return values.contiguous()


def tokenizer_of(source: Path, field: Any) -> Any:
    """The file's tokenizer, as a transformers tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind, splitting = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise BadInput(
            f"{source}: tokenizer {kind!r:.40} is not known; known are gpt2 (byte-level) and llama (SentencePiece)"
        )
    tokens = field("tokenizer.ggml.tokens")
    special = {}
    for role, name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        token = field(f"tokenizer.ggml.{role}_token_id", -1)
        if 0 <= token < len(tokens):
            special[f"{name}_token"] = tokens[token]
    if kind != "gpt2" or splitting not in ("smollm", "gpt-2", "default"):
        # In a folder of its own: a tokenizer_config.json beside the file would be read, and could name code to run.
        with quiet_transformers(), tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(source.resolve())
            converted = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        for role, token in special.items():
            setattr(converted, role, token)  # some releases of transformers mix them up
        return converted

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kinds = field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(field("tokenizer.ggml.add_space_prefix", 0)))
    # "smollm" splits numbers into digits; transformers' own GGUF reader leaves that out.
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if splitting == "smollm"
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(  # all at once: each call makes its search for all of them anew
        [
            AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
        ]
    )
    if field("tokenizer.ggml.add_bos_token", 0) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=int(field("llama.context_length")), **special
    )
    template = field("tokenizer.chat_template", "")
    if template:
        fast.chat_template = template
    return fast
