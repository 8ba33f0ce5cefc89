"""What a dry run measured, and what follows from it for the whole run. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordexp.trainers.dry_run.memory import MemoryUse


@dataclass(frozen=True)
class DataFacts:
    """Of the whole data set, before the dry run chose from it. Lengths in tokens, prompt and target together."""

    num_samples: int
    longest: int
    mean: float


@dataclass(frozen=True)
class StepReport:
    """One optimizer step of one rank. name: of its kind.  seconds: of its parts, in order.

    longest: tokens of the longest sequence.  num_tokens: of all, padding included.
    """

    name: str
    num_forwards: int
    num_samples: int
    longest: int
    num_tokens: int
    num_rows: int
    seconds: Mapping[str, float]
    memory: MemoryUse

    @property
    def total_s(self) -> float:
        """Of the whole step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation of a few images. teacher_s, rollout_s: of its two kinds; 0 where the run has not that kind.

    images: that this rank saw.  num_teacher, num_rollout: images of a whole evaluation, of all ranks.
    """

    images: int
    teacher_s: float
    rollout_s: float
    num_teacher: int
    num_rollout: int
    memory: MemoryUse

    def whole_s(self, world_size: int) -> float:
        """Seconds of an evaluation of all its images, shared by the ranks."""
        per_image = 1.0 / max(1, self.images)
        teacher = self.teacher_s * per_image * math.ceil(self.num_teacher / world_size)
        return teacher + self.rollout_s * per_image * math.ceil(self.num_rollout / world_size)


@dataclass(frozen=True)
class RunShape:
    """What the whole run will do. steps: optimizer steps of each kind, by its name."""

    variant: str
    steps: Mapping[str, int]
    num_evaluations: int
    world_size: int
    train: DataFacts
    num_eval_samples: int


@dataclass(frozen=True)
class DryRunReport:
    """Everything that is told at the end."""

    shape: RunShape
    steps: Sequence[StepReport]
    evaluation: EvaluationReport | None
    sample_id: str
    sample: str
    peak: MemoryUse
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def training_s(self) -> float:
        """All optimizer steps, each as long as the measured one of its kind: on the longest samples, so at most."""
        measured = {step.name: step.total_s for step in self.steps}
        return sum(number * measured.get(name, 0.0) for name, number in self.shape.steps.items())

    @property
    def evaluation_s(self) -> float:
        """All evaluations."""
        if self.evaluation is None:
            return 0.0
        return self.shape.num_evaluations * self.evaluation.whole_s(self.shape.world_size)

    @property
    def mean_share(self) -> float:
        """Mean length over that of the longest samples: what a mean step takes of a measured one, roughly."""
        return min(1.0, self.shape.train.mean / max(1, self.shape.train.longest))


def num_evaluations(
    strategy: str, eval_steps: float | None, total_steps: int, num_epochs: float, own_every: int | None
) -> int:
    """Evaluations of a run of `total_steps`.

    strategy, eval_steps: of the HF Trainer; eval_steps below 1 is a share of the steps.
    own_every: `custom.rollout_eval.every_steps`.
    """
    every = None
    if strategy == "steps" and eval_steps:
        every = max(1, math.ceil(eval_steps * total_steps)) if eval_steps < 1 else int(eval_steps)
    at = {total_steps} if every is not None else set[int]()  # the last step is evaluated in any case
    for step in (every, own_every):
        if step is not None:
            at.update(range(step, total_steps + 1, step))
    return len(at) + (math.ceil(num_epochs) if strategy == "epoch" else 0)
