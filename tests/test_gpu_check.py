"""The GPU check's own code, CPU against CPU on a tiny model; and that it sees what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import agentforge as af
from agentforge import stages


@pytest.fixture(scope="module")
def check(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("gpu_check")


def test_every_check_runs_and_agrees_with_itself(
    check: ModuleType, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = ("seedlm:K=8,C=8,P=3", "seedlm:K=8,C=8,P=3,weighted=true", "vptq:v=2,k=16", "vptq:v=2,k=16,residual=4")
    monkeypatch.setattr(check, "ENCODED", specs)
    monkeypatch.setattr(check, "DECODED", ("rounding:bits=4,group=32", "vptq:v=2,k=16"))
    sizes = check.Sizes(tokens=96, backward=32, window=32, steps=2, weights=2, side=128, new_tokens=3, limit=64)
    rows = check.run(af.open_model(tiny_llama), "cpu", sizes)
    assert [row[0] for row in rows] == [name for name, _, _ in check.checks()]
    assert {row[5] for row in rows} == {"yes"}, rows
    assert {float(row[3]) for row in rows} == {0.0}
    assert all(float(row[7]) > 0 and "% of" in row[8] for row in rows)


def test_it_encodes_with_every_stage_that_uses_a_gpu(check: ModuleType) -> None:
    able = {name for name in stages.names() if type(stages.get(name)).uses_gpu}
    assert {stages.parse(spec).name for spec in check.ENCODED} == able
    for spec in check.DECODED:
        assert stages.parse(spec).trains == "floats"


def test_it_sees_what_differs(check: ModuleType) -> None:
    def seen(**compared: object) -> object:
        return check.Seen(1.0, compared, 1.0, 1e9, "op/s")

    one = torch.ones(4)
    assert check.difference(seen(a=one, b=one), seen(a=one, b=1.01 * one)) == pytest.approx(0.01, rel=1e-4)
    assert check.difference(seen(a="x", b="y"), seen(a="x", b="z")) == 0.5
    assert check.difference(seen(a=one), seen(b=one)) == float("inf")
    assert check.difference(seen(a=one), seen(a=one * float("nan"))) == float("inf")
    answers = iter([seen(a=one), seen(a=1.01 * one)])
    line = check.row("x", 1e-3, lambda *_: next(answers), None, "cpu", {"op/s": 1e10})
    assert line[5] == "no" and line[8] == "1 Gop/s, 10.0% of 10"

    def broken(*_: object) -> object:
        raise RuntimeError("no kernel for this card")

    line = check.row("x", 1e-3, broken, None, "cpu", {"op/s": 1e10})
    assert line[5] == "no: RuntimeError: no kernel for this card"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no CUDA device" in said
