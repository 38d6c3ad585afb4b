"""A gallery of hostile artifacts: each function below takes a good small artifact and spoils one thing in it.

`CASES` holds them by name.  Where a file's hash would give the damage away, `rehash` brings the manifest's hashes up to
date, so that only the one thing is wrong: whoever makes a hostile file can compute a hash, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

MANIFEST = "agentforge.json"
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARKER = "executed"  # appears beside the artifact if a pickle of ours is ever opened


class Case(NamedTuple):
    """spoil: what it does to the folder.  base: which good artifact it starts from.  verify, load: whether
    Artifact.verify and open_model(...).model must refuse it (load does not check the hashes of
    rows, verify does not build models)."""

    spoil: Callable[[Path], None]
    base: str
    verify: bool
    load: bool


CASES: dict[str, Case] = {}


def case(
    base: str = "rounding", verify: bool = True, load: bool = True
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a function under its name."""

    def register(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[spoil.__name__] = Case(spoil, base, verify, load)
        return spoil

    return register


# Tools


def read_manifest(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return data


def write_manifest(folder: Path, manifest: Any) -> None:
    """With the hash of its own bytes, as far as it has a form that could have one."""
    if isinstance(manifest, dict):
        manifest = {**manifest, "sha256": "0" * 64}
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def encoded(manifest: dict[str, Any]) -> dict[str, Any]:
    """The row of the first encoded tensor."""
    row: dict[str, Any] = next(row for row in manifest["tensors"] if row["stage"])
    return row


def kept(manifest: dict[str, Any]) -> dict[str, Any]:
    """The row of the first kept tensor."""
    row: dict[str, Any] = next(row for row in manifest["tensors"] if not row["stage"])
    return row


def edit_row(folder: Path, row_of: Callable[[dict[str, Any]], dict[str, Any]] = encoded, **changes: Any) -> None:
    """Change keys of one row; `...` removes a key."""
    manifest = read_manifest(folder)
    row = row_of(manifest)
    for key, value in changes.items():
        if value is ...:
            del row[key]
        else:
            row[key] = value
    write_manifest(folder, manifest)


def edit_settings(folder: Path, **settings: Any) -> None:
    """Change the stage's settings in the first encoded row."""
    manifest = read_manifest(folder)
    encoded(manifest)["stage"].update(settings)
    write_manifest(folder, manifest)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json, and its hash in the manifest."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    rehash(folder)


def rehash(folder: Path) -> None:
    """Make every hash and size in the manifest that of the files as they are now."""
    manifest = read_manifest(folder)
    for name, about in manifest["files"].items():
        if (folder / name).is_file():
            raw = (folder / name).read_bytes()
            about.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    write_manifest(folder, manifest)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the shard's tensors, and every hash in files and rows that depends on them."""
    from agentforge import stages

    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / SHARD)
    manifest = read_manifest(folder)
    for row in manifest["tensors"]:
        digest = hashlib.sha256()
        if row["stage"] is None:
            if row["name"] in tensors:
                digest.update(raw_bytes(tensors[row["name"]]))
        else:
            rows, columns = row["shape"]
            shape = (columns, rows) if row["transposed"] else (rows, columns)
            digest.update(repr(shape).encode())
            for plane, (coding, size) in stages.from_json(row["stage"]).layout(shape).items():
                digest.update(f"{plane} {coding} {tuple(size)}".encode())
                if f"{row['name']}.{plane}" in tensors:
                    digest.update(raw_bytes(tensors[f"{row['name']}.{plane}"]))
        row["sha256"] = digest.hexdigest()
    write_manifest(folder, manifest)
    rehash(folder)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plane(tensors: dict[str, torch.Tensor], name: str) -> str:
    """The full name of the first plane called `name`."""
    return next(n for n in sorted(tensors) if n.endswith(f".{name}"))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the shard's JSON header, keep its data."""
    raw = (folder / SHARD).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    rehash(folder)


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(v for k, v in header.items() if k != "__metadata__")
    return entry


class Bomb:
    """Unpickling it creates the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (self.marker, "w"))


# The shard


@case()
def shard_truncated(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 10)


@case()
def shard_truncated_and_rehashed(folder: Path) -> None:
    shard_truncated(folder)
    rehash(folder)


@case()
def shard_truncated_in_the_header(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)
    rehash(folder)


@case()
def shard_empty(folder: Path) -> None:
    os.truncate(folder / SHARD, 0)
    rehash(folder)


@case()
def shard_with_surplus_bytes(folder: Path) -> None:
    with open(folder / SHARD, "ab") as file:
        file.write(b"\0" * 8)


@case()
def shard_with_surplus_bytes_rehashed(folder: Path) -> None:
    shard_with_surplus_bytes(folder)
    rehash(folder)


@case()
def shard_with_a_flipped_bit(folder: Path) -> None:
    raw = bytearray((folder / SHARD).read_bytes())
    raw[-1] ^= 1
    (folder / SHARD).write_bytes(raw)


@case(load=False)
def shard_with_a_flipped_bit_and_a_new_file_hash(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors[plane(tensors, "codes")][3] ^= 1
    save_file(tensors, folder / SHARD)
    rehash(folder)


@case(load=False)
def kept_tensor_changed_and_a_new_file_hash(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors[kept(read_manifest(folder))["name"]].view(-1)[0] += 1
    save_file(tensors, folder / SHARD)
    rehash(folder)


@case()
def shard_missing(folder: Path) -> None:
    (folder / SHARD).unlink()


@case()
def shard_is_a_folder(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


@case()
def shard_is_a_link_to_an_endless_device(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/dev/zero")


@case()
def shard_is_a_link_to_another_file(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/etc/passwd")


@case()
def shard_is_a_pickle(folder: Path) -> None:
    (folder / SHARD).write_bytes(pickle.dumps({"weight": Bomb(folder.parent / MARKER)}))
    rehash(folder)


@case()
def shard_is_a_torch_pickle(folder: Path) -> None:
    torch.save({"weight": Bomb(folder.parent / MARKER)}, folder / SHARD)
    rehash(folder)


@case()
def pickle_beside_a_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    torch.save({"weight": Bomb(folder.parent / MARKER)}, folder / "pytorch_model.bin")


@case(verify=False, load=False)
def pickle_beside_a_good_shard(folder: Path) -> None:
    torch.save({"weight": Bomb(folder.parent / MARKER)}, folder / "pytorch_model.bin")
    (folder / "model.pt").write_bytes(pickle.dumps(Bomb(folder.parent / MARKER)))


# The shard's header


@case()
def header_length_of_2_to_the_62(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", 1 << 62) + raw[8:])
    rehash(folder)


@case()
def header_length_of_2_to_the_26(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", 1 << 26) + raw[8:])
    rehash(folder)


@case()
def header_that_is_no_json(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:8] + b"#" + raw[9:])
    rehash(folder)


@case()
def header_of_100000_brackets(folder: Path) -> None:
    text = b'{"a":' + b"[" * 99_995
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)
    rehash(folder)


@case()
def header_with_overlapping_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entries = [v for k, v in header.items() if k != "__metadata__"]
        size = entries[1]["data_offsets"][1] - entries[1]["data_offsets"][0]
        entries[1]["data_offsets"] = [0, size]

    edit_header(folder, change)


@case()
def header_with_offsets_beyond_the_end(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        begin, end = first_tensor(header)["data_offsets"]
        first_tensor(header)["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]

    edit_header(folder, change)


@case()
def header_with_negative_offsets(folder: Path) -> None:
    edit_header(folder, lambda header: first_tensor(header).update(data_offsets=[-8, 0]))


@case()
def header_with_an_absurd_shape(folder: Path) -> None:
    edit_header(folder, lambda header: first_tensor(header).update(shape=[1 << 40, 1 << 40]))


@case()
def header_with_an_absurd_shape_and_offsets(folder: Path) -> None:
    edit_header(folder, lambda header: first_tensor(header).update(shape=[1 << 40], data_offsets=[0, 1 << 40]))


@case()
def header_with_an_unknown_dtype(folder: Path) -> None:
    edit_header(folder, lambda header: first_tensor(header).update(dtype="F7"))


# Planes (all hashes right)


@case()
def scale_plane_with_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "scale")].view(-1)[0] = float("nan")

    edit_tensors(folder, change)


@case()
def scale_plane_with_infinity(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "minimum")].view(-1)[-1] = float("-inf")

    edit_tensors(folder, change)


@case(base="ternary")
def ternary_scale_with_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "scale")].fill_(float("nan"))

    edit_tensors(folder, change)


@case(verify=False, load=False)
def exponent_that_leads_beyond_float32(folder: Path) -> None:
    """60000 * 2**128: decoding saturates."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "scale")].fill_(60000.0)
        tensors[plane(tensors, "exponent")].fill_(0)

    edit_tensors(folder, change)


@case()
def plane_missing(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[plane(tensors, "scale")]

    edit_tensors(folder, change)


@case(load=False)
def plane_too_many(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "scale") + "2"] = torch.ones(3)

    edit_tensors(folder, change)


@case()
def plane_of_another_dtype(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = plane(tensors, "scale")
        tensors[name] = tensors[name].view(torch.int16)

    edit_tensors(folder, change)


@case()
def plane_of_another_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = plane(tensors, "scale")
        tensors[name] = tensors[name].T

    edit_tensors(folder, change)


@case()
def plane_one_byte_short(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = plane(tensors, "codes")
        tensors[name] = tensors[name][:-1]

    edit_tensors(folder, change)


@case(base="ternary")
def padding_of_trits_not_zero(folder: Path) -> None:
    # 128 x 64 codes fill 1638 bytes and two fifths of another: its upper three trits are padding.
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "codes")][-1] = 9

    edit_tensors(folder, change)


@case(base="rounding-odd")
def padding_of_bits_not_zero(folder: Path) -> None:
    # 5 x 7 codes of 3 bits fill 105 of 112 bits.
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.weight.codes"][-1] |= 0x80

    edit_tensors(folder, change)


@case(base="ternary")
def trits_byte_of_243(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "codes")][0] = 243

    edit_tensors(folder, change)


@case(base="ternary-2bit")
def ternary_code_of_3(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "codes")][0] = 0xFF

    edit_tensors(folder, change)


@case(base="rounding-symmetric")
def symmetric_code_that_no_encoder_writes(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[plane(tensors, "codes")][0] = 0xFF

    edit_tensors(folder, change)


# Kept tensors


@case()
def kept_tensor_of_another_dtype(folder: Path) -> None:
    name = kept(read_manifest(folder))["name"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.int32)

    edit_tensors(folder, change)


@case()
def kept_tensor_of_another_shape(folder: Path) -> None:
    name = kept(read_manifest(folder))["name"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].reshape(-1, 2)

    edit_tensors(folder, change)


@case()
def kept_tensor_missing(folder: Path) -> None:
    name = kept(read_manifest(folder))["name"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    edit_tensors(folder, change)


@case()
def kept_tensor_with_wrong_bits(folder: Path) -> None:
    edit_row(folder, kept, bits=1)


@case()
def kept_tensor_with_wrong_bytes(folder: Path) -> None:
    edit_row(folder, kept, bytes=0, bits=0)


@case(verify=False)
def tensor_missing_everywhere(folder: Path) -> None:
    """Gone from shard and manifest alike: a whole artifact of something that is not the whole model."""
    name = kept(read_manifest(folder))["name"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    manifest = read_manifest(folder)
    manifest["tensors"] = [row for row in manifest["tensors"] if row["name"] != name]
    write_manifest(folder, manifest)
    edit_tensors(folder, change)


@case(base="llama", verify=False)
def tensor_missing_everywhere_of_a_llama(folder: Path) -> None:
    tensor_missing_everywhere(folder)


@case(base="llama", verify=False)
def tensor_that_the_model_does_not_have(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["tensors"].append({**kept(manifest), "name": "model.layers.0.surprise.weight"})
    write_manifest(folder, manifest)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.surprise.weight"] = tensors[kept(manifest)["name"]].clone()

    edit_tensors(folder, change)


# The manifest


@case()
def manifest_missing(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@case()
def manifest_no_json(folder: Path) -> None:
    (folder / MANIFEST).write_text("not { json")


@case()
def manifest_not_utf8(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b'{"format": "\xff\xfe"}')


@case()
def manifest_a_list(folder: Path) -> None:
    write_manifest(folder, [read_manifest(folder)])


@case()
def manifest_null(folder: Path) -> None:
    write_manifest(folder, None)


@case()
def manifest_of_100000_brackets(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)


@case()
def manifest_of_deep_objects(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@case()
def manifest_with_format_999(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "format": 999})


@case()
def manifest_without_format(folder: Path) -> None:
    manifest = read_manifest(folder)
    del manifest["format"]
    write_manifest(folder, manifest)


@case()
def manifest_without_tensors(folder: Path) -> None:
    manifest = read_manifest(folder)
    del manifest["tensors"]
    write_manifest(folder, manifest)


@case()
def manifest_with_tensors_as_an_object(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "tensors": {}})


@case(verify=False)
def manifest_with_no_rows_and_an_empty_shard(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "tensors": []})
    save_file({}, folder / SHARD)
    rehash(folder)


@case()
def manifest_with_no_rows(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "tensors": []})


@case()
def manifest_with_a_row_less(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["tensors"].pop()
    write_manifest(folder, manifest)


@case()
def manifest_with_a_tensor_twice(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["tensors"].append(manifest["tensors"][0])
    write_manifest(folder, manifest)


@case()
def manifest_with_rows_that_are_strings(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "tensors": ["a", "b"]})


@case()
def manifest_with_a_file_that_leads_out(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    manifest = read_manifest(folder)
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    write_manifest(folder, manifest)


@case()
def manifest_with_an_absolute_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    raw = Path("/etc/passwd").read_bytes()
    manifest["files"]["/etc/passwd"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write_manifest(folder, manifest)


@case()
def manifest_with_files_without_hashes(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"][SHARD] = {}
    write_manifest(folder, manifest)


@case()
def manifest_with_a_file_that_is_missing(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"]["ghost.json"] = {"bytes": 1, "sha256": "0" * 64}
    write_manifest(folder, manifest)


@case()
def manifest_that_forgets_the_shard(folder: Path) -> None:
    """No hash, no size: a ratio over nothing on disk."""
    manifest = read_manifest(folder)
    del manifest["files"][SHARD]
    write_manifest(folder, manifest)


@case()
def manifest_with_negative_bytes_of_the_original(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["original"]["bytes"] = "many"
    write_manifest(folder, manifest)


@case(load=False, verify=False)
def manifest_with_an_empty_recipe(folder: Path) -> None:
    write_manifest(folder, {**read_manifest(folder), "recipe": {}})


@case(load=False, verify=False)
def manifest_with_a_nameless_original(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["original"] = {"bytes": 10**400, "dtypes": "float32"}
    write_manifest(folder, manifest)


# Rows of the manifest


@case()
def row_with_an_absurd_shape_and_bytes(folder: Path) -> None:
    # Every side is still allowed, and bytes are what 4-bit codes in groups of 64 would take.
    side = 1 << 24
    weights = side * side
    edit_row(folder, shape=[side, side], bytes=weights // 2 + weights // 64 * 4 + 1)


@case()
def row_with_another_shape(folder: Path) -> None:
    manifest = read_manifest(folder)
    rows, columns = encoded(manifest)["shape"]
    edit_row(folder, shape=[rows // 2, columns])


@case()
def row_with_another_shape_of_the_same_bytes(folder: Path) -> None:
    manifest = read_manifest(folder)
    rows, columns = encoded(manifest)["shape"]
    edit_row(folder, shape=[rows // 2, columns * 2])


@case()
def row_with_other_bytes(folder: Path) -> None:
    edit_row(folder, bytes=encoded(read_manifest(folder))["bytes"] + 1)


@case()
def row_with_other_bits(folder: Path) -> None:
    """A weight that claims to cost one bit: only the manifest says so."""
    edit_row(folder, bits=1)


@case(load=False)
def row_with_another_hash(folder: Path) -> None:
    edit_row(folder, sha256="0" * 64)


@case(verify=False, load=False)
def row_with_an_error_beyond_floats(folder: Path) -> None:
    edit_row(folder, relative_error=10**400)


@case(base="ternary")
def row_with_an_infinite_setting(folder: Path) -> None:
    edit_settings(folder, tau=float("inf"))


@case(base="ternary")
def row_with_a_setting_beyond_floats(folder: Path) -> None:
    edit_settings(folder, tau=10**309)


@case(base="rounding-rows", verify=False, load=False)
def row_with_groups_of_2_to_the_30(folder: Path) -> None:
    """One group a row either way, so every plane has the right size; a decoder that spreads scales over whole groups
    needs half a terabyte.  (Wider than the weight is legal: the last group may be shorter.)"""
    manifest = read_manifest(folder)
    for row in manifest["tensors"]:
        if row["stage"]:
            row["stage"]["group"] = 1 << 30
    write_manifest(folder, manifest)


@case(base="rounding-rows", verify=False, load=False)
def row_with_groups_of_2_to_the_70(folder: Path) -> None:
    manifest = read_manifest(folder)
    for row in manifest["tensors"]:
        if row["stage"]:
            row["stage"]["group"] = 1 << 70
    write_manifest(folder, manifest)


# config.json and the folder


@case()
def folder_empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@case()
def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


@case()
def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    rehash(folder)


@case()
def config_of_100000_brackets(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    rehash(folder)


@case()
def config_is_a_pipe(folder: Path) -> None:
    """Reading it would wait for ever."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case()
def config_is_a_link_to_an_endless_device(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@case()
def config_without_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)


@case(verify=False)
def config_that_asks_for_other_shapes(folder: Path) -> None:
    edit_config(folder, hidden=[128, 65])


@case(verify=False)
def config_that_asks_for_absurd_shapes(folder: Path) -> None:
    """17 GB for one layer, if the model is built before its shapes are held against the tensors."""
    edit_config(folder, hidden=[1 << 16, 1 << 16])


@case(verify=False)
def config_with_shapes_that_are_text(folder: Path) -> None:
    edit_config(folder, hidden="many")


@case(verify=False)
def config_without_a_model_type(folder: Path) -> None:
    edit_config(folder, model_type=None)


@case(base="llama", verify=False)
def config_of_a_llama_that_asks_for_other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, intermediate_size=config["intermediate_size"] + 8)


@case(base="llama", verify=False)
def config_of_a_llama_with_an_absurd_vocabulary(folder: Path) -> None:
    edit_config(folder, vocab_size=1 << 40)


@case(base="llama", verify=False)
def config_of_a_llama_without_heads(folder: Path) -> None:
    edit_config(folder, num_attention_heads=0)


@case(base="llama", verify=False)
def config_of_a_llama_with_one_layer_more(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, num_hidden_layers=config["num_hidden_layers"] + 1)


# Shards and their index


@case(base="sharded")
def index_that_leads_out(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shard = next(iter(index["weight_map"].values()))
    (folder.parent / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    for key, value in index["weight_map"].items():
        if value == shard:
            index["weight_map"][key] = "../outside.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    rehash(folder)


@case(base="sharded")
def index_with_a_tensor_that_is_nowhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    rehash(folder)


@case(base="sharded")
def index_no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")
    rehash(folder)


@case(base="sharded")
def index_missing(folder: Path) -> None:
    (folder / INDEX).unlink()


@case(base="sharded")
def index_empty(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    rehash(folder)


@case(base="sharded")
def index_with_a_shard_that_is_missing(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()


# One change each

ROWS: dict[str, dict[str, Any]] = {
    "row_with_an_absurd_shape": {"shape": [1 << 40, 1 << 40]},
    "row_with_a_negative_shape": {"shape": [-128, -64]},
    "row_with_a_shape_of_floats": {"shape": [128.0, 64.0]},
    "row_with_a_shape_of_three": {"shape": [128, 64, 1]},
    "row_with_an_empty_shape": {"shape": [0, 64], "bytes": 1},
    "row_transposed": {"transposed": True},
    "row_with_bytes_as_text": {"bytes": "17"},
    "row_with_an_unknown_dtype": {"dtype": "float7"},
    "row_with_a_dtype_that_is_a_list": {"dtype": ["float32"]},
    "row_without_a_hash": {"sha256": ...},
    "row_without_a_stage": {"stage": ...},
    "row_that_says_it_was_kept": {"stage": None},
    "row_without_a_name": {"name": ...},
    "row_with_a_name_of_two_lines": {"name": "layers.0\nagentforge: all is well"},
    "row_with_a_name_that_is_no_text": {"name": "\ud800"},
    "row_with_a_name_of_rich_markup": {"name": "layers.0[/nothing]"},
    "row_with_a_stage_that_is_text": {"stage": "rounding:bits=4"},
    "row_with_a_stage_of_no_name": {"stage": {}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "row_with_an_unknown_stage": {"stage": "magic"},
    "row_with_an_unknown_setting": {"magic": 1},
    "row_with_a_setting_called_name": {"name": "rounding"},
    "row_with_a_setting_out_of_range": {"bits": 9},
    "row_with_settings_of_the_wrong_type": {"bits": "4"},
    "row_with_a_setting_that_is_a_list": {"clip": ["none"]},
    "row_with_a_setting_that_is_a_boolean": {"group": True},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "config_of_another_tool": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "config_with_a_quantization_that_is_text": {"quantization_config": "agentforge"},
}
for edit, changes_of in ((edit_row, ROWS), (edit_settings, SETTINGS), (edit_config, CONFIGS)):
    for name, changes in changes_of.items():
        CASES[name] = Case(partial(edit, **changes), "rounding", True, True)
