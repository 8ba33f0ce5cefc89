"""What latent vectors are held against: the same answers read after other prompts, and the most frequent first token.

The prompts are those of `OtherPrompts`. They are measured once, on the model as it stands before the first step of a
run, and leave with its first evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from coordexp.data.collator import Collate
from coordexp.data.latent.other_prompts import CUT, NONE, OtherPrompts, PromptBatch, ShareOfSamples
from coordexp.losses.inputs import cross_entropy_rows
from coordexp.losses.latent.answers import first_open, within
from coordexp.metrics import keys_stage1 as keys
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.latent.forwards import run_rows
from coordexp.trainers.step import ranks

MOST_MAJORITY_ROWS = 5000
"""Answers of the evaluation set that its most frequent first token is counted over."""


class FirstTokens(NamedTuple):
    """Answers of a batch, and how many of their first open tokens the model puts first or among the first five."""

    first: Tensor
    among_5: Tensor
    num_answers: float


def first_tokens_right(logits_RV: Tensor, targets_R: Tensor, places_R: Tensor) -> FirstTokens:
    """Of supervised rows. places_R: see `answers.answer_places`."""
    first_R = within(places_R, 1)
    ranked = logits_RV[first_R].topk(min(5, logits_RV.shape[-1]), dim=-1).indices
    hits = ranked == targets_R[first_R].unsqueeze(-1)
    return FirstTokens(hits[:, 0].sum().float(), hits.any(-1).sum().float(), float(hits.shape[0]))


def majority_share(answers: Any, tok: Any, opening: Sequence[int]) -> float | None:
    """Share of the most frequent first token among the answers of a data set; None without one.

    answers: EncodedSamples.
    """
    if answers is None:
        return None
    counts: Counter[int] = Counter()
    for index in range(min(len(answers), MOST_MAJORITY_ROWS)):
        answer = tok.encode(answers.row_at(index)["messages"][-1]["content"], add_special_tokens=False)
        counts[answer[first_open(answer, opening)]] += 1
    return counts.most_common(1)[0][1] / counts.total()


class LatentBaselines(TrainerCallback, ExportableState):
    """Measures other prompts before the first step of a run that evaluates, and keeps the numbers until they are taken.

    trainer: a LatentPrefixTrainer.  opening, plain: see `with_latents`.

    A run that was cut before its first evaluation has them in its checkpoint.
    """

    def __init__(self, trainer: Any, num_latents: int, opening: Sequence[int], plain: Collate) -> None:
        self._trainer, self._num_latents, self._opening = trainer, num_latents, tuple(opening)
        self._plain = plain
        self._pending: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """The numbers by their keys, once; empty afterwards."""
        taken, self._pending = self._pending, {}
        return taken

    def state(self) -> dict[str, Any]:
        """As checkpoints keep it."""
        return {"args": {}, "attributes": {"pending": dict(self._pending)}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        custom = self._trainer.settings.sections.custom
        if custom.dry_run is not None or custom.evaluate_only is not None:
            return
        if state.global_step > 0:
            saved: Any = state.stateful_callbacks  # by name of class, as `state` gave it
            kept = saved.get(type(self).__name__, {}).get("attributes", {})
            self._pending = dict(kept.get("pending", {}))
            return
        is_evaluated = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
        if is_evaluated and self._trainer.eval_dataset is not None:
            self._pending = self.measure()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of the model as it stands. Every rank reads its share of the evaluation set."""
        trainer = self._trainer
        sums: dict[str, Tensor] = {
            name: torch.zeros(4, dtype=torch.float64, device=trainer.args.device) for name in (NONE, CUT)
        }
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            for batches in self._loader():
                for name, plain in batches.items():
                    batch = PromptBatch(**trainer._prepare_input(plain))
                    with trainer.compute_loss_context_manager():
                        sums[name] += self._read(batch).to(sums[name])
        finally:
            trainer.model.train(was_training)
        numbers = {}
        for name, found in sums.items():
            nll, num_tokens, right, num_answers = ranks.sum_over_ranks(found).tolist()
            numbers[keys.LATENT_OTHER_NLL[name]] = nll / num_tokens
            numbers[keys.LATENT_OTHER_FIRST_TOKEN_ACC[name]] = right / num_answers
        return numbers

    def _loader(self) -> DataLoader[Any]:
        trainer = self._trainer
        collate = OtherPrompts.of(
            trainer.settings.prompt,
            self._plain,
            trainer.template.tokenizer,
            trainer.columns,
            self._opening,
            self._num_latents,
        )
        accelerator = trainer.accelerator
        share: Any = ShareOfSamples(
            trainer.eval_dataset, accelerator.process_index, accelerator.num_processes
        )
        return DataLoader(
            share,
            batch_size=trainer.args.per_device_eval_batch_size,
            num_workers=trainer.args.dataloader_num_workers,
            collate_fn=collate,
        )

    def _read(self, batch: PromptBatch) -> Tensor:
        """float64 [4]: the sum of cross-entropies, over how many tokens; first tokens that are right, of how many."""
        model = self._trainer.unwrapped_model
        inputs = {key: value for key, value in batch.inputs.items() if key not in SUPERVISION_KEYS}
        logits_RV = run_rows(model, model, inputs, batch.positions_R).logits_RV
        ce_R = cross_entropy_rows(logits_RV, batch.targets_R)
        right = first_tokens_right(logits_RV, batch.targets_R, batch.places_R)
        counts = torch.tensor([float(ce_R.numel()), right.num_answers], dtype=torch.float64)
        return torch.stack([ce_R.double().sum().cpu(), counts[0], right.first.double().cpu(), counts[1]])
