"""Every architecture that people have comes out right, or is refused in a sentence.

docs/architectures.md shows what is found here; `python tests/test_architectures.py` writes it.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import agentforge as af
import agentforge.huggingface
from agentforge.allocation import LADDER, Budget, fit
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.models import LanguageModel
from agentforge.opening import open_model
from tests.architectures import ARCHITECTURES, make

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TEXT = Text("counting", "test", " ".join(str(i) for i in range(300)))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=torch.arange(2, 42)[None], use_cache=False).logits
    assert torch.isfinite(found).all()
    return found  # type: ignore[no-any-return]


def near(one: torch.Tensor, other: torch.Tensor, share: float) -> None:
    assert (one - other).abs().max() <= share * other.abs().max()


def checks(model: LanguageModel, scratch: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is tried, by the head of its column; each raises if it is not right."""
    small: dict[str, Any] = {"text": TEXT, "tokens": 160, "progress": False}

    def listed() -> None:
        model.check()
        assert model.weights()

    def dense() -> None:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
        near(logits(model.model), logits(theirs), 1e-6)

    def rounded() -> None:
        af.compress(model, "rounding:bits=8,group=16", scratch / "rounded", progress=False)
        one, other = logits(af.load(scratch / "rounded").model), logits(model.model)
        assert (one - other).norm() < 0.2 * other.norm()  # of a token a router may choose another expert

    def packed() -> None:
        near(logits(af.load(scratch / "rounded", "packed").model), logits(af.load(scratch / "rounded").model), 1e-5)

    def in_transformers() -> None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(scratch / "rounded", dtype=torch.float32)
        assert torch.equal(logits(loaded), logits(af.load(scratch / "rounded", "packed").model))
        assert loaded.generate(torch.arange(2, 8)[None], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 6
        loaded.save_pretrained(scratch / "saved")
        Artifact(scratch / "saved").verify()

    def with_statistics() -> None:
        calibration = af.statistics.Calibration(TEXT, 512, 128)
        af.compress(model, "vptq:v=4,k=64", scratch / "vptq", calibration=calibration, progress=False)
        logits(af.load(scratch / "vptq").model)

    def fitted() -> None:
        calibration = af.statistics.Calibration(TEXT, 256, 128)
        found = fit(model, scratch / "fitted", Budget(bits=4), ladder=LADDER[::5], calibration=calibration, **small)
        kept = {row["name"] for row in found.artifact.rows if row["stage"] is None}
        assert found.bits <= 4 and kept & {weight.name for weight in model.weights()} == set(found.outside)

    def evaluated() -> None:
        found = af.divergence(af.load(scratch / "rounded"), model, **small)
        assert 0 <= found.kl.value < 0.2

    yield "list", listed
    yield "dense = transformers", dense
    yield "rounding", rounded
    yield "packed = dense", packed
    yield "`from_pretrained`, saved again", in_transformers
    yield "vptq, statistics", with_statistics
    yield "fit", fitted
    yield "evaluate", evaluated


def outcomes(name: str, scratch: Path) -> dict[str, str]:
    """Of each check: right, or the sentence that refuses."""
    try:
        model = open_model(make(name, scratch / name))
    except BadInput as error:
        return {"list": str(error)}
    found: dict[str, str] = {}
    for head, check in checks(model, scratch):
        before = set(scratch.iterdir())
        try:
            check()
            found[head] = "right"
        except BadInput as error:
            found[head] = str(error).partition(": ")[2]
            assert set(scratch.iterdir()) == before, f"{head}: something is left of what was refused"
    return found


def line(name: str, found: dict[str, str], reasons: dict[str, int]) -> str:
    """A row of the page; a refusal is the number of its sentence."""
    cells = []
    for sentence in found.values():
        cells.append("right" if sentence == "right" else f"refused ({reasons.setdefault(sentence, len(reasons) + 1)})")
    return f"| {name} | " + " | ".join(cells) + " |"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_is_right_or_refused(name: str, tmp_path: Path) -> None:
    found = outcomes(name, tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    numbers = {sentence: int(n) for n, sentence in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)}
    assert line(name, found, numbers) in text.splitlines(), found


def write() -> None:
    reasons: dict[str, int] = {}
    rows, heads = [], []
    for name in sorted(ARCHITECTURES):
        with tempfile.TemporaryDirectory() as scratch:
            found = outcomes(name, Path(scratch))
        heads = max(heads, list(found), key=len)
        rows.append(line(name, found, reasons))
        print(rows[-1], file=sys.stderr, flush=True)
    text = [
        "# Architectures",
        "",
        f"{len(rows)} architectures that transformers {transformers.__version__} has as causal language models: tiny models "
        "with random weights, each through all that is done with a model. A test repeats it.",
        "",
        "| " + " | ".join(["Architecture", *heads]) + " |",
        "|" + " --- |" * (len(heads) + 1),
        *rows,
        "",
        "Refused with these words:",
        "",
        *(f"{n}. {sentence}" for sentence, n in reasons.items()),
        "",
    ]
    PAGE.write_text("\n".join(itertools.chain(text)), encoding="utf-8")


if __name__ == "__main__":
    write()
