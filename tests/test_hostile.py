"""Hostile artifacts (hostile/make.py): each is refused in one sentence, opens nothing, and never takes much memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.make import CASES, MANIFEST, MARKER, SHARD, Bomb, Case
from safetensors.torch import save_file

import agentforge
from agentforge import artifact as artifact_module
from agentforge import cli
from agentforge.artifact import Artifact
from agentforge.errors import BadArtifact, BadInput

pytestmark = pytest.mark.usefixtures("bounded")


def small_classifier(folder: Path) -> Path:
    """A digits model whose hidden layers are so odd that packed codes need padding."""
    from agentforge.digits import MODEL_TYPE, DigitsMLP

    folder.mkdir()
    torch.manual_seed(0)
    model = DigitsMLP((7, 5))
    save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, folder / SHARD)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, "hidden": [7, 5]}))
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """The good artifacts that the cases start from, each made once."""
    root = tmp_path_factory.mktemp("good")
    recipes: dict[str, tuple[Any, str]] = {
        "rounding": ("digits-mlp", "rounding:bits=4,group=64"),
        "rounding-rows": ("digits-mlp", "rounding:bits=4,group=0"),
        "rounding-symmetric": ("digits-mlp", "rounding:bits=4,symmetric=true"),
        "rounding-odd": (None, "rounding:bits=3,group=64"),
        "ternary": ("digits-mlp", "ternary"),
        "ternary-2bit": ("digits-mlp", "ternary:packing=2bit"),
        "sharded": ("digits-mlp", "rounding:bits=4,group=64"),
        "llama": (tiny_llama, "rounding:bits=4,group=64"),
    }

    def good(name: str) -> Path:
        if not (root / name).exists():
            model, stage = recipes[name]
            if model is None:
                model = small_classifier(root / "small")
            with pytest.MonkeyPatch.context() as patch:
                if name == "sharded":
                    patch.setattr(artifact_module, "SHARD_BYTES", 3000)
                agentforge.compress(model, stage, root / name, progress=False)
        return root / name

    return good


@pytest.fixture
def spoiled(request: pytest.FixtureRequest, tmp_path: Path, bases: Callable[[str], Path]) -> Path:
    """The artifact of the case whose name is the parameter."""
    case = CASES[request.param]
    folder = tmp_path / "artifact"
    shutil.copytree(bases(case.base), folder)
    case.spoil(folder)
    return folder


def assert_sentence(text: str) -> None:
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 600, text


def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["agentforge", *args])
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    assert isinstance(code, int)
    return code, captured.out, captured.err


AS_JSON = (  # where the JSON form is tried, too
    "shard_with_a_flipped_bit",
    "shard_is_a_pickle",
    "scale_plane_with_nan",
    "manifest_with_an_empty_recipe",
    "manifest_with_a_nameless_original",
    "manifest_of_100000_brackets",
    "row_with_an_error_beyond_floats",
    "row_with_a_name_that_is_no_text",
    "row_with_a_name_of_two_lines",
    "folder_empty",
)


def both_forms(wanted: Callable[[Case], bool]) -> list[tuple[str, str]]:
    """(case, form) for the table form of every wanted case and the JSON form of some."""
    names = [name for name, case in CASES.items() if wanted(case)]
    return [(name, "table") for name in names] + [(name, "json") for name in names if name in AS_JSON]


@pytest.mark.parametrize(
    "base",
    ["rounding", "rounding-rows", "rounding-symmetric", "rounding-odd", "ternary", "ternary-2bit", "sharded", "llama"],
)
def test_the_good_artifacts_are_good(base: str, bases: Callable[[str], Path]) -> None:
    folder = bases(base)
    Artifact(folder).verify()
    assert agentforge.open_model(folder).model is not None
    assert (folder / "model.safetensors.index.json").exists() == (base == "sharded")


@pytest.mark.parametrize("spoiled", [name for name, case in CASES.items() if case.verify], indirect=True)
def test_verify_refuses(spoiled: Path) -> None:
    with pytest.raises(BadInput) as error:
        Artifact(spoiled).verify()
    assert_sentence(str(error.value))
    assert not (spoiled.parent / MARKER).exists()


@pytest.mark.parametrize("spoiled", [name for name, case in CASES.items() if case.load], indirect=True)
def test_opening_refuses(spoiled: Path) -> None:
    with pytest.raises(BadInput) as error:
        _ = agentforge.open_model(spoiled).model
    assert_sentence(str(error.value))
    assert not (spoiled.parent / MARKER).exists()


@pytest.mark.parametrize("spoiled", [name for name, case in CASES.items() if not case.load], indirect=True)
def test_what_opening_does_not_check_does_no_harm(spoiled: Path) -> None:
    with contextlib.suppress(BadInput):
        _ = agentforge.open_model(spoiled).model
    assert not (spoiled.parent / MARKER).exists()


@pytest.mark.parametrize("spoiled", [name for name, case in CASES.items() if not case.verify], indirect=True)
def test_what_verify_does_not_check_does_no_harm(spoiled: Path) -> None:
    with contextlib.suppress(BadInput):
        Artifact(spoiled).verify()
    assert not (spoiled.parent / MARKER).exists()


@pytest.mark.parametrize(("spoiled", "form"), both_forms(lambda case: case.verify), indirect=["spoiled"])
def test_the_command_verify_says_no(
    spoiled: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_cli(monkeypatch, capsys, "verify", str(spoiled), *(["--json"] if form == "json" else []))
    assert code == 1
    if form == "json":
        said = json.loads(out)
        assert said["ok"] is False
        assert_sentence(said["error"])
        assert err == ""
    else:
        assert out == ""
        assert_sentence(err)
        assert err.startswith("agentforge: ")


@pytest.mark.parametrize(("spoiled", "form"), both_forms(lambda case: True), indirect=["spoiled"])
def test_the_command_inspect_shows_or_refuses(
    spoiled: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_cli(monkeypatch, capsys, "inspect", str(spoiled), *(["--json"] if form == "json" else []))
    if code == 0:
        assert out
        assert err == ""
    else:
        assert code == 2
        assert_sentence(err)
        assert out == ""


def test_the_traps_work(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(Bomb(tmp_path / MARKER)))
    assert (tmp_path / MARKER).exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    """It keeps every file as a link to a blob of the same repository."""
    folder, blobs = tmp_path / "models--o--m" / "snapshots" / "abc", tmp_path / "models--o--m" / "blobs"
    shutil.copytree(bases("rounding"), folder)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("..", "..", "blobs", str(i)))
    assert len(Artifact(folder).verify()) == 3
    assert agentforge.load(folder).state_dict()
    agentforge.compress(folder, "ternary", tmp_path / "again", progress=False)


@pytest.mark.parametrize(
    "name", [SHARD, "config.json", MANIFEST, "LICENSE", "tokenizer.json", "model.safetensors.index.json"]
)
def test_links_that_lead_elsewhere_are_refused_by_name(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    """What they lead to would be read as a model's, and copied into what is made of it."""
    secret = tmp_path / "secret"
    folder = tmp_path / "models--o--m" / "snapshots" / "abc"
    shutil.copytree(tiny_llama, folder)
    secret.write_text("of somebody else")
    if (folder / name).exists():
        shutil.move(folder / name, secret)
    (tmp_path / "models--o--m" / "blobs").symlink_to(tmp_path)  # nor is this a way out
    (folder / name).symlink_to(tmp_path / "models--o--m" / "blobs" / "secret")
    if name == MANIFEST:
        with pytest.raises(BadInput, match=name):
            Artifact(folder)
        return
    with pytest.raises(BadInput, match=name) as error:
        agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    assert_sentence(str(error.value))
    assert not (tmp_path / "a").exists()
    (folder / name).unlink()
    (folder / "inside").write_bytes(secret.read_bytes())
    (folder / name).symlink_to("inside")
    if name in (SHARD, "config.json", "LICENSE", "tokenizer.json"):
        agentforge.compress(folder, "ternary", tmp_path / "a", progress=False).verify()


def test_refusing_an_absurd_shape_allocates_nothing(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    import tracemalloc

    for name in (
        "row_with_an_absurd_shape",
        "row_with_an_absurd_shape_and_bytes",
        "header_length_of_2_to_the_62",
        "header_with_an_absurd_shape_and_offsets",
    ):
        folder = tmp_path / name
        shutil.copytree(bases("rounding"), folder)
        CASES[name].spoil(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        with pytest.raises(BadInput):
            Artifact(folder).verify()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, name  # in KiB


@pytest.mark.parametrize("name", ["shard_is_a_pickle", "row_with_an_absurd_shape_and_bytes"])
def test_the_command_in_a_process_of_its_own(name: str, tmp_path: Path, bases: Callable[[str], Path]) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(bases("rounding"), folder)
    CASES[name].spoil(folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    done = subprocess.run(
        [sys.executable, "-m", "agentforge", "verify", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env=os.environ,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert_sentence(done.stderr)
    assert not (tmp_path / MARKER).exists()


def test_what_leads_beyond_float32_saturates(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    """What verify lets through decodes to numbers."""
    folder = tmp_path / "artifact"
    shutil.copytree(bases("rounding"), folder)
    CASES["exponent_that_leads_beyond_float32"].spoil(folder)
    with contextlib.suppress(BadInput):
        Artifact(folder).verify()
        assert all(torch.isfinite(t).all() for t in agentforge.load(folder).state_dict().values())


def test_a_refusal_is_a_bad_artifact(tmp_path: Path) -> None:
    """The common first mistake, a folder that is none: told apart from other bad input by its type."""
    with pytest.raises(BadArtifact, match=MANIFEST):
        Artifact(tmp_path)
    with pytest.raises(BadArtifact):
        Artifact(tmp_path / "missing")
