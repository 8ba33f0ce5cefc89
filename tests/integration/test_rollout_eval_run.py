"""Stage 1 that is judged by what the model writes: the records, the best checkpoint, the samples for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.processes import PLUGIN, free_port, run_coordexp, run_swift, sft_flags
from support.vllm import require_vllm

from coordexp.eval.on_policy import on_policy_numbers
from coordexp.eval.predictions.scored import read_predictions
from coordexp.metrics.catalog import lookup

pytestmark = pytest.mark.slow

GATE = 0.05
"""The model has seen 8 scenes: hardly a box overlaps much."""
ASKING = {
    "enabled": True,
    "decode_batch_size": 4,
    "max_new_tokens": 100,
    "num_images": None,
    "matching": {"maskiou_gate": GATE},
}

ENGINE = {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True}
EACH_STEP = {"rollout_eval": {**ASKING, "every_steps": 1}}
STILL: dict[str, Any] = {
    "learning_rate": 0, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1,
}  # fmt: skip
"""A step that changes nothing, and both kinds of evaluation after it."""
DEEPSPEED_ON_CPU = Path(__file__).with_name("deepspeed_on_cpu_plugin.py")


def metrics_at(run: Path, key: str) -> dict[int, dict[str, float]]:
    """Step -> metrics of the records that have `key`."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    return {r["global_step"]: r["metrics"] for r in records if key in r.get("metrics", {})}


def train(model: Path, scenes: Path, run: Path, custom: dict[str, Any], **flags: Any) -> str:
    environment = flags.pop("environment", {})
    done = run_swift(
        "sft", *sft_flags(model, scenes, run, coordexp=json.dumps({"custom": custom}), **flags), **environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps: the loss is evaluated at 3 and 6, the answers at 2, 4 and 6; one folder of samples is let go."""
    output = tmp_path_factory.mktemp("runs") / "asked"
    custom = {
        "rollout_eval": {**ASKING, "every_steps": 2},
        "generation_samples": {"num_images": 2, "keep": 2},
    }
    console = train(
        taught_model, scenes, output, custom, max_steps=6, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=6, save_only_model=True, report_to="tensorboard", learning_rate=1e-4,
    )  # fmt: skip
    (output / "console.txt").write_text(console)
    return output


def test_loss_and_answers_are_evaluated_each_at_its_own_steps(run: Path, scenes: Path):
    asked, taught = metrics_at(run, "eval_rollout/f1"), metrics_at(run, "eval_loss")
    assert (sorted(asked), sorted(taught)) == ([2, 4, 6], [3, 6])
    assert asked[6] == taught[6]  # one record
    assert "eval_token_acc" not in asked[2]
    assert asked[2]["eval_rollout/gt_objects"] == sum(
        len(json.loads(line)["objects"]) for line in (scenes / "val.jsonl").read_text().splitlines()
    )


def test_the_best_checkpoint_is_that_of_the_greatest_f1_and_scores_the_same_when_it_is_loaded_again(
    run: Path, scenes: Path, tmp_path: Path
):
    derived = json.loads((run / "resolved_config.json").read_text())["derived"]
    assert (derived["metric_for_best_model"], derived["greater_is_better"]) == ("rollout/f1", True)
    f1 = {step: metrics["eval_rollout/f1"] for step, metrics in metrics_at(run, "eval_rollout/f1").items()}
    best = max(f1, key=lambda step: (f1[step], -step))
    assert (run / "best").resolve().name == f"checkpoint-{best}"
    done = run_coordexp(
        "infer", "--model", run / "best", "--data", scenes / "val.jsonl", "--output", tmp_path,
        "--backend", "hf", "--max-new-tokens", 100, "--coord", "argmax",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    again = on_policy_numbers(read_predictions(tmp_path / "gt_vs_pred.jsonl", scored=False), gate=GATE)
    assert again["rollout_f1"] == pytest.approx(f1[best], abs=1e-8)  # ms-swift logs 8 digits
    assert 0 < f1[best] < 1


def test_the_best_checkpoint_is_verified_and_a_file_that_it_lacks_is_named(run: Path):
    done = run_coordexp("verify-best", run)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((run / "verify_best.json").read_text())
    assert (found["passed"], found["metric"], found["missing"]) == (True, "eval_rollout/f1", [])
    assert found["scored"] == {"hf": found["logged"]}
    assert 0 < found["logged"] < 1
    tokenizer = run / "best" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    try:
        done = run_coordexp("verify-best", run)
    finally:
        tokenizer.write_bytes(content)
    assert done.returncode == 1
    assert "lacks tokenizer.json or vocab.json: the vocabulary of the tokenizer" in done.stdout


def test_samples_stand_in_the_run_folder_on_the_console_and_in_tensorboard(run: Path, scenes: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_000004", "step_000006"]
    folder = run / "samples" / "step_000006"
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.json",
        "sample_00.png",
        "sample_01.png",
    ]
    told = json.loads((folder / "answers.json").read_text())
    records = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    assert [[gt["desc"] for gt in sample["ground_truth"]] for sample in told["samples"]] == [
        [item["desc"] for item in record["objects"]] for record in records[:2]
    ]
    width, height = Image.open(folder / "sample_00.png").size
    assert width > 2 * height * 0.8  # two panels side by side
    console = (run / "console.txt").read_text()
    assert console.count("step 6: ") == 2
    found = EventAccumulator(str(run / "runs"), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("samples/00")] == [2, 4, 6]


def of_tokens(key: str) -> bool:
    """Whether a number is a mean over tokens, whichever batches and ranks they come from."""
    spec = lookup(key)
    return spec is not None and "tokens" in spec.over


@pytest.fixture(scope="module")
def alone(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """An evaluation of the start model by one process."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(taught_model, scenes, output, EACH_STEP, **STILL)
    return metrics_at(output, "eval_rollout/f1")[1]


@pytest.mark.parametrize("stage", ["", "zero3"], ids=["ddp", "zero3"])
def test_two_ranks_find_what_one_rank_finds(
    stage: str, alone: dict[str, float], taught_model: Path, scenes: Path, tmp_path: Path
):
    """With no learning the answers are those of the start model.

    Four validation samples in batches of three: to fill its batch, the second rank gets two of the first one's again;
    in batches of four, it gets all of them again.
    """
    environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}
    flags: dict[str, Any] = {"ddp_backend": "gloo"}
    if stage:
        environment |= {"ACCELERATE_USE_CPU": "false"}
        flags |= {
            "per_device_eval_batch_size": 4,
            "deepspeed": stage,
            "use_cpu": None,
            "external_plugins": [DEEPSPEED_ON_CPU, PLUGIN],
        }
    train(
        taught_model, scenes, tmp_path / "two", EACH_STEP, environment=environment, **STILL, **flags,
    )  # fmt: skip
    together = metrics_at(tmp_path / "two", "eval_rollout/f1")[1]
    keys = [key for key in alone if key.startswith("eval_rollout/")]
    assert {key: alone[key] for key in keys} == {key: together[key] for key in keys}
    assert alone["eval_rollout/pred_objects"] > 0
    taught = [key for key in alone if key.startswith("eval_") and of_tokens(key)]
    assert {"eval_base_ce/loss", "eval_coord_diag/loss", "eval_token_acc"} <= set(taught)
    wanted = pytest.approx({key: alone[key] for key in taught}, rel=1e-5)
    assert {key: together[key] for key in taught} == wanted


@pytest.mark.vllm
def test_a_vllm_engine_finds_what_transformers_finds(
    alone: dict[str, float], taught_model: Path, scenes: Path, tmp_path: Path
):
    require_vllm()
    custom = {"rollout_eval": {**EACH_STEP["rollout_eval"], "backend": "vllm", "vllm": ENGINE}}
    train(
        taught_model, scenes, tmp_path / "engine", custom, **STILL,
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    found = metrics_at(tmp_path / "engine", "eval_rollout/f1")[1]
    keys = [key for key in alone if key.startswith("eval_rollout/")]
    assert {key: found[key] for key in keys} == {key: alone[key] for key in keys}
