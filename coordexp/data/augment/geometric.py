"""Operations that move the shapes of a scene with its picture: mirror, scale, cut out a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from coordexp.data.augment.scene import PictureScene, with_shapes

Window = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def mirrored(scene: PictureScene, *, top_for_bottom: bool = False) -> PictureScene:
    """Left for right, or top for bottom."""
    flip: Callable[..., Tensor] = transforms.vertical_flip if top_for_bottom else transforms.horizontal_flip
    return replace(scene, picture=flip(scene.picture), boxes=flip(scene.boxes), points=flip(scene.points))


def scaled(scene: PictureScene, width: int, height: int) -> PictureScene:
    """The picture in another size, with anti-aliasing."""
    if (width, height) == scene.size:
        return scene
    size = [height, width]
    # Points lie at pixel centres, half a pixel from the edges that scaling is about.
    corners = scene.points + 0.5
    old_width, old_height = scene.size
    factors = torch.tensor([width / old_width, height / old_height], dtype=torch.float64)
    boxes = transforms.resize(scene.boxes, size)
    resized = with_shapes(
        scene,
        boxes,
        corners.as_subclass(Tensor) * factors - 0.5,
        scene.box_of,
        scene.point_of,
        (height, width),
    )
    return replace(resized, picture=transforms.resize(scene.picture, size, antialias=True))


def window_of(scene: PictureScene, window: Window, min_visible: float) -> PictureScene:
    """What a window shows. Objects of whose area less than `min_visible` is left, or none, are left out."""
    shapes = shapes_in(scene, window, min_visible)
    return replace(shapes, picture=transforms.crop(scene.picture, *window))


def shapes_in(scene: PictureScene, window: Window, min_visible: float) -> PictureScene:
    """`window_of` with the picture as it was: for looking at what would be left."""
    height, width = window[2:]
    whole = transforms.crop(scene.boxes, *window).as_subclass(Tensor)
    ends = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = torch.minimum(whole.clamp(min=0.0), ends)
    kept = _is_kept(_areas(boxes), _areas(whole), min_visible)
    moved = transforms.crop(scene.points, *window).as_subclass(Tensor)
    outlines = [
        (index, cut)
        for index in scene.outlines
        if (cut := _outline_in(moved[scene.point_of == index], width, height, min_visible)) is not None
    ]
    return with_shapes(
        scene,
        boxes[kept],
        torch.cat([torch.empty(0, 2, dtype=torch.float64), *(cut for _, cut in outlines)]),
        scene.box_of[kept],
        torch.tensor([index for index, cut in outlines for _ in cut], dtype=torch.int64),
        (height, width),
    )


def _areas(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp(min=0.0).prod(dim=1)


def _is_kept(left: Tensor, whole: Tensor, min_visible: float) -> Tensor:
    return (left > 0) & (left >= min_visible * whole * (1 - 1e-9))


def _outline_in(points_V2: Tensor, width: int, height: int, min_visible: float) -> Tensor | None:
    """The outline cut at the borders of the window, None where too little of it is left.

    An outline that lies inside stays as it is, even one without area.
    """
    low, high = (
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64),
    )
    if bool(((points_V2 >= low) & (points_V2 <= high)).all()):
        return points_V2
    cut = points_V2
    for axis in (0, 1):
        cut = _beyond(cut, axis, float(low[axis]), 1.0)
        cut = _beyond(cut, axis, float(high[axis]), -1.0)
    enough = len(cut) >= 3 and bool(_is_kept(_outline_area(cut), _outline_area(points_V2), min_visible))
    return cut if enough else None


def _beyond(points_V2: Tensor, axis: int, border: float, sign: float) -> Tensor:
    """The part of an outline on one side of a line (Sutherland and Hodgman)."""
    kept: list[Tensor] = []
    distance = sign * (points_V2[:, axis] - border)
    for index in range(len(points_V2)):
        before, here = distance[index - 1], distance[index]
        if (before < 0) != (here < 0):
            share = before / (before - here)
            kept.append(points_V2[index - 1] + share * (points_V2[index] - points_V2[index - 1]))
        if here >= 0:
            kept.append(points_V2[index])
    return torch.stack(kept) if kept else points_V2[:0]


def _outline_area(points_V2: Tensor) -> Tensor:
    x, y = points_V2.unbind(dim=1)
    return (x * y.roll(-1) - x.roll(-1) * y).sum().abs() / 2
