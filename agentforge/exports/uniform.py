"""Folders of uniform codes: compressed-tensors, GPTQ, MLX and transformers' bitnet.

One function gives the planes of a matrix, by how their names go on behind the module's, and what is said of it; another the
configuration, of what was said by module and of the linear layers that are not encoded.  `quantised` reads all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .grids import Grid, refused, words

Planes = dict[str, torch.Tensor]
Said = dict[str, Any]

COMPRESSED = (
    "compressed-tensors holds symmetric rounding and ternary weights, and ggml's q4_0 and q8_0: compress with --stage "
    "rounding:bits=4,group=32,symmetric=true"
)
GPTQ = (
    "GPTQ holds symmetric rounding and ternary weights in matrices whose sides are multiples of 32: compress with --stage "
    "rounding:bits=4,group=32,symmetric=true"
)
MLX = "MLX holds rounding and ternary weights in groups of a multiple of 32: compress with --stage rounding:bits=4,group=64"
BITNET = "bitnet holds ternary weights of one scale, in a multiple of 4 rows: compress with --stage ternary:rule=absmean"


def compressed_tensors(name: str, grid: Grid) -> tuple[Planes, Said]:
    """pack-quantized: code - zero + 2**(b - 1) in b = 4 or 8 bits, along the rows."""
    if grid.zero is None:
        raise refused(name, f"encoded by {grid.stage.brief()}, asymmetric", COMPRESSED)
    bits = 4 if grid.bits <= 4 else 8
    planes = {
        "weight_packed": words(grid.codes + (2 ** (bits - 1) - grid.zero), bits),
        "weight_scale": grid.scale.contiguous(),
        "weight_shape": torch.tensor(grid.codes.shape),
    }
    strategy = {"strategy": "group", "group_size": grid.group} if grid.group else {"strategy": "channel", "group_size": None}
    return planes, {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}


def compressed_tensors_config(said: dict[str, Said], kept: list[str]) -> Said:
    """One scheme for all matrices, or each scheme with the names of its own: vLLM would prefer "Linear" to names in a layer
    that it makes of several."""
    schemes: dict[tuple[Any, ...], list[str]] = {}
    for stem, own in said.items():
        schemes.setdefault(tuple(own.items()), []).append(stem)
    groups = {
        f"group_{i}": {
            "targets": stems if len(schemes) > 1 else ["Linear"],
            "weights": dict(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (scheme, stems) in enumerate(schemes.items())
    }
    about = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {"quantization_config": {**about, "ignore": kept, "config_groups": groups}}


def gptq(name: str, grid: Grid) -> tuple[Planes, Said]:
    """GPTQ, version 1: words that run down the inputs, zero points less one.

    Kernels for `sym` take the zero point 2**(b - 1) for granted, so that codes are moved there.
    """
    rows, columns = grid.codes.shape
    if grid.zero is None:
        raise refused(name, f"encoded by {grid.stage.brief()}, asymmetric", GPTQ)
    if rows % 32 or columns % 32:
        raise refused(name, f"of shape {rows} x {columns}", GPTQ)
    bits = next(b for b in (2, 3, 4, 8) if b >= grid.bits)
    zero, scales = 2 ** (bits - 1), grid.scale.T.contiguous()
    planes = {
        "qweight": words(grid.codes + (zero - grid.zero), bits).T.contiguous(),
        "qzeros": words(torch.full(tuple(scales.shape), zero - 1, dtype=torch.uint8), bits),
        "scales": scales,
        "g_idx": torch.arange(columns, dtype=torch.int32) // grid.columns,
    }
    return planes, {"bits": bits, "group_size": grid.group or -1}


def gptq_config(said: dict[str, Said], kept: list[str]) -> Said:
    """The same bits and groups for all matrices, none of which is left out."""
    if left := [stem for stem in kept if stem != "lm_head"]:
        raise refused(f"{left[0]}.weight", "not encoded", "GPTQ has no way to leave a linear layer out: encode it, too")
    about = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" in said,
    }
    return {"quantization_config": {**about, **one_of(said)}}


def mlx(name: str, grid: Grid) -> tuple[Planes, Said]:
    """Codes along the rows, and a scale and a bias per group of 32, 64 or 128: w = code * scale + bias."""
    group = math.gcd(grid.columns, 128)
    if group < 32:
        raise refused(name, f"encoded in groups of {grid.columns} columns", MLX)
    bits = 8 if grid.bits == 7 else grid.bits
    bias = grid.scale * -(grid.zero or 0) if grid.minimum is None else grid.minimum
    each = grid.columns // group
    planes = {
        "weight": words(grid.codes, bits).view(torch.uint32),
        "scales": grid.scale.repeat_interleave(each, 1),
        "biases": bias.repeat_interleave(each, 1),
    }
    return planes, {"bits": bits, "group_size": group, "mode": "affine"}


def mlx_config(said: dict[str, Said], kept: list[str]) -> Said:
    """Bits and groups of the first matrix, and of each that has others."""
    first = next(iter(said.values()))
    scheme = {**first, **{stem: own for stem, own in said.items() if own != first}}
    return {"quantization": scheme, "quantization_config": scheme}


def bitnet(name: str, grid: Grid) -> tuple[Planes, Said]:
    """Four codes per byte: byte r holds rows r, r + R/4, r + 2R/4 and r + 3R/4, the first in the lowest bits."""
    rows = len(grid.codes)
    if grid.bits != 2 or grid.zero != 1 or rows % 4 or not (grid.scale == grid.scale[0, 0]).all():
        raise refused(name, f"encoded by {grid.stage.brief()}, {rows} rows", BITNET)
    quarters = grid.codes.reshape(4, rows // 4, -1)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return {"weight": packed, "weight_scale": grid.scale[0].contiguous()}, {}


def bitnet_config(said: dict[str, Said], kept: list[str]) -> Said:
    """autobitlinear multiplies by the scale; bitlinear would divide by it."""
    about = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return {"quantization_config": {**about, "modules_to_not_convert": kept}}


def one_of(said: dict[str, Said]) -> Said:
    """What is said of all matrices alike.  Raises BadInput if of one something else is."""
    (first, scheme), *others = said.items()
    for stem, own in others:
        if own != scheme:
            found = ", ".join(f"{key} {own[key]} ({first}: {scheme[key]})" for key in own if own[key] != scheme[key])
            raise refused(f"{stem}.weight", f"of {found}", "the format has one setting for all: compress with one --stage")
    return scheme
