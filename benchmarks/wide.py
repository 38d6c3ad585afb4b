"""A Llama of 576 columns made into one of 768 = 3 * 256, so that the K types of ggml hold its rows.

The residual stream x becomes [Q R] [x, y]: Q^T Q = I, drawn at random, so that the model computes the same from longer
rows, none of which has zeros.  Gains of norms go into the matrices that read them; eps is what it was for a vector of as
many entries.  A group of heads is there twice, and what multiplies its outputs is split into two random parts whose sum is
what it was.

With y = 0 this is exact, but inputs of matrices would lie in 576 of 768 directions, and errors in the others would be free
for whoever knows.  So what is written to x is written to y, too, in random mixes: one for the embedding, one for attention,
one for the MLPs.  y is no linear function of x then, and nobody reads it.  It disturbs the norms a little, as tokens differ
in how long y is.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import bench
import interop
import torch

from agentforge.models import LanguageModel
from agentforge.tensorfiles import write_tensors

SEED = 0


def widen(model: LanguageModel, folder: Path, columns: int, groups: int, beside: float) -> None:
    """Write the wider model into `folder`, float32, with the tokenizer.  groups: of heads, those that are there twice
    included.  beside: mean square of y's entries in units of x's, were all that is written to x orthogonal."""
    config, generator = dict(model.config), torch.Generator().manual_seed(SEED)
    old, dim, had = config["hidden_size"], config["head_dim"], config["num_key_value_heads"]
    each = config["num_attention_heads"] // had  # heads of a group
    twice = slice((2 * had - groups) * dim, None)  # the keys of the groups that are there twice, the last ones

    def orthonormal(rows: int, wide: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, wide, generator=generator, dtype=torch.float64)).Q

    both = orthonormal(columns, columns)
    q, r = both[:, :old], both[:, old:] * math.sqrt(beside)
    share = 1 + beside * (columns - old) / old  # of |x|^2 + |y|^2 in |x|^2, likewise
    gain = torch.full((columns,), math.sqrt(old / columns * share), dtype=torch.float32)

    from_embedding, from_attention, from_mlp = (q + r @ orthonormal(old, columns - old).T for _ in range(3))

    def read(matrix: torch.Tensor, norm: str) -> torch.Tensor:
        return matrix.double() * model.tensor(norm).double() @ q.T

    tensors, embedding = {}, model.tensor("model.embed_tokens.weight")
    tensors["model.embed_tokens.weight"] = embedding.double() @ from_embedding.T
    head = embedding if config["tie_word_embeddings"] else model.tensor("lm_head.weight")
    tensors["lm_head.weight"], tensors["model.norm.weight"] = read(head, "model.norm.weight"), gain
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{name}.{norm}.weight"] = gain.clone()
            for reader in readers:
                tensors[f"{name}.{reader}.weight"] = read(model.tensor(f"{name}.{reader}.weight"), f"{name}.{norm}.weight")
        for reader, heads in (("q", each), ("k", 1), ("v", 1)):
            values = tensors[f"{name}.self_attn.{reader}_proj.weight"]
            again = values[twice.start * heads :]
            tensors[f"{name}.self_attn.{reader}_proj.weight"] = torch.cat([values, again])
        output = model.tensor(f"{name}.self_attn.o_proj.weight").double()
        first = twice.start * each
        part = torch.rand(output[:, first:].shape, generator=generator, dtype=torch.float64)
        output = torch.cat([output[:, :first], output[:, first:] * part, output[:, first:] * (1 - part)], 1)
        tensors[f"{name}.self_attn.o_proj.weight"] = from_attention @ output
        tensors[f"{name}.mlp.down_proj.weight"] = from_mlp @ model.tensor(f"{name}.mlp.down_proj.weight").double()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    floats = {name: values.float().contiguous() for name, values in sorted(tensors.items())}
    write_tensors(partial / "model.safetensors", floats, {"format": "pt"})
    for file in model.side_files:
        shutil.copyfile(file, partial / file.name)
    config |= {"hidden_size": columns, "num_key_value_heads": groups, "num_attention_heads": groups * each}
    config |= {"tie_word_embeddings": False, "rms_norm_eps": config["rms_norm_eps"] * old / columns * share}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


def compared(model: LanguageModel, others: list[LanguageModel], windows: list[list[int]]) -> list[bench.Row]:
    """Of each other model KL(model || other) per token with its standard error over windows, and the largest difference
    between two logits."""
    kl, largest = [[] for _ in others], [0.0] * len(others)
    for window in windows:
        with torch.inference_mode():
            ours, *theirs = (each.model(input_ids=torch.tensor([window])).logits for each in (model, *others))
        for i, one in enumerate(theirs):
            kl[i].append(interop.compare(ours, one)["kl"]["value"])
            largest[i] = max(largest[i], float((ours - one).abs().max()))
    return [{"kl": bench.mean(kl[i]), "largest": largest[i]} for i in range(len(others))]
