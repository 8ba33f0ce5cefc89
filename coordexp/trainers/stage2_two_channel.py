"""Stage 2, two-channel: ground truth and rollouts on one schedule.

    channel A   teacher-forced on ground truth, then `n_softctx_iter - 1` further forwards whose coordinate inputs are
                what the model expected there; text loss from the first, coordinate losses from the last
    channel B   the model's own answers, exactly as in stage2_rollout_aligned

Which one a step runs follows from its number and `stage2_ab.schedule.b_ratio` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from coordexp.data.raw_samples import RawSample
from coordexp.errors import ConfigError
from coordexp.losses.provenance import Forward
from coordexp.metrics.keys_stage2 import B_RATIO_REALIZED, STAGE2_CHANNEL_B
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context
from coordexp.targets.rows import slot_positions_B4
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.channel_schedule import Channel, channel_at, realized_b_ratio, rollout_seed_base
from coordexp.trainers.stage2 import Stage2Trainer
from coordexp.trainers.step.plan import PlannedForward


class Stage2TwoChannelTrainer(Stage2Trainer):
    """Trainer variant `stage2_two_channel`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.settings.sections.stage2_ab
        if settings is None:
            raise ConfigError("stage2_ab: is missing; trainer variant stage2_two_channel needs it.")
        self.b_ratio = settings.schedule.b_ratio
        self.self_context = SelfContext(
            num_forwards=settings.n_softctx_iter,
            embed_mode=settings.coord_ctx_embed_mode,
            grad_mode=settings.softctx_grad_mode,
            temperature=settings.softctx_temperature,
        )
        self.channel = Channel.A

    def plan_groups(self, raws: Sequence[RawSample]) -> list[list[EncodedSample]]:
        step = int(self.state.global_step)
        self.channel = channel_at(step, self.b_ratio)
        self.metrics.add(STAGE2_CHANNEL_B, float(self.channel is Channel.B))
        self.metrics.add(B_RATIO_REALIZED, realized_b_ratio(step, self.b_ratio))
        if self.channel is Channel.B:
            return self.roll_out(raws, seed_base=rollout_seed_base(self.args.seed, step))
        return self.layout.groups([self.ground_truth(raw) for raw in raws])

    @property
    def forward_kinds(self) -> tuple[Forward, ...]:
        if self.channel is Channel.B:
            return (Forward.ROLLOUT,)
        if self.self_context.num_forwards == 1:
            return (Forward.TEACHER_FORCED,)
        return (Forward.ANCHOR, Forward.SELF_CONTEXT)

    def forward_loss(self, model: nn.Module, forward: PlannedForward) -> Tensor:
        if len(self.forward_kinds) == 1:
            return super().forward_loss(model, forward)
        inputs, rows = self.on_device(forward)
        slots = CoordSlots(
            slot_positions_B4(forward.batch.samples, forward.batch.starts).flatten().to(self.args.device),
            self.columns.index(self.args.device),
        )
        last = self.self_context.num_forwards - 1
        kinds = {0: Forward.ANCHOR, last: Forward.SELF_CONTEXT}

        def run(iteration: int) -> tuple[Tensor | None, Tensor | None]:
            slot_rows_N = None if iteration == last else slots.rows_N
            if iteration not in kinds:
                result = self.head.run(model, self.unwrapped_model, inputs, None, slot_rows_N)
            else:
                result = self.run_head(
                    model, inputs, rows, kinds[iteration], counts=forward.counts, slot_rows_N=slot_rows_N
                )
            return result.loss, result.slot_logits_NK

        losses = run_self_context(self.unwrapped_model, slots, self.self_context, run)
        return sum(loss for loss in (losses[0], losses[-1]) if loss is not None)  # type: ignore[return-value]
