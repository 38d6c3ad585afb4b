"""Devices: what is asked for reaches everything that computes, and what is not there is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge import allocation, chain, cli, execution, models, pipeline, stages, statistics
from agentforge.chain import Chain
from agentforge.evaluation import Text
from agentforge.models import LanguageModel
from agentforge.statistics import Calibration
from agentforge.training import phase, recover

TEXT = Text("own", "test", "The quick brown fox jumps over the lazy dog. " * 60)
MODULES = (allocation, chain, execution, models, phase, pipeline, recover, statistics)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all devices that anything asks for; the CPU plays every one of them."""
    names: list[str] = []

    def pretend(name: str) -> torch.device:
        names.append(name)
        return torch.device("cpu")

    for module in MODULES:
        monkeypatch.setattr(module, "device_named", pretend)
    return names


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each model that is moved, by its name, and where to."""
    found: list[tuple[str, str]] = []
    plain = LanguageModel.on

    def note(self: LanguageModel, device: str) -> LanguageModel:
        found.append((Path(self.name).name, device))
        return plain(self, device)

    monkeypatch.setattr(LanguageModel, "on", note)
    return found


def test_fit_takes_the_device_everywhere(
    asked: list[str], moved: list[tuple[str, str]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))
    calibration = Calibration(TEXT, tokens=64, context=32, sensitivity_tokens=32)
    ladder = [stages.get("ecsq", step=step) for step in (0.3, 0.6)]
    made = allocation.fit(
        tiny_llama,
        tmp_path / "out",
        allocation.Budget(bits=4.0),
        ladder=ladder,
        calibration=calibration,
        text=TEXT,
        tokens=64,
        device="cuda",
        progress=False,
    )
    assert set(asked) == {"cuda"}
    assert moved == [("tiny-llama", "cuda"), ("out", "cuda"), ("tiny-llama", "cuda")]  # statistics, then both are measured
    assert made.artifact.manifest["recipe"]["calibration"]["device"] == "cuda"


def test_a_recipe_names_the_device_only_where_it_is_not_the_cpu() -> None:
    plain = Calibration(TEXT).to_json()
    assert "device" not in plain
    assert Calibration(TEXT, device="cuda").to_json() == plain | {"device": "cuda"}


def test_a_chain_takes_the_device_everywhere(
    asked: list[str], moved: list[tuple[str, str]], digits: LanguageModel, tmp_path: Path
) -> None:
    steps = {"name": "two", "steps": [{"name": n, "try": [f"rounding:bits={b},group=64"]} for n, b in (("a", 8), ("b", 6))]}
    result = chain.run_chain(digits, Chain.model_validate(steps), tmp_path / "out", device="cuda", progress=False)
    assert result.finished
    assert set(asked) == {"cuda"}
    assert len(moved) == 5 and {device for _, device in moved} == {"cuda"}


def test_recovery_takes_the_device_everywhere(asked: list[str], digits: LanguageModel, tmp_path: Path) -> None:
    settings = recover.Settings(steps=2, batch=32, evaluate=2)
    phase.phase(digits, tmp_path / "out", settings, always_train=True, device="cuda", progress=False)
    assert set(asked) == {"cuda"}


def test_the_commands_pass_the_device_on(
    asked: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.text)
    options = ["--text", str(text), "--tokens", "64", "--context", "32"]
    assert run(monkeypatch, "evaluate", tiny_llama, "--against", tiny_llama, *options, "--device", "cuda") == 0
    assert asked == ["cuda"] * 3
    given: dict[str, Any] = {}

    def stop(*_: object, **options: Any) -> None:
        given.update(options)
        raise KeyboardInterrupt

    for command, owner, name in (("fit", allocation, "fit"), ("recover", phase, "phase"), ("pipeline", chain, "run_chain")):
        monkeypatch.setattr(owner, name, stop)
        extra = ["--bits", "3"] if command == "fit" else ["chain.yaml"] if command == "pipeline" else []
        given.clear()
        assert run(monkeypatch, command, tiny_llama, *extra, "--out", tmp_path / command, "--device", "cuda") == 130
        assert given["device"] == "cuda"
    capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "a-model"),
        ("fit", "a-model", "--bits", "3", "--out", "out"),
        ("recover", "a-model", "--out", "out"),
        ("pipeline", "a-model", "chain.yaml", "--out", "out"),
        ("compress", "digits-mlp", "--stage", "ternary", "--out", "out"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist, either: that it is not looked for shows that the device comes first."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *command, "--device", "cuda") == 2
    said = capsys.readouterr().err
    assert said == "agentforge: device 'cuda': torch has no such device here; use cpu\n"
    assert not any(tmp_path.iterdir())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """The command line's exit code."""
    monkeypatch.setattr(sys, "argv", ["agentforge", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_statistics_are_those_of_the_cpu(tiny_llama: Path) -> None:
    model = af.open_model(tiny_llama)
    settings = {"tokens": 96, "context": 32, "sensitivity_tokens": 32}
    cpu, gpu = (statistics.collect(model, Calibration(TEXT, **settings, device=d), progress=False) for d in ("cpu", "cuda"))
    for name, about in cpu.items():
        assert gpu[name].n == about.n and gpu[name].hessian.device.type == "cpu"
        torch.testing.assert_close(gpu[name].hessian, about.hessian, rtol=1e-3, atol=1e-4)
