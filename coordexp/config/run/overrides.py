"""Command-line overrides of a run file: `--set dotted.path=value` or `--dotted.path value`, ms-swift's own flags, and
our three flags.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from coordexp.config.checks import swift_arguments
from coordexp.config.checks.problems import COMMAND_LINE, KeyPath, Problem, closest, dotted
from coordexp.config.checks.yaml_tree import Tree, parse_scalar, read_yaml
from coordexp.config.run.dotted import DottedFlag, parse_path
from coordexp.config.run.draft import OUR_FLAGS, SWIFT_SECTIONS, TOP_KEYS, Draft, Written, unknown_argument
from coordexp.config.schema.training import Training
from coordexp.errors import ConfigError


def apply_overrides(draft: Draft, argv: Sequence[str]) -> None:
    """Lay the command line over a draft; a later flag wins over an earlier one.

    Raises:
        ConfigError: something that is no flag, a flag without its value, or `--set` without `=`.
    """
    for flag, values in _flags(argv):
        if flag == "set":
            for assignment in values:
                _set(draft, assignment)
        elif flag == "custom_trainer_variant":
            draft.variant = Written(_single(flag, values), flag, COMMAND_LINE)
        elif flag == "coordexp":
            draft.ours = Tree(_json_object(_single(flag, values)), {(): COMMAND_LINE})
        elif flag == "coordexp_config":
            draft.ours = read_yaml(_single(flag, values))
        else:
            _swift_flag(draft, flag, values)


def _flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`--a 1 2 --b=3 --set x=4` -> [("a", ["1", "2"]), ("b", ["3"]), ("set", ["x=4"])]."""
    flags: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(token)
        else:
            raise ConfigError(f"{token!r} on the command line: expected a flag such as --max_steps 100.")
    return flags


def _set(draft: Draft, assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {assignment}: expected dotted.path=value, such as custom.head=plain.")
    _assign(draft, parse_path(name, f"--set {name}=..."), parse_scalar(text))


def _assign(draft: Draft, path: KeyPath, value: Any) -> None:
    if path[0] == "coordexp" and len(path) > 1:
        path = path[1:]
    is_swift = len(path) == 1 and swift_arguments.is_known(str(path[0])) and path[0] != "debug"
    if len(path) == 2 and path[0] in SWIFT_SECTIONS and path[1] not in Training.model_fields:
        is_swift = True
    if is_swift:
        _put(draft, str(path[-1]), value, path)
    elif path[0] in TOP_KEYS:
        draft.ours.set(path, value, COMMAND_LINE)
    else:
        near = closest(str(path[0]), TOP_KEYS) or swift_arguments.nearest(str(path[0]))
        text = "unknown section or argument" + (f"; did you mean {near}?" if near else ".")
        draft.problems.append(Problem(dotted(path), text, place=COMMAND_LINE))


def _swift_flag(draft: Draft, flag: str, values: list[str]) -> None:
    if "." in flag:
        written = DottedFlag(flag, tuple(values))
        _assign(draft, written.path, written.value)
        return
    argument = swift_arguments.all_arguments(rlhf=True).get(flag)
    if argument is None:
        near = closest(flag, OUR_FLAGS)
        text = f"ms-swift has no such argument; did you mean {near}?" if near else unknown_argument(flag)
        draft.problems.append(Problem(f"--{flag}", text, place=COMMAND_LINE))
        return
    if "list" in argument.types and values:
        _put(draft, flag, values, (flag,))
    elif not values and "bool" in argument.types:
        _put(draft, flag, True, (flag,))
    else:
        _put(draft, flag, _single(flag, values), (flag,))


def _put(draft: Draft, name: str, value: Any, path: KeyPath) -> None:
    """An override replaces what the file says."""
    draft.swift.pop(name, None)
    draft.put_swift(name, value, path, COMMAND_LINE)


def _single(flag: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"--{flag} on the command line: expected one value, found {len(values)}.")
    return values[0]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--coordexp is not valid JSON ({error}); expected an object of sections."
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"--coordexp holds a JSON {type(value).__name__}; expected an object of sections.")
    return value
