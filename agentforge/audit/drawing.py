"""What a report says, in Markdown: its introduction, its tables, and how it was measured; drawn from a record alone.

A record is given to these functions as `report.obtain` returns it: all text in it is fit for Markdown (`escaping`),
so that nothing here, and nothing in a template, has to think of it again.
"""

from __future__ import annotations

import html
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..escaping import markdown
from ..models import converted_bytes
from ..names import REPORTS
from .claims import COLOURS

MARKS = dict(zip(COLOURS, "🟢🟡🔴🔀⚪❔⛔", strict=True))
# The same marks on a page, where they take the verdict's colour: told apart by their shape alone.
SHAPES = dict(zip(MARKS, "✔◐✘⇄○?!", strict=True))


def introduction(record: dict[str, Any]) -> str:
    """Title, verdict and what is measured, in Markdown: what a reader sees first."""
    measured = sum(row["measured"] is not None for row in record["claims"])
    counts = ", ".join(f"{MARKS[v]}&nbsp;{n} {v}" for v, n in record["summary"].items() if n)
    model = record["subject"] or record["model"]
    precision = model["source"].get("precision", "as stored")
    against = f" It is held against **{record['model']['name']}**." if record["subject"] else ""
    return f"""# {record["title"]}

**{measured} of {len(record["claims"])} rows are measured: {counts}.**

{record["about"]}

The rows are from: {record["source"]}. Every verdict is computed from a measurement, against thresholds that stood in the
claims file before anything was run. A grey row says what it would take, or that its claim is about another model. What
answered a row stands beside its verdict: rows marked `agentforge` are answered with this project's own code, and say nothing
about the repository that was audited.

The model is **{model["name"]}**, {model["parameters"] / 1e6:.1f} M parameters, base precision: {precision}.{against}
Whatever was compressed was written to disk and loaded back before it was measured. Budget: {record["budget"]}."""


def provenance(record: dict[str, Any]) -> str:
    """How it was measured, and how to measure it again, in Markdown."""
    text, git, machine = record["text"], record["git"], record["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    dirty = ", with uncommitted changes" if git["dirty"] else ""
    artifacts = "\n".join(
        f"| <code>{stage}</code> | <code>{sha256[:16]}</code> |" for stage, sha256 in record["artifacts"].items()
    )
    made = f"\n\n| artifact that was measured | sha256 of its manifest |\n|---|---|\n{artifacts}" if artifacts else ""
    return f"""## How it was measured

* **Text**: {text["name"]}, {text["split"]}, from {text["origin"]}, sha256 `{text["sha256"][:16]}`; skipped before it:
  {"; ".join(text["skipped"]) or "nothing"}.
* **Likelihoods**: {text["scored_tokens"]:,} tokens in windows of {text["context"]} spread evenly over the text, no BOS
  token, the first token of a window not scored. Errors are of windows, not of tokens, which are not independent; if two
  models are compared on the same windows, they are those of pairs.
* **Sizes**: bytes of the weight files on disk, headers included; tokenizer, configuration and manifest excluded. Every
  ratio names its denominator.
* **Thresholds**: with every claim, in the claims file (sha256 of what it says `{record["claims_sha256"][:16]}`). A
  verdict stands if the whole 95% interval agrees with it; a row whose interval holds a threshold is *undecided*, and says
  at which n it probably would not be. A row whose error is unknown is judged by its value, and says so. {_together(record)}
* **Machine**: {machine["cpu"]}, {machine["threads"]} threads, {machine["platform"]}, Python {machine["python"]}, device
  {record["device"]}; {packages}. Peak memory {record["peak_memory_bytes"] / 1e6:,.0f} MB.
* **Code**: commit `{git["commit"]}`{dirty}; {record["created"]}; this run took {record["seconds"]:.0f} s.
  {_taken_at(record)}
* **Again**: `{_again(record)} --tokens {text["scored_tokens"]}`; the
  record is `{record["report"]}.json`.{made}"""


def _together(record: dict[str, Any]) -> str:
    """What would change at one rate of error for all verdicts together."""
    found = record["false_discovery"]
    if not found["rows"]:
        return "No row has a sampling error."
    return (
        f"{found['decided']} of the {found['rows']} rows with an error are decided, each for itself at 95%; held to a false-"
        f"discovery rate of {found['rate']:.0%} over all of them (Benjamini and Hochberg), {found['would_flip']} of these "
        "would be undecided."
    )


def _taken_at(record: dict[str, Any]) -> str:
    """The commits that took the rows, as each row names its own."""
    taken = [row["provenance"] for row in record["claims"] if row["provenance"]]
    counts = Counter((one["commit"], one["dirty"], one["source"]) for one in taken)
    words = [
        f"`{str(commit)[:12]}`{' with uncommitted changes' if dirty else ''} (source `{source[:12]}`): {count}"
        for (commit, dirty, source), count in counts.most_common()
    ]
    return f"Rows were measured at {'; '.join(words)}." if words else ""


def is_own(row: dict[str, Any]) -> bool:
    """Whether a row is its claimant's own: not ours, and not about another model or size than the one that is measured."""
    return not row["about_other"] and not (row["claimed"] and row["claimed"]["by"] == "ours")


def claimant(row: dict[str, Any]) -> str:
    """Whose claim a row is: of the number, else of the first text that it quotes."""
    quoted = (who for who in ("audit", "paper", "documentation", "code") if row[who])
    by = row["claimed"]["by"] if row["claimed"] else next(quoted)
    return f"{by}, about another model or size" if row["about_other"] else str(by)


def totals(record: dict[str, Any]) -> str:
    """Verdicts by whose claim it is, and by what answered it, as two Markdown tables."""
    rows = record["claims"]
    shown = [verdict for verdict, count in record["summary"].items() if count]
    tables = []
    for title, groups in (
        ("whose claim", [claimant(row) for row in rows]),
        ("answered by", [row["measures"] or "nothing" for row in rows]),
    ):
        counts = Counter(zip(groups, (row["verdict"] for row in rows), strict=True))
        names = sorted(set(groups), key=lambda name: (name == "nothing", name.startswith("ours"), name))
        columns = {title: names, "rows": [str(groups.count(name)) for name in names]}
        columns |= {f"{MARKS[v]} {v}": [str(counts[name, v]) for name in names] for v in shown}
        tables.append(_markdown_table(columns))
    return (
        "A number about another model or size, or of our own, is not counted as its paper's. *documented algorithm*: what "
        "the paper, the documentation or the code describes was implemented here, and that was measured. *agentforge*: this "
        "project's own code and features. *arithmetic*: computed from numbers alone.\n\n" + "\n\n".join(tables) + "\n\n"
        "Behind a row's title are its threshold and protocol, what each source says, the evidence, and the command that "
        "measures it again; in the Markdown form the title leads there, to the HTML form."
    )


def verdict_table(record: dict[str, Any], section: str, page: str = "") -> str:
    """A section's claims as a Markdown table, a line each, all else about a row folded behind its title; columns in which
    the section says nothing are left out.  page: a file that has these rows, to which titles then link in place of that."""
    rows = [row for row in record["claims"] if row["section"] == section]
    titles = [f"[{row['title']}]({page}#{row['id']})" if page else _folded(record, row) for row in rows]
    columns = {
        "Claim": titles,
        "Verdict": [_verdict(row, f"{row['colour']} " if page else "") for row in rows],
        "Claimed": [claimed_text(row) for row in rows],
        "Measured": [amount_text(row) for row in rows],
        "Answered by": [f"`{row['measures']}`" if row["measures"] else "" for row in rows],
    }
    return _markdown_table({title: cells for title, cells in columns.items() if any(cells)})


def _folded(record: dict[str, Any], row: dict[str, Any]) -> str:
    """A row's title, behind which all else that is known of it is folded."""
    said = {
        "Decided": undecided_text(row),
        "How": how_text(row),
        "The audit said": row["audit"],
        "Paper": row["paper"],
        "Documentation": row["documentation"],
        "Code": row["code"],
        "Evidence": evidence(record, row),
    }
    words = " ".join(f"**{name}**: {text}" for name, text in said.items() if text)
    return f'<details id="{row["id"]}"><summary>{row["title"]}</summary>{words}</details>'


def _markdown_table(columns: dict[str, list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for cells in zip(*columns.values(), strict=True):
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) or "-" for cell in cells) + " |")
    return "\n".join(lines)


def evidence(record: dict[str, Any], row: dict[str, Any]) -> str:
    """The evidence for a row's verdict: probe, protocol, seed, hashes, seconds, and how to take it again."""
    measured = row["measured"]
    if measured is None:
        return ""
    call = f"{row['probe']}({', '.join(f'{k}={v!r}' for k, v in row['parameters'].items())})"
    words = [f"probe <code>{call}</code>"]
    words += [f"{k}: {_short(str(v))}" for k, v in measured["protocol"].items() if v not in ([], "")]
    words += [f"seed: {measured['seed']}"] if measured["seed"] is not None else []
    hashes = {k: v for k, v in measured["inputs"].items() if isinstance(v, str)} | measured["inputs"].get("artifacts", {})
    words += [f"{k}: <code>{_short(v, 12)}</code>" for k, v in hashes.items()]
    words += [f"{row['seconds']:.1f} s"]
    return f"{'; '.join(words)}. Again: <code>{_again(record, ' --only ' + row['id'])}</code>"


def _again(record: dict[str, Any], only: str = "") -> str:
    """The command that measures again; of files and folders elsewhere the record has the last part of the path alone."""

    def word(text: str) -> str:
        return markdown(shlex.quote(html.unescape(text)))

    asked, against = str(record["report"]), record["model"]
    if not (REPORTS / asked / "claims.yaml").is_file():
        model = record["subject"] or against
        asked = f"--claims {word(record.get('claims_file') or f'{asked}.yaml')} --model {word(model['name'])}"
        if against["fingerprint"] != model["fingerprint"]:
            asked += f" --against {word(against['name'])}"
    return f"agentforge audit {asked}{only} --budget {record['budget']}"


def _short(text: str, most: int = 120) -> str:
    """The beginning of a text that is escaped already; no character reference is cut in two."""
    return text if len(text) <= most else markdown(html.unescape(text)[:most])


def stage_table(record: dict[str, Any]) -> str:
    """What each stage made of the model, as a Markdown table; the original is the first row.

    Ratios are against 16 bits, of the whole model also against what the user has: the GGUF file it was converted from, else
    its weight files.
    """
    size = converted_bytes(record["model"]["source"])
    had = "GGUF file" if size else "weight files"
    lines = [
        f"| Stage | Bits per weight | Touched tensors, to 16 bits | Whole model, to 16 bits | Whole model, to its {had} "
        "| Perplexity | KL (nats per token) | Same top token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["stages"][:1]:
        lines.append(f"| original | - | - | - | - | {_with_error(row['original_perplexity'])} | 0 | 100% |")
    for row in record["stages"]:
        ratios = {(r["what"], r["denominator"].endswith("at 16 bits")): r["ratio"] for r in row["ratios"]}
        whole = next(r for r in row["ratios"] if r["what"] == "whole model" and not r["denominator"].endswith("bits"))
        lines.append(
            f"| {row['stage']} | {row['bits_per_weight']:.3f} | {ratios['touched tensors', True]:.2f}x "
            f"| {ratios['whole model', True]:.2f}x | {(size or whole['denominator_bytes']) / whole['bytes']:.2f}x "
            f"| {_with_error(row['perplexity'])} | {_with_error(row['kl'])} "
            f"| {100 * row['top1']['value']:.1f}% |"
        )
    return "\n".join(lines)


def _with_error(measured: dict[str, Any]) -> str:
    """Value and standard error, both to the error's first two digits."""
    value, error = measured["value"], measured["stderr"] or 0.0
    if not 1e-4 <= abs(value) < 1e5 or not 1e-9 < error < 1e5:
        return f"{value:.4g} ± {error:.2g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


def sections(record: dict[str, Any]) -> list[str]:
    """The record's sections, in order."""
    return list(dict.fromkeys(row["section"] for row in record["claims"]))


def verdict_text(row: dict[str, Any]) -> str:
    """Mark, colour and verdict of a row, whether it is undecided, and what answered it."""
    answered = f" `{row['measures']}`" if row["measures"] else ""
    if row["verdict"] == "error":
        return f"{MARKS['error']} ERROR: not measured{answered}"
    undecided = f": {undecided_text(row)}" if row["undecided"] else ""
    return f"{MARKS[row['verdict']]} {row['colour']} {row['verdict']}{undecided}{answered}"


def _verdict(row: dict[str, Any], colour: str) -> str:
    """Mark and verdict of a row, in a few words.  colour: stands before the verdict."""
    return f"{MARKS[row['verdict']]} {colour}{row['verdict']}{', undecided' if row['undecided'] else ''}"


def undecided_text(row: dict[str, Any]) -> str:
    """Whether a row is undecided, and what would decide it."""
    if not row["undecided"]:
        return ""
    return "undecided at this n" + (f"; about {row['decides_at']:,} would decide" if row["decides_at"] else "")


def measured_text(row: dict[str, Any]) -> str:
    """The measured value with its error, unit and n, its threshold, protocol and remark; or why there is none."""
    value = f"**{amount_text(row)}** " if row["measured"] and not row["failure"] else ""
    return value + how_text(row)


def how_text(row: dict[str, Any]) -> str:
    """The n of a measured value, its threshold, protocol and remark; or why there is none."""
    remark = "".join(f" {row[key]}" for key in ("protocol", "remark") if row[key])
    if row["failure"]:
        return f"**the probe failed**, which says nothing about the claim: {row['failure']}.{remark}"
    if row["measured"] is None:
        return f"needs {row['needs']}"
    measured = row["measured"]
    remark += f" The claim is about {row['about_other']}." if row["about_other"] else ""
    confirms = threshold_text(row["thresholds"]["confirmed"], measured["unit"])
    return f"(n = {measured['n']:,}; to confirm: {confirms}).{remark}"


def amount_text(row: dict[str, Any]) -> str:
    """What was measured, in a few words."""
    if (found := row["measured"]) is None:
        return "the probe failed" if row["failure"] else "not measured"
    unknown = " (error unknown)" if found["error"] == "unknown" else ""
    return amount(found["value"], found["unit"], found["stderr"], found["n"], unknown)


def claimed_text(row: dict[str, Any]) -> str:
    """What the audit said of a row, else the number that is claimed and by whom, in a few words."""
    if row["audit"] or not row["claimed"]:
        return str(row["audit"])
    value = row["claimed"]["value"]
    low, high = value if isinstance(value, list) else (value, None)
    unit = str(row["claimed"]["unit"])
    said = amount(low, "share" if _is_share(unit) else unit)
    if high is not None:
        said = f"{said.split(' ')[0]} to {amount(high, 'share' if _is_share(unit) else unit)}"
    return f"{said} ({row['claimed']['by']})"


def _is_share(unit: str) -> bool:
    return unit == "share" or unit.startswith("share of ")


def amount(value: float, unit: str, stderr: float | None = None, n: int = 0, unknown: str = "") -> str:
    """A value with its standard error and unit.  A share is a count, "33 of 33 facts", if it is exact and of at most 1,000;
    else it is in per cent.  unknown: stands after the value if its error is not known."""
    scale, sign, noun = (100, "%", unit.partition(" ")[2]) if _is_share(unit) else (1, "", unit)
    count = value * n
    # What is counted has a plural: "pieces"; a share of the accuracy is none of so many.
    if sign and stderr is None and not unknown and noun.endswith("s") and 1 < n <= 1000 and abs(count - round(count)) < 1e-6:
        return f"{count:.0f} of {n} {noun.removeprefix('of ')}"
    if sign and stderr:
        said = _with_error({"value": scale * value, "stderr": scale * stderr}).replace(" ", "% ", 1) + sign
    else:
        said = f"{_number(scale * value, 4)}{sign}" + ("" if stderr is None else f" ± {_number(scale * stderr, 2)}{sign}")
    return f"{said}{unknown} {noun}".rstrip()


def _number(value: float, digits: int) -> str:
    """A number, to so many digits; without an exponent if it is large."""
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def threshold_text(interval: Sequence[float | None], unit: str = "") -> str:
    """An interval in words, of shares in per cent."""
    scale, sign = (100, "%") if _is_share(unit) else (1, "")
    low, high = (bound if bound is None else f"{scale * bound:g}{sign}" for bound in interval)
    if low == high:
        return f"exactly {low}"
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if interval[0] in (None, 0) else f"{low} to {high}"
