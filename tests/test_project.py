"""The project's own files tell the truth about each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}


def direct() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = [line for extra in ("lab", "dask", "tasks", "dev") for line in extras[extra]]
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_carry_outputs_assertions_and_versions(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "version(" in "".join(code[0]["source"])
    assert all(cell["execution_count"] == i for i, cell in enumerate(code, start=1))
    assert any(output.get("data", {}).get("image/png") for cell in code for output in cell["outputs"])
    assert sum("assert " in "".join(cell["source"]) for cell in code) >= 2
    text = json.dumps(cells)
    assert "Traceback" not in text
    assert "/tmp/" not in text
    assert "/root/" not in text


def test_the_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
