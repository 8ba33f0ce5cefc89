"""Real servers in processes of their own, for tests: our rollout server, and `vllm serve`."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import requests
from support.processes import ROOT, free_port

START_S = 180.0
STOP_S = 20.0
KEY = secrets.token_hex(16)  # of all servers of this process, so that one run can use several


@dataclass(frozen=True)
class RolloutServer:
    """A server that answers. api_key_env: the variable that holds its key, set in this process too."""

    base_url: str
    group_port: int
    api_key_env: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def api_key(self) -> str:
        return os.environ[self.api_key_env]

    def settings(self, **values: object) -> dict[str, object]:
        """The `rollout_matching.vllm` section of a run that uses this server."""
        servers = {
            "servers": [{"base_url": self.base_url, "group_port": self.group_port}],
            "timeout_s": 60.0,
            "api_key_env": self.api_key_env,
        }
        return {"mode": "server", "server": servers | values}

    def console(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text()


@contextmanager
def rollout_server(
    model_dir: str | Path,
    log: Path,
    *flags: object,
    dtype: str = "float32",
    max_model_len: int = 512,
    **environment: str,
) -> Iterator[RolloutServer]:
    """`coordexp rollout-server` on free ports of 127.0.0.1; its process group is gone afterwards.

    log: file for what it prints.
    """
    port, group_port = free_port(), free_port()
    variable = f"COORDEXP_TEST_KEY_{port}"
    os.environ[variable] = KEY
    command = [
        sys.executable, "-m", "coordexp.cli.main", "rollout-server", "--model", model_dir, "--port", port,
        "--group-port", group_port, "--api-key-env", variable, "--dtype", dtype, "--max-model-len", max_model_len,
        "--max-num-seqs", 8, "--enforce-eager", *flags,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **environment,
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    server = RolloutServer(f"http://127.0.0.1:{port}", int(group_port), variable, process, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        stop(process)
        del os.environ[variable]


@contextmanager
def openai_server(model_dir: str | Path, log: Path, *flags: object, **environment: str) -> Iterator[str]:
    """`vllm serve` of a folder as "model" on a free port of 127.0.0.1, float32; gives its address, while it starts."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir, "--served-model-name",
        "model", "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", 512,
        "--max-num-seqs", 1, "--enforce-eager", "--no-enable-prefix-caching", "--mm-processor-cache-gb", 0,
        "--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--distributed-executor-backend", "uni", *flags,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork", **environment,
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def is_healthy(base_url: str) -> bool:
    """Does a server answer yet?"""
    try:
        return requests.get(base_url + "/health", timeout=2).ok
    except requests.RequestException:
        return False


def _wait_until_healthy(server: RolloutServer) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.process.poll() is None, server.console()[-4000:]
        if is_healthy(server.base_url):
            return
        time.sleep(0.2)
    raise AssertionError(f"no answer in {START_S} s\n{server.console()[-4000:]}")


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL for whatever of the group is left."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
