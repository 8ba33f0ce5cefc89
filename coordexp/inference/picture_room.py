"""Whether a record's pictures fit the model, told from their sizes alone before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coordexp.codec.records import Record
from coordexp.errors import RecordError
from coordexp.image_size import PixelLimits
from coordexp.pictures import picture_facts


@dataclass(frozen=True)
class PictureRoom:
    """How pictures are scaled, and how many visual tokens a record may have.

    setting: what leaves room for no more than `most_tokens`, for messages.
    """

    limits: PixelLimits
    most_tokens: int
    setting: str

    def check(self, record: Record) -> None:
        """RecordError with file and line for pictures that do not fit: their sizes, and the cap that would do."""
        sizes = list(_sizes(record))
        total = sum(self.limits.num_tokens(*size) for size in sizes)
        if total <= self.most_tokens:
            return
        shown = [
            f"{name} of {width} x {height} pixels"
            for name, (width, height) in zip(record.images, sizes, strict=True)
        ]
        where = "" if record.file is None else f"{record.file}:{record.line}: "
        raise RecordError(
            f"{where}{', '.join(shown)}: {total} visual tokens, but {self.setting} leaves room "
            f"for {max(self.most_tokens, 0)}; {self._what_to_do(len(sizes))}"
        )

    def _what_to_do(self, num_images: int) -> str:
        cap = self.limits.cap_for(max(self.most_tokens, 0) // num_images)
        if cap is None:
            return "no --max-pixels that the processor takes makes it fit; allow shorter answers or a longer prompt"
        return f"--max-pixels {cap} or less makes it fit"


def _sizes(record: Record) -> Iterator[tuple[int, int]]:
    """(width, height) of each picture; the record says it of the first."""
    yield record.width, record.height
    for path in record.image_paths()[1:]:
        facts = picture_facts(path)
        yield facts.width, facts.height
