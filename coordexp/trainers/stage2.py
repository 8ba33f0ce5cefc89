"""What both stage-2 trainers share: a step planned as a whole, forwards run one by one, evaluation by rollout.

    plan_groups      samples of the step (rollouts and targets, or ground truth), by the forward they share
    get_batch_samples  -> forwards, and the counts of every loss atom over the step and all ranks
    training_step    forward and backward of each planned forward; gradients meet once, at the last of the step
    evaluate         rollout -> parse -> match over the evaluation set; no teacher-forced loss

A subclass says what a step teaches on: `plan_groups` and `forward_kinds`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.data.raw_samples import RawSample, RawSamples
from coordexp.errors import ConfigError
from coordexp.head.run import HeadResult, RowsHead, Supervised
from coordexp.head.token_metrics import TokenMetrics
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.objective import Stage2Terms, check_atoms_sum
from coordexp.losses.provenance import Forward
from coordexp.metrics.keys_rollout import EARLY_FORWARDS, TIME_ROLLOUT_WAIT
from coordexp.models.coord_offset import fold_module
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.session.preflight import preflight
from coordexp.rollout.types import PolicyBackend, RolloutRequest
from coordexp.swift_bridge.prompts import rows_of
from coordexp.targets.counts import step_counts
from coordexp.targets.sample import EncodedSample
from coordexp.telemetry.desc_monitor import DescMonitor
from coordexp.telemetry.dumps import DumpSample, MonitorDumps
from coordexp.trainers.base import CoordTrainer
from coordexp.trainers.best_checkpoint import announce, choose_best_by
from coordexp.trainers.early_training import EarlyTraining
from coordexp.trainers.rollout_dumps import dump_sample
from coordexp.trainers.rollout_eval import evaluate_rollouts, evaluation_keys, matched_descs
from coordexp.trainers.rollout_metrics import (
    RolloutOutcome,
    channel_b_metrics,
    packing_metrics,
    rollout_metrics,
)
from coordexp.trainers.rollout_pipeline import RolledOut, RolloutPipeline
from coordexp.trainers.stage2_setup import (
    describe_pipeline,
    make_builder,
    make_layout,
    make_objective,
    rollout_settings,
)
from coordexp.trainers.step.plan import (
    PlannedForward,
    most_over_ranks,
    on_device,
    plan_forwards,
    spread,
    with_token_types,
)

logger = logging.getLogger(__name__)


class Stage2Trainer(CoordTrainer):
    """Base of the stage-2 trainers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        template, run = kwargs["template"], kwargs["args"]
        samples_per_step = run.per_device_train_batch_size * run.gradient_accumulation_steps * run.world_size
        for name, multiple_of in (("train_dataset", samples_per_step), ("eval_dataset", 1)):
            rows = rows_of(kwargs.get(name))
            kwargs[name] = None if rows is None else RawSamples(rows, template, multiple_of=multiple_of)
        super().__init__(*args, **kwargs)
        self.rollout_settings = settings = rollout_settings(self.settings)
        self.objective = make_objective(self.settings)
        self.head = RowsHead(self.settings.sections.custom.head, self.columns)
        self.layout = make_layout(
            settings,
            self.columns,
            template,
            self.unwrapped_model.config,
            self.args.per_device_train_batch_size,
        )
        self.builder = make_builder(self.settings, template, self.layout)
        self.desc_monitor = DescMonitor(settings.desc_monitor, device=str(self.args.device))
        self._pipeline: RolloutPipeline | None = None
        self._counts: dict[str, Tensor] = {}  # denominators of the step
        self._watched: dict[str, Tensor] = {}  # atoms of the planned forward that is running
        self._early: EarlyTraining | None = None  # of the step that is being planned
        self._early_loss: Tensor | None = None
        if settings.overlap.enabled and self.is_deepspeed_enabled:
            raise ConfigError(
                "rollout_matching.overlap.enabled: DeepSpeed keeps gradients in buffers of its own, so those of early "
                "forwards cannot be held apart; set it to false, or train with DDP."
            )
        choose_best_by(self.args, self.settings.swift.get("metric_for_best_model"), evaluation_keys(settings))
        self.dumps: MonitorDumps | None = None
        if self.is_world_process_zero():
            logger.info(describe_pipeline(self.settings, self.objective))
            announce(self.args)
            out_dir = settings.monitor_dump.out_dir or Path(self.args.output_dir) / "monitor_dumps"
            self.dumps = MonitorDumps(settings.monitor_dump, out_dir)

    # what a step teaches on

    def plan_groups(self, raws: Sequence[RawSample]) -> list[list[EncodedSample]]:
        """Training samples of the coming step on this rank, by the forward they share; without those trained early.

        Called once per step, before `forward_kinds` is read.
        """
        raise NotImplementedError

    @property
    def forward_kinds(self) -> tuple[Forward, ...]:
        """The kinds of forwards that each planned forward of the step runs, in order."""
        return (Forward.ROLLOUT,)

    def ground_truth(self, raw: RawSample) -> EncodedSample:
        """The sample that teaches the annotations of `raw` alone."""
        return self.builder.from_ground_truth(
            raw.prompt_ids, raw.objects, sample_id=raw.sample_id, media=raw.media
        )

    # the step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        batches: list[list[RawSample]] = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        if not batches:
            return [], None
        return spread(self._forwards_of([raw for batch in batches for raw in batch]), len(batches)), None

    def _forwards_of(self, raws: Sequence[RawSample]) -> list[PlannedForward]:
        """The forwards of the step on this rank; equally many on all ranks. Sets the counts of the step."""
        self.count_samples(len(raws))
        self._early = None
        groups = self.plan_groups(raws)
        filler = groups[0][0] if groups else self.ground_truth(raws[0])
        agree = partial(most_over_ranks, device=self.args.device)
        forwards = plan_forwards(groups, self.layout, agree, filler=filler)
        counted = [forward for forward in forwards if forward.counts]
        counted += self._early.forwards if self._early else []
        self._counts = self._step_counts([forward.rows for forward in counted])
        if self._early:
            self._early_loss = self._early.settle(self._counts)
        if self.layout.packing_length is not None and Forward.ROLLOUT in self.forward_kinds:
            lengths = [forward.batch.num_tokens for forward in counted]
            num_segments = sum(len(forward.batch.samples) for forward in counted)
            self.metrics.add_all(
                packing_metrics(lengths, self.layout.packing_length, num_segments=num_segments)
            )
        return [self._with_types(forward, raws) for forward in forwards]

    def _with_types(self, forward: PlannedForward, raws: Sequence[RawSample]) -> PlannedForward:
        """The forward with the token types that token metrics split by, where they are asked for."""
        counted_datasets = self.typed_datasets
        if counted_datasets is None:
            return forward
        return with_token_types(forward, {raw.sample_id for raw in raws if counted_datasets(raw.dataset)})

    def _step_counts(self, rows: Sequence[SupervisedRows]) -> dict[str, Tensor]:
        """Denominators of the atoms over the step and all ranks, on the device."""
        own: dict[str, Tensor] = {}
        for kind in self.forward_kinds:
            own |= step_counts(rows, self.objective, kind)
        summed = self.sum_over_ranks(
            torch.stack([count.double() for count in own.values()]).to(self.args.device)
        )
        return dict(zip(own, summed.float().unbind(), strict=True))

    def training_step(
        self, model: nn.Module, inputs: list[PlannedForward], num_items_in_batch: Any = None
    ) -> Tensor:
        self._enter_training(model)
        is_last_entry = self.accelerator.sync_gradients
        total = torch.zeros((), device=self.args.device)
        if self._early_loss is not None:
            total, self._early_loss = self._early_loss, None
        for index, forward in enumerate(inputs):
            is_last = is_last_entry and index == len(inputs) - 1
            with self._gradients_meet(model, is_last):
                total += self._forward_and_backward(model, forward)
        return total

    def _enter_training(self, model: nn.Module) -> None:
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()

    def _forward_and_backward(self, model: nn.Module, forward: PlannedForward) -> Tensor:
        return self._backward(self._watched_loss(model, forward), 1.0 if forward.counts else 0.0)

    def _watched_loss(self, model: nn.Module, forward: PlannedForward) -> Tensor:
        self._watched = {}
        with self.compute_loss_context_manager():
            loss = self.forward_loss(model, forward)
        ids = [sample.sample_id for sample in forward.batch.samples]
        self.stop_if_not_finite(self._watched | {"loss": loss}, ids)
        return loss

    def _backward(self, loss: Tensor, weight: float) -> Tensor:
        loss = loss * (self.gradient_scale * weight)
        # The loss is divided by counts of the whole step already; DeepSpeed must not divide it again.
        options: Mapping[str, Any] = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def forward_loss(self, model: nn.Module, forward: PlannedForward) -> Tensor:
        """This forward's share of the step's loss: one ordinary teacher-forced forward."""
        (kind,) = self.forward_kinds
        inputs, rows = self.on_device(forward)
        result = self.run_head(model, inputs, rows, kind, counts=forward.counts)
        assert result.loss is not None
        return result.loss

    def on_device(self, forward: PlannedForward) -> tuple[dict[str, Any], SupervisedRows]:
        """Arguments of the model and supervised rows of a planned forward, on the device."""
        inputs = self._prepare_input(forward.batch.model_inputs())
        inputs.pop("use_cache")  # the head sets it
        return inputs, on_device(forward.rows, self.args.device)

    def run_head(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        rows: SupervisedRows,
        kind: Forward,
        *,
        counts: bool,
        slot_rows_N: Tensor | None = None,
    ) -> HeadResult[Stage2Terms]:
        """One forward under the objective of `kind`; its numbers are logged if it `counts`."""
        tokens = TokenMetrics(rows, self.columns, **self.token_switches)

        def objective(loss_inputs: LossInputs) -> tuple[Tensor, Stage2Terms]:
            return self.objective(loss_inputs, kind, self._counts)

        supervised = Supervised(rows, self.objective.needs(kind), objective, tokens.observer)
        result = self.head.run(model, self.unwrapped_model, inputs, supervised, slot_rows_N)
        terms = Stage2Terms.merge(result.terms)
        self._watched |= {key: atom.sum for key, atom in terms.atoms.items()}
        if counts:
            self.add_metrics(terms.metrics())
            if kind is not Forward.SELF_CONTEXT:
                self.add_metrics(tokens.metrics())
        if self.settings.sections.debug.enabled and result.loss is not None:
            shares = self.objective.shares(terms, self._counts)
            check_atoms_sum(result.loss.item(), {key: share.item() for key, share in shares.items()})
        return result

    @contextmanager
    def _gradients_meet(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Ranks exchange gradients only in the last backward of a step."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(is_last)
        try:
            if is_last:
                yield
            else:
                with self.accelerator.no_sync(model):
                    yield
        finally:
            state._set_sync_gradients(before)

    # rollouts

    @property
    def policy_version(self) -> int:
        """Version of the trained weights: 1 before the first optimizer step, one more after each."""
        return int(self.state.global_step) + 1

    @property
    def pipeline(self) -> RolloutPipeline:
        """The rollout pipeline; its backend starts when it is first asked for (on all ranks together)."""
        if self._pipeline is None:
            backend = self._start_backend()
            self._pipeline = RolloutPipeline(
                backend,
                self.builder,
                self.template.tokenizer,
                self.rollout_settings.matching,
                field_order=self.settings.sections.custom.object_field_order,
            )
        return self._pipeline

    def _start_backend(self) -> PolicyBackend:
        """The backend of the settings, after it has answered a first question."""
        backend = build_policy_backend(
            self.rollout_settings,
            model=self.model_wrapped,
            template=self.template,
            model_dir=self.model.model_dir,
            accelerator=self.accelerator,
            fold=fold_module,
            token_logprobs=self.rollout_settings.eval_detection.enabled,
        )
        raw: RawSample = (self.train_dataset if self.train_dataset is not None else self.eval_dataset)[0]
        question = RolloutRequest(raw.messages, raw.images, request_id=raw.sample_id)
        preflight(backend, question, self.template, timeout_s=self.rollout_settings.preflight_timeout_s)
        return backend

    def push_policy(self) -> None:
        """Let the backend answer with the trained weights as they are now."""
        backend = self.pipeline.backend
        if backend.policy_version != self.policy_version:
            backend.push_policy(self.policy_version)

    def roll_out(self, raws: Sequence[RawSample], *, seed_base: int) -> list[list[EncodedSample]]:
        """Targets on rollouts of this rank's samples by the weights as they are now, as `plan_groups` returns them."""
        self.push_policy()
        per_rank = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        asked = {
            "version": self.policy_version,
            "seed_base": seed_base,
            "first_index": self.accelerator.process_index * per_rank,
        }
        if self.rollout_settings.overlap.enabled:
            return self._train_while_generating(raws, asked)
        rolled_out = self.pipeline.run(raws, **asked)
        self._record_rollouts(rolled_out)
        return self.layout.groups(rolled_out.samples)

    def _train_while_generating(
        self, raws: Sequence[RawSample], asked: Mapping[str, int]
    ) -> list[list[EncodedSample]]:
        """`roll_out` in chunks: while the next one is not there yet, samples of those before are trained on."""
        settings, parts = self.rollout_settings, list[RolledOut]()
        groups: list[list[EncodedSample]] = []
        names = self.objective.denominators(Forward.ROLLOUT)
        self._early = EarlyTraining(list(self.unwrapped_model.parameters()), names, self.args.device)
        chunk_size, ahead = settings.decode_batch_size, settings.overlap.queue_size
        with self.pipeline.stream(raws, chunk_size, ahead=ahead, **asked) as stream:
            for indices, rollouts, seconds in stream:
                chunk = [raws[index] for index in indices]
                parts.append(self.pipeline.finish(chunk, rollouts, generate_s=seconds))
                groups += self.layout.groups(parts[-1].samples)
                while groups and stream.must_wait:
                    self._train_early(groups.pop(0), raws)
        self.metrics.add_all(
            {TIME_ROLLOUT_WAIT: stream.wait_s, EARLY_FORWARDS: float(len(self._early.forwards))}
        )
        self._record_rollouts(RolledOut.joined(parts))
        return groups

    def _train_early(self, group: Sequence[EncodedSample], raws: Sequence[RawSample]) -> None:
        """Forward and backward of samples of the step before its counts are known; nothing here is collective."""
        assert self._early is not None
        model = (
            self.unwrapped_model
        )  # ranks differ in how much they train early, which wrappers may not notice
        self._enter_training(model)
        forward = self._with_types(self.layout.forward(group), raws)

        def backward(shown: PlannedForward, counts: Mapping[str, Tensor]) -> Tensor:
            self._counts = dict(counts)
            with self._gradients_meet(self.model_wrapped, False):
                return self._backward(self._watched_loss(model, shown), 1.0)

        own_counts = step_counts([forward.rows], self.objective, Forward.ROLLOUT)
        share = len(group) / (len(raws) * self.accelerator.num_processes)
        self._early.run(forward, own_counts, share, backward)
        if self.args.device.type == "cuda":
            # Otherwise the host, which runs ahead, would start more of these dear forwards than the wait has room for.
            torch.cuda.current_stream(self.args.device).synchronize()

    def _record_rollouts(self, rolled_out: RolledOut) -> None:
        """Log what the rollouts of the step say; dump a few for people to look at."""
        step, outcomes = int(self.state.global_step), rolled_out.outcomes
        timings = {name: getattr(rolled_out, name) for name in ("generate_s", "parse_match_s", "encode_s")}
        weight = self.objective.text_weights(Forward.ROLLOUT).get("desc_ce", 0.0)
        self.metrics.add_all(
            rollout_metrics(outcomes, self.rollout_settings, fn_desc_weight=weight, **timings)
        )
        self.metrics.add_all(channel_b_metrics(outcomes))
        if self.desc_monitor.wants(step):
            self.metrics.add_all(self.desc_monitor.compare(matched_descs(rolled_out.answers)).entries())
        if self.dumps is not None and self.dumps.wants(step):
            raws = [answer.raw for answer in rolled_out.answers]
            self.dumps.submit(step, self._shown(raws, outcomes))

    def _shown(self, raws: Sequence[RawSample], outcomes: Sequence[RolloutOutcome]) -> list[DumpSample]:
        most = self.rollout_settings.monitor_dump.max_samples
        return [
            dump_sample(
                outcome,
                raw.objects,
                self.template.tokenizer,
                sample_id=raw.sample_id,
                image_path=next(iter(raw.images), None),
            )
            for raw, outcome in zip(raws[:most], outcomes[:most], strict=True)
        ]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.dumps is not None:
                self.dumps.close()
            if self._pipeline is not None:
                self._pipeline.backend.close()

    # evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rollout metrics over the whole evaluation set, under `eval_rollout/...`, equal on all ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        started = time.perf_counter()
        self.model.eval()
        self.push_policy()
        numbers = evaluate_rollouts(
            self.pipeline,
            dataset,
            self.rollout_settings,
            self.desc_monitor if self.rollout_settings.desc_monitor.enabled else None,
            version=self.policy_version,
            seed=self.args.seed,
            step=int(self.state.global_step),
        )
        seconds = time.perf_counter() - started
        numbers |= {"runtime": seconds, "samples_per_second": len(dataset) / seconds}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in numbers.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        return list  # raw samples stay samples until a step is planned

    def floating_point_ops(self, inputs: list[PlannedForward]) -> int:
        return sum(super(Stage2Trainer, self).floating_point_ops(f.batch.model_inputs()) for f in inputs)
