"""A process that has imported what training and inference import of other projects, and forks itself for each command.

Started by `support.warm`, which says what is sent and answered. A command begins as in a new interpreter, with its own
environment, working directory, `sys.argv` and `__main__`, and ends as an interpreter ends. Nothing of this project is
imported here, so each command imports the project by itself; what it does not do again is to import the libraries.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

LIBRARIES = (
    "numpy", "scipy.optimize", "torch", "torchvision", "transformers", "transformers.tokenization_mistral_common",
    "transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.qwen3_vl.video_processing_qwen3_vl", "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl", "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "datasets", "peft", "accelerate", "deepspeed", "pydantic", "pycocotools.cocoeval", "cv2", "binpacking",
    "swift.cli.main", "swift.ray_utils", "swift.pipelines", "swift.trainers.seq2seq_trainer", "swift.callbacks.mapping",
    "swift.infer_engine.transformers_engine", "swift.loss_scale.mapping", "swift.metrics.mapping",
    "swift.optimizers.mapping",
)  # fmt: skip
LARGEST_ORDER = 1 << 18


def main(channel: socket.socket) -> None:
    atexit.register(hide_leaks)  # before those of the libraries: they are called in the opposite order
    for name in LIBRARIES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a thread would not be there after a fork"
    gc.collect()
    gc.freeze()
    while True:
        message, streams, _, _ = socket.recv_fds(channel, LARGEST_ORDER, 2)
        if not message:  # the tests have ended
            return
        order = json.loads(message)
        sys.stdout.flush()
        children = []
        for environment in order["environments"]:
            child = os.fork()
            if child == 0:
                channel.close()
                take_place(environment, order["cwd"], streams)
                begin(order["module"], order["words"], as_script=order["as_script"])
                return
            children.append(child)
        for descriptor in streams:
            os.close(descriptor)
        channel.send(json.dumps(children).encode())
        channel.send(json.dumps(ended(children)).encode())


def ended(children: list[int]) -> dict[str, float]:
    """The first exit code that is not 0, upon which the other processes are asked to end, and what all have taken."""
    running, first, cpu_s, most_memory_kib = set(children), 0, 0.0, 0
    while running:
        child, status, usage = os.wait4(-1, 0)
        cpu_s += usage.ru_utime + usage.ru_stime
        most_memory_kib = max(most_memory_kib, usage.ru_maxrss)
        running.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code
            for other in running:
                os.kill(other, signal.SIGTERM)
    return {"exit_code": first, "cpu_s": cpu_s, "most_memory_kib": most_memory_kib}


def hide_leaks() -> None:
    """Frozen objects are not collected at the end, of which bindings of C++ libraries would write."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def take_place(environment: dict[str, Any], cwd: str, streams: list[int]) -> None:
    """Take over the streams, the environment and the folder of a command."""
    import numpy as np

    os.setsid()
    for standard, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None
    random.seed()
    np.random.seed()


def begin(module: str, words: list[str], *, as_script: bool) -> None:
    """What `python -m MODULE WORDS` does, or `python` with the file of the module."""
    sys.argv[1:] = words
    if not as_script:
        sys.path[0] = os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    sys.argv[0], sys.path[0] = spec.origin, os.path.dirname(spec.origin)
    runpy.run_path(spec.origin, run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
