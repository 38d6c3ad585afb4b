"""Named texts: where each is looked for, and which one was found.

wikitext2   WikiText-2 raw: in the folder AGENTFORGE_DATA, else in shared/data beside the checkout, else from the hub
selftext    texts that SmolLM2-135M-Instruct wrote itself, shipped with the package, split into calibration and held-out
a path      any UTF-8 text file
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import BadInput
from ..names import unknown

DATA = Path(__file__).parent.parent / "data"
CHECKOUT = Path(__file__).parent.parent.parent
WIKITEXT2_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}
WIKITEXT2_SHA256 = {
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "validation": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
}
SPLITS = {"wikitext2": ("test", "validation"), "selftext": ("heldout", "calibration")}
CHAIN = ("wikitext2", "selftext")


@dataclass(frozen=True)
class Text:
    """A text and where it came from.  skipped: what was looked for first and why it was not used."""

    name: str
    split: str
    text: str = field(repr=False)
    origin: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_text(name: str | Text | None = None, split: str | None = None) -> Text:
    """A text by name or path; without a name, the first of `CHAIN` that is there.

    split: "test" or "validation" of wikitext2, "heldout" or "calibration" of selftext; the first one by default.
    Raises BadInput if it is not available.
    """
    if isinstance(name, Text):
        return name
    if name is None:
        skipped: list[str] = []
        for candidate in CHAIN:
            try:
                return replace(find_text(candidate, split), skipped=tuple(skipped))
            except BadInput as error:
                skipped.append(str(error))
        raise BadInput("no text was found: " + "; ".join(skipped))
    if name in SPLITS:
        chosen = split or SPLITS[name][0]
        if chosen not in SPLITS[name]:
            raise BadInput(f"text {name} has no split {chosen!r}; it has {', '.join(SPLITS[name])}")
        if name == "wikitext2":
            return _wikitext2(chosen)
        return Text(name, chosen, "\n\n".join(selftexts(chosen)), f"agentforge/data/selftext-{chosen}.jsonl.xz")
    try:
        path = Path(name).expanduser()
        found_file = path.is_file()
    except (OSError, RuntimeError):  # a name too long for a file, or ~ of nobody
        found_file = False
    if not found_file:
        raise unknown("text", name, SPLITS, "expected a text file or one of")
    return Text(path.name, "file", _read(path), str(path))


def selftexts(split: str = "calibration") -> list[str]:
    """The texts of selftext one by one: 7,249 to calibrate or train on, 381 held out (every twentieth)."""
    if split not in SPLITS["selftext"]:
        raise BadInput(f"text selftext has no split {split!r}; it has {', '.join(SPLITS['selftext'])}")
    with lzma.open(DATA / f"selftext-{split}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _wikitext2(split: str) -> Text:
    tried = []
    for label, folder in _data_folders():
        for candidate in (folder / "wikitext-2-raw" / WIKITEXT2_FILES[split], folder / WIKITEXT2_FILES[split]):
            if candidate.is_file():
                return _official(Text("wikitext2", split, _read(candidate), f"{label}/{candidate.name}"))
        tried.append(f"not in {label}")
    try:
        rows = _wikitext2_from_hub(split)
    except Exception as error:  # datasets raises what its many back ends raise
        tried.append(f"not from the hub ({type(error).__name__})")
        raise BadInput(
            f"wikitext2: {', '.join(tried)}; set AGENTFORGE_DATA to a folder that has {WIKITEXT2_FILES[split]}"
        ) from None
    # The hub's rows are the file's lines, but for blank lines, which it empties.
    return _official(Text("wikitext2", split, "".join(row or " \n" for row in rows), "hub:Salesforce/wikitext"))


def _official(text: Text) -> Text:
    """The text, if it is the one that papers are measured on.  Raises BadInput otherwise."""
    if text.sha256 != WIKITEXT2_SHA256[text.split]:
        raise BadInput(
            f"{text.origin}: sha256 is {text.sha256[:8]}..., expected {WIKITEXT2_SHA256[text.split][:8]}...; "
            "it is not the official WikiText-2 raw file"
        )
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _data_folders() -> list[tuple[str, Path]]:
    named = os.environ.get("AGENTFORGE_DATA")
    beside = ("../shared/data", CHECKOUT.parent / "shared" / "data")
    return [("AGENTFORGE_DATA", Path(named).expanduser()), beside] if named else [beside]


def local_data() -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of every file in the folders of local data: what may be measured on."""
    depths = ("*", "*/*", "*/*/*")
    files = sorted(
        file for _, folder in _data_folders() for depth in depths for file in folder.glob(depth) if file.is_file()
    )
    return [(str(file), (about := file.stat()).st_size, about.st_mtime_ns) for file in files]


def _wikitext2_from_hub(split: str) -> list[str]:
    from datasets import load_dataset

    reach_hub()
    return list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])


def reach_hub() -> None:
    """Raise OSError if the hub does not answer; nothing is asked if a proxy or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    # The hub's client tries for most of a minute before it gives up; without a network we want to know at once.
    free = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE")
    if not any(os.environ.get(name) for name in free):
        endpoint = urlsplit(constants.ENDPOINT)
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=3).close()
