"""What lies in the cache folder.  Cleared is only what agentforge can make again, and nothing that is in use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .errors import BadInput
from .folders import foreign, locked
from .models import SOURCE_FILE, cache_dir
from .names import unknown
from .tensorfiles import read_json

MODEL = r"(gguf-[0-9a-f]{16}|smollm2-135m|digits-mlp)-\d+"  # the number at the end is the conversion's
FILES = {  # of a folder: what they are, and their names
    "candidates": ("prices of settings, for fit", r"[0-9a-f]{16}(\.counted)?\.jsonl"),
    "measurements": ("measurements, for audit", r"[0-9a-f]{32}\.json(\.[0-9a-f]{16}\.tmp)?"),
}
UNFINISHED = rf"\.({MODEL}|{'|'.join(FILES)})-\w{{8}}"
_in_use: dict[Path, int] = {}  # folder -> descriptor that has its lock


def use(folder: Path) -> bool:
    """Whether a folder is there; if it is, it is not cleared for as long as this process lives."""
    while folder.is_dir():
        if folder not in _in_use:
            _in_use[folder] = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(_in_use[folder], fcntl.LOCK_SH)  # waits for one that clears it
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(_in_use[folder]), folder.stat()):
                return True
        os.close(_in_use.pop(folder))  # of one that was removed
    return False


def cached(name: str | None = None, clear: bool = False) -> list[dict[str, Any]]:
    """What lies in the cache folder, or what has this name, the largest first: name, what it is, its bytes, and kept: why it
    is not cleared, or nothing.  clear: remove what can be made again.  Raises BadInput if nothing has this name."""
    found, paths = [], sorted(cache_dir().glob("*"))
    if name is not None and name not in (names := [path.name for path in paths]):
        raise unknown("cache entry", name, names)
    for path in (path for path in paths if name in (None, path.name)):
        size = sum(each.lstat().st_size for each in (path, *path.rglob("*")) if each.is_symlink() or not each.is_dir())
        what, kept = _about(path)
        if not kept:
            try:
                with locked(path, path):
                    if clear:  # under another name first: a kill is to leave nothing that looks whole
                        aside = path if path.name.startswith(".") else path.with_name(f".{path.name}-_cleared")
                        os.replace(path, aside)
                        shutil.rmtree(aside)
            except BadInput:
                kept = "in use by a running process"
        found.append({"name": path.name, "what": what, "bytes": size, "kept": kept})
    return sorted(found, key=lambda entry: -entry["bytes"])


def _about(path: Path) -> tuple[str, str]:
    """What something in the cache folder is, and why it is to stay, or nothing."""
    if path.name == "registry":
        return "MLflow's registry", "nothing makes again what was registered"
    if path.is_dir() and not path.is_symlink():
        if re.fullmatch(UNFINISHED, path.name):
            return "left by a run that was killed", ""
        if path.name in FILES:
            what, pattern = FILES[path.name]
            strange = [file.name for file in path.iterdir() if file.is_dir() or not re.fullmatch(pattern, file.name)]
            return what, f"holds {strange[0]!a:.80}, which agentforge did not put there" if strange else ""
        if re.fullmatch(MODEL, path.name):
            with contextlib.suppress(BadInput):
                source = read_json(path / SOURCE_FILE)
                what = f"converted from {source['file']}" if "file" in source else "trained here"
                return what, foreign(path) or ""
    return "not agentforge's", "not agentforge's"
