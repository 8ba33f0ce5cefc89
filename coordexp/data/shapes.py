"""Synthetic detection scenes: coloured shapes on a light background, with exact boxes.

    coordexp data shapes --output runs/data/shapes --train 4000 --val 200

writes `train.jsonl`, `val.jsonl` and PNG files in the package's JSONL contract. On whole pixels a box is the tight box
of an object's visible pixels, and neighbours differ in colour, so that every number in a label can be read off the
picture; for scenes between the pixels see `coordexp.data.real_scenes`. Each scene draws from its own random stream
(seed, split, index): asking for more scenes leaves the earlier ones as they were, and the same parameters give the same
bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from coordexp.data.real_scenes import draw_real_scene
from coordexp.data.scene_config import (
    COLORS,
    KINDS,
    LAYOUT_TRIES,
    PRESETS,
    Scene,
    SceneObject,
    ShapesConfig,
    asked_classes,
    background,
    jittered,
    no_room,
    with_overrides,
)
from coordexp.errors import ConfigError
from coordexp.files import atomic_file, json_line
from coordexp.geometry import quantize_boxes
from coordexp.models.staging import is_up_to_date, staged_directory, write_stamp

__all__ = [
    "COLORS",
    "KINDS",
    "PRESETS",
    "ShapesConfig",
    "asked_classes",
    "generate_shapes",
    "render_scene",
    "scene_record",
    "with_overrides",
]

STAMP_NAME = "shapes.json"
_PLACEMENT_TRIES = 40
_LATER = ("real_valued", "unlabelled", "name_skew", "asked_colors", "num_lists")

Mask = NDArray[np.bool_]
PixelBox = tuple[int, int, int, int]


def generate_shapes(
    output_dir: str | Path,
    config: ShapesConfig,
    *,
    num_train: int,
    num_val: int,
    seed: int = 0,
    force: bool = False,
    on_scene: Callable[[], object] | None = None,
) -> bool:
    """Write `train.jsonl`, `val.jsonl` and `images/<split>/*.png` to `output_dir`, or nothing at all.

    Args:
        force: replace scenes made from other parameters (never a directory of anything else).
        on_scene: called after every scene, for a progress bar.

    Returns:
        True if scenes were written, False if `output_dir` already holds exactly these.

    Raises:
        ConfigError: negative counts, a configuration that cannot be drawn, or a directory that holds
            something else.
    """
    output_dir = Path(output_dir)
    splits = {"train": num_train, "val": num_val}
    for split, count in splits.items():
        if count < 0:
            raise ConfigError(f"shapes: number of {split} scenes = {count}: expected 0 or more.")
    stamp = {"generator": "coordexp.data.shapes/1", "seed": seed, **splits, **_stamped(config)}
    if not force and is_up_to_date(output_dir, STAMP_NAME, stamp):
        return False
    with staged_directory(output_dir, replace=force and (output_dir / STAMP_NAME).is_file()) as staging_dir:
        for split, count in splits.items():
            _write_split(staging_dir, config, seed, split, count, on_scene)
        write_stamp(staging_dir, STAMP_NAME, stamp)
    return True


def render_scene(config: ShapesConfig, *, seed: int, split: str, index: int) -> Scene:
    """Draw scene `index` of `split`; depends on nothing but the arguments.

    Raises:
        ConfigError: `min_objects` shapes do not fit within `max_overlap`.
    """
    rng = random.Random(f"coordexp-shapes/{seed}/{split}/{index}")
    if config.real_valued:
        return draw_real_scene(config, rng)
    pixels_HWC = background(config, rng)
    if rng.random() < config.empty_fraction:
        return Scene(pixels_HWC, ())
    owner_HW, descs = _layout(config, rng)
    for number, desc in enumerate(descs, start=1):
        pixels_HWC[owner_HW == number] = jittered(COLORS[desc.split()[0]], rng)
    objects = (SceneObject(desc, _tight_box(owner_HW == n)) for n, desc in enumerate(descs, start=1))
    return Scene(pixels_HWC, tuple(objects))


def scene_record(scene: Scene, image_path: str) -> dict[str, Any]:
    """The scene as one JSONL record: boxes in bins 0..999, objects sorted by (min y, min x)."""
    height, width = scene.pixels.shape[:2]
    objects = []
    for scene_object in scene.objects:
        bins = tuple(int(k) for k in quantize_boxes(scene_object.box_xyxy, width, height))
        objects.append({"desc": scene_object.desc, "bbox_2d": list(bins)})
    objects.sort(key=lambda item: (item["bbox_2d"][1], item["bbox_2d"][0]))
    return {"images": [image_path], "width": width, "height": height, "objects": objects}


def _stamped(config: ShapesConfig) -> dict[str, Any]:
    """What is written of the settings beside the scenes: what was added to them later, only where it is used."""
    usual = asdict(ShapesConfig())
    return {
        name: value for name, value in asdict(config).items() if name not in _LATER or value != usual[name]
    }


def _write_split(
    root: Path, config: ShapesConfig, seed: int, split: str, count: int, on_scene: Callable[[], object] | None
) -> None:
    image_dir = root / "images" / split
    image_dir.mkdir(parents=True)
    with atomic_file(root / f"{split}.jsonl", "wb", sync=False) as lines:
        for index in range(count):
            scene = render_scene(config, seed=seed, split=split, index=index)
            image_path = image_dir / f"{index:06d}.png"
            Image.fromarray(scene.pixels).save(image_path, compress_level=1)
            record = scene_record(scene, image_path.relative_to(root).as_posix())
            if config.asked_colors:
                record["classes"] = asked_classes(config, seed=seed, split=split, index=index)
                record["objects"] = [o for o in record["objects"] if o["desc"] in record["classes"]]
            if split == "train" and config.unlabelled:
                label_rng = random.Random(f"coordexp-shapes/labels/{seed}/{index}")
                record["objects"] = [o for o in record["objects"] if label_rng.random() >= config.unlabelled]
            lines.write(json_line(record))
            if on_scene is not None:
                on_scene()


def _layout(config: ShapesConfig, rng: random.Random) -> tuple[NDArray[np.int16], list[str]]:
    """Owner of every pixel (0: background, n: object n) and the objects' descriptions."""
    num_objects = rng.randint(config.min_objects, config.max_objects)
    for _ in range(LAYOUT_TRIES):
        owner_HW = np.zeros((config.height, config.width), dtype=np.int16)
        descs: list[str] = []
        areas: list[int] = []
        for _ in range(num_objects):
            kind = rng.choice(config.kinds)
            mask = _place(config, rng, kind, owner_HW, areas)
            if mask is None:
                continue
            color = rng.choice(_free_colors(config, descs, owner_HW, mask))
            areas.append(int(mask.sum()))
            descs.append(f"{color} {kind}")
            owner_HW[mask] = len(descs)
        if len(descs) >= config.min_objects:
            return owner_HW, descs
    raise no_room(config)


def _place(
    config: ShapesConfig, rng: random.Random, kind: str, owner_HW: NDArray[np.int16], areas: list[int]
) -> Mask | None:
    """Pixels of a new shape that hides no earlier object beyond `max_overlap`, or None if none is found."""
    for _ in range(_PLACEMENT_TRIES):
        mask = _draw_shape(config, kind, _random_box(config, rng, kind))
        if all(_hidden_share(owner_HW, n, area, mask) <= config.max_overlap for n, area in _numbered(areas)):
            return mask
    return None


def _free_colors(
    config: ShapesConfig, descs: list[str], owner_HW: NDArray[np.int16], mask: Mask
) -> tuple[str, ...]:
    """Colours that no neighbour of the new shape wears; all, if they wear every one."""
    x1, y1, x2, y2 = _tight_box(mask)
    nearby = np.unique(owner_HW[max(0, y1 - 1) : y2 + 2, max(0, x1 - 1) : x2 + 2])
    worn = {descs[number - 1].split()[0] for number in nearby if number > 0}
    return tuple(color for color in config.colors if color not in worn) or config.colors


def _numbered(areas: list[int]) -> Iterator[tuple[int, int]]:
    return enumerate(areas, start=1)


def _hidden_share(owner_HW: NDArray[np.int16], number: int, area: int, new_mask: Mask) -> float:
    still_visible = int(((owner_HW == number) & ~new_mask).sum())
    return 1.0 - still_visible / area


def _random_box(config: ShapesConfig, rng: random.Random, kind: str) -> PixelBox:
    """Pixel box xyxy (last pixel included) of random size and place; circles are as wide as high."""
    box_width = rng.randint(config.min_side, config.max_side)
    box_height = box_width if kind == "circle" else rng.randint(config.min_side, config.max_side)
    x1 = rng.randint(0, config.width - box_width)
    y1 = rng.randint(0, config.height - box_height)
    return x1, y1, x1 + box_width - 1, y1 + box_height - 1


def _draw_shape(config: ShapesConfig, kind: str, box: PixelBox) -> Mask:
    """The pixels of one shape inside `box`, without anti-aliasing. bool [height, width]."""
    image = Image.new("L", (config.width, config.height), 0)
    draw = ImageDraw.Draw(image)
    x1, y1, x2, y2 = box
    x_mid, y_mid = (x1 + x2) // 2, (y1 + y2) // 2
    if kind == "box":
        draw.rectangle(box, fill=1)
    elif kind in ("circle", "ellipse"):
        draw.ellipse(box, fill=1)
    elif kind == "triangle":
        draw.polygon([(x_mid, y1), (x2, y2), (x1, y2)], fill=1)
    elif kind == "diamond":
        draw.polygon([(x_mid, y1), (x2, y_mid), (x_mid, y2), (x1, y_mid)], fill=1)
    else:  # cross
        arm_x, arm_y = (x2 - x1) // 3, (y2 - y1) // 3
        draw.rectangle((x1 + arm_x, y1, x2 - arm_x, y2), fill=1)
        draw.rectangle((x1, y1 + arm_y, x2, y2 - arm_y), fill=1)
    return np.asarray(image, dtype=bool)


def _tight_box(mask: Mask) -> PixelBox:
    """First and last column and row that hold a pixel, as x1, y1, x2, y2."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
