"""A YOLO data set (Ultralytics' layout): data.yaml, labels, and the pictures beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from coordexp.codec.descs import canonical_desc
from coordexp.data.check.source import Source
from coordexp.data.formats.exports.folder import (
    boxes_in_picture,
    check_target,
    flat_names,
    objects_by_image,
    one_outline,
    place_picture,
    split_name,
)
from coordexp.errors import RecordError
from coordexp.eval.coco.segmentation import clip_outline
from coordexp.files import atomic_folder, write_text


def export_yolo(
    sources: Sequence[Source],
    output: Path,
    *,
    names: Sequence[str] | None = None,
    polygons: bool = False,
    pictures: str = "link",
) -> Counter[str]:
    """Write the sources as the splits of one YOLO data set; completely or not at all. Returns what was counted.

    names: classes in the order of their numbers; None sorts the descriptions.  polygons: write objects of one outline
    as that outline, the others as boxes.  pictures: see `place_picture`.
    Raises RecordError for a description that `names` does not hold and for a picture that is not there.
    """
    check_target(output, pictures)
    numbers = class_numbers(sources, names)
    counts = Counter(images_written=0, objects_written=0, classes_written=len(numbers))
    splits = {}
    with atomic_folder(output) as folder:
        for source in sources:
            split = split_name(source)
            if split in splits:
                raise RecordError(
                    f"{source.path}: a second {split} set; give every source a split of its own"
                )
            splits[split] = f"images/{split}"
            _write_split(source, split, folder, numbers, polygons, pictures, counts)
        content = {
            "path": ".",
            "train": splits.get("train", next(iter(splits.values()))),
            "val": splits.get("val", splits.get("train", next(iter(splits.values())))),
            **{split: place for split, place in splits.items() if split not in ("train", "val")},
            "names": {number: name for name, number in numbers.items()},
        }
        write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return counts


def class_numbers(sources: Sequence[Source], names: Sequence[str] | None) -> dict[str, int]:
    """Class name -> number; RecordError for a description that `names` does not hold."""
    found = {
        source.dataset.category_names[row]
        for source in sources
        for row in set(source.dataset.category_M.tolist())
    }
    if names is None:
        return {name: number for number, name in enumerate(sorted(found))}
    names = list(map(canonical_desc, names))
    unknown = sorted(found - set(names))
    if unknown:
        raise RecordError(
            f"description {unknown[0]!r} (of {len(unknown)} such) is none of the {len(names)} given classes"
        )
    return {name: number for number, name in enumerate(names)}


def _write_split(
    source: Source,
    split: str,
    folder: Path,
    numbers: dict[str, int],
    polygons: bool,
    pictures: str,
    counts: Counter[str],
) -> None:
    dataset = source.dataset
    boxes = boxes_in_picture(source)
    labels = folder / "labels" / split
    labels.mkdir(parents=True)
    (folder / "images" / split).mkdir(parents=True)
    for row, (name, objects) in enumerate(zip(flat_names(source), objects_by_image(source), strict=True)):
        width, height = dataset.sizes_N2[row].tolist()
        if not width or not height:
            raise RecordError(f"{source.name}: image {source.image_name(row)} has no width and height")
        lines = []
        for m in objects:
            outline = _outline(source, m, width, height) if polygons else None
            x1, y1, x2, y2 = boxes[m].tolist()
            values = outline or [
                (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            ]  # fmt: skip
            number = numbers[dataset.category_names[dataset.category_M[m]]]
            lines.append(" ".join([str(number), *(f"{value:.6f}" for value in values)]) + "\n")
            counts["outlines_written" if outline else "boxes_written"] += 1
        write_text((labels / name).with_suffix(".txt"), "".join(lines), sync=False)
        place_picture(source.pictures[row], folder / "images" / split / name, pictures)
        counts["images_written"] += 1
        counts["objects_written"] += len(lines)


def _outline(source: Source, m: int, width: int, height: int) -> list[float] | None:
    """The one outline of an object in shares of the picture's size, None where it is a box or has several."""
    outline = one_outline(source, m)
    inside = clip_outline(outline, (0, 0), (width, height)) if outline is not None else ()
    return (
        [float(v) for point in inside for v in (point[0] / width, point[1] / height)]
        if len(inside) >= 3
        else None
    )
