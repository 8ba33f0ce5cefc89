"""`coordexp COMMAND`: exit code 0 done, 2 bad input, 1 failure, 3 (`run`) ended but not accepted."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from types import ModuleType

from coordexp import __version__
from coordexp.errors import EXIT_FAILURE, CoordExpError

# Subcommands import torch, ms-swift or pydantic only inside `run`, so that `--help` and bad flags answer at once.
COMMANDS = {
    "train": "training",
    "run": "training",
    "verify-best": "training",
    "config": "training",
    "data": "assets",
    "model": "assets",
    "detect": "evaluation",
    "infer": "evaluation",
    "score": "evaluation",
    "eval": "evaluation",
    "report": "evaluation",
    "compare": "evaluation",
    "sweep": "evaluation",
    "doctor": "training",
    "metrics": "training",
    "audit": "training",
    "demo": "demo",
    "study": "study",
    "rollout-server": "training",
    "init": "project",
    "plugin-path": "project",
    "runbook": "project",
}
"""Command -> the folder of its file, in the order of the help."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="coordexp", description="Train and evaluate coordinate-token detectors."
    )
    parser.add_argument("--version", action="version", version=f"coordexp {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        _module(command).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can act on are printed without a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if getattr(args, "takes_overrides", False):
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        exit_code: int = _module(args.command).run(args)
        sys.stdout.flush()
        return exit_code
    except CoordExpError as error:
        print(f"coordexp {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        return EXIT_FAILURE


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more (`| head`)."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"coordexp.cli.{COMMANDS[command]}.{command.replace('-', '_')}_cmd")


if __name__ == "__main__":
    sys.exit(main())
