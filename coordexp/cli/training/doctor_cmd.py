"""`coordexp doctor`: is this run healthy, or this machine fit for one, and if not, what to do?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_FAILURE, EXIT_OK, ConfigError

EVERY_S = 2.0
"""Seconds between two looks of --watch."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is wrong with a run or with this machine, and what to do",
        description="Exit code 0: nothing found (--machine: nothing that will fail), 1: problems found, 2: bad use.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, nargs="?", help="output folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.add_argument(
        "--watch", action="store_true", help="a live view until the run is over or Ctrl-C is pressed"
    )
    parser.add_argument("--every", type=float, metavar="SECONDS", help="with --watch: between two looks (2)")
    group = parser.add_argument_group("this machine instead of a run")
    group.add_argument(
        "--machine",
        action="store_true",
        help="versions, devices, ranks (under torchrun), ports, folders, memory, the hub, an answer of each backend",
    )
    group.add_argument("--output", type=Path, metavar="DIR", help="where runs will be written (runs)")
    group.add_argument(
        "--port",
        type=positive_int,
        action="append",
        metavar="N",
        help="that a rollout server will have; repeatable",
    )
    group.add_argument("--quick", action="store_true", help="no answers of the backends")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns the process exit code."""
    if args.machine:
        return _machine(args)
    given = [flag for flag in ("output", "port", "quick") if getattr(args, flag)]
    if given:
        raise ConfigError(f"--{given[0]} belongs to --machine.")
    if args.run_dir is None:
        raise ConfigError("name the output folder of a run, or give --machine.")
    if args.json and args.watch:
        raise ConfigError("--json and --watch exclude each other.")
    return _run(args)


def _machine(args: argparse.Namespace) -> int:
    if args.run_dir is not None or args.watch or args.every is not None:
        raise ConfigError("--machine looks at this machine: it takes no RUN_DIR, --watch or --every.")
    if too_high := [port for port in args.port or () if port > 65535]:
        raise ConfigError(f"--port {too_high[0]}: ports end at 65535.")
    from coordexp.machine.gather.packages import gather_packages
    from coordexp.machine.gather.ranks import gather_ranks, rank
    from coordexp.machine.report.examine import Asked, examine

    if rank() > 0:  # rank 0 looks at the machine and reports
        met = gather_ranks(gather_packages().versions)
        if met is not None and met.error is not None:
            print(f"coordexp doctor: rank {rank()}: {met.error}", file=sys.stderr)
            return EXIT_FAILURE
        return EXIT_OK
    asked = Asked(args.output or Asked.output, tuple(args.port or ()), answers=not args.quick)
    report = examine(asked)
    print(json.dumps(report.to_json(), ensure_ascii=False, indent=2, default=str) if args.json else report)
    return report.exit_code


def _run(args: argparse.Namespace) -> int:
    from coordexp.telemetry.doctor.diagnose import Doctor

    if args.every is not None and not (args.watch and args.every > 0):
        raise ConfigError("--every takes seconds above 0, and has no effect without --watch.")
    doctor = Doctor(args.run_dir)
    if args.watch:
        from coordexp.telemetry.doctor.view import watch

        found = watch(doctor, every_s=args.every or EVERY_S)
        return EXIT_FAILURE if found.problems else EXIT_OK
    found = doctor.diagnose()
    if args.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
        return EXIT_FAILURE if found.problems else EXIT_OK
    print(f"{args.run_dir}: {found.summary}")
    for number, problem in enumerate(found.problems, start=1):
        print(f"{number}. {problem}")
    if not found.problems:
        print("No problem found.")
    return EXIT_FAILURE if found.problems else EXIT_OK
