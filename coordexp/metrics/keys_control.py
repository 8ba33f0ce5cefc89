"""Metric keys of settings that change over a run, and of the controllers that change them."""

from __future__ import annotations

import re

from coordexp.config.schema.custom import CoordSoftCeW1
from coordexp.config.schema.pipeline import OBJECTIVE_MODULES
from coordexp.metrics.spec import KeySection, Kind

IN_FORCE = KeySection(
    "Settings that change over the run (`schedule/*`)",
    "What the steps of the window had in force: the configured value (or a controller's) times its warm-up, the sigma "
    "that points say. Present for settings that can change: those with points, with a warm-up, or with a controller "
    "that acts.",
)


def _settings_of(fields: list[str]) -> list[str]:
    return [name for name in fields if name.endswith("_weight") or name.startswith("target_sigma")]


_MODULES: dict[str, list[str]] = {"coord_soft_ce_w1": _settings_of(list(CoordSoftCeW1.model_fields))}
for _name, _module in OBJECTIVE_MODULES.items():
    _config = _module.model_fields["config"].annotation
    assert _config is not None
    _MODULES[_name] = ["weight", *_settings_of(list(_config.model_fields))]
for _name, _settings in _MODULES.items():
    for _setting in _settings:
        IN_FORCE.define(
            f"schedule/{_name}/{_setting}",
            Kind.GAUGE,
            f"`{_setting}` of `{_name}`.",
            unit="bins" if _setting == "target_sigma" else "1",
            when="training records, where it can change",
            over="optimizer steps",
            pattern="schedule/<module>/<setting>",
        )


def schedule_key(module: str, setting: str) -> str:
    """`schedule/<module>/<setting>`; KeyError for a setting that cannot change."""
    return IN_FORCE.specs[f"schedule/{module}/{setting}"].key


MEASURED = KeySection(
    "Self-context forwards (`stage2_ab/softctx_*`)",
    "What further forwards of a channel-A step bring. Measured where a controller prices them.",
)
_ECONOMY = "channel-A steps, with a controller of kind softctx_economy"
SOFTCTX_FORWARDS = MEASURED.define(
    "stage2_ab/softctx_forwards",
    Kind.GAUGE,
    "Forwards of a channel-A step.",
    unit="forwards",
    when=_ECONOMY,
    over="planned forwards",
)
SOFTCTX_GAIN = MEASURED.define(
    "stage2_ab/softctx_gain",
    Kind.GAUGE,
    "Cross-entropy of the true bin over the coordinate tokens, of the first forward minus that of the last.",
    unit="nats",
    when=f"{_ECONOMY}, that ran two forwards or more",
    over="coordinate tokens",
    better="higher",
)
SOFTCTX_ENTROPY_CHANGE = MEASURED.define(
    "stage2_ab/softctx_entropy_change",
    Kind.GAUGE,
    "Entropy over the coordinate tokens, of the last forward minus that of the first; below 0 it is surer.",
    unit="nats",
    when=f"{_ECONOMY}, that ran two forwards or more",
    over="coordinate tokens",
)

CONTROLLERS = KeySection(
    "Controllers (`control/<name>/*`)",
    "By the name of the controller. A record holds what it decided after the record's window; `control.jsonl` in the "
    "run folder holds every decision with its reason. The payload's `tags` hold the labels under "
    "`control/<name>/value`: `[DB]` inside the deadband, `[AUDIT]` the window ran the base value, `[WIN]` the knob "
    "bought something, `[TAX ONLY]` it bought nothing, `[CONFIDENCE+]` a gain with less entropy.",
)
ANY_NAME = "<name>"
_TARGET, _PRICED = "kind setpoint", "kind softctx_economy"
_NUMBERS: dict[str, tuple[Kind, str, str, str]] = {
    "value": (Kind.GAUGE, "1", "", "The knob after the decision; in mode `recommend` what it would be."),
    "in_force": (Kind.GAUGE, "1", "", "What the steps of the next window run: the value, or the base value."),
    "mean": (Kind.GAUGE, "1", "", "Smoothed metric; of forwards the smoothed number."),
    "deadband": (Kind.FLAG, "1", "", "1 inside the deadband (`[DB]`)."),
    "audit": (Kind.FLAG, "1", "", "1 when the window ran the base value (`[AUDIT]`)."),
    "won": (Kind.FLAG, "1", "audits; windows with several forwards", "1: `[WIN]`, 0: `[TAX ONLY]`."),
    "surer": (Kind.FLAG, "1", "with `won`", "1: `[CONFIDENCE+]`, a gain with less entropy."),
    "error": (Kind.GAUGE, "1", _TARGET, "Smoothed metric minus target."),
    "at_base": (Kind.GAUGE, "1", f"{_TARGET}, audits", "The metric with the base value."),
    "bought": (
        Kind.GAUGE,
        "1",
        f"{_TARGET}, audits",
        "How much closer to its target the knob keeps the metric.",
    ),
    "price": (Kind.GAUGE, "nats", _PRICED, "Price of a further forward; 0 before it has one."),
    "tax": (Kind.GAUGE, "nats", _PRICED, "Price times the further forwards that the window ran."),
    "coupon": (Kind.GAUGE, "nats", _PRICED, "eta times their smoothed gain."),
    "gain": (Kind.GAUGE, "nats", _PRICED, "`stage2_ab/softctx_gain` of the window."),
    "entropy_change": (Kind.GAUGE, "nats", _PRICED, "`stage2_ab/softctx_entropy_change` of the window."),
    "survival_<k>": (
        Kind.GAUGE,
        "fraction",
        _PRICED,
        "Share of the last 100 windows that ran a k-th forward.",
    ),
}
for _number, (_kind, _unit, _of, _meaning) in _NUMBERS.items():
    CONTROLLERS.define(
        f"control/{ANY_NAME}/{_number}",
        _kind,
        _meaning,
        unit=_unit,
        when="windows with a decision" + (f" ({_of})" if _of else ""),
    )


def control_key(controller: str, number: str) -> str:
    """`control/<name>/<number>`."""
    return f"control/{controller}/{number}"


SECTIONS: tuple[KeySection, ...] = (IN_FORCE, MEASURED, CONTROLLERS)


def pattern_of(key: str) -> str | None:
    """The key with its controller's name, and the number of a forward, taken out; None for other keys."""
    match = re.fullmatch(r"control/[^/]+/([a-z_]+?)(_\d+)?", key)
    return None if match is None else control_key(ANY_NAME, match[1] + ("_<k>" if match[2] else ""))
