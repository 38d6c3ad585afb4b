"""Makes the folders beside it with transformers and peft themselves; README.md says which versions.

Two tiny bases, and adapters of them whose matrices are random: what peft's merge_and_unload makes of both is what logits
are computed from.  Nothing of agentforge is used.

    PYTHONPATH=<where peft is> python make.py
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

HERE, IDS = Path(__file__).parent, torch.arange(12)[None] * 5 % 32
SIZE = {"vocab_size": 32, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}
BASES = {
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        **SIZE,
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZE),
}
ADAPTERS = {
    "plain": ("llama", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])),
    "ranks": (
        "llama",
        LoraConfig(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"k_proj": 3}, target_modules="all-linear"),
    ),
    "head": ("llama", LoraConfig(r=2, target_modules=["lm_head", "gate_proj"])),
    "conv": ("gpt2", LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"])),
    "dora": ("llama", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])),
    "saved": ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "biased": ("llama", LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")),
    "pissa": ("llama", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")),
}


def main() -> None:
    torch.manual_seed(0)
    found = {"ids": IDS}
    for name, config in BASES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(HERE / name)
    for name, (base, settings) in ADAPTERS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(HERE / base), settings)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(HERE / name, save_embedding_layers=False)
        (HERE / name / "README.md").unlink(missing_ok=True)
        with torch.inference_mode():
            found[name] = model.merge_and_unload().eval()(IDS).logits
    save_file(found, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
