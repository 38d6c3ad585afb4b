"""The artifact: a compressed model on disk, in a Hugging Face style folder.

    config.json                     the model's own, with a quantization_config that names us
    model-00001-of-0000N.safetensors    planes and kept tensors (or one model.safetensors)
    model.safetensors.index.json    which tensor is in which shard (only if there are several)
    agentforge.json                 the manifest: recipe, one row per tensor, sizes, sha256 of every file, itself included
    tokenizer files, licence        copied

A writer works in `NAME.partial` beside the folder.  Every finished tensor is there as a file of its own, complete or
not at all; the last step joins them into shards and renames the folder.  Killed at any byte, the same command resumes
from the finished tensors, which carry their own hashes, and ends with the same bytes.

Files are checked against their hashes when they are read, once in a process; `verify` reads them in any case.

Files come from anywhere: nothing here is executed or unpickled, names cannot lead out of the folder, and no size from
a file is trusted before it is checked against what the stage's settings give and what is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import torch
from pydantic import Field

from . import stages
from .bits import FLOATS, bits_per_value, stored_bytes, tensor_bytes
from .entropy import VALUES_A_BYTE
from .errors import AgentForgeError, BadArtifact, BadInput
from .escaping import printable
from .folders import check_out, foreign, locked, remove, replace
from .models import SOURCE_FILE, LanguageModel, Weight, as_stored, converted_bytes
from .planes import Packed, Plane, is_coded
from .tensorfiles import (
    DTYPES,
    TEMPLATES,
    WEIGHTS_INDEX,
    Entry,
    check_files,
    describe_files,
    header_of,
    index_file,
    index_folder,
    json_bytes,
    names_in,
    plain_file,
    problem_of,
    read_json,
    read_sealed,
    read_tensor,
    sha256_file,
    write_json,
    write_safetensors,
    write_sealed,
    write_tensors,
)

MANIFEST = "agentforge.json"
FORMAT = 1
SHARED = "agentforge.shared"  # the name of the planes that all encoded tensors share
SHARD_BYTES = 2 << 30
TOKENIZER = (  # the files that `tokenizer.save_pretrained` writes
    rf"tokenizer.*|(special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|.*\.model|chat_template\..*|{TEMPLATES}/.*"
)
RECIPE = "recipe.json"  # marks what is unfinished
HISTORY = "history.json"  # of training, beside what the manifest knows
NO_HASH = "0" * 64

ERROR_BLOCK = 1 << 20  # values that `relative_error` takes at a time
LARGEST_SIDE = 1 << 24  # rows or columns of a weight; beyond that a manifest lies
Plan = tuple[str, tuple[int, ...]]  # coding and shape of a plane


@dataclass(frozen=True)
class Ratio:
    """How much smaller something became: bytes on disk against a stated denominator."""

    what: str
    bytes: int
    denominator: str
    denominator_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller: the denominator's bytes over the bytes on disk."""
        return self.denominator_bytes / self.bytes

    def to_json(self) -> dict[str, Any]:
        """All fields and the ratio."""
        return {**self.__dict__, "ratio": self.ratio}


class Ratios(list[Ratio]):
    """Ratios that print, and show in a notebook, as a table."""

    def of(self, what: str, bits: int) -> Ratio:
        """That of the "whole model" or of the "touched tensors", against `bits` (16 or 32) for each parameter."""
        return next(r for r in self if r.what == what and r.denominator.endswith(f"at {bits} bits"))

    def __str__(self) -> str:
        rows = [f"{r.what:15} {r.bytes:13,} {r.ratio:8.3f}x  {r.denominator}" for r in self]
        return "\n".join([f"{'what':15} {'bytes on disk':>13} {'ratio':>9}  against", *rows])

    def _repr_html_(self) -> str:
        rows = [("what", "bytes on disk", "ratio", "against", "bytes")]
        rows += [(r.what, f"{r.bytes:,}", f"{r.ratio:.3f}x", r.denominator, f"{r.denominator_bytes:,}") for r in self]
        return f"<table><tr>{'<tr>'.join('<td>' + '<td>'.join(map(html.escape, row)) for row in rows)}</table>"


class Artifact:
    """A finished artifact: `path` and `manifest` (checked when it was read)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path)

    def __str__(self) -> str:
        touched, name = sum(row["stage"] is not None for row in self.rows), self.manifest["original"]["name"]
        return printable(f"{self.path}: {touched} of {len(self.rows)} tensors of {name} encoded") + f"\n{self.ratios}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self).partition(chr(10))[0])}</p>{self.ratios._repr_html_()}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor, as in the manifest."""
        rows: list[dict[str, Any]] = self.manifest["tensors"]
        return rows

    @property
    def fallbacks(self) -> list[dict[str, Any]]:
        """The rows of weights that the stage could not encode: another one did, or they were kept; `reason` says why."""
        return [row for row in self.rows if row.get("fallback")]

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which holds the hashes of all files."""
        return sha256_file(self.path / MANIFEST)

    @property
    def plain_config(self) -> dict[str, Any]:
        """config.json without what it says of us."""
        return {k: v for k, v in read_json(self.path / "config.json").items() if k != "quantization_config"}

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of all weight files, headers included."""
        shards = [plain_file(self.path, name) for name in self.manifest["files"] if name.endswith(".safetensors")]
        if not all(shard.is_file() and shard.stat().st_size for shard in shards):
            raise BadArtifact(f"{self.path}: a weight file is missing or empty; fetch or write the artifact again")
        return sum(shard.stat().st_size for shard in shards)

    @property
    def ratios(self) -> Ratios:
        """Whole model and touched tensors, each against 16 and 32 bits per parameter; the whole model also against the bytes
        of what the user had: the GGUF file it was converted from, else its weight files.  Below 1 the artifact is larger."""

        def against(what: str, size: int, whose: str, count: int) -> list[Ratio]:
            return [Ratio(what, size, f"{whose} at {8 * width} bits", count * width) for width in (2, 4)]

        parameters, whole = sum(math.prod(row["shape"]) for row in self.rows), self.weight_bytes
        touched = [row for row in self.rows if row["stage"] is not None]
        count = sum(math.prod(row["shape"]) for row in touched)
        planes = sum(row["bytes"] for row in touched) + (self.manifest["shared"] or {"bytes": 0})["bytes"]
        original = self.manifest["original"]
        made_from, size = f"weight files it was made from ({original['dtypes']})", original["bytes"]
        if converted := converted_bytes(original.get("source")):
            made_from, size = "GGUF file it was made from", converted
        ratios = against("whole model", whole, f"all {parameters:,} parameters", parameters)
        ratios.append(Ratio("whole model", whole, made_from, size))
        return Ratios(ratios + (against("touched tensors", planes, f"their {count:,} weights", count) if touched else []))

    @property
    def ratio(self) -> float:
        """Whole model: 16 bits for every parameter, against the weight files on disk."""
        return self.ratio_to(16)

    def ratio_to(self, bits: int) -> float:
        """Whole model: `bits` (16 or 32) for every parameter, against the weight files on disk."""
        return self.ratios.of("whole model", bits).ratio

    def verify(self) -> list[str]:
        """Check every hash, shape and plane, and decode every tensor.  Returns what was checked.

        Raises BadArtifact at the first thing that is not as it should be.
        """
        self.check(again=True)
        others = sorted(names_in(self.path) - {*self.manifest["files"], MANIFEST})
        left_out = not any(re.fullmatch(TOKENIZER, name) for name in self.manifest["files"])  # by `save_pretrained`
        read = [n for n in others if re.search(r"\.(safetensors|json|txt|model|jinja)$", n) and n != HISTORY]
        if read := [n for n in read if not (left_out and re.fullmatch(TOKENIZER, n))]:
            raise BadArtifact(f"{self.path}: {read[0]!a:.80} is not in the manifest, loaders may read it; take it away")
        _ = self.entries  # every tensor of the weight files is one that the manifest knows
        if self.manifest["shared"] and self.shared.sha256 != self.manifest["shared"]["sha256"]:
            raise BadArtifact(f"{self.path}: the planes that its tensors share are not those that were fitted")
        odd_values = []
        for row in self.rows:
            packed = self.read(row)
            if isinstance(packed, torch.Tensor):
                if packed.is_floating_point() and not torch.isfinite(packed).all():
                    odd_values.append(row["name"])
                if hashlib.sha256(tensor_bytes(packed)).hexdigest() != row["sha256"]:
                    raise BadArtifact(f"{self.path}: tensor {row['name']}: its values are not those that were kept")
            else:
                if packed.sha256 != row["sha256"]:
                    raise BadArtifact(f"{self.path}: tensor {row['name']}: its planes are not those that were encoded")
                if not torch.isfinite(self.decode(row, packed)).all():
                    raise BadArtifact(f"{self.path}: tensor {row['name']}: decodes to values that are not finite")
        touched = sum(row["stage"] is not None for row in self.rows)
        return [
            f"{len(self.manifest['files'])} files: size and sha256",
            f"{touched} encoded tensors: planes, hashes, decoded to finite values",
            f"{len(self.rows) - touched} kept tensors: shape, dtype, hash",
            *(f"{name}: kept with values that are not finite, as the original has them" for name in odd_values),
            *([f"not in the manifest, and not checked: {', '.join(f'{name!a:.80}' for name in others)}"] if others else []),
        ]

    def check(self, again: bool = False, absent: bool = False) -> None:
        """Check every file against its size and hash in the manifest.  again: read them, even if this process has done so.
        absent: some may be missing, as in the hub's cache.

        Raises BadArtifact for the first that is missing or changed, by its name.
        """
        files = self.manifest["files"]
        try:
            check_files(self.path, {n: f for n, f in files.items() if not absent or (self.path / n).exists()}, again)
        except BadInput as error:
            raise BadArtifact(str(error)) from None

    def read(self, row: dict[str, Any]) -> Packed | torch.Tensor:
        """A row's planes, or its tensor if it was kept.

        Raises BadArtifact if what is on disk is not what the manifest, and the stage's settings, say.
        """
        name = row["name"]
        if row["stage"] is None:
            return read_tensor(name, self.entries[name])
        shared = self.shared if stages.from_json(row["stage"]).shared_layout() else None
        return Packed(oriented(row), _planes(self.path, name, _layout(row), self.entries), shared)

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Where each kept tensor and each plane lies, by its name in the weight files.

        All are checked against the manifest by the headers alone: no data is read, so that other loaders can ask for this
        before they allocate anything.  Raises BadArtifact if files, names, sizes, shapes or dtypes are not the manifest's.
        """
        self.check(absent=True)
        found, wanted = index_folder(self.path), dict[str, Entry]()
        shared = self.manifest["shared"]
        for row in [*([shared] if shared else []), *self.rows]:
            size = 0
            for name, dtype, shape, least, most, _ in _stored(row):
                if name not in found:
                    raise BadArtifact(f"{self.path}: {name} is in the manifest and not in the weight files")
                entry = wanted[name] = found[name]
                size += entry.bytes
                wanted_shape = (entry.bytes,) if shape is None else shape
                if (entry.dtype, entry.shape) != (dtype, wanted_shape) or not least <= entry.bytes <= most:
                    takes = f"{dtype}[{least} to {most}]" if shape is None else f"{dtype}{list(shape)}"
                    raise BadArtifact(
                        f"{self.path}: tensor {name} is {entry.dtype}{list(entry.shape)}, the manifest says {takes}"
                    )
            if size != row["bytes"]:
                what = f"the planes of {row.get('name', SHARED)} have {size} bytes"
                raise BadArtifact(f"{self.path}: {what}, the manifest says {row['bytes']}")
        files = {entry.file.name for entry in found.values()}
        if odd := sorted(set(found) - set(wanted)) or sorted(files - set(self.manifest["files"])):
            raise BadArtifact(f"{self.path}: the weight files hold {odd[0]}, which the manifest does not know")
        return wanted

    @cached_property
    def shared(self) -> Packed:
        """The planes that all encoded tensors share."""
        return Packed((0, 0), _planes(self.path, SHARED, _layout(self.manifest["shared"]), self.entries))

    def decode(self, row: dict[str, Any], packed: Packed | None = None) -> torch.Tensor:
        """A row's tensor as the model has it: decoded to float32 if it was encoded, as kept otherwise."""
        found = self.read(row) if packed is None else packed
        if isinstance(found, torch.Tensor):
            return found
        try:
            dense = stages.from_json(row["stage"]).decode(found)
        except BadArtifact as error:
            raise BadArtifact(f"{self.path}: tensor {row['name']}: {error}") from None
        return as_stored(dense, row["shape"], row["transposed"])


def dequantize(artifact: Artifact | str | Path, out: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the model that an artifact decodes to as an ordinary Hugging Face folder, for tools that know no planes.

    Every tensor is stored as `dtype`; `agentforge-source.json` says what the folder was made from, and the hash of each of
    its files.  The folder appears whole or not at all.  Raises BadInput if `out` is in the way or a value does not fit.
    """
    artifact = artifact if isinstance(artifact, Artifact) else Artifact(artifact)
    with made_of(artifact, out) as (folder, done):
        tensors = {}
        for row in artifact.rows:
            tensor = artifact.decode(row).to(dtype)
            if not torch.isfinite(tensor).all():
                raise BadInput(
                    f"{artifact.path}: tensor {row['name']} does not fit into {str(dtype).removeprefix('torch.')}"
                )
            tensors[row["name"]] = tensor.contiguous()
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", {**artifact.plain_config, "dtype": str(dtype).removeprefix("torch.")})
    return done


@contextlib.contextmanager
def made_of(artifact: Artifact, out: str | Path) -> Iterator[tuple[Path, Path]]:
    """A folder that is to hold what an artifact is turned into, and the name that it gets when the block ends.

    The tokenizer's and all other side files are copied, and `agentforge-source.json` is written, last.  After an error
    nothing stays.  Raises BadInput if `out` is in the way.
    """
    artifact.check()
    out = check_out(out, artifact.path)
    if out.exists() and not _is_empty(out):
        raise BadInput(f"{out}: is in the way; choose another folder")
    unfinished = out.with_name(out.name + ".partial")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    about = {"artifact_manifest_sha256": artifact.sha256, "recipe": artifact.manifest["recipe"]}
    write_json(unfinished / RECIPE, about)
    folder = unfinished / "folder"
    folder.mkdir()
    try:
        yield folder, out
        for name in artifact.manifest["files"]:
            if name != "config.json" and not name.endswith((".safetensors", WEIGHTS_INDEX)):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(plain_file(artifact.path, name), folder / name)
        write_json(folder / SOURCE_FILE, {**about, "files": describe_files(folder)})
        replace(folder, out)
    finally:
        remove(unfinished)


class Writer:
    """Writes an artifact, tensor by tensor, so that it can be killed at any moment and resumed.

    recipe: everything that the bytes depend on; an unfinished folder with another recipe is not resumed.
    """

    def __init__(self, out: Path, recipe: dict[str, Any], overwrite: bool = False) -> None:
        self.out, self.recipe = check_out(out, replace=overwrite), recipe
        self.partial = out.with_name(out.name + ".partial")
        self.tensors = self.partial / "tensors"
        self.finished, self._open = False, contextlib.ExitStack()
        if out.is_symlink() or (out.exists() and not _is_empty(out)):
            existing: dict[str, Any] | None = None
            with contextlib.suppress(BadInput):
                existing = Artifact(out).manifest["recipe"]
            self.finished = existing == recipe  # a kill between the rename and the clean-up may have left more
            if existing is None:
                raise BadInput(f"{out}: is in the way and not an artifact of agentforge; choose another --out")
            if not self.finished and not overwrite:
                what = _difference(existing, recipe)
                raise BadInput(f"{out}: holds {what}; choose another --out or pass --overwrite")
        if self.partial.exists() and (strange := foreign(self.partial)):
            raise BadInput(f"{self.partial}: {strange}; it is in the way, move it or choose another --out")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(locked(self.partial / "lock", out))
        except OSError as error:
            raise BadInput(f"{self.partial}: cannot be made ({error.strerror}); choose another --out") from None
        try:
            if not (self.partial / "lock").exists():
                raise BadInput(f"{out}: another agentforge has just finished it; run again to see what is there now")
            if not self.finished:
                self._go_on(overwrite)
        except BaseException as error:
            self._open.close()
            if isinstance(error, OSError):
                raise self._not_written(error) from None
            raise

    def _go_on(self, overwrite: bool) -> None:
        """Resume an unfinished run of the same recipe, or begin.  Parts damaged since are made again."""
        recipe_file = self.partial / RECIPE
        found: dict[str, Any] | None = None
        with contextlib.suppress(BadInput):
            found = read_json(recipe_file)
        if found is not None and found != self.recipe and not overwrite:
            raise BadInput(
                f"{self.partial}: an unfinished run with {_difference(found, self.recipe)}; "
                "run that command again to finish it, or pass --overwrite to discard it"
            )
        if found != self.recipe and recipe_file.is_file():
            shutil.rmtree(self.tensors, ignore_errors=True)
        write_json(recipe_file, self.recipe)
        self.tensors.mkdir(exist_ok=True)
        for piece in self.tensors.glob("*.safetensors"):
            if read_sealed(piece) is None:
                piece.unlink()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.finished or not any(self.tensors.glob("*")):
            with contextlib.suppress(BadInput):  # if somebody has put something beside our files meanwhile, it all stays
                remove(self.partial)
        self._open.close()
        if isinstance(error, OSError):
            raise self._not_written(error) from None

    def _not_written(self, error: OSError) -> AgentForgeError:
        return AgentForgeError(
            f"{self.out}: could not be written ({error.strerror}); free some space; the same command resumes from what is "
            "finished"
        )

    def has(self, index: int | str) -> bool:
        """Whether tensor number `index` is finished, or what the weights share, if it is "shared"."""
        return self.piece(index).is_file()

    def fallbacks(self) -> list[dict[str, Any]]:
        """The rows of finished weights that the stage could not encode."""
        rows = [_row_of(piece) for piece in sorted(self.tensors.glob("[0-9]*.safetensors"))]
        return [row for row in rows if row.get("fallback")]

    def put_encoded(self, index: int, weight: Weight, encoded: Encoded) -> None:
        """Write an encoded weight."""
        row = {
            "name": weight.name,
            "stage": encoded.stage.to_json(),
            "shape": list(weight.stored_shape),
            "transposed": weight.transposed,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "bits": encoded.bits,
            "bytes": sum(plane.nbytes for plane in encoded.planes),
            "relative_error": encoded.error,
            "sha256": encoded.sha256,
            **({"fallback": True, "reason": encoded.reason} if encoded.reason else {}),
        }
        planes = {}
        for about, plane in zip(_stored(row), encoded.planes, strict=True):
            data = torch.from_numpy(np.require(plane, requirements="W"))  # another process sends read-only
            planes[about.name] = data if about.shape is None else data.view(about.dtype).reshape(about.shape)
        write_sealed(self.piece(index), planes, {"row": json.dumps(row)})

    def put_shared(self, stage: stages.Stage, shared: Packed) -> None:
        """Write the planes that the weights share."""
        shared = Packed((0, 0), shared.planes)
        stored = {f"{SHARED}.{plane.name}": plane.stored() for plane in shared}
        bytes_ = sum(t.nbytes for t in stored.values())
        row = {"stage": stage.to_json(), "bits": shared.bits, "bytes": bytes_, "sha256": shared.sha256}
        write_sealed(self.piece("shared"), stored, {"row": json.dumps(row)})

    def put_kept(self, index: int, name: str, original: torch.Tensor, reason: str, fallback: bool = False) -> None:
        """Write a tensor that no stage touches: a matrix in float32 as float16 if that keeps it (relative error below
        1e-3), anything else as it is.  fallback: a stage was to encode it, and could not."""
        kept, error = original, 0.0
        if original.dtype in (torch.float32, torch.float64) and original.dim() >= 2:
            half = original.to(torch.float16)
            if torch.isfinite(half).all() and (half_error := relative_error(original, half)) < 1e-3:
                kept, error = half, half_error
        row = {
            "name": name,
            "stage": None,
            "reason": reason,
            "shape": list(kept.shape),
            "transposed": False,
            "dtype": str(kept.dtype).removeprefix("torch."),
            "bits": 8 * kept.nbytes,
            "bytes": kept.nbytes,
            "relative_error": error,
            "sha256": hashlib.sha256(tensor_bytes(kept)).hexdigest(),
            **({"fallback": True} if fallback else {}),
        }
        write_sealed(self.piece(index), {name: kept}, {"row": json.dumps(row)})

    def finish(self, model: LanguageModel, count: int) -> Artifact:
        """Join the `count` finished tensors into shards, write the manifest, and rename the folder.

        Raises BadInput if the model's files are not those that the run began with; what was made of them is discarded.
        """
        if model.fingerprint_now() != self.recipe["model"]:
            shutil.rmtree(self.tensors)
            raise BadInput(f"{model.path}: was changed while it was read, so that nothing was written; run again")
        folder = self.partial / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        pieces = [self.piece(i) for i in range(count)]
        shards: list[list[tuple[str, Entry]]] = [[]]
        size = 0
        for piece in [self.piece("shared"), *pieces] if self.has("shared") else pieces:
            tensors = index_file(piece)
            size += (grown := sum(entry.bytes for entry in tensors.values()))
            if shards[-1] and size > SHARD_BYTES:
                shards.append([])
                size = grown
            shards[-1] += tensors.items()
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        for name, members in zip(names, shards, strict=True):
            write_safetensors(
                folder / name,
                [(key, entry.dtype, entry.shape) for key, entry in members],
                (tensor_bytes(read_tensor(key, entry)) for key, entry in members),
            )
        weight_map = {key: name for name, members in zip(names, shards, strict=True) for key, _ in members}
        if len(names) > 1:
            total = sum((folder / name).stat().st_size for name in names)
            write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file in model.side_files:
            if file.name not in ("config.json", MANIFEST):
                target = folder / file.relative_to(model.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        stage = {key: value for key, value in self.recipe["stage"].items() if key != "weights"}  # the manifest has them
        quantization = {"quant_method": "agentforge", "format": FORMAT, "stage": stage}
        write_json(folder / "config.json", {**model.config, "quantization_config": quantization})
        rows = [_row_of(piece) for piece in pieces]
        fallbacks = sum(row.get("fallback", False) for row in rows)
        manifest = {
            "format": FORMAT,
            "recipe": self.recipe,
            "original": {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "bytes": model.bytes_on_disk,
                "dtypes": model.dtypes,
                "source": model.source,
            },
            "files": describe_files(folder),
            "shared": _row_of(self.piece("shared")) if self.has("shared") else None,
            **({"fallbacks": fallbacks} if fallbacks else {}),
            "tensors": rows,
        }
        write_manifest(folder, manifest)
        replace(folder, self.out)
        self.finished = True
        return Artifact(self.out)

    def piece(self, index: int | str) -> Path:
        """The file of a finished tensor, or of what the weights share."""
        return self.tensors / f"{index:0>5}.safetensors"


class Encoded(NamedTuple):
    """All that an artifact says of an encoded weight, in a form that any process can send to another.

    error: |W - decoded| / |W| (Frobenius).  planes: as they go to disk, in the order of the stage's layout, uint8[bytes]
    each.  reason: why it was the fallback that encoded it, None if it was not.
    """

    stage: stages.Stage
    bits: int
    sha256: str
    error: float
    planes: tuple[np.ndarray, ...]
    reason: str | None = None

    @classmethod
    def of(cls, stage: stages.Stage, packed: Packed, error: float, reason: str | None = None) -> Encoded:
        """The planes, packed once for the hash and for the disk."""
        stored = [plane.stored() for plane in packed]
        planes = tuple(np.asarray(tensor_bytes(tensor)) for tensor in stored)
        return cls(stage, packed.bits, packed.hash_of(stored), error, planes, reason)


def read_shared(piece: Path, stage: stages.Stage) -> Packed:
    """The planes that the weights share, from the writer's file of them."""
    return Packed((0, 0), _planes(piece, SHARED, stage.shared_layout(), index_file(piece)))


def _planes(where: Path, name: str, layout: Mapping[str, Plan], entries: Mapping[str, Entry]) -> tuple[Plane, ...]:
    """The planes of a tensor, read from their entries."""
    planes = []
    for plane, (coding, shape) in layout.items():
        try:
            stored = read_tensor(f"{name}.{plane}", entries[f"{name}.{plane}"])
            planes.append(Plane.from_stored(plane, coding, shape, stored))
        except BadArtifact as error:
            raise BadArtifact(f"{where}: tensor {name}: {error}") from None
    return tuple(planes)


def relative_error(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """|original - decoded| / |original| in the Frobenius norm; 0 if both are zero.

    This is what "relative error" means everywhere; its square is called "relative squared error".
    """
    return joint_error([(original, decoded)])


def joint_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The relative error of several tensors together, each with what it was decoded to.

    By blocks of a fixed size: in float64 a whole tensor would take more memory than encoding it does.
    """
    power = lost = 0.0
    for original, decoded in pairs:
        for part, other in zip(original.reshape(-1).split(ERROR_BLOCK), decoded.reshape(-1).split(ERROR_BLOCK), strict=True):
            a = part.to(torch.float32).numpy().astype("float64")
            b = other.to(torch.float32).numpy().astype("float64")
            power += float((a * a).sum())
            b -= a
            lost += float((b * b).sum())
    return math.sqrt(lost) / math.sqrt(power) if power else float(lost > 0)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hash of its own bytes, in which zeros stand for that hash."""
    blank = {**manifest, "sha256": NO_HASH}
    write_json(folder / MANIFEST, {**blank, "sha256": hashlib.sha256(json_bytes(blank)).hexdigest()})


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _row_of(piece: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(header_of(piece)[0]["__metadata__"]["row"])
    return row


def _layout(row: dict[str, Any]) -> dict[str, Plan]:
    """The planes of an encoded row, by name; of what all the rows share, if that is what it is about."""
    stage = stages.from_json(row["stage"])
    return stage.layout(oriented(row)) if "name" in row else stage.shared_layout()


class _Stored(NamedTuple):
    """A tensor of a weight file, as a manifest says it is.  shape: None for codes.  least, most: bytes.  bits: that it
    stands for; None if it is entropy-coded, where its bytes decide."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    least: int
    most: int
    bits: int | None


def _stored(row: dict[str, Any]) -> list[_Stored]:
    """What the weight files must hold for a row, by its stage's settings and its shape."""
    if row["stage"] is None:
        dtype = getattr(torch, row["dtype"])
        size = math.prod(row["shape"]) * dtype.itemsize
        return [_Stored(row["name"], dtype, tuple(row["shape"]), size, size, 8 * size)]
    found = []
    for plane, (coding, shape) in _layout(row).items():
        name, count, dtype = f"{row.get('name', SHARED)}.{plane}", math.prod(shape), FLOATS.get(coding)
        if is_coded(coding):
            sizes: tuple[int, int] = -(-count // VALUES_A_BYTE), stored_bytes(coding[1:], count) + 1
        else:
            sizes = (stored_bytes(coding, count),) * 2
        bits = None if is_coded(coding) else math.ceil(bits_per_value(coding) * count)
        found.append(_Stored(name, dtype or torch.uint8, shape if dtype else None, *sizes, bits))
    return found


def oriented(row: dict[str, Any]) -> tuple[int, int]:
    """(out, in) of an encoded row, as its stage sees it: the matrices of a layer's experts lie below each other."""
    *experts, rows, columns = row["shape"]
    rows, columns = (columns, rows) if row["transposed"] else (rows, columns)
    return math.prod(experts) * rows, columns


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two recipes, for a message: settings of a stage one by one."""
    have, want = _flat(found), _flat(wanted)
    return "; ".join(
        f"{key} {have.get(key, 'unset')} (asked for: {want.get(key, 'unset')})"
        for key in {**have, **want}
        if have.get(key) != want.get(key)
    )


def _flat(recipe: dict[str, Any]) -> dict[str, str]:
    flat = {}
    for key, value in recipe.items():
        for inner, one in value.items() if isinstance(value, dict) else [(key, value)]:
            flat[inner if inner == key else f"{key} {inner}"] = f"{one!s:.80}"
    return flat


class _File(pydantic.BaseModel):
    """What a manifest says of a file; whatever else it may say does not matter here."""

    model_config = pydantic.ConfigDict(strict=True)
    bytes: int = Field(ge=0)
    sha256: str


class _Planes(_File):
    """Of the planes that all rows share."""

    stage: dict[str, Any] | None
    bits: int


class _Row(_Planes):
    """Of a tensor."""

    name: str
    shape: list[Annotated[int, Field(ge=0, le=LARGEST_SIDE)]]
    transposed: bool
    dtype: str = Field(pattern=f"^({'|'.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())})$")
    relative_error: float = Field(ge=0, lt=1e300)


class _Original(pydantic.BaseModel):
    """Of the model that was compressed."""

    model_config = pydantic.ConfigDict(strict=True)
    name: str
    dtypes: str
    bytes: int = Field(gt=0, lt=1 << 62)


class _Manifest(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")
    format: int
    recipe: dict[str, Any]
    original: _Original
    files: dict[str, _File]
    shared: _Planes | None = None  # artifacts written before stages could share have none
    fallbacks: int = 0
    tensors: list[_Row]
    sha256: str = ""  # older artifacts have none


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact, its structure checked.  Raises BadArtifact."""
    if not (path / MANIFEST).is_file():
        raise BadArtifact(f"{path}: {MANIFEST} is missing; expected an artifact of agentforge")

    def refuse(what: str) -> BadArtifact:
        return BadArtifact(f"{path}/{MANIFEST}: {what}; fetch or write the artifact again")

    try:
        manifest: dict[str, Any] = read_json(plain_file(path, MANIFEST))
        config = read_json(plain_file(path, "config.json"))
        if manifest.get("format") != FORMAT:
            raise refuse(f"format {manifest.get('format')!r:.40}, this agentforge reads {FORMAT}")
        if "sha256" in manifest:
            said, raw = str(manifest["sha256"]), (path / MANIFEST).read_bytes()
            whole = re.fullmatch("[0-9a-f]{64}", said) and raw.replace(said.encode(), NO_HASH.encode())
            if not whole or hashlib.sha256(whole).hexdigest() != said:
                raise refuse("is damaged or was changed (its sha256 is another)")
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "agentforge":
            raise BadArtifact(f"{path}/config.json: its quantization_config does not name agentforge")
        _Manifest.model_validate(manifest)
        files, shared, original = manifest["files"], manifest.setdefault("shared", None), manifest["original"]
        if not isinstance(original.get("source"), dict):  # says nothing: no reason not to read the weights
            original["source"] = {}
        for name in files:
            plain_file(path, name)
        check_files(path, {name: files[name] for name in files if name == "config.json"})
    except pydantic.ValidationError as error:
        raise refuse(problem_of(error)) from None
    except BadInput as error:
        raise BadArtifact(str(error)) from None
    if not any(name.endswith(".safetensors") for name in files):
        raise refuse("files name no weight file")
    if not isinstance(manifest["recipe"].get("stage"), dict):
        raise refuse("recipe has no stage")
    if shared is not None and (wrong := _wrong(shared, shared)):
        raise refuse(f"shared: {wrong}")
    seen = {SHARED}
    for row in manifest["tensors"]:
        name = row["name"]
        if name in seen or not name.isprintable():
            raise refuse(f"tensor name {name!a:.80} is not printable, or there twice")
        seen.add(name)
        if wrong := _wrong(row, shared):
            raise refuse(f"tensor {name}: {wrong}")
    return manifest


def _wrong(row: dict[str, Any], shared: dict[str, Any] | None) -> str:
    """What is wrong with a row's stage, shape, bytes and bits, or with those of what all rows share; "" if nothing is."""
    try:
        if "name" in row and row["stage"] is not None:
            shape = row["shape"]
            if len(shape) not in (2, 3) or 0 in shape or max(oriented(row)) > LARGEST_SIDE:
                return f"shape {shape!r:.60} is neither a matrix nor one an expert, or not believable"
            if stages.from_json(row["stage"]).shared_layout() and (shared is None or shared["stage"] != row["stage"]):
                return "the planes that its stage shares are missing"
        stored = _stored(row)
    except BadInput as error:
        return str(error)
    least, most = sum(one.least for one in stored), sum(one.most for one in stored)
    coded = row["bytes"] - sum(one.most for one in stored if one.bits is not None)  # codes fill their bytes
    bits = 8 * coded + sum(one.bits or 0 for one in stored)
    if stored and least <= row["bytes"] <= most and row["bits"] == bits:
        return ""
    return f"{row['bytes']} bytes, {row['bits']} bits; settings and shape give {least} to {most} bytes, and {bits} bits"
