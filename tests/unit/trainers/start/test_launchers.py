"""What launchers ask for that our trainers cannot do."""

from __future__ import annotations

import re

import pytest

from coordexp.errors import ConfigError
from coordexp.trainers.start.launchers import check_launcher, check_started, launcher_problems

DDP = {
    "ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4",
    "RANK": "0", "WORLD_SIZE": "4",
}  # fmt: skip
"""Of a run of four ranks that one launcher or another has started; nothing in it is wrong."""


def test_data_parallel_ranks_are_fine():
    assert list(launcher_problems(DDP)) == []
    check_launcher({})


@pytest.mark.parametrize(
    ("variables", "named", "instead"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "distributed_type: FSDP", "one_node.yaml"),
        ({"ACCELERATE_USE_FSDP": "True"}, "ACCELERATE_USE_FSDP", "zero3.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type: MEGATRON_LM", "zero3.yaml"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2", "zero3.yaml"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, "context parallelism", "zero3.yaml"),
        ({"PJRT_DEVICE": "TPU"}, "distributed_type: XLA", "CUDA"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: INDUCTOR", "torch_compile"),
    ],
)
def test_what_the_trainers_cannot_do_is_named_with_what_to_use(variables, named, instead):
    (said,) = launcher_problems({**DDP, **variables})
    assert named in said
    assert instead in said
    with pytest.raises(ConfigError, match=re.escape(named)) as error:
        check_launcher({**DDP, **variables})
    assert error.value.exit_code == 2


def test_tasks_of_srun_that_know_no_rank_are_not_runs_of_their_own():
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    (said,) = launcher_problems(variables)
    assert "srun started 2 tasks" in said
    assert "configs/slurm/train.sbatch" in said
    assert list(launcher_problems({**variables, "SLURM_STEP_NUM_TASKS": "1"})) == []


def test_ranks_that_would_train_apart_are_refused():
    with pytest.raises(
        ConfigError, match="started 2 processes, and each of them would train a model of its own"
    ):
        check_started(1, None, False, {"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="deepspeed is set, but transformers ignores it on a CPU"):
        check_started(2, "zero2", False, {"WORLD_SIZE": "2"})
    check_started(2, "zero2", True, {"WORLD_SIZE": "2"})
    check_started(1, None, False, {})
