"""Trainer variant `latent_prefix`: a prompt's text becomes M vectors, which the model reads in its place.

A step is of kind L (the prompt is latent vectors) or T (it is its text), by its number alone. Of a micro-batch:

    text -> its embeddings -> prefix -> vectors, some of them dropped (custom.latent_prefix.keep)
    L: teacher reads the text, where the objective distils; student reads the vectors
    T: student reads the text, where the objective teaches it
    loss = sum over modules of the objective of weight * sum / total, totals being those of the whole step

Data, evaluation, rollouts and logs are those of stage 1, whose objective is one of the modules.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.codec.latent_vocab import LatentVocab
from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.config.schema.latent_prefix import LatentPrefixSettings
from coordexp.control.points import value_at
from coordexp.control.schedule import Channel, channel_at
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.latent.batches import LatentBatch, with_latents
from coordexp.data.latent.spans import LatentQuestions, SpanMarker, padded
from coordexp.errors import ConfigError
from coordexp.head.token_metrics import TokenMetrics
from coordexp.losses.inputs import LossInputs, SupervisedRows, cross_entropy_rows
from coordexp.losses.latent.objective import KD, STAGE1, STATE_KD, LatentInputs, LatentObjective
from coordexp.losses.objective import check_atoms_sum
from coordexp.losses.stage1 import Stage1Terms, stage1_terms
from coordexp.losses.sums import SumCount
from coordexp.metrics import keys_stage1 as keys
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_run import SAMPLES_REPLACED_TOTAL
from coordexp.models.latent_prefix.dropout import drop_latents, keep_mask, prompt_key, training_key
from coordexp.models.latent_prefix.place import latents_in_place
from coordexp.models.latent_prefix.resampler import rms, segment_means
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.datasets import EVAL, encode_datasets, evaluation_questions
from coordexp.trainers.dry_run.run import EVAL_IMAGES
from coordexp.trainers.latent.baselines import LatentBaselines, first_tokens_right, majority_share
from coordexp.trainers.latent.forwards import ForwardRows, language_layers, run_rows, run_teacher
from coordexp.trainers.latent.meeting import meet_without_forward, tied_to
from coordexp.trainers.latent.training import PrefixTraining
from coordexp.trainers.stage1 import Stage1CoordTrainer
from coordexp.trainers.start.latent import ATTRIBUTE
from coordexp.trainers.step.planners import COORD, TEXT, Totals

logger = logging.getLogger(__name__)

TEXT_STEP, LATENT_STEP = "T", "L"


@dataclass(frozen=True)
class Vectors:
    """The prefix of every sample of a batch. kept_SMH: after latent dropout; all_SMH: before it."""

    kept_SMH: Tensor
    all_SMH: Tensor
    means_SMH: Tensor
    text_rms_S: Tensor


class LatentPrefixTrainer(Stage1CoordTrainer):
    """Trainer variant `latent_prefix`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._training = PrefixTraining(
            self.model, self._latent, self.args.learning_rate, self.deepspeed_config
        )
        self.latent = LatentObjective(self._latent)
        language_layers(self.unwrapped_model, self.latent.state_layers)
        self._refuse_reentrant()
        self._has_warned = False
        self._ids_M = torch.tensor(self._latent_ids, device=self.args.device)
        plain = partial(_plain, self.template)
        self._baselines = LatentBaselines(self, self._latent.num_latents, self._opening, plain)
        self.add_callback(self._baselines)

    @property
    def _latent(self) -> LatentPrefixSettings:
        settings = self.settings.sections.custom.latent_prefix
        if settings is None:
            raise ConfigError("custom.latent_prefix is missing; trainer variant latent_prefix needs it.")
        return settings

    # data

    def prepare_datasets(self, arguments: dict[str, Any]) -> None:
        custom, template = self.settings.sections.custom, arguments["template"]
        asking, most = custom.rollout_eval, custom.rollout_eval.num_images
        if custom.dry_run is not None:
            most = EVAL_IMAGES
        self._questions = evaluation_questions(arguments, self.settings, most) if asking.enabled else None
        self._latent_ids = LatentVocab.from_tokenizer(template.tokenizer, self._latent.num_latents).ids
        self._opening = self._opening_of(template.tokenizer)
        encode_datasets(arguments, self.settings, SpanMarker(template.tokenizer))
        self._majority = majority_share(arguments.get(EVAL), template.tokenizer, self._opening)

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        collate = super()._get_data_collator(args, template)
        return with_latents(collate, partial(_plain, template), self._latent_ids, self._opening, self.columns)

    def _opening_of(self, tok: Any) -> list[int]:
        """Tokens that every answer begins with."""
        answers = [
            tok.encode(
                self.settings.form.serialize([BoxObject(desc, KIND_BBOX, bins)]), add_special_tokens=False
            )
            for desc, bins in (("apple", (1, 2, 3, 4)), ("zebra", (500, 600, 700, 800)))
        ]
        same = next(n for n, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
        opening: list[int] = answers[0][:same]
        return opening

    # steps

    def kind_at(self, step: int) -> str:
        """T or L: the kind of optimizer step `step`."""
        if self.dry_run is not None:
            kinds = tuple(self.step_kinds(1))
            return kinds[step % len(kinds)]
        is_text = channel_at(step, self._latent.text_share) is Channel.B
        return TEXT_STEP if is_text else LATENT_STEP

    def step_kinds(self, total_steps: int) -> dict[str, int]:
        shares = self._latent.text_share
        if shares == 0:
            return {LATENT_STEP: total_steps}
        num_text = sum(channel_at(step, shares) is Channel.B for step in range(total_steps))
        return {TEXT_STEP: num_text, LATENT_STEP: total_steps - num_text}

    def plan_step(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batches = super().plan_step(batches)
        plan = self._plan
        assert plan is not None
        counts: Counter[str] = Counter()
        for batch in batches:
            meta, latent = BatchMeta.of(batch), LatentBatch.of(batch)
            counts.update(self.latent.counts(latent.places_R, meta.num_samples))
        names = sorted(counts)
        total = self.sum_over_ranks(torch.tensor([counts[name] for name in names], device=self.args.device))
        totals = {**plan.totals, **dict(zip(names, total.unbind(), strict=True))}
        self._plan = replace(plan, totals=totals)
        kind = self.kind_at(plan.step)
        self.metrics.add(keys.LATENT_TEXT_STEPS, float(kind == TEXT_STEP))
        weights = self.latent.weights_at(plan.step, kind)
        changing = {entry.name for entry in self._latent.objective if not isinstance(entry.weight, float)}
        self.metrics.add_all({keys.LATENT_WEIGHT[name]: w for name, w in weights.items() if name in changing})
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        meta, latent = BatchMeta.take(inputs), LatentBatch.take(inputs)
        for key in SUPERVISION_KEYS:
            inputs.pop(key, None)
        in_training = self.model.training
        step = self._plan.step if in_training and self._plan is not None else int(self.state.global_step)
        kind = self.kind_at(step) if in_training else LATENT_STEP
        weights = self.latent.weights_at(step, kind) if in_training else self.latent.settled(kind)
        totals = self._totals(meta.rows, latent, meta.num_samples)
        vectors = self._vectors(latent, meta.sample_ids, step)
        with self.pace.timer.phase("forward"):
            given, rows = self._forwards(model, inputs, meta, latent, vectors, kind, weights)
        tokens = TokenMetrics(rows, self.columns, **self.token_switches)
        given = self._with_stage1(given, rows, tokens)
        loss, shares, raw = self.latent(given, weights, totals)
        self._log_forward(given, tokens, meta, shares, raw, vectors, kind)
        if in_training:
            # the prefix takes part in every step: ranks that exchange gradients expect all of it
            loss = loss + 0.0 * self._training.sum_of_weights()
            self._log_gradients(step, shares, vectors)
            loss = loss * self.gradient_scale
            self.stop_if_not_finite(shares, meta.sample_ids, loss=loss)
        else:
            self._log_text(model, inputs, meta, latent.places_R)
        if self.settings.sections.debug.enabled:
            scale = self.gradient_scale if in_training else 1.0
            parts = {name: float(share.detach()) for name, share in shares.items()}
            check_atoms_sum(float(loss.detach()) / scale, parts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _totals(self, rows: SupervisedRows, latent: LatentBatch, num_samples: int) -> Totals:
        """Denominators: of the whole step in training, of the batch in evaluation."""
        if self.model.training and self._plan is not None:
            return self._plan.totals
        counts = self.latent.counts(latent.places_R, num_samples)
        return {TEXT: rows.num_text, COORD: rows.num_coord, **counts}

    def _keep_prob(self, step: int) -> float:
        """Of latent dropout: in training that of the step; evaluation takes the same, unless it keeps all."""
        keep = self._latent.keep
        prob = value_at(step, keep.prob)
        if self.model.training or keep.evaluate == "same" or prob == 1:
            return prob
        if not self._has_warned and self.is_world_process_zero():
            self._has_warned = True
            logger.warning(
                "custom.latent_prefix.keep: evaluation keeps all latent vectors (evaluate: full), but training keeps "
                "each with probability %g; the model has not learned to read what it is measured on.",
                prob,
            )
        return 1.0

    def _vectors(self, latent: LatentBatch, sample_ids: Sequence[str], step: int) -> Vectors:
        prob = self._keep_prob(step)
        if self.model.training:
            names = [training_key(self.args.seed, step, sample_id) for sample_id in sample_ids]
        else:
            names = [
                prompt_key(ids[mask].tolist())
                for ids, mask in zip(latent.text_ids_SL.cpu(), latent.text_mask_SL.cpu(), strict=True)
            ]
        self.add_metrics({keys.LATENT_KEEP_PROB: (prob, 1.0)})
        return self._made(latent.text_ids_SL, latent.text_mask_SL, names, prob)

    def _made(self, ids_SL: Tensor, mask_SL: Tensor, names: Sequence[str], prob: float) -> Vectors:
        """The vectors of some texts. names: what latent dropout is decided by."""
        embedding: Any = self.unwrapped_model
        text_SLH = embedding.get_input_embeddings()(ids_SL).detach()
        num_latents = self._latent.num_latents
        with torch.autocast(text_SLH.device.type, enabled=False):
            text_SLH = text_SLH.float()
            means_SMH = segment_means(text_SLH, mask_SL, num_latents)
            vectors_SMH = self._training.prefix(text_SLH, mask_SL)
            keep_SM = keep_mask(names, num_latents, prob).to(text_SLH.device, non_blocking=True)
            return Vectors(drop_latents(vectors_SMH, keep_SM), vectors_SMH, means_SMH, rms(text_SLH, mask_SL))

    def _forwards(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        meta: BatchMeta,
        latent: LatentBatch,
        vectors: Vectors,
        kind: str,
        weights: Mapping[str, float],
    ) -> tuple[LatentInputs, SupervisedRows]:
        """What the objective looks at, and the supervised rows of the student's forward."""
        rows, places_R = meta.rows, latent.places_R
        counted = slice(meta.num_samples)
        given = LatentInputs(
            rows.targets_R,
            places_R,
            vectors_SMH=vectors.all_SMH[counted],
            means_SMH=vectors.means_SMH[counted],
        )
        if kind == TEXT_STEP:
            anchor = self._training.sum_of_weights()
            if STAGE1 not in weights:
                met = meet_without_forward(model, self.unwrapped_model, inputs, anchor)
                return replace(given, vectors_SMH=vectors.all_SMH + met), rows
            tied = tied_to(self.unwrapped_model, anchor)
            logits_RV = run_rows(model, self.unwrapped_model, inputs, rows.positions_R, placed=tied).logits_RV
            return replace(given, logits_RV=logits_RV), rows
        layers = self.latent.state_layers if STATE_KD in weights else ()
        state_R = self.latent.rows_of(STATE_KD, places_R) if layers else None
        latent_rows = latent.rows(rows)
        student = run_rows(
            model,
            self.unwrapped_model,
            {key: v for key, v in latent.model_inputs(inputs).items() if key not in SUPERVISION_KEYS},
            latent_rows.positions_R,
            layers=layers,
            state_positions_r=None if state_R is None else latent_rows.positions_R[state_R],
            placed=self._in_place(vectors),
        )
        self._check_states(student)
        given = replace(given, logits_RV=student.logits_RV)
        return self._taught(given, student, inputs, rows, weights, state_R), latent_rows

    def _taught(
        self,
        given: LatentInputs,
        student: ForwardRows,
        inputs: dict[str, Any],
        rows: SupervisedRows,
        weights: Mapping[str, float],
        state_R: Tensor | None,
    ) -> LatentInputs:
        """With what the teacher says, where the objective distils."""
        kd = self.latent.kd if KD in weights else None
        if kd is None and state_R is None:
            return given
        positions_R = rows.positions_R
        chosen = positions_R[self.latent.rows_of(KD, given.places_R)] if kd else positions_R[:0]
        teacher, states = run_teacher(
            self.unwrapped_model,
            inputs,
            chosen,
            top_k=kd.config.top_k if kd else 1,
            temperature=kd.config.temperature if kd else 1.0,
            chunk_rows=kd.config.chunk_rows if kd else 1,
            layers=tuple(student.states),
            state_positions_r=None if state_R is None else positions_R[state_R],
        )
        pairs = {layer: (found, states[layer]) for layer, found in student.states.items()}
        return replace(given, teacher=teacher, states=pairs)

    def _with_stage1(self, given: LatentInputs, rows: SupervisedRows, tokens: TokenMetrics) -> LatentInputs:
        """With the terms of stage 1, whether they are in the loss or only looked at."""
        if given.logits_RV is None:
            return given
        weights = self._weights_now() if self.model.training else self.weights.settled()
        with torch.autocast(given.logits_RV.device.type, enabled=False):
            if tokens.observer is not None:
                tokens.observer(given.logits_RV.detach(), rows)
            inputs = LossInputs.from_logits(given.logits_RV, rows, self.columns, self.needs)
            return replace(given, stage1=stage1_terms(inputs, weights))

    def _in_place(self, vectors: Vectors) -> AbstractContextManager[None]:
        """The forwards that read the prefix run in it."""
        deep = self._training.prefix.deep
        return latents_in_place(self.unwrapped_model, self._ids_M, vectors.kept_SMH, deep)

    def keep_first(self, inputs: dict[str, Any], num_entries: int) -> Tensor:
        keep_R = super().keep_first(inputs, num_entries)
        LatentBatch.of(inputs).first(keep_R).put(inputs)
        return keep_R

    # evaluation by what the model writes

    def asked(self, questions: Any) -> LatentQuestions:
        return LatentQuestions(questions, self.template.tokenizer, self._latent_ids)

    def around_generation(self, requests: Sequence[RolloutRequest]) -> AbstractContextManager[None]:
        assert self._asking is not None
        texts = [self._asking.questions.text_of(request.request_id) for request in requests]
        ids_SL, mask_SL = (part.to(self.args.device) for part in padded(texts))
        prob = self._keep_prob(int(self.state.global_step))
        with torch.no_grad():
            made = self._made(ids_SL, mask_SL, [prompt_key(text) for text in texts], prob)
        return self._in_place(made)

    # what is said

    def _log_forward(
        self,
        given: LatentInputs,
        tokens: TokenMetrics,
        meta: BatchMeta,
        shares: Mapping[str, Tensor],
        raw: Mapping[str, SumCount],
        vectors: Vectors,
        kind: str,
    ) -> None:
        numbers: dict[str, tuple[Tensor | float, Tensor | float]] = {
            keys.LATENT_RAW[name]: (term.sum, term.count) for name, term in raw.items()
        }
        if self.model.training:
            accumulated = float(self.args.gradient_accumulation_steps)
            numbers |= {
                keys.LATENT_SHARE[name]: (share.detach() * self.gradient_scale, 1.0 / accumulated)
                for name, share in shares.items()
            }
        size, counted = float(meta.num_samples), slice(meta.num_samples)
        numbers[keys.LATENT_PREFIX_RMS] = (rms(vectors.all_SMH[counted].detach()).sum(), size)
        numbers[keys.LATENT_TEXT_RMS] = (vectors.text_rms_S[counted].sum(), size)
        if self._training.prefix.deep is not None:
            numbers[keys.LATENT_DEEP_RMS] = (self._training.prefix.deep.values_rms, 1.0)
        if given.logits_RV is not None and given.stage1 is not None:
            nll = keys.LATENT_NLL if kind == LATENT_STEP else keys.LATENT_TEXT_NLL
            ce_R = cross_entropy_rows(given.logits_RV.detach(), given.targets_R)
            numbers[nll] = (ce_R.sum(), float(ce_R.numel()))
            numbers |= self._numbers(Stage1Terms.merge([given.stage1.detach()]), tokens, meta.num_samples)
            if kind == LATENT_STEP:
                right = first_tokens_right(given.logits_RV.detach(), given.targets_R, given.places_R)
                numbers[keys.LATENT_FIRST_TOKEN_ACC] = (right.first, right.num_answers)
                numbers[keys.LATENT_FIRST_TOKEN_ACC_TOP5] = (right.among_5, right.num_answers)
        if meta.num_replaced:
            numbers[SAMPLES_REPLACED_TOTAL] = (float(meta.num_replaced), 1.0)
        self.add_metrics(numbers)

    def _log_text(self, model: nn.Module, inputs: dict[str, Any], meta: BatchMeta, places_R: Tensor) -> None:
        """In evaluation the same answers are read after the text, too."""
        logits_RV = run_rows(model, self.unwrapped_model, inputs, meta.rows.positions_R).logits_RV
        ce_R = cross_entropy_rows(logits_RV, meta.rows.targets_R)
        right = first_tokens_right(logits_RV, meta.rows.targets_R, places_R)
        self.add_metrics({keys.LATENT_TEXT_NLL: (ce_R.sum(), float(ce_R.numel()))})
        self.add_metrics({keys.LATENT_TEXT_FIRST_TOKEN_ACC: (right.first, right.num_answers)})

    def _log_gradients(self, step: int, shares: Mapping[str, Tensor], vectors: Vectors) -> None:
        if not self.gradients.is_due(step):
            return
        for name, share in shares.items():
            gradient = (
                torch.autograd.grad(share, vectors.all_SMH, retain_graph=True, allow_unused=True)[0]
                if share.requires_grad
                else None
            )
            norm = torch.zeros(()) if gradient is None else gradient.detach().norm()
            self.add_metrics({keys.LATENT_GRAD_NORM[name]: (norm, 1.0)})

    def window_metrics(self, mode: str) -> dict[str, float]:
        metrics = super().window_metrics(mode)
        if mode == "eval" and EVAL_PREFIX + keys.LATENT_NLL in metrics:
            if self._majority is not None:
                metrics[EVAL_PREFIX + keys.LATENT_MAJORITY_FIRST_TOKEN] = self._majority
            metrics |= {EVAL_PREFIX + key: value for key, value in self._baselines.take().items()}
        return metrics

    # what is trained and kept

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model=model)
        self._training.use_own_rates(optimizer)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        settings = self._latent
        keep = value_at(int(self.state.global_step), settings.keep.prob)
        self._training.save(
            Path(output_dir or self.args.output_dir),
            self.template.tokenizer,
            keep_prob=keep if settings.keep.evaluate == "same" else 1.0,
            prompt=self.prompt.user if settings.source == "static" else None,
            state=state_dict,
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and not self.is_deepspeed_enabled:
            self._training.restore(best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # the weights of the prefix are in files of their own, and there already
        ours = f"{ATTRIBUTE}."
        missing = [key for key in load_result.missing_keys if not key.startswith(ours)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _refuse_reentrant(self) -> None:
        kwargs = self.args.gradient_checkpointing_kwargs or {}
        if not self.args.gradient_checkpointing or kwargs.get("use_reentrant") is False:
            return
        asked = "latent_state_kd" if self.latent.state_layers else None
        if self.settings.sections.telemetry.gradient_probe.every_steps is not None:
            asked = asked or "telemetry.gradient_probe"
        if asked is not None:
            raise ConfigError(
                f"{asked}: gradients inside the layers are not there under reentrant gradient checkpointing; write "
                "gradient_checkpointing_kwargs: {use_reentrant: false}, or gradient_checkpointing: false."
            )

    def _check_states(self, student: ForwardRows) -> None:
        if self.model.training and any(not found.requires_grad for found in student.states.values()):
            raise ConfigError(
                "latent_state_kd: the outputs of layers carry no gradient; write gradient_checkpointing: false."
            )


def _plain(template: Any, features: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as the template makes it. Of the module, so that workers can be given it."""
    batch: dict[str, Any] = template.data_collator(features)
    return batch
