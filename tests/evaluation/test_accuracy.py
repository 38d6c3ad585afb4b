from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import agentforge
from agentforge.digits import data
from agentforge.errors import BadInput
from agentforge.evaluation import accuracy_retention
from agentforge.models import LanguageModel


def test_accuracy_counts_the_right_answers(digits: LanguageModel) -> None:
    found = agentforge.accuracy(digits)
    _, _, pixels, labels = data()
    with torch.no_grad():
        answers = [int(digits.model(picture.unsqueeze(0)).argmax()) for picture in pixels]
    right = sum(a == b for a, b in zip(answers, labels.tolist(), strict=True))
    assert found.n == len(labels) == 450
    assert found.value == pytest.approx(right / 450)
    assert found.stderr == pytest.approx(math.sqrt(right * (450 - right) / 450**3))
    assert found.value > 0.95
    assert found.inputs == {"model": digits.fingerprint}


def test_retention_of_accuracy(digits: LanguageModel, tmp_path: Path) -> None:
    coarse = agentforge.load(agentforge.compress(digits, "ternary", tmp_path / "out", progress=False).path)
    found = accuracy_retention(coarse, digits)
    assert found.value == pytest.approx(agentforge.accuracy(coarse).value / agentforge.accuracy(digits).value)
    assert found.n == 450 and found.stderr is not None and found.stderr > 0
    assert accuracy_retention(digits, digits).value == 1.0


def test_a_measured_model_can_still_be_trained(digits: LanguageModel) -> None:
    """A module that is built under inference_mode keeps inference tensors for ever: no gradient goes through them."""
    fresh = agentforge.open_model(digits.path)
    agentforge.accuracy(fresh)
    fresh.model(data()[2][:4]).sum().backward()
    assert all(p.grad is not None for p in fresh.model.parameters())


def test_the_held_out_digits_are_held_out() -> None:
    train, train_labels, test, test_labels = data()
    assert (train.shape, test.shape) == ((1347, 64), (450, 64))
    assert 0.0 <= float(train.min()) < float(train.max()) == 1.0
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in test.tolist()}
    share = torch.bincount(test_labels) / torch.bincount(torch.cat([train_labels, test_labels]))
    assert ((share - 450 / 1797).abs() < 0.01).all()  # stratified


def test_a_language_model_has_no_accuracy(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="tiny-llama is not a classifier; measure its perplexity"):
        agentforge.accuracy(agentforge.open_model(tiny_llama))


def test_a_classifier_has_no_perplexity(digits: LanguageModel) -> None:
    with pytest.raises(BadInput, match="digits-mlp is a classifier"):
        agentforge.perplexity(digits, "selftext", context=16, tokens=10)
