"""`coordexp compare`: the headline numbers of evaluated runs side by side, with paired differences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordexp.cli.arguments import count
from coordexp.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from coordexp.eval.report.write import Compared


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="the numbers of evaluated runs side by side: the short form of `report`",
        description="Headline numbers with 95 % bootstrap intervals over images. Runs must be of the same images; the "
        "first is what the others are compared with, by paired differences.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folders of `coordexp score` or of `coordexp eval --format coco`, two or more",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    parser.add_argument(
        "--bootstrap", type=count, default=1000, metavar="N", help="resamples, 0 for none (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default 0)")
    parser.add_argument("--engine", choices=("hotcoco", "faster-coco-eval", "pycocotools"), default="hotcoco")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the process exit code."""
    from coordexp.eval.report.write import ReportOptions, compare_runs
    from coordexp.files import write_json

    if len(args.runs) < 2:
        raise ConfigError("compare takes two run folders or more (`coordexp report RUN` is about one).")
    options = ReportOptions(num_resamples=args.bootstrap, seed=args.seed, engine=args.engine)
    compared = compare_runs(args.runs, options=options)
    _print(compared)
    if args.json is not None:
        write_json(args.json, compared.as_json())
        print(f"wrote {args.json}")
    return EXIT_OK


def _print(compared: Compared) -> None:
    from coordexp.cli.console import show_table
    from coordexp.eval.report.headline import MEASURES, headline_cells

    rows = []
    for measure in MEASURES:
        cells = headline_cells(measure, compared.runs, compared.intervals)
        rows.append((measure.title, *(_cell(cell) for cell in cells)))
    names = [numbers.run.name for numbers in compared.runs]
    show_table(compared.summary, ("", *names), rows)
    print("* a difference whose range leaves zero out; better or worse by what the number means")
    print(compared.method)


def _cell(cell: dict[str, Any]) -> str:
    """The number, its range, and on a second line its distance from the first run."""
    text = str(cell["text"]) + (f" ({cell['interval']})" if cell["interval"] else "")
    change = cell["change"]
    if change is None:
        return text
    verdict = f" * {'better' if change['better'] else 'worse'}" if change["sure"] else ""
    return f"{text}\n{change['text']}" + (f" ({change['interval']})" if change["interval"] else "") + verdict
