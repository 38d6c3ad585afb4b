"""Tensors in safetensors files: read lazily, written as a stream, hashed.

The safetensors library checks a file's header before anything of it is trusted.  Bytes are read and written by ourselves:
the library reads the whole header again for each tensor, which takes hours for a file of many, and it writes only what is in
memory at once.  The format is eight bytes of header length, a JSON header and the bytes of the tensors in order (tests read
it back with the library).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import pydantic

from .bits import tensor_bytes
from .errors import BadInput

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TEMPLATES = "additional_chat_templates"  # the one folder inside a model's that transformers reads
WEIGHTS_INDEX = "model.safetensors.index.json"
SETTLED = 2.0  # seconds after a change, from which on a file's times tell any further one
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies, and what it is.  offset: of its first byte in the file; -1 if it is not read from there."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = -1

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return self.dtype.itemsize * math.prod(self.shape)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, which the library has checked against the file, and where the data behind it begin.

    Raises BadInput for a file that is not a safetensors file, or that is truncated or inconsistent.
    """
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: no readable safetensors file ({error}); fetch or write it again") from None
    return header, 8 + size


def index_file(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by name, from its header alone.  Raises BadInput as `header_of` does, and for a
    dtype that is not known."""
    header, start = header_of(path)
    entries = {}
    for name, about in sorted(header.items()):  # by name, as the library lists them
        if name != "__metadata__":
            if (code := about["dtype"]) not in DTYPES:
                raise BadInput(f"{path}: tensor {name} has dtype {code}; known are {', '.join(DTYPES)}")
            entries[name] = Entry(path, tuple(about["shape"]), DTYPES[code], start + about["data_offsets"][0])
    return entries


def index_folder(folder: Path, weights: str | None = None) -> dict[str, Entry]:
    """The tensors of a model folder, in the files that transformers takes: model.safetensors, whatever else is there;
    without it the shards that model.safetensors.index.json names.  weights: the file, or index, that config.json names.

    Raises BadInput if there are none; pickled weights are never opened.
    """
    single = plain_file(folder, weights or "model.safetensors")
    index = single if single.name.endswith(".index.json") else plain_file(folder, WEIGHTS_INDEX)
    weight_map: Any = None
    if index is single or (weights is None and index.is_file() and not single.is_file()):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise BadInput(f"{index}: expected a weight_map of tensor names to file names")
        shards = sorted(set(weight_map.values()))
    else:
        shards = [single.name]
    entries: dict[str, Entry] = {}
    for shard in shards:
        path = plain_file(folder, shard)
        if not path.is_file():
            pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
            if pickles and not index.is_file():
                raise BadInput(
                    f"{folder}: its weights are pickled ({pickles[0]}), which can run code when opened; "
                    "convert them to safetensors first"
                )
            raise BadInput(f"{folder}: {shard} is missing; expected a folder with safetensors weights")
        entries.update(index_file(path))
    if weight_map is not None and set(weight_map) != set(entries):
        odd = sorted(set(weight_map) ^ set(entries))[0]
        raise BadInput(f"{index}: tensor {odd} is not where the index says; fetch or write the folder again")
    return entries


def plain_file(folder: Path, name: str) -> Path:
    """`name` inside `folder`.  Raises BadInput if it would lead out of the folder or into another one (but that of chat
    templates), and for a link to a file elsewhere, which would be copied; only the hub's cache keeps its files beside the
    folder, in blobs/."""
    if name.startswith(f"{TEMPLATES}/"):
        return plain_file(plain_file(folder, TEMPLATES), name.removeprefix(f"{TEMPLATES}/"))
    plain = name.isprintable() and len(os.fsencode(name)) <= 255
    if not plain or not name or Path(name).name != name or name in (".", "..") or "\\" in name:
        raise BadInput(f"{folder}: file name {name!a:.80} leads out of the folder; expected a plain name")
    path = folder / name
    if os.path.islink(path):
        target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        blobs = home.parent.parent / "blobs"
        if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
            raise BadInput(f"{path}: is a link that leads out of the folder; put a copy of the file in its place")
    return path


def read_tensor(name: str, entry: Entry) -> torch.Tensor:
    """One tensor, read from its file.  name: for the message of the BadInput that is raised if it cannot be."""
    raw = torch.empty(entry.bytes, dtype=torch.uint8)
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            if file.readinto(raw.numpy().data) != entry.bytes:
                raise BadInput(f"{entry.file}: tensor {name} cannot be read (the file is too short); fetch it again")
    except OSError as error:
        raise BadInput(f"{entry.file}: tensor {name} cannot be read ({error.strerror})") from None
    return raw.view(entry.dtype).reshape(entry.shape)


def read_json(path: Path, limit: int = 256 << 20) -> dict[str, object]:
    """A JSON object from a file.  Raises BadInput if it is missing, too large, broken or no object."""
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: cannot be read (it is not a file)")
        if path.stat().st_size > limit:
            raise BadInput(f"{path}: {path.stat().st_size} bytes; expected at most {limit}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def problem_of(error: pydantic.ValidationError) -> str:
    """What a check of data found first, and where, in one line."""
    first = error.errors(include_url=False)[0]
    parts = [f"{part + 1}" if isinstance(part, int) else ascii(part)[1:-1][:80] for part in first["loc"]]
    return f"{', '.join(parts) or 'top level'}: {'expected an object' if first['type'] == 'model_type' else first['msg']}"


def write_json(path: Path, data: object) -> None:
    """Write JSON under a temporary name and rename it: the file is there whole or not at all."""
    write_atomic(path, [json_bytes(data)])


def json_bytes(data: object) -> bytes:
    """Data as our JSON files have it; what is not UTF-8 in a name of a file becomes an escape."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    data: Iterable[bytes | memoryview],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file as a stream: the tensors' names, dtypes and shapes first, then their bytes in order.

    The file appears under its name only when it is complete and on disk.
    """
    header, size = beginning(tensors, metadata)

    def parts() -> Iterable[bytes | memoryview]:
        yield header
        written = 0
        for part in data:
            written += len(part)
            yield part
        assert written == size, f"{path}: {written} bytes for tensors of {size}"

    write_atomic(path, parts())


def beginning(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, int]:
    """What a safetensors file of these tensors begins with, and how many bytes follow."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        size = Entry(Path(), shape, dtype).bytes
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the library aligns to eight bytes, too
    return len(text).to_bytes(8, "little") + text, offset


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors that are in memory, in the order given."""
    write_safetensors(
        path,
        [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()],
        (tensor_bytes(t) for t in tensors.values()),
        metadata,
    )


def write_sealed(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """`write_tensors` with a hash of all of it among the metadata, for `read_sealed`."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(path, whole, {**metadata, "sha256": _digest(whole, metadata)})


def read_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file as `write_sealed` wrote it; None for one that is missing, or that was damaged since."""
    try:
        metadata: dict[str, str] = dict(header_of(path)[0].get("__metadata__") or {})
        tensors = {name: read_tensor(name, entry) for name, entry in index_file(path).items()}
    except BadInput:
        return None
    said = metadata.pop("sha256", "")
    return (tensors, metadata) if said == _digest(tensors, metadata) else None


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!a} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def write_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to a temporary file beside `path`, which no other writer has, bring it to disk, and rename it."""
    temporary = path.with_name(f"{path.name[:60]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk its space is needed
        raise


def sha256_file(path: Path, again: bool = False) -> str:
    """The sha256 of a file's bytes, in hex.  A file is read once in a process, for as long as its times and size do not say
    that it was changed.  again: read it in any case."""
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if again or state not in _hashes:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time() - max(about.st_mtime, about.st_ctime) < SETTLED:
                return digest
            _hashes[state] = digest
        return _hashes[state]


_hashes: dict[tuple[int, ...], str] = {}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each file in a folder, by name: what `check_files` holds the folder against."""
    names = sorted(name for name in names_in(folder) if (folder / name).is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def names_in(folder: Path) -> set[str]:
    """What lies in a folder, by name; of chat templates each with their folder's."""
    found = {child.name for child in folder.iterdir()}
    inner = {f"{TEMPLATES}/{child.name}" for child in folder.glob(f"{TEMPLATES}/*")}
    return (found - {TEMPLATES}) | inner if inner else found


def check_files(folder: Path, files: Mapping[str, Any], again: bool = False) -> None:
    """Check files against what `describe_files` said of them.  again: read them, even if this process has done so before.

    Raises BadInput for the first that is missing or changed, by its name.
    """
    for name, about in files.items():
        path = plain_file(folder, name)
        if not path.is_file():
            raise BadInput(f"{path}: is missing; fetch or write the folder again")
        if (size := path.stat().st_size) != about["bytes"]:
            raise BadInput(f"{path}: has {size} bytes, expected {about['bytes']}; fetch or write the folder again")
        if sha256_file(path, again) != about["sha256"]:
            raise BadInput(f"{path}: is damaged or was changed (its sha256 is another); fetch or write the folder again")


def trim() -> None:
    """Have the C library return the memory that is free to the system."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # other C libraries have none
        library.malloc_trim(0)
