"""What all our trainers share: metrics in, one payload out."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config import derive, resolved_config, write_resolved
from coordexp.config.prompt import write_prompt
from coordexp.control.schedule import num_b_steps
from coordexp.data.collator import with_meta
from coordexp.data.row_types import RowTyper
from coordexp.data.source import DatasetFilter
from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.catalog import check_known
from coordexp.metrics.keys_run import (
    NONFINITE_LOSS_TOTAL,
    NONFINITE_METRICS_TOTAL,
    OOM_RETRIES_TOTAL,
    REMAINING,
)
from coordexp.metrics.payload import build_payload
from coordexp.metrics.progress import PROGRESS_KEY
from coordexp.metrics.sinks import MetricsSink, installed_versions
from coordexp.models.model_files import forget_loading, write_pixel_limits
from coordexp.swift_bridge.callbacks.console import use_console_lines
from coordexp.swift_bridge.prompts import complete_prompt
from coordexp.swift_bridge.trainer import SwiftTrainerBridge
from coordexp.telemetry import run_log
from coordexp.telemetry.console.view import ConsoleView
from coordexp.trainers.best_checkpoint import BestCheckpoint, link_best
from coordexp.trainers.datasets import probe_questions
from coordexp.trainers.dry_run.page import render
from coordexp.trainers.dry_run.run import TEACHER_FORCED, DryRun
from coordexp.trainers.dry_run.start import start_dry_run
from coordexp.trainers.finite import DropUpdate, FiniteLossGuard
from coordexp.trainers.hub_uploads import HubUploads
from coordexp.trainers.logs.console import RunConsole
from coordexp.trainers.logs.stats import StatsFile
from coordexp.trainers.logs.trackers import TRACKERS_KEY, ids_of, use_payloads
from coordexp.trainers.offset_training import OffsetTraining
from coordexp.trainers.optimizers import OURS, checked_table, meet_flat_weights
from coordexp.trainers.packing import check_template_packs
from coordexp.trainers.probes.trajectory import TrajectoryProbe
from coordexp.trainers.runtime import active
from coordexp.trainers.saving import SaveSchedule
from coordexp.trainers.start import determinism
from coordexp.trainers.start.evaluate_only import evaluate_only
from coordexp.trainers.start.launchers import check_started
from coordexp.trainers.start.meeting.ranks import training_begins
from coordexp.trainers.start.precision import lost_updates
from coordexp.trainers.start.schedule import lr_schedule
from coordexp.trainers.step import ranks
from coordexp.trainers.step.dump import DUMP_FOLDER, write_plan
from coordexp.trainers.step.gradient_probe import GradientProbe
from coordexp.trainers.step.pace import Pace, StepEnd, tags_of
from coordexp.trainers.step.plan import StepPlan
from coordexp.trainers.step.steering import CONTROL_KEY, Steering
from coordexp.trainers.watch.records import RULES_KEY
from coordexp.trainers.watch.run import RunWatch

logger = logging.getLogger(__name__)


class CoordTrainer(SwiftTrainerBridge):
    """Owns the metric store, its payload sinks, the form of answers and the coordinate columns of the vocabulary.

    Where coordinates are written as numbers there are no such columns, and every supervised token is text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.settings = active()
        probed = probe_questions(kwargs, self.settings)
        self.prepare_datasets(kwargs)
        template = kwargs["template"]
        settings = self.settings
        self._watch = RunWatch(kwargs["args"], settings.sections, settings.variant, settings.swift)
        kwargs["args"].data_seed = self.settings.swift["data_seed"]
        self.form = self.settings.form
        coord_ids = CoordVocab.from_tokenizer(template.tokenizer).ids if self.form.has_coord_tokens else ()
        self.columns = CoordColumns(coord_ids)
        forget_loading(template.tokenizer)
        super().__init__(*args, **kwargs)
        self.prompt = complete_prompt(self.settings.prompt, template)
        check_started(self.accelerator.num_processes, self.args.deepspeed, self.is_deepspeed_enabled)
        self._is_deterministic = determinism.settle(
            self.settings.sections.custom.deterministic,
            self.model,
            device=self.args.device,
            noise=self.args.neftune_noise_alpha,
            announces=self.is_world_process_zero(),
        )
        self._offset = self._train_offsets()
        self.metrics = MetricStore()
        self.pace = Pace(
            self.metrics, self.args.gradient_accumulation_steps, self.args.device, self.mixed_datasets
        )
        self.add_callback(StepEnd(self.pace.timer))
        self._stats = StatsFile(self.args.output_dir)
        if self.settings.sections.custom.dry_run is None:
            self.add_callback(self._stats)
        self.gradients = GradientProbe.of_run(self)
        self.add_callback(self.gradients)
        if probed is not None:
            probe = self.settings.sections.telemetry.trajectory_probe
            self.add_callback(TrajectoryProbe(self, probe, probed))
        self._has_started = False
        self._plan: StepPlan | None = None
        self._finite_guard = self._guard_loss()
        self._best = BestCheckpoint(self.args, self.settings)
        self.steering = Steering(
            self.settings.variant, self.settings.sections, self.args.output_dir, self.is_world_process_zero()
        )
        self._saves = SaveSchedule(self.settings.sections.training)
        self.add_callback(self._saves)
        self._resolved = self._resolve()
        self._own_optimizer: Optimizer | None = None
        self.dry_run = self._start_dry_run()
        self._sink: MetricsSink | None = None
        self.trackers = use_payloads(self, self.settings.swift)
        self._console = RunConsole(use_console_lines(self).say, colours=run_log.reaches_terminal())
        for callback in (*self._watch.callbacks, HubUploads()):
            self.add_callback(callback)
        self._reported_nonfinite: set[str] = set()
        if self.is_world_process_zero():
            self._best.announce()
            write_resolved(self.args.output_dir, self._resolved)
        training_begins()

    def prepare_datasets(self, arguments: dict[str, Any]) -> None:
        """Replace the data sets among the arguments of the trainer by what the variant trains on."""

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        collate = super()._get_data_collator(args, template)
        counts = self.typed_datasets
        return with_meta(
            collate,
            self.columns,
            None if counts is None else RowTyper(template.tokenizer, counts, self.form),
            self.mixed_datasets,
            has_sides=self.settings.sections.custom.coord_soft_ce_w1.target_sigma_per_side is not None,
        )

    @property
    def mixed_datasets(self) -> tuple[str, ...]:
        """Names of the data sets of a mixture; empty without one."""
        fusion = self.settings.sections.custom.fusion
        return () if fusion is None else fusion.names

    @property
    def typed_datasets(self) -> DatasetFilter | None:
        """Whose samples token metrics split by type; None when they are off."""
        settings = self.settings.sections.custom.token_type_metrics
        return DatasetFilter(tuple(settings.include), tuple(settings.exclude)) if settings.enabled else None

    @property
    def token_switches(self) -> dict[str, Any]:
        """Arguments of `TokenMetrics` beside the rows."""
        settings = self.settings.sections.custom.token_type_metrics
        return {
            "top5": settings.log_top5,
            "mass": settings.coord_monitor_mass and self.form.has_coord_tokens,
            "mass_max_tokens": settings.coord_monitor_mass_max_tokens,
        }

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.starts_step()
        self.pace.timer.start("data")
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            self.pace.timer.cancel()
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        timer = self.pace.timer
        timer.switch("backward")  # forwards interrupt it
        loss: Tensor = super().training_step(*args, **kwargs)
        timer.switch("optimizer" if self.accelerator.sync_gradients else "other")
        return loss

    def on_step(self, num_micro_steps: int) -> None:
        if self.dry_run is not None:
            self.dry_run.loaded()
        if not self._has_started:
            self._has_started = True
            kept = self.state.stateful_callbacks
            self.pace.restore(kept.get(PROGRESS_KEY))
            self.steering.restore(kept.get(CONTROL_KEY), int(self.state.global_step))
            self.pace.schedule = lr_schedule(self.args, int(self.state.max_steps))
            if self.is_world_process_zero():
                self._console.resume(self.args.output_dir, int(self.state.global_step))
            self._watch.begin(int(self.state.max_steps), kept.get(RULES_KEY))
            if self._own_optimizer is not None and self.is_deepspeed_enabled:
                meet_flat_weights(self._own_optimizer, self.model_wrapped.optimizer)
            if self.template.padding_free:
                check_template_packs(self.model_wrapped, self.template, self.args.device)
        self.pace.timer.switch("other")
        self.pace.add_step(num_micro_steps)

    def keep_plan(self, plan: StepPlan) -> None:
        """The step that is about to run."""
        self._plan = plan
        if self.dry_run is not None:
            self.dry_run.planned(plan)
        self.pace.add_load(plan.load)
        if plan.step < self.settings.sections.debug.step_dumps:
            folder, rank = Path(self.args.output_dir) / DUMP_FOLDER, self.accelerator.process_index
            names = self.unwrapped_model.named_parameters()
            write_plan(plan, folder, rank, [name for name, weight in names if weight.requires_grad])

    def count_samples(self, num_samples: int, parts: Sequence[str] = ()) -> None:
        """Original samples of this rank in the step that is being planned (`train/samples_total`, `_seen`).

        parts: the data set of a mixture of each.
        """
        self.pace.add_samples(num_samples, parts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        step = self.settings.sections.custom.evaluate_only
        if step is not None:
            with self._watch.training(lambda: step):
                return evaluate_only(self, step)
        if self.dry_run is None:
            with self._watch.training(lambda: int(self.state.global_step)):
                return super().train(*args, **kwargs)
        self.add_callback(self.dry_run)  # behind all others: it has the last word on evaluating and saving
        result = self.dry_run.run(lambda: super(CoordTrainer, self).train(*args, **kwargs))
        report = self.dry_run.report()
        if self.is_world_process_zero():
            print(render(report), flush=True)
        return result

    # dry run

    def step_kinds(self, total_steps: int) -> dict[str, int]:
        """Name of each kind of step that the run will ever run -> how many of them."""
        return {TEACHER_FORCED: total_steps}

    def num_rollout_images(self, num_samples: int) -> int | None:
        """Images that an evaluation of `num_samples` asks the model about; None where it does nothing else."""
        return None

    def _start_dry_run(self) -> DryRun | None:
        if self.settings.sections.custom.dry_run is None:
            return None
        derived = self._resolved["derived"]
        num_eval = 0 if self.eval_dataset is None else len(self.eval_dataset)
        return start_dry_run(
            self,
            self.step_kinds(int(derived.get("total_steps", 0))),
            derived,
            num_rollout_images=self.num_rollout_images(num_eval),
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.dry_run is not None:
            return
        self.state.stateful_callbacks[PROGRESS_KEY] = self.pace.state(self._sum_on_host)
        self.state.stateful_callbacks[RULES_KEY] = self._watch.state()
        self.state.stateful_callbacks[TRACKERS_KEY] = ids_of(self.trackers)
        if steered := self.steering.state():
            self.state.stateful_callbacks[CONTROL_KEY] = {"args": {}, "attributes": steered}
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            link_best(Path(self.args.output_dir), self.state.best_global_step)

    def _sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        """Each of the `numbers` added up over all ranks."""
        summed = ranks.sum_over_ranks(torch.tensor(numbers, device=self.args.device)).tolist()
        return [int(number) for number in summed]

    def _train_offsets(self) -> OffsetTraining | None:
        settings = self.settings.sections.custom.coord_offset
        if not settings.enabled:
            return None
        return OffsetTraining(self.model, settings, self.args.learning_rate, self.deepspeed_config)

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """What DeepSpeed's engine is configured with, by run file or launcher; None when it does not run."""
        if not self.is_deepspeed_enabled:
            return None
        config: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return config

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model=model)
        if self._offset is not None:
            self._offset.use_own_rates(optimizer)
        sentence = lost_updates(self.model, optimizer, self.deepspeed_config)
        if sentence is not None and self.is_world_process_zero():
            logger.warning(sentence)
        if self.args.optimizer in OURS:
            self._own_optimizer = optimizer
            self._resolved["derived"]["optimizer_groups"] = checked_table(self.model, optimizer)
            if self.is_world_process_zero():
                write_resolved(self.args.output_dir, self._resolved)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        write_prompt(folder, self.prompt)
        write_pixel_limits(
            folder, self.prompt.min_pixels, self.prompt.max_pixels
        )  # ms-swift copies an older file
        if self._offset is not None:
            self._offset.save(folder, state_dict)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._offset is not None and not self.is_deepspeed_enabled:  # DeepSpeed restores every parameter
            self._offset.restore(self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_too_early = self._saves.is_too_early(self.state)
        is_best = self._best.may_be_best(
            metrics, is_too_early=is_too_early
        ) and super()._determine_best_metric(metrics, trial)
        if is_best and self.args.save_strategy != "no":
            # Save it now: with save_steps other than eval_steps the weights would be gone by the next save. Rotation
            # spares the checkpoint of the best step.
            self.control.should_save = True
        self._watch.evaluated(int(self.state.global_step), metrics, self.control)
        return is_best or self._saves.must_save(self.state) or self._watch.is_stopping

    def add_metrics(self, metrics: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Put (sum, count) pairs into the window of the current mode. No host sync."""
        self.metrics.add_all(metrics, mode="train" if self.model.training else "eval")

    def window_metrics(self, mode: str) -> dict[str, float]:
        step = int(self.state.global_step)
        window = self.pace.window(mode, step)
        self._watch.was_busy(self.pace.busy_s)
        return window | self.steering.observed(step, window) if mode == "train" else window

    def on_record(self, mode: str, record: dict[str, float]) -> None:
        check_known(record)
        numbers = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        said = tags_of(numbers) | (self.steering.tags() if mode == "train" else {})
        tags = {"tags": said} if said else {}
        payload = build_payload(
            mode, self.state.global_step, self._finite(numbers), **tags, **self._said_of(mode)
        )
        if self._sink is None:
            meta = {"config_hash": self._resolved["config_hash"], "variant": self.settings.variant}
            self._sink = MetricsSink(self.args.output_dir, meta=meta)
        self._sink.write(payload)
        self._stats.note(mode, payload["global_step"])
        remaining = record.get(REMAINING)
        self._console.show(payload, self._console_view(), None if remaining is None else str(remaining))
        for tracker in self.trackers.values():
            tracker.send(payload["metrics"], payload["global_step"])
        self._watch.look(payload["global_step"], payload["metrics"])

    @property
    def coord_weights(self) -> Mapping[str, float] | None:
        """Weights of the coordinate terms of stage 1 by name; None where its objective is another."""
        return None

    def _console_view(self) -> ConsoleView:
        return ConsoleView(
            self.settings.sections.telemetry.console,
            int(self.state.max_steps),
            coord_weights=self.coord_weights,
            best_metric=self._best.metric.key,
        )

    def _said_of(self, mode: str) -> dict[str, Any]:
        """Beside a payload's numbers: the prompt of evaluation rollouts where it is not that of training."""
        name = self.settings.eval_prompt_variant
        if mode != "eval" or name is None:
            return {}
        return {"prompt": {"variant": name, "user": self.settings.eval_prompt.user}}

    def _finite(self, numbers: dict[str, float]) -> dict[str, float]:
        """`numbers` without those the framework logged as NaN or infinite (an fp16 gradient norm, say), counted."""
        bad = {key: value for key, value in numbers.items() if not math.isfinite(value)}
        for key in bad.keys() - self._reported_nonfinite:
            logger.warning("%s is %s; left out of the payload (said once per key).", key, bad[key])
        self._reported_nonfinite |= bad.keys()
        kept = {key: value for key, value in numbers.items() if key not in bad}
        if bad:
            kept[NONFINITE_METRICS_TOTAL] = kept.get(NONFINITE_METRICS_TOTAL, 0.0) + len(bad)
        return kept

    def _resolve(self) -> dict[str, Any]:
        """The content of resolved_config.json."""
        args, settings = self.args, self.settings
        two_channel = settings.sections.stage2_ab
        derived = derive(
            world_size=self.accelerator.num_processes,
            per_device_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_train_samples=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            max_steps=args.max_steps,
            num_epochs=args.num_train_epochs,
            num_b_steps=None
            if two_channel is None
            else partial(num_b_steps, b_ratio=two_channel.schedule.b_ratio),
            coord_token_ids=self.columns.ids,
            drop_last=args.dataloader_drop_last,
        )
        derived |= lr_schedule(args, derived.get("total_steps")).derived()
        derived |= {"data_seed": args.data_seed, "deterministic": self._is_deterministic}
        derived |= self._best.derived()
        context = {"command": shlex.join(sys.argv), "versions": installed_versions()}
        return resolved_config(
            settings.variant, settings.sections, settings.swift, derived=derived, context=context
        )

    def _guard_loss(self) -> FiniteLossGuard:
        on_nonfinite = self.settings.sections.custom.on_nonfinite_loss
        guard = FiniteLossGuard(on_nonfinite)
        if on_nonfinite == "skip_step":
            if self.is_deepspeed_enabled:
                raise ConfigError(
                    "custom.on_nonfinite_loss: skip_step does not work under DeepSpeed, whose engine updates the "
                    "weights inside the backward pass; use stop."
                )
            self.add_callback(DropUpdate(guard, self._count_skipped_step, self._unscale_unclipped))
        return guard

    def _unscale_unclipped(self) -> None:
        """Clipping unscales fp16 gradients; without it nobody has."""
        if not self.args.max_grad_norm:
            self.accelerator.unscale_gradients()

    def count_oom_retry(self) -> None:
        """Memory ran out on this rank, and half the work was tried at once; leaves with the next training record."""
        self.metrics.add(OOM_RETRIES_TOTAL, 1.0, mode="train")

    def _count_skipped_step(self) -> None:
        if self.is_world_process_zero():  # a step of the run, not of a rank
            self.metrics.add(NONFINITE_LOSS_TOTAL, 1.0)

    def stop_if_not_finite(
        self, terms: Mapping[str, Tensor], sample_ids: Sequence[str] = (), *, loss: Tensor
    ) -> None:
        """Watch the terms of a micro-batch; at the last one of a step, stop all ranks if any was not finite.

        loss: 0-dim, this rank's share of the step's loss in the micro-batch, as its backward pass takes it.
        With `custom.on_nonfinite_loss: skip_step` the update of that step is dropped instead.
        """
        self._finite_guard.watch(terms, sample_ids, loss=loss)
        if self.accelerator.sync_gradients:
            heard = self._finite_guard.check(self.state.global_step + 1, self._watch.asks_to_stop)
            self._stats.loss = heard.loss
            self._watch.agree(heard.said)

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """`counts` added up over all ranks when `average_tokens_across_devices` asks for it, else as they are."""
        return ranks.sum_over_ranks(counts) if self.args.average_tokens_across_devices else counts

    @property
    def gradient_scale(self) -> float:
        """Undoes the averaging of gradients over ranks, for losses divided by counts of all ranks."""
        return float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0

    # a forward of ours in place of the HF Trainer's `training_step`

    def enter_training(self, model: nn.Module) -> None:
        """Model and optimizer in training mode."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()

    def backward(self, loss: Tensor) -> Tensor:
        """Backward pass of a loss that is divided by counts of the whole step already. Returns it, detached."""
        # DeepSpeed must not divide it again.
        options: dict[str, Any] = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    @contextmanager
    def gradients_meet(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Ranks exchange gradients only in the last backward of a step."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(is_last)
        try:
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)
