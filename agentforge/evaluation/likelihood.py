"""Perplexity, and the divergence of a compressed model from its original.

A text is tokenised once and cut into windows of `context` tokens that start every `stride` tokens.  Every token is
scored at most once, by the first window that holds it; a window's first token has nothing before it and is not scored
(unless bos="window" puts the BOS token there).  With stride = context (the default) windows do not overlap, as in the
papers; with stride = context - 1 every token but the first is scored, as in lm-eval's rolling log-likelihood if the
windows come out even (else it gives its last window more to look back at).

`tokens` asks for a sample: windows of the whole text's grid, spread evenly over it.  Tokens of one window are not
independent, so that errors are of windows: each is a cluster (see `intervals`).  Fewer than LEAST windows are cut into equal
blocks; of more than MOST, neighbours, which are often of one article, are one cluster together.  `error` says what was done;
reports/coverage shows how often the intervals hold the whole text's value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from ..blockwise import Passes
from ..errors import BadInput
from ..models import LOWEST, LanguageModel
from ..progress import progress_bar
from . import intervals
from .measurement import Measurement
from .texts import Text, find_text

Bos = Literal["none", "text", "window"]
ROWS = 64  # positions whose distributions are in memory at once
LOGITS = 1 << 27  # numbers that a model's answers to windows may have together: 0.5 GB
LEAST, MOST = 4, 32  # clusters of a measurement
_CAUSAL: dict[str, bool] = {}


class Divergence(NamedTuple):
    """What one pass over the text tells about a compressed model beside its original.

    kl: mean KL(original || compressed) in nats per token.  top1: share of tokens at which both have the same most likely
    next token.  perplexity, original_perplexity: of the two, on the same tokens.  accuracy, original_accuracy: share of
    tokens at which the most likely next token is the one that follows.  retention: accuracy over original accuracy;
    perplexity_retention: original perplexity over perplexity; the errors of both are of pairs, window by window.
    """

    kl: Measurement
    top1: Measurement
    perplexity: Measurement
    original_perplexity: Measurement
    accuracy: Measurement
    original_accuracy: Measurement
    retention: Measurement
    perplexity_retention: Measurement


class Window(NamedTuple):
    """What is scored at once."""

    ids: list[int]  # the model's input
    first: int  # index of the first scored token in ids


def perplexity(
    model: LanguageModel,
    text: str | Text | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos | None = None,
    progress: bool = True,
) -> Measurement:
    """exp of the mean negative log-likelihood of a text's tokens.

    text: as for `find_text`.  context: window length in tokens (default: 2048, or as many as the model takes).  stride: how
    far windows are apart (default: such that they do not overlap).  tokens: how many tokens to score, in windows spread
    evenly over the text (default: all of it).  bos: no BOS token ("none"), one before the text ("text"), or one in each
    window ("window"; default: that if the tokenizer puts one before a text, else none).

    Raises BadInput for a text that is too short, for settings out of range, and for a model that sees the tokens that it is
    to predict.
    """
    found = find_text(text)
    windows, protocol = plan(model, found, context, stride, tokens, bos)

    def of_window(module: Any, window: Window) -> torch.Tensor:
        parts = zip(*(x.split(ROWS) for x in _scored(module, window)), strict=True)
        return torch.cat([cross_entropy(rows.float(), ids, reduction="none").double() for rows, ids in parts])[:, None]

    passes, groups = Passes(model), _groups(model, windows)
    losses: list[torch.Tensor] = []
    with progress_bar(f"perplexity of {model.name}" if progress else None, len(groups) * passes.steps, "block") as bar:
        for group in groups:
            losses += passes.map(of_window, group, bar, threads=0)
    sums, error = _clusters(losses)
    return _perplexity(sums[:, 1], sums[:, 0], error, protocol, model.fingerprint)


def divergence(
    model: LanguageModel,
    original: LanguageModel,
    text: str | Text | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos | None = None,
    progress: bool = True,
) -> Divergence:
    """KL divergence, top-1 agreement and both perplexities, in one pass.  Arguments as for `perplexity`.

    If one model has more ids than the other, as of a padded embedding, KL and top-1 agreement are of those that both have,
    and their protocols say so.  Raises BadInput, too, if the two models do not share a tokenizer.
    """
    return divergences([model], original, text, context, stride, tokens, bos, progress)[0]


def divergences(
    models: Sequence[LanguageModel],
    original: LanguageModel,
    text: str | Text | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    bos: Bos | None = None,
    progress: bool = True,
) -> list[Divergence]:
    """`divergence` for several models at once: the original runs over the text only once."""
    of = find_text(text)
    windows, protocol = plan(original, of, context, stride, tokens, bos)
    for model in models:
        if plan(model, of, context, stride, tokens, bos)[0] != windows:
            raise BadInput(
                f"{model.name} and {original.name} cut the text into different tokens; compare models of one tokenizer"
            )
    parts = compared(models, original, windows, progress)
    found = []
    for model, of_windows in zip(models, parts, strict=True):
        one = divergence_of(*_clusters(of_windows), protocol, model.fingerprint, original.fingerprint)
        mine, before = model.vocabulary, original.vocabulary
        if mine is not None and before is not None and mine != before:
            said = f"KL and top-1 over the {min(mine, before):,} that both have, renormalised"
            ids = {"ids": f"{said} (model {mine:,}; original {before:,})"}
            kl, top1 = (dataclasses.replace(m, protocol=m.protocol | ids) for m in (one.kl, one.top1))
            one = one._replace(kl=kl, top1=top1)
        found.append(one)
    return found


def compared(
    models: Sequence[LanguageModel], original: LanguageModel, windows: list[Window], progress: bool
) -> list[list[torch.Tensor]]:
    """What each model says of each window's scored tokens beside the original, float64[tokens, 6] per window: KL, same
    top-1, both models' losses, hits of both.  KL and top-1 are of the ids that both have, all else is of all ids."""

    def beside(module: Any, both: tuple[Window, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        (theirs, targets), logits = both[1], _scored(module, both[0])[0]
        rows = []
        for before, after, ids in zip(*(x.split(ROWS) for x in (theirs, logits, targets)), strict=True):
            p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
            losses, base = (-x.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (q, p))
            top, mine = p.argmax(-1), q.argmax(-1)
            right, right_before = mine == ids, top == ids
            if p.shape != q.shape:  # from the logits: beside a very large one nothing is left of the others in p
                width = min(p.shape[-1], q.shape[-1])
                p, q = (x[:, :width].float().log_softmax(-1) for x in (before, after))
                top, mine = p.argmax(-1), q.argmax(-1)
            columns = (relative_entropy(p, q), top == mine, losses, base, right, right_before)
            rows.append(torch.stack([column.double() for column in columns], 1))
        return torch.cat(rows)

    names = ", ".join(model.name for model in models)
    first, passes, groups = Passes(original), [Passes(model) for model in models], _groups(original, windows)
    steps = len(groups) * (first.steps + sum(one.steps for one in passes))
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    with progress_bar(f"{names} against {original.name}" if progress else None, steps, "block") as bar:
        for group in groups:
            base = list(first.map(_scored, group, bar, threads=0))
            for one, of_windows in zip(passes, parts, strict=True):
                of_windows += one.map(beside, list(zip(group, base, strict=True)), bar, threads=0)
            del base  # before the next ones are there
    return parts


def _groups(model: LanguageModel, windows: list[Window]) -> list[list[Window]]:
    """Windows that run at the same time: as many as have LOGITS numbers for answers, and one at least.  Each group reads the
    weights once."""
    most = max(1, LOGITS // (max(len(window.ids) for window in windows) * (model.vocabulary or 1)))
    return [windows[i : i + most] for i in range(0, len(windows), most)]


def relative_entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, float32[...], of log-probabilities, float32[..., ids].  An id that p never gives adds nothing,
    even if q never gives it either (0 log 0 is 0)."""
    weight = p.exp()
    return (weight * (p - q).masked_fill_(weight == 0, 0.0)).sum(-1)


def divergence_of(sums: torch.Tensor, error: str, protocol: dict[str, Any], model: str, original: str) -> Divergence:
    """What sums over clusters say, float64[clusters, 7]: tokens, KL, same top-1, both models' losses, hits of both.

    error: what the clusters are, in words.  model, original: fingerprints.
    """
    counts, kl, same, losses, base, right, right_before = sums.T
    inputs = {"model": model, "original": original}

    def measured(unit: str, metric: str, found: dict[str, Any], of: dict[str, str] = inputs) -> Measurement:
        return Measurement(unit=unit, protocol={**protocol, "metric": metric}, inputs=of, **found)

    def share(metric: str, hits: torch.Tensor, of: dict[str, str]) -> Measurement:
        return measured("share of tokens", metric, intervals.share(hits, counts, error), of)

    kept = intervals.pairs(right, right_before, counts, error)
    saved = intervals.mean(base - losses, counts, error, log=True)
    return Divergence(
        kl=measured("nats/token", "KL(original || model)", intervals.mean(kl, counts, error)),
        top1=share("top-1 agreement", same, inputs),
        perplexity=_perplexity(losses, counts, error, protocol, model),
        original_perplexity=_perplexity(base, counts, error, protocol, original),
        accuracy=share("next-token accuracy", right, {"model": model}),
        original_accuracy=share("next-token accuracy", right_before, {"model": original}),
        retention=measured("share", "accuracy / original accuracy", kept),
        perplexity_retention=measured("share", "original perplexity / perplexity", saved),
    )


def _clusters(windows: list[torch.Tensor]) -> tuple[torch.Tensor, str]:
    """Sums over clusters, float64[clusters, 1 + columns], the first of them the count, of windows' tokens, float64[tokens,
    columns] each; and what the clusters are, in words."""
    count = len(windows)
    pieces, together = -(-LEAST // count), -(-count // MOST)
    blocks = [block for window in windows for block in window.tensor_split(min(pieces, len(window)))]
    sums = torch.stack([torch.cat([block.new_tensor([len(block)]), block.sum(0)]) for block in blocks]).cpu()
    if together > 1:
        groups = sums.split(together)
        return torch.stack([group.sum(0) for group in groups]), f"{len(groups)} groups of {together} windows"
    of = f"{count} window{'s' if count > 1 else ''}"
    return sums, of if pieces == 1 else f"{len(blocks)} blocks of {of}"


def plan(
    model: LanguageModel, text: Text, context: int | None, stride: int | None, tokens: int | None, bos: Bos | None
) -> tuple[list[Window], dict[str, Any]]:
    """The windows to score, and the protocol that says how they were made."""
    context = model.usual_context if context is None else context
    bos = ("window" if model.first_ids else "none") if bos is None else bos
    longest = context - 1 if bos == "window" else context
    stride = max(longest, 1) if stride is None else stride
    if context < 2 or not 1 <= stride <= longest:
        raise BadInput(
            f"context={context}, stride={stride}; expected a context of 2 or more and 1 <= stride <= {max(longest, 1)}"
        )
    model.check_context(context)
    if tokens is not None and tokens < 2:
        raise BadInput(f"tokens={tokens}; expected 2 or more, for a standard error")
    if bos not in ("none", "text", "window"):
        raise BadInput(f"bos={bos!r}; expected none, text or window")
    check_causal(model)
    tokenizer = model.tokenizer
    ids = model.encode(text.text)
    first_id: list[int] = []
    if bos != "none":
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise BadInput(f"{model.name}: its tokenizer has no BOS token; use bos=none")
        first_id = model.known([token])
    if bos == "text":
        ids = first_id + ids
    spans = []  # start of a window's text, its first scored token, and its end
    end = start = 0
    while end < len(ids):
        first = max(end, start + (bos != "window"))
        end = start + longest
        if first < min(end, len(ids)):
            spans.append((start, first, min(end, len(ids))))
        start += stride
    total = sum(end - first for _, first, end in spans)
    if total < max(2, tokens or 2):
        raise BadInput(
            f"text {text.name} has {total} tokens to score, fewer than the {tokens or 2} asked for; use a longer text"
        )
    wanted = total if tokens is None else tokens
    windows: list[Window] = []
    for start, first, end in _spread(spans, wanted):
        if not wanted:
            break
        end = min(end, first + wanted)
        windows.append(Window(first_id * (bos == "window") + ids[start:end], first - start + (bos == "window")))
        wanted -= end - first
    placed = f"all {len(spans)}" if len(windows) == len(spans) else f"{len(windows)} of {len(spans)}, spread evenly"
    protocol = {
        "metric": "perplexity",
        "text": text.name,
        "split": text.split,
        "text_sha256": text.sha256,
        "context": context,
        "stride": stride,
        "bos": bos,
        "scored_tokens": total if tokens is None else tokens,
        "windows": placed,
        "tokenizer": _tokenizer_hash(tokenizer),
        "skipped_texts": list(text.skipped),
    }
    return windows, protocol


def _spread(spans: list[tuple[int, int, int]], tokens: int) -> list[tuple[int, int, int]]:
    """The fewest windows, one from the middle of each equal part of all, that have so many tokens to score."""
    most = max(end - first for _, first, end in spans)
    for count in range(-(-tokens // most), len(spans)):
        chosen = [spans[(2 * i + 1) * len(spans) // (2 * count)] for i in range(count)]
        if sum(end - first for _, first, end in chosen) >= tokens:
            return chosen
    return spans


def _tokenizer_hash(tokenizer: Any) -> str:
    """What the tokenizer does, in a hash: vocabulary, merges and splitting; its vocabulary alone if it is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _scored(module: Any, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, float[tokens, vocabulary], and target ids, int64[tokens], of a window's scored tokens."""
    ids = torch.tensor([window.ids], device=next(module.parameters()).device)
    with torch.inference_mode():
        logits = module(input_ids=ids, use_cache=False).logits[0, window.first - 1 : -1]
    return logits, ids[0, window.first :]


def check_causal(model: LanguageModel) -> None:
    """Raise BadInput if what the model says at a token depends on later ones: it sees what it is to predict.

    It is tried once for each configuration, which compressed models share with their originals.
    """
    ours = ("quantization_config", "dtype", "torch_dtype")
    key = json.dumps({name: value for name, value in model.config.items() if name not in ours}, sort_keys=True)
    if key not in _CAUSAL:
        ids = [i % (model.vocabulary or 10) for i in range(1, 9)]
        both = [Window([*ids, last], 1) for last in ids[:2]]
        # Ids that a model never gives stand at -inf, or at the lowest number that there is.
        logits = (logits[:-1].double() for logits, _ in Passes(model).map(_scored, both))
        one, other = (x.masked_fill(x < LOWEST, 0.0) for x in logits)
        _CAUSAL[key] = not bool((one - other).abs().max() > 1e-3 * one.abs().max())  # NaN is for others to find
    if not _CAUSAL[key]:
        raise BadInput(
            f"{model.name}: is no causal model: it sees the tokens that it is to predict, so that its likelihoods mean "
            "nothing; choose a decoder"
        )


def _perplexity(losses: torch.Tensor, counts: torch.Tensor, error: str, protocol: dict[str, Any], model: str) -> Measurement:
    found = intervals.mean(losses, counts, error, log=True)
    return Measurement(unit="perplexity", protocol=protocol, inputs={"model": model}, **found)
