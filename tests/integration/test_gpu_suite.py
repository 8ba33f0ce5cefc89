"""The checks of tests/gpu that a CPU can make in seconds, at its size: they pass, and planted faults fail them.

So that they cannot rot where no GPU is. The others start processes; they are run on a CPU by hand:
COORDEXP_GPU_SUITE_DEVICE=cpu python -m pytest -n 0 tests/gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gpu import DEVICE, lines_of
from support.processes import ROOT

from coordexp.head import products
from coordexp.losses import coord
from coordexp.models import self_context
from coordexp.packing import layout
from coordexp.rollout.backends import offload
from coordexp.rollout.decoding import readout

CHEAP = ("coord_losses", "head", "offload", "packing", "readout", "self_context")


class Results:
    """Outcome of every check, and what those that passed said."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.said: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
            self.said[name] = lines_of(report)

    def having(self, outcome: str) -> list[str]:
        return [name for name, found in self.outcomes.items() if found == outcome]


def run_checks(*which: str, traceback: str = "auto") -> Results:
    """In this process: what is imported stays imported, and so do planted faults."""
    results = Results()
    arguments = [
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-o",
        "addopts=--import-mode=importlib",
        f"--tb={traceback}",
    ]
    files = [f"{ROOT}/tests/gpu/test_{name}" for name in which]
    pytest.main([*arguments, *files], plugins=[results])
    return results


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "cpu")


def test_the_cheap_checks_pass_on_a_cpu_and_say_what_they_compared() -> None:
    found = run_checks(*(f"{name}.py" for name in CHEAP))
    assert found.having("failed") == []
    passed = found.having("passed")
    assert {name.partition(".py")[0] for name in passed} == {f"test_{name}" for name in CHEAP}
    assert len(passed) >= 29
    assert [name for name in passed if len(found.said[name]) != 1] == []


def plant(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Any) -> None:
    monkeypatch.setattr(module, name, fault(getattr(module, name)))


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "coord_losses.py": (
        coord, "running_sums", lambda right: lambda x: right(x) * (1.01 if x.dtype == torch.float32 else 1)
    ),
    "head.py": (products, "_add_product", lambda right: lambda out, a, b: right(out, 1.05 * a, b)),
    "offload.py": (
        offload, "_park_data", lambda right: lambda tensor, park: right(tensor, lambda x: park(x).mul(1.001))
    ),
    "packing.py": (
        layout, "block_causal_mask", lambda right: lambda lengths, dtype: right([sum(lengths)], dtype)
    ),
    "readout.py": (readout, "read_coords", lambda _: lambda logits, how: logits.argmax(-1)),
    "self_context.py": (
        self_context, "slot_embeddings", lambda right: lambda table, logits, how: right(
            table, logits if logits.dtype == torch.float64 else logits.flip(-1), how
        )
    ),
}  # fmt: skip
"""Check -> what is replaced by something wrong, under float32 alone where the reference uses it too."""


def test_a_planted_fault_in_each_fails_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in FAULTS.values():
        plant(monkeypatch, *fault)
    failed = run_checks(*FAULTS, traceback="no").having("failed")
    assert {name.partition("::")[0] for name in failed} == {f"test_{check}" for check in FAULTS}
    losses = [name for name in failed if name.startswith("test_coord_losses.py")]
    assert len(losses) == 1
    assert "[coord_w1]" in losses[0]
