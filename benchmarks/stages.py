"""What every stage costs and keeps on a real model, beside rounding to nearest at matched bytes.

    python benchmarks/stages.py [--tokens 6132] [--only PREFIX] [--model smollm2-135m] [--out reports/stages]

Each row is measured in a process of its own, so that peaks of memory do not mix; a second call takes only the rows that are
missing, or whose recipe has changed.  Bits are of all encoded planes on disk, per touched weight; coded: the same through
`agentforge.entropy`, decoded again and compared.  Error is |W - decoded| / |W|.  Quality is of the artifact loaded from
disk. Encode is the whole of `compress`, calibration included; decode: all touched weights, one thread; peak: until the
artifact is written.  A load above zero (processes that were ready to run when the row began) makes seconds upper bounds.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import math
import os
import tempfile
import time
from pathlib import Path

import bench

from agentforge import __version__, compress, evaluation, load, open_model, stages, statistics
from agentforge.artifact import Artifact
from agentforge.chain import model_error
from agentforge.evaluation.measurement import peak_memory
from agentforge.models import SAMPLED, SAMPLED_TOKENS, LanguageModel

ROWS = [
    *(f"rounding:bits={bits},group=64" for bits in (2, 3, 4)),
    *(f"rounding:bits={bits},group={group},clip=mse" for group in (0, 128, 64, 32) for bits in (2, 3, 4)),
    "rounding:bits=8,group=64",
    "ternary",
    *(f"seedlm:bits={bits}" for bits in (2, 3, 4)),
    # Refining and weighting are compared at K = 12 (4 bits as well): a search of 2^16 seeds would take an hour a row.
    *(f"seedlm:K=12,C=7,P=3{more}" for more in ("", ",refine=true", ",weighted=true", ",refine=true,weighted=true")),
    *(f"vptq:bits={bits}" for bits in (2, 3, 4)),
    *(f"vptq:bits={bits},shared=true" for bits in (2, 3, 4)),
    *(f"trajectory:U={U},M=3,select=false" for U in (225, 1600)),
    *(f"trajectory:U={U},M=1,l=0,variant=korobov,centred=true,select=false" for U in (31, 127, 511)),
    "curves",
    "curves:kind=polynomial",
    "curves:sort=segment",
    "seedlm:bits=8",  # last, for it takes longest: with 3 coefficients for 4 weights few seeds can be ruled out at sight
]
COLUMNS = (
    "stage | bits | coded | error | perplexity | KL (nats per token) | top-1 | encode (s) | decode (s) | peak (GB) | load | "
    "against rounding at matched bytes"
)
ACCIDENT = 1e-4  # relative error below which rounding to 5 bits or fewer has found the weights' own grid
USABLE = 0.05  # share of top tokens that agree, below which a model is gone
ACCIDENTAL = """
    The original is dequantised Q4_1: every 32 weights hold at most 16 values. Rounding at 4 bits in groups of 32 is lossless
    by that accident, so its row is no peer; groups of 64 are helped, too.
"""
Row = bench.Row


def recipe(stage: stages.Stage, fingerprint: str, options: argparse.Namespace) -> Row:
    """What a row depends on; a finished row is taken again where this has changed."""
    source, text = Path(inspect.getsourcefile(type(stage)) or ""), evaluation.find_text(options.text)
    about = {"stage": stage.to_json(), "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    about |= {"agentforge": __version__, "model": fingerprint, "text": [text.name, text.split, text.sha256]}
    return {**about, "tokens": options.tokens, "context": options.context}


def measure(text: str, options: argparse.Namespace, work: Path | None = None) -> Row:
    """One row, in this process.  work: where the artifact stays."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="agentforge-stages-") as folder:
            return measure(text, options, Path(folder))
    stage, model, load_before = stages.parse(text), open_model(options.model), os.getloadavg()[0]
    start = time.perf_counter()
    seen = statistics.collect(model, progress=False) if stage.needs_statistics else None
    calibrated = time.perf_counter()
    artifact = compress(model, stage, work / "artifact", statistics=seen, progress=False)
    row = {"encode_seconds": time.perf_counter() - start, "of_which_calibration": calibrated - start}
    row |= {"peak_bytes": peak_memory(), "load": load_before, **_planes(model, artifact)}
    how = {"context": options.context, "tokens": options.tokens, "progress": False}
    return {**row, **bench.to_json(evaluation.divergence(load(artifact.path), model, options.text, **how))}


def _planes(model: LanguageModel, artifact: Artifact) -> Row:
    """Bits, coded bits, error, and seconds to decode, of all weights that were touched."""
    rows = [row for row in artifact.rows if row["stage"] is not None]
    count = sum(math.prod(row["shape"]) for row in rows)
    start = time.perf_counter()
    for row in rows:
        artifact.decode(row)
    seconds = time.perf_counter() - start
    stored = sum(row["bytes"] for row in rows) + (artifact.manifest.get("shared") or {"bytes": 0})["bytes"]
    found = {"weights": count, "bits": 8 * stored / count, "coded_bits": 8 * bench.coded_bytes(artifact) / count}
    found |= {"model_bytes": artifact.weight_bytes, "relative_error": model_error(model, load(artifact.path))}
    return {**found, "decode_seconds": seconds}


def verdict(row: Row, rows: list[Row]) -> str:
    """The row's KL against rounding's at matched bytes.

    Of all rounding rows those count that no other one beats in both bits and KL, and that are not lossless by accident (the
    default model's weights lie on a grid themselves).  Where fewer than 5% of the top tokens agree, on both sides, nobody
    wins.  "wins": its KL is below that of the next one with as many bits or more.  "loses": it is above that of the next
    one with as many bits or fewer.  Between the two, and where it lies less than two standard errors from either, the
    line between them (log KL against bits) decides, and the table says that it does.
    """
    if row["recipe"]["stage"]["stage"] == "rounding":
        return "is rounding"
    others = [a for a in rows if a["recipe"]["stage"]["stage"] == "rounding" and a["relative_error"] > ACCIDENT]
    front = [a for a in others if not any(b["bits"] <= a["bits"] and _kl(b) < _kl(a) for b in others)]
    fewer = max((a for a in front if a["bits"] <= row["bits"]), key=lambda a: a["bits"], default=None)
    more = min((a for a in front if a["bits"] >= row["bits"]), key=lambda a: a["bits"], default=None)
    side = fewer or more
    if side and max(row["top1"]["value"], side["top1"]["value"]) < USABLE:
        return f"neither is usable: {_kl(row):.3g} against {_kl(side):.3g} at {side['bits']:.2f} bits"
    if more and _below(row, more):
        return f"**wins**: {_kl(row):.3g} against {_kl(more):.3g} at {more['bits']:.2f} bits"
    if fewer and _below(fewer, row):
        return f"**loses**: {_kl(row):.3g} against {_kl(fewer):.3g} at {fewer['bits']:.2f} bits"
    if not side:
        return "no rounding row yet"
    if not fewer or not more or fewer is more:
        return f"open: no rounding on both sides of {row['bits']:.2f} bits; {_kl(side):.3g} at {side['bits']:.2f} bits"
    share = (row["bits"] - fewer["bits"]) / (more["bits"] - fewer["bits"])
    line = math.exp((1 - share) * math.log(_kl(fewer)) + share * math.log(_kl(more)))
    outcome = "wins" if _kl(row) < line else "loses"
    return f"{outcome} against the line from {fewer['bits']:.2f} to {more['bits']:.2f} bits: {_kl(row):.3g}, {line:.3g}"


def _kl(row: Row) -> float:
    return max(float(row["kl"]["value"]), 1e-9)


def _below(a: Row, b: Row) -> bool:
    """Whether a's KL is below b's by more than two standard errors of the difference, taken as independent."""
    return _kl(a) + 2 * math.hypot(a["kl"]["stderr"] or 0.0, b["kl"]["stderr"] or 0.0) < _kl(b)


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """The table as Markdown, with what is needed to read it; rows of other tokens or windows in one of their own."""
    parts, (rows, older) = [f"# Stages on {options.model}"], _parted(rows, options)
    if rows:
        first, base = rows[0], rows[0]["original_perplexity"]
        (name, split, _), env = first["recipe"]["text"], base["environment"]
        parts.append(f"""
            Perplexity of the original: {base["value"]:.2f} ± {base["stderr"]:.2f}.  Text: {name}, {split}; {base["n"]:,}
            tokens scored, windows of {options.context} ({base["protocol"].get("windows")}); KL is
            KL(original || compressed).  {first["weights"]:,} weights of linear layers are encoded, the rest stays as it
            is.  {env["cpu"]}, {env["threads"]} threads, torch {env["packages"]["torch"]}, agentforge
            {first["recipe"]["agentforge"]}.
        """)
        if options.model == bench.MODEL:
            parts.append(ACCIDENTAL)
        taken = [row["recipe"]["stage"] for row in rows]
        if missing := [text for text in ROWS if stages.parse(text).to_json() not in taken]:
            parts.append(f"Not taken on these windows: {', '.join(missing)}.")
        if losers := [row for row in rows if "loses" in verdict(row, rows)]:
            parts.append("Lose to rounding at matched bytes: " + ", ".join(_name(row) for row in losers) + ".")
    parts.append(_table(rows))
    if older:
        protocols = sorted({(row["recipe"]["tokens"], row["recipe"]["context"]) for row in older})
        which = ", ".join(f"the first {tokens:,} tokens in windows of {context}" for tokens, context in protocols)
        text = f"Taken on {which}, with errors as if tokens were independent: not to be compared with the rows above."
        parts += ["## An earlier protocol", text, _table(older)]
    return bench.page(*parts)


def _table(rows: list[Row]) -> str:
    return bench.table(COLUMNS, (_cells(row, rows) for row in rows), "l" + "r" * 10 + "l")


def _name(row: Row) -> str:
    """The stage with the settings that are not its defaults."""
    return stages.from_json(row["recipe"]["stage"]).brief()


def _cells(row: Row, rows: list[Row]) -> list[str]:
    cells = [_name(row), f"{row['bits']:.3f}", f"{row['coded_bits']:.3f}", f"{row['relative_error']:.4f}"]
    cells += [f"{row[name]['value']:.4g} ± {row[name]['stderr'] or 0.0:.1g}" for name in ("perplexity", "kl", "top1")]
    cells += [f"{row['encode_seconds']:.1f}", f"{row['decode_seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
    return [*cells, f"{row['load']:.1f}" if "load" in row else "shared", verdict(row, rows)]


def write(rows: list[Row], options: argparse.Namespace) -> None:
    """All files; rows of other tokens or windows in one of their own, which nobody else reads."""
    asked, older = _parted(rows, options)
    files: Row = {"stages.json": asked, "stages.md": table(rows, options)}
    if older or (options.out / "earlier.json").is_file():
        files["earlier.json"] = older
    bench.save(options.out, files)


def _parted(rows: list[Row], options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The rows of the tokens and windows that are asked for, and the others."""
    asked = (options.tokens, options.context)
    same = [row for row in rows if (row["recipe"]["tokens"], row["recipe"]["context"]) == asked]
    return same, [row for row in rows if row not in same]


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    own = {"model": bench.MODEL, "text": "wikitext2", "tokens": SAMPLED_TOKENS, "context": SAMPLED, "only": []}
    return bench.options(arguments, __doc__, "reports/stages", **own)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    rows: list[Row] = bench.read(options.out / "stages.json") + bench.read(options.out / "earlier.json")
    if not options.report:
        fingerprint = open_model(options.model).fingerprint
        wanted = {text: recipe(stages.parse(text), fingerprint, options) for text in ROWS}
        take, keep = lambda text: bench.apart(measure, text, options), lambda rows: write(rows, options)
        rows = bench.run(rows, wanted, take, keep, lambda recipe: recipe["stage"], options.only)
    write(rows, options)


if __name__ == "__main__":
    main()
