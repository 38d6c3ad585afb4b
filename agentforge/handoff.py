"""Hand-offs: what one phase must leave for the next, written down and checked on both sides.

A hand-off is a folder with `handoff.json`: which phase wrote it, the models in it (subfolders), and for each its files'
hashes, its special tokens, and the perplexity it had when it was handed over, with the protocol it was measured by.
The receiver measures again; it does not believe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import evaluation
from .errors import BadInput
from .evaluation import Measurement, Text
from .models import LanguageModel, open_model
from .tensorfiles import plain_file, read_json, sha256_file, write_json

HANDOFF = "handoff.json"
FORMAT = 1
TOLERANCE = 0.01  # how far a perplexity may be from the one that was handed over, relatively: kernels differ


def write_handoff(folder: str | Path, phase: int, models: Mapping[str, Measurement], **facts: Any) -> Path:
    """Write folder/handoff.json.

    phase: the number of the phase that hands over.  models: name of a subfolder -> its perplexity (accuracy for a
    classifier).  facts: anything else that the next phase should know.  Raises BadInput where a model cannot be opened.
    """
    folder = Path(folder)
    about = {}
    for name, measured in models.items():
        model = open_model(folder / name)
        files = sorted(file for file in (folder / name).iterdir() if file.is_file())
        about[name] = {
            "files": {file.name: sha256_file(file) for file in files},
            "special_tokens": None if model.is_classifier else _special_tokens(model),
            "quality": measured.to_json(),
        }
    path = folder / HANDOFF
    write_json(path, {"format": FORMAT, "phase": phase, "models": about, "facts": facts})
    return path


def check_handoff(folder: str | Path, phase: int, text: str | Text | None = None, progress: bool = True) -> list[str]:
    """Check what a phase left: files and hashes, tensors finite, tokenizer and special tokens, quality measured again.

    text: where it is the one that the quality was measured on, it is measured again.  Returns what was checked.
    Raises BadInput with the reason where something is not as it should be.
    """
    folder = Path(folder)
    data: Any = read_json(folder / HANDOFF)

    def refuse(what: str) -> BadInput:
        return BadInput(f"{folder}/{HANDOFF}: {what}; run phase {phase} again")

    if data.get("format") != FORMAT or data.get("phase") != phase or not isinstance(data.get("models"), dict):
        raise refuse(f"is no hand-off of phase {phase} in format {FORMAT}")
    if not data["models"]:
        raise refuse("hands over no model")
    checks = []
    for name, about in data["models"].items():
        where = plain_file(folder, name)
        if not isinstance(about, dict) or not isinstance(about.get("files"), dict) or "quality" not in about:
            raise refuse(f"model {name!r} lacks files or quality")
        for file, digest in about["files"].items():
            path = plain_file(where, file)
            if not path.is_file():
                raise refuse(f"{name}/{file} is missing")
            if sha256_file(path) != digest:
                raise refuse(f"{name}/{file} is not the file that was handed over")
        model = open_model(where)
        checks.append(f"{name}: {len(about['files'])} files, each as it was written")
        checks += [f"{name}: {check}" for check in check_model(model)]
        if not model.is_classifier and (found := _special_tokens(model)) != about.get("special_tokens"):
            raise refuse(f"{name}: special tokens are {found}, handed over were {about.get('special_tokens')}")
        checks += _quality(model, name, about["quality"], text, refuse, progress)
    return checks


def check_model(model: LanguageModel) -> list[str]:
    """Check a model that comes without a hand-off: tensors present and finite, tokenizer and special tokens usable."""
    model.check()
    for name in model.entries:
        tensor = model.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise BadInput(f"{model.name}: tensor {name} holds values that are not finite; mend the model first")
    checks = [f"{len(model.entries)} tensors, all finite"]
    if not model.is_classifier:
        checks.append(f"{len(_special_tokens(model))} special tokens, each one token of the vocabulary")
    return checks


def _special_tokens(model: LanguageModel) -> dict[str, int]:
    """Special tokens and their ids.  Raises BadInput where one is no single token, or beyond the embedding."""
    tokenizer = model.tokenizer
    rows = model.config.get("vocab_size")
    found = {}
    for token in tokenizer.all_special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise BadInput(f"{model.name}: special token {token!r} is cut into {len(ids)} tokens; mend the tokenizer")
        if isinstance(rows, int) and ids[0] >= rows:
            raise BadInput(f"{model.name}: special token {token!r} has id {ids[0]}, the embedding has {rows} rows")
        found[token] = int(ids[0])
    return found


def _quality(
    model: LanguageModel, name: str, recorded: Any, text: str | Text | None, refuse: Any, progress: bool
) -> list[str]:
    try:
        measured = Measurement(**recorded)
        value = float(measured.value)
    except (TypeError, ValueError):
        raise refuse(f"{name}: its quality is no measurement") from None
    if not math.isfinite(value) or value <= 0:
        raise refuse(f"{name}: its quality is {value}")
    if model.is_classifier:
        again = evaluation.accuracy(model)
    else:
        found = evaluation.find_text(text) if text is not None else None
        protocol = measured.protocol
        if found is None or found.sha256 != protocol.get("text_sha256"):
            return [f"{name}: quality not measured again (its text is {protocol.get('text')})"]
        again = evaluation.perplexity(
            model,
            found,
            context=protocol["context"],
            stride=protocol["stride"],
            tokens=protocol["scored_tokens"],
            bos=protocol["bos"],
            progress=progress,
        )
    if abs(again.value / value - 1) > TOLERANCE:
        raise refuse(f"{name}: measured {again}, handed over was {value:.4g}")
    return [f"{name}: {again}, as handed over"]
