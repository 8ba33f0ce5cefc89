"""Pictures without annotations that a model is asked about: files, or pictures in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.codec.records import Record
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import RecordError
from coordexp.inference.picture_room import PictureRoom
from coordexp.pictures import check_picture, open_picture, upright_rgb
from coordexp.rollout.types import RolloutRequest

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A file, an open picture, or its pixels: uint8 [H, W, 3] in RGB or [H, W] in gray."""

ADDRESSES = ("http://", "https://", "data:", "file://")


@dataclass(frozen=True)
class AskedPicture:
    """A picture that the model can be asked about.

    source: its file, or the bytes of a PNG file of it.  width, height: pixels, upright.
    """

    name: str
    source: str | bytes
    width: int
    height: int

    @classmethod
    def of(cls, picture: Picture, *, name: str | None = None) -> AskedPicture:
        """Decodes it.

        name: what results and messages call it; None: its file as given, else "picture".
        Raises RecordError for a file that is missing, broken or no picture, an address, an array of another kind, and
        a picture whose shape the model's processor refuses.
        """
        source: str | bytes
        if isinstance(picture, Image.Image):
            name = name or "picture"
            decoded = upright_rgb(picture, name=name)
            source = _png(decoded)
        elif isinstance(picture, np.ndarray):
            name = name or "picture"
            decoded = _of_pixels(picture, name)
            source = _png(decoded)
        else:
            path = os.fspath(picture)
            _refuse_address(path)
            decoded = open_picture(path)
            name, source = name or path, str(Path(path).resolve())
        fault = check_picture(*decoded.size)
        if fault is not None:
            raise RecordError(f"image {name} {fault}.")
        return cls(name, source, *decoded.size)

    @property
    def record(self) -> Record:
        """As a line of a data file without objects."""
        return Record((self.name,), self.width, self.height, ())

    def request(self, prompt: Prompt) -> RolloutRequest:
        """The question about it; RequestError for a prompt that a template would change."""
        return RolloutRequest(tuple(prompt.messages(1)), (self.source,), request_id=self.name)

    def open(self) -> Image.Image:
        """Its pixels."""
        return open_picture(self.source)


def asked_pictures(
    pictures: Sequence[tuple[str | None, Picture]], room: PictureRoom
) -> list[AskedPicture | RecordError]:
    """Of each (name, picture) what can be asked about, or why it cannot."""

    def checked(given: tuple[str | None, Picture]) -> AskedPicture | RecordError:
        try:
            found = AskedPicture.of(given[1], name=given[0])
            room.check(found.record)
        except RecordError as error:
            return error
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(checked, pictures))


def _refuse_address(path: str) -> None:
    if path.startswith(ADDRESSES):
        shown = path if len(path) <= 100 else f"{path[:100]}…"
        raise RecordError(
            f"image {shown} is an address: pictures are not downloaded. Save it to a file and give its path."
        )


def _of_pixels(pixels: NDArray[Any], name: str) -> Image.Image:
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not is_picture or not pixels.size:
        raise RecordError(
            f"image {name} is an array of {pixels.dtype} with the shape {list(pixels.shape)}: expected uint8 of the "
            "shape [H, W, 3] (RGB) or [H, W] (gray)."
        )
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
