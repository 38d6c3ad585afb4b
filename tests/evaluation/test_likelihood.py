from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tqdm.auto import tqdm

import agentforge
import agentforge.progress
from agentforge.errors import BadInput, Incomparable
from agentforge.evaluation import Text, divergences, find_text, likelihood
from agentforge.evaluation.likelihood import plan
from agentforge.models import LanguageModel

LETTERS = "The quick brown fox jumps over the lazy dog; 3.14159 is roughly pi. "


def text_of(count: int) -> Text:
    """A text of `count` tokens for the tiny models, which have one token a byte."""
    return Text("letters", "test", (LETTERS * (count // len(LETTERS) + 1))[:count])


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LanguageModel:
    return agentforge.open_model(tiny_llama)


@pytest.fixture(scope="module")
def other(tiny_llama_other: Path) -> LanguageModel:
    return agentforge.open_model(tiny_llama_other)


@pytest.fixture(scope="module")
def backwards(tiny_llama_backwards: Path) -> LanguageModel:
    return agentforge.open_model(tiny_llama_backwards)


def windows_by_brute_force(ids: list[int], context: int, stride: int, tokens: int | None, bos: str) -> list[list[list[int]]]:
    """Of each window the scored tokens, in the text's order: all that the model sees before it, and itself last.

    tokens: so many, of the fewest windows that have them when one is taken from the middle of each equal part of all.
    """
    if bos == "text":
        ids = [0, *ids]
    room = context - 1 if bos == "window" else context
    windows: dict[int, list[list[int]]] = {}
    for t in range(len(ids)):
        start = next(start for start in range(0, len(ids), stride) if start <= t < start + room)
        before = [0, *ids[start:t]] if bos == "window" else ids[start:t]
        if before:
            windows.setdefault(start, []).append([*before, ids[t]])
    every = list(windows.values())
    if tokens is None or sum(map(len, every)) < tokens:
        return every
    for count in range(1, len(every) + 1):
        picked = [every[int((i + 0.5) * len(every) / count)] for i in range(count)]
        if sum(map(len, picked)) >= tokens:
            break
    left = tokens
    for i, window in enumerate(picked):
        picked[i] = window[:left]
        left -= len(picked[i])
    return [window for window in picked if window]


def scored_by_brute_force(*settings: Any) -> list[list[int]]:
    return [seen for window in windows_by_brute_force(*settings) for seen in window]


def clustered(windows: list[list[float]], log: bool = False) -> tuple[float, float, tuple[float, float]]:
    """Mean, standard error and 95% interval of values in windows, in four blocks at least, by the textbook."""
    pieces = -(-4 // len(windows))
    blocks = [block for window in windows for block in np.array_split(window, min(pieces, len(window)))]
    together = -(-len(windows) // 32)
    blocks = [np.concatenate(blocks[i : i + together]) for i in range(0, len(blocks), together)]
    count = sum(map(len, blocks))
    mean = sum(block.sum() for block in blocks) / count
    variance = len(blocks) / (len(blocks) - 1) * sum((block - mean).sum() ** 2 for block in blocks) / count**2
    spread = math.sqrt(variance)
    wide = spread * scipy.stats.t.ppf(0.975, len(blocks) - 1)
    if log:
        return math.exp(mean), math.exp(mean) * spread, (math.exp(mean - wide), math.exp(mean + wide))
    return mean, spread, (mean - wide, mean + wide)


def log_probabilities(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """What the model says after these ids, by transformers and numpy in double precision."""
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0, -1].numpy().astype(np.float64)
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()))


COMBINATIONS = [
    (length, context, stride, tokens, bos)
    for length, context, tokens, bos in itertools.product(
        (2, 3, 16, 17, 63, 64, 65), (2, 3, 8, 16, 100), (None, 2, 7, 30), ("none", "text", "window")
    )
    for stride in {1, 2, context // 2, context - 1, context}
    if 1 <= stride <= (context - 1 if bos == "window" else context)
]


@pytest.mark.parametrize("bos", ["none", "text", "window"])
def test_every_token_is_scored_once_with_the_context_that_is_promised(tiny: LanguageModel, bos: str) -> None:
    planned = 0
    for length, context, stride, tokens, kind in COMBINATIONS:
        if kind != bos:
            continue
        text = text_of(length)
        ids = tiny.tokenizer(text.text)["input_ids"]
        assert len(ids) == length
        expected = scored_by_brute_force(ids, context, stride, tokens, bos)
        if len(expected) < (tokens or 2):
            with pytest.raises(BadInput, match="use a longer text"):
                plan(tiny, text, context, stride, tokens, bos)  # type: ignore[arg-type]
            continue
        windows, protocol = plan(tiny, text, context, stride, tokens, bos)  # type: ignore[arg-type]
        scored = [window.ids[: i + 1] for window in windows for i in range(window.first, len(window.ids))]
        assert scored == expected, (length, context, stride, tokens, bos)
        assert all(2 <= len(window.ids) <= context for window in windows)
        assert protocol["scored_tokens"] == len(expected)
        planned += 1
    assert planned > 150


@pytest.mark.parametrize(
    ("context", "stride", "tokens", "bos"),
    [
        (16, 16, None, "none"),
        (16, 5, 40, "none"),
        (16, 15, None, "text"),
        (16, 15, 40, "window"),
        (9, 4, None, "window"),
        (2, 1, None, "none"),
    ],
)
def test_value_and_standard_error_by_brute_force(
    tiny: LanguageModel, context: int, stride: int, tokens: int | None, bos: str
) -> None:
    text = text_of(60)
    ids = tiny.tokenizer(text.text)["input_ids"]
    windows = windows_by_brute_force(ids, context, stride, tokens, bos)
    losses = [[-log_probabilities(tiny, seen[:-1])[seen[-1]] for seen in window] for window in windows]
    found = agentforge.perplexity(tiny, text, context=context, stride=stride, tokens=tokens, bos=bos)  # type: ignore[arg-type]
    assert found.n == sum(map(len, losses))
    value, spread, interval = clustered(losses, log=True)
    assert found.value == pytest.approx(value, rel=1e-5)
    assert found.stderr == pytest.approx(spread, rel=1e-3)
    assert found.interval == pytest.approx(interval, rel=1e-3)


def test_a_sample_is_spread_over_the_text_and_the_whole_is_the_whole(tiny: LanguageModel) -> None:
    text = text_of(1000)
    windows, protocol = plan(tiny, text, 10, None, 45, "none")
    ids = tiny.tokenizer(text.text)["input_ids"]
    assert [window.ids for window in windows] == [ids[start : start + 10] for start in (100, 300, 500, 700, 900)]
    assert protocol["windows"] == "5 of 100, spread evenly"
    whole = agentforge.perplexity(tiny, text, context=10)
    assert whole.protocol["windows"] == "all 100" and whole.error == "25 groups of 4 windows"
    assert agentforge.perplexity(tiny, text, context=10, tokens=900).to_json() == whole.to_json()
    assert agentforge.perplexity(tiny, text, context=10, tokens=45).error == "5 windows"
    few = agentforge.perplexity(tiny, text, context=10, tokens=18)
    assert few.error == "4 blocks of 2 windows"
    assert agentforge.perplexity(tiny, text, context=100, tokens=99).error == "4 blocks of 1 window"


def transformers_perplexity(model: LanguageModel, ids: list[int], context: int) -> float:
    """From the loss that transformers itself computes, a window at a time, weighted by the tokens it scores."""
    total, count = 0.0, 0
    for start in range(0, len(ids), context):
        window = torch.tensor([ids[start : start + context]])
        if window.shape[1] > 1:
            with torch.no_grad():
                total += float(model.model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize(("length", "context"), [(128, 128), (300, 128), (300, 32), (97, 32)])
def test_perplexity_is_transformers_own_loss(tiny: LanguageModel, length: int, context: int) -> None:
    text = text_of(length)
    expected = transformers_perplexity(tiny, tiny.tokenizer(text.text)["input_ids"], context)
    assert agentforge.perplexity(tiny, text, context=context).value == pytest.approx(expected, rel=1e-4)


def test_windows_longer_than_the_rows_held_at_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agentforge.open_model(tiny_llama)
    whole = agentforge.perplexity(model, text_of(128), context=128)
    monkeypatch.setattr(likelihood, "ROWS", 10)
    parts = agentforge.perplexity(model, text_of(128), context=128)
    assert (parts.value, parts.n) == (pytest.approx(whole.value, rel=1e-6), 127)


def harness_log_likelihood(model: LanguageModel, text: str, max_length: int) -> float:
    """lm-eval's rolling log-likelihood of one text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=max_length, batch_size=1)
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)]
    return float(harness.loglikelihood_rolling(requests, disable_tqdm=True)[0])


def agrees_with_the_harness(model: LanguageModel, text: Text, max_length: int, windows: int) -> None:
    """lm-eval's windows of M: M inputs, M tokens scored, the first window's first input the BOS token, and one token shared
    by neighbours.  In our words: context M + 1 (we count the last target, too), stride M, bos="text".  They are the same
    windows where M divides the number of tokens; otherwise lm-eval gives its last window more context than we do."""
    count = windows * max_length
    assert len(model.tokenizer(text.text, add_special_tokens=False)["input_ids"]) == count
    found = agentforge.perplexity(model, text, context=max_length + 1, stride=max_length, bos="text")
    assert found.n == count
    expected = harness_log_likelihood(model, text.text, max_length)
    assert -math.log(found.value) * count == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("max_length", "windows"), [(32, 3), (32, 1), (100, 4)])
def test_perplexity_agrees_with_lm_eval(tiny: LanguageModel, max_length: int, windows: int) -> None:
    agrees_with_the_harness(tiny, text_of(windows * max_length), max_length, windows)


def test_a_model_does_not_diverge_from_itself(tiny: LanguageModel) -> None:
    found = agentforge.divergence(tiny, tiny, text_of(100), context=32)
    assert found.kl.value == pytest.approx(0, abs=1e-9)
    assert found.top1.value == 1.0
    assert found.top1.within(0.98, 1) == "undecided"  # 96 tokens that agree do not show that 98 in 100 do
    assert found.top1.within(0.95, 1) == "inside"
    assert found.perplexity.value == found.original_perplexity.value


@pytest.mark.parametrize(("context", "stride", "tokens", "bos"), [(32, 32, None, "none"), (16, 7, 40, "window")])
def test_divergence_by_brute_force(
    tiny: LanguageModel, other: LanguageModel, context: int, stride: int, tokens: int | None, bos: str
) -> None:
    text = text_of(64)
    settings: dict[str, Any] = {"context": context, "stride": stride, "tokens": tokens, "bos": bos}
    found = agentforge.divergence(other, tiny, text, **settings)
    kl: list[list[float]] = []
    same: list[list[float]] = []
    for window in windows_by_brute_force(tiny.tokenizer(text.text)["input_ids"], context, stride, tokens, bos):
        pairs = [(log_probabilities(tiny, seen[:-1]), log_probabilities(other, seen[:-1])) for seen in window]
        kl.append([float((np.exp(p) * (p - q)).sum()) for p, q in pairs])
        same.append([float(p.argmax() == q.argmax()) for p, q in pairs])
    assert found.kl.n == found.top1.n == sum(map(len, kl))
    value, spread, interval = clustered(kl)
    assert found.kl.value == pytest.approx(value, rel=1e-5) and found.kl.value > 0.1
    assert found.kl.stderr == pytest.approx(spread, rel=1e-3)
    assert found.kl.interval == pytest.approx(interval, rel=1e-3)
    assert found.top1.value == pytest.approx(clustered(same)[0])
    reversed_kl = agentforge.divergence(tiny, other, text, **settings).kl.value
    assert reversed_kl != pytest.approx(found.kl.value, rel=1e-3)
    assert found.kl.inputs == {"model": other.fingerprint, "original": tiny.fingerprint}


def test_retention_is_a_ratio_of_pairs(tiny: LanguageModel, other: LanguageModel) -> None:
    settings: dict[str, Any] = {"context": 32, "stride": 32, "tokens": 90}
    found = agentforge.divergence(other, tiny, text_of(120), **settings)
    if found.original_accuracy.value:
        assert found.retention.value == pytest.approx(found.accuracy.value / found.original_accuracy.value)
    assert found.perplexity_retention.value == pytest.approx(found.original_perplexity.value / found.perplexity.value)
    itself = agentforge.divergence(tiny, tiny, text_of(120), **settings)
    assert itself.perplexity_retention.value == 1.0 and itself.perplexity_retention.stderr == 0.0


def padded(source: Path, folder: Path, ids: int, value: float = 0.0) -> LanguageModel:
    """The same model with an embedding of so many ids, `value` times random numbers in the rows that no token has; at
    infinity their logits are."""
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(source)
    module.resize_token_embeddings(ids, mean_resizing=False)
    rows = module.get_input_embeddings().weight
    known = 258
    rows.data[known:].normal_(generator=torch.Generator().manual_seed(ids)).mul_(value if math.isfinite(value) else 1.0)
    module.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model = agentforge.open_model(folder)
    if math.isinf(value):
        never = torch.arange(ids) >= known
        model.model.lm_head.register_forward_hook(lambda _, __, logits: logits.masked_fill(never, value))
    return model


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6, -math.inf])
@pytest.mark.parametrize(("ids", "ids_before"), [(258, 320), (320, 258), (264, 320), (320, 320)])
def test_vocabularies_of_other_sizes(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path, ids: int, ids_before: int, value: float
) -> None:
    model = padded(tiny_llama_other, tmp_path / "model", ids, value)
    original = padded(tiny_llama, tmp_path / "original", ids_before, value)
    settings: dict[str, Any] = {"context": 32, "stride": 32, "bos": "none"}
    found = agentforge.divergence(model, original, text_of(96), **settings)
    shared, kl, same = min(ids, ids_before), [], []
    windows, _ = plan(original, text_of(96), 32, 32, None, "none")
    for window in windows:
        with torch.no_grad():
            rows = [m.model(torch.tensor([window.ids])).logits[0, :-1, :shared].double() for m in (original, model)]
        p, q = (x.log_softmax(-1).numpy() for x in rows)
        with np.errstate(invalid="ignore"):
            kl.append(np.nansum(np.exp(p) * (p - q), 1))  # of two infinities nan
        same.append(p.argmax(1) == q.argmax(1))
    assert found.kl.value == pytest.approx(np.concatenate(kl).mean(), rel=1e-4) and found.kl.value > 0.1
    assert found.top1.value == pytest.approx(np.concatenate(same).mean())
    for measured, alone in ((found.perplexity, model), (found.original_perplexity, original)):
        assert measured.value == pytest.approx(agentforge.perplexity(alone, text_of(96), **settings).value, rel=1e-5)
        assert "ids" not in measured.protocol
    said = found.kl.protocol.get("ids")
    assert said == found.top1.protocol.get("ids")
    if ids == ids_before:
        assert said is None
    else:
        assert said == f"KL and top-1 over the {shared} that both have, renormalised (model {ids}; original {ids_before})"


def test_the_other_ids_do_not_count(tiny: LanguageModel, tiny_llama: Path, tmp_path: Path) -> None:
    """A model beside itself with a padded embedding, whose arg max is always an id that no token has."""
    folded = padded(tiny_llama, tmp_path / "padded", 320, 1e6)
    for pair in ((folded, tiny), (tiny, folded)):
        found = agentforge.divergence(*pair, text_of(96), context=32)
        assert found.kl.value == pytest.approx(0, abs=1e-6) and found.top1.value == 1.0
    assert agentforge.divergence(folded, tiny, text_of(96), context=32).accuracy.value == 0.0


def test_a_bos_token_beyond_the_embedding_is_refused(tiny_llama: Path) -> None:
    model = agentforge.open_model(tiny_llama)
    model.tokenizer.add_special_tokens({"bos_token": "<new>"})
    for bos in ("text", "window"):
        with pytest.raises(BadInput, match=r"gives the id 258, its model knows 258 tokens"):
            agentforge.perplexity(model, text_of(50), context=16, bos=bos)


def test_divergences_perplexities_are_perplexities(tiny: LanguageModel, other: LanguageModel) -> None:
    settings: dict[str, Any] = {"context": 24, "stride": 10, "tokens": 77, "bos": "text"}
    found = agentforge.divergence(other, tiny, text_of(120), **settings)
    for measured, model in ((found.perplexity, other), (found.original_perplexity, tiny)):
        alone = agentforge.perplexity(model, text_of(120), **settings)
        assert measured.value == pytest.approx(alone.value, rel=1e-6)
        assert measured.stderr == pytest.approx(alone.stderr, rel=1e-4)
        assert (measured.n, measured.protocol, measured.inputs) == (alone.n, alone.protocol, alone.inputs)
    assert found.perplexity.minus(found.original_perplexity) == found.perplexity.value - found.original_perplexity.value


def test_several_divergences_are_each_ones(tiny: LanguageModel, other: LanguageModel) -> None:
    settings: dict[str, Any] = {"context": 24, "stride": 10, "tokens": 77, "bos": "text"}
    together = divergences([other, tiny], tiny, text_of(120), **settings)
    for found, model in zip(together, (other, tiny), strict=True):
        alone = agentforge.divergence(model, tiny, text_of(120), **settings)
        assert [(m.value, m.n, m.protocol, m.inputs) for m in found] == [(m.value, m.n, m.protocol, m.inputs) for m in alone]


def test_the_protocol_says_how_it_was_taken(tiny: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(LETTERS, encoding="utf-8")
    found = agentforge.perplexity(tiny, str(path), context=16, stride=8, tokens=40, bos="window")
    expected = {
        "metric": "perplexity",
        "text": "mine.txt",
        "split": "file",
        "text_sha256": find_text(str(path)).sha256,
        "context": 16,
        "stride": 8,
        "bos": "window",
        "scored_tokens": 40,
    }
    assert expected.items() <= found.protocol.items()
    assert found.inputs == {"model": tiny.fingerprint}
    for change in ({"context": 12}, {"stride": 4}, {"tokens": 41}, {"bos": "none"}):
        settings: dict[str, Any] = {"context": 16, "stride": 8, "tokens": 40, "bos": "window", **change}
        with pytest.raises(Incomparable):
            found.minus(agentforge.perplexity(tiny, str(path), **settings))


def test_perplexities_under_different_tokenizers_do_not_compare(tiny: LanguageModel, backwards: LanguageModel) -> None:
    a, b = (agentforge.perplexity(model, text_of(50), context=16, tokens=40) for model in (tiny, backwards))
    with pytest.raises(Incomparable, match="tokenizer"):
        a.minus(b)


def test_bos_window_works_without_a_stride(tiny: LanguageModel) -> None:
    found = agentforge.perplexity(tiny, text_of(50), context=16, bos="window")
    assert found.n == 50
    assert found.value == agentforge.perplexity(tiny, text_of(50), context=16, stride=15, bos="window").value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "context=1, stride=1; expected a context of 2 or more"),
        ({"context": 0}, "expected a context of 2 or more"),
        ({"context": 16, "stride": 0}, r"stride=0; .* 1 <= stride <= 16"),
        ({"context": 16, "stride": -3}, r"stride=-3; .* 1 <= stride <= 16"),
        ({"context": 16, "stride": 17}, r"stride=17; .* 1 <= stride <= 16"),
        ({"context": 16, "stride": 16, "bos": "window"}, r"stride=16; .* 1 <= stride <= 15"),
        ({"context": 129}, r"context=129: tiny-llama.* takes at most 128 tokens"),
        ({"context": 16, "tokens": 0}, "tokens=0; expected"),
        ({"context": 16, "tokens": -1}, "tokens=-1; expected"),
        ({"context": 16, "tokens": 1}, "tokens=1; expected 2 or more"),
        ({"context": 16, "bos": "always"}, "bos='always'; expected none, text or window"),
        ({"context": 16, "tokens": 47}, "text letters has 46 tokens to score, fewer than the 47 asked for"),
    ],
)
def test_refusals(tiny: LanguageModel, other: LanguageModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        agentforge.perplexity(tiny, text_of(50), **settings)
    with pytest.raises(BadInput, match=message):
        agentforge.divergence(tiny, other, text_of(50), **settings)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_texts_that_are_too_short(tiny: LanguageModel, length: int) -> None:
    with pytest.raises(BadInput, match=f"text letters has {max(0, length - 1)} tokens to score"):
        agentforge.perplexity(tiny, text_of(length), context=16)


def test_bos_without_such_a_token(tiny_llama: Path) -> None:
    model = agentforge.open_model(tiny_llama)
    with_bos = agentforge.perplexity(model, text_of(20), context=16, bos="text").value
    model.tokenizer.bos_token = None  # then EOS does the same service, as in lm-eval
    assert agentforge.perplexity(model, text_of(20), context=16, bos="text").value != with_bos
    model.tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no BOS token; use bos=none"):
        agentforge.perplexity(model, text_of(20), context=16, bos="text")


def test_a_measured_model_can_still_be_trained(tiny_llama: Path) -> None:
    fresh, original = agentforge.open_model(tiny_llama), agentforge.open_model(tiny_llama)
    agentforge.divergence(fresh, original, text_of(50), context=16)
    fresh.model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(p.grad is not None for p in fresh.model.parameters())


@pytest.mark.parametrize("swap", [False, True])
def test_divergence_wants_one_tokenizer(tiny: LanguageModel, backwards: LanguageModel, swap: bool) -> None:
    pair = (backwards, tiny) if swap else (tiny, backwards)
    with pytest.raises(BadInput, match="cut the text into different tokens; compare models of one tokenizer"):
        agentforge.divergence(*pair, text_of(50), context=16)


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_silent_when_asked(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch, progress: bool) -> None:
    """tqdm draws nothing with disable=True, and with disable=None nothing but on a terminal."""
    seen: list[object] = []

    def bar(**settings: object) -> tqdm:
        seen.append(settings["disable"])
        return tqdm(**{**settings, "disable": True})

    monkeypatch.setattr(agentforge.progress, "tqdm", bar)
    agentforge.perplexity(tiny, text_of(50), context=16, progress=progress)
    agentforge.divergence(tiny, tiny, text_of(50), context=16, progress=progress)
    assert seen == [None if progress else True] * 2


def text_of_exactly(model: LanguageModel, count: int) -> Text:
    ids = model.tokenizer(find_text("selftext").text[: count * 8], add_special_tokens=False)["input_ids"]
    return Text("selftext, cut", "heldout", model.tokenizer.decode(ids[:count]))


@pytest.mark.slow
def test_smollm2_agrees_with_lm_eval(smollm2: LanguageModel) -> None:
    agrees_with_the_harness(smollm2, text_of_exactly(smollm2, 1536), 512, 3)


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_own_loss(smollm2: LanguageModel) -> None:
    text = text_of_exactly(smollm2, 1024)
    ids = smollm2.tokenizer(text.text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1024
    found = agentforge.perplexity(smollm2, text, context=1024)
    assert found.n == 1023
    assert found.value == pytest.approx(transformers_perplexity(smollm2, ids, 1024), rel=1e-4)
