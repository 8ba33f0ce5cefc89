"""What a stage-2 trainer makes of its settings before the first step."""

from __future__ import annotations

from typing import Any, Literal

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.sections import checksum_of, pipeline_of
from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.modules import ObjectiveSpec
from coordexp.losses.objective import Stage2Objective
from coordexp.packing.position_ids import VisionLayout
from coordexp.targets.builder import PolygonTransport, TargetBuilder
from coordexp.trainers.runtime import RunSettings
from coordexp.trainers.step.plan import Layout


def rollout_settings(settings: RunSettings) -> RolloutMatching:
    """The `rollout_matching` section; ConfigError when it is missing."""
    section = settings.sections.rollout_matching
    if section is None:
        raise ConfigError(f"rollout_matching: is missing; trainer variant {settings.variant} needs it.")
    return section


def make_objective(settings: RunSettings) -> Stage2Objective:
    """The objective of the run's pipeline; ConfigError when there is none."""
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
) -> Layout:
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
    return Layout(
        columns, VisionLayout.from_config(config), template.tokenizer.pad_token_id, length, batch_size
    )


def make_builder(settings: RunSettings, template: Any, layout: Layout) -> TargetBuilder:
    """Targets in the run's spelling, none longer than a forward holds."""
    matching = rollout_settings(settings).matching
    return TargetBuilder(
        template.tokenizer,
        field_order=settings.sections.custom.object_field_order,
        max_tokens=layout.packing_length or template.max_length,
        polygons=PolygonTransport(matching.ot_cost, matching.ot_epsilon, matching.ot_iters),
    )


def _decode_mode(settings: RunSettings) -> Literal["exp", "st"]:
    two_channel = settings.sections.stage2_ab
    return (
        rollout_settings(settings).coord_decode_mode if two_channel is None else two_channel.coord_decode_mode
    )
