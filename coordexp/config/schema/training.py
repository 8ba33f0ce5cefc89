"""Our keys beside ms-swift's: in `training`, `deepspeed`, and at the top; the numbers derived from them; and the
`control` section: controllers that move a knob of the run and measure what that bought.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coordexp.config.schema.section import Section

B_RATIO, NUM_SOFTCTX = "b_ratio", "n_softctx_iter"
"""Knobs that are no weight of the objective."""
Low = Annotated[float, Field(ge=0)]
Mode = Literal["recommend", "act"]
_NAME = r"^[a-z][a-z0-9_]*$"
_MODE = "`recommend` only says what it would do; `act` does it."
_AUDIT = (
    "After so many updates one window runs the base value (what the configuration says); it changes nothing in the "
    "controller, and what the knob bought is measured against it. 0: never."
)


class Goal(Section):
    """A number of an evaluation that is enough."""

    metric: str = Field(description="A number that evaluation reports, as it is logged: with `eval_`.")
    op: Literal[">=", ">", "<=", "<"] = Field(description="How it has to stand to the value.")
    value: float = Field(description="What it is compared with.")


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
    stop_when: list[Goal] = Field(
        default=[],
        description="The run ends, saved and with exit code 0, at the first evaluation in which all of these hold. "
        "[]: after its last step.",
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


class SetpointController(Section):
    """Moves a knob so that a metric comes to a target, and holds it there."""

    kind: Literal["setpoint"] = Field(description="What sort of controller it is.")
    name: str = Field(pattern=_NAME, description="Its name in metrics and records.")
    knob: str = Field(
        description="`b_ratio` (a number, not points), or a weight of the objective: `coord_soft_ce_w1.w1_weight` in "
        "stage 1, `coord_reg.w1_weight` or `coord_reg.weight` in stage 2."
    )
    metric: str = Field(
        description="Key of a training record, which is reduced over the window and all ranks."
    )
    target: float = Field(description="What the metric is to be.")
    effect: Literal["raises", "lowers"] = Field(description="What more of the knob does to the metric.")
    gain: float = Field(gt=0, description="Change of the knob for a metric that is off by 1.")
    ema: float = Field(
        default=0.8, ge=0, lt=1, description="Share of the old mean that is kept when a new value comes in."
    )
    deadband: float = Field(
        default=0.0, ge=0, description="How far off the metric may be without a full correction."
    )
    inside_toward_base: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of a correction made inside the deadband, toward the base value.",
    )
    inside_from_base: float = Field(
        default=0.0, ge=0, le=1, description="The same, away from the base value, which costs more."
    )
    bounds: tuple[Low, Low] = Field(strict=False, description="The knob stays within [least, most].")
    rate: float = Field(gt=0, description="Most that the knob changes at once.")
    dwell: int = Field(default=0, ge=0, description="Updates that a value stays before it changes again.")
    audit_every: int = Field(default=20, ge=0, description=_AUDIT)
    mode: Mode = Field(default="recommend", description=_MODE)

    @model_validator(mode="after")
    def _bounds_ascend(self) -> SetpointController:
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds are {list(self.bounds)}; expected [least, most]")
        return self


class SoftctxPrice(Section):
    """What a further self-context forward costs, in nats of coordinate cross-entropy."""

    initial: Low = Field(default=0.01, description="Price that pricing begins with.")
    bounds: tuple[Low, Low] = Field(
        default=(0.002, 0.05),
        strict=False,
        description="[least, most]. A gain under least / eta never pays; one above most / eta always does.",
    )
    target_forwards: float = Field(
        default=1.3,
        ge=1,
        description="Mean forwards that the price steers to: with more it rises, with fewer it falls.",
    )
    gain: float = Field(default=0.005, gt=0, description="Change of the price for a mean that is off by 1.")
    rate: float = Field(default=0.002, gt=0, description="Most that the price changes at once.")
    deadband: float = Field(
        default=0.1,
        ge=0,
        description="Within so many forwards of the target the price may only fall, slowly.",
    )

    @model_validator(mode="after")
    def _bounds_hold_the_initial_price(self) -> SoftctxPrice:
        low, high = self.bounds
        if not low <= self.initial <= high or low == high:
            raise ValueError(
                f"bounds are {[low, high]}; expected [least, most] around the initial price {self.initial}"
            )
        return self


class SoftctxEconomy(Section):
    """Prices self-context forwards: runs as many as lower the coordinate loss by more than they cost."""

    kind: Literal["softctx_economy"] = Field(description="What sort of controller it is.")
    name: str = Field(pattern=_NAME, description="Its name in metrics and records.")
    knob: Literal["n_softctx_iter"] = Field(
        default="n_softctx_iter",
        description="Forwards of a channel-A step, from 1 to stage2_ab.n_softctx_iter.",
    )
    forced: int = Field(
        default=20, ge=1, description="Updates of warm-up: all forwards, whatever they bring."
    )
    observed: int = Field(
        default=10,
        ge=0,
        description="Updates after that in which forwards are free: only harm lowers their number.",
    )
    eta: float = Field(default=1.0, gt=0, description="Coupon for a gain of 1, taken off the price.")
    ema: float = Field(
        default=0.8, ge=0, lt=1, description="Share of the old mean that is kept at an update."
    )
    price: SoftctxPrice = SoftctxPrice()
    dwell: int = Field(default=2, ge=0, description="Updates that a number stays before it changes again.")
    audit_every: int = Field(default=20, ge=0, description=_AUDIT)
    mode: Mode = Field(default="recommend", description=_MODE)


Controller = Annotated[SetpointController | SoftctxEconomy, Field(discriminator="kind")]


class Control(Section):
    """Controllers; none unless they are declared."""

    controllers: list[Controller] = Field(
        default=[], description="One for a knob, each with a name of its own."
    )

    @model_validator(mode="after")
    def _each_once(self) -> Control:
        for what in ("name", "knob"):
            counts = Counter(getattr(controller, what) for controller in self.controllers)
            repeated = [value for value, count in counts.items() if count > 1]
            if repeated:
                raise ValueError(f"two controllers have the {what} {repeated[0]}")
        return self
