"""Nothing is removed or replaced but what agentforge has made, and a kill at any moment leaves the old or the new whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import agentforge
from agentforge import allocation, folders, registry
from agentforge.artifact import Artifact, dequantize
from agentforge.audit import report
from agentforge.chain import Chain, run_chain
from agentforge.errors import BadInput
from agentforge.models import LanguageModel
from agentforge.training.recover import Settings, recover

QUICK = Settings(steps=2, batch=8, evaluate=1)
TWO: dict[str, Any] = {"name": "two", "gates": ["ratio >= 1"]}


def chain(stage: str) -> Chain:
    return Chain.model_validate({**TWO, "steps": [{"name": "a", "try": [stage]}]})


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def make_report(folder: Path, note: str = "") -> Path:
    """What marks a report: a record, and the files that are drawn from it."""
    folder.mkdir()
    (folder / f"{folder.name}.json").write_text(json.dumps({"report": folder.name, "claims": [], "note": note}))
    (folder / f"{folder.name}.html").write_text("drawn")
    (folder / "figure-1.png").write_bytes(b"")
    return folder


def audit(out: Path) -> None:
    """The audit of a report named as the folder, as far as it touches folders: nothing is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "read_claims", lambda _: Mock(report=out.name, model=None, against=None, folder=None))
        patch.setattr(report, "_execute", Mock(side_effect=BadInput("nothing is in the way of out")))
        report.run("claims.yaml", out=out.parent)


def fit(out: Path, model: LanguageModel, **_: Any) -> None:
    out = folders.check_out(out, model.path, replace=True)
    with allocation.folder_beside(out) as folder:
        agentforge.compress(model, "rounding:bits=3", folder / "made", progress=False)
        allocation.take(folder / "made", out, True)


COMMANDS: dict[str, Callable[[LanguageModel, Path], object]] = {
    "compress": lambda m, out: agentforge.compress(m, "rounding:bits=3", out, overwrite=True, progress=False),
    "recover": lambda m, out: recover(m, out, settings=QUICK, overwrite=True, progress=False),
    "pipeline": lambda m, out: run_chain(m, chain("rounding:bits=3"), out, overwrite=True, progress=False),
    "fit": lambda m, out: fit(out, m),
    "dequantize": lambda m, out: dequantize(agentforge.compress(m, "ternary", out.with_name("a"), progress=False), out),
    "audit": lambda _, out: audit(out),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["out", "out.partial", "out.agentforge-old"])
@pytest.mark.parametrize("kind", ["a folder of the user's", "an artifact with a file of the user's", "a file", "a link"])
def test_what_others_made_stays(digits: LanguageModel, tmp_path: Path, command: str, place: str, kind: str) -> None:
    """At the place itself, and at each one where something unfinished or old would lie."""
    precious = tmp_path / place
    if kind == "an artifact with a file of the user's":
        agentforge.compress(digits, "rounding:bits=4", precious, progress=False)
        (precious / "thesis.txt").write_text("years of work")
    elif kind == "a file":
        precious.write_text("years of work")
    else:
        folder = tmp_path / "elsewhere" if kind == "a link" else precious
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "thesis.txt").write_text("years of work")
        if kind == "a link":
            precious.symlink_to(folder)
    before = hashes(tmp_path)
    refused = ""
    try:
        COMMANDS[command](digits, tmp_path / "out")
    except BadInput as error:
        refused = str(error)
    assert refused or place not in ("out", "out.agentforge-old")
    assert len(refused.splitlines()) <= 1
    assert before.items() <= hashes(tmp_path).items()
    assert precious.is_symlink() == (kind == "a link")


MADE: dict[str, Callable[[LanguageModel, Path], object]] = {
    "artifact": lambda m, out: agentforge.compress(m, "rounding:bits=4", out, progress=False),
    "trained": lambda m, out: recover(m, out, settings=QUICK, progress=False),
    "chain": lambda m, out: run_chain(m, chain("ternary"), out, progress=False),
    "dense": lambda m, out: dequantize(agentforge.compress(m, "ternary", out.with_name("a"), progress=False), out),
    "report": lambda _, out: make_report(out),
    "empty": lambda _, out: out.mkdir(),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_agentforge_made_is_told_from_what_it_did_not(digits: LanguageModel, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    MADE[kind](digits, out)
    assert folders.foreign(out) is None
    inside = [out, *(path for path in out.rglob("*") if path.is_dir())]
    for folder in inside:
        for name in ("notes.txt", "data.json", "weights.safetensors", "thesis.docx"):
            (folder / name).write_text("{}")
            assert name in (folders.foreign(out) or ""), folder
            with pytest.raises(BadInput, match=name):
                folders.remove(out)
            (folder / name).unlink()
    folders.remove(out)
    assert not out.exists()


class Killed(BaseException):
    """As SIGKILL would: nothing that the code under test might handle."""


@pytest.fixture
def killed_at() -> Iterator[Callable[[int], None]]:
    """Let the n-th change of a name or removal be the one before which the process dies."""
    with pytest.MonkeyPatch.context() as patch:

        def arm(after: int) -> None:
            left = iter(range(after))

            def until(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if next(left, None) is None:
                        raise Killed
                    return real(*args, **kwargs)

                return call

            patch.setattr(os, "replace", until(os.replace))
            patch.setattr(shutil, "rmtree", until(shutil.rmtree))
            patch.setattr(Path, "unlink", until(Path.unlink))
            patch.setattr(Path, "rmdir", until(Path.rmdir))

        arm.undo = patch.undo  # type: ignore[attr-defined]
        yield arm


@pytest.mark.parametrize("kind", ["artifact", "chain", "dense", "report"])
def test_a_kill_at_any_step_of_a_replacement_leaves_one_whole(
    digits: LanguageModel, tmp_path: Path, kind: str, killed_at: Any
) -> None:
    """And the next run puts it in its place, and clears away what is left of the other."""
    old, new = tmp_path / "templates" / "old", tmp_path / "templates" / "new"
    for place in (old, new):
        place.mkdir(parents=True)
        MADE[kind](digits, place / "out")
    changed = next(path for path in sorted((new / "out").rglob("*")) if path.suffix in (".html", ".safetensors"))
    changed.write_bytes(changed.read_bytes() + b"new")
    wanted = [hashes(old / "out"), hashes(new / "out")]
    steps = 0
    for steps in range(100):
        place = tmp_path / str(steps)
        shutil.copytree(old / "out", place / "out")
        shutil.copytree(new / "out", place / "scratch" / "out")
        killed_at(steps)
        try:
            folders.replace(place / "scratch" / "out", place / "out")
            done = True
        except Killed:
            done = False
        killed_at.undo()
        found = [
            hashes(path)
            for path in (place / "out", place / "out.agentforge-old", place / "scratch" / "out")
            if path.exists()
        ]
        assert any(whole in found for whole in wanted)
        folders.check_out(place / "out", replace=True)
        assert hashes(place / "out") in wanted
        assert not (place / "out.agentforge-old").exists()
        if done:
            assert hashes(place / "out") == wanted[1]
            break
    assert steps >= 4


KILLED = """
import os, signal, sys
from pathlib import Path
from agentforge import folders
real, left = os.replace, iter(range(int(sys.argv[3])))
def replace(*names):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
folders.replace(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_real_kill_between_the_renames(digits: LanguageModel, tmp_path: Path, renames: int) -> None:
    out, made = tmp_path / "out", tmp_path / "made"
    agentforge.compress(digits, "rounding:bits=4", out, progress=False)
    agentforge.compress(digits, "ternary", made, progress=False)
    before = hashes(out)
    done = subprocess.run([sys.executable, "-c", KILLED, str(made), str(out), str(renames)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == (renames == 0)
    with pytest.raises(BadInput, match="--overwrite"):  # another recipe: the old one is there again, and told
        agentforge.compress(digits, "rounding:bits=5", out, progress=False)
    assert hashes(out) == before
    agentforge.compress(digits, "rounding:bits=5", out, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]


@pytest.mark.parametrize("command", ["compress", "recover", "pipeline", "fit"])
def test_a_model_is_not_written_over(digits: LanguageModel, tmp_path: Path, command: str, monkeypatch: Any) -> None:
    """Nor the folder that one is in, nor any above them."""
    model = agentforge.compress(digits, "rounding:bits=8", tmp_path / "in" / "model", progress=False)
    opened = agentforge.open_model(model.path)
    monkeypatch.chdir(tmp_path / "in")
    before = hashes(tmp_path)
    for out in ("model", ".", "..", "model/..", "./model/", str(model.path), str(tmp_path), "/"):
        with pytest.raises(BadInput) as error:
            COMMANDS[command](opened, Path(out))
        assert len(str(error.value).splitlines()) == 1
    assert hashes(tmp_path) == before


def test_the_registry_removes_no_folder_of_others(digits: LanguageModel, tmp_path: Path) -> None:
    artifact = agentforge.compress(digits, "ternary", tmp_path / "a", progress=False)
    (tmp_path / "dequantised" / artifact.sha256).mkdir(parents=True)
    (tmp_path / "dequantised" / artifact.sha256 / "thesis.txt").write_text("years of work")
    (tmp_path / "r.db.partial").mkdir()
    (tmp_path / "r.db.partial" / "thesis.txt").write_text("years of work")
    before = hashes(tmp_path)
    with pytest.raises(BadInput, match="thesis"):
        registry._dequantised(artifact, artifact.sha256, f"sqlite:///{tmp_path / 'r.db'}")
    assert hashes(tmp_path) == before


def test_saving_removes_no_weights_of_others(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import agentforge.huggingface

    agentforge.compress(tiny_llama, "rounding:bits=4,group=32", tmp_path / "a", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    shutil.copytree(tiny_llama, tmp_path / "b")
    before = hashes(tmp_path / "b")
    with pytest.raises(BadInput, match="holds the weights"):
        model.save_pretrained(tmp_path / "b")
    assert hashes(tmp_path / "b") == before
    model.save_pretrained(tmp_path / "c")
    model.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    model.generation_config.max_new_tokens = 7  # what is changed here is written with its hash
    model.save_pretrained(tmp_path / "c")
    Artifact(tmp_path / "c").verify()
    assert json.loads((tmp_path / "c" / "generation_config.json").read_text())["max_new_tokens"] == 7


@pytest.mark.parametrize("name", ["thesis.tmp/chapter1", "notes.tmp", "x.0123456789abcdef.tmp/y"])
def test_only_files_that_a_kill_left_are_temporary(tmp_path: Path, name: str) -> None:
    (made := tmp_path / "made").mkdir()
    (made / "recipe.json").write_text('{"stage": "ternary"}')
    (made / "recipe.json.0123456789abcdef.tmp").write_text("{")
    assert folders.foreign(made) is None
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("mine")
    assert "which agentforge did not put there" in str(folders.foreign(made))


MARKS = [("journal.json", '{"diary": 1}'), ("journal.json", "[1]"), ("recipe.json", "two eggs"), ("recipe.json", "{}")]


@pytest.mark.parametrize(("name", "text"), MARKS)
def test_a_file_of_that_name_alone_marks_nothing(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert "nothing that says agentforge made it" in str(folders.foreign(tmp_path))
    with pytest.raises(BadInput, match="is not removed"):
        folders.remove(tmp_path)
    assert (tmp_path / name).read_text() == text


def test_a_lock_that_holds_something_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    assert folders.foreign(tmp_path) is None
    (tmp_path / "lock").write_text("combination: 1234")
    assert "nothing that says agentforge made it" in str(folders.foreign(tmp_path))


def test_a_copy_that_the_user_called_old_stays(digits: LanguageModel, tmp_path: Path) -> None:
    for _ in range(2):  # made, and finished already
        agentforge.compress(digits, "rounding", tmp_path / "a", progress=False)
        if not (tmp_path / "a.old").exists():
            shutil.copytree(tmp_path / "a", tmp_path / "a.old")
    agentforge.compress(digits, "ternary", tmp_path / "a", overwrite=True, progress=False)
    assert Artifact(tmp_path / "a.old").manifest["recipe"]["stage"]["stage"] == "rounding"
    shutil.rmtree(tmp_path / "a")
    agentforge.compress(digits, "ternary", tmp_path / "a", progress=False)
    assert (tmp_path / "a.old").exists()
