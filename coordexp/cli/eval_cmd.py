"""`coordexp eval`: F1 and COCO average precision of a scored inference run."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `eval`."""
    parser = subparsers.add_parser("eval", help="F1 and COCO AP of scored predictions")
    parser.add_argument(
        "--run", type=Path, required=True, help="folder that `coordexp score` has been run on"
    )
    parser.add_argument("--engine", choices=("pycocotools", "faster-coco-eval"), default="pycocotools")


def run(args: argparse.Namespace) -> int:
    """Write metrics.json and print the headline numbers; returns the process exit code."""
    from coordexp.cli.console import show_table
    from coordexp.eval.evaluate import evaluate_directory

    metrics = evaluate_directory(args.run, engine=args.engine)
    names = (
        "f1_at_50",
        "f1_50_95",
        "box_f1_at_50",
        "box_f1_50_95",
        "precision_at_50",
        "recall_at_50",
        "AP",
        "AP50",
        "AP75",
        "AP_const",
    )
    show_table(
        f"{args.run}: {metrics['num_images']} images, {metrics['num_gt']} objects, {metrics['num_pred']} predictions",
        ("metric", "value"),
        [(name, f"{metrics[name]:.3f}") for name in names],
    )
    print(f"wrote {args.run / 'metrics.json'}")
    return EXIT_OK
