"""Artifacts in the formats of other programs: llama.cpp, vLLM, transformers, MLX.  Nothing is encoded anew.

The codes that a stage chose are laid out as the other program wants them, and its scales are the stage's.  What a format
cannot hold is refused before anything is written.  What was written is decoded again, by the format's own reader if there is
one here, and held against what the artifact decodes to, before it gets its name.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import stages
from ..artifact import Artifact, made_of
from ..errors import BadInput
from ..names import unknown
from ..opening import ArtifactModel
from ..planes import Packed
from ..quantised import QuantisedModel
from ..stages.ggml import GGML
from ..tensorfiles import index_folder, write_json, write_tensors
from . import gguf, uniform
from .grids import Grid, first_of, fits_halves, grid_of, halves, refused
from .vptq import vptq, vptq_config


def _of_grids(planes: Any, holds: str) -> Any:
    """A function of a grid as one of a stage and its planes."""
    return lambda name, stage, packed: planes(name, grid_of(name, stage, packed, holds))


# What gives a matrix's planes, what gives the configuration, and whether embeddings can be encoded.
FOLDERS: dict[str, tuple[Any, Any, bool]] = {
    "compressed-tensors": (
        _of_grids(uniform.compressed_tensors, uniform.COMPRESSED),
        uniform.compressed_tensors_config,
        False,
    ),
    "mlx": (_of_grids(uniform.mlx, uniform.MLX), uniform.mlx_config, True),
    "gptq": (_of_grids(uniform.gptq, uniform.GPTQ), uniform.gptq_config, False),
    "bitnet": (_of_grids(uniform.bitnet, uniform.BITNET), uniform.bitnet_config, False),
    "vptq": (vptq, vptq_config, False),
}
TO = ("gguf", *FOLDERS)
ONE_DTYPE = ("gptq", "bitnet", "vptq")  # of which transformers leaves what is not quantised in the dtype that the file has


class Exported(NamedTuple):
    """What an export left.  kinds: how many tensors are of which type.  rounded: the largest difference of each tensor whose
    scales float16 does not hold exactly from what the artifact decodes to; all others are the same, bit for bit."""

    path: Path
    to: str
    bytes: int
    kinds: dict[str, int]
    exact: int
    rounded: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**self._asdict(), "path": str(self.path)}

    def lines(self) -> list[str]:
        """The same, for people."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        said = [f"exported: {self.path} ({self.to}, {self.bytes:,} bytes)", f"  tensors: {kinds}"]
        said.append(f"  decoded again: {self.exact} tensors are the artifact's, bit for bit")
        if self.rounded:
            most = max(self.rounded.values())
            said.append(f"  {len(self.rounded)} differ by the rounding of their scales to float16, by at most {most:.3g}")
        return said


def export(artifact: Artifact | str | Path, to: str, out: str | Path | None = None) -> Exported:
    """Write an artifact in another program's format.

    to: one of `TO`.  out: the file (gguf) or folder; by default beside the artifact, under its name.
    Raises BadInput for what the format cannot hold, by the tensor's name, and if `out` is in the way.
    """
    artifact = artifact if isinstance(artifact, Artifact) else Artifact(artifact)
    if to not in TO:
        raise unknown("format", to, TO)
    artifact.check()
    model = ArtifactModel(artifact)
    if model.is_classifier:
        raise BadInput(f"{artifact.path}: is a classifier; {to} holds language models")
    here = artifact.path.absolute()
    path = Path(out or here.with_name(f"{here.name}{'.gguf' if to == 'gguf' else f'-{to}'}")).expanduser()
    if os.path.lexists(path):
        raise BadInput(f"{path}: is in the way; choose another name")
    return _file(artifact, model, path) if to == "gguf" else _folder(artifact, model, to, path)


def _file(artifact: Artifact, model: ArtifactModel, out: Path) -> Exported:
    partial, loose = out.with_name(f"{out.name[:60]}.{secrets.token_hex(8)}.tmp"), dict[str, int]()

    def tensors() -> Iterator[tuple[str, torch.Tensor | Grid | gguf.Blocks]]:
        for row, packed in _encoded(artifact, model, embeddings=True):
            value = packed
            if isinstance(packed, Packed) and isinstance(stage := first_of(stages.from_json(row["stage"])), GGML):
                value = gguf.as_it_is(row["name"], stage, packed)
            elif isinstance(packed, Packed):
                value = grid_of(row["name"], stages.from_json(row["stage"]), packed, gguf.HOLDS)
                if not all(map(fits_halves, value.floats)):
                    loose[row["name"]] = value.bits
            yield row["name"], value

    try:
        kinds = gguf.write(partial, model, tensors(), artifact.sha256)
        rounded = _compare(artifact, gguf.reopened(partial, model), loose)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, "gguf", out.stat().st_size, dict(Counter(kinds.values())), len(kinds) - len(rounded), rounded)


def _folder(artifact: Artifact, model: ArtifactModel, to: str, out: Path) -> Exported:
    planes_of, config_of, embeddings = FOLDERS[to]
    plain, tensors, floats = dict[str, torch.Tensor](), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    said, kinds, loose = dict[str, dict[str, Any]](), Counter[str](), dict[str, int]()
    linear = {weight.name for weight in model.weights(embeddings=True) if weight.module == "Linear"}
    kept = [] if "lm_head.weight" in model.entries else ["lm_head"]
    for row, packed in _encoded(artifact, model, embeddings):
        name, stem = row["name"], row["name"].removesuffix(".weight")
        if isinstance(packed, torch.Tensor):
            kinds[row["dtype"]] += 1
            plain[name] = packed
            kept += [stem] if name in linear else []
            continue
        planes, said[stem] = planes_of(name, stages.from_json(row["stage"]), packed)
        kinds["{type}{num_bits}".format(**said[stem]) if "num_bits" in said[stem] else to] += 1
        for leaf, plane in planes.items():
            if plane.dtype is torch.float32 and to == "gptq":
                if not fits_halves(plane):
                    loose[name] = said[stem]["bits"]
                plane = halves(name, plane)
            (floats if plane.dtype is torch.float32 else tensors)[f"{stem}.{leaf}"] = plane
    narrow = all(map(fits_halves, floats.values()))  # what runtimes like best, if it loses nothing
    tensors |= plain | {name: plane.half() if narrow else plane for name, plane in floats.items()}
    if not said:
        raise BadInput(f"{artifact.path}: none of its tensors is encoded, so that there is nothing to export to {to}")
    config = {**artifact.plain_config, **config_of(said, kept)}
    if to in ONE_DTYPE and plain:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in plain.values()))
        tensors |= {name: tensor.to(dtype) for name, tensor in plain.items()}
        config["dtype"] = str(dtype).removeprefix("torch.")
    with made_of(artifact, out) as (folder, done):
        about = {"format": "mlx" if to == "mlx" else "pt", "agentforge.manifest_sha256": artifact.sha256}
        write_tensors(folder / "model.safetensors", dict(sorted(tensors.items())), about)
        write_json(folder / "config.json", config)
        opened = QuantisedModel(str(done), folder, index_folder(folder), {})
        rounded = _compare(artifact, opened.tensor, loose)
    size = (done / "model.safetensors").stat().st_size
    return Exported(done, to, size, dict(kinds), len(artifact.rows) - len(rounded), rounded)


def _encoded(artifact: Artifact, model: ArtifactModel, embeddings: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each row and its planes, or the tensor that was kept.

    Raises BadInput for an encoded one that is no matrix of a linear layer, or of an embedding if these are allowed.
    """
    modules = {weight.name: weight.module for weight in model.weights(embeddings=True)}
    allowed = ("Linear", "Embedding") if embeddings else ("Linear",)
    for row in artifact.rows:
        if row["stage"] is not None and modules.get(row["name"]) not in allowed:
            what = f"encoded, and a weight of {modules.get(row['name'], 'no layer')}"
            raise refused(row["name"], what, f"only those of {' and '.join(allowed)} can be encoded here: keep it")
        yield row, artifact.read(row)


def _compare(artifact: Artifact, tensor_of: Callable[[str], torch.Tensor], loose: Mapping[str, int]) -> dict[str, float]:
    """The largest difference of each tensor of `loose`, whose scales were rounded, by name: with so many bits.

    Raises BadInput if any other one is not what the artifact decodes to, or if one of these is further away than rounding a
    scale takes it: a share of 2**-11 if it is a normal half float, 2**-25 for each level if it is not.
    """
    rounded = {}
    for row in artifact.rows:
        name, wanted = row["name"], artifact.decode(row).float()
        lost = (tensor_of(name).float() - wanted).abs()
        if lost.any() and name in loose:
            rounded[name] = float(lost.max())
            lost -= 1.01 * (wanted.abs() * 2**-11 + 2 ** (loose[name] - 25))
        if not (lost <= 0).all():  # NaN is not, either
            raise BadInput(f"tensor {name}: what was written decodes to other values, so that nothing is exported")
    return rounded
