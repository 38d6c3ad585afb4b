"""Hand-offs: what one phase must leave for the next, written down as contracts and checked on both sides.

A hand-off is a folder with `handoff.json`: which phase wrote it and which one receives it, the models in it (subfolders),
and for each its files with bytes and hashes, its special tokens, and the quality that it had when it was handed over, with
the protocol it was measured by.  The receiver measures again; it does not trust.

There is one format.  `CONTRACTS` names who may hand over to whom, and agentforge/schemas/ says what each of them takes; its
README.md says how the documentation's contradictory formats became one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import evaluation, schemas
from .artifact import MANIFEST, Artifact, Ratio
from .errors import BadInput
from .evaluation import Measurement, Text
from .models import LanguageModel
from .opening import open_model
from .tensorfiles import check_files, describe_files, plain_file, read_json, write_json

HANDOFF = "handoff.json"
FORMAT = 2
LARGEST = 4 << 20  # bytes of a handoff.json
TOLERANCE = 0.01  # how far a perplexity may be from the one that was handed over, relatively: kernels differ
GRADIENT_TOKENS = 128


class Contract(NamedTuple):
    """to: the phase that receives.  models: the subfolders that are handed over; empty: one, of any name."""

    to: int | str
    models: tuple[str, ...] = ()


CONTRACTS: dict[int, Contract] = {
    3: Contract(4),
    4: Contract(5, ("quantized", "dequantized")),
    7: Contract(8),
    8: Contract("deployment", ("artifact",)),
}


def write_handoff(folder: str | Path, phase: int, models: Mapping[str, Measurement], **facts: Any) -> Path:
    """Write folder/handoff.json.

    phase: the number of the phase that hands over.  models: name of a subfolder -> its perplexity (accuracy for a
    classifier).  facts: anything else that the next phase should know.  Raises BadInput if a model cannot be opened, or
    if what is handed over is not what the contract of this phase asks for.
    """
    folder = Path(folder)
    about = {}
    for name, measured in models.items():
        model = open_model(plain_file(folder, name))
        about[name] = _about(model) | {"files": describe_files(folder / name), "quality": measured.to_json()}
        if _is_packed(model):
            about[name]["ratios"] = _ratios(model)
    to = contract(phase).to
    data = {"format": FORMAT, "phase": phase, "to": to, "models": about, "facts": facts}
    if wrong := schemas.problem(f"handoff-{phase}-{to}", _finite(data, 1.0)):
        raise BadInput(f"{folder}: cannot be handed over from phase {phase} to {to}: {wrong}")
    path = plain_file(folder, HANDOFF)
    if path.exists() and not {"phase", "models"} <= read_json(path, LARGEST).keys():
        raise BadInput(f"{path}: is in the way and not a hand-off; move it and run again")
    # JSON has no word for what is not finite: as a quality the receiver refuses the null, a gate that failed may have it.
    write_json(path, _finite(data))
    return path


def measure_and_write(
    folder: str | Path, phase: int, text: str | Text | None = None, tokens: int | None = None, progress: bool = True
) -> Path:
    """Write the hand-off of a folder that lies there: each model that the contract names is measured as it is on disk, and
    from phase 8 on, the gates that it passed are those of the chain's journal.

    Raises BadInput if a model is missing, or if the journal is not the artifact's.
    """
    folder = Path(folder).expanduser()
    names = contract(phase).models or tuple(sorted(path.parent.name for path in folder.glob("*/config.json")))
    if not contract(phase).models and len(names) != 1:
        raise BadInput(f"{folder}: holds {len(names)} models in subfolders; expected one, phase {phase}'s")
    facts = {"gates": _gates_passed(folder)} if phase == 8 else {}
    models = {}
    for name in names:
        model = open_model(plain_file(folder, name))
        context = model.usual_context if tokens is None else model.sampled_context
        models[name] = _measured(model, text, context=context, tokens=tokens, progress=progress)
    return write_handoff(folder, phase, models, **facts)


def contract(phase: int, to: str | None = None) -> Contract:
    """What `phase` must leave.  Raises BadInput if there is no hand-off from there, or none to `to`."""
    found = CONTRACTS.get(phase)
    if found is None or to not in (None, str(found.to)):
        known = ", ".join(f"{one} to {other.to}" for one, other in CONTRACTS.items())
        raise BadInput(f"there is no hand-off from phase {phase}{f' to {to:.40}' if to else ''}; there are {known}")
    return found


def check_handoff(
    folder: str | Path, phase: int, text: str | Text | None = None, progress: bool = True, to: str | None = None
) -> list[str]:
    """Check what a phase left: files and hashes, tensors finite, tokenizer and special tokens, quality measured again, and
    what its contract asks for: from 4 to 5 that the dense model is what the packed one decodes to and that gradients reach
    all of it, from 8 on that every gate was passed.

    text: what the quality was measured on, if it is not one of agentforge's own; without it such a quality is not measured
    again.  to: the receiver, if that is to be checked, too.  Returns what was checked.  Raises BadInput with the reason
    if something is not as it should be.
    """
    folder = Path(folder).expanduser()
    if to is not None:
        contract(phase, to)

    def refuse(what: str) -> BadInput:
        return BadInput(f"{folder}/{HANDOFF}: {what}; run phase {phase} again")

    data: Any = read_json(folder / HANDOFF, LARGEST)
    if data.get("format") != FORMAT or data.get("phase") != phase or not isinstance(data.get("models"), dict):
        raise refuse(f"is not a hand-off of phase {phase} in format {FORMAT}")
    if not data["models"]:
        raise refuse("hands over no model")
    contract(phase)
    for name in data["models"]:
        plain_file(folder, name)
    try:
        if _finite(data) != data:
            raise refuse("holds numbers that are not finite")
    except RecursionError:
        raise refuse("is nested too deeply") from None
    if wrong := schemas.problem(f"handoff-{phase}-{contract(phase).to}", data):
        raise refuse(wrong)
    checks, models = [], {}
    for name, about in data["models"].items():
        where = plain_file(folder, name)
        if not where.is_dir() or where.resolve().parent != folder.resolve():
            raise refuse(f"model {name!r:.80} is not a subfolder")
        try:
            check_files(where, about["files"])
        except BadInput as error:
            raise refuse(str(error)) from None
        if odd := sorted({file.name for file in where.iterdir() if file.is_file()} - set(about["files"])):
            raise refuse(f"{name}/{odd[0]} was not handed over")
        model = models[name] = open_model(where)
        found = [f"{len(about['files'])} files, each as it was written"]
        for key, value in _about(model).items():
            if about[key] != value:
                raise refuse(f"{name}: {key} is {value!s:.200}, handed over was {about[key]!s:.80}")
        if _is_packed(model):
            found += Artifact(model.path).verify()
            if about["ratios"] not in (_ratios(model), _ratios(model, older=True)):
                raise refuse(f"{name}: the ratios are not those of the bytes on disk")
            text_of = "{what}: {bytes:,} bytes, {ratio:.3f}x against {denominator}"
            found += [text_of.format_map(ratio) for ratio in _ratios(model)]
        found += check_model(model)
        found.append(_quality(model, name, about["quality"], text, refuse, progress))
        checks += [f"{name}: {check}" for check in found]
    if phase == 4:
        checks += _check_two_forms(models["quantized"], models["dequantized"], refuse)
        checks += [
            f"gate {gate['name']}: {'passed' if gate['passed'] else 'FAILED'}" for gate in data["facts"].get("gates", [])
        ]
    if phase == 8:
        checks += _check_gates(Artifact(models["artifact"].path), data["facts"]["gates"], refuse)
    return checks


def check_model(model: LanguageModel) -> list[str]:
    """Check a model that comes without a hand-off: tensors present and finite, tokenizer and special tokens usable."""
    model.check()
    for name in model.entries:
        tensor = model.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise BadInput(f"{model.name}: tensor {name} holds values that are not finite; fix the model first")
    checks = [f"{len(model.entries)} tensors, all finite"]
    if not model.is_classifier:
        checks.append(f"{len(_special_tokens(model))} special tokens, each one token of the vocabulary")
    return checks


def _is_packed(model: LanguageModel) -> bool:
    return (model.path / MANIFEST).is_file()


def _about(model: LanguageModel) -> dict[str, Any]:
    """What a hand-off says of a model, beside its files and its quality."""
    return {
        "form": "packed" if _is_packed(model) else "dense",
        "dtypes": model.dtypes,
        "vocabulary": None if model.is_classifier else model.vocabulary,
        "special_tokens": None if model.is_classifier else _special_tokens(model),
    }


def _ratios(model: LanguageModel, older: bool = False) -> list[dict[str, Any]]:
    """Of a packed model.  older: as hand-offs of 0.1.0 have one from a GGUF file: against what that was converted to."""
    artifact = Artifact(model.path)
    ratios, made_from = artifact.ratios, artifact.manifest["original"]
    if older:
        conversion = f"weight files it was made from ({made_from['dtypes']})"
        ratios[2] = Ratio("whole model", artifact.weight_bytes, conversion, made_from["bytes"])
    return [ratio.to_json() for ratio in ratios]


def _finite(data: Any, instead: float | None = None) -> Any:
    """The same data with `instead` for every number that is not finite."""
    if isinstance(data, dict):
        return {key: _finite(value, instead) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value, instead) for value in data]
    return instead if isinstance(data, float) and not math.isfinite(data) else data


def _check_two_forms(packed: LanguageModel, dense: LanguageModel, refuse: Any) -> list[str]:
    """The dense model is tensor by tensor what the packed one decodes to, in the dense one's dtype, and can be trained."""
    from .training.gates import gradient_flow
    from .training.recover import windows

    if set(dense.entries) != set(packed.entries):
        raise refuse(f"dequantized: tensor {sorted(set(dense.entries) ^ set(packed.entries))[0]} is not in both models")
    for name in packed.entries:
        stored = dense.tensor(name)
        if not torch.equal(packed.tensor(name).to(stored.dtype), stored):
            raise refuse(f"dequantized: tensor {name} is not what the packed one decodes to")
    batch = windows(dense, "selftext", 1, min(dense.usual_context, GRADIENT_TOKENS))
    module = dense.model.requires_grad_(True)
    flow = gradient_flow(module, batch)
    module.requires_grad_(False)
    if not flow.passed:
        raise refuse(f"dequantized: {flow}")
    return [f"dequantized: {len(packed.entries)} tensors, each what the packed one decodes to", f"dequantized: {flow}"]


def _check_gates(artifact: Artifact, gates: list[Any], refuse: Any) -> list[str]:
    """Every gate is decided again by what was measured; those of the last step are this artifact's."""
    from .chain import Condition

    last = gates[-1]["step"]
    for gate in gates:
        try:
            condition = Condition.parse(gate["condition"])
        except ValueError as error:
            raise refuse(str(error)) from None
        measured = Measurement(**gate["measured"])
        if (decision := condition.decide(measured)) != "passed":
            raise refuse(f"{gate['step']}: gate {condition}: {decision} ({measured})")
        if gate["step"] != last:
            continue
        if measured.inputs.get("model") != artifact.sha256:
            raise refuse(f"{last}: gate {condition} was measured on another model")
        bits = measured.protocol.get("bits")
        found: float | None = artifact.weight_bytes if condition.quantity == "bytes" else None
        if condition.quantity == "ratio" and bits in (16, 32):
            found = artifact.ratio_to(int(bits))
        if found is not None and found != measured.value:
            raise refuse(f"{last}: gate {condition} says {measured.value}, on disk it is {found}")
    return [f"{len(gates)} gates, all passed by what was measured"]


def _gates_passed(folder: Path) -> list[dict[str, Any]]:
    """The gates of every accepted step of a chain, from its journal, in order."""
    from .chain import Condition

    journal: Any = read_json(folder / "journal.json")
    try:
        accepted = [row for row in journal.get("attempts", []) if row.get("decision") == "accepted"]
        gates = [
            {"step": row["name"], "condition": gate, "measured": row["measured"][Condition.parse(gate).quantity]}
            for row in accepted
            for gate in row["gates"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{folder / 'journal.json'}: is not the journal of a chain; run the chain again") from None
    if not accepted or accepted[-1].get("artifact") != Artifact(folder / "artifact").sha256:
        raise BadInput(f"{folder}: its journal is not that of the artifact beside it; run the chain again")
    if not gates:
        raise BadInput(f"{folder}: its chain has no gates, so that nothing was passed; give it some and run it again")
    return gates


def _special_tokens(model: LanguageModel) -> dict[str, int]:
    """Special tokens and their ids.  Raises BadInput if one is not a single token, or beyond the embedding."""
    tokenizer = model.tokenizer
    rows = model.vocabulary
    found = {}
    for token in tokenizer.all_special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise BadInput(f"{model.name}: special token {token!r} is cut into {len(ids)} tokens; fix the tokenizer")
        if rows is not None and ids[0] >= rows:
            raise BadInput(f"{model.name}: special token {token!r} has id {ids[0]}, the embedding has {rows} rows")
        found[token] = int(ids[0])
    return found


def _measured(model: LanguageModel, text: str | Text | None, **protocol: Any) -> Measurement:
    return evaluation.accuracy(model) if model.is_classifier else evaluation.perplexity(model, text, **protocol)


def _quality(model: LanguageModel, name: str, recorded: Any, text: str | Text | None, refuse: Any, progress: bool) -> str:
    """Measure what was handed over again, on the text given, or on one of agentforge's own if it was that."""
    measured = Measurement(**recorded)
    protocol, found, known = measured.protocol, None, {}
    if not model.is_classifier:
        if text is not None:
            found = evaluation.find_text(text)
        elif protocol.get("text") in evaluation.texts.SPLITS:  # a path from a file is not followed
            with contextlib.suppress(BadInput):
                found = evaluation.find_text(protocol["text"], protocol.get("split"))
        if found is None or found.sha256 != protocol.get("text_sha256"):
            return f"quality not measured again (its text is {protocol.get('text')!s:.80})"
        names = {"context": "context", "stride": "stride", "tokens": "scored_tokens", "bos": "bos"}
        if lacking := [key for key in names.values() if key not in protocol]:
            raise refuse(f"{name}: the protocol of its quality lacks {', '.join(lacking)}")
        known = {argument: protocol[key] for argument, key in names.items()} | {"progress": progress}
    again = _measured(model, found, **known)
    if again.unit != measured.unit or abs(again.value / measured.value - 1) > TOLERANCE:
        raise refuse(f"{name}: measured {again}, handed over was {measured.value:.4g} {measured.unit:.40}")
    return f"{again}, as handed over"
