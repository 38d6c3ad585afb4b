"""What a budget of bits buys: `agentforge fit` against every single stage, common tools, and no model at all.

    python benchmarks/fit.py [--model smollm2-135m] [--bits 3.06 2.6] [--out reports/fit]
    python benchmarks/fit.py --bits 2.0 1.6 --recover 300 [--batch 8] [--work FOLDER]

Fits the model to each budget of bits per weight of its linear layers, and measures what is loaded back from disk.
Statistics come from selftext alone; nothing is trained without --recover, which trains the codes for that many steps on
selftext, within the same bits.  Killed, the same command resumes after the finished budgets, and from the last look of a
training.  Writes OUT/fit.json, OUT/fit.md and OUT/fit.png; `--report` measures nothing.

Rows of others are those of --peers (made by `benchmarks/peers.py`) and of --stages (`benchmarks/stages.py`).  One table has
one protocol: a row of other tokens or windows than the budgets' is left out, and counted.
"""

from __future__ import annotations

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

import bench
import torch
from matplotlib.figure import Figure

import agentforge
from agentforge import stages
from agentforge.allocation import Budget, fit
from agentforge.artifact import Artifact
from agentforge.evaluation import find_text
from agentforge.evaluation.measurement import peak_memory
from agentforge.models import SAMPLED_TOKENS
from agentforge.opening import load, open_model
from agentforge.runtime import resident_bytes
from agentforge.statistics import Calibration, collect
from agentforge.training.recover import Settings, schedule
from agentforge.training.student import MARGIN, SPAN

BITS = (8.0, 4.2, 3.5, 3.06, 2.6, 2.0, 1.6, 1.0, 0.5, 0.25, 0.114)
# From 0.025 to 14 root mean squares: the default ladder, finer for 8 bits and coarser for what is left of a bit.
LADDER = tuple(stages.get("ecsq", step=round(0.6 * 2 ** (k / 2), 6)) for k in range(-12, 10))
TOKENS = SAMPLED_TOKENS  # as in the audit's own reports
ACCIDENT = 1e-4  # relative error below which few bits have found the weights' own grid
SAME = 0.005  # bits per weight that count as equal
SHOWN = 4  # rows that a sentence names
PROTOCOL = ("text", "split", "text_sha256", "context", "stride", "bos", "scored_tokens", "windows", "tokenizer")
Row = bench.Row


class Other(NamedTuple):
    """A row that budgets are compared with.  kind: single stage, tool, no model, fit.  bits, held: per weight of the linear
    layers, on disk and in memory (None: not measured).  row: its measurements.  reason: why it is not an ordinary row."""

    kind: str
    name: str
    bits: float
    held: float | None
    row: Row
    reason: str = ""

    @property
    def kl(self) -> float:
        """KL(original || this), nats per token."""
        return float(self.row["kl"]["value"])

    def __str__(self) -> str:
        return f"{self.name} ({self.bits:.2f} bits, KL {self.kl:.3g}{', ' + self.reason if self.reason else ''})"


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
        "context": model.sampled_context,
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
            "held_bits": 8 * _held(found.artifact) / count,
            "weight_bytes": found.artifact.weight_bytes,
            "ratios": [ratio.to_json() for ratio in found.artifact.ratios],
            "bits_by_layer": {kind: sum(found) / len(found) for kind, found in sorted(chosen.items())},
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_memory(),
            **({"history": looks} if recovery else {}),
            **{name: value.to_json() for name, value in found.measured._asdict().items()},
        }
    finally:
        if not place.with_name(place.name + ".training").exists():  # a training that was interrupted continues from there
            shutil.rmtree(place, ignore_errors=True)


def _held(artifact: Artifact) -> int:
    """Bytes of memory of the encoded layers while they compute from their planes."""
    module = load(artifact.path, runtime="packed").model
    with torch.inference_mode():
        module(input_ids=torch.tensor([[0]]), use_cache=False)  # what is made when it is first needed
    layers = dict(module.named_modules())
    return sum(resident_bytes(layers[row["name"].removesuffix(".weight")]) for row in artifact.rows if row["stage"])


def protocol(row: Row) -> tuple[Any, ...]:
    """What two rows of one table have in common."""
    return tuple(row["kl"]["protocol"].get(key) for key in PROTOCOL)


def others(stages_file: Path, peers_file: Path, like: tuple[Any, ...]) -> tuple[list[Other], list[str]]:
    """Every single stage and every peer that was measured by the protocol `like`; and what is to be said of the rest."""
    found, said, old = [], [], 0
    for row in bench.read(stages_file):
        if protocol(row) != like:
            old += 1
            continue
        reason = "the grid on which the base lies, found by accident" if row["relative_error"] < ACCIDENT else ""
        found.append(
            Other("single stage", f"`{stages.from_json(row['recipe']['stage']).brief()}`", row["bits"], None, row, reason)
        )
    if old:
        said.append(f"Of reports/stages {_count(old)} of other tokens or windows, left out.")
    failed = []
    for row in bench.read(peers_file):
        name, tool = row["recipe"]["name"], row["recipe"]["tool"]
        if "failed" in row:
            failed.append(f"{name} ({row['failed']})")
        elif protocol(row) == like:
            reason = "the base itself" if row.get("relative_error") == 0 else ""
            if not reason and row.get("relative_error", 1.0) < ACCIDENT:
                reason = "the grid on which the base lies"
            found.append(Other(tool, name.removeprefix("no model "), row["bits"], row["held_bits"], row, reason))
    if failed:
        said.append("Not measured: " + "; ".join(failed) + ".")
    return found, said


def report(rows: list[Row], found: list[Other], said: list[str]) -> str:
    """The tables and what they say."""
    trained = sorted((row for row in rows if "recovery" in row["recipe"]), key=lambda row: -row["bits"])
    rows = sorted((row for row in rows if "recovery" not in row["recipe"]), key=lambda row: -row["bits"])
    first = rows[0]
    how, base = first["kl"]["protocol"], first["original_perplexity"]
    lines = [
        "# What a budget of bits buys",
        "",
        f"smollm2-135m, dequantised Q4_1 (perplexity {_cell(base)}).  Bits are per weight of the linear layers: *on disk* "
        "those of the planes, *held* those in memory of layers that compute from them; embedding and norms stay.  KL is "
        f"KL(original || compressed) on {first['kl']['n']:,} tokens of {how['text']}/{how['split']}, in windows of "
        f"{how['context']} ({how['windows']}); [ ] holds the value of the whole text 95 times in 100.  Statistics: 8,192 "
        "tokens of selftext, backward passes on 2,048 of them; no training.  *Whole model*: all weight files, against 16 "
        "bits for every parameter, and against the file that the model came in; below 1 that file is the smaller one.",
        "",
        "| asked for | on disk | held | linear layers against 16 bits | whole model against 16 bits "
        "| whole model against its file | KL (nats per token) | predicted | perplexity | top-1 | accuracy kept |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        whole = [r for r in row["ratios"] if r["what"] == "whole model"]
        to_16 = next(r["ratio"] for r in whole if r["denominator"].endswith("at 16 bits"))
        to_file = next(r["ratio"] for r in whole if not r["denominator"].endswith("bits"))
        lines.append(
            f"| {row['recipe']['bits']:g} | {row['bits']:.3f} | {row['held_bits']:.2f} | {16 / row['bits']:.1f}x "
            f"| {to_16:.2f}x | {to_file:.2f}x | {_cell(row['kl'])} | {row['predicted']:.3g} | {_cell(row['perplexity'])} "
            f"| {_cell(row['top1'])} | {_cell(row['retention'])} |"
        )
    lines += _recovered(rows, trained, found)
    own = [Other("fit", f"fit to {row['recipe']['bits']:g} bits", row["bits"], row["held_bits"], row) for row in rows]
    everything = sorted([*found, *own], key=lambda o: (-o.bits, o.kl))
    lines += ["", "## Against everything else", "", *(f"* {line}" for line in verdicts(own, everything)), ""]
    lines += [f"* {text}" for text in said]
    lines += ["", "![KL against bits](fit.png)", "", "## Everything there is", ""]
    lines += ["| what | by | on disk | held | KL (nats per token) | perplexity | top-1 | accuracy kept | remark |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for o in everything:
        remark = "; ".join(text for text in (o.reason, o.row.get("note", "")) if text)
        held = "-" if o.held is None else f"{o.held:.2f}"
        cells = " | ".join(_cell(o.row[key]) if key in o.row else "-" for key in ("kl", "perplexity", "top1", "retention"))
        lines.append(f"| {o.name} | {o.kind} | {o.bits:.3f} | {held} | {cells} | {remark} |")
    lines += [
        "",
        "How the rows of tools were made (`python benchmarks/peers.py`):",
        "",
        "| what | version | command | seed | calibrated on |",
    ]
    lines += ["|---|---|---|---:|---|"]
    for o in sorted((o for o in found if "command" in o.row), key=lambda o: o.name):
        made = o.row["recipe"]
        shown = made["calibration"]
        text = f"{shown['tokens']:,} tokens of {shown['text']}, windows of {shown['context']}" if shown else "-"
        lines.append(f"| {o.name} | {made['version'] or '-'} | {o.row['command']} | {made['seed']} | {text} |")
    lines += [
        "",
        "## Where the bits went",
        "",
        "Mean bits per weight of each kind of layer: what the prediction of damage says they are worth.",
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


def verdicts(own: list[Other], everything: list[Other]) -> list[str]:
    """For each budget what is better with as many bits or fewer, of all rows there are; first what holds for all of them."""
    lines, alone = [], 0
    for mine in own:
        rest = [o for o in everything if o is not mine]
        better = [o for o in rest if o.bits <= mine.bits + SAME and o.kl < mine.kl]
        beaten = [o for o in rest if o.kind != "fit" and o.bits > mine.bits + SAME and _apart(mine, o)]
        alone += not better
        text = (
            f"better with as many bits or fewer: {_named(better, mine)}"
            if better
            else "nothing of as many bits or fewer is better"
        )
        text += f"; worse with more bits: {_count(len(beaten))}"
        lines.append(f"{mine.bits:.2f} bits, KL {mine.kl:.3g}: {text}{f', up to {beaten[0]}' if beaten else ''}.")
    lines.insert(
        0, f"**For {alone} of {len(own)} budgets nothing of as many bits or fewer is better; the others say what is.**"
    )
    nothing = min((o for o in everything if o.bits == 0), key=lambda o: o.kl, default=None)
    if nothing is None:
        return lines
    some = [o for o in everything if o.bits > 0]
    worse = [o for o in some if o.kl > nothing.kl]
    least = min((o.bits for o in some if o.kl <= nothing.kl), default=math.inf)
    below = [o for o in worse if o.bits < least]
    text = f"**A model of no bits, {nothing.name}, has KL {nothing.kl:.3g}"
    text += "".join(f" ({o.name}: {o.kl:.3g})" for o in everything if o.bits == 0 and o is not nothing)
    text += f" and keeps {_cell(nothing.row['retention'])} of the accuracy.  "
    if below:
        text += f"Everything of fewer than {least:.2f} bits loses to it: {_count(len(below))}."
    if more := [o for o in worse if o not in below]:
        text += f"  So {'does' if len(more) == 1 else 'do'} {_count(len(more))} of as many bits or more, up to {more[0]}."
    text += "**"
    return [*lines, text]


def _count(number: int) -> str:
    return f"{number} row{'s' if number != 1 else ''}"


def _apart(better: Other, worse: Other) -> bool:
    """Whether the two 95% intervals of KL do not touch."""
    return bench.measurement(better.row["kl"]).bounds[1] < bench.measurement(worse.row["kl"]).bounds[0]


def _named(better: list[Other], mine: Other) -> str:
    """The best of them by name, and which cannot be told from `mine`."""
    best = sorted(better, key=lambda o: o.kl)
    words = [f"{o}{'' if _apart(o, mine) else ', within the errors'}" for o in best[:SHOWN]]
    return "; ".join(words) + (f"; and {len(best) - SHOWN} more" if len(best) > SHOWN else "")


def _recovered(rows: list[Row], trained: list[Row], found: list[Other]) -> list[str]:
    """What training the codes brought back, and which tools need more bits for it."""
    if not trained:
        text = "None was measured on these windows, so none stands here: `python benchmarks/fit.py --recover 24` takes them."
        return ["", "## With recovery", "", text]
    lines = [
        "",
        "## With recovery",
        "",
        "Trained on selftext, by distillation from the original, are the norms, a gain per row (a half float, within the "
        "same bits) and, straight through their rounding, the codes.  " + "  ".join(dict.fromkeys(map(_travel, trained))),
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
    tools = [o for o in found if o.kind not in ("single stage", "no model")]
    for row in trained:
        mine = Other("fit", "trained", row["bits"], None, row)
        beaten = sorted((o for o in tools if o.bits > mine.bits and o.kl > mine.kl), key=lambda o: -o.bits)
        ahead = min((o for o in tools if o.kl <= mine.kl), key=lambda o: o.bits, default=None)
        lines.append(
            f"* {mine.bits:.2f} bits, trained, KL {mine.kl:.3g}: below "
            f"{'; '.join(map(str, beaten)) or 'no tool of more bits'}. "
            f"The tool of fewest bits that is better: {ahead or 'none'}."
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
    low, high = bench.measurement(measured).bounds
    return f"{measured['value']:.3g} [{low:.3g}, {high:.3g}]"


def picture(rows: list[Row], found: list[Other]) -> bytes:
    """KL against bits per weight, on two logarithmic axes; what is off them stands at their edge."""
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    least, most = 1e-4, 60.0
    kinds = sorted(
        {(o.kind, o.name.strip("`").partition(":")[0] if o.kind == "single stage" else "") for o in found if o.bits}
    )
    for number, (kind, family) in enumerate(kinds):
        mine = [o for o in found if o.kind == kind and (not family or o.name.strip("`").partition(":")[0] == family)]
        x, y = [o.bits for o in mine], [max(o.kl, least) for o in mine]
        stage = kind == "single stage"
        label, marker = (f"single stage: {family}", "ovs^DphP<"[number % 9]) if stage else (kind, "XPdDH8"[number % 6])
        axes.plot(x, y, marker, ms=6 if stage else 9, alpha=0.55 if stage else 1, color=f"C{number % 10}", label=label)
    off = [f"{o.name.strip('`')}, {o.bits:.2f} bits: KL {o.kl:.1g}" for o in found if o.bits and o.kl < least]
    if off:
        axes.text(0.02, 0.02, "\n".join(["below the scale:", *off]), transform=axes.transAxes, fontsize=10)
    for o in found:
        if not o.bits:
            axes.axhline(o.kl, color="black", lw=1.5, ls="--" if o.name == "uniform" else "-.", label=f"0 bits: {o.name}")
    plain = sorted((row for row in rows if "recovery" not in row["recipe"]), key=lambda row: row["bits"])
    trained = sorted((row for row in rows if "recovery" in row["recipe"]), key=lambda row: row["bits"])
    for some, style, label in (
        (plain, "r*-", "agentforge fit (bars: 95%)"),
        (trained, "mD-", "agentforge fit, then trained"),
    ):
        if some:
            kl = [row["kl"]["value"] for row in some]
            low, high = zip(*(bench.measurement(row["kl"]).bounds for row in some), strict=True)
            bars = [[v - a for v, a in zip(kl, low, strict=True)], [b - v for v, b in zip(kl, high, strict=True)]]
            axes.errorbar([row["bits"] for row in some], kl, bars, fmt=style, ms=11, capsize=3, label=label)
    predicted = [row["predicted"] for row in plain]
    axes.plot([row["bits"] for row in plain], predicted, "r:", label="agentforge fit, as it predicts itself")
    axes.set(xscale="log", yscale="log", ylim=(least / 1.3, most))
    axes.set_xlabel("bits per weight of the linear layers, on disk", fontsize=12)
    axes.set_ylabel("KL from the original (nats per token)", fontsize=12)
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8], ["1/8", "1/4", "1/2", "1", "2", "3", "4", "6", "8"], fontsize=12)
    axes.tick_params(axis="y", labelsize=12)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    axes.set_title("Bits spent where they prevent damage,\nagainst the same bits everywhere", fontsize=14)
    data = BytesIO()
    figure.savefig(data, dpi=120, metadata={"Software": None})
    return data.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = bench.parser("Fit a model to budgets of bits, and measure.", "reports/fit")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--bits", type=float, nargs="*", default=BITS)
    parser.add_argument("--stages", type=Path, default=Path("reports/stages/stages.json"))
    parser.add_argument("--peers", type=Path, default=Path("reports/fit/peers.json"))
    parser.add_argument("--recover", type=int, default=0, help="steps to train for; 0 trains nothing")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens per training step")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "agentforge-fit")
    parser.add_argument("--report", action="store_true", help="write tables and picture again, measure nothing")
    options = parser.parse_args(arguments)
    rows = [
        row for row in bench.read(options.out / "fit.json") if row["recipe"].get("context")
    ]  # rows without were taken on the first tokens alone
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
            bench.save(options.out, {"fit.json": rows})
    rows = [row for row in rows if protocol(row) == protocol(rows[-1])]
    found, said = others(options.stages, options.peers, protocol(rows[0]))
    bench.save(options.out, {"fit.md": report(rows, found, said), "fit.png": picture(rows, found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
