"""The project's own files tell the truth about each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
# What the notebooks may cite: arXiv's number and the title that it has there.
PAPERS = {
    "2402.17764": "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits",
    "1308.3432": "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
    "2410.10714": "SeedLM: Compressing LLM Weights into Seeds of Pseudo-Random Generators",
    "2409.17066": "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
    "2409.00592": "Hyper-Compression: Model Compression via Hyperfunction",
    "2208.11580": "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
    "2212.09720": "The case for 4-bit precision: k-bit Inference Scaling Laws",
    "2407.09141": "Accuracy is Not All You Need",
    "1810.03993": "Model Cards for Model Reporting",
}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}


def direct() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = [line for lines in extras.values() for line in lines]
    names = [re.match(r"[\w.-]+", line) for line in [*project["dependencies"], *chosen]]
    return sorted({re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name})


def test_every_direct_dependency_is_pinned_and_torch_exactly() -> None:
    assert set(direct()) <= set(locked())
    assert locked()["torch"] == "2.13.0"
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda"))]


def test_environment_yml_is_the_same_environment() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == "agentforge"
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip[0] == "--constraint requirements.lock"
    pins = dict(line.partition(";")[0].split("==") for line in pip if not line.startswith("--"))
    pins = {re.sub(r"[-_.]+", "-", name.split("[")[0]).lower(): version for name, version in pins.items()}
    assert sorted(pins) == direct()
    assert all(locked()[name] == version for name, version in pins.items())
    python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert python.removeprefix("python=") in ("3.11", "3.12", "3.13")


@pytest.mark.parametrize("script", ["environment.py", "readme.py"])
def test_written_files_are_as_their_script_writes_them(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda path: "/".join(path.parts[-2:]))
def test_notebooks_carry_outputs_and_versions(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "version(" in source(code[0])
    assert all(cell["execution_count"] == i for i, cell in enumerate(code, start=1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    text = json.dumps(cells)
    assert "Traceback" not in text
    assert "/tmp/" not in text
    assert "/root/" not in text
    assert not [cell for cell in cells if set(cell["metadata"]) - {"tags"}], "python tools/notebooks.py --strip"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_one_structure(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    header, code = source(cells[0]), [cell for cell in cells if cell["cell_type"] == "code"]
    for part in (
        f"# {path.stem[:2]} ",
        "**What you will learn**",
        "**Time** ",
        " two cores",
        "smoke mode",
        "**Memory** ",
        "**Needs** ",
    ):
        assert part in header, part
    (parameters,) = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters is code[1]
    assert source(parameters).startswith("smoke = False")
    assert any("if smoke" in source(cell) for cell in code[2:])
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    numbers = [int(n) for n in re.findall(r"^## (\d+) ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert re.findall(r"^## \d+ (.*)$", text, re.MULTILINE)[-2:] == ["What to remember", "Exercises"]
    pictures = [i for i, cell in enumerate(cells) if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))]
    assert pictures
    for i in pictures:  # the finding stands under each picture
        after = next(source(cell) for cell in cells[i + 1 :] if cell["cell_type"] == "markdown")
        assert after.startswith("**What the plot shows.**"), source(cells[i])[:80]
    assert source(code[-1]).startswith("# What this notebook stands for, asserted.")
    assert source(code[-1]).count("assert ") >= 3
    assert sum("assert " in source(cell) for cell in code) >= 2
    assert any("nbval-check-output" in cell["metadata"].get("tags", []) for cell in code)


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *SOLUTIONS, ROOT / "notebooks" / "README.md"], ids=lambda path: "/".join(path.parts[-2:])
)
def test_links_of_the_notebooks_lead_somewhere(path: Path) -> None:
    if path.suffix == ".md":
        text = path.read_text()
    else:
        text = "\n".join(source(c) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link), link
            assert link.rpartition("/")[2] in PAPERS, f"{link} is not in the list of papers"
        else:
            assert (path.parent / link).exists(), link


def test_the_course_is_whole_and_in_order() -> None:
    index = (ROOT / "notebooks" / "README.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", index) == [path.name for path in NOTEBOOKS]
    assert re.findall(r"\]\(notebooks/(\d\d_\w+\.ipynb)\)", readme) == [path.name for path in NOTEBOOKS]
    assert [path.name for path in SOLUTIONS] == [path.name for path in NOTEBOOKS]
    for path, after in zip(NOTEBOOKS, [*NOTEBOOKS[1:], None], strict=True):
        last = source(json.loads(path.read_text())["cells"][-1])
        assert f"[Solutions](solutions/{path.name})" in last
        assert "Back to the [index](README.md)" in last
        assert after is None or f"({after.name})" in last


def source(cell: Any) -> str:
    """A cell's text, whichever of the two forms it is stored in."""
    return "".join(cell["source"])


def test_the_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
