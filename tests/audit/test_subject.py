"""Claims about a model that somebody else made: sizes as the files have them, likelihoods as `evaluate` has them."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import agentforge as af
from agentforge import audit
from agentforge.audit import drawing, probes, report
from agentforge.cli import app
from agentforge.errors import BadInput

TEXT = {"text": "selftext", "tokens": 127}


@pytest.fixture(scope="module")
def small(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, rounded to three bits: one of our artifacts."""
    out = tmp_path_factory.mktemp("subject") / "small"
    return af.compress(str(tiny_llama), "rounding:bits=3,group=64", out=out, progress=False).path


@pytest.fixture(scope="module")
def elsewhere(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as an ordinary Hugging Face folder of half floats, as anybody might have made it."""
    return af.artifact.dequantize(small, tmp_path_factory.mktemp("elsewhere") / "half")


def shop(model: Path, folder: Path, against: Path | None) -> audit.Workshop:
    return audit.workshop_for(str(against or model), folder, "selftext", 127, subject=str(model), effort="smoke")


def value(workshop: audit.Workshop, name: str, **parameters: Any) -> float:
    return probes.run(workshop, name, parameters).value


def test_sizes_are_those_of_the_files(small: Path, elsewhere: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for folder in (small, elsewhere):
        workshop = shop(folder, tmp_path, tiny_llama)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        count = af.open_model(tiny_llama).parameters
        assert value(workshop, "ratio_on_disk", bits=16) == pytest.approx(2 * count / size)
        assert value(workshop, "ratio_on_disk", bits=32) == pytest.approx(4 * count / size)
        assert value(workshop, "bits_on_disk") == pytest.approx(8 * size / count)
        assert value(workshop, "megabytes_on_disk") == pytest.approx(size / 1e6)


def test_likelihoods_are_those_of_evaluate(small: Path, elsewhere: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for folder in (small, elsewhere):
        workshop = shop(folder, tmp_path, tiny_llama)
        found = af.divergence(
            af.open_model(folder), af.open_model(tiny_llama), text="selftext", context=128, tokens=127, progress=False
        )
        assert value(workshop, "kl") == found.kl.value > 0.01
        assert value(workshop, "perplexity") == pytest.approx(found.perplexity.value, rel=1e-6)
        assert value(workshop, "same_top_token") == found.top1.value
        if math.isnan(found.retention.value):  # the tiny model guesses no token right
            with pytest.raises(audit.Unmeasured, match="gets something right"):
                value(workshop, "accuracy_kept")
        else:
            assert value(workshop, "accuracy_kept") == pytest.approx(found.retention.value)
        assert value(workshop, "perplexity_kept") == found.perplexity_retention.value


def test_speed_is_a_median_with_its_interval(small: Path, tiny_llama: Path, tmp_path: Path) -> None:
    workshop = shop(small, tmp_path, tiny_llama)
    found = probes.run(workshop, "tokens_a_second", {"tokens": 4, "runs": 6})
    assert found.value > 0 and found.interval is not None and found.n == 6
    # Both are dense float32 models of the same shape: equal but for noise.
    assert 0.1 < value(workshop, "times_as_fast", tokens=4, runs=5) < 10


def test_a_classifier_is_audited_by_its_labels(digits: af.models.LanguageModel, tmp_path: Path) -> None:
    made = af.compress(digits, "rounding:bits=2,group=0", out=tmp_path / "digits", progress=False)
    workshop = audit.workshop_for("digits-mlp", tmp_path, None, 127, subject=str(made.path))
    expected = af.evaluation.accuracy_retention(af.load(made.path), digits)
    assert value(workshop, "accuracy_kept") == expected.value


def test_what_cannot_be_compared_is_refused(small: Path, tmp_path: Path, tiny_llama: Path) -> None:
    alone = shop(small, tmp_path, None)
    with pytest.raises(BadInput, match="--against"):
        probes.run(alone, "kl", {})
    assert value(alone, "megabytes_on_disk") > 0
    without = audit.workshop_for(str(tiny_llama), tmp_path, "selftext", 127)
    with pytest.raises(BadInput, match="--claims"):
        probes.run(without, "kl", {})


def test_claims_without_code_from_the_command_line(
    small: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claims = {
        "report": "mine",
        "title": "Is it a quarter of the size?",
        "about": "What the model card says.",
        "source": "the model card",
        "model": "nowhere",
        "claims": [
            {
                "id": "size",
                "stage": "model",
                "section": "Size",
                "title": "Four times smaller than 16 bits",
                "documentation": "4x (model card)",
                "claimed": {"by": "documentation", "value": 4, "unit": "x"},
                "probe": {"name": "ratio_on_disk", "parameters": {"bits": 16}},
                "confirmed": [2, None],
                "partly": [1.5, None],
                "protocol": "Bytes of the weight files.",
            }
        ],
    }
    path = tmp_path / "my claims.yaml"
    path.write_text(yaml.safe_dump(claims))
    arguments = ["audit", "--claims", str(path), "--model", str(small), "--against", str(tiny_llama), "--only", "size"]
    app([*arguments, "--text", "selftext", "--tokens", "127", "--json"], standalone_mode=False)
    (row,) = json.loads(capsys.readouterr().out)["claims"]
    size = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert row["measured"]["value"] == pytest.approx(2 * af.open_model(tiny_llama).parameters / size)
    assert row["verdict"] == (
        "confirmed" if row["measured"]["value"] >= 2 else "partly" if row["measured"]["value"] >= 1.5 else "refuted"
    )
    with pytest.raises(BadInput, match="one of the two"):
        app(["audit", "phase4_bitnet", "--claims", str(path)], standalone_mode=False)
    # What the report says under "Again" does so, where the file and both models lie.
    settings = {"report": path, "model": str(small), "against": str(tiny_llama), "text": "selftext", "tokens": 127}
    record = report.obtain(None, None, settings | {"budget": "smoke", "device": "cpu", "fresh": False})
    again = f"agentforge audit --claims 'my claims.yaml' --model {small.name} --against {tiny_llama.name}"
    assert f"Again**: `{again} --budget smoke --tokens 127`" in drawing.provenance(record)
    said = drawing.evidence(record, record["claims"][0])
    assert f"Again: <code>{again} --only size --budget smoke</code>" in said
    for folder in (small, tiny_llama):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    app([*shlex.split(again)[1:], "--only", "size", "--budget", "smoke", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["claims"][0]["measured"]["value"] == row["measured"]["value"]


def test_the_example_is_a_claims_file_that_works(small: Path, tiny_llama: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "model_card.yaml"
    settings = {"model": str(small), "against": str(tiny_llama), "text": "selftext", "tokens": 127, "budget": "smoke"}
    names = [claim.id for claim in audit.read_claims(path).claims]
    rows = report.only(path, names, settings | {"device": "cpu", "fresh": True})
    # The tiny model guesses no token right, so that no share of its accuracy can be kept.
    assert {row["id"] for row in rows if row["measured"] is None} <= {"quality.accuracy"}
    assert not [row["failure"] for row in rows if row["failure"]]
    assert all(row["measured"]["stderr"] is not None for row in rows if row["stage"] == "runtime")
