"""The command line: every command as tables and as JSON, its exit codes, and one sentence where something is wrong."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import agentforge
from agentforge import cli
from agentforge.artifact import MANIFEST
from agentforge.errors import AgentForgeError
from agentforge.models import LanguageModel


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]
NO_MEMORY = "agentforge: out of memory; free some or raise the limit (--workers 1 needs the least, if the command has it)\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["agentforge", *map(str, args)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, digits: LanguageModel) -> Path:
    """An artifact of digits-mlp."""
    out = tmp_path_factory.mktemp("cli") / "small"
    agentforge.compress(digits, "rounding:bits=4,group=64", out, progress=False)
    return out


def assert_refused(result: Result, code: int, *parts: str) -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("agentforge: ")
    assert len(result.err.splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err


# models


def test_models_lists_the_names(run: Run) -> None:
    result = run("models")
    assert (result.code, result.err) == (0, "")
    assert "smollm2-135m" in result.out
    assert "digits-mlp" in result.out
    said = run("models", "--json")
    assert said.code == 0
    assert set(said.json["models"]) == {"smollm2-135m", "digits-mlp"}


def test_models_shows_a_model(run: Run, tiny_llama: Path) -> None:
    result = run("models", tiny_llama)
    assert (result.code, result.err) == (0, "")
    assert "model.layers.1.self_attn.k_proj.weight" in result.out
    assert "32 x 64" in result.out
    assert "token embedding: kept unless embeddings are asked for" in result.out
    said = run("models", tiny_llama, "--json").json
    assert len(said["weights"]) == 14
    assert said["weights"]["model.layers.0.mlp.down_proj.weight"] == [64, 128]
    assert "model.embed_tokens.weight" in said["kept"]
    assert said["touched_parameters"] == sum(a * b for a, b in said["weights"].values())
    opened = agentforge.open_model(tiny_llama)
    assert said["parameters"] == opened.parameters
    more = run("models", tiny_llama, "--json", "--embeddings").json
    assert set(more["weights"]) - set(said["weights"]) == {"model.embed_tokens.weight"}
    assert more["parameters"] == said["parameters"]


# compress, inspect, verify


def test_compress_as_json(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "a"
    result = run("compress", "digits-mlp", "--stage", "rounding:bits=4,group=32", "--out", out, "--json")
    assert (result.code, result.err) == (0, "")
    said = result.json
    artifact = agentforge.artifact.Artifact(out)
    assert said["path"] == str(out)
    assert said["stage"] == {"stage": "rounding", "bits": 4, "group": 32, "symmetric": False, "clip": "none"}
    assert said["ratios"] == [r.to_json() for r in artifact.ratios]
    for ratio in said["ratios"]:
        assert ratio["ratio"] == ratio["denominator_bytes"] / ratio["bytes"]
    assert said["ratios"][0]["bytes"] == os.stat(out / "model.safetensors").st_size
    assert 0 < said["seconds"] < 3600
    assert 50e6 < said["peak_memory_bytes"] < 1e12


def test_compress_as_a_table(run: Run, tmp_path: Path) -> None:
    result = run("compress", "digits-mlp", "--stage", "ternary", "--out", tmp_path / "a")
    assert result.code == 0
    assert "2 of 6 tensors encoded" in re.sub(r"\s+", " ", result.out)
    artifact = agentforge.artifact.Artifact(tmp_path / "a")
    for ratio in artifact.ratios:
        assert f"{ratio.bytes:,}" in result.out
        assert f"{ratio.ratio:.3f}x" in result.out
    assert "ternary:rule=absmean" in result.out


def test_compress_takes_its_options(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "a"
    result = run(
        "compress", "digits-mlp", "--stage", "ternary", "--out", out, "--embeddings", "--seed", 3, "--workers", 1, "--json"
    )
    assert result.code == 0
    recipe = agentforge.artifact.Artifact(out).manifest["recipe"]
    assert (recipe["embeddings"], recipe["seed"]) == (True, 3)
    assert_refused(run("compress", "digits-mlp", "--stage", "rounding", "--out", out, "--json"), 2, "--overwrite")
    assert run("compress", "digits-mlp", "--stage", "rounding", "--out", out, "--overwrite", "--json").code == 0
    assert agentforge.artifact.Artifact(out).manifest["recipe"]["stage"]["stage"] == "rounding"


def test_inspect(run: Run, small: Path) -> None:
    artifact = agentforge.artifact.Artifact(small)
    said = run("inspect", small, "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["tensors"] == artifact.rows
    assert said.json["recipe"] == artifact.manifest["recipe"]
    assert said.json["original"]["name"] == "digits-mlp"
    assert said.json["ratios"] == [r.to_json() for r in artifact.ratios]
    result = run("inspect", small)
    assert (result.code, result.err) == (0, "")
    for row in artifact.rows:
        assert row["name"] in result.out
        assert f"{row['bytes']:,}" in result.out
        count = 1
        for size in row["shape"]:
            count *= size
        assert f"{row['bits'] / count:.4f}" in result.out
    assert "made from digits-mlp" in result.out


def test_verify(run: Run, small: Path, tmp_path: Path) -> None:
    result = run("verify", small)
    assert (result.code, result.err) == (0, "")
    assert "sound" in result.out
    said = run("verify", small, "--json")
    assert said.code == 0
    assert said.json["ok"] is True
    assert len(said.json["checked"]) == 3


@pytest.mark.parametrize("name", ["a [bold]b", "[/nothing]", "[red]", "ü 重"])
def test_folders_may_have_any_name(run: Run, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    out.parent.mkdir(parents=True, exist_ok=True)
    result = run("compress", "digits-mlp", "--stage", "ternary", "--out", out)
    assert result.code == 0
    assert "".join(name.split()) in "".join(result.out.split())  # a long path is wrapped
    result = run("verify", out)
    assert result.code == 0
    assert "".join(name.split()) in "".join(result.out.split())
    assert run("inspect", out).code == 0


def test_verify_of_something_damaged(run: Run, small: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(small, folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert_refused(run("verify", folder), 1, "sha256")
    said = run("verify", folder, "--json")
    assert said.code == 1
    assert said.err == ""
    assert said.json["ok"] is False
    assert "sha256" in said.json["error"]


# evaluate


def test_evaluate_a_classifier(run: Run, small: Path) -> None:
    said = run("evaluate", small, "--against", "digits-mlp", "--json")
    assert (said.code, said.err) == (0, "")
    measured = said.json["measurements"]
    assert set(measured) == {"accuracy", "accuracy of the original"}
    assert measured["accuracy"]["n"] == 450
    assert measured["accuracy of the original"]["value"] > 0.95
    assert measured["accuracy"]["value"] == agentforge.accuracy(agentforge.load(small)).value
    assert set(run("evaluate", small, "--json").json["measurements"]) == {"accuracy"}
    table = run("evaluate", small, "--against", "digits-mlp")
    assert table.code == 0
    assert f"{measured['accuracy']['value']:.5g}" in table.out


def test_evaluate_a_language_model(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    assert run("compress", tiny_llama, "--stage", "rounding:bits=3", "--out", tmp_path / "a", "--json").code == 0
    asked = ("--text", text, "--context", 64, "--json")
    said = run("evaluate", tmp_path / "a", "--against", tiny_llama, *asked)
    assert (said.code, said.err) == (0, "")
    measured = said.json["measurements"]
    assert set(measured) == {"perplexity", "perplexity of the original", "KL(original || model)", "top-1 agreement"}
    assert measured["KL(original || model)"]["value"] > 0
    assert 0 < measured["top-1 agreement"]["value"] <= 1
    assert measured["perplexity"]["value"] != measured["perplexity of the original"]["value"]
    alone = run("evaluate", tmp_path / "a", *asked).json["measurements"]
    assert alone["perplexity"]["value"] == pytest.approx(measured["perplexity"]["value"], rel=1e-6)
    same = run("evaluate", tiny_llama, "--against", tiny_llama, *asked).json["measurements"]
    assert same["KL(original || model)"]["value"] == pytest.approx(0, abs=1e-9)
    assert same["top-1 agreement"]["value"] == 1
    fewer = run("evaluate", tiny_llama, "--text", text, "--context", 64, "--tokens", 40, "--json").json["measurements"]
    assert fewer["perplexity"]["n"] == 40
    table = run("evaluate", tmp_path / "a", "--against", tiny_llama, "--text", text, "--context", 64)
    assert table.code == 0
    assert "top-1 agreement" in table.out
    assert f"{measured['perplexity']['value']:.5g}" in table.out


def test_evaluate_the_phase_5_checks(run: Run, wide_llama: Path, tmp_path: Path) -> None:
    assert run("compress", wide_llama, "--stage", "rounding:bits=3", "--out", tmp_path / "a", "--json").code == 0
    said = run("evaluate", tmp_path / "a", "--against", wide_llama, "--phase5", "--json")
    assert (said.code, said.err) == (0, "")
    edge, rules = said.json["edge_of_chaos"], said.json["eudaimonia"]
    assert edge["at"] == edge["original"]["at"] and edge["accuracy"]["n"] == 400
    assert set(rules["score"]) == set(rules["retention"]) == {"autonomy", "honesty", "harm", "dignity"}
    refused = run("evaluate", wide_llama, "--phase5", "--tokens", 40)
    assert refused.code == 2 and "--phase5 asks its own questions" in refused.err


# What is wrong


def test_bad_input_is_one_sentence_and_exit_code_2(run: Run, small: Path, tmp_path: Path, tiny_llama: Path) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "short.txt").write_text("a")
    assert_refused(run("models", "nonsense"), 2, "'nonsense' does not exist", "smollm2-135m")
    assert_refused(run("models", "nonsense", "--json"), 2, "'nonsense'")
    assert_refused(run("compress", "nonsense", "--stage", "ternary", *out), 2, "'nonsense'")
    assert_refused(run("compress", "digits-mlp", "--stage", "magic", *out), 2, "'magic'", "ternary")
    assert_refused(run("compress", "digits-mlp", "--stage", "rounding:bits=9", *out), 2, "bits=9", "2 to 8")
    assert_refused(run("compress", "digits-mlp", "--stage", "rounding:magic=1", *out), 2, "'magic'", "group")
    assert_refused(run("compress", "digits-mlp", "--stage", "rounding:bits", *out), 2, "setting=value")
    assert_refused(run("compress", "digits-mlp", "--stage", "ternary", *out, "--workers", 0), 2, "workers=0")
    assert_refused(run("compress", "digits-mlp", "--stage", "ternary", *out, "--device", "nowhere"), 2, "device 'nowhere'")
    assert_refused(run("compress", "digits-mlp", "--stage", "ternary", "--out", tmp_path), 2, str(tmp_path))
    assert_refused(run("inspect", tmp_path / "missing"), 2, "missing")
    assert_refused(run("inspect", tmp_path), 2, "agentforge.json is missing")
    assert_refused(run("verify", tmp_path / "missing"), 2, "no such folder")
    assert_refused(run("verify", tmp_path), 1, "agentforge.json is missing")
    assert_refused(run("evaluate", "nonsense"), 2, "'nonsense'")
    assert_refused(run("evaluate", small, "--against", "nonsense"), 2, "'nonsense'")
    assert_refused(run("evaluate", tiny_llama, "--text", tmp_path / "missing.txt"), 2, "missing.txt")
    assert_refused(run("evaluate", tiny_llama, "--text", tmp_path / "short.txt", "--context", 64), 2, "short.txt")
    assert_refused(
        run("evaluate", tiny_llama, "--text", tmp_path / "short.txt", "--context", 1 << 20), 2, "at most 128 tokens"
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_comparing_what_cannot_be_compared(run: Run, small: Path, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 10)
    assert_refused(run("evaluate", small, "--against", tiny_llama), 2)
    assert_refused(run("evaluate", tiny_llama, "--against", "digits-mlp", "--text", text, "--context", 64), 2)


@pytest.mark.parametrize(
    "args",
    [
        ["magic"],
        ["compress"],
        ["compress", "digits-mlp"],
        ["compress", "digits-mlp", "--stage", "ternary"],
        ["compress", "digits-mlp", "--stage", "ternary", "--out", "x", "--magic"],
        ["compress", "digits-mlp", "--stage", "ternary", "--out", "x", "--workers", "many"],
        ["inspect"],
        ["verify"],
        ["verify", "a", "b"],
        ["evaluate"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(run: Run, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.code == 2
    assert result.out == ""
    assert "Usage:" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--help"], ["compress", "--help"], ["verify", "--help"]], ids=" ".join)
def test_help_exits_with_0(run: Run, args: list[str]) -> None:
    result = run(*args)
    assert (result.code, result.err) == (0, "")
    assert "Usage:" in result.out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "agentforge: interrupted; the same command starts again\n"),
        (MemoryError(), 2, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, NO_MEMORY),
        (RuntimeError("can't start new thread"), 2, NO_MEMORY),
        (OSError(28, "No space left on device", "/x/y"), 2, "agentforge: /x/y: No space left on device\n"),
        (OSError("odd"), 2, "agentforge: input or output: odd\n"),
        (AgentForgeError("something is wrong"), 2, "agentforge: something is wrong\n"),
    ],
    ids=["interrupt", "memory", "torch", "threads", "disk", "odd", "ours"],
)
def test_what_goes_wrong_midway(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("agentforge.opening.open_model", fail)
    assert run("models", "digits-mlp") == Result(code, "", message)


@pytest.mark.parametrize("base", [ZeroDivisionError, type("PanicException", (BaseException,), {})])
def test_a_bug_is_one_sentence_that_says_where(run: Run, monkeypatch: pytest.MonkeyPatch, base: Any) -> None:
    def fail(*_: object) -> None:
        raise base("a bug")

    monkeypatch.setattr("agentforge.opening.open_model", fail)
    result = run("models", "digits-mlp")
    assert_refused(
        result, 70, f"{base.__name__}: a bug (test_cli.py, line ", "this is a bug of agentforge", "PYTHONDEVMODE=1"
    )


def test_a_developer_sees_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("agentforge.opening.open_model", fail)
    monkeypatch.setattr("agentforge.cli.sys", SimpleNamespace(**{**vars(sys), "flags": SimpleNamespace(dev_mode=True)}))
    with pytest.raises(ZeroDivisionError):
        run("models", "digits-mlp")


def test_what_comes_from_files_steers_no_terminal(run: Run, small: Path, tmp_path: Path) -> None:
    """Names in a manifest, as JSON, in tables and in the sentence of an error."""
    evil = "a\x1b]0;PWNED\x07\x9b31m\u202e[red]b[/red]\nsound: all is well"
    folder = Path(shutil.copytree(small, tmp_path / "evil"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["original"]["name"] = evil
    manifest.pop("sha256", None)  # of the manifest itself, which older ones do not have
    (folder / MANIFEST).write_text(json.dumps(manifest))
    odd = tmp_path / "\x1b[31m\u202enone"
    said = [run("inspect", folder), run("inspect", folder, "--json"), run("verify", folder), run("verify", odd)]
    said += [run("inspect", odd), run("models", odd), run("evaluate", odd)]
    for result in said:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", result.out + result.err)
        assert "\nsound: all is well" not in result.out
    assert "[red]b[/red]" in re.sub(r"\s", "", said[0].out) and r"\x1b" in said[0].out
    assert said[1].json["original"]["name"] == evil


@pytest.mark.parametrize("command", [["compress", "--stage", "ternary"], ["fit", "--bits", "3"], ["recover"], ["pipeline"]])
def test_an_out_that_cannot_be_written_is_told_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened before --out was looked at")

    monkeypatch.setattr("agentforge.opening.open_model", worked)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    args = [command[0], "digits-mlp", *(["x.yaml"] if command[0] == "pipeline" else []), *command[1:]]
    refused = (("file", "is not a folder"), ("file/below/x", "is not a folder"), ("/proc/x/y", "/proc cannot be written"))
    for where, why in refused:
        assert_refused(run(*args, "--out", tmp_path / where), 2, "--out", why, "choose another --out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_fit_tells_of_a_folder_in_the_way_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("statistics were collected before --out was looked at")

    monkeypatch.setattr("agentforge.allocation.collect", worked)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/thesis.tex").write_text("x")
    for asked in (["--bits", "3"], ["--bits", "3", "--overwrite"], ["--max-kl", "1"], ["--max-kl", "1", "--overwrite"]):
        assert_refused(run("fit", tiny_llama, *asked, "--out", tmp_path / "theirs"), 2, "theirs")
    assert (tmp_path / "theirs/thesis.tex").read_text() == "x"


def test_recover_tells_of_a_window_beyond_the_model_before_the_work(run: Run, tmp_path: Path, tiny_llama: Path) -> None:
    result = run("recover", tiny_llama, "--window", "129", "--out", tmp_path / "out")
    assert_refused(result, 2, "context=129", "takes at most 128 tokens")
    assert not (tmp_path / "out").exists()


# What a command says when it is interrupted, and how it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        (["compress", "digits-mlp", "--stage", "ternary", "--out", "x"], True),
        (["fit", "digits-mlp", "--bits=3", "--out", "x"], True),
        (["fit", "digits-mlp", "--max-kl", "1", "--out", "x"], False),
        (["recover", "digits-mlp", "--out", "x"], True),
        (["evaluate", "digits-mlp"], False),
        (["models", "digits-mlp"], False),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else None,
)
def test_signals_end_a_command_with_a_true_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, command: list[str], goes_on: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for each in (signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
        before = signal.signal(each, signal.SIG_DFL)
        assert before is not None

    def work(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    for module in ("opening", "training.phase"):
        monkeypatch.setattr(f"agentforge.{module}.open_model", work)
    result = run(*command)
    assert_refused(result, 128 + number, "interrupted; the same command " + ("resumes" if goes_on else "starts again"))
    assert list(tmp_path.iterdir()) == []


CHAIN = "name: c\nsteps: [{name: s, try: ['rounding:bits=8'], gates: []}]\non_failure: stop\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["pipeline", "digits-mlp", "chain.yaml", "--out", "out", "--workers", "-3"], "workers=-3; expected 1 or more"),
        (
            ["compress", "digits-mlp", "--stage", "ternary", "--out", "out", "--device", "meta"],
            "device 'meta' does not exist; choose from cpu, cuda",
        ),
        (["compress", "~nobody-of-that-name/m", "--stage", "ternary", "--out", "out"], "begins with ~"),
        (["inspect", "~nobody-of-that-name"], "begins with ~"),
    ],
)
def test_odd_arguments_are_refused_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.yaml").write_text(CHAIN)
    assert_refused(run(*command), 2, words)
    assert [path.name for path in tmp_path.iterdir()] == ["chain.yaml"]


# Names that are mistyped


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["compres", "x"], "'compress'"),
        (["handoff", "chekc"], "'check'"),
        (["compress", "digits-mlp", "--stge", "ternary"], "--stage"),
        (["compress", "smollm2", "--stage", "ternary", "--out", "x"], "(did you mean smollm2-135m?)"),
        (["compress", "digits-mlp", "--stage", "rouding:bits=4 | entropy", "--out", "x"], "(did you mean rounding?)"),
        (["compress", "digits-mlp", "--stage", "ternary", "--calibration", "selftex", "--out", "x"], "mean selftext?)"),
        (["fit", "digits-mlp", "--bits", "3", "--embeddings", "rond", "--out", "x"], "(did you mean rounding?)"),
        (["fit", "digits-mlp", "--for", "ggfu", "--out", "x"], "choose from gguf, compressed-tensors (did you mean gguf?)"),
        (["models", "DIGITS"], "(did you mean digits-mlp?)"),
        (["models", "my-modle"], "(did you mean my-model?)"),
        (["evaluate", "digits-mlp", "--against", "digts-mlp"], "(did you mean digits-mlp?)"),
        (["evaluate", "digits-mlp", "--runtime", "pakced"], "(did you mean packed?)"),
        (["evaluate", "digits-mlp", "--device", "cude"], "choose from cpu, cuda (did you mean cuda?)"),
        (["evaluate", "digits-mlp", "--text", "wikitext"], "(did you mean wikitext2?)"),
        (["evaluate", "digits-mlp", "--tasks", "arc_easy,hellaswagg"], "(did you mean hellaswag?)"),
        (["recover", "digits-mlp", "--optimizer", "adam", "--out", "x"], "(did you mean adamw?)"),
        (["pipeline", "digts-mlp", "x.yaml", "--out", "x"], "(did you mean digits-mlp?)"),
        (["export", ".", "--to", "ggfu"], "(did you mean gguf?)"),
        (["audit", "phase4_bitnt"], "(did you mean phase4_bitnet?)"),
        (["audit", "--budget", "quik"], "(did you mean quick?)"),
        (["inspect", "nothing"], "no such folder"),
        (["register", "nothing"], "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_name_is_told_without_loading_torch(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    for module in ("opening", "execution", "evaluation", "exports", "registry", "artifact", "audit.report", "chain"):
        monkeypatch.setitem(sys.modules, f"agentforge.{module}", None)  # an import of it fails
    result = run(*command)
    assert (result.code, result.out) == (2, "")
    assert meant in result.err, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["my-model"]


def test_the_names_that_are_known_without_torch_are_those_that_there_are() -> None:
    from agentforge import exports, stages
    from agentforge.audit.workshop import EFFORTS
    from agentforge.evaluation.tasks import SUITES
    from agentforge.evaluation.texts import SPLITS
    from agentforge.names import KNOWN, MODELS, check_model, stage_names

    assert stage_names() == stages.names()
    there = {"format": exports.TO, "budget": EFFORTS, "text": SPLITS, "task": SUITES}
    assert {what: [*names] for what, names in there.items()} == {what: [*KNOWN[what]] for what in there}
    for model in MODELS:
        check_model(model)


def test_short_answers_load_nothing_heavy_in_half_a_second_of_cpu(tmp_path: Path) -> None:
    """`models`, and a name that is mistyped."""
    heavy = {"torch", "transformers", "numpy", "numba", "tqdm"}
    code = "import atexit, os, sys; from agentforge import cli\n"
    code += f"atexit.register(lambda: print(sorted({heavy} & set(sys.modules)), sum(os.times()[:2])))\ncli.main()"
    for args in (["models"], ["compress", "smollm", "--stage", "ternary", "--out", "x"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
        found, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
        assert found == "[]"
        assert float(seconds) < 1.0  # measured 0.3: whatever is slow here is slow by seconds


def test_help_says_the_exit_codes_and_cuts_no_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = " ".join(run("--help").out.split())
    for code in ("0 done", "1 a check says no", "2 bad input", "70 a bug", "130 interrupted", "143 terminated"):
        assert code in said
    for command in ("compress", "fit", "evaluate", "audit", "cache"):
        text = run(command, "--help").out
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "--calibration-tokens" in run("compress", "--help").out


# Tables in 80 columns


ATTEMPT = {"name": "vptq", "decision": "rolled back", "setting": {"stage": "vptq:v=6,k=8,refine=true"}}


def test_a_table_that_is_too_wide_is_one_table_for_each_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = "step|setting|>ratio|>of this step|>touched tensors|>of this step|>error|>retention|>in total|decision"
    measured = {name: {"value": 0.125, "stderr": 0.0625} for name in ("ratio", "error", "retention")}
    rows = [cli._attempt_cells({**ATTEMPT, "measured": measured}), cli._attempt_cells(ATTEMPT | {"name": "[b]|>x"})]
    monkeypatch.setenv("COLUMNS", "80")
    cli._table(columns, rows, "said below")
    narrow = capsys.readouterr().out
    lines = narrow.splitlines()
    assert max(map(len, lines)) <= 80
    for words in ("vptq:v=6,k=8,refine=true", "0.125 ± 0.062", "rolled back", "touched tensors", "[b]|>x"):
        assert any(words in line for line in lines), words  # no word is cut
    assert lines[-1].strip() == "said below"
    monkeypatch.setenv("COLUMNS", "200")
    cli._table(columns, rows, "said below")
    assert len(capsys.readouterr().out.splitlines()) == 7  # heads, two rows, and what is said below


def test_heads_of_numbers_leave_room_for_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    columns = "tensor|shape|stage|>bits per weight|>relative error|>bytes"
    monkeypatch.setenv("COLUMNS", "80")
    cli._table(columns, [["layers.0.weight", "128 x 64", "rounding", "4.5010", "0.08543", "4,609"]])
    out = capsys.readouterr().out
    assert "layers.0.weight" in out and max(map(len, out.splitlines())) <= 80


# In a process of its own


def test_names_that_the_terminal_cannot_show_are_shown_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentforge", "compress", "digits-mlp", "--stage", "rounding", "--out", "\xfc"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\xfc" in done.stdout
    assert (tmp_path / "\xfc" / MANIFEST).is_file()


def test_python_m_agentforge() -> None:
    done = subprocess.run([sys.executable, "-m", "agentforge", "models"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits-mlp" in done.stdout


@pytest.mark.parametrize("module", ["agentforge", "agentforge.cli"])
def test_importing_the_package_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "numba", "sklearn", "gguf"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in agentforge.__all__:
        assert getattr(agentforge, name) is not None
        assert name in dir(agentforge)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = agentforge.magic


def test_a_registry_without_a_driver_is_refused(run: Run) -> None:
    pytest.importorskip("mlflow")
    if importlib.util.find_spec("MySQLdb") is not None:
        pytest.skip("the driver is installed")
    result = run("models", "--registered", "--registry", "mysql://someone:secret@127.0.0.1/x")
    assert_refused(result, 2, "registry mysql://127.0.0.1/x", "MySQLdb")
    assert "secret" not in result.err
    assert "cret" not in run("models", "--registered", "--registry", "mysql://someone:se/cret@127.0.0.1/x").err


def test_defaults_that_the_command_line_repeats_are_those_of_the_functions() -> None:
    """They are written out there, so that no command loads torch to say what it takes."""
    from agentforge.statistics import FOR_FIT, Calibration

    for command, calibration in ((cli.compress, Calibration()), (cli.fit, FOR_FIT)):
        options = inspect.signature(command).parameters
        assert (options["calibration"].default, options["calibration_tokens"].default) == (
            calibration.text,
            calibration.tokens,
        )
