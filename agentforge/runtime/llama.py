"""Llama's decoder layer for one new token per sequence, in two calls instead of some sixty.

At batch 1 the products of a small model take microseconds, and what Python and torch do between them takes longer.  So a
layer whose weights are all ternary computes a generated token by two kernels of ternary_cpu, up to the new keys and from
there on; only the cache lies between, which stays transformers' own.  The formulas are those of transformers' modules, in
float32; sums have another order.  Everything else (a prompt, a mask, another device or dtype) goes through the modules,
which are all still there; their hooks are not called for a token that the kernels compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .linear import TernaryLinear
from .ternary_cpu import WORTH_THREADS, decode_projections, decode_rest


class PackedLlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A LlamaDecoderLayer whose seven linear layers are TernaryLinear.  `adopt` makes one."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """float[batch, length, hidden] to the same, as LlamaDecoderLayer does."""
        x = hidden_states
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        batch, length, hidden = x.shape
        if (
            length != 1
            or attention_mask is not None
            or past_key_values is None
            or position_embeddings is None
            or not x.is_cpu
            or x.dtype != torch.float32
            or not x.is_contiguous()
            or attention.config._attn_implementation != "sdpa"
            or (batch * mlp.gate_proj.packed.numel() >= WORTH_THREADS and torch.get_num_threads() > 1)
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            result: torch.Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return result
        size = attention.head_dim
        q_layer, k_layer, v_layer = attention.q_proj.address(), attention.k_proj.address(), attention.v_proj.address()
        q = torch.empty((batch, q_layer[5]))
        k = torch.empty((batch, k_layer[5] // size, 1, size))
        v = torch.empty((batch, v_layer[5] // size, 1, size))
        cos, sin = (t.contiguous() for t in position_embeddings)
        before: Any = self.input_layernorm
        after: Any = self.post_attention_layernorm
        decode_projections(
            x.data_ptr(),
            before.weight.data_ptr(),
            before.variance_epsilon,
            q_layer,
            k_layer,
            v_layer,
            (cos.data_ptr(), sin.data_ptr(), int(len(cos) > 1)),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            batch,
            size,
        )
        keys, values = past_key_values.update(k, v, attention.layer_idx)
        keys, values = (t.to(torch.float32).contiguous() for t in (keys, values))
        out = torch.empty((batch, 1, hidden))
        decode_rest(
            x.data_ptr(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            (keys.shape[2], keys.shape[1]),
            size,
            attention.scaling,
            after.weight.data_ptr(),
            after.variance_epsilon,
            attention.o_proj.address(),
            mlp.gate_proj.address(),
            mlp.up_proj.address(),
            mlp.down_proj.address(),
            out.data_ptr(),
            batch,
        )
        return out


def adopt(module: nn.Module) -> int:
    """Make PackedLlamaLayers of all layers of a model that can be; returns how many."""
    count = 0
    for layer in module.modules():
        if type(layer) is not LlamaDecoderLayer:
            continue
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        linears: list[nn.Module] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if all(type(linear) is TernaryLinear for linear in linears) and attention.config.hidden_act == "silu":
            layer.__class__ = PackedLlamaLayer
            count += 1
    return count
