"""Stop a run whose loss is not finite, before the optimizer can spread the damage, on all ranks together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from coordexp.errors import CoordExpError


class NonFiniteLossError(CoordExpError):
    """A term of the loss is NaN or infinite."""


class FiniteLossGuard:
    """Collects the loss terms of an optimizer step on the device; `check` looks at them once, at its end.

    All ranks call `watch` with the same terms and `check` equally often. `check` costs one small collective and the
    only host sync of the step, before the backward pass of the last micro-batch.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._flags: list[Tensor] = []

    def watch(self, terms: Mapping[str, Tensor]) -> None:
        """Remember whether each term (0-dim) of one micro-batch is finite. No host sync."""
        self._names = tuple(terms)
        self._flags.append(torch.stack([term.detach().isfinite().logical_not() for term in terms.values()]))

    def check(self, step: int) -> None:
        """Raise NonFiniteLossError on every rank if any term of any rank was not finite; forget the terms."""
        bad_MA = torch.stack(self._flags).to(torch.int8)
        self._flags = []
        ranks = [bad_MA]
        if dist.is_available() and dist.is_initialized():
            ranks = [torch.empty_like(bad_MA) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, bad_MA)
        bad_RMA = torch.stack(ranks)
        if not bad_RMA.any():
            return
        found = [
            f"rank {rank}, micro-batch {micro}: {self._names[atom]}"
            for rank, micro, atom in bad_RMA.nonzero().tolist()
        ]
        raise NonFiniteLossError(
            f"the loss is not finite at step {step} ({'; '.join(found)}). Stopped before the optimizer update, so the "
            "weights are those of the step before. Lower the learning rate or max_grad_norm, or look at the data of "
            "that micro-batch; resume from the last checkpoint."
        )
