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
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
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
    *("Doge", "Cwm", "Ministral", "Ministral3", "SeedOss", "NanoChat", "HyperCLOVAX", "Jais2", "RoFormer"),
    *("Arcee", "Apertus", "BitNet", "GPT2", "GPTBigCode", "Bloom", "GPTNeoX", "BioGpt", "Bert", "Electra", "MegatronBert"),
    "Rwkv",
)
# What differs from SIZES, by the name of transformers' configuration.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN},
    **dict.fromkeys(("Qwen3Moe", "Mixtral", "Phimoe", "Olmoe", "GraniteMoe"), EXPERTS),
    **dict.fromkeys(("MiniMax", "MiniMaxM2", "FlexOlmo", "Mellum"), EXPERTS),
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
    "Glm4Moe": {**EXPERTS, **GROUPS},
    "Dots1": {**EXPERTS, **GROUPS, "n_shared_experts": 1},
    "SolarOpen": {**EXPERTS, **GROUPS},
    "DeepseekV3": {**EXPERTS, **MLA, **GROUPS, "q_lora_rank": 16, "head_dim": 8},
    "LongcatFlash": {
        **{**EXPERTS, **MLA, **GROUPS, "q_lora_rank": 16, "head_dim": 8, "num_layers": 2, "zero_expert_num": 2},
        **{"ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    },
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16},
    "HunYuanMoEV1": {**EXPERTS, "moe_topk": 2},
    "Lfm2Moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "GraniteMoeShared": {**EXPERTS, "shared_intermediate_size": 32},
    "GraniteMoeHybrid": {**EXPERTS, **MAMBA, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "Afmoe": {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "AriaText": {**EXPERTS, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "pad_token_id": 0},
    "Dbrx": {
        **{"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8},
    },
    "Jamba": {
        **{**EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    },
    "NemotronH": {
        **{**EXPERTS, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16},
        **{"ssm_state_size": 16, "n_groups": 1},
    },
    "Qwen3Next": {
        **{**EXPERTS, "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    },
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**MAMBA, "mamba_d_ssm": 64},
    "Zamba2": {
        **{"mamba_d_state": 16, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "attention_head_dim": 32},
        "layers_block_type": ["mamba", "hybrid"],
    },
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    "Youtu": {**MLA, "q_lora_rank": 16, "head_dim": 8},
    "MiniCPM3": {**MLA, "q_lora_rank": 16},
    "DiffLlama": {"num_key_value_heads": 2},
    "VaultGemma": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "Gemma3nText": {
        **{"intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 258, "laurel_rank": 4, "altup_num_inputs": 2},
        **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    },
    "ModernBertDecoder": {"pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 32},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 1, "ffn_hidden_size": 64},
    "CodeGen": {"num_attention_heads": 4, "rotary_dim": 4},
    "CTRL": {"dff": 64},
    "OpenAIGPT": {},
    "GPTNeoXJapanese": {"intermediate_multiple_size": 2},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "Roberta": {"max_position_embeddings": 130, "pad_token_id": 1},
    "Bart": {
        **{"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 2, "pad_token_id": 1},
        **{"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 2},
    },
    "DeepseekV2": {**EXPERTS, **MLA, "n_routed_experts": 4, "q_lora_rank": None, "first_k_dense_replace": 1},
}


def make(name: str, folder: Path, **settings: Any) -> Path:
    """A tiny model of the architecture, with random weights, one token per byte.  settings: of its configuration."""
    make_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    kind = getattr(transformers, f"{name}Config")
    chosen = {**SIZES, **ARCHITECTURES[name], **settings}
    config = kind(**{k: v for k, v in chosen.items() if not isinstance(getattr(kind, k, None), property)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
