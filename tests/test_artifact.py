"""Artifacts: what compress writes is what load reads, to the bit; its bytes are counted right; nothing is ever half done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import agentforge
from agentforge import artifact as artifact_module
from agentforge import folders, stages, tensorfiles
from agentforge.artifact import Artifact, Ratio, Ratios, Writer, relative_error
from agentforge.bits import tensor_bytes
from agentforge.errors import AgentForgeError, BadArtifact, BadInput
from agentforge.models import LanguageModel
from agentforge.tensorfiles import sha256_file

STAGES = [
    "rounding:bits=4,group=64",
    "rounding:bits=3,group=48,symmetric=true,clip=mse",
    "ternary",
    "ternary:rule=threshold,packing=2bit",
]


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def header_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, read without agentforge and without the library."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}


def assert_sentence(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@pytest.fixture(params=["digits-mlp", "tiny-llama"])
def model(request: pytest.FixtureRequest, digits: LanguageModel) -> LanguageModel:
    if request.param == "digits-mlp":
        return digits
    return agentforge.open_model(request.getfixturevalue("tiny_llama"))


def copy_with(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model folder with changed tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# What is written


@pytest.mark.parametrize("stage", STAGES)
def test_the_bytes_on_disk_are_the_bits_that_are_claimed(model: LanguageModel, stage: str, tmp_path: Path) -> None:
    artifact = agentforge.compress(model, stage, tmp_path / "a", progress=False)
    on_disk = header_sizes(tmp_path / "a" / "model.safetensors")
    parsed = stages.parse(stage)
    touched = {weight.name: weight for weight in model.weights()}
    assert touched
    for row in artifact.rows:
        name = row["name"]
        if name not in touched:
            assert row["stage"] is None
            assert row["bytes"] == on_disk[name] == row["bits"] // 8
            continue
        packed = parsed.encode(touched[name].load(), name=name)
        assert row["bits"] == packed.bits
        sizes = {plane.name: on_disk[f"{name}.{plane.name}"] for plane in packed}
        for plane in packed:
            assert 8 * sizes[plane.name] - 8 < plane.bits <= 8 * sizes[plane.name]
        assert row["bytes"] == sum(sizes.values())
    # Nothing else lies in the file: every byte of it is in a row, or in the header.
    assert sum(row["bytes"] for row in artifact.rows) == sum(on_disk.values())


@pytest.mark.parametrize("stage", STAGES)
def test_every_weight_is_what_the_stage_makes_of_it(model: LanguageModel, stage: str, tmp_path: Path) -> None:
    agentforge.compress(model, stage, tmp_path / "a", progress=False)
    loaded = agentforge.load(tmp_path / "a")
    parsed = stages.parse(stage)
    state = loaded.model.state_dict()
    for weight in model.weights():
        expected = parsed.decode(parsed.encode(weight.load(), name=weight.name))
        assert loaded.tensor(weight.name).dtype == torch.float32
        assert torch.equal(loaded.tensor(weight.name), expected), weight.name
        assert torch.equal(state[weight.name], expected), weight.name
        assert not torch.equal(expected, weight.load()), "a stage that changes nothing proves nothing"


def test_kept_tensors_stay_and_say_why(model: LanguageModel, tmp_path: Path) -> None:
    artifact = agentforge.compress(model, "ternary", tmp_path / "a", progress=False)
    loaded = agentforge.load(tmp_path / "a")
    kept = {row["name"]: row for row in artifact.rows if row["stage"] is None}
    assert {name: row["reason"] for name, row in kept.items()} == model.kept()
    assert set(kept) | {w.name for w in model.weights()} == set(model.entries)
    for name, row in kept.items():
        before, after = model.tensor(name), loaded.tensor(name)
        if before.dim() == 2:
            assert row["dtype"] == "float16"
            assert torch.equal(after, before.to(torch.float16))
            assert row["relative_error"] == pytest.approx(
                float((before.double() - after.double()).norm() / before.double().norm())
            )
            assert 0 < row["relative_error"] < 1e-3
        else:
            assert row["dtype"] == "float32"
            assert torch.equal(after, before)
            assert row["relative_error"] == 0


@pytest.mark.parametrize(("scale", "kept_as"), [(1.0, torch.float16), (1e-8, torch.float32), (1e8, torch.float32)])
def test_a_kept_matrix_becomes_half_only_where_that_keeps_it(
    tiny_llama: Path, tmp_path: Path, scale: float, kept_as: torch.dtype
) -> None:
    name = "model.embed_tokens.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] *= scale

    folder = copy_with(tiny_llama, tmp_path / "model", change)
    agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    found = agentforge.load(tmp_path / "a").tensor(name)
    assert found.dtype == kept_as
    torch.testing.assert_close(
        found.float(), agentforge.open_model(folder).tensor(name), rtol=1e-3, atol=0 if scale < 1 else 1e-6
    )


def test_relative_errors_are_those_of_the_decoded_weights(digits: LanguageModel, tmp_path: Path) -> None:
    artifact = agentforge.compress(digits, "rounding:bits=3", tmp_path / "a", progress=False)
    loaded = agentforge.load(tmp_path / "a")
    rows = {row["name"]: row for row in artifact.rows}
    for weight in digits.weights():
        before = weight.load().double()
        expected = float((loaded.tensor(weight.name).double() - before).norm() / before.norm())
        assert rows[weight.name]["relative_error"] == pytest.approx(expected, rel=1e-6)
        assert expected > 0.01
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2)) == 1


def test_ratios_are_what_the_file_system_says(model: LanguageModel, tmp_path: Path) -> None:
    artifact = agentforge.compress(model, "rounding:bits=4,group=64", tmp_path / "a", progress=False)
    shard = os.stat(tmp_path / "a" / "model.safetensors").st_size
    original = os.stat(model.path / "model.safetensors").st_size
    tensors = load_file(model.path / "model.safetensors")
    parameters = sum(t.numel() for t in tensors.values())
    touched = [w.name for w in model.weights()]
    count = sum(tensors[name].numel() for name in touched)
    on_disk = header_sizes(tmp_path / "a" / "model.safetensors")
    planes = sum(size for name, size in on_disk.items() if any(name.startswith(f"{t}.") for t in touched))
    assert [(r.what, r.bytes, r.denominator_bytes) for r in artifact.ratios] == [
        ("whole model", shard, 2 * parameters),
        ("whole model", shard, 4 * parameters),
        ("whole model", shard, original),
        ("touched tensors", planes, 2 * count),
        ("touched tensors", planes, 4 * count),
    ]
    assert artifact.ratio == 2 * parameters / shard
    said = [r.denominator for r in artifact.ratios]
    assert said == [
        f"all {parameters:,} parameters at 16 bits",
        f"all {parameters:,} parameters at 32 bits",
        "weight files it was made from (float32)",
        f"their {count:,} weights at 16 bits",
        f"their {count:,} weights at 32 bits",
    ]
    lines = str(artifact.ratios).splitlines()
    assert str(artifact).splitlines() == [
        f"{artifact.path}: {len(model.weights())} of {len(artifact.rows)} tensors of {model.name} encoded",
        *lines,
    ]
    page = artifact._repr_html_()
    cells = re.findall(r"<td>([^<]*)", page)
    assert len(lines) == 1 + len(artifact.ratios) and len(cells) == 5 * len(lines) and str(artifact.path) in page
    for i, ratio in enumerate(artifact.ratios, 1):
        assert re.split(r"\s{2,}", lines[i]) == [ratio.what, f"{ratio.bytes:,}", f"{ratio.ratio:.3f}x", ratio.denominator]
        assert cells[5 * i] == ratio.what and cells[5 * i + 4] == f"{ratio.denominator_bytes:,}"
    assert "<b>" not in Ratios([Ratio("<b>", 1, "<b>", 1)])._repr_html_()
    assert Ratio("x", 10, "y", 40).to_json() == {
        "what": "x",
        "bytes": 10,
        "denominator": "y",
        "denominator_bytes": 40,
        "ratio": 4.0,
    }


def test_the_denominator_names_the_dtypes_that_are_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    folder = copy_with(tiny_llama, tmp_path / "model", change)
    artifact = agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    assert artifact.ratios[2].denominator == "weight files it was made from (bfloat16)"
    assert artifact.ratios[2].denominator_bytes == os.stat(folder / "model.safetensors").st_size
    assert all(row["dtype"] == "bfloat16" for row in artifact.rows)
    # bfloat16 vectors and matrices are kept as they are.
    kept = agentforge.load(tmp_path / "a").tensor("model.norm.weight")
    assert kept.dtype == torch.bfloat16


def test_embeddings_are_encoded_where_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    without = agentforge.compress(tiny_llama, "rounding:bits=4", tmp_path / "without", progress=False)
    with_them = agentforge.compress(tiny_llama, "rounding:bits=4", tmp_path / "with", embeddings=True, progress=False)
    stage_of = [{r["name"]: r["stage"] for r in a.rows} for a in (without, with_them)]
    assert stage_of[0][name] is None
    assert stage_of[1][name]["stage"] == "rounding"
    assert {k for k in stage_of[0] if stage_of[0][k] != stage_of[1][k]} == {name}
    assert with_them.weight_bytes < without.weight_bytes
    assert with_them.verify()
    # The head is tied: it must use the decoded embedding, too.
    loaded = agentforge.load(tmp_path / "with").model
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_verify_passes_and_says_what_it_did(model: LanguageModel, tmp_path: Path) -> None:
    artifact = agentforge.compress(model, "ternary", tmp_path / "a", progress=False)
    touched, rows = len(model.weights()), len(model.entries)
    files = [p for p in (tmp_path / "a").iterdir() if p.name != "agentforge.json"]
    assert (
        Artifact(tmp_path / "a").verify()
        == artifact.verify()
        == [
            f"{len(files)} files: size and sha256",
            f"{touched} encoded tensors: planes, hashes, decoded to finite values",
            f"{rows - touched} kept tensors: shape, dtype, hash",
        ]
    )
    assert set(artifact.manifest["files"]) == {p.name for p in files}


def test_the_artifact_is_a_folder_that_needs_nothing_of_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    expected = agentforge.load(tmp_path / "a").model.state_dict()
    shutil.rmtree(folder)
    (tmp_path / "a").rename(tmp_path / "moved")
    loaded = agentforge.open_model(tmp_path / "moved")
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert loaded.tokenizer("ab")["input_ids"] == agentforge.open_model(tiny_llama).tokenizer("ab")["input_ids"]
    assert (tmp_path / "moved" / "LICENSE").read_text() == "do as you like"
    assert not list((tmp_path / "moved").glob("*.bin")) + list((tmp_path / "moved").glob("*.py"))
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "agentforge"
    assert config["model_type"] == "llama"


def test_several_shards_are_one_artifact(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = agentforge.compress(tiny_llama, "rounding:bits=4", tmp_path / "whole", progress=False)
    monkeypatch.setattr(artifact_module, "SHARD_BYTES", 20_000)
    several = agentforge.compress(tiny_llama, "rounding:bits=4", tmp_path / "several", progress=False)
    shards = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(shards) > 2
    assert [p.name for p in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    for shard in shards:
        assert {n for n, s in index["weight_map"].items() if s == shard.name} == set(header_sizes(shard))
    assert several.weight_bytes == sum(p.stat().st_size for p in shards)
    assert several.rows == whole.rows
    several.verify()
    loaded = [agentforge.load(tmp_path / name) for name in ("whole", "several")]
    assert all(torch.equal(loaded[0].tensor(n), loaded[1].tensor(n)) for n in loaded[0].entries)


@pytest.mark.parametrize("stage", ["rounding:bits=3,group=48,clip=mse", "ternary"])
def test_the_number_of_workers_changes_no_byte(tiny_llama: Path, stage: str, tmp_path: Path) -> None:
    for workers in (1, 4):
        agentforge.compress(tiny_llama, stage, tmp_path / str(workers), workers=workers, progress=False)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "4")


def test_an_artifact_can_be_compressed_again(digits: LanguageModel, tmp_path: Path) -> None:
    """Re-encoding: the second stage sees what the first one decodes to."""
    agentforge.compress(digits, "rounding:bits=8", tmp_path / "first", progress=False)
    agentforge.compress(tmp_path / "first", "ternary", tmp_path / "second", progress=False)
    first, second = agentforge.load(tmp_path / "first"), agentforge.load(tmp_path / "second")
    stage = stages.get("ternary")
    for weight in digits.weights():
        assert torch.equal(second.tensor(weight.name), stage.decode(stage.encode(first.tensor(weight.name))))
    Artifact(tmp_path / "second").verify()


# Damage


def damaged_copies(folder: Path, place: Path, count: int) -> Iterator[Path]:
    """Copies of a folder with one bit flipped each, anywhere in its files, by a fixed seed."""
    rng = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for i in range(count):
        copy = Path(shutil.copytree(folder, place / str(i)))
        file = copy / files[i % len(files)].name
        raw = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
        yield copy


def test_every_flipped_bit_is_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    """In weights, manifest, configuration and tokenizer alike, by each way in."""
    import transformers

    import agentforge.huggingface

    sound = agentforge.compress(tiny_llama, "rounding:bits=4,group=64", tmp_path / "sound", progress=False)
    ways: list[Callable[[Path], Any]] = [
        agentforge.load,
        agentforge.open_model,
        lambda folder: agentforge.load(folder, runtime="packed"),
        lambda folder: Artifact(folder).verify(),
    ]
    for copy in damaged_copies(sound.path, tmp_path / "copies", 60):
        for way in ways:
            with pytest.raises(BadInput) as error:
                way(copy)
            assert_sentence(error, str(copy))
        # transformers reads config.json before it asks us; without the name of this one key it never does, and only warns.
        if b'"quantization_config"' in (copy / "config.json").read_bytes():
            with pytest.raises((BadInput, OSError)):
                transformers.AutoModelForCausalLM.from_pretrained(copy)
    assert agentforge.load(sound.path).state_dict()


def test_a_cached_conversion_that_was_damaged_is_noticed(digits: LanguageModel, tmp_path: Path) -> None:
    for copy in damaged_copies(digits.path, tmp_path / "copies", 12):
        if (copy / "agentforge-source.json").read_bytes() == (digits.path / "agentforge-source.json").read_bytes():
            with pytest.raises(BadInput) as error:
                agentforge.open_model(copy)
            assert_sentence(error, str(copy))


def test_a_file_is_read_once_unless_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, how: reads.append(file.name) or real(file, how))
    file = tmp_path / "a"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    monkeypatch.setattr(tensorfiles, "SETTLED", -1.0)
    first = [sha256_file(file), sha256_file(file), sha256_file(file)]
    assert len(reads) == 1 and len(set(first)) == 1
    file.write_bytes(b"two")
    os.utime(file, (1, 1))  # of the same size, and as old
    assert sha256_file(file) == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 2
    assert sha256_file(file, again=True) and len(reads) == 3


def test_what_a_change_of_a_moment_ago_left_is_not_remembered(tmp_path: Path) -> None:
    """The file system's clock is coarse: of two changes in one tick, the second does not show."""
    file = tmp_path / "a"
    for i in range(50):
        file.write_bytes(bytes([i]))
        assert sha256_file(file) == hashlib.sha256(bytes([i])).hexdigest()


def test_files_that_should_not_be_there_are_named(digits: LanguageModel, tiny_llama: Path, tmp_path: Path) -> None:
    artifact = agentforge.compress(tiny_llama, "ternary", tmp_path / "a", progress=False)
    (tmp_path / "a" / "README.md").write_text("mine")
    assert artifact.verify()[-1] == "not in the manifest, and not checked: 'README.md'"
    (tmp_path / "a" / "added_tokens.json").write_text("{}")
    with pytest.raises(BadArtifact) as error:
        artifact.verify()
    assert_sentence(error, "added_tokens.json")
    artifact = agentforge.compress(digits, "ternary", tmp_path / "b", progress=False)  # without a tokenizer's files
    (tmp_path / "b" / "added_tokens.json").write_text("{}")
    assert artifact.verify()[-1] == "not in the manifest, and not checked: 'added_tokens.json'"
    (tmp_path / "b" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BadArtifact, match=r"preprocessor_config\.json"):
        artifact.verify()


def test_a_piece_damaged_after_a_kill_is_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    agentforge.compress(tiny_llama, "ternary", tmp_path / "whole", progress=False)
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            agentforge.compress(tiny_llama, "ternary", out, progress=False)
    pieces = sorted((partial_of(out) / "tensors").glob("*.safetensors"))
    assert pieces
    for i, piece in enumerate(pieces):
        raw = bytearray(piece.read_bytes())
        raw[(i * 37) % len(raw)] ^= 4
        piece.write_bytes(raw)
    agentforge.compress(tiny_llama, "ternary", out, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_model_that_changes_while_it_is_read_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    model = agentforge.open_model(folder)
    real = Writer.put_kept

    def put_kept(self: Writer, *args: Any, **kwargs: Any) -> None:
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "put_kept", put_kept)
        with pytest.raises(BadInput) as error:
            agentforge.compress(model, "ternary", tmp_path / "a", progress=False)
    assert_sentence(error, "was changed while it was read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_that_changed_after_a_kill_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    (folder / "LICENSE").write_text("another")
    with pytest.raises(BadInput) as error:
        agentforge.compress(folder, "ternary", tmp_path / "a", progress=False)
    assert_sentence(error, "unfinished run with model")


OLD = Path(__file__).parent / "data" / "old_artifacts"


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.iterdir() if path.is_dir()))
def test_artifacts_of_older_versions_load_as_they_did(name: str, tmp_path: Path) -> None:
    """They have no hash of the manifest."""
    loaded = agentforge.load(OLD / name)
    found = {
        key: hashlib.sha256(str((t.dtype, tuple(t.shape))).encode() + bytes(tensor_bytes(t))).hexdigest()
        for key, t in loaded.state_dict().items()
    }
    assert found == json.loads((OLD / "tensors.json").read_text())[name]
    assert "sha256" not in Artifact(OLD / name).manifest
    Artifact(OLD / name).verify()
    agentforge.compress(loaded, "rounding:bits=8,group=32", tmp_path / "a", progress=False).verify()


# What is there already


def test_the_same_call_again_changes_nothing(digits: LanguageModel, tmp_path: Path) -> None:
    first = agentforge.compress(digits, "ternary", tmp_path / "a", progress=False)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "a").iterdir()}
    for overwrite in (False, True):
        again = agentforge.compress(digits, "ternary", tmp_path / "a", overwrite=overwrite, progress=False)
        assert again.manifest == first.manifest
        assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "a").iterdir()} == before
    assert not partial_of(tmp_path / "a").exists()


@pytest.mark.parametrize("change", [{"stage": "rounding:bits=5"}, {"seed": 1}, {"embeddings": True}])
def test_another_recipe_does_not_touch_what_is_there(digits: LanguageModel, tmp_path: Path, change: dict[str, Any]) -> None:
    agentforge.compress(digits, "rounding:bits=4", tmp_path / "a", progress=False)
    before = hashes(tmp_path)
    asked = {"stage": "rounding:bits=4", "out": tmp_path / "a", "progress": False, **change}
    with pytest.raises(BadInput) as error:
        agentforge.compress(digits, **asked)
    assert_sentence(error, str(tmp_path / "a"), "--overwrite", next(iter(change)))
    assert hashes(tmp_path) == before


def test_two_recipes_that_differ_late_are_told_apart(digits: LanguageModel, tmp_path: Path) -> None:
    agentforge.compress(digits, "ternary:packing=trits", tmp_path / "a", progress=False)
    with pytest.raises(BadInput) as error:
        agentforge.compress(digits, "ternary:packing=2bit", tmp_path / "a", progress=False)
    assert_sentence(error, "trits", "2bit")


def test_overwrite_replaces_an_artifact(digits: LanguageModel, tmp_path: Path) -> None:
    agentforge.compress(digits, "rounding:bits=4", tmp_path / "a", progress=False)
    agentforge.compress(digits, "ternary", tmp_path / "a", overwrite=True, progress=False)
    agentforge.compress(digits, "ternary", tmp_path / "fresh", progress=False)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "fresh"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_what_is_no_artifact_is_never_replaced(digits: LanguageModel, tmp_path: Path, overwrite: bool, kind: str) -> None:
    out = tmp_path / "precious"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        (out / "config.json").write_text("{}")
    elif kind == "file":
        out.write_text("years of work")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = hashes(tmp_path)
    with pytest.raises(BadInput) as error:
        agentforge.compress(digits, "ternary", out, overwrite=overwrite, progress=False)
    assert_sentence(error, str(out))
    assert hashes(tmp_path) == before
    assert not partial_of(out).exists()


def test_bad_arguments_leave_nothing_behind(digits: LanguageModel, tmp_path: Path) -> None:
    for stage, more in (
        ("magic", {}),
        ("rounding:bits=9", {}),
        (stages.rounding.Rounding(bits=9), {}),
        ("ternary", {"workers": 0}),
    ):
        with pytest.raises(BadInput) as error:
            agentforge.compress(digits, stage, tmp_path / "a", progress=False, **more)
        assert_sentence(error)
    with pytest.raises(BadInput):
        agentforge.compress(tmp_path / "missing", "ternary", tmp_path / "a", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(digits: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput) as error:
        agentforge.compress(digits, "ternary", tmp_path / "file" / "a", progress=False)
    assert_sentence(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_made(tiny_llama: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    folder = copy_with(tiny_llama, tmp_path / "model", change)
    with pytest.raises(BadInput) as error:
        agentforge.compress(folder, "rounding:bits=4", tmp_path / "a", progress=False)
    assert_sentence(error, name)
    assert not (tmp_path / "a").exists()


def test_load_refuses_another_runtime_and_what_is_no_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    agentforge.compress(tiny_llama, "ternary", tmp_path / "a", progress=False)
    with pytest.raises(BadInput) as error:
        agentforge.load(tmp_path / "a", runtime="magic")
    assert_sentence(error, "'magic'", "dense")
    with pytest.raises(BadArtifact):
        agentforge.load(tiny_llama)


# Interruptions


class StopError(Exception):
    """Stands for anything that goes wrong in the middle."""


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Writer.put_encoded works `count` times, then raises."""
    real, calls = Writer.put_encoded, iter(range(count))

    def put(self: Writer, *args: Any) -> None:
        if next(calls, None) is None:
            raise error
        real(self, *args)

    monkeypatch.setattr(Writer, "put_encoded", put)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopError("power"), BadInput("no")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("done", [0, 1, 9])
def test_an_interrupted_run_is_finished_by_the_same_call(
    tiny_llama: Path, tmp_path: Path, error: BaseException, done: int
) -> None:
    agentforge.compress(tiny_llama, "rounding:bits=4", tmp_path / "whole", progress=False)
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, done, error)
        with pytest.raises(type(error)):
            agentforge.compress(tiny_llama, "rounding:bits=4", out, workers=1, progress=False)
    assert not out.exists()
    pieces = partial_of(out) / "tensors"
    finished = {p.name: p.stat().st_mtime_ns for p in pieces.glob("*.safetensors")}
    assert len(finished) >= done
    encoded: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = Writer.put_encoded

        def put(self: Writer, index: int, weight: Any, *args: Any) -> None:
            encoded.append(weight.name)
            real(self, index, weight, *args)

        patch.setattr(Writer, "put_encoded", put)
        agentforge.compress(tiny_llama, "rounding:bits=4", out, progress=False)
    assert len(encoded) == 14 - done, "what was finished is not done again"
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not partial_of(out).exists()


@pytest.mark.parametrize(
    "change", [{"stage": "rounding:bits=5"}, {"seed": 1}, {"embeddings": True}, {"model": "digits-mlp"}]
)
def test_an_unfinished_run_is_not_continued_by_another_recipe(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"model": tiny_llama, "stage": "rounding:bits=4", "out": tmp_path / "a", "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 3, StopError())
        with pytest.raises(StopError):
            agentforge.compress(**asked)
    before = hashes(tmp_path)
    with pytest.raises(BadInput) as error:
        agentforge.compress(**{**asked, **change})
    assert_sentence(error, "a.partial", next(iter(change)), "--overwrite")
    assert hashes(tmp_path) == before
    # overwrite discards what the other one left, and nothing of it is in the result.
    agentforge.compress(**{**asked, **change, "overwrite": True})
    agentforge.compress(**{**asked, **change, "out": tmp_path / "fresh"})
    assert hashes(tmp_path / "a") == hashes(tmp_path / "fresh")


def test_an_unfinished_run_that_somebody_removes_ends_in_a_sentence(
    digits: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Writer.put_kept

    def removed(writer: Writer, *rest: Any) -> None:
        shutil.rmtree(writer.partial, ignore_errors=True)
        put(writer, *rest)

    with monkeypatch.context() as context:
        context.setattr(Writer, "put_kept", removed)
        with pytest.raises(AgentForgeError, match="could not be written"):
            agentforge.compress(digits, "ternary", tmp_path / "a", workers=1, progress=False)
    assert agentforge.compress(digits, "ternary", tmp_path / "a", progress=False).verify()


def test_two_writers_at_once(digits: LanguageModel, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "a")
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput) as error:
            agentforge.compress(digits, "ternary", tmp_path / "a", progress=False)
        assert_sentence(error, "another agentforge is writing it")
        with pytest.raises(BadInput):
            agentforge.compress(digits, "ternary", tmp_path / "a", overwrite=True, progress=False)
        assert not (tmp_path / "a").exists()
    agentforge.compress(digits, "ternary", tmp_path / "a", progress=False).verify()
    assert not partial.exists()


@pytest.mark.parametrize("phase", ["recipe", "pieces", "shards", "manifest", "rename"])
def test_a_full_disk_is_said_in_a_sentence_and_the_run_goes_on_later(tiny_llama: Path, tmp_path: Path, phase: str) -> None:
    out = tmp_path / "a"
    agentforge.compress(tiny_llama, "ternary", tmp_path / "whole", progress=False)
    calls = iter(range(4))

    def full(real: Callable[..., None], when: Callable[..., bool]) -> Callable[..., None]:
        def write(*args: Any, **kwargs: Any) -> None:
            if when(*args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            real(*args, **kwargs)

        return write

    with pytest.MonkeyPatch.context() as patch:
        if phase == "recipe":
            patch.setattr(
                artifact_module, "write_json", full(artifact_module.write_json, lambda path, *_: path.name == "recipe.json")
            )
        elif phase == "pieces":
            patch.setattr(
                artifact_module, "write_sealed", full(artifact_module.write_sealed, lambda *_: next(calls, None) is None)
            )
        elif phase == "shards":
            patch.setattr(artifact_module, "write_safetensors", full(artifact_module.write_safetensors, lambda *_: True))
        elif phase == "manifest":
            patch.setattr(
                artifact_module,
                "write_json",
                full(artifact_module.write_json, lambda path, *_: path.name == "agentforge.json"),
            )
        else:
            patch.setattr(folders.os, "replace", full(os.replace, lambda _, target: Path(target) == out))
        with pytest.raises(AgentForgeError) as error:
            agentforge.compress(tiny_llama, "ternary", out, progress=False)
    assert_sentence(error, "No space left on device")
    assert not out.exists()
    agentforge.compress(tiny_llama, "ternary", out, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not partial_of(out).exists()


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(digits: LanguageModel, tmp_path: Path) -> None:
    """The old artifact has been moved away, the new one not yet moved in: the same call goes on."""
    out = tmp_path / "a"
    agentforge.compress(digits, "rounding:bits=4", out, progress=False)
    agentforge.compress(digits, "ternary", tmp_path / "whole", progress=False)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            agentforge.compress(digits, "ternary", out, overwrite=True, progress=False)
    assert not out.exists()
    agentforge.compress(digits, "ternary", out, overwrite=True, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not partial_of(out).exists()


def test_a_kill_after_the_rename_is_cleaned_up_by_the_same_call(digits: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact_module, "remove", lambda _: None)
        agentforge.compress(digits, "ternary", out, progress=False)
    assert partial_of(out).exists(), "the kill left it behind"
    before = hashes(out)
    agentforge.compress(digits, "ternary", out, progress=False)
    assert hashes(out) == before
    assert not partial_of(out).exists()
