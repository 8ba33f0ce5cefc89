"""Vectors in the place of latent tokens.

Latent tokens are ordinary text tokens, so the chat template, image placeholders, positions (M-RoPE) and masks are what
they are without a prefix; only the rows that the embedding module gives for them are replaced, in a forward hook. The
model still gets `input_ids`: as in `models.self_context`, every other row is what it was, to the bit. The hook is there
within a context alone and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coordexp.errors import ContractError
from coordexp.models.embeds_hook import embeds_replaced
from coordexp.models.latent_prefix.deep import DeepPrefix, deep_in_place

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
def latents_in_place(
    model: nn.Module, latent_ids_M: Tensor, vectors: Tensor | MakeVectors, deep: DeepPrefix | None = None
) -> Iterator[None]:
    """Within this context the embedding module of `model` gives `vectors` for latent tokens.

    Arguments:
        model: has `get_input_embeddings`; unwrapped from DDP or DeepSpeed.
        vectors: float [S, M, H], or what makes them, inside the forward of the model.
        deep: what the layers read beside; the model is ready for it (`deep.read_deep`).

    Raises:
        ContractError: the model did not embed a batch of token ids [B, T] within the context.
    """

    def replace(module: nn.Module, input_ids_BT: Tensor, embeds: Tensor) -> Tensor:
        found = vectors if isinstance(vectors, Tensor) else vectors(module)
        return place_vectors(embeds, input_ids_BT, latent_ids_M, found)

    with deep_in_place(model, deep), embeds_replaced(model, replace, what="a forward with a latent prefix"):
        yield
