"""`swift rlhf` on our data by the shipped recipes: GRPO with our rewards, and self-distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.processes import ROOT, run_coordexp, run_train
from transformers import AutoTokenizer

from coordexp.codec.parse import parse_rollout
from coordexp.codec.records import read_jsonl
from coordexp.config.prompt import read_prompt
from coordexp.eval.rewards import REWARDS, rewards_of

pytestmark = pytest.mark.slow


def train(
    recipe: str, model: Path, scenes: Path, output: Path, *, as_command: bool = False, **flags: Any
) -> list[dict[str, Any]]:
    """The records that a run of a recipe logs, with a small batch.

    as_command: by `coordexp train`, not by what that starts.
    """
    given = {
        "model": model, "dataset": scenes / "train.jsonl", "output_dir": output, "max_steps": 2, "save_steps": 2,
        "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "max_completion_length": 90, **flags,
    }  # fmt: skip
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run_file = ROOT / "configs" / recipe / "demo.yaml"
    done = run_coordexp("train", run_file, *argv) if as_command else run_train(run_file, argv)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]


def moved(start: Path, end: Path) -> float:
    """Largest change of a weight."""
    before, after = (load_file(folder / "model.safetensors") for folder in (start, end))
    return max(float((before[name] - after[name]).abs().max()) for name in before)


@pytest.fixture(scope="module")
def rewarded(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("grpo") / "run"
    train(
        "stage2_grpo", taught_model, scenes, output, num_generations=4, log_completions=True, temperature=0.7,
    )  # fmt: skip
    return output


def test_rewards_are_earned_and_weights_move(rewarded, taught_model):
    records = [json.loads(line) for line in (rewarded / "logging.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward" in record]
    assert len(steps) == 2
    for step in steps:
        means = [step[f"rewards/{name}/mean"] for name in ("coordexp_f1", "coordexp_iou", "coordexp_format")]
        assert all(0.0 <= mean <= 1.0 for mean in means)
        assert step["reward"] == pytest.approx(means[0] + means[1] + 0.2 * means[2], abs=1e-5)
    assert max(step["rewards/coordexp_iou/mean"] for step in steps) > 0
    assert moved(taught_model, rewarded / "checkpoint-2") > 1e-4


def test_the_rewards_are_those_of_the_logged_answers(rewarded, taught_model, scenes):
    """From text alone: the answers tokenized again, against the records of their pictures."""
    tok = AutoTokenizer.from_pretrained(taught_model)
    truths = [record.objects for record in read_jsonl(scenes / "train.jsonl")]
    lines = [json.loads(line) for line in (rewarded / "completions.jsonl").read_text().splitlines()]
    assert [set(line["step"]) for line in lines[:2]] == [{"1"}, {"2"}]
    checked = 0
    for line in lines[:2]:  # the last one is written again at the end
        answers = zip(line["completion"], *(line[name] for name in list(REWARDS)[:2]), strict=True)
        for text, f1, iou in answers:
            parsed = parse_rollout(tok.encode(text, add_special_tokens=False), tok)
            found = {rewards_of(parsed, objects, ended=True)[:2] for objects in truths}
            assert any(pair == pytest.approx((f1, iou), abs=1e-6) for pair in found)
            checked += 1
    assert checked == 16


def test_the_prompt_of_stage_1_stays_with_the_checkpoint(rewarded, taught_model):
    start, end = read_prompt(taught_model), read_prompt(rewarded / "checkpoint-2")
    assert start.prompt.rendered is not None
    assert end.prompt == start.prompt.model_copy(update={"max_pixels": 4096})  # which the recipe sets


def test_a_model_learns_from_itself_when_it_is_shown_the_objects(taught_model, scenes, tmp_path):
    records = train("stage2_opsd", taught_model, scenes, tmp_path / "run", as_command=True)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert (
        min(losses) > 0
    )  # the same model without the objects in its prompt would differ from itself by nothing
    assert moved(taught_model, tmp_path / "run" / "checkpoint-2") > 1e-4
    resolved = json.loads((tmp_path / "run" / "resolved_config.json").read_text())
    assert resolved["trainer_variant"] == "rlhf"
    assert resolved["custom"]["teacher_prompt"].endswith("{answer}")
