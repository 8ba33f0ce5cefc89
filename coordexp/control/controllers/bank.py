"""All controllers of a run: what is in force for the next steps, and what a window taught them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordexp.config.schema.training import SetpointController, SoftctxEconomy
from coordexp.control.controllers.decisions import Decision
from coordexp.control.controllers.economy import EconomySteering, ForwardsSeen
from coordexp.control.controllers.setpoint import SetpointSteering
from coordexp.errors import ConfigError

Knobs = Mapping[str, float]
"""Values that controllers have in force, by the names of their knobs; others are those of the configuration."""
NO_KNOBS: Knobs = {}


class ControllerBank:
    """Holds no clock: `observe` is called once for every log window, with the same numbers on all ranks.

    base: value of every declared knob in the configuration.
    """

    def __init__(
        self, settings: Sequence[SetpointController | SoftctxEconomy], base: Mapping[str, float]
    ) -> None:
        self._steering = [
            SetpointSteering(one, base[one.knob])
            if isinstance(one, SetpointController)
            else EconomySteering(one, round(base[one.knob]))
            for one in settings
        ]

    def knobs(self) -> Knobs:
        """Of the steps until the next `observe`: those of controllers that act."""
        acting = (one for one in self._steering if one.settings.mode == "act")
        return {one.settings.knob: one.in_force for one in acting}

    def observe(self, metrics: Mapping[str, float], forwards: ForwardsSeen | None = None) -> list[Decision]:
        """What the controllers decide after a window; none of those whose number it lacks.

        metrics: of the window.  forwards: its channel-A steps; None without one.
        """
        decisions = [
            one.observe(metrics) if isinstance(one, SetpointSteering) else one.observe(forwards)
            for one in self._steering
        ]
        return [decision for decision in decisions if decision is not None]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {one.settings.name: one.state() for one in self._steering}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another process; a controller that it does not know begins anew.

        Raises ConfigError for a name that a controller of another kind had.
        """
        for one in self._steering:
            name = one.settings.name
            if name not in state:
                continue
            if state[name].keys() != one.state().keys():
                raise ConfigError(
                    f"control.controllers: {name} is of kind {one.settings.kind}, but in the resumed checkpoint "
                    "it is of another one; give it another name, and it begins anew."
                )
            one.restore(state[name])
