"""What a run asks, against what the model it starts from was trained with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from coordexp.config import Prompt
from coordexp.config.prompt import write_prompt
from coordexp.config.schema.custom import Custom
from coordexp.errors import ConfigError
from coordexp.swift_bridge.checkpoint import load_template
from coordexp.swift_bridge.prompts import complete_prompt
from coordexp.swift_bridge.template import register_coord_template
from coordexp.trainers.start.prompt import prompt_of_run

TRAINED = Prompt(
    user="Find all.", system="You detect.", media_order="text_first", object_field_order="geometry_first"
)


@pytest.fixture(autouse=True)
def _template_of_its_own():
    yield
    register_coord_template()


@pytest.fixture
def start(tmp_path: Path, nano: Path) -> Path:
    """A folder with the record of a model, its text included."""
    write_prompt(tmp_path, complete_prompt(TRAINED, load_template(nano)))
    return tmp_path


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def prompt_for(
    start: list[str | None], caplog: pytest.LogCaptureFixture, swift: dict[str, Any], **custom: Any
) -> Prompt:
    with caplog.at_level(logging.INFO, logger="coordexp"):
        return prompt_of_run(Custom(**custom), swift, start)


def test_what_a_run_leaves_out_is_as_the_model_was_trained(start: Path, caplog, nano: Path):
    prompt = prompt_for([None, str(start)], caplog, {})
    assert (prompt.user, prompt.system, prompt.media_order) == ("Find all.", "You detect.", "text_first")
    assert prompt.object_field_order == "geometry_first"
    assert said(caplog, logging.WARNING) == []
    assert said(caplog, logging.INFO) == [
        f"The run asks as the model it starts from was trained ({start}/coordexp_prompt.json)."
    ]
    assert complete_prompt(prompt, load_template(nano)).rendered == prompt.rendered is not None


def test_what_a_run_says_otherwise_is_told_with_both_texts(start: Path, caplog, nano: Path):
    prompt = prompt_for(
        [str(start)], caplog, {"system": "Be kind.", "max_pixels": 90_000}, prompt="Find cats."
    )
    assert (prompt.user, prompt.system, prompt.max_pixels, prompt.rendered) == (
        "Find cats.",
        "Be kind.",
        90_000,
        None,
    )
    [warning] = said(caplog, logging.WARNING)
    assert 'custom.prompt is "Find cats.", trained with "Find all."' in warning
    assert 'system is "Be kind.", trained with "You detect."' in warning
    assert "max_pixels is 90000, trained with " in warning
    assert "Find cats." in str(complete_prompt(prompt, load_template(nano)).rendered)


def test_a_template_that_writes_another_text_than_the_start_model_saw_is_an_error_with_both(
    start: Path, caplog, nano: Path
):
    """Though all settings are the same, or only the pictures are asked about otherwise."""
    stale = complete_prompt(TRAINED, load_template(nano)).model_copy(
        update={"rendered": "<|im_start|>user Find all."}
    )
    write_prompt(start, stale)
    for swift in ({}, {"max_pixels": 90_000}):
        prompt = prompt_for([str(start)], caplog, swift)
        with pytest.raises(ConfigError) as caught:
            complete_prompt(prompt, load_template(nano))
        text = str(caught.value)
        assert text.startswith(
            "The model that the run starts from was trained with another text of its prompt"
        )
        assert (
            "Trained: '<|im_start|>user Find all.'. Written here: '<|im_start|>system\\nYou detect." in text
        )
    other = prompt_for(
        [str(start)], caplog, {}, prompt="Find cats."
    )  # another text on purpose, which is told
    assert complete_prompt(other, load_template(nano)).user == "Find cats."


def test_a_model_without_a_record_is_asked_by_the_settings(tmp_path: Path, caplog):
    assert prompt_for([str(tmp_path), None], caplog, {}, prompt="Find cats.") == Prompt(user="Find cats.")
    assert caplog.messages == []
