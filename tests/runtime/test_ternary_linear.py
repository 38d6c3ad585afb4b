"""Ternary layers that stay packed: exact against brute force on every path, and as a model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import agentforge as af
from agentforge.errors import BadArtifact, BadInput
from agentforge.models import LanguageModel
from agentforge.planes import Packed, Plane
from agentforge.runtime import TernaryLinear, linear, packed_cpu, ternary_cpu
from agentforge.runtime.layers import Half
from agentforge.stages.ternary import Ternary

SHAPES = [(1, 1), (1, 64), (3, 65), (4, 63), (16, 256), (17, 100), (70, 1000), (1, 2500), (129, 1)]


def layer_of(rows: int, columns: int, bias: bool = False, per_row: bool = False, seed: int = 0) -> TernaryLinear:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (rows, columns), generator=g, dtype=torch.uint8)
    scale = torch.rand(rows if per_row else 1, generator=g) + 0.1
    return TernaryLinear(codes, scale, torch.randn(rows, generator=g) if bias else None)


def codes_of(layer: TernaryLinear) -> torch.Tensor:
    """uint8[out, in], read from the bytes as the module's description says."""
    groups = len(layer.packed)
    column = torch.arange(layer.in_features)
    places = 16 * torch.arange(4)[:, None] + column % 16  # of a row's columns in their runs
    codes = layer.packed[:, column // 64, places] >> (2 * (column % 64 // 16)) & 3
    return codes.reshape(4 * groups, layer.in_features)[: layer.out_features]


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s of BitNet's activations, as the authors compute them."""
    s = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-5)
    return (x.float() * s).round().clamp_(-128, 127), s


def reference(layer: TernaryLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in double precision: float64.  Integers are summed first: where they give zero, so does this."""
    q, s = rounded(x)
    result = q.double() @ (codes_of(layer).double() - 1).T / s.double() * layer.scale.double()
    return result if layer.bias is None else result + layer.bias.double()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of float32, against the size of what was added up."""
    assert torch.equal(found.isnan(), expected.isnan())
    size = expected.nan_to_num().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert ((found.double() - expected).nan_to_num().abs() / size).max() < 2**-23


def by_path(layer: TernaryLinear, x: torch.Tensor, path: str | None = None, threads: int = 1) -> torch.Tensor:
    return ternary_cpu.product(x, layer.packed, layer.scales, layer.biases, layer.out_features, path, threads)


@pytest.mark.parametrize("path", ternary_cpu.PATHS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 67])
def test_integers_are_those_of_brute_force(path: str, tokens: int) -> None:
    if path not in ternary_cpu.available():
        pytest.skip("not on this machine")
    for rows, columns in SHAPES:
        layer = layer_of(rows, columns)
        layer.scales.fill_(1.0)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
        q, s = rounded(x)
        exact = q.long() @ (codes_of(layer).long() - 1).T
        assert torch.equal(by_path(layer, x, path), (exact.double() * (1 / s.double())).float())


def test_the_largest_sums_fit() -> None:
    columns = 1 << 20
    for code, sign in ((2, 1), (0, -1)):
        layer = TernaryLinear(torch.full((1, columns), code, dtype=torch.uint8), torch.ones(1))
        for path in ternary_cpu.available():
            for tokens in (1, 4):
                out = by_path(layer, torch.full((tokens, columns), 127.0), path)
                assert torch.equal(out, torch.full((tokens, 1), sign * 127.0 * columns))
    with pytest.raises(BadInput, match="expected 1 to"):
        TernaryLinear(torch.zeros(1, ternary_cpu.LIMIT + 1, dtype=torch.uint8), torch.ones(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_and_biases(bias: bool, per_row: bool) -> None:
    for rows, columns in SHAPES:
        layer = layer_of(rows, columns, bias, per_row)
        assert (layer.bias is not None) == bias and layer.scale.numel() == (rows if per_row else 1)
        for shape in ((columns,), (2, 3, columns), (0, columns)):
            x = torch.randn(shape)
            found = layer(x)
            assert found.shape == (*shape[:-1], rows) and found.dtype == torch.float32
            if x.numel():
                assert_equal(found, reference(layer, x))


@pytest.mark.parametrize("path", ternary_cpu.PATHS)
def test_unusual_activations(path: str) -> None:
    if path not in ternary_cpu.available():
        pytest.skip("not on this machine")
    layer = layer_of(20, 130, bias=True)
    x = torch.randn(12, 130)
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e35
    x[3] = torch.finfo(torch.float32).max / 130  # larger ones may give a sum beyond float32
    x[4, 7] = torch.nan
    x[5, 129] = torch.inf
    x[6, 0] = -torch.inf
    x[7] = 1e-45
    x[8] = torch.arange(130) - 64.5  # halves, to even
    x[9, :-1] = 0
    found = by_path(layer, x, path)
    assert layer.bias is not None and torch.equal(found[0], layer.bias) and torch.equal(found[1], layer.bias)
    assert found[4:7].isnan().all() and not found[[*range(4), *range(7, 12)]].isnan().any()
    assert_equal(found, reference(layer, x))
    for token in range(12):
        assert torch.equal(by_path(layer, x[token], path).nan_to_num(), found[token].nan_to_num())


def test_paths_and_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary_cpu, "WORTH_THREADS", 1)
    for rows, columns in [(1, 10), (16, 64), (100, 700), (257, 130)]:
        layer = layer_of(rows, columns, bias=True, per_row=True)
        x = torch.randn(5, columns)
        first = by_path(layer, x)
        for path in ternary_cpu.available():
            for threads in (1, 2, 3, 8):
                assert torch.equal(by_path(layer, x, path, threads), first)


def test_callers_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary_cpu, "WORTH_THREADS", 1)
    layer, xs = layer_of(300, 500), [torch.randn(3, 500) for _ in range(40)]
    expected = [by_path(layer, x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(layer, xs), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = layer_of(30, 200, bias=True), torch.randn(4, 200).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_from_linear_rounds_as_bitnet_does() -> None:
    for bias in (False, True):
        dense = nn.Linear(100, 30, bias=bias)
        layer = TernaryLinear.from_linear(dense)
        w = dense.weight.detach()
        scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
        assert torch.equal(codes_of(layer).float() - 1, (w * scale).round().clamp_(-1, 1))
        assert layer.scale.item() == pytest.approx(float(w.abs().mean()), rel=1e-6)
        assert (layer.bias is None) if not bias else torch.equal(layer.bias, dense.bias.detach())
        x = torch.randn(7, 100)
        assert_equal(layer(x), reference(layer, x))
    assert "in_features=100, out_features=30" in repr(layer)
    with pytest.raises(BadInput, match="Embedding: expected a linear layer"):
        TernaryLinear.from_linear(nn.Embedding(3, 4))


def test_from_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 70)
    dense = nn.Linear(70, 24)
    dense.weight.data, dense.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    x = torch.randn(2, 5, 70)
    assert torch.equal(TernaryLinear.from_linear(conv)(x), TernaryLinear.from_linear(dense)(x))


@pytest.mark.parametrize(
    "stage",
    [
        Ternary(),
        Ternary(packing="2bit"),
        Ternary(rule="threshold"),
        Ternary(rule="threshold", tau=0.7),
        Ternary(rule="calibrated"),
    ],
)
@pytest.mark.parametrize("size", [1e-20, 0.02, 1e20])
def test_from_packed_is_what_the_stage_decodes(stage: Ternary, size: float) -> None:
    packed = stage.encode(torch.randn(19, 77, generator=torch.Generator().manual_seed(0)) * size)
    layer = TernaryLinear.from_packed(packed)
    assert torch.equal((codes_of(layer).float() - 1) * layer.scale.unsqueeze(1), stage.decode(packed))
    x = torch.randn(3, 77)
    assert_equal(layer(x), reference(layer, x))


def test_refusals() -> None:
    layer = layer_of(4, 8)
    with pytest.raises(BadInput, match=r"expected inputs \[\.\.\., 8\], found \[2, 9\]"):
        layer(torch.randn(2, 9))
    with pytest.raises(BadInput, match="no gradient"):
        layer(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(BadInput, match="not those of a ternary weight"):
        TernaryLinear.from_packed(af.stages.get("rounding", bits=4).encode(torch.randn(8, 64)))
    codes = Plane("codes", torch.full((2, 2), 3, dtype=torch.uint8), "uint2")
    with pytest.raises(BadArtifact, match="holds 3"):
        TernaryLinear.from_packed(Packed((2, 2), (codes, Plane("scale", torch.ones(1), "float32"))))
    with pytest.raises(BadInput, match="expected one scale"):
        TernaryLinear(torch.zeros(3, 4, dtype=torch.uint8), torch.ones(2))


def test_nothing_dense_is_held() -> None:
    layer = layer_of(192, 576)
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert held == 192 * 576 // 4 + 32
    assert not [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert not list(layer.parameters())


def test_a_layer_is_copied_saved_cast_and_moved() -> None:
    layer, x = layer_of(10, 70, bias=True, per_row=True), torch.randn(2, 70)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    other = layer_of(10, 70, bias=True, per_row=True, seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.scales.dtype == cast.biases.dtype == torch.float32
        assert torch.equal(cast(x), expected)
    assert copy.deepcopy(layer).to("meta").scales.is_meta


def test_the_portable_path_where_there_is_nothing_else(tmp_path: Path) -> None:
    layer, x = layer_of(33, 150), torch.randn(5, 150)
    torch.save({"layer": layer.state_dict(), "x": x, "expected": layer(x)}, tmp_path / "case.pt")
    program = f"""
import torch
from agentforge.runtime import TernaryLinear, ternary_cpu
assert ternary_cpu.available() == ("portable",)
case = torch.load({str(tmp_path / "case.pt")!r})
layer = TernaryLinear(torch.zeros(33, 150, dtype=torch.uint8), torch.ones(1))
layer.load_state_dict(case["layer"])
assert torch.equal(layer(case["x"]), case["expected"])
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


class Int8Linear(nn.Module):
    """A dense layer with the activations of a TernaryLinear."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, s = rounded(x)
        return (q.double() @ self.dense.weight.double().T / s.double()).float()


@pytest.fixture(scope="module", params=["ternary", "ternary:rule=threshold,packing=2bit"])
def artifact(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "artifact"
    return af.compress(af.open_model(tiny_llama), request.param, out=out).path


def dense_reference(path: Path) -> nn.Module:
    model = af.load(path).model
    for block in model.model.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return model


def test_a_packed_model_is_the_dense_one_with_the_same_activations(artifact: Path) -> None:
    packed, dense = af.load(artifact, runtime="packed"), dense_reference(artifact)
    layers = [m for m in packed.model.modules() if isinstance(m, TernaryLinear)]
    assert len(layers) == 14
    assert not any(t.is_meta for t in [*packed.model.parameters(), *packed.model.buffers()])
    ids = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = packed.model(ids).logits, dense(ids).logits
    # A float32 sum in another order may carry one activation over the edge between two integers.
    assert ((found - expected).norm() / expected.norm()) < 2e-2
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_a_packed_model_generates(artifact: Path) -> None:
    packed = af.load(artifact, runtime="packed")
    ids = packed.tokenizer("A small packed model", return_tensors="pt").input_ids
    with torch.inference_mode():
        out = packed.model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        assert out.shape == (1, ids.shape[1] + 12)
        for length in range(ids.shape[1], out.shape[1]):  # a step with a cache is a step without one
            logits = packed.model(out[:, :length]).logits[0, -1]
            assert logits[out[0, length]] >= logits[2:].max() - 0.05 * logits.std()


def test_a_packed_model_is_measured(artifact: Path, tmp_path: Path) -> None:
    text = "The same few words, again and again, to be guessed. " * 12
    packed, dense = af.load(artifact, runtime="packed"), af.load(artifact)
    (tmp_path / "text.txt").write_text(text)
    found, expected = (af.perplexity(m, text=str(tmp_path / "text.txt"), context=64) for m in (packed, dense))
    assert found.value == pytest.approx(expected.value, rel=0.2)


def test_padding_and_casts_of_a_packed_model(artifact: Path) -> None:
    model = af.load(artifact, runtime="packed").model
    ids = torch.randint(2, 250, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded: the mask must count
    with torch.inference_mode():
        alone = model.generate(ids[1:, 3:], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(alone[0, 3:], both[1, 6:])
        brain = copy.deepcopy(model).to(torch.bfloat16)
        assert brain(ids).logits.dtype == torch.bfloat16
        assert brain.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 9)


def test_a_packed_model_holds_two_bits_a_weight(artifact: Path) -> None:
    model = af.load(artifact, runtime="packed").model
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    scales = sum(4 * m.scales.numel() + 4 * m.biases.numel() for m in layers)
    assert sum(t.nbytes for m in layers for t in m.buffers()) == weights // 4 + scales
    kept = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert sum(kept.values()) < weights // 4 + scales + 2 * 258 * 64 + 4 * 64 * 5 + 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (5, 64), (1000, 48), (3, 16), (9, 30)])
def test_a_head_of_16_bits(dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cpu, "CHUNK", 300)
    weight = torch.randn(rows, columns).to(dtype)
    for tokens in (1, 4, 5):
        x = torch.randn(1, tokens, columns)
        found, exact = packed_cpu.half(x, weight), x.double() @ weight.double().T
        assert ((found - exact).abs() <= 1e-6 * (x.abs().double() @ weight.abs().double().T)).all()
        monkeypatch.setattr(ternary_cpu, "WORTH_THREADS", 1)
        assert torch.equal(packed_cpu.half(x, weight), found)
        monkeypatch.setattr(packed_cpu, "available", lambda: False)
        assert ((packed_cpu.half(x, weight) - exact).abs() <= 1e-6 * (x.abs().double() @ weight.abs().double().T)).all()
        monkeypatch.undo()
    head, embedding = Half(weight), Half(weight)
    assert torch.equal(embedding(torch.tensor([[2, 0]])), weight[[2, 0]].float()[None])
    for module in (head, embedding):
        module.to(torch.float64)
        assert (
            module.state_dict()["weight"].dtype == dtype
            and module.weight.dtype == module.like.dtype
            and not list(module.parameters())
        )
    assert embedding(torch.tensor([1])).dtype == torch.float64
    assert head(torch.randn(2, columns, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "llama with biases"])
def test_other_architectures(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 258, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    decoder = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    elif kind == "gemma":
        config = transformers.GemmaConfig(**sizes, **decoder, num_key_value_heads=1, head_dim=16)
    else:
        biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        config = transformers.LlamaConfig(**sizes, **decoder, **biases, num_key_value_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / "model")
    for file in tiny_llama.glob("token*"):
        shutil.copy(file, tmp_path / "model")
    path = af.compress(af.open_model(tmp_path / "model"), "ternary", out=tmp_path / "artifact").path
    packed, dense = af.load(path, runtime="packed").model, af.load(path).model
    names = [name for name, module in packed.named_modules() if isinstance(module, TernaryLinear)]
    assert len(names) == (8 if kind == "gpt2" else 14)
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounded(args[0])[0] / rounded(args[0])[1],))
    ids = torch.randint(2, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = packed(ids).logits, dense(ids).logits
        assert ((found - expected).norm() / expected.norm()) < 2e-2
        cache = packed(ids[:, :-1], use_cache=True).past_key_values
        step = packed(ids[:, -1:], past_key_values=cache).logits[:, -1]
        assert ((step - found[:, -1]).norm() / step.norm()) < 2e-2


def test_classifiers_too(digits: LanguageModel, tmp_path: Path) -> None:
    path = af.compress(digits, "ternary", out=tmp_path / "digits").path
    packed = af.load(path, runtime="packed")
    assert any(isinstance(m, TernaryLinear) for m in packed.model.modules())
    assert af.accuracy(packed).value == pytest.approx(af.accuracy(af.load(path)).value, abs=0.05)


def test_the_command_line_evaluates_packed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agentforge import cli

    (tmp_path / "text.txt").write_text("again and again " * 10)

    def value(runtime: str) -> float:
        command = ["agentforge", "evaluate", artifact, "--text", tmp_path / "text.txt", "--context", 64, "--json"]
        monkeypatch.setattr("sys.argv", [*map(str, command), "--runtime", runtime])
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            cli.main()
        return float(json.loads(capsys.readouterr().out)["measurements"]["perplexity"]["value"])

    packed, dense = value("packed"), value("dense")
    assert packed != dense and packed == pytest.approx(dense, rel=0.2)


def test_an_unknown_runtime_is_refused(artifact: Path) -> None:
    with pytest.raises(BadInput, match=r"runtime 'fast' does not exist; choose from dense, packed"):
        af.load(artifact, runtime="fast")


@pytest.mark.parametrize(("bias", "per_row"), [(False, False), (True, True)])
@pytest.mark.parametrize("tokens", [1, 3, 35])
@pytest.mark.parametrize(("part", "exact"), [(1 << 24, 1 << 17), (1000, 1)])
def test_results_elsewhere_are_those_of_the_cpu(
    tokens: int, bias: bool, per_row: bool, part: int, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU where there is one, else by the same code on the CPU."""
    monkeypatch.setattr(linear, "PART", part)
    monkeypatch.setattr(linear, "EXACT", exact)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rows, columns in [(1, 1), (70, 130), (17, 600)]:
        layer = layer_of(rows, columns, bias, per_row)
        x = torch.randn(tokens, columns)
        x[-1, 0] = torch.nan
        operands = [t.to(device) for t in (x, layer.packed, layer.scales, layer.biases)]
        found = linear.product_elsewhere(*operands, rows).cpu()
        expected = layer(x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_packing_is_undone() -> None:
    codes = torch.randint(0, 3, (9, 200), dtype=torch.uint8)
    assert torch.equal(codes_of(TernaryLinear(codes, torch.ones(1))), codes)
    padded = linear.pack(codes)
    assert padded.shape == (3, 4, 64) and np.count_nonzero(padded[-1, -1].numpy()) > 0


def test_the_benchmark_measures_and_tells(
    load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_benchmark("ternary_speed")
    for name, value in {"SHAPES": [(8, 64)], "TOKENS": [1, 5], "OUT_OF_CACHE": 1000, "BLOCK": 1e-5}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda threads: 1e10)
    threads = torch.get_num_threads()
    try:
        rows = benchmark.products(0.0, [1])
    finally:
        torch.set_num_threads(threads)
    assert [(row["tokens"], row["weights"]) for row in rows] == [(1, "memory"), (1, "cache"), (5, "cache")]
    assert rows[0]["contestants"]["packed"]["bytes"] == 8 * 64 // 4 + 32
    shown = benchmark.table_of_products(rows)
    assert "| 8 x 64 | 1 | 1 | memory |" in shown and "quartiles" in shown
