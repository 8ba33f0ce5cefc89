"""The objective of trainer variant `latent_prefix`: `custom.latent_prefix.objective` -> weighted means of its terms.

    weights = objective.weights_at(step, kind)              # of the modules that act
    counts = objective.counts(places_R, num_samples, kind)  # per batch, summed over batches and ranks beforehand
    loss, terms = objective(inputs, weights, totals)        # loss = sum over modules of weight * sum / total

Denominators are those of the whole optimizer step, so the result does not depend on how it is cut. A row takes part in
a term by its place in the answer; padding has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from coordexp.config.schema.latent_prefix import (
    LatentKCe,
    LatentKd,
    LatentObjectiveModule,
    LatentPrefixSettings,
    LatentStateKd,
)
from coordexp.control.points import last_value, value_at
from coordexp.errors import ContractError
from coordexp.losses.inputs import cross_entropy_rows
from coordexp.losses.latent.answers import within
from coordexp.losses.latent.terms import TeacherRows, align_samples, kd_rows, state_kd_rows
from coordexp.losses.stage1 import Stage1Terms, combine
from coordexp.losses.sums import SumCount, divide, sum_count

Value = TypeVar("Value")
STAGE1 = "stage1"
FIRST_TOKEN_CE, K_CE, KD, STATE_KD, ALIGN = (
    "latent_first_token_ce",
    "latent_k_ce",
    "latent_kd",
    "latent_state_kd",
    "latent_align",
)
TEXT_ROWS, COORD_ROWS = "text", "coord"
"""Totals of `stage1`, beside one total for every other module."""


@dataclass(frozen=True)
class LatentInputs:
    """What one forward gives. Rows are in the order of the supervised rows (text first, then coordinates).

    logits_RV: float [R, V] of all rows, with graph; None in a step that runs no forward.
    targets_R: int64 [R].  places_R: see `answers.answer_places`.
    stage1: its terms, where it acts.
    teacher: of the rows that `latent_kd` looks at.
    states: layer -> hidden states [r, H] of student and teacher, of the rows that `latent_state_kd` looks at.
    vectors_SMH, means_SMH: the prefix of every sample, and the segment means of its text.
    """

    targets_R: Tensor
    places_R: Tensor
    logits_RV: Tensor | None = None
    stage1: Stage1Terms | None = None
    teacher: TeacherRows | None = None
    states: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    vectors_SMH: Tensor | None = None
    means_SMH: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Those of a forward that was run."""
        return _there(self.logits_RV, "logits")


class LatentObjective:
    """The modules of a run."""

    def __init__(self, settings: LatentPrefixSettings) -> None:
        self._modules: dict[str, LatentObjectiveModule] = {
            entry.name: entry for entry in settings.objective if entry.is_on
        }
        self._terms: dict[str, Callable[[LatentInputs], SumCount]] = {
            FIRST_TOKEN_CE: lambda given: _ce(given, within(given.places_R, 1)),
            K_CE: lambda given: _ce(given, self.rows_of(K_CE, given.places_R)),
            KD: self._kd,
            STATE_KD: self._state_kd,
            ALIGN: lambda given: sum_count(
                align_samples(_there(given.vectors_SMH, "vectors"), _there(given.means_SMH, "means"))
            ),
        }

    @property
    def kd(self) -> LatentKd | None:
        """`latent_kd`, where it is on."""
        found = self._modules.get(KD)
        return found if isinstance(found, LatentKd) else None

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states `latent_state_kd` matches."""
        found = self._modules.get(STATE_KD)
        return tuple(found.config.layers) if isinstance(found, LatentStateKd) else ()

    def weights_at(self, step: int, kind: str) -> dict[str, float]:
        """Weight of every module that acts in optimizer step `step`, a step of that kind."""
        return self._weights(kind, {name: value_at(step, e.weight) for name, e in self._modules.items()})

    def settled(self, kind: str) -> dict[str, float]:
        """What evaluation measures with at any step: the last points."""
        return self._weights(kind, {name: last_value(e.weight) for name, e in self._modules.items()})

    def _weights(self, kind: str, weights: Mapping[str, float]) -> dict[str, float]:
        return {
            name: weight
            for name, weight in weights.items()
            if weight > 0 and kind in self._modules[name].kinds
        }

    def rows_of(self, name: str, places_R: Tensor) -> Tensor:
        """bool [R]: the rows that a module looks at. ContractError for one that looks at no rows."""
        module = self._modules[name]
        if name == FIRST_TOKEN_CE:
            return within(places_R, 1)
        if isinstance(module, LatentKCe | LatentKd | LatentStateKd):
            return within(places_R, module.config.num_tokens)
        raise ContractError(f"module {name} of the latent objective looks at no rows of its own")

    def counts(self, places_R: Tensor, num_samples: int) -> dict[str, float]:
        """What one batch adds to the denominators of all modules but `stage1`. On the host."""
        counts: dict[str, float] = {}
        for name in self._modules:
            if name == ALIGN:
                counts[name] = float(num_samples)
            elif name != STAGE1:
                number = float(self.rows_of(name, places_R).sum())
                counts[name] = number * len(self.state_layers) if name == STATE_KD else number
        return counts

    def __call__(
        self, given: LatentInputs, weights: Mapping[str, float], totals: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, SumCount]]:
        """The loss, what each module adds to it (with graph), and the raw terms (detached) of all but `stage1`.

        weights: of the modules that act.  totals: denominators of the whole optimizer step, by module; those of
        `stage1` are TEXT_ROWS and COORD_ROWS.
        """
        shares: dict[str, Tensor] = {}
        raw: dict[str, SumCount] = {}
        for name, weight in weights.items():
            if name == STAGE1:
                if given.stage1 is None:
                    raise ContractError("the latent objective weighs stage1, but was given no terms of it")
                mean = combine(given.stage1, totals[TEXT_ROWS], totals[COORD_ROWS])
            else:
                term = self._terms[name](given)
                raw[name] = term.detach()
                mean = divide(term.sum, totals[name])
            shares[name] = weight * mean
        if not shares:
            raise ContractError("no module of the latent objective acts in this step")
        return torch.stack(list(shares.values())).sum(), shares, raw

    def _kd(self, given: LatentInputs) -> SumCount:
        kd = _there(self.kd, "latent_kd")
        teacher = _there(given.teacher, "teacher")
        logits_rV = given.logits[self.rows_of(KD, given.places_R)]
        return sum_count(kd_rows(logits_rV, teacher, kd.config.temperature))

    def _state_kd(self, given: LatentInputs) -> SumCount:
        missing = set(self.state_layers) - given.states.keys()
        if missing:
            raise ContractError(f"hidden states of layers {sorted(missing)} were not given")
        return sum_count(torch.cat([state_kd_rows(*given.states[layer]) for layer in self.state_layers]))


def _ce(given: LatentInputs, chosen_R: Tensor) -> SumCount:
    return sum_count(cross_entropy_rows(given.logits[chosen_R], given.targets_R[chosen_R]))


def _there(value: Value | None, name: str) -> Value:
    if value is None:
        raise ContractError(f"the latent objective needs {name}, which this forward did not give")
    return value
