"""Does everything give on a GPU what it gives on the CPU, and how fast is it there?

    python benchmarks/gpu_check.py                      the default model, from AGENTFORGE_CACHE or the user's cache folder
    python benchmarks/gpu_check.py my-model/            any folder or GGUF file that `open_model` takes; no network is asked

Each check runs on the CPU and on the GPU.  What came out is compared with tolerances, which were fixed before any GPU ran
this; planes have to be the same bits.  Speeds are those of the GPU, as a share of a limit that is measured there first: the
operations per second of a large float32 product, or bytes per second of a copy.  Generation and the ternary kernel count the
bytes of the weights that a token reads.  Times are of single runs after a warm-up on a smaller size, or the best of five
if a run takes milliseconds.  It takes some minutes, most of them the CPU's.

Exit code 0: all within tolerance, 1: not all, 2: there is no GPU, or the model cannot be opened.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import say, table

from agentforge import compress, evaluation, load, open_model, stages
from agentforge.errors import AgentForgeError
from agentforge.models import LanguageModel
from agentforge.runtime import TernaryLinear
from agentforge.statistics import Calibration, InputStatistics, collect
from agentforge.training.recover import Settings, recover

ENCODED = ("seedlm:bits=4", "seedlm:bits=4,weighted=true", "vptq:bits=3", "vptq:bits=2,outliers=0.02")
DECODED = ("rounding:bits=4,group=64", "vptq:bits=3")
PROMPT = "The history of the city begins"
COLUMNS = "check | CPU | GPU | difference | tolerance | ok | CPU s | GPU s | GPU's speed, of its limit"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.  tokens: of statistics and likelihoods.  backward: of backward passes.  window: tokens per
    training step.  steps: of training.  weights: matrices that are encoded.  side: rows and columns of the ternary matrix.
    new_tokens: to generate.  limit: rows and columns of the product, and of the copy, that the limits come from."""

    tokens: int = 1024
    backward: int = 512
    window: int = 256
    steps: int = 5
    weights: int = 3
    side: int = 4096
    new_tokens: int = 24
    limit: int = 8192


class Seen(NamedTuple):
    """What a check gave on one device.  value: for the table.  compared: tensors by name, or hashes.  seconds: it took.
    work: operations, or bytes, in that time.  unit: "op/s" or "B/s"."""

    value: float
    compared: dict[str, torch.Tensor | str]
    seconds: float
    work: float
    unit: str


@dataclass(frozen=True)
class Bench:
    """What the checks share.  statistics: of the CPU, so that both devices encode with the same."""

    model: LanguageModel
    sizes: Sizes
    folder: Path
    statistics: dict[str, InputStatistics]

    @property
    def operations(self) -> float:
        """Of a forward pass of one token: two per parameter."""
        return 2.0 * self.model.parameters

    def calibration(self, device: str, backward: int = 0) -> Calibration:
        context = min(self.sizes.tokens, self.model.usual_context)
        return Calibration("selftext", max(self.sizes.tokens, backward), context, backward, device)


def synchronised(device: str) -> float:
    """The time, when all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], device: str, runs: int = 1) -> tuple[Any, float]:
    """The result, and the seconds of the fastest of `runs` runs."""
    times = []
    for _ in range(runs):
        start = synchronised(device)
        result = work()
        times.append(synchronised(device) - start)
    return result, min(times)


def statistics(bench: Bench, device: str) -> Seen:
    found, seconds = timed(lambda: collect(bench.model, bench.calibration(device), progress=False), device)
    hessians: dict[str, torch.Tensor | str] = {name: about.hessian for name, about in found.items()}
    inner = sum(about.hessian.numel() for about in {id(s.hessian): s for s in found.values()}.values())
    mean = sum(float(about.diagonal.mean()) for about in found.values()) / len(found)
    return Seen(mean, hessians, seconds, bench.sizes.tokens * (bench.operations + 2.0 * inner), "op/s")


def sensitivity(bench: Bench, device: str) -> Seen:
    calibration = bench.calibration(device, bench.sizes.backward)
    found, seconds = timed(lambda: collect(bench.model, calibration, progress=False), device)
    curvatures = {name: about.sensitivity for name, about in found.items() if about.sensitivity is not None}
    mean = sum(float(g.mean()) for g in curvatures.values()) / len(curvatures)
    work = (calibration.tokens + 2 * bench.sizes.backward) * bench.operations
    return Seen(mean, dict(curvatures), seconds, work, "op/s")


def encode(bench: Bench, device: str, spec: str) -> Seen:
    stage, weights = stages.parse(spec), bench.model.weights()[: bench.sizes.weights]
    dense = {w.name: w.load().to(device, torch.float32) for w in weights}

    def work() -> dict[str, Any]:
        return {name: stage.encode(weight, bench.statistics[name], name=name) for name, weight in dense.items()}

    if torch.device(device).type == "cuda":
        work()  # compiles the kernels
    found, seconds = timed(work, device)
    bits = sum(packed.bits for packed in found.values()) / sum(w.numel() for w in dense.values())
    hashes = {name: packed.sha256 for name, packed in found.items()}
    return Seen(bits, hashes, seconds, sum(w.nbytes for w in dense.values()), "B/s")


def decode(bench: Bench, device: str, spec: str) -> Seen:
    """As training decodes: from integer planes, and float planes on the device."""
    stage, weight = stages.parse(spec), bench.model.weights()[0]
    packed = stage.encode(weight.load().to(torch.float32), bench.statistics[weight.name], name=weight.name)
    floats = {name: values.to(device) for name, values in packed.floats.items()}
    stage.dense(packed, floats)
    found, seconds = timed(lambda: stage.dense(packed, floats), device, runs=5)
    return Seen(float(found.norm()), {weight.name: found.cpu()}, seconds, found.nbytes, "B/s")


def likelihood(bench: Bench, device: str, which: str) -> Seen:
    made = compress(bench.model, "rounding:bits=4,group=64", bench.folder / "rounded", progress=False)
    small, model = load(made.path).on(device), bench.model.on(device)
    how = {"tokens": bench.sizes.tokens - 1, "context": min(bench.sizes.tokens, model.usual_context), "progress": False}
    text = evaluation.find_text("selftext", "heldout")

    def work() -> Any:
        if which == "perplexity":
            return evaluation.perplexity(model, text, **how)
        return evaluation.divergence(small, model, text, **how).kl

    found, seconds = timed(work, device)
    passes = 1 if which == "perplexity" else 2
    return Seen(found.value, {which: torch.tensor(found.value)}, seconds, passes * found.n * bench.operations, "op/s")


def recovery(bench: Bench, device: str) -> Seen:
    steps, window = bench.sizes.steps, bench.sizes.window
    settings = Settings(steps=steps, batch=1, context=window, evaluate=steps, heldout=window, dtype="float32")
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    last = recover(bench.model, out, settings=settings, device=device, overwrite=True, progress=False).history[-1]
    # The teacher's pass, and three times as much for the student's two.
    work = 4.0 * bench.operations * steps * window
    return Seen(last["loss"], {"loss": torch.tensor(last["loss"])}, last["seconds"], work, "op/s")


def ternary_kernel(bench: Bench, device: str, tokens: int) -> Seen:
    generator, side = torch.Generator().manual_seed(0), bench.sizes.side
    linear = torch.nn.Linear(side, side, bias=False)
    linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
    layer = TernaryLinear.from_linear(linear).to(device)
    x = torch.randn(tokens, side, generator=generator).to(device)
    with torch.inference_mode():
        layer(x)
        y, seconds = timed(lambda: layer(x), device, runs=5)
    return Seen(float(y.norm()), {"y": y.cpu()}, seconds, side**2 / 4, "B/s")


def generation(bench: Bench, device: str, form: str) -> Seen:
    """Greedy, batch 1, tokens per second.  The packed form is ternary, the others are the original."""
    if form == "packed":
        made = compress(bench.model, "ternary:packing=2bit", bench.folder / "ternary", progress=False)
        module = load(made.path, runtime="packed").on(device).model
    else:
        module = open_model(bench.model.path).model.to(device, getattr(torch, form))
    module.generation_config.eos_token_id = None  # go on to the last token
    ids, tokens = bench.model.tokenizer(PROMPT, return_tensors="pt").input_ids.to(device), bench.sizes.new_tokens

    def run(tokens: int) -> Any:
        return module.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    with torch.inference_mode():
        logits = module(input_ids=ids).logits.float().cpu()
        run(2)
        _, seconds = timed(lambda: run(tokens), device)
    held = {t.data_ptr(): t.nbytes for t in [*module.parameters(), *module.buffers()]}
    return Seen(tokens / seconds, {"logits": logits}, seconds, tokens * sum(held.values()), "B/s")


def checks() -> list[tuple[str, float, Callable[[Bench, str], Seen]]]:
    """Name, tolerance and function of every check.

    A tolerance is the largest difference that passes: |GPU - CPU| / |CPU|, of the worst layer if there are several.
    """
    return [
        ("statistics H", 1e-3, statistics),  # float32 sums in another order, through all layers
        ("sensitivity", 1e-2, sensitivity),  # the same, backwards; a token drawn at a border may be its neighbour
        *((f"encode {spec}", 0.0, partial(encode, spec=spec)) for spec in ENCODED),  # share of planes with other bits
        *((f"decode {spec}", 1e-6, partial(decode, spec=spec)) for spec in DECODED),
        ("perplexity", 1e-4, partial(likelihood, which="perplexity")),
        ("KL divergence", 1e-3, partial(likelihood, which="KL divergence")),
        ("recovery, last loss", 2e-2, recovery),  # rounding to -1, 0, +1 amplifies the sums' order
        *((f"ternary kernel, {n} tokens", 1e-6, partial(ternary_kernel, tokens=n)) for n in (1, 32)),  # one rounding
        ("generation, packed", 5e-2, partial(generation, form="packed")),  # activations round to another of 255 values
        ("generation, bfloat16", 5e-2, partial(generation, form="bfloat16")),  # of the first logits
        ("generation, float16", 1e-2, partial(generation, form="float16")),
    ]


def difference(cpu: Seen, gpu: Seen) -> float:
    """Share of hashes that differ, or the largest relative difference of any tensor; infinite if names differ."""
    if cpu.compared.keys() != gpu.compared.keys():
        return math.inf
    pairs = [(a, gpu.compared[name]) for name, a in cpu.compared.items()]
    if isinstance(pairs[0][0], str):
        return sum(a != b for a, b in pairs) / len(pairs)
    found = [float((b.double() - a.double()).norm() / a.double().norm().clamp(min=1e-30)) for a, b in pairs]
    return math.inf if any(map(math.isnan, found)) else max(found)


def limits(device: str, size: int) -> dict[str, float]:
    """Operations per second of a float32 product, and bytes per second that a copy reads and writes."""
    a = torch.ones(size, size, device=device)
    b = torch.empty_like(a)
    torch.mm(a, a, out=b)
    _, product = timed(lambda: torch.mm(a, a, out=b), device, runs=3)
    _, copy = timed(lambda: b.copy_(a), device, runs=5)
    return {"op/s": 2.0 * size**3 / product, "B/s": 2.0 * a.nbytes / copy}


def row(name: str, tolerance: float, check: Callable[[Bench, str], Seen], bench: Bench, device: str, most: Any) -> list[str]:
    """A line of the table; a check that breaks down says so in it."""
    try:
        cpu, gpu = check(bench, "cpu"), check(bench, device)
    except Exception as error:  # of whatever kind: the other checks still run
        return [name, "", "", "", f"{tolerance:g}", f"no: {type(error).__name__}: {str(error)[:90]}", "", "", ""]
    off, speed, limit = difference(cpu, gpu), gpu.work / gpu.seconds, most[gpu.unit]
    cells = [
        name,
        f"{cpu.value:.5g}",
        f"{gpu.value:.5g}",
        f"{off:.2g}",
        f"{tolerance:g}",
        "yes" if off <= tolerance else "no",
    ]
    cells += [f"{cpu.seconds:.3g}", f"{gpu.seconds:.3g}"]
    return [*cells, f"{speed / 1e9:.4g} G{gpu.unit}, {speed / limit:.1%} of {limit / 1e9:,.0f}"]


def run(model: LanguageModel, device: str, sizes: Sizes) -> list[list[str]]:
    """All checks, one row each."""
    most, rows = limits(device, sizes.limit), []
    with tempfile.TemporaryDirectory(prefix="agentforge-gpu-") as folder:
        bench = Bench(model, sizes, Path(folder), {})
        bench.statistics.update(collect(model, bench.calibration("cpu"), progress=False))
        for name, tolerance, check in checks():
            say(name)
            rows.append(row(name, tolerance, check, bench, device, most))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything on the GPU, beside the CPU.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; run it on a machine that has one", file=sys.stderr)
        return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        model = open_model(options.model)
    except AgentForgeError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    rows = run(model, "cuda", Sizes())
    print(f"{model.name} on {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(table(COLUMNS, rows, "lrrrrlrrl"))
    passed = sum(line[5] == "yes" for line in rows)
    print(f"{passed} of {len(rows)} checks within tolerance; {time.perf_counter() - start:.0f} s")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
