"""Study files: what they may say, their cells, and how long recipes train."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from coordexp.codec.latent_vocab import num_latent_tokens
from coordexp.config.checks.yaml_tree import read_yaml
from coordexp.errors import ConfigError
from coordexp.study.assets import make_models, start_model
from coordexp.study.jobs import check_recipes, seconds_of_steps, steps_within
from coordexp.study.plan import Cell, read_study, selected

STUDY = """
name: small
seeds: [1, 2]
data:
  few: {shapes: {preset: few}}
  crowded: {shapes: {preset: crowded}}
recipes:
  later: {config: a.yaml, start_from: {recipe: first}, budget: {seconds_of: slow, measured_on: first}, only: few}
  slow: {config: b.yaml, start_from: {recipe: first}, only: few}
  first: {config: a.yaml}
baseline: first
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_cells_come_after_those_they_need_and_the_first_seed_before_the_second(tmp_path):
    study = read_study(written(tmp_path, STUDY))
    assert [str(cell) for cell in study.cells] == [
        "few/first/seed1", "few/slow/seed1", "few/later/seed1", "crowded/first/seed1",
        "few/first/seed2", "few/slow/seed2", "few/later/seed2", "crowded/first/seed2",
    ]  # fmt: skip
    assert study.needs(Cell("few", "later", 2)) == [Cell("few", "first", 2), Cell("few", "slow", 2)]
    assert study.folder_of(Cell("few", "slow", 1)) == Path("runs/study/small/few/slow/seed1")


def test_a_model_is_given_latent_tokens(tmp_path):
    """Beside the plain one; a study without them has the model that it had."""
    text = STUDY + f"output: {tmp_path / 'out'}\n"
    plain = start_model(
        read_study(written(tmp_path, text + "model: {preset: nano}\n")), Cell("few", "first", 1)
    )
    assert plain.made_from == {"preset": "nano", "coord_tokens": True, "seed": 1}
    study = read_study(written(tmp_path, text + "model: {preset: nano, latent_tokens: 3}\n"))
    made = start_model(study, Cell("few", "first", 1))
    assert made.made_from == {**plain.made_from, "latent_tokens": 3}
    said: list[str] = []
    for _ in range(2):
        make_models(study, [Cell("few", "first", 1)], say=said.append)
    assert said == [f"model nano_latents3_seed1: made in {made.path.parent}"]
    assert num_latent_tokens(AutoTokenizer.from_pretrained(made.path)) == 3
    assert (
        num_latent_tokens(AutoTokenizer.from_pretrained(plain.path.with_name("nano_latents3_seed1_plain")))
        == 0
    )


def test_a_data_set_may_go_on_from_another_one_with_the_same_recipe(tmp_path):
    text = STUDY.replace("crowded: {", "crowded: {start_from: few, ").replace(
        ", only: few}\n  first", "}\n  first"
    )
    study = read_study(written(tmp_path, text))
    assert study.needs(Cell("crowded", "first", 2)) == [Cell("few", "first", 2)]
    assert study.start_of(Cell("crowded", "first", 2)) == (Cell("few", "first", 2), "last")
    assert study.needs(Cell("crowded", "slow", 1)) == [Cell("crowded", "first", 1)]
    assert study.start_of(Cell("few", "first", 1)) is None


def test_a_data_set_on_which_nothing_is_compared_needs_no_baseline(tmp_path):
    text = STUDY.replace(
        "  first: {config: a.yaml}", "  first: {config: a.yaml}\n  alone: {config: c.yaml, only: %s}"
    )
    text = text.replace("baseline: first", "baseline: slow")
    with pytest.raises(ConfigError, match=r"baseline .*is not run on crowded, where first and alone"):
        read_study(written(tmp_path, text % "crowded"))
    assert Cell("few", "alone", 1) in read_study(written(tmp_path, text % "few")).cells


def test_selection_restricts_the_named_axes(tmp_path):
    cells = read_study(written(tmp_path, STUDY)).cells
    assert [str(cell) for cell in selected(cells, ["recipe=first,slow", "seed=2"])] == [
        "few/first/seed2", "few/slow/seed2", "crowded/first/seed2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--only recipe=frist: .*did you mean first"):
        selected(cells, ["recipe=frist"])
    with pytest.raises(ConfigError, match="--only colour=red"):
        selected(cells, ["colour=red"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: first", "baseline: frist", r"baseline in .*:11: expected one of .*did you mean first"),
        ("{recipe: first}, only", "{recipe: frist}, only", r"recipes\.slow\.start_from\.recipe .*did you mean first"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds .*holds a seed twice"),
        ("seeds: [1, 2]", "seedz: [1, 2]", r"seedz in .*:3: unknown key; did you mean seeds\?"),
        ("preset: crowded", "preset: crowded, trian: 3", r"data\.crowded\.shapes\.trian .*did you mean"),
        ("first: {config: a.yaml}", "first: {config: a.yaml, start_from: {recipe: later}}", "in a circle"),
        ("slow: {config: b.yaml,", "slow: {", r"recipes\.slow .*needs config"),
        ("  first: {config: a.yaml}", "  first: {config: a.yaml, only: crowded}", r"recipes\.\w+ .*not run on few"),
        ("first: {config: a.yaml}", "first: {config: a.yaml, is_evaluated: false}", "first is not evaluated"),
        ("first: {config: a.yaml}", "first: {config: a.yaml, budget: {clock: cpu}}", "clock has no effect without"),
        (", measured_on: first}", "}", r"recipes\.later\.budget .*seconds_of needs measured_on"),
        ("measured_on: first", "measured_on: slow", r"recipes\.later\.budget\.measured_on .*trains with b\.yaml"),
        ("few: {shapes", "few: {start_from: crowded, shapes", r"data\.few\.start_from .*the first data set"),
        ("crowded: {", "crowded: {start_from: fwe, ", r"data\.crowded\.start_from .*did you mean few"),
        ("{shapes: {preset: few}}", "{train_jsonl: a.jsonl}", r"data\.few .*expected shapes, or both"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_path_and_line(tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        read_study(written(tmp_path, STUDY.replace(old, new)))


def test_overrides_that_no_run_has_and_those_of_the_study_are_refused(tmp_path):
    text = """
name: small
data: {few: {shapes: {preset: few}}}
recipes: {ce: {config: configs/demo/stage1_ce.yaml, overrides: {%s}}}
baseline: ce
"""
    with pytest.raises(ConfigError, match=r"recipes\.ce\.overrides\.seed: the study sets it"):
        check_recipes(read_study(written(tmp_path, text % "seed: 3")))
    with pytest.raises(ConfigError, match=r"recipes\.ce: .*learning_rat"):
        check_recipes(read_study(written(tmp_path, text % "learning_rat: 0.1")))


STUDIES = [path for path in sorted(Path("configs/study").glob("*.yaml")) if "recipes" in read_yaml(path).data]


def test_the_studies_are_all_found():
    assert {"objectives", "readout", "answer_forms", "stage2"} <= {path.stem for path in STUDIES}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_can_run(path):
    study = read_study(path)
    check_recipes(study)
    assert study.cells


@pytest.mark.parametrize(
    ("seconds", "per_step", "steps"), [(100.0, 2.0, 50), (99.0, 2.0, 49), (0.5, 2.0, 1), (280.0, 1.7125, 163)]
)
def test_steps_within_a_time(seconds, per_step, steps):
    assert steps_within(seconds, per_step) == steps


def test_seconds_of_a_busy_machine_are_those_of_computing():
    cost = {"train_s": 80.0, "train_cpu_share": 0.25}
    assert (seconds_of_steps(cost, "wall"), seconds_of_steps(cost, "cpu")) == (80.0, 20.0)
    assert seconds_of_steps({"train_s": None, "train_cpu_share": 0.5}, "cpu") == 0.0
