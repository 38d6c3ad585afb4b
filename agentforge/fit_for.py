"""`fit` for other programs: weights in one file of at most so many bytes, in the format's own types, for the least damage.

* gguf, for llama.cpp: candidates of each matrix are the block types that ggml has for rows of its length.  The token
  embedding and the output head are weights like any other (`statistics.collect` says how they are weighed), and the budget
  is that of the whole file: header, tokenizer and the vectors that are kept included.
* compressed-tensors, for vLLM and transformers: its int4 and int8 in groups of 32 are ggml's Q4_0 and Q8_0, without their
  order.  Embedding and head stay as they are.  Matrices that are fed the same tensor get one type: vLLM makes one layer of
  q, k and v, and of gate and up, and a layer has one scheme.  The budget is that of model.safetensors.

The stage `ggml` encodes; prices and the search are `allocation`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import evaluation
from .allocation import PASSES, Search, candidates, check_free, folder_beside, take
from .blockwise import Spill
from .errors import BadInput
from .evaluation import Divergence, Text
from .exports import Exported, export, gguf
from .folders import check_out
from .gguf_import import convert, reader_of
from .models import SAMPLED_TOKENS, LanguageModel, device_named
from .names import unknown
from .opening import open_model
from .stages.ggml import FORMS, GGML
from .statistics import FOR_FIT, Calibration, Collected, collect
from .tensorfiles import beginning

if TYPE_CHECKING:
    from concurrent.futures import Executor

LADDER = tuple(GGML(type=name) for name in FORMS)
TYPES = {
    "gguf": tuple(name for name in FORMS if name != "tq2_0"),  # what that holds, tq1_0 holds in fewer bytes
    "compressed-tensors": ("q4_0", "q8_0"),
}
TENSOR = 24  # bytes that a GGUF header has for a tensor beside its name and its shape, and 8 for each dimension


class Fitted(NamedTuple):
    """file: what was written, of which types.  predicted: damage, nats per token.  measured: of the weights that the file
    decodes to, as it is opened again."""

    file: Exported
    predicted: float
    measured: Divergence


def fit_for(
    model: LanguageModel | str | Path,
    to: str,
    out: str | Path,
    most: int,
    *,
    types: Collection[str] | None = None,
    calibration: Calibration | None = None,
    statistics: Collected | None = None,
    text: str | Text | None = None,
    tokens: int = SAMPLED_TOKENS,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> Fitted:
    """The file of least predicted damage in `most` bytes, measured as it is opened again.

    to: of `TYPES`.  out: the file (gguf) or the folder.  types: to choose from (default: all).  statistics: for gguf with
    those of `ends`.  overwrite: what agentforge wrote there may be replaced.  Other arguments as for `fit`.

    Raises BadInput if the budget cannot be met, for gguf for another model than a plain Llama, and as `fit` does.
    """
    if to not in TYPES:
        raise unknown("format to fit for", to, TYPES)
    device_named(device)
    model = open_model(model) if isinstance(model, str | Path) else model
    model.check()
    one_file = to == "gguf"
    if model.is_classifier:
        raise BadInput(f"{model.name}: is a classifier; {'a GGUF file' if one_file else to} holds language models")
    evaluation.check_causal(model)
    out = Path(out).expanduser()
    if not one_file:
        check_free(out := check_out(out, model.path, replace=True), overwrite)
    elif os.path.lexists(out) and not (overwrite and _is_ours(out)):
        why = "; it is no GGUF file of agentforge" if overwrite else ", or pass --overwrite to replace it"
        raise BadInput(f"{out}: is in the way; choose another --out{why}")
    found_text = evaluation.find_text(text)
    calibration = dataclasses.replace((calibration or FOR_FIT).for_model(model), device=device).with_sensitivities()
    ladder = [stage for stage in LADDER if stage.type in (types or TYPES[to])]
    shapes = {
        weight.name: weight.shape
        for weight in model.weights(embeddings=one_file)
        if one_file or (weight.module == "Linear" and weight.shape[1] % 32 == 0)
    }
    usable = {name: [stage for stage in ladder if stage.fits(shape[1])] for name, shape in shapes.items()}
    for name in (name for name, found in usable.items() if not found):
        raise BadInput(f"{name}: has rows of {shapes[name][1]}; ggml's types take multiples of 32 or 256, so none holds it")
    if not shapes:
        raise BadInput(f"{model.name}: no linear layer in its blocks has rows of a multiple of 32, as the groups of {to}")
    with folder_beside(out) as folder:
        if one_file:
            kept = [(name, model.tensor(name)) for name in sorted(model.entries) if name not in shapes]
            gguf.write(folder / "kept.gguf", model, kept, "0" * 64)  # refuses what is no Llama before anything takes long
            rest = (folder / "kept.gguf").stat().st_size + sum(TENSOR + 16 + len(gguf.gguf_name(name)) for name in shapes)
        else:
            header, size = beginning(sorted(_four_bits(model, shapes)), {"format": "pt", gguf.MARK: "0" * 64})
            rest = len(header) + size - sum(rows * columns * 9 // 16 for rows, columns in shapes.values())
        sizes = ([math.prod(one.layout(shapes[name])["blocks"][1]) for one in found] for name, found in usable.items())
        if most < (least := rest + sum(map(min, sizes))):
            what = f"budget of {most:,} bytes; the smallest candidates of {len(shapes)} weights"
            raise BadInput(f"{what} take {least:,}, all else in the file included")
        statistics = statistics or collect(model, calibration, workers, progress, ends=one_file)
        how: dict[str, Any] = {"workers": workers, "executor": executor}
        priced = candidates(model, statistics, calibration, ladder, device=device, progress=progress, **how)
        options = {n: [one for one in found if one.stage in usable[n]] for n, found in priced.items() if n in shapes}
        settings = {"calibration": calibration, "statistics": statistics, **how}
        journal = folder / "counted"  # of nothing: these prices are counted
        about: Any = settings, journal, {}, Spill(), {}, None if one_file else statistics.keys_of
        search = Search(model, options, {}, found_text, tokens, device, progress, *about)
        for turn in range(PASSES):
            artifact, predicted = search.make(most - rest, folder / "trial", True)
            exported = export(artifact, to, folder / f"{turn}.gguf" if one_file else folder / f"{turn}")
            if exported.bytes <= most:
                break
            rest = exported.bytes - search.planes(artifact)  # now with what lies between tensors
        else:
            raise BadInput(f"budget of {most:,} bytes could not be met; allow a little more")
        if one_file:
            convert(exported.path, folder / "opened")
            measured = search.measure(open_model(folder / "opened"))
            os.replace(exported.path, out)
        else:
            measured = search.measure(open_model(exported.path))
            take(exported.path, out, overwrite)
    return Fitted(exported._replace(path=out), predicted, measured)


def _four_bits(model: LanguageModel, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """What model.safetensors holds if all weights of these shapes are int4: names, dtypes and shapes."""
    for name, entry in model.entries.items():
        if name in shapes:
            rows, columns = shapes[name]
            yield f"{name}_packed", torch.int32, (rows, columns // 8)
            yield f"{name}_scale", torch.float16, (rows, columns // 32)
            yield f"{name}_shape", torch.int64, (2,)
        else:  # a matrix in float32 is kept as float16
            wide = len(entry.shape) > 1 and entry.dtype in (torch.float32, torch.float64)
            yield name, torch.float16 if wide else entry.dtype, entry.shape


def _is_ours(file: Path) -> bool:
    with contextlib.suppress(Exception):  # whatever the reader says of a file that is none
        return not file.is_symlink() and reader_of(file).get_field(gguf.MARK) is not None
    return False
