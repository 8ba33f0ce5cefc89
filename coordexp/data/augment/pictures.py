"""The picture of a record, with the size that it had when the record was checked."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from coordexp.codec.records import Record
from coordexp.errors import RecordError
from coordexp.pictures import open_picture


def open_checked(record: Record, paths: Sequence[str]) -> list[Image.Image]:
    """All pictures of a record; RecordError when one cannot be read, or the first has another size by now."""
    pictures = [open_picture(path) for path in paths]
    found = pictures[0].size
    if found != (record.width, record.height):
        raise RecordError(
            f"image {paths[0]} is {found[0]} x {found[1]} pixels by now, its record says {record.width} x "
            f"{record.height}. The picture was changed after its file had been checked; write the record anew."
        )
    return pictures
