"""`coordexp init DIR`: lay out a project away from the repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `init`."""
    parser = subparsers.add_parser(
        "init",
        help="lay out a project: run files, folders, a README",
        description="Write run files for both stages, with the paths of data and models to fill in, a run file that "
        "shows whether the installation works, folders and a README. A folder that holds anything else is refused.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")


def run(args: argparse.Namespace) -> int:
    """Write the project; returns the process exit code."""
    from coordexp.shipped.project import lay_out, project_files

    if not lay_out(args.folder):
        print(f"up to date: {args.folder}")
        return EXIT_OK
    print(f"wrote {args.folder}: {', '.join(sorted(project_files()))}")
    print(f"next: cd {args.folder}, and read README.md")
    return EXIT_OK
