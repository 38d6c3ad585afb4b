"""Measurement: a number with all that is needed to trust it and to measure it again."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..errors import Incomparable

Within = Literal["inside", "outside", "undecided"]
PACKAGES = (
    *("agentforge", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "gguf"),
    *("scipy", "lm_eval", "datasets"),
)


@dataclass(frozen=True)
class Measurement:
    """value in `unit`, with its standard error over n observations.

    stderr: None if the value is a count or another exact quantity, or if its error is unknown.  protocol: how it was taken;
    two measurements compare only when their protocols are equal.  inputs: hashes of what was measured.  environment:
    packages, CPU, threads.  interval: that holds the true value 95 times in 100 (default: two standard errors either way).
    error: what the error rests on, such as "12 windows" or "binomial"; "exact" for a count, "unknown" if nobody knows.
    """

    value: float
    unit: str
    stderr: float | None
    n: int
    protocol: dict[str, Any]
    seed: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    interval: tuple[float, float] | None = None
    error: str = ""

    def __post_init__(self) -> None:
        if not self.error:
            object.__setattr__(self, "error", "exact" if self.stderr is None else "standard error")
        if self.interval is not None:  # JSON gives a list
            object.__setattr__(self, "interval", (self.interval[0], self.interval[1]))

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95% interval; the value twice if it is exact, or if its error is unknown."""
        if self.interval is not None:
            return self.interval
        spread = 2 * (self.stderr or 0.0)
        return self.value - spread, self.value + spread

    def within(self, low: float, high: float) -> Within:
        """Whether the whole 95% interval lies inside [low, high], outside of it, or neither; NaN, of the value or its
        error, lies outside, and so does a value that its own interval does not hold.

        The one rule by which gates and verdicts hold a measurement against a threshold.
        """
        least, most = self.bounds
        known = math.isfinite(self.value) and not any(map(math.isnan, (self.stderr or 0.0, least, most)))
        slack = 1e-9 * abs(self.value)  # an interval may have gone through a logarithm
        if not known or not least - slack <= self.value <= most + slack or most < low or least > high:
            return "outside"
        return "inside" if low <= least and most <= high else "undecided"

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{self.value:.4g}{error} {self.unit} (n = {self.n:,})"

    def through(self, function: Callable[[float], float], unit: str, **protocol: Any) -> Measurement:
        """`function` of the value, of its interval and, to first order, of its standard error; the function is monotonic.

        protocol: what is said differently, such as metric.
        """
        value, step = function(self.value), 1e-4 * (self.stderr or 0.0)
        spread = step and abs(function(self.value + step) - function(self.value - step)) / 2e-4
        low, high = sorted(function(end) for end in self.bounds)
        return dataclasses.replace(
            self,
            value=value,
            unit=unit,
            stderr=None if self.stderr is None else spread,
            interval=None if self.stderr is None else (low, high),
            protocol={**self.protocol, **protocol},
        )

    def minus(self, other: Measurement) -> float:
        """This value less the other.  Raises Incomparable, naming what differs, if the protocols do."""
        differing = sorted(
            key for key in {*self.protocol, *other.protocol} if self.protocol.get(key) != other.protocol.get(key)
        )
        if self.unit != other.unit:
            differing.append("unit")
        if differing:
            raise Incomparable(f"two measurements differ in {', '.join(differing)}; measure both in the same way")
        return self.value - other.value

    def to_json(self) -> dict[str, Any]:
        """All fields, as json.load gives them back."""
        return {**dataclasses.asdict(self), "interval": self.interval and list(self.interval)}


@functools.cache
def _static_environment() -> dict[str, Any]:
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "packages": packages,
    }


def environment() -> dict[str, Any]:
    """Python, platform, CPU, threads and package versions of this process."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    known = _static_environment()
    packages = known["packages"] | {"torch": torch.__version__}  # which build it is, too: +cpu or a CUDA one
    return {**known, "packages": packages, "threads": torch.get_num_threads(), "gpu": gpu}


def peak_memory() -> int:
    """The peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
