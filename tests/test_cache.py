"""The cache folder: what lies there is told as it is, and only what is agentforge's and not in use is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import agentforge
from agentforge import cli
from agentforge.cache import cached, use
from agentforge.errors import BadInput
from agentforge.exports import export

OPEN = "import sys, agentforge; model = agentforge.open_model({path!r}); print(model.path, flush=True); sys.stdin.read()"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    artifact = agentforge.compress(tiny_llama, "ggml:type=q8_0", folder / "a", progress=False)
    return export(artifact, "gguf", folder / "tiny.gguf").path


@pytest.fixture
def other(cache: Path, gguf: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has the GGUF file open until its standard input ends."""
    command = [sys.executable, "-c", OPEN.format(path=str(gguf))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert Path(process.stdout.readline().strip()).parent == cache
        yield process
        process.kill()


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`agentforge cache` with these arguments: its exit code, and what it says, in one line each."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agentforge", "cache", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        return int(stop.value.code or 0), out, err

    return call


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_copy_of_a_gguf_file_is_listed_with_its_size_and_removed(
    cache: Path, gguf: Path, other: subprocess.Popen[str], command: Command
) -> None:
    (entry,) = (one | {"kept": ""} for one in cached())
    folder = cache / entry["name"]
    assert entry["what"] == "converted from tiny.gguf"
    assert entry["bytes"] == sum(file.stat().st_size for file in folder.iterdir()) > gguf.stat().st_size

    # While the other process has it open, it stays: asked for by its name it is an error, else a word.
    before = tree(folder)
    refused = f"agentforge: {entry['name']}: is not cleared; in use by a running process"
    assert command("--clear", entry["name"]) == (2, "", refused)
    code, out, _ = command("--clear")
    assert code == 0 and "stays: in use" in out and "0.0 MB cleared" in out
    assert tree(folder) == before

    # Its lock ends with it, even by a kill.
    other.kill()
    other.wait()
    found = json.loads(command("--clear", "--json")[1])
    assert found == {"path": str(cache), "entries": [entry], "cleared": [entry["name"]]}
    assert list(cache.iterdir()) == []
    assert agentforge.open_model(gguf).path == folder  # made again
    assert tree(folder) == before


def test_what_is_not_ours_stays(cache: Path, tmp_path: Path, command: Command) -> None:
    mine = {
        "thesis.tex": "x",
        "notes/a.txt": "x",
        "gguf-0123456789abcdef-2/model.safetensors": "x",  # without our mark
        "digits-mlp-2/agentforge-source.json": '{"name": "digits-mlp", "files": {}}',
        "digits-mlp-2/mine.txt": "x",  # beside what our mark accounts for
        "candidates/0123456789abcdef.jsonl": "{}",
        "candidates/mine.csv": "x",
        "registry/mlflow.db": "x",
        ".smollm2-135m-2-abcdefgh.txt": "x",
    }
    for name, text in mine.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(text)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/model").write_text("x")
    (cache / "digits-mlp-1").symlink_to(tmp_path / "outside")
    before = tree(cache)
    found = {entry["name"]: entry["kept"] for entry in cached(clear=True)}
    assert set(found) == {path.name for path in cache.iterdir()} and all(found.values()), found
    assert "'mine.txt', which agentforge did not put there" in found["digits-mlp-2"]
    assert tree(cache) == before and (tmp_path / "outside/model").exists()
    assert command("--clear", "registry")[0] == 2


def test_what_is_ours_goes(cache: Path) -> None:
    ours = [
        "candidates/0123456789abcdef.jsonl",
        "candidates/0123456789abcdef.counted.jsonl",
        f"measurements/{'0' * 32}.json",
    ]
    ours += [".gguf-0123456789abcdef-2-abcd_123/model/model.safetensors"]  # of a conversion that was killed
    for name in ours:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("{}")
    assert use(cache / "candidates") and use(cache / "candidates")  # as `fit` does
    kept = {entry["name"]: bool(entry["kept"]) for entry in cached(clear=True)}
    assert kept == {"candidates": True, "measurements": False, ".gguf-0123456789abcdef-2-abcd_123": False}
    assert [path.name for path in cache.iterdir()] == ["candidates"]
    with pytest.raises(BadInput, match=r"cache entry 'candidate' does not exist; .*did you mean candidates"):
        cached("candidate", clear=True)


def test_a_folder_that_was_made_again_is_held_again(cache: Path) -> None:
    folder = cache / "measurements"
    folder.mkdir(parents=True)
    assert use(folder)
    os.rename(folder, cache / "aside")  # by hand: no lock stops that
    assert not use(folder)
    folder.mkdir()
    assert use(folder)
    assert [entry["kept"] for entry in cached("measurements", clear=True)] == ["in use by a running process"]


def test_an_empty_cache_is_no_error(cache: Path, command: Command) -> None:
    code, out, _ = command("--json")
    assert (code, json.loads(out)) == (0, {"path": str(cache), "entries": [], "cleared": []})
    assert not cache.exists()
