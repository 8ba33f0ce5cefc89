"""Scenes whose shapes lie anywhere between the pixels, with soft edges, so that every bin occurs.

A pixel shows the share of its area that a shape covers, so an edge can be read to a small part of a pixel. Boxes are in
the frame of all records: the centre of the first pixel is at 0, that of the last at width - 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordexp.data.scene_config import (
    COLORS,
    LAYOUT_TRIES,
    Box,
    Scene,
    SceneObject,
    ShapesConfig,
    background,
    jittered,
    no_room,
)
from coordexp.geometry import FloatArray

_SAMPLES = 8  # per pixel and axis, where an edge runs across pixels at an angle
_PLACEMENT_TRIES = 60


def draw_real_scene(config: ShapesConfig, rng: random.Random) -> Scene:
    """A scene of `config` with as many objects as it asks for and find room.

    Raises:
        ConfigError: `min_objects` shapes do not fit within `max_overlap`.
    """
    pixels_HWC = background(config, rng).astype(np.float64)
    objects: list[SceneObject] = []
    if rng.random() >= config.empty_fraction:
        objects = _layout(config, rng)
    for one in objects:
        color, kind = one.desc.split()
        cover_HW1 = coverage(kind, one.box_xyxy, config.width, config.height)[..., None]
        pixels_HWC += cover_HW1 * (np.array(jittered(COLORS[color], rng)) - pixels_HWC)
    return Scene(np.rint(pixels_HWC).astype(np.uint8), tuple(objects))


def coverage(kind: str, box: Box, width: int, height: int) -> FloatArray:
    """The share of each pixel that a shape covers: exact where its sides run along the axes, sampled elsewhere.

    float64 [height, width] in [0, 1]
    """
    x1, y1, x2, y2 = box
    if kind == "box":
        return _interval_cover(y1, y2, height)[:, None] * _interval_cover(x1, x2, width)
    if kind == "cross":
        arm_x, arm_y = (x2 - x1) / 3, (y2 - y1) / 3
        across_H1, across_W = (
            _interval_cover(y1 + arm_y, y2 - arm_y, height)[:, None],
            _interval_cover(x1, x2, width),
        )
        upright_H1, upright_W = (
            _interval_cover(y1, y2, height)[:, None],
            _interval_cover(x1 + arm_x, x2 - arm_x, width),
        )
        return across_H1 * across_W + upright_H1 * upright_W - across_H1 * upright_W
    return _sampled_cover(kind, box, width, height)


def _interval_cover(low: float, high: float, count: int) -> FloatArray:
    """The share of each of `count` pixels, of width 1 around 0, 1, 2 ..., that an interval covers.  [count]"""
    centres = np.arange(count)
    shared: FloatArray = (np.minimum(high, centres + 0.5) - np.maximum(low, centres - 0.5)).clip(0.0, 1.0)
    return shared


def _sampled_cover(kind: str, box: Box, width: int, height: int) -> FloatArray:
    x1, y1, x2, y2 = box
    left, top = max(0, int(np.floor(x1 + 0.5))), max(0, int(np.floor(y1 + 0.5)))
    right, bottom = min(width - 1, int(np.floor(x2 + 0.5))), min(height - 1, int(np.floor(y2 + 0.5)))
    offsets = (np.arange(_SAMPLES) + 0.5) / _SAMPLES - 0.5
    xs = (np.arange(left, right + 1)[:, None] + offsets).ravel()
    ys = (np.arange(top, bottom + 1)[:, None] + offsets).ravel()
    u_X = (2 * (xs - x1) / (x2 - x1) - 1)[None, :]
    v_Y = (2 * (ys - y1) / (y2 - y1) - 1)[:, None]
    inside = _inside(kind, u_X, v_Y)
    shape = (bottom - top + 1, _SAMPLES, right - left + 1, _SAMPLES)
    cover = np.zeros((height, width))
    cover[top : bottom + 1, left : right + 1] = inside.reshape(shape).mean(axis=(1, 3))
    return cover


def _inside(kind: str, u_X: FloatArray, v_Y: FloatArray) -> NDArray[np.bool_]:
    """Whether points lie in a shape whose box is [-1, 1] x [-1, 1].  bool [Y, X]"""
    inside: NDArray[np.bool_]
    if kind in ("circle", "ellipse"):
        inside = u_X**2 + v_Y**2 <= 1
    elif kind == "diamond":
        inside = np.abs(u_X) + np.abs(v_Y) <= 1
    else:  # a triangle on its base, the tip in the middle of the upper side
        inside = (2 * np.abs(u_X) <= v_Y + 1) & (v_Y <= 1)
    return inside


def _layout(config: ShapesConfig, rng: random.Random) -> list[SceneObject]:
    names = [(color, kind) for color in config.colors for kind in config.kinds]
    random.Random("coordexp-shapes/names").shuffle(names)  # which names are rare: the same in every scene
    weights = [(rank + 1) ** -config.name_skew for rank in range(len(names))]
    num_objects = rng.randint(config.min_objects, config.max_objects)
    for _ in range(LAYOUT_TRIES):
        objects: list[SceneObject] = []
        for _ in range(num_objects):
            color, kind = _free_name(names, weights, objects, rng)
            box = _place(config, rng, kind, [one.box_xyxy for one in objects])
            if box is not None:
                objects.append(SceneObject(f"{color} {kind}", box))
        if len(objects) >= config.min_objects:
            return objects
    raise no_room(config)


def _free_name(
    names: Sequence[tuple[str, str]],
    weights: Sequence[float],
    objects: Sequence[SceneObject],
    rng: random.Random,
) -> tuple[str, str]:
    """A name whose colour nobody wears in this scene, while there are such."""
    worn = {one.desc.split()[0] for one in objects}
    free = [(name, weight) for name, weight in zip(names, weights, strict=True) if name[0] not in worn]
    pool = free or list(zip(names, weights, strict=True))
    return rng.choices([name for name, _ in pool], [weight for _, weight in pool])[0]


def _place(config: ShapesConfig, rng: random.Random, kind: str, others: Sequence[Box]) -> Box | None:
    """A box that shares at most `max_overlap` of the smaller one's area with every other, or None."""
    for _ in range(_PLACEMENT_TRIES):
        box_width = rng.uniform(config.min_side, config.max_side)
        box_height = box_width if kind == "circle" else rng.uniform(config.min_side, config.max_side)
        x1 = rng.uniform(0, config.width - 1 - box_width)
        y1 = rng.uniform(0, config.height - 1 - box_height)
        box = (x1, y1, x1 + box_width, y1 + box_height)
        if all(
            _shared_area(box, other) <= config.max_overlap * min(_area(box), _area(other)) for other in others
        ):
            return box
    return None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
