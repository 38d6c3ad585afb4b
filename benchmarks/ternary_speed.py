"""Ternary layers that stay packed, beside torch: one product at a time, and generating text.

    python benchmarks/ternary_speed.py [--only products|generation] [--seconds 1] [--tokens 64] [--rounds 5]
                                        [--threads 1 2] [--out reports/ternary_speed]

Prints tables; with --out (reports/ternary_speed) it also writes DIR/ternary_speed.json and .md, and keeps what an earlier
call wrote of the part that --only leaves out.

Products: a layer of random weights as TernaryLinear (2-bit weights, 8-bit activations), and torch's Linear in float32,
bfloat16 and dynamically quantised to int8, with the same number of threads.  Blocks of calls, one contestant after the
other, until the time for a row is up; the median of each one's blocks.  "memory" calls copies of the layer in turn, so many
that they fit into no cache, as the layers of a large model do; "cache" calls one layer again and again.  The bandwidth
reached is the layer's own bytes over its time, as a share of the speed at which this machine reads (torch sums 256 MB),
with as many threads.

Generation: greedy, one prompt, the default model with all its linear layers ternary: packed, and the same weights decoded
in float32 and bfloat16, in turn; medians of the runs.  A run is one prompt's processing and all new tokens.

One process, other work on the machine moves all numbers: the load average is written down, and every row names its spread.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import bench
import torch
from torch import nn

from agentforge import __version__, compress, load, open_model
from agentforge.artifact import Artifact
from agentforge.evaluation.measurement import environment
from agentforge.runtime import TernaryLinear, ternary_cpu

SHAPES = [(4096, 4096), (4096, 11008), (192, 576), (576, 576), (1536, 576), (576, 1536)]  # out, in
TOKENS = [1, 8, 64]
OUT_OF_CACHE = 128 << 20
BLOCK = 5e-3  # seconds
OURS = "packed"
Row = bench.Row

# Under a table whose record does not say that transformers' own decoder layers ran.
FUSED = """\
The generation speed of packed was measured with a Llama layer that computed a new token by two kernels of its own; that code
is gone. Without it a token of this model takes about 1.3 times as long."""


def contestants(rows: int, columns: int, copies: int) -> dict[str, tuple[list[nn.Module], torch.dtype, int]]:
    """Layers, their dtype, and bytes of one: as many copies as `copies` bytes take, one at least."""
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao moves elsewhere
        int8 = torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {nn.Linear}, dtype=torch.qint8)
    packed, half, count = TernaryLinear.from_linear(dense), copy.deepcopy(dense).to(torch.bfloat16), rows * columns
    made = {OURS: (packed, torch.float32, sum(t.nbytes for t in packed.buffers()))}
    made |= {"float32": (dense, torch.float32, 4 * count), "bfloat16": (half, torch.bfloat16, 2 * count)}
    made["int8 dynamic"] = (int8, torch.float32, count)
    many = {name: max(1, copies // size) for name, (_, _, size) in made.items()}
    return {name: ([copy.deepcopy(layer) for _ in range(many[name])], *rest) for name, (layer, *rest) in made.items()}


def summary(times: list[float]) -> Row:
    """Median and quartiles, and of how many blocks."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_s": middle, "quartiles_s": [low, high], "n": len(times)}


@functools.cache
def read_bandwidth(threads: int) -> float:
    """`bench.read_bandwidth` with so many threads, which torch has."""
    return bench.read_bandwidth()


def products(seconds: float, numbers: list[int]) -> list[Row]:
    """A row for every shape, number of tokens, number of threads, and place of the weights."""
    found = []
    for threads, (rows, columns), where in itertools.product(numbers, SHAPES, ("memory", "cache")):
        torch.set_num_threads(threads)
        layers = contestants(rows, columns, OUT_OF_CACHE if where == "memory" else 0)
        for tokens in TOKENS if where == "cache" else TOKENS[:1]:
            work = {}
            for name, (copies, dtype, _) in layers.items():
                x, turn = torch.randn(tokens, columns).to(dtype), itertools.cycle(copies)
                work[name] = lambda x=x, turn=turn: next(turn)(x)
            with torch.inference_mode():
                times = bench.in_turn(work, seconds, block=BLOCK)
            row: Row = {"out": rows, "in": columns, "tokens": tokens, "threads": threads, "weights": where}
            row["read_bytes_per_s"] = read_bandwidth(threads)
            row["contestants"] = {name: {**summary(times[name]), "bytes": size} for name, (_, _, size) in layers.items()}
            found.append(row)
    return found


def generation(tokens: int, rounds: int, numbers: list[int]) -> Row:
    """Tokens per second and memory of the three models, for each number of threads."""
    with tempfile.TemporaryDirectory() as scratch:
        original = open_model(bench.MODEL)
        path = compress(original, "ternary", Path(scratch) / "ternary", progress=False).path
        models: dict[str, Any] = {OURS: load(path, runtime="packed").model, "float32": load(path).model}
        models["bfloat16"] = load(path).model.to(torch.bfloat16)
        weights = sum(row["shape"][0] * row["shape"][1] for row in Artifact(path).rows if row["stage"])
        ids = original.tokenizer(bench.PROMPT, return_tensors="pt").input_ids
    layers = [m for m in models[OURS].modules() if isinstance(m, TernaryLinear)]
    held = {
        OURS: sum(t.nbytes for layer in layers for t in layer.buffers()),
        "float32": 4 * weights,
        "bfloat16": 2 * weights,
    }
    whole = {}
    for name, model in models.items():
        model.generation_config.eos_token_id = None  # all go on to the last token
        whole[name] = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    new = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    runs = []
    for threads in numbers:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            work = {name: lambda model=model: model.generate(ids, **new) for name, model in models.items()}
            times = bench.in_turn(work, 0, rounds)
        runs.append({"threads": threads, "contestants": {name: summary(times[name]) for name in models}})
    about = {"model": original.name, "prompt_tokens": ids.shape[1], "new_tokens": tokens, "linear_weights": weights}
    return {**about, "linear_bytes": held, "whole_bytes": whole, "runs": runs}


def table_of_products(rows: list[Row]) -> str:
    others, lines = ["float32", "bfloat16", "int8 dynamic"], []
    for row in rows:
        ours, us = row["contestants"][OURS], {name: 1e6 * c["median_s"] for name, c in row["contestants"].items()}
        cells = [f"{row['out']} x {row['in']}", str(row["tokens"]), str(row["threads"]), row["weights"], f"{us[OURS]:.1f}"]
        cells.append(" - ".join(f"{1e6 * q:.1f}" for q in ours["quartiles_s"]))
        cells.append(f"{ours['bytes'] / ours['median_s'] / row['read_bytes_per_s']:.2f}")
        lines.append([*cells, *(f"{us[name]:.0f}" for name in others), *(f"{us[name] / us[OURS]:.1f}" for name in others)])
    head = ["out x in", "tokens", "threads", "weights in", "packed (us)", "quartiles", "of read bandwidth"]
    head += [*(f"{name} (us)" for name in others), *(f"{name} / packed" for name in others)]
    return bench.table(" | ".join(head), lines, "r")


def table_of_generation(found: Row) -> str:
    lines = []
    for run in found["runs"]:
        for name, c in run["contestants"].items():
            speeds = [found["new_tokens"] / q for q in (c["median_s"], *reversed(c["quartiles_s"]))]
            cells = [str(run["threads"]), name, f"{speeds[0]:.1f}", " - ".join(f"{s:.1f}" for s in speeds[1:])]
            cells.append(f"{c['median_s'] / run['contestants'][OURS]['median_s']:.2f}")
            lines.append([*cells, *(f"{found[size][name] / 1e6:.1f}" for size in ("linear_bytes", "whole_bytes"))])
    head = "threads | weights | tokens/s | quartiles | packed is faster by | linear weights (MB) | whole model (MB)"
    return bench.table(head, lines, "r")


def table(record: Row) -> str:
    """The report as Markdown."""
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    text = f"# Ternary layers that stay packed: speed\n\n{about}\n\n"
    for part, lines_of in (("products", table_of_products), ("generation", table_of_generation)):
        if part not in record:
            continue
        found, env, kernel = record[part]["found"], record[part]["environment"], record[part]["kernel"]
        loads = " to ".join(f"{load:.1f}" for load in record[part]["load_average"])
        machine = f"""
            {env["cpu"]}, {env["cores"]} cores, torch {env["packages"]["torch"]}, kernel {kernel}; load average {loads} (this
            benchmark's own included).
        """
        text += bench.page(f"## {part.capitalize()}", lines_of(found), machine) + "\n"
    if "generation" in record:
        share = found["linear_bytes"][OURS] / found["linear_bytes"]["bfloat16"]
        text += bench.page(f"""
            {found["model"]}, {found["prompt_tokens"]} tokens of prompt, {found["new_tokens"]} new ones.  The packed linear
            weights take {share:.4f} of bfloat16's bytes; embedding and head of the packed model are float16, as the artifact
            keeps them.
        """)
        text += "" if "decoder" in record["generation"] else f"\n{FUSED}\n"
    return text


def main(arguments: list[str] | None = None) -> None:
    own = {"only": [], "seconds": 1.0, "tokens": 64, "rounds": 5, "threads": [1, 2]}
    args = bench.options(arguments, __doc__, "reports/ternary_speed", **own)
    record: Row = dict(bench.read(args.out / "ternary_speed.json"))
    parts = {"products": lambda: products(args.seconds, args.threads)}
    parts["generation"] = lambda: generation(args.tokens, args.rounds, args.threads)
    for part, measure in () if args.report else parts.items():
        if not args.only or part in args.only:
            before = os.getloadavg()[0]
            about = {"found": measure(), "load_average": [before, os.getloadavg()[0]], "environment": environment()}
            about |= {"kernel": ternary_cpu.available()[0], "decoder": "transformers", "version": __version__}
            record[part] = about
            print((table_of_products if part == "products" else table_of_generation)(about["found"]))
    bench.save(args.out, {"ternary_speed.json": record, "ternary_speed.md": table(record)})


if __name__ == "__main__":
    main()
