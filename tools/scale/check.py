"""Predictions beside real runs that no rate was taken from: CPU seconds of a step, and bytes at its peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale.fit import Measured, measure, predicted_seconds
from scale.memory import step_memory
from scale.rates import Rates
from scale.trial import ROLLOUT_ALIGNED, TWO_CHANNEL, Trial

BOUND = 0.2

CELLS = (
    Trial("batch of 8", steps=6),
    Trial("batch of 16, 12 objects", objects=12, side=96, batch=16, steps=5),
    Trial("10 layers, checkpointing", size={"text_layers": 10}, batch=4, objects=6, checkpointing=True, steps=6),
    Trial("vision frozen, 2 micro-batches", frozen_vision=True, accumulate=2, batch=4, side=128, steps=6),
    Trial("packs of 512, 2 micro-batches", packing_length=512, batch=1, accumulate=2, steps=6),
    Trial("fused head", head="fused", objects=10, side=96, steps=6),
    Trial("two gloo ranks", ranks=2, batch=4, steps=6),
    Trial("two channels, 2 forwards, answers of 64", stage=TWO_CHANNEL, new_tokens=64, forwards=2, steps=8),
    Trial(
        "4 x 2 answers of 96, 4 at once",
        stage=ROLLOUT_ALIGNED, new_tokens=96, answers=2, decode_batch=4, batch=4, steps=5,
    ),
    Trial("packs of answers of 16", stage=ROLLOUT_ALIGNED, packing_length=640, batch=16, new_tokens=16, steps=6),
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One number of one run. unit: s or MB."""

    name: str
    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.measured - 1

    @property
    def holds(self) -> bool:
        return abs(self.error) <= BOUND


def compared(one: Measured, rates: Rates) -> list[Compared]:
    """Time of each kind of step that the run has, and its memory."""
    channels = sorted({step["channel"] for step in one.outcome.steps}, key=str)
    found = []
    for channel in channels:
        what = "CPU s of a step" + (f", channel {channel}" if len(channels) > 1 else "")
        told = predicted_seconds(one, rates, channel)["total"]
        found.append(Compared(one.trial.name, what, told, one.outcome.seconds(None, channel), "s"))
    return [*found, compared_memory(one)]


def compared_memory(one: Measured) -> Compared:
    """Peak of the last step: weights, optimizer states and what torch's allocator gave out beyond them.

    Of two channels the last step is one of them; the larger is what a run must have room for, and what is compared.
    """
    channels = {step["channel"] for step in one.outcome.steps}
    peaks = []
    for channel in channels:
        run = one.run(channel)
        peaks.append(
            step_memory(
                one.shape, run.passes, one.how, head=one.trial.head, graphs=run.graphs, device="cpu"
            ).peak
        )
    outcome = one.outcome
    measured = outcome.weights + outcome.optimizer + outcome.growth
    return Compared(one.trial.name, "MB at the peak of a step", max(peaks) / 1e6, measured / 1e6, "MB")


def run_cells(
    rates: Rates, folder: Path, cells: Sequence[Trial] = CELLS, *, reuse: bool = False
) -> list[Compared]:
    """All cells, one after the other, each printed as it is there."""
    found = []
    for cell in cells:
        rows = compared(measure(cell, folder, reuse=reuse), rates)
        for row in rows:
            print(line(row), flush=True)
        found += rows
    return found


def line(row: Compared) -> str:
    """For the console."""
    digits = 3 if row.unit == "s" else 1
    return (
        f"{row.name:<40} {row.what:<28} predicted {row.predicted:>9.{digits}f}  measured {row.measured:>9.{digits}f}  "
        f"{row.error:>+7.1%}{'' if row.holds else '  MISSED'}"
    )
