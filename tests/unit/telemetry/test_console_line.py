"""The line that the console shows of a record."""

from __future__ import annotations

from coordexp.telemetry.console_line import console_line


def test_a_training_step():
    record = {
        "loss": 1.23456, "grad_norm": 5.25, "learning_rate": 1e-5, "time/step_s": 0.5, "train/tokens_per_s": 15234.0,
        "train/tokens_seen": 2_500_000.0, "packing/utilization": 0.934, "memory/peak_gb": 12.34, "token_acc": 0.5,
        "global_step/max_steps": "20/400", "remaining_time": "3m 20s",
    }  # fmt: skip
    assert console_line(20, 400, record) == (
        "step 20/400 · loss 1.235 · grad norm 5.25 · lr 1e-05 · 0.5 s/step · 15.2k tokens/s · 2.5M tokens seen · "
        "93% filled · 12.3 GB · 3m 20s left"
    )


def test_a_step_of_two_channels_an_evaluation_and_the_end():
    step = {"loss": 2.0, "stage2/channel_b": 1.0, "rollout/f1": 0.25}
    assert console_line(3, 8, step) == "step 3/8 · 100% channel B · loss 2 · rollout f1 0.25"
    evaluation = {"eval_loss": 0.5, "eval_rollout/f1": 0.75, "eval_rollout/mAP": 0.125, "eval_runtime": 2.5}
    assert console_line(4, 8, evaluation) == "eval at step 4/8 · loss 0.5 · f1 0.75 · mAP 0.125 · 2.5 s"
    assert (
        console_line(8, 8, {"train_loss": 1.5, "train_runtime": 60.0})
        == "done at step 8/8 · mean loss 1.5 · 60 s"
    )
