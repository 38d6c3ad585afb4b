"""How small the encoded tensors can get while 84% of the accuracy holds, and what is best at each ratio from 2 to 280.

    python benchmarks/ratios.py [--stages FILE] [--chains FILE] [--fit FILE] [--sequential FILE] [--peers FILE]
                                [--out reports/ratios]

For digits-mlp every setting of GRID is encoded, written, loaded from disk and measured; killed, the same command resumes.
For the language model nothing is measured here: its candidates are the budgets of --fit and --sequential, and those rows of
--stages and attempts of --chains that were measured on the same tokens in the same windows.

Bits are of the encoded tensors on disk, per weight; coded: through `agentforge.entropy`, each plane decoded again and
compared.  A setting is best at a ratio if none of that ratio or more keeps more.  Chance keeps what an answer does that
looks at no question: the most frequent digit, or token (--peers).  Shannon: no code of R bits per weight gets independent
Gaussian weights below 2**(-2 R) of relative squared error.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import bench
from matplotlib.figure import Figure

from agentforge import __version__, compress, digits, evaluation, load, open_model, stages
from agentforge.chain import Condition, model_error
from agentforge.errors import BadInput
from agentforge.models import LanguageModel

CLASSIFIER, LANGUAGE = "digits-mlp", "smollm2-135m"
PROMISE = 0.84
HOW = {"sequential": "layer by layer", "recovery": "trained"}  # what a recipe says beside its budget
RATIOS = (2, 4, 8, 16, 32, 64, 128, 280)
GRID = [
    *(f"rounding:bits={bits},group={group},clip=mse" for bits in (2, 3, 4, 8) for group in (0, 32)),
    *(f"ecsq:step={step}" for step in (1, 2, 3, 4, 5, 6, 7, 8, 12)),
    "ternary",
    "ternary:rule=calibrated",
    *(f"ternary:rule=threshold,tau={tau}" for tau in (1, 1.5, 2)),
    *(f"seedlm:bits={bits}" for bits in (2, 3, 4, 8)),
    *(f"seedlm:K={K},C={C},P=1" for K, C in ((8, 8), (12, 12), (8, 12), (16, 16), (8, 16), (12, 24), (16, 32), (12, 32))),
    *(f"seedlm:K={K},C=32,P=1" for K in (8, 4, 2)),
    *(f"vptq:v={v},k={k}" for v, k in ((1, 2), (2, 4), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (8, 2), (16, 2), (64, 2))),
    *(f"vptq:v=4,k={k}" for k in (4, 8, 16, 32, 64)),
    *(f"vptq:v=8,k={k}" for k in (4, 6, 7, 8, 10, 12, 16, 24, 32, 64)),
    *(f"vptq:v={v},k={k}" for v, k in ((2, 3), (4, 3), (5, 3), (5, 4), (6, 4), (6, 8), (10, 16), (12, 16))),
    *(f"vptq:v={v},k={k},refine=30" for v, k in ((4, 3), (5, 4), (8, 8), (8, 10))),
    *(f"vptq:v=16,k={k}" for k in (4, 8, 16, 32)),
    *(f"vptq:v={v},k={k},shared=true" for v, k in ((1, 2), (2, 2), (2, 4), (4, 2), (4, 8), (4, 16), (8, 16), (16, 2))),
    *(f"curves:degree=0,segment={length}" for length in (4, 16, 64)),
    *(f"curves:degree=7,segment={length}" for length in (64, 256, 1171)),
    "trajectory:U=31,M=1,l=0,variant=korobov,centred=true,select=false",
]
Row = bench.Row


def measure(model: LanguageModel, stage: stages.Stage) -> Row:
    """A setting on digits-mlp."""
    pixels, labels, _, _ = digits.data()
    with tempfile.TemporaryDirectory(prefix="agentforge-ratios-") as work:
        artifact = compress(model, stage, Path(work) / "artifact", workers=1, progress=False)
        loaded = load(artifact.path)
        touched = next(r for r in artifact.ratios if r.what == "touched tensors")
        count = touched.denominator_bytes // 2
        row = {"stage": str(stage), **_made_from(model), "bits": 8 * touched.bytes / count}
        row |= {"model_bytes": artifact.weight_bytes, "coded_bits": 8 * bench.coded_bytes(artifact) / count}
        row |= {"error": model_error(model, loaded), "accuracy": evaluation.accuracy(loaded).to_json()}
        row["retention"] = evaluation.accuracy_retention(loaded, model).to_json()
        row["chosen_by"] = float((loaded.model(pixels).argmax(1) == labels).double().mean())
        return row


def _made_from(model: LanguageModel) -> Row:
    return {"model": model.fingerprint, "agentforge": __version__}


def _point(setting: str, bits: float, size: int | None, error: float, retention: Row, by: float | None = None) -> Row:
    """What is chosen from.  by: what it is chosen by, if not by the retention."""
    point = {"setting": setting, "bits": bits, "model_bytes": size, "error": error, "retention": retention}
    return {**point, "chosen_by": retention["value"] if by is None else by}


def _with_coded(point: Row, bits: float) -> list[Row]:
    """The planes as they are stored, and once coded, if that takes less.  Nobody wrote the model's files with them."""
    coded = {**point, "setting": f"{point['setting']}, coded", "bits": bits, "model_bytes": None}
    return [point, coded] if bits < point["bits"] else [point]


def points_of_grid(rows: list[Row]) -> list[Row]:
    """The settings of digits-mlp."""
    found = []
    for row in rows:
        about = (row["bits"], row["model_bytes"], row["error"], row["retention"], row["chosen_by"])
        found += _with_coded(_point(_short(row["stage"]), *about), row["coded_bits"])
    return found


def points_of_stages(rows: list[Row]) -> list[Row]:
    """The rows of `benchmarks/stages.py` that hold accuracies."""
    found = []
    for row in (row for row in rows if "retention" in row):
        setting = stages.from_json(row["recipe"]["stage"]).brief()
        point = _point(setting, row["bits"], row["model_bytes"], row["relative_error"], row["retention"])
        found += _with_coded(point, row["coded_bits"])
    return found


def points_of_fit(rows: list[Row]) -> list[Row]:
    """The budgets of `benchmarks/fit.py`."""
    found = []
    for row in rows:
        about = (row["bits"], row["weight_bytes"], row["relative_error"], row["retention"])
        made = row["recipe"]
        how = [f"{made['bits']:g} bits", *(word for key, word in HOW.items() if key in made)]
        found.append(_point(f"fit to {', '.join(how)}", *about))
    return found


def points_of_chains(runs: list[Row], model: str) -> list[Row]:
    """Every measured attempt of the chains on this model."""
    found = []
    for run in (run for run in runs if run["recipe"]["model"] == model):
        for row in (row for row in run["attempts"] if "measured" in row):
            m, file = row["measured"], Path(run["recipe"]["file"]).stem
            setting = f"{_short(row['setting']['stage'])}, step {row['step']} of {file}"
            bits = m["touched_ratio"]["protocol"]["bits"] / m["touched_ratio"]["value"]
            found.append(_point(setting, bits, m["bytes"]["value"], m["error"]["value"], m["total_retention"]))
    return found


def of_one_protocol(points: list[Row]) -> tuple[list[Row], int]:
    """The points that were measured as the first one was, and how many were not."""
    keys = ("text_sha256", "context", "stride", "scored_tokens", "windows")
    how = [tuple(point["retention"].get("protocol", {}).get(key) for key in keys) for point in points]
    same = [point for point, taken in zip(points, how, strict=True) if taken == how[0]]
    return same, len(points) - len(same)


def about_digits(model: LanguageModel) -> Row:
    """Parameters, bytes of the file, and what chance keeps of the accuracy."""
    _, labels, _, held_out = digits.data()
    keeps = float((held_out == labels.bincount().argmax()).double().mean()) / evaluation.accuracy(model).value
    chance = {"what": "one digit for all pictures", "keeps": keeps}
    return {"parameters": model.parameters, "file": model.opened_bytes, "chance": chance}


def about_language(budgets: list[Row], peers: list[Row]) -> Row:
    """The same from the records of `benchmarks/fit.py` and `benchmarks/peers.py`; None if they are not there."""
    whole = [r for r in (budgets[0]["ratios"] if budgets else ()) if r["what"] == "whole model"]
    size = {r["denominator"].endswith("at 16 bits"): r["denominator_bytes"] for r in whole if "32" not in r["denominator"]}
    about = {"parameters": size.get(True, 0) // 2 or None, "file": size.get(False), "chance": None}
    for row in peers:
        if row["recipe"]["settings"].get("of", "uniform") != "uniform":
            what = "always saying the most frequent token of selftext"
            about["chance"] = {"what": what, "keeps": row["retention"]["value"]}
    return about


def _short(text: str) -> str:
    """A stage's text with the settings that are not its defaults; text of another form as it is."""
    try:
        return stages.parse(text).brief()
    except BadInput:
        return text


def decide(point: Row) -> str:
    """Whether 84% holds there, by the whole 95% interval: the rule of gates and verdicts."""
    found = Condition("total_retention", ">=", PROMISE).decide(bench.measurement(point["retention"]))
    return {"passed": "holds", "failed": "does not hold", "undecided": "open"}[found]


def best(points: list[Row], ratio: float, bits: int) -> Row | None:
    """The point that keeps most at this ratio or more, against `bits` a weight; of equals the smaller one."""
    fits = [p for p in points if bits / p["bits"] >= ratio and math.isfinite(p["retention"]["value"])]
    return max(fits, key=lambda p: (p["chosen_by"], -p["bits"]), default=None)


def largest(points: list[Row]) -> Row | None:
    """The smallest point at which 84% holds."""
    return min((p for p in points if decide(p) == "holds"), key=lambda p: p["bits"], default=None)


def summary(models: dict[str, list[Row]], about: dict[str, Row]) -> list[str]:
    """In sentences, what the tables say about "280x with 84%".

    about: of each model its parameters, the bytes of the file that it came in, and what chance keeps of its accuracy.
    """
    lines, holds = [], []
    for model, points in models.items():
        top, at, chance = largest(points), best(points, 280, 32), about[model]["chance"]
        if top is None:
            lines.append(f"{model}: 84% of the accuracy holds at no measured setting.")
        else:
            lines.append(
                f"{model}: the largest ratio of the encoded layers at which 84% of the accuracy holds with its whole 95% "
                f"interval is {16 / top['bits']:.1f}x against 16 bits per weight ({32 / top['bits']:.1f}x against 32): "
                f"`{top['setting']}`, {_kept(top)} on n = {top['retention']['n']:,}.{_whole(top, about[model])}"
            )
        if at is None:
            lines.append(f"{model}: nothing was measured at 280x or more.")
            continue
        holds += [model] if decide(at) == "holds" else []
        lines.append(
            f"{model}: the best at 280x or more against 32 bits keeps {_kept(at)} (`{at['setting']}`, "
            f"{32 / at['bits']:.0f}x); 84% {'is ' if decide(at) == 'open' else ''}{decide(at)}"
            + (f"; {chance['what']} keeps {chance['keeps']:.3f}." if chance else ".")
            + _whole(at, about[model])
        )
    return [*lines, f'"280x with 84%" holds for {" and ".join(holds) or "neither model"}, by any setting measured here.']


def _kept(point: Row) -> str:
    return bench.with_interval(point["retention"], ".3f")


def _whole(point: Row, about: Row) -> str:
    """The same point's ratios of the whole model, in a sentence; nothing if its files were not written."""
    ratios = _ratios(point, about)
    return f" The whole model: {ratios[0]} against 16 bits, {ratios[1]} against its file." if "-" not in ratios else ""


def _ratios(point: Row, about: Row) -> list[str]:
    """The whole model's ratios, against 16 bits and against its file."""
    size, known = point["model_bytes"], point["model_bytes"] and about["file"]
    return [f"{part / size:.2f}x" for part in (2 * about["parameters"], about["file"])] if known else ["-", "-"]


def _cells(points: list[Row], about: Row, ratio: int, bits: int) -> list[str]:
    p = best(points, ratio, bits)
    if p is None:
        return [str(ratio), "none measured", *"-------", f"{2 ** (-2 * bits / ratio):.3g}"]
    kept = [f"{_kept(p)} (n = {p['retention']['n']:,})", decide(p), f"{p['error'] ** 2:.3g}"]
    cells = [str(ratio), f"`{p['setting']}`", f"{bits / p['bits']:.1f}x", f"{p['bits']:.3f}", *_ratios(p, about)]
    return [*cells, *kept, f"{2 ** (-2 * p['bits']):.3g}"]


def report(models: dict[str, list[Row]], about: dict[str, Row], left_out: int) -> str:
    """The tables as Markdown."""
    said = bench.bullets(f"**{line}**" for line in summary(models, about))
    text = f"""
        Ratios are of the encoded tensors alone, all their planes included. digits-mlp's accuracy is on 450 held-out
        pictures, settings chosen on the 1,347 it was trained on (its 16,384 hidden weights are encoded; the output layer
        stays). The language model's is the share of right next tokens, chosen and reported on the same tokens; base:
        dequantised Q4_1. [ ] is a 95% interval; 84% holds if all of it does. The largest ratio is that of the smallest point
        that holds, of {" and ".join(str(len(p)) for p in models.values())} points, on the very pictures (tokens) it is
        reported on: a little flattered.
    """
    others = f"{left_out} points of stages and chains were taken on other tokens or windows, and are left out."
    parts = ["# How small, and what is left", said, text, others if left_out else "\n\n"]
    parts.append("![bits per weight, error and retention](ratios.png)")
    head = (
        "ratio at least | best setting | its ratio | bits | whole model, to 16 bits | whole model, to its file | accuracy "
        "kept | 84% | relative squared error | Shannon"
    )
    for model, points in models.items():
        for bits in (32, 16):
            rows = [_cells(points, about[model], ratio, bits) for ratio in RATIOS]
            parts += [f"## {model}, ratios against {bits} bits per weight", bench.table(head, rows, "rlrrrrrlrr")]
    parts.append("""
        *Relative squared error* is |W - decoded|² / |W|², *Shannon* 2^(-2R) at the setting's own bits R (at the ratio's if
        nothing was measured). A stage that looks at the inputs of a layer gives error away where they are weak, which is why
        accuracy can hold far above the bound.
    """)
    return bench.page(*parts)


def picture(models: dict[str, list[Row]], about: dict[str, Row]) -> bytes:
    """Squared error and retention against bits, one column per model: PNG."""
    figure = Figure(figsize=(6 * len(models), 9), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(models), squeeze=False, sharex=True)
    names = sorted({_stage(p) for points in models.values() for p in points})
    for (model, points), above, below in zip(models.items(), *grid, strict=True):
        for number, name in enumerate(names):
            if own := [p for p in points if _stage(p) == name]:
                bits, kept = [p["bits"] for p in own], [p["retention"] for p in own]
                above.plot(bits, [p["error"] ** 2 for p in own], "o", ms=4, color=f"C{number}", label=name)
                values = [each["value"] for each in kept]
                below.errorbar(bits, values, yerr=bench.bars(kept), fmt="o", ms=4, lw=1, color=f"C{number}")
        rates = [2 ** (x / 20) for x in range(-80, 72)]
        above.plot(rates, [2 ** (-2 * r) for r in rates], "k-", lw=1, label="Shannon's bound, $2^{-2R}$")
        above.set(yscale="log", ylim=(1e-5, 20), title=model, ylabel="relative squared error")
        below.axhline(PROMISE, color="k", lw=1, ls="--", label="84%")
        below.set_ylabel("accuracy over the original's (95% intervals)")
        if chance := about[model]["chance"]:
            below.axhline(chance["keeps"], color="k", lw=1, ls="-.", label=f"{chance['what']}: chance")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.axvline(32 / 280, color="tab:red", lw=1, ls=":", label="280x")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=9)
        ticks = [32 / r for r in reversed(RATIOS)]
        below.set_xticks(ticks, [f"{t:.3g}\n{32 / t:.0f}x" for t in ticks])
        below.set_xlabel("bits per weight of the encoded tensors; ratio against 32 bits")
    return bench.png(figure)


def _stage(point: Row) -> str:
    return str(point["setting"]).split(":")[0].split("|")[0].split(",")[0].split(" to ")[0]


def main(arguments: list[str] | None = None) -> None:
    files = ("stages/stages", "chains/chains", "fit/fit", "fit/sequential", "fit/peers")
    own = {Path(name).name: Path(f"reports/{name}.json") for name in files}
    options = bench.options(arguments, __doc__, "reports/ratios", **own)
    order, before = [str(stages.parse(text)) for text in GRID], dict(bench.read(options.out / "ratios.json"))
    rows: list[Row] = before.get("grid", [])
    if options.report:  # of the record alone: another processor trains another classifier
        digits = before["about"][CLASSIFIER]
    else:
        model = open_model(CLASSIFIER)
        digits = about_digits(model)
        rows = [row for row in rows if _made_from(model).items() <= row.items() and row["stage"] in order]
        for text in order:
            if not any(row["stage"] == text for row in rows):
                bench.say(f"{text} ...")
                rows.append(measure(model, stages.parse(text)))
                bench.save(options.out, {"ratios.json": {"grid": rows}})
    rows.sort(key=lambda row: order.index(row["stage"]))
    table, runs, budgets, in_order, peers = (bench.read(getattr(options, name)) for name in own)
    fitted = [*budgets, *(row for row in in_order if "bits" in row["recipe"])]
    points = points_of_fit(fitted) + points_of_stages(table) + points_of_chains(runs, LANGUAGE)
    language, left_out = of_one_protocol(points)
    models = {CLASSIFIER: points_of_grid(rows)}  # not the chains' attempts: they were not looked at on training pictures
    models |= {LANGUAGE: language} if language else {}
    about = {CLASSIFIER: digits, LANGUAGE: about_language(budgets, peers)}
    found = {}
    for name, points in models.items():
        at = {str(bits): {str(ratio): best(points, ratio, bits) for ratio in RATIOS} for bits in (32, 16)}
        found[name] = {"largest": largest(points), "best": at}
    record = {"says": summary(models, about), "about": about, "models": found, "points": models, "grid": rows}
    pages = {"ratios.md": report(models, about, left_out), "ratios.png": picture(models, about)}
    bench.save(options.out, {"ratios.json": record, **pages})


if __name__ == "__main__":
    main()
