"""What a dry run says of the whole run, from steps and images that it measured: by hand."""

from __future__ import annotations

import pytest
import torch

from coordexp.data.chosen import ChosenSamples
from coordexp.swift_bridge.draws import Draw
from coordexp.trainers.dry_run.memory import MemoryUse, is_out_of_memory
from coordexp.trainers.dry_run.page import duration, render
from coordexp.trainers.dry_run.parts import (
    DataFacts,
    DryRunReport,
    EvaluationReport,
    RunShape,
    StepReport,
    num_evaluations,
)

MEMORY = MemoryUse(1.5, 6.0, "host, resident")


def step(name: str, **seconds: float) -> StepReport:
    return StepReport(name, 2, 8, 90, 700, 300, seconds, MEMORY)


def report(world_size: int = 2) -> DryRunReport:
    """70 steps of A (2 s) and 30 of B (5 s); 4 evaluations of 100 images by teacher forcing and 40 by answers."""
    shape = RunShape(
        "stage2_two_channel",
        {"A": 70, "B": 30},
        4,
        world_size,
        DataFacts(1000, 100, 40.0),
        num_eval_samples=100,
    )
    evaluation = EvaluationReport(
        images=1, teacher_s=0.5, rollout_s=3.0, num_teacher=100, num_rollout=40, memory=MEMORY
    )
    steps = (step("A", plan=0.5, optimizer=1.5), step("B", generate=4.0, optimizer=1.0))
    return DryRunReport(shape, steps, evaluation, "data.jsonl:3", "{}<|im_end|>", MEMORY)


def test_the_estimate_adds_up_steps_and_evaluations():
    found = report()
    assert found.training_s == 70 * 2.0 + 30 * 5.0
    # each of two ranks: 50 images of 0.5 s and 20 of 3 s
    assert found.evaluation_s == 4 * (50 * 0.5 + 20 * 3.0)
    assert found.mean_share == 0.4
    assert report(world_size=1).evaluation_s == 4 * (100 * 0.5 + 40 * 3.0)


def test_the_page_says_what_was_found():
    lines = render(report()).splitlines()
    facts = {line[:21].strip(): line[21:] for line in lines if line[:21].strip()}
    assert facts["lengths"] == "1000 training samples: longest 100 tokens, mean 40; 100 evaluation samples"
    assert facts["memory"] == "peak 1.50 of 6.0 GiB (25%; host, resident)"
    assert facts["estimate"].startswith("70 of A, 30 of B: 4 min 50 s if all")
    assert facts["estimate"].endswith("4 evaluations 5 min 40 s; at the mean length about 7 min 36 s in all")
    assert "generate 4.00 + optimizer 1.00 = 5.00 s" in render(report())


@pytest.mark.parametrize(
    ("strategy", "eval_steps", "total", "epochs", "own", "expected"),
    [
        ("steps", 200, 1000, 1.0, None, 5),
        ("steps", 300, 1000, 1.0, None, 4),  # 300, 600, 900 and the last step
        ("steps", 0.25, 1000, 1.0, None, 4),
        ("no", 200, 1000, 1.0, None, 0),
        ("no", 200, 1000, 1.0, 400, 2),
        ("steps", 400, 1000, 1.0, 200, 5),  # 200, 400, 600, 800, 1000; 400 and 800 in one
        ("epoch", None, 1000, 2.5, None, 3),
    ],
)
def test_number_of_evaluations(strategy, eval_steps, total, epochs, own, expected):
    assert num_evaluations(strategy, eval_steps, total, epochs, own) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (60, "1 min 00 s"), (3599.9, "59 min 59 s"), (7265, "2 h 01 min")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_chosen_samples_are_asked_for_at_the_same_time_of_the_run():
    class Told:
        def __getitem__(self, index: Draw) -> tuple[int, int, float]:
            return int(index), index.epoch, index.progress

    chosen = ChosenSamples(Told(), [7, 2], list(range(10, 20)))
    assert [chosen[Draw(0, 3, 0.5)], chosen[1]] == [(7, 3, 0.5), (2, 0, 0.0)]
    assert (len(chosen), chosen["lengths"]) == (2, [17, 12])


def test_memory_that_ran_out_is_known_from_other_errors():
    class Allocator(torch.OutOfMemoryError):
        pass

    assert is_out_of_memory(Allocator("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
