"""Looking at every picture of a data set, with all cores: header, pixels, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coordexp.errors import RecordError
from coordexp.pictures import PictureFacts, open_picture, picture_facts

OnPicture = Callable[[int, int], None]
"""Called with the number of pictures just looked at, and of all."""

_PER_TASK = 16
_MIN_FOR_POOL = 200
"""Fewer pictures than this are looked at sooner than processes start."""


@dataclass(frozen=True)
class PictureReport:
    """What one file turned out to be.

    facts: None where the header cannot be read.  fingerprint: of size and pixels, None where they cannot be decoded.
    fault: why it cannot be used, in one sentence; None where it can.
    """

    facts: PictureFacts | None
    fingerprint: bytes | None
    fault: str | None


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def look(path: Path) -> PictureReport:
    """Read the header and decode the pixels of one picture."""
    facts = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            facts = picture_facts(path)
            picture = open_picture(path)
        except RecordError as error:
            return PictureReport(facts, None, str(error))
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}:".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return PictureReport(facts, digest.digest(), None)


def look_at_all(
    paths: Sequence[Path], *, on_done: OnPicture = no_progress, workers: int | None = None
) -> dict[Path, PictureReport]:
    """A report of every file that is named, each looked at once.

    workers: processes; None for one per core.
    """
    distinct = list(dict.fromkeys(paths))
    workers = workers or len(os.sched_getaffinity(0))
    reports: dict[Path, PictureReport] = {}
    for path, report in zip(distinct, _reports(distinct, workers), strict=True):
        reports[path] = report
        on_done(1, len(distinct))
    return reports


def _reports(paths: Sequence[Path], workers: int) -> Iterator[PictureReport]:
    if workers < 2 or len(paths) < _MIN_FOR_POOL:
        yield from map(look, paths)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(look, paths, chunksize=_PER_TASK)
        except BrokenProcessPool as error:
            raise RecordError(
                "a process that decodes pictures was killed (too little memory, or a picture that breaks its decoder); "
                f"the pictures are those of {_around(paths)}"
            ) from error


def _around(paths: Iterable[Path]) -> str:
    names = sorted({str(path.parent) for path in paths})
    return ", ".join(names[:3])
