"""Runs the stages of a file in order: train, hold against the criteria, prove the best checkpoint, go on or stop.

Everything is decided anew from the files of the stages' folders, so that a runner can be killed at any moment: a stage
that came to its end is not trained again, one that did not goes on from its last whole checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coordexp.config import load_run_config
from coordexp.control.acceptance import Criterion, Outcome, at_step, judge, outcome
from coordexp.errors import EXIT_FAILURE, ConfigError, CoordExpError
from coordexp.files import folder_lock, log_tail, read_json
from coordexp.models.checkpoints import (
    base_of,
    checkpoints_of,
    is_whole,
    last_whole,
    mend_best_link,
    resumable,
    step_of,
)
from coordexp.stages import processes, state
from coordexp.stages.plan import PlannedStage, StagePlan, start_words
from coordexp.stages.series import series_of
from coordexp.stages.verify import REPORT, keeps_best, read_resolved, settles, verify_best

LOCK = ".coordexp_run.lock"
Say = Callable[[str], object]
Watch = Callable[[PlannedStage], object]
Train = Callable[..., int]


class StageError(CoordExpError):
    """The training of a stage ended with an error. exit_code: that of the training."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class StageRunner:
    """Runs a plan.

    say: told of everything that happens.  watch: called every second while a stage trains.
    train: trains a run file, by the arguments of `processes.train`.
    environment: variables of all trainings, for where this process has none.
    replaces: a stage whose folder was made from something else is forgotten and run anew, instead of refused.
    """

    plan: StagePlan
    say: Say
    watch: Watch | None = None
    train: Train = processes.train
    environment: Mapping[str, str] = field(default_factory=dict)
    replaces: bool = False
    _verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, *, anew_from: str | None = None) -> dict[str, Any]:
        """The verdict on all stages, as it is written too.

        anew_from: this stage and those after it are forgotten and run anew.

        Raises:
            StageError: the training of a stage failed.
            ConfigError: the folder of a stage was made from something else.
        """
        with folder_lock(self.plan.output, LOCK, busy=self._say_busy) as lock:
            if anew_from is not None:
                for stage in self.plan.stages[self.plan.index(anew_from) :]:
                    self._forget(stage)
            for stage in self.plan.stages:
                verdict = self._verdicts[stage.name] = self._run_stage(stage, lock)
                state.write_verdict(stage.output, verdict)
                if not verdict["accepted"]:
                    break
            overall = self._overall()
            state.write_verdict(self.plan.output, overall)
            return overall

    def _say_busy(self) -> None:
        self.say(
            f"{self.plan.output}: another runner, or the training of one that was ended, works here; waiting for it"
        )

    def _overall(self) -> dict[str, Any]:
        stages = [
            self._verdicts.get(stage.name, {"stage": stage.name, "outcome": state.NOT_RUN, "accepted": False})
            for stage in self.plan.stages
        ]
        return {
            "stages_file": str(self.plan.path),
            "accepted": all(one["accepted"] for one in stages),
            "stages": stages,
        }

    def _run_stage(self, stage: PlannedStage, lock: int) -> dict[str, Any]:
        start = self._start_of(stage)
        words = [*stage.words, *([] if start is None else start_words(stage, str(start), base_of(start)))]
        wanted = state.made_from(stage, start, load_run_config(stage.run, words))
        differing = state.differences(stage, wanted)
        if differing and self.replaces:
            self.say(f"{stage.name}: made anew, its {', '.join(differing)} changed")
            self._forget(stage)
        elif differing:
            raise ConfigError(
                f"{stage.output}: stage {stage.name} was made from other {' and '.join(differing)}. Take that back, or "
                f"run it and what follows anew: coordexp run {self.plan.path} --anew-from {stage.name}"
            )
        if state.is_trained(stage, state.payloads_of(stage)):
            self.say(f"{stage.name}: trained already")
        else:
            self._train(stage, words, wanted, lock)
        return self._judged(stage, lock)

    def _start_of(self, stage: PlannedStage) -> Path | None:
        """The checkpoint that a stage starts from; None for the model of its run file."""
        if stage.start is None:
            return None
        name, which = stage.start
        verdict = self._verdicts[name]
        if verdict["outcome"] == Outcome.BACK_TO_BEST:
            which = "best"
        folder = self.plan.stages[self.plan.index(name)].output
        checkpoint = folder / str(verdict[which] if which in ("best", "last") else which)
        if not is_whole(checkpoint):
            text = f"stage {stage.name} starts from the checkpoint `{which}` of stage {name}, which is not there."
            raise StageError(text, EXIT_FAILURE)
        return checkpoint

    def _train(self, stage: PlannedStage, words: list[str], wanted: Mapping[str, Any], lock: int) -> None:
        checkpoint = resumable(stage.output)
        if checkpoint is None:
            if stage.output.is_dir():  # an attempt that has saved nothing to go on from
                self._forget(stage)
            state.write_stamp(stage, wanted)
        else:
            for broken in (path for path in checkpoints_of(stage.output) if not is_whole(path)):
                shutil.rmtree(broken)
            words = [*words, "--resume_from_checkpoint", str(checkpoint)]
        goes_on = "" if checkpoint is None else f", from {checkpoint.name} on"
        self.say(f"{stage.name}: coordexp train {stage.run} {' '.join(words)}")
        self.say(f"{stage.name}: training{goes_on} (log: {stage.log})")
        watch = None if self.watch is None else partial(self.watch, stage)
        code = self.train(stage.run, words, stage.log, lock=lock, watch=watch, environment=self.environment)
        if code != 0:
            self.say(log_tail(stage.log, 15))
            raise StageError(
                f"the training of stage {stage.name} ended with exit status {code}; its log: {stage.log}",
                code if code > 0 else EXIT_FAILURE,
            )
        state.note_end(stage)

    def _judged(self, stage: PlannedStage, lock: int) -> dict[str, Any]:
        """The verdict on a stage that is trained."""
        payloads = state.payloads_of(stage)
        best, last = mend_best_link(stage.output), last_whole(stage.output)
        judgements = [
            judge(one, series_of(payloads, one.metric), self._reference(stage, one)) for one in stage.criteria
        ]
        found = outcome(judgements)
        for one in judgements:
            said = "met" if one.passed else f"NOT met ({one.criterion.on_fail})"
            self.say(f"{stage.name}: {one.criterion}: {said}: {one.reason}")
        if found is Outcome.BACK_TO_BEST and best is None:
            self.say(f"{stage.name}: there is no best checkpoint to go back to")
            found = Outcome.REFUSED
        verified = self._verified(stage, best, lock)
        if verified is not None and not verified["passed"]:
            found = Outcome.REFUSED
        self.say(f"{stage.name}: {found}")
        return state.stage_verdict(
            stage,
            found,
            judgements,
            last_step=max((payload["global_step"] for payload in payloads), default=0),
            best=None if best is None else best.name,
            last=None if last is None else last.name,
            verified=verified,
        )

    def _reference(self, stage: PlannedStage, criterion: Criterion) -> tuple[int, float] | None:
        """Step and number that a criterion compares with, as the stage that it names logged them."""
        wanted = criterion.of
        if wanted is None:
            return None
        source = stage if wanted.stage is None else self.plan.stages[self.plan.index(wanted.stage)]
        series = series_of(state.payloads_of(source), wanted.metric)
        if wanted.at == "last":
            return at_step(series)
        best = mend_best_link(source.output)
        return None if best is None else at_step(series, step_of(best))

    def _verified(self, stage: PlannedStage, best: Path | None, lock: int) -> dict[str, Any] | None:
        """What `verify-best` says of a stage, also if it was said before; None without a best checkpoint."""
        if not self.plan.verify_best or best is None or not keeps_best(read_resolved(stage.output)):
            return None
        report = stage.output / REPORT
        if report.is_file():
            known: dict[str, Any] = read_json(report)
            if settles(known, best.name):
                return known
        self.say(f"{stage.name}: {best.name} is loaded and scored again")
        verdict = verify_best(stage.output, lock=lock, environment=self.environment)
        for fault in verdict.faults:
            self.say(f"{stage.name}: {fault}")
        return verdict.to_json()

    def _forget(self, stage: PlannedStage) -> None:
        """Remove the folder of a stage, where a runner made it."""
        if not stage.output.is_dir():
            return
        if not (stage.output / state.STAMP).is_file():
            state.differences(stage, {})  # refuses a folder that is not ours
        retired = stage.output.with_name(f".{stage.name}.removed")
        shutil.rmtree(retired, ignore_errors=True)
        stage.output.rename(retired)  # at once: a half-removed folder would pass for a stage
        shutil.rmtree(retired)
