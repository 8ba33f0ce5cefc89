"""Our keys beside ms-swift's: in `training`, `deepspeed`, and at the top; and the numbers derived from
them.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from coordexp.config.schema.section import Section


class Training(Section):
    """Keys of `training` that CoordExp adds to ms-swift's arguments."""

    effective_batch_size: int | None = Field(
        default=None,
        gt=0,
        description="Samples (with packing: packs) of an optimizer step over all ranks; "
        "gradient_accumulation_steps is derived and must come out whole.",
    )
    packing: bool = Field(
        default=False,
        description="Stage 1: train on packs of up to packing_length tokens (ms-swift's argument; max_length when "
        "left out), under any attention implementation. runbooks/train_stage1.md, section 6.",
    )
    eval_packing: bool = Field(
        default=False,
        description="Pack evaluation samples too; the numbers are the same, memory and speed differ.",
    )
    packing_buffer: int = Field(
        default=512, gt=0, description="Refused: no packer here carries samples over to a later step."
    )
    packing_min_fill_ratio: float = Field(default=0.0, ge=0, le=1, description="Refused, as packing_buffer.")
    packing_drop_last: bool = Field(default=False, description="Refused, as packing_buffer.")
    save_delay_steps: int = Field(
        default=0,
        ge=0,
        description="No checkpoint is saved, and no evaluation picks the best one, before this optimizer step.",
    )
    save_last_epoch: bool | None = Field(
        default=None,
        description="true: the last step is saved under every save_strategy. false: it is saved only where save_steps "
        "asks for it or it is the best. null: as the HF Trainer does (saved unless save_strategy is no or best).",
    )


TRAINER_KEYS = Training.model_fields.keys() - {"effective_batch_size"}
"""What a trainer reads of `training`; it reaches it in `--coordexp` too."""


class DeepSpeed(Section):
    """DeepSpeed, with a name that ms-swift knows (zero2, zero3, ...), a file, or the configuration itself."""

    enabled: bool = Field(default=True, description="false: train without DeepSpeed.")
    config: str | dict[str, Any] | None = Field(
        default=None,
        description="zero0 ... zero3, zero2_offload, zero3_offload, FILE or mapping. Needed unless enabled is false.",
    )

    @model_validator(mode="after")
    def _enabled_needs_a_config(self) -> DeepSpeed:
        if self.enabled and self.config is None:
            raise ValueError("config is missing; give a name such as zero2, or set enabled: false")
        return self


def accumulation_steps(effective_batch_size: int, per_device_batch_size: int, world_size: int) -> int:
    """Micro-steps of an optimizer step.

    Raises:
        ValueError: effective_batch_size is no multiple of what all ranks take in one micro-step.
    """
    per_micro_step = per_device_batch_size * world_size
    if effective_batch_size % per_micro_step:
        below = effective_batch_size // per_micro_step * per_micro_step
        nearest = [str(size) for size in (below, below + per_micro_step) if size > 0]
        raise ValueError(
            f"expected a multiple of per_device_train_batch_size * world size = {per_device_batch_size} * "
            f"{world_size} = {per_micro_step}, such as {' or '.join(nearest)}"
        )
    return effective_batch_size // per_micro_step
