"""One line for the console from the record of a logging step; the whole record is in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coordexp.metrics import keys_rollout, keys_run
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_stage2 import STAGE2_CHANNEL_B

Shown = tuple[str, Callable[[float], str]]


def _number(name: str) -> Callable[[float], str]:
    return lambda value: f"{name} {value:.4g}"


def _large(name: str) -> Callable[[float], str]:
    def show(value: float) -> str:
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.3g}{unit} {name}"
        return f"{value:.3g} {name}"

    return show


_TRAIN: tuple[Shown, ...] = (
    (STAGE2_CHANNEL_B, lambda value: f"{value:.0%} channel B"),
    (keys_run.LOSS, _number("loss")),
    (keys_rollout.F1, _number("rollout f1")),
    (keys_run.GRAD_NORM, _number("grad norm")),
    (keys_run.LEARNING_RATE, lambda value: f"lr {value:.3g}"),
    (keys_run.TIME_STEP, lambda value: f"{value:.3g} s/step"),
    (keys_run.TRAIN_TOKENS_PER_S, _large("tokens/s")),
    (keys_run.TRAIN_TOKENS_SEEN, _large("tokens seen")),
    (keys_run.PACKING_UTILIZATION, lambda value: f"{value:.0%} filled"),
    (keys_run.MEMORY_PEAK, lambda value: f"{value:.3g} GB"),
)
_EVAL: tuple[Shown, ...] = (
    (keys_run.EVAL_LOSS, _number("loss")),
    (EVAL_PREFIX + keys_rollout.F1, _number("f1")),
    (EVAL_PREFIX + keys_rollout.PRECISION, _number("precision")),
    (EVAL_PREFIX + keys_rollout.RECALL, _number("recall")),
    (EVAL_PREFIX + keys_rollout.MAP, _number("mAP")),
    (keys_run.EVAL_RUNTIME, lambda value: f"{value:.3g} s"),
)
_END: tuple[Shown, ...] = (
    (keys_run.TRAIN_LOSS, _number("mean loss")),
    (keys_run.TRAIN_RUNTIME, lambda value: f"{value:.4g} s"),
)


def console_line(step: int, max_steps: int, record: Mapping[str, object]) -> str:
    """`step 20/400 · loss 1.23 · ...`; of an evaluation `eval at step 20/400 · ...`, of the end `done at step ...`."""
    numbers = {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    place = f"step {step}/{max_steps}"
    if any(key.startswith(EVAL_PREFIX) for key in numbers):
        return _join(f"eval at {place}", numbers, _EVAL)
    if keys_run.TRAIN_RUNTIME in numbers:
        return _join(f"done at {place}", numbers, _END)
    line, remaining = _join(place, numbers, _TRAIN), record.get(keys_run.REMAINING)
    return f"{line} · {remaining} left" if remaining else line


def _join(head: str, numbers: Mapping[str, float], shown: tuple[Shown, ...]) -> str:
    return " · ".join([head, *(show(numbers[key]) for key, show in shown if key in numbers)])
