"""What a training sample shows when it is drawn: its row, picture and objects at that turn of the run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from coordexp.codec.records import Record
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.augment.pictures import open_checked
from coordexp.data.dataset import RowMaker, images_of, record_in
from coordexp.data.source import naming_sample
from coordexp.swift_bridge.draws import Draw


class Order(Protocol):
    """Which row an index means."""

    def __len__(self) -> int: ...

    def at(self, draw: Draw) -> tuple[int, str]:
        """The row, and a name for the turn at which it is shown: no row is shown twice under one name."""
        ...


@dataclass(frozen=True)
class InTurn:
    """The rows one after another.

    multiple_of: the length is filled up to a multiple of this with the first rows.
    """

    num_rows: int
    multiple_of: int = 1

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple_of) * self.multiple_of

    def at(self, draw: Draw) -> tuple[int, str]:
        again, row = divmod(int(draw), self.num_rows)
        return row, f"{draw.epoch}.{again}"


@dataclass(frozen=True)
class Shown:
    """row: messages, pictures and source, as a template encodes them.  record: objects in the order they are taught.

    images: what a rollout is given: paths, or the bytes of files where pictures were changed.
    """

    row: Mapping[str, Any]
    record: Record
    images: tuple[str | bytes, ...]


class ShownRows:
    """Rows of `RowMaker`, with their pictures, as they are shown when they are drawn.

    order: None for the rows in turn.  augmenter: changes what is shown; it needs `maker`, which makes rows of records.
    """

    def __init__(
        self,
        rows: Any,
        *,
        order: Order | None = None,
        augmenter: Augmenter | None = None,
        maker: RowMaker | None = None,
    ) -> None:
        self.rows = rows
        self.order: Order = order or InTurn(len(rows))
        self._augmenter, self._maker = augmenter, maker

    def __len__(self) -> int:
        return len(self.order)

    def row_at(self, index: int) -> Mapping[str, Any]:
        """The row behind an index, without its picture."""
        found: Mapping[str, Any] = self.rows[self.order.at(Draw.of(index))[0]]
        return found

    def __getitem__(self, index: int) -> Shown:
        """Raises RecordError naming file and line: a picture that cannot be read, or has another size by now."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        draw = Draw.of(index)
        at, turn = self.order.at(draw)
        row = self.rows[at]
        record = record_in(row)
        with naming_sample(row):
            if self._augmenter is None or self._maker is None:
                pictures = open_checked(record, images_of(row))
                return Shown({**row, "images": pictures}, record, images_of(row))
            augmented = self._augmenter(record, turn=turn, progress=draw.progress)
        changed = self._maker.row(augmented.record)
        shown = {**changed, "images": [augmented.picture]}
        return Shown(shown, record_in(changed), (_png(augmented.picture),))


def _png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()
