"""Write README's figures from reports/: everything between the two `figures` comments comes from a report's record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from agentforge.audit.drawing import MARKS, stage_table
from agentforge.evaluation import Measurement
from agentforge.models import converted_bytes

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


def protocol(measured: dict[str, Any]) -> str:
    """Which tokens a likelihood was measured on, in words."""
    how = measured["protocol"]
    windows = how.get("windows", "the first ones")
    return f"{how['scored_tokens']:,} tokens of {how['text']} ({how['split']}), in windows of {how['context']} ({windows})"


def stages_of(record: dict[str, Any]) -> list[str]:
    """What stages make of the model, with sizes against 16 bits and against the file that it comes in."""
    rows, size = record["stages"], converted_bytes(record["model"]["source"])
    lines = [
        f"What ternary weights and plain rounding make of {record['model']['name']}, without any training.  The base is",
        f"{record['model']['source'].get('precision', 'as stored')}.",
    ]
    if size:
        whole = {row["stage"]: next(r["bytes"] for r in row["ratios"] if r["what"] == "whole model") for row in rows}
        larger = [f"`{stage}` ({found / 1e6:.0f} MB)" for stage, found in whole.items() if found > size]
        smaller = [f"`{stage}` ({found / 1e6:.0f} MB)" for stage, found in whole.items() if found <= size]
        lines.append(f"It comes in a file of {size / 1e6:.0f} MB: larger than that are {', '.join(larger) or 'none'},")
        lines.append(f"smaller {', '.join(smaller) or 'none'}.")
    return [*lines, "", stage_table(record)]


def budgets_of(rows: list[dict[str, Any]], report: str) -> list[str]:
    """What a budget of bits buys, and what its report says in bold."""
    lines = [
        "What a budget of bits buys ([against everything else](reports/fit/fit.md)): `agentforge fit` among steps of",
        "`ecsq`, KL from the original, [ ] a 95% interval. The default now is steps of `tcq`, which are not measured here.",
        "",
        "| bits per weight, linear layers | linear layers, to 16 bits | whole model, to 16 bits | whole model, to its file "
        "| KL (nats per token) | perplexity | accuracy kept |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (-row["recipe"]["bits"], "recovery" in row["recipe"])):
        whole = [r for r in row["ratios"] if r["what"] == "whole model"]
        to_16 = next(r["ratio"] for r in whole if r["denominator"].endswith("at 16 bits"))
        to_file = next(r["ratio"] for r in whole if not r["denominator"].endswith("bits"))
        cells = []
        for name in ("kl", "perplexity", "retention"):
            low, high = Measurement(**row[name]).bounds
            cells.append(f"{row[name]['value']:.3g} [{low:.3g}, {high:.3g}]")
        trained = f", trained on {row['history'][-1]['tokens']:,} tokens" if "recovery" in row["recipe"] else ""
        sizes = f"{16 / row['bits']:.1f}x | {to_16:.2f}x | {to_file:.2f}x"
        lines.append(f"| {row['bits']:.3f}{trained} | {sizes} | {' | '.join(cells)} |")
    return [*lines, "", *(line.replace("**", "") for line in report.splitlines() if line.startswith("* **"))]


def figures() -> str:
    """The README's block of figures, from the records of the phase 4 report, of the ratios, and of the budgets."""
    record = _read("phase4_bitnet/phase4_bitnet.json")
    rows = {row["id"]: row for row in record["claims"]}
    budgets, ratios = _read("fit/fit.json"), _read("ratios/ratios.json")
    kept = [point["retention"] for point in ratios["points"].get("smollm2-135m", ())]
    parts = {
        "stages": [row["kl"] for row in record["stages"]],
        "ratios": [measured for measured in kept if "protocol" in measured],
        "budgets": [row["kl"] for row in budgets],
    }
    said = {what: " and ".join(dict.fromkeys(map(protocol, measured))) for what, measured in parts.items() if measured}
    if len(set(said.values())) == 1:
        base = budgets[0]["original_perplexity"]
        lines = [
            f"One protocol for all likelihoods: {said['budgets']}.",
            f"The original has perplexity {base['value']:.4g} there; errors are those of windows.",
        ]
    else:
        lines = [f"Likelihoods of {what}: {how}." for what, how in said.items()]
    lines += ["", *stages_of(record), ""]
    lines += ["Some rows of the first audit report:", ""]
    lines += ["| What was claimed | The audit said | Measured | Verdict |", "|---|---|---|---|"]
    for claim in SHOWN:
        row = rows[claim]
        measured = row["measured"]
        value = f"{measured['value']:.4g} {measured['unit']}"
        lines.append(f"| {row['title']} | {row['audit']} | {value} | {MARKS[row['verdict']]} {row['verdict']} |")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in record["summary"].items() if n)
    lines += ["", f"Of {len(record['claims'])} rows: {counts}. Grey rows could not be measured here; the report says "]
    lines[-1] += "what each would need."
    lines += ["", "How small the encoded tensors can get ([all settings](reports/ratios/ratios.md)):", ""]
    lines += [f"* {sentence}" for sentence in ratios["says"]]
    report = (ROOT / "reports/fit/fit.md").read_text(encoding="utf-8")
    return "\n".join([*lines, "", *budgets_of(budgets, report)])


def _read(name: str) -> Any:
    return json.loads((ROOT / "reports" / name).read_text(encoding="utf-8"))


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
