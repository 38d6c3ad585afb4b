"""Speed and memory of models as they run: packed, dense, and in llama.cpp.

    python benchmarks/runtime.py [--runs STAGE_OR_ARTIFACT ...] [--llama STAGE_OR_GGUF_FILE ...] [--model smollm2-135m]
                                 [--threads 1] [--tokens 32] [--rounds 5] [--work DIR] [--out reports/runtime]

Compresses the model with each stage (kept in --work), and takes finished ARTIFACTs, too; those of --llama are exported to
GGUF, or are GGUF FILEs, and run by llama.cpp, built in --work at the version that `peers.py` pins.  Each is measured in turn
with the original in bfloat16.  A round is one run of each, so that other work on the machine meets both alike; ratios are
formed within a round.  Means, with standard errors.  Times are of the processor, not of the clock: all threads' together.

* generation: greedy, batch 1, --tokens new tokens after a short prompt, whose processing is in the time.
* prompts: so many tokens at once, in float32, in which packed models compute unless they are told otherwise, and with the
  packed model cast to bfloat16.
* held: parameters, buffers, and what packed layers keep beside them, between two calls; of llama.cpp the file.
* peak, load: memory and seconds of a fresh process which loads the model and generates four tokens; Python is in it.
* reads: what a token reads per second, and its share of what this machine reads when it adds up 256 MB.

With --out (reports/runtime) it writes DIR/runtime.json and .md after each row, and does not measure again what is there.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench
import interop
import peers
import torch
from gguf import GGUFReader
from torch import nn

from agentforge import __version__, compress, export, load, open_model
from agentforge.artifact import Artifact
from agentforge.evaluation.measurement import environment
from agentforge.runtime import PackedWeight, resident_bytes

# SeedLM with seeds of 8 bits, which are found in seconds: regenerating a block takes as long for any seed.
STAGES = [
    "rounding:bits=4,group=64",
    "rounding:bits=3,group=64",
    "rounding:bits=4,group=64 | entropy",
    "ternary:rule=absmean",
    "vptq:bits=3,shared=true",
    "seedlm:K=8,C=8,P=3",
    "trajectory",
    "curves",
]
LLAMA = [*interop.STAGES.values()][:3]
PROMPTS = (17, 100, 512)
Row = bench.Row
Runs = tuple[Callable[[int], object], Callable[[int], object]]  # generate so many tokens; process a prompt of so many


def read_bytes(model: nn.Module) -> int:
    """What a token reads: all in memory but planes that were replaced by plain ones."""
    total = resident_bytes(model)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            kept = {tensor.data_ptr() for tensor in module.ready.tensors}
            total -= sum(buffer.nbytes for buffer in module.buffers() if buffer.data_ptr() not in kept)
    return total


def transformer(model: Any, ids: list[int]) -> Runs:
    """A model of transformers."""
    model.generation_config.eos_token_id = None  # all go on to the last token
    new = {"do_sample": False, "pad_token_id": 0}
    return (
        lambda count: model.generate(torch.tensor([ids]), max_new_tokens=count, **new),
        lambda count: model(torch.arange(count)[None] % 1000 + 100, logits_to_keep=1),
    )


def llama_cpp(file: Path, work: Path, ids: list[int], threads: int) -> Runs:
    """A file in llama.cpp, by its Python package."""
    built = peers.LlamaCpp(work)
    built.build("llama")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(built.programs)
    sys.path.insert(0, str(built.package))
    import llama_cpp

    shape = {"n_ctx": 1024, "n_batch": max(PROMPTS), "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(file), verbose=False, **shape)

    def prompt(count: int) -> None:
        model.reset()
        model.eval([token % 1000 + 100 for token in range(count)])

    return lambda count: [*zip(range(count), model.generate(ids, temp=0.0), strict=False)], prompt


def in_turn(runs: dict[str, Runs], tokens: int, rounds: int) -> Row:
    """Milliseconds of the processor per token of all, in turn, and each one's ratio to the last one's."""
    found: Row = {}
    for kind, count in {"generation": tokens, **{str(count): count for count in PROMPTS}}.items():
        calls = {
            name: partial(generate if kind == "generation" else prompt, count) for name, (generate, prompt) in runs.items()
        }
        with torch.inference_mode():
            spent = bench.in_turn(calls, 0, rounds, clock=time.process_time)
        base = [*spent.values()][-1]
        found[kind] = {
            name: {
                **bench.mean([1e3 * seconds / count for seconds in each]),
                "ratio": bench.mean([a / b for a, b in zip(each, base, strict=True)]),
            }
            for name, each in spent.items()
        }
    return found


def alone(path: str, packed: bool) -> Row:
    """Peak memory and loading time of one model, of a process that does nothing else."""
    import transformers  # noqa: F401  (not part of loading)

    start = time.perf_counter()
    model: Any = load(path, runtime="packed").model if packed else open_model(path).model.to(torch.bfloat16)
    loaded = time.perf_counter() - start
    with torch.inference_mode():
        model.generate(torch.tensor([[100, 200]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory, too
    return {"load_s": loaded, "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0])}


def measured(name: str, path: Path, dense: Any, ids: list[int], args: Any) -> Row:
    """The row of an artifact."""
    of, row = transformer(dense, ids), {"threads": torch.get_num_threads()}
    row["read_per_s"] = bench.read_bandwidth(time.process_time)
    if name.startswith("llama.cpp"):
        file = path if path.suffix == ".gguf" else args.work / f"{path.name}.gguf"
        if not file.is_file():
            export(path, "gguf", file)
        layers = [tensor for tensor in GGUFReader(file).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
        row["bits"] = 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers)
        llama = llama_cpp(file, args.work.resolve(), ids, args.threads)
        size = dict.fromkeys(("held", "read"), file.stat().st_size)
        return row | size | in_turn({"float32": llama, "dense": of}, args.tokens, args.rounds)
    rows = [row for row in Artifact(path).rows if row["stage"]]
    row["bits"] = sum(r["bits"] for r in rows) / sum(r["shape"][0] * r["shape"][1] for r in rows)
    packed: Any = load(path, runtime="packed").model
    both = {"float32": packed, "bfloat16": copy.deepcopy(packed).to(torch.bfloat16)}
    runs = {dtype: transformer(model, ids) for dtype, model in both.items()}
    row |= in_turn({**runs, "dense": of}, args.tokens, args.rounds)
    return row | {"held": resident_bytes(packed), "read": read_bytes(packed), **bench.apart(alone, str(path), True)}


def table(record: Row) -> str:
    """The report in Markdown."""

    def cells(name: str, row: Row, kind: str) -> list[str]:
        own = "peak_bytes" in row
        found = [name, f"{row['bits']:.2f}", f"{row['held'] / 1e6:.0f}"]
        found += [f"{row['peak_bytes'] / 1e6:.0f}", f"{row['load_s']:.1f}"] if own else ["-", "-"]
        each = row["generation"][kind]
        speed = row["read"] / each["value"] * 1e3
        found += [bench.with_error(each, ".1f", ".1f"), bench.with_error(each["ratio"], ".2f", ".2f")]
        found.append(f"{speed / 1e9:.1f} ({speed / row['read_per_s']:.0%})")
        for count in map(str, PROMPTS):
            half = row[count].get("bfloat16", {}).get("ratio") if kind == "float32" else None
            found.append(bench.with_error(row[count][kind]["ratio"], ".2f", ".2f"))
            found[-1] += f"; {bench.with_error(half, '.2f', '.2f')}" if half else ""
        return found

    rows, first, env = record["rows"], next(iter(record["rows"].values())), record["environment"]
    lines = [cells(f"`{name}`".replace("|", "\\|"), row, "float32") for name, row in rows.items()]
    beside = {**first, "bits": 16, "held": record["dense"]["held"], "read": record["dense"]["held"], **record["dense"]}
    lines.append(cells("dense, bfloat16, beside the first row", beside, "dense"))
    head = "model | bits per weight | held (MB) | peak (MB) | load (s) | generation (ms per token) | of bfloat16's | "
    head += "reads (GB/s) | " + " | ".join(f"prompt of {count}, of bfloat16's" for count in PROMPTS)
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].rpartition("\n\nWith --out")[0]
    text = f"""
        {record["model"]}; {env["cpu"]}, torch {env["packages"]["torch"]}, llama-cpp-python {peers.LLAMA_CPP}, threads:
        {first["threads"]}; {first["generation"]["dense"]["n"]} rounds, {record["tokens"]} new tokens.  Prompts: the time of
        a packed model by that of the dense one in bfloat16; behind the semicolon that of the packed one in bfloat16.
    """
    return f"# Models as they run: speed and memory\n\n{about}\n\n{bench.page(bench.table(head, lines, 'lr'), text)}"


def main(arguments: list[str] | None = None) -> None:
    own = {"tokens": 32, "rounds": 5, "threads": 1, "work": Path(tempfile.gettempdir()) / "agentforge-runtime"}
    args = bench.options(arguments, __doc__, "reports/runtime", runs=STAGES, llama=LLAMA, model=bench.MODEL, **own)
    record: Row = {"rows": {}, **dict(bench.read(args.out / "runtime.json"))}
    if args.report:
        bench.save(args.out, {"runtime.md": table(record)})
        return
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    original, dense = open_model(args.model), open_model(args.model).model.to(torch.bfloat16)
    record |= {"model": original.name, "tokens": args.tokens, "environment": environment(), "version": __version__}
    record.setdefault("dense", {"held": resident_bytes(dense), **bench.apart(alone, args.model, False)})
    ids = original.encode(bench.PROMPT)
    wanted = [("", text) for text in args.runs] + [("llama.cpp, ", text) for text in args.llama]
    for where, text in wanted:
        finished = Path(text).is_dir() or text.endswith(".gguf")
        name = where + (f"{'file' if where else 'artifact'} {Path(text).name.removesuffix('.gguf')}" if finished else text)
        path = Path(text) if finished else args.work / "".join(c if c.isalnum() else "-" for c in text)
        if name in record["rows"]:
            continue
        if not path.exists():
            compress(original, text, path)
        row = record["rows"][name] = measured(name, path, dense, ids, args)
        bench.say(f"{name}: {row['generation']['float32']['value']:.1f} ms per token")
        bench.save(args.out, {"runtime.json": record, "runtime.md": table(record)})


if __name__ == "__main__":
    main()
