"""The report of a dry run, for the console."""

from __future__ import annotations

from collections.abc import Iterator

from coordexp.trainers.dry_run.memory import MemoryUse
from coordexp.trainers.dry_run.parts import DryRunReport, StepReport

_WIDTH = 21


def render(report: DryRunReport) -> str:
    """Plain text, one fact a line."""
    return "\n".join(f"{name:<{_WIDTH}}{text}" for name, text in _lines(report))


def _lines(report: DryRunReport) -> Iterator[tuple[str, str]]:
    shape, train = report.shape, report.shape.train
    yield "dry run", f"{shape.variant} on {shape.world_size} rank(s); nothing of it is kept"
    yield (
        "lengths",
        f"{train.num_samples} training samples: longest {train.longest} tokens, mean {train.mean:.0f}; "
        f"{shape.num_eval_samples} evaluation samples",
    )
    for step in report.steps:
        yield f"step {step.name}", _step(step)
        yield "", f"{_parts(step)} = {step.total_s:.2f} s; peak {_gib(step.memory)}"
    if report.evaluation is not None:
        found = report.evaluation
        kinds = [
            f"{what} {seconds:.2f} s"
            for what, seconds in (("teacher-forced", found.teacher_s), ("by answers", found.rollout_s))
            if seconds
        ]
        yield (
            "evaluation",
            f"{found.images} images on this rank: {', '.join(kinds)}; peak {_gib(found.memory)}",
        )
    else:
        yield "evaluation", "the run has none"
    yield "memory", _memory(report.peak)
    yield "estimate", _estimate(report)
    for note in report.notes:
        yield "note", note
    yield "sample", report.sample_id
    for line in report.sample.splitlines():
        yield "", line


def _step(step: StepReport) -> str:
    return (
        f"{step.num_samples} of the longest samples in {step.num_forwards} forward(s) of up to {step.longest} tokens "
        f"({step.num_tokens} with padding, {step.num_rows} supervised)"
    )


def _parts(step: StepReport) -> str:
    return " + ".join(f"{name} {seconds:.2f}" for name, seconds in step.seconds.items())


def _gib(memory: MemoryUse) -> str:
    return f"{memory.peak_gib:.2f} GiB"


def _memory(peak: MemoryUse) -> str:
    share = peak.peak_gib / peak.total_gib if peak.total_gib else 0.0
    return f"peak {peak.peak_gib:.2f} of {peak.total_gib:.1f} GiB ({share:.0%}; {peak.where})"


def _estimate(report: DryRunReport) -> str:
    steps = ", ".join(f"{number} of {name}" for name, number in report.shape.steps.items())
    mean = report.training_s * report.mean_share + report.evaluation_s
    return (
        f"{steps}: {duration(report.training_s)} if all were as long as these first ones, and "
        f"{report.shape.num_evaluations} evaluations {duration(report.evaluation_s)}; at the mean length about "
        f"{duration(mean)} in all"
    )


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 12.3 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s" if seconds >= 60 else f"{seconds:.1f} s"
