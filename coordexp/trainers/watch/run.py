"""Everything that watches one process of a run: run.log, signs of life, rules, the end that a rule asks for."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl

from coordexp.config import Sections, mask_secrets
from coordexp.telemetry import run_log
from coordexp.telemetry.life.beats import STOPPED, TRAINED
from coordexp.telemetry.life.keeper import RankLife
from coordexp.trainers.watch.life import TRAINING, LifeOfSteps
from coordexp.trainers.watch.records import RecordWatch
from coordexp.trainers.watch.stop import StopOnRule, StopWhenReached

logger = logging.getLogger(__name__)


class RunWatch:
    """Begins with the trainer. A dry run is not watched: it leaves nothing.

    args: training arguments.  swift: ms-swift's, whose secrets stay out of run.log.
    """

    def __init__(self, args: Any, sections: Sections, variant: str, swift: Mapping[str, Any]) -> None:
        self._telemetry, self._variant = sections.telemetry, variant
        self._life = RankLife(Path(args.output_dir), args.process_index, args.world_size)
        self._stop = StopOnRule(sections.telemetry.stop_on)
        self._goal = StopWhenReached.of_run(sections, variant)
        self._saves = args.save_strategy != "no"
        self._records = RecordWatch(sections.telemetry, variant, None)
        if sections.custom.dry_run is None:
            run_log.open_in(
                args.output_dir,
                command=mask_secrets(shlex.join(sys.argv), swift),
                resumed_from=args.resume_from_checkpoint,
                has_header=args.process_index == 0,
            )
            self._life.start()

    def begin(self, total_steps: int | None, kept: Mapping[str, Any] | None) -> None:
        """The first step is near. total_steps: of the run.  kept: what a checkpoint kept of `state`."""
        self._records = RecordWatch(self._telemetry, self._variant, total_steps)
        self._records.restore(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._records.state()

    @property
    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """Go behind all that decide about saving."""
        return self._stop, LifeOfSteps(self._life)

    def starts_step(self) -> None:
        """A step begins, with asking for its data."""
        self._life.does(TRAINING)

    def was_busy(self, seconds: float | None) -> None:
        """Seconds of a step of the last window in which this rank did not wait for others."""
        if seconds is not None:
            self._life.was_busy(seconds)

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Judge a record, on the main process, and say what is wrong with it."""
        for finding in self._records.look(step, metrics):
            logger.warning(finding.message)
        self._life.judged(finding.to_json() for finding in self._records.findings)

    @property
    def asks_to_stop(self) -> int:
        """What the ranks must hear in the next step's collective; see `RecordWatch`."""
        return self._records.asks_to_stop

    def agree(self, asked: int) -> None:
        """The largest `asks_to_stop` of all ranks."""
        self._stop.agree(asked)

    def evaluated(self, step: int, metrics: Mapping[str, float], control: TrainerControl) -> None:
        """An evaluation is over. metrics: as logged, the same on all ranks."""
        self._goal.look(step, metrics, control, saves=self._saves)

    @property
    def is_stopping(self) -> bool:
        """Whether the run ends after this step, by a rule or since it has reached its goal."""
        return self._stop.rule is not None or self._goal.is_reached

    @contextmanager
    def training(self, step: Callable[[], int]) -> Iterator[None]:
        """Around training. step: how many optimizer steps are done.

        Raises StoppedByRuleError behind it where a rule has ended the run.
        """
        try:
            yield
            self._life.ends(STOPPED if self._stop.rule else TRAINED, self._stop.rule or "")
            self._stop.raise_if_stopped(step())
        except BaseException as error:
            self._life.fails(error)
            raise
