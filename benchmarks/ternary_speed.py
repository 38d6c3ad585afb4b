"""Ternary layers that stay packed, beside torch: one product at a time, and generating text.

    python benchmarks/ternary_speed.py [--only products|generation] [--seconds 1] [--tokens 64] [--rounds 5]
                                        [--threads 1 2] [--out DIR]

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
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
from torch import nn

import agentforge
from agentforge.artifact import Artifact
from agentforge.evaluation.measurement import environment
from agentforge.opening import load, open_model
from agentforge.pipeline import compress
from agentforge.runtime import TernaryLinear, ternary_cpu

SHAPES = [(4096, 4096), (4096, 11008), (192, 576), (576, 576), (1536, 576), (576, 1536)]  # out, in
TOKENS = [1, 8, 64]
THREADS = [1, 2]
OUT_OF_CACHE = 128 << 20
BLOCK = 5e-3  # seconds
OURS = "packed"
Row = bench.Row


def contestants(rows: int, columns: int, copies: int) -> dict[str, tuple[list[nn.Module], torch.dtype, int]]:
    """Layers, their dtype, and bytes of one: as many copies as `copies` bytes take, one at least."""
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao moves elsewhere
        int8 = torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {nn.Linear}, dtype=torch.qint8)
    packed = TernaryLinear.from_linear(dense)
    count = rows * columns
    made: dict[str, tuple[nn.Module, torch.dtype, int]] = {
        OURS: (packed, torch.float32, sum(t.nbytes for t in packed.buffers())),
        "float32": (dense, torch.float32, 4 * count),
        "bfloat16": (copy.deepcopy(dense).to(torch.bfloat16), torch.bfloat16, 2 * count),
        "int8 dynamic": (int8, torch.float32, count),
    }
    return {
        name: ([copy.deepcopy(layer) for _ in range(max(1, copies // size))], dtype, size)
        for name, (layer, dtype, size) in made.items()
    }


def summary(times: list[float]) -> dict[str, Any]:
    """Median and quartiles, and of how many blocks."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_s": middle, "quartiles_s": [low, high], "n": len(times)}


def read_bandwidth() -> float:
    """Bytes a second that torch sums, with the threads it has: the best of seven."""
    values = torch.ones(64 << 20)
    return values.nbytes / min(bench.once(values.sum) for _ in range(7))


def products(seconds: float, numbers: list[int]) -> list[dict[str, Any]]:
    """A row for every shape, number of tokens, number of threads, and place of the weights."""
    found = []
    for threads in numbers:
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        for rows, columns in SHAPES:
            for where in ("memory", "cache"):
                layers = contestants(rows, columns, OUT_OF_CACHE if where == "memory" else 0)
                for tokens in TOKENS if where == "cache" else TOKENS[:1]:
                    work: dict[str, Callable[[], object]] = {}
                    for name, (copies, dtype, _) in layers.items():
                        x, turn = torch.randn(tokens, columns).to(dtype), iter(range(1 << 62))
                        work[name] = lambda copies=copies, x=x, turn=turn: copies[next(turn) % len(copies)](x)  # type: ignore[misc]
                    with torch.inference_mode():
                        times = bench.in_turn(work, seconds, block=BLOCK)
                    row: dict[str, Any] = {
                        "out": rows,
                        "in": columns,
                        "tokens": tokens,
                        "threads": threads,
                        "weights": where,
                    }
                    row["read_bytes_per_s"] = bandwidth
                    row["contestants"] = {
                        name: {**summary(times[name]), "bytes": size} for name, (_, _, size) in layers.items()
                    }
                    found.append(row)
    return found


def generation(tokens: int, rounds: int, numbers: list[int]) -> dict[str, Any]:
    """Tokens a second and memory of the three models, for each number of threads."""
    with tempfile.TemporaryDirectory() as scratch:
        original = open_model("smollm2-135m")
        path = compress(original, "ternary", Path(scratch) / "ternary", progress=False).path
        models = {
            OURS: load(path, runtime="packed").model,
            "float32": load(path).model,
            "bfloat16": load(path).model.to(torch.bfloat16),
        }
        weights = sum(row["shape"][0] * row["shape"][1] for row in Artifact(path).rows if row["stage"])
        ids = original.tokenizer(bench.PROMPT, return_tensors="pt").input_ids
    layers = [m for m in models[OURS].modules() if isinstance(m, TernaryLinear)]
    held = {
        OURS: sum(t.nbytes for layer in layers for t in layer.buffers()),
        "float32": 4 * weights,
        "bfloat16": 2 * weights,
    }
    whole = {
        name: sum({t.data_ptr(): t.nbytes for t in [*m.parameters(), *m.buffers()]}.values()) for name, m in models.items()
    }
    for model in models.values():
        model.generation_config.eos_token_id = None  # all go on to the last token

    def run(model: Any) -> object:
        return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    runs = []
    for threads in numbers:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            times = bench.in_turn({name: lambda m=model: run(m) for name, model in models.items()}, 0, rounds)  # type: ignore[misc]
        runs.append({"threads": threads, "contestants": {name: summary(times[name]) for name in models}})
    return {
        "model": original.name,
        "prompt_tokens": ids.shape[1],
        "new_tokens": tokens,
        "linear_weights": weights,
        "linear_bytes": held,
        "whole_bytes": whole,
        "runs": runs,
    }


def table_of_products(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["out x in", "tokens", "threads", "weights in", "packed (us)", "quartiles", "of read bandwidth"]
    others = ["float32", "bfloat16", "int8 dynamic"]
    lines = [[*head, *(f"{name} (us)" for name in others), *(f"{name} / packed" for name in others)]]
    for row in rows:
        ours = row["contestants"][OURS]
        us = {name: 1e6 * c["median_s"] for name, c in row["contestants"].items()}
        share = ours["bytes"] / ours["median_s"] / row["read_bytes_per_s"]
        lines.append(
            [
                f"{row['out']} x {row['in']}",
                str(row["tokens"]),
                str(row["threads"]),
                row["weights"],
                f"{us[OURS]:.1f}",
                " - ".join(f"{1e6 * q:.1f}" for q in ours["quartiles_s"]),
                f"{share:.2f}",
                *(f"{us[name]:.0f}" for name in others),
                *(f"{us[name] / us[OURS]:.1f}" for name in others),
            ]
        )
    return lines


def table_of_generation(found: dict[str, Any]) -> list[list[str]]:
    lines = [
        ["threads", "weights", "tokens/s", "quartiles", "packed is faster by", "linear weights (MB)", "whole model (MB)"]
    ]
    for run in found["runs"]:
        ours = run["contestants"][OURS]["median_s"]
        for name, c in run["contestants"].items():
            speeds = [found["new_tokens"] / q for q in reversed(c["quartiles_s"])]
            lines.append(
                [
                    str(run["threads"]),
                    name,
                    f"{found['new_tokens'] / c['median_s']:.1f}",
                    " - ".join(f"{s:.1f}" for s in speeds),
                    f"{c['median_s'] / ours:.2f}",
                    f"{found['linear_bytes'][name] / 1e6:.1f}",
                    f"{found['whole_bytes'][name] / 1e6:.1f}",
                ]
            )
    return lines


def show(title: str, lines: list[list[str]]) -> str:
    """A table in Markdown, under its title."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"## {title}", "", text[0], "|" + " ---: |" * len(lines[0]), *text[1:], ""])


def table(record: Row) -> str:
    """The report as Markdown."""
    text = ["# Ternary layers that stay packed: speed", "", (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2], ""]
    for part, lines_of in (("products", table_of_products), ("generation", table_of_generation)):
        if part not in record:
            continue
        found, about = record[part]["found"], record[part]["environment"]
        text.append(show(part.capitalize(), lines_of(found)))
        loads = " to ".join(f"{load:.1f}" for load in record[part]["load_average"])
        text.append(
            f"{about['cpu']}, {about['cores']} cores, torch {about['packages']['torch']}, kernel {record[part]['kernel']}; "
            f"load average {loads} (this benchmark's own included).\n"
        )
        if part == "generation":
            share = found["linear_bytes"][OURS] / found["linear_bytes"]["bfloat16"]
            text.append(
                f"{found['model']}, {found['prompt_tokens']} tokens of prompt, {found['new_tokens']} new ones.  The "
                f"packed linear weights take {share:.4f} of bfloat16's bytes; embedding and head of the packed model are "
                "float16, as the artifact keeps them.\n"
            )
            text += [] if "decoder" in record[part] else [bench.FUSED.format("packed") + "\n"]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    parser = bench.parser(__doc__ or "", None)
    parser.add_argument("--only", choices=["products", "generation"])
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per row of products")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a generation")
    parser.add_argument("--rounds", type=int, default=5, help="generations of each model")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    args = parser.parse_args(arguments)
    record: Row = dict(bench.read(args.out / "ternary_speed.json")) if args.out else {}
    for part in ("products", "generation"):
        if args.only in (None, part):
            before = os.getloadavg()[0]
            if part == "products":
                found: Any = products(args.seconds, args.threads)
            else:
                found = generation(args.tokens, args.rounds, args.threads)
            about = {
                "load_average": [before, os.getloadavg()[0]],
                "kernel": ternary_cpu.available()[0],
                "decoder": "transformers",
            }
            record[part] = {"found": found, **about, "version": agentforge.__version__, "environment": environment()}
            print(show(part.capitalize(), (table_of_products if part == "products" else table_of_generation)(found)))
    if args.out:
        bench.save(args.out, {"ternary_speed.json": record, "ternary_speed.md": table(record)})


if __name__ == "__main__":
    main()
