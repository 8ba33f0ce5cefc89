"""Values of ms-swift's arguments that no run can mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.checks.problems import Problem, WrittenOf


@dataclass(frozen=True)
class Range:
    """An interval of numbers. low and high belong to it unless they are open."""

    low: float
    high: float | None = None
    is_low_open: bool = False
    is_high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.is_low_open else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.is_high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{'more than' if self.is_low_open else 'at least'} {self.low:g}"
        left, right = "(" if self.is_low_open else "[", ")" if self.is_high_open else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


RATE = Range(0, 1)
"""A learning rate above 1 is a lost minus sign in its exponent."""
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, is_high_open=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, is_low_open=True)
COUNT = Range(1)

RANGES: dict[str, Range] = {
    "learning_rate": RATE,
    "vit_lr": RATE,
    "aligner_lr": RATE,
    "weight_decay": SHARE,
    "warmup_ratio": SHARE,
    "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE_BELOW_1,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "save_total_limit": COUNT,
    "seed": NOT_NEGATIVE,
    "data_seed": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": COUNT,
    "split_dataset_ratio": SHARE,
    "max_length": COUNT,
    "max_pixels": COUNT,
    "packing_length": COUNT,
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE_BELOW_1,
    "lorap_lr_ratio": POSITIVE,
    "freeze_parameters_ratio": SHARE,
    "galore_rank": COUNT,
}


def value_problems(swift: Mapping[str, Any], written: WrittenOf) -> list[Problem]:
    """Every argument whose value cannot be meant. swift: converted values, flat."""
    problems = []
    for name, text in _out_of_range(swift):
        path, place = written(name)
        problems.append(Problem(path, text, value=swift[name], place=place))
    return problems


def _out_of_range(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, allowed in RANGES.items():
        value = swift.get(name)
        if isinstance(value, int | float) and value not in allowed:
            yield name, f"expected a number {allowed}."
    steps = swift.get("max_steps")
    if isinstance(steps, int) and steps != -1 and steps < 1:
        yield "max_steps", "expected at least 1, or -1 for num_train_epochs."
