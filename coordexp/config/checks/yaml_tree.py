"""YAML files as plain data that remembers the file and line of every value; `extends`.

A file may start with `extends: OTHER.yaml` (relative to itself), and that file with another. Mappings are merged key
by key, anything else replaces what the base says.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from coordexp.config.checks.problems import KeyPath, Place, dotted
from coordexp.errors import ConfigError
from coordexp.shipped import recipe_file


@dataclass
class Tree:
    """Nested dicts, lists and scalars, and the place of every value by its path."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place | None:
        """Where the value at `path`, or its closest enclosing value, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None

    def subtree(self, key: str) -> Tree:
        """The mapping under a top-level key, with paths relative to it."""
        places = {path[1:]: place for path, place in self.places.items() if path[:1] == (key,)}
        value = self.data.get(key)
        return Tree(value if isinstance(value, dict) else {}, places)

    def without(self, paths: Iterable[KeyPath]) -> Tree:
        """This tree less some keys; mappings that held nothing else are gone too."""
        data = copy.deepcopy(self.data)
        for path in paths:
            _remove(data, path)
        return Tree(data, self.places)

    def merged_under(self, child: Tree) -> Tree:
        """This tree with `child` laid over it."""
        places = dict(self.places)
        data = _merge(self.data, child.data, (), places)
        return Tree(data, {**places, **child.places})

    def set(self, path: KeyPath, value: Any, place: Place) -> None:
        """Write a value; mappings on the way are made, list items must exist.

        Raises:
            ConfigError: an index outside its list, or a scalar on the way.
        """
        here: Any = self.data
        for depth, part in enumerate(path[:-1]):
            if isinstance(part, str) and isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = _step(here, part, path[: depth + 1])
        _check_step(here, path[-1], path)
        here[path[-1]] = value
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML mapping, resolving `extends` over as many files as there are.

    path: also `configs/...` of the recipes that come with the package, from any folder.

    Raises:
        ConfigError: no such file, broken YAML, a repeated key, a key that is no string, or files that extend
        each other in a circle.
    """
    return _read_extended(recipe_file(path), ())


def _read_extended(path: Path, below: tuple[Path, ...]) -> Tree:
    """below: the files that extend this one, from the first, each resolved."""
    child = _read_one(path)
    base_name = child.data.pop("extends", None)
    extends_place = child.places.pop(("extends",), None)
    if base_name is None:
        return child
    if not isinstance(base_name, str):
        raise ConfigError(f"extends in {extends_place}: expected the path of one YAML file.")
    base_path = path.parent / base_name
    if not base_path.is_file():
        raise ConfigError(f"extends in {extends_place}: {base_path} does not exist.")
    seen = (*below, path.resolve())
    if base_path.resolve() in seen:
        circle = [*seen[seen.index(base_path.resolve()) :], base_path.resolve()]
        raise ConfigError(
            f"extends in {extends_place}: files extend each other in a circle: "
            + " -> ".join(file.name for file in circle)
            + "; one of them must stand alone."
        )
    return _read_extended(base_path, seen).merged_under(child)


def parse_yaml(text: str, source: str) -> Tree:
    """A YAML mapping from its text; `extends` is a key like any other.

    source: what places and errors name.

    Raises:
        ConfigError: broken YAML, no mapping, a repeated key, or a key that is no string.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeated_keys(node, source)
        data = {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{source}:1: expected a mapping of settings, found {type(data).__name__}.")
    return Tree(data, dict(_places(node, (), source)))


def parse_scalar(text: str) -> Any:
    """A command-line value, read as YAML; `a: b` without braces stays text.

    Raises:
        ConfigError: text that is no YAML value.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value: {error}") from None
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-4` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _read_one(path: Path) -> Tree:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text ({error}).") from None
    return parse_yaml(text, str(path))


def _places(node: yaml.Node | None, path: KeyPath, file: str) -> Iterator[tuple[KeyPath, Place]]:
    """Line of every key and list item. Merge keys (`<<`) are already resolved by the loader."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                where = f"{file}:{key.start_mark.line + 1}"
                raise ConfigError(f"{where}: key {key.value!r} is not text; put it in quotes.")
            yield (*path, key.value), Place(file, key.start_mark.line + 1)
            yield from _places(value, (*path, key.value), file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), Place(file, item.start_mark.line + 1)
            yield from _places(item, (*path, index), file)


def _refuse_repeated_keys(node: yaml.Node | None, file: str, above: tuple[yaml.Node, ...] = ()) -> None:
    """Also keys that are no plain values, and aliases to a value around them. above: the nodes around this one."""
    if node is not None and any(node is outer for outer in above):
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: a value holds itself by an alias.")
    inside = above if node is None else (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, file, inside)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{file}:{line}: a key is a {key.id}; expected text.")
        if key.value in lines and key.value != "<<":
            raise ConfigError(
                f"{file}:{line}: key {key.value!r} is already set on line {lines[key.value]}; keep one of "
                f"them."
            )
        lines[str(key.value)] = line
        _refuse_repeated_keys(value, file, inside)


def _merge(
    base: Mapping[str, Any], child: Mapping[str, Any], path: KeyPath, places: dict[KeyPath, Place]
) -> dict[str, Any]:
    """`child` over `base`; forgets the places of base values that were replaced."""
    merged = dict(base)
    for key, value in child.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, here, places)
        else:
            merged[key] = value
            for known in [known for known in places if known[: len(here)] == here]:
                del places[known]
    return merged


def _remove(here: Any, path: KeyPath) -> None:
    """Take `path` out of nested mappings, and what is left empty by that."""
    if not isinstance(here, dict) or path[0] not in here:
        return
    if len(path) > 1:
        _remove(here[path[0]], path[1:])
    if len(path) == 1 or here[path[0]] == {}:
        del here[path[0]]


def _check_step(here: Any, part: str | int, path: KeyPath) -> None:
    if isinstance(part, int):
        if not isinstance(here, list) or not 0 <= part < len(here):
            size = f"a list of {len(here)}" if isinstance(here, list) else f"{type(here).__name__}"
            raise ConfigError(f"{dotted(path)} on the command line: found {size}; the item must exist.")
    elif not isinstance(here, dict):
        raise ConfigError(f"{dotted(path)} on the command line: {dotted(path[:-1])} is not a mapping.")


def _step(here: Any, part: str | int, path: KeyPath) -> Any:
    _check_step(here, part, path)
    return here[part]
