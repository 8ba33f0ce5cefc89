"""Monitor dumps: what the model was asked, what it wrote and what it is taught, for people to look at.

    dumps = MonitorDumps(settings.rollout_matching.monitor_dump, run_dir / "monitor_dumps")
    if dumps.wants(step):
        dumps.submit(step, samples)      # returns at once
    dumps.close()

One folder per step, which appears whole or not at all: for every sample a `.json`, a readable `.md`, an `.html` with
each token coloured by its role, and a `.png` with ground truth and predictions drawn. One thread writes; when it
cannot keep up, dumps are left out and counted. Nothing that goes wrong here reaches training: it is said once, and the
dumps are off.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from coordexp.config.schema.rollout import MonitorDump
from coordexp.files import atomic_folder, write_json, write_text
from coordexp.telemetry.dump_pages import DumpSample, as_html, as_markdown, dump_record

__all__ = ["DumpSample", "MonitorDumps"]

logger = logging.getLogger(__name__)

QUEUE_SIZE = 4
"""Dumps that may wait to be written."""


class MonitorDumps:
    """Writes the dumps of a run. Only the main process makes one.

    Folders that an earlier start of the same run left in `out_dir` count towards `max_events`.
    logging_steps: optimizer steps between dumps where `every_steps` is null.
    """

    def __init__(self, settings: MonitorDump, out_dir: str | Path, *, logging_steps: int = 1) -> None:
        self.settings = settings
        self._every_steps = settings.every_steps or logging_steps
        self.out_dir = Path(out_dir)
        self.num_left_out = 0
        """Dumps that found the queue full."""
        self._is_on = settings.enabled
        self._num_handed_over = len(list(self.out_dir.glob("step_*"))) if settings.enabled else 0
        self._num_skipped = 0  # changed by the writing thread alone, as _num_handed_over is not
        self._queue: queue.Queue[tuple[int, tuple[DumpSample, ...]] | None] = queue.Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None

    def wants(self, step: int) -> bool:
        """Whether to build samples for optimizer step `step`: it is one to dump, and dumps are on and not used up."""
        due = step % self._every_steps == 0
        return due and self._is_on and self._num_handed_over - self._num_skipped < self.settings.max_events

    def submit(self, step: int, samples: Sequence[DumpSample]) -> None:
        """Hand the samples (at most `max_samples` of them) to the writing thread. Never blocks, never raises."""
        if not samples or not self.wants(step):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="monitor-dumps", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((step, tuple(samples[: self.settings.max_samples])))
            self._num_handed_over += 1
        except queue.Full:
            self.num_left_out += 1

    def close(self, timeout_s: float = 30.0) -> None:
        """Wait for what was handed over, at most `timeout_s`; say how many dumps were left out."""
        self._is_on = False
        if self.num_left_out:
            logger.warning(
                "monitor dumps: %d left out, as writing one takes longer than the steps between.",
                self.num_left_out,
            )
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):  # then the thread is still writing, which is said below
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("monitor dumps: not all were written within %g s; the rest is lost.", timeout_s)

    def _write_all(self) -> None:
        """The writing thread: until `close`, or until something goes wrong."""
        while (event := self._queue.get()) is not None:
            try:
                self._write(*event)
            except Exception:
                logger.warning("monitor dumps: step %d failed, no more are written.", event[0], exc_info=True)
                self._is_on = False
                return

    def _write(self, step: int, samples: Sequence[DumpSample]) -> None:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not self._has_room():
            self._num_skipped += 1
            return
        folder = self.out_dir / f"step_{step:06d}"
        with atomic_folder(
            folder, replace=True
        ) as unfinished:  # one is there when a run was resumed from before it
            for index, sample in enumerate(samples):
                self._write_sample(unfinished, f"sample_{index:02d}", step, sample)

    def _has_room(self) -> bool:
        """Whether the disk has `min_free_gb`; the first time it has not, say so."""
        free_gb = shutil.disk_usage(self.out_dir).free / 1e9
        if free_gb >= self.settings.min_free_gb:
            return True
        if not self._num_skipped:
            logger.warning(
                "monitor dumps: %s has %.1f GB free, less than min_free_gb = %g; dumps are skipped until it has more.",
                self.out_dir,
                free_gb,
                self.settings.min_free_gb,
            )
        return False

    def _write_sample(self, folder: Path, name: str, step: int, sample: DumpSample) -> None:
        limit = self.settings.max_text_chars
        record = dump_record(sample, step, limit)
        markdown = as_markdown(record, name, has_picture=sample.draw is not None)
        write_json(folder / f"{name}.json", record, indent=1, sync=False)
        write_text(folder / f"{name}.md", markdown, sync=False)
        write_text(folder / f"{name}.html", as_html(record, sample.target_tokens, limit), sync=False)
        if sample.draw is not None:
            sample.draw().save(folder / f"{name}.png", "PNG")
