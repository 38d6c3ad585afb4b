"""How fast weights are encoded and decoded, beside a named peer and beside what the memory allows.

    python benchmarks/encode.py [million weights]

The peer for 4-bit rounding is gguf's own quantiser (Q4_1: groups of 32, numpy); for ternary weights it is the plain
torch formula without packing.  The limit is one read of the float32 weights and one write of the planes, at the speed
at which this machine copies memory.  Everything runs in this process, one after the other, best of three.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType, quantize
from rich.console import Console
from rich.table import Table

from agentforge import stages
from agentforge.planes import Packed, Plane


def best(work: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest of `runs` runs, after one to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _decode(stage: stages.Stage, packed: Packed, stored: list[tuple[Plane, torch.Tensor]]) -> torch.Tensor:
    planes = [Plane.from_stored(p.name, p.coding, tuple(p.values.shape), s) for p, s in stored]
    return stage.decode(Packed(packed.shape, tuple(planes)))


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 32.0
    weight = torch.randn(int(millions * 1e6) // 1536, 1536, generator=torch.Generator().manual_seed(0)) * 0.05
    target = torch.empty_like(weight)
    bandwidth = 2 * weight.nbytes / best(lambda: target.copy_(weight))

    def torch_ternary() -> torch.Tensor:
        scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
        return (weight * scale).round().clamp(-1, 1).to(torch.int8)

    peers = {
        "rounding": ("gguf Q4_1", best(lambda: quantize(weight.numpy(), GGMLQuantizationType.Q4_1))),
        "ternary": ("torch, unpacked", best(torch_ternary)),
    }
    table = Table(
        title=f"{weight.numel() / 1e6:.1f} M weights, {torch.get_num_threads()} threads, copy {bandwidth / 1e9:.1f} GB/s"
    )
    for column in (
        "stage",
        "encode + pack (s)",
        "M weights/s",
        "peer",
        "peer / ours",
        "of the limit",
        "unpack + decode (s)",
    ):
        table.add_column(column, justify="left" if column in ("stage", "peer") else "right")
    for spec in (
        "rounding:bits=4,group=64",
        "rounding:bits=4,group=64,clip=mse",
        "rounding:bits=3,group=64",
        "ternary:rule=absmean",
        "ternary:rule=threshold,packing=2bit",
    ):
        stage = stages.parse(spec)
        packed = stage.encode(weight)
        stored = [(plane, plane.stored()) for plane in packed]
        encode = best(lambda stage=stage: [plane.stored() for plane in stage.encode(weight)])  # type: ignore[misc]

        decode = best(lambda stage=stage, packed=packed, stored=stored: _decode(stage, packed, stored))  # type: ignore[misc]
        peer, peer_seconds = peers[stage.name]
        limit = (weight.nbytes + packed.bits / 8) / bandwidth
        table.add_row(
            spec,
            f"{encode:.3f}",
            f"{weight.numel() / encode / 1e6:.0f}",
            peer,
            f"{peer_seconds / encode:.2f}",
            f"{limit / encode:.1%}",
            f"{decode:.3f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
