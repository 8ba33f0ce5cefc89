"""Run one planned forward under its step's plan: its share of the step's loss, and its numbers.

    PlainRunner         one teacher-forced forward
    SelfContextRunner   a chain of forwards, each on coordinate inputs that the one before expected

A runner keeps nothing between two forwards. Its result depends on the model, the forward and the plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coordexp.config.schema.training import NUM_SOFTCTX
from coordexp.head.atom_gradients import HeadProbe
from coordexp.head.run import HeadResult, RowsHead, Supervised
from coordexp.head.token_metrics import TokenMetrics
from coordexp.losses.columns import CoordColumns
from coordexp.losses.coord import CoordDistribution, entropy_rows, token_ce_rows
from coordexp.losses.inputs import LossInputs
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective, Stage2Terms, check_atoms_sum
from coordexp.losses.sums import SumCount, sum_count
from coordexp.metrics.keys_control import SOFTCTX_ENTROPY_CHANGE, SOFTCTX_FORWARDS, SOFTCTX_GAIN
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context
from coordexp.trainers.step.gradient_probe import GradientProbe
from coordexp.trainers.step.plan import PlannedForward, StepPlan


@dataclass(frozen=True)
class ForwardOutcome:
    """What one planned forward gave."""

    loss: Tensor
    """0-dim, with graph: this forward's share of the step's loss on this rank."""
    terms: Mapping[ForwardKind, Stage2Terms]
    """Detached, by what the forward was run for."""
    metrics: Mapping[str, SumCount]
    """What is logged."""

    def watched(self) -> dict[str, Tensor]:
        """The terms that must be finite, by name."""
        atoms = {key: atom.sum for terms in self.terms.values() for key, atom in terms.atoms.items()}
        return atoms | {"loss": self.loss}


class ForwardRunner(Protocol):
    """Runs a planned forward that is on the device.

    model: called; it may be wrapped (DDP, DeepSpeed).  unwrapped: the model inside.
    """

    def __call__(
        self, model: nn.Module, unwrapped: nn.Module, forward: PlannedForward, plan: StepPlan
    ) -> ForwardOutcome: ...


class PlainRunner:
    """One forward.

    Arguments:
        token_switches: arguments of `TokenMetrics` beside rows and columns.
        checks_atoms: compare the loss with the sum of its atoms (`debug.enabled`; a host sync).
        gradients: looks at the gradients of the atoms.
    """

    def __init__(
        self,
        head: RowsHead,
        objective: Stage2Objective,
        columns: CoordColumns,
        *,
        token_switches: Mapping[str, Any] | None = None,
        checks_atoms: bool = False,
        gradients: GradientProbe | None = None,
    ) -> None:
        self.head, self.columns, self._gradients = head, columns, gradients
        self._objective, self._checks_atoms = objective, checks_atoms
        self._token_switches = dict(token_switches or {})

    def __call__(
        self, model: nn.Module, unwrapped: nn.Module, forward: PlannedForward, plan: StepPlan
    ) -> ForwardOutcome:
        (kind,) = plan.kinds
        return self.run_as(kind, model, unwrapped, forward, plan)[0]

    def run_as(
        self,
        kind: ForwardKind,
        model: nn.Module,
        unwrapped: nn.Module,
        forward: PlannedForward,
        plan: StepPlan,
        slot_rows_N: Tensor | None = None,
    ) -> tuple[ForwardOutcome, Tensor | None]:
        """One forward under the objective of `kind`, and the coordinate logits [N, K] of the rows asked for."""
        rows, of_step = forward.meta.rows, self._objective.at(plan.step, plan.knobs)
        tokens = TokenMetrics(rows, self.columns, **self._token_switches)

        def objective(inputs: LossInputs) -> tuple[Tensor, Stage2Terms]:
            return of_step(inputs, kind, plan.totals)

        supervised = Supervised(
            rows, of_step.needs(kind), objective, tokens.observer, tokens.restart,
            self._probe(of_step, kind, forward, plan),
        )  # fmt: skip
        result: HeadResult[Stage2Terms] = self.head.run(
            model, unwrapped, dict(forward.inputs), supervised, slot_rows_N
        )
        assert result.loss is not None
        terms = Stage2Terms.merge(result.terms)
        if self._checks_atoms:
            shares = of_step.shares(terms, plan.totals)
            check_atoms_sum(result.loss.item(), {key: share.item() for key, share in shares.items()})
        metrics = terms.metrics()
        if kind is not ForwardKind.SELF_CONTEXT:  # its inputs are no tokens
            metrics |= tokens.metrics()
        return ForwardOutcome(result.loss, {kind: terms}, metrics), result.slot_logits_NK

    def _probe(
        self, objective: Stage2Objective, kind: ForwardKind, forward: PlannedForward, plan: StepPlan
    ) -> HeadProbe | None:
        """What looks at the gradients of this forward; None where nothing does."""
        if self._gradients is None:
            return None
        names = [name for each in plan.kinds for name in objective.atom_names(each)]

        def losses(inputs: LossInputs) -> dict[str, Tensor]:
            return objective.atom_losses(inputs, kind, plan.totals)

        return self._gradients.watch(
            plan.step, names, forward.meta.rows, objective.needs(kind), losses, counts=not forward.is_filler
        )


class SelfContextRunner:
    """Channel A with `n_softctx_iter` of two or more: text loss of the first forward, coordinate losses of the last.

    Steps of other kinds run as plain forwards.

    measures: also log how many forwards ran, and what the further ones changed at the coordinates.
    """

    def __init__(self, plain: PlainRunner, settings: SelfContext, *, measures: bool = False) -> None:
        self._plain, self._settings, self._measures = plain, settings, measures

    def __call__(
        self, model: nn.Module, unwrapped: nn.Module, forward: PlannedForward, plan: StepPlan
    ) -> ForwardOutcome:
        if len(plan.kinds) == 1:
            single = self._plain(model, unwrapped, forward, plan)
            if not self._measures or plan.kinds != (ForwardKind.TEACHER_FORCED,):
                return single
            return replace(single, metrics={**single.metrics, **_num_forwards(single.loss, 1)})
        settings = replace(
            self._settings, num_forwards=round(plan.knobs.get(NUM_SOFTCTX, self._settings.num_forwards))
        )
        assert forward.slots_N is not None
        slots = CoordSlots(forward.slots_N, self._plain.columns.index(forward.slots_N.device))
        last = settings.num_forwards - 1
        kinds = {0: ForwardKind.ANCHOR, last: ForwardKind.SELF_CONTEXT}

        seen: list[Tensor] = []

        def run(iteration: int) -> tuple[ForwardOutcome | None, Tensor | None]:
            slot_rows_N = None if iteration == last and not self._measures else slots.rows_N
            if iteration in kinds:
                outcome, logits_NK = self._plain.run_as(
                    kinds[iteration], model, unwrapped, forward, plan, slot_rows_N
                )
                if self._measures and logits_NK is not None:
                    seen.append(logits_NK.detach())
                return outcome, logits_NK
            between: HeadResult[Stage2Terms] = self._plain.head.run(
                model, unwrapped, dict(forward.inputs), None, slot_rows_N
            )
            return None, between.slot_logits_NK

        outcomes = run_self_context(unwrapped, slots, settings, run)
        first, final = outcomes[0], outcomes[-1]
        assert first is not None
        assert final is not None
        metrics = {**first.metrics, **final.metrics}
        if self._measures:
            metrics |= _num_forwards(first.loss, settings.num_forwards)
            metrics |= forwards_worth(seen[0], seen[-1], forward.meta.rows.bins_N)
        return ForwardOutcome(first.loss + final.loss, {**first.terms, **final.terms}, metrics)


def _num_forwards(like: Tensor, number: int) -> dict[str, SumCount]:
    one = torch.ones_like(like.detach())
    return {SOFTCTX_FORWARDS: SumCount(number * one, one)}


@torch.no_grad()
def forwards_worth(first_NK: Tensor, last_NK: Tensor, bins_N: Tensor) -> dict[str, SumCount]:
    """What the forwards after the first changed at coordinates: fall of the cross-entropy, change of the entropy.

    first_NK, last_NK: coordinate logits of the first and the last forward.
    """
    first, last = CoordDistribution(first_NK), CoordDistribution(last_NK)
    return {
        SOFTCTX_GAIN: sum_count(token_ce_rows(first, bins_N) - token_ce_rows(last, bins_N)),
        SOFTCTX_ENTROPY_CHANGE: sum_count(entropy_rows(last) - entropy_rows(first)),
    }
