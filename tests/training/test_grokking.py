"""The grokking benchmark: its lean model against a plain one, its statistics by hand, and its smoke form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F


@pytest.fixture(scope="module")
def grokking(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("grokking")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark takes one thread; the tests after it get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SMALL = ["--p", "7", "--width", "16", "--cap", "30", "--seeds", "2"]


def a_recipe(grokking: ModuleType, arm: Any, seed: int, cap: int, p: int = 7) -> dict[str, Any]:
    return grokking.recipe(arm, seed, grokking.options_of(["--cap", str(cap), "--p", str(p), "--width", "16"]))


def plain(model: Any, heads: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The whole decoder over all four positions of every example, with torch's own attention."""
    p, n = model.p, len(a)
    tokens = torch.stack([a, torch.full((n,), p + 1), b, torch.full((n,), p)], 1)
    x = model.tokens(tokens) + model.positions.weight
    for block in model.blocks:
        x = block.norm1(x)
        q, k, v = (part(x).view(n, 4, heads, -1).transpose(1, 2) for part in (block.q, block.k, block.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + block.o(mixed)
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    return model.head(model.norm(x))[:, -1]


@pytest.mark.parametrize("layers", [2, 3])
def test_the_lean_model_is_the_plain_one(grokking: ModuleType, layers: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = grokking.Decoder(11, 16, layers).double()
        a, b, product = torch.randint(11, (3, 40))
    logits, expected = model(a, b), plain(model, grokking.HEADS, a, b)
    torch.testing.assert_close(logits, expected)
    gradients = [torch.autograd.grad(F.cross_entropy(out, product), list(model.parameters())) for out in (logits, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_papers_size(grokking: ModuleType) -> None:
    model = grokking.Decoder()
    assert (len(model.blocks), model.head.weight.shape, grokking.HEADS) == (2, (99, 128), 4)
    assert sum(p.numel() for block in model.blocks for p in block.parameters()) == 2 * (12 * 128**2 + 13 * 128)
    train, validation = grokking.products(0)
    assert train.shape == validation.shape == (3, 97 * 96 // 2)
    everything = torch.cat([train, validation], 1)
    assert len(set(zip(*everything[:2].tolist(), strict=True))) == 97 * 96
    assert torch.equal(everything[0] * everything[1] % 97, everything[2]) and everything[1].min() == 1
    assert not torch.equal(train, grokking.products(1)[0])


def test_batches_are_epochs(grokking: ModuleType) -> None:
    train, _ = grokking.products(0)
    stream = grokking.batches(train, 0)
    epochs = [[next(stream) for _ in range(10)] for _ in range(2)]
    assert [batch.shape[1] for batch in epochs[0]] == [512] * 9 + [48]
    for epoch in epochs:
        seen = torch.cat(epoch, 1)
        assert set(zip(*seen.tolist(), strict=True)) == set(zip(*train.tolist(), strict=True))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(next(grokking.batches(train, 0)), epochs[0][0])


def test_adam_filters_before_it_adds_the_weight_decay(grokking: ModuleType) -> None:
    """As the paper's code: on a gradient that stays, Adam sees 3 g + 0.005 w; AdamW's step has no such term."""
    model = torch.nn.Linear(3, 2)
    reference = torch.nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    ours = grokking.optimizer_of(grokking.Arm("Adam", 0.005, 2.0), model)
    theirs = torch.optim.Adam(reference.parameters(), grokking.LR, weight_decay=0.005, betas=grokking.BETAS)
    for _ in range(3):
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad, r.grad = torch.full_like(p, 1e-3), torch.full_like(p, 3e-3)
        ours.step()
        theirs.step()
    for p, r in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-8)


def test_a_third_of_the_weight_decay_is_what_a_factor_of_three_leaves(grokking: ModuleType) -> None:
    """Adam on 3 g + 0.005 w goes where Adam on g + 0.005 / 3 w goes, but for its eps."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in "ab"]
    decays = (0.005, grokking.WEAKER.weight_decay)
    adams = [torch.optim.Adam([w], 1e-3, weight_decay=decay) for w, decay in zip(weights, decays, strict=True)]
    for step in range(20):
        gradient = 0.01 * torch.randn(7, generator=torch.Generator().manual_seed(step))
        for weight, adam, factor in zip(weights, adams, (3, 1), strict=True):
            weight.grad = factor * gradient
            adam.step()
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", range(4))
def test_both_arms_of_a_pair_differ_in_the_filter_only(grokking: ModuleType, pair: int) -> None:
    plain_arm, filtered = grokking.PAIRS[pair]
    assert (plain_arm.optimizer, plain_arm.weight_decay) == (filtered.optimizer, filtered.weight_decay)
    assert (plain_arm.lamb, filtered.lamb) == (0.0, 2.0)
    model = grokking.Decoder(5, 16)
    for arm in (plain_arm, filtered):
        for group in grokking.optimizer_of(arm, model).param_groups:
            assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, arm.weight_decay, (0.9, 0.98))


def test_rank(grokking: ModuleType) -> None:
    assert grokking.rank(1) == (1, 0.0)
    assert grokking.rank(5) == (1, 1 - 2 / 32)
    assert grokking.rank(8) == (2, 1 - 2 * 9 / 256)
    assert grokking.rank(7) == (1, 1 - 2 / 128)  # k = 2 would hold it at 87.5 %


def test_medians_and_intervals(grokking: ModuleType) -> None:
    known = [(float(x), float(x)) for x in (5, 1, 4, 2, 3)]
    assert grokking.median(known) == (3, 3) and grokking.interval(known) == (1, 5)
    censored = [*known[:3], (6.0, math.inf), (6.0, math.inf)]
    assert grokking.median(censored) == (5, 5) and grokking.interval(censored) == (1, math.inf)
    assert grokking.median([(6.0, math.inf)] * 3) == (6, math.inf)


@pytest.mark.parametrize(
    ("without", "with_filter", "expected", "text"),
    [
        ((300, 300), (100, 100), (3, 3), "3.00"),
        ((600, math.inf), (200, 200), (3, math.inf), "> 3.00"),
        ((300, 300), (600, math.inf), (0, 0.5), "< 0.50"),
        ((600, math.inf), (600, math.inf), (0, math.inf), "not known"),
    ],
)
def test_ratios_of_censored_runs(
    grokking: ModuleType,
    without: tuple[float, float],
    with_filter: tuple[float, float],
    expected: tuple[float, float],
    text: str,
) -> None:
    assert grokking.ratio(without, with_filter) == expected
    assert grokking.show(expected, 2) == text


def test_verdicts(grokking: ModuleType) -> None:
    def say(*ratios: float) -> str:
        return grokking.verdict([(r, r) for r in ratios])

    assert say(1.1, 2, 3, 4, 5) == "sooner"
    assert say(0.9, 0.5, 0.3, 0.2, 0.1) == "later"
    assert say(0.9, 2, 3, 4, 5) == "no difference shown"
    assert say(2, 2, 2, 2) == "too few seeds"
    assert grokking.verdict([(3, math.inf)] * 5) == "sooner"
    assert grokking.verdict([(3, 3)] * 4 + [(0, math.inf)]) == "no difference shown"


@pytest.mark.parametrize("arm", [(0, 0), (1, 1), (2, 1)])
def test_an_interrupted_run_comes_to_the_same(grokking: ModuleType, arm: tuple[int, int], tmp_path: Path) -> None:
    recipe = a_recipe(grokking, grokking.PAIRS[arm[0]][arm[1]], 3, 130)
    whole = grokking.run(recipe, tmp_path / "whole.pt")
    parts = [grokking.run(recipe, tmp_path / "parts.pt", deadline=0.0) for _ in range(7)]
    assert parts[:6] == [None] * 6  # stops at each look, every 20 steps; the cap ends the seventh
    seconds = [row.pop("cpu_seconds_a_step") for row in (whole, parts[6])]
    assert whole == parts[6] and min(seconds) > 0
    assert len(whole["every_100_steps"]) == 1 and whole["steps"] is None and 0 <= whole["accuracy"] < 0.95
    assert list(tmp_path.iterdir()) == []


def test_another_runs_state_is_not_taken(grokking: ModuleType, tmp_path: Path) -> None:
    first, second = (a_recipe(grokking, grokking.PAIRS[0][0], seed, 40) for seed in (0, 1))
    assert grokking.run(first, tmp_path / "state.pt", deadline=0.0) is None
    mixed, alone = grokking.run(second, tmp_path / "state.pt"), grokking.run(second, tmp_path / "alone.pt")
    assert {**mixed, "cpu_seconds_a_step": 0} == {**alone, "cpu_seconds_a_step": 0}


def test_a_run_stops_at_the_goal(grokking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([0.1, 0.949, 0.95])
    monkeypatch.setattr(grokking, "accuracy", lambda *_: next(seen))
    row = grokking.run(a_recipe(grokking, grokking.PAIRS[0][0], 0, 500), tmp_path / "state.pt")
    assert row["steps"] == 60 and row["accuracy"] == 0.95


def test_smoke_and_resume(grokking: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--out", str(tmp_path)]
    grokking.main([*arguments, "--only", "MuGrokfast, wd"])
    rows = json.loads((tmp_path / "grokking.json").read_text(encoding="utf-8"))
    assert [(r["recipe"]["arm"]["optimizer"], r["recipe"]["arm"]["lamb"], r["recipe"]["seed"]) for r in rows] == [
        ("MuGrokfast", 0.0, 0),
        ("MuGrokfast", 0.0, 1),
    ]
    assert rows[0]["environment"]["packages"]["torch"] == torch.__version__
    capsys.readouterr()
    grokking.main(arguments)
    assert capsys.readouterr().err.count(" ...") == 16  # of 9 arms with 2 seeds, 2 were there
    grokking.main(arguments)
    assert capsys.readouterr().err == ""
    report = (tmp_path / "grokking.md").read_text(encoding="utf-8")
    for group in grokking.ORDER:
        for arm in group:
            assert f"| {arm} | > 30 | " in report
    assert '"> 30": censored, not reached in 30 steps' in report
    assert report.count("| not known | ") == len(grokking.COMPARISONS)


def test_runs_with_other_settings_are_kept_and_not_mixed_in(grokking: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--out", str(tmp_path), "--only", "AdamW, wd"]
    grokking.main(arguments)
    grokking.main([*arguments, "--cap", "20"])
    assert len(json.loads((tmp_path / "grokking.json").read_text(encoding="utf-8"))) == 4
    assert "> 30" not in (tmp_path / "grokking.md").read_text(encoding="utf-8")
    grokking.main([*SMALL, "--out", str(tmp_path), "--report"])
    assert "> 30" in (tmp_path / "grokking.md").read_text(encoding="utf-8")


def test_stops_in_time_and_goes_on(grokking: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--out", str(tmp_path), "--only", "AdamW, wd"]
    grokking.main([*arguments, "--seconds", "0"])
    assert "out of time" in capsys.readouterr().err
    assert (tmp_path / "unfinished.pt").is_file()
    grokking.main(arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grokking.json", "grokking.md"]
    assert len(json.loads((tmp_path / "grokking.json").read_text(encoding="utf-8"))) == 2


def test_no_run_yet(grokking: ModuleType, tmp_path: Path) -> None:
    grokking.main(["--out", str(tmp_path), "--report"])
    assert "No run yet." in (tmp_path / "grokking.md").read_text(encoding="utf-8")
