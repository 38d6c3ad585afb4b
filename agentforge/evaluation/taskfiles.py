"""Questions of the task suites from local files, in the form in which lm-eval's tasks expect them from the hub.

Below the folder (JSON files as .json or .jsonl, each file also as .gz or .bz2):
    arc/arc_easy_test, arc/arc_easy_validation, arc/arc_challenge_test: question, choices (text, label), answerKey
    gsm8k/test: question, answer
    hellaswag/hellaswag_val_full.txt: six lines per item, context, number of the right ending, four endings
    humaneval/HumanEval: prompt, entry_point, test
    mmlu/test/SUBJECT_test.csv, mmlu/dev/SUBJECT_dev.csv: question, four choices, letter
    truthfulqa/mc_task: question, mc1_targets and mc2_targets (choice: 0 or 1)
    winogrande/dev: sentence, option1, option2, answer
These are the files that the data sets' authors give out; HellaSwag's is the one of llama.cpp.

Files are not trusted: sizes are bounded, also of what compressed ones hold, and a row that is not as it should be is
refused with its file and line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadInput
from .texts import _data_folders

BYTES = 64 << 20  # that a file may hold
CHARACTERS = 50_000  # that a text in it may have
ENDINGS = ("", ".jsonl", ".json", ".txt", ".csv")
OPENERS: dict[str, Callable[[Path], Any]] = {"": lambda path: path.open("rb"), ".gz": gzip.open, ".bz2": bz2.open}
Rows = list[dict[str, Any]]


class Found(NamedTuple):
    """splits: for each part of a task (mmlu's subjects, as "_anatomy"; else one, named ""), the rows to ask ("test") and,
    if there are any, those to show as examples ("dev").  origin: where they come from."""

    splits: dict[str, dict[str, Rows]]
    origin: str


def find(name: str, folder: str | Path | None = None) -> Found | None:
    """The questions of a task from `folder`, else from the folders in which texts are looked for; None if they are in
    none of them.

    Raises BadInput for a folder that was named and does not have them, and for files that cannot be read.
    """
    folders = _data_folders() if folder is None else [(str(folder), Path(folder).expanduser())]
    for label, root in folders:
        if splits := _mmlu(root) if name == "mmlu" else _splits(name, root):
            return Found(splits, f"{label}/{SOURCES[name][0].rpartition('/')[0]}")
    if folder is not None:
        raise BadInput(f"{folder}: has no {looked_for(name)}; name a folder that has it")
    return None


def looked_for(name: str) -> str:
    """The file that `find` looks for."""
    return "mmlu/test/*_test.csv" if name == "mmlu" else SOURCES[name][0]


def _splits(name: str, root: Path) -> dict[str, dict[str, Rows]]:
    test, dev, convert = SOURCES[name]
    rows = {}
    for split, stem in (("test", test), ("dev", dev)):
        if stem and (path := _existing(root, stem)):
            records = _sixes(path) if name == "hellaswag" else _records(path)
            rows[split] = [_converted(convert, record, path, where) for where, record in records]
            if not rows[split]:
                raise BadInput(f"{path}: is empty; expected questions of {name}")
    return {"": rows} if "test" in rows else {}


def _mmlu(root: Path) -> dict[str, dict[str, Rows]]:
    splits = {}
    for path in sorted((root / "mmlu" / "test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        dev = root / "mmlu" / "dev" / f"{subject}_dev.csv"
        rows = {"test": _csv(path, subject)} | ({"dev": _csv(dev, subject)} if dev.is_file() else {})
        if not rows["test"]:
            raise BadInput(f"{path}: is empty; expected questions of mmlu")
        splits[f"_{subject}"] = rows
    return splits


def _existing(root: Path, stem: str) -> Path | None:
    files = (root / f"{stem}{ending}{packing}" for ending in ENDINGS for packing in OPENERS)
    return next((file for file in files if file.is_file()), None)


def _read(path: Path) -> str:
    packing = path.suffix if path.suffix in OPENERS else ""
    try:
        with OPENERS[packing](path) as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise BadInput(f"{path}: holds more than {BYTES >> 20} MB; expected the questions of one task")
        return str(data, "utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON objects, one per line or in one array, each with its place."""
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            yield from ((f"item {i}", record) for i, record in enumerate(json.loads(text), start=1))
            return
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not a JSON array ({error})") from None
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {i}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {i}: is not JSON ({error})") from None


def _sixes(path: Path) -> Iterator[tuple[str, list[str]]]:
    lines = _read(path).removesuffix("\n").split("\n")
    for i in range(0, len(lines) if lines != [""] else 0, 6):
        yield f"line {i + 1}", lines[i : i + 6]


def _csv(path: Path, subject: str) -> Rows:
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    rows = []
    try:
        for record in reader:
            rows.append({**_converted(_mmlu_row, record, path, f"line {reader.line_num}"), "subject": subject})
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: is not CSV ({error})") from None
    return rows


def _converted(convert: Callable[[Any], dict[str, Any]], record: Any, path: Path, where: str) -> dict[str, Any]:
    try:
        return convert(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise BadInput(f"{path}, {where}: {why}; fix the file or fetch it again") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > CHARACTERS:
        raise ValueError(f"expected a text of at most {CHARACTERS} characters, found {str(value)[:40]!r}")
    return value


def _one_of(value: Any, choices: list[Any]) -> int:
    if value not in choices:
        raise ValueError(f"expected an answer among {choices}, found {str(value)[:40]!r}")
    return choices.index(value)


def _choices(values: Any) -> list[str]:
    if not isinstance(values, list) or not 2 <= len(values) <= 26:
        raise ValueError(f"expected 2 to 26 choices, found {str(values)[:40]!r}")
    return [_text(value) for value in values]


def _arc(row: Any) -> dict[str, Any]:
    choices, labels = _choices(row["choices"]["text"]), _choices(row["choices"]["label"])
    if len(choices) != len(labels):
        raise ValueError(f"{len(choices)} choices with {len(labels)} labels")
    _one_of(row["answerKey"], labels)
    return {
        "question": _text(row["question"]),
        "choices": {"text": choices, "label": labels},
        "answerKey": row["answerKey"],
    }


def _gsm8k(row: Any) -> dict[str, Any]:
    if "####" not in _text(row["answer"]):
        raise ValueError("expected an answer that ends in #### and a number")
    return {"question": _text(row["question"]), "answer": row["answer"]}


def _hellaswag(lines: Any) -> dict[str, Any]:
    if len(lines) != 6:
        raise ValueError(f"expected six lines per item, found {len(lines)}")
    return {"query": _text(lines[0]), "choices": _choices(lines[2:]), "label": _one_of(lines[1].strip(), list("0123"))}


def _humaneval(row: Any) -> dict[str, Any]:
    texts = {key: _text(row[key]) for key in ("task_id", "prompt", "entry_point", "test")}
    if not texts["entry_point"].isidentifier():
        raise ValueError(f"expected the name of a function, found {texts['entry_point'][:40]!r}")
    return texts


def _mmlu_row(row: Any) -> dict[str, Any]:
    if len(row) != 6:
        raise ValueError(f"expected six fields (question, four choices, letter), found {len(row)}")
    return {"question": _text(row[0]), "choices": _choices(row[1:5]), "answer": _one_of(row[5].strip(), list("ABCD"))}


def _truthfulqa(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"question": _text(row["question"])}
    for key in ("mc1_targets", "mc2_targets"):
        # lm-eval takes the first choice of mc1 for the right one, as the hub has them.
        pairs = sorted(row[key].items(), key=lambda pair: pair[1] != 1)
        labels = [_one_of(label, [0, 1]) for _, label in pairs]
        if not 0 < sum(labels) < len(labels) or (key == "mc1_targets" and sum(labels) != 1):
            raise ValueError(f"{key} has {sum(labels)} right choices of {len(labels)}")
        found[key] = {"choices": [_text(choice) for choice, _ in pairs], "labels": labels}
    return found


def _winogrande(row: Any) -> dict[str, Any]:
    if _text(row["sentence"]).count("_") != 1:
        raise ValueError("expected one _ in the sentence")
    _one_of(row["answer"], ["1", "2"])
    return {key: _text(row[key]) for key in ("sentence", "option1", "option2", "answer")}


SOURCES: dict[str, tuple[str, str, Callable[[Any], dict[str, Any]]]] = {
    "arc_challenge": ("arc/arc_challenge_test", "", _arc),
    "arc_easy": ("arc/arc_easy_test", "arc/arc_easy_validation", _arc),
    "gsm8k": ("gsm8k/test", "", _gsm8k),
    "hellaswag": ("hellaswag/hellaswag_val_full", "", _hellaswag),
    "humaneval": ("humaneval/HumanEval", "", _humaneval),
    "mmlu": ("mmlu/test", "", _mmlu_row),
    "truthfulqa_mc1": ("truthfulqa/mc_task", "", _truthfulqa),
    "truthfulqa_mc2": ("truthfulqa/mc_task", "", _truthfulqa),
    "winogrande": ("winogrande/dev", "", _winogrande),
}
