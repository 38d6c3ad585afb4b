"""Write README's figures from reports/: everything between the two `figures` comments comes from a report's record.

`results` is the longer account, a page of the documentation site.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from agentforge.audit.drawing import MARKS, amount_text, stage_table
from agentforge.evaluation import Measurement
from agentforge.models import converted_bytes

ROOT = Path(__file__).parent.parent
# Whole files that are shown: ours by megabytes, llama-quantize's by kind, and of other tools, with the row of a file of the
# same types in reports/runtime.
OURS, KINDS = (40, 50, 60, 76), ("Q2_K", "Q3_K_M", "Q4_K_M")
PEERS = {"HQQ 4": "", "auto-round 4, no tuning": "", "llama.cpp Q4_0": "llama.cpp, rounding:bits=4,group=32,symmetric=true"}
AUDITS = {
    "phase4_bitnet": "Phase 4, BitNet",
    "phase8_compression": "Phase 8, compression",
    "claims_vs_measurements": "Papers and documentation, number by number",
}
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
        "What a budget of bits buys ([against everything else](reports/fit/fit.md)): `agentforge fit`, KL from the",
        "original, [ ] a 95% interval.",
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


def whole_files() -> list[str]:
    """A table of whole files, ours and those of others: megabytes, KL, and tokens per second where they were measured."""
    speeds, fitted = _read("runtime/runtime.json")["rows"], _read("fit/fit.json")[0]
    touched = next(r for r in fitted["ratios"] if r["what"] == "touched tensors" and r["denominator"].endswith("at 16 bits"))
    rest = fitted["weight_bytes"] - touched["bytes"]  # embedding, which is the head, at 16 bits, and norms
    found: list[tuple[float, str, dict[str, Any], str, str]] = []

    def speed(name: str, kind: str = "float32") -> str:
        return f"{1000 / speeds[name]['generation'][kind]['value']:.0f}" if name in speeds else "–"

    for row in _read("fit/whole.json"):
        if (size := round(row["weight_bytes"] / 1e6)) in OURS:
            found.append((size, "**`fit`**", row["kl"], "–", speed(f"artifact fit-to-{size}-MB")))
    shares = []
    for row in _read("gguf_fit/gguf_fit.json"):
        theirs, ours = row["theirs"], row["ours" if "widened" in row else "without Q4_1"]
        if "widened" in row:
            shares.append(ours["kl"]["value"] / theirs["kl"]["value"])
        elif (kind := row["recipe"]["name"]) in KINDS:
            for name, of in ((f"llama.cpp {kind}, imatrix", theirs), ("**`fit --for gguf`**", ours)):
                found.append((of["bytes"] / 1e6, name, of["kl"], "–", "–"))
    for row in _read("fit/peers.json"):
        if (name := row["recipe"]["name"]) in PEERS:
            size = (row["bits"] / 16 * touched["denominator_bytes"] + rest) / 1e6
            found.append((size, name, row["kl"], speed(PEERS[name]), "–"))
    lines = ["| whole file | MB | KL | tokens/s, llama.cpp | tokens/s, ours |", "|---|---:|---:|---:|---:|"]
    for size, name, kl, *rates in sorted(found, key=lambda one: one[0]):
        lines.append(f"| {name} | {size:.0f} | {kl['value']:.3g} ± {kl['stderr']:.1g} | {' | '.join(rates)} |")
    own = next(r["denominator_bytes"] for r in fitted["ratios"] if not r["denominator"].endswith("bits")) / 1e6
    about = f"""
        SmolLM2-135M-Instruct, dequantised from a Q4_1 file of {own:.0f} MB. KL(original || compressed) in nats per token, ±
        its standard error, on {protocol(fitted["kl"])}; nothing is trained.
        Tokens/s: of one core, – not measured ([all rows](reports/runtime/runtime.md)); bfloat16 in transformers makes
        {speed("artifact fit-to-60-MB", "dense")}. `fit` encodes embedding and head, too
        ([rows](reports/fit/fit.md#whole-files)). `fit --for gguf` does without the types of the base's own file; like the
        files with an importance matrix, it is measured in llama.cpp ([rows](reports/gguf_fit/gguf_fit.md)). On the model
        widened to rows of 768, for K types, its KL is {min(shares):.2f} to {max(shares):.2f} of theirs at the same bytes.
        auto-round, Q4_0 and HQQ: the linear layers as saved, the embedding counted at 16 bits
        ([more tools](reports/fit/fit.md)).
    """
    return [*lines, "", textwrap.fill(" ".join(about.split()), 125, break_long_words=False, break_on_hyphens=False)]


def figures() -> str:
    """README's block of figures."""
    ratios = _read("ratios/ratios.json")
    lines = [*whole_files(), ""]
    lines += ['Does "280x with 84%" hold? ([All settings](reports/ratios/ratios.md))', ""]
    lines += [f"* {said}" for said in ratios["says"] if "84% of the accuracy holds" in said or said.startswith('"')]
    said = (ROOT / "reports/fit/fit.md").read_text(encoding="utf-8").partition("Of these, ")[2].partition("\n")[0]
    lines += [f"* [Whole files](reports/fit/fit.md#whole-files) of smollm2-135m, by `fit --bytes`: {said}"] if said else []
    lines += ["", "What the audits say of their claims:", ""]
    marks = [f"{MARKS[verdict]} {verdict}" for verdict in MARKS]
    lines += [f"| report | rows | {' | '.join(marks)} |", f"|---|{'---:|' * (len(marks) + 1)}"]
    for name, title in AUDITS.items():
        record = _read(f"{name}/{name}.json")
        counts = " | ".join(str(record["summary"].get(verdict, 0)) for verdict in MARKS)
        lines.append(f"| [{title}](reports/{name}/{name}.md) | {len(record['claims'])} | {counts} |")
    return "\n".join(lines)


def results() -> str:
    """What came out, at length, from the records of the phase 4 report, of the ratios, and of the budgets."""
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
        lines.append(f"| {row['title']} | {row['audit']} | {amount_text(row)} | {MARKS[row['verdict']]} {row['verdict']} |")
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
