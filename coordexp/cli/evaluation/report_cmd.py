"""`coordexp report`: one HTML file about one evaluated run, or about several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.cli.arguments import count
from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `report`."""
    parser = subparsers.add_parser(
        "report", help="one HTML file with numbers, curves and pictures of evaluated runs"
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of `coordexp score` or of `coordexp eval --format coco`, others are compared with the first; or "
        "that of `coordexp run`, for its verdicts, of `coordexp sweep`, for its table, or of a training with a latent "
        "prefix, for what other prompts are worth",
    )
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--image-root",
        type=Path,
        help="folder that image names start from (default: the folder of the data file the run was made on)",
    )
    parser.add_argument("--worst", type=count, default=24, help="worst images, in full size (default 24)")
    parser.add_argument("--best", type=count, default=12, help="best images, in full size (default 12)")
    parser.add_argument(
        "--thumbnails", type=count, default=5000, metavar="N", help="other images, small (default 5000)"
    )
    parser.add_argument(
        "--min-score", type=float, metavar="X",
        help="least score of a prediction in the confusion matrix and among probable label errors (default: that of "
        "the highest F1 of each run)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="also write every number of the page (default: beside it, as .json)",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=count, default=1000, metavar="N", help="resamples, 0 for none (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default 0)")
    parser.add_argument("--engine", choices=("hotcoco", "faster-coco-eval", "pycocotools"), default="hotcoco")


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the process exit code."""
    from coordexp.eval.report.sweep import write_sweep
    from coordexp.eval.report.verdicts import (
        holds_prompts,
        holds_verdicts,
        write_prompts,
        write_verdicts,
    )
    from coordexp.eval.report.write import ReportOptions, write_report
    from coordexp.eval.sweep import holds_sweep

    if len(args.runs) == 1 and holds_verdicts(args.runs[0]):
        print(f"wrote {write_verdicts(args.runs[0], args.output)}: the verdicts on the stages")
        return EXIT_OK
    if len(args.runs) == 1 and holds_prompts(args.runs[0]):
        print(f"wrote {write_prompts(args.runs[0], args.output)}: the latent prefix beside other prompts")
        return EXIT_OK
    if len(args.runs) == 1 and holds_sweep(args.runs[0]):
        print(f"wrote {write_sweep(args.runs[0], args.output, args.image_root)}: the ways to decode")
        return EXIT_OK
    options = ReportOptions(
        args.worst, args.best, args.bootstrap, args.seed, args.engine, args.thumbnails, args.min_score
    )
    json_path = args.output.with_suffix(".json") if args.json == Path() else args.json
    written = write_report(
        args.runs, args.output, image_root=args.image_root, options=options, json_path=json_path
    )
    if written.num_missing:
        print(
            f"{written.num_missing} of {written.num_pictures} pictures could not be read; give --image-root"
        )
    print(f"wrote {written.path}: {written.num_images} images, {written.num_pictures} of them shown")
    print(f"wrote {written.label_errors}: {written.num_label_errors} probable label errors")
    if json_path is not None:
        print(f"wrote {json_path}")
    return EXIT_OK
