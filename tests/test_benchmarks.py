"""The table of stages: what its verdicts say, and one row of it on a tiny model."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import agentforge
from agentforge import stages


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("stages")


def row(stage: str, bits: float, kl: float, stderr: float = 0.01, top1: float = 0.5, error: float = 0.1) -> dict[str, Any]:
    return {
        "recipe": {"stage": stages.parse(stage).to_json()},
        "bits": bits,
        "kl": {"value": kl, "stderr": stderr},
        "top1": {"value": top1},
        "relative_error": error,
    }


ROUNDING = [
    row("rounding:bits=2", 2.5, 8.0),
    row("rounding:bits=3,group=0", 3.0, 3.0),
    row("rounding:bits=3", 3.5, 2.0),
    row("rounding:bits=3,group=32", 4.0, 2.5),  # more bits and worse: nobody is held against it
    row("rounding:bits=4", 4.5, 0.5),
]


@pytest.mark.parametrize(
    ("bits", "kl", "says"),
    [
        (3.2, 1.9, "**wins**: 1.9 against 2 at 3.50 bits"),
        (3.2, 3.1, "**loses**: 3.1 against 3 at 3.00 bits"),
        (3.5, 1.9, "**wins**: 1.9 against 2 at 3.50 bits"),
        (3.5, 2.1, "**loses**: 2.1 against 2 at 3.50 bits"),
        (4.0, 0.4, "**wins**: 0.4 against 0.5 at 4.50 bits"),
        (4.0, 0.9, "wins against the line from 3.50 to 4.50 bits: 0.9, 1"),
        (4.0, 1.1, "loses against the line from 3.50 to 4.50 bits: 1.1, 1"),
        (3.2, 2.99, "loses against the line from 3.00 to 3.50 bits: 2.99, 2.55"),  # within two standard errors of 3
        (5.0, 0.4, "open: no rounding on both sides of 5.00 bits; 0.5 at 4.50 bits"),
        (5.0, 0.6, "**loses**: 0.6 against 0.5 at 4.50 bits"),
        (1.6, 9.0, "open: no rounding on both sides of 1.60 bits; 8 at 2.50 bits"),
        (1.6, 7.0, "**wins**: 7 against 8 at 2.50 bits"),
    ],
)
def test_verdicts(benchmark: ModuleType, bits: float, kl: float, says: str) -> None:
    candidate = row("ternary", bits, kl)
    assert benchmark.verdict(candidate, [*ROUNDING, candidate]) == says


def test_rounding_is_not_held_against_itself(benchmark: ModuleType) -> None:
    assert benchmark.verdict(ROUNDING[0], ROUNDING) == "is rounding"
    assert benchmark.verdict(row("ternary", 3, 1), []) == "no rounding row yet"


def test_a_grid_that_rounding_hit_by_accident_is_no_peer(benchmark: ModuleType) -> None:
    exact = row("rounding:bits=3,group=16", 3.5, 1e-6, error=1e-6)
    assert benchmark.verdict(row("ternary", 3.5, 1.9), [*ROUNDING, exact]) == "**wins**: 1.9 against 2 at 3.50 bits"


def test_of_two_models_that_are_gone_neither_wins(benchmark: ModuleType) -> None:
    gone = [row("rounding:bits=2", 2.5, 8.0, top1=0.01)]
    for bits in (1.6, 3.0):  # rounding with more bits, and with fewer
        assert benchmark.verdict(row("ternary", bits, 9.0, top1=0.02), gone) == "neither is usable: 9 against 8 at 2.50 bits"
    assert benchmark.verdict(row("ternary", 1.6, 7.0), gone) == "**wins**: 7 against 8 at 2.50 bits"


def test_a_row_of_the_table(benchmark: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, twice. " * 20, encoding="utf-8")
    arguments = ["--model", str(tiny_llama), "--text", str(text), "--tokens", "200", "--context", "64"]
    options: argparse.Namespace = benchmark.options_of([*arguments, "--out", str(tmp_path / "out")])
    rows = []
    for name in ("rounding:bits=3,group=32", "ternary"):
        stage = stages.parse(name)
        work = tmp_path / stage.name
        rows.append({"recipe": benchmark.recipe(stage, "model", options), **benchmark.measure(name, options, work)})
        artifact = agentforge.artifact.Artifact(work / "artifact")
        touched = [r for r in artifact.rows if r["stage"] is not None]
        assert rows[-1]["bits"] == 8 * sum(r["bytes"] for r in touched) / sum(math.prod(r["shape"]) for r in touched)
        assert rows[-1]["coded_bits"] < rows[-1]["bits"] + 0.1
        assert min(r["relative_error"] for r in touched) <= rows[-1]["relative_error"]
        assert rows[-1]["relative_error"] <= max(r["relative_error"] for r in touched)
        assert rows[-1]["kl"]["n"] == 200 and rows[-1]["kl"]["stderr"] > 0
        assert rows[-1]["peak_bytes"] > 1e8
    benchmark.write(rows, options)
    assert json.loads((options.out / "stages.json").read_text(encoding="utf-8")) == json.loads(json.dumps(rows))
    report = (options.out / "stages.md").read_text(encoding="utf-8")
    assert "| rounding:bits=3,group=32 |" in report and "| ternary |" in report


def test_finished_rows_are_not_taken_again(
    benchmark: ModuleType, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc " * 100, encoding="utf-8")
    taken = []

    def instead(_: object, text: str, options: argparse.Namespace) -> dict[str, Any]:
        taken.append(text)
        if text == "curves":
            raise RuntimeError("out of memory")
        return {"bits": 3.0}

    monkeypatch.setattr(benchmark.bench, "apart", instead)
    monkeypatch.setattr(benchmark, "table", lambda rows, options: f"{len(rows)} rows\n")
    monkeypatch.setattr(benchmark, "ROWS", ["rounding:bits=3", "ternary"])
    arguments = ["--model", str(tiny_llama), "--text", str(text), "--out", str(tmp_path / "out")]
    benchmark.main([*arguments, "--only", "ternary"])
    benchmark.main(arguments)
    assert taken == ["ternary", "rounding:bits=3"]
    saved = json.loads((tmp_path / "out" / "stages.json").read_text(encoding="utf-8"))
    assert [r["recipe"]["stage"]["stage"] for r in saved] == ["rounding", "ternary"]  # in the list's order
    monkeypatch.setattr(benchmark, "ROWS", ["curves", "rounding:bits=3", "ternary"])
    with pytest.raises(SystemExit, match="curves: RuntimeError: out of memory"):
        benchmark.main([*arguments, "--tokens", "50"])
    assert taken == ["ternary", "rounding:bits=3", "curves", "rounding:bits=3", "ternary"]
    assert (tmp_path / "out" / "stages.md").read_text(encoding="utf-8") == "2 rows\n"


REPORTS = Path(__file__).parents[1] / "reports"


@pytest.mark.parametrize(
    ("name", "folder", "options"),
    [
        *((name, name, []) for name in ("calibration", "chains", "fit", "grokking", "recovery", "runtime", "stages")),
        *(
            (name, name, [])
            for name in ("ablation", "blocks", "ct_fit", "gguf_fit", "interop", "streaming", "ternary_speed")
        ),
        ("from_scratch", "from_scratch", ["--steps", "280"]),
        ("intervals", "coverage", []),
        pytest.param("ratios", "ratios", [], marks=pytest.mark.slow),
    ],
)
def test_report_draws_what_is_committed(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, name: str, folder: str, options: list[str]
) -> None:
    shutil.copytree(REPORTS / folder, tmp_path / folder)
    load_benchmark(name).main(["--report", "--out", str(tmp_path / folder), *options])
    drawn = {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir() if file.suffix != ".png"}
    assert drawn == {file.name: file.read_bytes() for file in (REPORTS / folder).iterdir() if file.suffix != ".png"}


@pytest.mark.slow
def test_from_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    import subprocess

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 50, encoding="utf-8")
    script = Path(__file__).parents[1] / "benchmarks" / "stages.py"
    command = [sys.executable, str(script), "--model", str(tiny_llama), "--text", str(text), "--tokens", "100"]
    command += ["--context", "64"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--only", "ternary"], capture_output=True, text=True, check=True
    )
    assert "ternary ..." in done.stderr
    assert "| ternary | 1." in (tmp_path / "stages.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("beside", "most", "directions"), [(0.0, 1e-9, 64), (0.25, 0.1, 96)])
def test_a_widened_model_computes_what_it_did(
    load_benchmark: Callable[[str], ModuleType],
    tiny_llama: Path,
    tmp_path: Path,
    beside: float,
    most: float,
    directions: int,
) -> None:
    model = agentforge.open_model(tiny_llama)
    load_benchmark("wide").widen(model, tmp_path / "wide", 96, 3, beside)
    other = agentforge.open_model(tmp_path / "wide")
    assert other.tensor("model.layers.1.self_attn.o_proj.weight").shape == (96, 96)
    ids = torch.tensor([model.encode("the quick brown fox jumps over the lazy dog, twice. " * 2)])
    with torch.no_grad():
        output = other.model(input_ids=ids, output_hidden_states=True)
        a, b = model.model(input_ids=ids).logits.double().log_softmax(-1), output.logits.double().log_softmax(-1)
    assert float((a.exp() * (a - b)).sum(-1).mean()) < most
    assert torch.linalg.matrix_rank(output.hidden_states[-1][0], rtol=1e-4) == directions
    assert all(bool((weight.load() != 0).all()) for weight in other.weights(embeddings=True))


def test_calibration_text_is_judged_on_text_that_was_not_seen(
    load_benchmark: Callable[[str], ModuleType], tiny_llama: Path, tmp_path: Path
) -> None:
    calibration = load_benchmark("calibration")
    small = ["--tokens", "64", "512", "--context", "32", "--judged-tokens", "256"]
    calibration.main(["--model", str(tiny_llama), *small, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    rows = result["rows"]["ternary:rule=calibrated"]
    assert list(rows) == ["0", "64", "512"] and all(len(values) == 14 for values in rows.values())
    # One layer from its definition: the outputs themselves, on the text that judges.
    model = agentforge.open_model(tiny_llama)
    judged_by, _ = calibration.judge_by(model, 256, 32)
    weight = next(iter(model.weights()))
    dense = weight.load().double()
    stage = stages.get("ternary")
    gap = dense - stage.decode(stage.encode(dense.float())).double()
    root = torch.linalg.cholesky(judged_by[weight.name].hessian.double() + 1e-12 * torch.eye(dense.shape[1]).double())
    expected = float((gap @ root).square().sum() / (dense @ root).square().sum())
    assert rows["0"][0] == pytest.approx(expected, rel=1e-3)
    assert "| 512 | 16 |" in (tmp_path / "calibration.md").read_text(encoding="utf-8")
