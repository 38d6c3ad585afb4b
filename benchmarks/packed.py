"""Every stage's packed layers beside dense ones: memory, and tokens per second.

    python benchmarks/packed.py [ARTIFACT ...] [--stages STAGE ...] [--model smollm2-135m] [--threads 2] [--device cpu]
                                [--tokens 32] [--prompt 512] [--rounds 5] [--scratch DIR] [--out DIR]

Compresses the model with each stage (kept in --scratch), and takes finished ARTIFACTs, too.  Each is loaded packed and
measured in turn with two dense models of the original: float32 and bfloat16.  A round is one run of each, one after another,
so that other work on the machine meets all three alike; ratios are formed within a round.  Means, with standard errors.

generation: greedy, batch 1, --tokens new tokens after a short prompt; its processing is in the time.  prompt: --prompt
tokens at once.  held: parameters, buffers, and what packed layers keep beside them, between two calls.  peak: the most
memory that a fresh process took which loaded the model and generated four tokens; Python and its libraries are in it.
load: seconds of that process from the folder to the model.  limit: the bytes that a token reads, at the speed at which torch
copies 256 MB with as many threads (bytes read and written).

With --out (reports/packed) it writes DIR/packed.json and .md after each stage, and does not measure again what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
from torch import nn

import agentforge
from agentforge import open_model, stages
from agentforge.artifact import Artifact
from agentforge.evaluation.measurement import environment
from agentforge.opening import load
from agentforge.pipeline import compress
from agentforge.runtime import PackedWeight, resident_bytes

# SeedLM with seeds of 8 bits, which are found in seconds: regenerating a block takes as long for any seed.
STAGES = [
    "rounding:bits=4,group=64",
    "rounding:bits=4,group=64 | entropy",
    "ternary:rule=absmean",
    "vptq:bits=3,shared=true",
    "seedlm:K=8,C=8,P=3",
    "trajectory",
    "curves",
]
COPIED = 64 << 20  # float32 values
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bandwidth(device: str) -> float:
    """Bytes per second that torch reads and writes as it copies, best of seven."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(bench.once(lambda: target.copy_(source), device) for _ in range(7))


def read_bytes(model: nn.Module) -> int:
    """What a token reads: all in memory but planes that were replaced by plain ones."""
    total = resident_bytes(model)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            kept = {held.stored.data_ptr() for held in module.ready.planes.values()}
            total -= sum(buffer.nbytes for buffer in module.buffers() if buffer.data_ptr() not in kept)
    return total


def rounds(models: dict[str, Any], ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all models, in turn, for generation and for a prompt."""
    long = torch.arange(args.prompt, device=args.device)[None] % 1000 + 100
    kinds: dict[str, tuple[int, Callable[[Any], object]]] = {
        "generation": (args.tokens, lambda m: m.generate(ids, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)),
        "prompt": (args.prompt, lambda m: m(long, logits_to_keep=1)),
    }
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for kind, (count, run) in kinds.items():
            for model in models.values():
                run(model)
            speeds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(args.rounds):
                for name, model in models.items():
                    speeds[name].append(count / bench.once(lambda m=model, run=run: run(m), args.device))  # type: ignore[misc]
            found[kind] = {name: bench.mean(values) for name, values in speeds.items()}
            for name in DENSE:
                ratios = [ours / theirs for ours, theirs in zip(speeds["packed"], speeds[name], strict=True)]
                found[kind][f"packed / {name}"] = bench.mean(ratios)
    return found


def alone(path: str, kind: str) -> dict[str, Any]:
    """Peak memory and loading time of one model, in a process of its own."""
    command = [sys.executable, __file__, "--alone", path, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_alone(path: str, kind: str) -> dict[str, Any]:
    """What `alone` asks for, of this process."""
    import transformers  # noqa: F401  (not part of loading)

    start = time.perf_counter()
    model: Any = load(path, runtime="packed").model if kind == "packed" else open_model(path).model.to(DENSE[kind])
    loaded = time.perf_counter() - start
    with torch.inference_mode():
        model.generate(torch.tensor([[100, 200]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory, too
    return {"load_s": loaded, "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0])}


def measured(path: Path, dense: dict[str, Any], ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The row of an artifact."""
    before = os.getloadavg()[0]
    artifact = Artifact(path)
    packed = load(path, runtime="packed").model.to(args.device)
    packed.generation_config.eos_token_id = None  # all go on to the last token
    models = {"packed": packed, **dense}
    speeds = rounds(models, ids, args)
    rows = [row for row in artifact.rows if row["stage"]]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "bits": sum(row["bits"] for row in rows) / weights,
        "held_bytes": {name: resident_bytes(model) for name, model in models.items()},
        "read_bytes": {name: read_bytes(model) for name, model in models.items()},
        "copy_bytes_per_s": bandwidth(args.device),
        "alone": alone(str(path), "packed") if args.device == "cpu" else None,
        "load_average": [before, os.getloadavg()[0]],
        "threads": torch.get_num_threads(),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        **speeds,
    }


def table(record: dict[str, Any]) -> str:
    """The report in Markdown."""

    def shown(found: dict[str, Any], digits: int = 1) -> str:
        error = "" if found["stderr"] is None else f" ± {found['stderr']:.{digits}f}"
        return f"{found['value']:.{digits}f}{error}"

    head = (
        "stage | bits per weight | held (MB) | peak (MB) | load (s) | generation (tokens/s) | of float32's | of bfloat16's "
        f"| limit (tokens/s) | prompt of {record['prompt']} (tokens/s) | of float32's | of bfloat16's"
    )
    lines: list[list[str]] = []

    def line(name: str, bits: str, kind: str, row: dict[str, Any], alone: dict[str, Any] | None) -> None:
        limit = row["copy_bytes_per_s"] / row["read_bytes"][kind]
        cells = [name, bits, f"{row['held_bytes'][kind] / 1e6:.1f}"]
        cells += ["-", "-"] if alone is None else [f"{alone['peak_bytes'] / 1e6:.0f}", f"{alone['load_s']:.1f}"]
        for what in ("generation", "prompt"):
            cells.append(shown(row[what][kind]))
            cells += [shown(row[what][f"packed / {other}"], 2) if kind == "packed" else "-" for other in DENSE]
            cells += [f"{limit:.0f}"] if what == "generation" else []
        lines.append(cells)

    rows = list(record["rows"].items())
    for name, row in rows:
        escaped = name.replace("|", "\\|")  # it would end the cell
        line(f"`{escaped}`", f"{row['bits']:.2f}", "packed", row, row["alone"])
    for kind in DENSE:  # as they ran beside the first row
        bits = "32" if kind == "float32" else "16"
        line(f"dense {kind}, beside the first row", bits, kind, rows[0][1], record["dense"][kind])
    about = record["environment"]
    loads = ", ".join(f"{row['load_average'][0]:.1f} to {row['load_average'][1]:.1f}" for _, row in rows)
    return "\n".join(
        [
            "# Packed layers of every stage: memory and speed",
            "",
            (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2],
            *bench.table(head, lines, "l" + "r" * 11),
            "",
            f"{record['model']}; {about['cpu']}, {about['cores']} cores, torch {about['packages']['torch']}, "
            f"{rows[0][1]['threads']} threads, device {rows[0][1]['device']}; "
            f"{rows[0][1]['generation']['packed']['n']} rounds, "
            f"{record['tokens']} new tokens.  Load averages before and after each row (this benchmark's own threads "
            f"included): {loads}.",
            "",
            *([] if "decoder" in record else [bench.FUSED.format("`ternary`"), ""]),
        ]
    )


def keep(record: dict[str, Any], out: Path | None) -> None:
    """Write what is measured so far, if a folder was asked for."""
    if out:
        bench.save(out, {"packed.json": record, "packed.md": table(record)})


def main() -> None:
    parser = bench.parser(__doc__ or "", None)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--stages", nargs="*", default=STAGES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a generation")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("packed-artifacts"), help="where compressed models are kept")
    parser.add_argument("--alone", nargs=2, metavar=("PATH", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run_alone(*args.alone)))
        return
    torch.set_num_threads(args.threads)
    original = open_model(args.model)
    record: dict[str, Any] = {"rows": {}, **dict(bench.read(args.out / "packed.json") if args.out else {})}
    record |= {"model": original.name, "tokens": args.tokens, "prompt": args.prompt, "environment": environment()}
    record["decoder"] = "transformers"
    record["version"] = agentforge.__version__
    dense: dict[str, Any] = {kind: open_model(args.model).model.to(args.device, dtype) for kind, dtype in DENSE.items()}
    for model in dense.values():
        model.generation_config.eos_token_id = None
    if "dense" not in record:
        record["dense"] = {kind: alone(args.model, kind) if args.device == "cpu" else None for kind in DENSE}
    ids = original.tokenizer(bench.PROMPT, return_tensors="pt").input_ids.to(args.device)
    for text in [*args.stages, *args.artifacts]:
        if isinstance(text, Path):
            path, name = text, f"artifact {text.name}"
        else:
            name = stages.parse(text).brief()
            path = args.scratch / "".join(c if c.isalnum() else "-" for c in name)
        if name in record["rows"]:
            continue
        if isinstance(text, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            compress(original, text, path)
        row = record["rows"][name] = measured(path, dense, ids, args)
        print(f"{name}: {row['generation']['packed']['value']:.1f} tokens/s generated", flush=True)
        keep(record, args.out)
    keep(record, args.out)
    print(table(record).partition("\n| stage")[2])


if __name__ == "__main__":
    main()
