"""What a packed batch must look like for its samples to stay apart; looked at on the host, before it is moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coordexp.errors import ContractError

NOT_SUPERVISED = -100
TEXT_AND_MROPE = 4
"""Rows of position ids: text, time, height, width."""


def check_pack(batch: Mapping[str, Any], num_samples: int) -> None:
    """Of a collated batch with more samples than sequences: position ids and labels restart with every sample.

    Raises:
        ContractError: samples would attend to each other, or the first token of one would be taught by the last
            row of another.
    """
    labels_BT: Tensor = batch["labels"]
    if num_samples <= labels_BT.shape[0]:
        return
    position_ids, found = batch.get("position_ids"), f"a pack of {num_samples} samples"
    if position_ids is None or position_ids.ndim != 3 or position_ids.shape[0] != TEXT_AND_MROPE:
        shape = None if position_ids is None else list(position_ids.shape)
        raise ContractError(
            f"{found} has position ids of shape {shape}; expected [4, 1, T], the text row first: without it later "
            "samples would attend to earlier ones. Is the template coordexp's qwen3_vl?"
        )
    if batch.get("attention_mask") is not None:
        raise ContractError(
            f"{found} has an attention mask, under which transformers ignores where samples begin; expected none."
        )
    text_BT = position_ids[0]
    begins_BT = text_BT.diff(dim=-1, prepend=text_BT[:, :1] - 2) != 1
    num_begins = int(begins_BT.sum())
    if num_begins != num_samples:
        raise ContractError(
            f"{found} has text positions that begin {num_begins} times; expected one beginning for each sample."
        )
    if bool((labels_BT[begins_BT] != NOT_SUPERVISED).any()):
        raise ContractError(
            f"{found} supervises the first token of a sample, which the last row of the sample before it would be "
            "taught; expected every sample to begin with its prompt."
        )
