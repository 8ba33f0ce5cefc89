"""What a run of trainer variant `latent_prefix` may not ask for, and where its section has no effect."""

from __future__ import annotations

from typing import Any

import pytest

from coordexp.config.contradictions.latent import latent_problems
from coordexp.config.run.packing import packing_problems
from coordexp.config.schema.sections import parse_sections

PREFIX: dict[str, Any] = {"num_latents": 4, "objective": [{"name": "stage1", "weight": 1.0}]}
DEEP: dict[str, Any] = {"latent_prefix": {**PREFIX, "deep": {"num": 2}}}


def problems(custom: dict[str, Any], swift: dict[str, Any] | None = None, **more: Any) -> list[str]:
    sections = parse_sections({"custom": {"latent_prefix": PREFIX, **custom}, **more})
    found = latent_problems("latent_prefix", sections, {"tuner_type": "full", **(swift or {})})
    return [".".join(map(str, path)) + ": " + text for path, text in found]


def test_a_plain_run_is_fine():
    assert problems({}) == []
    assert problems({}, {"attn_impl": "flash_attn"}) == []
    assert problems(DEEP, {"attn_impl": "sdpa"}) == problems(DEEP) == []
    assert problems({"latent_prefix": {**PREFIX, "language_model": "tuned"}}, {"tuner_type": "lora"}) == []


NO_PACKS = "trainer variant latent_prefix does not train on packs"
PROBE = {"telemetry": {"trajectory_probe": {"every_steps": 5}}}
STATIC = {"latent_prefix": {**PREFIX, "source": "static"}, "prompt": "Find: {classes}."}


@pytest.mark.parametrize(
    ("custom", "swift", "more", "said"),
    [
        ({}, {}, {"training": {"packing": True}}, f"training.packing: {NO_PACKS}"),
        ({}, {"packing": True}, {}, f"packing: {NO_PACKS}"),
        ({}, {"padding_free": True}, {}, f"padding_free: {NO_PACKS}"),
        (
            {},
            {"deepspeed": "zero3"},
            {},
            "deepspeed: trainer variant latent_prefix does not train under ZeRO-3",
        ),
        ({"head": "fused"}, {}, {}, "custom.head: fused never has the logits"),
        ({}, {}, {"debug": {"step_dumps": 2}}, "debug.step_dumps: "),
        ({}, {}, PROBE, "telemetry.trajectory_probe: "),
        (
            {"rollout_eval": {"enabled": True, "backend": "vllm"}},
            {},
            {},
            "custom.rollout_eval.backend: vllm takes no prompt embeddings",
        ),
        ({}, {"tuner_type": "lora"}, {}, "custom.latent_prefix.language_model: frozen leaves nothing"),
        ({"coord_offset": {"enabled": True}}, {}, {}, "custom.coord_offset: cannot be trained with"),
        (DEEP, {"attn_impl": "flash_attn"}, {}, "custom.latent_prefix.deep: is read beside attn_impl: sdpa"),
        (STATIC, {}, {}, "custom.latent_prefix.source: static vectors stand for one text"),
    ],
)
def test_what_cannot_take_effect_is_refused(
    custom: dict[str, Any], swift: dict[str, Any], more: dict[str, Any], said: str
):
    (found,) = problems(custom, swift, **more)
    assert found.startswith(said)


def test_the_section_belongs_to_the_variant():
    with_prefix = parse_sections({"custom": {"latent_prefix": PREFIX}})
    ((path, text),) = latent_problems("stage1_coord", with_prefix, {})
    assert (path, text[:13]) == (("custom", "latent_prefix"), "has no effect")
    ((path, text),) = latent_problems("latent_prefix", parse_sections({}), {})
    assert (path, text[:10]) == (("custom", "latent_prefix"), "is missing")


def test_packing_settings_are_those_of_stage_1():
    """An unset packing is no problem for the variant, as in stage 1."""
    training = parse_sections({}).training
    assert packing_problems({}, training, "latent_prefix", lambda n: (n, None), lambda _: None) == []
