"""Valid keys whose feature this version does not have yet: refused with that sentence, never ignored.

When a feature is built, its line leaves FEATURES_NOT_BUILT; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.checks.problems import COMMAND_LINE, KeyPath, Place, Problem, as_yaml, dotted
from coordexp.config.checks.yaml_tree import Tree


@dataclass(frozen=True)
class Feature:
    """A key, what it would turn on, and the values that ask for it.

    values: none means any value but null.  unless: values that ask for nothing.  instead: what to use.
    """

    path: KeyPath
    what: str
    values: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = (None,)
    instead: str = ""

    def asked_for(self, value: Any) -> bool:
        """Whether a value of the key asks for the feature."""
        wanted = not self.values or any(value is item or value == item for item in self.values)
        return wanted and not any(value is item or value == item for item in self.unless)

    @property
    def shown(self) -> str:
        """The key with the values that are refused, as in YAML."""
        return dotted(self.path) + (": " + " or ".join(map(as_yaml, self.values)) if self.values else "")


FEATURES_NOT_BUILT: tuple[Feature, ...] = (
    Feature(("custom", "coord_tokens", "skip_bbox_norm"), "normalising boxes at load time", (False,)),
)

_DEEPSPEED = "Use deepspeed: zero2, or zero3 for a model that does not fit on a device."

SWIFT_NOT_BUILT: tuple[Feature, ...] = (
    Feature(("streaming",), "streaming of data files", (True,)),
    Feature(("sequence_parallel_size",), "sequence parallelism", unless=(None, 1)),
    Feature(("fsdp",), "sharding by FSDP", unless=(None, ""), instead=_DEEPSPEED),
    Feature(
        ("deepspeed_autotp_size",), "tensor parallelism of DeepSpeed", unless=(None, 1), instead=_DEEPSPEED
    ),
)
"""ms-swift arguments that our trainers do not handle yet."""


def refuse(path: str, feature: Feature, value: Any, place: Place | None) -> Problem:
    """The refusal of a key whose feature is not built."""
    text = f"a valid key, but {feature.what} is not built yet in this version of coordexp."
    text += f" {feature.instead}" if feature.instead else ""
    if isinstance(value, Mapping):
        return Problem(path, text, place=place)
    return Problem(path, text, value=value, place=place)


def swift_not_built(swift: Mapping[str, Any]) -> list[Problem]:
    """Every ms-swift argument that asks for something our trainers do not handle, from parsed flags."""
    found = [(feature, swift.get(str(feature.path[0]))) for feature in SWIFT_NOT_BUILT]
    return [
        refuse(f"--{feature.path[0]}", feature, value, COMMAND_LINE)
        for feature, value in found
        if feature.asked_for(value)
    ]


def find_not_built(tree: Tree) -> list[Problem]:
    """Every key written in the sections that asks for a feature which is not built."""
    problems = []
    for feature in FEATURES_NOT_BUILT:
        value: Any = tree.data
        for part in feature.path:
            value = value.get(part) if isinstance(value, Mapping) else None
        if feature.asked_for(value):
            problems.append(refuse(dotted(feature.path), feature, value, tree.place(feature.path)))
    return problems
