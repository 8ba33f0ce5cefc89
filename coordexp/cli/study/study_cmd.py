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
    from coordexp.cli.console import show_table
    from coordexp.study.running import states
    from coordexp.study.schema import METRICS

    found, done = states(study)
    headline = study.file.evaluate.of_headline
    rows = []
    for cell in cells:
        record = done.get(cell)
        numbers = ["", "", *("" for _ in study.file.headline)]
        if record is not None:
            readout = record["readouts"][f"{headline.coord}/{headline.score}"]
            values = [readout[name] for name in study.file.headline]
            seconds = record["cost"]["train_s"]
            numbers = [str(record["steps"]), "-" if seconds is None else f"{seconds:.0f}"]
            numbers += ["-" if value is None else f"{value:.3f}" for value in values]
        rows.append((cell.data, cell.recipe, str(cell.seed), found[cell], *numbers))
    heads = (
        "data",
        "recipe",
        "seed",
        "state",
        "steps",
        "train s",
        *map(METRICS.__getitem__, study.file.headline),
    )
    show_table(f"{study.file.name}: {len(cells)} cells, {len(done)} done", heads, rows)


def _say(text: str) -> None:
    print(text, flush=True)
