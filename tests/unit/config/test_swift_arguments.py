"""The data file of ms-swift's arguments: what values they take, and that it fits the installed ms-swift."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.checks import swift_arguments
from coordexp.config.checks.swift_arguments import all_arguments, nearest


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_steps", 3, 3),
        ("max_steps", "3", 3),
        ("max_steps", 3.0, 3),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1),
        ("save_steps", 100, 100),
        ("bf16", True, True),
        ("bf16", "false", False),
        ("model", "path/to", "path/to"),
        ("model", 4, "4"),
        ("dataset", "one.jsonl", ["one.jsonl"]),
        ("dataset", ["a", "b"], ["a", "b"]),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 2}}),
        ("resume_from_checkpoint", None, None),
        ("quant_bits", "float8", "float8"),
        ("quant_bits", 4, 4),
        ("torch_dtype", "bfloat16", "bfloat16"),
    ],
)
def test_values_are_converted_as_ms_swift_takes_them(name: str, value: Any, expected: Any) -> None:
    converted = all_arguments()[name].convert(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_steps", 3.5, "expected an integer"),
        ("max_steps", True, "expected an integer"),
        ("max_steps", None, "expected an integer; ms-swift cannot be told null here"),
        ("learning_rate", "fast", "expected a number"),
        ("bf16", "maybe", "expected true or false"),
        ("bf16", 1, "expected true or false"),
        ("max_steps", [3], "expected an integer"),
        ("dataset", [["a"]], "expected a list of plain values"),
        ("torch_dtype", "bf16", 'expected one of bfloat16, float16, float32 (did you mean "bfloat16"?)'),
    ],
)
def test_other_values_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^expected") as caught:
        all_arguments()[name].convert(value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_step", "max_steps"),
        ("train_type", "tuner_type"),
        ("per_device_batch_size", "per_device_eval_batch_size"),
        ("zzzzz", None),
    ],
)
def test_nearest_name(name: str, expected: str | None) -> None:
    assert nearest(name) == expected


@pytest.mark.slow
def test_the_file_fits_the_installed_ms_swift() -> None:
    """In a process of its own: parsing arguments changes the types that ms-swift's dataclasses report."""
    folder = Path(__file__).parents[3] / "tools" / "setup"
    code = "import json, dump_swift_arguments; print(json.dumps(dump_swift_arguments.collect()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    )
    installed = json.loads(done.stdout.splitlines()[-1])
    on_disk = json.loads(swift_arguments.DATA_FILE.read_text())
    for part in ("arguments", "rlhf_arguments"):
        assert installed[part] == on_disk[part], "run python tools/setup/dump_swift_arguments.py"
