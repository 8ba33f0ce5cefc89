"""Turns what pydantic finds wrong into problems with dotted path, value, place and the nearest valid name."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coordexp.config.checks.problems import NO_VALUE, KeyPath, Problem, as_yaml, closest, dotted
from coordexp.config.checks.removed import find_removed, removed_variant
from coordexp.config.checks.yaml_tree import Tree


def validate(model: type[BaseModel], tree: Tree) -> tuple[BaseModel | None, list[Problem]]:
    """The typed model of a tree, or None and its problems: removed keys alone, else all that the schema says."""
    removed = find_removed(tree)
    if removed:
        return None, removed
    try:
        return model.model_validate(tree.data), []
    except ValidationError as error:
        problems = [_problem(model, tree, detail) for detail in error.errors(include_url=False)]
    return None, list({problem.path: problem for problem in reversed(problems)}.values())[::-1]


def _problem(model: type[BaseModel], tree: Tree, detail: ErrorDetails) -> Problem:
    path = real_path(tree.data, detail["loc"])
    place = tree.place(path)
    if detail["type"] == "extra_forbidden":
        return Problem(dotted(path), _unknown(model, path), place=place)
    if detail["type"] == "missing":
        return Problem(dotted(path), "is missing; it has no default.", place=place)
    value = detail["input"]
    if detail["type"] == "union_tag_invalid":
        path, value = (*path, "name"), value["name"]
        place = tree.place(path)
    hint = removed_variant(value) if path == ("custom", "trainer_variant") else None
    about_the_whole = detail["type"] == "value_error" and isinstance(value, Mapping | list)
    shown = NO_VALUE if about_the_whole else value
    return Problem(dotted(path), f"{hint or _expected(detail)}.", value=shown, place=place)


def real_path(data: Any, loc: tuple[int | str, ...]) -> KeyPath:
    """`loc` without the tags that pydantic adds for unions."""
    path: list[int | str] = []
    here = data
    for index, part in enumerate(loc):
        inside = (isinstance(here, Mapping) and part in here) or (
            isinstance(here, list) and isinstance(part, int)
        )
        if inside:
            here = here[part]
        elif index != len(loc) - 1 or not isinstance(here, Mapping):
            continue  # a tag
        path.append(part)
    return tuple(path)


def _expected(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return str(context["error"])
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        listed = context.get("expected") or context.get("expected_tags") or ""
        choices = re.findall(r"'([^']*)'", str(listed)) or str(listed).split(", ")
        value = detail["input"].get("name") if isinstance(detail["input"], Mapping) else detail["input"]
        near = closest(str(value), choices)
        return f"expected one of {', '.join(choices)}" + (f" (did you mean {as_yaml(near)}?)" if near else "")
    if detail["type"] == "union_tag_not_found":
        return "name is missing; every module states its name"
    if detail["type"] == "model_type":
        return "expected a mapping"
    text = detail["msg"].replace("Input should be", "expected")
    return text[0].lower() + text[1:]


def _unknown(model: type[BaseModel], path: KeyPath) -> str:
    known = _known_keys(model, path[:-1])
    near = closest(str(path[-1]), known)
    hint = f"; did you mean {dotted((*path[:-1], near))}?" if near else "."
    listed = f" Known here: {', '.join(known)}." if known else " Nothing can be set here."
    return "unknown key" + hint + listed


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Field names of the model (or models) that a path leads to."""
    candidates: list[type[BaseModel]] = [model]
    for part in path:
        if isinstance(part, int):
            continue
        annotations = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        candidates = [inner for annotation in annotations for inner in models_in(annotation)]
    return list(dict.fromkeys(name for candidate in candidates for name in candidate.model_fields))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside a type hint (through lists, unions and Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, dict, typing.Union, UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in models_in(part)]
    return []
