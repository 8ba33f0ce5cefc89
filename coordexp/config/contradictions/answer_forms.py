"""What a run may not ask for with the form of its answers."""

from __future__ import annotations

from collections.abc import Iterator

from coordexp.config.checks.problems import KeyPath
from coordexp.config.schema.answer_form import settings_of, writes_numbers
from coordexp.config.schema.custom import STAGE1_VARIANTS, Custom
from coordexp.config.schema.pipeline import Pipeline
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.sections import Sections

_ORDERS = {"qwen": "geometry_first", "compact": "desc_first"}
"""Formats whose records have one order."""


def form_problems(sections: Sections, variant: str) -> Iterator[tuple[KeyPath, str]]:
    """Every setting that the form of the answer leaves without effect, and what to do."""
    yield from _format_problems(sections.custom)
    yield from number_problems(sections, variant)


def number_problems(sections: Sections, variant: str) -> Iterator[tuple[KeyPath, str]]:
    """Of a form that writes numbers: every setting that needs coordinate tokens."""
    custom = sections.custom
    if not writes_numbers(custom.answer_form):
        return
    if variant in STAGE1_VARIANTS and custom.coord_soft_ce_w1.enabled:
        yield (
            ("custom", "coord_soft_ce_w1"),
            "is a loss on coordinate tokens, and this answer writes numbers, which plain cross-entropy teaches; write "
            "enabled: false.",
        )
    if custom.coord_offset.enabled:
        yield (
            ("custom", "coord_offset"),
            "trains the rows of coordinate tokens, and this answer writes numbers; write enabled: false.",
        )
    metrics = custom.token_type_metrics
    if "coord_monitor_mass" in metrics.model_fields_set and metrics.coord_monitor_mass:
        yield (
            ("custom", "token_type_metrics", "coord_monitor_mass"),
            "is the probability of coordinate tokens, and this answer writes numbers; remove it.",
        )
    if sections.rollout_matching is not None:
        yield from _rollouts(sections.rollout_matching)
    stage2 = sections.stage2_ab
    if stage2 is not None:
        yield from _modules(("stage2_ab", "pipeline"), stage2.pipeline)
        if stage2.n_softctx_iter > 1:
            yield (
                ("stage2_ab", "n_softctx_iter"),
                "feeds expected coordinate tokens back, and this answer writes numbers; use 1.",
            )


def _format_problems(custom: Custom) -> Iterator[tuple[KeyPath, str]]:
    answer_format, tokens = custom.answer_format, custom.coord_tokens.enabled
    if settings_of(custom.answer_form) != (answer_format, tokens):
        yield (
            ("custom", "answer_format"),
            f"{answer_format} writes coordinates as {'numbers' if tokens else 'coordinate tokens'}, which "
            f"custom.coord_tokens.enabled: {str(tokens).lower()} rules out; write enabled: {str(not tokens).lower()} "
            "there, or another format.",
        )
    order = _ORDERS.get(answer_format)
    if (
        order is not None
        and "object_field_order" in custom.model_fields_set
        and custom.object_field_order != order
    ):
        yield (
            ("custom", "object_field_order"),
            f"has no effect with answer_format: {answer_format}, whose order is {order}; write that, or remove it.",
        )


def _rollouts(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    here = tuple(settings.where.split("."))
    if settings.decoding.coord != "argmax":
        yield (
            (*here, "decoding", "coord"),
            f"{settings.decoding.coord} reads the distribution over coordinate tokens, and this answer writes numbers; "
            "use argmax.",
        )
    if settings.decoding.guided:
        yield (
            (*here, "decoding", "guided"),
            "writes coordinate tokens, and this answer writes numbers; use false.",
        )
    if settings.pipeline is not None:
        yield from _modules((*here, "pipeline"), settings.pipeline)


def _modules(here: KeyPath, pipeline: Pipeline) -> Iterator[tuple[KeyPath, str]]:
    for part in ("objective", "diagnostics"):
        for index, module in enumerate(getattr(pipeline, part)):
            if module.name != "token_ce" and module.enabled:
                yield (
                    (*here, part, index),
                    f"{module.name} looks at coordinate tokens, and this answer writes numbers; write enabled: false. "
                    "token_ce teaches the numbers.",
                )
