"""COCO annotation files to the package's JSONL: sorted, in bins, with everything that was changed or left out counted.

    counts = import_coco(Path("instances_val2017.json"), Path("data/val.jsonl"), ImportOptions())

A COCO box reaches to the right edge of its last pixel (x + width <= image width), while the last bin stands for the
last pixel centre, width - 1: corners beyond it are clamped and counted. All other corners keep within half a bin.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from coordexp.codec.records import order_objects
from coordexp.codec.schema import KIND_BBOX, KIND_POLY, BoxObject
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.external import naming
from coordexp.files import read_json, write_jsonl
from coordexp.geometry import MAX_BIN, quantize_boxes, quantize_points

MISSING_IMAGES = ("error", "skip", "keep")
OVER_MAX = ("drop-image", "keep-largest")

COUNTS = (
    "images_read",
    "images_written",
    "images_without_objects",
    "annotations_read",
    "objects_written",
    "crowd_left_out",
    "degenerate_left_out",  # no width or height, or wholly outside the image
    "boxes_widened",  # a side that collapsed to nothing in bins got one bin
    "boxes_clamped",  # reach past the first or last pixel centre
)
"""What is always counted; further counts appear where they are not 0."""

Describe = Callable[[Mapping[str, Any], int], str]
"""(category, annotation id) -> description of the object."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to take over.

    image_root: folder that file names start from; None leaves the names relative to the JSONL file and unchecked.
    missing: what to do about an image file that is not there (only with `image_root`).
    polygons: write objects of one outline as `poly`; others (several parts, run lengths) stay boxes.
    max_poly_points: outlines with more points stay boxes, None for no limit.
    max_objects: of an image, None for no limit; over_max: images with more are left out, because labels that are cut
    short teach a model to stop early ("drop-image"), or keep their largest objects ("keep-largest").
    drop_empty: leave out images without objects.
    dataset: name to keep as `metadata.dataset`, None for none.
    """

    image_root: Path | None = None
    missing: str = "error"
    polygons: bool = False
    max_poly_points: int | None = None
    max_objects: int | None = None
    over_max: str = "drop-image"
    drop_empty: bool = False
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.missing not in MISSING_IMAGES:
            raise ConfigError(f"missing is {self.missing!r}: expected one of {', '.join(MISSING_IMAGES)}")
        if self.over_max not in OVER_MAX:
            raise ConfigError(f"over_max is {self.over_max!r}: expected one of {', '.join(OVER_MAX)}")
        if self.image_root is not None and not self.image_root.is_dir():
            raise ConfigError(f"{self.image_root} is no folder: expected the one that holds the images.")


def import_coco(annotations: Path, output: Path, options: ImportOptions) -> Counter[str]:
    """Convert a COCO annotation file; writes `output` completely or not at all and returns what was counted.

    Raises RecordError naming file and entry for an annotation file that cannot be read as COCO, and for a missing
    image unless `options.missing` says otherwise.
    """
    source = read_annotations(annotations)
    with naming(annotations):
        lines, counts = convert(source, output.parent, options, describe=_category_name, file_name=_file_name)
    write_jsonl(output, lines)
    return counts


def convert(
    source: Mapping[str, Any],
    folder: Path,
    options: ImportOptions,
    *,
    describe: Describe,
    file_name: Callable[[Mapping[str, Any]], str],
    metadata: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The records of a file of COCO's shape (from `read_annotations`), and what was counted.

    folder: of the JSONL file, which image paths are relative to.  describe: the text of an object.  file_name: of an
    image entry.  metadata: of an image entry, to be kept beside its `image_id` and `file_name`.
    """
    categories = {category["id"]: category for category in source["categories"]}
    by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in source["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    counts = Counter(dict.fromkeys(COUNTS, 0))
    counts.update(images_read=len(source["images"]), annotations_read=len(source["annotations"]))
    lines = []
    for image in source["images"]:
        name = file_name(image)
        path = _image_path(name, image, folder, options, counts)
        if path is None:
            counts["objects_of_missing_images"] += len(by_image[image["id"]])
            continue
        found = [
            (describe(categories[annotation["category_id"]], annotation["id"]), annotation)
            for annotation in by_image[image["id"]]
        ]
        objects = _image_objects(found, image["width"], image["height"], options, counts)
        if objects is None or (options.drop_empty and not objects):
            counts["images_over_max_objects" if objects is None else "images_empty_left_out"] += 1
            continue
        extra = metadata(image) if metadata is not None else {}
        if options.dataset is not None:
            extra["dataset"] = options.dataset
        lines.append(
            {
                "images": [path],
                "width": image["width"],
                "height": image["height"],
                "objects": [{"desc": obj.desc, obj.kind: list(obj.bins)} for obj in objects],
                "metadata": {"image_id": image["id"], "file_name": name, **extra},
            }
        )
        counts["images_without_objects"] += not objects
        counts["objects_written"] += len(objects)
    if not lines:
        left_out = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
        raise RecordError(f"no image is left to write ({left_out})")
    counts["images_written"] = len(lines)
    return lines, counts


def read_annotations(path: Path) -> dict[str, Any]:
    """A COCO or LVIS annotation file; RecordError naming file and entry when the parts do not fit together."""
    source = read_json(path, allow_nan=True)
    with naming(path):
        missing = [key for key in ("images", "annotations", "categories") if key not in source]
        if missing or not isinstance(source, dict):
            raise RecordError(f"has no {', '.join(missing)}: expected a COCO annotation file (instances)")
        ids = {
            kind: _checked_ids(source[kind], kind, required)
            for kind, required in (("images", ("id", "width", "height")), ("categories", ("id", "name")))
        }
        for index, annotation in enumerate(source["annotations"]):
            where = f"annotations[{index}]"
            _check_keys(annotation, ("id", "image_id", "category_id", "bbox"), where)
            for key, known in (("image_id", ids["images"]), ("category_id", ids["categories"])):
                if annotation[key] not in known:
                    raise RecordError(
                        f"{where} (id {annotation['id']}) has {key} {annotation[key]!r}, which is not there"
                    )
            if not _is_box(annotation["bbox"]):
                raise RecordError(
                    f"{where} (id {annotation['id']}) has bbox {annotation['bbox']!r}: expected x, y, width, height"
                )
    return source


def quantize_widened(box_xyxy: Sequence[float], width: int, height: int) -> tuple[tuple[int, ...], bool]:
    """Bins of a pixel box, a collapsed side widened to one bin towards where its middle lies; and whether any was."""
    bins = quantize_boxes(box_xyxy, width, height).tolist()
    widened = False
    for axis, span in ((0, max(1, width - 1)), (1, max(1, height - 1))):
        if bins[axis] != bins[axis + 2]:
            continue
        widened = True
        middle = MAX_BIN * (box_xyxy[axis] + box_xyxy[axis + 2]) / 2 / span
        if bins[axis] < MAX_BIN and (middle >= bins[axis] or bins[axis] == 0):
            bins[axis + 2] += 1
        else:
            bins[axis] -= 1
    return tuple(bins), widened


@dataclass(frozen=True)
class _Converted:
    """An object, the area that decides when an image has too many, and what to count if it is kept."""

    obj: BoxObject
    area: float
    notes: tuple[str, ...]


def _image_objects(
    found: Sequence[tuple[str, Mapping[str, Any]]],
    width: int,
    height: int,
    options: ImportOptions,
    counts: Counter[str],
) -> list[BoxObject] | None:
    """The objects of one image, sorted; None for an image that has too many."""
    converted = []
    for desc, annotation in found:
        x, y, box_width, box_height = map(float, annotation["bbox"])
        box = (x, y, x + box_width, y + box_height)
        if annotation.get("iscrowd"):
            counts["crowd_left_out"] += 1
        elif box_width <= 0 or box_height <= 0 or not _touches(box, width, height):
            counts["degenerate_left_out"] += 1
        else:
            obj, notes = _box(desc, box, width, height)
            if options.polygons:
                polygon, note = _polygon(desc, annotation, width, height, options)
                obj, notes = (polygon, (note,)) if polygon else (obj, (*notes, note))
            converted.append(_Converted(obj, box_width * box_height, notes))
    if options.max_objects is not None and len(converted) > options.max_objects:
        num_kept = 0 if options.over_max == "drop-image" else options.max_objects
        counts["objects_over_max_left_out"] += len(converted) - num_kept
        if not num_kept:
            return None
        converted = sorted(converted, key=lambda entry: -entry.area)[:num_kept]
    counts.update(note for entry in converted for note in entry.notes)
    return order_objects([entry.obj for entry in converted])


def _box(desc: str, box: Sequence[float], width: int, height: int) -> tuple[BoxObject, tuple[str, ...]]:
    bins, widened = quantize_widened(box, width, height)
    clamped = min(box) < 0 or box[2] > width - 1 or box[3] > height - 1
    notes = [note for note, happened in (("boxes_widened", widened), ("boxes_clamped", clamped)) if happened]
    return BoxObject(desc, KIND_BBOX, bins), tuple(notes)


def _polygon(
    desc: str, annotation: Mapping[str, Any], width: int, height: int, options: ImportOptions
) -> tuple[BoxObject | None, str]:
    """The outline in bins without repeated neighbours, None where the object has to stay a box; and what to count."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None, "outlines_missing_as_box"
    if not isinstance(segmentation, list) or len(segmentation) != 1:
        return None, "outlines_of_several_parts_as_box"
    flat = segmentation[0]
    points = quantize_points([flat[i : i + 2] for i in range(0, len(flat) - 1, 2)], width, height).tolist()
    kept = [point for index, point in enumerate(points) if point != points[index - 1]]
    if len({tuple(point) for point in kept}) < 3:
        return None, "outlines_degenerate_as_box"
    if options.max_poly_points is not None and len(kept) > options.max_poly_points:
        return None, "outlines_over_max_points_as_box"
    bins = tuple(value for point in kept for value in point)
    return BoxObject(desc, KIND_POLY, bins), "polygons_written"


def _image_path(
    name: str, image: Mapping[str, Any], folder: Path, options: ImportOptions, counts: Counter[str]
) -> str | None:
    """The image's path as the record names it, relative to the JSONL file; None for one that is left out."""
    if options.image_root is None:
        return name
    path = options.image_root / name
    if path.is_file():
        _check_size(path, image)
    else:
        counts["images_missing"] += 1
        if options.missing == "error":
            raise RecordError(
                f"image {name} (id {image['id']}) is not in {options.image_root}. Give the folder that holds "
                "the images, or leave such images out (--missing-images skip)."
            )
        if options.missing == "skip":
            return None
    return Path(os.path.relpath(path, folder)).as_posix()


def _check_size(path: Path, image: Mapping[str, Any]) -> None:
    try:
        with Image.open(path) as opened:
            size = opened.size
    except (OSError, UnidentifiedImageError) as error:
        raise RecordError(f"image {path} cannot be read ({error}).") from error
    if size != (image["width"], image["height"]):
        raise RecordError(
            f"image {path} is {size[0]} x {size[1]} pixels, but the annotations (id {image['id']}) are for "
            f"{image['width']} x {image['height']}. Use the files that were annotated."
        )


def _checked_ids(entries: Any, kind: str, required: Sequence[str]) -> set[Any]:
    ids: set[Any] = set()
    for index, entry in enumerate(entries):
        _check_keys(entry, required, f"{kind}[{index}]")
        for key in required[1:]:
            if not _is_valid(key, entry[key]):
                raise RecordError(f"{kind}[{index}] (id {entry['id']}) has {key} {entry[key]!r}")
        if entry["id"] in ids:
            raise RecordError(f"{kind}[{index}] repeats id {entry['id']}: ids must be unique")
        ids.add(entry["id"])
    return ids


def _check_keys(entry: Any, required: Sequence[str], where: str) -> None:
    missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise RecordError(f"{where} has no {', '.join(missing)}")


def _is_valid(key: str, value: Any) -> bool:
    """Whether a size is a whole number of pixels, or a name is text."""
    if key == "name":
        return isinstance(value, str) and bool(value.strip())
    return type(value) is int and value > 0


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and abs(value) < float("inf") for value in box)
    )


def _touches(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a part of the box with area lies inside the image."""
    return box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0


def _category_name(category: Mapping[str, Any], _annotation_id: int) -> str:
    return str(category["name"])


def _file_name(image: Mapping[str, Any]) -> str:
    if not image.get("file_name"):
        raise RecordError(
            f"image id {image['id']} has no file_name (an LVIS file? `coordexp data from-lvis`)"
        )
    return str(image["file_name"])
