"""Prompts as a template encodes them for training: token ids up to the answer, and the image patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swift.dataset import LazyLLMDataset
from torch import Tensor

from coordexp.errors import ConfigError, RecordError


@dataclass(frozen=True)
class EncodedPrompt:
    """What the model sees before its answer, image placeholders expanded.

    pixel_values_PD, image_grid_thw_I3: patches and grids of all images, from the processor; None without images.
    """

    token_ids: tuple[int, ...]
    pixel_values_PD: Tensor | None
    image_grid_thw_I3: Tensor | None


def rows_of(dataset: Any) -> Any:
    """The rows that ms-swift was about to encode: a dataset of `messages`, `images` and the columns of the loader."""
    if dataset is None:
        return None
    if isinstance(dataset, LazyLLMDataset):
        return dataset.dataset
    raise ConfigError(
        f"ms-swift hands over a {type(dataset).__name__}; training on rollouts starts from plain rows. "
        "Remove packing, streaming and cached_dataset from the flags."
    )


def encode_prompt(template: Any, row: Mapping[str, Any]) -> EncodedPrompt:
    """The prompt of a row of user and assistant messages, by the template in train mode.

    Raises:
        RecordError: the template supervises no token, so there is no place where the answer begins.
    """
    encoded = template.encode({"messages": row["messages"], "images": row["images"]})
    labels = encoded["labels"]
    start = next((index for index, label in enumerate(labels) if label != -100), None)
    if not start:
        raise RecordError(
            f"the template supervises none of the {len(labels)} tokens of {row['images']}; expected a user message and "
            "an answer. Is it longer than max_length?"
        )
    return EncodedPrompt(
        tuple(encoded["input_ids"][:start]), encoded.get("pixel_values"), encoded.get("image_grid_thw")
    )
