"""What a budget of bits buys: `agentforge fit` against every single stage, and against the tools that people use.

    python benchmarks/fit.py [--model smollm2-135m] [--bits 3.06 2.6] [--out reports/fit]
    python benchmarks/fit.py --bits 2.0 1.6 --recover 300 [--batch 8] [--work FOLDER]

Fits the model to each budget of bits a weight of its linear layers, and measures what is loaded back from disk.  Statistics
come from selftext alone; nothing is trained but with --recover, which trains the codes for so many steps on selftext, within
the same bits.  Killed, the same command goes on from the budgets that are done, and from the last look of a training.
Writes OUT/fit.json, OUT/fit.md and OUT/fit.png; `--report` measures nothing.

The single stages are the rows of reports/stages/stages.json, the same text, tokens and windows.  TOOLS were measured once on
the same model, text and tokens, weights dequantised into float32; GPTQ, auto-round and imatrix had seen some of WikiText-2's
validation split, which favours them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

import agentforge
from agentforge import stages
from agentforge.allocation import Budget, fit
from agentforge.evaluation import find_text
from agentforge.evaluation.measurement import peak_memory
from agentforge.models import open_model
from agentforge.statistics import Calibration, collect
from agentforge.tensorfiles import write_atomic
from agentforge.training.codelinear import MARGIN, SPAN
from agentforge.training.recover import Settings, schedule

BITS = (8.0, 4.2, 3.5, 3.06, 2.6, 2.0, 1.6, 1.0, 0.5, 0.25, 0.114)
# From 0.025 to 14 root mean squares: the default ladder, finer for 8 bits and coarser for what is left of a bit.
LADDER = tuple(stages.get("ecsq", step=round(0.6 * 2 ** (k / 2), 6)) for k in range(-12, 10))
TOKENS = 4094


class Tool(NamedTuple):
    """Bits a weight of the linear layers, and KL in nats a token on the same 4,094 tokens."""

    name: str
    bits: float
    kl: float


TOOLS = (
    Tool("HQQ 4, g64", 4.50, 0.197),
    Tool("HQQ 3, g64", 3.70, 2.08),
    Tool("HQQ 2, g64", 2.50, 10.2),
    Tool("optimum-quanto int4", 4.31, 0.437),
    Tool("optimum-quanto int2", 2.31, 11.9),
    Tool("bitsandbytes NF4, double quantised", 4.14, 0.253),
    Tool("auto-round 4, no tuning", 4.31, 0.320),
    Tool("auto-round 3, no tuning", 3.30, 1.34),
    Tool("auto-round 2, no tuning", 2.28, 10.9),
    Tool("GPTQ 3", 3.30, 0.842),
    Tool("GPTQ 2", 2.28, 6.58),
    Tool("llama.cpp Q3_K_M", 4.63, 0.140),
    Tool("llama.cpp Q2_K", 4.23, 0.405),
    Tool("llama.cpp IQ2_XS", 3.96, 0.388),
    Tool("llama.cpp Q3_K, merged rows", 3.44, 0.698),
    Tool("llama.cpp IQ3_XXS, imatrix, merged rows", 3.06, 0.613),
    Tool("llama.cpp Q2_K, imatrix, merged rows", 2.63, 1.20),
)
Row = dict[str, Any]


def recipe(model: Any, bits: float, text: str | None, tokens: int, recovery: Settings | None) -> Row:
    """What a row depends on."""
    found = find_text(text)
    return {
        "bits": bits,
        "model": model.fingerprint,
        "agentforge": agentforge.__version__,
        "ladder": [stage.step for stage in LADDER],
        "text": [found.name, found.split, found.sha256],
        "tokens": tokens,
        **({"recovery": asdict(recovery)} if recovery else {}),
    }


def measure(
    model: Any, bits: float, statistics: Any, text: str | None, tokens: int, recovery: Settings | None, work: Path
) -> Row:
    """Fit to one budget, in a folder of `work` that is gone afterwards."""
    place = work / (f"{bits:g}-recovered" if recovery else f"{bits:g}")
    start = time.perf_counter()
    try:
        found = fit(
            model,
            place,
            Budget(bits=bits),
            ladder=LADDER,
            statistics=statistics,
            recovery=recovery,
            text=text,
            tokens=tokens,
            overwrite=True,
        )
        history = json.loads((place / "history.json").read_text(encoding="utf-8"))["history"] if recovery else []
        looks = [{k: look[k] for k in ("step", "tokens", "kl", "stderr", "seconds")} for look in history]
        chosen: dict[str, list[float]] = {}
        for row in found.artifact.rows:
            if row["stage"]:
                kind = row["name"].split(".")[-2]
                chosen.setdefault(kind, []).append(row["bits"] / math.prod(row["shape"]))
        lost = sum(row["relative_error"] ** 2 * math.prod(row["shape"]) for row in found.artifact.rows if row["stage"])
        count = sum(math.prod(row["shape"]) for row in found.artifact.rows if row["stage"])
        return {
            "bits": found.bits,
            "predicted": found.predicted,
            "relative_error": math.sqrt(lost / count),
            "weight_bytes": found.artifact.weight_bytes,
            "ratios": [ratio.to_json() for ratio in found.artifact.ratios],
            "bits_by_layer": {kind: sum(found) / len(found) for kind, found in sorted(chosen.items())},
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_memory(),
            **({"history": looks} if recovery else {}),
            **{name: value.to_json() for name, value in found.measured._asdict().items()},
        }
    finally:
        if not place.with_name(place.name + ".training").exists():  # a training that was interrupted goes on from there
            shutil.rmtree(place, ignore_errors=True)


def singles(file: Path) -> list[tuple[str, float, float, float]]:
    """Stage, bits, KL and its standard error of each single stage; the accident of the base's own grid is left out."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    found = []
    for row in rows:
        if row["relative_error"] < 1e-3:
            continue
        settings = row["recipe"]["stage"]
        default = stages.get(settings["stage"]).to_json()
        changed = ",".join(f"{k}={v}" for k, v in settings.items() if k != "stage" and v != default[k])
        name = f"{settings['stage']}:{changed}" if changed else settings["stage"]
        found.append((name, row["bits"], row["kl"]["value"], row["kl"]["stderr"] or 0.0))
    return found


def report(rows: list[Row], others: list[tuple[str, float, float, float]]) -> str:
    """The tables and what they say."""
    trained = sorted((row for row in rows if "recovery" in row["recipe"]), key=lambda row: -row["bits"])
    rows = sorted((row for row in rows if "recovery" not in row["recipe"]), key=lambda row: -row["bits"])
    first = rows[0]
    protocol, base = first["kl"]["protocol"], first["original_perplexity"]
    lines = [
        "# What a budget of bits buys",
        "",
        f"smollm2-135m, dequantised Q4_1 (perplexity {_cell(base)}).  Bits are those of the planes on disk, a weight of "
        "the linear layers; embedding and norms are kept.  KL is KL(original || compressed) on "
        f"{first['kl']['n']:,} tokens of {protocol['text']}/{protocol['split']}, windows of {protocol['context']}; ± is one "
        "standard error.  Statistics: 8,192 tokens of selftext, backward passes on 2,048 of them; no training.  Touched: "
        "the planes against 32 bits a weight.",
        "",
        "| asked for | bits | touched | whole model against 16 bits | KL (nats a token) | predicted | perplexity | top-1 "
        "| accuracy kept |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        whole = next(r["ratio"] for r in row["ratios"] if r["what"] == "whole model")
        lines.append(
            f"| {row['recipe']['bits']:g} | {row['bits']:.3f} | {32 / row['bits']:.1f}x | {whole:.2f}x | {_cell(row['kl'])} "
            f"| {row['predicted']:.3g} | {_cell(row['perplexity'])} | {_cell(row['top1'])} | {_cell(row['retention'])} |"
        )
    lines += _recovered(rows, trained)
    lines += ["", "## Against everything else", ""]
    everything = [(f"`{name}`", bits, kl) for name, bits, kl, _ in others] + [(t.name, t.bits, t.kl) for t in TOOLS]
    for row in rows:
        kl, error = row["kl"]["value"], row["kl"]["stderr"] or 0.0
        better = [o for o in everything if o[1] <= row["bits"] + 0.005 and o[2] < kl]
        worse = sorted((o for o in everything if o[1] > row["bits"] and o[2] > kl + 2 * error), key=lambda o: -o[1])
        near = min((o for o in everything if o[1] >= row["bits"] - 0.005), key=lambda o: o[1], default=None)
        text = f"* {row['bits']:.2f} bits, KL {kl:.3g}: "
        text += "nothing of as many bits or fewer is better" if not better else f"worse than {_named(better[0])}"
        text += f"; {len(worse)} rows of more bits are worse" + (f", up to {_named(worse[0])}" if worse else "")
        if near is not None:
            text += f"; the next row of more bits, {_named(near)}, has {near[2] / kl:.2g} times the KL"
        lines.append(text + ".")
    lines += [
        "",
        "![KL against bits](fit.png)",
        "",
        "## Where the bits went",
        "",
        "Mean bits a weight of each kind of layer: what the prediction of damage says they are worth.",
        "",
        "| asked for | " + " | ".join(first["bits_by_layer"]) + " |",
        "|---:|" + "---:|" * len(first["bits_by_layer"]),
        *(
            f"| {row['recipe']['bits']:g} | " + " | ".join(f"{bits:.2f}" for bits in row["bits_by_layer"].values()) + " |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def _recovered(rows: list[Row], trained: list[Row]) -> list[str]:
    """What training the codes brought back, and which tools need more bits for it."""
    if not trained:
        return []
    lines = [
        "",
        "## With recovery",
        "",
        "Trained on selftext, by distillation from the original, are the norms, a gain a row (a half float, within the same "
        "bits) and, straight through their rounding, the codes.  " + "  ".join(dict.fromkeys(map(_travel, trained))),
        "",
        "| asked for | bits | tokens seen | minutes | KL untrained | KL trained | perplexity | top-1 | accuracy kept |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in trained:
        before = next((r for r in rows if r["recipe"]["bits"] == row["recipe"]["bits"]), None)
        last = row["history"][-1]
        lines.append(
            f"| {row['recipe']['bits']:g} | {row['bits']:.3f} | {last['tokens']:,} | {last['seconds'] / 60:.0f} "
            f"| {_cell(before['kl']) if before else '-'} | {_cell(row['kl'])} | {_cell(row['perplexity'])} "
            f"| {_cell(row['top1'])} | {_cell(row['retention'])} |"
        )
    lines.append("")
    for row in trained:
        kl = row["kl"]["value"]
        beaten = sorted((t for t in TOOLS if t.bits > row["bits"] and t.kl > kl), key=lambda t: -t.bits)
        ahead = sorted((t for t in TOOLS if t.kl <= kl), key=lambda t: t.bits)
        lines.append(
            f"* {row['bits']:.2f} bits, trained, KL {kl:.3g}: below "
            + ("; ".join(_named(t) for t in beaten) or "no tool of more bits")
            + f". The tool of fewest bits that is better: {_named(ahead[0]) if ahead else 'none'}."
        )
    return lines


def _travel(row: Row) -> str:
    """How far the codes of a row can have come."""
    training = row["recipe"]["recovery"]
    factors = (math.prod(schedule(step, training["steps"], training["warmup"])) for step in range(training["steps"]))
    path = training["lr"] * SPAN * sum(factors)
    text = f"In {training['steps']} steps the learning rates add up to {path:.2f} of a quantisation step; at the start no "
    text += f"latent value is nearer than {MARGIN:g} to the border of its code"
    return text + (": what is shown is the work of gains and norms." if path < MARGIN else ".")


def _cell(measured: Row) -> str:
    return f"{measured['value']:.4g} ± {measured['stderr'] or 0.0:.2g}"


def _named(other: tuple[str, float, float] | Tool) -> str:
    return f"{other[0]} ({other[1]:.2f} bits, {other[2]:.3g})"


def picture(rows: list[Row], others: list[tuple[str, float, float, float]]) -> bytes:
    """KL against bits a weight, on two logarithmic axes."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    families = sorted({name.partition(":")[0] for name, *_ in others})
    for family, marker in zip(families, "ovs^Dph", strict=False):
        points = [(bits, kl) for name, bits, kl, _ in others if name.partition(":")[0] == family]
        axes.plot(*zip(*points, strict=True), marker, ms=5, alpha=0.7, label=f"single stage: {family}")
    axes.plot([t.bits for t in TOOLS], [t.kl for t in TOOLS], "kx", ms=6, label="other tools")
    trained = sorted((row for row in rows if "recovery" in row["recipe"]), key=lambda row: row["bits"])
    rows = sorted((row for row in rows if "recovery" not in row["recipe"]), key=lambda row: row["bits"])
    if trained:
        points = [(row["bits"], row["kl"]["value"]) for row in trained]
        axes.plot(*zip(*points, strict=True), "mD-", ms=8, label="fit, then trained")
    bits, kl = [row["bits"] for row in rows], [row["kl"]["value"] for row in rows]
    spread = [2 * (row["kl"]["stderr"] or 0.0) for row in rows]
    axes.errorbar(bits, kl, spread, fmt="r*-", ms=10, capsize=3, label="fit (± 2 standard errors)")
    axes.plot(bits, [row["predicted"] for row in rows], "r:", label="fit, predicted to second order")
    axes.set(xscale="log", yscale="log", xlabel="bits a weight of the linear layers, on disk", ylabel="KL (nats a token)")
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8], ["1/8", "1/4", "1/2", "1", "2", "3", "4", "6", "8"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("Bits spent where they prevent damage, against the same bits everywhere")
    data = BytesIO()
    figure.savefig(data, dpi=110, metadata={"Software": None})
    return data.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fit a model to budgets of bits, and measure.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--bits", type=float, nargs="*", default=BITS)
    parser.add_argument("--stages", type=Path, default=Path("reports/stages/stages.json"))
    parser.add_argument("--out", type=Path, default=Path("reports/fit"))
    parser.add_argument("--recover", type=int, default=0, help="steps to train for; 0 trains nothing")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step of training")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "agentforge-fit")
    parser.add_argument("--report", action="store_true", help="write tables and picture again, measure nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "fit.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not options.report:
        model, statistics = open_model(options.model), None
        recovery = replace(Settings.of_codes(options.recover), batch=options.batch) if options.recover else None
        options.work.mkdir(parents=True, exist_ok=True)
        for bits in options.bits:
            wanted = recipe(model, bits, options.text, options.tokens, recovery)
            if any(row["recipe"] == wanted for row in rows):
                continue
            print(f"{bits} bits ...", file=sys.stderr, flush=True)
            statistics = statistics or collect(model, Calibration().for_stage(LADDER[0]))
            found = measure(model, bits, statistics, options.text, options.tokens, recovery, options.work)
            row = {"recipe": wanted, **found}
            same = {"bits": bits, "recovery": wanted.get("recovery")}
            rows = [r for r in rows if {key: r["recipe"].get(key) for key in same} != same] + [row]
            write_atomic(file, [json.dumps(rows, indent=1).encode() + b"\n"])
    others = singles(options.stages)
    write_atomic(options.out / "fit.md", [report(rows, others).encode()])
    write_atomic(options.out / "fit.png", [picture(rows, others)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
