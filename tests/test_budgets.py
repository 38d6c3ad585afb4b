"""The tables of budgets: what their sentences say of rows that are made up, and the models of no bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import agentforge
from agentforge.evaluation.texts import find_text


@pytest.fixture(scope="module")
def fit(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("fit")


@pytest.fixture(scope="module")
def peers(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("peers")


def measured(value: float, spread: float = 0.0, windows: str = "16 of 600, spread evenly") -> dict[str, Any]:
    return {
        "value": value,
        "stderr": spread / 2,
        "interval": [value - spread, value + spread],
        "n": 8176,
        "error": "16 windows",
        "protocol": {"text": "wikitext2", "split": "test", "context": 512, "windows": windows, "scored_tokens": 8176},
    }


def row(bits: float, kl: float, spread: float = 0.0, **more: Any) -> dict[str, Any]:
    others = {key: measured(0.5) for key in ("perplexity", "top1", "retention", "original_perplexity")}
    whole = [
        {"what": "whole model", "ratio": 2.31, "denominator": "all 100 parameters at 16 bits"},
        {"what": "whole model", "ratio": 0.85, "denominator": "GGUF file it was made from"},
    ]
    made = {"recipe": {"bits": bits}, "bits": bits, "held_bits": 2 * bits, "predicted": kl, "ratios": whole}
    return {**made, "kl": measured(kl, spread), "bits_by_layer": {"q_proj": bits}, **others, **more}


def peer(name: str, bits: float, kl: float, tool: str = "llama.cpp", **more: Any) -> dict[str, Any]:
    recipe = {"name": name, "tool": tool, "version": "1", "seed": 0, "calibration": None}
    return row(bits, kl, **{"recipe": recipe, "command": "make it", "note": "as it comes", "relative_error": 0.1, **more})


def files(folder: Path, stages: list[dict[str, Any]], peers: list[dict[str, Any]]) -> tuple[Path, Path]:
    for name, rows in (("stages", stages), ("peers", peers)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder / "stages.json", folder / "peers.json"


def stage(bits: int, kl: float, error: float = 0.1) -> dict[str, Any]:
    recipe = {"stage": agentforge.stages.get("rounding", bits=bits).to_json()}
    return row(bits + 0.5, kl, recipe=recipe, relative_error=error)


def test_a_sentence_is_made_from_all_rows_and_names_what_is_better(fit: ModuleType, tmp_path: Path) -> None:
    rows = [row(8.0, 3e-4), row(4.2, 0.04, 0.01), row(3.0, 0.2), row(0.25, 12.3), row(0.114, 10.4)]
    stages = [stage(4, 8.6e-7, error=1e-6), stage(3, 2.1), stage(2, 10.0)]
    found, said = fit.others(*files(tmp_path, stages, [peer("llama.cpp Q4", 4.2, 0.035)]), fit.protocol(rows[0]))
    text = fit.report(rows, found, said)
    assert "**For 2 of 5 budgets nothing of as many bits or fewer is better; the others say what is.**" in text
    exact = "`rounding` (4.50 bits, KL 8.6e-07, the grid on which the base lies, found by accident)"
    lines = {line.split(" bits")[0]: line for line in text.splitlines() if line.startswith("* ") and " bits, KL" in line}
    assert f"better with as many bits or fewer: {exact}" in lines["* 8.00"]
    assert "better with as many bits or fewer: llama.cpp Q4 (4.20 bits, KL 0.035), within the errors;" in lines["* 4.20"]
    assert "nothing of as many bits or fewer is better; worse with more bits: 1 row, up to" in lines["* 3.00"]
    assert "better with as many bits or fewer: fit to 0.114 bits (0.11 bits, KL 10.4)" in lines["* 0.25"]
    assert "nothing of as many bits or fewer is better" in lines["* 0.11"]
    # Every row there is stands in the table, with its reason; ratios below 1 are shown.
    table = text[text.index("## Everything there is") :]
    assert "| `rounding` | single stage | 4.500 | - | 8.6e-07" in table and "found by accident |" in table
    assert "| llama.cpp Q4 | llama.cpp | 4.200 | 8.40 |" in table and "| 2.31x | 0.85x |" in text
    assert fit.picture(rows, found).startswith(b"\x89PNG")


def test_models_of_no_bits_are_held_against_everything(fit: ModuleType, tmp_path: Path) -> None:
    rows = [row(2.0, 0.9), row(1.0, 6.1), row(0.5, 10.0)]
    nothing = [peer("no model uniform", 0.0, 7.9, "no model"), peer("no model unigrams", 0.0, 5.6, "no model")]
    found, said = fit.others(*files(tmp_path, [stage(2, 10.0)], nothing), fit.protocol(rows[0]))
    text = fit.report(rows, found, said)
    assert "A model of no bits, unigrams, has KL 5.6 (uniform: 7.9)" in text
    assert "Everything of fewer than 2.00 bits loses to it: 2 rows." in text
    assert "So does 1 row of as many bits or more, up to `rounding:bits=2` (2.50 bits, KL 10).**" in text
    assert "better with as many bits or fewer: unigrams (0.00 bits, KL 5.6);" in text


def test_rows_of_another_protocol_and_failures_are_said_and_not_mixed_in(fit: ModuleType, tmp_path: Path) -> None:
    rows = [row(3.0, 0.2)]
    old = {**stage(4, 0.1), "kl": measured(0.1, windows="the first 2")}
    broken = {"recipe": {"name": "GPTQ 3", "tool": "GPTQ"}, "failed": "no wheel"}
    found, said = fit.others(*files(tmp_path, [old], [broken]), fit.protocol(rows[0]))
    assert found == []
    assert said == [
        "Of reports/stages 1 row of other tokens or windows, left out.",
        "Not measured: GPTQ 3 (no wheel).",
    ]
    assert "None was measured on these windows" in fit.report(rows, found, said)


def test_models_of_no_bits_are_what_they_say(peers: ModuleType, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agentforge.open_model(tiny_llama)
    monkeypatch.setattr(peers, "selftexts", lambda: ["a banana", "bandana"])
    text = find_text("selftext")
    for kind in ("uniform", "unigrams of selftext"):
        fake, _ = peers.of_no_bits(model, kind)
        found = agentforge.evaluation.divergence(fake, model, text, context=32, tokens=93, progress=False)
        vocabulary = model.config["vocab_size"]
        if kind == "uniform":
            assert found.perplexity.value == pytest.approx(vocabulary)
        counts = torch.ones(vocabulary)
        for one in ("a banana", "bandana") if kind != "uniform" else ():
            for token in model.encode(one):
                counts[token] += 1
        torch.testing.assert_close(fake.model(torch.tensor([[3, 4]])).logits[0, 1].exp(), counts / counts.sum())
    assert model.model is not fake.model and math.isfinite(found.kl.value)


def test_rows_of_tools_go_on_and_say_why_they_failed(
    peers: ModuleType, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = agentforge.open_model(tiny_llama)
    taken = []

    def instead(peer: Any, *_: Any) -> Any:
        taken.append(peer.name)
        if peer.tool == "HQQ":
            raise RuntimeError("pip: no such package")
        return peers.of_no_bits(model, "uniform")[0], {"bits": 0.0}

    monkeypatch.setattr(peers, "MODEL", str(tiny_llama))
    monkeypatch.setattr(peers, "TOKENS", 62)
    monkeypatch.setattr(peers, "SAMPLED", 32)
    monkeypatch.setattr(peers, "prepare", instead)
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("no model", {"of": "uniform"}), peers.Peer("HQQ", {"bits": 4})))
    for _ in range(2):
        peers.main(["--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    assert taken == ["no model uniform", "HQQ 4", "HQQ 4"]  # what failed is tried again
    rows = json.loads((tmp_path / "peers.json").read_text())
    assert [r.get("failed") for r in rows] == [None, "pip: no such package"]
    assert rows[0]["kl"]["n"] == 62 and rows[1]["recipe"]["version"] == "hqq==0.2.8.post1"
