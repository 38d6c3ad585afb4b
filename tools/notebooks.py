"""Run the notebooks.

    python tools/notebooks.py --smoke [NOTEBOOK ...]    only copy them into smoke/, with smoke = True, for nbval to run
    python tools/notebooks.py --write [NOTEBOOK ...]    in full; outputs are written into the notebooks
    python tools/notebooks.py --strip [NOTEBOOK ...]    only take the traces of runs away, as --write does

Without names: all of notebooks/, and their solutions.  Prints seconds, and seconds of CPU, of each; exit
code 1 if one fails.  --write puts the minutes of CPU into the notebook's head.  Traces are what differs from run to run and
says nothing to a reader: time stamps, metadata of papermill, widgets, and where an error was raised.  What a reader needs is
completed: the finding under a picture is its alternative text, and the index of the course repeats the minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
PEAK = "import resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"


def smoke(path: Path) -> None:
    """Write it into smoke/, from where all of its paths lead to the same files, with smoke = True.  What a cell tagged
    in-full prints is another thing then."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            cell.source = cell.source.replace("smoke = False", "smoke = True", 1)
        if "in-full" in tags(cell):
            cell.metadata.tags.remove("nbval-check-output")
    made = ROOT / "smoke" / path.relative_to(NOTEBOOKS)
    made.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, made)


def write(path: Path) -> str:
    """Run in full and keep the outputs; the most memory that the kernel held, to print."""
    from nbclient import NotebookClient

    notebook, cpu = nbformat.read(path, 4), kernels()
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        notebook.cells.append(probe := nbformat.v4.new_code_cell(PEAK))
        client.execute_cell(probe, len(notebook.cells) - 1, store_history=False)
        notebook.cells.pop()
    minutes = math.ceil((kernels() - cpu) / 60)
    measured = f"{minutes} minute{'s' * (minutes > 1)} of CPU (measured), less in smoke mode"
    notebook.cells[0].source = re.sub(r"(?<=\*\*Time\*\* ).*?(?= · )", measured, notebook.cells[0].source)
    save(path, notebook)
    peak = int(probe.outputs[0].data["text/plain"]) * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 1e9:6.1f} GB"


def tags(cell: Any) -> list[str]:
    """A cell's tags."""
    return list(cell.metadata.get("tags", []))


def stripped(notebook: Any) -> Any:
    """The notebook without traces of its run; cells are named by their place."""
    for key in set(notebook.metadata) - {"kernelspec", "language_info"}:
        del notebook.metadata[key]
    finding = ""
    for index, cell in reversed(list(enumerate(notebook.cells))):
        cell.id = f"cell-{index:02}"
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        for key in set(cell.metadata) - {"tags"}:
            del cell.metadata[key]
        if folded:
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "markdown":
            finding = first_sentence(cell.source)
            continue
        if "slider" in tags(cell):  # a widget is nothing without its kernel; the picture before it stands for it
            cell.outputs = []
        if "raises-exception" in tags(cell):  # nbval lets such a cell pass if it does not raise, unless outputs are compared
            cell.metadata["tags"] = sorted({*tags(cell), "nbval-check-output"})
        for output in cell.outputs:
            if output.output_type == "error":
                output.traceback = [f"{output.ename}: {output.evalue}"]
            elif "image/png" in output.get("data", {}):
                output.metadata = {"image/png": {"alt": finding}}
    return notebook


def first_sentence(text: str) -> str:
    """The finding that a text begins with, as plain text."""
    said = re.sub(r"[*`$\\]", "", text.partition("\n\n")[0].partition("** ")[2])
    return " ".join(re.split(r"(?<=[.:])\s(?=[A-Z(])", said)[0].split())


def save(path: Path, notebook: Any) -> None:
    """In one step; and the index of the course says how long the notebook takes."""
    nbformat.validate(stripped(notebook))
    beside = path.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    os.replace(beside, path)
    if said := re.search(r"\*\*Time\*\* (\d+) minutes? of CPU", notebook.cells[0].source):
        index = path.parent / "README.md"
        row = rf"(?<=\({path.name}\))(.*\| )\d+ min(?= \|)"
        index.write_text(re.sub(row, rf"\g<1>{said[1]} min", index.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks.")
    how = parser.add_mutually_exclusive_group(required=True)
    for name in ("smoke", "write", "strip"):
        how.add_argument(f"--{name}", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks]
    paths = paths or [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("solutions/*.ipynb"))]
    failed, total, used = 0, 0.0, 0.0
    for path in paths:
        start, cpu, said = time.perf_counter(), kernels(), ""
        try:
            if options.smoke:
                smoke(path)
            elif options.write:
                said = write(path)
            else:
                save(path, nbformat.read(path, 4))
        except Exception as error:  # whatever a cell raises; the other notebooks still run
            failed, said = failed + 1, f"  FAILED\n{error}"
        seconds, cpu = time.perf_counter() - start, kernels() - cpu
        total, used = total + seconds, used + cpu
        print(f"{Path(*path.parts[-2:])!s:48}{seconds:7.0f} s{cpu:7.0f} s of CPU{said}", flush=True)
    print(f"{'together':48}{total:7.0f} s{used:7.0f} s of CPU")
    return 1 if failed else 0


def kernels() -> float:
    """Seconds of CPU that the kernels took so far: unlike the clock, hardly moved by what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
