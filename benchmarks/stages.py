"""What every stage costs and keeps on a real model, beside rounding to nearest at matched bytes.

    python benchmarks/stages.py [--tokens 6132] [--only PREFIX] [--model smollm2-135m] [--out reports/stages]

Writes OUT/stages.json and OUT/stages.md.  Each row is measured in a process of its own, so that peaks of memory do not
mix, and is written as soon as it is there; a second call takes only the rows that are missing, or whose recipe (stage,
its source code, model, text, tokens) has changed.  `--report` writes the table again and measures nothing.  Rows of other
tokens or windows stay until they are taken again, in a table of their own.

What a row says, and how it was taken:

* bits: bytes on disk of all encoded planes (codebooks, scales, exponents included) per touched weight; coded: the same
  through `agentforge.entropy`, whose planes are decoded again and compared.
* error: |W - decoded| / |W| over all touched weights together.
* perplexity, KL from the original and top-1 agreement, each with its standard error, of the artifact loaded from disk.
* encode: the whole of `compress`, calibration included; decode: reading and decoding all touched weights, one thread.
* load: processes that were ready to run when the row began; above zero, seconds are upper bounds.
* peak: most resident memory of the process until the artifact is written, the interpreter and torch included.
* against rounding: see `verdict`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch

import agentforge
from agentforge import evaluation, stages, statistics
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.evaluation.measurement import peak_memory
from agentforge.models import SAMPLED, SAMPLED_TOKENS, LanguageModel
from agentforge.opening import load, open_model
from agentforge.pipeline import compress

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
Row = bench.Row


def recipe(stage: stages.Stage, options: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on; a finished row is taken again where this has changed."""
    source = Path(inspect.getsourcefile(type(stage)) or "")
    text = evaluation.find_text(options.text)
    return {
        "stage": stage.to_json(),
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "agentforge": agentforge.__version__,
        "model": open_model(options.model).fingerprint,
        "text": [text.name, text.split, text.sha256],
        "tokens": options.tokens,
        "context": options.context,
    }


def measure(stage: stages.Stage, options: argparse.Namespace) -> Row:
    """One row, in this process."""
    model, load_before = open_model(options.model), os.getloadavg()[0]
    start = time.perf_counter()
    seen = statistics.collect(model, progress=False) if stage.needs_statistics else None
    calibrated = time.perf_counter()
    artifact = compress(model, stage, Path(options.work) / "artifact", statistics=seen, progress=False)
    encoded = time.perf_counter()
    peak = peak_memory()
    row = {
        "encode_seconds": encoded - start,
        "of_which_calibration": calibrated - start,
        "peak_bytes": peak,
        "load": load_before,
        **_planes(model, artifact),
    }
    found = evaluation.divergence(
        load(artifact.path), model, options.text, context=options.context, tokens=options.tokens, progress=False
    )
    return {**row, **{name: value.to_json() for name, value in found._asdict().items()}}


def _planes(model: LanguageModel, artifact: Artifact) -> Row:
    """Bits, coded bits, error, and seconds to decode, of all weights that were touched."""
    weights = {weight.name: weight for weight in model.weights()}
    rows = [row for row in artifact.rows if row["stage"] is not None]
    shared = artifact.manifest.get("shared") or {"bytes": 0}
    count = sum(math.prod(row["shape"]) for row in rows)
    seconds, lost, power = 0.0, [], []
    for row in rows:
        start = time.perf_counter()
        packed = artifact.read(row)
        decoded = artifact.decode(row, packed)
        seconds += time.perf_counter() - start
        dense = weights[row["name"]].load().to(torch.float64).numpy()
        back = (decoded.T if row["transposed"] else decoded).to(torch.float64).numpy()
        lost.append(float(np.square(back - dense).sum()))
        power.append(float(np.square(dense).sum()))
    stored = sum(row["bytes"] for row in rows) + shared["bytes"]
    return {
        "weights": count,
        "bits": 8 * stored / count,
        "coded_bits": 8 * bench.coded_bytes(artifact) / count,
        "model_bytes": artifact.weight_bytes,
        "relative_error": math.sqrt(sum(lost) / sum(power)),
        "decode_seconds": seconds,
    }


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
    others = [
        other for other in rows if other["recipe"]["stage"]["stage"] == "rounding" and other["relative_error"] > ACCIDENT
    ]
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
    lines = [f"# Stages on {options.model}", ""]
    older = _older(rows, options)
    rows = [row for row in rows if row not in older]
    if rows:
        base, first = rows[0]["original_perplexity"], rows[0]
        n, environment = base["n"], base["environment"]
        name, split, _ = first["recipe"]["text"]
        lines += [
            f"Perplexity of the original: {base['value']:.2f} ± {base['stderr']:.2f}.  Text: {name}, {split}; {n:,} tokens "
            f"scored, windows of {options.context} ({base['protocol'].get('windows', 'the first ones')}); KL is "
            f"KL(original || compressed).  {first['weights']:,} weights of "
            f"linear layers are encoded, the rest stays as it is.  {environment['cpu']}, {environment['threads']} threads, "
            f"torch {environment['packages']['torch']}, agentforge {first['recipe']['agentforge']}.",
            "",
        ]
        if options.model == "smollm2-135m":
            lines += [
                "The original is dequantised Q4_1: every 32 weights hold at most 16 values. Rounding at 4 bits in groups of "
                "32 is lossless by that accident, so its row is no peer; groups of 64 are helped, too.",
                "",
            ]
        if any("load" not in row for row in rows):
            lines += [
                "Where the load is not known (shared), other work ran beside the row: its seconds are upper bounds.",
                "",
            ]
        taken = {json.dumps(row["recipe"]["stage"], sort_keys=True) for row in rows}
        missing = [text for text in ROWS if json.dumps(stages.parse(text).to_json(), sort_keys=True) not in taken]
        if missing:
            lines += [f"Not taken on these windows: {', '.join(missing)}.", ""]
        losers = [row for row in rows if "loses" in verdict(row, rows)]
        if losers:
            lines += ["Lose to rounding at matched bytes: " + ", ".join(_name(row) for row in losers) + ".", ""]
    lines += _table(rows)
    if older:
        protocols = sorted({(row["recipe"]["tokens"], row["recipe"]["context"]) for row in older})
        first = ", ".join(f"the first {tokens:,} tokens in windows of {context}" for tokens, context in protocols)
        text = f"Taken on {first}, with errors as if tokens were independent: not to be compared with the rows above."
        lines += ["", "## An earlier protocol", "", text, "", *_table(older)]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    return bench.table(COLUMNS, (_cells(row, rows) for row in rows), "l" + "r" * 10 + "l")


def _name(row: Row) -> str:
    """The stage with the settings that are not its defaults."""
    return stages.from_json(row["recipe"]["stage"]).brief()


def _cells(row: Row, rows: list[Row]) -> list[str]:
    def with_error(name: str) -> str:
        return f"{row[name]['value']:.4g} ± {row[name]['stderr'] or 0.0:.1g}"

    return [
        _name(row),
        f"{row['bits']:.3f}",
        f"{row['coded_bits']:.3f}",
        f"{row['relative_error']:.4f}",
        with_error("perplexity"),
        with_error("kl"),
        with_error("top1"),
        f"{row['encode_seconds']:.1f}",
        f"{row['decode_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['load']:.1f}" if "load" in row else "shared",
        verdict(row, rows),
    ]


def write(folder: Path, rows: list[Row], options: argparse.Namespace) -> None:
    """All files, each replaced in one step; rows of other tokens or windows in one of their own, which nobody else reads."""
    older = _older(rows, options)
    kept = {"stages.json": [row for row in rows if row not in older], "earlier.json": older}
    files = {name: some for name, some in kept.items() if some or (folder / name).is_file()}
    bench.save(folder, {**files, "stages.md": table(rows, options)})


def _older(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    asked = (options.tokens, options.context)
    return [row for row in rows if (row["recipe"]["tokens"], row["recipe"]["context"]) != asked]


def _in_a_process(stage: stages.Stage, arguments: list[str]) -> Row:
    with tempfile.TemporaryDirectory(prefix="agentforge-stages-") as work:
        command = [sys.executable, __file__, *arguments, "--row", json.dumps(stage.to_json()), "--work", work]
        subprocess.run(command, check=True)
        row: Row = json.loads((Path(work) / "row.json").read_text(encoding="utf-8"))
        return row


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = bench.parser("A table of every stage, beside rounding at matched bytes.", "reports/stages")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--tokens", type=int, default=SAMPLED_TOKENS, help="tokens to score")
    parser.add_argument("--context", type=int, default=SAMPLED)
    parser.add_argument("--only", action="append", help="stages that begin like this; may be given more than once")
    parser.add_argument("--report", action="store_true", help="write the table again, measure nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = options_of(arguments)
    if options.row:
        row = measure(stages.from_json(json.loads(options.row)), options)
        (Path(options.work) / "row.json").write_text(json.dumps(row), encoding="utf-8")
        return 0
    rows: list[Row] = bench.read(options.out / "stages.json") + bench.read(options.out / "earlier.json")
    failed = 0
    order = {}
    for place, text in enumerate(ROWS):
        try:
            stage = stages.parse(text)
        except BadInput as error:
            print(f"{text}: left out: {error}", file=sys.stderr)
            continue
        order[str(stage)] = place
        if options.report or (options.only and not any(text.startswith(prefix) for prefix in options.only)):
            continue
        wanted = recipe(stage, options)
        if any(row["recipe"] == wanted for row in rows):
            continue
        print(f"{text} ...", file=sys.stderr, flush=True)
        try:
            row = {"recipe": wanted, **_in_a_process(stage, arguments)}
        except subprocess.CalledProcessError as error:
            print(f"{text}: failed with exit code {error.returncode}", file=sys.stderr)
            failed += 1
            continue
        rows = [other for other in rows if other["recipe"]["stage"] != wanted["stage"]] + [row]
        rows.sort(key=lambda r: order.get(str(stages.from_json(r["recipe"]["stage"])), len(ROWS)))
        write(options.out, rows, options)
    if options.report:
        write(options.out, rows, options)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
