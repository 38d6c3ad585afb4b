"""Run the notebooks.

    python tools/notebooks.py --smoke [NOTEBOOK ...]    papermill with smoke = True, into a temporary folder; nothing is kept
    python tools/notebooks.py --write [NOTEBOOK ...]    in full; outputs are written into the notebooks
    python tools/notebooks.py --strip [NOTEBOOK ...]    only take the traces of runs away, as --write does

Without names: all of notebooks/, and but for --smoke their solutions.  Prints seconds, and seconds of CPU, of each; exit
code 1 if one fails.  Traces are what differs from run to run and says nothing to a reader: time stamps, and metadata of
papermill and of widgets.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
PEAK = "import resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"


def smoke(path: Path, folder: Path) -> None:
    """Run with smoke = True."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill.execute_notebook(
        path, folder / path.name, parameters={"smoke": True}, cwd=path.parent, progress_bar=False, kernel_name="python3"
    )


def write(path: Path) -> str:
    """Run in full and keep the outputs; the most memory that the kernel held, to print."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        notebook.cells.append(probe := nbformat.v4.new_code_cell(PEAK))
        client.execute_cell(probe, len(notebook.cells) - 1, store_history=False)
        notebook.cells.pop()
    save(path, notebook)
    peak = int(probe.outputs[0].data["text/plain"]) * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 1e9:6.1f} GB"


def stripped(notebook: Any) -> Any:
    """The notebook without traces of its run; cells are named by their place."""
    for key in set(notebook.metadata) - {"kernelspec", "language_info"}:
        del notebook.metadata[key]
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02}"
        for key in set(cell.metadata) - {"tags"}:
            del cell.metadata[key]
    return notebook


def save(path: Path, notebook: Any) -> None:
    """In one step."""
    nbformat.validate(stripped(notebook))
    beside = path.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks.")
    how = parser.add_mutually_exclusive_group(required=True)
    for name in ("smoke", "write", "strip"):
        how.add_argument(f"--{name}", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks] or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not options.notebooks and not options.smoke:
        paths += sorted(NOTEBOOKS.glob("solutions/*.ipynb"))
    failed, total, used = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="agentforge-notebooks-") as folder:
        for path in paths:
            start, cpu, said = time.perf_counter(), kernels(), ""
            try:
                if options.smoke:
                    smoke(path, Path(folder))
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
