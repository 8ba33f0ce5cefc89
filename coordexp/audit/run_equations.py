"""Numbers of the run itself, from its dumps and settings alone: progress, learning rate, tokens.

And the numbers that have no equation, each with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordexp.audit.rows64 import on_line, with_weights
from coordexp.metrics import keys_run, keys_stage1
from coordexp.metrics.keys_control import schedule_key

NOT_RECOMPUTED = {
    keys_run.TRAIN_SPEED: "a clock of ms-swift that runs from before the first step",
    keys_run.MEMORY: "read off the accelerator's allocator",
    keys_run.MFU: "made of that clock and of the accelerator's rating",
    keys_run.MEMORY_PEAK: "read off the allocator, or off the system",
    keys_run.TRAIN_TOKENS_PER_S: "made of the clock of the steps",
    **dict.fromkeys(
        (keys_run.TIME_STEP, keys_run.TIME_FIRST_STEP, *keys_run.TIME_SHARES.values()),
        "the clock of the steps",
    ),
}
"""Numbers of a training step that no dump decides, and why."""

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class DumpedStep:
    """One optimizer step as a run dumped it.

    plans: of this step, one per rank.  history: of all steps up to this one, itself included.
    payload: the metrics it logged.  config: resolved_config.json.
    """

    plans: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    payload: Mapping[str, float]
    config: Mapping[str, Any]
    pad_token_id: int | None = None

    @property
    def step(self) -> int:
        return int(self.plans[0]["step"])

    @property
    def channel(self) -> str | None:
        """None in stage 1."""
        channel: str | None = self.plans[0]["channel"]
        return channel

    @property
    def excused(self) -> dict[str, str]:
        """Keys without an equation under these settings -> why."""
        schedule = self.config["swift"]["lr_scheduler_type"]
        decided = {key: "a decision, see control.jsonl" for key in self.payload if key.startswith("control/")}
        if schedule in SCHEDULES and not self._has_several_rates:
            return {**NOT_RECOMPUTED, **decided}
        why = f"only {', '.join(SCHEDULES)} with one rate are written down here; the run has {schedule}"
        return {**NOT_RECOMPUTED, **decided, keys_run.LEARNING_RATE: why, keys_run.LR_PHASE: why}

    @property
    def _has_several_rates(self) -> bool:
        swift = self.config["swift"]
        return any(swift.get(name) is not None for name in ("vit_lr", "aligner_lr"))


def run_equations(step: DumpedStep) -> dict[str, float]:
    """Progress, learning rate and events of the step, as far as the payload has them."""
    values = _progress(step) | _events(step) | _in_force(step)
    if keys_run.LEARNING_RATE not in step.excused:
        values[keys_run.LEARNING_RATE] = learning_rate(step.config["swift"], step.step + 1)
        values[keys_run.LR_PHASE] = _phase(step.config["swift"], step.step + 1)
    return values


def _in_force(step: DumpedStep) -> dict[str, float]:
    """Settings that change over the run, as the step had them."""
    knobs, config = step.plans[0].get("knobs", {}), step.config
    section = config["stage2_ab"] or config["rollout_matching"]
    is_stage1 = step.channel is None
    entries = (
        [{"name": "coord_soft_ce_w1", **config["custom"]["coord_soft_ce_w1"]}]
        if is_stage1
        else section["pipeline"]["objective"]
    )
    values: dict[str, float] = {}
    for entry in entries:
        name = entry["name"]
        settings = with_weights(entry, step.step, knobs, name, None if is_stage1 else "config")
        flat = {**(entry if is_stage1 else entry["config"])}
        now = {**settings, **settings.get("config", {})}
        for key, value in flat.items():
            if key.startswith("target_sigma") and isinstance(value, list):
                values[schedule_key(name, key)] = on_line(step.step, value)
        changing = [*(entry.get("warmup") or {}), *(key for key in now if f"{name}.{key}" in knobs)]
        values |= {schedule_key(name, key): now[key] for key in changing}
    return values


def _phase(swift: Mapping[str, Any], step: int) -> float:
    """0 while the rate rises, 1 where it stays, 2 where it falls."""
    before, after = learning_rate(swift, step), learning_rate(swift, step + 1)
    if after == before:  # also at the end of a decay, which stays at 0
        return 1.0 if swift["lr_scheduler_type"].startswith("constant") else 2.0
    return 0.0 if after > before else 2.0


def learning_rate(swift: Mapping[str, Any], step: int) -> float:
    """The rate of optimizer step `step`, the first being 0, by the schedules' definitions.

    ms-swift logs the rate when the step is over: that of the next one.
    """
    rate, schedule, total = swift["learning_rate"], swift["lr_scheduler_type"], swift["max_steps"]
    warmup = int(swift.get("warmup_steps") or 0)
    if not warmup and swift.get("warmup_ratio"):
        warmup = math.ceil(total * swift["warmup_ratio"])
    if schedule == "constant":
        return float(rate)
    if step < warmup:
        return float(rate * step / warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))  # behind the end nothing rises again
    return float(
        rate
        * {
            "constant_with_warmup": 1.0,
            "linear": max(0.0, 1 - done),
            "cosine": max(0.0, (1 + math.cos(math.pi * done)) / 2),
        }[schedule]
    )


def num_samples(plan: Mapping[str, Any]) -> int:
    """Original samples of a rank in a step: those asked about, however often, or those taught."""
    return sum(answer["answer_index"] == 0 for answer in plan["answers"]) or sum(
        int(forward["num_samples"]) for forward in counted(plan)
    )


def counted(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The forwards that are no filler."""
    return [forward for forward in plan["forwards"] if not forward["is_filler"]]


def _micro_steps(plan: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """In stage 1 a micro-step is a forward; in stage 2 it is a batch of the loader, before packing."""
    if plan["channel"] is None:
        return len(plan["forwards"])
    batch_size = int(config["swift"]["per_device_train_batch_size"])
    return math.ceil(num_samples(plan) / batch_size)


def _progress(step: DumpedStep) -> dict[str, float]:
    config, swift = step.config, step.config["swift"]
    micro_steps = [_micro_steps(plan, config) for plan in step.plans]
    total = sum(map(num_samples, step.plans))
    values = {
        keys_stage1.TRAIN_SAMPLES_TOTAL: total,
        keys_stage1.TRAIN_SAMPLES_SEEN: sum(map(num_samples, step.history)),
        keys_stage1.TRAIN_MICRO_STEPS: sum(micro_steps) / len(micro_steps),
        keys_stage1.ACCUM_CURRENT_GRAD_STEPS: sum(micro_steps) / len(micro_steps),
        keys_stage1.ACCUM_GRAD_STEPS: swift["gradient_accumulation_steps"],
    }
    values |= {
        keys_run.TRAIN_TOKENS_TOTAL: sum(map(_supervised, step.plans)),
        keys_run.TRAIN_TOKENS_SEEN: sum(map(_supervised, step.history)),
        keys_run.TRAIN_IMAGES_TOTAL: sum(map(_images, step.plans)),
        keys_run.TRAIN_IMAGES_SEEN: sum(map(_images, step.history)),
        keys_run.PACKING_MODE: max(plan["load"]["is_packed"] for plan in step.plans),
    }
    if places := sum(plan["load"]["num_places"] for plan in step.plans):
        num_tokens = sum(plan["load"]["num_tokens"] for plan in step.plans)
        values[keys_run.PACKING_UTILIZATION] = num_tokens / places
    length = config["derived"].get("num_train_samples")
    if length is not None:
        of_rank = length // len(step.plans)
        in_epoch = math.ceil(of_rank / swift["per_device_train_batch_size"])
        so_far = sum(_micro_steps(plan, config) for plan in step.history if plan["rank"] == 0)
        values[keys_run.EPOCH] = so_far / in_epoch
    if keys_run.NUM_INPUT_TOKENS_SEEN in step.payload:
        values[keys_run.NUM_INPUT_TOKENS_SEEN] = sum(_input_tokens(step, plan) for plan in step.history)
    return {key: float(value) for key, value in values.items()}


def _supervised(plan: Mapping[str, Any]) -> int:
    """Tokens with a loss of a rank: in stage 1 every row; in stage 2, where rows may weigh 0, what the plan counted."""
    if plan["channel"] is None:
        return sum(int(forward["rows"]["targets_R"].numel()) for forward in counted(plan))
    return int(plan["load"]["num_supervised"])


def _images(plan: Mapping[str, Any]) -> int:
    if plan["channel"] is None:
        return sum(len(forward["inputs"].get("image_grid_thw", ())) for forward in counted(plan))
    return int(plan["load"]["num_images"])


def _input_tokens(step: DumpedStep, plan: Mapping[str, Any]) -> int:
    every = step.config["swift"]["include_num_input_tokens_seen"] != "non_padding"
    ids = [forward["inputs"]["input_ids"] for forward in counted(plan)]
    return sum(int(one.numel() if every else (one != step.pad_token_id).sum()) for one in ids)


def _events(step: DumpedStep) -> dict[str, float]:
    """What should not happen: absent while it does not."""
    forwards = [forward for plan in step.plans for forward in counted(plan)]
    found = {
        keys_run.SAMPLES_REPLACED_TOTAL: sum(forward["num_replaced"] for forward in forwards),
        keys_run.TOKEN_TYPES_SKIPPED_TOTAL: sum(forward["types_skipped"] for forward in forwards),
    }
    return {key: float(number) for key, number in found.items() if number}
