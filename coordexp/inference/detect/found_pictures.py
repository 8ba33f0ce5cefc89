"""The pictures that files, folders and patterns name."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from coordexp.errors import ConfigError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Files of a folder that are taken for pictures; one that is named itself is taken whatever its suffix."""


class FoundPicture(NamedTuple):
    """name: what results call it, with no other picture of the same name."""

    name: str
    path: Path


def find_pictures(sources: Sequence[str], *, leave_out: Path | None = None) -> list[FoundPicture]:
    """Every picture once, in the order of `sources`.

    sources: files, folders (with the folders in them, sorted, without hidden ones) and patterns such as
        "frames/*.jpg" (`**` for folders in folders). Names are those within a folder, else of the file.
    leave_out: a folder in which nothing is looked for.

    Raises ConfigError for a folder or pattern that holds no picture. A file need not be there.
    """
    found: dict[Path, str] = {}
    taken: set[str] = set()
    for source in sources:
        pictures = list(_of_source(source, leave_out))
        if not pictures:
            raise ConfigError(f"{source}: holds no picture; expected files such as {', '.join(SUFFIXES[:6])}")
        for name, path in pictures:
            resolved = path.resolve()
            if resolved not in found:
                found[resolved] = _free(name, taken)
                taken.add(found[resolved])
    return [FoundPicture(name, path) for path, name in found.items()]


def _of_source(source: str, leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    path = Path(source)
    if path.is_dir():
        for file in _files(path, leave_out):
            yield file.relative_to(path).as_posix(), file
    elif path.exists() or not glob.has_magic(source):
        yield path.name, path
    else:
        for match in sorted(map(Path, glob.glob(source, recursive=True))):
            if match.is_file():
                yield match.name, match


def _files(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    left_out = None if leave_out is None else leave_out.resolve()
    for home, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(home, name).resolve() != left_out
        )
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(home, name)


def _free(name: str, taken: set[str]) -> str:
    """The name, or the first of NAME_2, NAME_3, ... that is not taken."""
    path, number, free = PurePosixPath(name), 1, name
    while free in taken:
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}").as_posix()
    return free
