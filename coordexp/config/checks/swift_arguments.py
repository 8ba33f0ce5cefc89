"""The arguments of `swift sft` and `swift rlhf`, from a data file, so that they can be checked without ms-swift.

tools/setup/dump_swift_arguments.py writes the file; a test compares it with the installed ms-swift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from coordexp.config.checks.problems import as_yaml, closest
from coordexp.files import read_json

DATA_FILE = Path(__file__).with_name("swift_arguments.json")

RENAMED = {
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "dtype": "torch_dtype",
    "custom_dataset": "dataset",
}
"""Names from other releases and tools -> the argument of this one."""


@dataclass(frozen=True)
class SwiftArgument:
    """One argument: the section it is shown in, what it takes, its default."""

    name: str
    section: str
    types: frozenset[str]
    choices: tuple[str, ...]
    default: Any

    def convert(self, value: object) -> Any:
        """`value` as ms-swift takes it.

        Raises:
            ValueError: with what was expected instead.
        """
        if value is None:
            if self.default is None:
                return None
            raise ValueError(f"expected {self.expected}; ms-swift cannot be told null here")
        if "any" in self.types or ("dict" in self.types and isinstance(value, dict)):
            return value
        if "list" in self.types and not isinstance(value, dict):
            return (
                [self._scalar(item) for item in value] if isinstance(value, list) else [self._scalar(value)]
            )
        if isinstance(value, list | dict):
            raise ValueError(f"expected {self.expected}")
        return self._typed_scalar(value)

    @property
    def expected(self) -> str:
        """What the argument takes, in words."""
        if self.choices and "int" not in self.types:
            return "one of " + ", ".join(self.choices)
        words = {
            "bool": "true or false",
            "int": "an integer",
            "float": "a number",
            "str": "text",
            "list": "a list",
            "dict": "a mapping",
        }
        return " or ".join(word for name, word in words.items() if name in self.types) or "a value"

    def _scalar(self, value: object) -> object:
        if isinstance(value, list | dict) or value is None:
            raise ValueError(f"expected {self.expected} of plain values")
        return value

    def _typed_scalar(self, value: object) -> Any:
        if isinstance(value, bool):
            if "bool" in self.types:
                return value
            hint = (
                "; YAML reads no, off, yes and on as true or false, put the word in quotes"
                if self.choices
                else ""
            )
            quoted = " (YAML reads a bare no or off as false: write 'no')" if "str" in self.types else ""
            raise ValueError(f"expected {self.expected}{hint or quoted}")
        if "bool" in self.types and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        for name in ("int", "float"):
            if name in self.types and (number := _number(value, whole=name == "int")) is not None:
                return number
        if "str" not in self.types:
            raise ValueError(f"expected {self.expected}")
        if self.choices and value not in self.choices:
            near = closest(str(value), self.choices)
            raise ValueError(
                f"expected {self.expected}" + (f" (did you mean {as_yaml(near)}?)" if near else "")
            )
        return str(value)


@cache
def all_arguments(*, rlhf: bool = False) -> dict[str, SwiftArgument]:
    """Name -> argument, of every argument of `swift sft`, or of `swift rlhf`, which has all of them and more."""
    content = read_json(DATA_FILE)
    entries = content["arguments"] | (content["rlhf_arguments"] if rlhf else {})
    return {
        name: SwiftArgument(
            name,
            entry["section"],
            frozenset(entry["types"]),
            tuple(entry.get("choices", ())),
            entry["default"],
        )
        for name, entry in entries.items()
    }


def is_known(name: str) -> bool:
    """Whether `swift sft` or `swift rlhf` has an argument of that name."""
    return name in all_arguments(rlhf=True)


def nearest(name: str) -> str | None:
    """The argument that `name` was probably meant to be, or None."""
    return RENAMED.get(name) or closest(name, all_arguments(rlhf=True))


def _number(value: object, *, whole: bool) -> int | float | None:
    """`value`, a number or its text, as int where it is whole, else float; None if it is no such number."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number.is_integer() and "e" not in str(value).lower() and "." not in str(value):
        return int(str(value))
    return (int(number) if number.is_integer() else None) if whole else number
