"""Run files of `swift rlhf`: the shipped recipes, its own arguments, and settings that cannot act."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from coordexp.config import load_run_config
from coordexp.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_grpo_in_both_forms_of_a_file(tmp_path: Path):
    recipe = CONFIGS / "stage2_grpo" / "demo.yaml"
    flat = load_run_config(recipe)
    assert (flat.command, flat.variant) == ("rlhf", "rlhf")
    argv = flat.to_swift_argv()
    assert "--custom_trainer_variant" not in argv
    at = argv.index("--reward_funcs")
    assert argv[at + 1 : at + 4] == ["coordexp_f1", "coordexp_iou", "coordexp_format"]
    values = yaml.safe_load(recipe.read_text())
    ours = {"external_plugins", "ignore_args_error", "ENV"}
    file = tmp_path / "sections.yaml"
    file.write_text(
        yaml.safe_dump({"training": {k: v for k, v in values.items() if k not in ours}, "custom": {}})
    )
    assert load_run_config(file).config_hash == flat.config_hash
    assert load_run_config(recipe, ["--num_generations", "4"]).config_hash != flat.config_hash


def test_the_recipe_of_self_distillation_shows_the_teacher_the_objects():
    found = load_run_config(CONFIGS / "stage2_opsd" / "demo.yaml")
    assert found.command == "rlhf"
    assert "{answer}" in found.custom.teacher_prompt


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("training: {num_generations: 4}", ("training.num_generations", "sets rlhf_type")),
        ("training: {rlhf_type: grpo, num_generation: 4}", ("did you mean num_generations?",)),
        ("training: {rlhf_type: grop}", ("training.rlhf_type", "grpo")),
        ("training: {rlhf_type: grpo}\ncustom: {trainer_variant: stage1}", ("custom.trainer_variant",)),
        ("training: {rlhf_type: grpo}\nrollout_matching: {}", ("rollout_matching", "has no effect")),
        ("training: {max_steps: 1}\ncustom: {teacher_prompt: 'Find {answer}'}", ("custom.teacher_prompt",)),
        ("training: {rlhf_type: grpo, optimizer: coord_adamw}", ("training.optimizer", "ms-swift's optimizers")),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(tmp_path: Path, text: str, fragments: tuple[str, ...]):
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
