"""Evaluation by what the model writes, the same in both stages: numbers of all ranks, samples for people on one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.control.schedule import policy_version_at
from coordexp.models.coord_offset import fold_module
from coordexp.rollout.backends.hf import Around
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.session.session import RolloutQuestion, RolloutSession
from coordexp.telemetry.desc_monitor import DescMonitor
from coordexp.trainers.on_policy.samples import GenerationSampler
from coordexp.trainers.rollouts.answers import AnswerJudge
from coordexp.trainers.rollouts.eval import evaluate_rollouts
from coordexp.trainers.step.ranks import most_over_ranks


@dataclass(frozen=True)
class OnPolicyEvaluation:
    """Asks a session and judges its answers.

    desc_monitor: None when descriptions are not compared.  seed: of the run.  sampler: None on ranks that show nothing.
    """

    session: RolloutSession
    judge: AnswerJudge
    settings: RolloutMatching
    desc_monitor: DescMonitor | None
    seed: int
    sampler: GenerationSampler | None = None

    def __call__(self, samples: Any, step: int) -> dict[str, float]:
        """The `rollout/*` keys over all `samples` after `step` optimizer steps. Collective; equal on all ranks.

        samples: a sequence of RawSample.
        """
        numbers = evaluate_rollouts(
            self.session,
            self.judge,
            samples,
            self.settings,
            self.desc_monitor,
            version=policy_version_at(step),
            seed=self.seed,
            step=step,
            watch=None if self.sampler is None else self.sampler.watch,
        )
        if self.sampler is not None:
            self.sampler.show(step, numbers)
        return numbers


def make_session(
    trainer: Any,
    settings: RolloutMatching,
    first_question: Callable[[], RolloutQuestion],
    around: Around = lambda _requests: nullcontext(),
) -> RolloutSession:
    """Rollouts of the model in training. trainer: one of ours, when its HF side is complete.

    around: see `HfBackend`.
    """
    return RolloutSession(
        lambda: build_policy_backend(
            settings,
            model=trainer.model_wrapped,
            template=trainer.template,
            model_dir=trainer.model.model_dir,
            accelerator=trainer.accelerator,
            form=trainer.form,
            fold=fold_module,
            on_retry=trainer.count_oom_retry,
            around=around,
            token_logprobs=settings.eval_detection.enabled
            and settings.eval_detection.score_mode == "logprob",
        ),
        first_question=first_question,
        template=trainer.template,
        preflight_timeout_s=settings.preflight_timeout_s,
        section=settings.where,
        agree=partial(most_over_ranks, device=trainer.args.device),
        pushing=partial(trainer.pace.timer.phase, "push"),
    )


def make_evaluation(
    trainer: Any, settings: RolloutMatching, session: RolloutSession, desc_monitor: DescMonitor
) -> OnPolicyEvaluation:
    """The evaluation of a run by its settings."""
    custom = trainer.settings.sections.custom
    return OnPolicyEvaluation(
        session,
        AnswerJudge(trainer.template.tokenizer, settings.matching, form=trainer.form),
        settings,
        desc_monitor if settings.desc_monitor.enabled else None,
        trainer.args.seed,
        GenerationSampler.of_run(trainer, custom.generation_samples),
    )
