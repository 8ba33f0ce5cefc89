"""Position ids of Qwen3-VL, per sample, so that samples can be packed.

The model takes four rows: the position in the text, then time, height and width of its rotary embedding
(mRoPE). The text row matters for packing only: transformers takes every place where it does not grow by one
for the start of another sample and keeps attention within samples. With three rows, or with a cache, there is
no such row, and later samples silently attend to earlier ones.

`Qwen3VLModel.get_rope_index` computes the same three rows. It is a method of the loaded model; this is a
function of token ids and image grids, for data workers and for code that holds a wrapped model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from coordexp.errors import ConfigError, ContractError
from coordexp.geometry import IntArray


@dataclass(frozen=True)
class VisionLayout:
    """How a model writes images into its token sequence."""

    image_token_id: int
    """The placeholder: one for each visual token."""
    spatial_merge_size: int
    """Patches per visual token and axis."""

    @classmethod
    def from_config(cls, config: Any) -> VisionLayout:
        """From a Qwen3-VL model config; ConfigError when it is not of that family."""
        image_token_id = getattr(config, "image_token_id", None)
        merge_size = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        if image_token_id is None or merge_size is None:
            raise ConfigError(
                f"{type(config).__name__} has no image_token_id or vision_config.spatial_merge_size; expected "
                "the config of a Qwen3-VL model"
            )
        return cls(int(image_token_id), int(merge_size))


def position_ids(
    token_ids_T: Sequence[int] | IntArray, image_grid_thw_I3: ArrayLike, layout: VisionLayout
) -> IntArray:
    """Text, time, height and width position of each token of one sample.

    Text tokens count on together on all axes. An image of (t, h, w) visual tokens that starts at position p
    has time p + 0..t-1, height p + 0..h-1 and width p + 0..w-1; the text behind it goes on at p + max(h, w).
    (Qwen2-VL, arXiv 2409.12191, section 2.1, as transformers computes it for Qwen3-VL.)

    image_grid_thw_I3: patches (t, h, w) of each image in the order of their placeholders; may be empty.
    Returns int64 [4, T]. Raises ContractError when placeholders and images do not fit together.
    """
    ids_T = np.asarray(token_ids_T, dtype=np.int64)
    merge = np.array([1, layout.spatial_merge_size, layout.spatial_merge_size])
    grids_I3 = np.asarray(image_grid_thw_I3, dtype=np.int64).reshape(-1, 3) // merge
    is_image_T = ids_T == layout.image_token_id
    _check_placeholders(int(is_image_T.sum()), grids_I3)
    mrope_3T = np.empty((3, len(ids_T)), dtype=np.int64)
    done = position = 0
    for grid in grids_I3:
        start = done + int(np.argmax(is_image_T[done:]))
        stop = start + int(grid.prod())
        if not is_image_T[start:stop].all():
            raise ContractError(
                f"the placeholders of an image of {grid.tolist()} visual tokens begin at token {start} but are "
                f"interrupted before token {stop}; expected {stop - start} in a row"
            )
        mrope_3T[:, done:start] = position + np.arange(start - done)
        position += start - done
        mrope_3T[:, start:stop] = position + np.indices(grid).reshape(3, -1)
        position += int(grid[1:].max())
        done = stop
    mrope_3T[:, done:] = position + np.arange(len(ids_T) - done)
    return np.concatenate([np.arange(len(ids_T))[None], mrope_3T])


def _check_placeholders(num_placeholders: int, grids_I3: IntArray) -> None:
    num_visual = int(grids_I3.prod(axis=1).sum())
    if num_placeholders != num_visual:
        raise ContractError(
            f"the prompt has {num_placeholders} image placeholders, its {len(grids_I3)} images make {num_visual} "
            f"visual tokens (grids {grids_I3.tolist()}): expand every placeholder exactly once"
        )
