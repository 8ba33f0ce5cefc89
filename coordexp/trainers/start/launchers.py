"""What a launcher asks for that our trainers cannot do, by its environment variables and by what came of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.errors import ConfigError

ACCELERATE_CONFIGS = "configs/accelerate/"
_YES = ("1", "true", "yes", "on")
_DEGREES = {
    "TP_SIZE": "tensor parallelism",
    "CP_SIZE": "context parallelism",
    "SP_SIZE": "sequence parallelism",
    "DP_SHARD_SIZE": "sharding by FSDP2",
}


def check_launcher(environ: Mapping[str, str]) -> None:
    """Raises ConfigError that names the setting of the launcher, what it cannot be, and what to use."""
    problems = list(launcher_problems(environ))
    if problems:
        raise ConfigError("\n  ".join(problems))


def launcher_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each setting of accelerate, XLA or Slurm that cannot take effect."""
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        yield (
            "distributed_type: FSDP of the accelerate configuration (ACCELERATE_USE_FSDP): our trainers do not run "
            "under FSDP, which flattens and shards the weights that losses, rollouts and optimizers here read by name. "
            f"Use {ACCELERATE_CONFIGS}one_node.yaml (DDP), or zero2.yaml or zero3.yaml there, which shard by DeepSpeed."
        )
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        yield (
            "distributed_type: MEGATRON_LM of the accelerate configuration (ACCELERATE_USE_MEGATRON_LM): our trainers "
            f"do not run on Megatron-LM, which has its own models. Use {ACCELERATE_CONFIGS}zero3.yaml for a model that "
            "does not fit on a device."
        )
    if _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        degrees = [
            f"{what} (parallelism_config_{name.lower()}: {environ[f'PARALLELISM_CONFIG_{name}']})"
            for name, what in _DEGREES.items()
            if environ.get(f"PARALLELISM_CONFIG_{name}", "1") not in ("1", "0", "")
        ]
        if degrees:
            yield (
                f"parallelism_config of the accelerate configuration: no {' and no '.join(degrees)} in our trainers. "
                f"Remove parallelism_config, and use {ACCELERATE_CONFIGS}zero3.yaml for a model that does not fit on a "
                "device."
            )
    if environ.get("PJRT_DEVICE", "").upper() == "TPU" or _is_on(environ, "ACCELERATE_USE_TPU"):
        yield "distributed_type: XLA (PJRT_DEVICE=TPU): our trainers do not run on TPUs. Use CUDA devices or a CPU."
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.upper() not in ("", "NO"):
        yield (
            f"dynamo_backend: {backend} of the accelerate configuration (ACCELERATE_DYNAMO_BACKEND) would compile the "
            "model where the run file does not say so. Set it to 'no'; torch_compile of the run file compiles."
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1 and "RANK" not in environ:
        yield (
            f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS), and nothing gives this process a rank: each task "
            "would train a model of its own into the same folder. Start one task per node with NNODES, NODE_RANK, "
            "NPROC_PER_NODE and MASTER_ADDR, as configs/slurm/train.sbatch does; for separate runs, unset "
            "SLURM_STEP_NUM_TASKS."
        )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in _YES


def check_started(
    num_processes: int, deepspeed: Any, is_deepspeed_enabled: bool, environ: Mapping[str, str] = os.environ
) -> None:
    """Raises ConfigError where what the launcher and the flags ask for did not come about.

    num_processes: that train together.  deepspeed: of the training arguments.
    """
    size = int(environ.get("WORLD_SIZE") or 1)
    if num_processes != size:
        raise ConfigError(
            f"the launcher started {size} processes, and each of them would train a model of its own: this machine "
            "has no device that they could meet on. On a CPU set use_cpu: true, or ACCELERATE_USE_CPU=true "
            "in the environment."
        )
    asked = bool(deepspeed) or _is_on(environ, "ACCELERATE_USE_DEEPSPEED")
    if asked and not is_deepspeed_enabled:
        raise ConfigError(
            "deepspeed is set, but transformers ignores it on a CPU (use_cpu: true, or ACCELERATE_USE_CPU=true); "
            "remove one of them."
        )
