"""Detections on files and folders of pictures: what `coordexp detect` does.

job = DetectJob.prepare(model, pictures, InferSettings(), classes=["car"])
with KeptAnswers.open(folder, job.decisive(), overwrite=False) as kept:
    found = job.run(kept)
found.detections, found.left_out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coordexp.config.schema.rollout import Readout
from coordexp.errors import RecordError
from coordexp.inference.asked_pictures import AskedPicture, asked_pictures
from coordexp.inference.checked_model import CheckedModel
from coordexp.inference.class_names import checked_classes, prompt_for
from coordexp.inference.detect.found_pictures import FoundPicture
from coordexp.inference.detect.kept_answers import KeptAnswers
from coordexp.inference.detections import Detections, detections_of
from coordexp.inference.detector import Detector, decoding_for, settled
from coordexp.inference.fingerprint import file_fingerprint
from coordexp.inference.settings import InferSettings


def _nothing(*_: object) -> None:
    pass


@dataclass
class Found:
    """What became of the pictures.

    detections: of each that could be read, in the order of the pictures.  files: those pictures.
    left_out: (picture, why) of the others.  num_asked: answers of this run; the others were kept.
    """

    detections: list[Detections] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[FoundPicture, str]] = field(default_factory=list)
    num_asked: int = 0

    @property
    def num_cut(self) -> int:
        """Answers that were cut at the limit of their length."""
        return sum(one.truncated for one in self.detections)


@dataclass(frozen=True)
class DetectJob:
    """A checked job; the model is loaded when the first picture has to be asked about.

    checked: the model, with the question that it is asked.
    """

    checked: CheckedModel
    settings: InferSettings
    pictures: Sequence[FoundPicture]
    classes: tuple[str, ...] | None

    @classmethod
    def prepare(
        cls,
        model: Path,
        pictures: Sequence[FoundPicture],
        settings: InferSettings,
        *,
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        readout: Readout | None = None,
        guided: bool | None = None,
    ) -> DetectJob:
        """prompt, classes, readout, guided: as `Detector` takes them.  Raises ConfigError as it does."""
        names = checked_classes(classes)
        checked = CheckedModel.of(model, settings)
        settings = decoding_for(
            settled(settings, checked), checked.asking.form, readout=readout, guided=guided
        )
        question = prompt_for(checked.asking.prompt, prompt, names)
        return cls(
            replace(checked, asking=checked.asking._replace(prompt=question)), settings, pictures, names
        )

    def decisive(self) -> dict[str, Any]:
        """What decides the answers beside the pictures."""
        return self.checked.decisive(self.settings, self.settings.longest_answer)

    def run(
        self,
        kept: KeptAnswers,
        *,
        on_pictures: Callable[[int, int], object] = _nothing,
        on_found: Callable[[Detections], object] = _nothing,
    ) -> Found:
        """Ask about every picture that `kept` holds no answer of.

        on_pictures: called with (pictures just done, pictures in all).
        on_found: called with the detections of each picture, new or kept.
        """
        found, results, total = Found(), dict[int, Detections](), len(self.pictures)
        on_pictures(0, total)

        def done(index: int, picture: AskedPicture, key: str) -> None:
            answer = kept.get(key)
            assert answer is not None
            results[index] = detections_of(picture, *answer, self.classes)
            on_found(results[index])
            on_pictures(1, total)

        with ExitStack() as stack:
            detector: Detector | None = None
            for chunk in self._chunks(kept, found, done, on_left_out=lambda: on_pictures(1, total)):
                if detector is None:
                    detector = stack.enter_context(
                        Detector.load(self.checked.model, self.settings, self.checked)
                    )
                answers = detector.answers(
                    [picture for _, picture, _ in chunk],
                    self.checked.asking.prompt,
                    readout=self.settings.coord,
                    guided=self.settings.guided,
                )
                kept.add([(key, answer) for (_, _, key), answer in zip(chunk, answers, strict=True)])
                found.num_asked += len(chunk)
                for index, picture, key in chunk:
                    done(index, picture, key)
        found.detections = [results[index] for index in sorted(results)]
        found.files = [self.pictures[index].path for index in sorted(results)]
        return found

    def _chunks(
        self, kept: KeptAnswers, found: Found, done: Callable[..., None], *, on_left_out: Callable[[], object]
    ) -> Iterator[list[tuple[int, AskedPicture, str]]]:
        """(index, picture, hash) of those to ask about, as many as are asked at once; others are dealt with."""
        size, room = self.settings.chunk_size, self.checked.room(self.settings.longest_answer)
        waiting: list[tuple[int, AskedPicture, str]] = []
        for start in range(0, len(self.pictures), size):
            looked_at = self.pictures[start : start + size]
            for index, one in enumerate(asked_pictures([(p.name, p.path) for p in looked_at], room), start):
                if isinstance(one, RecordError):
                    found.left_out.append((self.pictures[index], " ".join(str(one).split())))
                    on_left_out()
                    continue
                key = file_fingerprint(self.pictures[index].path)
                if kept.get(key) is not None:
                    done(index, one, key)
                else:
                    waiting.append((index, one, key))
            while len(waiting) >= size:
                yield waiting[:size]
                del waiting[:size]
        if waiting:
            yield waiting
