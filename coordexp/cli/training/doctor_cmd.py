"""`coordexp doctor`: is this run healthy, and if not, what to do?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coordexp.errors import EXIT_FAILURE, EXIT_OK, ConfigError

EVERY_S = 2.0
"""Seconds between two looks of --watch."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is wrong with a run and what to do",
        description="Exit code 0: nothing found, 1: problems found, 2: not a run folder.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="output folder of a run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    how.add_argument(
        "--watch", action="store_true", help="a live view until the run is over or Ctrl-C is pressed"
    )
    parser.add_argument("--every", type=float, metavar="SECONDS", help="with --watch: between two looks (2)")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns the process exit code."""
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
