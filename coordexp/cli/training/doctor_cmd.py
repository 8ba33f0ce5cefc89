"""`coordexp doctor`: is this run healthy, and if not, what to do?"""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_FAILURE, EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is wrong with a run and what to do",
        description="Exit code 0: nothing found, 1: problems found, 2: not a run folder.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder with resolved_config.json")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns the process exit code."""
    from coordexp.telemetry.doctor import diagnose

    diagnosis = diagnose(args.run_dir)
    print(f"{args.run_dir}: {diagnosis.summary}")
    for number, problem in enumerate(diagnosis.problems, start=1):
        print(f"{number}. {problem}")
    if not diagnosis.problems:
        print("No problem found.")
    return EXIT_FAILURE if diagnosis.problems else EXIT_OK
