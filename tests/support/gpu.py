"""What the checks of a device share: which device it is, what is missing, and the line that says what was compared.

COORDEXP_GPU_SUITE_DEVICE=cpu runs those of tests/gpu that can at a size for a CPU, which shows that they compare.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "COORDEXP_GPU_SUITE_DEVICE"
COMPARED = "compared"
"""Name of the property of a test's report that holds its line."""
MODULES = {"ms-swift": "swift", "vLLM": "vllm", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
Say = Callable[[str], None]


def needs(*packages: str) -> None:
    """Skip a test whose subject is not installed, by its name."""
    for package in packages:
        if importlib.util.find_spec(MODULES[package]) is None:
            pytest.skip(f"needs {package}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the checks run: the first CUDA device, or what the environment names."""
    named = os.environ.get(DEVICE)
    if named is None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(named or "cuda:0")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The device of a check that no CPU can make."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(scope="session")
def two_gpus(device: torch.device) -> None:
    """A CPU stands for both where the check runs on one."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Say:
    """Say in one line what was compared; it is shown below the results. A test that passes must have said it."""

    def note(line: str) -> None:
        request.node.user_properties.append((COMPARED, line))

    return note


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, not in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def lines_of(report: pytest.TestReport) -> list[str]:
    """What a test said."""
    return [str(value) for name, value in report.user_properties if name == COMPARED]


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item()


class NamedSkips(pytest.Module):
    """A test file one of whose imports is not installed is skipped by the name of the package."""

    def collect(self) -> Any:
        """As pytest does."""
        try:
            _ = self.obj
        except self.CollectError as failure:
            name = _missing_package(failure)
            if name is None:
                raise
            pytest.skip(f"needs {name}", allow_module_level=True)
        return super().collect()


def _missing_package(failure: BaseException | None) -> str | None:
    while failure is not None:
        if isinstance(failure, ModuleNotFoundError) and failure.name:
            package = failure.name.partition(".")[0]
            return None if package in ("coordexp", "support") else _shown(package)
        failure = failure.__cause__ or failure.__context__
    return None


def _shown(module: str) -> str:
    return next((package for package, name in MODULES.items() if name == module), module)


def module_of(path: Path, parent: pytest.Collector) -> pytest.Module:
    """The collector of a test file."""
    return NamedSkips.from_parent(parent, path=path)
