"""Measurement: a number with all that is needed to believe it and to take it again."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import Incomparable

PACKAGES = ("agentforge", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "gguf")


@dataclass(frozen=True)
class Measurement:
    """value in `unit`, with its standard error over n observations.

    stderr: None where the value is a count or another exact quantity.  protocol: how it was taken; two measurements
    compare only when their protocols are equal.  inputs: hashes of what was measured.  environment: packages, CPU,
    threads.
    """

    value: float
    unit: str
    stderr: float | None
    n: int
    protocol: dict[str, Any]
    seed: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{self.value:.4g}{error} {self.unit} (n = {self.n:,})"

    def minus(self, other: Measurement) -> float:
        """This value less the other.  Raises Incomparable, naming what differs, where the protocols do."""
        differing = sorted(
            key for key in {*self.protocol, *other.protocol} if self.protocol.get(key) != other.protocol.get(key)
        )
        if self.unit != other.unit:
            differing.append("unit")
        if differing:
            raise Incomparable(f"two measurements differ in {', '.join(differing)}; measure both in the same way")
        return self.value - other.value

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for json.dump."""
        return dataclasses.asdict(self)


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
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
