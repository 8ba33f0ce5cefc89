"""Stage 1: cross-entropy on text, a distribution loss on coordinate slots, one teacher-forced forward.

    loss of a micro-batch = text CE sum / T + coordinate loss sum / C

where T and C count text and coordinate rows of the whole optimizer step: all micro-batches of all ranks. The result
does not depend on how a step is cut into micro-batches and ranks, nor on `custom.head`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from coordexp.control.halving import Halving
from coordexp.data.batch_meta import BatchMeta
from coordexp.errors import ConfigError
from coordexp.head.run import RowsHead
from coordexp.head.token_metrics import TokenMetrics
from coordexp.losses.inputs import LossInputs
from coordexp.losses.objective import check_atoms_sum
from coordexp.losses.stage1 import (
    COORD_TERMS,
    SECTION,
    Stage1Terms,
    Stage1Weights,
    atom_losses,
    atom_names,
    combine,
    stage1_terms,
)
from coordexp.losses.stage1_numbers import (
    finish_parts,
    finish_per_sample,
    loss_shares,
    part_losses,
    part_sums,
    per_sample_sums,
)
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_control import schedule_key
from coordexp.metrics.keys_rollout import TIME_ROLLOUT_EVAL
from coordexp.metrics.keys_run import EVAL_LOSS, LOSS, SAMPLES_REPLACED_TOTAL, TOKEN_TYPES_SKIPPED_TOTAL
from coordexp.metrics.keys_stage1 import BASE_CE_LOSS, COORD_DIAG_LOSS, PACK_NUM_SAMPLES
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.telemetry.desc_monitor import DescMonitor
from coordexp.trainers.base import CoordTrainer
from coordexp.trainers.datasets import encode_datasets, evaluation_questions
from coordexp.trainers.dry_run.run import EVAL_IMAGES
from coordexp.trainers.on_policy.evaluation import OnPolicyEvaluation, make_evaluation, make_session
from coordexp.trainers.on_policy.schedule import EvaluationParts, RolloutEvalSchedule
from coordexp.trainers.packing import pack_datasets, packing_length_of
from coordexp.trainers.step.planners import COORD, TEXT, Totals, plan_teacher_forced
from coordexp.trainers.step.repeats import num_counted

logger = logging.getLogger(__name__)

BASE_CE_LOSS_EVAL = EVAL_PREFIX + BASE_CE_LOSS
COORD_LOSS_EVAL = EVAL_PREFIX + COORD_DIAG_LOSS


class _RolloutEval(NamedTuple):
    """What `custom.rollout_eval` asks, when, and how the answers are judged."""

    questions: Any
    schedule: RolloutEvalSchedule
    evaluation: OnPolicyEvaluation


class Stage1CoordTrainer(CoordTrainer):
    """Trainer variant `stage1_coord`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        custom = self.settings.sections.custom
        settings = custom.coord_soft_ce_w1.model_dump()
        mass_monitor = settings.pop("monitor_mass") and self.form.has_coord_tokens
        self.weights = Stage1Weights.from_mapping(settings)
        self.needs = self.weights.needs(mass_monitor=mass_monitor)
        self.head = RowsHead(custom.head, self.columns, self.count_oom_retry)
        self._asking = self._make_rollout_eval()
        self._eval_batches = Halving(
            "teacher-forced evaluation, a batch at a time",
            "per_device_eval_batch_size",
            error=torch.OutOfMemoryError,
            free=torch.cuda.empty_cache,
            on_retry=self.count_oom_retry,
        )
        self._has_reported_types = False
        self._packing_length = packing_length_of(self.settings, self.template)

    def prepare_datasets(self, arguments: dict[str, Any]) -> None:
        custom = self.settings.sections.custom
        asking, most = custom.rollout_eval, custom.rollout_eval.num_images
        if custom.dry_run is not None:
            most = EVAL_IMAGES
        self._questions = evaluation_questions(arguments, self.settings, most) if asking.enabled else None
        encode_datasets(arguments, self.settings)
        pack_datasets(arguments, self.settings)

    @property
    def coord_weights(self) -> dict[str, float] | None:
        weights = self._weights_now()
        return {term: weights.of(term) for term in COORD_TERMS} if weights.enabled else None

    def plan_step(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        metas = [BatchMeta.of(batch) for batch in batches]
        self.count_samples(
            sum(meta.num_samples for meta in metas), [part for meta in metas for part in meta.parts]
        )
        step, knobs = int(self.state.global_step), self.steering.knobs()
        self.keep_plan(
            plan_teacher_forced(
                batches, metas, step, self.sum_over_ranks, self.args.device, self._packing_length, knobs
            )
        )
        in_force = self.weights.in_force(step, knobs)
        self.metrics.add_all({schedule_key(SECTION, name): value for name, value in in_force.items()})
        return batches

    def _weights_now(self) -> Stage1Weights:
        """Those of the step that runs."""
        if self._plan is None:
            return self.weights.at(int(self.state.global_step))
        return self.weights.at(self._plan.step, self._plan.knobs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        meta = BatchMeta.take(inputs)
        rows = meta.rows
        for key in SUPERVISION_KEYS:
            inputs.pop(key, None)
        in_training = self.model.training
        weights = self._weights_now() if in_training else self.weights.settled()
        totals: Totals = (
            self._plan.totals
            if in_training and self._plan is not None
            else {TEXT: rows.num_text, COORD: rows.num_coord}
        )
        tokens = TokenMetrics(rows, self.columns, **self.token_switches)

        def objective(loss_inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
            terms = stage1_terms(loss_inputs, weights)
            return combine(terms, totals[TEXT], totals[COORD]), terms.detach()

        def losses(loss_inputs: LossInputs) -> dict[str, Tensor]:
            return atom_losses(loss_inputs, weights, totals[TEXT], totals[COORD])

        probe = None
        if in_training and self._plan is not None:
            names = atom_names(weights)
            probe = self.gradients.watch(self._plan.step, names, rows, self.needs, losses)
        with self.pace.timer.phase("forward"):
            loss, parts = self.head(
                model,
                self.unwrapped_model,
                inputs,
                rows,
                self.needs,
                objective,
                tokens.observer,
                tokens.restart,
                probe,
            )
        terms = Stage1Terms.merge(parts)
        self.add_metrics(self._numbers(terms, tokens, meta.num_samples))
        if meta.num_replaced:
            self.add_metrics({SAMPLES_REPLACED_TOTAL: (float(meta.num_replaced), 1.0)})
        if meta.types_skipped:
            self._report_skipped_types(meta.sample_ids)
        if self.settings.sections.debug.enabled:
            check_atoms_sum(float(loss), loss_shares(terms, totals[TEXT], totals[COORD]))
        if in_training:
            loss = loss * self.gradient_scale
            coord = terms.coord if terms.coord_ce is None else terms.coord_ce
            self.stop_if_not_finite({"text": terms.text.sum, "coord": coord.sum}, meta.sample_ids, loss=loss)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A batch of evaluation. Of samples that only fill up the last round of the ranks, nothing is counted."""
        num_entries = BatchMeta.of(inputs).num_entries
        num = num_counted(self.accelerator, num_entries)
        if 0 < num < num_entries:
            self.keep_first(inputs, num)
        with self.metrics.paused() if num == 0 < num_entries else nullcontext():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def keep_first(self, inputs: dict[str, Any], num_entries: int) -> Tensor:
        """Leave a batch the supervision of its first entries alone; returns which rows (bool [R]) those are."""
        kept, keep_R = BatchMeta.of(inputs).first(num_entries)
        kept.put(inputs)
        return keep_R

    # evaluation by what the model writes

    def _make_rollout_eval(self) -> _RolloutEval | None:
        settings, questions = self.settings.sections.custom.rollout_eval, self._questions
        if not settings.enabled:
            return None
        if questions is None:
            raise ConfigError("custom.rollout_eval: there are no validation records to ask about.")
        questions = self.asked(questions)
        schedule = RolloutEvalSchedule(settings.every_steps)
        self.add_callback(schedule)
        rollouts = settings.rollouts
        session = make_session(self, rollouts, lambda: questions[0], self.around_generation)
        monitor = DescMonitor(settings.desc_monitor, device=str(self.args.device))
        return _RolloutEval(questions, schedule, make_evaluation(self, rollouts, session, monitor))

    def asked(self, questions: Any) -> Any:
        """The questions as the model in training is asked them."""
        return questions

    def around_generation(self, requests: Sequence[RolloutRequest]) -> AbstractContextManager[None]:
        """What the model in training answers some requests in."""
        return nullcontext()

    def on_step(self, num_micro_steps: int) -> None:
        super().on_step(num_micro_steps)
        if self._asking is not None:
            self._asking.evaluation.session.start()

    def num_rollout_images(self, num_samples: int) -> int:
        settings = self.settings.sections.custom.rollout_eval
        return min(settings.num_images or num_samples, num_samples) if settings.enabled else 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._asking is not None:
                self._asking.evaluation.session.close()

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The HF Trainer's own loop, the model's answers, or both: their numbers leave in one record."""
        asking = self._asking if metric_key_prefix == "eval" else None
        parts = EvaluationParts(True, False) if asking is None else asking.schedule.take()
        output = (
            self._teacher_forced(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if parts.teacher_forced
            else EvalLoopOutput(np.empty(0), None, {}, 0)
        )
        if asking is None or not parts.rollouts:
            return output
        started = time.perf_counter()
        self.model.eval()
        numbers = asking.evaluation(asking.questions, int(self.state.global_step))
        numbers[TIME_ROLLOUT_EVAL] = time.perf_counter() - started
        metrics = {**(output.metrics or {}), **{EVAL_PREFIX + key: value for key, value in numbers.items()}}
        return output._replace(metrics=metrics, num_samples=output.num_samples or len(asking.questions))

    def _teacher_forced(self, dataloader: Any, *arguments: Any) -> EvalLoopOutput:
        """The HF Trainer's own loop; of one process, begun anew with half the batch where memory runs out.

        Several processes would wait for one that begins anew.
        """
        full = int(self.args.per_device_eval_batch_size)

        def attempt(size: int) -> EvalLoopOutput:
            if size == full:
                whole: EvalLoopOutput = super(Stage1CoordTrainer, self).evaluation_loop(
                    dataloader, *arguments
                )
                return whole
            self.metrics.flush("eval")  # what a try that failed has added
            self.args.per_device_eval_batch_size = size
            try:
                loader = self.get_eval_dataloader(dataloader.dataset)
                halved: EvalLoopOutput = super(Stage1CoordTrainer, self).evaluation_loop(loader, *arguments)
                return halved
            finally:
                self.args.per_device_eval_batch_size = full

        if self.accelerator.num_processes > 1:
            return attempt(full)
        return self._eval_batches.run(full, attempt)

    def window_metrics(self, mode: str) -> dict[str, float]:
        metrics = super().window_metrics(mode)
        if mode == "eval" and BASE_CE_LOSS_EVAL in metrics and self.weights.enabled:
            # The trainer's own eval_loss averages batch means, which depends on the batch size; this one is exact.
            metrics[EVAL_LOSS] = metrics[BASE_CE_LOSS_EVAL] + metrics.get(COORD_LOSS_EVAL, 0.0)
        finish_parts(metrics, mode, self.mixed_datasets)
        if self.template.padding_free:
            finish_per_sample(metrics, mode)
        return metrics

    def _numbers(
        self, terms: Stage1Terms, tokens: TokenMetrics, num_samples: int
    ) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        numbers: dict[str, tuple[Tensor | float, Tensor | float]] = dict(terms.metrics())
        numbers.update(tokens.metrics())
        numbers.update(part_sums(terms, self.mixed_datasets))
        numbers[PACK_NUM_SAMPLES] = (float(num_samples), 1.0)
        if self.template.padding_free:
            numbers |= per_sample_sums(terms, num_samples)
        if not self.model.training and terms.coord_ce is not None:
            numbers[LOSS] = (terms.text.sum + terms.coord_ce.sum, terms.text.count + terms.coord.count)
            numbers.update(part_losses(terms, self.mixed_datasets))
        return numbers

    def _report_skipped_types(self, ids: Sequence[str]) -> None:
        """Count a batch without token types; say so once."""
        self.add_metrics({TOKEN_TYPES_SKIPPED_TOTAL: (1.0, 1.0)})
        if not self._has_reported_types:
            self._has_reported_types = True
            logger.warning(
                "custom.token_type_metrics: the labels of a batch are not those of its samples one after another, so "
                "its tokens have no types and its token metrics are left out (said once; %s counts the batches). "
                "Samples: %s",
                TOKEN_TYPES_SKIPPED_TOTAL,
                ", ".join(ids),
            )
