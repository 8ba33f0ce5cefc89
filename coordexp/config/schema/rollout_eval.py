"""`custom.rollout_eval` and `custom.generation_samples`: what an evaluation asks the model, and shows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from coordexp.config.schema.rollout import (
    DescMonitorSettings,
    EvalDetection,
    Matching,
    RepeatTerminate,
    RolloutMatching,
    Vllm,
)
from coordexp.config.schema.section import Section


class EvalRollouts(RolloutMatching):
    """Rollouts of a stage-1 evaluation, as the code of stage 2 reads them; never written in a file."""

    where: ClassVar[str] = "custom.rollout_eval"


class RolloutEval(Section):
    """Stage 1: evaluation by what the model writes, greedily; it reports eval_rollout/* as stage 2 does."""

    enabled: bool = Field(
        default=False,
        description="Use it. metric_for_best_model is then rollout/f1 unless another one is given.",
    )
    every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps between such evaluations, whatever eval_strategy says; null: with each evaluation "
        "of eval_strategy, in the same record.",
    )
    num_images: int | None = Field(
        default=200,
        gt=0,
        description="The first N validation records are asked about (in a mixture some of each data set); null: all.",
    )
    backend: Literal["hf", "vllm"] = Field(default="hf", description="What generates.")
    decode_batch_size: int = Field(default=8, ge=1, description="Rollouts generated at once.")
    max_new_tokens: int = Field(default=1024, gt=0, description="Longest rollout.")
    generate_timeout_s: float | None = Field(
        default=1800.0, gt=0, description="Longest wait for decode_batch_size rollouts; null: no limit."
    )
    preflight_timeout_s: float = Field(
        default=300.0, gt=0, description="Longest wait for the tiny rollout before step 1."
    )
    repetition_penalty: float = Field(default=1.0, gt=0, description="1: none.")
    repeat_terminate: RepeatTerminate = RepeatTerminate()
    vllm: Vllm = Vllm()
    matching: Matching = Matching()
    desc_monitor: DescMonitorSettings = DescMonitorSettings()
    eval_detection: EvalDetection = EvalDetection()

    @property
    def rollouts(self) -> EvalRollouts:
        """These settings under the names of `rollout_matching`, for the code that both stages share."""
        own = {"enabled", "every_steps", "num_images"}
        return EvalRollouts(
            decode_mode="greedy",
            **{name: getattr(self, name) for name in RolloutEval.model_fields if name not in own},
        )

    @model_validator(mode="after")
    def _vllm_has_an_engine(self) -> RolloutEval:
        if self.backend == "hf" and self.vllm.model_fields_set:
            raise ValueError("vllm has no effect with backend: hf; remove it, or use backend: vllm")
        return self


class GenerationSamples(Section):
    """A few fixed images of every evaluation by rollouts, with the ground truth beside the answer, for people."""

    num_images: int = Field(
        default=4,
        ge=0,
        le=64,
        description="The first N evaluated images, in samples/step_N/ of the run folder and in TensorBoard and W&B "
        "where they are on; 0: none.",
    )
    console: bool = Field(default=True, description="Show the first of them on the console too.")
    keep: int = Field(
        default=20, gt=0, description="Folders in samples/; beyond it the oldest one is removed."
    )
