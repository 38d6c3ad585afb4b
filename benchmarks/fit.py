"""What a budget of bits buys: `agentforge fit` against every single stage, common tools, and no model at all.

    python benchmarks/fit.py [--model smollm2-135m] [--bits 3.06 2.6] [--work FOLDER] [--out reports/fit]
    python benchmarks/fit.py --bits 2.0 1.6 --recover 300 [--batch 8]
    python benchmarks/fit.py --bits 3.06 2.6 2.0 1.6 --calibration 8192
    python benchmarks/fit.py --whole 80 --whole 60 --whole 50
    python benchmarks/fit.py --bits 3.06 2.6 2.0 1.6 --sequential

Fits the model to each budget of bits per weight of its linear layers, and measures what is loaded back from disk; --whole:
to megabytes of all weight files, with settings for embedding and head, too; --calibration: with statistics of so many tokens
(other tools read 8,192); --sequential: layer by layer; --recover
trains the codes for that many steps, and a training that was interrupted goes on with the same command.  Rows of others are
those of --peers (made by `benchmarks/peers.py`) and of --stages (`benchmarks/stages.py`).  One table has one protocol: a row
of other tokens or windows than the budgets' is left out, and counted.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import bench
import ratios
import torch
from matplotlib.figure import Figure

from agentforge import __version__, load, open_model, stages
from agentforge.allocation import FINER, Budget, fit
from agentforge.artifact import Artifact
from agentforge.evaluation import find_text
from agentforge.evaluation.measurement import peak_memory
from agentforge.models import SAMPLED_TOKENS
from agentforge.runtime import resident_bytes
from agentforge.statistics import FOR_FIT, Calibration, collect
from agentforge.training.recover import Settings

BITS = [8.0, 4.2, 3.5, 3.06, 2.6, 2.0, 1.6, 1.0, 0.5, 0.25, 0.114]
# From 0.009 to 14 root mean squares: finer than the default ladder for 8 bits, coarser for what is left of a bit.
LADDER = tuple(stages.get("tcq", step=round(0.6 * 2 ** (k / 2), 6)) for k in range(-12, 10))
ACCIDENT = 1e-4  # relative error below which few bits have found the weights' own grid
SAME = 0.005  # bits per weight that count as equal
SHOWN = 4  # rows that a sentence names
PROTOCOL = ("text", "split", "text_sha256", "context", "stride", "bos", "scored_tokens", "windows", "tokenizer")
KEPT = "KL (nats per token) | perplexity | top-1 | accuracy kept"
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


def recipe(model: Any, limit: Row, options: argparse.Namespace) -> Row:
    """What a row depends on.  limit: bits, or bytes of all weight files."""
    found = find_text(options.text)
    about = limit | {"model": model.fingerprint, "agentforge": __version__, "ladder": [s.brief() for s in LADDER]}
    about["text"] = [found.name, found.split, found.sha256]
    about |= {"tokens": options.tokens, "context": model.sampled_context}
    about |= {"calibration": _calibration(options).to_json(), "heads": True, "finer": FINER}
    about |= {"sequential": True} if options.sequential else {}
    return about | ({"recovery": asdict(_recovery(options))} if options.recover else {})


def _calibration(options: argparse.Namespace) -> Calibration:
    return replace(FOR_FIT, tokens=options.calibration).for_stage(LADDER[0])


def _recovery(options: argparse.Namespace) -> Settings:
    return replace(Settings.of_codes(options.recover), batch=options.batch)


def measure(model: Any, statistics: Any, wanted: Row, options: argparse.Namespace) -> Row:
    """Fit to one budget, in a folder of --work that is gone afterwards."""
    limit = {key: wanted[key] for key in ("bits", "bytes") if key in wanted}
    name = " ".join(f"{value} {key}" for key, value in limit.items())
    start, place = time.perf_counter(), options.work / f"{name}{'-recovered' if options.recover else ''}"
    try:
        how = {"ladder": LADDER, "statistics": statistics, "text": options.text, "tokens": options.tokens}
        how["recovery"] = _recovery(options) if options.recover else None
        how |= {"embeddings": None if "bytes" in limit else "keep", "sequential": options.sequential}
        found = fit(model, place, Budget(**limit), overwrite=True, **how)
        artifact = found.artifact
        encoded = [(row, math.prod(row["shape"])) for row in artifact.rows if row["stage"]]
        chosen: dict[str, list[float]] = {}
        for row, size in encoded:
            chosen.setdefault(row["name"].split(".")[-2], []).append(row["bits"] / size)
        count, lost = sum(size for _, size in encoded), sum(row["relative_error"] ** 2 * size for row, size in encoded)
        made = {"bits": found.bits, "predicted": found.predicted, "relative_error": math.sqrt(lost / count)}
        made |= {"held_bits": 8 * _held(artifact) / count, "weight_bytes": artifact.weight_bytes}
        made["ratios"] = [ratio.to_json() for ratio in artifact.ratios]
        made["bits_by_layer"] = {kind: sum(found) / len(found) for kind, found in sorted(chosen.items())}
        made |= {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory()}
        if options.recover:
            looks = bench.read(place / "history.json")["history"]
            shown = ("step", "tokens", "kl", "stderr", "seconds", "cpu_seconds")
            made["history"] = [{key: look[key] for key in shown} for look in looks]
        return made | bench.to_json(found.measured)
    finally:
        if not place.with_name(place.name + ".partial").exists():  # a training that was interrupted continues from there
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
    rows, peers = bench.read(stages_file), bench.read(peers_file)
    found, said = [], []
    for row in (row for row in rows if protocol(row) == like):
        reason = "the grid on which the base lies, found by accident" if row["relative_error"] < ACCIDENT else ""
        name = f"`{stages.from_json(row['recipe']['stage']).brief()}`"
        found.append(Other("single stage", name, row["bits"], None, row, reason))
    if old := len(rows) - len(found):
        said.append(f"Of reports/stages {_count(old)} of other tokens or windows, left out.")
    for row in (row for row in peers if "failed" not in row and protocol(row) == like):
        error = row.get("relative_error", 1.0)
        reason = "the base itself" if error == 0 else "the grid on which the base lies" if error < ACCIDENT else ""
        name = row["recipe"]["name"].removeprefix("no model ")
        found.append(Other(row["recipe"]["tool"], name, row["bits"], row["held_bits"], row, reason))
    if failed := [f"{row['recipe']['name']} ({row['failed']})" for row in peers if "failed" in row]:
        said.append("Not measured: " + "; ".join(failed) + ".")
    return found, said


def _kept(row: Row) -> list[str]:
    """What is left of the model."""
    return [bench.with_interval(row[key]) if key in row else "-" for key in ("kl", "perplexity", "top1", "retention")]


def _budget(row: Row) -> list[str]:
    whole = {r["denominator"]: r["ratio"] for r in row["ratios"] if r["what"] == "whole model"}
    to_16 = next(ratio for what, ratio in whole.items() if what.endswith("at 16 bits"))
    to_file = next(ratio for what, ratio in whole.items() if not what.endswith("bits"))
    cells = [f"{row['recipe']['bits']:g}", f"{row['bits']:.3f}", f"{row['held_bits']:.2f}", f"{16 / row['bits']:.1f}x"]
    kl, *kept = _kept(row)
    return [*cells, f"{to_16:.2f}x", f"{to_file:.2f}x", kl, f"{row['predicted']:.3g}", *kept]


def _compared(o: Other) -> list[str]:
    remark = "; ".join(text for text in (o.reason, o.row.get("note", "")) if text)
    return [o.name, o.kind, f"{o.bits:.3f}", "-" if o.held is None else f"{o.held:.2f}", *_kept(o.row), remark]


def _made(o: Other) -> list[str]:
    made = o.row["recipe"]
    shown = made["calibration"]
    text = f"{shown['tokens']:,} tokens of {shown['text']}, windows of {shown['context']}" if shown else "-"
    return [o.name, made["version"] or "-", o.row["command"], str(made["seed"]), text]


def _whole(row: Row) -> list[str]:
    head = row["bits_by_layer"].get("embed_tokens", row["bits_by_layer"].get("lm_head", math.nan))
    return [f"{row['weight_bytes'] / 1e6:.2f}", f"{row['bits']:.3f}", f"{head:.2f}", *_kept(row)]


def _smallest(whole: Sequence[Row]) -> str:
    """The smallest file that keeps what the documentation promises of 280x."""
    kept = [row for row in whole if ratios.decide(row) == "holds"]
    if not kept:
        return ""
    row = min(kept, key=lambda row: row["weight_bytes"])
    ratio = next(r["ratio"] for r in row["ratios"] if r["what"] == "whole model" and r["denominator"].endswith("at 32 bits"))
    text = f"Of these, {row['weight_bytes'] / 1e6:.0f} MB is the smallest that keeps {ratios.PROMISE:.0%} of the accuracy, "
    return f"{text}with its whole 95% interval: {ratio:.1f}x against 32 bits for every parameter."


def report(
    rows: list[Row],
    found: list[Other],
    said: list[str],
    whole: Sequence[Row] = (),
    less: Sequence[Row] = (),
    ordered: Sequence[Row] = (),
) -> str:
    """The tables and what they say.  less: rows with less calibration text.  ordered: of `fit --sequential`."""
    files = map(_whole, sorted(whole, key=lambda row: -row["weight_bytes"]))
    trained = sorted((row for row in rows if "recovery" in row["recipe"]), key=lambda row: -row["bits"])
    rows = sorted((row for row in rows if "recovery" not in row["recipe"]), key=lambda row: -row["bits"])
    first = rows[0]
    how, layers = first["kl"]["protocol"], first["bits_by_layer"]
    earlier = _earlier([*rows, *trained, *whole])
    own = [Other("fit", f"fit to {row['recipe']['bits']:g} bits", row["bits"], row["held_bits"], row) for row in rows]
    everything = sorted([*found, *own], key=lambda o: (-o.bits, o.kl))
    tools = sorted((o for o in found if "command" in o.row), key=lambda o: o.name)
    by_layer = [[f"{row['recipe']['bits']:g}", *(f"{b:.2f}" for b in row["bits_by_layer"].values())] for row in rows]
    head = (
        "asked for | on disk | held | linear layers against 16 bits | whole model against 16 bits | whole model against its "
        "file | KL (nats per token) | predicted | perplexity | top-1 | accuracy kept"
    )
    kept = f"on disk | held | {KEPT}"
    amounts = ("8,192 tokens", f"{FOR_FIT.tokens:,}")
    by_text = " | ".join(["asked for", *(f"{what}, {n}" for what in ("KL", "perplexity") for n in amounts)])
    text = f"""
        # What a budget of bits buys

        smollm2-135m, dequantised Q4_1 (perplexity {bench.with_interval(first["original_perplexity"])}).  Bits are per
        weight of the linear layers: *on disk* those of the planes, *held* those in memory of layers that compute from them;
        embedding and norms stay.  KL is KL(original || compressed) on {first["kl"]["n"]:,} tokens of
        {how["text"]}/{how["split"]}, in windows of {how["context"]} ({how["windows"]}); [ ] holds the value of the whole
        text 95 times in 100.  Statistics: {FOR_FIT.tokens:,} tokens of selftext, backward passes on
        {FOR_FIT.for_stage(LADDER[0]).sensitivity_tokens:,} of them; no training.  All
        budgets were met with steps of `tcq`.  {earlier}  *Whole
        model*: all weight files, against 16 bits for every parameter, and against the file that the model came in; below 1
        that file is the smaller one.

        {bench.table(head, map(_budget, rows), "r")}

        ## With as much text as other tools

        Tools below that look at a layer's inputs were given 8,192 tokens of the same text.  With as many:

        {bench.table(by_text, _by_text(rows, less), "r")}

        ## Whole files

        The budget is one of bytes, of all weight files: embedding and head, one matrix here, get settings like all others.
        On the same tokens.  {_smallest(whole)}

        {bench.table(f"MB | bits per weight | of the embedding | {KEPT}", files, "r")}

        ## Layer by layer

        {_in_order([*rows, *trained, *whole], ordered)}

        ## With recovery

        {_recovered(rows, trained, found)}

        ## Against everything else

        {bench.bullets(verdicts(own, everything))}

        {bench.bullets(said)}

        ![KL against bits](fit.png)

        ## Everything there is

        {bench.table(f"what | by | {kept} | remark", map(_compared, everything), "llrrrrrrl")}

        How the rows of tools were made (`python benchmarks/peers.py`):

        {bench.table("what | version | command | seed | calibrated on", map(_made, tools), "lllrl")}

        ## Where the bits went

        Mean bits per weight of each kind of layer: what the prediction of damage says they are worth.

        {bench.table(" | ".join(["asked for", *layers]), by_layer, "r")}
    """
    return bench.page(text)


def _by_text(rows: Sequence[Row], less: Sequence[Row]) -> list[list[str]]:
    """Of each budget that was measured with less text, too, what more of it is worth."""
    many, few = ([row for row in each if "finer" in row["recipe"]] for each in (rows, less))
    found = [(one, row) for row in many for one in few if one["recipe"]["bits"] == row["recipe"]["bits"]]
    shown = [[bench.with_interval(each[name]) for name in ("kl", "perplexity") for each in pair] for pair in found]
    return [[f"{pair[1]['recipe']['bits']:g}", *cells] for pair, cells in zip(found, shown, strict=True)]


def _in_order(rows: Sequence[Row], ordered: Sequence[Row]) -> str:
    """What it is worth to encode layers in the model's order, in as many bits or bytes."""
    if not ordered:
        return "None was measured yet: `python benchmarks/fit.py --bits 2.0 --sequential` takes them."
    cells = []
    for row in sorted(ordered, key=lambda row: (-row["weight_bytes"], "recovery" in row["recipe"])):
        made = row["recipe"]
        same = ("bits", "bytes", "recovery")
        beside = [other for other in rows if all(other["recipe"].get(name) == made.get(name) for name in same)]
        asked = f"{made['bits']:g} bits" if "bits" in made else f"{made['bytes'] / 1e6:g} MB"
        trained = f"{row['history'][-1]['tokens']:,}" if "recovery" in made else "-"
        cells.append([asked, trained, bench.with_interval(beside[0]["kl"]) if beside else "-", *_kept(row)])
    head = f"budget | trained on | KL, all at once | {KEPT.replace('KL (nats', 'KL, in order (nats')}"
    return f"""
        `fit --sequential` encodes each layer for the inputs that it will have, and has it make up for what the residual
        stream has lost before it.

        {bench.table(head, cells, "r")}
    """


def _earlier(rows: list[Row]) -> str:
    """Which rows earlier versions made, and how these differ."""
    before = [row["recipe"] for row in rows if "finer" not in row["recipe"]]
    kinds = {
        "Of an earlier version, with coarser steps and no curvature of heads": [r for r in before if "calibration" in r],
        "Of one before that, with a quarter of the text and longer codes": [r for r in before if "calibration" not in r],
    }

    def size(made: Row) -> str:
        return f"{made['bits']:g} bits" if "bits" in made else f"{made['bytes'] / 1e6:g} MB"

    return "  ".join(f"{what}: {', '.join(map(size, found))}." for what, found in kinds.items() if found)


def _recovered(rows: list[Row], trained: list[Row], found: list[Other]) -> str:
    """What training gains and norms brought back, and which tools need more bits for it."""
    if not trained:
        return "None was measured on these windows, so none stands here: `python benchmarks/fit.py --recover 24` takes them."
    before = {row["recipe"]["bits"]: bench.with_interval(row["kl"]) for row in rows}
    tools = [o for o in found if o.kind not in ("single stage", "no model")]
    cells, lines = [], []
    for row in trained:
        last, asked = row["history"][-1], row["recipe"]["bits"]
        seen = [f"{asked:g}", f"{row['bits']:.3f}", f"{last['tokens']:,}", f"{last['cpu_seconds'] / 60:.0f}"]
        cells.append([*seen, before.get(asked, "-"), *_kept(row)])
        mine = Other("fit", "trained", row["bits"], None, row)
        beaten = sorted((o for o in tools if o.bits > mine.bits and o.kl > mine.kl), key=lambda o: -o.bits)
        ahead = min((o for o in tools if o.kl <= mine.kl), key=lambda o: o.bits, default=None)
        below = "; ".join(map(str, beaten)) or "no tool of more bits"
        text = f"{mine.bits:.2f} bits, trained, KL {mine.kl:.3g}: below {below}."
        lines.append(f"{text} The tool of fewest bits that is better: {ahead or 'none'}.")
    head = "asked for | bits | tokens seen | CPU minutes | KL untrained | KL trained | perplexity | top-1 | accuracy kept"
    return f"""
        Trained on selftext, by distillation from the original, are the norms, and a gain per row (a half float, within the
        same bits); the codes stay.

        {bench.table(head, cells, "r")}

        {bench.bullets(lines)}
    """


def verdicts(own: list[Other], everything: list[Other]) -> list[str]:
    """For each budget what is better with as many bits or fewer, of all rows there are; first what holds for all of them."""
    lines, alone = [], 0
    for mine in own:
        rest = [o for o in everything if o is not mine]
        better = sorted((o for o in rest if o.bits <= mine.bits + SAME and o.kl < mine.kl), key=lambda o: o.kl)
        beaten = [o for o in rest if o.kind != "fit" and o.bits > mine.bits + SAME and _apart(mine, o)]
        alone += not better
        words = [f"{o}{'' if _apart(o, mine) else ', within the errors'}" for o in better[:SHOWN]]
        words += [f"and {len(better) - SHOWN} more"] if len(better) > SHOWN else []
        text = "better with as many bits or fewer: " if better else "nothing of as many bits or fewer is better"
        text += f"{'; '.join(words)}; worse with more bits: {_count(len(beaten))}{f', up to {beaten[0]}' if beaten else ''}."
        lines.append(f"{mine.bits:.2f} bits, KL {mine.kl:.3g}: {text}")
    sums = f"**For {alone} of {len(own)} budgets nothing of as many bits or fewer is better; the others say what is.**"
    return [sums, *lines, *_against_nothing(everything)]


def _against_nothing(everything: list[Other]) -> list[str]:
    """What loses to the better model of no bits; nothing if there is none."""
    none = sorted((o for o in everything if o.bits == 0), key=lambda o: o.kl)
    if not none:
        return []
    best, *rest = none
    some = [o for o in everything if o.bits > 0]
    worse = [o for o in some if o.kl > best.kl]
    least = min((o.bits for o in some if o.kl <= best.kl), default=math.inf)
    below = [o for o in worse if o.bits < least]
    text = f"**A model of no bits, {best.name}, has KL {best.kl:.3g}{''.join(f' ({o.name}: {o.kl:.3g})' for o in rest)}"
    text += f" and keeps {bench.with_interval(best.row['retention'])} of the accuracy.  "
    if below:
        text += f"Everything of fewer than {least:.2f} bits loses to it: {_count(len(below))}."
    if more := [o for o in worse if o not in below]:
        text += f"  So {'does' if len(more) == 1 else 'do'} {_count(len(more))} of as many bits or more, up to {more[0]}."
    return [text + "**"]


def _count(number: int) -> str:
    return f"{number} row{'s' if number != 1 else ''}"


def _apart(better: Other, worse: Other) -> bool:
    """Whether the two 95% intervals of KL do not touch."""
    return bench.measurement(better.row["kl"]).bounds[1] < bench.measurement(worse.row["kl"]).bounds[0]


def picture(rows: list[Row], found: list[Other], in_order: Sequence[Row] = ()) -> bytes:
    """KL against bits per weight, on two logarithmic axes; what is off them stands at their edge."""
    figure = Figure(figsize=(5.6, 7.6), layout="constrained", facecolor="white")  # so that letters are large on a phone
    axes, (least, most) = figure.add_subplot(), (1e-4, 60.0)
    kinds: dict[tuple[str, str], list[Other]] = {}
    for o in (o for o in found if o.bits):
        family = o.name.strip("`").partition(":")[0] if o.kind == "single stage" else ""
        kinds.setdefault((o.kind, family), []).append(o)
    for number, ((kind, family), mine) in enumerate(sorted(kinds.items())):
        label, marker = (f"stage {family}", "ovs^DphP<") if family else (kind, "XPdDH8")
        how = {"ms": 5, "alpha": 0.55} if family else {"ms": 7, "alpha": 1}
        x, y = [o.bits for o in mine], [max(o.kl, least) for o in mine]
        axes.plot(x, y, marker[number % len(marker)], color=f"C{number % 10}", label=label, **how)
    if off := [f"{o.name.strip('`')}, {o.bits:.2f} bits: KL {o.kl:.1g}" for o in found if o.bits and o.kl < least]:
        axes.text(0.02, 0.02, "\n".join(["below the scale:", *off]), transform=axes.transAxes, fontsize=9)
    for o in found:
        if not o.bits:
            label, style = f"0 bits: {o.name.split()[0]}", "--" if o.name == "uniform" else "-."
            axes.axhline(o.kl, color="black", lw=1.5, ls=style, label=label)
    ordered = sorted(rows, key=lambda row: row["bits"])
    plain = [row for row in ordered if "recovery" not in row["recipe"]]
    trained = [row for row in ordered if "recovery" in row["recipe"]]
    in_order = sorted((row for row in in_order if "bits" in row["recipe"]), key=lambda row: row["bits"])
    for some, style, label in (
        (plain, "r*-", "agentforge fit, 95%"),
        (trained, "mD-", "the same, trained"),
        ([row for row in in_order if "recovery" not in row["recipe"]], "b*-", "fit --sequential"),
        ([row for row in in_order if "recovery" in row["recipe"]], "bD-", "the same, trained"),
    ):
        if some:
            x, kl = [row["bits"] for row in some], [row["kl"] for row in some]
            axes.errorbar(x, [each["value"] for each in kl], bench.bars(kl), fmt=style, ms=9, capsize=3, label=label)
    predicted = [row["predicted"] for row in plain]
    axes.plot([row["bits"] for row in plain], predicted, "r:", label="as predicted")
    axes.set(xscale="log", yscale="log", ylim=(least / 1.3, most))
    axes.set_xlabel("bits per weight of the linear layers, on disk", fontsize=12)
    axes.set_ylabel("KL from the original (nats per token)", fontsize=12)
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8], ["1/8", "1/4", "1/2", "1", "2", "3", "4", "6", "8"], fontsize=12)
    axes.tick_params(axis="y", labelsize=12)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11, columnspacing=1)
    axes.set_title("Bits spent where they prevent damage,\nagainst the same bits everywhere", fontsize=14)
    return bench.png(figure, 160)


def main(arguments: list[str] | None = None) -> None:
    own = {"text": None, "tokens": SAMPLED_TOKENS, "bits": BITS, "work": Path(tempfile.gettempdir()) / "agentforge-fit"}
    own |= {"recover": 0, "batch": 8, "whole": [], "calibration": FOR_FIT.tokens, "sequential": False}
    own |= {"stages": Path("reports/stages/stages.json"), "peers": Path("reports/fit/peers.json")}
    options = bench.options(arguments, __doc__, "reports/fit", model=bench.MODEL, **own)
    file = "whole.json" if options.whole else "fit.json" if options.calibration == FOR_FIT.tokens else "less_text.json"
    file = "sequential.json" if options.sequential else file
    if not options.report:
        model = open_model(options.model)
        options.work.mkdir(parents=True, exist_ok=True)
        limits: list[Row] = [{"bits": bits} for bits in options.bits]
        limits = [{"bytes": round(1e6 * float(megabytes))} for megabytes in options.whole] or limits
        wanted = {" ".join(map(str, *limit.items())): recipe(model, limit, options) for limit in limits}
        statistics = functools.cache(lambda: collect(model, _calibration(options), ends=bool(options.whole)))

        def take(name: str) -> Row:
            return measure(model, statistics(), wanted[name], options)

        def keep(rows: list[Row]) -> None:
            bench.save(options.out, {file: rows})

        def key(recipe: Row) -> tuple[Any, ...]:
            return tuple(recipe.get(name) for name in ("bytes", "bits", "recovery"))

        bench.run(bench.read(options.out / file), wanted, take, keep, key)
    names = ("fit", "whole", "less_text", "sequential")
    rows, whole, less, ordered = (bench.read(options.out / f"{name}.json") for name in names)
    rows = [row for row in rows if protocol(row) == protocol(rows[-1])]
    found, said = others(options.stages, options.peers, protocol(rows[0]))
    bench.save(
        options.out, {"fit.md": report(rows, found, said, whole, less, ordered), "fit.png": picture(rows, found, ordered)}
    )


if __name__ == "__main__":
    main()
