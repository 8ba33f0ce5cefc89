"""A dry run as it goes: when each part of a step ends, what it was, what it took; and the report at the end.

The trainer runs as always, on its longest samples. The callback here stops it after one step of each kind, asks for
an evaluation where the run has one, and lets nothing be saved.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from coordexp.errors import DeviceMemoryError
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_rollout import TIME_ROLLOUT_EVAL
from coordexp.metrics.keys_run import EVAL_RUNTIME
from coordexp.trainers.dry_run.memory import HOST, MemoryUse, is_out_of_memory, take
from coordexp.trainers.dry_run.parts import DryRunReport, EvaluationReport, RunShape, StepReport
from coordexp.trainers.step.plan import StepPlan
from coordexp.trainers.step.ranks import most_over_ranks

EVAL_IMAGES = 2
SHOWN_CHARS = 1500
GENERATE, JUDGE, ENCODE = "generate", "parse and match", "encode"
TEACHER_FORCED = "teacher-forced"
"""Name of the steps of stage 1; those of stage 2 are called by their channels."""


@dataclass
class _Clock:
    """Seconds of each part of the step that is running."""

    last: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=dict)

    def end(self, part: str) -> None:
        """What ran since the last call was `part`."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        parts, self.parts = self.parts, {}
        return parts


class DryRun(TrainerCallback):
    """Watches and ends a dry run. All ranks have one.

    Arguments:
        shape: of the run it stands for.
        evaluates: whether that run has evaluations.
        num_rollout_images: that an evaluation of it asks the model about.
        rollouts_only: whether its evaluations have no teacher-forced part (stage 2).
        decode: token ids -> text.
    """

    def __init__(
        self,
        shape: RunShape,
        *,
        evaluates: bool,
        num_rollout_images: int,
        rollouts_only: bool,
        device: torch.device,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._shape, self._evaluates, self._device, self._decode = shape, evaluates, device, decode
        self._num_rollout_images, self._rollouts_only = num_rollout_images, rollouts_only
        self._clock = _Clock()
        self._doing = "the start of the trainer"
        self._plan: StepPlan | None = None
        self._steps: list[StepReport] = []
        self._evaluation: EvaluationReport | None = None
        self._peak = MemoryUse(0.0, 0.0, "")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the steps that are run, in order."""
        return tuple(self._shape.steps)

    def run(self, train: Callable[[], Any]) -> Any:
        """`train()`, with memory that runs out told as what did not fit.

        Raises:
            DeviceMemoryError: naming the step, its lengths and what to lower.
        """
        try:
            return train()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
        have = take(self._device)
        raise DeviceMemoryError(
            f"dry run: {self._doing} does not fit: {said} Peak so far {have.peak_gib:.2f} of {have.total_gib:.1f} GiB "
            f"({have.where}). Lower max_pixels, packing_length or per_device_train_batch_size, set "
            "gradient_checkpointing: true, or take more devices (deepspeed: zero3)."
        )

    # what the trainer tells

    def loaded(self) -> None:
        """The samples of a step are there; it is about to be planned."""
        self._clock.end("load")
        self._doing = f"the plan of step {len(self._steps) + 1}"

    def planned(self, plan: StepPlan) -> None:
        """The step is planned."""
        self._clock.end("plan")
        rolled_out = plan.rolled_out
        if rolled_out is not None:
            inner = {
                GENERATE: rolled_out.generate_s,
                JUDGE: rolled_out.parse_match_s,
                ENCODE: rolled_out.encode_s,
            }
            self._clock.parts["plan"] = max(0.0, self._clock.parts["plan"] - sum(inner.values()))
            self._clock.parts |= inner
        self._plan = plan
        shapes = [tuple(forward.inputs["input_ids"].shape) for forward in plan.forwards]
        self._doing = f"the forward and backward pass of step {self._name(plan)} (input ids of {shapes})"

    def evaluated(self, metrics: dict[str, float]) -> None:
        """An evaluation has ended. metrics: what it logs."""
        rollout_s = metrics.get(EVAL_PREFIX + TIME_ROLLOUT_EVAL, 0.0)
        whole_s = metrics.get(EVAL_RUNTIME, 0.0)
        if self._rollouts_only:
            rollout_s = whole_s
        world = self._shape.world_size
        self._evaluation = EvaluationReport(
            images=-(-min(EVAL_IMAGES, self._shape.num_eval_samples) // world),
            teacher_s=max(0.0, whole_s - rollout_s),
            rollout_s=rollout_s,
            num_teacher=0 if self._rollouts_only else self._shape.num_eval_samples,
            num_rollout=self._num_rollout_images,
            memory=self._memory(),
        )

    # the loop of the HF Trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock = _Clock()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock.end("plan")

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wait()
        self._clock.end("forward and backward")
        self._doing = "the optimizer's first step, which makes its state,"

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._wait()
        self._clock.end("optimizer")
        assert self._plan is not None
        self._steps.append(self._report(self._plan))
        is_last = len(self._steps) >= len(self._shape.steps)
        control.should_training_stop = is_last
        self._doing = f"the evaluation of {EVAL_IMAGES} images"
        return self._only_evaluate(control, is_last and self._evaluates)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._only_evaluate(control, False)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluated(kwargs["metrics"])
        self._clock.end("evaluation")
        self._clock.take()

    def report(self) -> DryRunReport:
        """What was found on this rank; the peak is the largest of all ranks. Collective."""
        assert self._plan is not None
        self._memory()
        peak_mib = most_over_ranks(int(self._peak.peak_gib * 1024), self._device)
        sample_id, sample = self._sample(self._plan)
        peak = replace(self._peak, peak_gib=peak_mib / 1024)
        return DryRunReport(
            shape=self._shape,
            steps=tuple(self._steps),
            evaluation=self._evaluation,
            sample_id=sample_id,
            sample=sample,
            peak=peak,
            notes=_room(peak),
        )

    def _only_evaluate(self, control: TrainerControl, evaluate: bool) -> TrainerControl:
        control.should_evaluate, control.should_save = evaluate, False
        return control

    def _wait(self) -> None:
        """For the device, so that each part is charged with its own work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _memory(self) -> MemoryUse:
        found = take(self._device)
        self._peak = replace(found, peak_gib=max(found.peak_gib, self._peak.peak_gib))
        return found

    def _name(self, plan: StepPlan) -> str:
        """Of its channel; of a step without one its turn among the kinds of the run."""
        return self.kinds[len(self._steps) % len(self.kinds)] if plan.channel is None else str(plan.channel)

    def _report(self, plan: StepPlan) -> StepReport:
        shapes = [forward.inputs["input_ids"].shape for forward in plan.forwards]
        return StepReport(
            name=self._name(plan),
            num_forwards=len(plan.forwards),
            num_samples=sum(forward.meta.num_samples for forward in plan.counted),
            longest=max(shape[-1] for shape in shapes),
            num_tokens=sum(shape.numel() for shape in shapes),
            num_rows=sum(forward.meta.rows.num_rows for forward in plan.counted),
            seconds=self._clock.take(),
            memory=self._memory(),
        )

    def _sample(self, plan: StepPlan) -> tuple[str, str]:
        """The first sequence of the step, decoded; runs of image placeholders as one."""
        forward = plan.forwards[0]
        ids: Tensor = forward.inputs["input_ids"][0]
        mask = forward.inputs.get("attention_mask")
        if mask is not None and mask.shape == forward.inputs["input_ids"].shape:
            ids = ids[mask[0].bool()]
        text = re.sub(
            r"(?:<\|image_pad\|>)+",
            lambda run: f"<|image_pad|> x {run[0].count('<|image_pad|>')}",
            self._decode(ids.tolist()),
        )
        return forward.meta.sample_ids[0], text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."


def _room(peak: MemoryUse) -> Sequence[str]:
    """Sentences on memory that is nearly used up; the ranks of a machine share that of the host."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if peak.where == HOST else 1
    used = peak.peak_gib * ranks
    if used <= 0.9 * peak.total_gib:
        return ()
    return (f"{used:.1f} of {peak.total_gib:.1f} GiB leave little room; longer answers may not fit.",)
