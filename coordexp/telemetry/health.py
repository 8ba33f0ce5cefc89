"""From the numbers of a window to sentences a person can act on.

    watch = HealthWatch(repeat_after=200)
    for advice in watch.due(step, metrics):          # each kind at most once per 200 steps
        logger.warning("%s", advice.message)
    watch.load_state_dict(state)                     # a resumed run goes on from what a checkpoint kept

`coordexp doctor` applies the same rules to the files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.metrics import keys_rollout, keys_run, keys_stage2
from coordexp.metrics.catalog import EVAL_PREFIX


@dataclass(frozen=True)
class Advice:
    """One thing that is wrong. kind: its name, the same for the same thing.  message: what, and what to do."""

    kind: str
    key: str
    value: float
    message: str


@dataclass(frozen=True)
class HealthRule:
    """When the number of a key is bad, and what to do about it.

    above: whether values above `threshold` are bad, or those below.  meaning, action: halves of the sentence.
    only_below: another key and the value under which it must lie for the rule to apply.
    """

    kind: str
    key: str
    threshold: float
    above: bool
    meaning: str
    action: str
    only_below: tuple[str, float] | None = None

    def judge(self, metrics: Mapping[str, float], prefix: str = "") -> Advice | None:
        """The advice for one window, by the keys with this prefix; None when all is well or the key is absent."""
        key = prefix + self.key
        value = metrics.get(key)
        if value is None or not (value > self.threshold if self.above else value < self.threshold):
            return None
        if (
            self.only_below is not None
            and metrics.get(prefix + self.only_below[0], 0.0) >= self.only_below[1]
        ):
            return None
        beyond = f"{'above' if self.above else 'below'} {self.threshold:g}"
        return Advice(
            self.kind,
            key,
            value,
            f"{key} = {value:.4g} ({beyond}): {self.meaning}. What to do: {self.action}.",
        )


RULES: tuple[HealthRule, ...] = (
    HealthRule(
        "truncated",
        keys_rollout.PARSE_TRUNCATED_RATE,
        0.5,
        above=True,
        meaning="most rollouts are cut before they close",
        action="raise rollout_matching.max_new_tokens; if their texts repeat (look at a monitor dump), enable "
        "rollout_matching.repeat_terminate",
    ),
    HealthRule(
        "parse_drop",
        keys_rollout.PARSE_OBJ_DROP_FRAC,
        0.2,
        above=True,
        meaning="many predicted objects break the format and are dropped",
        action="see stage2_ab/channel_b/strict_drop/reason/* for why; start from a longer stage-1 run, lower "
        "decoding.temperature, or raise token_ce's rollout_drop_invalid_struct_ce_multiplier",
    ),
    HealthRule(
        "no_prediction",
        keys_rollout.SAMPLE_VALID_PRED_RATE,
        0.5,
        above=False,
        meaning="most rollouts hold no valid object",
        action="check that the stage-1 checkpoint writes the format (coordexp infer), and that prompt and "
        "custom.object_field_order are those it was trained with",
    ),
    HealthRule(
        "excluded",
        keys_rollout.EXCLUDED_RATE,
        0.0,
        above=True,
        meaning="matched objects are left out of the targets",
        action="these rollouts have text before the container, or a prefix that cannot be continued: look at a monitor "
        "dump, and check the chat template",
    ),
    HealthRule(
        "closure_drop",
        keys_stage2.CLOSURE_N_DROP,
        0,
        above=True,
        meaning="samples are left out because the end of their target cannot be located",
        action="a monitor dump names the reason; check the tokenizer's normalizer and the descriptions of the records",
    ),
    HealthRule(
        "gating",
        keys_rollout.GATING_REJECTION_RATE,
        0.9,
        above=True,
        meaning="nearly all candidate pairs overlap too little to match, and few objects are found",
        action="the boxes are far off: train stage 1 longer, check that image sizes agree, or lower "
        "rollout_matching.matching.maskiou_gate",
        only_below=(keys_rollout.RECALL, 0.5),
    ),
    HealthRule(
        "coco_failed",
        keys_rollout.COCO_EVAL_OK,
        0.5,
        above=False,
        meaning="the COCO evaluation failed, so mAP is reported as 0",
        action="the log has the reason; do not choose a checkpoint by mAP until it is gone",
    ),
    HealthRule(
        "nonfinite_metric",
        keys_run.NONFINITE_METRICS_TOTAL,
        0,
        above=True,
        meaning="numbers were NaN or infinite and left out of the log",
        action="the console names their keys; lower the learning rate, check max_grad_norm and the precision (fp16)",
    ),
    HealthRule(
        "nonfinite_loss",
        keys_run.NONFINITE_LOSS_TOTAL,
        0,
        above=True,
        meaning="optimizer steps were skipped because the loss was not finite",
        action="lower the learning rate; look at the samples the console names",
    ),
    HealthRule(
        "oom_retries",
        keys_run.OOM_RETRIES_TOTAL,
        0,
        above=True,
        meaning="memory ran out, and half the work was tried at once instead",
        action="the console says what it was; lower it, since the next time both halves may not fit",
    ),
    HealthRule(
        "samples_replaced",
        keys_run.SAMPLES_REPLACED_TOTAL,
        0,
        above=True,
        meaning="samples that cannot be encoded were replaced by others, which are trained more often",
        action="set strict: true, and the first of them is named with its file and line",
    ),
)
"""Rules on one window alone."""

HEALTH_KEY = "CoordExpHealth"
"""Where a checkpoint's trainer_state.json keeps the history of the watch."""
F1_FALL = 0.1
"""Absolute fall of evaluation F1 against its best so far. (F1 of a training step is of a few samples only.)"""
SPEED_FALL = 0.5
"""Share of the best generation speed so far under which it has collapsed."""


class HealthWatch:
    """Applies the rules to window after window and remembers what the run could do.

    repeat_after: optimizer steps before the same kind of advice is due again.
    """

    def __init__(self, repeat_after: int = 200) -> None:
        self.repeat_after = repeat_after
        self._best: dict[str, float] = {}
        self._said: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """The best numbers so far, and when each kind of advice was last returned; JSON values."""
        return {"best": dict(self._best), "said": dict(self._said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._best = {key: float(value) for key, value in state["best"].items()}
        self._said = {kind: int(step) for kind, step in state["said"].items()}

    def look(self, metrics: Mapping[str, float]) -> list[Advice]:
        """All that is wrong in one window, of training or (keys with `eval_`) of an evaluation."""
        judged = [
            *(rule.judge(metrics, prefix) for rule in RULES for prefix in ("", EVAL_PREFIX)),
            self._fallen(metrics, EVAL_PREFIX + keys_rollout.F1, _f1_fell),
            self._fallen(metrics, keys_rollout.GEN_TOKENS_PER_S, _speed_fell),
        ]
        return [advice for advice in judged if advice is not None]

    def due(self, step: int, metrics: Mapping[str, float]) -> list[Advice]:
        """As `look`, without the kinds that were returned less than `repeat_after` steps ago."""
        fresh = [
            advice
            for advice in self.look(metrics)
            if step - self._said.get(advice.kind, step - self.repeat_after) >= self.repeat_after
        ]
        self._said |= {advice.kind: step for advice in fresh}
        return fresh

    def _fallen(
        self, metrics: Mapping[str, float], key: str, judge: Callable[[str, float, float], Advice | None]
    ) -> Advice | None:
        """Compare the number of `key` with the best before it."""
        value = metrics.get(key)
        if value is None:
            return None
        best = self._best.get(key, value)
        self._best[key] = max(best, value)
        return judge(key, value, best)


def _f1_fell(key: str, value: float, best: float) -> Advice | None:
    if best - value <= F1_FALL:
        return None
    return Advice(
        "f1_fell",
        key,
        value,
        f"{key} = {value:.3f} fell by {best - value:.3f} from its best {best:.3f} (more than {F1_FALL:g}): the model "
        "unlearns. What to do: lower the learning rate, or go back to the best checkpoint; look at precision and "
        "recall to see whether objects are missed or made up.",
    )


def _speed_fell(key: str, value: float, best: float) -> Advice | None:
    if value >= SPEED_FALL * best:
        return None
    return Advice(
        "slow_generation",
        key,
        value,
        f"{key} = {value:.4g} is under half of its best {best:.4g}: generation has slowed down. What to do: see "
        "whether rollouts became longer (rollout/gen_new_tokens_p99); lower rollout_matching.decode_batch_size or "
        "raise vllm.gpu_memory_utilization if the engine runs out of cache; check for other jobs on the machine.",
    )
