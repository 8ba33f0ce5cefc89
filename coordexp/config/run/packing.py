"""Packing settings that could not take effect, found before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.config.checks.problems import PlaceOf, Problem, WrittenOf, dotted
from coordexp.config.schema.custom import STAGE1_VARIANTS
from coordexp.config.schema.training import Training

FLASH_ATTENTION = ("flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""What ms-swift takes as `attn_impl` for its own `packing` and `padding_free`."""

BETWEEN_STEPS = ("packing_buffer", "packing_min_fill_ratio", "packing_drop_last")
"""Keys of a packer that carries samples from step to step."""


def packing_problems(
    swift: Mapping[str, Any], training: Training, variant: str, written: WrittenOf, place: PlaceOf
) -> list[Problem]:
    """Every packing setting of a run that its trainer variant or its attention could not honour.

    swift: ms-swift's arguments, flat; those left out count as unset.
    """
    ours = _stage1(training, swift) if variant in STAGE1_VARIANTS else _stage2(training)
    problems = [
        Problem(dotted(("training", key)), text, value=value, place=place(("training", key)))
        for key, (value, text) in ours.items()
    ]
    theirs = _of_swift(swift, training, variant)
    for name, text in theirs.items():
        path, where = written(name)
        problems.append(Problem(path, text, value=swift.get(name), place=where))
    return problems


def _stage1(training: Training, swift: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    found = {
        key: "stage 1 packs its data once, before training, and no pack waits for samples; remove it."
        for key in BETWEEN_STEPS
        if key in training.model_fields_set
    }
    if training.eval_packing and not (training.packing or swift.get("packing")):
        found["eval_packing"] = "has no effect without packing: true."
    return {key: (getattr(training, key), text) for key, text in found.items()}


def _stage2(training: Training) -> dict[str, tuple[Any, str]]:
    found = {
        key: "stage 2 packs the samples of a step within that step, and carries none over; remove it."
        for key in BETWEEN_STEPS
        if key in training.model_fields_set
    }
    if training.packing:
        found["packing"] = (
            "stage 2 packs what a step teaches on, after its rollouts: rollout_matching.packing."
        )
    if training.eval_packing:
        found["eval_packing"] = "stage 2 evaluates by rollouts, where nothing is packed; remove it."
    return {key: (getattr(training, key), text) for key, text in found.items()}


def _of_swift(swift: Mapping[str, Any], training: Training, variant: str) -> dict[str, str]:
    found = {}
    for name in ("packing", "padding_free"):
        if not swift.get(name):
            continue
        if variant not in STAGE1_VARIANTS:
            found[name] = (
                "stage 2 packs what a step teaches on, after its rollouts: rollout_matching.packing."
            )
        elif swift.get("attn_impl") not in FLASH_ATTENTION:
            found[name] = (
                f"ms-swift allows it under flash attention only (attn_impl: {' or '.join(FLASH_ATTENTION)}). Under "
                "sdpa or eager attention let coordexp pack: training.packing: true (in ms-swift's flat form "
                "coordexp: {training: {packing: true}})."
            )
    is_packed = bool(swift.get("packing")) or training.packing
    if swift.get("packing_length") is not None and not is_packed:
        found["packing_length"] = "has no effect without packing: true" + (
            "." if variant in STAGE1_VARIANTS else "; stage 2 reads rollout_matching.packing_length."
        )
    encodes_first = _encodes_first(swift)
    if encodes_first is not None and encodes_first not in found and not swift.get("strict"):
        found[encodes_first] = _LEFT_OUT_IN_SILENCE[encodes_first]
    return found


_LEFT_OUT_IN_SILENCE = {
    "lazy_tokenize": "ms-swift encodes every sample before training, and leaves out in silence what it cannot encode; "
    "lengths are told without that. Remove it, or write strict: true.",
    "packing": "ms-swift encodes every sample before it packs them, and leaves out in silence what it cannot encode. "
    "Write training.packing: true instead (in ms-swift's flat form coordexp: {training: {packing: true}}), or strict: "
    "true.",
    "group_by_length": "ms-swift encodes every sample for it before training, and leaves out in silence what it cannot "
    "encode. Write lazy_tokenize: true beside it: lengths are told without that. Or write strict: true.",
}


def _encodes_first(swift: Mapping[str, Any]) -> str | None:
    """The ms-swift argument that makes it encode all samples before training, None where nothing does."""
    lazy = swift.get("lazy_tokenize")
    if lazy is False:
        return "lazy_tokenize"
    return None if lazy else next((name for name in ("packing", "group_by_length") if swift.get(name)), None)
