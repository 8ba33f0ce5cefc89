"""The demo's run files fit together: what one starts from, another writes and keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.cli.demo import demo_cmd
from coordexp.cli.main import main
from coordexp.config import load_run_config
from coordexp.stages.plan import PlannedStage, load_stages

ROOT = Path(__file__).parents[3]


def stage_of(recipe: str) -> PlannedStage:
    file, name = demo_cmd.RECIPES[recipe]
    plan = load_stages(ROOT / file)
    return plan.stages[plan.index(name)]


def swift_arguments(recipe: str) -> dict:
    return stage_of(recipe).config.swift


@pytest.mark.parametrize("recipe", demo_cmd.RECIPES)
def test_a_stage_of_the_demo_is_its_run_file(recipe):
    stage = stage_of(recipe)
    alone = load_run_config(stage.run)
    assert stage.config.config_hash == alone.config_hash
    assert Path(alone.swift["output_dir"]) == stage.output == demo_cmd.output_of(recipe)


def test_the_checkpoint_that_stage_2_starts_from_is_written_and_kept():
    first = swift_arguments("mix")
    assert Path(first["output_dir"]) == demo_cmd.START.parent
    step = int(demo_cmd.START.name.removeprefix("checkpoint-"))
    assert step % first["save_steps"] == 0
    assert step <= first["max_steps"]
    assert (
        first.get("save_total_limit") is None
    )  # each new best is saved too, and rotation would reach this one
    for later in demo_cmd.STARTED_LATER:
        assert Path(swift_arguments(later)["model"]) == demo_cmd.START


def test_a_recipe_without_its_start_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo_cmd.STAGES.parent.mkdir(parents=True)
    demo_cmd.STAGES.write_text("")
    monkeypatch.setattr(demo_cmd, "make_assets", lambda: None)
    monkeypatch.setattr(demo_cmd, "evaluate_checkpoint", lambda name, model: {})
    assert main(["demo", "--recipes", "stage2"]) == 2
    said = capsys.readouterr().err
    assert (
        "stage2: starts from runs/demo/stage1/checkpoint-600, which is not there; train `mix` first" in said
    )
