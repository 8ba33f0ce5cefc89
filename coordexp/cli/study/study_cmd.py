"""`coordexp study FILE.yaml`: recipes x data sets x seeds, run to the end, and one page that compares them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from coordexp.study.plan import Cell, Study


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `study`."""
    parser = subparsers.add_parser(
        "study",
        help="compare recipes over data sets and seeds",
        description="Train and evaluate every cell of a table (recipe x data set x seed), then write study.json, "
        "study.md and index.html. The same command again goes on where a stopped study was; cells that are done are "
        "not run again. Exit code 1 when a cell failed.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML file (configs/study/)")
    parser.add_argument(
        "--jobs", type=positive_int, metavar="N", help="cells at a time (default: one per CPU core)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=VALUE",
        help="only these cells, and those they start from: recipe=mix,ce data=few seed=1",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the cells and how far each is")
    what.add_argument(
        "--report-only", action="store_true", help="write the results of the cells that are done"
    )


def run(args: argparse.Namespace) -> int:
    """Check the whole study, then list, run or report; returns the process exit code."""
    from coordexp.study.assets import check_assets
    from coordexp.study.jobs import check_recipes
    from coordexp.study.plan import read_study, selected
    from coordexp.study.records import DONE

    study = read_study(args.file)
    check_assets(study)
    check_recipes(study)
    cells = selected(study.cells, args.only)
    if args.list:
        _list(study, cells)
        return EXIT_OK
    failed = []
    if not args.report_only:
        from coordexp.study.running import run_study

        cores = len(os.sched_getaffinity(0))
        jobs = args.jobs or cores
        try:
            ended = run_study(study, cells, jobs=jobs, threads=max(1, cores // jobs), say=_say)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here")
            return EXIT_FAILURE
        failed = [cell for cell, state in ended.items() if state != DONE]
    from coordexp.study.page import write_results

    page = write_results(study)
    print(f"wrote {page}, study.md and study.json beside it")
    if failed:
        print(f"{len(failed)} cells are not done: {', '.join(map(str, failed))}")
    return EXIT_FAILURE if failed else EXIT_OK


def _list(study: Study, cells: Sequence[Cell]) -> None:
    """One line per cell: its state, and of those that are done what they cost and say."""
    from coordexp.study.running import states
    from coordexp.study.schema import METRICS

    found, done = states(study)
    headline = study.file.evaluate.of_headline
    rows = [["cell", "state", "steps", "train s", *map(METRICS.__getitem__, study.file.headline)]]
    for cell in cells:
        row = [str(cell), found[cell]]
        if (record := done.get(cell)) is not None:
            readout = record["readouts"].get(f"{headline.coord}/{headline.score}", {})
            numbers = [(record["cost"]["train_s"], 0), *((readout.get(n), 3) for n in study.file.headline)]
            row += [str(record["steps"]), *("-" if v is None else f"{v:.{digits}f}" for v, digits in numbers)]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip())
    print(f"{len(done)} of {len(study.cells)} cells are done")


def _say(text: str) -> None:
    print(text, flush=True)
