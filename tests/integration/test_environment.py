"""The locked versions are the installed ones, and the big packages live in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from support.processes import ROOT
from support.vllm import require_vllm

LOCKED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
CORE = (
    "torch", "torchvision", "transformers", "ms_swift", "accelerate", "deepspeed", "peft", "datasets", "scipy", "numpy",
    "pycocotools", "faster-coco-eval", "sentence-transformers", "qwen-vl-utils", "binpacking", "pydantic",
)  # fmt: skip


@pytest.mark.parametrize("package", CORE)
def test_installed_version_is_the_locked_one(package: str):
    installed = re.sub(r"\+.*", "", version(package))  # torch carries +cpu or +cu130
    assert installed == LOCKED[package]


@pytest.mark.slow
@pytest.mark.vllm
def test_swift_vllm_and_deepspeed_import_together():
    require_vllm()
    code = "import swift, vllm, deepspeed, torchvision, pycocotools; print(vllm.__version__.split('+')[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == LOCKED["vllm"]
