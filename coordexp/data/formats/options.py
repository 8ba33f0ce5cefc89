"""What an import takes over, and what it does about pictures that are missing or broken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.errors import ConfigError

MISSING_IMAGES = ("error", "skip", "keep")
BAD_IMAGES = ("error", "skip")
OVER_MAX = ("drop-image", "keep-largest")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to take over.

    image_root: folder that file names start from, and that they may not leave; None takes the place where the format
    has its pictures, and for COCO files leaves the names relative to the JSONL file and unchecked.
    find_pictures: look for that place near the annotation file where `image_root` is not given.
    allow_outside: follow file names that lead outside of `image_root`.
    missing: what to do about an image file that is not there.
    bad: what to do about a picture that cannot be decoded, is of another size than annotated, or is none that the
    model's processor can take.
    polygons: write objects of one outline as `poly`; others (several parts, run lengths) stay boxes.
    max_poly_points: outlines with more points stay boxes, None for no limit.
    max_objects: of an image, None for no limit; over_max: images with more are left out, because labels that are cut
    short teach a model to stop early ("drop-image"), or keep their largest objects ("keep-largest").
    drop_empty: leave out images without objects.
    dataset: name to keep as `metadata.dataset`, None for none.
    split: the one to take of a source with several, None for the only one.
    """

    image_root: Path | None = None
    find_pictures: bool = False
    allow_outside: bool = False
    missing: str = "error"
    bad: str = "error"
    polygons: bool = False
    max_poly_points: int | None = None
    max_objects: int | None = None
    over_max: str = "drop-image"
    drop_empty: bool = False
    dataset: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("missing", self.missing, MISSING_IMAGES),
            ("bad", self.bad, BAD_IMAGES),
            ("over_max", self.over_max, OVER_MAX),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: expected one of {', '.join(known)}")
        if self.image_root is not None and not self.image_root.is_dir():
            raise ConfigError(f"{self.image_root} is no folder: expected the one that holds the images.")
