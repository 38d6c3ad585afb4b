"""Log-likelihoods of texts that could follow a prompt, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import BadInput
from ..models import LanguageModel
from ..progress import progress_bar

BATCH = 768  # tokens that run through a model at once, padding included


class Scored(NamedTuple):
    """sums: the log-likelihoods of a prompt's options in nats, float64[options], from the first token in which they differ
    on.  lengths: how many tokens each sum is of."""

    sums: torch.Tensor
    lengths: torch.Tensor


class _Row(NamedTuple):
    """ids: one run of the model.  targets: the options it scores, each by its place in the question and its tokens."""

    question: int
    ids: list[int]
    first: int  # index in ids before which the scored tokens stand
    targets: list[tuple[int, list[int]]]


def likelihoods(
    model: LanguageModel, questions: Sequence[tuple[str, Sequence[str]]], progress: bool = False
) -> list[Scored]:
    """How likely each option is after its prompt.  questions: prompt and options each; a BOS token goes before the prompt
    if the tokenizer puts one.

    Options that differ in their last token only share one run of the model.  Raises BadInput for a model without a
    tokenizer, and for a prompt that does not fit.
    """
    rows: list[_Row] = []
    found = []
    for i, (prompt, options) in enumerate(questions):
        tokens = [model.first_ids + model.encode(prompt + option) for option in options]
        shortest = min(map(len, tokens))
        # What all options share says nothing of them; of each at least one token is scored.
        shared = next((j for j in range(shortest) if len({ids[j] for ids in tokens}) > 1), shortest)
        first = max(1, min(shared, shortest - 1))
        if model.context and max(map(len, tokens)) > model.context:
            raise BadInput(f"a prompt of {max(map(len, tokens))} tokens; {model.name} takes at most {model.context}")
        together: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, ids in enumerate(tokens):
            together.setdefault(tuple(ids[:-1]), []).append((place, ids[first:]))
        rows += [_Row(i, list(ids), first, targets) for ids, targets in together.items()]
        lengths = torch.tensor([len(ids) - first for ids in tokens])
        found.append(Scored(torch.zeros(len(options), dtype=torch.float64), lengths))
    rows.sort(key=lambda row: -len(row.ids))
    with progress_bar(model.name if progress else None, len(rows), "run") as bar:
        while rows:
            size = max(1, BATCH // len(rows[0].ids))
            batch, rows = rows[:size], rows[size:]
            for row, logs in zip(batch, _run(model, batch), strict=True):
                for place, target in row.targets:
                    at = torch.arange(len(target))
                    found[row.question].sums[place] = logs[at, torch.tensor(target)].double().sum()
            bar.update(len(batch))
    return found


def _run(model: LanguageModel, batch: Sequence[_Row]) -> list[torch.Tensor]:
    """Log-probabilities after each row's tokens from `first` - 1 on, float32[len(ids) - first + 1, vocabulary] each.

    Padding is on the right: nothing before it sees it.
    """
    module = model.model
    device = next(module.parameters()).device
    width = len(batch[0].ids)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)
    with torch.inference_mode():
        logits: Any = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [logits[i, row.first - 1 : len(row.ids)].float().log_softmax(-1).cpu() for i, row in enumerate(batch)]
