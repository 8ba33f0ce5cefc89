"""The configurations for `accelerate launch`, read by accelerate itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from support.processes import ROOT, free_port

from coordexp.trainers.start.launchers import launcher_problems

CONFIGS = ROOT / "configs" / "accelerate"


def environment(config: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch` gives to every rank, but for the ranks themselves."""
    words = [
        "--config_file",
        str(config),
        "--main_process_port",
        free_port(),
        *flags,
        "-m",
        "coordexp.cli.main",
    ]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    assert args.multi_gpu or args.use_fsdp, "accelerate would start one process"
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_asks_for_nothing_that_is_refused(path):
    found = environment(path)
    assert list(launcher_problems(found)) == []
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"  # the run file says it
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    stage = found.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    assert stage == {"zero2": "2", "zero3": "3"}.get(path.stem)


def test_fsdp_is_refused_by_name(tmp_path):
    text = (CONFIGS / "one_node.yaml").read_text().replace("MULTI_GPU", "FSDP")
    config = tmp_path / "fsdp.yaml"
    config.write_text(text + "fsdp_config: {fsdp_version: 2, fsdp_cpu_ram_efficient_loading: false}\n")
    (said,) = launcher_problems(environment(config))
    assert said.startswith("distributed_type: FSDP of the accelerate configuration (ACCELERATE_USE_FSDP): ")
    assert said.endswith("or zero2.yaml or zero3.yaml there, which shard by DeepSpeed.")
