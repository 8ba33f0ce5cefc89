"""`coordexp metrics ...`: what a logged number means."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK
from coordexp.files import write_text

REFERENCE = Path("runbooks/metrics.md")
RULES = Path("runbooks/rules.md")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `metrics` and its subcommands."""
    parser = subparsers.add_parser("metrics", help="look up what a logged number means")
    commands = parser.add_subparsers(dest="metrics_command", metavar="COMMAND", required=True)
    explain = commands.add_parser("explain", help="unit, meaning, reduction and presence of keys")
    explain.add_argument("keys", nargs="+", metavar="KEY", help="as logged, such as eval_coord_diag/w1")
    commands.add_parser("list", help="every key, one a line")
    reference = commands.add_parser("write-reference", help=f"print {REFERENCE} from the catalogue")
    reference.add_argument("--output", type=Path, default=REFERENCE, help=f"default {REFERENCE}")
    rules = commands.add_parser("write-rules", help=f"print {RULES} from the rules and healthy ranges")
    rules.add_argument("--output", type=Path, default=RULES, help=f"default {RULES}")


def run(args: argparse.Namespace) -> int:
    """Run the chosen `metrics` subcommand; returns the process exit code."""
    from coordexp.metrics.catalog import all_specs
    from coordexp.metrics.reference import explain, render_reference
    from coordexp.telemetry.rules.reference import render_rules, watched

    if args.metrics_command == "explain":
        print("\n\n".join("\n".join([explain(key), *watched(key)]) for key in args.keys))
    elif args.metrics_command == "list":
        print("\n".join(spec.key for spec in all_specs()))
    else:
        render = render_rules if args.metrics_command == "write-rules" else render_reference
        write_text(args.output, render())
        print(f"wrote {args.output}")
    return EXIT_OK
