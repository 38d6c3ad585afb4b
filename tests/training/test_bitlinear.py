"""BitLinear: values, gradients by hand, codes that are exported, and what is replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from agentforge import stages
from agentforge.errors import BadInput
from agentforge.training.bitlinear import (
    BitLinear,
    convert,
    quantize_activations,
    set_blend,
)
from agentforge.training.student import layers_of, straight_through

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def linear(inputs: int = 7, outputs: int = 5, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def test_values_are_those_of_the_paper_written_out() -> None:
    layer = BitLinear(linear())
    x = torch.randn(3, 7)
    gamma = layer.weight.abs().mean()
    codes = torch.clamp(torch.round(layer.weight / gamma), -1, 1)
    scale = 127 / x.abs().amax(1, keepdim=True)
    whole = torch.clamp(torch.round(x * scale), -128, 127)
    by_hand = (whole @ codes.T) * gamma / scale + layer.bias
    torch.testing.assert_close(layer(x), by_hand)


def test_activations_take_256_levels_a_token_and_zeros_stay() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.25], [254.0, -254.0, 1.0]])
    found = quantize_activations(x)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1] * 127, torch.tensor([127.0, -64.0, 32.0]))  # -63.5 and 31.75: halves go to even
    torch.testing.assert_close(found[2], torch.tensor([254.0, -254.0, 0.0]))  # 0.5 goes to 0
    assert quantize_activations(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_gradients_are_those_derived_by_hand(blend: float) -> None:
    """y = X B^T + b with X = x + l (x_q - x) and B = W + l (W_q - W): dL/dW = G^T X, dL/dx = G B, dL/db = sum G."""
    layer = BitLinear(linear())
    layer.blend = blend
    x = torch.randn(2, 4, 7, requires_grad=True)
    g = torch.randn(2, 4, 5)
    layer(x).backward(g)
    gamma = layer.weight.detach().abs().mean()
    weight = layer.weight.detach()
    mixed = weight + blend * (gamma * torch.clamp(torch.round(weight / gamma), -1, 1) - weight)
    inputs = x.detach() + blend * (quantize_activations(x.detach()) - x.detach())
    torch.testing.assert_close(layer.weight.grad, g.reshape(-1, 5).T @ inputs.reshape(-1, 7))
    torch.testing.assert_close(x.grad, g @ mixed)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))


def test_gradient_goes_through_the_clip_too() -> None:
    """Weights far beyond gamma are clipped in the forward pass; the estimator does not mask them."""
    layer = BitLinear(linear(bias=False), activations=False)
    with torch.no_grad():
        layer.weight[0, 0] = 100.0
    x = torch.ones(1, 7)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.ones(5, 7))


def test_norm_inside_has_the_gradient_of_rmsnorm() -> None:
    """n = x / r, r = sqrt(mean x^2 + eps): dL/dx = (p - n mean(p n)) / r with p = dL/dn = G B."""
    layer = BitLinear(linear(bias=False), activations=False, norm="inside").double()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, dtype=torch.float64)
    layer(x).backward(g)
    r = (x.detach().square().mean(1, keepdim=True) + 1e-6).sqrt()
    n = x.detach() / r
    p = g @ layer.quantized().double()
    torch.testing.assert_close(x.grad, (p - n * (p * n).mean(1, keepdim=True)) / r, rtol=1e-6, atol=1e-6)


def test_straight_through_is_exact_at_one() -> None:
    value, quantised = torch.randn(100), torch.randn(100)
    assert torch.equal(straight_through(value, quantised), quantised)


@pytest.mark.parametrize("packing", ["trits", "2bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_codes_are_the_forward_s_to_the_last_bit(packing: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    stage = stages.get("ternary", packing=packing)
    for dense_layer in (nn.Linear(129, 65), conv1d(129, 65)):
        layer = BitLinear(dense_layer.to(dtype), stage=stage)
        dense = layer.weight.detach().T.contiguous() if layer.transposed else layer.weight.detach()
        used = layer.quantized().T if layer.transposed else layer.quantized()
        packed = layer.packed()
        assert torch.equal(stage.decode(packed), used)
        assert stage.encode(dense).sha256 == packed.sha256  # what the stage makes of the latent weight


def conv1d(inputs: int, outputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


def test_conv1d_computes_as_the_transposed_linear() -> None:
    conv = conv1d(7, 5)
    same = nn.Linear(7, 5)
    with torch.no_grad():
        same.weight.copy_(conv.weight.T)
        same.bias.copy_(conv.bias)
    x = torch.randn(2, 7)
    torch.testing.assert_close(BitLinear(conv)(x), BitLinear(same)(x))


def test_only_linear_layers_of_the_blocks_are_replaced() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    names = set(llama.state_dict())
    assert len(convert(llama)) == 14
    assert set(llama.state_dict()) == names
    assert isinstance(llama.lm_head, nn.Linear) and isinstance(llama.model.embed_tokens, nn.Embedding)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    found = convert(gpt2)
    assert found == [f"transformer.h.{i}.{leaf}" for i in range(2) for leaf in LEAVES]
    assert type(gpt2.lm_head) is nn.Linear
    assert all(layer.transposed for _, layer in layers_of(gpt2, BitLinear))


LEAVES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def test_named_layers_only_and_wrong_names_are_refused() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert convert(llama, ["model.layers.1.mlp.up_proj.weight"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(BadInput, match=r"model\.norm: expected a linear layer, found LlamaRMSNorm"):
        convert(llama, ["model.norm"])
    with pytest.raises(BadInput, match="nowhere: expected a linear layer, found nothing"):
        convert(llama, ["nowhere"])
    with pytest.raises(BadInput, match=r"blend=1\.5"):
        set_blend(llama, 1.5)


def test_blend_leads_from_the_dense_model_to_the_quantised_one() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    ids = torch.arange(6).unsqueeze(0)
    before = llama(ids).logits
    student = copy.deepcopy(llama)
    convert(student)
    set_blend(student, 0.0)
    torch.testing.assert_close(student(ids).logits, before)
    distances = []
    for blend in (0.25, 0.5, 1.0):
        set_blend(student, blend)
        distances.append((student(ids).logits - before).abs().mean().item())
    assert 0 < distances[0] < distances[1] < distances[2]


def test_steps_change_the_output() -> None:
    """An earlier implementation trained a copy that the forward pass never read: 100 steps changed outputs by exactly 0."""
    layer = BitLinear(linear())
    x = torch.randn(8, 7)
    before = layer(x).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert float(layer(x).square().mean()) < 0.9 * float(before.square().mean())
