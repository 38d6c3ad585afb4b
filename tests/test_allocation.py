"""Allocation: no combination within the budget is better by more than a step on one hull; fits keep to their budgets."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agentforge as af
from agentforge import cli, stages
from agentforge.allocation import Budget, Candidate, allocate, budget_bytes, candidates, damage, finer, fit
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.models import LanguageModel
from agentforge.stages.ecsq import ECSQ
from agentforge.stages.tcq import TCQ
from agentforge.statistics import Calibration, InputStatistics, collect
from agentforge.training.recover import Settings
from tests.architectures import make

LADDER = tuple(stages.get("ecsq", step=step) for step in (0.1, 0.3, 1.0))
TEXT = Text("words", "test", "".join(f"The {i}th word is number {i * i}. " for i in range(400)))
CALIBRATION = Calibration(TEXT, tokens=256, context=64, sensitivity_tokens=128)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LanguageModel:
    return af.open_model(tiny_llama)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))


def random_options(seed: int) -> dict[str, list[Candidate]]:
    rng = np.random.default_rng(seed)
    stage = stages.get("rounding")
    return {
        f"w{i}": [Candidate(stage, int(rng.integers(1, 40)), float(rng.exponential())) for _ in range(rng.integers(1, 5))]
        for i in range(4)
    }


@pytest.mark.parametrize("seed", range(30))
def test_an_allocation_is_within_one_step_of_the_best_of_all_combinations(seed: int) -> None:
    options = random_options(seed)
    smallest = sum(min(c.bytes for c in found) for found in options.values())
    largest = sum(max(c.bytes for c in found) for found in options.values())
    for budget in range(smallest, largest + 3, 3):
        chosen = allocate(options, budget)
        assert chosen.keys() == options.keys()
        assert sum(one.bytes for one in chosen.values()) <= budget
        combinations = itertools.product(*options.values())
        best = min(sum(c.damage for c in row) for row in combinations if sum(c.bytes for c in row) <= budget)
        spread = max(max(c.damage for c in found) - min(c.damage for c in found) for found in options.values())
        assert best - 1e-12 <= sum(one.damage for one in chosen.values()) <= best + spread + 1e-12
    assert sum(one.damage for one in chosen.values()) == pytest.approx(best)  # with room for all, the best of each
    with pytest.raises(BadInput, match="the smallest candidates of 4 weights take"):
        allocate(options, smallest - 1)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_alike_gets_one_place_and_the_allocation_is_within_one_step_of_the_best(seed: int) -> None:
    rng, (four, eight) = np.random.default_rng(seed), (stages.get("rounding", bits=bits) for bits in (4, 8))
    sizes = rng.integers(1, 9, 5).tolist()
    options = {
        f"w{i}": [Candidate(four, size, float(rng.exponential())), Candidate(eight, 2 * size, float(rng.exponential()) / 9)]
        for i, size in enumerate(sizes)
    }
    allowed = [places for places in itertools.product(range(2), repeat=5) if places[1] == places[3]]
    rows = [[found[place] for found, place in zip(options.values(), places, strict=True)] for places in allowed]
    spread = max(sum(options[n][0].damage for n in names) for names in (["w0"], ["w1", "w3"], ["w2"], ["w4"]))
    for budget in range(sum(sizes), 2 * sum(sizes) + 1):
        chosen = allocate(options, budget, {"w1": "one", "w3": "one"})
        assert chosen.keys() == options.keys() and chosen["w1"].stage == chosen["w3"].stage
        assert sum(one.bytes for one in chosen.values()) <= budget
        best = min(sum(c.damage for c in row) for row in rows if sum(c.bytes for c in row) <= budget)
        assert best - 1e-12 <= sum(one.damage for one in chosen.values()) <= best + spread
    assert sum(one.damage for one in chosen.values()) == pytest.approx(best)


def test_damage_is_the_second_order_of_the_divergence_of_a_softmax() -> None:
    """For logits W x, KL = 1/2 E[(E x)^T (diag p - p p^T) (E x)] to second order; with one-hot-free outputs far apart the
    diagonal, p (1 - p), is what is kept.  Both sides are computed from the samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    weight, error = (torch.randn(5, 6, generator=generator, dtype=torch.float64) * s for s in (0.1, 1e-3))
    p = (x @ weight.T).softmax(1)
    stats = InputStatistics((x.T @ x / len(x)).float(), len(x), (p * (1 - p)).mean(0).float())
    found = damage(weight, weight + error, stats)
    direct = float((p * (1 - p) * (x @ error.T) ** 2).sum(1).mean()) / 2
    assert found == pytest.approx(direct, rel=0.02)  # E[g x x^T] against E[g] E[x x^T]
    without = damage(weight, weight + error, InputStatistics(stats.hessian, len(x)))
    assert without == pytest.approx(float((x @ error.T).square().sum(1).mean()) / 2, rel=1e-6)


def test_sensitivity_is_that_of_a_softmax_behind_a_relu(digits: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last touched layer, the gradient is U^T (onehot - p) where its output passes the ReLU, U the head.  On noise
    the model is unsure, so that a sample of each prediction tells its variance."""
    from agentforge import digits as data

    generator = torch.Generator().manual_seed(1)
    pictures = 0.3 * torch.rand(20000, 64, generator=generator)
    rest = data.data()[1:]
    monkeypatch.setattr(data, "data", lambda: (pictures, *rest))
    found = collect(digits, Calibration(sensitivity_tokens=1), progress=False)
    again = collect(digits, Calibration(sensitivity_tokens=1), workers=1, progress=False)
    name = [weight.name for weight in digits.weights()][-1]
    estimate = found[name].sensitivity
    assert estimate is not None and torch.equal(estimate, again[name].sensitivity)  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in digits.model.parameters())
    hidden = {}
    layer = dict(digits.model.named_modules())[name.rpartition(".")[0]]
    handle = layer.register_forward_hook(lambda _, __, output: hidden.update(out=output.detach()))
    with torch.no_grad():
        p = digits.model(pictures).double().softmax(1)
    handle.remove()
    head = digits.tensor("head.weight").double()
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = (torch.einsum("vi,nvw,wi->ni", head, fisher, head) * (hidden["out"] > 0)).mean(0)
    strong = exact > exact.mean()
    assert torch.allclose(estimate.double()[strong], exact[strong], rtol=0.2)
    assert float(estimate.sum()) == pytest.approx(float(exact.sum()), rel=0.05)


def test_candidates_are_taken_up_from_their_journal(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = collect(tiny, CALIBRATION, progress=False)
    first = candidates(tiny, statistics, CALIBRATION, LADDER, progress=False)
    assert capsys.readouterr().err == ""  # no bar that nobody asked for
    for weight in tiny.weights():
        for one in first[weight.name]:
            packed = one.stage.encode(weight.load(), statistics[weight.name])
            assert one.bytes == sum(plane.stored().nbytes for plane in packed)
            expected = damage(weight.load(), one.stage.decode(packed), statistics[weight.name])
            assert one.damage == pytest.approx(expected)
        assert [one.damage for one in first[weight.name]] == sorted(one.damage for one in first[weight.name])
    (journal,) = (tmp_path / "cache" / "candidates").glob("*.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])
    calls, encode = [], stages.Stage.encode
    monkeypatch.setattr(stages.Stage, "encode", lambda *a, **k: calls.append(k["name"]) or encode(*a, **k))
    assert candidates(tiny, statistics, CALIBRATION, LADDER, progress=False) == first
    assert len(calls) == len(LADDER) and len(set(calls)) == 1  # only the weight whose line was cut off
    with pytest.raises(BadInput, match="shares planes between weights"):
        candidates(tiny, statistics, CALIBRATION, [stages.parse("vptq:v=4,k=16,shared=true")], progress=False)


def test_a_fit_keeps_to_bits_bytes_and_divergence(tiny: LanguageModel, tmp_path: Path) -> None:
    options = {"ladder": LADDER, "calibration": CALIBRATION, "text": TEXT, "tokens": 127, "progress": False}
    by_bits = fit(tiny, tmp_path / "bits", Budget(bits=4.5), **options)
    assert by_bits.bits <= 4.5
    by_bits.artifact.verify()
    # Every matrix gets a setting, embedding and head included, or linear layers alone, with bits of their own.
    both = [fit(tiny, tmp_path / "kept", Budget(bits=4.5), embeddings="keep", **options), by_bits]
    for made, weights in zip(both, (tiny.weights(), tiny.weights(embeddings=True)), strict=True):
        rows = [row for row in made.artifact.rows if row["stage"]]
        assert {row["name"] for row in rows} == {w.name for w in weights}
        assert sum(row["bytes"] for row in rows) * 8 / sum(w.shape[0] * w.shape[1] for w in weights) == made.bits <= 4.5
    assert "embedding" in by_bits.counted and "embedding" not in both[0].counted
    assert {row["stage"]["stage"] for row in by_bits.artifact.rows if row["stage"]} == {"ecsq"}
    assert fit(tiny, tmp_path / "bits", Budget(bits=4.5), **options).artifact.sha256 == by_bits.artifact.sha256
    measured = af.divergence(af.load(tmp_path / "bits"), tiny, TEXT, context=tiny.usual_context, tokens=127, progress=False)
    assert measured.kl.value == by_bits.measured.kl.value

    most = both[0].artifact.weight_bytes + 100
    by_bytes = fit(tiny, tmp_path / "bytes", Budget(bytes=most), embeddings="keep", **options)
    assert most - 2000 < by_bytes.artifact.weight_bytes <= most
    smaller = fit(tiny, tmp_path / "e", Budget(bytes=most), embeddings="rounding:bits=8,group=0", **options)
    assert smaller.artifact.weight_bytes <= most and smaller.bits > by_bytes.bits
    most = by_bits.artifact.weight_bytes + 100
    same = fit(tiny, tmp_path / "f", Budget(bytes=most), embeddings="rounding:bits=8,group=0", **options)
    whole = fit(tiny, tmp_path / "g", Budget(bytes=most), **options)
    assert max(made.artifact.weight_bytes for made in (same, whole)) <= most
    assert whole.measured.kl.value < same.measured.kl.value

    limit = 2 * by_bits.measured.kl.value
    by_kl = fit(tiny, tmp_path / "kl", Budget(max_kl=limit), **options)
    assert by_kl.measured.kl.value + 2 * (by_kl.measured.kl.stderr or 0) <= limit
    assert by_kl.artifact.weight_bytes <= by_bits.artifact.weight_bytes + 2000
    assert not list(tmp_path.glob(".*"))  # what was tried on the way is gone

    with pytest.raises(BadInput, match="is in the way"):
        fit(tiny, tmp_path / "kl", Budget(max_kl=limit), **options)
    with pytest.raises(BadInput, match="least that the candidates gave"):
        fit(tiny, tmp_path / "none", Budget(max_kl=1e-9), **options)
    with pytest.raises(BadInput, match="the smallest candidates"):
        fit(tiny, tmp_path / "none", Budget(bits=0.1), **options)
    assert not (tmp_path / "none").exists()
    assert by_kl.artifact.verify()


def test_a_stage_for_each_weight(tiny: LanguageModel, tmp_path: Path) -> None:
    names = [weight.name for weight in tiny.weights()]
    plan = {names[0]: stages.get("rounding", bits=3), names[1]: stages.get("ternary")}
    artifact = af.compress(tiny, plan, tmp_path / "a", progress=False)
    artifact.verify()
    rows = {row["name"]: row for row in artifact.rows}
    assert {name: row["stage"]["stage"] for name, row in rows.items() if row["stage"]} == {
        names[0]: "rounding",
        names[1]: "ternary",
    }
    assert rows[names[2]]["reason"] == "no stage was chosen for it"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["stage"] == {"stage": "several"}
    for bad, message in (
        ({"nothing": stages.get("ternary")}, "is not a weight"),
        ({}, "no weight has a stage"),
        ({names[0]: stages.parse("vptq:v=4,k=16,shared=true")}, "shares planes"),
    ):
        with pytest.raises(BadInput, match=message):
            af.compress(tiny, bad, tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ("60MB", None, 60_000_000),
        ("1.5GB", None, 1_500_000_000),
        ("61440", None, 61440),
        (None, "4x", 500),
        (None, "8", 250),
    ],
)
def test_budgets_are_read(size: str | None, target: str | None, expected: int) -> None:
    assert budget_bytes(size, target, 1000) == expected
    assert budget_bytes(None, None, 1000) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bytes", "many"], "expected a size such as 60MB"),
        (["--target", "0x"], "expected a ratio such as 4x"),
        (["--target", "4x", "--bytes", "1MB"], "expected one of the two"),
        ([], "expected one positive limit"),
        (["--bits", "3", "--max-kl", "1"], "expected one positive limit"),
        (["--bits", "-3"], "expected one positive limit"),
        (["--bits", "3"], "is a classifier"),
    ],
)
def test_a_bad_budget_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["agentforge", "fit", "digits-mlp", "--out", str(tmp_path / "a"), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_fit_with_recovery_keeps_to_the_same_bits(tiny: LanguageModel, tmp_path: Path) -> None:
    ladder = [stages.get("tcq", step=step) for step in (0.06, 0.15, 0.5)]
    options = {"ladder": ladder, "calibration": CALIBRATION, "text": TEXT, "tokens": 127, "progress": False}
    settings = Settings(steps=20, batch=4, context=32, lr=1e-2, evaluate=10, heldout=64)
    plain = fit(tiny, tmp_path / "plain", Budget(bits=3.0), embeddings="keep", **options)  # type: ignore[arg-type]
    made = fit(tiny, tmp_path / "trained", Budget(bits=3.0), recovery=settings, **options)  # type: ignore[arg-type]
    assert made.bits <= 3.0
    assert made.measured.kl.value != plain.measured.kl.value
    assert made.artifact.manifest["recipe"]["training"]["steps"] == 20
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["plain", "trained"]
    for budget, embeddings in ((Budget(bytes=100_000), None), (Budget(bits=3.0), "rounding")):
        with pytest.raises(BadInput, match="within a budget of bits"):
            fit(tiny, tmp_path / "no", budget, embeddings=embeddings, recovery=settings, **options)  # type: ignore[arg-type]


def rows_of_unequal_size(seed: int) -> tuple[torch.Tensor, InputStatistics]:
    """Correlated inputs; rows, columns and curvatures over two orders of magnitude, and an outlier."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((600, 256)) @ rng.standard_normal((256, 256)) * np.exp(rng.normal(0, 1, 256))
    weight = rng.standard_normal((400, 256)) * np.exp(rng.normal(0, 1, (400, 1)))
    weight[7, 11] *= 80
    sensitivity = torch.from_numpy(np.exp(rng.normal(0, 1.5, 400))).float()
    stats = InputStatistics(torch.from_numpy(inputs.T @ inputs / 600).float(), 600, sensitivity)
    return torch.from_numpy(weight).float(), stats


@pytest.mark.parametrize(
    ("name", "step", "near", "about"),  # a path's price is that of scalars in as many bits
    [
        *(("ecsq", step, 0.08, 0.1) for step in (0.05, 0.3, 1.0, 1.7)),
        *(("tcq", step, 0.1, 0.2) for step in (0.05, 0.15, 0.3, 0.6, 0.8)),
    ],
)
def test_prices_are_about_what_encoding_costs(name: str, step: float, near: float, about: float) -> None:
    weight, stats = rows_of_unequal_size(1)
    stage = stages.get(name, step=step)
    packed = stage.encode(weight, stats)
    size, lost, counted = stage.price(weight, stats, "w", {})
    assert not counted
    assert size == pytest.approx(sum(plane.stored().nbytes for plane in packed), rel=near)
    assert lost == pytest.approx(damage(weight, stage.decode(packed), stats), rel=about)
    with pytest.raises(BadInput, match="w: 1 NaN"):
        stage.price(weight.put_(torch.tensor(0), torch.tensor(np.nan)), stats, "w", {})


@pytest.mark.parametrize("name", ["ecsq", "tcq"])
def test_what_lies_between_two_settings_costs_about_what_is_between_their_costs(name: str) -> None:
    weight, stats = rows_of_unequal_size(2)
    scratch: dict[str, Any] = {}
    ladder = [stages.get(name, step=step) for step in (0.2, 0.2828, 0.4)]
    found = finer([Candidate(stage, *stage.price(weight, stats, "w", scratch)) for stage in ladder])
    assert len(found) == 9 and [one.stage for one in found[::4]] == ladder
    assert all(a.bytes > b.bytes and a.damage < b.damage for a, b in itertools.pairwise(found))
    for one in found:
        size, lost, _ = one.stage.price(weight, stats, "w", scratch)
        assert one.bytes == pytest.approx(size, rel=0.01) and one.damage == pytest.approx(lost, rel=0.02)
    others = [stages.get(name, step=0.2), stages.get(name, step=0.4, damping=0.3), stages.get("rounding")]
    assert len(finer([Candidate(stage, 100 - n, 1.0 + n) for n, stage in enumerate(others)])) == 3


@pytest.fixture
def broad(tmp_path: Path) -> LanguageModel:
    """A model whose layers have more rows than a price is estimated from."""
    return af.open_model(make("Llama", tmp_path / "broad", hidden_size=128, intermediate_size=256))


@pytest.mark.parametrize("kind", [ECSQ, TCQ])
def test_a_fit_is_the_same_however_it_is_run(
    kind: type[ECSQ | TCQ], broad: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one thread, by three, by other processes, and after a kill: the same bytes, within the budget."""
    ladder = LADDER if kind is ECSQ else [stages.get("tcq", step=step) for step in (0.06, 0.15, 0.5)]
    options: dict[str, Any] = {"ladder": ladder, "calibration": CALIBRATION, "text": TEXT, "tokens": 127, "progress": False}

    def fresh(name: str, **more: Any) -> str:
        monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / f"cache of {name}"))
        made = fit(broad, tmp_path / name, Budget(bits=4.0), **options, **more)
        assert 3.8 < made.bits <= 4.0
        return made.artifact.sha256

    expected = fresh("one", workers=1)
    assert fresh("three", workers=3) == expected
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert fresh("processes", executor=pool) == expected
    calls, encode = [], kind._encode

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_encode", killed)
        with pytest.raises(KeyboardInterrupt):
            fresh("killed", workers=1)
    assert fresh("killed", workers=1) == expected
    fit(broad, tmp_path / "other", Budget(bits=3.0), **options)  # which leaves its counts in the same journal
    shutil.rmtree(tmp_path / "killed")
    assert fresh("killed") == expected
