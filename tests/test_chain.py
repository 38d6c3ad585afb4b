"""Chains: what is handed over has passed its gates, whatever fails on the way, and a killed run loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import agentforge as af
from agentforge import chain as module
from agentforge import cli, stages
from agentforge.artifact import Artifact
from agentforge.chain import Chain, Condition, read_chain, run_chain
from agentforge.errors import AgentForgeError, BadInput
from agentforge.evaluation import Measurement
from agentforge.folders import locked
from agentforge.models import LanguageModel

FINE, COARSE = "rounding:bits=8,group=32", "ternary:rule=threshold,tau=2.5"  # 97 and 11 of 100 digits


def chain(*steps: dict[str, Any], **more: Any) -> Chain:
    return Chain.model_validate({"name": "test", "steps": list(steps), **more})


def step(*settings: Any, gates: tuple[str, ...] = ("retention >= 0.9",), name: str = "step") -> dict[str, Any]:
    return {"name": name, "try": list(settings), "gates": list(gates)}


def value(value: float, stderr: float | None) -> Measurement:
    return Measurement(value, "share", stderr, 100, {})


def hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def decisions(attempts: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(row["step"], row["attempt"], row["decision"]) for row in attempts]


@pytest.mark.parametrize(
    ("text", "measured", "decision"),
    [
        ("retention >= 0.98", value(0.99, 0.004), "passed"),
        ("retention >= 0.98", value(0.99, 0.006), "undecided"),
        ("retention >= 0.98", value(0.97, 0.006), "undecided"),
        ("retention >= 0.98", value(0.97, 0.004), "failed"),
        ("kl <= 0.1", value(0.05, 0.02), "passed"),
        ("kl <= 0.1", value(0.2, 0.04), "failed"),
        ("kl <= 0.1", value(math.nan, None), "failed"),
        ("ratio >= 2", value(2.0, None), "passed"),
        ("ratio >= 2", value(1.999, None), "failed"),
        ("kl <= 0.1", value(0.01, math.nan), "failed"),
    ],
)
def test_a_gate_decides_by_the_whole_interval(text: str, measured: Measurement, decision: str) -> None:
    assert Condition.parse(text).decide(measured) == decision


def test_steps_build_on_what_was_accepted(digits: LanguageModel, tmp_path: Path) -> None:
    """The second step encodes what the first one decodes to: its planes are those of `compress` on the loaded artifact."""
    result = run_chain(digits, chain(step(FINE), step("ternary", gates=("total_retention >= 0.5",))), tmp_path / "out")
    assert result.finished
    assert decisions(result.attempts) == [(1, 1, "accepted"), (2, 1, "accepted")]
    first = af.compress(digits, FINE, tmp_path / "first", progress=False)
    second = af.compress(af.load(first.path), "ternary", tmp_path / "second", progress=False)
    assert result.artifact is not None
    assert (result.artifact.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    measured = result.attempts[1]["measured"]
    whole = 2 * digits.parameters
    assert measured["bytes"]["value"] == second.weight_bytes
    assert measured["ratio"]["value"] == pytest.approx(whole / second.weight_bytes)
    assert measured["step_ratio"]["value"] == pytest.approx(first.weight_bytes / second.weight_bytes)
    accuracies = [af.accuracy(m).value for m in (digits, af.load(first.path), af.load(second.path))]
    assert measured["accuracy"]["value"] == accuracies[2]
    assert measured["retention"]["value"] == pytest.approx(accuracies[2] / accuracies[1])
    assert measured["total_retention"]["value"] == pytest.approx(accuracies[2] / accuracies[0])
    lost = power = 0.0
    for weight in digits.weights():
        a, b = digits.tensor(weight.name).double(), af.load(second.path).tensor(weight.name).double()
        lost, power = lost + float(((a - b) ** 2).sum()), power + float((a**2).sum())
    assert measured["error"]["value"] == pytest.approx(math.sqrt(lost / power))


def test_a_language_model_is_measured_against_the_step_before_and_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, twice. " * 30, encoding="utf-8")
    gates = ("kl <= 100", "perplexity_retention >= 0.001")
    steps = [step("rounding:bits=4,group=16", gates=gates), step("rounding:bits=3,group=16", gates=gates)]
    model = af.open_model(tiny_llama)
    result = run_chain(model, chain(*steps, text=str(path), tokens=100), tmp_path / "out", progress=False)
    assert result.finished
    first, second = (row["measured"] for row in result.attempts)
    found = af.divergence(
        af.load(tmp_path / "out/artifact"), model, str(path), context=model.context or 0, tokens=100, progress=False
    )
    assert second["kl"]["n"] == 100
    assert second["perplexity"]["value"] == pytest.approx(found.perplexity.value, rel=1e-6)
    ratio = found.original_perplexity.value / second["perplexity"]["value"]
    assert second["total_perplexity_retention"]["value"] == pytest.approx(ratio)
    ratio = first["perplexity"]["value"] / second["perplexity"]["value"]
    assert second["perplexity_retention"]["value"] == pytest.approx(ratio)


def test_the_ladder_is_climbed_and_the_failures_stay_in_the_journal(digits: LanguageModel, tmp_path: Path) -> None:
    result = run_chain(digits, chain(step(COARSE, "rounding:bits=3,group=32", FINE)), tmp_path / "out", progress=False)
    assert result.finished and result.artifact is not None
    assert result.attempts[0]["decision"] == "rejected"
    assert "retention >= 0.9: failed" in result.attempts[0]["reason"]
    assert result.attempts[-1]["decision"] == "accepted"
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {"journal.json", "step-1", "artifact"}
    assert json.loads((tmp_path / "out/journal.json").read_text())["attempts"] == result.attempts


def test_the_journal_says_what_is_being_done(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def watched(original: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append(json.loads((tmp_path / "out/journal.json").read_text()))
            return original(*args, **kwargs)

        return called

    monkeypatch.setattr(module, "compress", watched(module.compress))
    monkeypatch.setattr(module._Run, "_measure", watched(module._Run._measure))
    with caplog.at_level("INFO", "agentforge.chain"):
        run_chain(digits, chain(step(COARSE, FINE)), tmp_path / "out", progress=False)
    said = [(found["now"]["attempt"], found["now"]["doing"]) for found in seen]
    assert said == [(1, "encoding"), (1, "measuring"), (2, "encoding"), (2, "measuring")]
    assert [len(found["attempts"]) for found in seen] == [0, 0, 1, 1]
    last = json.loads((tmp_path / "out/journal.json").read_text())
    assert last["now"] is None
    assert sum(last["original"]["tensors"].values()) == digits.parameters and last["original"]["name"] == "digits-mlp"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[2].startswith("step, try 1: rejected: retention >= 0.9: failed") and lines[-1] == "step, try 2: accepted"


@pytest.mark.parametrize("on_failure", ["stop", "go_on"])
def test_a_step_that_fails_is_rolled_back(digits: LanguageModel, tmp_path: Path, on_failure: str) -> None:
    last = step("rounding:bits=6,group=32")
    result = run_chain(digits, chain(step(FINE), step(COARSE), last, on_failure=on_failure), tmp_path / "out")
    assert not result.finished
    assert result.artifact is not None and result.artifact.verify()
    expected = {"stop": [(1, 1, "accepted"), (2, 1, "rejected")]}
    expected["go_on"] = [*expected["stop"], (3, 1, "accepted")]
    assert decisions(result.attempts) == expected[on_failure]
    bits = {row["stage"]["bits"] for row in result.artifact.rows if row["stage"]}
    assert bits == ({8} if on_failure == "stop" else {6})
    assert af.accuracy(af.load(result.artifact.path)).value > 0.9


def test_where_nothing_passes_nothing_is_handed_over(digits: LanguageModel, tmp_path: Path) -> None:
    result = run_chain(digits, chain(step(COARSE, COARSE)), tmp_path / "out", progress=False)
    assert result.artifact is None and not result.finished
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.json"]


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("fault", ["gate", "stage", "not finite"])
def test_no_fault_hands_over_what_failed(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, fault: str
) -> None:
    """A fault is injected into step `failing` of three: what comes out is the step before, bit for bit."""
    settings = [FINE, "rounding:bits=7,group=32", "rounding:bits=6,group=32"]
    spec = chain(*(step(setting) for setting in settings))
    rounding = type(stages.get("rounding"))
    bits = 9 - failing
    if fault == "gate":
        decide = Condition.decide
        calls: list[int] = []

        def fails(condition: Condition, measured: Measurement) -> str:
            calls.append(1)
            return "failed" if len(calls) == failing else decide(condition, measured)

        monkeypatch.setattr(Condition, "decide", fails)
    else:
        encode, decode = rounding._encode, rounding._decode

        def broken(stage: Any, *rest: Any) -> Any:
            if stage.bits == bits and fault == "stage":
                raise BadInput("weight: cannot be encoded")
            return encode(stage, *rest)

        def bad(stage: Any, packed: Any) -> Any:
            dense = decode(stage, packed)
            return dense / 0 if stage.bits == bits and fault == "not finite" else dense

        monkeypatch.setattr(rounding, "_encode", broken)
        monkeypatch.setattr(rounding, "_decode", bad)
    result = run_chain(digits, spec, tmp_path / "out", progress=False)
    assert not result.finished
    assert decisions(result.attempts) == [(i, 1, "accepted") for i in range(1, failing)] + [(failing, 1, "rejected")]
    assert not list((tmp_path / "out").glob("*.partial"))
    if failing == 1:
        assert result.artifact is None and not (tmp_path / "out/artifact").exists()
        return
    monkeypatch.undo()
    expected = run_chain(digits, chain(*(step(s) for s in settings[: failing - 1])), tmp_path / "expected", progress=False)
    assert hashes(tmp_path / "out/artifact") == hashes(tmp_path / "expected/artifact")
    assert expected.finished


def test_an_undecided_gate_asks_for_more_text_and_is_then_not_accepted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    divergence = module.evaluation.divergence

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["tokens"])
        return divergence(*args, **kwargs)

    monkeypatch.setattr(module.evaluation, "divergence", watched)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, twice. " * 60, encoding="utf-8")
    model = af.open_model(tiny_llama)
    exact = divergence(model, model, str(text), context=model.context or 0, tokens=200, progress=False).perplexity.value
    # At any number of tokens the limit is within two standard errors of the value.
    gate = f"perplexity <= {exact:.6g}"
    spec = chain(step("rounding:bits=8,group=16", gates=(gate,)), text=str(text), tokens=50, most_tokens=250)
    result = run_chain(model, spec, tmp_path / "out", progress=False)
    assert seen == [50, 100, 200]
    assert not result.finished and result.artifact is None
    assert result.attempts[0]["gates"] == {gate: "undecided"}


def test_a_killed_run_goes_on_to_the_same_bytes(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = chain(step(COARSE, FINE), step("rounding:bits=6,group=32"))
    whole = run_chain(digits, spec, tmp_path / "whole", progress=False)
    made = []
    for at in range(9):  # at every one of the moments between which something is written
        calls: list[int] = []

        def strike(original: Any, at: int = at, calls: list[int] = calls) -> Any:
            def struck(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) == at + 1:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return struck

        out = tmp_path / f"out-{at}"
        with monkeypatch.context() as context:
            context.setattr(module, "compress", strike(module.compress))
            context.setattr(module._Run, "_measure", strike(module._Run._measure))
            context.setattr(module._Journal, "add", strike(module._Journal.add))
            with pytest.raises(KeyboardInterrupt):
                run_chain(digits, spec, out, progress=False)
        context_calls: list[str] = []

        def counted(model: Any, stage: str, *rest: Any, made: list[str] = context_calls, **more: Any) -> Any:
            made.append(stage)
            return af.compress(model, stage, *rest, **more)

        with monkeypatch.context() as context:
            context.setattr(module, "compress", counted)
            again = run_chain(digits, spec, out, progress=False)
        made.append(len(context_calls))
        assert decisions(again.attempts) == decisions(whole.attempts)
        assert hashes(out / "artifact") == hashes(tmp_path / "whole/artifact")
    assert made == [3, 3, 3, 2, 2, 2, 1, 1, 1]  # what the journal has is not done again
    assert run_chain(digits, spec, tmp_path / "whole", progress=False).attempts == whole.attempts


def test_an_accepted_artifact_that_was_damaged_is_made_again(digits: LanguageModel, tmp_path: Path) -> None:
    spec = chain(step(FINE), step("rounding:bits=6,group=32"))
    run_chain(digits, spec, tmp_path / "out", progress=False)
    before = hashes(tmp_path / "out/artifact")
    (tmp_path / "out/step-1/agentforge.json").unlink()
    assert run_chain(digits, spec, tmp_path / "out", progress=False).finished
    assert hashes(tmp_path / "out/artifact") == before
    weights = tmp_path / "out/artifact/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert run_chain(digits, spec, tmp_path / "out", progress=False).finished  # never handed over unseen
    assert hashes(tmp_path / "out/artifact") == before


def test_a_full_disk_is_no_failed_gate(digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = chain(step(FINE, "ternary"))
    with monkeypatch.context() as context:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        context.setattr(af.artifact.Writer, "finish", full)
        with pytest.raises(AgentForgeError, match="No space left on device"):
            run_chain(digits, spec, tmp_path / "out", progress=False)
    result = run_chain(digits, spec, tmp_path / "out", progress=False)
    assert decisions(result.attempts) == [(1, 1, "accepted")]


def test_another_chain_does_not_take_up_a_run(digits: LanguageModel, tmp_path: Path) -> None:
    run_chain(digits, chain(step(FINE)), tmp_path / "out", progress=False)
    with pytest.raises(BadInput, match="holds a run with another chain"):
        run_chain(digits, chain(step("ternary")), tmp_path / "out", progress=False)
    result = run_chain(digits, chain(step("ternary", gates=())), tmp_path / "out", overwrite=True, progress=False)
    assert result.finished and len(result.attempts) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(BadInput, match=r"is in the way and not a (chain|folder)"):
            run_chain(digits, chain(step(FINE)), tmp_path / "mine", overwrite=overwrite, progress=False)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    with pytest.raises(BadInput, match=r"is in the way and not a (chain|folder)"):
        run_chain(digits, chain(step(FINE)), tmp_path / "mine/letter.txt", overwrite=True, progress=False)


def test_one_run_at_a_time(digits: LanguageModel, tmp_path: Path) -> None:
    writing = "another agentforge is writing it"
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", tmp_path / "out"), pytest.raises(BadInput, match=writing):
        run_chain(digits, chain(step(FINE)), tmp_path / "out", progress=False)
    (tmp_path / "out/journal.json").write_text("{")
    for _ in range(2):  # a refusal holds no lock
        with pytest.raises(BadInput, match=r"journal\.json"):
            run_chain(digits, chain(step(FINE)), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "no valid YAML"),
        ("- 1", "top level"),
        ("{name: a, steps: []}", "steps"),
        ("{name: a, steps: [{name: b, try: []}]}", "steps, 1, try"),
        ("{name: a, steps: [{name: b, try: [nothing]}]}", "stage 'nothing'"),
        ("{name: a, steps: [{name: b, try: ['rounding:bits=99']}]}", "bits=99"),
        ("{name: a, steps: [{name: b, try: [ternary], gates: ['kl < 1']}]}", "gate 'kl < 1'; expected a condition"),
        ("{name: a, steps: [{name: b, try: [ternary], gates: ['joy >= 1']}]}", "expected a condition"),
        ("{name: a, steps: [{name: b, try: [ternary], gates: ['kl >= nan']}]}", "expected a condition"),
        ("{name: a, steps: [{name: b, try: [ternary]}], gates: ['kl']}", "gates"),
        ("{name: a, steps: [{name: b, try: [ternary]}], on_failure: panic}", "on_failure"),
        ("{name: a, steps: [{name: b, try: [ternary], other: 1}]}", "other"),
        ("!!python/object/apply:os.system [echo]", "not plain data"),
        ("[" * 5000, "nested more than"),
        ("{name: a, steps: [{name: b, try: [ternary]}], tokens: 1" + "0" * 400 + "}", "line 1: 1000"),
        ("name: a\nname: b", "line 2: 'name' is there twice"),
    ],
)
def test_a_file_that_is_no_chain_is_refused_and_the_place_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        read_chain(file)
    assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_gates_on_what_a_model_does_not_have_are_refused(digits: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="digits-mlp is a classifier"):
        run_chain(digits, chain(step(FINE, gates=("kl <= 1",))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="cannot be read"):
        read_chain(tmp_path / "absent.yaml")


def test_the_command_line_runs_a_chain_and_fails_with_it(
    digits: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(
        "name: two\nsteps:\n  - {name: fine, try: ['rounding:bits=8']}\n"
        "  - {name: coarse, try: [{stage: 'ternary:rule=threshold,tau=2.5', calibration_tokens: 64}]}\n"
        "gates: ['retention >= 0.9']\n"
    )

    def run(*more: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr(
            "sys.argv", ["agentforge", "pipeline", "digits-mlp", str(file), "--out", str(tmp_path / "out"), *more]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    code, printed = run("--json")
    found = json.loads(printed)
    assert code == 1 and not found["finished"]
    assert decisions(found["attempts"]) == [(1, 1, "accepted"), (2, 1, "rejected")]
    assert Artifact(found["path"]).verify()
    monkeypatch.setenv("COLUMNS", "200")
    code, printed = run()
    assert code == 1 and "coarse, try 1: retention >= 0.9: failed" in printed and "rejected" in printed


def test_texts_are_in_the_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    """The same path with another text is another run."""
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    spec = chain(step("ternary", gates=()), text=str(file), tokens=50)
    run_chain(tiny_llama, spec, tmp_path / "out", progress=False)
    file.write_text("the lazy dog jumps over the quick brown fox. " * 30)
    with pytest.raises(BadInput, match="another text"):
        run_chain(tiny_llama, spec, tmp_path / "out", progress=False)


def test_a_kill_between_handing_over_and_cleaning_up_leaves_nothing(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = chain(step("rounding:bits=8", gates=())), tmp_path / "out"

    def killed(made: Path, final: Path) -> None:
        os.replace(made, final)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("agentforge.chain.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_chain(digits, spec, out, progress=False)
    assert (out / "artifact.partial").exists()
    run_chain(digits, spec, out, progress=False)
    assert not (out / "artifact.partial").exists()


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    """AGENTFORGE_KILLS (default 5) kills between the moment the journal is there and the end of the run."""
    settings = ["ternary:rule=threshold,tau=2.5", "seedlm:K=11,C=8,P=3", "vptq:v=4,k=64", "rounding:bits=4,group=32"]
    file = tmp_path / "chain.yaml"
    steps = [{"name": s, "try": [s], "gates": ["total_retention >= 0.5"]} for s in settings]
    file.write_text(json.dumps({"name": "kills", "steps": steps, "on_failure": "go_on"}))

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "agentforge", "pipeline", "digits-mlp", str(file), "--out", str(out), "--json"]
        journal = out / "journal.json"
        before = journal.stat().st_mtime_ns if journal.is_file() else None
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not (journal.is_file() and journal.stat().st_mtime_ns != before):
            time.sleep(0.001)  # a run writes its journal when it begins
        return process

    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    process = start(whole)
    began = time.monotonic()
    said = process.communicate(timeout=300)[0]
    seconds = time.monotonic() - began
    assert process.returncode == 1 and [d for *_, d in decisions(json.loads(said)["attempts"])] == ["rejected"] + 3 * [
        "accepted"
    ]
    expected, kills, finished = hashes(whole / "artifact"), 0, []
    while kills < int(os.environ.get("AGENTFORGE_KILLS", "5")):
        fresh = not killed.exists()
        process = start(killed)
        time.sleep(rng.uniform(seconds / 2, seconds) if kills % 2 else rng.uniform(0, seconds / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            journal = killed / "journal.json"
            finished.append(len(json.loads(journal.read_text())["attempts"]) if journal.is_file() else 0)
        if process.returncode == 1:  # it was through before the kill: again from the beginning
            assert hashes(killed / "artifact") == expected
            shutil.rmtree(killed)
            seconds *= 0.8 if fresh else 1  # the machine is faster than it was: else no kill might come in time
    process = start(killed)
    assert process.communicate(timeout=300)[0] and process.returncode == 1
    print(f"attempts finished at each kill: {finished}")
    assert hashes(killed / "artifact") == expected
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
