"""What the tests share: no network, a tiny Llama with its own tokenizer, and the two models that agentforge names."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import coverage
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from agentforge.evaluation import Text
    from agentforge.models import LanguageModel

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# huggingface_hub reads its variables once, when it is first imported: before any test module is collected.
os.environ.update(OFFLINE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print coverage where `coverage run` measures it, here, so that the tests' own last line stays the last one."""
    if (measuring := coverage.Coverage.current()) is not None:
        measuring.stop()
        table = io.StringIO()
        measuring.report(file=table)
        terminalreporter.write(table.getvalue())


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """A file of benchmarks/, by its name, as a module."""

    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.append(str(folder))  # where Python finds `bench` for a script of that folder

    def load(name: str) -> ModuleType:
        file = folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """A module that took the variables away while it was imported would let the tests reach for the network."""
    os.environ.update(OFFLINE)


ROOM = 4 << 30  # address space that a bounded test may take beyond what the process has
SECONDS = 60  # a bounded test that waits longer hangs


class HangError(BaseException):
    """Nothing that the code under test might take for an error of its own."""


@pytest.fixture
def bounded() -> Iterator[None]:
    """No huge allocation succeeds, and nothing waits for ever."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def hang(*_: object) -> None:
        raise HangError(f"still running after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def make_tiny_llama(folder: Path, seed: int = 0, reverse_vocabulary: bool = False) -> Path:
    """A Hugging Face folder: two layers, 128 positions, one token a byte, weights large enough to make sharp guesses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse_vocabulary)
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, a byte a token, with room for the questions of the Phase 5 checks."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("wide") / "wide-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


@pytest.fixture(scope="session")
def tiny_llama_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama-other", seed=1)


@pytest.fixture(scope="session")
def tiny_llama_backwards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a tokenizer that numbers the bytes from the other end."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama-backwards", reverse_vocabulary=True)


@pytest.fixture(scope="session")
def digits() -> LanguageModel:
    import agentforge

    return agentforge.open_model("digits-mlp")


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real default model: for tests marked slow only."""
    import agentforge

    return agentforge.open_model("smollm2-135m")


@pytest.fixture(scope="session")
def wikitext2() -> Text:
    """WikiText-2's test split from a local folder; skips where neither AGENTFORGE_DATA nor ../shared/data has it."""
    from agentforge.evaluation import find_text, texts

    for _, folder in texts._data_folders():
        if any((folder / inner / "wiki.test.raw").is_file() for inner in (".", "wikitext-2-raw")):
            return find_text("wikitext2", "test")
    pytest.skip("WikiText-2 is neither in AGENTFORGE_DATA nor in ../shared/data")


@pytest.fixture(scope="session")
def beginning(smollm2: LanguageModel, wikitext2: Text) -> Callable[[int], Text]:
    """WikiText-2's first so many tokens, as a text of its own: a sample of the whole text would lie elsewhere."""

    from agentforge.evaluation import Text

    def cut(tokens: int) -> Text:
        ids = smollm2.tokenizer(wikitext2.text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        return Text("wikitext2, its beginning", "test", smollm2.tokenizer.decode(ids))

    return cut
