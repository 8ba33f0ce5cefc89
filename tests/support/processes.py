"""Run the real commands in processes of their own, on a CPU."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.warm import Done, WarmServer

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "coordexp" / "plugin.py"


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def sft_flags(model: Path, data: Path, output: Path, **overrides: object) -> list[str]:
    """Flags of a short CPU run of `swift sft`; a None override removes the flag."""
    flags: dict[str, object] = {
        "model": model,
        "model_type": "qwen3_vl",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "freeze_vit": False,
        "freeze_aligner": False,
        "external_plugins": PLUGIN,
        "ignore_args_error": True,
        "custom_trainer_variant": "stage1_coord",
        "dataset": data / "train.jsonl",
        "val_dataset": data / "val.jsonl",
        "max_length": 512,
        "strict": True,
        "load_from_cache_file": False,
        "output_dir": output,
        "add_version": False,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "fp16": False,
        "bf16": False,
        "check_model": False,
        **overrides,
    }
    argv = []
    for key, value in flags.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        argv += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return argv


@functools.cache
def warm_server() -> WarmServer:
    """The one of this test process."""
    return WarmServer(swift_environment())


def run_swift(command: str, *arguments: object, **environment: str) -> Done:
    """`swift COMMAND ARGUMENTS` in processes of its own; output captured as text.

    They are warm ones (see `support.warm`) and what the launchers of ms-swift and torch would start, NPROC_PER_NODE of
    them.
    """
    words, variables = [str(word) for word in arguments], swift_environment(**environment)
    return warm_server().run(
        f"swift.cli.{command}", words, as_script=True, environments=of_ranks(variables), cwd=ROOT, timeout=300
    )


def run_fresh_swift(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same by the launchers and in new interpreters."""
    return subprocess.run(
        [sys.executable, "-m", "swift.cli.main", command, *map(str, arguments)],
        capture_output=True, text=True, env=swift_environment(**environment), cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip


def run_train(run_file: str | Path, words: Sequence[object], **environment: str) -> Done:
    """What `coordexp train RUN_FILE WORDS` starts."""
    from coordexp.config import load_run_config

    config = load_run_config(run_file, overrides=[str(word) for word in words])
    of_file = {name: value for name, value in config.env.items() if name not in os.environ}
    return run_swift(config.command, *config.to_swift_argv(), **{**of_file, **environment})


def of_ranks(variables: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process, as `torchrun` gives them where NPROC_PER_NODE is set."""
    number = variables.get("NPROC_PER_NODE")
    if number is None:
        return [dict(variables)]
    shared = {
        **variables, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(int(number))]


def swift_environment(**environment: str) -> dict[str, str]:
    """Environment of a CPU run: one thread, no hub, unknown metrics are errors."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "COORDEXP_STRICT_METRICS": "1",
        **environment,
    }


def run_coordexp(*arguments: object, cwd: Path = ROOT, timeout: float = 300) -> Done:
    """`coordexp ARGUMENTS` in a process of its own, a warm one; timeout: seconds."""
    words = [str(word) for word in arguments]
    return warm_server().run(
        "coordexp.cli.main", words, environments=[swift_environment()], cwd=cwd, timeout=timeout
    )
