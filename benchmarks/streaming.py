"""What memory and time it takes to compress a model that is much larger than any of its tensors.

    python benchmarks/streaming.py [--size 8] [--folder DIR] [--out reports/streaming]

Makes a Llama of random half floats, --size GB, in a temporary folder (in --folder, which needs twice as much), and
compresses it with each of STAGES by the command line, in a process of its own, with no page of the model in memory.  Peak is
the most resident memory of that process as the kernel counts it, mapped files included: 390 MB of libraries that were just
written, or 250 of others.  Read and written are what the kernel counts; the disk's own rates are taken just before.  A load
above zero (processes that were ready to run when the row began) makes seconds upper bounds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bench

# Nothing large is imported and no child forks from here with much in memory: a child's peak is counted from its parent's.

STAGES = ("rounding:bits=4,group=64", "trajectory:select=False")
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 8192
SHARD_BYTES = 10**9
SLACK = 500 * 10**6
PROBE_BYTES = 10**9  # written to learn the disk's rate
COLUMNS = (
    "stage | peak (MB) | bound (MB) | seconds | CPU (s) | MB/s of the model | read (GB) | written (GB) | disk alone (s) | "
    "load"
)
Row = bench.Row


def shapes(layers: int, hidden: int = HIDDEN, ffn: int = FFN) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with this many layers, and their shapes."""
    kv = hidden * KV_HEADS // HEADS
    inner: dict[str, tuple[int, ...]] = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    inner |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kv, hidden))
    inner |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (ffn, hidden)) | {"mlp.down_proj": (hidden, ffn)}
    inner |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in inner.items()}
    return {"model.embed_tokens.weight": (VOCABULARY, hidden), **blocks, "model.norm.weight": (hidden,)}


def make(folder: Path, gigabytes: float, hidden: int = HIDDEN, ffn: int = FFN) -> Path:
    """A checkpoint of random half floats of about this size (a layer at least); one tensor at a time is in memory."""
    import torch

    from agentforge.bits import tensor_bytes
    from agentforge.tensorfiles import WEIGHTS_INDEX, write_json, write_safetensors

    def bytes_of(names: dict[str, tuple[int, ...]]) -> int:
        return 2 * sum(math.prod(shape) for shape in names.values())

    rest, one = (bytes_of(shapes(layers, hidden, ffn)) for layers in (0, 1))
    layers = max(1, round((gigabytes * 1e9 - rest) / (one - rest)))
    generator = torch.Generator().manual_seed(0)

    def data(members: dict[str, tuple[int, ...]]) -> Iterator[memoryview]:
        for shape in members.values():
            values = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            yield tensor_bytes(values.to(torch.float16))

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers, hidden, ffn).items():
        if shards[-1] and bytes_of({**shards[-1], name: shape}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir(parents=True)
    weight_map = {}
    for k, members in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, [(name, torch.float16, shape) for name, shape in members.items()], data(members))
        weight_map.update(dict.fromkeys(members, file))
    write_json(folder / WEIGHTS_INDEX, {"metadata": {}, "weight_map": weight_map})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", "tie_word_embeddings": True}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    write_json(folder / "config.json", {**config, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS})
    return folder


def bound(model: Path) -> int:
    """Three times the largest tensor in float32, and 500 MB; from config.json alone."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    sizes = shapes(1, config["hidden_size"], config["intermediate_size"]).values()
    return 3 * 4 * max(math.prod(shape) for shape in sizes) + SLACK


def compress(model: Path, stage: str, out: Path) -> Row:
    """Compress by the command line with nothing of the model in memory: peak, seconds, bytes read and written."""
    forget(model)
    row: Row = {"stage": stage, "load": os.getloadavg()[0], "bound_bytes": bound(model)}
    command = [sys.executable, "-m", "agentforge", "compress", model, "--stage", stage, "--out", out, "--json"]
    _, used = bench.process(*command)
    sizes = {"model_bytes": model, "artifact_bytes": out}
    return row | used | {name: sum(f.stat().st_size for f in place.glob("*.safetensors")) for name, place in sizes.items()}


def forget(model: Path) -> None:
    """Have the kernel drop what it holds of the model's files."""
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(model: Path) -> dict[str, float]:
    """Bytes a second: the model read in order from the disk, and a file written and brought to it."""
    forget(model)
    start, count = time.perf_counter(), 0
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while part := opened.read(1 << 24):
                count += len(part)
    read = count / (time.perf_counter() - start)
    block, start = bytes(1 << 24), time.perf_counter()
    with open(model.with_name("probe"), "wb", buffering=0) as probe:
        for _ in range(PROBE_BYTES >> 24):
            probe.write(block)
        os.fsync(probe.fileno())
    written = (PROBE_BYTES >> 24 << 24) / (time.perf_counter() - start)
    model.with_name("probe").unlink()
    return {"read_rate": read, "write_rate": written}


def _cells(row: Row) -> list[str]:
    disk = row["read_bytes"] / row["read_rate"] + row["written_bytes"] / row["write_rate"]
    speed = row["model_bytes"] / row["seconds"] / 1e6
    cells = [row["stage"], f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['bound_bytes'] / 1e6:,.0f}", f"{row['seconds']:.0f}"]
    cells += [f"{row['cpu_seconds']:.0f}", f"{speed:.0f}", f"{row['read_bytes'] / 1e9:.1f}"]
    return [*cells, f"{row['written_bytes'] / 1e9:.1f}", f"{disk:.0f}", f"{row['load']:.1f}"]


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with what is needed to read them."""
    first = rows[0]
    text = f"""
        # Streaming

        A Llama of random half floats, {first["model_bytes"] / 1e9:.1f} GB, whose largest tensor has
        {(first["bound_bytes"] - SLACK) / 3e6:.0f} MB in float32, compressed by `agentforge compress` with its default number
        of workers. Bound: three times that tensor and 500 MB. Disk alone: the seconds that the bytes read and written take
        at the rates that the disk had just before ({first["read_rate"] / 1e6:.0f} MB/s read, {first["write_rate"] / 1e6:.0f}
        MB/s written before the first row). {first["machine"]}.
    """
    return bench.page(text, bench.table(COLUMNS, map(_cells, rows), "lr"))


def measure(gigabytes: float, folder: Path | None) -> list[Row]:
    """A row per stage.  The model is made in a process of its own, so that this one stays small."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="agentforge-streaming-", dir=folder) as work:
        model, out = Path(work) / "model", Path(work) / "out"
        bench.say("making the model ...")
        bench.apart(make, model, gigabytes)
        for stage in STAGES:
            bench.say(f"{stage} ...")
            measured = rates(model)
            rows.append({**compress(model, stage, out), **measured})
            shutil.rmtree(out)
    from agentforge.evaluation.measurement import environment

    about = environment()
    machine = f"{about['cpu']}, {os.cpu_count()} cores, torch {about['packages']['torch']}"
    return [{**row, "machine": machine, "agentforge": about["packages"].get("agentforge")} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    options = bench.options(arguments, __doc__, "reports/streaming", size=8.0, folder=None)
    rows = bench.read(options.out / "streaming.json") if options.report else measure(options.size, options.folder)
    bench.save(options.out, {"streaming.json": rows, "streaming.md": table(rows)})


if __name__ == "__main__":
    main()
