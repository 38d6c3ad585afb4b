"""Set up .venv as the lock files say, for this Python and this machine: python3 tools/install.py [dev]

Needs only Python 3.11: if Debian left out ensurepip, pip comes from the index, too.  Every file is checked against
the hashes of the lock.  requirements.lock is what an audit needs, requirements-dev.lock what the tests need beside it, and
requirements-cuda.lock what PyPI's torch needs on Linux; if an index offers torch's CPU build, that is taken instead.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUIET = 10  # seconds after which a line says that work continues


@dataclass(frozen=True)
class Pin:
    """A package of a lock.  python: the versions of Python that it asks for; files: name -> (kB, sha256)."""

    name: str
    version: str
    marker: str
    python: str
    files: dict[str, tuple[int, str]]

    def __str__(self) -> str:
        """Its lines in the lock."""
        lines = [f"# Python {self.python or 'any'}", *(f"# {name} {kb:,} kB" for name, (kb, _) in self.files.items())]
        pinned = f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")
        hashes = [f"--hash=sha256:{sha256}" for _, sha256 in self.files.values()]
        return "\n".join([*lines, " \\\n    ".join([pinned, *hashes])])


def read(lock: str) -> list[Pin]:
    """The pins of a lock file at the project's root."""
    pins = []
    for block in (ROOT / lock).read_text(encoding="utf-8").split("\n\n")[1:]:
        python = re.search(r"^# Python (.*)$", block, re.MULTILINE)
        files = re.findall(r"^# (\S+) ([\d,]+) kB$", block, re.MULTILINE)
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", block)
        pinned = re.search(r"^([\w.-]+)==([^\s;]+)(?: ; (.*?))? \\$", block, re.MULTILINE)
        assert python and pinned and len(files) == len(hashes), f"{lock}: not as tools/environment.py writes it:\n{block}"
        sizes = {name: (int(kb.replace(",", "")), sha) for (name, kb), sha in zip(files, hashes, strict=True)}
        pins.append(Pin(pinned[1], pinned[2], pinned[3] or "", python[1].replace("any", ""), sizes))
    return pins


def bootstrap() -> None:
    """Make .venv, with pip in it."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making .venv with Python {sys.version.split()[0]}")
        bare = [] if importlib.util.find_spec("ensurepip") else ["--without-pip"]
        subprocess.run([sys.executable, "-m", "venv", *bare, VENV], check=True)
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        return
    (pip,) = (pin for pin in read("requirements.lock") if pin.name == "pip")
    ((file, (_, sha256)),) = pip.files.items()
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    say(f"this Python has no ensurepip; fetching {file}")
    with urllib.request.urlopen(index, timeout=60) as page:
        found = re.search(rf'href="([^"]*{re.escape(file)}[^"]*)"', page.read().decode())
    if found is None:
        sys.exit(f"{index} has no {file}; install the package python3-venv, or name an index that has it in PIP_INDEX_URL")
    with urllib.request.urlopen(urllib.parse.urljoin(index, found[1].partition("#")[0]), timeout=60) as wheel:
        data = wheel.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{index}: {file} is not the file that requirements.lock names; it was not run")
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / file).write_bytes(data)
        subprocess.run([python, path / "pip", "install", "--quiet", "--no-deps", "--no-index", path], check=True)


def install(dev: bool) -> None:
    """Install what is missing in the environment that this runs in."""
    from pip._vendor.packaging.markers import Marker

    def missing(*locks: str) -> list[Pin]:
        wanted = [pin for lock in locks for pin in read(lock) if not pin.marker or Marker(pin.marker).evaluate()]
        return [pin for pin in wanted if installed(pin.name).partition("+")[0] != pin.version]

    pins = missing("requirements.lock", *(["requirements-dev.lock"] if dev else []))
    first = [pin for pin in pins if pin.name in ("pip", "setuptools")]
    torch = [pin for pin in pins if pin.name == "torch"]
    rest = [pin for pin in pins if pin not in first + torch]
    say(
        f"setting up .venv: {len(pins)} packages, {megabytes(pins)} to download unless pip has them already; "
        "a few minutes on a fast line"
    )
    pip(first)
    linux = sys.platform == "linux"
    index = ["--extra-index-url", CPU_INDEX] if torch and linux and answers(f"{CPU_INDEX}/torch/") else []
    # Asked for by name: of two builds pip takes the one whose hash its index says, which a folder of wheels does not.
    if not linux or not pip([replace(pin, version=f"{pin.version}+cpu") for pin in torch], *index, optional=True):
        pip(torch)
    if linux and not installed("torch").endswith("+cpu"):
        cuda = missing("requirements-cuda.lock")
        if cuda:
            say(f"no index here offers torch's CPU build: {len(cuda)} packages of CUDA, {megabytes(cuda)} more")
        rest += [pin for pin in cuda if pin not in rest]
    pip(rest)
    run("installing agentforge itself", ["--editable", str(ROOT)])
    subprocess.run([sys.executable, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)


def installed(name: str) -> str:
    """The version that is installed, or nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def megabytes(pins: list[Pin]) -> str:
    """How large the files are that pip will choose here."""
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import parse_wheel_filename

    tags, total = set(sys_tags()), 0
    for pin in pins:
        files = [file for file in pin.files if not file.endswith(".whl") or parse_wheel_filename(file)[3] & tags]
        total += min((pin.files[file][0] for file in files), default=0)
    return f"{total / 1000:,.0f} MB"


def answers(url: str) -> bool:
    """Whether an index is reachable: pip would ask it again and again."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return True
    except (OSError, ValueError):
        return False


def pip(pins: list[Pin], *options: str, optional: bool = False) -> bool:
    """Install pins, by their hashes, and nothing else.  optional: whether an index may lack them; False: it did."""
    if not pins:
        return True
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n\n".join(map(str, pins)) + "\n")
        file.flush()
        what = f"{pins[0].name} {pins[0].version}" if len(pins) == 1 else f"{len(pins)} packages"
        return run(f"installing {what}", ["--require-hashes", "--requirement", file.name, *options], len(pins), optional)


def run(what: str, arguments: list[str], total: int = 1, optional: bool = False) -> bool:
    """pip install, with a line at least every QUIET seconds; ends with pip's words if it fails.  optional: as of `pip`."""
    say(what)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", *arguments]
    # The pins decide alone: a machine's own constraints know nothing of them, and make pip call any absence a conflict.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    began = said = time.monotonic()
    heard, collected, doing = [], 0, "asking the package index"
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            line = ""
        if line is None:
            break
        heard.append(line)
        collected += line.startswith("Collecting ")
        if match := re.match(r"\s*(Downloading|Building wheel for|Installing collected) ?(\S*)(.*)", line):
            file = match[2].rpartition("/")[2]
            doing = "unpacking all of it" if "collected" in match[1] else f"{match[1].lower()} {file}{match[3].rstrip()}"
        if time.monotonic() - said >= QUIET:
            said = time.monotonic()
            say(f"  {said - began:.0f} s: {f'{collected} of {total}, ' if total > 1 else ''}{doing}")
    if process.wait() and not (optional and any("No matching distribution found" in line for line in heard)):
        sys.exit("\n".join([*filter(None, heard[-30:]), f"{what} failed; pip's last words stand above"]))
    return process.returncode == 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    if Path(sys.prefix).resolve() == VENV.resolve():
        install(dev="dev" in sys.argv[1:])
    else:
        bootstrap()
        os.execv(VENV / "bin" / "python", [str(VENV / "bin" / "python"), __file__, *sys.argv[1:]])
