"""Brings a metric to a target: an integrator with a deadband, bounds, a rate limit and a dwell time.

The knob itself is what integrates, and stays within its bounds, so nothing winds up behind them: it turns around with
the first value on the other side. A window in which it stays, because of the dwell time or the deadband, adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coordexp.config.schema.training import SetpointController
from coordexp.control.controllers.decisions import AUDIT, DEADBAND, TAX_ONLY, WIN, Decision, flags_of


@dataclass(frozen=True)
class SetpointState:
    """value: of the knob.  mean: of the metric, None before the first update.  stayed: updates since it changed.

    auditing: the window that runs is an audit.
    """

    value: float
    mean: float | None = None
    num_updates: int = 0
    stayed: int = 0
    auditing: bool = False


class SetpointSteering:
    """A `SetpointController` at work.

    base: the knob's value in the configuration.
    """

    def __init__(self, settings: SetpointController, base: float) -> None:
        self.settings, self.base = settings, base
        self._state = SetpointState(base)

    @property
    def in_force(self) -> float:
        """What the steps of the coming window run."""
        return self.base if self._state.auditing or self.settings.mode == "recommend" else self._state.value

    def observe(self, metrics: Mapping[str, float]) -> Decision | None:
        """Takes in the metrics of a window that ran `in_force`; None where they lack the metric."""
        found = metrics.get(self.settings.metric)
        if found is None:
            return None
        if self._state.auditing:
            return self._end_audit(found)
        return self._update(found)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another process; a knob outside bounds that have changed since comes to them."""
        low, high = self.settings.bounds
        self._state = SetpointState(**{**state, "value": min(max(state["value"], low), high)})

    def _update(self, found: float) -> Decision:
        settings, before = self.settings, self._state
        mean = found if before.mean is None else settings.ema * before.mean + (1 - settings.ema) * found
        error = mean - settings.target
        wanted, reason = self._correction(error, before.value)
        is_inside = abs(error) <= settings.deadband
        if wanted and before.stayed < settings.dwell and before.num_updates:
            wanted, reason = 0.0, f"{reason}, but stays {settings.dwell} updates ({before.stayed} so far)"
        after = min(max(before.value + wanted, settings.bounds[0]), settings.bounds[1])
        if wanted and after == before.value:
            reason = f"{reason}, but is at its bound {after:g}"
        num_updates = before.num_updates + 1
        kept = before.value if settings.mode == "recommend" else after
        self._state = SetpointState(
            value=kept,
            mean=mean,
            num_updates=num_updates,
            stayed=0 if after != before.value else before.stayed + 1,
            auditing=self._audits_after(num_updates),
        )
        return self._decision(before.value, after, reason, (DEADBAND,) if is_inside else (), {"error": error})

    def _correction(self, error: float, value: float) -> tuple[float, str]:
        """Change of the knob, and the reason."""
        settings = self.settings
        sign = -1.0 if settings.effect == "raises" else 1.0
        wanted = min(max(sign * settings.gain * error, -settings.rate), settings.rate)
        said = f"{settings.metric} is {abs(error):.4g} {'above' if error > 0 else 'below'} its target"
        if abs(error) > settings.deadband:
            return wanted, said
        is_toward_base = wanted * (self.base - value) > 0
        share = settings.inside_toward_base if is_toward_base else settings.inside_from_base
        way = "toward" if is_toward_base else "away from"
        return share * wanted, f"{said}, inside the deadband: {share:g} of a correction {way} the base value"

    def _audits_after(self, num_updates: int) -> bool:
        settings = self.settings
        return settings.mode == "act" and settings.audit_every > 0 and num_updates % settings.audit_every == 0

    def _end_audit(self, found: float) -> Decision:
        """An audit changes neither the knob nor the mean; it tells what the knob bought."""
        state, settings = self._state, self.settings
        assert state.mean is not None
        bought = abs(found - settings.target) - abs(state.mean - settings.target)
        self._state = replace(state, auditing=False)
        labels = (AUDIT,) if state.value == self.base else (AUDIT, WIN if bought > 0 else TAX_ONLY)
        reason = (
            f"audit: with the base value {self.base:g} {settings.metric} is {found:.4g}, with {state.value:g} it was "
            f"{state.mean:.4g}; the knob brought it {abs(bought):.4g} {'closer to' if bought > 0 else 'away from'} "
            "its target"
        )
        return self._decision(state.value, state.value, reason, labels, {"at_base": found, "bought": bought})

    def _decision(
        self, before: float, after: float, reason: str, labels: tuple[str, ...], numbers: Mapping[str, float]
    ) -> Decision:
        settings, mean = self.settings, self._state.mean
        assert mean is not None
        shown = {"value": after, "in_force": self.in_force, "mean": mean, **numbers}
        shown |= flags_of(labels)
        return Decision(
            settings.name, settings.knob, settings.mode, before, after, self.in_force, reason, labels, shown
        )
