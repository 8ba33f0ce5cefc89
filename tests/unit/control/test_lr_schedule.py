"""The phase that is named, against the learning rates that transformers makes."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from coordexp.control.lr_schedule import LrSchedule

TOTAL, WARMUP = 20, 4
OPTIONS = {"warmup_stable_decay": {"num_decay_steps": 6}, "cosine_with_min_lr": {"min_lr": 1e-5}}
OPTIONS["cosine_warmup_with_min_lr"] = OPTIONS["cosine_with_min_lr"]
NO_LAMBDA = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}  # they follow a metric, not the step


def rates(name: SchedulerType) -> list[float]:
    """Learning rate after 0, 1, ... TOTAL steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL,
        scheduler_specific_kwargs=OPTIONS.get(name.value),
    )  # fmt: skip
    found = []
    for _ in range(TOTAL + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", sorted(set(SchedulerType) - NO_LAMBDA), ids=str)
def test_a_phase_is_what_the_learning_rate_does(name):
    schedule = LrSchedule.of_run(name.value, WARMUP, TOTAL, OPTIONS.get(name.value))
    lr = rates(name)
    for step in range(TOTAL):
        change = lr[step + 1] - lr[step]
        phase = schedule.phase(step)
        if phase == "warmup":
            assert change > 0 or (name is SchedulerType.COSINE_WARMUP_WITH_MIN_LR and step == WARMUP - 1), (
                step
            )
        elif phase == "stable":
            assert change == 0, step
        elif step < TOTAL - 1:  # some end one step earlier, or start again
            assert change < 0, step
    if schedule.decay_until is not None:
        assert schedule.decay_until == TOTAL


def test_derived_numbers():
    wsd = LrSchedule.of_run("warmup_stable_decay", 4, 20, {"num_decay_steps": 6})
    assert wsd.derived() == {"warmup_steps": 4, "lr_decay_from": 14, "lr_decay_until": 20}
    assert [wsd.phase(step) for step in (0, 3, 4, 13, 14, 20)] == [
        "warmup", "warmup", "stable", "stable", "decay", "decay",
    ]  # fmt: skip
    assert LrSchedule.of_run("cosine", 3, 10).derived() == {
        "warmup_steps": 3, "lr_decay_from": 3, "lr_decay_until": 10,
    }  # fmt: skip
    assert LrSchedule.of_run("constant", 3, 10).derived() == {"warmup_steps": 0}
    assert LrSchedule.of_run("inverse_sqrt", 3, 10).derived() == {"warmup_steps": 3, "lr_decay_from": 3}
