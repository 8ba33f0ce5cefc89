"""Pictures that cannot be asked about: found before they are, and named.

What headers tell is looked at for all records before a model is loaded; whole pictures are decoded just before they
are asked about, so that one that is broken inside does not stop a batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordexp.codec.records import Record, check_images
from coordexp.errors import RecordError
from coordexp.inference.picture_room import PictureRoom
from coordexp.pictures import open_picture

BAD_IMAGES = ("error", "skip")
MAX_NAMED = 1000
"""Pictures that one message names."""


@dataclass(frozen=True)
class PictureCheck:
    """Which of these records' pictures cannot be used.

    header_faults: what their headers tell, by index of the record.
    skip: whether such records are left out; otherwise they are an error.
    """

    records: Sequence[Record]
    header_faults: Mapping[int, str]
    skip: bool

    @classmethod
    def of(cls, records: Sequence[Record], room: PictureRoom, *, skip: bool) -> PictureCheck:
        """Looks at the headers of all pictures.

        Raises RecordError naming all that are missing, no pictures, of another size than their record says, or do not
        fit the model; unless they are left out.
        """
        found = {
            index: fault for index, record in enumerate(records) if (fault := _header_fault(record, room))
        }
        if found and not skip:
            raise RecordError(_named(list(found.values())))
        return cls(records, found, skip)

    def __call__(self, start: int, stop: int) -> list[str | None]:
        """Why each of the records from `start` up to, not including, `stop` cannot be used; None where it can.

        Raises RecordError naming all bad pictures from `start` on, unless they are left out.
        """
        faults = self._decoded(start, stop)
        if not self.skip and any(faults):
            every = [fault for fault in self._decoded(start, len(self.records)) if fault]
            kept = f"The {start} answers so far are kept: mend the pictures and start the same command again."
            raise RecordError(f"{_named(every)}\n{kept}")
        return faults

    def _decoded(self, start: int, stop: int) -> list[str | None]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._fault, range(start, stop)))

    def _fault(self, index: int) -> str | None:
        if index in self.header_faults:
            return self.header_faults[index]
        record = self.records[index]
        try:
            for path in record.image_paths():
                open_picture(path)
        except RecordError as error:
            return f"{record.file}:{record.line}: {error}"
        return None


def _header_fault(record: Record, room: PictureRoom) -> str | None:
    try:
        check_images(record)
        room.check(record)
    except RecordError as error:
        return str(error)
    return None


def _named(faults: Sequence[str]) -> str:
    """One message for all of them: a line each."""
    if len(faults) == 1:
        return f"{faults[0].rstrip('.')}. (--bad-images skip leaves such a picture out and records it.)"
    shown = [f"  {fault}" for fault in faults[:MAX_NAMED]]
    if len(faults) > MAX_NAMED:
        shown.append(f"  and {len(faults) - MAX_NAMED} more")
    head = (
        f"{len(faults)} records have unusable pictures (--bad-images skip leaves them out and records them):"
    )
    return "\n".join([head, *shown])
