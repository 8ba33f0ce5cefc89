"""Turns what pydantic finds wrong into problems with dotted path, value, place and the nearest valid name."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coordexp.config.checks.problems import NO_VALUE, KeyPath, Problem, as_yaml, closest, dotted
from coordexp.config.checks.removed import find_removed, removed_variant
from coordexp.config.checks.research import advice
from coordexp.config.checks.yaml_tree import Tree

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], tree: Tree) -> tuple[Model | None, list[Problem]]:
    """The typed model of a tree and its problems; None where the schema finds one.

    Removed keys are problems, and the rest is checked as if they were not there.
    """
    removed = find_removed(tree)
    rest = tree.without(path for path, _ in removed)
    problems = [problem for _, problem in removed]
    try:
        return model.model_validate(rest.data), problems
    except ValidationError as error:
        found = [_problem(model, rest, detail) for detail in error.errors(include_url=False)]
    first_of_each = {problem.path: problem for problem in reversed(found)}
    return None, [*problems, *list(first_of_each.values())[::-1]]


def _problem(model: type[BaseModel], tree: Tree, detail: ErrorDetails) -> Problem:
    path = real_path(tree.data, detail["loc"])
    place = tree.place(path)
    if detail["type"] == "extra_forbidden":
        return Problem(dotted(path), _unknown(model, path, tree.data), place=place)
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


def _unknown(model: type[BaseModel], path: KeyPath, data: Any) -> str:
    of_the_research_code = advice(dotted(path))
    if of_the_research_code is not None:
        return of_the_research_code
    known = known_keys(model, path[:-1], data)
    elsewhere = list(_paths_of(model, str(path[-1])))
    near = closest(str(path[-1]), known, cutoff=0.7)
    hint = f"; did you mean {dotted((*path[:-1], near))}?" if near else "."
    if elsewhere:  # the same name in another place is likelier than another name in this one
        hint = f"; did you mean {' or '.join(map(dotted, elsewhere))}?"
    listed = f" Known here: {', '.join(known)}." if known else " Nothing can be set here."
    return "unknown key" + hint + listed


def known_keys(model: type[BaseModel], path: KeyPath, data: Any = None) -> list[str]:
    """Field names of the model (or models) that a path leads to.

    data: what was written; its names choose among the models of a list.
    """
    candidates: list[Any] = [model]
    for part in path:
        inside = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int)
        )
        data = data[part] if inside else None
        if not isinstance(part, int):
            candidates = [inner for candidate in candidates for inner in _under(candidate, part)]
        if isinstance(data, Mapping):
            named = [c for c in candidates if _is_model(c) and _is_named(c, data.get("name"))]
            candidates = named or candidates
    return list(dict.fromkeys(name for c in candidates if _is_model(c) for name in c.model_fields))


def _under(candidate: Any, key: str) -> list[Any]:
    """Models, or mappings of any keys to models, that stand under a key of such a one."""
    if not _is_model(candidate):
        return _models_or_mappings(typing.get_args(candidate)[1])
    field = candidate.model_fields.get(key)
    return [] if field is None else _models_or_mappings(field.annotation)


def _models_or_mappings(annotation: Any) -> list[Any]:
    if _is_model(annotation) or typing.get_origin(annotation) is dict:
        return [annotation]
    if typing.get_origin(annotation) in (list, typing.Union, UnionType, typing.Annotated):
        return [found for part in typing.get_args(annotation) for found in _models_or_mappings(part)]
    return []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_named(model: type[BaseModel], name: Any) -> bool:
    """Whether a model is the one that a `name` chooses."""
    field = model.model_fields.get("name")
    return field is not None and typing.get_args(field.annotation) == (name,)


def _paths_of(model: type[BaseModel], name: str, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Where a key of that name stands in the model; list items carry no index, and modules of lists are left out."""
    for key, field in model.model_fields.items():
        here = (*path, key)
        if key == name:
            yield here
        inner = models_in(field.annotation)
        if len(inner) == 1 and "list[" not in str(field.annotation):
            yield from _paths_of(inner[0], name, here)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside a type hint (through lists, unions and Annotated)."""
    if _is_model(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (list, dict, typing.Union, UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in models_in(part)]
    return []
