"""VPTQ, for transformers and the package `vptq`: indices, codebooks, and a scale and a bias per column.

An index has the main codebook's in its low bits and the residual's above them; a group's indices are one stream of bits per
row of vectors, filled up to words.  First come the outliers' columns, then those of each group; `perm` says which columns of
the model they are.  A column's scale takes in the power of two that our planes have per tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..bits import pack_uint
from ..planes import Packed, times_power_of_two
from ..stages.base import Stage
from ..stages.vptq import Vptq
from .grids import first_of, refused

HOLDS = (
    "the VPTQ format holds vptq of one part per vector, in groups of equal width, with no more residual centroids than main "
    "ones: compress with --stage vptq:bits=2"
)


def vptq(name: str, stage: Stage, packed: Packed) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The planes of one matrix, by how their names go on behind the module's, and what the configuration says of it."""
    stage, (rows, columns) = first_of(stage), packed.shape
    if not isinstance(stage, Vptq) or stage.parts > 1:
        raise refused(name, f"encoded by {stage.brief()}", HOLDS)
    segments = stage.segments(packed.shape)
    places = stage.columns(packed, segments)
    groups = [s for s in segments if not s.plane]
    bits = [(k - 1).bit_length() for k in groups[0].sizes]
    widths, outliers = {s.last - s.first for s in groups}, segments[0] if segments[0].plane else None
    if len(widths) > 1 or max(bits) > bits[0] or columns > 1 << 16 or (outliers and outliers.v < 2):
        raise refused(name, f"encoded by {stage.brief()}, in groups of {sorted(widths)} columns", HOLDS)
    floats = {**packed.floats, **(packed.shared.floats if packed.shared else {})}
    size = widths.pop()
    indices = torch.zeros((len(groups), *packed["indices"].shape[1:2], size), dtype=torch.int64)
    planes, shift = {}, 0
    for level, plane, leaf in zip(bits, ("", "residual_"), ("centroids", "res_centroids"), strict=False):
        found = packed[f"{plane}indices"][0].to(torch.int64)  # [chunks, columns], group by group
        indices |= found.unflatten(1, (len(groups), size)).transpose(0, 1) << shift
        planes[f"{leaf}.weight"] = _book(floats[f"{plane}codebook"], level)
        shift += level
    planes["indices"] = _stream(indices, shift)
    said: dict[str, Any] = {
        **{"in_features": columns, "out_features": rows, "bias": False, "is_indice_packed": True, "indices_as_float": False},
        **{"enable_norm": True, "enable_perm": True, "group_num": len(groups), "group_size": size, "outlier_size": 0},
        **{"vector_lens": [-1, groups[0].v], "num_centroids": [-1, 1 << bits[0]]},
        "num_res_centroids": [-1, 1 << bits[1] if len(bits) > 1 else -1],
    }
    if outliers:
        level = (outliers.sizes[0] - 1).bit_length()
        planes["outlier_centroids.weight"] = _book(floats["outlier_codebook"], level)
        planes["outlier_indices"] = packed["outlier_indices"].to(torch.int64).to(torch.uint16).view(torch.int16)
        said["outlier_size"], said["vector_lens"][0], said["num_centroids"][0] = outliers.last, outliers.v, 1 << level
    planes["perm"] = torch.from_numpy(np.concatenate(places).astype(np.uint16)).view(torch.int16)
    exponent = 128 - int(packed["exponent"])
    scale = floats.get("scale", torch.ones(1)).expand(columns)
    planes["weight_scale"] = times_power_of_two(scale, exponent)
    planes["weight_bias"] = times_power_of_two(floats.get("mean", torch.zeros(columns)), exponent)
    return planes, said


def vptq_config(said: dict[str, dict[str, Any]], kept: list[str]) -> dict[str, Any]:
    """Everything is said module by module."""
    about = {"quant_method": "vptq", "config_for_layers": said, "shared_layer_config": {}, "enable_proxy_error": False}
    return {"quantization_config": {**about, "modules_to_not_convert": kept}}


def _book(book: torch.Tensor, bits: int) -> torch.Tensor:
    """Codebooks float[groups, 1, k, v] as [groups, 2**bits * v]: filled up with zeros to a power of two."""
    groups, _, k, v = book.shape
    return torch.nn.functional.pad(book.reshape(groups, k, v), (0, 0, 0, (1 << bits) - k)).flatten(1)


def _stream(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of indices below 2**bits as streams of bits, the first one lowest: int32[groups, chunks, words]."""
    single = (indices.unsqueeze(-1) >> torch.arange(bits)) & 1
    stream = torch.nn.functional.pad(single.flatten(2).to(torch.uint8), (0, -bits * indices.shape[2] % 32))
    return pack_uint(stream, 1).view(torch.int32).reshape(*indices.shape[:2], -1)
