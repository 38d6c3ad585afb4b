"""Folders that another tool quantised: each matrix is dequantised to float32 when it is read, and nothing is written.

A format says in which planes a matrix lies, which are held against the files' headers before any of them is read, and how
they are decoded.  What a configuration says beyond what is known here is refused by its name, for it may change what the
model computes.  Activations stay in floating point, even if the tool's own runtime rounds them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .bits import unpack_uint
from .errors import BadInput
from .models import LanguageModel
from .tensorfiles import Entry, read_tensor

# How the names of tensors end that only quantisers write, and only beside others.
QUANTISED = (".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")
INT32, INT8, UINT8 = (torch.int32,), (torch.int8,), (torch.uint8,)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # of the eight codes in a word, those of outputs 0 to 7
UNROUNDED = ", activations not rounded"
INSTEAD = "open the model it was made from"
Planes = dict[str, torch.Tensor]
Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


class Matrix(NamedTuple):
    """How a matrix lies on disk.

    kind: for people.  shape: (out, in).  planes: by how their names go on behind the module's, the shape and the dtypes that
    they may have; dimensions of one do not count.  decode: makes float32[out, in] of the planes, which have these shapes.
    """

    kind: str
    shape: tuple[int, int]
    planes: Shapes
    decode: Callable[[Planes], torch.Tensor]


class Module(NamedTuple):
    """The planes of one module, by how their names go on behind its own.  Each method raises BadInput for a missing one."""

    stem: str
    stored: Mapping[str, Entry]

    def has(self, leaf: str) -> bool:
        """Whether there is a plane of this name."""
        return f"{self.stem}.{leaf}" in self.stored

    def entry(self, leaf: str) -> Entry:
        """Where a plane lies.  Raises BadInput if it is missing."""
        if not self.has(leaf):
            raise BadInput(f"tensor {self.stem}.{leaf} is missing")
        return self.stored[f"{self.stem}.{leaf}"]

    def shape(self, leaf: str) -> tuple[int, int]:
        """The shape of a plane that has to be a matrix."""
        shape = self.entry(leaf).shape
        if len(shape) != 2 or 0 in shape:
            raise BadInput(f"tensor {self.stem}.{leaf} is {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def read(self, leaf: str) -> torch.Tensor:
        """A plane of a few bytes that says how the others are to be read, flat."""
        entry = self.entry(leaf)
        if not 0 < entry.bytes <= 1 << 16:
            raise BadInput(f"tensor {self.stem}.{leaf} has {entry.bytes} bytes, expected 1 to {1 << 16}")
        return read_tensor(f"{self.stem}.{leaf}", entry).reshape(-1)


class QuantisedModel(LanguageModel):
    """A model whose matrices lie on disk as another tool quantised them.

    Raises BadInput for what is not exactly known: a format, a setting, a plane that is missing or of another shape.
    """

    def __init__(self, name: str, path: Path, stored: dict[str, Entry], source: dict[str, Any]) -> None:
        super().__init__(name, path, stored, source)
        said, mlx = self.config.pop("quantization_config", None), self.config.pop("quantization", None)
        settings: Any = said
        if isinstance(mlx, dict) and said in (None, mlx):
            settings = {**mlx, "quant_method": "mlx"}
        elif said is None and mlx is None:  # hqq writes no more than its planes
            settings = {"quant_method": "hqq"}
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if not isinstance(method, str) or method not in FORMATS:
            raise BadInput(
                f"{path}: already quantised by another tool in a way that is not known ({method!a:.40}; known are "
                f"{', '.join(FORMATS)}); {INSTEAD}"
            )
        matrix_of, marks, known = FORMATS[method]
        self.entries = dict(stored)
        self._matrices: dict[str, tuple[Matrix, dict[str, tuple[str, Entry]]]] = {}
        try:
            _check_settings(settings, known)
            for tensor in stored:
                mark = next((mark for mark in marks if tensor.endswith(f".{mark}")), None)
                stem = tensor.removesuffix(f".{mark}")
                if mark is None or f"{stem}.weight" in self._matrices:
                    continue
                module = Module(stem, stored)
                matrix = matrix_of(settings, module)
                _check_planes(module, matrix)
                planes = {leaf: (f"{stem}.{leaf}", self.entries.pop(f"{stem}.{leaf}")) for leaf in matrix.planes}
                self._matrices[f"{stem}.weight"] = matrix, planes
                if f"{stem}.weight" in self.entries:
                    raise BadInput(f"tensor {stem}.weight is there quantised and as it is")
            check_plain(self.entries)
            if not self._matrices:
                raise BadInput("config.json says so, but none of its tensors is")
        except BadInput as error:
            raise BadInput(f"{path}: already quantised by another tool ({method}): {error}; {INSTEAD}") from None
        for weight, (matrix, planes) in self._matrices.items():
            self.entries[weight] = Entry(next(iter(planes.values()))[1].file, matrix.shape, torch.float32)
        kinds = " and ".join(sorted({matrix.kind for matrix, _ in self._matrices.values()}))
        self.source = {**source, "precision": f"dequantised {method} ({kinds})"}

    def fit(self, module: nn.Module) -> None:
        """Leave out the biases of zeros that some packers wrote for layers that have none.

        Raises BadInput for GPT-2's layers: they hold their matrices transposed, which the formats do not.
        """
        if any(type(layer).__name__ == "Conv1D" for layer in module.modules()):
            raise BadInput(f"{self.path}: quantised layers of GPT-2's kind (Conv1D) are not read; {INSTEAD}")
        known = dict(module.named_parameters(remove_duplicate=False))
        for name in [f"{weight.removesuffix('weight')}bias" for weight in self._matrices]:
            if name in self.entries and name not in known and not self.tensor(name).any():
                del self.entries[name]

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """`tensor(name)` as a function that can be sent to another process, which then reads the files by itself."""
        if name not in self._matrices:
            return super().reader(name)
        matrix, planes = self._matrices[name]
        absolute = {leaf: (n, e._replace(file=e.file.absolute())) for leaf, (n, e) in planes.items()}
        return partial(_dequantised, name, matrix, absolute)


def check_plain(entries: Mapping[str, Entry]) -> None:
    """Raise BadInput for a tensor that does not hold a model's own numbers."""
    for name, entry in entries.items():
        if name.endswith(QUANTISED) or (name.endswith("weight") and entry.dtype not in (*FLOATS, torch.float64)):
            raise BadInput(f"tensor {name} is {_dtype(entry.dtype)}, which nothing explains")


def _dequantised(name: str, matrix: Matrix, planes: dict[str, tuple[str, Entry]]) -> torch.Tensor:
    read = {leaf: read_tensor(*plane).reshape(matrix.planes[leaf][0]) for leaf, plane in planes.items()}
    try:
        found = matrix.decode(read).contiguous()
        if not found.any():  # what a download that broke off leaves
            raise BadInput("its matrix holds nothing but zeros")
        return found
    except BadInput as error:
        file = next(iter(planes.values()))[1].file
        raise BadInput(f"{file}: tensor {name}, already quantised by another tool: {error}; {INSTEAD}") from None


def _check_settings(said: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in said.items():
        values = known.get("*" if "." in key else key, ())
        if values is not None and value not in values:
            raise BadInput(f"{key!a:.60} is {value!a:.60}, which is not supported")


def _check_planes(module: Module, matrix: Matrix) -> None:
    for leaf, (shape, dtypes) in matrix.planes.items():
        entry = module.entry(leaf)
        if entry.dtype not in dtypes or [n for n in entry.shape if n != 1] != [n for n in shape if n != 1]:
            raise BadInput(
                f"tensor {module.stem}.{leaf} is {_dtype(entry.dtype)}{list(entry.shape)}, expected "
                f"{' or '.join(map(_dtype, dtypes))}{list(shape)}"
            )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(said: Mapping[str, Any], key: str, allowed: tuple[int, ...] | range) -> int:
    value = said.get(key)
    if type(value) is not int or value not in allowed:
        raise BadInput(f"{key} is {value!a:.40}, expected {allowed if isinstance(allowed, tuple) else 'a positive number'}")
    return value


def _group(said: Mapping[str, Any], columns: int) -> int:
    """Columns per group of scales; -1 stands for all of them."""
    return columns if said.get("group_size") == -1 else min(columns, _number(said, "group_size", range(1, 1 << 31)))


def _words(count: int, bits: int) -> int:
    """Words of 32 bits that hold so many codes."""
    if 32 % bits and count % 32:
        raise BadInput(f"rows of {count} codes of {bits} bits, expected a multiple of 32")
    return math.ceil(count * bits / 32)


def _codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes in the words of each row, the first in the lowest bits: uint8[rows, count]."""
    rows, width = words.shape
    stream = words.contiguous().view(torch.uint8).reshape(-1)
    return unpack_uint(stream, bits, rows * width * 32 // bits).reshape(rows, -1)[:, :count]


def _spread(grid: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """A number per block as one per element, float32."""
    rows = grid.float().repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def _gptq(said: dict[str, Any], module: Module) -> Matrix:
    """Words that run down the inputs, zero points that run along the outputs, and a group per input."""
    versions = {said.get(key) or "gptq" for key in ("checkpoint_format", "format") if key in said} or {"gptq"}
    if len(versions) > 1:
        raise BadInput("checkpoint_format and format are not the same")
    bits = _number(said, "bits", (2, 3, 4, 8))
    words, outputs = module.shape("qweight")
    inputs = words * 32 // bits
    group = _group(said, inputs)
    groups = math.ceil(inputs / group)
    planes: Shapes = {
        "qweight": ((_words(inputs, bits), outputs), INT32),
        "qzeros": ((groups, _words(outputs, bits)), INT32),
        "scales": ((groups, outputs), FLOATS),
    }
    if module.has("g_idx") or said.get("desc_act"):
        planes["g_idx"] = ((inputs,), (torch.int32, torch.int64))
    decode = partial(_decode_gptq, bits, group, "gptq" in versions, bool(said.get("desc_act")))
    return Matrix(f"{bits} bits", (outputs, inputs), planes, decode)


def _decode_gptq(bits: int, group: int, first: bool, ordered: bool, planes: Planes) -> torch.Tensor:
    groups, outputs = planes["scales"].shape
    words = planes["qzeros"]
    if first and bits != 3:  # version 1 has one less; a code that overflows carries into the next one, as it once borrowed
        words = words + sum(1 << shift for shift in range(0, 32, bits))
    zeros = _codes(words, bits, outputs)
    if first and bits == 3:
        zeros = (zeros + 1) & 7
    inputs = planes["qweight"].shape[0] * 32 // bits
    plain = torch.arange(inputs) // group
    index = planes.get("g_idx", plain).long()
    if not ordered and not torch.equal(index, plain):
        raise BadInput("g_idx has an order, desc_act says there is none")
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise BadInput(f"g_idx leads out of the {groups} groups")
    codes = _codes(planes["qweight"].T, bits, inputs)
    return (codes.float() - zeros.float()[index].T) * planes["scales"].float()[index].T


def _awq(said: dict[str, Any], module: Module) -> Matrix:
    """Words that run along the outputs in an order of their own."""
    _number(said, "bits", (4,))
    inputs, words = module.shape("qweight")
    outputs, group = words * 8, _group(said, inputs)
    groups = math.ceil(inputs / group)
    planes: Shapes = {
        "qweight": ((inputs, words), INT32),
        "qzeros": ((groups, words), INT32),
        "scales": ((groups, outputs), FLOATS),
    }
    return Matrix("4 bits", (outputs, inputs), planes, partial(_decode_awq, group))


def _decode_awq(group: int, planes: Planes) -> torch.Tensor:
    codes, zeros = (
        _codes(planes[leaf], 4, planes["scales"].shape[1]).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).float()
        for leaf in ("qweight", "qzeros")
    )
    index = torch.arange(len(codes)) // group
    values: torch.Tensor = (codes - zeros[index]) * planes["scales"].float()[index]
    return values.T


def _compressed_tensors(said: dict[str, Any], module: Module) -> Matrix:
    """Codes in words or in bytes, and a scale per matrix, row, group or block of them."""
    schemes = said.get("config_groups")
    if not isinstance(schemes, dict) or not schemes or not all(isinstance(scheme, dict) for scheme in schemes.values()):
        raise BadInput("its config_groups are missing")
    named = [scheme for scheme in schemes.values() if isinstance(scheme.get("targets"), list)]
    own = [scheme for scheme in named if module.stem in scheme["targets"]] or [*schemes.values()]
    scheme = own[0]
    for other in schemes.values():
        _check_settings(other, SCHEME)
    if any(other.get(key) != scheme.get(key) for other in own for key in ("weights", "format")):
        raise BadInput(f"it has several schemes in config_groups, not one that names {module.stem}")
    weights, activations = scheme.get("weights"), scheme.get("input_activations")
    if not isinstance(weights, dict):
        raise BadInput("its scheme says nothing of weights")
    _check_settings(weights, WEIGHTS)
    if activations is not None and (not isinstance(activations, dict) or activations.get("dynamic") is not True):
        raise BadInput("its activations are rounded by scales from the file, which is not supported")
    packed, kind = module.has("weight_packed"), said.get("format")
    if packed != (kind == "pack-quantized") or scheme.get("format") not in (None, kind):
        raise BadInput(f"format is {kind!a:.40}, tensors {module.stem}.* are of another")
    floats = weights.get("type") == "float"
    bits = _number(weights, "num_bits", (8,) if floats else (4, 8) if packed else tuple(range(2, 9)))
    if packed and floats:
        raise BadInput("its packed numbers are floats, which is not supported")
    planes: Shapes = {}
    if packed:
        shape = module.read("weight_shape").tolist()
        if len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
            raise BadInput(f"tensor {module.stem}.weight_shape is {shape!a:.60}, expected two positive numbers")
        rows, columns = shape
        planes["weight_packed"] = ((rows, _words(columns, bits)), INT32)
        planes["weight_shape"] = ((2,), (torch.int64, torch.int32))
    else:
        rows, columns = module.shape("weight")
        planes["weight"] = ((rows, columns), FLOAT8[:1] if floats else INT8)
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if strategy is None:
        strategy = "tensor" if weights.get("group_size") is None else "channel" if weights["group_size"] == -1 else "group"
    if strategy == "block":
        block = _block(block, (rows, columns))
    else:
        block = (rows if strategy == "tensor" else 1, _group(weights, columns) if strategy == "group" else columns)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    planes["weight_scale"] = (grid, FLOATS)
    if weights.get("symmetric") is False:
        planes["weight_zero_point"] = ((_words(rows, bits), grid[1]), INT32) if packed else (grid, INT8)
    if module.has("weight_g_idx"):
        raise BadInput(f"tensor {module.stem}.weight_g_idx orders its columns, which is not supported")
    name = "FP8" if floats else f"{bits} bits"
    decode = partial(_decode_scaled, (rows, columns), block, bits)
    return Matrix(name + UNROUNDED * (activations is not None), (rows, columns), planes, decode)


def _decode_scaled(shape: tuple[int, int], block: tuple[int, int], bits: int, planes: Planes) -> torch.Tensor:
    packed, zeros = planes.get("weight_packed"), planes.get("weight_zero_point")
    scales = next(planes[leaf] for leaf in ("weight_scale", "weight_scale_inv") if leaf in planes)
    if packed is not None:
        values = _codes(packed, bits, shape[1]).float() - (1 << bits - 1)
        zeros = None if zeros is None else _codes(zeros.T, bits, shape[0]).T.float() - (1 << bits - 1)
    else:
        values = planes["weight"].float()
    if zeros is not None:
        values -= _spread(zeros, block, shape)
    return values * _spread(scales, block, shape)


def _block(block: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns per scale, at most those that there are."""
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise BadInput(f"blocks are {block!a:.40}, expected two positive numbers")
    return min(block[0], shape[0]), min(block[1], shape[1])


def _fp8(said: dict[str, Any], module: Module) -> Matrix:
    """Numbers of 8 bits, and a scale per block, per row or for all; it multiplies whatever it is called."""
    shape = module.shape("weight")
    leaf = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
    entry, block = module.entry(leaf), (1, shape[1])
    if said.get("weight_block_size") is not None:
        block = _block(said["weight_block_size"], shape)
    elif math.prod(entry.shape) == 1:
        block = shape
    grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    planes: Shapes = {"weight": (shape, FLOAT8), leaf: (grid, FLOATS)}
    if said["quant_method"] == "fbgemm_fp8" and module.has("input_scale_ub"):
        planes["input_scale_ub"] = ((1,), FLOATS)  # of activations
    return Matrix("FP8" + UNROUNDED, shape, planes, partial(_decode_scaled, shape, block, 8))


def _bitsandbytes(said: dict[str, Any], module: Module) -> Matrix:
    """LLM.int8: a byte per number and a maximum per row; else four bits."""
    if not module.has("SCB"):
        return _four_bits(module)
    shape = module.shape("weight")
    planes: Shapes = {"weight": (shape, INT8), "SCB": ((shape[0], 1), FLOATS)}
    if module.has("weight_format"):
        planes["weight_format"] = ((1,), UINT8)
        if module.read("weight_format").tolist() != [0]:
            raise BadInput(f"tensor {module.stem}.weight_format says that its rows are not in order")
    return Matrix("8 bits" + UNROUNDED, shape, planes, _decode_int8)


def _decode_int8(planes: Planes) -> torch.Tensor:
    return planes["weight"].float() * (planes["SCB"].float() / 127)


def _four_bits(module: Module) -> Matrix:
    """Two codes per byte, the first in the high bits, and a maximum per block of the flat matrix, which may be quantised,
    too."""
    kinds = [kind for kind in ("nf4", "fp4") if module.has(f"weight.quant_state.bitsandbytes__{kind}")]
    if len(kinds) != 1:
        raise BadInput(f"tensor {module.stem}.weight.quant_state.bitsandbytes__nf4, or __fp4, is missing")
    leaf = f"weight.quant_state.bitsandbytes__{kinds[0]}"
    try:
        state = json.loads(module.read(leaf).view(torch.uint8).numpy().tobytes())
        rows, columns = state["shape"]
        numbers = [rows, columns, state["blocksize"], state.get("nested_blocksize", 1)]
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        numbers, offset = [], math.nan
    if not numbers or not all(type(n) is int and 0 < n < 1 << 31 for n in numbers) or state.get("quant_type") != kinds[0]:
        raise BadInput(f"tensor {module.stem}.{leaf} does not describe a matrix")
    size, nested = rows * columns, module.has("weight.nested_absmax")
    blocks = math.ceil(size / state["blocksize"])
    planes: Shapes = {
        "weight": ((math.ceil(size / 2),), UINT8),
        "weight.absmax": ((blocks,), UINT8 if nested else FLOATS),
        "weight.quant_map": ((16,), FLOATS),
        leaf: (module.entry(leaf).shape, UINT8),
    }
    if nested:
        planes["weight.nested_absmax"] = ((math.ceil(blocks / numbers[3]),), FLOATS)
        planes["weight.nested_quant_map"] = ((256,), FLOATS)
    decode = partial(_decode_4bit, (rows, columns), min(numbers[2], size), min(numbers[3], blocks), offset)
    return Matrix(kinds[0], (rows, columns), planes, decode)


def _decode_4bit(shape: tuple[int, int], block: int, nested: int, offset: float, planes: Planes) -> torch.Tensor:
    maxima, size = planes["weight.absmax"], shape[0] * shape[1]
    if "weight.nested_absmax" in planes:
        outer = planes["weight.nested_absmax"].float().repeat_interleave(nested)[: len(maxima)]
        maxima = planes["weight.nested_quant_map"].float()[maxima.int()] * outer + offset
    pairs = planes["weight"]
    values = planes["weight.quant_map"].float()[torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[:size].int()]
    return (values * maxima.float().repeat_interleave(block)[:size]).reshape(shape)


def _mlx(said: dict[str, Any], module: Module) -> Matrix:
    """Words that run along the inputs, and a scale and a bias per group."""
    own = said.get(module.stem)
    if isinstance(own, dict):
        _check_settings(own, MLX)
        said = {**said, **own}
    bits = _number(said, "bits", (2, 3, 4, 5, 6, 8))
    rows, groups = module.shape("scales")
    group = _number(said, "group_size", range(1, 1 << 16))
    columns = groups * group
    planes: Shapes = {
        "weight": ((rows, _words(columns, bits)), (torch.uint32,)),
        "scales": ((rows, groups), FLOATS),
        "biases": ((rows, groups), FLOATS),
    }
    return Matrix(f"{bits} bits", (rows, columns), planes, partial(_decode_mlx, bits, group))


def _decode_mlx(bits: int, group: int, planes: Planes) -> torch.Tensor:
    _, groups = planes["scales"].shape
    codes = _codes(planes["weight"], bits, groups * group).float().unflatten(1, (groups, group))
    values: torch.Tensor = codes * planes["scales"].float()[..., None] + planes["biases"].float()[..., None]
    return values.flatten(1)


def _bitnet(said: dict[str, Any], module: Module) -> Matrix:
    """Four codes per byte, of rows that lie a quarter of the matrix apart, and a scale that multiplies, or divides."""
    quarter, columns = module.shape("weight")
    planes: Shapes = {"weight": ((quarter, columns), UINT8), "weight_scale": ((1,), FLOATS)}
    divides = said.get("linear_class", "bitlinear") == "bitlinear"
    return Matrix("ternary" + UNROUNDED, (4 * quarter, columns), planes, partial(_decode_bitnet, divides))


def _decode_bitnet(divides: bool, planes: Planes) -> torch.Tensor:
    codes = torch.cat([planes["weight"] >> shift & 3 for shift in (0, 2, 4, 6)])
    if int(codes.max()) > 2:
        raise BadInput("a code is 3, expected 0 to 2")
    scale = planes["weight_scale"].float()
    return codes.float().sub_(1).mul_(1 / scale if divides else scale)


def _vptq(said: dict[str, Any], module: Module) -> Matrix:
    """Indices of vectors along the outputs, a stream of bits per row of vectors, and codebooks: VQuantLinear of vptq."""
    layers = said.get("config_for_layers")
    own = layers.get(module.stem) if isinstance(layers, dict) else None
    if not isinstance(own, dict):
        raise BadInput(f"config_for_layers says nothing of {module.stem}")
    _check_settings(own, VPTQ_LAYER)
    rows, columns, groups, width = (
        _number(own, key, range(1, 1 << 24)) for key in ("out_features", "in_features", "group_num", "group_size")
    )
    outliers = _number(own, "outlier_size", range(1 << 24))
    if groups * width + outliers != columns or columns > 1 << 16:
        raise BadInput(f"{groups} groups of {width} columns and {outliers} outliers are not {columns} columns")

    def pair(key: str) -> tuple[int, int]:
        both = own.get(key)
        if not isinstance(both, list) or len(both) != 2 or not all(type(n) is int and n <= 1 << 16 for n in both):
            raise BadInput(f"{key} is {both!a:.40}, expected two numbers")
        return both[0], both[1]

    lengths, main, residual = pair("vector_lens"), pair("num_centroids"), pair("num_res_centroids")
    books = [(leaf, k) for leaf, k in (("centroids.weight", main[1]), ("res_centroids.weight", residual[1])) if k > 0]
    bits = [k.bit_length() - 1 for _, k in books]
    if not bits or lengths[1] < 1 or any(k != 1 << n for (_, k), n in zip(books, bits, strict=True)) or residual[0] > 0:
        raise BadInput(f"{main} and {residual} centroids of {lengths} numbers are not supported")
    planes: Shapes = {leaf: ((groups, k * lengths[1]), FLOATS) for leaf, k in books}
    planes["indices"] = ((groups, math.ceil(rows / lengths[1]), math.ceil(width * sum(bits) / 32)), INT32)
    if outliers:
        planes["outlier_centroids.weight"] = ((1, main[0] * lengths[0]), FLOATS)
        planes["outlier_indices"] = ((1, math.ceil(rows / max(1, lengths[0])), outliers), (torch.int16,))
    if own.get("enable_perm"):
        planes["perm"] = ((columns,), (torch.int16,))
    if own.get("enable_norm"):
        planes |= dict.fromkeys(("weight_scale", "weight_bias"), ((columns,), FLOATS))
    decode = partial(_decode_vptq, rows, width, lengths, bits)
    return Matrix(f"{lengths[1]} weights in {sum(bits)} bits", (rows, columns), planes, decode)


def _decode_vptq(rows: int, width: int, lengths: tuple[int, int], bits: list[int], planes: Planes) -> torch.Tensor:
    def vectors(book: torch.Tensor, indices: torch.Tensor, length: int) -> torch.Tensor:
        """The vectors of codebooks, float[groups, k * length], at int64[groups, chunks, width]: float[rows, columns]."""
        groups, chunks, _ = indices.shape
        found = book.float().reshape(groups, -1, length)[torch.arange(groups)[:, None, None], indices]
        return found.permute(1, 3, 0, 2).reshape(chunks * length, -1)[:rows]

    words = planes["indices"]
    stream = unpack_uint(words.contiguous().view(torch.uint8).reshape(-1), 1, 32 * words.numel())
    single = stream.reshape(*words.shape[:2], -1)[..., : width * sum(bits)].unflatten(2, (width, sum(bits))).long()
    indices = (single << torch.arange(sum(bits))).sum(-1)
    values = vectors(planes["centroids.weight"], indices & (1 << bits[0]) - 1, lengths[1])
    if len(bits) > 1:
        values = values + vectors(planes["res_centroids.weight"], indices >> bits[0], lengths[1])
    if "outlier_indices" in planes:
        first = planes["outlier_indices"].view(torch.uint16).long()
        if int(first.max()) * lengths[0] >= planes["outlier_centroids.weight"].shape[1]:
            raise BadInput("outlier_indices lead out of their codebook")
        values = torch.cat([vectors(planes["outlier_centroids.weight"], first, lengths[0]), values], 1)
    if "perm" in planes:
        order = planes["perm"].view(torch.uint16).long()
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise BadInput("perm is no order of the columns")
        values = values[:, order.argsort()]
    if "weight_scale" in planes:
        values = values * planes["weight_scale"].float() + planes["weight_bias"].float()
    return values


def _hqq(said: dict[str, Any], module: Module) -> Matrix:
    """Codes of rows that lie a part of the matrix apart, the first in the highest bits, and a scale and a zero point per
    group: HQQLinear of hqq, which writes its settings as tensors beside them."""
    packing = module.read("packing").view(torch.uint8).numpy().tobytes()
    if packing not in HQQ_PACKINGS:
        raise BadInput(f"packing is {packing!a:.40}, which is not supported")
    about = {leaf: module.read(leaf).tolist() for leaf in HQQ_LAYER if module.has(leaf)}
    _check_settings({leaf: values[0] for leaf, values in about.items()}, HQQ_LAYER)
    numbers = [*module.read("shape").tolist(), *module.read("group_size").tolist()]
    if len(numbers) != 3 or not all(type(n) is int and 0 < n < 1 << 31 for n in numbers):
        raise BadInput(f"shape and group_size are {numbers!a:.60}, expected three positive numbers")
    rows, columns, group = numbers
    groups, rest = divmod(rows * columns, group)
    if rest:
        raise BadInput(f"{rows} x {columns} numbers are no whole groups of {group}")
    along = module.read("axis").tolist() == [1]
    flat = (groups, group) if along else (group, groups)
    bits, per = HQQ_PACKINGS[packing]
    planes: Shapes = {
        "W_q": ((math.ceil(flat[0] / per), flat[1]), INT32 if bits == 3 else UINT8),
        **dict.fromkeys(("scale", "zero"), ((groups, 1) if along else (1, groups), FLOATS)),
        **{leaf: (module.entry(leaf).shape, (module.entry(leaf).dtype,)) for leaf in about},
    }
    kind = f"{module.read('nbits')[0]:.3g} bits"
    return Matrix(kind, (rows, columns), planes, partial(_decode_hqq, bits, per, flat[0], (rows, columns)))


def _decode_hqq(bits: int, per: int, rows: int, shape: tuple[int, int], planes: Planes) -> torch.Tensor:
    parts = [planes["W_q"] >> bits * part & (1 << bits) - 1 for part in reversed(range(per))]
    codes = torch.cat(parts)[:rows].float()
    return ((codes - planes["zero"].float()) * planes["scale"].float()).reshape(shape)


def _any(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())


# What a configuration may say, by key: the values that are understood.  None stands for any: it is followed above, or says
# nothing of what is computed.
MLX = {**_any("quant_method bits group_size *"), "mode": ("affine",)}
GPTQ = {
    **_any(
        "quant_method method bits group_size sym desc_act damp_percent damp_auto_increment static_groups true_sequential"
    ),
    **_any("model_name_or_path model_file_base_name meta tokenizer dataset batch_size pad_token_id block_name_to_quantize"),
    **_any("module_name_preceding_first_block model_seqlen modules_in_block_to_quantize modules_to_not_convert lm_head"),
    **_any("use_cuda_fp16 use_exllama disable_exllama exllama_config max_input_length cache_block_outputs quantizer mse"),
    **_any("backend act_group_aware true_sequential"),
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "format": ("gptq", "gptq_v2", None),
    "pack_dtype": ("int32", None),
    "dynamic": (None, {}),
    "is_marlin_format": (False, None),
    "awq_gemm_checkpoint": (False, None),
}
AWQ = {
    **GPTQ,
    **_any("do_fuse fuse_max_seq_len modules_to_fuse"),
    "zero_point": (True,),
    "desc_act": (False, None),
    "backend": ("auto", "autoawq", None),
    **dict.fromkeys(("version", "format", "checkpoint_format"), ("gemm", "GEMM")),
}
COMPRESSED = {
    **_any("quant_method config_groups ignore quantization_status version global_compression_ratio"),
    "format": ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"),
    **dict.fromkeys(("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"), (None, {})),
}
SCHEME = {**_any("weights input_activations targets format"), "output_activations": (None,)}
WEIGHTS = {
    **_any("num_bits group_size block_structure observer observer_kwargs scale_dtype zp_dtype actorder"),
    "type": ("int", "float"),
    "symmetric": (True, False),
    "strategy": ("tensor", "channel", "group", "block", None),
    "dynamic": (False,),
}
FP8 = {
    **_any("quant_method weight_block_size modules_to_not_convert ignored_layers modules_to_convert dequantize"),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3",),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8",),
}
BITSANDBYTES = _any(
    "quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight "
    "llm_int8_skip_modules llm_int8_threshold"
)
BITNET = {
    **_any("quant_method modules_to_not_convert rms_norm_eps"),
    "linear_class": ("bitlinear", "autobitlinear"),
    "quantization_mode": ("offline",),
    "use_rms_norm": (False, None),
}
VPTQ = {
    **_any("quant_method config_for_layers modules_to_not_convert"),
    "shared_layer_config": ({},),
    "enable_proxy_error": (False,),
}
VPTQ_LAYER = {
    **_any("in_features out_features group_num group_size outlier_size vector_lens num_centroids num_res_centroids bias"),
    **dict.fromkeys(("enable_norm", "enable_perm"), (True, False)),
    "is_indice_packed": (True,),
    "indices_as_float": (False,),
}
HQQ_LAYER = {
    **_any("nbits group_size shape packing optimize round_zero compute_dtype unpack_view_dtype"),
    **_any("offload_meta encoded_state_dict stores_quant_config"),
    "axis": (0, 1),
    "channel_wise": (1,),
    **dict.fromkeys(("quant_scale", "quant_zero", "view_as_float"), (0,)),
}
HQQ_PACKINGS = {b"8bit_u8": (8, 1), b"4bit_u8": (4, 2), b"3bit_32": (3, 10), b"2bit_u8": (2, 4), b"1bit_u8": (1, 8)}
# By the name that config.json has for it: what finds a matrix, how a plane ends by which it is known, and the settings.
FORMATS: dict[str, tuple[Callable[[dict[str, Any], Module], Matrix], tuple[str, ...], dict[str, Any]]] = {
    "gptq": (_gptq, ("qweight",), GPTQ),
    "awq": (_awq, ("qweight",), AWQ),
    "compressed-tensors": (_compressed_tensors, ("weight_packed", "weight_scale"), COMPRESSED),
    "bitsandbytes": (_bitsandbytes, ("weight.absmax", "SCB"), BITSANDBYTES),
    "fp8": (_fp8, ("weight_scale_inv", "weight_scale"), FP8),
    "fbgemm_fp8": (_fp8, ("weight_scale",), {**_any("quant_method modules_to_not_convert activation_scale_ub")}),
    "mlx": (_mlx, ("scales",), MLX),
    "bitnet": (_bitnet, ("weight_scale",), BITNET),
    "vptq": (_vptq, ("indices",), VPTQ),
    "hqq": (_hqq, ("W_q",), _any("quant_method quant_config skip_modules")),
}
