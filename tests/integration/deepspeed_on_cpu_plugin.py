"""Lets DeepSpeed run over several CPU ranks, for tests.

transformers ignores `deepspeed` with `use_cpu`; without it accelerate (1.15), on a machine that has no GPU, takes every
rank for a run of its own. Told that the ranks meet by gloo, both do what they do on GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support.gloo_deepspeed  # noqa: F401

_prepare_backend = PartialState._prepare_backend


def _with_gloo(self: PartialState, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
    if cpu or torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return _prepare_backend(self, cpu, *args, **kwargs)
    return "gloo", DistributedType.MULTI_CPU


PartialState._prepare_backend = _with_gloo
