"""One sample changed as `custom.augmentation` says, in a way that depends on sample, turn and seed alone.

augmenter = Augmenter(settings, seed=7)
augmented = augmenter(record, turn="3", progress=0.4)      # record and picture, both changed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.codec.records import Record
from coordexp.config.schema.augmentation import (
    Augmentation,
    RandomCropParams,
    ResizeByScaleParams,
)
from coordexp.data.augment.draws import Draws
from coordexp.data.augment.geometric import mirrored, scaled, shapes_in, window_of
from coordexp.data.augment.photometric import CHANGES
from coordexp.data.augment.pictures import open_checked
from coordexp.data.augment.scene import PictureScene, picture_of, record_of_scene, scene_of
from coordexp.errors import RecordError

WINDOW_DRAWS = 10
"""Windows that are tried before a picture stays whole."""


@dataclass(frozen=True)
class Augmented:
    """record: with the size and the objects of the picture. Its order of objects is that of the record before."""

    record: Record
    picture: Image.Image


class Augmenter:
    """Changes samples of a run.

    settings: `custom.augmentation`, enabled.  seed: of the run.
    """

    def __init__(self, settings: Augmentation, seed: int) -> None:
        self._seed = seed
        phases = settings.curriculum.phases if settings.curriculum else ()
        self._phases = [(phase.until_percent, settings.in_phase(phase)) for phase in phases]
        self._phases.append((float("inf"), settings.in_phase(None)))

    def __call__(self, record: Record, *, turn: str = "0", progress: float = 0.0) -> Augmented:
        """The sample as it is shown at one of its turns.

        turn: names the turn of the sample in the run; another one gives other changes.
        progress: of the run, 0 to 1; chooses the phase.
        Raises RecordError naming file and line: a record of several pictures, a picture that cannot be read, or one
        that has another size than when its record was checked.
        """
        settings = self._at(progress)
        draws = Draws(self._seed, Path(record.file or "").name, record.line, record.images, turn)
        picture = _open(record)
        if draws.chance(settings.bypass_prob):
            return Augmented(record, picture)
        scene = scene_of(record, picture)
        for operation in settings.ops:
            if draws.chance(operation.params.prob):
                scene = _changed(scene, operation, draws, settings.min_visible)
        return Augmented(record_of_scene(scene, record), picture_of(scene))

    def _at(self, progress: float) -> Augmentation:
        """The settings of a phase; of the last one at the end of the run."""
        of_phases = [settings for until, settings in self._phases if min(100 * progress, 99.999999) < until]
        return of_phases[0]


def _changed(scene: PictureScene, operation: Any, draws: Draws, min_visible: float) -> PictureScene:
    name, params = operation.name, operation.params
    if name in CHANGES:
        return replace(scene, picture=CHANGES[name](scene.picture, params, draws))
    if name in ("hflip", "vflip"):
        return mirrored(scene, top_for_bottom=name == "vflip")
    if name == "resize_by_scale":
        return scaled(scene, *_scaled_size(scene.size, params, draws))
    return _cut(scene, params, draws, min_visible)


def _scaled_size(size: tuple[int, int], params: ResizeByScaleParams, draws: Draws) -> tuple[int, int]:
    factor, multiple = draws.between(params.lo, params.hi), params.align_multiple or 1
    width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
    return width, height


def _cut(scene: PictureScene, params: RandomCropParams, draws: Draws, min_visible: float) -> PictureScene:
    """A window of the picture that shows enough objects; the whole picture if none is found."""
    width, height = scene.size
    least = min_visible if params.min_coverage is None else params.min_coverage
    wanted = min(params.min_objects, scene.num_objects)
    for _ in range(WINDOW_DRAWS):
        share, ratio = draws.between(*params.scale), draws.between(*params.aspect_ratio)
        window_width = min(width, max(1, round(width * (share * ratio) ** 0.5)))
        window_height = min(height, max(1, round(height * (share / ratio) ** 0.5)))
        left = draws.below(width - window_width + 1)
        top = draws.below(height - window_height + 1)
        window = (top, left, window_height, window_width)
        if shapes_in(scene, window, least).num_objects >= wanted:
            cut = window_of(scene, window, least)
            return scaled(cut, width, height) if params.keep_size else cut
    return scene


def _open(record: Record) -> Image.Image:
    where = f"{record.file}:{record.line}"
    if len(record.images) != 1:
        raise RecordError(
            f"{where}: has {len(record.images)} pictures, and custom.augmentation changes one with its objects. Set "
            "enabled: false, or leave such records out."
        )
    try:
        return open_checked(record, [str(record.image_paths()[0])])[0]
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error
