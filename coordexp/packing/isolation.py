"""Does a model keep packed samples apart? Asked once, of the model itself, before it is trained on packs.

Attention implementations differ in what they read: cumulative lengths, the text row of the position ids, a mask. Where
none of it is read, nothing fails: later samples attend to earlier ones, and the loss only looks a little odd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.errors import ContractError

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
