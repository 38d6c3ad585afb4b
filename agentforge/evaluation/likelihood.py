"""Perplexity, and the divergence of a compressed model from its original.

A text is tokenised once and cut into windows of `context` tokens that start every `stride` tokens.  Every token is
scored at most once, by the first window that holds it; a window's first token has nothing before it and is not scored
(unless bos="window" puts the BOS token there).  With stride = context (the default) windows do not overlap, as in the
papers; with stride = context - 1 every token but the first is scored, as in lm-eval's rolling log-likelihood where the
windows come out even (else it gives its last window more to look back at).

Standard errors treat the token losses as independent; neighbouring losses are not quite, so they are a little small.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models import LanguageModel
from .measurement import Measurement
from .texts import Text, find_text

Bos = Literal["none", "text", "window"]
ROWS = 256  # positions whose distributions are held at once


class Divergence(NamedTuple):
    """What one pass over the text tells about a compressed model beside its original.

    kl: mean KL(original || compressed) in nats a token.  top1: share of tokens at which both have the same most likely
    next token.  perplexity, original_perplexity: of the two, on the same tokens.  accuracy, original_accuracy: share of
    tokens at which the most likely next token is the one that follows.  retention: accuracy over original accuracy;
    perplexity_retention: original perplexity over perplexity; the standard errors of both are of pairs, token by token.
    """

    kl: Measurement
    top1: Measurement
    perplexity: Measurement
    original_perplexity: Measurement
    accuracy: Measurement
    original_accuracy: Measurement
    retention: Measurement
    perplexity_retention: Measurement


class _Window(NamedTuple):
    ids: list[int]  # the model's input
    first: int  # index of the first scored token in ids


def perplexity(
    model: LanguageModel,
    text: str | Text | None = None,
    context: int = 2048,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos = "none",
    progress: bool = True,
) -> Measurement:
    """exp of the mean negative log-likelihood of a text's tokens.

    text: as for `find_text`.  context: window length in tokens.  stride: how far windows are apart (default: such that they
    do not overlap).  tokens: how many tokens to score (default: all).  bos: no BOS token ("none"), one before the text
    ("text"), or one in each window ("window").

    Raises BadInput for a text that is too short, and for settings out of range.
    """
    found = find_text(text)
    windows, protocol = _plan(model, found, context, stride, tokens, bos)
    losses = [
        torch.cat([_losses(rows, targets) for rows, targets in _rows(model, window)])
        for window in _bar(windows, f"perplexity of {model.name}", progress)
    ]
    return _perplexity(torch.cat(losses), protocol, model)


def divergence(
    model: LanguageModel,
    original: LanguageModel,
    text: str | Text | None = None,
    context: int = 2048,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos = "none",
    progress: bool = True,
) -> Divergence:
    """KL divergence, top-1 agreement and both perplexities, in one pass.  Arguments as for `perplexity`.

    Raises BadInput, too, where the two models do not share a tokenizer.
    """
    return divergences([model], original, text, context, stride, tokens, bos, progress)[0]


def divergences(
    models: Sequence[LanguageModel],
    original: LanguageModel,
    text: str | Text | None = None,
    context: int = 2048,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos = "none",
    progress: bool = True,
) -> list[Divergence]:
    """`divergence` for several models at once: the original runs over the text only once."""
    found = find_text(text)
    windows, protocol = _plan(original, found, context, stride, tokens, bos)
    for model in models:
        if _plan(model, found, context, stride, tokens, bos)[0] != windows:
            raise BadInput(
                f"{model.name} and {original.name} cut the text into different tokens; compare models of one tokenizer"
            )
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in models]
    losses = []
    names = ", ".join(model.name for model in models)
    for window in _bar(windows, f"{names} against {original.name}", progress):
        theirs = [(p := logits.log_softmax(-1), p.argmax(-1), targets) for logits, targets in _rows(original, window)]
        losses += [-p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double() for p, _, targets in theirs]
        for model, columns in zip(models, parts, strict=True):
            for (p, top, targets), (logits, _) in zip(theirs, _rows(model, window), strict=True):
                q = logits.log_softmax(-1)
                mine = q.argmax(-1)
                columns.append(
                    (
                        (p.exp() * (p - q)).sum(-1).double(),
                        (top == mine).double(),
                        -q.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double(),
                        (mine == targets).double(),
                        (top == targets).double(),
                    )
                )
    base = torch.cat(losses)
    return [_divergence(model, original, base, columns, protocol) for model, columns in zip(models, parts, strict=True)]


def _divergence(
    model: LanguageModel,
    original: LanguageModel,
    base: torch.Tensor,
    columns: list[tuple[torch.Tensor, ...]],
    protocol: dict[str, Any],
) -> Divergence:
    kl, top1, losses, right, right_before = (torch.cat(column) for column in zip(*columns, strict=True))
    inputs = {"model": model.fingerprint, "original": original.fingerprint}
    named = {**protocol, "metric": "next-token accuracy"}
    saved = math.exp(max(min(float((base - losses).mean()), 700.0), -700.0))
    return Divergence(
        kl=Measurement(
            float(kl.mean()),
            "nats/token",
            standard_error(kl),
            len(kl),
            {**protocol, "metric": "KL(original || model)"},
            inputs=inputs,
        ),
        top1=share_right(top1, "share of tokens", {**protocol, "metric": "top-1 agreement"}, inputs),
        perplexity=_perplexity(losses, protocol, model),
        original_perplexity=_perplexity(base, protocol, original),
        accuracy=share_right(right, "share of tokens", named, {"model": model.fingerprint}),
        original_accuracy=share_right(right_before, "share of tokens", named, {"model": original.fingerprint}),
        retention=retention(right, right_before, {**protocol, "metric": "accuracy / original accuracy"}, inputs),
        perplexity_retention=Measurement(
            saved,
            "share",
            saved * standard_error(base - losses),
            len(losses),
            {**protocol, "metric": "original perplexity / perplexity"},
            inputs=inputs,
        ),
    )


def retention(
    hits: torch.Tensor, hits_before: torch.Tensor, protocol: dict[str, Any], inputs: dict[str, str]
) -> Measurement:
    """mean(hits) / mean(hits_before), float64[n] each, of the same questions, with the delta method's standard error for
    pairs; NaN where nothing was right before."""
    before, n = float(hits_before.mean()), len(hits)
    value = float(hits.mean()) / before if before else math.nan
    spread = float((hits - value * hits_before).square().mean().sqrt()) / (before * math.sqrt(n)) if before else math.nan
    return Measurement(value, "share", spread, n, protocol, inputs=inputs)


def share_right(
    hits: torch.Tensor, unit: str, protocol: dict[str, Any], inputs: dict[str, str], seed: int | None = None
) -> Measurement:
    """Mean of hits, float64[n] of 0 and 1, with its binomial standard error."""
    share, n = float(hits.mean()), len(hits)
    return Measurement(share, unit, math.sqrt(share * (1 - share) / n), n, protocol, seed, inputs)


def _plan(
    model: LanguageModel, text: Text, context: int, stride: int | None, tokens: int | None, bos: Bos
) -> tuple[list[_Window], dict[str, Any]]:
    """The windows to score, and the protocol that says how they were made."""
    room = context - 1 if bos == "window" else context
    stride = max(room, 1) if stride is None else stride
    if context < 2 or not 1 <= stride <= room:
        raise BadInput(
            f"context={context}, stride={stride}; expected a context of 2 or more and 1 <= stride <= {max(room, 1)}"
        )
    if model.context and context > model.context:
        raise BadInput(f"context={context}: {model.name} takes at most {model.context} tokens")
    if tokens is not None and tokens < 2:
        raise BadInput(f"tokens={tokens}; expected 2 or more, for a standard error")
    if bos not in ("none", "text", "window"):
        raise BadInput(f"bos={bos!r}; expected none, text or window")
    tokenizer = model.tokenizer
    ids = model.encode(text.text)
    first_id: list[int] = []
    if bos != "none":
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise BadInput(f"{model.name}: its tokenizer has no BOS token; use bos=none")
        first_id = [token]
    if bos == "text":
        ids = first_id + ids
    windows: list[_Window] = []
    scored = end = start = 0
    wanted = len(ids) if tokens is None else tokens
    while scored < wanted and end < len(ids):
        content = ids[start : start + room]
        first = max(end - start, 0 if bos == "window" else 1)
        count = min(len(content) - first, wanted - scored)
        if count > 0:
            content = content[: first + count]
            window = _Window(first_id + content, first + 1) if bos == "window" else _Window(content, first)
            windows.append(window)
            scored += count
        end = start + room
        start += stride
    if scored < 2 or (tokens is not None and scored < tokens):
        raise BadInput(
            f"text {text.name} has {scored} tokens to score, fewer than the {tokens or 2} asked for; use a longer text"
        )
    protocol = {
        "metric": "perplexity",
        "text": text.name,
        "split": text.split,
        "text_sha256": text.sha256,
        "context": context,
        "stride": stride,
        "bos": bos,
        "scored_tokens": scored,
        "tokenizer": _tokenizer_hash(tokenizer),
        "skipped_texts": list(text.skipped),
    }
    return windows, protocol


def _tokenizer_hash(tokenizer: Any) -> str:
    """What the tokenizer does, in a hash: vocabulary, merges and splitting; its vocabulary alone where it is no fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _rows(model: LanguageModel, window: _Window) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits, float32[rows, vocabulary], and target ids, int64[rows], of a window's scored tokens, in parts."""
    module = model.model
    device = next(module.parameters()).device
    ids = torch.tensor([window.ids], device=device)
    with torch.inference_mode():
        logits = module(input_ids=ids, use_cache=False).logits[0, window.first - 1 : -1]
    targets = ids[0, window.first :]
    for part, ids_part in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        yield part.float(), ids_part


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()


def _perplexity(losses: torch.Tensor, protocol: dict[str, Any], model: LanguageModel) -> Measurement:
    value = math.exp(min(float(losses.mean()), 700.0))
    # The standard error of exp(mean) to first order.
    return Measurement(
        value, "perplexity", value * standard_error(losses), len(losses), protocol, inputs={"model": model.fingerprint}
    )


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of independent values, float64[n]; NaN for fewer than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _bar(windows: list[_Window], what: str, progress: bool) -> Any:
    return tqdm(windows, desc=what, unit="window", leave=False, disable=None if progress else True)
