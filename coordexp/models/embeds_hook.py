"""Other embeddings in the place of some tokens' own, for the forwards within a context.

The model still gets `input_ids`, so template, image placeholders, positions and masks are what they are. The hook is
there within its context alone and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from coordexp.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""The embedding module within its own call (weights that are partitioned elsewhere are there), ids [B, T] and their
embeddings [B, T, H] -> what takes the place of these embeddings. What it looks up in the module is left alone."""


@contextmanager
def embeds_replaced(model: nn.Module, replace: Replace, *, what: str) -> Iterator[None]:
    """Within this context the embedding module of `model` gives what `replace` makes of a batch of token ids [B, T].

    Arguments:
        model: has `get_input_embeddings`; unwrapped from DDP or DeepSpeed.
        what: the forward that is meant, for the error.

    Raises:
        ContractError: the model did not embed a batch of token ids [B, T] within the context.
    """
    embedding = cast("PreTrainedModel", model).get_input_embeddings()
    is_inside = False
    num_batches = 0

    def hook(module: nn.Module, args: tuple[Any, ...], embeds: Tensor) -> Tensor | None:
        nonlocal is_inside, num_batches
        if is_inside or args[0].ndim != 2:  # only [B, T]: models also look up single tokens
            return None
        num_batches += 1
        is_inside = True
        try:  # other hooks see what is looked up here
            return replace(module, args[0], embeds)
        finally:
            is_inside = False

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if num_batches == 0:
        raise ContractError(
            f"{type(model).__name__} did not embed token ids during {what}; pass it input_ids, not inputs_embeds"
        )
