"""What a valid run is told: settings that train less than they seem to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.run.effects import ends_in
from coordexp.config.schema.optimizer import COORD_MUON

TRAINED_MARK = "coordexp_prompt.json"
"""A model folder that holds it was trained here before."""
_LOW_PRECISION = ("bfloat16", "float16")


def advice(swift: Mapping[str, Any], *, coord_offset: bool) -> list[str]:
    """Sentences for `config check` and `coordexp doctor`; at the start of a run the trainer looks at its weights.

    coord_offset: whether custom.coord_offset is enabled.
    swift: ms-swift's arguments, flat; those left out count as ms-swift's defaults (LoRA, without DeepSpeed).
    """
    return [
        *untrained_rows(swift, coord_offset=coord_offset),
        *_no_master_copy(swift),
        *_muon_after_adam(swift),
    ]


def untrained_rows(swift: Mapping[str, Any], *, coord_offset: bool) -> Iterator[str]:
    """The part of `advice` that is about the rows of the coordinate tokens."""
    tuner = swift.get("tuner_type") or "lora"
    named = any(ends_in(swift.get(key)) for key in ("target_modules", "modules_to_save"))
    if tuner == "full" or coord_offset or named:
        return
    start = [swift.get("model"), *_listed(swift.get("adapters"))]
    if any((Path(str(folder)) / TRAINED_MARK).is_file() for folder in start if folder):
        return
    yield (
        f"tuner_type: {tuner} leaves the rows of the 1000 coordinate tokens as they are in the start model (embedding "
        "and head are no target of it), which is random after `coordexp model add-coord-tokens`. Set "
        "custom.coord_offset.enabled: true (configs/stage1/lora.yaml), unless the model was trained with them before."
    )


def _no_master_copy(swift: Mapping[str, Any]) -> Iterator[str]:
    dtype, rate = swift.get("torch_dtype"), swift.get("learning_rate")
    if swift.get("tuner_type") != "full" or dtype not in _LOW_PRECISION or swift.get("deepspeed"):
        return
    yield (
        f"torch_dtype: {dtype} with tuner_type: full and without DeepSpeed keeps no float32 copy of the weights: an "
        "update that is smaller than half the distance of two numbers is lost (of bfloat16 weights some 15 % move in a "
        f"step of 1e-5; learning_rate here: {rate}). Use deepspeed: zero2, which keeps one, or torch_dtype: float32 "
        "with bf16: true."
    )


def _muon_after_adam(swift: Mapping[str, Any]) -> Iterator[str]:
    if swift.get("optimizer") != COORD_MUON or swift.get("tuner_type") != "full":
        return
    yield (
        "optimizer: coord_muon with tuner_type: full trains on with Muon what was trained with AdamW, as published "
        "models were, Qwen3-VL among them. Muon's gains are known for training from the start; where the optimizer "
        "changes in between, none was found (Muon is Scalable for LLM Training, 2025). Compare with coord_adamw before "
        "you rely on it; random weights need no such care."
    )


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [str(item) for item in values]
