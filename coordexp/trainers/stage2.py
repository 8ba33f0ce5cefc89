"""Stage 2: the HF Trainer around steps that are planned as a whole.

    plan_step       raw samples of the step -> `StepPlan` (trainers/step/planners.py), its numbers logged
    training_step   forward and backward of each planned forward; gradients meet once, at the last of the step
    evaluate        rollout -> parse -> match over the evaluation set; no teacher-forced loss

The two variants differ in what plans a step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.control.schedule import Channel, num_b_steps
from coordexp.data.raw_samples import RawSample
from coordexp.errors import ConfigError
from coordexp.trainers.base import CoordTrainer
from coordexp.trainers.datasets import question_datasets, samples_of_a_step
from coordexp.trainers.stage2_parts import Stage2Parts, make_parts, rollout_settings
from coordexp.trainers.step.plan import PlannedForward
from coordexp.trainers.step.planners import (
    GroundTruthPlanner,
    OneOfEachPlanner,
    Planner,
    RolloutPlanner,
    ScheduledPlanner,
)


class Stage2Trainer(CoordTrainer):
    """Base of the stage-2 variants; a subclass says what plans a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = make_parts(self)
        self.planner = self.make_planner(self.parts)

    def make_planner(self, parts: Stage2Parts) -> Planner:
        """What a step teaches on."""
        raise NotImplementedError

    def prepare_datasets(self, arguments: dict[str, Any]) -> None:
        samples_per_step = samples_of_a_step(arguments["args"])
        rollout = rollout_settings(self.settings)
        packing_length = rollout.packing_length if rollout.packing else None
        question_datasets(
            arguments, self.settings, samples_per_step=samples_per_step, packing_length=packing_length
        )

    # the step

    def plan_step(self, batches: list[Any]) -> list[Any]:
        raws: list[RawSample] = [raw for batch in batches for raw in batch]
        step = int(self.state.global_step)
        self.count_samples(len(raws), [raw.part for raw in raws])
        plan = self.planner(raws, step, self.steering.knobs())
        self.keep_plan(plan)
        self.metrics.add_all(plan.facts)
        if plan.rolled_out is not None:
            self.metrics.add_all(self.parts.record(plan.rolled_out, step))
        return plan.entries(len(batches))

    def training_step(
        self, model: nn.Module, inputs: list[PlannedForward], num_items_in_batch: Any = None
    ) -> Tensor:
        self.pace.timer.switch("backward")  # forwards interrupt it
        self.enter_training(model)
        total = torch.zeros((), device=self.args.device)
        is_last_entry = self.accelerator.sync_gradients
        for index, forward in enumerate(inputs):
            with self.gradients_meet(model, is_last_entry and index == len(inputs) - 1):
                total += self._forward_and_backward(model, forward)
        self.pace.timer.switch("optimizer" if is_last_entry else "other")
        return total

    def _forward_and_backward(self, model: nn.Module, forward: PlannedForward) -> Tensor:
        assert self._plan is not None
        with self.pace.timer.phase("forward"), self.compute_loss_context_manager():
            outcome = self.parts.runner(model, self.unwrapped_model, self._on_device(forward), self._plan)
        loss = outcome.loss * (0.0 if forward.is_filler else self.gradient_scale)
        self.stop_if_not_finite(outcome.watched(), forward.meta.sample_ids, loss=loss)
        if not forward.is_filler:
            self.add_metrics(outcome.metrics)
        return self.backward(loss)

    def _on_device(self, forward: PlannedForward) -> PlannedForward:
        return forward.on(self.args.device, self._prepare_input(dict(forward.inputs)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.parts.record.close()
            self.parts.session.close()

    # evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rollout metrics over the whole evaluation set, under `eval_rollout/...`, equal on all ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        started = time.perf_counter()
        self.model.eval()
        numbers = self.parts.evaluation(dataset, int(self.state.global_step))
        seconds = time.perf_counter() - started
        numbers |= {"runtime": seconds, "samples_per_second": len(dataset) / seconds}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in numbers.items()}
        self.log(metrics)
        self.announce_evaluation(metrics)
        return metrics

    # raw samples stay samples until a step is planned

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        return list

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # the plan counts what its losses are divided by

    def _track_num_input_tokens(self, inputs: list[PlannedForward]) -> None:
        for forward in inputs:  # as often on every rank; fillers teach nothing
            ids_BT = forward.inputs["input_ids"]
            super()._track_num_input_tokens({"input_ids": ids_BT[:, :0] if forward.is_filler else ids_BT})

    def floating_point_ops(self, inputs: list[PlannedForward]) -> int:
        return sum(super(Stage2Trainer, self).floating_point_ops(dict(f.inputs)) for f in inputs)


class Stage2RolloutAlignedTrainer(Stage2Trainer):
    """Trainer variant `stage2_rollout_aligned`: every step teaches on the model's own answers."""

    def make_planner(self, parts: Stage2Parts) -> Planner:
        return RolloutPlanner(parts.roll_out, parts.builder, parts.assemble)

    def step_kinds(self, total_steps: int) -> dict[str, int]:
        return {str(Channel.B): total_steps}


class Stage2TwoChannelTrainer(Stage2Trainer):
    """Trainer variant `stage2_two_channel`: ground truth and rollouts on one schedule."""

    def make_planner(self, parts: Stage2Parts) -> Planner:
        two_channel = self.settings.sections.stage2_ab
        if two_channel is None:
            raise ConfigError("stage2_ab: is missing; trainer variant stage2_two_channel needs it.")
        ground_truth = GroundTruthPlanner(
            parts.builder, parts.assemble, num_forwards=two_channel.n_softctx_iter
        )
        rollouts = RolloutPlanner(parts.roll_out, parts.builder, parts.assemble)
        scheduled = ScheduledPlanner(
            two_channel.schedule.b_ratio, ground_truth, rollouts, self.steering.share
        )
        if self.dry_run is None:
            return scheduled
        return OneOfEachPlanner(scheduled, [Channel(name) for name in self.dry_run.kinds])

    def step_kinds(self, total_steps: int) -> dict[str, int]:
        two_channel = self.settings.sections.stage2_ab
        ratio = 0.0 if two_channel is None else two_channel.schedule.b_ratio
        num_b = num_b_steps(total_steps, ratio)
        counts = {Channel.A: total_steps - num_b, Channel.B: num_b}
        return {str(channel): number for channel, number in counts.items() if number}
