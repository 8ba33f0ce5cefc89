"""A picture with the shapes of its objects, in torchvision's types, and the way from a record and back.

    boxes    edges: the left edge of the first pixel to the right edge of the last, 0..width
    points   pixel centres, 0..width - 1, as torchvision has them

A record's box names its first and last pixel, in bins; so x1 is the edge x1, and x2 the edge x2 + 1. Under this reading
a mirrored box is exactly 999 - k, and a box stays tight around its pixels when the picture is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from coordexp.codec.records import Record
from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.geometry import MAX_BIN, IntArray, dequantize_points, quantize_boxes, quantize_points


@dataclass(frozen=True, eq=False)
class PictureScene:
    """picture: uint8 [3, H, W].  boxes: float64 [N, 4] xyxy, edges.  points: float64 [V, 2], corners of outlines.

    box_of: int64 [N], which object of the record a box belongs to.  point_of: int64 [V], the same for corners, which
    stay together and in their order.
    """

    picture: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    points: tv_tensors.KeyPoints
    box_of: Tensor
    point_of: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.picture.shape[-2:]
        return int(width), int(height)

    @property
    def num_objects(self) -> int:
        return len(self.box_of) + len(self.outlines)

    @property
    def outlines(self) -> list[int]:
        """The objects that have an outline."""
        return sorted(set(self.point_of.tolist()))


def scene_of(record: Record, picture: Image.Image) -> PictureScene:
    """The scene of a record and its picture, which has the size that the record states."""
    size = record.width, record.height
    corners = [
        (index, point)
        for index, obj in enumerate(record.objects)
        for point in dequantize_points(np.reshape(obj.bins, (-1, 2)), *size).tolist()
    ]
    is_box = [obj.kind == KIND_BBOX for obj in record.objects]
    boxes_N4 = torch.tensor(
        [point for index, point in corners if is_box[index]], dtype=torch.float64
    ).reshape(-1, 4)
    points_V2 = torch.tensor([point for index, point in corners if not is_box[index]], dtype=torch.float64)
    canvas = (record.height, record.width)
    return PictureScene(
        picture=transforms.to_image(picture),
        boxes=_boxes(boxes_N4 + torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64), canvas),
        points=tv_tensors.KeyPoints(points_V2.reshape(-1, 2), canvas_size=canvas),
        box_of=torch.tensor([index for index, box in enumerate(is_box) if box], dtype=torch.int64),
        point_of=torch.tensor([index for index, _ in corners if not is_box[index]], dtype=torch.int64),
    )


def record_of_scene(scene: PictureScene, record: Record) -> Record:
    """`record` as the scene shows it: its size, and the objects that are left, in their order."""
    width, height = scene.size
    edges = scene.boxes.numpy()
    boxes = np.concatenate([edges[:, :2], np.maximum(edges[:, 2:] - 1, edges[:, :2])], axis=1)
    bins = {
        index: _widened(box)
        for index, box in zip(scene.box_of.tolist(), quantize_boxes(boxes, width, height), strict=True)
    }
    corners = quantize_points(scene.points.numpy(), width, height)
    for index in scene.outlines:
        bins[index] = tuple(corners[scene.point_of.numpy() == index].ravel().tolist())
    objects = tuple(
        BoxObject(obj.desc, obj.kind, bins[index])
        for index, obj in enumerate(record.objects)
        if index in bins
    )
    return replace(record, width=width, height=height, objects=objects)


def picture_of(scene: PictureScene) -> Image.Image:
    """The picture, for the processor of a model."""
    shown: Image.Image = transforms.to_pil_image(scene.picture)
    return shown


def with_shapes(
    scene: PictureScene,
    boxes: Tensor,
    points: Tensor,
    box_of: Tensor,
    point_of: Tensor,
    canvas: tuple[int, int],
) -> PictureScene:
    """The scene with other shapes. canvas: height and width they lie in."""
    return replace(
        scene,
        boxes=_boxes(boxes, canvas),
        points=tv_tensors.KeyPoints(points, canvas_size=canvas),
        box_of=box_of,
        point_of=point_of,
    )


def _boxes(boxes_N4: Tensor, canvas: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    # Clamping would hide how much of an object is left.
    return tv_tensors.BoundingBoxes(boxes_N4, format="XYXY", canvas_size=canvas, clamping_mode=None)


def _widened(bins: IntArray) -> tuple[int, ...]:
    """A box of which no side has collapsed to one bin."""
    x1, y1, x2, y2 = bins.tolist()
    if x1 == x2:
        x1, x2 = (x1, x2 + 1) if x2 < MAX_BIN else (x1 - 1, x2)
    if y1 == y2:
        y1, y2 = (y1, y2 + 1) if y2 < MAX_BIN else (y1 - 1, y2)
    return x1, y1, x2, y2
