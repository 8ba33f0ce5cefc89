"""Stage 1: cross-entropy on text, a distribution loss on coordinate slots, one teacher-forced forward.

    loss of a micro-batch = text CE sum / T + coordinate loss sum / C

where T and C count text and coordinate rows of the whole optimizer step: all micro-batches of all ranks. The result
does not depend on how a step is cut into micro-batches and ranks, nor on `custom.head`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coordexp.data.collator import ROWS_KEY, take_rows
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms
from coordexp.losses.sums import add_up
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_run import EVAL_LOSS, LOSS
from coordexp.metrics.keys_stage1 import BASE_CE_LOSS, COORD_DIAG_LOSS, PACK_NUM_SAMPLES
from coordexp.metrics.keys_tokens import TOKEN_ACC
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.base import CoordTrainer, accuracy
from coordexp.trainers.rows_head import RowsHead

BASE_CE_LOSS_EVAL = EVAL_PREFIX + BASE_CE_LOSS
COORD_LOSS_EVAL = EVAL_PREFIX + COORD_DIAG_LOSS


class Stage1CoordTrainer(CoordTrainer):
    """Trainer variant `stage1_coord`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        custom = self.settings.sections.custom
        settings = custom.coord_soft_ce_w1.model_dump()
        mass_monitor = settings.pop("monitor_mass")
        self.weights = Stage1Weights.from_mapping(settings)
        self.needs = self.weights.needs(mass_monitor=mass_monitor)
        self.head = RowsHead(custom.head, self.columns)
        self._step_counts = torch.zeros(2)  # text and coordinate rows of the step, see plan_step

    def plan_step(self, batches: list[dict[str, Any]]) -> None:
        num_text = sum(batch[ROWS_KEY]["num_text"] for batch in batches)
        num_coord = sum(batch[ROWS_KEY]["bins_N"].numel() for batch in batches)
        counts = torch.tensor([num_text, num_coord], device=self.args.device)
        self._step_counts = self.sum_over_ranks(counts)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        rows, num_samples = take_rows(inputs)
        for key in SUPERVISION_KEYS:
            inputs.pop(key, None)
        in_training = self.model.training
        text_count, coord_count = (
            self._step_counts.unbind() if in_training else (rows.num_text, rows.num_coord)
        )
        hits: list[tuple[Tensor, Tensor]] = []

        def objective(loss_inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
            terms = stage1_terms(loss_inputs, self.weights)
            return combine(terms, text_count, coord_count), terms.detach()

        def observe(logits_RV: Tensor, chunk: SupervisedRows) -> None:
            hits.append(accuracy(logits_RV, chunk.targets_R))

        loss, parts = self.head(model, self.unwrapped_model, inputs, rows, self.needs, objective, observe)
        terms = Stage1Terms.merge(parts)
        self.add_metrics(self._numbers(terms, hits, num_samples))
        if in_training:
            loss = loss * self.gradient_scale
            coord = terms.coord if terms.coord_ce is None else terms.coord_ce
            self.stop_if_not_finite({"text": terms.text.sum, "coord": coord.sum})
        return (loss, {"loss": loss}) if return_outputs else loss

    def window_metrics(self, mode: str) -> dict[str, float]:
        metrics = super().window_metrics(mode)
        if mode == "eval" and BASE_CE_LOSS_EVAL in metrics and self.weights.enabled:
            # The trainer's own eval_loss averages batch means, which depends on the batch size; this one is exact.
            metrics[EVAL_LOSS] = metrics[BASE_CE_LOSS_EVAL] + metrics.get(COORD_LOSS_EVAL, 0.0)
        return metrics

    def _numbers(
        self, terms: Stage1Terms, hits: list[tuple[Tensor, Tensor]], num_samples: int
    ) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        numbers: dict[str, tuple[Tensor | float, Tensor | float]] = dict(terms.metrics())
        numbers[TOKEN_ACC] = add_up(hits)
        numbers[PACK_NUM_SAMPLES] = (float(num_samples), 1.0)
        if not self.model.training and terms.coord_ce is not None:
            numbers[LOSS] = (terms.text.sum + terms.coord_ce.sum, terms.text.count + terms.coord.count)
        return numbers
