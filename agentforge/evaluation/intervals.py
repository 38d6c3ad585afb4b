"""95% intervals that hold: of values measured in clusters, of few values, of shares near 0 and 1.

Observations of one cluster (the tokens of a window, the two items of a twin) are not independent; the clusters' sums nearly
are.  A value is a ratio of two sums, its standard error that of the delta method over clusters (Cochran, Sampling
Techniques, 3rd edition, section 6.3), its interval Student's with one degree of freedom less than there are clusters.

Each function gives the fields of a Measurement that say so: value, stderr, n, interval and error.  A cluster is an element
of its arguments, float64[clusters] each; without `counts` every cluster is one observation.  error: what the clusters are,
such as "12 windows"; "unknown" is given for one cluster alone, and for sums that are not finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models import LanguageModel
from .measurement import Measurement

LARGEST = 690.0  # the exp of more is beyond what a float, or the schema of measurements, holds


def measured(
    found: dict[str, Any],
    unit: str,
    protocol: dict[str, Any],
    model: LanguageModel,
    original: LanguageModel | None = None,
    seed: int | None = None,
) -> Measurement:
    """The Measurement whose fields a function here has `found`, of a model, or of it beside its original."""
    inputs = {"model": model.fingerprint} | ({} if original is None else {"original": original.fingerprint})
    return Measurement(unit=unit, protocol=protocol, seed=seed, inputs=inputs, **found)


def student(freedom: int) -> float:
    """How many standard errors either way hold the true value 95 times in 100: 1.96 for many degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def binomial(hits: float, n: float) -> tuple[float, float]:
    """The exact interval of a share, `hits` of n independent trials (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.special import betaincinv

    low = float(betaincinv(hits, n - hits + 1, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 0.975)) if hits < n else 1.0
    return low, high


def ratio(top: torch.Tensor, bottom: torch.Tensor, n: int, error: str, log: bool = False) -> dict[str, Any]:
    """sum(top) / sum(bottom), of n observations in all; log: exp of it, and of its interval.  NaN if sum(bottom) is 0."""
    value, spread = _ratio(top, bottom)
    wide = student(len(top) - 1) * spread if len(top) > 1 else math.nan
    low, high = value - wide, value + wide
    if log:
        value, low, high = (math.exp(max(min(x, LARGEST), -LARGEST)) for x in (value, low, high))
        spread *= value
    if not math.isfinite(wide):
        return {"value": value, "stderr": None, "n": n, "error": "unknown"}
    return {"value": value, "stderr": spread, "n": n, "interval": (low, high), "error": error}


def mean(sums: torch.Tensor, counts: torch.Tensor | None = None, error: str = "", log: bool = False) -> dict[str, Any]:
    """The mean of all observations; log: exp of it, and of its interval."""
    counts = torch.ones_like(sums) if counts is None else counts
    return ratio(sums, counts, int(counts.sum()), error or f"{len(sums)} values", log)


def share(hits: torch.Tensor, counts: torch.Tensor | None = None, error: str = "") -> dict[str, Any]:
    """The share of hits among all observations.

    The interval is the exact binomial one of as many independent trials as would have the clusters' standard error (Korn and
    Graubard, Survey Methodology 24, 1998); of all n if each cluster is one trial, and if clusters do not differ, as
    they cannot at a share of 0 or 1.
    """
    counts = torch.ones_like(hits) if counts is None else counts
    n, clusters = int(counts.sum()), len(hits)
    value, spread = _ratio(hits, counts)
    if n > clusters and spread > 0:
        trials = min(n, value * (1 - value) / spread**2) * (student(n - 1) / student(clusters - 1)) ** 2
    else:
        spread, trials, error = math.sqrt(value * (1 - value) / n), n, "binomial"
    return {"value": value, "stderr": spread, "n": n, "interval": binomial(value * trials, trials), "error": error}


def pairs(
    top: torch.Tensor, bottom: torch.Tensor, counts: torch.Tensor | None = None, error: str = "pairs"
) -> dict[str, Any]:
    """sum(top) / sum(bottom), of hits and of hits before on the same questions, or of their differences and 1.

    If no cluster differs from this value, the interval is a bound on how many observations could: the exact binomial one
    of none out of n.  NaN if sum(bottom) is 0.
    """
    n = len(top) if counts is None else int(counts.sum())
    found = ratio(top, bottom, n, error)
    if found["stderr"] is None or found["stderr"] > 1e-12 * abs(found["value"]):  # beyond the rounding of the sums
        return found
    wide = binomial(0, n)[1] * n / float(bottom.sum())
    return {**found, "interval": (found["value"] - wide, found["value"] + wide), "error": "binomial"}


def median(values: Sequence[float]) -> dict[str, Any]:
    """The median of independent values, such as times, of any distribution.

    The interval goes from one order statistic to another (David and Nagaraja, Order Statistics, 3rd edition, section 7.1);
    there is one from six values on.  The standard error is the bootstrap's (Maritz and Jarrett, JASA 73, 1978).
    """
    from scipy.special import betainc

    n, ordered = len(values), sorted(values)
    found = {"value": statistics.median(ordered), "n": n}
    # So many values at either end may be left out: the median lies outside of the rest once in 20 times, at most.
    cut = sum(sum(math.comb(n, i) for i in range(k + 1)) <= 0.025 * 2**n for k in range(n // 2))
    if not cut:
        return {**found, "stderr": None, "error": "unknown"}
    weights = np.diff(betainc((n + 1) / 2, (n + 1) / 2, np.arange(n + 1) / n))
    spread = math.sqrt(float(weights @ np.square(ordered - weights @ ordered)))
    interval = ordered[cut - 1], ordered[n - cut]
    return {**found, "stderr": spread, "interval": interval, "error": f"median of {n} runs, order statistics"}


def _ratio(top: torch.Tensor, bottom: torch.Tensor) -> tuple[float, float]:
    """The ratio of the sums, and its standard error, NaN if that is not known."""
    clusters, total = len(top), float(bottom.sum())
    if total == 0:
        return math.nan, math.nan
    value = float(top.sum()) / total
    left = float((top - value * bottom).square().sum())
    return value, math.sqrt(clusters / (clusters - 1) * left) / total if clusters > 1 else math.nan
