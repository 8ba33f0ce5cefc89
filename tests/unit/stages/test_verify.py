"""What `verify-best` asks of a run's settings, and what it makes of what it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.stage2 import rollout_aligned

from coordexp.config import load_run_config, resolved_config
from coordexp.errors import ConfigError
from coordexp.stages.verify import TOLERANCE, BestVerdict, evaluation_of, settles

STAGE1 = {
    "custom_trainer_variant": "stage1_coord", "external_plugins": ["coordexp/plugin.py"], "model": "base",
    "dataset": ["train.jsonl"], "val_dataset": ["val.jsonl"], "tuner_type": "full", "deepspeed": "zero2",
    "output_dir": "out", "report_to": ["tensorboard"], "seed": 7, "resume_from_checkpoint": "out/checkpoint-1",
    "coordexp": {"custom": {"coord_soft_ce_w1": {"w1_weight": 3.0}}, "debug": {"val_sample_limit": 5}},
}  # fmt: skip
ASKED = {**STAGE1, "coordexp": {"custom": {"rollout_eval": {"enabled": True, "max_new_tokens": 9}}}}
ENGINE = {
    "mode": "server",
    "enforce_eager": True,
    "server": {"servers": [{"base_url": "http://a:1", "group_port": 2}]},
}
STAGE2 = {
    **STAGE1,
    "custom_trainer_variant": "stage2_rollout_aligned",
    "coordexp": rollout_aligned(backend="vllm", vllm=ENGINE),
}


def evaluation(tmp_path: Path, run: dict, backend: str = "hf"):
    """(run file of the evaluation, what it resolves to), from the resolved_config.json of `run`."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_run_config(tmp_path / "run.yaml")
    resolved = resolved_config(config.variant, config.sections, config.swift, derived={})
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump(evaluation_of(resolved, tmp_path / "checkpoint-4", 4, backend, tmp_path / "scratch"))
    )
    return config, load_run_config(tmp_path / "again.yaml")


@pytest.mark.parametrize(
    ("change", "settled"),
    [
        ({}, True),
        ({"tolerance": 1.0}, False),
        ({"passed": False}, False),
        ({"checkpoint": "checkpoint-4"}, False),
    ],
)
def test_an_earlier_report_settles_it_only_where_it_was_as_strict(change, settled):
    verdict = BestVerdict("checkpoint-2", 2, "eval_rollout/f1", 0.5, (), {"hf": 0.5}, TOLERANCE)
    assert settles({**verdict.to_json(), **change}, "checkpoint-2") is settled


def test_an_evaluation_has_the_settings_of_its_run_and_another_model(tmp_path):
    run, again = evaluation(tmp_path, STAGE1)
    assert again.swift["model"] == str(tmp_path / "checkpoint-4")
    assert again.swift["output_dir"] == str(tmp_path / "scratch")
    assert (again.swift["report_to"], again.swift["seed"], again.swift["val_dataset"]) == (
        ["none"],
        7,
        ["val.jsonl"],
    )
    assert not {"deepspeed", "resume_from_checkpoint", "adapters"} & again.swift.keys()
    assert again.custom.evaluate_only == 4
    assert again.sections.custom.model_copy(update={"evaluate_only": None}) == run.sections.custom
    assert again.debug == run.debug


@pytest.mark.parametrize("run", [ASKED, STAGE2], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_who_answers_is_chosen_and_an_engine_is_in_the_process(tmp_path, run, backend):
    before, again = evaluation(tmp_path, run, backend)
    asking = again.rollout_matching or again.custom.rollout_eval
    assert (asking.backend, asking.vllm.mode, asking.vllm.server) == (backend, "colocate", None)
    was = before.rollout_matching or before.custom.rollout_eval
    assert asking.matching == was.matching
    assert asking.max_new_tokens == was.max_new_tokens
    if run is STAGE2 and backend == "vllm":
        assert asking.vllm.enforce_eager


def test_an_adapter_stays_on_the_model_it_was_trained_on(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    _, again = evaluation(tmp_path, {**STAGE1, "tuner_type": "lora"})
    assert (again.swift["model"], again.swift["adapters"]) == ("base", [str(tmp_path / "checkpoint-4")])


def test_a_loss_needs_no_engine(tmp_path):
    with pytest.raises(ConfigError, match="--backend vllm: the run is judged by its loss"):
        evaluation(tmp_path, STAGE1, "vllm")


def verdict(**changes) -> BestVerdict:
    found = {
        "checkpoint": "checkpoint-4", "step": 4, "metric": "eval_rollout/f1", "logged": 0.5, "missing": (),
        "scored": {"hf": 0.50005, "vllm": 0.5}, "tolerance": 1e-4, **changes,
    }  # fmt: skip
    return BestVerdict(**found)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"scored": {"hf": 0.5002}}, "logged as 0.5; loaded again it is 0.5002 by hf"),
        ({"scored": {"hf": None}}, "loaded again it is none by hf"),
        ({"scored": {"hf": float("nan")}}, "loaded again it is nan by hf"),
        ({"missing": ("tokenizer.json: it",)}, "checkpoint-4 lacks tokenizer.json: it"),
        ({"logged": None}, "no record of step 4 has eval_rollout/f1"),
        ({"checkpoint": None}, "no evaluation picked a best checkpoint by eval_rollout/f1"),
    ],
)
def test_what_is_wrong_is_said(changes, fault):
    found = verdict(**changes)
    assert found.passed is (fault is None)
    assert [fault in said for said in found.faults] == ([] if fault is None else [True])
