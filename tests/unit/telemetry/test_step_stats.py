"""stats.json after every step, on a clock by hand."""

from __future__ import annotations

from coordexp.telemetry.step_stats import StepStats


def test_a_resumed_run_of_10_steps():
    stats = StepStats(first_step=4, max_steps=10, started=100.0)
    first = stats.after(5, 103.0, 2.5, {})
    assert first == {
        "schema_version": 1,
        "mode": "train",
        "global_step": 5,
        "metrics": {"time/step_s": 3.0, "loss": 2.5},
        "progress": {"max_steps": 10, "elapsed_s": 3.0, "eta_s": 15.0},
        "recorded": {},
    }
    second = stats.after(6, 104.0, float("nan"), {"train": 5})
    assert second["metrics"] == {"time/step_s": 1.0}  # JSON has no NaN
    assert second["progress"] == {
        "max_steps": 10,
        "elapsed_s": 4.0,
        "eta_s": 8.0,
    }  # two steps in 4 s, four are left
    assert second["recorded"] == {"train": 5}
    assert stats.after(10, 112.0, 1.0, {})["progress"]["eta_s"] == 0.0
