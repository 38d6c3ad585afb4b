"""How much calibration text do the stages need that look at a layer's inputs?

    python benchmarks/calibration.py [--model smollm2-135m] [--tokens 256 1024 4096 16384] [--out reports/calibration]

The documentation asks for 1,000 samples and never says what fewer would do.  Here each stage is encoded with input
statistics of that many tokens of selftext's calibration split (windows of --context tokens: a sample), and judged by the
layers' output error on inputs that it has not seen: sum of tr(E H E^T) over sum of tr(W H W^T), H from WikiText-2's
validation split (selftext's held-out one if WikiText-2 is missing).  The plain rule, which looks at no inputs, is in the
first row.

Writes OUT/calibration.json and OUT/calibration.md.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bench
import numpy as np

from agentforge import stages
from agentforge.errors import BadInput
from agentforge.evaluation import find_text
from agentforge.evaluation.measurement import environment
from agentforge.models import LanguageModel
from agentforge.opening import open_model
from agentforge.statistics import Calibration, InputStatistics, collect

PLAIN = {"ternary:rule=calibrated": "ternary"}
Statistics = dict[str, InputStatistics]


def judge_by(model: LanguageModel, tokens: int, context: int) -> tuple[Statistics, str]:
    """Statistics of text that no stage has seen, and that text's name."""
    try:
        text = find_text("wikitext2", "validation")
    except BadInput:
        text = find_text("selftext", "heldout")
    return collect(model, Calibration(text, tokens, context), progress=False), f"{text.name}/{text.split}"


def lost(model: LanguageModel, spec: str, seen: Statistics | None, judged_by: Statistics) -> list[float]:
    """Each layer's output error, tr(E H E^T) / tr(W H W^T)."""
    stage, found = stages.parse(spec), []
    for weight in model.weights():
        dense = weight.load().float()
        hessian = judged_by[weight.name].hessian
        gap = dense - stage.decode(stage.encode(dense, seen[weight.name] if seen else None))
        power = [float(((x @ hessian) * x).sum()) for x in (gap, dense)]
        found.append(power[0] / power[1])
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# How much calibration text?",
        "",
        f"{result['model']}; output error of {result['layers']} layers on {result['judged_tokens']:,} tokens of "
        f"{result['judged_by']}, as a share of the output's power, mean over the layers ± its standard error; in brackets "
        f"the mean of the ratio to the row with most tokens.  Calibrated on selftext; a sample has "
        f"{result['context']} tokens.",
        "",
    ]
    specs = list(result["rows"])
    tokens = sorted({int(n) for rows in result["rows"].values() for n in rows})
    rows = []
    for n in tokens:
        cells = []
        for spec in specs:
            values, best = (np.array(result["rows"][spec][str(k)]) for k in (n, tokens[-1]))
            spread = values.std(ddof=1) / np.sqrt(len(values))
            cells.append(f"{values.mean():.4f} ± {spread:.4f} ({(values / best).mean():.3f})")
        rows.append([f"{n:,}", f"{n // result['context']:,}", *cells])
    return "\n".join([*lines, *bench.table(" | ".join(["tokens", "samples", *specs]), rows, "r" * (len(specs) + 2))]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = bench.parser("Output error against the amount of calibration text.", "reports/calibration")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stages", nargs="+", default=["ternary:rule=calibrated"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--context", type=int, default=128, help="tokens per window")
    parser.add_argument("--judged-tokens", type=int, default=8192)
    options = parser.parse_args(arguments)
    model, began = open_model(options.model), time.perf_counter()
    judged_by, name = judge_by(model, options.judged_tokens, options.context)
    rows: dict[str, dict[str, list[float]]] = {spec: {} for spec in options.stages}
    for spec in options.stages:
        rows[spec]["0"] = lost(model, PLAIN.get(spec, spec), None, judged_by)
    for tokens in options.tokens:
        print(f"{tokens} tokens ...", file=sys.stderr, flush=True)
        seen = collect(model, Calibration("selftext", tokens, options.context), progress=False)
        for spec in options.stages:
            rows[spec][str(tokens)] = lost(model, spec, seen, judged_by)
    result = {
        "model": model.name,
        "layers": len(rows[options.stages[0]]["0"]),
        "judged_by": name,
        "judged_tokens": options.judged_tokens,
        "context": options.context,
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "environment": environment(),
    }
    bench.save(options.out, {"calibration.json": json.dumps(result) + "\n", "calibration.md": table(result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
