"""Valid keys whose feature this version does not have yet: refused with that sentence, never ignored.

When a feature is built, its line leaves FEATURES_NOT_BUILT; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.problems import KeyPath, Problem, dotted
from coordexp.config.yaml_tree import Tree


def _given(value: Any) -> bool:
    return value is not None


def _on(value: Any) -> bool:
    return value is True


def _off(value: Any) -> bool:
    return value is False


VARIANT_PATH: KeyPath = ("custom", "trainer_variant")


@dataclass(frozen=True)
class Feature:
    """A key, what it would turn on, and the values that ask for it."""

    path: KeyPath
    what: str
    asked_for: Callable[[Any], bool] = _given


FEATURES_NOT_BUILT: tuple[Feature, ...] = (
    Feature(
        VARIANT_PATH,
        "stage-2 training",
        lambda value: value in ("stage2_two_channel", "stage2_rollout_aligned"),
    ),
    Feature(("stage2_ab",), "two-channel training"),
    Feature(("rollout_matching",), "training on rollouts"),
    Feature(("custom", "coord_tokens", "enabled"), "coordinates as plain numbers", _off),
    Feature(("custom", "coord_tokens", "skip_bbox_norm"), "normalising boxes at load time", _off),
    Feature(("custom", "coord_offset", "enabled"), "the coord-offset adapter", _on),
    Feature(("custom", "token_type_metrics", "enabled"), "token-type metrics", _on),
    Feature(("custom", "head"), "the fused head", lambda value: value == "fused"),
    Feature(("custom", "on_nonfinite_loss"), "skipping a step", lambda value: value == "skip_step"),
    Feature(("debug", "enabled"), "the runtime checks of debug mode", _on),
    Feature(("debug", "train_sample_limit"), "limiting the number of records"),
    Feature(("debug", "val_sample_limit"), "limiting the number of records"),
    Feature(("training", "packing_buffer"), "packing"),
    Feature(("training", "packing_min_fill_ratio"), "packing"),
    Feature(("training", "packing_drop_last"), "packing"),
    Feature(("training", "eval_packing"), "packing of evaluation samples"),
)

SWIFT_NOT_BUILT: Mapping[str, Feature] = {
    "packing": Feature(("packing",), "packing", _on),
    "packing_length": Feature(("packing_length",), "packing"),
    "padding_free": Feature(("padding_free",), "padding-free batches", _on),
    "sequence_parallel_size": Feature(("sequence_parallel_size",), "sequence parallelism", lambda v: v != 1),
}
"""ms-swift arguments that our trainers do not handle yet."""


def refuse(path: str, feature: Feature, value: Any, place: Any) -> Problem:
    """The refusal of a key whose feature is not built."""
    shown = {} if isinstance(value, Mapping) else {"value": value}
    return Problem(
        path,
        f"a valid key, but {feature.what} is not built yet in this version of coordexp.",
        place=place,
        **shown,
    )


def refuse_variant(path: str, variant: str, place: Any) -> list[Problem]:
    """The refusal of a trainer variant that is not built, or nothing."""
    feature = next((feature for feature in FEATURES_NOT_BUILT if feature.path == VARIANT_PATH), None)
    if feature is None or not feature.asked_for(variant):
        return []
    return [refuse(path, feature, variant, place)]


def find_not_built(tree: Tree) -> list[Problem]:
    """Every key written in the sections that asks for a feature which is not built."""
    problems = []
    for feature in FEATURES_NOT_BUILT:
        value: Any = tree.data
        for part in feature.path:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and feature.asked_for(value):
            problems.append(refuse(dotted(feature.path), feature, value, tree.place(feature.path)))
    return problems
