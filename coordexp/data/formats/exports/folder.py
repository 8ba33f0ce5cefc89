"""What every export of a folder of pictures shares: where pictures go, under which names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from coordexp.data.check.source import Source
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.segmentation import is_run_length, read_outlines
from coordexp.files import is_file
from coordexp.geometry import FloatArray, xywh_to_xyxy

PICTURES = ("link", "copy", "none")


def flat_names(source: Source, taken: set[str] | None = None) -> list[str]:
    """For every image a file name without folders that no other one has, apart from the suffix too.

    taken: names without suffix that are given away already, and those given now.
    """
    taken = set() if taken is None else taken
    names = []
    for row, given in enumerate(source.dataset.file_names):
        parts = [part for part in PurePosixPath(given.replace("\\", "/")).parts if part.strip("/.")]
        name = PurePosixPath(parts[-1] if parts else f"{row}.jpg")
        stem, number = name.stem, 1
        while stem in taken:
            number += 1
            stem = f"{name.stem}_{number}"
        taken.add(stem)
        names.append(f"{stem}{name.suffix}")
    return names


def check_target(folder: Path, pictures: str) -> None:
    """ConfigError unless `folder` is empty or not there, and `pictures` one of `PICTURES`."""
    if pictures not in PICTURES:
        raise ConfigError(f"pictures is {pictures!r}: expected one of {', '.join(PICTURES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: expected the name of a new folder.")


def place_picture(picture: Path | None, target: Path, pictures: str) -> None:
    """Put a picture at `target`: "link" (a symbolic link), "copy", or "none" for not at all.

    Raises RecordError for a picture that is not there.
    """
    if pictures == "none":
        return
    if picture is None or not is_file(picture):
        raise RecordError(
            f"picture {picture or target.name} is not there; export without pictures (--pictures none)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if pictures == "copy":
        shutil.copyfile(picture, target)
    else:
        target.symlink_to(picture.resolve())


def objects_by_image(source: Source) -> Iterator[list[int]]:
    """The annotations of every image in turn, without crowds and boxes without extent."""
    dataset = source.dataset
    kept = np.flatnonzero(~dataset.crowd_M & (dataset.boxes_xywh_M4[:, 2:] > 0).all(axis=1))
    order = kept[np.argsort(dataset.image_M[kept], kind="stable")]
    starts = np.searchsorted(dataset.image_M[order], np.arange(len(dataset.image_ids) + 1))
    for row in range(len(dataset.image_ids)):
        yield order[starts[row] : starts[row + 1]].tolist()


def boxes_in_picture(source: Source) -> FloatArray:
    """Boxes xyxy in pixels, cut at the border of their picture.  float64 [M, 4]."""
    dataset = source.dataset
    limits = np.tile(dataset.sizes_N2[dataset.image_M], 2).astype(np.float64)
    boxes: FloatArray = np.clip(xywh_to_xyxy(dataset.boxes_xywh_M4), 0, limits)
    return boxes


def one_outline(source: Source, m: int) -> FloatArray | None:
    """The outline of an object that has exactly one, pixels [V, 2]; None for a box, run lengths or several parts."""
    segmentation = source.dataset.segmentations[m]
    if segmentation is None or is_run_length(segmentation):
        return None
    parts = read_outlines(segmentation, f"{source.dataset.place(m)}.segmentation")
    return parts[0] if len(parts) == 1 else None


def split_name(source: Source) -> str:
    """What a source's part of an export is called."""
    return source.split or "train"
