"""What a training sample shows when it is drawn: its row, picture and objects at that turn of the run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from coordexp.codec.records import Record
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.augment.pictures import open_checked
from coordexp.data.dataset import RowMaker, images_of, record_in
from coordexp.data.source import SOURCE_COLUMN, SampleSource, naming_sample
from coordexp.swift_bridge.draws import Draw


class Order(Protocol):
    """Which row an index means."""

    @property
    def differs_by_epoch(self) -> bool:
        """Whether an index means another row in another epoch."""
        ...

    def __len__(self) -> int: ...

    def at(self, draw: Draw) -> tuple[int, str]:
        """The row, and a name for the turn at which it is shown: no row is shown twice under one name."""
        ...

    def rows_in(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [len]: the row of every index in an epoch."""
        ...


@dataclass(frozen=True)
class InTurn:
    """The rows one after another.

    multiple_of: the length is filled up to a multiple of this with the first rows.
    """

    num_rows: int
    multiple_of: int = 1
    differs_by_epoch: ClassVar[bool] = False

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple_of) * self.multiple_of

    def at(self, draw: Draw) -> tuple[int, str]:
        again, row = divmod(int(draw), self.num_rows)
        return row, f"{draw.epoch}.{again}"

    def rows_in(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.arange(len(self)) % self.num_rows


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
    part_of: the data set of `custom.fusion` that a row belongs to, which its source then names.
    """

    def __init__(
        self,
        rows: Any,
        *,
        order: Order | None = None,
        augmenter: Augmenter | None = None,
        maker: RowMaker | None = None,
        part_of: Callable[[int], str] | None = None,
    ) -> None:
        self.rows, self._part_of = rows, part_of
        self.order: Order = order or InTurn(len(rows))
        self._augmenter, self._maker = augmenter, maker

    def __len__(self) -> int:
        return len(self.order)

    def row_at(self, index: int) -> Mapping[str, Any]:
        """The row behind an index, without its picture."""
        return self._row(self.order.at(Draw.of(index))[0])

    def __getitem__(self, index: int) -> Shown:
        """Raises RecordError naming file and line: a picture that cannot be read, or has another size by now."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        draw = Draw.of(index)
        at, turn = self.order.at(draw)
        row = self._row(at)
        record = record_in(row)
        with naming_sample(row):
            if self._augmenter is None or self._maker is None:
                pictures = open_checked(record, images_of(row))
                return Shown({**row, "images": pictures}, record, images_of(row))
            augmented = self._augmenter(record, turn=turn, progress=draw.progress)
        changed = {**self._maker.row(augmented.record), SOURCE_COLUMN: row[SOURCE_COLUMN]}
        shown = {**changed, "images": [augmented.picture]}
        return Shown(shown, record_in(changed), (_png(augmented.picture),))

    def _row(self, at: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.rows[at]
        if self._part_of is None:
            return row
        source = replace(SampleSource.of_sample(row), part=self._part_of(at))
        return {**row, SOURCE_COLUMN: source.to_text()}


def _png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()
