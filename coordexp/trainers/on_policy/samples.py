"""The same few images after every evaluation: the ground truth beside what the model writes, for people to look at.

    sampler.watch(answer)           # every answer of an evaluation; the first ones are kept
    sampler.show(step, numbers)     # console, samples/step_N/, trackers

Only the main process has a sampler. What goes wrong with files is said once and ends the samples, not the run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from coordexp.config.schema.rollout_eval import GenerationSamples
from coordexp.errors import CoordExpError
from coordexp.files import atomic_folder, write_json
from coordexp.trainers.logs.trackers import Tracker
from coordexp.trainers.on_policy.panel import sample_panel
from coordexp.trainers.rollouts.answers import JudgedAnswer
from coordexp.trainers.rollouts.dumps import answer_picture

logger = logging.getLogger(__name__)

SAMPLES_FOLDER = "samples"
ANSWERS_FILE = "answers.json"
CONSOLE_SAMPLES = 2
"""Shown on the console, of those that are written."""


class GenerationSampler:
    """Shows the first answers of each evaluation.

    folder: of all steps; made when it is needed.  trackers: which get the pictures, too.
    """

    def __init__(
        self,
        settings: GenerationSamples,
        folder: Path,
        trackers: Collection[Tracker] = (),
        console: Console | None = None,
    ) -> None:
        self._settings, self._folder, self._trackers = settings, folder, trackers
        self._console = console or Console(stderr=True)
        self._kept: list[JudgedAnswer] = []
        self._is_on = settings.num_images > 0

    @classmethod
    def of_run(cls, trainer: Any, settings: GenerationSamples) -> GenerationSampler | None:
        """None on processes that show nothing."""
        if settings.num_images == 0 or not trainer.is_world_process_zero():
            return None
        folder = Path(trainer.args.output_dir) / SAMPLES_FOLDER
        return cls(settings, folder, trainer.trackers.values())

    def watch(self, answer: JudgedAnswer) -> None:
        """Keep the answer if it is one of the first of this evaluation."""
        if self._is_on and len(self._kept) < self._settings.num_images:
            self._kept.append(answer)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show what was kept, and forget it. numbers: of the evaluation, `rollout/*`."""
        answers, self._kept = self._kept, []
        if not answers:
            return
        if self._settings.console:
            for answer in answers[:CONSOLE_SAMPLES]:
                self._console.print(sample_panel(answer, step))
        try:
            pictures = [_picture(answer) for answer in answers]
            self._write(step, answers, pictures, numbers)
        except (OSError, CoordExpError) as error:
            logger.warning("generation samples: step %d failed (%s); no more are written.", step, error)
            self._is_on = False
            return
        captions = [answer.raw.sample_id for answer in answers]
        for tracker in self._trackers:
            tracker.show(SAMPLES_FOLDER, pictures, captions, step)

    def _write(
        self,
        step: int,
        answers: Sequence[JudgedAnswer],
        pictures: Sequence[Image.Image],
        numbers: Mapping[str, float],
    ) -> None:
        """One folder, which appears whole or not at all; the oldest ones beyond `keep` go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(self._folder / f"step_{step:06d}", replace=True) as unfinished:
            for index, picture in enumerate(pictures):
                picture.save(unfinished / f"sample_{index:02d}.png", "PNG")
            told = {"step": step, "numbers": dict(numbers), "samples": [_told(answer) for answer in answers]}
            write_json(unfinished / ANSWERS_FILE, told, indent=1, sync=False)
        for old in sorted(self._folder.glob("step_*"))[: -self._settings.keep]:
            shutil.rmtree(old, ignore_errors=True)


def _picture(answer: JudgedAnswer) -> Image.Image:
    raw = answer.raw
    source = next(iter(raw.images), None)
    return answer_picture(
        Image.new("RGB", (raw.width, raw.height)) if source is None else source,
        raw.objects,
        answer.parsed.objects,
        answer.match.matched,
    )


def _told(answer: JudgedAnswer) -> dict[str, Any]:
    raw, parsed, match = answer.raw, answer.parsed, answer.match
    return {
        "sample_id": raw.sample_id,
        "image": next((image for image in raw.images if isinstance(image, str)), None),
        "ground_truth": [{"desc": gt.desc, "bins": list(gt.bins)} for gt in raw.objects],
        "answer": parsed.text,
        "predictions": [{"desc": pred.desc, "bins": list(pred.bins)} for pred in parsed.objects],
        "matched": [
            {"prediction": pred, "ground_truth": gt, "mask_iou": round(iou, 4)}
            for (pred, gt), iou in zip(match.matched, match.maskious, strict=True)
        ],
        "dropped": {str(reason): count for reason, count in parsed.dropped_by_reason.items()},
        "finish_reason": answer.rollout.finish_reason,
    }
