"""Write environment.yml, the conda file of the environment that pyproject.toml asks for and requirements.lock pins.

python tools/environment.py           write it
python tools/environment.py --check   exit 1 where it is not what would be written
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def normal(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Package -> pinned version, from the lock."""
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[normal(name)] = version
    return pins


def text() -> str:
    """The content of environment.yml: Python and pip by conda, each direct dependency as pinned, the rest constrained."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = {*project["dependencies"], *(one for extra in extras.values() for one in extra)}
    pins = locked()
    lines = [
        "# Written by tools/environment.py from pyproject.toml and requirements.lock.",
        "# conda env create --file environment.yml",
        "name: agentforge",
        "channels:",
        "  - conda-forge",
        "  - nodefaults",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - make",
        "  - git",
        "  - pip:",
        "      - --constraint requirements.lock",
        "      - --editable .",
    ]
    for requirement in sorted(direct, key=str.lower):
        match = re.match(r"([\w.-]+)(\[[\w,]+\])?", requirement)
        assert match, requirement
        _, semicolon, marker = requirement.partition(";")
        line = f"{match[1]}{match[2] or ''}=={pins[normal(match[1])]}{semicolon}{marker}"
        lines.append(f'      - "{line}"' if marker else f"      - {line}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = ROOT / "environment.yml"
    if "--check" in sys.argv:
        sys.exit(0 if target.read_text() == text() else "environment.yml is not what tools/environment.py writes; run it")
    target.write_text(text())
