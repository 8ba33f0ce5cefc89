"""Gradients of a prefix that takes no part in a forward, met by ranks all the same.

The prefix is a part of the model, but its vectors are made outside of the model's forward. DDP exchanges gradients of
weights that it finds behind the output of its own forward: weights behind the loss alone are exchanged too early, and
in a step without a forward not at all. So the weights are tied to the forward by a term that is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coordexp.models.embeds_hook import embeds_replaced
from coordexp.trainers.latent.forwards import run_rows

_BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")


def tied_to(model: nn.Module, anchor: Tensor) -> AbstractContextManager[None]:
    """Within this context the output of the model depends on `anchor`, with a gradient of zero, and is what it was.

    model: unwrapped.  anchor: 0-dim, finite.
    """

    def add_nothing(_embedding: nn.Module, _input_ids_BT: Tensor, embeds_BTH: Tensor) -> Tensor:
        return embeds_BTH + (0.0 * anchor).to(embeds_BTH.dtype)

    return embeds_replaced(model, add_nothing, what="a forward that a prefix is tied to")


def meet_without_forward(
    model: nn.Module, unwrapped: nn.Module, inputs: Mapping[str, Any], anchor: Tensor
) -> Tensor | float:
    """Zero, which the loss of a step without a forward must depend on.

    Under DDP that is the output of a forward of one token, which no logits are made of.

    model: what the step would call.  inputs: of a batch.  anchor: see `tied_to`.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    one_token = {key: inputs[key][..., :1, :1] for key in _BY_TOKEN if inputs.get(key) is not None}
    no_rows = one_token["input_ids"].new_empty(0)
    nothing: Tensor = run_rows(
        model, unwrapped, one_token, no_rows, placed=tied_to(unwrapped, anchor)
    ).logits_RV
    return nothing.float().sum()
