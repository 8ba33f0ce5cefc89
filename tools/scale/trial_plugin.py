"""The part of a trial inside the trainer: `--callbacks scale_trial` notes what each optimizer step was, and cost.

SCALE_TRIAL names the JSON file that rank 0 writes. CPU seconds are those of the process, over all of its threads, so a
busy neighbour costs little. Memory is what torch's allocator gave out in the last step, from its first forward to its
end, over the weights and the optimizer's states; a step of its own, since watching takes time.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback

from coordexp.files import write_text
from coordexp.trainers.step.timer import StepTimer


class ScaleTrial(TrainerCallback):
    """Measures the steps of a trainer."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, Any]] = []
        self.growth = 0
        self._watching: torch.profiler.profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer = StepTimer(torch.device("cpu"), time.process_time)
        self.trainer.pace.timer = self.timer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            self._watching = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._watching.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer.finish()
        if self._watching is not None:
            self._watching.stop()
            self.growth = _peak(self._watching)
            return
        (cpu_s,) = self.timer.take()
        self.steps.append({"cpu_s": cpu_s, **_work(self.trainer)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        model, optimizer = self.trainer.unwrapped_model, self.trainer.optimizer
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        states = sum(
            value.numel() * value.element_size()
            for held in optimizer.state.values()
            for value in held.values()
            if torch.is_tensor(value)
        )
        found = {"steps": self.steps, "weights": weights, "optimizer": states, "growth": self.growth}
        write_text(Path(os.environ["SCALE_TRIAL"]), json.dumps(found))


def _work(trainer: Any) -> dict[str, Any]:
    """What the step that has ended consisted of, as its plan says."""
    plan = trainer._plan
    forwards = [
        {
            "shape": list(forward.inputs["input_ids"].shape),
            "samples": forward.meta.num_samples,
            "text_rows": forward.meta.rows.num_text,
            "coord_rows": forward.meta.rows.num_coord,
        }
        for forward in plan.forwards
    ]
    answers = [] if plan.rolled_out is None else [one.rollout for one in plan.rolled_out.answers]
    return {
        "channel": None if plan.channel is None else str(plan.channel),
        "forwards": forwards,
        "answers": [[len(one.prompt_token_ids), len(one.response_token_ids)] for one in answers],
    }


def _peak(profile: torch.profiler.profile) -> int:
    """Most bytes that were given out and not taken back, at any moment."""
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


callbacks_map["scale_trial"] = ScaleTrial
