"""What the template makes of a prompt: the text of the model's own chat template, and its limits of pictures."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from swift.template import get_template

from coordexp.config import Prompt
from coordexp.config.prompt import PromptRecord
from coordexp.errors import ConfigError
from coordexp.image_size import PixelLimits
from coordexp.swift_bridge.checkpoint import load_template
from coordexp.swift_bridge.prompts import check_rendering, complete_prompt, rendered
from coordexp.swift_bridge.template import register_coord_template

TOKEN = 32 * 32
"""Pixels of a visual token of Qwen3-VL."""


@pytest.fixture(scope="module")
def template(real_model: Path) -> Any:
    return load_template(real_model)


@pytest.mark.parametrize("media_order", ["media_first", "text_first"])
@pytest.mark.parametrize("system", [None, "You detect.\nBe exact: caf\u00e9 \u732b."])
def test_the_text_is_that_of_the_models_own_chat_template(
    template: Any, media_order: Any, system: str | None
):
    """What `vllm serve` and transformers write for the same messages."""
    prompt = Prompt(user="Find all.", system=system, media_order=media_order)
    parts = [{"type": "image"}, {"type": "text", "text": "Find all."}]
    messages = [{"role": "user", "content": parts if media_order == "media_first" else parts[::-1]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    theirs = template.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered(template, prompt) == theirs


def test_a_complete_prompt_says_what_the_template_does(template: Any):
    complete = complete_prompt(Prompt(user="Find all."), template)
    assert complete == Prompt(
        user="Find all.",
        min_pixels=64 * TOKEN,
        max_pixels=16384 * TOKEN,
        rendered="<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find all.<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    with pytest.raises(ConfigError, match=r"the run uses qwen3_vl, .* set template: qwen2_5_vl"):
        complete_prompt(Prompt(template="qwen2_5_vl"), template)


def test_a_template_that_writes_another_text_is_refused_with_both(template: Any, tmp_path: Path):
    trained = complete_prompt(Prompt(user="Find all.", system="S"), template)
    check_rendering(template, PromptRecord(tmp_path, trained))
    check_rendering(template, PromptRecord(tmp_path, Prompt()))  # of a folder that does not say
    stale = trained.model_copy(update={"rendered": "<|im_start|>user\nFind all."})
    with pytest.raises(ConfigError) as caught:
        check_rendering(template, PromptRecord(tmp_path, stale))
    assert repr(stale.rendered) in str(caught.value)
    assert repr(trained.rendered) in str(caught.value)


def test_the_limits_of_a_prompt_are_those_of_template_and_saved_processor(real_model: Path, tmp_path: Path):
    template = load_template(real_model, prompt=Prompt(min_pixels=20 * TOKEN, max_pixels=100 * TOKEN))
    assert template.pixel_limits == PixelLimits(20 * TOKEN, 100 * TOKEN, 32)
    template.processor.save_pretrained(tmp_path)
    assert PixelLimits.of_folder(tmp_path) == template.pixel_limits
    complete = complete_prompt(Prompt(max_pixels=100 * TOKEN), template)
    assert (complete.min_pixels, complete.max_pixels) == (20 * TOKEN, 100 * TOKEN)


def test_a_run_has_the_limits_that_it_was_registered_with(real_model: Path):
    """ms-swift makes the template of a run; its own flag `max_pixels` is stronger."""
    processor = load_template(real_model).processor
    register_coord_template(min_pixels=4 * TOKEN, max_pixels=90 * TOKEN)
    try:
        made = get_template(processor)
        assert made.pixel_limits == PixelLimits(4 * TOKEN, 90 * TOKEN, 32)
        assert pickle.loads(pickle.dumps(made)).pixel_limits == made.pixel_limits  # in a worker
        assert get_template(processor, max_pixels=80 * TOKEN).pixel_limits.max_pixels == 80 * TOKEN
    finally:
        register_coord_template()
    assert load_template(real_model).pixel_limits.max_pixels == 16384 * TOKEN
