"""The neutral payload in which metrics leave the process. No torch.

    {"schema_version": 1, "mode": "train" | "eval", "global_step": int, "metrics": {key: finite number}}

Further top-level sections are allowed and kept, so that a newer writer does not break an older reader of the
same major version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from coordexp.errors import ContractError
from coordexp.metrics.catalog import is_helper

SCHEMA_VERSION = 1
SUPPORTED_VERSIONS = (SCHEMA_VERSION,)
MODES = ("train", "eval")

Payload = dict[str, Any]


def build_payload(mode: str, global_step: int, metrics: Mapping[str, float], **sections: Any) -> Payload:
    """A payload of the current version; underscore-prefixed helper keys are left out.

    Raises:
        ContractError: as `validate_payload`.
    """
    return validate_payload(
        {
            **sections,
            "schema_version": SCHEMA_VERSION,
            "mode": mode,
            "global_step": global_step,
            "metrics": metrics,
        }
    )


def validate_payload(obj: object) -> Payload:
    """Check a payload and return it with plain Python numbers; helper keys go, other sections stay.

    Raises:
        ContractError: missing, non-integer or unsupported `schema_version`; a `mode` other than train or
            eval; a `global_step` that is no integer >= 0; metric keys that are no strings; values that are
            no finite numbers.
    """
    if not isinstance(obj, Mapping):
        raise ContractError(
            f"metrics payload: found {_describe(obj)}, expected a mapping with schema_version, mode, ..."
        )
    version = _check_version(obj)
    return {
        **{key: value for key, value in obj.items() if key not in _CORE},
        "schema_version": version,
        "mode": _check_mode(obj),
        "global_step": _check_step(obj),
        "metrics": _check_metrics(obj),
    }


_CORE = ("schema_version", "mode", "global_step", "metrics")
_MISSING = object()


def _check_version(obj: Mapping[Any, Any]) -> int:
    supported = f"supported: {', '.join(map(str, SUPPORTED_VERSIONS))} (an integer)"
    found = obj.get("schema_version", _MISSING)
    if found is _MISSING:
        raise ContractError(f"metrics payload: schema_version is missing; {supported}.")
    if not _is_integer(found):
        raise ContractError(
            f"metrics payload: schema_version is {_describe(found)}, not an integer; {supported}."
        )
    if found not in SUPPORTED_VERSIONS:
        raise ContractError(f"metrics payload: schema_version {found} is not supported; {supported}.")
    return int(found)


def _check_mode(obj: Mapping[Any, Any]) -> str:
    found = obj.get("mode", _MISSING)
    if not isinstance(found, str) or found not in MODES:
        raise ContractError(f"metrics payload: mode is {_describe(found)}; expected 'train' or 'eval'.")
    return str(found)


def _check_step(obj: Mapping[Any, Any]) -> int:
    found = obj.get("global_step", _MISSING)
    if not _is_integer(found) or found < 0:
        raise ContractError(f"metrics payload: global_step is {_describe(found)}; expected an integer >= 0.")
    return int(found)


def _check_metrics(obj: Mapping[Any, Any]) -> dict[str, float | int]:
    found = obj.get("metrics", _MISSING)
    if not isinstance(found, Mapping):
        raise ContractError(
            f"metrics payload: metrics is {_describe(found)}; expected a mapping of key to number."
        )
    for key in found:
        if not isinstance(key, str) or not key:
            raise ContractError(f"metrics payload: metric key {_describe(key)}; expected a non-empty string.")
    return {key: _plain_number(key, value) for key, value in found.items() if not is_helper(key)}


def _plain_number(key: str, value: object) -> float | int:
    if _is_integer(value):
        return int(value)  # type: ignore[call-overload, no-any-return]
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ContractError(
        f"metrics payload: metrics[{key!r}] is {_describe(value)}; expected a finite Python number."
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _describe(value: object) -> str:
    return "missing" if value is _MISSING else f"{value!r} ({type(value).__name__})"
