"""Which kernels search for codes on which device."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import BadInput


def kernels_for(device: torch.device) -> Any:
    """The module of Triton kernels for a CUDA device, None for the CPU.  Raises BadInput if Triton is missing."""
    if device.type != "cuda":
        return None
    try:
        from . import triton_kernels
    except ImportError:
        raise BadInput(f"device {device}: Triton is not installed; install it, or encode on the CPU") from None
    return triton_kernels
