"""The documented chains, run for real: bytes, quality and decision of every attempt, and what is left of "280x with 84%".

    python benchmarks/chains.py [--only smollm2-135m/documented] [--work FOLDER] [--out reports/chains]

Runs each file of RUNS with `agentforge pipeline` in a process of its own.  A finished run is repeated if the chain, the
model, the text or agentforge's version changed; killed, the same command continues from the chain's last finished attempt
(in --work).  Bytes are of all weight files on disk; error is |W - decoded| / |W| over the encoded weights, against the
original's; seconds are of the attempt, its measuring included; peak is the most memory of the process so far.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import bench

from agentforge import __version__, evaluation, open_model
from agentforge.chain import Condition, read_chain
from agentforge.evaluation.measurement import environment

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
SAYS = {"passed": "holds", "failed": "does not hold", "undecided": "is open within two standard errors"}
Row = bench.Row


def recipe(model_name: str, file: str) -> Row:
    """What a run depends on."""
    model, chain = open_model(model_name), read_chain(ROOT / "chains" / f"{file}.yaml")
    text = None if model.is_classifier else evaluation.find_text(chain.text)
    about = {"model": model_name, "fingerprint": model.fingerprint, "file": f"chains/{file}.yaml"}
    about |= {"chain": chain.model_dump(mode="json", by_alias=True), "text": text and [text.name, text.split, text.sha256]}
    return {**about, "agentforge": __version__}


def take(model_name: str, file: str, work: Path) -> Row:
    """Run one chain file in a process of its own; what an earlier call has finished there is not done again."""
    load, chain = os.getloadavg()[0], ROOT / "chains" / f"{file}.yaml"
    command = [sys.executable, "-m", "agentforge", "pipeline", model_name, chain, "--overwrite", "--json"]
    said, used = bench.process(*command, "--out", work / f"{model_name}-{file}", fine=(0, 1))  # 1: a gate said no
    found = {name: json.loads(said)[name] for name in ("finished", "attempts")}
    return {**found, "load": load, "last_call_seconds": used["seconds"], "environment": environment()}


def verdict(run: Row) -> list[str]:
    """What the run says about the claim, in sentences."""
    last = next((row for row in reversed(run["attempts"]) if row["decision"] == "accepted"), None)
    claim = f'"{LABEL}x with 84%" on {run["recipe"]["model"]}:'
    if last is None:
        lines = ["Nothing was accepted; the original stands."]
    else:
        lines = [
            f"Handed over: {last['name']} (`{last['setting']['stage']}`), {_value(last, 'touched_ratio'):.3g}x on the "
            f"encoded tensors, {_value(last, 'ratio'):.3g}x on the whole model, {_with_error(last, 'total_retention')} of "
            "the accuracy."
        ]
    small = [row for row in run["attempts"] if "measured" in row and _value(row, "touched_ratio") >= LABEL]
    if not small:
        return [*lines, f"{claim} no attempt of this chain came to {LABEL}x."]
    best = max(small, key=lambda row: _value(row, "total_retention"))
    kept = Condition("total_retention", ">=", PROMISE).decide(bench.measurement(best["measured"]["total_retention"]))
    text = f"{claim} at {_value(best, 'touched_ratio'):.3g}x on the encoded tensors ({_value(best, 'ratio'):.3g}x on the "
    text += f"whole model) {_with_error(best, 'total_retention')} of the accuracy is left; 84% {SAYS[kept]}."
    return [*lines, text]


ABOUT = """
    # The documented chains, measured

    SeedLM 2x, VPTQ 20x, hypercompression 6.25x; at least 84% of the quality; 250x by multiplication, labelled 280x.
    Ratios: *whole* is 32 bits for every parameter, over all weight files on disk; *touched* is 32 bits per weight over the
    planes of the encoded tensors, the only reading in which 100, 50, 2.5, 0.4 MB comes true; *of this step* is touched, over
    the last accepted artifact. Every step re-encodes what the last accepted one decodes to. ± is one standard error; a gate
    needs two.
"""


def report(runs: list[Row]) -> str:
    """All runs as Markdown."""
    parts = []
    for run in runs:
        about, attempts, env = run["recipe"], run["attempts"], run["environment"]
        chain = about["chain"]
        gates = "; ".join(f"{step['name']}: {', '.join(step['gates']) or 'none'}" for step in chain["steps"])
        on = f"Text: {about['text'][0]}, {about['text'][1]}. " if about["text"] else "450 held-out pictures. "
        said = "\n".join(f"**{line}**" for line in verdict(run))
        text = f"""
            Gates: {gates}; of every step: {", ".join(chain["gates"]) or "none"}. {on}
            {sum(row["seconds"] for row in attempts) / 60:.1f} minutes in all on {env["cpu"]}, {env["cores"]} threads;
            {run["load"]:.1f} other processes were ready to run at its begin. agentforge {about["agentforge"]}.
        """
        reasons = [f"{row['name']}, try {row['attempt']}: {row['reason']}" for row in attempts if row["reason"]]
        table = bench.table(COLUMNS, map(_cells, attempts), "ll" + "r" * 16 + "l")
        parts += [f"## {about['model']}, {about['file']}", said, text, table, bench.bullets(reasons)]
    return bench.page(ABOUT, *parts)


def _value(row: Row, name: str) -> float:
    return float(row["measured"][name]["value"])


def _with_error(row: Row, name: str) -> str:
    found = row.get("measured", {}).get(name)
    return "-" if found is None or not math.isfinite(found["value"]) else bench.with_error(found)


def _cells(row: Row) -> list[str]:
    found, setting = row.get("measured", {}), f"`{row['setting']['stage']}`"
    if row["setting"]["calibration_tokens"] != 8192:
        setting += f", {row['setting']['calibration_tokens']:,} calibration tokens"
    cells = [f"{row['name']}, try {row['attempt']}", setting, f"{_value(row, 'bytes'):,.0f}" if found else "-"]
    cells += [f"{_value(row, name):.4g}x" if found else "-" for name in ("ratio", "touched_ratio", "touched_step_ratio")]
    quality = ("error", "perplexity", "kl", "retention", "total_retention")
    cells += [_with_error(row, name) for name in (*quality, "perplexity_retention", "total_perplexity_retention")]
    cells.append(f"{found['total_retention']['n']:,}" if found else "-")
    cells += [f"{row[name]:.1f}" if name in row else "-" for name in ("encode_seconds", "decode_seconds", "seconds")]
    return [*cells, f"{row['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in row else "-", row["decision"]]


def main(arguments: list[str] | None = None) -> None:
    work = Path(tempfile.gettempdir()) / "agentforge-chains"
    options = bench.options(arguments, __doc__, "reports/chains", only=[], work=work)
    runs: list[Row] = bench.read(options.out / "chains.json")

    def keep(runs: list[Row]) -> None:
        bench.save(options.out, {"chains.json": runs, "chains.md": report(runs)})

    if options.report:
        keep(runs)
        return
    names = [f"{model}/{file}" for model, file in RUNS if not options.only or f"{model}/{file}" in options.only]
    wanted = {name: recipe(*name.split("/")) for name in names}
    bench.run(runs, wanted, lambda name: take(*name.split("/"), options.work), keep, lambda r: (r["model"], r["file"]))


if __name__ == "__main__":
    main()
