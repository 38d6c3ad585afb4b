"""Phase 4 whole: a model comes in, is made ternary, recovers if it has to, and goes out in two forms, with evidence.

    check the model -> measure -> convert -> measure -> gradient flow -> train if quality fell -> measure
    -> quantized/ (packed planes) and dequantized/ (float16) -> gates -> hand-off

Everything that is reported is measured here, on what was loaded back from disk.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import evaluation, tracking
from ..artifact import Artifact, dequantize
from ..errors import BadInput
from ..evaluation import Measurement, Text, intervals
from ..folders import check_out, remove
from ..handoff import check_model, write_handoff
from ..models import SAMPLED_TOKENS, LanguageModel, device_named, fastest_device
from ..opening import load, open_model
from ..pipeline import compress
from ..planes import Packed
from ..stages import parse
from ..stages.ternary import Ternary, zero_fraction
from ..tensorfiles import write_json
from . import gates
from .bitlinear import convert
from .gates import Gate
from .recover import Settings, block_of, check_trainable, recover, windows


class Size(NamedTuple):
    """A row of the documentation's size-adaptive table: threshold and target ratio (against 32 bits per parameter)."""

    name: str
    below: float
    tau: float
    ratio: float


SIZES = (
    Size("tiny", 50e6, 0.05, 6.0),
    Size("small", 500e6, 0.10, 8.0),
    Size("medium", 2e9, 0.15, 10.0),
    Size("large", math.inf, 0.20, 12.0),
)


def size_of(parameters: int) -> Size:
    """The row of the size-adaptive table for a model with so many parameters."""
    return next(size for size in SIZES if parameters < size.below)


def adaptive(model: LanguageModel) -> Ternary:
    """The stage that the size-adaptive table asks for: the documentation's rule with the threshold for this size."""
    return Ternary(rule="threshold", tau=size_of(model.parameters).tau)


@dataclass(frozen=True)
class Phase:
    """What a run of the phase gave.  path: the folder.  metrics: the 19 of the documentation, by name.  gates: what was
    checked against limits.  trained: whether training was triggered."""

    path: Path
    metrics: dict[str, float]
    gates: list[Gate]
    trained: bool

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(gate.passed for gate in self.gates)


def phase(
    model: LanguageModel | str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    stage: Ternary | str = "ternary",
    text: str | Text | None = None,
    training_text: str | Text = "selftext",
    tokens: int = SAMPLED_TOKENS,
    always_train: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Phase:
    """Run phase 4 on `model` and write the folder `out`.

    settings: of training, which runs if perplexity (for a classifier, one less accuracy) rose by more than 5%, or
    `always_train`.  text, tokens: what quality is measured on.  training_text: what is trained on.
    device: for training and measuring (default: cuda if available).

    out holds quantized/, dequantized/, handoff.json, phase.json and tracking/.  Run again after a kill, the parts that
    are finished are not made again.  Raises BadInput if the model or the settings cannot be used, and never because a
    gate failed: that is in the result.
    """
    device = device or fastest_device()
    device_named(device)
    model = open_model(model) if isinstance(model, str | Path) else model
    parsed = parse(stage) if isinstance(stage, str) else stage
    if not isinstance(parsed, Ternary):
        raise BadInput(f"phase 4 makes weights ternary; expected the stage ternary, found {parsed}")
    stage = parsed
    settings = settings or Settings()
    settings.check()
    model.check_context(settings.context)
    check_trainable(model)
    out = check_out(out, model.path)
    for name in ("untrained", "quantized", "dequantized"):
        check_out(out / name, replace=True)
    check_model(model)
    found = None if model.is_classifier else evaluation.find_text(text)
    out.mkdir(parents=True, exist_ok=True)
    plain = compress(model, stage, out / "untrained", device=device, overwrite=overwrite, progress=progress)
    protocol: dict[str, Any] = {"tokens": tokens, "context": model.sampled_context, "progress": progress}
    before, converted, accuracy, factor = _quality(model.on(device), load(plain.path).on(device), found, protocol)
    flow = _gradient_flow(model, stage, settings)
    rise = converted.value / before.value - 1
    trained = always_train or not rise <= gates.TRIGGER
    after, history = converted, []  # type: Measurement, list[dict[str, Any]]
    if trained:
        done = recover(
            model,
            out / "quantized",
            Ternary(packing=stage.packing),  # the paper's rule, whichever the conversion was asked for
            settings,
            text=training_text,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
        artifact, history = done.artifact, done.history
        _, after, accuracy, factor = _quality(model, load(artifact.path).on(device), found, protocol)
    else:
        artifact = compress(model, stage, out / "quantized", device=device, overwrite=overwrite, progress=progress)
    remove(out / "dequantized")
    dense = open_model(dequantize(artifact, out / "dequantized")).on(device)
    agreement = _agreement(dense, load(artifact.path).on(device), found, protocol)
    worse = "rise of " + ("perplexity" if found else "1 / accuracy")
    target = size_of(model.parameters)
    ratio = artifact.ratio_to(32)
    checks = [
        Gate("tensors without a gradient", _exact(len(flow.missing + flow.zero + flow.infinite), "tensors"), "<=", 0.0),
        Gate(worse, factor.through(lambda x: x - 1, "share"), "<=", gates.MAX_PERPLEXITY_RISE),
        Gate("drop of accuracy", accuracy.through(lambda x: 1 - x, "share"), "<=", gates.MAX_ACCURACY_DROP),
        Gate("agreement of the two outputs", agreement, ">=", gates.MIN_AGREEMENT),
        Gate(f"ratio to 32 bits ({target.name} model)", _exact(ratio, "x"), ">=", target.ratio),
    ]
    metrics = {
        **_size_metrics(model, artifact, ratio),
        "compression/pre_perplexity": before.value,
        "compression/pre_eval_loss": math.log(before.value),
        "compression/post_perplexity": converted.value,
        "compression/perplexity_degradation": converted.value / before.value - 1,
        "compression/accuracy_preserved": accuracy.value,
        "compression/dequantization_accuracy": agreement.value,
        "compression/gradient_flow_test_passed": float(flow.passed),
        "compression/post_finetune_perplexity": after.value,
        "compression/perplexity_recovery": _recovered(before.value, converted.value, after.value),
        "compression/fine_tune_epochs": history[-1]["epochs"] if history else 0.0,
        "compression/fine_tune_time_hours": history[-1]["seconds"] / 3600 if history else 0.0,
    }
    config = {"model": model.name, "fingerprint": model.fingerprint, "stage": stage.to_json(), "trained": trained}
    with tracking.Run(out / "tracking", f"phase4-{Path(model.name).name}", config) as run:
        run.log({name: metrics[name] for name in tracking.METRICS})
        run.artifact("quantized", artifact)
    facts = {"gates": [gate.to_json() for gate in checks], "ratio_to_32_bits": ratio, "gradient_flow": str(flow)}
    again = evaluation.perplexity(dense, found, **protocol) if found else evaluation.accuracy(dense)
    packed = after if found else evaluation.accuracy(load(artifact.path))
    write_handoff(out, 4, {"quantized": packed, "dequantized": again}, **facts)
    write_json(out / "phase.json", {"metrics": metrics, **facts, "trained": trained, "history": history})
    remove(out / "untrained")
    return Phase(out, metrics, checks, trained)


def _quality(
    model: LanguageModel, compressed: LanguageModel, text: Text | None, protocol: dict[str, Any]
) -> tuple[Measurement, Measurement, Measurement, Measurement]:
    """Perplexity before and after (for a classifier the inverse accuracies), accuracy after over accuracy before, and how
    many times the perplexity it is; the last two have the error of pairs."""
    if text is None:
        before, after = (evaluation.accuracy(one).through(_inverse, "1 / accuracy") for one in (model, compressed))
        kept = evaluation.accuracy_retention(compressed, model)
        return before, after, kept, kept.through(_inverse, "x")
    found = evaluation.divergence(compressed, model, text, **protocol)
    kept = found.retention
    if math.isnan(kept.value):  # never right before: nothing to lose
        kept = _exact(1.0, "share")
    return found.original_perplexity, found.perplexity, kept, found.perplexity_retention.through(_inverse, "x")


def _inverse(x: float) -> float:
    return 1 / max(x, 1e-9)


def _exact(value: float, unit: str) -> Measurement:
    return Measurement(float(value), unit, None, 1, {"metric": "counted"})


def _agreement(a: LanguageModel, b: LanguageModel, text: Text | None, protocol: dict[str, Any]) -> Measurement:
    """Share of tokens (of all pictures, which takes no labels) at which the two outputs say the same."""
    if text is not None:
        return evaluation.divergence(a, b, text, **protocol).top1
    from .. import digits

    train, _, test, _ = digits.data()
    pictures = torch.cat([train, test]).to(next(a.model.parameters()).device)
    same = (a.model(pictures).argmax(-1) == b.model(pictures).argmax(-1)).double().cpu()
    return Measurement(unit="share of pictures", protocol={"metric": "agreement of two outputs"}, **intervals.share(same))


def _gradient_flow(model: LanguageModel, stage: Ternary, settings: Settings) -> gates.GradientFlow:
    """Gradients of a fresh student on one real batch."""
    student = copy.deepcopy(model.model).cpu().requires_grad_(False)
    names = convert(student, [weight.name for weight in model.weights()], settings.activations)
    owners = dict(student.named_modules())
    for name in names:
        owners[name].requires_grad_(True)
    return gates.gradient_flow(student, windows(model, "selftext", 1, min(settings.context, 128)))


def _size_metrics(model: LanguageModel, artifact: Artifact, ratio: float) -> dict[str, float]:
    rows = [row for row in artifact.rows if row["stage"]]
    zeros = counted = 0.0
    for row in rows:
        packed = artifact.read(row)
        assert isinstance(packed, Packed)
        count = math.prod(packed.shape)
        zeros, counted = zeros + zero_fraction(packed) * count, counted + count
    blocks = {block_of(row["name"]) for row in rows}
    return {
        "compression/original_size_mb": model.opened_bytes / 1e6,
        "compression/compressed_size_mb": artifact.weight_bytes / 1e6,
        "compression/ratio": ratio,
        "compression/layers_compressed": float(len(blocks)),
        "compression/layers_quantized": float(len(rows)),
        "compression/sparsity_ratio": zeros / counted,
        "compression/quantized_params": counted,
        "compression/total_params": float(model.parameters),
    }


def _recovered(before: float, converted: float, after: float) -> float:
    """How much of the loss, in nats, training won back: 1 is all of it."""
    lost = math.log(converted) - math.log(before)
    return (math.log(converted) - math.log(after)) / lost if lost > 0 else 0.0
