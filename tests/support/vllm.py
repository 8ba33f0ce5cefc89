"""Is there a vLLM to test with?"""

from __future__ import annotations

import importlib.util
import os

import pytest


def require_vllm() -> None:
    """Skip without vLLM; where COORDEXP_REQUIRE_VLLM is set, its absence is a failure."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed: `make setup` found no build of it for this machine"
        if os.environ.get("COORDEXP_REQUIRE_VLLM"):
            pytest.fail(reason)
        pytest.skip(reason)
