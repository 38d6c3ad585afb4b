"""Hand-offs: one format, a contract for each receiver, and nothing is believed that can be counted or measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import agentforge as af
from agentforge import cli, handoff, registry, schemas
from agentforge.artifact import Artifact, dequantize
from agentforge.chain import Chain, run_chain
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.opening import load
from agentforge.tensorfiles import describe_files, read_json, write_json

TO = {3: "4", 4: "5", 7: "8", 8: "deployment"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, digits: LanguageModel) -> dict[int, Path]:
    """A hand-off of digits-mlp from each phase."""
    root = tmp_path_factory.mktemp("handoffs")
    for phase in (3, 7):
        shutil.copytree(digits.path, root / f"{phase}/model")
    artifact = af.compress(digits, "rounding:bits=4,group=64", root / "4/quantized", progress=False)
    dequantize(artifact, root / "4/dequantized")
    steps = [
        {"name": "round", "try": ["rounding:bits=6,group=64"], "gates": ["retention >= 0.9"]},
        {"name": "code", "try": ["| entropy"], "gates": ["total_retention >= 0.9", "bytes <= 40000", "ratio >= 1.2"]},
    ]
    run_chain(digits, Chain.model_validate({"name": "test", "steps": steps}), root / "8", progress=False)
    for phase in TO:
        handoff.measure_and_write(root / str(phase), phase)
    return {phase: root / str(phase) for phase in TO}


@pytest.mark.parametrize("phase", TO)
def test_what_is_sound_is_accepted_by_its_receiver(phase: int, sound: dict[int, Path]) -> None:
    data = read_json(sound[phase] / "handoff.json")
    assert str(data["to"]) == TO[phase]
    checks = "\n".join(handoff.check_handoff(sound[phase], phase, to=TO[phase]))
    assert "as handed over" in checks and "files, each as it was written" in checks
    if phase == 4:
        assert "6 tensors, each what the packed one decodes to" in checks
        assert "gradients flow to all 6 trainable tensors" in checks
    if phase == 8:
        assert "4 gates, all passed by what was measured" in checks and "x against all 17,226 parameters" in checks


def test_the_schemas_are_schemas_and_say_why() -> None:
    for file in schemas.FOLDER.glob("*.json"):
        schema = read_json(file)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$id"] == file.name and len(str(schema["description"])) > 80
    assert {f"handoff-{phase}-{to}.json" for phase, to in TO.items()} < {file.name for file in schemas.FOLDER.iterdir()}


def models(data: Any) -> Any:
    return next(iter(data["models"].values()))


def set_in(*path: Any) -> Callable[[Path, Any], None]:
    """A damage that puts the last of `path` where the others lead to, in the first model."""

    def damage(_: Path, data: Any) -> None:
        place = models(data)
        for part in path[:-2]:
            place = place[part]
        place[path[-2]] = path[-1]

    return damage


def outside(folder: Path, data: Any) -> None:
    first = next(iter(data["models"]))
    shutil.move(folder / first, folder.parent / "elsewhere")
    (folder / first).symlink_to(folder.parent / "elsewhere")


def linked_file(folder: Path, data: Any) -> None:
    config = folder / next(iter(data["models"])) / "config.json"
    shutil.move(config, folder.parent / "config.json")
    config.symlink_to(folder.parent / "config.json")


def added_file(folder: Path, data: Any) -> None:
    (folder / next(iter(data["models"])) / "tokenizer_config.json").write_text("{}")


def lost_model(folder: Path, data: Any) -> None:
    shutil.rmtree(folder / next(iter(data["models"])))


def flipped(folder: Path, data: Any) -> None:
    path = folder / next(iter(data["models"])) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def leading_out(_: Path, data: Any) -> None:
    models(data)["files"]["../../secret"] = {"bytes": 1, "sha256": "0" * 64}


HOSTILE: dict[str, tuple[Callable[[Path, Any], None], str]] = {
    "a model that leads out": (lambda _, data: data["models"].update({"../m": models(data)}), "leads out of the folder"),
    "a file that leads out": (leading_out, "leads out of the folder"),
    "a linked model": (outside, "leads out of the folder"),
    "a linked file": (linked_file, "leads out of the folder"),
    "a file more": (added_file, "tokenizer_config.json was not handed over"),
    "a model less": (lost_model, "is not a subfolder"),
    "other bytes": (flipped, "is damaged or was changed"),
    "another phase": (lambda _, data: data.update(phase=5), "is not a hand-off of phase"),
    "another receiver": (lambda _, data: data.update(to=7), "to: 7 is not"),
    "another format": (lambda _, data: data.update(format=1), "is not a hand-off of phase"),
    "no model": (lambda _, data: data.update(models={}), "hands over no model"),
    "models as a list": (lambda _, data: data.update(models=[1]), "is not a hand-off of phase"),
    "facts as text": (lambda _, data: data.update(facts="good"), "facts: 'good' is not of type 'object'"),
    "a key more": (lambda _, data: data.update(extra=1), "'extra' was unexpected"),
    "a model of the wrong type": (
        lambda _, data: data["models"].update({next(iter(data["models"])): 3}),
        "3 is not of type",
    ),
    "a hash of the wrong type": (set_in("files", "config.json", "sha256", 3), "3 is not of type 'string'"),
    "a size of the wrong type": (set_in("files", "config.json", "bytes", "9"), "'9' is not of type 'integer'"),
    "another size": (set_in("files", "config.json", "bytes", 1 << 70), "bytes, expected 1180591620717411303424"),
    "quality NaN": (set_in("quality", "value", float("nan")), "numbers that are not finite"),
    "quality infinite": (set_in("quality", "value", float("inf")), "numbers that are not finite"),
    "quality null": (set_in("quality", "value", None), "None is not of type 'number'"),
    "quality as text": (set_in("quality", "value", "0.97"), "'0.97' is not of type 'number'"),
    "quality huge": (set_in("quality", "value", 10**4000), "is greater than the maximum"),
    "quality zero": (set_in("quality", "value", 0), "less than or equal to the minimum of 0"),
    "better quality than is there": (set_in("quality", "value", 0.999), "handed over was 0.999"),
    "a bare number": (set_in("quality", 0.97), "0.97 is not of type 'object'"),
    "no protocol": (set_in("quality", "protocol", {}), "'metric' is a required property"),
    "another dtype": (set_in("dtypes", "float64"), "handed over was float64"),
    "another vocabulary": (set_in("vocabulary", 50008), "handed over was 50008"),
    "facts nested deeply": (lambda _, data: data["facts"].update(a=json.loads("[" * 900 + "]" * 900)), "nested too deeply"),
}


def copied(source: Path, to: Path) -> tuple[Path, Any]:
    shutil.copytree(source, to / "handed")
    return to / "handed", json.loads((source / "handoff.json").read_text())


@pytest.mark.parametrize("phase", [3, 8])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_hand_offs_are_refused_in_a_sentence(
    what: str, phase: int, sound: dict[int, Path], tmp_path: Path, bounded: None
) -> None:
    damage, reason = HOSTILE[what]
    folder, data = copied(sound[phase], tmp_path)
    damage(folder, data)
    (folder / "handoff.json").write_text(json.dumps(data))
    with pytest.raises(BadInput) as refused:
        handoff.check_handoff(folder, phase)
    assert reason in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b" " * (5 << 20), "expected at most 4194304"),
        (b"[" * 100_000, "no valid JSON"),
        (b"{" * 10, "no valid JSON"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
    ],
)
def test_the_command_refuses_hostile_json_with_code_2(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handoff.json").write_bytes(content)
    code, _, err = run(capsys, monkeypatch, "check", tmp_path, "--from", 3, "--to", 4)
    assert code == 2 and reason in err and err.count("\n") == 1


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: Any) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["agentforge", "handoff", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_commands_write_and_check(
    sound: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = copied(sound[7], tmp_path)
    (folder / "handoff.json").unlink()
    code, out, _ = run(capsys, monkeypatch, "write", folder, "--from", 7, "--to", 8, "--json")
    assert code == 0 and json.loads(out) == {"path": str(folder / "handoff.json")}
    assert (folder / "handoff.json").read_bytes() == (sound[7] / "handoff.json").read_bytes()
    code, out, _ = run(capsys, monkeypatch, "check", folder, "--from", 7, "--to", 8)
    assert code == 0 and out.startswith("accepted: ")
    code, _, err = run(capsys, monkeypatch, "check", folder, "--from", 7, "--to", "deployment")
    assert code == 2 and "there is no hand-off from phase 7 to deployment; there are 3 to 4, 4 to 5, 7 to 8" in err
    shutil.copytree(folder / "model", folder / "other")
    code, _, err = run(capsys, monkeypatch, "write", folder, "--from", 7, "--to", 8)
    assert code == 2 and "holds 2 models in subfolders; expected one" in err


def rewritten(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors of a model, and let the hand-off say that this is how it was handed over."""
    path = folder / name / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    source: Any = read_json(path.with_name("agentforge-source.json"))
    source["files"] |= {path.name: describe_files(path.parent)[path.name]}
    write_json(path.with_name("agentforge-source.json"), source)
    data: Any = read_json(folder / "handoff.json")
    data["models"][name]["files"] = describe_files(path.parent)
    data["models"][name]["quality"] = af.accuracy(af.open_model(folder / name)).to_json()
    write_json(folder / "handoff.json", data)


def test_the_dense_model_is_what_the_packed_one_decodes_to(sound: dict[int, Path], tmp_path: Path) -> None:
    folder, _ = copied(sound[4], tmp_path)
    rewritten(folder, "dequantized", lambda tensors: tensors["layers.0.weight"][0].add_(0.01))
    with pytest.raises(BadInput, match=r"dequantized: tensor layers\.0\.weight is not what the packed one decodes to"):
        handoff.check_handoff(folder, 4)


def test_gradients_must_reach_every_tensor(digits: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(digits.path, tmp_path / "dead", ignore=shutil.ignore_patterns("agentforge-source.json"))
    tensors = load_file(tmp_path / "dead/model.safetensors")
    tensors["layers.1.bias"].fill_(-1e4)  # no unit of this layer is ever active
    save_file(tensors, tmp_path / "dead/model.safetensors", {"format": "pt"})
    artifact = af.compress(str(tmp_path / "dead"), "rounding:bits=4,group=64", tmp_path / "4/quantized", progress=False)
    dequantize(artifact, tmp_path / "4/dequantized")
    handoff.measure_and_write(tmp_path / "4", 4)
    with pytest.raises(BadInput, match=r"dequantized: gradients do not flow: 5 zero"):
        handoff.check_handoff(tmp_path / "4", 4)


GATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda facts: facts.update(gates=[]), "facts, gates: [] should be non-empty"),
    "not there": (lambda facts: facts.clear(), "'gates' is a required property"),
    "missed": (lambda facts: facts["gates"][0]["measured"].update(value=0.5), "retention >= 0.9: failed"),
    "undecided": (lambda facts: facts["gates"][0]["measured"].update(interval=[0.5, 1.5]), "retention >= 0.9: undecided"),
    "unknown": (lambda facts: facts["gates"][0].update(condition="love >= 1"), "gate 'love >= 1'; expected a condition"),
    "of another model": (
        lambda facts: facts["gates"][-1]["measured"].update(inputs={"model": "0" * 64}),
        "was measured on another model",
    ),
    "fewer bytes": (
        lambda facts: facts["gates"][2]["measured"].update(value=17.0),
        "gate bytes <= 40000 says 17.0, on disk",
    ),
    "a larger ratio": (
        lambda facts: facts["gates"][3]["measured"].update(value=280.0),
        "gate ratio >= 1.2 says 280.0, on disk",
    ),
}


@pytest.mark.parametrize("what", GATES)
def test_gates_are_decided_again(what: str, sound: dict[int, Path], tmp_path: Path) -> None:
    damage, reason = GATES[what]
    folder, data = copied(sound[8], tmp_path)
    damage(data["facts"])
    write_json(folder / "handoff.json", data)
    with pytest.raises(BadInput) as refused:
        handoff.check_handoff(folder, 8)
    assert reason in str(refused.value)


def test_ratios_are_computed_again_and_the_journal_is_the_artifacts(sound: dict[int, Path], tmp_path: Path) -> None:
    folder, data = copied(sound[8], tmp_path)
    artifact = Artifact(folder / "artifact")
    older = {
        **data["models"]["artifact"]["ratios"][2],
        "denominator": f"weight files it was made from ({artifact.manifest['original']['dtypes']})",
    }
    assert data["models"]["artifact"]["ratios"][2] == older  # as all hand-offs of 0.1.0 have it
    for field in ("ratio", "denominator_bytes"):
        write_json(folder / "handoff.json", data)
        handoff.check_handoff(folder, 8)
        data["models"]["artifact"]["ratios"][2] = {**older, field: 280}
        write_json(folder / "handoff.json", data)
        with pytest.raises(BadInput, match="the ratios are not those of the bytes on disk"):
            handoff.check_handoff(folder, 8)
        data["models"]["artifact"]["ratios"][2] = older
    data["models"]["artifact"]["ratios"][0]["ratio"] = 280.0
    write_json(folder / "handoff.json", data)
    with pytest.raises(BadInput, match="the ratios are not those of the bytes on disk"):
        handoff.check_handoff(folder, 8)
    shutil.rmtree(folder / "artifact")
    shutil.copytree(folder / "step-1", folder / "artifact")
    with pytest.raises(BadInput, match="its journal is not that of the artifact beside it"):
        handoff.measure_and_write(folder, 8)


@pytest.mark.parametrize(
    "attempts",
    ["x", [1], [{"decision": "accepted"}], [{"decision": "accepted", "name": "a", "gates": {"kl <= x": 1}, "measured": {}}]],
)
def test_a_journal_that_is_none_is_refused(attempts: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "journal.json", {"attempts": attempts})
    with pytest.raises(BadInput, match="is not the journal of a chain"):
        handoff.measure_and_write(tmp_path, 8)


def test_a_language_model_is_scored_again_on_its_own_text(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "3/model")
    handoff.measure_and_write(tmp_path / "3", 3, "selftext", 200, progress=False)
    checks = handoff.check_handoff(tmp_path / "3", 3, progress=False)
    assert any("perplexity (n = 200), as handed over" in check for check in checks)
    data: Any = read_json(tmp_path / "3/handoff.json")
    data["models"]["model"]["quality"]["value"] *= 0.9
    write_json(tmp_path / "3/handoff.json", data)
    with pytest.raises(BadInput, match="handed over was"):
        handoff.check_handoff(tmp_path / "3", 3, progress=False)
    del data["models"]["model"]["quality"]["protocol"]["stride"]
    write_json(tmp_path / "3/handoff.json", data)
    with pytest.raises(BadInput, match="the protocol of its quality lacks stride"):
        handoff.check_handoff(tmp_path / "3", 3, progress=False)


def test_an_artifact_is_no_dense_model(sound: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(sound[4] / "quantized", tmp_path / "model")
    with pytest.raises(BadInput, match=r"cannot be handed over from phase 3 to 4: .*'dense' was expected"):
        handoff.measure_and_write(tmp_path, 3)
    assert not (tmp_path / "handoff.json").exists()


def test_the_registry_records_the_receivers_answer(sound: dict[int, Path], tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    artifact = Artifact(sound[4] / "quantized")
    registry.register(artifact.path, uri=uri, handed=sound[4])
    assert {row["tags"]["handoff"] for row in registry.registered(uri)} == {"passed"}
    folder, data = copied(sound[4], tmp_path)
    data["models"]["quantized"]["quality"]["value"] = 0.9999
    write_json(folder / "handoff.json", data)
    registry.register(artifact.path, uri=uri, handed=folder)
    rows = registry.registered(uri)
    assert [row["tags"]["handoff"] for row in rows] == ["failed"]
    assert "handed over was 0.9999" in rows[0]["tags"]["handoff_reason"]
    with pytest.raises(BadInput, match="does not hand over this artifact"):
        registry.register(artifact.path, uri=uri, handed=sound[8])
    assert load(rows[0]["source"]).fingerprint == artifact.sha256
