"""Settings that trainer variant `latent_prefix` cannot honour, and a section that another variant would not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import KeyPath
from coordexp.config.schema.custom import LATENT_VARIANT
from coordexp.config.schema.sections import Sections

_HERE: KeyPath = ("custom", "latent_prefix")


def latent_problems(
    variant: str, sections: Sections, swift: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Every such setting, and what to do."""
    settings = sections.custom.latent_prefix
    if variant != LATENT_VARIANT:
        if settings is not None:
            yield _HERE, f"has no effect with trainer variant {variant}; remove it."
        return
    if settings is None:
        yield _HERE, f"is missing; trainer variant {LATENT_VARIANT} needs it."
        return
    yield from _of_the_run(sections, swift)
    if settings.source == "static" and "{" in sections.custom.prompt:
        yield (
            (*_HERE, "source"),
            "static vectors stand for one text, and custom.prompt differs from record to record; use encoder.",
        )
    if settings.deep is not None and swift.get("attn_impl") not in (None, "sdpa"):
        yield (
            (*_HERE, "deep"),
            f"is read beside attn_impl: sdpa, and this run has {swift['attn_impl']}; write attn_impl: sdpa.",
        )
    if settings.language_model == "frozen":
        if swift.get("tuner_type") not in (None, "full"):
            yield (
                (*_HERE, "language_model"),
                f"frozen leaves nothing for tuner_type: {swift['tuner_type']} to train; write tuned, or tuner_type: "
                "full.",
            )
        if sections.custom.coord_offset.enabled:
            yield (
                ("custom", "coord_offset"),
                "cannot be trained with custom.latent_prefix.language_model: frozen; write tuned, or enabled: false.",
            )


def _of_the_run(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    custom = sections.custom
    if swift.get("deepspeed") in ("zero3", "zero3_offload"):
        yield ("deepspeed",), "trainer variant latent_prefix does not train under ZeRO-3; use zero2."
    if sections.training.packing or sections.training.eval_packing:
        yield ("training", "packing"), "trainer variant latent_prefix does not train on packs; remove it."
    for name in ("packing", "padding_free"):
        if swift.get(name):
            yield (name,), "trainer variant latent_prefix does not train on packs; remove it."
    if custom.head == "fused":
        yield (
            ("custom", "head"),
            "fused never has the logits that the terms of a latent prefix look at; use auto.",
        )
    if sections.debug.step_dumps:
        yield (
            ("debug", "step_dumps"),
            "holds what a step of stage 1 or 2 trains on, not its latent vectors; use 0.",
        )
    if sections.telemetry.trajectory_probe.every_steps is not None:
        yield ("telemetry", "trajectory_probe"), "reads the text of prompts, not latent vectors; remove it."
    asking = custom.rollout_eval
    if asking.enabled and asking.backend != "hf":
        yield (
            ("custom", "rollout_eval", "backend"),
            "vllm takes no prompt embeddings beside images, so that it cannot be asked through latent vectors; use hf.",
        )
