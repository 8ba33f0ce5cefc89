"""Prices self-context forwards, and runs as many as pay for themselves.

    gain    coordinate cross-entropy of the first forward minus that of the last, nats
    coupon  eta x gain
    tax     price x (forwards - 1)

Three phases, counted in updates: all forwards are forced, then they are free, then they have a price. From the second
on the number moves, one at a time, to the one whose coupon exceeds its tax by most. The price rises while more forwards
run than `target_forwards`, and falls while fewer do. A number that does not run has no gain; audits run all forwards
and measure it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coordexp.config.schema.training import SoftctxEconomy
from coordexp.control.controllers.decisions import (
    AUDIT,
    CONFIDENCE,
    DEADBAND,
    TAX_ONLY,
    WIN,
    Decision,
    flags_of,
)

TRACE_LENGTH = 100
"""Updates that the survival trace looks back on."""
INSIDE_FALL = 0.25
"""Share of a fall of the price that is made inside its deadband; it never rises there."""
AUDIT_SHARE = 0.5
"""Share of an audit in the gain of a number that does not run: there is no other news of it."""


@dataclass(frozen=True)
class ForwardsSeen:
    """The channel-A steps of a window.

    forwards: of each.  gain, entropy_change: first to last forward, nats a coordinate; None with one forward.
    """

    forwards: float
    gain: float | None = None
    entropy_change: float | None = None


@dataclass(frozen=True)
class EconomyState:
    """value: forwards.  gains: smoothed, by the number of forwards (as text).  mean_forwards: smoothed, None at first.

    ran: forwards of the last windows, audits included.  auditing: the window that runs is an audit.
    """

    value: int
    price: float
    gains: Mapping[str, float]
    mean_forwards: float | None = None
    num_updates: int = 0
    stayed: int = 0
    ran: tuple[int, ...] = ()
    auditing: bool = False


class EconomySteering:
    """A `SoftctxEconomy` at work.

    base: stage2_ab.n_softctx_iter, 2 or more.
    """

    def __init__(self, settings: SoftctxEconomy, base: int) -> None:
        self.settings, self.base = settings, base
        self._state = EconomyState(base, settings.price.initial, {})

    @property
    def in_force(self) -> float:
        """Forwards of the channel-A steps of the coming window."""
        state = self._state
        return float(self.base if state.auditing or self.settings.mode == "recommend" else state.value)

    def observe(self, seen: ForwardsSeen | None) -> Decision | None:
        """Takes in a window that ran `in_force`; None where it had no channel-A step."""
        if seen is None:
            return None
        ran = round(seen.forwards)
        self._state = replace(
            self._state,
            gains=self._with_gain(ran, seen.gain),
            ran=(*self._state.ran, ran)[-TRACE_LENGTH:],
        )
        labels = _worth(seen)
        if self._state.auditing:
            self._state = replace(self._state, auditing=False)
            reason = f"audit: all {self.base} forwards ran, their gain was {seen.gain or 0.0:.4g}"
            return self._decision(self._state.value, reason, (AUDIT, *labels), seen)
        return self._update(seen, labels)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self._state), "ran": list(self._state.ran)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another process, with no more forwards than there are now."""
        known = {**state, "ran": tuple(state["ran"]), "value": min(state["value"], self.base)}
        self._state = EconomyState(**known)

    def survival(self) -> list[float]:
        """Share of the last windows that ran a k-th forward, for k = 1, 2, ... up to the base value."""
        ran = self._state.ran
        return [sum(k <= number for number in ran) / len(ran) for k in range(1, self.base + 1)] if ran else []

    def _update(self, seen: ForwardsSeen, labels: tuple[str, ...]) -> Decision:
        settings, before = self.settings, self._state
        old = before.mean_forwards
        mean = before.value if old is None else settings.ema * old + (1 - settings.ema) * before.value
        num_updates = before.num_updates + 1
        state = replace(before, mean_forwards=mean, num_updates=num_updates)
        if num_updates <= settings.forced:
            self._state = state
            return self._decision(
                before.value, f"forced warm-up, update {num_updates} of {settings.forced}", labels, seen
            )
        has_price = num_updates > settings.forced + settings.observed
        if has_price and num_updates > settings.forced + settings.observed + 1:
            price, is_inside = self._next_price(mean)
            state = replace(state, price=price)
            labels = ((DEADBAND,) if is_inside else ()) + labels
        after, reason = self._next_number(state, state.price if has_price else 0.0)
        self._state = replace(
            state,
            value=after,
            stayed=0 if after != before.value else before.stayed + 1,
            auditing=settings.mode == "act"
            and settings.audit_every > 0
            and num_updates % settings.audit_every == 0,
        )
        return self._decision(before.value, reason, labels, seen)

    def _next_price(self, mean: float) -> tuple[float, bool]:
        """The price, and whether the mean number of forwards is inside the deadband."""
        rules = self.settings.price
        error = mean - rules.target_forwards
        change = min(max(rules.gain * error, -rules.rate), rules.rate)
        is_inside = abs(error) <= rules.deadband
        if is_inside:
            change = INSIDE_FALL * min(change, 0.0)
        return min(max(self._state.price + change, rules.bounds[0]), rules.bounds[1]), is_inside

    def _next_number(self, state: EconomyState, price: float) -> tuple[int, str]:
        """Forwards from now on, and why."""
        value, eta = state.value, self.settings.eta
        nets = {k: eta * self._gain_of(k) - price * (k - 1) for k in range(1, self.base + 1)}
        best = max(nets, key=lambda k: (nets[k], k == value, -k))
        said = f"net worth of {', '.join(f'{k}: {nets[k]:.4g}' for k in nets)} at price {price:.4g}"
        if best == value:
            return value, f"{said}; {value} stays best"
        if state.stayed < self.settings.dwell:
            return value, f"{said}; {best} is best, but {value} stays {self.settings.dwell} updates"
        return value + (1 if best > value else -1), f"{said}; {best} is best"

    def _gain_of(self, k: int) -> float:
        """Smoothed gain of k forwards; of a number that never ran, its share of the gain of all forwards."""
        gains = self._state.gains
        if k == 1:
            return 0.0
        return gains.get(str(k), gains.get(str(self.base), 0.0) * (k - 1) / (self.base - 1))

    def _with_gain(self, ran: int, gain: float | None) -> dict[str, float]:
        gains = dict(self._state.gains)
        if ran > 1 and gain is not None:
            old, state = gains.get(str(ran)), self._state
            share = AUDIT_SHARE if state.auditing and ran != state.value else 1 - self.settings.ema
            gains[str(ran)] = gain if old is None else (1 - share) * old + share * gain
        return gains

    def _decision(self, before: int, reason: str, labels: tuple[str, ...], seen: ForwardsSeen) -> Decision:
        settings, state = self.settings, self._state
        is_priced = state.num_updates > settings.forced + settings.observed
        price = state.price if is_priced else 0.0
        coupon = settings.eta * self._gain_of(round(seen.forwards))
        tax = price * (seen.forwards - 1)
        shown = {
            "value": float(state.value),
            "in_force": self.in_force,
            "price": price,
            "coupon": coupon,
            "tax": tax,
        }
        shown |= {f"survival_{k}": share for k, share in enumerate(self.survival(), 1) if k > 1}
        shown |= flags_of(labels)
        if state.mean_forwards is not None:
            shown["mean"] = state.mean_forwards
        if seen.gain is not None:
            shown["gain"] = seen.gain
        if seen.entropy_change is not None:
            shown["entropy_change"] = seen.entropy_change
        return Decision(
            settings.name,
            settings.knob,
            settings.mode,
            float(before),
            float(state.value),
            self.in_force,
            reason,
            labels,
            shown,
        )


def _worth(seen: ForwardsSeen) -> tuple[str, ...]:
    """Whether the further forwards of a window helped."""
    if seen.gain is None:
        return ()
    if seen.gain <= 0:
        return (TAX_ONLY,)
    is_sure = seen.entropy_change is not None and seen.entropy_change < 0
    return (WIN, CONFIDENCE) if is_sure else (WIN,)
