"""Runs in Weights & Biases, offline unless WANDB_MODE says otherwise; every number is also written to a plain file.

METRICS are the 19 that the documentation of phase 4 lists and its code left at zero.  Of phase 8's lists (33, 35, 95 names,
none of them logged by its code), PHASE8_METRICS and PHASE8_STAGE_METRICS are those that a chain really measures.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput

if TYPE_CHECKING:
    from .artifact import Artifact
    from .models import LanguageModel

METRICS = tuple(
    f"compression/{name}"
    for name in (
        *("original_size_mb", "pre_perplexity", "pre_eval_loss"),  # before
        *("compressed_size_mb", "ratio", "layers_compressed", "sparsity_ratio", "quantized_params", "total_params"),
        *("layers_quantized", "post_perplexity", "perplexity_degradation", "accuracy_preserved"),
        *("dequantization_accuracy", "gradient_flow_test_passed"),
        *("post_finetune_perplexity", "perplexity_recovery", "fine_tune_epochs", "fine_tune_time_hours"),  # after training
    )
)


class Run:
    """A tracked run: use as a context manager.

    folder: gets metrics.jsonl, one line per call of `log`, and W&B's own offline files if the package wandb is installed.
    config: what the run depends on.
    """

    def __init__(self, folder: str | Path, name: str, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115  (closed with the run)
        try:
            import wandb
        except ImportError:
            self._wandb: Any = None
            return  # the plain file has everything
        self._wandb = wandb
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
        self._run = wandb.init(
            project="agentforge", name=name, dir=str(self.folder), mode=mode, config=dict(config or {}), settings=settings
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._wandb is not None:
            self._run.finish()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log numbers by name.  Raises BadInput for one that is not finite: a metric without a value is not logged."""
        for name, value in metrics.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise BadInput(f"metric {name}: {value!r}; expected a finite number, or leave the metric out")
        self._file.write(json.dumps(dict(metrics)) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._run.log(dict(metrics))

    def artifact(self, name: str, artifact: Artifact) -> None:
        """Log an artifact by the hashes that the registry knows it by.

        W&B gets its manifest, which holds the hashes of all files, and in the metadata the manifest's own; the weights stay
        where they are.
        """
        original = artifact.manifest["original"]
        about = {"manifest_sha256": artifact.sha256, "original_sha256": original.get("fingerprint")}
        if self._wandb is not None:
            logged = self._wandb.Artifact(name, type="model", metadata=about)
            logged.add_file(str(artifact.path / "agentforge.json"), policy="immutable")
            self._run.log_artifact(logged)


def read(folder: str | Path) -> dict[str, float]:
    """The last value of every metric of a run, from its metrics.jsonl."""
    found: dict[str, float] = {}
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found.update(json.loads(line))
    return found


# What the documentation of phase 8 names and a chain measures.  {} is a stage: seedlm, vptq, hypercompression, or the
# stage's own name.  Ratios are whole model, against the chain's `bits` a parameter; {}_ratio is of that step.
# Not here, because a chain measures nothing of the kind: seven benchmarks, edge of chaos, eudaimonia, Grokfast's scores,
# mean absolute errors, and speed of inference.
PHASE8_STAGE_METRICS = {  # and what `_of_attempt` calls it
    "{}/compression_ratio": "step_ratio",
    "{}/original_size_mb": "before",
    "{}/compressed_size_mb": "mb",
    "{}/overall_passed": "accepted",
    "{}/num_failed_benchmarks": "missed",  # gates that were not passed
    "validation/{}/avg_relative_error": "error",
    "compression/{}_ratio": "step_ratio",
}
PHASE8_METRICS = {  # and what a chain calls it
    "compression/original_size_mb": "original_mb",
    "compression/num_weight_tensors": "tensors",
    "size/original_mb": "original_mb",
    "phase/original_size_mb": "original_mb",
    "phase/stages_completed": "accepted",
    "phase/duration_seconds": "seconds",
    "phase/validation_passed": "finished",
    "phase/success": "finished",
    "compression/final_model_size_mb": "mb",
    "size/final_mb": "mb",
    "phase/compressed_size_mb": "mb",
    "compression/total_ratio": "ratio",
    "size/total_compression_ratio": "ratio",
    "phase/total_compression_ratio": "ratio",
    "performance/decompression_time_ms": "decode_ms",
    "quality/final_accuracy": "accuracy",
    "quality/final_perplexity": "perplexity",
    "quality/accuracy_vs_phase1": "total_retention",  # over that of the model that came in
}
# Ours, of every attempt: each quantity that was measured as {}/QUANTITY, with {}/QUANTITY_stderr, and these.
TIMES = ("encode_seconds", "decode_seconds", "seconds", "peak_memory_bytes")
_HYPER = ("trajectory", "curves")


def track_chain(
    folder: Path,
    model: LanguageModel,
    recipe: Mapping[str, Any],
    attempts: Sequence[Mapping[str, Any]],
    finished: bool,
    artifact: Artifact | None = None,
) -> None:
    """Log a chain's attempts, in their order, and what came out, as a run in `folder`.

    recipe, attempts: as in the chain's journal.  artifact: what is handed over.  A metric that was not measured
    is not logged: after a stage that failed to encode there is none of its sizes.
    """
    with Run(folder, f"chain-{recipe['chain']['name']}", recipe) as run:
        before, failures, passed = model.opened_bytes / 1e6, 0, None
        for row in attempts:
            stage, accepted = stage_label(row["setting"]["stage"]), row["decision"] == "accepted"
            failures += not accepted
            run.log(_of_attempt(stage, row, before) | {"phase/failures": failures})
            if accepted:
                before, passed = row["measured"]["bytes"]["value"] / 1e6, row
        run.log(_of_chain(model, attempts, passed, finished))
        if artifact is not None:
            run.artifact("artifact", artifact)


def stage_label(text: str) -> str:
    """What the documentation calls the stage of such a text; for the others their own name, or what a refinement refines."""
    match = re.search(r"[a-z0-9_]+", text)
    name = match[0] if match else text
    return "hypercompression" if name in _HYPER else name


def _of_attempt(stage: str, row: Mapping[str, Any], before: float) -> dict[str, float]:
    found = {f"{stage}/{name}": float(row[name]) for name in TIMES if name in row}
    values: dict[str, float] = {"accepted": int(row["decision"] == "accepted")}
    if "measured" in row:  # it could be encoded
        for name, m in row["measured"].items():
            values[name] = found[f"{stage}/{name}"] = m["value"]
            if m["stderr"] is not None:
                found[f"{stage}/{name}_stderr"] = m["stderr"]
        missed = sum(decision != "passed" for decision in row["gates"].values())
        values |= {"before": before, "mb": values["bytes"] / 1e6, "missed": missed}
    for name, key in PHASE8_STAGE_METRICS.items():
        short = "hyper" if stage == "hypercompression" and name.startswith("compression/") else stage
        found |= {name.format(short): values[key]} if key in values else {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _of_chain(
    model: LanguageModel, attempts: Sequence[Mapping[str, Any]], passed: Mapping[str, Any] | None, finished: bool
) -> dict[str, float]:
    found = {name: m["value"] for name, m in passed["measured"].items()} if passed else {}
    if passed:
        found |= {"mb": found["bytes"] / 1e6, "decode_ms": 1e3 * passed["decode_seconds"]}
    found |= {
        "original_mb": model.opened_bytes / 1e6,
        "tensors": len(list(model.weights())),
        "accepted": sum(row["decision"] == "accepted" for row in attempts),
        "seconds": sum(row["seconds"] for row in attempts),
        "finished": int(finished),
    }
    return {name: found[key] for name, key in PHASE8_METRICS.items() if math.isfinite(found.get(key, math.nan))}
