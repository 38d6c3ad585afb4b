"""The documented chains, run for real: bytes, quality and decision of every attempt, and what is left of "280x with 84%".

    python benchmarks/chains.py [--only smollm2-135m/documented] [--work FOLDER] [--out reports/chains]

Runs each file of RUNS with `agentforge pipeline` in a process of its own, and writes OUT/chains.json and OUT/chains.md as
soon as it is done.  A finished run is repeated if the chain, the model, the text or agentforge's version changed;
killed, the same command continues from the chain's last finished attempt (in --work).  `--report` writes the table again and
measures nothing.

What a row says:

* bytes: of all weight files on disk.  whole: 32 bits for every parameter over these; touched: 32 bits per weight over the
  planes of the encoded tensors; of this step: the last accepted artifact's planes over these.
* error: |W - decoded| / |W| over the encoded weights, against the original's.
* perplexity, KL(original || this); retention of accuracy (right next tokens, or right digits) and of perplexity, of the step
  and in total: each with its standard error, on n tokens (pictures).  A gate that was undecided asked for more of them.
* encode, decode, seconds: of the attempt, the last one with its measuring.  peak: most resident memory of the process
  so far, so that it never falls within a chain.
"""

from __future__ import annotations

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

import agentforge
from agentforge import evaluation
from agentforge.chain import Condition, read_chain
from agentforge.evaluation.measurement import environment
from agentforge.opening import open_model

ROOT = Path(__file__).parents[1]
RUNS = (
    ("digits-mlp", "documented_digits"),
    ("digits-mlp", "documented_digits_go_on"),
    ("smollm2-135m", "documented"),
    ("smollm2-135m", "documented_go_on"),
)
PROMISE, LABEL = 0.84, 280
COLUMNS = (
    "step | setting | bytes | whole | touched | of this step | error | perplexity | KL (nats per token) | "
    "retention of accuracy, step | in total | retention of perplexity, step | in total | n | encode (s) | decode (s) | "
    "seconds | peak (GB) | decision"
)
Run = dict[str, Any]


def recipe(model_name: str, file: str) -> dict[str, Any]:
    """What a run depends on."""
    model, chain = open_model(model_name), read_chain(ROOT / "chains" / f"{file}.yaml")
    text = None if model.is_classifier else evaluation.find_text(chain.text)
    return {
        "model": model_name,
        "fingerprint": model.fingerprint,
        "file": f"chains/{file}.yaml",
        "chain": chain.model_dump(mode="json", by_alias=True),
        "text": text and [text.name, text.split, text.sha256],
        "agentforge": agentforge.__version__,
    }


def take(model_name: str, file: str, work: Path) -> Run:
    """Run one chain file in a process of its own; what an earlier call has finished there is not done again."""
    out = work / f"{model_name}-{file}"
    load, start = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, "-m", "agentforge", "pipeline", model_name, str(ROOT / "chains" / f"{file}.yaml")]
    done = subprocess.run(
        [*command, "--out", str(out), "--overwrite", "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):  # 1: a gate said no, which is a result
        raise subprocess.CalledProcessError(done.returncode, command)
    said: Run = json.loads(done.stdout)
    return {
        "finished": said["finished"],
        "attempts": said["attempts"],
        "load": load,
        "last_call_seconds": time.perf_counter() - start,
        "environment": environment(),
    }


def accepted(run: Run) -> dict[str, Any] | None:
    """The attempt whose artifact was handed over."""
    return next((row for row in reversed(run["attempts"]) if row["decision"] == "accepted"), None)


def promise(row: dict[str, Any]) -> str:
    """What an attempt says about 84%: holds, does not hold, or open, by the whole 95% interval."""
    found = Condition("total_retention", ">=", PROMISE).decide(bench.measurement(row["measured"]["total_retention"]))
    return {"passed": "holds", "failed": "does not hold", "undecided": "is open within two standard errors"}[found]


def verdict(run: Run) -> list[str]:
    """What the run says about the claim, in sentences."""
    last, lines = accepted(run), []
    name = run["recipe"]["model"]
    if last is None:
        lines.append("Nothing was accepted; the original stands.")
    else:
        lines.append(
            f"Handed over: {last['name']} (`{last['setting']['stage']}`), {_value(last, 'touched_ratio'):.3g}x on the "
            f"encoded tensors, {_value(last, 'ratio'):.3g}x on the whole model, {_with_error(last, 'total_retention')} of "
            "the accuracy."
        )
    measured = [row for row in run["attempts"] if "measured" in row]
    small = [row for row in measured if _value(row, "touched_ratio") >= LABEL]
    if small:
        best = max(small, key=lambda row: _value(row, "total_retention"))
        lines.append(
            f'"{LABEL}x with 84%" on {name}: at {_value(best, "touched_ratio"):.3g}x on the encoded tensors '
            f"({_value(best, 'ratio'):.3g}x on the whole model) {_with_error(best, 'total_retention')} of the accuracy is "
            f"left; 84% {promise(best)}."
        )
    else:
        lines.append(f'"{LABEL}x with 84%" on {name}: no attempt of this chain came to {LABEL}x.')
    return lines


def report(runs: list[Run]) -> str:
    """All runs as Markdown."""
    lines = [
        "# The documented chains, measured",
        "",
        "SeedLM 2x, VPTQ 20x, hypercompression 6.25x; at least 84% of the quality; 250x by multiplication, labelled 280x. "
        "Ratios: *whole* is 32 bits for every parameter, over all weight files on disk; *touched* is 32 bits per weight "
        "over the planes of the encoded tensors, the only reading in which 100, 50, 2.5, 0.4 MB comes true; *of this step* "
        "is touched, over the last accepted artifact. Every step re-encodes what the last accepted one decodes to. ± is one "
        "standard error; a gate needs two.",
        "",
    ]
    for run in runs:
        about, attempts = run["recipe"], run["attempts"]
        chain = about["chain"]
        gates = "; ".join(f"{step['name']}: {', '.join(step['gates']) or 'none'}" for step in chain["steps"])
        on = f"Text: {about['text'][0]}, {about['text'][1]}. " if about["text"] else "450 held-out pictures. "
        env = run["environment"]
        lines += [
            f"## {about['model']}, {about['file']}",
            "",
            *(f"**{line}**" for line in verdict(run)),
            "",
            f"Gates: {gates}; of every step: {', '.join(chain['gates']) or 'none'}. {on}"
            f"{sum(row['seconds'] for row in attempts) / 60:.1f} minutes in all on {env['cpu']}, {env['cores']} threads; "
            f"{run['load']:.1f} other processes were ready to run at its begin. agentforge {about['agentforge']}.",
            "",
            *bench.table(COLUMNS, map(_cells, attempts), "ll" + "r" * 16 + "l"),
            "",
        ]
        reasons = [f"* {row['name']}, try {row['attempt']}: {row['reason']}" for row in attempts if row["reason"]]
        lines += [*reasons, ""] if reasons else []
    return "\n".join(lines)


def _value(row: dict[str, Any], name: str) -> float:
    return float(row["measured"][name]["value"])


def _with_error(row: dict[str, Any], name: str) -> str:
    m = row.get("measured", {}).get(name)
    if m is None or not math.isfinite(m["value"]):
        return "-"
    return f"{m['value']:.4g}" + ("" if m["stderr"] is None else f" ± {m['stderr']:.2g}")


def _cells(row: dict[str, Any]) -> list[str]:
    found = row.get("measured", {})
    cells = [f"{row['name']}, try {row['attempt']}", f"`{row['setting']['stage']}`"]
    if row["setting"]["calibration_tokens"] != 8192:
        cells[1] += f", {row['setting']['calibration_tokens']:,} calibration tokens"
    cells.append(f"{_value(row, 'bytes'):,.0f}" if found else "-")
    cells += [f"{_value(row, name):.4g}x" if found else "-" for name in ("ratio", "touched_ratio", "touched_step_ratio")]
    quality = ("error", "perplexity", "kl", "retention", "total_retention")
    cells += [_with_error(row, name) for name in (*quality, "perplexity_retention", "total_perplexity_retention")]
    cells.append(f"{found['total_retention']['n']:,}" if found else "-")
    cells += [f"{row[name]:.1f}" if name in row else "-" for name in ("encode_seconds", "decode_seconds", "seconds")]
    cells += [f"{row['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in row else "-", row["decision"]]
    return cells


def main(arguments: list[str] | None = None) -> int:
    parser = bench.parser("The documented chains, run for real.", "reports/chains")
    parser.add_argument("--only", action="append", help="MODEL/FILE, as in digits-mlp/documented_digits; may be repeated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "agentforge-chains")
    parser.add_argument("--report", action="store_true", help="write the table again, measure nothing")
    options = parser.parse_args(arguments)
    file = options.out / "chains.json"

    def write(runs: list[Run]) -> None:
        bench.save(options.out, {"chains.json": runs, "chains.md": report(runs)})

    for model, name in () if options.report else RUNS:
        if options.only and f"{model}/{name}" not in options.only:
            continue
        wanted = recipe(model, name)
        if any(run["recipe"] == wanted for run in bench.read(file)):
            continue
        print(f"{model}/{name} ...", file=sys.stderr, flush=True)
        run = {"recipe": wanted, **take(model, name, options.work)}
        kept = [r for r in bench.read(file) if (r["recipe"]["model"], r["recipe"]["file"]) != (model, wanted["file"])]
        order = [(model, f"chains/{name}.yaml") for model, name in RUNS]
        runs = sorted([*kept, run], key=lambda r: order.index((r["recipe"]["model"], r["recipe"]["file"])))
        write(runs)
    if options.report:
        write(bench.read(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
