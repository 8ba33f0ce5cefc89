"""Runs of `swift rlhf`: which of our settings act there, and what of ms-swift's goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import KeyPath, one_of
from coordexp.config.schema.optimizer import COORD_ADAMW, COORD_MUON
from coordexp.config.schema.sections import Sections

ANSWER = "{answer}"
"""Stands for the ground truth in custom.teacher_prompt."""
TYPES = ("grpo", "gkd")
"""Values of `rlhf_type` whose trainers ask the model, and which coordexp prepares."""
REWARD_PREFIX = "coordexp_"
REWARDS = tuple(f"{REWARD_PREFIX}{name}" for name in ("f1", "iou", "format", "no_duplicates"))
"""Reward functions of ours."""

_ACTING = {
    "custom": frozenset(
        {
            "train_jsonl",
            "val_jsonl",
            "prompt",
            "media_order",
            "min_pixels",
            "answer_format",
            "object_field_order",
            "object_ordering",
            "coord_tokens",
            "teacher_prompt",
            "trust_remote_code",
        }
    ),
    "training": frozenset({"effective_batch_size"}),
    "debug": frozenset({"train_sample_limit", "val_sample_limit"}),
    "telemetry": frozenset(),
}


def ours_without_effect(sections: Sections) -> Iterator[tuple[KeyPath, str]]:
    """Our settings that `swift rlhf`, whose objective and trainer are ms-swift's, does not read."""
    for name, acting in _ACTING.items():
        for key in sorted(getattr(sections, name).model_fields_set - acting):
            if getattr(getattr(sections, name), key) is not None:
                yield (name, key), "has no effect with swift rlhf, whose trainer is ms-swift's; remove it."
    if sections.custom.teacher_prompt is not None and ANSWER not in sections.custom.teacher_prompt:
        yield (
            ("custom", "teacher_prompt"),
            f"tells the teacher nothing: write {ANSWER} where the objects stand.",
        )


def theirs_without_effect(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Arguments of `swift rlhf` that cannot act as they are written."""
    kind = swift.get("rlhf_type")
    if kind is None:  # a value that ms-swift does not take, which is a problem of its own
        return
    if kind not in TYPES:
        yield "rlhf_type", f"{one_of(kind, TYPES)}; the others take pairs of answers or a reward model."
    if swift.get("optimizer") in (COORD_ADAMW, COORD_MUON):
        yield "optimizer", "is built by coordexp's trainers; swift rlhf takes ms-swift's optimizers."
    for name in swift.get("reward_funcs") or ():
        if str(name).startswith(REWARD_PREFIX) and name not in REWARDS:
            yield "reward_funcs", f"{one_of(name, REWARDS)}, or a name of ms-swift's."
    has_teacher = any(swift.get(key) for key in ("teacher_model", "teacher_model_server"))
    if kind == "gkd" and not has_teacher and sections.custom.teacher_prompt is None:
        yield (
            "rlhf_type",
            "gkd without a teacher_model teaches the model what it says already; set custom.teacher_prompt, which "
            f"shows the model the objects ({ANSWER}) when it is the teacher, or name a teacher_model.",
        )
