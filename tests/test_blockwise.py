"""Block by block gives what the whole model gives: logits and gradients, with the weights of one block in memory."""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge.blockwise import Passes, Products, Spill
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.opening import open_model
from tests.architectures import make

WINDOWS = [torch.arange(i, i + 24)[None] % 60 for i in range(5)]


@pytest.fixture(params=["GPT2", "Mamba", "Gemma3Text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(request.param, tmp_path / "model")


def logits_of(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(ids, use_cache=False).logits  # type: ignore[no-any-return]


def resident(passes: Passes) -> set[str]:
    """Names of the matrices that take memory."""
    return {name for name, p in passes.module.named_parameters() if p.dim() > 1 and any(p.stride())}


@pytest.mark.parametrize("workers", [1, 3])
def test_logits_are_those_of_the_whole_model(folder: Path, workers: int) -> None:
    passes, whole = Passes(open_model(folder)), open_model(folder).model
    found = list(passes.map(logits_of, WINDOWS, workers=workers))
    torch.set_num_threads(1)
    assert all(torch.equal(one, logits_of(whole, ids)) for one, ids in zip(found, WINDOWS, strict=True))
    assert not resident(passes)


def test_one_block_is_in_memory_at_a_time(folder: Path) -> None:
    passes = Passes(open_model(folder))
    seen: list[set[str]] = []
    for block in passes.blocks:
        block.register_forward_hook(lambda *_: seen.append(resident(passes)))
    list(passes.map(logits_of, WINDOWS))
    prefixes = {".".join(name.split(".")[:3]) for names in seen for name in names}
    assert len(seen) == len(WINDOWS) * len(passes.blocks) and len(prefixes) == len(passes.blocks)
    assert all(len({".".join(name.split(".")[:3]) for name in names}) == 1 for names in seen)


def test_gradients_are_those_of_the_whole_model(tiny_llama: Path) -> None:
    """Of the sum of the squared logits, with respect to what the first and the last linear layer give."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

    def gradients(passes: Passes, backward: bool) -> list[dict[str, torch.Tensor]]:
        mine = threading.local()

        def keep(name: str, output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return output
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(lambda gradient: mine.found.update({name: gradient}))
            return output

        def work(module: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            mine.found = {}
            logits = module(ids, use_cache=False).logits
            logits.backward(2 * logits.detach())
            return mine.found  # type: ignore[no-any-return]

        with ExitStack() as stack:
            for name in names:
                layer = passes.module.get_submodule(name)
                stack.enter_context(layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
            return list(passes.map(work, WINDOWS, backward=backward))

    whole = open_model(tiny_llama)
    assert whole.model is not None
    expected, found = gradients(Passes(whole), False), gradients(Passes(open_model(tiny_llama)), True)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(expected, gradients(Passes(whole), True), strict=True) for n in names)
    assert not any("forward" in vars(module) for module in whole.model.modules())
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == set(names)
        assert all(torch.equal(one[name], other[name]) for name in names)


def test_what_is_read_outside_its_turn_is_no_number(tiny_llama: Path) -> None:
    passes = Passes(open_model(tiny_llama))
    late = passes.module.get_submodule("model.layers.1.mlp.down_proj")

    def peek(module: Any, ids: torch.Tensor) -> torch.Tensor:
        return logits_of(module, ids) + late.weight.sum()

    assert all(one.isnan().all() for one in passes.map(peek, WINDOWS))


def test_an_error_in_one_window_ends_all_of_them(tiny_llama: Path) -> None:
    passes, threads = Passes(open_model(tiny_llama)), threading.active_count()

    def fail(module: Any, ids: torch.Tensor) -> None:
        logits_of(module, ids)
        raise BadInput(f"window {int(ids[0, 0])}")

    with pytest.raises(BadInput, match="window 0"):
        list(passes.map(fail, WINDOWS, workers=1))
    assert threading.active_count() <= threads and not resident(passes)
    assert len(list(passes.map(logits_of, WINDOWS))) == len(WINDOWS)  # and it can be used again


def test_measuring_builds_no_model(tiny_llama: Path, tmp_path: Path) -> None:
    original = open_model(tiny_llama)
    text = af.evaluation.Text("words", "test", "".join(f"The {i}th word is {i * i}. " for i in range(400)))
    af.compress(original, "rounding:bits=4", tmp_path / "a", progress=False)
    loaded = af.load(tmp_path / "a")
    by_blocks = af.divergence(loaded, original, text, 64, tokens=500, progress=False)
    assert not any("model" in vars(model) for model in (original, loaded))
    assert isinstance(loaded, LanguageModel) and loaded.model is not None and original.model is not None
    whole = af.divergence(loaded, original, text, 64, tokens=500, progress=False)
    assert by_blocks.kl.value == pytest.approx(whole.kl.value, rel=1e-4)
    assert by_blocks.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)


def test_products_are_those_of_double_precision() -> None:
    """Both kinds of input, with and without a bias, forward and backward, of matrices that lie in memory as they like."""
    torch.manual_seed(0)
    bias, x = torch.randn(48), torch.randn(3, 70, 40)
    some = torch.randn(48, 40), torch.randn(48, 40).T.contiguous().T, torch.randn(48, 64)[:, :40]
    for inputs, b, weight in itertools.product((x, x[0], x[0, 0], x[0, :0], x[:, ::2]), (None, bias), some):
        found = []
        for dtype in (torch.float32, torch.float64):
            x_, w_ = (values.detach().to(dtype).requires_grad_() for values in (inputs, weight))
            x_.grad = w_.grad = None
            with Products():
                y = torch.nn.functional.linear(x_, w_, None if b is None else b.to(dtype))
                y.square().sum().backward()
                with torch.inference_mode():
                    again = torch.nn.functional.linear(x_, w_, None if b is None else b.to(dtype))
            found.append([y, again, x_.grad, w_.grad])
        for single, double in zip(*found, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-3)


def test_what_waits_on_the_disk_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))
    spill = Spill()
    tensors = [torch.randn(7, 3), torch.arange(5), torch.randn(4, 6).to(torch.bfloat16).T, torch.empty(0, 2)]
    waiting = [spill.put(tensor) for tensor in tensors]
    assert not list((tmp_path / "cache").iterdir())  # nothing that a kill would leave behind
    for tensor, read in zip(tensors, waiting, strict=True):
        assert torch.equal(read(), tensor) and read().dtype == tensor.dtype
    (tmp_path / "file").touch()
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "file" / "cache"))  # which cannot be made
    assert torch.equal(Spill().put(tensors[0])(), tensors[0])
    full = Spill()
    full._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(BadInput, match="No space left"):
        full.put(torch.ones(3))
