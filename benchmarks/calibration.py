"""How much calibration text do the stages need that look at a layer's inputs?

    python benchmarks/calibration.py [--model smollm2-135m] [--tokens 256 1024 4096 16384] [--out reports/calibration]

Each stage is encoded with input statistics of so many tokens of selftext's calibration split (windows of --context tokens:
a sample), and judged by the layers' output error on inputs that it has not seen: sum of tr(E H E^T) over sum of tr(W H W^T),
H from WikiText-2's validation split (selftext's held-out one if it is missing).  The first row looks at no inputs.
"""

from __future__ import annotations

import json
import time

import bench
import numpy as np

from agentforge import open_model, stages
from agentforge.errors import BadInput
from agentforge.evaluation import find_text
from agentforge.evaluation.measurement import environment
from agentforge.models import LanguageModel
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


def table(result: bench.Row) -> str:
    """The result as Markdown."""
    tokens = sorted({n for rows in result["rows"].values() for n in rows}, key=int)

    def cell(rows: dict[str, list[float]], n: str) -> str:
        values, best = np.array(rows[n]), np.array(rows[tokens[-1]])
        spread = values.std(ddof=1) / np.sqrt(len(values))
        return f"{values.mean():.4f} ± {spread:.4f} ({(values / best).mean():.3f})"

    cells = [[f"{int(n):,}", f"{int(n) // result['context']:,}"] for n in tokens]
    cells = [[*line, *(cell(rows, n) for rows in result["rows"].values())] for line, n in zip(cells, tokens, strict=True)]
    text = f"""
        # How much calibration text?

        {result["model"]}; output error of {result["layers"]} layers on {result["judged_tokens"]:,} tokens of
        {result["judged_by"]}, as a share of the output's power, mean over the layers ± its standard error; in brackets the
        mean of the ratio to the row with most tokens.  Calibrated on selftext; a sample has {result["context"]} tokens.
    """
    return bench.page(text, bench.table(" | ".join(["tokens", "samples", *result["rows"]]), cells, "r"))


def measure(name: str, specs: list[str], sizes: list[int], context: int, judged_tokens: int) -> bench.Row:
    """Each layer's output error, by stage and by tokens of calibration text."""
    model, began = open_model(name), time.perf_counter()
    judged_by, text = judge_by(model, judged_tokens, context)
    rows = {spec: {"0": lost(model, PLAIN.get(spec, spec), None, judged_by)} for spec in specs}
    for tokens in sizes:
        bench.say(f"{tokens} tokens ...")
        seen = collect(model, Calibration("selftext", tokens, context), progress=False)
        for spec in specs:
            rows[spec][str(tokens)] = lost(model, spec, seen, judged_by)
    about = {"model": model.name, "layers": len(rows[specs[0]]["0"]), "judged_by": text, "judged_tokens": judged_tokens}
    about |= {"context": context, "rows": rows, "seconds": time.perf_counter() - began, "environment": environment()}
    return about


def main(arguments: list[str] | None = None) -> None:
    own = {"stages": ["ternary:rule=calibrated"], "tokens": [256, 1024, 4096, 16384], "context": 128, "judged_tokens": 8192}
    options = bench.options(arguments, __doc__, "reports/calibration", model=bench.MODEL, **own)
    if options.report:
        result = bench.read(options.out / "calibration.json")
    else:
        result = measure(options.model, options.stages, options.tokens, options.context, options.judged_tokens)
        bench.save(options.out, {"calibration.json": json.dumps(result) + "\n"})
    bench.save(options.out, {"calibration.md": table(result)})


if __name__ == "__main__":
    main()
