"""Tiny models of the architectures that transformers has as causal language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import make_tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2}
PLAIN = (
    *(
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Gemma",
        "Starcoder2",
        "StableLm",
        "Cohere",
        "Cohere2",
        "Olmo",
        "Olmo2",
        "Olmo3",
    ),
    *("Granite", "Glm", "Glm4", "Nemotron", "Persimmon", "SmolLM3", "Helium", "Ernie4_5", "Exaone4", "HunYuanDenseV1"),
    *("Arcee", "Apertus", "BitNet", "GPT2", "GPTBigCode", "Bloom", "GPTNeoX", "BioGpt", "Bert", "Electra", "MegatronBert"),
    "Rwkv",
)
# What differs from SIZES, by the name of transformers' configuration.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN},
    **dict.fromkeys(("Qwen3Moe", "Mixtral", "Phimoe", "Olmoe", "GraniteMoe", "MiniMax"), EXPERTS),
    "Gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "Gemma3Text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "Phi": {"num_key_value_heads": 2},
    "Phi3": {"pad_token_id": 0},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "GPTJ": {"rotary_dim": 8},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "Mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "XGLM": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2},
    "Mamba": {"state_size": 8, "pad_token_id": 0},
    "FalconMamba": {"state_size": 8, "pad_token_id": 0},
    "Mamba2": {"state_size": 16, "num_heads": 4, "n_groups": 1, "pad_token_id": 0},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "Llama4Text": {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "GptOss": {**EXPERTS, "sliding_window": 32},
    "JetMoe": {**EXPERTS, "kv_channels": 16, "num_attention_heads": 2},
    "DeepseekV2": {**EXPERTS, **MLA, "n_routed_experts": 4, "q_lora_rank": None, "first_k_dense_replace": 1},
}


def make(name: str, folder: Path, **settings: Any) -> Path:
    """A tiny model of the architecture, with random weights, one token per byte.  settings: of its configuration."""
    make_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ARCHITECTURES[name], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
