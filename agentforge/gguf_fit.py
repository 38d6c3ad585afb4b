"""`fit` for llama.cpp: one GGUF file of at most so many bytes, for the least damage.

Candidates of each matrix are the block types that ggml has for rows of its length, encoded by the stage `ggml`; prices and
the search are `allocation`'s.  The token embedding and the output head are weights like any other (`statistics.collect` says
how they are weighed), and the budget is that of the whole file: header, tokenizer and the vectors that are kept included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import evaluation
from .allocation import PASSES, Search, candidates, folder_beside
from .blockwise import Spill
from .errors import BadInput
from .evaluation import Divergence, Text
from .exports import Exported, export, gguf
from .gguf_import import convert, reader_of
from .models import SAMPLED_TOKENS, LanguageModel, device_named
from .opening import open_model
from .stages.ggml import FORMS, GGML
from .statistics import Calibration, Collected, collect

if TYPE_CHECKING:
    from concurrent.futures import Executor

TYPES = tuple(name for name in FORMS if name != "tq2_0")  # what that holds, tq1_0 holds in fewer bytes
LADDER = tuple(GGML(type=name) for name in FORMS)
TENSOR = 24  # bytes that the header has for a tensor beside its name and its shape, and 8 for each dimension


class GGUFFit(NamedTuple):
    """file: what was written, of which types.  predicted: damage, nats per token.  measured: of the weights that the file
    decodes to, as it is opened again."""

    file: Exported
    predicted: float
    measured: Divergence


def fit_gguf(
    model: LanguageModel | str | Path,
    out: str | Path,
    most: int,
    *,
    types: Collection[str] = TYPES,
    calibration: Calibration | None = None,
    statistics: Collected | None = None,
    text: str | Text | None = None,
    tokens: int = SAMPLED_TOKENS,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> GGUFFit:
    """The GGUF file of least predicted damage in `most` bytes, measured as it is opened again.

    types: to choose from.  statistics: with those of `ends`.  overwrite: a GGUF file of agentforge's may be replaced.  Other
    arguments as for `fit`.

    Raises BadInput if the budget cannot be met, for another model than a plain Llama, and as `fit` does.
    """
    device_named(device)
    model = open_model(model) if isinstance(model, str | Path) else model
    model.check()
    if model.is_classifier:
        raise BadInput(f"{model.name}: is a classifier; a GGUF file holds language models")
    out = Path(out).expanduser()
    if os.path.lexists(out) and not (overwrite and _is_ours(out)):
        why = "; it is no GGUF file of agentforge" if overwrite else ", or pass --overwrite to replace it"
        raise BadInput(f"{out}: is in the way; choose another --out{why}")
    found_text = evaluation.find_text(text)
    calibration = dataclasses.replace((calibration or Calibration()).for_model(model), device=device).with_sensitivities()
    columns = {weight.name: weight.shape[1] for weight in model.weights(embeddings=True)}
    ladder = [stage for stage in LADDER if stage.type in types]
    usable = {n: [stage for stage in ladder if stage.fits(many)] for n, many in columns.items()}
    for name in (name for name, found in usable.items() if not found):
        raise BadInput(f"{name}: has rows of {columns[name]}; ggml's types take multiples of 32 or 256, so none holds it")
    with folder_beside(out) as folder:
        kept = [(name, model.tensor(name)) for name in sorted(model.entries) if name not in columns]
        gguf.write(folder / "kept.gguf", model, kept, "0" * 64)  # refuses what is no Llama before anything takes long
        header = sum(TENSOR + 16 + len(gguf.gguf_name(name)) for name in columns)
        rest = (folder / "kept.gguf").stat().st_size + header
        statistics = statistics or collect(model, calibration, workers, progress, ends=True)
        how: dict[str, Any] = {"workers": workers, "executor": executor}
        priced = candidates(model, statistics, calibration, ladder, device=device, progress=progress, **how)
        options = {name: [one for one in found if one.stage in usable[name]] for name, found in priced.items()}
        settings = {"calibration": calibration, "statistics": statistics, **how}
        journal = folder / "counted"  # of nothing: these prices are counted
        search = Search(model, options, {}, found_text, tokens, device, progress, settings, journal, {}, Spill(), {})
        for _ in range(PASSES):
            artifact, predicted = search.make(most - rest, folder / "trial", True)
            (folder / "trial.gguf").unlink(missing_ok=True)
            exported = export(artifact, "gguf", folder / "trial.gguf")
            if exported.bytes <= most:
                break
            rest = exported.bytes - search.planes(artifact)  # now with what lies between tensors
        else:
            raise BadInput(f"budget of {most:,} bytes could not be met; allow a little more")
        convert(exported.path, folder / "opened")
        measured = search.measure(open_model(folder / "opened"))
        os.replace(exported.path, out)
    return GGUFFit(exported._replace(path=out), predicted, measured)


def _is_ours(file: Path) -> bool:
    with contextlib.suppress(Exception):  # whatever the reader says of a file that is none
        return not file.is_symlink() and reader_of(file).get_field(gguf.MARK) is not None
    return False
