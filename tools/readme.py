"""Write README's figures from reports/: everything between the two `figures` comments comes from a report's record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from agentforge.audit.drawing import MARKS, stage_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SHOWN = (
    "components.sparsity",
    "algorithms.ternary",
    "components.ratio",
    "algorithms.ratio",
    "parameters.bits",
    "red.perplexity",
    "figures.perplexity_documented",
)


def figures() -> str:
    """The README's block of figures, from the records of the phase 4 report, of the ratios, and of the budgets."""
    record = json.loads((ROOT / "reports/phase4_bitnet/phase4_bitnet.json").read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in record["claims"]}
    text = record["text"]
    lines = [
        f"What ternary weights and plain rounding make of {record['model']['name']}, without any training: bytes on disk",
        f"against 16 bits a parameter; {text['scored_tokens']:,} tokens of {text['name']} ({text['split']}), windows of",
        f"{text['context']}.",
        f"The base is {record['model']['source'].get('precision', 'as stored')}.",
        "",
        stage_table(record),
        "",
        "Some rows of the first audit report:",
        "",
        "| What was claimed | The audit said | Measured | Verdict |",
        "|---|---|---|---|",
    ]
    for claim in SHOWN:
        row = rows[claim]
        measured = row["measured"]
        value = f"{measured['value']:.4g} {measured['unit']}"
        lines.append(f"| {row['title']} | {row['audit']} | {value} | {MARKS[row['verdict']]} {row['verdict']} |")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in record["summary"].items() if n)
    lines += ["", f"Of {len(record['claims'])} rows: {counts}. What is grey says in the report what it would take."]
    ratios = json.loads((ROOT / "reports/ratios/ratios.json").read_text(encoding="utf-8"))
    lines += ["", "How small the encoded tensors can get ([all settings](reports/ratios/ratios.md)):", ""]
    lines += [f"* {sentence}" for sentence in ratios["says"]]
    budgets = json.loads((ROOT / "reports/fit/fit.json").read_text(encoding="utf-8"))
    lines += [
        "",
        "What a budget of bits buys ([against everything else](reports/fit/fit.md)): `agentforge fit`, KL from the original",
        f"on {budgets[0]['kl']['n']:,} tokens.",
        "",
        "| bits a weight, linear layers | ratio to 16 bits | KL (nats a token) | perplexity | accuracy kept |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(budgets, key=lambda row: (-row["recipe"]["bits"], "recovery" in row["recipe"])):
        kl, perplexity, kept = (f"{row[k]['value']:.3g} ± {row[k]['stderr']:.1g}" for k in ("kl", "perplexity", "retention"))
        trained = f", trained on {row['history'][-1]['tokens']:,} tokens" if "recovery" in row["recipe"] else ""
        lines.append(f"| {row['bits']:.3f}{trained} | {16 / row['bits']:.1f}x | {kl} | {perplexity} | {kept} |")
    return "\n".join(lines)


def written() -> str:
    """README.md with its block of figures as the reports have them now."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures()}\n{END}{after}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        same = (ROOT / "README.md").read_text(encoding="utf-8") == written()
        sys.exit(0 if same else "README.md does not show what reports/ hold; run tools/readme.py")
    (ROOT / "README.md").write_text(written(), encoding="utf-8")
