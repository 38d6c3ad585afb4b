"""Write README's figures from reports/: everything between the two `figures` comments comes from a report's record.

`results` is the longer account, a page of the documentation site.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from agentforge.audit.drawing import MARKS, amount_text, stage_table
from agentforge.evaluation import Measurement
from agentforge.models import converted_bytes

ROOT = Path(__file__).parent.parent
BUDGETS = (4.2, 3.06, 2.6, 2.0)
ACCIDENT = 1e-4  # relative error below which a tool has found the grid on which the base lies
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


def beside_tools() -> list[str]:
    """A table of some budgets: KL beside that of the best other tool of as many bits, and what another tool needs for it."""
    budgets = {row["recipe"]["bits"]: row for row in _read("fit/fit.json") if "recovery" not in row["recipe"]}
    first = next(iter(budgets.values()))
    tools = [
        row
        for row in _read("fit/peers.json")
        if "failed" not in row
        and row["bits"]
        and row.get("relative_error", 1.0) > ACCIDENT
        and protocol(row["kl"]) == protocol(first["kl"])
    ]
    lines = [
        "| bits per weight | file | KL, `agentforge fit` | best other tool of as many bits | tool of fewest bits as good |",
        "|---:|---:|---:|---|---|",
    ]
    for row in (budgets[bits] for bits in BUDGETS):
        bits, kl = row["bits"], row["kl"]["value"]
        best = min((o for o in tools if o["bits"] <= bits + 0.005), key=lambda o: o["kl"]["value"], default=None)
        equal = min((o for o in tools if o["kl"]["value"] <= kl), key=lambda o: o["bits"], default=None)
        named = (
            f"{o['recipe']['name']} ({o['bits']:.2f} bits): {o['kl']['value']:.3g}" if o else "none" for o in (best, equal)
        )
        low, high = Measurement(**row["kl"]).bounds
        size = f"{row['weight_bytes'] / 1e6:.0f} MB"
        lines.append(f"| {bits:.2f} | {size} | **{kl:.3g}** [{low:.3g}, {high:.3g}] | {' | '.join(named)} |")
    return lines


def in_llama_cpp() -> list[str]:
    """A table of whole files, as llama.cpp computes with them, and what it is of; those of a widened model in a sentence."""
    own = [(row["weight_bytes"], row["kl"]["value"]) for row in _read("fit/whole.json")]
    lines = [
        "Whole files, in llama.cpp itself, on the same text, without the types of the base's own file (Q4_1, Q5_1;",
        "[all rows](reports/gguf_fit/gguf_fit.md)); last, the smallest of our own files, embedding and head encoded, with",
        "no more KL ([rows](reports/fit/fit.md#whole-files)):",
        "",
        "| llama-quantize, importance matrix | KL | `fit --for gguf`, same bytes | share | `fit`, no worse |",
        "|---|---:|---:|---:|---:|",
    ]
    shares = []
    for row in _read("gguf_fit/gguf_fit.json"):
        theirs, ours = row["theirs"], row["ours" if "widened" in row else "without Q4_1"]
        share = ours["kl"]["value"] / theirs["kl"]["value"]
        if "widened" in row:
            shares.append(share)
            continue
        kl, less = (f"{kl['value']:.3g} ± {kl['stderr']:.1g}" for kl in (theirs["kl"], ours["kl"]))
        best = min((one for one in own if one[1] <= theirs["kl"]["value"]), default=None)
        cells = [kl, f"**{less}**", f"{share:.2f}", f"{best[0] / 1e6:.0f} MB, {best[1]:.2g}" if best else "not measured"]
        lines.append(f"| {row['recipe']['name']}, {theirs['bytes'] / 1e6:.1f} MB | {' | '.join(cells)} |")
    if shares:
        lines += [
            "",
            f"Widened to rows of 768, for K types: shares of {min(shares):.2f} to {max(shares):.2f}.",
        ]
    return lines


def speeds() -> str:
    """What a token takes."""
    rows = _read("runtime/runtime.json")["rows"]
    own, theirs = rows["artifact fit-to-60-MB"], rows["llama.cpp, rounding:bits=4,group=32,symmetric=true"]
    ours, dense = (own["generation"][name]["value"] for name in ("float32", "dense"))
    quick = theirs["generation"]["float32"]["value"]
    return (
        f"A token takes {ours:.0f} ms of one core from `fit`'s 60 MB in our runtime, {dense:.0f} from bfloat16 in "
        f"transformers, {quick:.0f} from Q4_0 in llama.cpp ([all rows](reports/runtime/runtime.md))."
    )


def figures() -> str:
    """README's block of figures."""
    ratios, first = _read("ratios/ratios.json"), _read("fit/fit.json")[0]
    lines = [*beside_tools(), ""]
    lines += ["SmolLM2-135M-Instruct (dequantised Q4_1); bits of the linear layers, with embedding and head kept at 16, the"]
    lines += ["file is whole; KL(original || compressed) in"]
    lines += [f"nats per token on {protocol(first['kl'])}, [ ] a 95% interval; nothing is trained."]
    lines += ["[All rows](reports/fit/fit.md), with every tool's version and command.", ""]
    lines += [*in_llama_cpp(), "", speeds(), ""]
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
