"""What a model sees of a picture: patches, put together again, and where a dark mark lies in them."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch


class Seen(NamedTuple):
    """What enters the model: patches, and how many of them in time, height and width."""

    pixels_PD: torch.Tensor
    grid_13: torch.Tensor

    @property
    def fingerprint(self) -> str:
        shape = repr(self.grid_13.tolist()).encode()
        return hashlib.sha256(shape + self.pixels_PD.numpy().tobytes()).hexdigest()

    def brightness(self, processor: Any) -> torch.Tensor:
        """[height, width] in 0..1: the picture in the model's frame, put together from the patches."""
        [[_, rows, columns]] = self.grid_13.tolist()
        merge, side = processor.merge_size, processor.patch_size
        patches = self.pixels_PD.reshape(
            rows // merge, columns // merge, merge, merge, 3, processor.temporal_patch_size, side, side
        )
        image_HWC = (
            patches[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)
        )
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        return (image_HWC * std + mean).mean(-1)


def dark_box(brightness_HW: torch.Tensor) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2), inclusive: the smallest box around all dark pixels."""
    ys, xs = torch.nonzero(brightness_HW < 0.35, as_tuple=True)
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())
