"""Where pictures are: names of annotation files, which may not lead out of the folder that the user gave."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from coordexp.errors import RecordError
from coordexp.files import is_file

PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".jp2",
    ".ppm",
)


def picture_path(root: Path, name: str, where: str, *, allow_outside: bool = False) -> Path:
    """The file that `name` means under `root`, whether it is there or not.

    Where no file has the name as it is, backslashes are those of Windows, and accents may be written the other way.
    where: of the name, for messages. Raises RecordError for a name that leads out of `root`, unless that is allowed.
    """
    path = _inside(root, name, where, allow_outside)
    if is_file(path):
        return path
    for form in {name.replace("\\", "/"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))} - {
        name
    }:
        other = _inside(root, form, where, allow_outside)
        if is_file(other):
            return other
    return path


def picture_paths(
    root: Path, names: Sequence[str], where: Callable[[int], str], *, allow_outside: bool = False
) -> list[Path]:
    """`picture_path` of every name."""
    return [
        picture_path(root, name, where(index), allow_outside=allow_outside)
        for index, name in enumerate(names)
    ]


def pictures_in(folder: Path) -> list[Path]:
    """Every picture file under a folder, by name, through sub-folders."""
    found = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
    ]
    return sorted(found)


def guessed_root(annotations: Path, names: Sequence[str]) -> Path | None:
    """The folder near an annotation file that holds the pictures it names (a sample of them); None without any."""
    sample = [name for name in names[:: max(1, len(names) // 20)] if name][:20]
    home = annotations.parent
    names_of_folders = ("", "images", annotations.stem, "train", "val", "data")
    for place in [parent / name for parent in (home, home.parent) for name in names_of_folders]:
        if sample and all(".." not in name and is_file(place / name) for name in sample):
            return place
    return None


def _inside(root: Path, name: str, where: str, allow_outside: bool) -> Path:
    base = os.path.abspath(root)
    target = os.path.abspath(os.path.join(base, name)) if "\0" not in name else base
    if not allow_outside and target != base and not target.startswith(base.rstrip(os.sep) + os.sep):
        raise RecordError(
            f"{where} is {name!r}, which leads outside of {root}. Give the folder that holds all pictures "
            "(--image-root), or follow such names (--allow-outside)"
        )
    return root / name if not os.path.isabs(name) else Path(target)
