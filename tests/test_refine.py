"""Refining an artifact: the ratio multiplies, and lossless means bit for bit."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

import agentforge as af
from agentforge.artifact import Artifact
from agentforge.chain import Chain, run_chain
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.pipeline import refine

ROUNDED = "rounding:bits=4,group=32"


def touched(artifact: Artifact) -> int:
    return next(ratio.bytes for ratio in artifact.ratios if ratio.what == "touched tensors")


def same_weights(a: Artifact, b: Artifact) -> bool:
    pairs = zip(a.rows, b.rows, strict=True)
    return all(torch.equal(a.decode(one), b.decode(other)) for one, other in pairs)


def test_entropy_coding_keeps_every_weight_and_multiplies_the_ratio(digits: LanguageModel, tmp_path: Path) -> None:
    chain = Chain.model_validate(
        {"name": "refine", "steps": [{"name": "rounding", "try": [ROUNDED]}, {"name": "entropy", "try": ["| entropy"]}]}
    )
    result = run_chain(digits, chain, tmp_path / "out", progress=False)
    first = af.compress(digits, ROUNDED, tmp_path / "first", progress=False)
    assert result.finished and result.artifact is not None
    result.artifact.verify()
    assert same_weights(first, result.artifact)
    assert touched(result.artifact) < touched(first)
    before, after = (row["measured"] for row in result.attempts)
    product = before["touched_ratio"]["value"] * after["touched_step_ratio"]["value"]
    assert math.isclose(after["touched_ratio"]["value"], product, rel_tol=1e-12)
    assert after["retention"]["value"] == 1 and after["retention"]["stderr"] == 0
    direct = af.compress(digits, f"{ROUNDED} | entropy", tmp_path / "direct", progress=False)
    planes = [[row["sha256"] for row in artifact.rows] for artifact in (direct, result.artifact)]
    assert planes[0] == planes[1]  # encoding and refining at once, or one after the other


def test_shared_codebooks_are_refined_once(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = af.open_model(tiny_llama)
    stage = "vptq:v=4,k=16,shared=true"
    first = af.compress(tiny, stage, tmp_path / "first", progress=False)
    second = refine(first, "entropy", tmp_path / "second", original=tiny, progress=False)
    assert capsys.readouterr().err == ""  # no bar that nobody asked for
    second.verify()
    assert same_weights(first, second)
    assert second.manifest["shared"]["bytes"] > 0


def test_a_refinement_goes_on_and_is_refused_where_it_does_not_fit(digits: LanguageModel, tmp_path: Path) -> None:
    first = af.compress(digits, ROUNDED, tmp_path / "first", progress=False)
    whole = refine(first, "entropy", tmp_path / "whole", original=digits, progress=False)
    partial = tmp_path / "part.partial"
    with pytest.raises(BadInput, match="expected entropy"):
        refine(first, "codebook=ternary", tmp_path / "part", original=digits, progress=False)
    assert not partial.exists()
    with pytest.raises(BadInput, match="entropy-coded already"):
        refine(whole, "entropy", tmp_path / "part", original=digits, progress=False)
    other = af.compress(digits, "rounding:bits=8,group=32", tmp_path / "other", progress=False)
    with pytest.raises(BadInput, match="holds"):
        refine(other, "entropy", tmp_path / "whole", original=digits, progress=False)
    # Killed after the first encoded tensor: what is there is taken as it is, and the bytes come out the same.
    from agentforge.artifact import Writer

    class Stop(BaseException):
        pass

    put, count = Writer.put_encoded, 0

    def stopping(self: Writer, *arguments: object) -> None:
        nonlocal count
        if (count := count + 1) > 1:
            raise Stop
        put(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "put_encoded", stopping)
        with pytest.raises(Stop):
            refine(first, "entropy", tmp_path / "again", original=digits, progress=False)
    assert (tmp_path / "again.partial").is_dir()
    again = refine(first, "entropy", tmp_path / "again", original=digits, progress=False)
    hashes = [hashlib.sha256((a.path / "model.safetensors").read_bytes()).hexdigest() for a in (whole, again)]
    assert hashes[0] == hashes[1]


def test_a_chain_cannot_begin_with_a_refinement(digits: LanguageModel, tmp_path: Path) -> None:
    chain = Chain.model_validate({"name": "x", "steps": [{"name": "entropy", "try": ["| entropy"]}]})
    result = run_chain(digits, chain, tmp_path / "out", progress=False)
    assert result.artifact is None and not result.finished
    assert "no accepted step whose planes could be refined" in result.attempts[0]["reason"]
    with pytest.raises(ValueError, match="expected entropy"):
        Chain.model_validate({"name": "x", "steps": [{"name": "entropy", "try": ["| zip"]}]})
