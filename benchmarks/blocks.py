"""What `fit` and `evaluate` take as a model gets more blocks, and wider ones.

    python benchmarks/blocks.py [--folder DIR] [--only NAME] [--out reports/blocks]

Makes Llamas of random half floats, and runs both commands on each by the command line, in processes of their own.  The
weights mean nothing, and so do the divergences; bytes, seconds and memory depend on shapes alone.  Peak is the most resident
memory of the process as the kernel counts it.  The whole needs 30 GB of disk, and two hours of two cores.
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
MODELS = {
    "1024 wide": (1024, 2816, 0.6),
    "2048 wide, 4 blocks": (2048, 5632, 0.4),
    "2048 wide, 12 blocks": (2048, 5632, 1.1),
    "1 B": (2048, 5632, 2.0),
    "3 B": (2048, 5632, 6.0),
}
TOKENS = 2044  # to measure on
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
        command = sys.executable, "-m", "agentforge"
        words = ["--tokens", TOKENS, "--json"]
        _, fit = bench.process(*command, "fit", model, "--bits", 3, "--out", out, *words)
        _, evaluate = bench.process(*command, "evaluate", out, "--against", model, "--context", 512, *words)
    from agentforge.evaluation.measurement import environment

    found = environment()
    machine = f"{found['cpu']}, {os.cpu_count()} cores, torch {found['packages']['torch']}"
    return {**about, "fit": fit, "evaluate": evaluate, "machine": machine}


def table(rows: list[bench.Row]) -> str:
    """The rows as Markdown."""
    cells = []
    for row in rows:
        about = [
            row["recipe"]["name"],
            f"{row['parameters'] / 1e6:,.0f}",
            str(row["blocks"]),
            f"{row['block_bytes'] / 1e6:,.0f}",
        ]
        for command in ("fit", "evaluate"):
            used = row[command]
            peak, each = f"{used['peak_bytes'] / 1e6:,.0f}", f"{1e6 * used['cpu_seconds'] / row['parameters']:.2f}"
            cells.append([*about, command, peak, f"{used['cpu_seconds']:,.0f}", each, f"{used['seconds']:,.0f}"])
    text = f"""
        # Blocks

        Llamas of random half floats: `agentforge fit --bits 3`, and `agentforge evaluate` of the result beside the
        original, on {TOKENS:,} tokens.  The weights of one block are in memory at a time.  {rows[0]["machine"]}.
    """
    return bench.page(text, bench.table(COLUMNS, cells, "lrrrlr"))


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
