"""Vectors in the place of latent tokens.

Latent tokens are ordinary text tokens, so the chat template, image placeholders, positions (M-RoPE) and masks are what
they are without a prefix; only the rows that the embedding module gives for them are replaced, in a forward hook. The
model still gets `input_ids`: as in `models.self_context`, every other row is what it was, to the bit. The hook is there
within a context alone and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from coordexp.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeVectors = Callable[[nn.Module], Tensor]
"""The embedding module, within its own call, to vectors [S, M, H]: weights that are partitioned elsewhere are there."""


def place_vectors(
    embeds_BTH: Tensor, input_ids_BT: Tensor, latent_ids_M: Tensor, vectors_SMH: Tensor
) -> Tensor:
    """`embeds_BTH` with the rows of latent tokens replaced. No host sync.

    Arguments:
        input_ids_BT: every sample has the latent tokens once each, in order; a row of a batch holds one sample, or
            several (packed), or none.
        vectors_SMH: of all samples in order.
    """
    flat = input_ids_BT.flatten()
    is_token_NM = flat.unsqueeze(-1) == latent_ids_M
    is_latent_N = is_token_NM.any(-1)
    latent_N = is_token_NM.to(torch.uint8).argmax(-1)
    sample_N = (is_token_NM[:, 0].cumsum(0) - 1).clamp(min=0)
    rows_NH = vectors_SMH[sample_N, latent_N].to(embeds_BTH.dtype)
    placed = torch.where(is_latent_N.unsqueeze(-1), rows_NH, embeds_BTH.flatten(0, 1))
    return placed.view_as(embeds_BTH)


def check_places(input_ids_BT: Tensor, latent_ids: Sequence[int], num_samples: int) -> None:
    """ContractError unless the ids hold the latent tokens of `num_samples` samples, each in order. On the host."""
    wanted = torch.tensor(list(latent_ids), device=input_ids_BT.device)
    found = input_ids_BT[torch.isin(input_ids_BT, wanted)]
    if not torch.equal(found, wanted.repeat(num_samples)):
        raise ContractError(
            f"{num_samples} samples with {len(latent_ids)} latent tokens each were expected, in order; the batch holds "
            f"{found.numel()} of them. A prompt holds them once, as the user message."
        )


@contextmanager
def latents_in_place(model: nn.Module, latent_ids_M: Tensor, vectors: Tensor | MakeVectors) -> Iterator[None]:
    """Within this context the embedding module of `model` gives `vectors` for latent tokens.

    Arguments:
        model: has `get_input_embeddings`; unwrapped from DDP or DeepSpeed.
        vectors: float [S, M, H], or what makes them, inside the forward of the model.

    Raises:
        ContractError: the model did not embed a batch of token ids [B, T] within the context.
    """
    embedding = cast("PreTrainedModel", model).get_input_embeddings()
    is_inside = False
    num_batches = 0

    def replace(module: nn.Module, args: tuple[Any, ...], embeds: Tensor) -> Tensor | None:
        nonlocal is_inside, num_batches
        if is_inside or args[0].ndim != 2:
            return None
        num_batches += 1
        is_inside = True
        try:
            found = vectors if isinstance(vectors, Tensor) else vectors(module)
        finally:
            is_inside = False
        return place_vectors(embeds, args[0], latent_ids_M, found)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if num_batches == 0:
        raise ContractError(
            f"{type(model).__name__} did not embed token ids during a forward with a latent prefix; pass it input_ids, "
            "not inputs_embeds"
        )
