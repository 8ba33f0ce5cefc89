"""The `stage2_ab` section: channel schedule, self-context iterations and objective of
`stage2_two_channel`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coordexp.config.schedules.points import ShareOrPoints
from coordexp.config.schema.pipeline import Pipeline
from coordexp.config.schema.section import Section


class Schedule(Section):
    """Which optimizer steps run channel B: step s does iff floor((s+1) r) > floor(s r)."""

    b_ratio: ShareOrPoints = Field(
        description="Share r of optimizer steps that run channel B (rollouts), from 0 to 1. Or points [[step, r], "
        "...], linear between them and constant outside: step s runs B iff the sum of r over the steps up to s has a "
        "larger whole part than the sum up to the step before."
    )

    @property
    def never_runs_b(self) -> bool:
        """No step is of channel B."""
        return self.b_ratio == 0 or (isinstance(self.b_ratio, list) and not any(r for _, r in self.b_ratio))


class Stage2AB(Section):
    """Two-channel training: A teaches on ground truth with self-context, B on rollouts."""

    schedule: Schedule
    n_softctx_iter: int = Field(default=1, ge=1, description="Forwards of a channel-A step.")
    softctx_grad_mode: Literal["unroll", "em_detach"] = Field(
        default="unroll", description="Let the gradient flow through earlier iterations, or cut it."
    )
    softctx_temperature: float = Field(
        default=1.0, gt=0, description="Temperature of the expected coordinate embedding."
    )
    coord_ctx_embed_mode: Literal["soft", "st", "hard"] = Field(
        default="soft",
        description="Embedding at coordinate slots: expectation, straight-through argmax, or argmax.",
    )
    coord_decode_mode: Literal["exp", "st"] = Field(
        default="exp",
        description="How boxes are decoded for bbox_geo: expectation or straight-through argmax.",
    )
    pipeline: Pipeline
