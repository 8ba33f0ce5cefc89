"""Self-context: forwards whose coordinate inputs are what the model itself expected there.

The first forward is teacher-forced. In every further one, the embedding of a coordinate token at position p is
replaced by one made from the previous forward's distribution over the K coordinate tokens at row p - 1:

    soft   sum_k p(k) E[k], the expected embedding
    hard   E[argmax p]
    st     the value of hard with the gradient of soft (straight-through)

with p = softmax(z[C] / T) and E the embeddings of the coordinate tokens. Gradients reach the earlier forwards through
p (`unroll`), or p is held fixed (`em_detach`).

The replacement is a forward hook on the embedding module, registered last: the model still gets `input_ids`, so the
places of image features (also the deepstack ones), positions and masks are found as always, other hooks on the
embedding apply to all rows and to E, and every row but the slots is what it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from coordexp.errors import ContractError
from coordexp.models.embeds_hook import embeds_replaced

EmbedMode = Literal["soft", "st", "hard"]
GradMode = Literal["unroll", "em_detach"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class CoordSlots:
    """The coordinate tokens of a batch that are replaced."""

    positions_N: Tensor
    """int64 [N]: b * T + p of each token in the flattened batch, p >= 1, none twice."""
    coord_ids_K: Tensor
    """int64 [K]: ids of the coordinate tokens in bin order."""

    @property
    def rows_N(self) -> Tensor:
        """Rows of the flattened logits that predict the slots: one before each."""
        return self.positions_N - 1


@dataclass(frozen=True)
class SelfContext:
    """How self-context runs: `stage2_ab.n_softctx_iter` and its neighbours."""

    num_forwards: int = 1
    embed_mode: EmbedMode = "soft"
    grad_mode: GradMode = "unroll"
    temperature: float = 1.0
    """T of the distribution that embeddings are made from."""


def run_self_context(
    model: nn.Module,
    slots: CoordSlots,
    settings: SelfContext,
    forward: Callable[[int], tuple[Result, Tensor | None]],
) -> list[Result]:
    """What `forward` returns in each of `settings.num_forwards` iterations.

    Arguments:
        model: has `get_input_embeddings`; unwrapped from DDP or DeepSpeed.
        forward: given the number of the iteration, runs the model once without a cache and returns its result and
            the coordinate logits [N, K] that predict the slots (those of the last iteration are not looked at).

    Raises:
        ContractError: no logits from a forward that another follows.
    """
    results = []
    logits_NK: Tensor | None = None
    for iteration in range(settings.num_forwards):
        if iteration > 0 and logits_NK is None:
            raise ContractError(
                f"self-context: forward {iteration - 1} gave no logits for forward {iteration}"
            )
        in_between = 0 < iteration < settings.num_forwards - 1
        context = nullcontext() if logits_NK is None else embedded_slots(model, slots, logits_NK, settings)
        grad = torch.no_grad() if in_between and settings.grad_mode == "em_detach" else nullcontext()
        with context, grad:
            result, logits_NK = forward(iteration)
        results.append(result)
    return results


@contextmanager
def embedded_slots(
    model: nn.Module, slots: CoordSlots, logits_NK: Tensor, settings: SelfContext
) -> Iterator[None]:
    """Within this context the embedding module of `model` gives the slots what `logits_NK` expects there.

    Arguments:
        logits_NK: float [N, K] of the forward before.

    Raises:
        ContractError: the model did not embed a batch of token ids [B, T] within the context.
    """

    def replace(module: nn.Module, input_ids_BT: Tensor, embeds: Tensor) -> Tensor:
        table_KH = module(slots.coord_ids_K.unsqueeze(0)).squeeze(0)
        slots_NH = slot_embeddings(table_KH, logits_NK, settings).to(embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, slots.positions_N, slots_NH).view_as(embeds)

    with embeds_replaced(model, replace, what="a self-context forward"):
        yield


def slot_embeddings(table_KH: Tensor, logits_NK: Tensor, settings: SelfContext) -> Tensor:
    """Embeddings [N, H] of slots from the logits of their distributions; computed in float32 at least.

    table_KH: embeddings of the coordinate tokens in bin order.
    """
    with torch.autocast(table_KH.device.type, enabled=False):
        dtype = torch.promote_types(table_KH.dtype, torch.float32)
        table_KH, logits_NK = table_KH.to(dtype), logits_NK.to(dtype)
        if settings.grad_mode == "em_detach":
            logits_NK = logits_NK.detach()
        if settings.embed_mode == "soft":
            return _expected(table_KH, logits_NK, settings.temperature)
        hard_NH = table_KH.index_select(0, logits_NK.argmax(-1))
        if settings.embed_mode == "hard":
            return hard_NH
        soft_NH = _expected(table_KH, logits_NK, settings.temperature)
        return hard_NH.detach() + (soft_NH - soft_NH.detach())


def _expected(table_KH: Tensor, logits_NK: Tensor, temperature: float) -> Tensor:
    return (logits_NK / temperature).softmax(-1) @ table_KH
