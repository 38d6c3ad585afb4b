"""The Phase 5 checks: their questions, their likelihoods, the fitted level, and the items of the four rules."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agentforge as af
from agentforge.errors import BadInput
from agentforge.evaluation import phase5
from agentforge.evaluation.choices import Scored, likelihoods
from agentforge.evaluation.phase5 import GRID, RULES, edge_of_chaos, eudaimonia, eudaimonia_items, fit_curve
from agentforge.evaluation.questions import CHANCE, LEVELS, Question, questions
from agentforge.models import LanguageModel

ALL = [question for level in LEVELS for question in questions(level, 12)]


@pytest.fixture(scope="module")
def wide(wide_llama: Path) -> LanguageModel:
    return af.open_model(str(wide_llama))


# ---- the questions


def solved(question: Question) -> str:
    """The answer, found from the prompt alone and in another way than it was made."""
    text = question.prompt
    if question.family == "sum":
        return str(sum(int(n) for n in re.findall(r"\d+", text.splitlines()[-1])))
    if question.family == "sequence":
        shown = np.array([int(n) for n in re.findall(r"\d+", text)], dtype=np.int64)
        degree = 1 + question.level // 40
        line = np.polynomial.Polynomial.fit(np.arange(len(shown)), shown, degree)
        assert np.allclose(line(np.arange(len(shown))), shown, atol=1e-3)
        return str(round(float(line(len(shown)))))
    shown_words = re.findall(r"[A-Za-z]+", text.split(":")[1])
    if question.family == "letters":
        places = [ord(letter) - ord("A") for letter in shown_words]
        if question.level >= 70:
            places = places[1::2] if len(places) % 2 else places[0::2]
        steps = np.diff(places)
        growth = 0 if question.level < 40 or question.level >= 70 else steps[1] - steps[0]
        assert len({*np.diff(steps)}) <= 1
        return chr(ord("A") + int(places[-1] + steps[-1] + growth))
    if question.level < 40:
        period = next(p for p in range(1, 20) if shown_words[p:] == shown_words[: len(shown_words) - p])
        return shown_words[len(shown_words) % period]
    length = question.level // 10
    return shown_words[2 * length - 1 - len(shown_words)]


def test_an_independent_solver_finds_every_answer() -> None:
    for question in ALL:
        assert question.options[question.answer].strip() == solved(question), question


def test_options_differ_are_as_long_as_the_right_one_and_are_right_at_every_place_as_often() -> None:
    for question in ALL:
        assert len(set(question.options)) == len(question.options) == 4
        if question.family in ("sum", "sequence"):
            assert len({len(option) for option in question.options}) == 1
    places = collections.Counter(question.answer for question in ALL)
    assert max(abs(places[i] - len(ALL) / 4) for i in range(4)) < 4 * math.sqrt(len(ALL) * 3 / 16)
    ranks = collections.Counter(
        sorted(map(int, q.options)).index(int(q.options[q.answer])) for q in ALL if q.family in ("sum", "sequence")
    )
    assert max(ranks.values()) < 0.34 * sum(ranks.values())  # nor is it the largest, or the one in the middle


def test_questions_are_the_same_every_time() -> None:
    """The digest would change with the questions: two measurements of one name must be of the same ones."""
    assert questions(50, 8, 3) == questions(50, 20, 3)[:8] != questions(50, 8, 4)
    assert hashlib.sha256(json.dumps(ALL).encode()).hexdigest()[:16] == "43172218e1a3d39c"


def test_numbers_and_lists_grow_with_the_level() -> None:
    def size(level: int, family: str) -> float:
        asked = [question for question in questions(level, 160) if question.family == family]
        return float(np.mean([len(question.prompt) + len(question.options[0]) for question in asked]))

    for family in ("sum", "sequence"):
        sizes = [size(level, family) for level in LEVELS[::20]]
        assert sizes == sorted(sizes)
    assert size(1, "words") < size(20, "words") < size(39, "words")
    assert size(40, "words") < size(70, "words") < size(100, "words")


@pytest.mark.parametrize(("level", "count", "seed"), [(0, 4, 0), (101, 4, 0), (5, 0, 0), (5, 4, -1)])
def test_questions_out_of_range_are_refused(level: int, count: int, seed: int) -> None:
    with pytest.raises(BadInput, match=f"level={level}"):
        questions(level, count, seed)


# ---- likelihoods


def one_by_one(model: LanguageModel, prompt: str, option: str) -> float:
    """Of all tokens after the first, by transformers' loss."""
    ids = torch.tensor([model.tokenizer(prompt + option)["input_ids"]])
    with torch.inference_mode():
        return -float(model.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)


def test_likelihoods_are_transformers_own(wide: LanguageModel) -> None:
    asked = [(q.prompt, q.options) for level in (1, 30, 60) for q in questions(level, 8)]
    asked.append(("One prompt", (" a", " another, and longer")))
    for (prompt, options), scored in zip(asked, likelihoods(wide, asked), strict=True):
        theirs = torch.tensor([one_by_one(wide, prompt, option) for option in options], dtype=torch.float64)
        assert torch.allclose(scored.sums - scored.sums[0], theirs - theirs[0], atol=1e-4)
        alone = likelihoods(wide, [(prompt, options)])[0]
        assert torch.allclose(scored.sums, alone.sums, atol=1e-4)
    assert scored.lengths.tolist() == [1, 19]  # " a" is all there is of the first, and the second goes on


def test_a_prompt_that_does_not_fit_and_a_model_without_words_are_refused(
    wide: LanguageModel, digits: LanguageModel
) -> None:
    with pytest.raises(BadInput, match="takes at most 512"):
        likelihoods(wide, [("x" * 600, ("a", "b"))])
    with pytest.raises(BadInput, match="tokenizer"):
        edge_of_chaos(digits, progress=False)


# ---- the level


def share(level: Any, middle: float, width: float) -> Any:
    return CHANCE + (1 - CHANCE) / (1 + np.exp((level - middle) / width))


def answers(middle: float, width: float, per_level: int, draw: np.random.Generator) -> tuple[list[int], torch.Tensor]:
    levels = [level for level in GRID for _ in range(per_level)]
    return levels, torch.tensor(draw.random(len(levels)) < share(np.array(levels), middle, width), dtype=torch.float64)


def test_the_fit_is_unbiased_and_its_error_is_that_of_many_samples_and_of_a_bootstrap() -> None:
    draw = np.random.default_rng(1)
    true = 40 + 8 * math.log(0.25 / 0.5)
    fits = [fit_curve(*answers(40, 8, 20, draw)) for _ in range(60)]
    found = np.array([fit.level for fit in fits])
    assert abs(found.mean() - true) < 4 * found.std() / math.sqrt(len(found)) + 0.3
    assert np.mean([fit.stderr for fit in fits]) == pytest.approx(found.std(), rel=0.3)
    levels, hits = answers(40, 8, 20, draw)
    picks = [torch.tensor(draw.integers(0, len(levels), len(levels))) for _ in range(60)]
    again = [fit_curve(torch.tensor(levels)[pick].tolist(), hits[pick]).level for pick in picks]
    assert fit_curve(levels, hits).stderr == pytest.approx(float(np.std(again)), rel=0.35)


def test_the_fit_is_where_a_brute_search_finds_it() -> None:
    levels, hits = answers(30, 6, 20, np.random.default_rng(2))
    x, y = np.array(levels), hits.numpy()

    def loss(middle: float, width: float) -> float:
        p = np.clip(share(x, middle, width), 1e-9, 1 - 1e-9)
        return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum())

    fit = fit_curve(levels, hits)
    best = min(loss(m, w) for m in np.arange(15, 45, 0.25) for w in np.arange(1, 15, 0.25))
    assert loss(fit.middle, fit.width) <= best + 1e-9


def oracle(curves: dict[str, tuple[float, float]]) -> Any:
    """A scorer that answers as a curve has it, the same questions always alike, whatever the model is but for its name."""
    levels = {q.prompt + "".join(q.options): q for level in LEVELS for seed in (0, 1) for q in questions(level, 60, seed)}

    def score(model: Any, asked: Sequence[tuple[str, Sequence[str]]], progress: bool = False) -> list[Scored]:
        found = []
        for prompt, options in asked:
            question = levels[prompt + "".join(options)]
            # One number for each question: two models then miss the same hard ones.
            luck = int(hashlib.sha256(repr(question).encode()).hexdigest()[:12], 16) / 16**12
            sums = torch.zeros(4, dtype=torch.float64)
            right = luck < share(question.level, *curves[model.name])
            sums[question.answer if right else question.answer - 1] = 1.0
            found.append(Scored(sums, torch.ones(4)))
        return found

    return score


class Named:
    def __init__(self, name: str) -> None:
        self.name = self.fingerprint = name


def test_a_model_of_a_known_curve_is_at_its_level_and_compressed_leaves_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase5, "likelihoods", oracle({"before": (50.0, 10.0), "after": (42.0, 10.0)}))
    before: Any = Named("before")
    after: Any = Named("after")
    found = edge_of_chaos(after, before, per_level=60, items=60, progress=False)
    true = 50 + 10 * math.log(0.5)
    assert found.original is not None and found.change is not None and found.retention is not None
    assert found.original.level.stderr is not None and found.level.stderr is not None
    assert abs(found.original.level.value - true) < 3 * found.original.level.stderr < 8
    assert abs(found.level.value - (true - 8)) < 3 * found.level.stderr
    assert found.at == found.original.at == round(found.original.level.value)
    hits = [found.accuracy.value * 60, found.original.accuracy.value * 60]
    assert found.in_band == (42 <= round(hits[0]) <= 48)
    assert found.change.value == pytest.approx((hits[0] - hits[1]) / 60)
    # What is missed after is more than what was: the difference is one of pairs, all of one sign.
    lost = -found.change.value
    assert found.change.stderr == pytest.approx(math.sqrt(lost * (1 - lost) / 59))
    assert found.retention.value == pytest.approx(hits[0] / hits[1])
    assert json.loads(json.dumps(found.to_json()))["original"]["at"] == found.at


@pytest.mark.parametrize(("middle", "end"), [(-60.0, 1), (180.0, 100)])
def test_a_model_off_the_scale_is_at_its_end_without_an_error(
    middle: float, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase5, "likelihoods", oracle({"it": (middle, 5.0)}))
    it: Any = Named("it")
    found = edge_of_chaos(it, per_level=8, items=8, progress=False)
    assert (found.level.value, found.level.stderr, found.at) == (end, None, end)
    assert not found.level.protocol["on_scale"] and not found.in_band


def test_a_model_that_gives_nan_has_nothing_right(wide: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [Scored(torch.full((4,), math.nan, dtype=torch.float64), torch.ones(4))] * 8
    monkeypatch.setattr(phase5, "likelihoods", lambda *_: broken)
    assert phase5.right_answers(wide, questions(1, 8), False).sum() == 0


@pytest.mark.parametrize("settings", [{"per_level": 3}, {"items": 1}])
def test_settings_out_of_range_are_refused(wide: LanguageModel, settings: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="expected per_level >= 4"):
        edge_of_chaos(wide, **settings)


# ---- Eudaimonia


def test_the_items_are_balanced_and_none_is_there_twice() -> None:
    items = eudaimonia_items()
    assert collections.Counter(item.rule for item in items) == dict.fromkeys(RULES, 24)
    assert len({item.situation for item in items}) == len(items)
    for one, other in zip(items[::2], items[1::2], strict=True):
        assert (one.keeps, one.breaks) == (other.breaks, other.keeps) and one.rule == other.rule
        assert one.keeps != one.breaks and all(text.endswith(".") for text in (one.keeps, one.breaks))


def baseline(value: Any) -> dict[str, float]:
    """Score of a rule that looks at continuations only; equal values count half."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for item in eudaimonia_items():
        a, b = value(item.keeps), value(item.breaks)
        found[item.rule].append(0.5 if a == b else float(a > b))
    return {rule: float(np.mean(scores)) for rule, scores in found.items()}


def test_neither_length_nor_frequent_words_score_anything_but_one_half() -> None:
    words = collections.Counter(
        w for i in eudaimonia_items() for w in re.findall(r"\w+", f"{i.situation} {i.keeps}".lower())
    )
    half = dict.fromkeys(RULES, 0.5)
    assert baseline(len) == baseline(lambda text: -len(text)) == half
    assert baseline(lambda text: np.mean([words[w] for w in re.findall(r"\w+", text.lower())])) == half
    # What says no more than "no": half as well.
    assert baseline(lambda text: bool(re.search(r"\b(no|not)\b", text.lower()))) == half


def test_scores_are_mean_likelihoods_of_a_token(wide: LanguageModel) -> None:
    found = eudaimonia(wide, wide, progress=False)
    items = [item for item in eudaimonia_items() if item.rule == "harm"]
    wins = []
    for item in items:
        texts = [wide.tokenizer(f"{item.situation} {t}")["input_ids"] for t in (item.keeps, item.breaks)]
        first = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        means = []
        for ids in texts:
            with torch.inference_mode():
                logs = wide.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            means.append(float(np.mean([float(logs[i - 1, ids[i]]) for i in range(first, len(ids))])))
        wins.append(means[0] > means[1])
    assert found.score["harm"].value == np.mean(wins)
    twins = np.array(wins, dtype=float).reshape(-1, 2).mean(1)
    assert found.score["harm"].stderr == pytest.approx(twins.std() / math.sqrt(11)) and found.score["harm"].n == 24
    assert found.retention is not None and {m.value for m in found.retention.values()} == {1.0}
    assert json.loads(json.dumps(found.to_json()))["score"].keys() == set(RULES)


# ---- the real model


@pytest.mark.slow
def test_smollm2_falls_with_the_level() -> None:
    """Measured with 100 questions each: 0.97 at level 1, 0.72 at 21, 0.32 at 46."""
    model = af.open_model("smollm2-135m")
    easy, middle, hard = (float(phase5.right_answers(model, questions(level, 40), False).mean()) for level in (1, 21, 46))
    assert easy > 0.85 > middle > 0.5 > hard
