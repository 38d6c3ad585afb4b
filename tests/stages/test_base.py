from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import checks

import agentforge as af
from agentforge import stages
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.stages.base import REGISTRY


def test_the_registry_lists_its_stages() -> None:
    assert stages.names() == sorted(stages.names())
    assert {"rounding", "ternary"} <= set(stages.names())
    assert all(stages.get(name).name == name for name in stages.names())


def test_a_new_stage_is_one_file(digits: LanguageModel, tmp_path: Path) -> None:
    """As if tests/stages/toy/bfloat16.py lay in agentforge/stages/: no other file names it."""
    stages.__path__.append(str(Path(__file__).parent / "toy"))
    try:
        vars(stages)["__spec__"].loader.exec_module(stages)  # which imports what lies there
        artifact = af.compress(digits, "bfloat16", tmp_path / "artifact", progress=False)
        weights = digits.weights()
        for name in (weight.name for weight in weights):
            assert torch.equal(af.load(artifact.path).tensor(name), digits.tensor(name).bfloat16().float())
        assert len([row for row in artifact.rows if row["stage"] == {"stage": "bfloat16"}]) == len(weights) > 0
        for _, check in checks(stages.parse("bfloat16")):
            check()
    finally:
        stages.__path__.pop()
        REGISTRY.pop("bfloat16", None)
        sys.modules.pop("agentforge.stages.bfloat16", None)


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        *((name, name) for name in stages.names() if name != "refined"),
        ("rounding:bits=4,group=64,clip=mse,symmetric=false", "rounding:clip=mse"),
        ("vptq:bits=2,shared=true", "vptq:bits=2,shared=True"),
        ("vptq:v=4,k=256,refine=4|entropy", "vptq:v=4,k=256 | entropy"),
    ],
)
def test_a_brief_text_says_what_differs_and_is_taken_back(text: str, brief: str) -> None:
    stage = stages.parse(text)
    assert stage.brief() == brief
    assert stages.parse(brief) == stage


def test_unknown_stage() -> None:
    with pytest.raises(BadInput, match=rf"stage 'gptq' does not exist; choose from {', '.join(stages.names())}"):
        stages.get("gptq")


def test_unknown_setting() -> None:
    with pytest.raises(BadInput, match="stage rounding has no setting 'bitz'; it has bits, group, symmetric, clip"):
        stages.get("rounding", bitz=4)


@pytest.mark.parametrize("setting", ["name", "self", "cls"])
@pytest.mark.parametrize("how", ["get", "parse", "from_json"])
def test_settings_that_no_stage_has_by_any_road(setting: str, how: str) -> None:
    roads = {
        "get": lambda: stages.get("rounding", **{setting: "x"}),
        "parse": lambda: stages.parse(f"rounding:{setting}=x"),
        "from_json": lambda: stages.from_json({"stage": "rounding", setting: "x"}),
    }
    with pytest.raises(BadInput, match=f"no setting '{setting}'"):
        roads[how]()


@pytest.mark.parametrize(
    ("stage", "setting", "value", "message"),
    [
        ("rounding", "bits", 4.0, r"rounding: bits=4\.0; expected int"),
        ("rounding", "bits", "4", "rounding: bits='4'; expected int"),
        ("rounding", "bits", True, "rounding: bits=True; expected int"),
        ("rounding", "bits", None, "rounding: bits=None; expected int"),
        ("rounding", "bits", 1, "rounding: bits=1; expected 2 to 8"),
        ("rounding", "bits", 9, "rounding: bits=9; expected 2 to 8"),
        ("rounding", "group", -1, "rounding: group=-1; expected 1 or more, or 0"),
        ("rounding", "symmetric", 1, "rounding: symmetric=1; expected bool"),
        ("rounding", "symmetric", "yes", "rounding: symmetric='yes'; expected bool"),
        ("rounding", "clip", "l1", "rounding: clip='l1'; expected one of none, mse"),
        ("rounding", "clip", None, "rounding: clip=None; expected one of none, mse"),
        ("rounding", "clip", ["mse"], r"rounding: clip=\['mse'\]; expected one of none, mse"),
        ("ternary", "tau", math.nan, "ternary: tau=nan; expected a finite number"),
        ("ternary", "tau", math.inf, "ternary: tau=inf; expected a finite number"),
        ("ternary", "tau", True, "ternary: tau=True; expected a finite number"),
        ("ternary", "tau", "0.1", "ternary: tau='0.1'; expected a finite number"),
        pytest.param("ternary", "tau", 10**400, "ternary: tau=.*expected a finite number", id="ternary-tau-10**400"),
        ("ternary", "tau", -0.1, "ternary: tau=-0.1; expected 0 or more"),
        ("ternary", "eps", 0, "ternary: eps=0; expected "),
        ("ternary", "rule", "BitNet", "ternary: rule='BitNet'; expected one of absmean, threshold"),
        ("ternary", "packing", 2, "ternary: packing=2; expected one of trits, 2bit"),
    ],
)
def test_settings_out_of_range(stage: str, setting: str, value: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.get(stage, **{setting: value})
    with pytest.raises(BadInput, match=message):
        stages.from_json({"stage": stage, setting: value})


def test_a_constructor_only_stores_and_encode_checks() -> None:
    import torch

    stage = type(stages.get("rounding"))(bits=99)
    assert stage.bits == 99
    with pytest.raises(BadInput, match="bits=99"):
        stage.encode(torch.ones(2, 2))


def test_stages_are_values() -> None:
    assert stages.get("rounding") == stages.get("rounding", bits=4)
    assert len({stages.get("rounding"), stages.get("rounding", bits=4), stages.get("rounding", bits=3)}) == 2
    with pytest.raises(AttributeError):
        stages.get("rounding").bits = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounding", {}),
        ("rounding:", {}),
        ("rounding:bits=3", {"bits": 3}),
        ("rounding:bits=3,group=0,symmetric=TRUE,clip=mse", {"bits": 3, "group": 0, "symmetric": True, "clip": "mse"}),
        ("rounding:symmetric=false", {"symmetric": False}),
        ("ternary:tau=1,eps=1e-6", {"tau": 1.0, "eps": 1e-6}),
    ],
)
def test_parse(text: str, expected: dict[str, Any]) -> None:
    assert stages.parse(text) == stages.get(text.partition(":")[0], **expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stage '' does not exist; choose from .*rounding"),
        ("gptq:bits=4", "stage 'gptq' does not exist"),
        ("rounding:bits", "expected setting=value, found 'bits'"),
        ("rounding:4", "expected setting=value, found '4'"),
        ("rounding:bits=4:group=8", "bits='4:group=8'; expected int"),
        ("rounding:bits=4,bits=4", "bits is set twice"),
        ("rounding:bits=four", "bits='four'; expected int"),
        ("rounding:bits=4.0", r"bits='4\.0'; expected int"),
        ("rounding:bits=", "bits=''; expected int"),
        ("rounding:symmetric=1", "symmetric='1'; expected bool"),
        ("rounding:bitz=4", "no setting 'bitz'; it has bits, group"),
        ("rounding: bits=4", "no setting ' bits'"),
        ("ternary:tau=nan", "tau=nan; expected a finite number"),
        ("ternary:tau=1e999", "tau=inf; expected a finite number"),
        ("ternary:tau=x", "tau='x'; expected a finite number"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        stages.parse(text)


@pytest.mark.parametrize(
    "junk",
    [None, 3, "rounding", [], ["rounding"], {}, {"stage": None}, {"stage": ["rounding"]}, {"stage": 1}],
)
def test_from_json_of_junk(junk: Any) -> None:
    with pytest.raises(BadInput, match="expected a stage as"):
        stages.from_json(junk)


def test_from_json_of_unknown_things() -> None:
    with pytest.raises(BadInput, match="stage 'gptq' does not exist"):
        stages.from_json({"stage": "gptq"})
    with pytest.raises(BadInput, match="no setting 'wbits'"):
        stages.from_json({"stage": "rounding", "wbits": 4})


def test_a_long_junk_is_cut_in_the_message() -> None:
    with pytest.raises(BadInput) as caught:
        stages.from_json(list(range(10_000)))
    assert len(str(caught.value)) < 250
