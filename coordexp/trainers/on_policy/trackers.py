"""Pictures in the trackers of the HF Trainer that are on (`report_to`): TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback


def show_in_trackers(
    callbacks: Sequence[Any], tag: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int
) -> None:
    """Hand the pictures to each tracker among `callbacks` that has started, under `tag`, at optimizer step `step`."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for index, picture in enumerate(pictures):
                pixels_HW3 = np.asarray(picture.convert("RGB"))
                callback.tb_writer.add_image(f"{tag}/{index:02d}", pixels_HW3, step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback) and callback._initialized:
            wandb = callback._wandb
            images = [
                wandb.Image(picture, caption=caption)
                for picture, caption in zip(pictures, captions, strict=True)
            ]
            wandb.log({tag: images, "train/global_step": step})
