"""The `stage2_ab` section: channel schedule, self-context iterations and objective of
`stage2_two_channel`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator

from coordexp.config.schema.pipeline import Pipeline
from coordexp.config.schema.section import Section

_SHARE = "a number from 0 to 1"


def _share_or_points(value: object) -> float | list[tuple[int, float]]:
    """A number from 0 to 1, or points [[step, number], ...] with ascending steps; ValueError for anything else."""
    if not isinstance(value, list):
        return _share(value, f"expected {_SHARE}, or points [[step, number], ...]")
    if not value:
        raise ValueError("holds no point; expected a number from 0 to 1, or points [[step, number], ...]")
    points = [_point(point) for point in value]
    steps = [step for step, _ in points]
    if steps != sorted(set(steps)):
        raise ValueError(f"the steps of its points are {steps}; expected ascending ones")
    return points


def _share(value: object, refusal: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(refusal)
    return float(value)


def _point(value: object) -> tuple[int, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"found {value!r} for a point; expected [step, number from 0 to 1]")
    step, share = value
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"the step of {list(value)} is {step!r}; expected a whole number from 0")
    return step, _share(share, f"the share of {list(value)} is {share!r}; expected {_SHARE}")


class Schedule(Section):
    """Which optimizer steps run channel B: step s does iff floor((s+1) r) > floor(s r)."""

    b_ratio: Annotated[float | list[tuple[int, float]], PlainValidator(_share_or_points)] = Field(
        description="Share r of optimizer steps that run channel B (rollouts), from 0 to 1. Or points [[step, r], "
        "...], linear between them and constant outside: step s runs B iff the sum of r over the steps up to s has a "
        "larger whole part than the sum up to the step before."
    )


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
