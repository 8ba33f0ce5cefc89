"""`coordexp score`: give every prediction of an inference run a confidence."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `score`."""
    parser = subparsers.add_parser("score", help="add confidences from token log-probabilities")
    parser.add_argument("--run", type=Path, required=True, help="folder written by `coordexp infer`")


def run(args: argparse.Namespace) -> int:
    """Write gt_vs_pred_scored.jsonl; returns the process exit code."""
    from coordexp.eval.confidence import score_directory

    failures = score_directory(args.run)
    for reason, count in sorted(failures.items()):
        print(f"left out {count} predictions without a score: {reason}")
    print(f"scored {args.run}; next: coordexp eval --run {args.run}")
    return EXIT_OK
