"""Operations on pictures in a file of the research code: those that are here, with the parameters they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coordexp.config.schema.augmentation import OPERATIONS

OPS = "custom.augmentation.ops"
PHASES = "custom.augmentation.curriculum.phases"
WHY_NOT = {
    "rotate": "the box of a turned object is not tight, so boxes would be wrong",
    "expand_to_fit_affine": "it makes room for turned pictures, which are not here",
}
CROP_NOTE = (
    "scale of random_crop is a share of the picture's area, aspect_ratio a factor on its shape; objects of which less "
    "than min_coverage is left are left out, whole ones are described as before."
)


def carried(path: str, value: Any) -> tuple[Any, list[str], list[str]]:
    """The value of `OPS` or `PHASES` here; operations that are left out; parameters that are, as name.parameter."""
    if not isinstance(value, list):
        return value, [], []
    operations: list[str] = []
    parameters: list[str] = []
    if path == OPS:
        kept = [
            {**entry, "params": _known(entry["name"], entry.get("params") or {}, parameters)}
            for entry in _of_known_names(value, operations)
        ]
        return kept, operations, parameters
    phases = []
    for phase in value:
        changes = phase.get("ops") if isinstance(phase, Mapping) else None
        if isinstance(changes, Mapping):
            named = [{"name": name, "params": params} for name, params in changes.items()]
            kept_ops = {
                entry["name"]: _known(entry["name"], entry["params"] or {}, parameters)
                for entry in _of_known_names(named, operations)
            }
            phase = {**phase, "ops": kept_ops}
        phases.append(phase)
    return phases, list(dict.fromkeys(operations)), list(dict.fromkeys(parameters))


def _of_known_names(entries: Sequence[Any], left_out: list[str]) -> Iterator[Any]:
    for entry in entries:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if name in OPERATIONS:
            yield entry
        else:
            left_out.append(str(name))


def _known(name: str, params: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    taken = OPERATIONS[name]
    left_out += [f"{name}.{key}" for key in params if key not in taken]
    return {key: value for key, value in params.items() if key in taken}
