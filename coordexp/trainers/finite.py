"""A loss that is not finite never reaches the weights: the run stops, or the step is skipped, on all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from coordexp.errors import CoordExpError

logger = logging.getLogger(__name__)

SHOWN_SAMPLES = 8
ADVICE = "Lower the learning rate or max_grad_norm, or look at these samples"


class NonFiniteLossError(CoordExpError):
    """A term of the loss is NaN or infinite."""


class StepHeard(NamedTuple):
    """What every rank knows of a step.

    loss: of each rank its losses added up, the mean of them.  said: the largest number that a rank said.
    """

    loss: float
    said: int


class FiniteLossGuard:
    """Collects the loss terms of an optimizer step on the device; `check` looks at them once, at its end.

    All ranks watch the same terms, any number of times, and call `check` equally often. `check` costs one small
    collective and the only host sync of the step, before the backward pass of the last micro-batch. The loss of the
    step and a number of each rank come along.

    Arguments:
        on_nonfinite: `custom.on_nonfinite_loss`. `skip_step` also needs a `DropUpdate` among the trainer's callbacks.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip_step"] = "stop") -> None:
        self._on_nonfinite = on_nonfinite
        self._names: tuple[str, ...] = ()
        self._flags: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._samples: list[Sequence[str]] = []
        self._drops_update = False

    def watch(
        self, terms: Mapping[str, Tensor], sample_ids: Sequence[str] = (), *, loss: Tensor | None = None
    ) -> None:
        """Remember whether each term (0-dim) of one micro-batch is finite, and its loss (0-dim). No host sync."""
        self._names = tuple(terms)
        self._flags.append(torch.stack([term.detach().isfinite().logical_not() for term in terms.values()]))
        self._losses.append((self._flags[-1].new_zeros(()) if loss is None else loss.detach()).float())
        self._samples.append(sample_ids)

    def check(self, step: int, said: int = 0) -> StepHeard:
        """Look for terms that were not finite on any rank, and forget the terms. The same on every rank.

        said: a small number >= 0 that this rank tells the others on the way.
        Raises NonFiniteLossError for `stop`. For `skip_step` it warns, and the next `take_drop` is True.
        """
        bad_MA, samples, losses = torch.stack(self._flags).to(torch.int8), self._samples, self._losses
        self._flags, self._samples, self._losses = [], [], []
        # [A + 2]: terms, the loss, what is said; ranks may have run different numbers of micro-batches
        loss = torch.stack(losses).sum()
        own = torch.cat([bad_MA.amax(0).float(), torch.stack([loss, loss.new_full((), float(said))])])
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, own)
        by_rank: list[list[float]] = torch.stack(ranks).tolist()
        heard = StepHeard(
            sum(row[-2] for row in by_rank) / len(by_rank), int(max(row[-1] for row in by_rank))
        )
        if not any(any(row[:-2]) for row in by_rank):
            return heard
        found = f"the loss is not finite at step {step} ({self._describe_all(bad_MA, samples)})."
        if self._on_nonfinite == "stop":
            raise NonFiniteLossError(
                f"{found} Stopped before the optimizer update, so the weights are those of the step before. {ADVICE}; "
                "resume from the last checkpoint, or set custom.on_nonfinite_loss: skip_step."
            )
        self._drops_update = True
        logger.warning("%s The step is skipped: its gradients are dropped on all ranks. %s.", found, ADVICE)
        return heard

    def take_drop(self) -> bool:
        """Whether the gradients of the step must be dropped; False from then on."""
        drops, self._drops_update = self._drops_update, False
        return drops

    def _describe_all(self, bad_MA: Tensor, samples: Sequence[Sequence[str]]) -> str:
        """Rank, micro-batch, terms and samples of everything that was not finite on any rank, in words."""
        own = self._describe(bad_MA, samples)
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [[]] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        return "; ".join(
            f"rank {rank}, {found}" for rank, descriptions in enumerate(ranks) for found in descriptions
        )

    def _describe(self, bad_MA: Tensor, samples: Sequence[Sequence[str]]) -> list[str]:
        found = []
        for micro, bad_A in enumerate(bad_MA.tolist()):
            terms = [name for name, is_bad in zip(self._names, bad_A, strict=True) if is_bad]
            of = _shown(samples[micro])
            if terms:
                found.append(f"micro-batch {micro}: {', '.join(terms)}" + (f", of {of}" if of else ""))
        return found


class DropUpdate(TrainerCallback):
    """Drops the gradients of a skipped step just before the optimizer would use them.

    Parameters without a gradient are left alone by every optimizer, weight decay and moments included.

    Arguments:
        guard: says which steps.
        on_skip: called once for each.
        unscale: fp16's gradient scaler looks at the gradients in it, if it has not yet: it refuses to step without.
    """

    def __init__(
        self, guard: FiniteLossGuard, on_skip: Callable[[], None], unscale: Callable[[], None] = lambda: None
    ) -> None:
        self._guard, self._on_skip, self._unscale = guard, on_skip, unscale

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._guard.take_drop():
            self._on_skip()
            self._unscale()
            kwargs["optimizer"].zero_grad(set_to_none=True)


def _shown(sample_ids: Sequence[str]) -> str:
    more = len(sample_ids) - SHOWN_SAMPLES
    return ", ".join(sample_ids[:SHOWN_SAMPLES]) + (f" and {more} more" if more > 0 else "")
