"""Proof that packed samples stay apart: of every batch, on the host; and once of the model itself.

Attention implementations differ in what they read: cumulative lengths, the text row of the position ids, a mask. Where
none of it is read, nothing fails: later samples attend to earlier ones, and the loss only looks a little odd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.errors import ContractError

NOT_SUPERVISED = -100
TEXT_AND_MROPE = 4
"""Rows of position ids: text, time, height, width."""
MakePack = Callable[[Sequence[Sequence[int]]], dict[str, Any]]
"""Token ids of several text samples -> keyword arguments of one packed forward, on the model's device."""

PROBE_TOKENS = 8
_TOLERANCE = 1e-2  # of the largest logit; a sample that sees the one before it differs by tens of percent


@torch.no_grad()
def check_samples_kept_apart(model: nn.Module, make_pack: MakePack, token_ids: Sequence[int]) -> None:
    """Two forwards over a pack of two tiny samples: changing the first must leave the second as it was.

    Args:
        model: called as in training (it may be wrapped; all ranks call together); its training mode is restored.
        make_pack: as training batches are made.
        token_ids: at least 3 * PROBE_TOKENS different ids of ordinary tokens.

    Raises:
        ContractError: the second sample changed.
    """
    first, other, second = (token_ids[i * PROBE_TOKENS : (i + 1) * PROBE_TOKENS] for i in range(3))
    was_training = model.training
    model.eval()
    try:
        before, after = (_logits_of_last(model, make_pack([start, second])) for start in (first, other))
    finally:
        model.train(was_training)
    difference, scale = (after - before).abs().max().item(), before.abs().max().item()
    if not difference <= _TOLERANCE * scale:
        raise ContractError(
            f"the model does not keep packed samples apart: changing one sample moved the logits of the next by "
            f"{difference:.3g} (largest logit {scale:.3g}; expected no change). Its attention ignores where samples "
            "begin. Use attn_impl: flash_attn, or train without packing."
        )


def _logits_of_last(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits_1TV: Tensor = model(**inputs, use_cache=False).logits
    return logits_1TV[0, -PROBE_TOKENS:].float()


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
