"""Folders that agentforge writes: recognised as its own, replaced by renames, removed last.

Only what agentforge has made is removed or replaced.  Each of its folders carries a mark, a file that says what else
it has put there; a folder without one, and anything beside it that the mark does not account for, belongs to the user.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BadInput
from .tensorfiles import TEMPLATES, read_json

# The mark of a folder, and what may lie beside it; if the mark has "files", these may, too.
MARKS = {
    "agentforge.json": r"history\.json",
    "agentforge-source.json": r"",
    "recipe.json": r"lock|tensors(/(\d{5,}|shared|checkpoint|best)\.safetensors)?|folder",
    "journal.json": r"handoff\.json|(step-\d+|artifact)(\.partial|\.agentforge-old)?",
}
# What a mark says in any case, if others may use its name, too.
MARKED: dict[str, set[str]] = {"recipe.json": set(), "journal.json": {"recipe", "original", "attempts"}}
# What an artifact can be of, if its mark is damaged and no longer says so.
USUAL = r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|tokenizer.*|special_tokens_map\.json|LICEN[SC]E.*"
REPORT = (".json", ".ipynb", ".html", ".md", ".sarif", ".intoto.json")


def foreign(folder: Path) -> str | None:
    """The first thing in a folder that agentforge has not put there; None for one that is all its own, or empty."""
    if folder.is_symlink() or not folder.is_dir():
        return "is not a folder of agentforge's"
    children = sorted(folder.iterdir())
    if all(_temporary(child) or (child.name == "lock" and not child.stat().st_size) for child in children):
        return None  # empty, or just begun
    mark, pattern = _mark(folder)
    if mark is None:
        return f"holds {children[0].name!a:.80} and nothing that says agentforge made it"
    for child in children:
        if child.name == mark or _temporary(child):
            continue
        if not re.fullmatch(pattern, child.name):
            return f"holds {child.name!a:.80}, which agentforge did not put there"
        if child.is_symlink() or not child.is_dir() or (mark, child.name) == ("recipe.json", "folder"):
            continue
        if mark == "recipe.json" or child.name == TEMPLATES:
            files = [file for file in sorted(child.iterdir()) if not _temporary(file)]
            strange = [file.name for file in files if not re.fullmatch(pattern, f"{child.name}/{file.name}")]
            found = f"holds {strange[0]!a:.80}, which agentforge did not put there" if strange else None
        else:
            found = foreign(child)
        if found:
            return f"holds {child.name}, which {found}"
    return None


def _temporary(path: Path) -> bool:
    """Whether it is a file that `write_atomic` had not renamed yet when it was killed."""
    return re.fullmatch(r".+\.[0-9a-f]{16}\.tmp", path.name) is not None and path.is_file() and not path.is_symlink()


def _mark(folder: Path) -> tuple[str | None, str]:
    """The name of the file that marks a folder as made by agentforge, and the pattern of what may lie beside it."""
    for name, pattern in MARKS.items():
        if (folder / name).is_file() and not (folder / name).is_symlink():
            data: Any = {}
            with contextlib.suppress(BadInput):
                data = read_json(folder / name)
            if name in MARKED and not (data and data.keys() >= MARKED[name]):
                continue  # somebody else's file of that name
            files = data.get("files")
            listed = map(re.escape, files) if isinstance(files, dict) else [USUAL]
            return name, "|".join([pattern, TEMPLATES, *listed] if name.startswith("agentforge") else [pattern])
    for file in sorted(folder.glob("*.json")):  # a report is marked by its record
        with contextlib.suppress(BadInput):
            data = read_json(file)
            if data.get("report") == file.stem and isinstance(data.get("claims"), list):
                return file.name, "|".join([*(re.escape(file.stem + end) for end in REPORT), r"figure-\d+\.png"])
    if (folder.parent / "journal.json").is_file() and re.fullmatch(MARKS["journal.json"], folder.name):
        return "", USUAL  # a step of a chain that has lost its manifest
    return None, ""


def remove(folder: Path) -> None:
    """Remove a folder that agentforge has made, its mark last, so that what a kill leaves can be told, too.

    Nothing happens if there is none.  Raises BadInput if anything in it is not agentforge's.
    """
    if not os.path.lexists(folder):
        return
    if strange := foreign(folder):
        raise BadInput(f"{folder}: {strange}, so that it is not removed; move it away and run again")
    mark, _ = _mark(folder)
    for child in sorted(folder.iterdir(), key=lambda child: child.name == mark):
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    folder.rmdir()


@contextlib.contextmanager
def locked(path: Path, out: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made if it is not there; no link is followed.  wait: until nobody
    else has it.  Otherwise raises BadInput, about `out`, if another process has it."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise BadInput(f"{out}: another agentforge is writing it; wait for that one") from None
        yield
    finally:
        os.close(descriptor)


def old_of(out: Path) -> Path:
    """Where `replace` keeps the old folder until the new one is there: a name that nobody gives to a copy of his own."""
    return out.with_name(out.name + ".agentforge-old")


def check_out(out: str | Path, *inputs: Path, replace: bool = False) -> Path:
    """The folder to write, absolute, and free to be written: what a kill left of its replacement is put right.

    inputs: what must not be written over.  replace: a folder of agentforge's may be there, and is to go.
    Raises BadInput if the folder cannot be used, before any work.
    """
    out = Path(out).expanduser()
    target = Path(os.path.abspath(out))
    here = Path(os.path.abspath("."))
    if target == here or target in here.parents:
        raise BadInput(f"{out}: is the folder that this runs in, or above it; name a new folder")
    real = Path(os.path.realpath(target))
    for path in inputs:
        if real == (held := Path(os.path.realpath(path))) or real in held.parents:
            raise BadInput(f"{out}: is the folder of {path}, which is read, or above it; name another one")
    try:
        old = old_of(target)
        if os.path.lexists(old):
            if strange := foreign(old):
                raise BadInput(f"{old}: {strange}; it is in the way, move it and run again")
            if os.path.lexists(target):
                remove(old)
            else:
                os.replace(old, target)
        if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink()):
            raise BadInput(f"{out}: is in the way and not a folder; choose another one")
        if replace and target.is_dir() and (strange := foreign(target)):
            raise BadInput(f"{out}: {strange}; it is not replaced, choose another folder or move that away")
    except OSError as error:
        raise BadInput(f"{str(out)!a:.80}: cannot be written ({error.strerror}); choose another folder") from None
    return target if out.name in ("", "..") else out


def replace(made: Path, out: Path) -> None:
    """Rename the folder `made` to `out`.  What was there, a folder of agentforge's, is renamed away and removed last: killed
    at any moment, one of the two is whole, and `check_out` puts it in its place.

    Raises BadInput if anything in the old one is not agentforge's.
    """
    if out.is_dir() and (strange := foreign(out)):
        raise BadInput(f"{out}: {strange}; it is not replaced, choose another folder or move that away")
    sync(made)
    old = old_of(out)
    if out.exists():
        remove(old)
        os.replace(out, old)
    os.replace(made, out)
    sync(out.parent)
    remove(old)


def sync(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
