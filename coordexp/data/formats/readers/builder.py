"""Putting a data set together image by image, for formats that have a file for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from coordexp.codec.descs import canonical_desc
from coordexp.codec.schema import is_blank
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import MAX_SIDE, Dataset
from coordexp.eval.coco.fields import MAX_COORDINATE, Id, is_writable, shown
from coordexp.geometry import FloatArray


class Faults:
    """What to do about an entry that cannot be read: stop (the default), or keep its message and go on without it."""

    def __init__(self, *, collect: bool = False) -> None:
        self._collect = collect
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Raises RecordError unless faults are collected."""
        if not self._collect:
            raise RecordError(message)
        self.messages.append(message)


class Places(Sequence[str]):
    """What messages call the objects of a data set: the file of their image and their number in it."""

    def __init__(
        self, files: Sequence[str], image_M: Sequence[int], number_M: Sequence[int], between: str
    ) -> None:
        self._files, self._image_M, self._number_M, self._between = files, image_M, number_M, between

    def __len__(self) -> int:
        return len(self._image_M)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return f"{self._files[self._image_M[index]]}{self._between}{self._number_M[index]}"


class DatasetBuilder:
    """Images and objects in the order they are added.

    between: what stands between an image's annotation file and an object's number in messages (":" for lines).
    """

    def __init__(self, between: str = ": object ") -> None:
        self._between = between
        self._names: list[str] = []
        self._files: list[str] = []
        self._ids: list[Id] = []
        self._sizes: list[tuple[int, int]] = []
        self._categories: dict[str, int] = {}
        self._objects: list[tuple[int, int, int]] = []
        self._boxes: list[Sequence[float]] = []
        self._segmentations: list[Any] = []
        self._crowd: list[bool] = []

    def add_image(self, name: str, width: int, height: int, *, file: str, image_id: Id | None = None) -> int:
        """Returns the image's row. width, height: 0 where they are not known.  file: of its annotations."""
        if not (0 <= width <= MAX_SIDE and 0 <= height <= MAX_SIDE):
            raise RecordError(
                f"{file}: the image has {width} x {height} pixels: expected at most {MAX_SIDE} a side"
            )
        self._names.append(name)
        self._files.append(file)
        self._sizes.append((width, height))
        self._ids.append(len(self._names) if image_id is None else image_id)
        return len(self._names) - 1

    def add_category(self, name: str) -> int:
        """Its row; categories come in the order they are named first, and one name in two Unicode forms is one."""
        return self._categories.setdefault(canonical_desc(name), len(self._categories))

    def add_object(
        self,
        image: int,
        name: str,
        box_xyxy: Sequence[float],
        number: int,
        *,
        outlines: Sequence[Sequence[float]] | None = None,
        crowd: bool = False,
    ) -> None:
        """An object with its box in pixels. number: of the object in its file.  outlines: flat, one per part.

        Raises RecordError naming the object for a name that is empty, and a box that is not finite or swapped.
        """
        place = f"{self._files[image]}{self._between}{number}"
        if is_blank(name) or not is_writable(name):
            raise RecordError(f"{place} has the name {shown(name)}: expected the name of a class")
        if not np.isfinite(box_xyxy).all() or np.abs(box_xyxy).max() > MAX_COORDINATE:
            raise RecordError(f"{place} has the box {shown(list(box_xyxy))}: expected finite pixel values")
        x1, y1, x2, y2 = box_xyxy
        if x2 < x1 or y2 < y1:
            raise RecordError(
                f"{place} has the box {shown(list(box_xyxy))}: expected x1 <= x2 and y1 <= y2. Are its corners swapped?"
            )
        self._objects.append((image, self.add_category(name), number))
        self._boxes.append(box_xyxy)
        self._segmentations.append([list(part) for part in outlines] if outlines else None)
        self._crowd.append(crowd)

    def build(self) -> Dataset:
        """The data set so far."""
        columns = np.array(self._objects, dtype=np.int64).reshape(-1, 3)
        boxes: FloatArray = np.array(self._boxes, dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        names = list(self._categories)
        return Dataset(
            prefix="",
            image_ids=list(self._ids),
            file_names=self._names,
            sizes_N2=np.array(self._sizes, dtype=np.int64).reshape(-1, 2),
            category_ids=list(range(1, len(names) + 1)),
            category_names=names,
            annotation_ids=list(range(1, len(columns) + 1)),
            image_M=columns[:, 0],
            category_M=columns[:, 1],
            boxes_xywh_M4=boxes,
            area_M=boxes[:, 2] * boxes[:, 3],
            crowd_M=np.array(self._crowd, dtype=bool),
            segmentations=self._segmentations,
            images=[{}] * len(self._names),
            categories=[{"name": name} for name in names],
            places=Places(self._files, columns[:, 0].tolist(), columns[:, 2].tolist(), self._between),
        )
