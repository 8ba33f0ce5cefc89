"""Commands in processes that need not import torch, transformers and ms-swift first (see `support.warm_server`)."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

PROGRAM = Path(__file__).with_name("warm_server.py")


class Done(subprocess.CompletedProcess[str]):
    """A command that has ended.

    cpu_s: seconds of one core, without the imports that were done before it.  most_memory_kib: of its largest process.
    """

    cpu_s: float
    most_memory_kib: int


class WarmServer:
    """A server that ends with this process.

    A message is one command, with the descriptors of its standard output and error; the answers are the ids of its
    processes and, at their end, the exit code and what they have taken.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other_end:
            command = [sys.executable, str(PROGRAM), str(other_end.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[other_end.fileno()], env=environment
            )
        atexit.register(self._stop)

    def run(
        self,
        module: str,
        words: Sequence[str],
        *,
        as_script: bool = False,
        environments: Sequence[Mapping[str, str]],
        cwd: Path,
        timeout: float,
    ) -> Done:
        """What `python -m MODULE WORDS` prints, and its exit code; TimeoutExpired after `timeout` seconds.

        as_script: run the file of the module by its path. environments: one process for each; when one of them fails,
        the others are terminated, and its exit code is the answer.
        """
        pipes = [os.pipe() for _ in range(2)]
        order = {
            "module": module, "words": list(words), "as_script": as_script, "cwd": str(cwd),
            "environments": [dict(environment) for environment in environments],
        }  # fmt: skip
        socket.send_fds(self._channel, [json.dumps(order).encode()], [sink for _, sink in pipes])
        for _, sink in pipes:
            os.close(sink)
        children, late = self._answer(), []
        timer = Timer(timeout, lambda: late.append(_kill_groups(children)))
        timer.start()
        with ThreadPoolExecutor(2) as pool:
            output, errors = pool.map(_read, [source for source, _ in pipes])
        end = self._answer()
        timer.cancel()
        command = [sys.executable, "-m", module, *words]
        if late:
            raise subprocess.TimeoutExpired(command, timeout, output, errors)
        done = Done(command, end["exit_code"], output, errors)
        done.cpu_s, done.most_memory_kib = end["cpu_s"], end["most_memory_kib"]
        return done

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        answer = self._channel.recv(1 << 12)
        assert answer, "the server of warm processes has ended: its own error stands above"
        return json.loads(answer)


def _read(descriptor: int) -> str:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
        return stream.read()


def _kill_groups(children: Sequence[int]) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
