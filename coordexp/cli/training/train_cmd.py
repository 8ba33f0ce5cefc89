"""`coordexp train FILE [--key value ...]`: check a run configuration, print ms-swift's command, run it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from coordexp.errors import EXIT_OK, ConfigError

COMMAND, STEP = "command", "step"
"""What a dry run does: print the command, or run a step of each kind."""
_SEVERAL = ("NPROC_PER_NODE", "NNODES")
"""Environment variables by which ms-swift starts several processes."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `train`."""
    parser = subparsers.add_parser(
        "train",
        allow_abbrev=False,
        usage="coordexp train [--dry-run | --dry-run=step] FILE [--key value ...] [--dotted.path value ...]",
        help="train from a YAML file through `swift sft` (or `swift rlhf`)",
        description="Takes YAML with our sections (model, training, custom, ...) and ms-swift's flat YAML. Further "
        "flags override the file: ms-swift's own (--max_steps 3) and ours "
        "(--custom.coord_soft_ce_w1.enabled false).",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--dry-run", action="store_const", const=COMMAND, help="print the command and stop")
    # An option with a value of its own would take FILE for it in `--dry-run FILE`.
    parser.add_argument(
        "--dry-run=step",
        dest="dry_run",
        action="store_const",
        const=STEP,
        help="run one step of each kind and a small evaluation, print what they took, keep nothing",
    )
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of the training process."""
    from coordexp.cli.training.run_checks import RUN_CHECKS, missing_paths
    from coordexp.config import exit_code, load_run_config, mask_secrets
    from coordexp.config.run import dry_run

    checks = RUN_CHECKS if args.dry_run == COMMAND else (*RUN_CHECKS, missing_paths)
    config = load_run_config(args.config, overrides=args.overrides, checks=checks)
    folder = dry_run.make_folder() if args.dry_run == STEP else None
    try:
        flags = config.to_swift_argv()
        if folder is not None:
            flags = [*dry_run.without_resume(flags), *dry_run.flags(folder)]
        print(
            "running: " + mask_secrets(shlex.join(["swift", config.command, *flags]), config.swift),
            flush=True,
        )
        if args.dry_run == COMMAND:
            return EXIT_OK
        with exit_code.asked_for() as (more, told):
            environment = {**config.env, **os.environ, **more}
            _refuse_two_launchers(environment)
            command = [sys.executable, *_program(config.command, environment), *flags]
            done = subprocess.run(command, env=environment, check=False)
            return told() or done.returncode if done.returncode else EXIT_OK
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_two_launchers(environment: Mapping[str, str]) -> None:
    """ConfigError for a process of one launcher that would start another, and with it ranks of its own."""
    found = [name for name in _SEVERAL if name in environment]
    if found and "LOCAL_RANK" in environment:
        raise ConfigError(
            f"{' and '.join(found)}: torchrun or accelerate has started this process already, "
            "and each rank would start ranks of its own. Unset it, or start coordexp train by itself."
        )


def _program(command: str, environment: Mapping[str, str]) -> list[str]:
    """What the interpreter runs for `swift COMMAND`.

    For one process this is what ms-swift's launcher would start after it has imported torch itself, which takes
    seconds.
    """
    swift = importlib.util.find_spec("swift")
    if swift is None or swift.origin is None or not environment.keys().isdisjoint(_SEVERAL):
        return ["-m", "swift.cli.main", command]
    return [str(Path(swift.origin).parent / "cli" / f"{command}.py")]
