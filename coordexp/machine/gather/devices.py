"""CUDA devices: what the driver lists and what torch can do with them."""

from __future__ import annotations

import os
import shutil
import subprocess

from coordexp.machine.facts import DeviceFacts, Gpu

_QUERY = ("--query-gpu=driver_version", "--format=csv,noheader")


def gather_devices() -> DeviceFacts:
    """Of this process."""
    drivers = _listed()
    gpus, error = _seen_by_torch()
    return DeviceFacts(
        drivers[0] if drivers else None, len(drivers), gpus, error, os.environ.get("CUDA_VISIBLE_DEVICES")
    )


def _listed() -> list[str]:
    """The driver's version, once for each device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *_QUERY], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _seen_by_torch() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        import torch
    except ImportError as error:
        return (), f"torch does not import: {error}"
    try:
        if not torch.cuda.is_available():
            if torch.version.cuda is not None:
                torch.cuda.init()  # says why
            return (), None
        return tuple(_gpu(index) for index in range(torch.cuda.device_count())), None
    except RuntimeError as error:
        return (), str(error).splitlines()[0]


def _gpu(index: int) -> Gpu:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    error = None
    try:
        square = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        if (square @ square).sum().item() != 64**3:
            error = "a product of ones came out wrong"
    except RuntimeError as problem:
        error = str(problem).splitlines()[0]
    return Gpu(torch.cuda.get_device_name(index), total, free, torch.cuda.get_device_capability(index), error)
