"""Runs in Weights & Biases, offline unless WANDB_MODE says otherwise; every number also goes to a plain file.

The 19 metrics are those that the documentation of phase 4 lists and its code left at zero.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BadInput

METRICS = (
    # before
    "compression/original_size_mb",
    "compression/pre_perplexity",
    "compression/pre_eval_loss",
    # the compression
    "compression/compressed_size_mb",
    "compression/ratio",
    "compression/layers_compressed",
    "compression/sparsity_ratio",
    "compression/quantized_params",
    "compression/total_params",
    "compression/layers_quantized",
    # after
    "compression/post_perplexity",
    "compression/perplexity_degradation",
    "compression/accuracy_preserved",
    "compression/dequantization_accuracy",
    "compression/gradient_flow_test_passed",
    # after training
    "compression/post_finetune_perplexity",
    "compression/perplexity_recovery",
    "compression/fine_tune_epochs",
    "compression/fine_tune_time_hours",
)


class Run:
    """A tracked run: use as a context manager.

    folder: gets metrics.jsonl, a line a call of `log`, and W&B's own offline files where the package wandb is installed.
    config: what the run depends on.
    """

    def __init__(self, folder: str | Path, name: str, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115  (closed with the run)
        self._run: Any = None
        try:
            import wandb
        except ImportError:
            return  # the plain file has everything
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
        self._run = wandb.init(
            project="agentforge", name=name, dir=str(self.folder), mode=mode, config=dict(config or {}), settings=settings
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._run is not None:
            self._run.finish()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log numbers by name.  Raises BadInput for one that is no finite number: a metric without a value is not logged."""
        for name, value in metrics.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise BadInput(f"metric {name}: {value!r}; expected a finite number, or leave the metric out")
        self._file.write(json.dumps(dict(metrics)) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(dict(metrics))


def read(folder: str | Path) -> dict[str, float]:
    """The last value of every metric of a run, from its metrics.jsonl."""
    found: dict[str, float] = {}
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found.update(json.loads(line))
    return found
