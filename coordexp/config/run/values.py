"""Values of ms-swift's arguments that no run can mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.checks.problems import Problem, WrittenOf, one_of
from coordexp.config.run.packing import FLASH_ATTENTION


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
    "neftune_noise_alpha": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "ddp_timeout": COUNT,
}

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
"""Learning-rate schedules of transformers."""
WITH_LEAST_RATE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
LEAST_RATE = ("min_lr", "min_lr_rate")
ATTENTION = ("eager", "sdpa", "flex_attention", *FLASH_ATTENTION)
DEEPSPEED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": SCHEDULERS,
    "eval_strategy": ("no", "steps", "epoch"),
    "attn_impl": ATTENTION,
}
"""Values of arguments that ms-swift declares as any text. Kernels of a hub (`owner/name`) are attention too."""
PATHS = ("model", "output_dir", "resume_from_checkpoint", "logging_dir")
INTERVALS = ("logging_steps", "eval_steps", "save_steps")


def value_problems(swift: Mapping[str, Any], written: WrittenOf) -> list[Problem]:
    """Every argument whose value cannot be meant. swift: converted values, flat."""
    problems = []
    for name, text in (*_out_of_range(swift), *_not_among(swift), *_contradictions(swift)):
        path, place = written(name)
        problems.append(Problem(path, text, value=swift[name], place=place))
    return problems


def _out_of_range(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, allowed in RANGES.items():
        value = swift.get(name)
        if isinstance(value, int | float) and value not in allowed:
            yield name, f"expected a number {allowed}."
    for name in INTERVALS:
        value = swift.get(name)
        if isinstance(value, float) and value > 1 and not value.is_integer():
            yield name, "expected whole steps, or a share of the run below 1."
    steps = swift.get("max_steps")
    if isinstance(steps, int) and steps != -1 and steps < 1:
        yield "max_steps", "expected at least 1, or -1 for num_train_epochs."


def _not_among(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, choices in CHOICES.items():
        value = swift.get(name)
        if value is not None and value not in choices and not (name == "attn_impl" and "/" in str(value)):
            yield name, f"{one_of(value, choices)}."
    deepspeed = swift.get("deepspeed")
    is_file = isinstance(deepspeed, str) and deepspeed.endswith((".json", "}"))  # or JSON itself, from a flag
    if isinstance(deepspeed, str) and deepspeed not in DEEPSPEED and not is_file:
        yield "deepspeed", f"{one_of(deepspeed, DEEPSPEED)}, or a .json file."
    if isinstance(deepspeed, Mapping) and "enabled" in deepspeed:
        yield (
            "deepspeed",
            "in ms-swift's flat form this is DeepSpeed's own configuration; give a name such as zero2, or leave it "
            "out.",
        )
    for name in PATHS:
        if swift.get(name) == "":
            yield name, "expected a path; leave it out where none is meant."
    for name in ("dataset", "val_dataset"):
        if "" in (swift.get(name) or ()):
            yield name, "expected the path of a JSONL file."


def _contradictions(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    options = swift.get("lr_scheduler_kwargs")
    if not isinstance(options, str):
        yield from _least_rate(swift, options or {})
    if swift.get("fp16") and swift.get("bf16"):
        yield "bf16", "fp16 is true as well; keep one of them."
    if swift.get("target_modules") == [] and swift.get("tuner_type", "lora") != "full":
        yield "target_modules", "expected at least one; all-linear takes every linear layer."
    if swift.get("label_smoothing_factor"):
        yield "label_smoothing_factor", "has no effect: no objective here smooths its labels; remove it."
    if swift.get("loss_type"):
        yield "loss_type", "has no effect: the trainer variant decides the objective; remove it."
    if swift.get("load_best_model_at_end") and swift.get("save_strategy") != "best":
        yield from _best_at_end(swift)


def _least_rate(swift: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scheduler = swift.get("lr_scheduler_type")
    given = [name for name in LEAST_RATE if options.get(name) is not None]
    if scheduler in WITH_LEAST_RATE and len(given) != 1:
        yield "lr_scheduler_type", "needs one of min_lr and min_lr_rate in lr_scheduler_kwargs."
    for name in given:
        value = options[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or value not in RATE:
            yield "lr_scheduler_kwargs", f"{name}: expected a number {RATE}."


def _best_at_end(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the HF Trainer asks for, as far as both sides are stated."""
    evaluates, saves = swift.get("eval_strategy"), swift.get("save_strategy")
    if evaluates is not None and saves is not None and evaluates != saves:
        yield (
            "load_best_model_at_end",
            f"needs the same eval_strategy and save_strategy, found {evaluates} and {saves}; or save_strategy: best.",
        )
    eval_steps, save_steps = swift.get("eval_steps"), swift.get("save_steps")
    if (evaluates, saves) == ("steps", "steps") and eval_steps and save_steps and save_steps % eval_steps:
        yield (
            "load_best_model_at_end",
            f"needs save_steps to be a multiple of eval_steps, found {save_steps:g} and {eval_steps:g}.",
        )
