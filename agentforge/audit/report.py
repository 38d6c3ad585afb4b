"""From a template notebook to a report: papermill runs it, nbconvert draws it, and the record says what is true.

A report is a folder: NAME.ipynb (as it was run), NAME.html (one file, nothing fetched), NAME.md with its figures, and
NAME.json, the record.  It is made in a temporary folder beside the place and moved there when it is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AgentForgeError, BadInput
from ..evaluation.texts import CHECKOUT
from ..tensorfiles import read_json
from .claims import COLOURS, read_claims

MARKS = {"confirmed": "🟢", "partly": "🟡", "refuted": "🔴", "not reproducible here": "⚪", "not tested": "⚪"}
STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #2a2a2a; } body { background: #1b1b1b; color: #eee; }
  a { color: #8ab4f8; } img { background: #fff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
.scroll, .jp-RenderedMarkdown, .jp-RenderedHTMLCommon { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
th, td { border: 1px solid var(--line); padding: .35rem .5rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
td:first-child, td:nth-child(2) { min-width: 8rem; }
.GREEN { color: #1a7f37; } .YELLOW { color: #bf8700; } .RED { color: #cf222e; } .GREY { color: #888; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: var(--soft); padding: .5rem; }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { max-width: none; }
  .scroll, .jp-RenderedMarkdown, .jp-RenderedHTMLCommon { overflow: visible; }
  table { font-size: 7.5pt; }
  tr, img { break-inside: avoid; }
  th, td { overflow-wrap: anywhere; }
  td:first-child, td:nth-child(2) { min-width: 0; }
}
"""


def run(
    report: str = "phase4_bitnet",
    *,
    model: str | None = None,
    text: str | None = None,
    tokens: int = 6141,
    out: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Run a report's notebook and write the report; returns its folder.

    report: the name of a claims file with a template of the same name.  model, text, tokens: what is measured (default:
    the claims file's model, the first text that is there).  out: the folder for reports (default: reports/ of the
    checkout).  Compressed models are made anew, in a temporary folder: what is measured is what the code makes today.

    Raises BadInput for an unknown report, AgentForgeError where a cell of the notebook fails.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    claims = read_claims(report)
    template = CHECKOUT / "reports" / "templates" / f"{claims.report}.ipynb"
    if not template.is_file():
        raise BadInput(f"{template}: the report's template is missing; run from a checkout of agentforge")
    if tokens < 2:
        raise BadInput(f"tokens={tokens}; expected 2 or more")
    folder = (Path(out) if out is not None else CHECKOUT / "reports") / claims.report
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{claims.report}-") as scratch,
        _lines_of_progress(progress),
    ):
        made = Path(scratch) / claims.report
        made.mkdir()
        parameters = {
            "report": claims.report,
            "model": model or claims.model,
            "text": text,
            "tokens": tokens,
            "record_path": str((made / f"{claims.report}.json").resolve()),
            "artifacts": str((Path(scratch) / "artifacts").resolve()),
        }
        try:
            papermill.execute_notebook(
                template,
                made / f"{claims.report}.ipynb",
                parameters=parameters,
                cwd=CHECKOUT,
                log_output=progress,
                progress_bar=False,
                kernel_name="python3",
            )
        except PapermillExecutionError as error:
            raise AgentForgeError(
                f"{template.name}: cell {error.exec_count} failed: {error.ename}: {error.evalue}"
            ) from None
        render(made, claims.report)
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(made, folder)
    return folder


@contextlib.contextmanager
def _lines_of_progress(wanted: bool) -> Iterator[None]:
    """Show the lines of progress that the measuring cell prints, as papermill logs them, and nothing else of its log."""
    logger = logging.getLogger("papermill")
    level = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.terminator = ""
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda line: re.match(r"\[\d+/", line.getMessage()) is not None)
    if wanted:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def render(folder: Path, name: str) -> None:
    """Draw NAME.html and NAME.md from the executed NAME.ipynb in `folder`."""
    import nbformat
    from nbconvert import HTMLExporter, MarkdownExporter
    from traitlets.config import Config

    record = read_json(folder / f"{name}.json")
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    notebook.metadata.pop("papermill", None)  # paths and times of this machine
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    hidden = {"parameters", "injected-parameters", "progress"}
    shown = nbformat.from_dict(
        {**notebook, "cells": [c for c in notebook.cells if not hidden & set(c.metadata.get("tags", []))]}
    )
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/markdown", "image/png", "text/html", "text/plain"]
    body, _ = HTMLExporter(template_name="basic", exclude_input=True, config=config).from_notebook_node(shown)
    for verdict, mark in MARKS.items():
        # Not every machine has a font with coloured circles.
        body = body.replace(mark, f'<span class="{COLOURS[verdict]}">●</span>')
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{record["title"]}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    markdown, resources = MarkdownExporter(exclude_input=True, config=config).from_notebook_node(shown)
    for i, (file, data) in enumerate(sorted(resources["outputs"].items()), start=1):
        figure = f"figure-{i}.png"
        markdown = markdown.replace(f"({file})", f"({figure})")
        (folder / figure).write_bytes(data)
    (folder / f"{name}.md").write_text(markdown.strip() + "\n", encoding="utf-8")
    nbformat.write(notebook, folder / f"{name}.ipynb")


def verdict_table(record: dict[str, Any], section: str) -> str:
    """A section's claims as a Markdown table; columns in which the section says nothing are left out."""
    rows = [row for row in record["claims"] if row["section"] == section]
    columns = {
        "Claim": [row["title"] for row in rows],
        "Verdict": [verdict_text(row) for row in rows],
        "Measured": [measured_text(row) for row in rows],
        "The audit said": [row["audit"] for row in rows],
        "Paper": [row["paper"] for row in rows],
        "Documentation": [row["documentation"] for row in rows],
        "Code": [row["code"] for row in rows],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for cells in zip(*columns.values(), strict=True):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |")
    return "\n".join(lines)


def stage_table(record: dict[str, Any]) -> str:
    """What each stage made of the model, as a Markdown table; the original is the first row."""
    lines = [
        "| Stage | Bits a weight | Touched tensors | Whole model | Perplexity | KL (nats/token) | Same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = record["stages"]
    if rows:
        lines.append(f"| original | - | - | - | {_with_error(rows[0]['original_perplexity'])} | 0 | 100% |")
    for row in rows:
        ratios = {(r["what"], r["denominator"].endswith("at 16 bits")): r["ratio"] for r in row["ratios"]}
        lines.append(
            f"| {row['stage']} | {row['bits_per_weight']:.3f} | {ratios['touched tensors', True]:.2f}x "
            f"| {ratios['whole model', True]:.2f}x | {_with_error(row['perplexity'])} | {_with_error(row['kl'])} "
            f"| {100 * row['top1']['value']:.1f}% |"
        )
    return "\n".join(lines)


def _with_error(measured: dict[str, Any]) -> str:
    return f"{measured['value']:.4g} ± {measured['stderr']:.1g}"


def sections(record: dict[str, Any]) -> list[str]:
    """The record's sections, in order."""
    return list(dict.fromkeys(row["section"] for row in record["claims"]))


def verdict_text(row: dict[str, Any]) -> str:
    """Mark, colour and verdict of a row, and whether it was a close call."""
    close = ", close to a threshold" if row["close"] else ""
    return f"{MARKS[row['verdict']]} {row['colour']} {row['verdict']}{close}"


def measured_text(row: dict[str, Any]) -> str:
    """The measured value with its error, unit and n, its threshold, protocol and remark; or what it would need."""
    if row["measured"] is None:
        return f"needs {row['needs']}"
    measured = row["measured"]
    error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.2g}"
    low, high = row["thresholds"]["confirmed"]
    asked = (
        f"exactly {low:g}"
        if low == high
        else f"at least {low:g}"
        if high is None
        else f"at most {high:g}"
        if low in (None, 0)
        else f"{low:g} to {high:g}"
    )
    remark = "".join(f" {row[key]}" for key in ("protocol", "remark") if row[key])
    value = f"{measured['value']:.4g}{error} {measured['unit']}"
    return f"**{value}** (n = {measured['n']:,}; to confirm: {asked}).{remark}"
