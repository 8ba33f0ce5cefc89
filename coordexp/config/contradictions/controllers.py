"""Controllers that the rest of a configuration leaves without a knob, or that a resume could not repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import KeyPath, closest
from coordexp.config.schema.sections import Sections, pipeline_of
from coordexp.config.schema.training import B_RATIO, NUM_SOFTCTX, SetpointController, SoftctxEconomy

SAVE_STEPS = 500
"""What ms-swift takes where a run says nothing."""


def knob_values(variant: str, sections: Sections) -> dict[str, float]:
    """Every knob that a run has, with its value in the configuration; weights of modules that are on."""
    if variant == "stage1_coord":
        loss = sections.custom.coord_soft_ce_w1
        return {f"coord_soft_ce_w1.{name}": weight for name, weight in loss.weights().items() if loss.enabled}
    values: dict[str, float] = {}
    found = pipeline_of(sections, variant)
    if found is not None:
        for module in found[0].objective:
            if module.enabled:
                values |= {f"{module.name}.{name}": weight for name, weight in module.weights().items()}
    two_channel = sections.stage2_ab
    if two_channel is not None:
        values[NUM_SOFTCTX] = float(two_channel.n_softctx_iter)
        if isinstance(two_channel.schedule.b_ratio, float):
            values[B_RATIO] = two_channel.schedule.b_ratio
    return values


def control_problems(
    variant: str, sections: Sections, swift: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Path of every setting of a controller that cannot take effect, and why."""
    values = knob_values(variant, sections)
    for index, controller in enumerate(sections.control.controllers):
        here = ("control", "controllers", index)
        for key, text in _knob(controller, values, sections):
            yield (*here, key), text
    if any(controller.mode == "act" for controller in sections.control.controllers):
        yield from _windows(swift)
        every = swift.get("logging_steps")
        if sections.telemetry.stop_on and isinstance(every, int) and every > 1:
            yield (
                ("telemetry", "stop_on"),
                "saves a checkpoint in the step after a record, between two decisions of a controller that acts "
                f"(logging_steps: {every}), and resuming there would change the next one; set logging_steps: 1.",
            )


def _knob(
    controller: SetpointController | SoftctxEconomy, values: Mapping[str, float], sections: Sections
) -> Iterator[tuple[str, str]]:
    knob = controller.knob
    two_channel = sections.stage2_ab
    if knob == B_RATIO and two_channel is not None and knob not in values:
        yield "knob", "stage2_ab.schedule.b_ratio has points, which say its value already; give one number."
        return
    if knob not in values:
        near = closest(knob, values)
        hint = f" Did you mean {near}?" if near else ""
        yield "knob", f"{knob}: this run has no such knob.{hint} Expected one of {', '.join(sorted(values))}."
        return
    if isinstance(controller, SoftctxEconomy):
        if values[knob] < 2:
            yield (
                "knob",
                "stage2_ab.n_softctx_iter is 1, so there is no forward to price; set it to 2 or more.",
            )
        if values.get(B_RATIO) == 1:
            yield "knob", "stage2_ab.schedule.b_ratio is 1: no step runs channel A, whose forwards it prices."
        return
    if knob == NUM_SOFTCTX:
        yield "kind", f"{NUM_SOFTCTX} is priced by a controller of kind softctx_economy."
        return
    low, high = controller.bounds
    if not low <= values[knob] <= high:
        yield "bounds", f"the configured {knob} is {values[knob]:g}, outside {[low, high]}."
    if knob == B_RATIO and high > 1:
        yield "bounds", f"{B_RATIO} is a share: its upper bound is {high:g}, expected 1 at most."
    if knob != B_RATIO and values[knob] == 0:
        yield "knob", f"{knob} is 0 in the configuration, so its loss is not computed; give it a weight."


def _windows(swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """A checkpoint inside a log window would begin that window anew."""
    every = swift.get("logging_steps")
    by = swift.get("logging_strategy")
    if str(by) not in ("steps", "None"):
        yield (
            ("control", "controllers"),
            f"a controller that acts decides at every log, in whole steps, and logging_strategy is {by}; set it to "
            "steps.",
        )
        return
    if every == 1:
        return
    if not isinstance(every, int):
        yield (
            ("control", "controllers"),
            "a controller that acts needs logging_steps, in whole steps; set it.",
        )
        return
    saves = swift.get("save_strategy") or "steps"
    evaluates = swift.get("eval_strategy") or (
        saves if swift.get("eval_steps") else None
    )  # as ms-swift has it
    for strategy, chosen, steps in (
        ("save_strategy", saves, "save_steps"),
        ("eval_strategy", evaluates, "eval_steps"),
    ):
        default = SAVE_STEPS if steps == "save_steps" else None
        number = swift.get(steps, default)  # 12.0 where the command line says 12, 0.1 for a tenth of the run
        is_border = not isinstance(number, (int, float)) or number % every == 0
        if str(chosen) == "epoch" or (str(chosen) not in ("no", "None") and not is_border):
            shown = number if number is None else f"{number:g}"
            yield (
                ("control", "controllers"),
                f"a controller decides every logging_steps ({every}), and a checkpoint between two decisions would "
                f"change the next one: {strategy} is {chosen} and {steps} {shown}; make {steps} a multiple of "
                "logging_steps, or set logging_steps: 1.",
            )
