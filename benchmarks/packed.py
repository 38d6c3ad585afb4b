"""Every stage's packed layers beside dense ones: memory, and tokens per second.

    python benchmarks/packed.py [--stages STAGE_OR_ARTIFACT ...] [--model smollm2-135m] [--threads 2] [--device cpu]
                                [--tokens 32] [--prompt 512] [--rounds 5] [--scratch DIR] [--out reports/packed]

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
import os
import time
from pathlib import Path
from typing import Any

import bench
import torch
from torch import nn

from agentforge import __version__, compress, load, open_model, stages
from agentforge.artifact import Artifact
from agentforge.evaluation.measurement import environment
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
Row = bench.Row
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
            kept = {tensor.data_ptr() for tensor in module.ready.tensors}
            total -= sum(buffer.nbytes for buffer in module.buffers() if buffer.data_ptr() not in kept)
    return total


def rounds(models: dict[str, Any], ids: torch.Tensor, args: argparse.Namespace) -> Row:
    """Tokens per second of all models, in turn, for generation and for a prompt."""
    long = torch.arange(args.prompt, device=args.device)[None] % 1000 + 100
    new = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    runs = {"generation": (args.tokens, lambda m: m.generate(ids, **new))}
    runs["prompt"] = (args.prompt, lambda m: m(long, logits_to_keep=1))
    found: Row = {}
    for kind, (count, run) in runs.items():
        work = {name: lambda model=model, run=run: run(model) for name, model in models.items()}
        with torch.inference_mode():
            times = bench.in_turn(work, 0, args.rounds, device=args.device)
        speeds = {name: [count / each for each in seconds] for name, seconds in times.items()}
        found[kind] = {name: bench.mean(values) for name, values in speeds.items()}
        for name in DENSE:
            ratios = [ours / theirs for ours, theirs in zip(speeds["packed"], speeds[name], strict=True)]
            found[kind][f"packed / {name}"] = bench.mean(ratios)
    return found


def alone(path: str, kind: str) -> Row:
    """Peak memory and loading time of one model, of a process that does nothing else."""
    import transformers  # noqa: F401  (not part of loading)

    start = time.perf_counter()
    model: Any = load(path, runtime="packed").model if kind == "packed" else open_model(path).model.to(DENSE[kind])
    loaded = time.perf_counter() - start
    with torch.inference_mode():
        model.generate(torch.tensor([[100, 200]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory, too
    return {"load_s": loaded, "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0])}


def measured(path: Path, dense: dict[str, Any], ids: torch.Tensor, args: argparse.Namespace) -> Row:
    """The row of an artifact."""
    before, cpu = os.getloadavg()[0], args.device == "cpu"
    packed = load(path, runtime="packed").model.to(args.device)
    packed.generation_config.eos_token_id = None  # all go on to the last token
    models = {"packed": packed, **dense}
    speeds = rounds(models, ids, args)
    rows = [row for row in Artifact(path).rows if row["stage"]]
    return {
        "bits": sum(row["bits"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows),
        "held_bytes": {name: resident_bytes(model) for name, model in models.items()},
        "read_bytes": {name: read_bytes(model) for name, model in models.items()},
        "copy_bytes_per_s": bandwidth(args.device),
        "alone": bench.apart(alone, str(path), "packed") if cpu else None,
        "load_average": [before, os.getloadavg()[0]],
        "threads": torch.get_num_threads(),
        "device": args.device if cpu else torch.cuda.get_device_name(),
        **speeds,
    }


def _cells(name: str, bits: str, kind: str, row: Row, alone: Row | None) -> list[str]:
    cells = [name, bits, f"{row['held_bytes'][kind] / 1e6:.1f}"]
    cells += ["-", "-"] if alone is None else [f"{alone['peak_bytes'] / 1e6:.0f}", f"{alone['load_s']:.1f}"]
    for what in ("generation", "prompt"):
        cells.append(bench.with_error(row[what][kind], ".1f", ".1f"))
        ratios = [row[what][f"packed / {other}"] for other in DENSE]
        cells += [bench.with_error(ratio, ".2f", ".2f") if kind == "packed" else "-" for ratio in ratios]
        if what == "generation":
            cells.append(f"{row['copy_bytes_per_s'] / row['read_bytes'][kind]:.0f}")
    return cells


def table(record: Row) -> str:
    """The report in Markdown."""
    rows, first, env = record["rows"], next(iter(record["rows"].values())), record["environment"]
    cells = []
    for name, row in rows.items():
        escaped = name.replace("|", "\\|")  # it would end the cell
        cells.append(_cells(f"`{escaped}`", f"{row['bits']:.2f}", "packed", row, row["alone"]))
    for kind, bits in {"float32": "32", "bfloat16": "16"}.items():  # as they ran beside the first row
        cells.append(_cells(f"dense {kind}, beside the first row", bits, kind, first, record["dense"][kind]))
    loads = ", ".join(f"{row['load_average'][0]:.1f} to {row['load_average'][1]:.1f}" for row in rows.values())
    head = (
        "stage | bits per weight | held (MB) | peak (MB) | load (s) | generation (tokens/s) | of float32's | of bfloat16's "
        f"| limit (tokens/s) | prompt of {record['prompt']} (tokens/s) | of float32's | of bfloat16's"
    )
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    text = f"""
        {record["model"]}; {env["cpu"]}, {env["cores"]} cores, torch {env["packages"]["torch"]}, {first["threads"]} threads,
        device {first["device"]}; {first["generation"]["packed"]["n"]} rounds, {record["tokens"]} new tokens.  Load averages
        before and after each row (this benchmark's own threads included): {loads}.
    """
    page = bench.page(bench.table(head, cells, "lr"), text)
    fused = "" if "decoder" in record else f"\n{bench.FUSED.format('`ternary`')}\n"
    return f"# Packed layers of every stage: memory and speed\n\n{about}\n{page}{fused}"


def main(arguments: list[str] | None = None) -> None:
    own = {"tokens": 32, "prompt": 512, "rounds": 5, "threads": 2, "device": "cpu", "scratch": Path("packed-artifacts")}
    args = bench.options(arguments, __doc__, "reports/packed", stages=STAGES, model=bench.MODEL, **own)
    record: Row = {"rows": {}, **dict(bench.read(args.out / "packed.json"))}
    if args.report:
        bench.save(args.out, {"packed.md": table(record)})
        return
    torch.set_num_threads(args.threads)
    original = open_model(args.model)
    record |= {"model": original.name, "tokens": args.tokens, "prompt": args.prompt, "environment": environment()}
    record |= {"decoder": "transformers", "version": __version__}
    dense: dict[str, Any] = {kind: open_model(args.model).model.to(args.device, dtype) for kind, dtype in DENSE.items()}
    for model in dense.values():
        model.generation_config.eos_token_id = None
    if "dense" not in record:
        cpu = args.device == "cpu"
        record["dense"] = {kind: bench.apart(alone, args.model, kind) if cpu else None for kind in DENSE}
    ids = original.tokenizer(bench.PROMPT, return_tensors="pt").input_ids.to(args.device)
    for text in args.stages:
        finished = Path(text).is_dir()
        name = f"artifact {Path(text).name}" if finished else stages.parse(text).brief()
        path = Path(text) if finished else args.scratch / "".join(c if c.isalnum() else "-" for c in name)
        if name in record["rows"]:
            continue
        if not finished:
            path.parent.mkdir(parents=True, exist_ok=True)
            compress(original, text, path)
        row = record["rows"][name] = measured(path, dense, ids, args)
        print(f"{name}: {row['generation']['packed']['value']:.1f} tokens/s generated", flush=True)
        bench.save(args.out, {"packed.json": record, "packed.md": table(record)})
    print(table(record).partition("\n| stage")[2])


if __name__ == "__main__":
    main()
