"""The project's own files tell the truth about each other."""

from __future__ import annotations

import copy
import http.server
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

from agentforge.audit.workshop import EFFORTS

MADE = ("commands.md",)  # pages that only the site has
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import environment  # noqa: E402
import install  # noqa: E402

import notebooks  # noqa: E402

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


ENVIRONMENTS = [(python, *where) for python in environment.PYTHONS for where in environment.PLATFORMS]


def needed(requirement: str, extras: frozenset[str], python: str, system: str, machine: str) -> bool:
    """Whether a requirement of a package is one for these extras, on this Python and platform."""
    marker = Requirement(requirement).marker
    found = environment.markers(python, system, machine)
    return marker is None or any(marker.evaluate(found | {"extra": extra}) for extra in ["", *extras])


def test_every_direct_dependency_is_pinned_and_torch_exactly() -> None:
    pins = environment.pins()
    assert {environment.normal(Requirement(line).name) for line in environment.dependencies()} <= set(pins)
    assert [pin.version for pin in pins["torch"]] == ["2.13.0"]
    both = {pin.name for lock in ("requirements.lock", "requirements-dev.lock") for pin in install.read(lock)}
    assert not [name for name in both if name.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("where", ENVIRONMENTS, ids="-".join)
def test_the_lock_has_one_version_and_a_file_of_each_package_for(where: tuple[str, str, str]) -> None:
    tags = environment.tags(*where)
    for lock in environment.LOCKS:
        pins = [pin for pin in install.read(lock) if environment.applies(pin.marker, *where)]
        assert len(pins) == len({environment.normal(pin.name) for pin in pins}), lock
        for pin in pins:
            assert SpecifierSet(pin.python).contains(where[0]), f"{pin.name} {pin.version} asks for Python {pin.python}"
            wheels = [parse_wheel_filename(file)[3] for file in pin.files if file.endswith(".whl")]
            assert not wheels or any(found & tags for found in wheels), f"{pin.name} {pin.version} has no wheel"
            if pin.name == "torch":
                assert any("+cpu" in file and parse_wheel_filename(file)[3] & tags for file in pin.files) == (
                    where[1] == "linux"
                )


@pytest.mark.parametrize("where", ENVIRONMENTS, ids="-".join)
def test_the_lock_is_a_resolution_for(where: tuple[str, str, str]) -> None:
    """What each package asks for (as its installed form says) is pinned, in a version that will do."""
    pins = {
        name: one for name, found in environment.pins().items() for one in found if environment.applies(one.marker, *where)
    }
    ahead, seen = [(line, frozenset[str](), "agentforge") for line in environment.dependencies()], set()
    while ahead:
        line, extras, whose = ahead.pop()
        if not needed(line, extras, *where):
            continue
        wanted = Requirement(line)
        name = environment.normal(wanted.name)
        assert name in pins, f"{whose} needs {line}, which no lock has"
        assert wanted.specifier.contains(pins[name].version, prereleases=True), (
            f"{whose} needs {line}, not {pins[name].version}"
        )
        asked = frozenset(wanted.extras)
        if (name, asked) not in seen and install.installed(name).partition("+")[0] == pins[name].version:
            seen.add((name, asked))
            ahead += [(other, asked, name) for other in importlib.metadata.requires(name) or ()]
    assert len(seen) > 200


def test_a_pip_that_the_lock_does_not_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pip,) = (pin for pin in install.read("requirements.lock") if pin.name == "pip")
    (file,) = pip.files
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "index.html").write_text(f'<a href="../{file}#sha256=0">{file}</a>')
    (tmp_path / file).write_bytes(b"another file")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as Debian's Python without python3-venv
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(SystemExit, match=r"not the file that requirements\.lock names"):
            install.bootstrap()
        server.shutdown()
    assert (tmp_path / "venv" / "bin" / "python").exists()
    assert not list((tmp_path / "venv").rglob("pip*"))


def test_the_set_up_is_never_silent_and_fails_with_pips_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (slow := tmp_path / "python").write_text(
        "#!/bin/sh\necho Collecting x==1\nsleep 2.5\necho ERROR: no space left\nexit 1\n"
    )
    slow.chmod(0o755)
    monkeypatch.setattr(install, "QUIET", 1)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(SystemExit, match=r"(?s)ERROR: no space left.*installing x failed"):
        install.run("installing x", [], 2)
    first, *later = capsys.readouterr().out.splitlines()
    slow.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found for x'\nexit 1\n")
    assert not install.run("installing x", [], optional=True)
    with pytest.raises(SystemExit, match="installing x failed"):
        install.run("installing x", [])
    monkeypatch.setenv("PIP_CONSTRAINT", "of the machine")
    slow.write_text("#!/bin/sh\ntest $PIP_CONSTRAINT = /dev/null\n")
    assert install.run("installing x", [])
    assert first == "installing x"
    assert later[0].endswith("s: 1 of 2, asking the package index")


def test_readme_says_what_is_downloaded_and_measured() -> None:
    readme = " ".join(((ROOT / "README.md").read_text() + (ROOT / "docs" / "guide.md").read_text()).split())
    where = ("3.11.0", "linux", "x86_64")
    tags = environment.tags(*where)

    def files(pin: install.Pin) -> list[int]:
        return [kb for f, (kb, _) in pin.files.items() if not f.endswith(".whl") or parse_wheel_filename(f)[3] & tags]

    pins = {lock: [p for p in install.read(lock) if environment.applies(p.marker, *where)] for lock in environment.LOCKS}
    audit, dev, cuda = (sum(min(files(pin)) for pin in found) / 1e6 for found in pins.values())
    (torch,) = (files(pin) for pin in pins["requirements.lock"] if pin.name == "torch")
    cuda += (max(torch) - min(torch)) / 1e6
    assert f"`make audit` downloads {audit:.1f} GB, `make test` {audit + dev:.1f} GB" in readme
    assert f"PyPI's torch brings {cuda:.1f} GB of CUDA" in readme
    quick, standard, full = (EFFORTS[name] for name in ("quick", "standard", "full"))
    assert f"likelihoods on {quick.tokens:,} tokens, one in {quick.every} of" in readme
    assert f"`make audit BUDGET=standard` takes {standard.tokens:,} tokens, one matrix in {standard.every}," in readme
    assert (
        f"BUDGET=full` ({full.tokens:,} tokens, one matrix in {full.every}, five seeds, {full.calibration:,} tokens"
        in readme
    )
    assert f"calibrated on {quick.calibration:,} tokens" in readme
    assert (quick.seeds, full.seeds) == (2, 5)


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1400


def test_environment_yml_is_the_same_environment() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == "agentforge"
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    found = {environment.normal(Requirement(line).name): Requirement(line) for line in pip if not line.startswith("--")}
    pins = environment.pins()
    assert {environment.normal(Requirement(line).name) for line in environment.dependencies()} <= set(found)
    assert all(str(requirement.specifier)[2:] in {pin.version for pin in pins[name]} for name, requirement in found.items())
    assert "--editable ." in pip


@pytest.mark.parametrize("script", ["environment.py", "readme.py"])
def test_written_files_are_as_their_script_writes_them(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "guide.md"], ids=lambda path: path.name)
def test_links_of_readme_and_guide_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists() or link in MADE, link


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda path: "/".join(path.parts[-2:]))
def test_notebooks_carry_outputs_and_versions(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "version(" in source(code[0])
    assert all(cell["execution_count"] == i for i, cell in enumerate(code, start=1))
    wrong = [cell for cell in code if any(output["output_type"] == "error" for output in cell["outputs"])]
    assert all("raises-exception" in tags(cell) for cell in wrong)
    text = json.dumps(cells)
    for trace in ("Traceback", "/tmp/", "/root/", "interactive(children="):
        assert trace not in text
    notebook = nbformat.read(path, 4)
    assert notebooks.stripped(copy.deepcopy(notebook)) == notebook, "python tools/notebooks.py --strip"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda path: "/".join(path.parts[-2:]))
def test_cells_of_notebooks_are_short(path: Path) -> None:
    """Read on a laptop: 25 lines of 100 characters.  A plot's code may be longer: it is folded, few will open it."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            lines = source(cell).splitlines()
            assert max(map(len, lines)) <= 100, lines[0]
            assert len(lines) <= 25 or "plot" in tags(cell), lines[0]
            assert ("plot" in tags(cell)) == bool(cell["metadata"].get("jupyter")), lines[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_are_cells_that_a_check_judges(path: Path) -> None:
    """Stubs fail: nbval compares a check's error with the one stored here.  Solutions pass the same checks."""
    stubs, checks = exercises(path)
    answers, passed = exercises(path.parent / "solutions" / path.name)
    assert len(stubs) == len(answers) == len(checks) == len(passed) >= 2
    for stub, answer in zip(stubs, answers, strict=True):
        assert "# your code here" in source(stub)
        assert not stub["outputs"] and "# your code here" not in source(answer)
    for check, same in zip(checks, passed, strict=True):
        assert source(check) == source(same)
        assert source(check).startswith("# Run this to check your answer: ")
        assert tags(check) == ["check", "nbval-check-output", "raises-exception"]
        assert tags(same) == ["check"]
        assert [(output["output_type"], output.get("ename")) for output in check["outputs"]] == [("error", "AssertionError")]
        assert check["outputs"][0]["evalue"], "says nothing that helps"


def exercises(path: Path) -> tuple[list[Any], list[Any]]:
    """The cells of exercises, and the checks, each of which follows its exercise at once."""
    cells = json.loads(path.read_text())["cells"]
    judged = [(cell, after) for cell, after in zip(cells, cells[1:], strict=False) if "exercise" in tags(cell)]
    assert all("check" in tags(after) for _, after in judged)
    assert sum("check" in tags(cell) for cell in cells) == len(judged)
    return [cell for cell, _ in judged], [after for _, after in judged]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_slider_has_a_picture_for_those_without_a_kernel(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    for before, cell in zip(cells, cells[1:], strict=False):
        if "slider" in tags(cell):
            assert "interact(" in source(cell) and not cell["outputs"]
            assert any("image/png" in output.get("data", {}) for output in before["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_index_promises_the_minutes_that_were_measured(path: Path) -> None:
    said = re.search(r"\*\*Time\*\* (\d+) minutes? of CPU \(measured\)", source(json.loads(path.read_text())["cells"][0]))
    assert said
    assert re.search(rf"\({path.name}\).*\| {said[1]} min \|", (path.parent / "README.md").read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_one_structure(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    header, code = source(cells[0]), [cell for cell in cells if cell["cell_type"] == "code"]
    for part in (
        f"# {path.stem[:2]} ",
        "**What you will learn**",
        "**Time** ",
        "smoke mode",
        "**Memory** ",
        "**Needs** ",
    ):
        assert part in header, part
    (parameters,) = [cell for cell in code if "parameters" in tags(cell)]
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
        for output in cells[i]["outputs"]:
            assert len(output["metadata"]["image/png"]["alt"]) > 20
    code = [cell for cell in code if not {"exercise", "check"} & set(tags(cell))]
    assert source(code[-1]).startswith("# What this notebook stands for, asserted.")
    assert source(code[-1]).count("assert ") >= 3
    assert sum("assert " in source(cell) for cell in code) >= 2
    assert any("nbval-check-output" in tags(cell) for cell in code)


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


def tags(cell: Any) -> list[str]:
    """A cell's tags."""
    found: list[str] = cell["metadata"].get("tags", [])
    return found


def test_the_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
