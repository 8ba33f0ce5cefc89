"""The form of answers in the settings: what names it, what goes with it, and how it stays with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordexp.config import Prompt, load_run_config
from coordexp.config.prompt import PROMPT_FILE, find_prompt, given_by_run, settle, with_prompt, write_prompt
from coordexp.config.schema.custom import Custom
from coordexp.errors import ConfigError

NUMBERS = "coord_tokens: {enabled: false}"
PLAIN = "coord_soft_ce_w1: {enabled: false}"
TOKEN_CE = """\
      - name: token_ce
        enabled: true
        weight: 1.0
        channels: [B]
        config: {desc_ce_weight: 1.0, self_context_struct_ce_weight: 0.1, rollout_fn_desc_weight: 1.0,
                 rollout_matched_prefix_struct_weight: 0.0, rollout_drop_invalid_struct_ce_multiplier: 1.0}
"""
GEO = """\
      - {name: bbox_geo, enabled: true, weight: 1.0, channels: [B], config: {smoothl1_weight: 1.0, ciou_weight: 1.0}}
"""


def aligned(objective: str, rollouts: str = "") -> str:
    return (
        f"custom: {{trainer_variant: stage2_rollout_aligned, answer_format: qwen, {NUMBERS}}}\n"
        f"rollout_matching:\n  backend: hf\n{rollouts}  pipeline:\n    objective:\n{objective}"
    )


def load(tmp_path: Path, text: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_run_config(file, ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "custom: {answer_format: qwen}\n",
            "custom.answer_format in run.yaml:1: qwen writes coordinates as numbers, which "
            "custom.coord_tokens.enabled: true rules out; write enabled: false there, or another format.",
        ),
        (
            f"custom: {{{NUMBERS}}}\n",
            "is a loss on coordinate tokens, and this answer writes numbers, which plain cross-entropy teaches; write "
            "enabled: false.",
        ),
        (
            f"custom: {{answer_format: qwen, object_field_order: desc_first, {NUMBERS}, {PLAIN}}}\n",
            "custom.object_field_order in run.yaml:1: has no effect with answer_format: qwen, whose order is "
            "geometry_first; write that, or remove it.",
        ),
        (
            f"custom: {{coord_offset: {{enabled: true}}, {NUMBERS}, {PLAIN}}}\n",
            "custom.coord_offset in run.yaml:1: trains the rows of coordinate tokens",
        ),
        (
            f"custom: {{token_type_metrics: {{coord_monitor_mass: true}}, {NUMBERS}, {PLAIN}}}\n",
            "custom.token_type_metrics.coord_monitor_mass in run.yaml:1: is the probability of coordinate tokens",
        ),
        (
            "custom: {answer_format: compact, coord_tokens: {enabled: false}}\n",
            "custom.answer_format in run.yaml:1: compact writes coordinates as coordinate tokens, which "
            "custom.coord_tokens.enabled: false rules out; write enabled: true there, or another format.",
        ),
        (
            "custom: {answer_format: compact, object_field_order: geometry_first}\n",
            "custom.object_field_order in run.yaml:1: has no effect with answer_format: compact, whose order is "
            "desc_first; write that, or remove it.",
        ),
        (
            aligned(TOKEN_CE + GEO),
            "bbox_geo looks at coordinate tokens, and this answer writes numbers; write enabled: false. token_ce "
            "teaches the numbers.",
        ),
        (
            aligned(TOKEN_CE, "  decoding: {coord: median}\n"),
            "median reads the distribution over coordinate tokens, and this answer writes numbers; use argmax.",
        ),
    ],
)
def test_what_does_not_go_with_the_form_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert said in str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("custom: {prompt: Find all.}\n", "coordjson"),
        (f"custom: {{{NUMBERS}, {PLAIN}}}\n", "coordjson_numbers"),
        (f"custom: {{answer_format: qwen, {NUMBERS}, {PLAIN}}}\n", "qwen"),
        (aligned(TOKEN_CE), "qwen"),
        ("custom: {answer_format: compact}\n", "compact"),
    ],
)
def test_what_goes_with_it_is_taken(tmp_path: Path, text: str, form: str):
    assert load(tmp_path, text).sections.custom.answer_form == form


def test_the_form_of_a_checkpoint_is_kept_unless_the_run_says_otherwise(tmp_path: Path):
    write_prompt(tmp_path, Prompt(answer_form="qwen"))
    assert json.loads((tmp_path / PROMPT_FILE).read_text())["answer_form"] == "qwen"
    record = find_prompt([tmp_path])
    silent = Custom(prompt="Find all.")
    prompt, differences = settle(record, given_by_run(silent, {}))
    assert (prompt.answer_form, [d.name for d in differences]) == ("qwen", ["user"])
    custom = with_prompt(silent, prompt)
    assert (custom.answer_format, custom.coord_tokens.enabled, custom.answer_form) == ("qwen", False, "qwen")
    given = given_by_run(Custom.model_validate({"coord_tokens": {"enabled": False}}), {})
    prompt, differences = settle(record, given)
    assert (prompt.answer_form, [d.name for d in differences]) == ("coordjson_numbers", ["answer_form"])


def test_coordjson_is_not_named_in_the_file(tmp_path: Path):
    write_prompt(tmp_path, Prompt())
    assert "answer_form" not in json.loads((tmp_path / PROMPT_FILE).read_text())
    assert find_prompt([tmp_path]).prompt == Prompt()
