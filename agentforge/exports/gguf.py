"""GGUF, for llama.cpp: a Llama's tensors in blocks of 32 or 256 weights, and its configuration and tokenizer.

Layouts as in the `gguf` package (quants.py), which decodes them.  d and m are half floats; byte i of the nibbles holds
weight i in its low and weight i + 16 in its high half:

====  ===========================================  =================
type  bytes of 32 weights                          weight
====  ===========================================  =================
Q4_0  d, 16 bytes of nibbles                       (nibble - 8) * d
Q4_1  d, m, 16 bytes of nibbles                    nibble * d + m
Q5_0  d, the fifth bits (uint32), nibbles          (code - 16) * d
Q5_1  d, m, the fifth bits (uint32), nibbles       code * d + m
Q8_0  d, 32 int8                                   code * d
====  ===========================================  =================

Ternary weights become TQ1_0 or TQ2_0 (as they were packed) if their rows are multiples of 256, else Q4_0.  What the stage
ggml made are blocks already.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import BadInput
from ..gguf_import import (
    CONTROL_TOKEN,
    FLOATS_AS_THEY_ARE,
    LAYER_NAMES,
    OTHER_NAMES,
    USER_DEFINED_TOKEN,
    dequantised,
    hf_name,
    metadata_of,
    reader_of,
    tokenizer_of,
)
from ..models import LanguageModel
from ..planes import Packed
from ..stages.ggml import GGML
from ..stages.ternary import Ternary
from .grids import Grid, halves, refused

MARK = "agentforge.manifest_sha256"  # key of the metadata
HOLDS = (
    "GGUF holds rounding of 2 to 5 bits, and symmetric of up to 8, in groups of a multiple of 32, and ternary weights in "
    "rows of a multiple of 32: compress with --stage rounding:bits=4,group=32"
)
NORMAL_TOKEN, UNKNOWN_TOKEN, UNUSED_TOKEN, BYTE_TOKEN = 1, 2, 5, 6
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {  # how text is split before it is merged, as llama.cpp calls it: of each step what it is, and what it splits at
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", LLAMA_3), ("ByteLevel", False)],
}
PROBE = "Hello, world! It's 3.14 or 2024; naïve café, 東京 🙂\n\n\tdef f(x):\r\n    return 'x'  # done\u00a0..."


class Blocks(NamedTuple):
    """A matrix as a GGUF file has it: the type's name, and uint8[out, bytes]."""

    kind: str
    data: np.ndarray


def as_it_is(name: str, stage: GGML, packed: Packed) -> Blocks:
    """What the stage ggml made.  Raises BadInput if its rows are not whole blocks."""
    if not stage.fits(packed.shape[1]):
        what = f"encoded as {stage.type} in rows of {packed.shape[1]}"
        raise refused(name, what, f"a GGUF file takes multiples of {stage.form.block} there: choose another type")
    return Blocks(stage.type.upper(), packed["blocks"].numpy())


def blocks(name: str, grid: Grid) -> Blocks:
    """A matrix as blocks.  Raises BadInput if no type holds it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows, columns = grid.codes.shape
    if grid.columns % 32:
        raise refused(name, f"encoded in groups of {grid.columns} columns", HOLDS)
    d = halves(name, grid.scale).numpy()
    if isinstance(grid.stage, Ternary) and columns % 256 == 0:
        kind = "TQ1_0" if grid.stage.packing == "trits" else "TQ2_0"
        dense = (grid.codes.numpy().astype(np.float32) - 1) * d.astype(np.float32)
        return Blocks(kind, quantize(dense, GGMLQuantizationType[kind]))
    if grid.zero is None and grid.bits > 5:
        raise refused(name, f"encoded by {grid.stage.brief()}, asymmetric", HOLDS)
    many = grid.columns // 32
    parts: list[Any] = [np.repeat(d, many, 1).reshape(-1, 1).view(np.uint8)]
    codes = grid.codes.numpy().reshape(-1, 32)
    width = 4 if grid.bits <= 4 else 5 if grid.bits == 5 else 8
    if grid.minimum is None and width < 8:
        codes = codes + np.uint8(2 ** (width - 1) - (grid.zero or 0))
    if grid.minimum is not None:
        parts.append(np.repeat(halves(name, grid.minimum).numpy(), many, 1).reshape(-1, 1).view(np.uint8))
    if width == 8:
        parts.append(codes - np.uint8(grid.zero or 0))  # wraps around to the bytes of an int8
    else:
        if width == 5:
            parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
        parts.append((codes[:, :16] & 15) | (codes[:, 16:] << 4))
    return Blocks(f"Q{width}_{0 if grid.minimum is None else 1}", np.concatenate(parts, 1).reshape(rows, -1))


def write(
    path: Path, model: LanguageModel, tensors: Iterable[tuple[str, torch.Tensor | Grid | Blocks]], sha256: str
) -> dict[str, str]:
    """Write the file; returns the type of each tensor.  sha256: of the artifact's manifest.

    Raises BadInput, before anything is written, for another model than a Llama, and for what no type holds.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    config: Any = model.skeleton().config  # with what config.json leaves to defaults
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer, kinds, most = GGUFWriter(path, "llama"), dict[str, str](), Counter[str]()
    _configuration(writer, model, config)
    _tokenizer(writer, model)
    for name, value in tensors:
        if isinstance(value, Grid | Blocks):
            kinds[name], array = value if isinstance(value, Blocks) else blocks(name, value)
            kind = f"MOSTLY_{kinds[name]}"
            most[kind if kind in LlamaFileType.__members__ else f"{kind}_M"] += 1
        elif value.dtype not in FLOATS_AS_THEY_ARE.values():
            raise refused(name, str(value.dtype).removeprefix("torch."), "GGUF holds float32, float16 and bfloat16")
        else:
            value = value.float() if value.dim() == 1 else value  # llama.cpp multiplies by norms in float32 alone
            kinds[name] = next(kind for kind, dtype in FLOATS_AS_THEY_ARE.items() if dtype is value.dtype)
            array = value.view(torch.uint8).numpy() if value.dtype is torch.bfloat16 else value.numpy()
        for part, count in heads.items():
            if name.endswith(f"self_attn.{part}.weight"):  # llama.cpp's rotary embedding pairs neighbours
                array = array.reshape(count, 2, len(array) // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array), raw_dtype=GGMLQuantizationType[kinds[name]])
    writer.add_file_type(LlamaFileType[most.most_common(1)[0][0] if most else "ALL_F32"])
    writer.add_quantization_version(2)
    writer.add_string(MARK, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kinds


def reopened(path: Path, model: LanguageModel) -> Callable[[str], torch.Tensor]:
    """What gives the tensors of a file as the `gguf` package decodes them, by transformers' names.

    Raises BadInput if the tokenizer in the file is not the model's.
    """
    reader = reader_of(path)
    field = metadata_of(path, reader)
    heads = {"q_proj": field("llama.attention.head_count"), "k_proj": field("llama.attention.head_count_kv")}
    same = tokenizer_of(path, field)
    texts = [PROBE, *model.tokenizer.all_special_tokens]
    if odd := [text for text in texts if same(text)["input_ids"] != model.tokenizer(text)["input_ids"]]:
        raise BadInput(f"{model.path}: its tokenizer splits {odd[0][:20]!r} in another way once it is in a GGUF file")
    tensors = {hf_name(tensor.name, path): tensor for tensor in reader.tensors}
    return lambda name: dequantised(name, tensors[name], heads)


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Llama.  Raises BadInput for one that it does not have."""
    for theirs, ours in OTHER_NAMES.items():
        if name == ours:
            return theirs
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    for theirs, ours in LAYER_NAMES.items():
        if match and match[2] == ours:
            return f"blk.{match[1]}.{theirs}.weight"
    raise refused(name, "not part of a plain Llama", "GGUF files are written of those alone")


def _configuration(writer: Any, model: LanguageModel, config: Any) -> None:
    rope = config.rope_parameters
    for what, found, known in (
        ("model_type", config.model_type, ("llama",)),
        ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
        ("rope_type", rope["rope_type"], ("default", "linear")),
    ):
        if found not in known:
            raise BadInput(f"{model.path}: {what} is {found!a:.40}; GGUF files are written of {' or '.join(known)} alone")
    writer.add_type("model")
    writer.add_name(Path(model.source["name"]).name)
    if licence := (model.source.get("source") or {}).get("licence"):
        writer.add_license(licence)
    writer.add_vocab_size(model.entries["model.embed_tokens.weight"].shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", float(rope["factor"]))


def _tokenizer(writer: Any, model: LanguageModel) -> None:
    """The vocabulary, how it is merged, and the name of the rule that splits text before.

    Raises BadInput for a tokenizer that is none of `RULES`, and not SentencePiece's BPE.
    """
    tokenizer = model.tokenizer
    said: Any = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    bpe, before = said["model"], said.get("pre_tokenizer") or {"type": None}
    steps = [
        (step["type"], step.get("individual_digits", step.get("pattern", {}).get("Regex", step.get("use_regex", True))))
        for step in before.get("pretokenizers", [before])
    ]
    pieces = bool(bpe.get("byte_fallback"))
    rule = "default" if pieces else next((name for name, known in RULES.items() if steps == known), None)
    if not bpe.get("merges") and steps[-1][0] == "ByteLevel":
        rule = "gpt-2"  # a token per byte, however text is split
    if bpe["type"] != "BPE" or rule is None or (said.get("normalizer") and not pieces):
        known = f"SentencePiece's BPE, and byte-level BPE that splits as {', '.join(RULES)} do"
        raise BadInput(f"{model.path}: its tokenizer is of a kind that no name in a GGUF file stands for; known are {known}")
    size = model.entries["model.embed_tokens.weight"].shape[0]
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise BadInput(f"{model.path}: its tokenizer has token {max(names)}, its embedding {size} rows; GGUF takes one each")
    added = {token["id"]: CONTROL_TOKEN if token["special"] else USER_DEFINED_TOKEN for token in said["added_tokens"]}
    kinds = [added.get(i, NORMAL_TOKEN) if i in names else UNUSED_TOKEN for i in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    if pieces:  # merged by the scores of what comes out: the earlier a merge, the higher
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(names.get(i, ""), -1e6) for i in range(size)])
        for i, name in names.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
                kinds[i] = BYTE_TOKEN
        kinds[tokenizer.unk_token_id or 0] = UNKNOWN_TOKEN
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (token := getattr(tokenizer, f"{role}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
