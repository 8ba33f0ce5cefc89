"""Stage 2 over several processes, through kills and resumes, and its best checkpoint in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.processes import PLUGIN, ROOT, free_port, run_swift, sft_flags, swift_environment
from support.stage2 import rollout_aligned, two_channel

from coordexp.metrics.sinks import read_payloads
from coordexp.telemetry.doctor.diagnose import diagnose
from coordexp.telemetry.life.beats import FAILED, read_beats
from coordexp.telemetry.run_log import HEADER

pytestmark = pytest.mark.slow

Records = list[dict[str, Any]]
DEEPSPEED_ON_CPU = Path(__file__).with_name("deepspeed_on_cpu_plugin.py")
STEERED = {
    "kind": "setpoint", "name": "sharper", "knob": "coord_reg.w1_weight", "metric": "loss/A1_text/struct_ce",
    "effect": "lowers", "target": 0.0, "gain": 100.0, "rate": 0.1, "ema": 0.5, "bounds": [0.5, 2.0],
    "audit_every": 2, "mode": "act",
}  # fmt: skip
"""A controller that raises a weight by its rate at every update, but for audits at the weight of the run file."""
SAME_FOR_EVERY_CUT = ("loss", "rollout/f1", "rollout/gt", "rollout/valid", "coord_diag/")


def flags(model: Path, scenes: Path, output: Path, sections: dict[str, Any], **more: Any) -> list[str]:
    variant = "stage2_two_channel" if "stage2_ab" in sections else "stage2_rollout_aligned"
    return sft_flags(
        model, scenes, output, custom_trainer_variant=variant, coordexp=json.dumps(sections),
        **{"learning_rate": 1e-3, "val_dataset": None, **more},
    )  # fmt: skip


def run(argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = run_swift("sft", *argv, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def records(output: Path, mode: str = "train") -> Records:
    found = [p for p in read_payloads(output / "metrics.jsonl") if p["mode"] == mode]
    return [p["metrics"] | {"step": p["global_step"]} for p in found]


def losses(output: Path) -> dict[int, float]:
    """Step -> loss; of a step that was logged twice, the later one."""
    return {record["step"]: record["loss"] for record in records(output) if "loss" in record}


def mixed(**rollout_matching: Any) -> dict[str, Any]:
    """Sections of a run of both channels, self-context and a controller."""
    return {**two_channel(0.5, rollout_matching, n_softctx_iter=2), "control": {"controllers": [STEERED]}}


def decisions(output: Path) -> list[tuple[int, float, float]]:
    """(step, what the controller chose, what was in force), the later ones of steps that were done twice."""
    lines = (output / "control.jsonl").read_text().splitlines()
    found = {one["step"]: (one["step"], one["after"], one["in_force"]) for one in map(json.loads, lines)}
    return sorted(found.values())


def two_ranks() -> dict[str, str]:
    return {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}


@pytest.fixture(scope="module")
def alone(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight mixed steps in one process, checkpoints at 3 and 6."""
    output = tmp_path_factory.mktemp("alone") / "run"
    sections = mixed()
    run(flags(taught_model, scenes, output, sections, max_steps=8, save_strategy="steps", save_steps=3))
    return output


def deepspeed_ranks(stage: str) -> dict[str, Any]:
    """Flags under which DeepSpeed is not ignored on CPUs."""
    return {"deepspeed": stage, "use_cpu": None, "external_plugins": [DEEPSPEED_ON_CPU, PLUGIN]}


@pytest.mark.parametrize("stage", ["", "zero2", "zero3"], ids=["ddp", "zero2", "zero3"])
def test_two_ranks_with_ragged_packs_take_the_step_of_one(stage, alone, taught_model, scenes, tmp_path):
    """Packs of one or two samples: the ranks have different numbers of them, and of micro-batches with nothing in."""
    sections = mixed(packing_length=190)
    output = tmp_path / "run"
    more = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "train_dataloader_shuffle": True,
        **(deepspeed_ranks(stage) if stage else {}),
    }
    environment = {"ACCELERATE_USE_CPU": "false"} if stage else {}
    run(flags(taught_model, scenes, output, sections, max_steps=4, **more), **two_ranks(), **environment)
    assert json.loads((output / "resolved_config.json").read_text())["derived"]["world_size"] == 2
    np.testing.assert_allclose(
        decisions(output), decisions(alone)[:2]
    )  # of the steps on ground truth, 1 and 3
    ours, theirs = records(output), records(alone)
    for step in range(4):
        assert ours[step]["train/samples_total"] == theirs[step]["train/samples_total"] == 8
        for key in ("train/tokens_total", "train/tokens_seen", "train/images_seen"):
            assert ours[step][key] == theirs[step][key] > 0, key
        assert (ours[step]["train/micro_steps"], theirs[step]["train/micro_steps"]) == (4, 1)
        for key in theirs[step]:
            if key.startswith(SAME_FOR_EVERY_CUT) and "p90" not in key:
                assert ours[step][key] == pytest.approx(theirs[step][key], rel=2e-3, abs=1e-6), key


def test_deepspeed_that_would_be_ignored_is_refused(taught_model, scenes, tmp_path):
    argv = flags(taught_model, scenes, tmp_path / "run", two_channel(0.5), max_steps=1, deepspeed="zero2")
    done = run_swift("sft", *argv)
    assert done.returncode != 0
    assert "deepspeed is set, but transformers ignores it on a CPU" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(alone, taught_model, scenes, tmp_path):
    output = tmp_path / "run"
    sections = mixed()
    schedule: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    argv = flags(taught_model, scenes, output, sections, **schedule)
    with subprocess.Popen(
        [sys.executable, "-m", "swift.cli.main", "sft", *argv], env=swift_environment(), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_for(lambda: reached(output, 5), process, 240)
        kill_tree(process.pid)
    checkpoint = output / "checkpoint-3"
    run(flags(taught_model, scenes, output, sections, **schedule, resume_from_checkpoint=checkpoint))
    expected, found = losses(alone), losses(output)
    np.testing.assert_allclose(decisions(output), decisions(alone))
    assert sorted(found) == list(range(1, 9))
    said = (output / "run.log").read_text().splitlines()
    assert [line.split(" · ")[0] for line in said if line.startswith(HEADER)] == [f"{HEADER}1", f"{HEADER}2"]
    assert f"resumed from: {checkpoint}" in said
    assert any(line.startswith("step 5/8 · channel A · loss ") for line in said)
    for step in range(4, 9):
        assert found[step] == pytest.approx(expected[step], rel=1e-6), step
    channels = {record["step"]: record["stage2/channel_b"] for record in records(output) if "loss" in record}
    assert [channels[step] for step in range(1, 9)] == [0, 1] * 4
    for key in ("train/tokens_seen", "train/images_seen"):
        of_run, uncut = ({r["step"]: r[key] for r in records(run) if "loss" in r} for run in (output, alone))
        assert of_run == uncut, key
    seen = {record["step"]: record["train/samples_seen"] for record in records(output) if "loss" in record}
    assert [seen[step] for step in range(4, 9)] == [8 * step for step in range(4, 9)]


def test_when_a_rank_dies_the_other_ends_with_an_error(taught_model, scenes, tmp_path):
    output = tmp_path / "run"
    argv = flags(
        taught_model, scenes, output, rollout_aligned(), max_steps=500, per_device_train_batch_size=4
    )
    with subprocess.Popen(
        [sys.executable, "-m", "swift.cli.main", "sft", *argv], env=swift_environment(**two_ranks()), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: reached(output, 2), process, 300)
            survivor = rank_process(process.pid, rank=0)
            rank_process(process.pid, rank=1).kill()
            assert process.wait(timeout=60) != 0
            assert not survivor.is_running()
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
    names_of = {beat.rank: beat for beat in read_beats(output)}
    assert (names_of[0].end.how, names_of[1].end) == (FAILED, None)
    postmortem = json.loads((output / "postmortem.json").read_text())
    assert postmortem["rank"] == 0
    assert postmortem["stack"]
    assert postmortem["last_payloads"][-1]["global_step"] >= 2
    ended, silent = [str(problem) for problem in diagnose(output, now=time.time() + 61).problems][:2]
    assert ended.startswith("rank 0 (")
    assert f"process {names_of[1].pid}) is dead: it said nothing for" in silent


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_best_checkpoint_survives_and_scores_the_same_in_a_fresh_process(
    tuner, taught_model, scenes, tmp_path
):
    """A learning rate that wrecks the model: the best step is an early one, at which no save was due."""
    output = tmp_path / "run"
    sections = rollout_aligned()
    more: dict[str, Any] = {"tuner_type": tuner}
    if tuner == "lora":
        more |= {"modules_to_save": ["embed_tokens", "lm_head"], "lora_rank": 4}
    run(
        flags(
            taught_model, scenes, output, sections, max_steps=6, learning_rate=0.05,
            lr_scheduler_type="constant_with_warmup", warmup_steps=25, save_total_limit=1,
            save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=2,
            val_dataset=scenes / "train.jsonl", **more,
        )
    )  # fmt: skip
    evaluations = {record["step"]: record["eval_rollout/f1"] for record in records(output, "eval")}
    best_step = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert evaluations[best_step] > 0  # a model that says nothing would be no best one
    state = json.loads((output / f"checkpoint-{best_step}" / "trainer_state.json").read_text())
    assert state["best_metric"] == evaluations[best_step]
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best_step}"
    again = rescore(
        output / f"checkpoint-{best_step}", tuner, taught_model, scenes, tmp_path / "again", sections, more
    )
    assert again == evaluations[best_step]


def rescore(
    checkpoint: Path,
    tuner: str,
    base: Path,
    scenes: Path,
    output: Path,
    sections: dict[str, Any],
    more: dict[str, Any],
) -> float:
    """eval_rollout/f1 of a checkpoint by a fresh run with a learning rate of 0."""
    loaded = checkpoint if tuner == "full" else base
    adapters = {} if tuner == "full" else {"adapters": checkpoint}
    run(
        flags(
            loaded, scenes, output, sections, max_steps=1, learning_rate=0.0, weight_decay=0.0, eval_strategy="steps",
            eval_steps=1, val_dataset=scenes / "train.jsonl", **more, **adapters,
        )
    )  # fmt: skip
    return records(output, "eval")[0]["eval_rollout/f1"]


def test_a_number_that_evaluation_may_lack_does_not_end_the_run(nano_model, scenes, tmp_path):
    """An untrained model writes no object: no match, no maskIoU, and nothing by which it could be the best."""
    run_dir = tmp_path / "run"
    done = run_swift(
        "sft",
        *flags(
            nano_model, scenes, run_dir, rollout_aligned(max_new_tokens=16), max_steps=2, save_strategy="steps",
            save_steps=2, eval_strategy="steps", eval_steps=1, val_dataset=scenes / "train.jsonl",
            metric_for_best_model="eval_rollout/matched_maskiou_mean",
        ),
    )  # fmt: skip
    console = done.stdout + done.stderr
    assert done.returncode == 0, console[-3000:]
    said = "This evaluation picks no best checkpoint: it reported no eval_rollout/matched_maskiou_mean."
    assert console.count(said) == 1
    assert "the greatest eval_rollout/matched_maskiou_mean" in console
    assert sorted(path.name for path in run_dir.glob("*") if path.name.startswith(("best", "check"))) == [
        "checkpoint-2"
    ]
    state = json.loads((run_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] is None


def test_an_unknown_best_metric_is_refused_before_anything_is_written(nano_model, scenes, tmp_path):
    argv = flags(
        nano_model, scenes, tmp_path / "run", rollout_aligned(), metric_for_best_model="eval_rollout/f2"
    )
    done = run_swift("sft", *argv)
    assert done.returncode == 2
    assert (
        'coordexp: --metric_for_best_model = "eval_rollout/f2" on the command line: the evaluation of trainer variant '
        "stage2_rollout_aligned reports no such number." in done.stderr
    )
    assert not (tmp_path / "run").exists()


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """The process that trains as `rank` under a launcher."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and any(
            "swift/cli/sft.py" in word for word in process.cmdline()
        ):
            return process
    raise AssertionError(f"no process of rank {rank}")


def kill_tree(launcher: int) -> None:
    """SIGKILL to a launcher and everything it started (ranks lead sessions of their own)."""
    tree = psutil.Process(launcher)
    for process in [*tree.children(recursive=True), tree]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def reached(output: Path, step: int) -> bool:
    return (output / "metrics.jsonl").is_file() and max(losses(output), default=0) >= step


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended on its own with {process.returncode}"
        assert time.monotonic() < deadline, "the run did not get that far in time"
        time.sleep(0.2)
