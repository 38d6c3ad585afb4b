"""The documented chains meet the documented bytes, no fault hands failing weights over, what is tracked was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import agentforge as af
from agentforge import chain as module
from agentforge import cli, stages, tracking
from agentforge.bits import stored_bytes
from agentforge.chain import Chain, read_chain, run_chain
from agentforge.errors import AgentForgeError, BadInput
from agentforge.models import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
CHAINS = sorted((ROOT / "chains").glob("*.yaml"))
SETTINGS = ("rounding:bits=8,group=32", "rounding:bits=7,group=32", "rounding:bits=6,group=32")
COARSE = "ternary:rule=threshold,tau=2.5"  # 11 of 100 digits
SHAPES = {(192, 576): 60, (576, 576): 60, (1536, 576): 60, (576, 1536): 30}  # of SmolLM2-135M's linear layers, and how many


def three(gate: str = "retention >= 0.9", **more: Any) -> Chain:
    steps = [{"name": f"step {i}", "try": [setting], "gates": [gate]} for i, setting in enumerate(SETTINGS, 1)]
    return Chain.model_validate({"name": "three", "steps": steps, **more})


def decisions(result: module.Result) -> list[str]:
    return [row["decision"] for row in result.attempts]


def bits_of(result: module.Result) -> set[int]:
    assert result.artifact is not None
    result.artifact.verify()
    return {row["stage"]["bits"] for row in result.artifact.rows if row["stage"]}


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_the_files_are_chains_against_32_bits(path: Path) -> None:
    assert read_chain(path).bits == 32


def test_the_documented_bytes_are_met_on_smollm2() -> None:
    """2x, 40x, and 280x against 32 bits, from what the stages' layouts take on the model's shapes."""
    for step, ratio in zip(read_chain(ROOT / "chains/documented.yaml").steps, (2, 40, 280), strict=True):
        stage = stages.parse(step.settings[0].stage)
        stored = sum(n * bits(stage.layout(shape)) for shape, n in SHAPES.items()) + bits(stage.shared_layout())
        weights = sum(n * shape[0] * shape[1] for shape, n in SHAPES.items())
        assert weights == 106_168_320
        assert 32 * weights / stored >= ratio


def bits(layout: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(8 * stored_bytes(coding, math.prod(shape)) for coding, shape in layout.values())


def test_ratios_of_the_encoded_tensors(digits: LanguageModel, tmp_path: Path) -> None:
    gates = {"gates": ["touched_ratio >= 3.5"], "bits": 32}
    result = run_chain(digits, three("touched_step_ratio >= 1.05", **gates), tmp_path / "out", progress=False)
    assert result.finished
    made = [af.artifact.Artifact(tmp_path / f"out/step-{i}") for i in (1, 2, 3)]
    planes = [next(r.bytes for r in artifact.ratios if r.what == "touched tensors") for artifact in made]
    weights = sum(math.prod(weight.shape) for weight in digits.weights())
    before = 4 * weights
    for row, now in zip(result.attempts, planes, strict=True):
        assert row["measured"]["touched_ratio"]["value"] == pytest.approx(4 * weights / now)
        assert row["measured"]["touched_ratio"]["protocol"]["bits"] == 32
        assert row["measured"]["touched_step_ratio"]["value"] == pytest.approx(before / now)
        assert row["decode_seconds"] > 0
        before = now


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("fault", ["noise", "nan value", "nan error"])
def test_garbage_and_measurements_that_fail_are_not_handed_over(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, fault: str
) -> None:
    """Weights that are finite and mean nothing, and a retention that is NaN, or whose standard error is."""
    if fault == "noise":
        rounding = type(stages.get("rounding"))
        decode = rounding._decode

        def noise(stage: Any, packed: Any) -> torch.Tensor:
            dense: torch.Tensor = decode(stage, packed)
            return (
                torch.randn(dense.shape, generator=torch.Generator().manual_seed(0)) if stage.bits == 9 - failing else dense
            )

        monkeypatch.setattr(rounding, "_decode", noise)
    else:
        measure = module._Run._measure
        change = {"value": math.nan} if fault == "nan value" else {"stderr": math.nan}

        def spoiled(run: Any, artifact: Any, *rest: Any) -> Any:
            found = measure(run, artifact, *rest)
            if artifact.path.name == f"step-{failing}":
                found["retention"] = dataclasses.replace(found["retention"], **change)
            return found

        monkeypatch.setattr(module._Run, "_measure", spoiled)
    result = run_chain(digits, three(), tmp_path / "out", progress=False)
    assert not result.finished
    assert decisions(result) == ["accepted"] * (failing - 1) + ["rejected"]
    assert not (tmp_path / f"out/step-{failing}").exists()
    if failing == 1:
        assert result.artifact is None and not (tmp_path / "out/artifact").exists()
    else:
        assert bits_of(result) == {10 - failing}


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("where", ["stage", "measure", "load"])
def test_an_error_that_is_nobodys_input_stops_the_run_and_costs_nothing(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, where: str
) -> None:
    """A bug is not a failed gate: no row says "rejected", nothing is handed over, and mended, the run goes on."""
    spec, out = three(), tmp_path / "out"

    def struck(original: Any, when: Callable[..., bool]) -> Any:
        def strike(*args: Any, **more: Any) -> Any:
            if when(*args):
                raise RuntimeError("out of luck")
            return original(*args, **more)

        return strike

    with monkeypatch.context() as context:
        if where == "stage":
            rounding = type(stages.get("rounding"))
            strike = struck(rounding._encode, lambda stage, *_: stage.bits == 9 - failing)
            context.setattr(rounding, "_encode", strike)
        elif where == "measure":
            strike = struck(module._Run._measure, lambda _, artifact, *__: artifact.path.name == f"step-{failing}")
            context.setattr(module._Run, "_measure", strike)
        else:
            context.setattr(module, "load", struck(module.load, lambda path: Path(path).name == f"step-{failing}"))
        with pytest.raises(RuntimeError, match="out of luck"):
            run_chain(digits, spec, out, progress=False)
    rows = json.loads((out / "journal.json").read_text())["attempts"]
    assert [row["decision"] for row in rows] == ["accepted"] * (failing - 1)
    assert not (out / "artifact").exists()
    assert decisions(run_chain(digits, spec, out, progress=False)) == ["accepted"] * 3


def test_a_kill_while_the_artifact_is_handed_over(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copytree", "rmtree"):
        with monkeypatch.context() as context:

            def interrupted(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            context.setattr(module.shutil, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_chain(digits, three(), tmp_path / name, progress=False)
        assert not (tmp_path / name / "artifact").exists()
        assert bits_of(run_chain(digits, three(), tmp_path / name, progress=False)) == {6}


def test_what_was_handed_over_goes_when_it_fails_on_being_made_again(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert bits_of(run_chain(digits, three(), out, progress=False)) == {6}
    for step in (1, 2, 3):
        shutil.rmtree(out / f"step-{step}")
    monkeypatch.setattr(module.Condition, "decide", lambda *_: "failed")
    assert run_chain(digits, three(), out, progress=False).artifact is None
    assert not (out / "artifact").exists()


def test_weights_that_overflow_a_language_model_are_rejected(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight is finite, what the model makes of them is not."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, twice. " * 30, encoding="utf-8")
    rounding = type(stages.get("rounding"))
    decode = rounding._decode
    monkeypatch.setattr(rounding, "_decode", lambda stage, packed: decode(stage, packed).sign() * 1e38)
    spec = three("kl <= 1000", text=str(text), tokens=64, most_tokens=128)
    result = run_chain(tiny_llama, spec, tmp_path / "out", progress=False)
    assert result.artifact is None and decisions(result) == ["rejected"]
    assert math.isnan(result.attempts[0]["measured"]["kl"]["value"])


def test_compress_takes_a_chain_or_its_file(digits: LanguageModel, tmp_path: Path) -> None:
    spec = three()
    artifact = af.compress(digits, spec, out=tmp_path / "a", progress=False)
    assert artifact.path == tmp_path / "a/artifact"
    file = tmp_path / "chain.yaml"
    file.write_text(json.dumps(spec.model_dump(mode="json", by_alias=True)))
    for given in (file, str(file)):
        again = af.compress(digits, given, out=tmp_path / f"b-{type(given).__name__}", progress=False)
        assert again.sha256 == artifact.sha256
    assert af.compress("digits-mlp", stages.parse(SETTINGS[0]), tmp_path / "c", progress=False).verify()


def test_compress_raises_where_no_step_was_accepted(digits: LanguageModel, tmp_path: Path) -> None:
    gate = {"gates": ["retention >= 0.9"]}
    nothing = Chain.model_validate({"name": "none", "steps": [{"name": "coarse", "try": [COARSE], **gate}]})
    with pytest.raises(AgentForgeError, match=r"no step of the chain was accepted; coarse, .* retention >= 0\.9: failed"):
        af.compress(digits, nothing, tmp_path / "nothing", progress=False)
    steps = [{"name": "fine", "try": [SETTINGS[0]], **gate}, {"name": "coarse", "try": [COARSE], **gate}]
    part = Chain.model_validate({"name": "part", "steps": steps})
    artifact = af.compress(digits, part, tmp_path / "part", progress=False)  # the last accepted one
    assert {row["stage"]["stage"] for row in artifact.rows if row["stage"]} == {"rounding"}
    with pytest.raises(BadInput, match="cannot be read"):
        af.compress(digits, tmp_path / "absent.yml", tmp_path / "absent", progress=False)


def test_what_is_tracked_was_measured(digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    gate = {"gates": ["retention >= 0.9"]}
    steps = [
        {"name": "SeedLM", "try": ["seedlm:K=11,C=8,P=3"], **gate},
        {"name": "hyper", "try": ["curves:degree=7,segment=1171", SETTINGS[0]], **gate},
    ]
    spec = Chain.model_validate({"name": "tracked", "steps": steps})
    result = run_chain(digits, spec, tmp_path / "out", progress=False, track=tmp_path / "track")
    assert decisions(result) == ["accepted", "rejected", "accepted"]
    found = tracking.read(tmp_path / "track")
    first, hyper, last = (row["measured"] for row in result.attempts)
    assert found["seedlm/retention"] == first["retention"]["value"]
    assert found["seedlm/retention_stderr"] == first["retention"]["stderr"]
    assert found["seedlm/original_size_mb"] == digits.bytes_on_disk / 1e6
    assert found["seedlm/overall_passed"] == 1 and found["hypercompression/overall_passed"] == 0
    assert found["hypercompression/num_failed_benchmarks"] == 1
    assert found["compression/hyper_ratio"] == hyper["step_ratio"]["value"]
    assert found["hypercompression/original_size_mb"] == first["bytes"]["value"] / 1e6
    assert found["phase/failures"] == 1 and found["phase/success"] == 1 and found["phase/stages_completed"] == 2
    assert found["quality/accuracy_vs_phase1"] == last["total_retention"]["value"]
    assert found["performance/decompression_time_ms"] == 1e3 * result.attempts[2]["decode_seconds"]
    assert found["phase/duration_seconds"] == pytest.approx(sum(row["seconds"] for row in result.attempts))
    assert "quality/final_perplexity" not in found  # a classifier has none
    assert set(tracking.PHASE8_METRICS) - set(found) == {"quality/final_perplexity"}
    assert {name.format("seedlm") for name in tracking.PHASE8_STAGE_METRICS} <= set(found)
    pytest.importorskip("wandb")
    assert len(list((tmp_path / "track/wandb").glob("offline-run-*"))) == 1


def test_a_metric_without_a_value_is_not_tracked(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that cannot encode has a time and no size; where nothing was accepted, nothing is final."""
    rounding = type(stages.get("rounding"))

    def broken(*_: Any) -> Any:
        raise BadInput("weight: cannot be encoded")

    monkeypatch.setattr(rounding, "_encode", broken)
    file = tmp_path / "chain.yaml"
    file.write_text(json.dumps(three().model_dump(mode="json", by_alias=True)))
    command = ["agentforge", "pipeline", "digits-mlp", str(file), "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr("sys.argv", [*command, "--track", str(tmp_path / "track")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and json.loads(capsys.readouterr().out)["path"] is None
    found = tracking.read(tmp_path / "track")
    assert found["phase/success"] == 0 and found["phase/stages_completed"] == 0
    assert {name for name in found if name.startswith("rounding/")} == {"rounding/overall_passed", "rounding/seconds"}
    assert not {"size/final_mb", "compression/total_ratio", "performance/decompression_time_ms"} & set(found)


def test_the_benchmark_runs_a_documented_chain_once(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the end, at the documented bytes: 290x on the encoded tensors, and no better than guessing."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    benchmark = load_benchmark("chains")
    command = ["--only", "digits-mlp/documented_digits_go_on", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    benchmark.main(command)
    before = (tmp_path / "chains.json").read_bytes()
    (run,) = json.loads(before)
    ratios = [row["measured"]["touched_ratio"]["value"] for row in run["attempts"]]
    assert run["finished"] and [r >= limit for r, limit in zip(ratios, (2, 40, 280), strict=True)] == [True] * 3
    text = (tmp_path / "chains.md").read_text(encoding="utf-8")
    assert '"280x with 84%" on digits-mlp: at 290x on the encoded tensors' in text and "84% does not hold" in text
    monkeypatch.setattr(benchmark, "take", lambda *_: pytest.fail("taken again"))
    benchmark.main(command)
    assert (tmp_path / "chains.json").read_bytes() == before
    benchmark.main(["--report", "--out", str(tmp_path)])
    assert (tmp_path / "chains.md").read_text(encoding="utf-8") == text


def point(setting: str, bits: float, value: float, stderr: float = 0.01, chosen_by: float | None = None) -> dict[str, Any]:
    retention = {"value": value, "stderr": stderr, "n": 450, "unit": "share"}
    sizes = {"bits": bits, "model_bytes": int(100 * bits)}
    return {"setting": setting, "error": 0.1, "retention": retention, "chosen_by": chosen_by or value, **sizes}


def test_the_best_at_a_ratio_and_the_largest_that_holds(load_benchmark: Callable[[str], ModuleType]) -> None:
    ratios = load_benchmark("ratios")
    points = [point("a", 4, 0.99), point("b", 2, 0.999), point("c", 1, 0.9), point("d", 0.5, 0.85), point("e", 0.1, 0.1)]
    assert ratios.best(points, 2, 32)["setting"] == "b"  # smaller and better
    assert ratios.best(points, 20, 32)["setting"] == "c" and ratios.best(points, 20, 16)["setting"] == "d"
    assert ratios.best(points, 400, 32) is None
    assert ratios.best([point("x", 1, 0.9), point("y", 1, 0.8, chosen_by=1.0)], 2, 32)["setting"] == "y"
    assert ratios.largest(points)["setting"] == "c" and [ratios.decide(p) for p in points[2:]] == [
        "holds",
        "open",
        "does not hold",
    ]
    one = {"parameters": 1000, "file": 85, "chance": {"what": "guessing", "keeps": 0.1}}
    says = ratios.summary({"one": points}, {"one": one})
    assert "16.0x against 16 bits per weight (32.0x against 32): `c`, 0.900 [0.880, 0.920]" in says[0]
    assert says[0].endswith("The whole model: 20.00x against 16 bits, 0.85x against its file.")
    assert "(`e`, 320x); 84% does not hold; guessing keeps 0.100." in says[1]
    # The interval decides, where there is one: it need not be twice the standard error.
    wide = {**points[2], "retention": {**points[2]["retention"], "interval": [0.8, 1.0]}}
    assert ratios.decide(points[2]) == "holds" and ratios.decide(wide) == "open"
    assert says[-1] == '"280x with 84%" holds for neither model, by any setting measured here.'
    says = ratios.summary({"one": points, "other": [point("z", 0.1, 0.95)]}, {"one": one, "other": one})
    assert '"280x with 84%" holds for other, by' in says[-1]


def test_ratios_take_their_candidates_from_the_other_reports(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = load_benchmark("ratios")
    monkeypatch.setattr(ratios, "GRID", ["rounding:bits=3,group=32,clip=mse", "curves:degree=7,segment=1171"])
    share = {"stderr": 0.01, "n": 4088, "unit": "share", "protocol": {"context": 512, "windows": "8 of 600"}}
    stage = stages.parse("vptq:bits=3").to_json()
    row = {"recipe": {"stage": stage}, "bits": 3.5, "coded_bits": 3.4, "relative_error": 0.2, "model_bytes": 200}
    held = {**row, "retention": {"value": 0.8, **share}}
    first_tokens = {**row, "retention": {"value": 0.9, **share, "protocol": {"context": 2048}}}
    (tmp_path / "stages.json").write_text(json.dumps([row, held, first_tokens]))
    measured = {"touched_ratio": {"value": 288.0, "protocol": {"bits": 32}}, "error": {"value": 1.0}, "bytes": {"value": 50}}
    attempt = {
        "step": 3,
        "setting": {"stage": "curves|other"},
        "measured": measured | {"total_retention": {"value": 0.1, **share}},
    }
    run = {"recipe": {"model": "smollm2-135m", "file": "chains/documented.yaml"}, "attempts": [attempt, {"step": 4}]}
    (tmp_path / "chains.json").write_text(json.dumps([run]))
    budget = {"recipe": {"bits": 3.06}, "bits": 3.05, "relative_error": 0.2, "retention": {"value": 0.9, **share}}
    sizes = {"all 250 parameters at 16 bits": 500, "all 250 parameters at 32 bits": 1000, "GGUF file it was made from": 170}
    whole = [{"what": "whole model", "denominator": what, "denominator_bytes": size} for what, size in sizes.items()]
    budget |= {"ratios": whole, "weight_bytes": 200}
    (tmp_path / "fit.json").write_text(json.dumps([budget]))
    in_order = [
        budget | {"recipe": {"sequential": True, "recovery": {}, **limit}} for limit in ({"bits": 2.0}, {"bytes": 99})
    ]
    (tmp_path / "sequential.json").write_text(json.dumps(in_order))
    names = ("stages", "chains", "fit", "sequential", "peers")
    files = [part for name in names for part in (f"--{name}", str(tmp_path / f"{name}.json"))]
    files += ["--out", str(tmp_path)]
    ratios.main(files)
    record = json.loads((tmp_path / "ratios.json").read_text())
    language = record["points"]["smollm2-135m"]
    ours = ["fit to 3.06 bits", "fit to 2 bits, layer by layer, trained"]
    settings = [*ours, "vptq:bits=3", "vptq:bits=3, coded", "curves|other, step 3 of documented"]
    assert [p["setting"] for p in language] == settings
    assert language[2]["retention"]["value"] == pytest.approx(0.8)
    assert language[4]["bits"] == pytest.approx(32 / 288)
    assert record["about"]["smollm2-135m"] == {"parameters": 250, "file": 170, "chance": None}
    grid = {p["setting"]: p for p in record["points"]["digits-mlp"]}
    assert grid["rounding:bits=3,group=32,clip=mse"]["retention"]["value"] > 0.95
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "ratios.md").read_text(encoding="utf-8")
    assert "2 points of stages and chains were taken on other tokens or windows" in text and "84% does not hold" in text
    assert "| 2.50x | 0.85x |" in text  # the budget's 200 bytes, against 250 parameters and a file of 170 bytes
    monkeypatch.setattr(ratios, "measure", lambda *_: pytest.fail("measured again"))
    ratios.main(files)
