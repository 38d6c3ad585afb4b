"""Lock what pyproject.toml asks for, and write environment.yml, the conda file of the same environment.

python tools/environment.py           write environment.yml from the lock files
python tools/environment.py --check   exit 1 if it is not what would be written
python tools/environment.py --lock    resolve again first, by uv (pip install uv); pins stay where they can.  To take newer
                                      releases, delete their lines from the lock files before
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from install import CPU_INDEX, ROOT, Pin, read

PYTHONS = ("3.11.0", "3.11.9", "3.12.0", "3.13.0", "3.14.0")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
LOCKS = {
    "requirements.lock": "What make audit needs",
    "requirements-dev.lock": "What make test and make docs need beside requirements.lock",
    "requirements-cuda.lock": "What PyPI's torch needs on Linux, and its CPU build does not",
}
AUDIT = ("lab", "tasks", "registry", "dashboard")
CUDA = re.compile(r"nvidia-|cuda-|triton$")


def normal(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, list[Pin]]:
    """Package -> its pins in the lock files, one for each range of Pythons that needs one of its own."""
    found: dict[str, dict[str, Pin]] = {}
    for lock in LOCKS:
        for pin in read(lock):
            found.setdefault(normal(pin.name), {})[str(pin)] = pin
    return {name: list(found[name].values()) for name in sorted(found)}


def markers(python: str, system: str, machine: str) -> dict[str, str]:
    """What markers are evaluated with, on this Python and platform."""
    return {
        "implementation_name": "cpython",
        "implementation_version": python,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": system.capitalize(),
        "python_full_version": python,
        "python_version": ".".join(python.split(".")[:2]),
        "sys_platform": system,
    }


def applies(marker: str, python: str, system: str, machine: str) -> bool:
    """Whether a pin is for this Python on this platform."""
    from packaging.markers import Marker

    return not marker or Marker(marker).evaluate(markers(python, system, machine))


def tags(python: str, system: str, machine: str) -> set[Any]:
    """The tags of wheels that pip installs there: glibc 2.36 (Debian 12) or macOS 14."""
    from packaging.tags import compatible_tags, cpython_tags, mac_platforms

    version = tuple(map(int, python.split(".")[:2]))
    if system == "linux":
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(5, 37)]
        platforms += [f"{old}_{machine}" for old in ("manylinux1", "manylinux2010", "manylinux2014", "linux")]
    else:
        platforms = list(mac_platforms((14, 0), machine))
    interpreter = f"cp{version[0]}{version[1]}"
    return {*cpython_tags(version, platforms=platforms), *compatible_tags(version, interpreter, platforms)}


def resolve(extras: tuple[str, ...] | None, before: str) -> list[tuple[str, str, str]]:
    """Name, version and marker of all that a set of extras needs (None: all of them), for every Python and platform."""
    with tempfile.TemporaryDirectory() as folder:
        (asked := Path(folder) / "asked.in").write_text("pip\nsetuptools>=77\n")  # what the set-up itself works with
        (out := Path(folder) / "out.txt").write_text(before)
        chosen = ["--all-extras"] if extras is None else [part for extra in extras for part in ("--extra", extra)]
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0], *chosen]
        command += ["--no-header", "--no-annotate", str(ROOT / "pyproject.toml"), str(asked), "--output-file", str(out)]
        subprocess.run(command, check=True)
        lines = [re.fullmatch(r"([\w.-]+)==([^\s;]+)(?: ; (.*))?", line) for line in out.read_text().splitlines()]
    found = [(line[1], line[2], line[3] or "") for line in lines if line]
    assert len(found) == len(lines), "uv wrote lines that are not pins"
    return [one for one in found if any(applies(one[2], python, *where) for python in PYTHONS for where in PLATFORMS)]


def pinned(name: str, version: str, marker: str, known: dict[str, list[Pin]]) -> Pin:
    """A pin with its files, as PyPI lists them: wheels for the Pythons and platforms in question, else the source."""
    from packaging.utils import parse_sdist_filename, parse_wheel_filename

    request = urllib.request.Request(
        f"https://pypi.org/simple/{normal(name)}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        listed = json.load(reply)["files"]
    wanted = set().union(*(tags(p, *w) for p in PYTHONS for w in PLATFORMS if applies(marker, p, *w)))
    files, sources, asked = {}, {}, ""
    for file in listed:
        one = (max(1, round(file["size"] / 1000)), file["hashes"]["sha256"])
        try:
            if file["filename"].endswith(".whl"):
                _, found, _, fits = parse_wheel_filename(file["filename"])
                if str(found) == version and fits & wanted:
                    files[file["filename"]], asked = one, file.get("requires-python") or ""
            elif str(parse_sdist_filename(file["filename"])[1]) == version:
                sources[file["filename"]], asked = one, asked or file.get("requires-python") or ""
        except ValueError:  # an old file whose name follows no rule
            continue
    if name == "torch":
        files |= cpu_builds(version, wanted, known)
    return Pin(name, version, marker, asked, files or sources)


def cpu_builds(version: str, wanted: set[Any], known: dict[str, list[Pin]]) -> dict[str, tuple[int, str]]:
    """The CPU builds of torch, which PyTorch's own index has; as the lock has them already, if it cannot be asked."""
    from packaging.utils import parse_wheel_filename

    before = [pin.files for pin in known.get("torch", ()) if pin.version == version]
    locked = {file: one for files in before for file, one in files.items() if "+cpu" in file}
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=20) as reply:
            links = re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', reply.read().decode())
    except OSError:
        assert locked, f"{CPU_INDEX} does not answer, and the lock has no CPU build of torch {version}"
        return locked
    found = {}
    for link, sha256 in links:
        name = link.rpartition("/")[2].replace("%2B", "+")
        if name.startswith(f"torch-{version}+cpu-") and parse_wheel_filename(name)[3] & wanted:
            size = urllib.request.Request(urllib.parse.urljoin(f"{CPU_INDEX}/torch/", link), method="HEAD")
            with urllib.request.urlopen(size, timeout=20) as head:
                found[name] = (round(int(head.headers["Content-Length"]) / 1000), sha256)
    return found


def lock() -> None:
    """Write the three lock files."""
    known = pins()
    before = [f"{p.name}=={p.version}" + (f" ; {p.marker}" if p.marker else "") for found in known.values() for p in found]
    everything = resolve(None, "\n".join(before) + "\n")
    text = "".join(f"{name}=={version}{f' ; {marker}' if marker else ''}\n" for name, version, marker in everything)
    audit = resolve(AUDIT, text)
    assert {one[:2] for one in audit} <= {one[:2] for one in everything}
    needed = {one[0] for one in audit}
    direct = {normal(re.split(r"[^\w.-]", one)[0]) for one in dependencies()}
    written: dict[str, list[Pin]] = {name: [] for name in LOCKS}
    for one in everything:
        pin = pinned(*one, known)
        print(f"{pin.name} {pin.version}: {len(pin.files)} files", flush=True)
        if CUDA.match(pin.name):
            written["requirements-cuda.lock"].append(pin)
        if pin.name in needed and not CUDA.match(pin.name):
            written["requirements.lock"].append(pin)
        elif not CUDA.match(pin.name) or normal(pin.name) in direct:
            written["requirements-dev.lock"].append(pin)
    for name, found in written.items():
        head = (
            f"# {LOCKS[name]}; written by tools/environment.py --lock, installed by tools/install.py with --no-deps.\n"
            "# For Python 3.11 to 3.14 on Linux with glibc (x86-64, aarch64) and on macOS (arm64).\n"
            "# Above each pin: the Pythons it asks for, and its files in the order of their hashes."
        )
        (ROOT / name).write_text("\n\n".join([head, *map(str, found)]) + "\n", encoding="utf-8")


def dependencies() -> list[str]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]


def text() -> str:
    """The content of environment.yml: Python and pip by conda, everything else as the lock files have it, without hashes."""
    lines = [
        "# Written by tools/environment.py from the lock files.",
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
        f"      - --extra-index-url {CPU_INDEX}",
        "      - --editable .",
    ]
    for name, found in pins().items():
        for pin in found:
            if name != "pip" and not CUDA.match(name):
                line = f"{pin.name}=={pin.version}"
                lines.append(f'      - "{line} ; {pin.marker}"' if pin.marker else f"      - {line}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = ROOT / "environment.yml"
    if "--lock" in sys.argv:
        lock()
    if "--check" in sys.argv:
        sys.exit(0 if target.read_text() == text() else "environment.yml is not what tools/environment.py writes; run it")
    target.write_text(text())
