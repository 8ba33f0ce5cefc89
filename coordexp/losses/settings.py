"""Frozen dataclasses read strictly from plain mappings: every key known, every value in range."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from coordexp.errors import ConfigError

T = TypeVar("T")


def number(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    optional: bool = False,
) -> Any:
    """A dataclass field holding a finite number: >= minimum, > above, <= maximum; None if `optional`."""
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "optional": optional}
    return dataclasses.field(default=default, metadata={"number": limits})


def check_numbers(settings: Any, path: str = "") -> None:
    """Check every `number` field of a dataclass instance. Raises ConfigError with the dotted path."""
    for field in dataclasses.fields(settings):
        if "number" in field.metadata:
            _check_number(dotted(path, field.name), getattr(settings, field.name), **field.metadata["number"])


def read(cls: type[T], mapping: Mapping[str, Any], path: str, *, complete: bool) -> T:
    """Build `cls` from a mapping: `check_keys`, then every `number` field.

    Raises ConfigError with the dotted path for a wrong key or a value out of range.
    """
    check_keys(cls, mapping, path, complete=complete)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in mapping and "number" in field.metadata:
            _check_number(dotted(path, field.name), mapping[field.name], **field.metadata["number"])
    return cls(**mapping)


def check_keys(cls: type, mapping: Mapping[str, Any], path: str, *, complete: bool) -> None:
    """The keys must be exactly (or, if not `complete`, among) the fields of `cls`.

    Raises ConfigError for an unknown key, with the nearest valid one, or for a missing key.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{path}: found {type(mapping).__name__} {mapping!r}, expected a mapping of settings"
        )
    known = [field.name for field in dataclasses.fields(cls)]
    for key in mapping:
        if key not in known:
            raise ConfigError(unknown_name(dotted(path, str(key)), str(key), known))
    missing = [name for name in known if name not in mapping]
    if complete and missing:
        raise ConfigError(
            f"{dotted(path, missing[0])} is missing: expected exactly the keys {', '.join(known)}"
        )


def unknown_name(where: str, name: str, known: Iterable[str]) -> str:
    """Message for a name nobody knows, with the nearest valid one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{where}: unknown name {name!r}{hint}; expected one of {', '.join(known)}"


def check_bool(path: str, value: Any) -> None:
    """Raises ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{path} = {value!r}: expected true or false")


def dotted(path: str, key: str) -> str:
    """path.key, or just the key at the top."""
    return f"{path}.{key}" if path else key


def _check_number(
    path: str,
    value: Any,
    *,
    minimum: float | None,
    above: float | None,
    maximum: float | None,
    optional: bool,
) -> None:
    if value is None and optional:
        return
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", minimum), (">", above), ("<=", maximum))
        if bound is not None
    ]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not is_number
        or (minimum is not None and value < minimum)
        or (above is not None and value <= above)
        or (maximum is not None and value > maximum)
    ):
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip() + (
            " or null" if optional else ""
        )
        raise ConfigError(f"{path} = {value!r}: expected {expected}")
