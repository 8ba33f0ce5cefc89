"""A few tokens of a tiny random model by each backend, in a process of its own, which may crash or hang."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from coordexp.files import log_tail
from coordexp.machine.facts import AnswerFacts

LIMITS_S = {"hf": 240.0, "vllm": 420.0}
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NPROC_PER_NODE",
)
_PROGRAM = "coordexp.machine.tiny_answer"


def gather_answers(*, limits_s: dict[str, float] | None = None) -> tuple[AnswerFacts, ...]:
    """By our backend `hf`, or transformers alone where ms-swift or datasets is missing; by vLLM if it is there."""
    limits = dict(limits_s or LIMITS_S)
    if not all(map(importlib.util.find_spec, ("swift", "datasets"))):
        limits = {"transformers" if backend == "hf" else backend: limit for backend, limit in limits.items()}
    return tuple(_answer(backend, limit) for backend, limit in limits.items())


def _answer(backend: str, limit_s: float) -> AnswerFacts:
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        return AnswerFacts(backend, "not installed")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    with tempfile.TemporaryDirectory(prefix="coordexp-") as folder:
        log, told = Path(folder) / "log", Path(folder) / "told.json"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM, backend, folder, str(told)],
                stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **environment, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            try:
                code = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                return AnswerFacts(backend, "too late", seconds=limit_s, log=log_tail(log, 4))
            finally:
                _end(process)
        if code != 0 or not told.is_file():
            return AnswerFacts(backend, "failed", log=log_tail(log, 4) or f"exit code {code}")
        found = json.loads(told.read_text(encoding="utf-8"))
        return AnswerFacts(backend, "answered", tuple(found["tokens"]), found["seconds"], found["device"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started: engines outlive their parents."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
