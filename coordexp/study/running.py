"""Runs the cells of a study: ready ones side by side, each to its end, whatever happens to the others."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError, CoordExpError
from coordexp.files import folder_lock, write_json
from coordexp.metrics.sinks import installed_versions
from coordexp.models.checkpoints import resumable
from coordexp.study.assets import data_files, make_data, make_models
from coordexp.study.evaluating import EvaluationJob, readouts
from coordexp.study.jobs import TrainingJob, training_job
from coordexp.study.plan import Cell, Study
from coordexp.study.processes import ProcessError, Processes
from coordexp.study.records import (
    CELL,
    DONE,
    FAILED,
    TRAINING,
    begin_training,
    checkpoints,
    chosen_checkpoint,
    finish_training,
    process_costs,
    read_record,
    training_numbers,
)

LOCK = ".lock"
EVALUATION_JOB = "evaluation_job.json"
WAITS, READY, CHANGED, BEGUN, BLOCKED = "waits", "to do", "changed", "begun", "blocked"
Say = Callable[[str], object]


def state_of(study: Study, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> str:
    """In a word: done, failed, begun (goes on where it was), changed (is run anew), to do, or waits for others.

    done: `cell.json` of the cells that are done.
    """
    if any(other not in done for other in study.needs(cell)):
        return WAITS
    job, folder = training_job(study, cell, done), study.folder_of(cell)
    training, record = read_record(folder, TRAINING), read_record(folder, CELL)
    if training is None:
        return READY
    if training["identity"] != job.identity:
        return CHANGED
    if record is None or record["identity"] != job.identity:
        return BEGUN
    if record["state"] == FAILED:
        return FAILED
    if job.steps and not checkpoints(folder):
        return BEGUN
    try:
        found = readouts(evaluation_job(study, cell, job))
    except ConfigError:  # the checkpoint that is evaluated is gone
        return BEGUN
    return BEGUN if found is None else DONE


def states(study: Study) -> tuple[dict[Cell, str], dict[Cell, Mapping[str, Any]]]:
    """The state of every cell, in order, and `cell.json` of those that are done."""
    found: dict[Cell, str] = {}
    done: dict[Cell, Mapping[str, Any]] = {}
    for cell in study.cells:
        found[cell] = state_of(study, cell, done)
        if found[cell] == DONE:
            done[cell] = _record(study, cell, done)
    return found, done


def evaluation_job(study: Study, cell: Cell, job: TrainingJob) -> EvaluationJob:
    """How the weights of a cell are evaluated; ConfigError where the checkpoint it names is not there."""
    settings, recipe = study.file.evaluate, study.recipe_of(cell)
    folder = study.folder_of(cell)
    return EvaluationJob(
        checkpoint=str(chosen_checkpoint(folder, recipe.checkpoint) if job.steps else job.start),
        data=str(data_files(study, cell.data).val),
        output=str(folder / "eval"),
        identity=job.identity,
        coord=tuple(
            coord
            for coord in settings.coord
            if recipe.is_evaluated and (recipe.coord is None or coord in recipe.coord)
        ),
        score=tuple(s for s in settings.score if recipe.score is None or s in recipe.score),
        max_new_tokens=recipe.max_new_tokens or settings.max_new_tokens,
        batch_size=settings.batch_size,
        limit=settings.limit,
        cut_prompt=recipe.cut_prompt,
    )


class CellRunner:
    """Takes one cell from what is there to `cell.json`."""

    def __init__(self, study: Study, processes: Processes, jobs: int, say: Say) -> None:
        self.processes = processes
        self._study, self._jobs, self._say = study, jobs, say

    def run(self, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
        """`cell.json`, of a cell that is done or has failed."""
        study, folder = self._study, self._study.folder_of(cell)
        job: TrainingJob | None = None
        try:
            job = training_job(study, cell, done)
            self._train(cell, job)
            evaluation = evaluation_job(study, cell, job)
            if readouts(evaluation) is None:
                self._evaluate(folder, evaluation)
            record = {
                "state": DONE,
                **self._about(cell, job),
                "checkpoint": evaluation.checkpoint,
                "readouts": readouts(evaluation),
                "cost": self._cost(folder, job),
            }
        except (ProcessError, CoordExpError, OSError) as error:
            if self.processes.is_stopped:
                raise  # not the cell's fault: it goes on where it was
            record = {"state": FAILED, **self._about(cell, job), "error": str(error)}
        try:
            write_json(folder / CELL, record)
        except (ConfigError, OSError) as error:
            if record["state"] == DONE:
                record = {**record, "state": FAILED, "error": str(error)}
        return record

    def _train(self, cell: Cell, job: TrainingJob) -> None:
        folder = self._study.folder_of(cell)
        there = read_record(folder, TRAINING)
        is_same = there is not None and there["identity"] == job.identity
        if is_same and there is not None and there["finished"] and (checkpoints(folder) or not job.steps):
            return
        last = resumable(folder) if is_same else None
        begin_training(folder, job.identity, job.made_from, keep=last is not None)
        if job.steps:
            resume = () if last is None else ("--resume_from_checkpoint", str(last))
            at = "" if last is None else f", going on from {last.name}"
            self._say(f"{cell}: training {job.steps} steps{at}")
            note = {"jobs": self._jobs, "from": None if last is None else last.name}
            self.processes.run([*job.command, *resume], folder, "train", note)
        finish_training(folder)

    def _evaluate(self, folder: Path, job: EvaluationJob) -> None:
        write_json(folder / EVALUATION_JOB, asdict(job))
        command = [sys.executable, "-m", "coordexp.study.evaluating", str(folder / EVALUATION_JOB)]
        self.processes.run(command, folder, "evaluate", {"jobs": self._jobs})

    def _about(self, cell: Cell, job: TrainingJob | None) -> dict[str, Any]:
        about = {"cell": asdict(cell), "versions": installed_versions()}
        if job is None:
            return {"identity": None, **about}
        return {"identity": job.identity, "steps": job.steps, "command": shlex.join(job.command), **about}

    def _cost(self, folder: Path, job: TrainingJob) -> dict[str, Any]:
        processes = process_costs(folder)
        numbers = training_numbers(folder) if job.steps else {"train_s": 0.0, "tokens_trained": 0}
        train = processes.get("train", {"wall_s": 0.0, "cpu_s": 0.0, "is_whole": True})
        evaluate = processes.get("evaluate", {"wall_s": 0.0, "cpu_s": 0.0})
        return {
            **numbers,
            "train_wall_s": train["wall_s"],
            "train_cpu_s": train["cpu_s"],
            "train_cpu_share": train.get("cpu_share", 0.0),
            "is_whole": train["is_whole"],
            "evaluate_wall_s": evaluate["wall_s"],
            "evaluate_cpu_s": evaluate["cpu_s"],
        }


def run_study(study: Study, cells: Sequence[Cell], *, jobs: int, threads: int, say: Say) -> dict[Cell, str]:
    """Run these cells and those that they need; returns the state of each.

    jobs: cells at a time.  threads: of each process.
    """
    wanted = with_needs(study, cells)
    with folder_lock(study.folder, LOCK, busy=partial(_refuse, study.folder)) as lock:
        make_data(study, dict.fromkeys(cell.data for cell in wanted), say=say)
        make_models(study, wanted, say=say)
        runner = CellRunner(study, Processes(threads, keep_open=lock), jobs, say)
        return _run_ready(study, wanted, runner, jobs, say)


def with_needs(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """These cells and all that they need, in the study's order."""
    wanted: set[Cell] = set()
    left = list(cells)
    while left:
        cell = left.pop()
        if cell not in wanted:
            wanted.add(cell)
            left += study.needs(cell)
    return [cell for cell in study.cells if cell in wanted]


def _refuse(folder: Path) -> None:
    raise ConfigError(
        f"{folder}: another process runs this study, or a training of one that was killed is not over yet; "
        "wait for it, or give this one its own `output`."
    )


def _run_ready(
    study: Study, wanted: Sequence[Cell], runner: CellRunner, jobs: int, say: Say
) -> dict[Cell, str]:
    states: dict[Cell, str] = {}
    done: dict[Cell, Mapping[str, Any]] = {}
    running: dict[Future[dict[str, Any]], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool, _stopping(runner.processes):
        while len(states) < len(wanted):
            for cell in wanted:
                if cell in states or cell in running.values() or len(running) >= jobs:
                    continue
                needs = study.needs(cell)
                if any(states.get(other) in (FAILED, BLOCKED) for other in needs):
                    states[cell] = BLOCKED
                    say(f"{cell}: not run, {' and '.join(str(o) for o in needs if o not in done)} failed")
                elif all(other in done for other in needs):
                    if _is_done(study, cell, done):
                        states[cell], done[cell] = DONE, _record(study, cell, done)
                        continue
                    running[pool.submit(runner.run, cell, dict(done))] = cell
            if running:
                _collect(running, states, done, len(wanted), say)
    return states


def _is_done(study: Study, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> bool:
    """False too where it cannot be told: running the cell finds out what is wrong, and records it."""
    try:
        return state_of(study, cell, done) == DONE
    except CoordExpError:
        return False


def _collect(
    running: dict[Future[dict[str, Any]], Cell],
    states: dict[Cell, str],
    done: dict[Cell, Mapping[str, Any]],
    total: int,
    say: Say,
) -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        cell, record = running.pop(future), future.result()
        states[cell] = record["state"]
        if record["state"] == DONE:
            done[cell] = record
            seconds = record["cost"]["train_wall_s"] + record["cost"]["evaluate_wall_s"]
            say(f"[{len(states)}/{total}] {cell}: done in {seconds:.0f} s")
        else:
            say(f"[{len(states)}/{total}] {cell}: failed. {record['error']}")


@contextmanager
def _stopping(processes: Processes) -> Iterator[None]:
    """End the processes when the study is interrupted or asked to end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if is_main else None
    try:
        yield
    except BaseException:
        processes.stop()
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _record(study: Study, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
    """`cell.json` of a cell that is done, with the readouts that this study asks for."""
    record = read_record(study.folder_of(cell), CELL)
    if record is None:
        raise ConfigError(f"{study.folder_of(cell)}: {CELL} is gone; run the study again.")
    job = evaluation_job(study, cell, training_job(study, cell, done))
    return {**record, "readouts": readouts(job)}
