"""What a stage-2 trainer is made of: its settings turned into objects, once, before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.sections import checksum_of, pipeline_of
from coordexp.control.schedule import policy_version_at
from coordexp.errors import ConfigError
from coordexp.head.run import RowsHead
from coordexp.losses.columns import CoordColumns
from coordexp.losses.modules import ForwardKind, ObjectiveSpec
from coordexp.losses.objective import Stage2Objective
from coordexp.models.self_context import SelfContext
from coordexp.packing.position_ids import VisionLayout
from coordexp.rollout.session.session import RolloutSession
from coordexp.targets.builder import PolygonTransport, TargetBuilder
from coordexp.targets.rewrite import PrefixRules
from coordexp.telemetry.desc_monitor import DescMonitor
from coordexp.trainers.on_policy.evaluation import OnPolicyEvaluation, make_evaluation, make_session
from coordexp.trainers.rollouts.answers import AnswerJudge, AnswerTeacher
from coordexp.trainers.rollouts.record import RolloutRecord
from coordexp.trainers.runtime import RunSettings
from coordexp.trainers.step.assembly import SampleLayout, StepAssembly
from coordexp.trainers.step.ranks import most_over_ranks
from coordexp.trainers.step.runner import ForwardRunner, PlainRunner, SelfContextRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage2Parts:
    """The objects of a stage-2 run. None of them changes from step to step; only the session holds something open."""

    settings: RolloutMatching
    builder: TargetBuilder
    assemble: StepAssembly
    session: RolloutSession
    roll_out: AnswerTeacher
    runner: ForwardRunner
    evaluation: OnPolicyEvaluation
    record: RolloutRecord


def make_parts(trainer: Any) -> Stage2Parts:
    """The parts of a `Stage2Trainer` whose HF side is complete.

    Raises:
        ConfigError: a section is missing, or packing has no length.
    """
    settings, args, template = rollout_settings(trainer.settings), trainer.args, trainer.template
    objective = make_objective(trainer.settings)
    layout = make_layout(
        settings,
        trainer.columns,
        template,
        trainer.unwrapped_model.config,
        args.per_device_train_batch_size,
    )
    names = "matched_desc_ce" in objective.text_weights(ForwardKind.ROLLOUT)
    builder = make_builder(trainer.settings, template, layout, teaches_names=names)
    judge = AnswerJudge(template.tokenizer, settings.matching, form=trainer.form)
    session = make_session(
        trainer,
        settings,
        lambda: (trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset)[0],
    )
    desc_monitor = DescMonitor(settings.desc_monitor, device=str(args.device))
    is_main = trainer.is_world_process_zero()
    if is_main:
        logger.info(describe_pipeline(trainer.settings, objective))
        if trainer.settings.eval_prompt_variant is not None:
            logger.info(
                "Evaluation asks in another way than training: %r.", trainer.settings.eval_prompt.user
            )
    return Stage2Parts(
        settings=settings,
        builder=builder,
        assemble=StepAssembly(
            layout,
            objective,
            agree=partial(most_over_ranks, device=args.device),
            add_up=trainer.sum_over_ranks,
            device=args.device,
            typed_datasets=trainer.typed_datasets,
        ),
        session=session,
        roll_out=AnswerTeacher(
            session,
            judge,
            builder,
            policy_version=policy_version_at,
            seed=args.seed,
            first_index=trainer.accelerator.process_index
            * args.per_device_train_batch_size
            * args.gradient_accumulation_steps,
            num_answers=settings.num_return_sequences,
            teaches_best=settings.targets.answers == "best",
            generating=partial(trainer.pace.timer.phase, "generation"),
        ),
        runner=_make_runner(trainer, objective),
        evaluation=make_evaluation(trainer, settings, session, desc_monitor),
        record=RolloutRecord(
            settings,
            desc_monitor,
            template.tokenizer,
            fn_desc_weight=objective.text_weights(ForwardKind.ROLLOUT).get("desc_ce", 0.0),
            dump_dir=Path(settings.monitor_dump.out_dir or Path(args.output_dir) / "monitor_dumps")
            if is_main and trainer.dry_run is None
            else None,
            logging_steps=max(1, int(args.logging_steps)),
        ),
    )


def rollout_settings(settings: RunSettings) -> RolloutMatching:
    """The `rollout_matching` section; ConfigError when it is missing."""
    section = settings.sections.rollout_matching
    if section is None:
        raise ConfigError(f"rollout_matching: is missing; trainer variant {settings.variant} needs it.")
    return section


def make_objective(settings: RunSettings) -> Stage2Objective:
    """The objective of the run's module lists; ConfigError when there are none."""
    found = pipeline_of(settings.sections, settings.variant)
    if found is None:
        raise ConfigError(f"trainer variant {settings.variant}: the pipeline section is missing.")
    pipeline, _ = found
    return Stage2Objective(ObjectiveSpec.from_pipeline(pipeline), _decode_mode(settings))


def describe_pipeline(settings: RunSettings, objective: Stage2Objective) -> str:
    """The resolved module lists and their checksum, in one line."""
    modules = [
        f"{entry.name} x {entry.weight:g} in {'+'.join(entry.channels)}" + ("" if entry.enabled else " (off)")
        for entry in (*objective.spec.objective, *objective.spec.diagnostics)
    ]
    checksum = checksum_of(settings.sections, settings.variant)
    return f"{settings.variant}: pipeline_checksum {checksum}; modules: {'; '.join(modules)}."


def make_layout(
    settings: RolloutMatching, columns: CoordColumns, template: Any, config: Any, batch_size: int
) -> SampleLayout:
    """How the samples of a step become forwards.

    template: ms-swift's, for its max_length and tokenizer.  config: of the model.
    batch_size: samples of a padded forward.

    Raises:
        ConfigError: packing without a length.
    """
    length = (settings.packing_length or template.max_length) if settings.packing else None
    if settings.packing and length is None:
        raise ConfigError(
            "rollout_matching.packing_length: missing, and no max_length is set; give one of them, or "
            "rollout_matching.packing: false."
        )
    return SampleLayout(
        columns, VisionLayout.from_config(config), template.tokenizer.pad_token_id, length, batch_size
    )


def make_builder(
    settings: RunSettings, template: Any, layout: SampleLayout, *, teaches_names: bool = False
) -> TargetBuilder:
    """Targets in the run's spelling, none longer than a forward holds."""
    rollout = rollout_settings(settings)
    matching, targets = rollout.matching, rollout.targets
    return TargetBuilder(
        template.tokenizer,
        form=settings.form,
        max_tokens=layout.packing_length or template.max_length,
        polygons=PolygonTransport(matching.ot_cost, matching.ot_epsilon, matching.ot_iters),
        teaches_names=teaches_names,
        rules=PrefixRules(
            duplicate_iou=targets.drop_duplicates_above_iou,
            replace_above_iou=targets.replace_above_iou,
            drop_unmatched=targets.drop_unmatched,
            missed_in_order=targets.missed == "in_order",
        ),
    )


def _make_runner(trainer: Any, objective: Stage2Objective) -> ForwardRunner:
    sections = trainer.settings.sections
    plain = PlainRunner(
        RowsHead(sections.custom.head, trainer.columns, trainer.count_oom_retry),
        objective,
        trainer.columns,
        token_switches=trainer.token_switches,
        checks_atoms=sections.debug.enabled,
        gradients=trainer.gradients,
    )
    if sections.stage2_ab is None:
        return plain
    return SelfContextRunner(
        plain,
        SelfContext(
            num_forwards=sections.stage2_ab.n_softctx_iter,
            embed_mode=sections.stage2_ab.coord_ctx_embed_mode,
            grad_mode=sections.stage2_ab.softctx_grad_mode,
            temperature=sections.stage2_ab.softctx_temperature,
        ),
        measures=trainer.steering.measures_forwards,
    )


def _decode_mode(settings: RunSettings) -> Literal["exp", "st"]:
    two_channel = settings.sections.stage2_ab
    return (
        rollout_settings(settings).coord_decode_mode if two_channel is None else two_channel.coord_decode_mode
    )
