"""YOLO data sets (Ultralytics and Darknet): a text file of shares of the picture's size beside every picture.

    data.yaml                 names, and where the pictures of each split are
    images/train/a.jpg        labels/train/a.txt:  class x_centre y_centre width height
                                                   class x1 y1 x2 y2 x3 y3 ...         (an outline)

Without a data.yaml a folder of `images` and `labels` (or of both together) with a `classes.txt` is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.paths import picture_path, pictures_in
from coordexp.data.formats.readers.builder import DatasetBuilder, Faults
from coordexp.errors import RecordError
from coordexp.eval.coco.fields import parse_number, shown
from coordexp.files import is_file, is_folder
from coordexp.pictures import PictureFacts, picture_facts

SPLITS = ("train", "val", "test")
CLASS_FILES = ("classes.txt", "obj.names", "names.txt")
MAX_SHARE = 1.01
"""Of the picture's size; exporters overshoot by rounding."""
_BOX_VALUES = 4
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class _Layout:
    """Class names by number, the pictures of every split, and how many keypoint values follow a box."""

    root: Path
    names: Mapping[int, str]
    splits: Mapping[str, Sequence[Path]]
    num_pose_values: int = 0


def read_yolo(path: Path, options: ImportOptions, faults: Faults) -> list[Source]:
    """The splits of a YOLO data set, from its data.yaml or its folder.

    Raises RecordError naming file and line (or hands it to `faults`): values that are no shares of the picture's size,
    classes without a name, pictures outside of the data set's folder.
    """
    config = path if path.suffix in (".yaml", ".yml") else find_config(path)
    layout = _from_config(config, options) if config is not None else _from_folder(path, options)
    sources = []
    for split, pictures in layout.splits.items():
        if pictures and options.split in (None, split):
            sources.append(_read_split(path, split, pictures, layout, faults))
    if not sources:
        raise RecordError(f"{path}: no pictures were found ({', '.join(layout.splits) or 'no split'})")
    return sources


def find_config(folder: Path) -> Path | None:
    """The YAML file of a YOLO data set's folder, None without one."""
    for candidate in _yaml_files(folder):
        try:
            if "names" in _read_yaml(candidate):
                return candidate
        except RecordError:
            continue
    return None


def read_class_names(path: Path) -> list[str]:
    """The class names of a data.yaml (`names`) or of a text file with one on each line, in the order of their numbers.

    Raises RecordError for a data.yaml that leaves numbers out.
    """
    if path.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in read_lines(path) if line.strip()]
    names = _class_names(_read_yaml(path).get("names"), path)
    if sorted(names) != list(range(len(names))):
        raise RecordError(
            f"{path}: names has the numbers {shown(sorted(names))}: expected 0 to {len(names) - 1}"
        )
    return [names[number] for number in range(len(names))]


def label_file(picture: Path) -> Path:
    """Where the labels of a picture are: `labels` for the last folder named `images`, and `.txt`."""
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_split(path: Path, split: str, pictures: Sequence[Path], layout: _Layout, faults: Faults) -> Source:
    builder = DatasetBuilder(":")
    for name in layout.names.values():
        builder.add_category(name)
    kept: list[Path] = []
    num_labelled = 0
    for picture, facts in zip(pictures, _facts(pictures), strict=True):
        labels = label_file(picture)
        width, height = (facts.width, facts.height) if facts is not None else (0, 0)
        name = Path(os.path.relpath(picture, layout.root)).as_posix()
        row = builder.add_image(name, width, height, file=_shown_path(labels, layout.root))
        kept.append(picture)
        if is_file(labels):
            num_labelled += 1
            if facts is not None:  # the fault of the picture is found and named by those who look at pictures
                _read_labels(labels, builder, row, (width, height), layout, faults)
    if not num_labelled:
        faults.add(f"{path}: no picture has labels (looked for {label_file(pictures[0])} and the like)")
    return Source(
        path, "yolo", builder.build(), kept, split,
        Counter(images_without_label_file=len(kept) - num_labelled), faults.messages,
    )  # fmt: skip


def _read_labels(
    labels: Path, builder: DatasetBuilder, row: int, size: tuple[int, int], layout: _Layout, faults: Faults
) -> None:
    for number, line in enumerate(read_lines(labels), start=1):
        if not line.strip():
            continue
        try:
            name, box, outline = _parse_line(line.split(), size, layout)
            builder.add_object(row, name, box, number, outlines=outline)
        except RecordError as error:
            where = f"{_shown_path(labels, layout.root)}:{number}"
            text = str(error)
            faults.add(text if text.startswith(where) else f"{where}: {text}")


def _parse_line(
    words: Sequence[str], size: tuple[int, int], layout: _Layout
) -> tuple[str, list[float], list[list[float]] | None]:
    """(class name, box xyxy in pixels, outline in pixels) of one label."""
    class_number = parse_number(words[0])
    if class_number is None or not class_number.is_integer() or int(class_number) not in layout.names:
        raise RecordError(
            f"class is {shown(words[0])}: expected a number of one of the {len(layout.names)} classes, "
            f"{min(layout.names, default=0)} to {max(layout.names, default=0)}"
        )
    values = words[1:]
    if layout.num_pose_values and len(values) == _BOX_VALUES + layout.num_pose_values:
        values = values[:_BOX_VALUES]
    if len(values) == _BOX_VALUES + 1:  # a confidence or track number after the box
        values = values[:_BOX_VALUES]
    numbers = [_share(word) for word in values]
    if len(numbers) == _BOX_VALUES:
        return layout.names[int(class_number)], _box(numbers, size), None
    if len(numbers) < 6 or len(numbers) % 2:
        raise RecordError(
            f"has {len(words)} values: expected class, x, y, width, height, or class and an outline x, y, x, y, ..."
        )
    outline = [value * size[index % 2] for index, value in enumerate(numbers)]
    box = [min(outline[0::2]), min(outline[1::2]), max(outline[0::2]), max(outline[1::2])]
    return layout.names[int(class_number)], box, [outline]


def _share(word: str) -> float:
    value = parse_number(word)
    if value is None or not 1 - MAX_SHARE <= value <= MAX_SHARE:
        hint = ". Are these pixels?" if value is not None and value > MAX_SHARE else ""
        raise RecordError(f"value is {shown(word)}: expected a share of the picture's size, 0 to 1{hint}")
    return value


def _box(values: Sequence[float], size: tuple[int, int]) -> list[float]:
    x, y, width, height = values
    if width < 0 or height < 0:
        raise RecordError(f"width and height are {width} and {height}: expected at least 0")
    return [
        (x - width / 2) * size[0],
        (y - height / 2) * size[1],
        (x + width / 2) * size[0],
        (y + height / 2) * size[1],
    ]


def read_lines(path: Path) -> list[str]:
    """The lines of a small text file; RecordError naming it when it cannot be read, is no UTF-8 text or is huge."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RecordError(f"{path}: has {path.stat().st_size} bytes, too many for a file of labels")
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _facts(pictures: Sequence[Path]) -> Iterable[PictureFacts | None]:
    """Headers of the pictures; None of one that cannot be read."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from pool.map(_facts_or_none, pictures)


def _facts_or_none(picture: Path) -> PictureFacts | None:
    try:
        return picture_facts(picture)
    except RecordError:
        return None


def _from_config(config: Path, options: ImportOptions) -> _Layout:
    content = _read_yaml(config)
    names = _class_names(content.get("names"), config)
    root = _root(config, content.get("path"), options)
    splits: dict[str, Sequence[Path]] = {}
    for split in SPLITS:
        value = content.get(split, content.get("valid") if split == "val" else None)
        if value is not None:
            pictures = _split_pictures(value, root, f"{config}: {split}", options)
            if pictures not in splits.values():  # Ultralytics wants a val, which some sets name train again
                splits[split] = pictures
    return _Layout(root, names, splits, _num_pose_values(content.get("kpt_shape"), config))


def _from_folder(folder: Path, options: ImportOptions) -> _Layout:
    """A folder without data.yaml; pictures are its own or those of its `images`."""
    for place in (folder, folder / "labels", folder / "labels" / "train"):
        for name in CLASS_FILES:
            if is_file(place / name):
                names = {n: line.strip() for n, line in enumerate(read_lines(place / name)) if line.strip()}
                pictures = pictures_in(options.image_root or folder)
                return _Layout(folder, names, {"": pictures})
    raise RecordError(
        f"{folder}: nothing names the classes: expected a data.yaml with `names`, or a {' or '.join(CLASS_FILES)}"
        f"{_broken_yaml(folder)}"
    )


def _broken_yaml(folder: Path) -> str:
    """What is wrong with the YAML files of a folder that cannot be read."""
    faults = []
    for candidate in _yaml_files(folder):
        try:
            _read_yaml(candidate)
        except RecordError as error:
            faults.append(str(error))
    return f" ({'; '.join(faults)})" if faults else ""


def _yaml_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


def _read_yaml(config: Path) -> Mapping[str, Any]:
    text = "\n".join(read_lines(config))
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecordError(f"{config}: is not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{config}: is {shown(content)}: expected names, train and val")
    return content


def _class_names(value: Any, config: Path) -> dict[int, str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise RecordError(
            f"{config}: names is {shown(value)}: expected a list of class names, or number: name"
        )
    names = {}
    for key, name in value.items():
        number = parse_number(key)
        if (
            number is None
            or not number.is_integer()
            or number < 0
            or isinstance(name, (dict, list))
            or name is None
        ):
            raise RecordError(f"{config}: names holds {shown(key)}: {shown(name)}: expected number: name")
        names[int(number)] = str(name)
    return names


def _num_pose_values(value: Any, config: Path) -> int:
    if value is None:
        return 0
    shape = [parse_number(v) for v in value] if isinstance(value, list) and len(value) == 2 else [None]
    if not all(v is not None and v.is_integer() and 0 < v < 1000 for v in shape):
        raise RecordError(f"{config}: kpt_shape is {shown(value)}: expected two whole numbers")
    return int(shape[0] or 0) * int(shape[1] or 0)


def _root(config: Path, value: Any, options: ImportOptions) -> Path:
    """`path` of a data.yaml where it is there on this machine, else the folder of the file."""
    if options.image_root is not None:
        return options.image_root
    if isinstance(value, str) and value:
        for place in (Path(value), config.parent / value):
            if is_folder(place) and (
                options.allow_outside or place.resolve().is_relative_to(config.parent.resolve())
            ):
                return place
    return config.parent


def _split_pictures(value: Any, root: Path, where: str, options: ImportOptions) -> list[Path]:
    """Pictures of a split: a folder, a text file that lists pictures, or several of these."""
    if isinstance(value, list):
        return [picture for entry in value for picture in _split_pictures(entry, root, where, options)]
    if not isinstance(value, str) or not value:
        raise RecordError(
            f"{where} is {shown(value)}: expected a folder of pictures or a file that lists them"
        )
    path = _split_path(value, root, where, options)
    if is_folder(path):
        return pictures_in(path)
    if is_file(path):
        return [
            picture_path(path.parent if line.startswith("./") else root, line.strip(), f"{path}:{number}",
                         allow_outside=options.allow_outside)
            for number, line in enumerate(read_lines(path), start=1)
            if line.strip()
        ]  # fmt: skip
    raise RecordError(
        f"{where} is {value!r}, and {path} is neither a folder nor a file. Give --image-root DIR"
    )


def _split_path(value: str, root: Path, where: str, options: ImportOptions) -> Path:
    """Some exporters write `../train/images` and mean `train/images` beside the file."""
    if value.startswith("../") and not options.allow_outside:
        inside = root / value.removeprefix("../")
        if (is_folder(inside) or is_file(inside)) and ".." not in inside.relative_to(root).parts:
            return inside
    return picture_path(root, value, where, allow_outside=options.allow_outside)


def _shown_path(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix() if path.is_relative_to(root) else str(path)
