"""The safetensors files that agentforge writes, read back by the safetensors library; the folders that it refuses."""

from __future__ import annotations

import concurrent.futures
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agentforge import tensorfiles
from agentforge.errors import BadInput
from agentforge.tensorfiles import (
    DTYPES,
    index_file,
    index_folder,
    plain_file,
    read_json,
    read_tensor,
    write_atomic,
    write_json,
    write_safetensors,
    write_tensors,
)


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    values = torch.arange(-7, -7 + 15).reshape(3, 5) if shape == (3, 5) else torch.ones(shape)
    return (values % 2).to(dtype) if dtype == torch.bool else values.abs().to(dtype)


def one_line(error: pytest.ExceptionInfo[BadInput]) -> str:
    text = str(error.value)
    assert text.strip()
    assert "\n" not in text
    return text


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_is_read_back_by_the_library(tmp_path: Path, code: str) -> None:
    tensor = sample(DTYPES[code])
    write_tensors(tmp_path / "a.safetensors", {"x": tensor})
    back = load_file(tmp_path / "a.safetensors")["x"]
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == code


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_every_shape_is_read_back_by_the_library(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"before": torch.tensor([1.5]), "x": torch.full(shape, 2.5), "after": torch.tensor([7], dtype=torch.int64)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = load_file(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)


def test_names_and_metadata_may_be_any_unicode(tmp_path: Path) -> None:
    names = ["größe", "重み", 'a b"c\\d', "new\nline", "𝛼", ""]
    write_tensors(tmp_path / "a.safetensors", {n: torch.tensor([float(i)]) for i, n in enumerate(names)}, {"k": 'ü\n"x'})
    back = load_file(tmp_path / "a.safetensors")
    assert {n: float(back[n]) for n in names} == {n: float(i) for i, n in enumerate(names)}
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"k": 'ü\n"x'}


def test_tensors_that_are_not_contiguous_are_written_in_their_own_order(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"t": base.T, "strided": base[:, ::2]})
    back = load_file(tmp_path / "a.safetensors")
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["strided"], base[:, ::2])


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_begins_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"n" * length: torch.tensor([1.0, 2.0])})
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert size % 8 == 0
    header = json.loads(raw[8 : 8 + size])
    begin, end = header["n" * length]["data_offsets"]
    assert raw[8 + size + begin : 8 + size + end] == struct.pack("<2f", 1.0, 2.0)
    assert len(raw) == 8 + size + end


def test_a_stream_of_several_parts_is_the_same_file(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.uint8)
    write_tensors(tmp_path / "whole.safetensors", {"a": a, "b": b})

    def parts() -> Iterator[bytes]:
        raw = a.numpy().tobytes() + b.numpy().tobytes()
        for i in range(0, len(raw), 5):
            yield raw[i : i + 5]

    described = [("a", torch.float32, (2, 3)), ("b", torch.uint8, (4,))]
    write_safetensors(tmp_path / "parts.safetensors", described, parts())
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_stream_of_the_wrong_length_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 bytes for tensors of 8"):
        write_safetensors(tmp_path / "a.safetensors", [("x", torch.float32, (2,))], [b"abc"])
    assert not (tmp_path / "a.safetensors").exists()


def test_reading_one_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(2, 3, dtype=torch.int8)})
    entries = index_file(tmp_path / "a.safetensors")
    assert {n: (e.shape, e.dtype, e.bytes) for n, e in entries.items()} == {
        "x": ((2,), torch.float32, 8),
        "y": ((2, 3), torch.int8, 6),
    }
    assert torch.equal(read_tensor("x", entries["x"]), torch.tensor([1.0, 2.0]))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-7])
    with pytest.raises(BadInput) as error:
        read_tensor("x", entries["x"])
    assert "tensor x" in one_line(error)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(BadInput):
        read_tensor("x", entries["x"])


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 100, b"\xff" * 100, b"{}" * 50, b"\x80\x04\x95" + b"a" * 50])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(BadInput) as error:
        index_file(tmp_path / "a.safetensors")
    assert "a.safetensors" in one_line(error)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(8)})
    raw = (tmp_path / "a.safetensors").read_bytes()
    for length in range(0, len(raw), 7):
        (tmp_path / "b.safetensors").write_bytes(raw[:length])
        with pytest.raises(BadInput) as error:
            index_file(tmp_path / "b.safetensors")
        one_line(error)


def test_a_dtype_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"odd": torch.zeros(4, dtype=torch.float8_e8m0fnu)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput) as error:
        index_file(tmp_path / "a.safetensors")
    assert "tensor odd has dtype F8_E8M0" in one_line(error)


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A folder of two shards and its index; returns all tensors."""
    tensors = {name: torch.full((2, 2), float(i)) for i, name in enumerate("abc")}
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in "bc"}, folder / "model-00002-of-00002.safetensors")
    weight_map = {n: f"model-0000{1 if n == 'a' else 2}-of-00002.safetensors" for n in "abc"}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return tensors


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    entries = index_folder(tmp_path)
    assert list(entries) == ["x"]
    assert entries["x"].file == tmp_path / "model.safetensors"


def test_a_folder_with_shards(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    entries = index_folder(tmp_path)
    assert set(entries) == set(tensors)
    assert all(torch.equal(read_tensor(n, entries[n]), t) for n, t in tensors.items())
    assert len({entry.file for entry in entries.values()}) == 2


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput) as error:
        index_folder(tmp_path)
    assert "model-00002-of-00002.safetensors is missing" in one_line(error)


@pytest.mark.parametrize("change", ["more in the index", "more in the files"])
def test_an_index_that_does_not_match_the_files_is_refused(tmp_path: Path, change: str) -> None:
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "more in the index":
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    else:
        del index["weight_map"]["c"]
    path.write_text(json.dumps(index))
    with pytest.raises(BadInput) as error:
        index_folder(tmp_path)
    assert f"tensor {'ghost' if change == 'more in the index' else 'c'} is not where the index says" in one_line(error)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "", ".", "..", "a\\b", "x/", "./x", "a\0b"])
def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    # Whatever the name would lead to is there and holds good tensors: only the name is wrong.
    for target in (tmp_path / "x", folder / "a" / "b", folder / "x"):
        save_file({"x": torch.ones(3)}, target)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})
    with pytest.raises(BadInput) as error:
        index_folder(folder)
    assert "leads out of the folder" in one_line(error)
    with pytest.raises(BadInput):
        plain_file(folder, name)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["model.safetensors"]}])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00001.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(BadInput, match="expected a weight_map") as error:
        index_folder(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickled_folder_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(marker), "w"))  # type: ignore[return-value]

    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"x": Bomb()}, folder / name)
    with pytest.raises(BadInput) as error:
        index_folder(folder)
    assert f"pickled ({name})" in one_line(error)
    assert not marker.exists()
    torch.load(folder / name, weights_only=False)
    assert marker.exists(), "the trap itself must work"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.safetensors is missing"):
        index_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a":' * 100_000, "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'"{}"', "expected a JSON object, found str"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_json(path)
    assert message in one_line(error)
    assert "a.json" in str(error.value)


def test_json_that_is_missing_too_large_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(BadInput, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "big.json").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(BadInput, match="expected at most 50"):
        read_json(tmp_path / "big.json", limit=50)
    assert read_json(tmp_path / "big.json", limit=109) == {"a": "x" * 100}


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    data = {"ä": [1, 2.5, None, True], "b": {"c": "\n\"'"}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_writer_that_fails_midway_leaves_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"new and "
        raise RuntimeError("the disk fell off")

    path = tmp_path / "a"
    with pytest.raises(RuntimeError, match="fell off"):
        write_atomic(path, broken())
    assert not path.exists()
    write_atomic(path, [b"old"])
    with pytest.raises(RuntimeError, match="fell off"):
        write_atomic(path, broken())
    assert path.read_bytes() == b"old"
    write_atomic(path, [b"new ", memoryview(b"and whole")])
    assert path.read_bytes() == b"new and whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Whoever renames last wins, with a whole file; nothing else stays, and the mode is what the umask says."""

    def write(i: int) -> None:
        write_atomic(tmp_path / "file", (bytes([i]) * 4096 for _ in range(50)))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    data = (tmp_path / "file").read_bytes()
    assert data == data[:1] * 4096 * 50
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"x"
        raise OSError("disk full")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "file", parts())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_the_header_is_read_once_however_many_tensors_are_read(tmp_path: Path) -> None:
    """Each read of the whole header would make four times as many take sixteen times as long."""
    file = tmp_path / "many.safetensors"
    write_safetensors(file, [(f"layers.{i}.w", torch.uint8, (1,)) for i in range(300)], [bytes(range(100)) * 3])
    with (
        mock.patch.object(tensorfiles.json, "loads", wraps=json.loads) as parsed,
        mock.patch.object(tensorfiles, "safe_open", wraps=tensorfiles.safe_open) as opened,
    ):
        found = [int(read_tensor(name, entry)) for name, entry in index_file(file).items()]
    assert sorted(found) == sorted([*range(100)] * 3)
    assert parsed.call_count == opened.call_count == 1
