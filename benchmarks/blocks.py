"""What `fit` and `evaluate` take as a model gets more blocks, and what they would take for one of 70 B parameters.

    python benchmarks/blocks.py [--folder DIR] [--only NAME] [--out reports/blocks]

Makes Llamas of random half floats, and runs both on each in processes of their own.  The weights mean nothing, and so do the
divergences; bytes, seconds and memory depend on shapes alone.  Peak is the most resident memory of the process as the kernel
counts it.  The whole needs 30 GB of disk, and two hours of two cores.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import bench
import streaming

# hidden, ffn, gigabytes.
MODELS = {"0.3 B": (2048, 5632, 0.6), "1 B": (2048, 5632, 2.0), "3 B": (2048, 5632, 6.0)}
TOKENS = 2044  # to measure on
# `agentforge fit MODEL --bits 3 --out OUT`, which says at which of its CPU seconds a part of it had ended.
FIT = f"""
import json, os, sys
from agentforge.allocation import FOR_FIT, LADDER, Budget, candidates, collect, fit, open_model
model, ends = open_model(sys.argv[1]), {{}}
calibration = FOR_FIT.for_model(model).for_stage(LADDER[0])
statistics = collect(model, calibration)
ends["statistics"] = sum(os.times()[:2])
candidates(model, statistics, calibration)
ends["prices"] = sum(os.times()[:2])
fit(model, sys.argv[2], Budget(bits=3), statistics=statistics, tokens={TOKENS})
print(json.dumps({{"stage": LADDER[0].name, "ends": ends, "calibration": calibration.to_json()}}))
"""
# Of Llama-3-70B: blocks, parameters of a block, and inputs of its widest layer.
LARGE = {"parameters": 70e9, "block": 856e6, "widest": 28672}
WORKERS = 16
COLUMNS = (
    "model | parameters (M) | blocks | block in float32 (MB) | command | peak (MB) | CPU (s) | μs per parameter | seconds"
)


def make(folder: Path, hidden: int, ffn: int, gigabytes: float) -> None:
    """The model, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    streaming.make(folder, gigabytes, hidden, ffn)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(name: str, folder: Path | None) -> bench.Row:
    """Both commands on one model."""
    hidden, ffn, gigabytes = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="agentforge-blocks-", dir=folder) as work:
        model, out = Path(work) / "model", Path(work) / "out"
        bench.apart(make, model, hidden, ffn, gigabytes)
        layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        rest, whole = (sum(map(math.prod, streaming.shapes(n, hidden, ffn).values())) for n in (0, layers))
        about = {"blocks": layers, "parameters": whole, "block_bytes": 4 * (whole - rest) // layers}
        said, fit = bench.process(sys.executable, "-c", FIT, model, out)
        words = ["evaluate", out, "--against", model, "--context", 512, "--tokens", TOKENS, "--json"]
        _, evaluate = bench.process(sys.executable, "-m", "agentforge", *words)
    told = json.loads(said)
    fit["cpu_seconds_until"] = told["ends"]
    from agentforge.evaluation.measurement import environment

    found = environment()
    machine = f"{found['cpu']}, {os.cpu_count()} cores, torch {found['packages']['torch']}"
    about |= {"stage": told["stage"], "calibration": told["calibration"]}
    return {**about, "fit": fit, "evaluate": evaluate, "machine": machine}


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    cells = []
    for row in rows:
        parameters, block = f"{row['parameters'] / 1e6:,.0f}", f"{row['block_bytes'] / 1e6:,.0f}"
        for command in ("fit", "evaluate"):
            used = row[command]
            peak, each = f"{used['peak_bytes'] / 1e6:,.0f}", f"{1e6 * used['cpu_seconds'] / row['parameters']:.2f}"
            about = [row["recipe"]["name"], parameters, str(row["blocks"]), block, command]
            cells.append([*about, peak, f"{used['cpu_seconds']:,.0f}", each, f"{used['seconds']:,.0f}"])
    read = rows[-1].get("calibration", {"tokens": 8192, "sensitivity_tokens": 2048})  # those of before it was recorded
    text = f"""
        # Blocks

        Llamas of random half floats: `fit` to 3 bits per weight among steps of `{rows[-1]["stage"]}`, calibrated on
        {read["tokens"]:,} tokens, with backward passes on {read["sensitivity_tokens"]:,}, and
        `agentforge evaluate` of the result beside the original, both on {TOKENS:,} tokens.  The
        weights of one block are in memory at a time.  {rows[0]["machine"]}.
    """
    grown = growth(rows) if len(rows) > 1 else []
    return bench.page(text, bench.table(COLUMNS, cells, "lrrrlr"), *grown, large(rows[-1]))


def growth(rows: list[bench.Row]) -> list[str]:
    """How seconds and memory grow from the first row to the last."""
    first, last = rows[0], rows[-1]
    names = f"From {first['recipe']['name']} to {last['recipe']['name']}"
    said, more = [], math.log(last["parameters"] / first["parameters"])
    for command in ("fit", "evaluate"):
        one, other = first[command], last[command]
        power = math.log(other["cpu_seconds"] / one["cpu_seconds"]) / more
        memory = (other["peak_bytes"] - one["peak_bytes"]) / 1e6
        said.append(
            f"{names}, CPU seconds of `{command}` grow with the parameters to the power of {power:.3f}, and its peak by "
            f"{memory:+,.0f} MB."
        )
    return said


def large(row: bench.Row) -> str:
    """What the last row's costs make of a model of 70 B parameters.

    Statistics, and measuring, run on one machine; prices and encoding go to workers as well (`fit --scheduler`).
    """
    fit, evaluate = row["fit"], row["evaluate"]["cpu_seconds"]
    until = fit["cpu_seconds_until"]
    parts = {"statistics": until["statistics"], "prices": until["prices"] - until["statistics"]}
    parts |= {"encoding": fit["cpu_seconds"] - until["prices"] - evaluate, "measuring": evaluate}
    hours = {name: seconds / row["parameters"] * LARGE["parameters"] / 3600 for name, seconds in parts.items()}
    spread = hours["prices"] + hours["encoding"]
    alone = sum(hours.values()) - spread
    # A block twice, and the factor of H as it is made: a number in 8 bytes, its result in 4.
    memory = (2 * 4 * LARGE["block"] + 12 * LARGE["widest"] ** 2) / 1e9
    each = ", ".join(f"{name} {value:,.1f}" for name, value in hours.items())
    return (
        f"At the costs of {row['recipe']['name']}, `fit` of 70 B parameters takes {sum(hours.values()):,.0f} hours "
        f"of one core ({each}). With {WORKERS} workers of one core for prices and encoding it takes "
        f"{alone + spread / WORKERS:,.0f} hours, of which {alone:,.0f} are statistics and measuring, which run on one core "
        f"where `fit` was called. Its largest block twice in float32 and the factor of its widest H take {memory:,.0f} GB. "
        "This is an estimate: no such model was run."
    )


def main(arguments: list[str] | None = None) -> None:
    options = bench.options(arguments, __doc__, "reports/blocks", folder=None, only=[])
    rows = bench.read(options.out / "blocks.json")

    def keep(rows: list[bench.Row]) -> None:
        bench.save(options.out, {"blocks.json": rows, "blocks.md": table(rows)})

    if options.report:
        return keep(rows)
    wanted = {name: {"name": name, "shape": list(shape)} for name, shape in MODELS.items()}
    bench.run(rows, wanted, lambda name: measure(name, options.folder), keep, only=options.only)


if __name__ == "__main__":
    main()
