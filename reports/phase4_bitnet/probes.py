"""The probes that the claims of this report name, and what its pictures are drawn from."""

from __future__ import annotations

from typing import Any

from agentforge import stages
from agentforge.audit.workshop import Workshop
from agentforge.stages.ternary import zero_fraction

from ..phase8_compression import dashboard
from . import project, ternary, training

__all__ = ["FIGURES", "dashboard", "project", "ternary", "training"]

TAUS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def zeros_by_threshold(workshop: Workshop) -> dict[str, Any]:
    """Share of weights set to zero by the documented rule, at several thresholds, on every 15th matrix."""
    weights = workshop.model.weights()
    sample = [weight.load() for weight in weights[::15]]
    total = sum(w.numel() for w in sample)
    shares = []
    for tau in TAUS:
        stage = stages.get("ternary", rule="threshold", tau=tau)
        shares.append(sum(zero_fraction(stage.encode(w)) * w.numel() for w in sample) / total)
    return {"taus": list(TAUS), "shares": shares, "matrices": len(sample), "of": len(weights)}


def bytes_by_part(workshop: Workshop) -> dict[str, Any]:
    """How the bytes of the ternary model are spent."""
    parts = {"ternary codes and scales": 0, "embedding (16 bits)": 0, "norms": 0}
    for row in workshop.artifact("ternary:rule=threshold,tau=0.1").rows:
        part = "ternary codes and scales" if row["stage"] else "embedding (16 bits)" if len(row["shape"]) > 1 else "norms"
        parts[part] += row["bytes"]
    encoded = sum(w.shape[0] * w.shape[1] for w in workshop.model.weights())
    return {"parts": parts, "encoded_weights": encoded}


FIGURES = (zeros_by_threshold, bytes_by_part)
