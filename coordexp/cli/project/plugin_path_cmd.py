"""`coordexp plugin-path`: what `swift sft --external_plugins` has to name."""

from __future__ import annotations

import argparse

from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `plugin-path`."""
    subparsers.add_parser(
        "plugin-path",
        help="print the plugin file for ms-swift's external_plugins",
        description='swift sft FILE --external_plugins "$(coordexp plugin-path)"',
    )


def run(_args: argparse.Namespace) -> int:
    """Print one line; returns the process exit code."""
    from coordexp.shipped import PLUGIN_FILE

    print(PLUGIN_FILE)
    return EXIT_OK
