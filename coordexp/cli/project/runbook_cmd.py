"""`coordexp runbook [PAGE]`: the pages that messages name, wherever coordexp is installed."""

from __future__ import annotations

import argparse

from coordexp.errors import EXIT_OK, ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `runbook`."""
    parser = subparsers.add_parser(
        "runbook", help="print a page of the runbooks", description="Without PAGE: the list of the pages."
    )
    parser.add_argument("page", nargs="?", default="README", metavar="PAGE", help="such as train_stage1")


def run(args: argparse.Namespace) -> int:
    """Print the page; returns the process exit code."""
    from coordexp.shipped import runbooks

    name = args.page.removeprefix("runbooks/").removesuffix(".md")
    pages = sorted(path.stem for path in runbooks().glob("*.md"))
    if name not in pages:
        raise ConfigError(f"no runbook is called {name!r}; there are {', '.join(pages)}.")
    print((runbooks() / f"{name}.md").read_text(encoding="utf-8"), end="")
    return EXIT_OK
