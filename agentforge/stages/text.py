"""The grammar of stages: texts such as "vptq:bits=3 | entropy" and their JSON, both ways; stages by name."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ..errors import BadInput
from ..names import meant, unknown
from .base import REGISTRY, Stage, setting_types
from .refined import Refined


def names() -> list[str]:
    """Names of all registered stages, sorted."""
    return sorted(REGISTRY)


def get(name: str, /, **settings: Any) -> Stage:
    """The stage of this name with these settings; what is not given keeps its default.

    Raises BadInput, listing what is valid, for an unknown name or setting, and for a value out of range.
    """
    if name not in REGISTRY:
        raise unknown("stage", name, names())
    cls = REGISTRY[name]
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in settings:
        if key not in valid:
            raise BadInput(f"stage {name} has no setting {key!r}; it has {', '.join(valid)}{meant(key, valid)}")
    stage = cls(**settings)
    stage.check()
    return stage


def from_json(data: Any) -> Stage:
    """The inverse of `Stage.to_json`.  Raises BadInput for anything else."""
    if not isinstance(data, dict) or not isinstance(data.get("stage"), str):
        raise BadInput(f"expected a stage as {{'stage': name, settings}}, found {data!r:.100}")
    if data["stage"] == Refined.name:
        first = data.get("first")
        if data != {"stage": Refined.name, "first": first, "planes": [], "entropy": True} or data["entropy"] is not True:
            raise BadInput(
                f"refined: expected entropy coding alone, found planes={data.get('planes')!r:.60} in {data!r:.60}"
            )
        if isinstance(first, dict) and first.get("stage") == Refined.name:
            raise BadInput("a refined stage is refined again; expected a stage on its own")
        return Refined(from_json(first))
    return get(data["stage"], **{k: v for k, v in data.items() if k != "stage"})


def parse(text: str) -> Stage:
    """A stage from the command line's form, `name` or `name:setting=value,setting=value`, and ` | entropy` for a refinement.

    Raises BadInput if a part is not of that form or `get` refuses it.
    """
    text, refinement, rest = text.partition("|")
    if refinement:
        return with_refinement(parse(text), rest)
    text = text.strip()
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    hints = setting_types(REGISTRY[name]) if name in REGISTRY else {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise BadInput(f"stage {text!r}: expected setting=value, found {part!r}")
        if key in settings:
            raise BadInput(f"stage {text!r}: {key} is set twice")
        settings[key] = _literal(value, hints.get(key))
    return get(name, **settings)


def with_refinement(first: Stage, text: str) -> Refined:
    """`first` with the refinement that `text` names.  Raises BadInput if that is not "entropy", or `first` has it."""
    if text.strip() != "entropy":
        raise BadInput(f"refinement {text.strip()!r}; expected entropy")
    stage = Refined(first)
    stage.check()
    return stage


def _literal(text: str, hint: Any) -> Any:
    """`text` as the type that the setting asks for, or as it is, so that `Stage.check` says what is wrong."""
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if hint is kind or (typing.get_origin(hint) is typing.Literal and kind in map(type, typing.get_args(hint))):
            try:
                return kind(text)
            except ValueError:
                return text
    return text
