"""Models of any architecture come out right, or are refused in a sentence: kinds of faults that were silent once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import agentforge as af
import agentforge.huggingface
from agentforge.allocation import LADDER, Budget, fit
from agentforge.cli import app
from agentforge.errors import BadInput
from agentforge.evaluation import Text, check_causal, likelihood
from agentforge.models import LanguageModel, as_matrix
from agentforge.opening import open_model
from agentforge.statistics import Calibration, collect
from agentforge.training.distil import distillation
from agentforge.training.phase import phase
from agentforge.training.recover import Settings, recover
from tests.architectures import make
from tests.conftest import make_tiny_llama

TEXT = Text("counting", "test", " ".join(str(i) for i in range(400)))


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny model of the architecture that the test names, of 64 positions."""
    return open_model(make(request.param, tmp_path / request.param, max_position_embeddings=64))


@pytest.mark.parametrize("made", ["GPT2"], indirect=True)
def test_sensitivities_of_conv1d_are_of_its_outputs(made: LanguageModel) -> None:
    """GPT-2 stores [in, out]; by hand, with a gradient for each output."""
    found = collect(made, Calibration(TEXT, 48, 48, 48), progress=False)
    window = made.encode(TEXT.text)[:48]
    outputs: dict[str, torch.Tensor] = {}
    module = made.model
    for name in found:
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, output))
    logp = module(torch.tensor([window])).logits[0].log_softmax(-1)
    drawn = torch.multinomial(logp.exp(), 1, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(logp.gather(1, drawn).sum(), list(outputs.values()))
    for name, gradient in zip(outputs, gradients, strict=True):
        shape = next(weight.shape for weight in made.weights() if weight.name == name)
        assert found[name].sensitivity is not None and found[name].sensitivity.shape == (shape[0],)
        torch.testing.assert_close(found[name].sensitivity, gradient[0].square().mean(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("made", ["Llama", "Qwen3", "Zamba2"], indirect=True)  # which says it otherwise
def test_queries_and_keys_have_the_curvature_of_their_heads(made: LanguageModel) -> None:
    """By hand; several workers; of other layers there is none."""
    calibration = Calibration(TEXT, 96, 48, 96)
    found = collect(made, calibration, workers=3, progress=False)
    ids = made.encode(TEXT.text)[:96]
    size = made.config.get("head_dim") or made.config["attention_head_dim"]
    generator, gradients = torch.Generator().manual_seed(0), {}
    outputs: dict[str, torch.Tensor] = {}
    for name in found:
        layer = made.model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    for window in (ids[:48], ids[48:]):
        logp = made.model(torch.tensor([window])).logits[0].log_softmax(-1)
        drawn = torch.multinomial(logp.exp(), 1, generator=generator)
        for name, gradient in zip(
            outputs, torch.autograd.grad(logp.gather(1, drawn).sum(), list(outputs.values())), strict=True
        ):
            gradients.setdefault(name, []).append(gradient[0].double())
    for name, of in gradients.items():
        curvature, g = found[name].curvature, torch.cat(of)
        assert (curvature is not None) == (name.split(".")[-2] in ("q_proj", "k_proj"))
        if curvature is not None:
            for head, block in enumerate(curvature.double()):
                own = g[:, size * head : size * (head + 1)]
                torch.testing.assert_close(block, own.T @ own / 96, rtol=1e-3, atol=1e-9)
            assert found[name].sensitivity.shape == (len(curvature) * size,)


@pytest.mark.parametrize("made", ["GPT2"], indirect=True)
def test_windows_are_no_longer_than_the_model_takes(made: LanguageModel, tmp_path: Path) -> None:
    """64 positions; calibration asks for 1024 and evaluation for 2048 if nothing else is said."""
    assert af.perplexity(made, TEXT, progress=False).protocol["context"] == 64
    few = Calibration(tokens=1024)
    compressed = af.compress(made, "vptq:v=4,k=16", tmp_path / "v", calibration=few, progress=False)
    assert compressed.manifest["recipe"]["calibration"]["context"] == 64
    fitted = fit(made, tmp_path / "f", Budget(bits=4), calibration=few, text=TEXT, tokens=128, progress=False)
    assert fitted.measured.kl.protocol["context"] == 64 and fitted.bits <= 4


@pytest.mark.parametrize("made", ["Llama4Text"], indirect=True)
def test_a_router_that_gives_several_outputs_has_no_sensitivity(made: LanguageModel) -> None:
    found = collect(made, Calibration(TEXT, 64, 64, 64), progress=False)
    without = [name for name, stats in found.items() if stats.sensitivity is None]
    assert without == [name for name in found if name.endswith("router.weight")] != []
    assert all(stats.sensitivity is None or stats.sensitivity.any() for stats in found.values())


@pytest.mark.parametrize("made", ["Bert"], indirect=True)
def test_what_sees_later_tokens_has_no_perplexity(made: LanguageModel, tmp_path: Path) -> None:
    for ask in (
        lambda: af.perplexity(made, TEXT, tokens=64, progress=False),
        lambda: af.divergence(made, made, TEXT, tokens=64, progress=False),
        lambda: fit(made, tmp_path / "f", Budget(bits=3), text=TEXT, tokens=64, progress=False),
    ):
        with pytest.raises(BadInput, match=r"is no causal model: it sees the tokens"):
            ask()
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("never", [-math.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("made", ["Bert", "Llama"], indirect=True)
def test_an_id_that_is_never_given_hides_no_encoder(made: LanguageModel, never: float) -> None:
    likelihood._CAUSAL.clear()
    head = made.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits.masked_fill(torch.arange(258) > 250, never))
    if type(made.model).__name__.startswith("Bert"):
        with pytest.raises(BadInput, match="is no causal model"):
            check_causal(made)
    else:
        check_causal(made)


def test_recovery_takes_ids_that_are_never_given() -> None:
    ours, theirs = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    rest = distillation(mine := ours.clone().requires_grad_(), theirs)
    rest.backward()
    pad = torch.full((5, 3), -math.inf)
    loss = distillation(wide := torch.cat([ours, pad], 1).requires_grad_(), torch.cat([theirs, pad], 1))
    loss.backward()
    assert mine.grad is not None and wide.grad is not None
    # The order of sums depends on how many values a processor adds at once.
    assert float(loss) == pytest.approx(float(rest), rel=1e-6)
    assert torch.allclose(wide.grad[:, :7], mine.grad, rtol=1e-6, atol=1e-8) and not wide.grad[:, 7:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    sound = make_tiny_llama(tmp_path / "sound")
    folder, name = make_tiny_llama(tmp_path / "broken"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    broken = open_model(folder)
    (tmp_path / "text.txt").write_text(TEXT.text)
    for models in ([str(folder)], [str(folder), "--against", str(sound)], [str(sound), "--against", str(folder)]):
        with pytest.raises(BadInput, match=rf"broken: what it computes is not finite \(its tensor {name}"):
            app(["evaluate", *models, "--text", str(tmp_path / "text.txt"), "--tokens", "64"], standalone_mode=False)
    few = Calibration(tokens=1024)
    with pytest.raises(BadInput, match=name):
        fit(broken, tmp_path / "f", Budget(bits=3), calibration=few, text=TEXT, tokens=64, progress=False)


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    from tokenizers import processors

    folder = make_tiny_llama(tmp_path / "with-bos")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)
    model, ids = open_model(folder), open_model(folder).encode(TEXT.text)
    assert model.first_ids == [0] and ids[0] != 0
    windows, protocol = likelihood.plan(model, TEXT, None, None, 300, None)
    assert protocol["bos"] == "window" and len(windows) > 1
    assert all(window.ids[0] == 0 and window.first == 1 and len(window.ids) <= 128 for window in windows)
    assert likelihood.plan(model, TEXT, None, None, 300, "none")[1]["bos"] == "none"
    found = af.perplexity(model, TEXT, tokens=127, progress=False)
    (window,) = likelihood.plan(model, TEXT, None, None, 127, None)[0]
    with torch.inference_mode():
        logits = model.model(torch.tensor([window.ids])).logits[0, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits, torch.tensor(window.ids[1:])).exp()
    assert found.value == pytest.approx(float(by_hand), rel=1e-5)
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args or kwargs), with_kwargs=True)
    layer = model.model.get_submodule("model")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]) if args else None)
    collect(model, Calibration(TEXT, 100, 40), workers=1, progress=False)
    windows_seen = [ids for ids in seen if isinstance(ids, torch.Tensor) and ids.shape[1] > 4]
    assert [w.shape[1] for w in windows_seen] == [40, 40, 23] and all(w[0, 0] == 0 for w in windows_seen)
    assert [i for w in windows_seen for i in w[0, 1:].tolist()] == ids[:100]


@pytest.mark.parametrize(
    "mixture", ["a stale index", "stale shards", "shards alone", "a name in config.json", "consolidated, fp16"]
)
def test_the_weights_are_those_that_transformers_takes(tmp_path: Path, mixture: str) -> None:
    folder, other = make_tiny_llama(tmp_path / "m"), make_tiny_llama(tmp_path / "other", seed=1)
    shards = transformers.AutoModelForCausalLM.from_pretrained(other)
    if mixture in ("a stale index", "stale shards", "shards alone"):
        shards.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
        for file in (tmp_path / "shards").glob("model*"):
            if mixture != "a stale index" or file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
    if mixture == "shards alone":
        (folder / "model.safetensors").unlink()
    if mixture in ("a name in config.json", "consolidated, fp16"):
        for name in ("consolidated.safetensors", "model.fp16.safetensors"):
            (folder / name).write_bytes((other / "model.safetensors").read_bytes())
    if mixture == "a name in config.json":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "consolidated.safetensors"}))
    ids = torch.tensor([[5, 9, 70]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    opened = open_model(folder)
    with torch.inference_mode():
        assert torch.equal(opened.model(ids).logits, theirs(ids).logits)
    made = af.compress(opened, "rounding:bits=8,group=16", tmp_path / "a", progress=False)
    made.verify()
    with torch.inference_mode():
        found = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(ids).logits
    assert (found - theirs(ids).logits).abs().max() < 0.2 * found.abs().max()


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/base"}))
    with pytest.raises(BadInput, match=r"holds an adapter \(PEFT\) for 'somebody/base', not a model; merge"):
        open_model(tmp_path)


@pytest.mark.parametrize("kind", ["gptq, no config", "int8 weights", "MLX"])
def test_what_another_tool_quantised_is_not_taken_for_weights(tmp_path: Path, kind: str) -> None:
    folder, name = make_tiny_llama(tmp_path / "m"), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(name)
    if kind == "gptq, no config":
        tensors |= {name.replace("weight", "qweight"): torch.zeros(8, 128, dtype=torch.int32)}
    elif kind == "int8 weights":
        tensors[name] = (20 * weight).round().clamp(-127, 127).to(torch.int8)
    else:
        tensors[name] = weight
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 32}}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"already quantised by another tool"):
        open_model(folder)


@pytest.mark.parametrize("made", ["Mixtral", "Qwen3Moe"], indirect=True)
def test_experts_have_statistics_of_the_tokens_that_the_router_sends_them(made: LanguageModel) -> None:
    """By hand, from the router's own choice: what each expert is fed, and the gradients of what it gives."""
    found = collect(made, Calibration(TEXT, 48, 48, 48), progress=False)
    name = next(weight.name for weight in made.weights() if weight.name.endswith("experts.gate_up_proj"))
    experts = made.model.get_submodule(name.rpartition(".")[0])
    ids = torch.tensor([made.encode(TEXT.text)[:48]])
    seen: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    made.model(ids)
    handle.remove()
    states, chosen, _ = (one.reshape(48, -1) for one in seen[0])
    fed = torch.cat([states[(chosen == expert).any(1)] for expert in range(chosen.max() + 1)]).double()
    stats = found[name]
    assert stats.n == len(fed) == chosen.numel()
    torch.testing.assert_close(stats.hessian.double(), fed.T @ fed / len(fed), rtol=1e-4, atol=1e-6)
    down = found[name.replace("gate_up", "down")]
    assert down.sensitivity is not None and down.sensitivity.shape == (4 * 32,)
    # The loss is differentiated in a number that is added to each output of each expert.
    logp = made.model(ids).logits[0].log_softmax(-1)
    drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    by_hand = torch.zeros(4, 32)
    made.model.set_experts_implementation("eager")
    linear = torch.nn.functional.linear
    outputs: list[tuple[int, torch.Tensor]] = []

    def spied(x: torch.Tensor, matrix: torch.Tensor, bias: Any = None) -> torch.Tensor:
        output = linear(x, matrix, bias)
        for expert, own in enumerate(experts.down_proj):
            if torch.equal(matrix, own):
                outputs.append((expert, output))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spied)
        logp = made.model(ids).logits[0].log_softmax(-1)
    gradients = torch.autograd.grad(logp.gather(1, drawn).sum(), [output for _, output in outputs])
    for (expert, _), gradient in zip(outputs, gradients, strict=True):
        by_hand[expert] += gradient.square().sum(0) / 48
    torch.testing.assert_close(down.sensitivity.reshape(4, 32), by_hand, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text", "Mixtral", "JetMoe"])
def test_experts_have_the_statistics_of_their_gradients(name: str, tmp_path: Path) -> None:
    """Of an expert that one token is sent to, the gradient is g x^T; H is the sum of x x^T, the sensitivity g^2."""
    made = open_model(make(name, tmp_path / name, num_experts_per_tok=1))
    experts = {weight.name: weight for weight in made.weights() if weight.experts}
    checked = 0
    for start in range(4):
        text = Text("two", "test", TEXT.text[5 * start :])
        found = collect(made, Calibration(text, 2, 2, 2), progress=False)
        ids = torch.tensor([made.encode(text.text)[:2]])
        logp = made.model(ids).logits[0].log_softmax(-1)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad(logp.gather(1, drawn).sum(), [made.model.get_parameter(one) for one in experts])
        for (one, weight), gradient in zip(experts.items(), gradients, strict=True):
            own = as_matrix(gradient, weight.transposed).reshape(weight.experts, -1, weight.shape[1]).double()
            hit = [expert for expert in range(weight.experts) if own[expert].any()]
            sensitivity = found[one].sensitivity
            assert found[one].n == 2 and sensitivity is not None
            squares = 2 * sensitivity.reshape(weight.experts, -1).double()
            assert [expert for expert in range(weight.experts) if squares[expert].any()] == hit
            if len(hit) < 2:
                continue
            total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
            for expert in hit:
                _, sizes, directions = torch.linalg.svd(own[expert])
                length = sizes[0] ** 2 / squares[expert].sum()
                total += length * directions[0].outer(directions[0])
                torch.testing.assert_close(squares[expert] * length, own[expert].square().sum(1), rtol=1e-3, atol=1e-9)
            torch.testing.assert_close(found[one].hessian.double() * 2, total, rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked


@pytest.mark.parametrize("made", ["Mixtral", "Qwen3Moe", "GptOss", "Llama4Text", "JetMoe"], indirect=True)
def test_a_budget_of_bits_holds_experts_too(made: LanguageModel, tmp_path: Path) -> None:
    about: dict[str, Any] = {"calibration": Calibration(tokens=1024), "ladder": LADDER[::4], "text": TEXT, "tokens": 128}
    fitted = fit(made, tmp_path / "f", Budget(bits=3), progress=False, **about)
    kept = {row["name"] for row in fitted.artifact.rows if row["stage"] is None}
    assert kept & {weight.name for weight in made.weights()} == set(fitted.outside)
    assert all(
        name.endswith((".router.weight", ".router.layer.weight")) for name in fitted.outside
    )  # that give several outputs
    assert fitted.bits <= 3


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("Rwkv", "rwkv changes its weights in place, so that it cannot be trained"),
        ("GptOss", "model.layers.0.mlp.experts.down_proj is of experts, and linear layers alone are trained"),
        ("JetMoe", "model.layers.0.mlp.input_linear.weight is of experts"),
    ],
    indirect=["made"],
)
def test_what_cannot_be_trained_is_refused_before_any_work(made: LanguageModel, why: str, tmp_path: Path) -> None:
    settings = Settings(steps=1, batch=1, context=32, heldout=32)
    before = set(tmp_path.iterdir())
    for ask in (
        lambda: recover(made, tmp_path / "r", "ternary", settings, progress=False),
        lambda: recover(made, tmp_path / "r", "rounding:bits=4,group=16", settings, progress=False),
        lambda: fit(made, tmp_path / "r", Budget(bits=4), recovery=settings, text=TEXT, tokens=64, progress=False),
        lambda: phase(made, tmp_path / "r", settings, text=TEXT, tokens=64, progress=False),
    ):
        with pytest.raises(BadInput, match=why):
            ask()
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("made", ["Rwkv"], indirect=True)
def test_weights_that_change_in_place_are_refused_before_the_first_token(made: LanguageModel, tmp_path: Path) -> None:
    af.compress(made, "rounding:bits=8,group=16", tmp_path / "a", progress=False)
    with pytest.raises(BadInput, match="rwkv changes its own in place, which planes cannot; load with runtime=dense"):
        _ = af.load(tmp_path / "a", "packed").model
    with pytest.raises(BadInput, match="rwkv changes its own in place"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.raises(BadInput, match="has no gradients, because it changes in place"):
        fit(made, tmp_path / "f", Budget(bits=4), text=TEXT, tokens=64, progress=False)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("made", ["Mamba"], indirect=True)
def test_modules_that_read_a_weight_find_it_in_training(made: LanguageModel, tmp_path: Path) -> None:
    settings = Settings(steps=2, batch=2, context=32, heldout=32)
    done = recover(made, tmp_path / "r", "rounding:bits=4,group=16", settings, text=TEXT, progress=False)
    one = af.divergence(af.load(tmp_path / "r"), made, TEXT, tokens=64, progress=False).kl.value
    assert math.isfinite(done.after.kl) and math.isfinite(one)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("made", ["Mamba", "Mamba2", "Llama4Text", "Bert", "GPT2"], indirect=True)
def test_modules_that_read_a_packed_weight_find_it(made: LanguageModel, tmp_path: Path, embeddings: bool) -> None:
    """They take a layer's matrix, or its dtype and device, instead of calling it; a tied head has a bias of its own."""
    if hasattr(made.model, "cls"):  # else nothing would show that a head lost its bias
        torch.nn.init.normal_(made.model.cls.predictions.bias)
        made.model.save_pretrained(made.path)
        made = open_model(made.path)
    af.compress(made, "rounding:bits=8,group=16", tmp_path / "a", embeddings=embeddings, progress=False)
    ids = torch.tensor([made.encode(TEXT.text)[:40]])
    with torch.inference_mode():
        dense = af.load(tmp_path / "a").model(ids).logits
        packed = af.load(tmp_path / "a", runtime="packed").model(ids).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)(ids).logits
    assert (dense - packed).abs().max() < 1e-5 * dense.abs().max()
    assert torch.equal(packed, theirs)


def test_a_packed_ternary_weight_can_be_read() -> None:
    linear = torch.nn.Linear(70, 10)
    layer = af.runtime.TernaryLinear.from_linear(linear)
    expected = af.stages.get("ternary", packing="2bit")
    torch.testing.assert_close(layer.weight, expected.decode(expected.encode(linear.weight.detach())), rtol=1e-6, atol=0)
