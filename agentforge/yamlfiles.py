"""YAML that somebody else may have written: read as plain data, or refused by its line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import BadInput

LARGEST = 4 << 20  # bytes
DEEPEST = 40
MOST_VALUES = 200_000  # an alias counts as all that it stands for
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
Line = Callable[[Sequence[Any]], int]


def read_yaml(path: Path, expected: str) -> tuple[Any, Line]:
    """What a YAML file holds (mappings with text as keys, lists, text, finite numbers, true, false, null), and a function
    that gives the line, from 1, of the value at a path, or of its nearest parent.

    expected: what the file should be, for messages.  Raises BadInput, by line, for keys that are there twice, aliases of
    what they are a part of or of too much, deep nesting, numbers beyond a float, and whatever else is not a plain data.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: is not a file; expected {expected}")
        if (size := path.stat().st_size) > LARGEST:
            raise BadInput(f"{path}: {size:,} bytes; expected {expected} of at most {LARGEST:,}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: no valid YAML (it is not UTF-8); expected {expected}") from None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # without recursion, which composing is not
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _Refused(event, f"is nested more than {DEEPEST} deep; expected {expected}")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None, lambda _: 1
        loader = yaml.SafeLoader("")
        _check(root, loader, {})
        return loader.construct_document(root), lambda where: _line(root, where)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        place = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{place}: {why if isinstance(error, _Refused) else f'no valid YAML ({why})'}") from None


class _Refused(yaml.MarkedYAMLError):
    """YAML that is not for us."""

    def __init__(self, place: Any, why: str) -> None:
        super().__init__(problem=why, problem_mark=place.start_mark)


def _check(node: yaml.Node, loader: yaml.SafeLoader, counts: dict[int, int]) -> int:
    """How many values a node stands for; `counts` has those of the nodes that are known, 0 while one is being counted."""
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise _Refused(node, "is a part of itself, by an alias; write it out")
        return known
    if node.tag not in PLAIN:
        raise _Refused(node, f"{node.tag.rsplit(':', 1)[-1][:40]!r} is not plain data; expected text in quotes, or a number")
    counts[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [value for _, value in node.value]
        seen = set()
        for key, _ in node.value:
            if key.tag not in (TEXT, MERGE) or not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a key is not text; expected a name, in quotes if it looks like something else")
            if key.value in seen:
                raise _Refused(key, f"{key.value[:80]!r} is there twice; expected it once")
            seen.add(key.value)
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    else:
        try:
            value = loader.construct_object(node)
            finite = not isinstance(value, int | float) or math.isfinite(float(value))
        except (ValueError, OverflowError, LookupError):  # what the library raises for numbers and words that are none
            finite = False
        if not finite:
            raise _Refused(node, f"{node.value[:40]} is not a finite number; expected one, or null")
    counts[id(node)] = 1 + sum(_check(part, loader, counts) for part in parts)
    if counts[id(node)] > MOST_VALUES:
        raise _Refused(node, f"stands for more than {MOST_VALUES:,} values, aliases counted; write fewer")
    return counts[id(node)]


def _line(node: yaml.Node, path: Sequence[Any]) -> int:
    for step in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode) and (found := [v for k, v in node.value if k.value == step]):
            node = found[-1]  # the first ones may be merged in by "<<"
    return int(node.start_mark.line) + 1
