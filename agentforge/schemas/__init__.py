"""JSON Schemas (draft 2020-12) of what one program writes and another one reads, and the check against them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource

FOLDER = Path(__file__).parent


def problem(name: str, data: Any) -> str:
    """What is wrong with `data` under the schema of this name, and where, in one line; "" if nothing is."""
    found = first_error(FOLDER / f"{name}.json", data)
    if found is None:
        return ""
    where = ", ".join(f"{part}"[:80] for part in found.absolute_path) or "top level"
    message = found.message  # it begins with the value, and ends with what is wrong with it
    return f"{where}: {message if len(message) <= 240 else f'{message[:120]} ... {message[-100:]}'}"


def first_error(schema: Path, data: Any) -> Any:
    """The error of jsonschema that says best what is wrong with `data` under a schema; None if nothing is."""
    return jsonschema.exceptions.best_match(_validator(schema).iter_errors(data))


@functools.cache
def _validator(schema: Path) -> Any:
    """The validator of a schema; what it refers to lies beside it, and nothing is fetched from anywhere."""
    contents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in {*FOLDER.glob("*.json"), schema}}
    registry: Any = Registry().with_resources((key, Resource.from_contents(one)) for key, one in contents.items())
    return jsonschema.Draft202012Validator(contents[schema.name], registry=registry)
