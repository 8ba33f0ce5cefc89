"""Training on the first samples of a step while the last are still being generated.

A loss atom is divided by a count over the whole step, and how many tokens a step supervises is known only when its last
rollout is parsed. Gradients are linear in those divisions:

    gradient of the step = sum over denominators d of 1 / N_d * (gradient of the sum of the atoms that N_d divides)

So an early forward is run once per denominator, each time divided by a guess of one N_d and with all other atoms off,
and its gradients are held apart. When the counts are known, every held gradient is multiplied by guess / N_d and they
are added up: gradient, loss and atoms of a step are those of a step without early forwards, up to rounding.

The price of an early forward is one forward and backward per denominator (text; boxes and slots; text gate) in place of
one, and memory for as many copies of the gradients. It is paid in time in which the device would idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from coordexp.losses.sums import divide
from coordexp.rollout.weights.policy_model import preserved_random_state
from coordexp.trainers.step.plan import PlannedForward

Backward = Callable[[PlannedForward, Mapping[str, Tensor]], Tensor]
"""Forward and backward of a planned forward under the given counts; returns its loss, detached."""


class HeldGradients:
    """Gradients in sets of their own, beside `.grad`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sets: dict[str, list[Tensor | None]] = {}

    @contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """What backward passes inside add to `.grad` goes to the set `name`."""
        usual = self._swap(self._sets.get(name, [None] * len(self._parameters)))
        try:
            yield
        finally:
            self._sets[name] = self._swap(usual)

    @torch.no_grad()
    def release(self, factors: Mapping[str, Tensor]) -> None:
        """Add each set, times its factor (0-dim, on the device), to `.grad`; nothing is held any more."""
        while self._sets:
            name, gradients = self._sets.popitem()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is None:
                    continue
                gradient.mul_(factors[name].to(gradient.device))
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _swap(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        before = [parameter.grad for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return before


class EarlyTraining:
    """The early forwards of one step on this rank.

    Arguments:
        denominators: names of the counts that divide a loss atom.

    forwards: those that ran, in order.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], denominators: Sequence[str], device: torch.device
    ) -> None:
        self.forwards: list[PlannedForward] = []
        self._names = tuple(denominators)
        self._device = device
        self._held = HeldGradients(parameters)
        self._guesses: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}

    def run(
        self, forward: PlannedForward, own_counts: Mapping[str, Tensor], share: float, backward: Backward
    ) -> None:
        """Train on `forward` now.

        own_counts: denominators of this forward alone.
        share: of the step's samples in it. With it the counts of the step are guessed, so that numbers keep their
            size; how good the guess is does not matter.
        """
        if not self.forwards:
            self._guesses = {
                name: (own_counts[name] / share).clamp(min=1.0).to(self._device) for name in self._names
            }
        for index, name in enumerate(self._names):
            is_last = index == len(self._names) - 1
            # Metrics are taken once. Dropout draws the same for every denominator.
            shown = replace(forward, counts=is_last)
            same_draws = nullcontext() if is_last else preserved_random_state()
            with same_draws, self._held.collect(name):
                loss = backward(shown, self._alone(own_counts, name))
            self._losses[name] = self._losses[name] + loss if name in self._losses else loss
        self.forwards.append(forward)

    def settle(self, counts: Mapping[str, Tensor]) -> Tensor:
        """Add the gradients of all early forwards to `.grad`, divided by the counts of the step; returns their loss."""
        factors = {name: divide(self._guesses[name], counts[name]) for name in self._guesses}
        self._held.release(factors)
        total = torch.zeros((), device=self._device)
        for name, loss in self._losses.items():
            total = total + loss * factors[name]
        return total

    def _alone(self, own_counts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """Counts under which only the atoms over `name` are left."""
        off = torch.full((), math.inf, device=self._device)
        return dict.fromkeys(own_counts, off) | {name: self._guesses[name]}
