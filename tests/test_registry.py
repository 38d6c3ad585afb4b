"""The registry: both forms or none, whoever else is registering and whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge import cli, registry
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.opening import load, open_model

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHANGES = ("create_registered_model", "create_model_version", "set_model_version_tag", "set_registered_model_alias")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["agentforge.registry", "mlflow", "sqlalchemy", "alembic"])


def register_two(paths: tuple[Path, Path], uri: str, start: Any) -> None:
    start.wait()
    for path in paths:
        registry.register(path, uri=uri)


def register_and_die(path: Path, uri: str, name: str, at: int) -> None:
    """Killed before the change number `at` that MLflow is asked for."""
    open_client, left = registry._client, [at]

    def counting(change: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **more)

        return counted

    def client(uri: str) -> Any:
        found = open_client(uri)
        for name in CHANGES:
            setattr(found, name, counting(getattr(found, name)))
        return found

    registry._client = client
    registry.register(path, uri=uri, name=name, aliases=("champion",))


def versions(uri: str, name: str = "digits-mlp") -> list[dict[str, Any]]:
    return [row for row in registry.registered(uri) if row["name"] == name]


def by_hash(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The versions by their artifact's hash; each is there once."""
    found = {row["tags"]["manifest_sha256"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    stages = [f"rounding:bits={bits},group={group}" for bits in (2, 3, 4) for group in (16, 32, 64)]
    return [af.compress("digits-mlp", stage, folder / str(i), progress=False) for i, stage in enumerate(stages)]


@pytest.fixture(scope="module")
def crowded(artifacts: list[Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry in which eight processes have registered an artifact each, and one more all of them, at the same moment;
    a ninth was killed before, while the database was made."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "mlflow.db.partial").mkdir()
    (folder / "mlflow.db.partial/mlflow.db").write_bytes(b"half of a database")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    start = CONTEXT.Barrier(8)
    running = [
        CONTEXT.Process(target=register_two, args=((one.path, artifacts[8].path), uri, start)) for one in artifacts[:8]
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * 8
    return uri


def test_eight_processes_at_once_lose_no_version(crowded: str, artifacts: list[Artifact]) -> None:
    rows = versions(crowded)
    assert [row["version"] for row in rows] == list(range(1, 10))
    found = by_hash(rows)
    assert set(found) == {artifact.sha256 for artifact in artifacts}
    for artifact in artifacts:
        row = found[artifact.sha256]
        assert Artifact(row["source"]).sha256 == artifact.sha256
        assert open_model(row["tags"]["dequantised_source"]).fingerprint == row["tags"]["dequantised_fingerprint"]


@pytest.mark.parametrize("at", range(1, 4))
def test_the_next_call_mends_what_a_kill_left(at: int, crowded: str, artifacts: list[Artifact]) -> None:
    name = f"killed-{at}"
    process = CONTEXT.Process(target=register_and_die, args=(artifacts[0].path, crowded, name, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = {1: 0, 2: 0, 3: 1}[at]
    assert len(versions(crowded, name)) == left
    registry.register(artifacts[1].path, uri=crowded, name=name)
    assert len(by_hash(versions(crowded, name))) == 1 + left
    again = registry.register(artifacts[0].path, uri=crowded, name=name, aliases=("champion",))
    assert again.new == (left == 0)
    rows = versions(crowded, name)
    assert set(by_hash(rows)) == {artifacts[0].sha256, artifacts[1].sha256}
    assert [row["version"] for row in rows if row["aliases"] == ["champion"]] == [again.packed]


def test_of_a_pair_in_an_older_registry_the_packed_version_counts(
    crowded: str, artifacts: list[Artifact], tmp_path: Path
) -> None:
    made = registry.register(artifacts[0].path, uri=crowded, name="older")
    client = registry._client(crowded)
    tags = versions(crowded, "older")[0]["tags"]
    client.set_model_version_tag("older", "1", "form", "packed")
    client.create_model_version("older", tags["dequantised_source"], tags={**tags, "form": "dequantised", "partner": "1"})
    assert [row["version"] for row in versions(crowded, "older")] == [1]
    assert registry.register(artifacts[0].path, uri=crowded, name="older") == (*made[:3], False)


def test_metrics_lineage_and_aliases_come_back(crowded: str, digits: LanguageModel, tmp_path: Path) -> None:
    first = af.compress(digits, "rounding:bits=5,group=64", tmp_path / "first", progress=False)
    second = af.compress(load(first.path), "ternary", tmp_path / "second", progress=False)
    accuracy = af.accuracy(load(first.path))
    record = tmp_path / "record.json"
    claims = [
        {"id": "of.this", "measured": {**accuracy.to_json(), "inputs": {"model": "0", "artifacts": {"x": first.sha256}}}},
        {"id": "of.others", "measured": {**accuracy.to_json(), "inputs": {"model": digits.fingerprint}}},
        {"id": "not.measured", "measured": None},
    ]
    record.write_text(json.dumps({"measurements": {"KL(a || b)": accuracy.to_json()}, "claims": claims}))
    one = registry.register(first.path, uri=crowded, record=record, aliases=("champion", "small"))
    two = registry.register(second.path, uri=crowded)
    rows = {row["version"]: row for row in versions(crowded)}
    packed, child = rows[one.packed], rows[two.packed]
    assert packed["aliases"] == ["champion", "small"] and not child["aliases"]
    assert set(packed["metrics"]) == {"KL_a_b_", "of.this"} and not child["metrics"]
    expected = {key: value for key, value in accuracy.to_json().items() if key != "environment"}
    assert packed["metrics"]["KL_a_b_"] == expected
    assert {row["tags"]["base_sha256"] for row in (packed, child)} == {digits.fingerprint}
    assert child["tags"]["parent_version"] == f"digits-mlp/{one.packed}"
    assert child["tags"]["parent_sha256"] == first.sha256 and "parent_version" not in packed["tags"]
    assert json.loads(packed["tags"]["settings"]) == first.manifest["recipe"]
    assert json.loads(packed["tags"]["ratios"]) == [ratio.to_json() for ratio in first.ratios]
    step = af.compress(digits, "rounding:bits=6,group=64", tmp_path / "step", progress=False)
    last = af.compress(load(step.path), "ternary", tmp_path / "last", progress=False)
    registry.register(last.path, uri=crowded, name="of-an-unknown-step")
    tags = versions(crowded, "of-an-unknown-step")[0]["tags"]
    assert (tags["base_sha256"], tags["parent_sha256"]) == (digits.fingerprint, step.sha256)
    assert "parent_version" not in tags
    # Measured on the other form: it is said to be of that, and the artifact stays one version.
    dense = open_model(packed["tags"]["dequantised_source"])
    record.write_text(json.dumps({"measurements": {"accuracy": af.accuracy(dense).to_json()}}))
    assert registry.register(first.path, uri=crowded, record=record) == (*one[:3], False)
    metrics = next(row for row in versions(crowded) if row["version"] == one.packed)["metrics"]
    assert set(metrics) == {"KL_a_b_", "of.this", "dequantised.accuracy"}


def test_the_dequantised_form_is_what_the_packed_one_decodes_to(crowded: str, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = af.compress(str(tiny_llama), "rounding:bits=4,group=32", tmp_path / "llama", progress=False)
    found = registry.register(artifact.path, uri=crowded, name="llama")
    folder = Path(versions(crowded, "llama")[0]["tags"]["dequantised_source"])
    decoded = load(artifact.path).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(theirs[name], tensor.float()) for name, tensor in decoded.items())
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert registry.register(artifact.path, uri=crowded, name="llama") == (*found[:3], False)
    assert torch.equal(open_model(folder).tensor("model.norm.weight"), decoded["model.norm.weight"].float())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"measurements": {"a": 0.97}}, "a: no measurement"),
        ({"measurements": {"a": {"value": float("nan"), "n": 1}}}, "a: no measurement"),
        ({"model": "x"}, "holds no measurement of this artifact"),
        ([], "expected a JSON object"),
    ],
)
def test_a_record_of_something_else_registers_nothing(
    content: Any, reason: str, crowded: str, artifacts: list[Artifact], tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=reason):
        registry.register(artifacts[0].path, uri=crowded, name="nothing", record=record)
    record.write_text(json.dumps({"measurements": {"a": {**af.accuracy(load(artifacts[1].path)).to_json()}}}))
    with pytest.raises(BadInput, match="no measurement of this artifact"):
        registry.register(artifacts[0].path, uri=crowded, name="nothing", record=record)
    assert not versions(crowded, "nothing")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: Any) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["agentforge", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_a_damaged_artifact_is_refused_and_nothing_is_made(
    artifacts: list[Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artifacts[0].path, tmp_path / "damaged")
    weights = tmp_path / "damaged/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    uri = f"sqlite:///{tmp_path / 'made/mlflow.db'}"
    code, out, err = run(capsys, monkeypatch, "register", tmp_path / "damaged", "--registry", uri)
    assert code == 2 and not out
    assert err.count("\n") == 1 and "its sha256 is another" in err
    assert not (tmp_path / "made").exists() and registry.registered(uri) == []


def test_the_command_line_registers_and_lists(
    crowded: str, artifacts: list[Artifact], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFORGE_REGISTRY", crowded)
    code, out, _ = run(capsys, monkeypatch, "register", artifacts[2].path, "--name", "shown", "--json")
    assert code == 0 and json.loads(out) == {"name": "shown", "packed": 1, "dequantised": 1, "new": True}
    code, out, _ = run(capsys, monkeypatch, "register", artifacts[2].path, "--name", "shown", "--alias", "best")
    assert code == 0 and "is already there: shown, version 1, packed and dequantised" in out
    code, out, _ = run(capsys, monkeypatch, "models", "shown", "--registered", "--json")
    listed = json.loads(out)["registered"]
    assert [(row["version"], row["aliases"], row["tags"]["handoff"]) for row in listed] == [(1, ["best"], "none")]
    code, out, _ = run(capsys, monkeypatch, "models", "--registered")
    assert code == 0 and "best" in out


def test_what_cannot_be_used_is_refused_in_a_sentence(
    artifacts: list[Artifact], crowded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = artifacts[0].path
    for uri in ("mlflow.db", "sqlite:mlflow.db", "sqlite:///a?b=c"):
        with pytest.raises(BadInput, match="expected a URI such as"):
            registry.register(path, uri=uri)
    for name in ("a'b", "../a", "", "a" * 300):
        with pytest.raises(BadInput, match="expected letters"):
            registry.register(path, uri=crowded, name=name)
    for alias in ("latest", "v1", "a b", ""):
        with pytest.raises(BadInput, match="expected letters"):
            registry.register(path, uri=crowded, aliases=(alias,))
    (tmp_path / "no.db").write_bytes(b"this is no database, and long enough to be read as one" * 40)
    with pytest.raises(BadInput, match="check the registry and run the same command again"):
        registry.register(path, uri=f"sqlite:///{tmp_path / 'no.db'}")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BadInput, match=r"the registry needs the package mlflow; pip install 'agentforge\[registry\]'"):
        registry.register(path, uri=crowded)
