"""`coordexp score`: give every prediction of an inference run a confidence."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `score`."""
    parser = subparsers.add_parser(
        "score",
        help="add confidences from token log-probabilities",
        description="Score = exp(mean log-probability of an object's coordinate tokens). Predictions that cannot be "
        "scored are left out, counted by reason.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder written by `coordexp infer`")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--desc-fusion",
        type=float,
        nargs="?",
        const=0.5,
        default=0.0,
        metavar="WEIGHT",
        help="let the tokens of the description count with this weight in [0, 1] (0.5 when none is given)",
    )
    kind.add_argument(
        "--constant", action="store_true", help="score 1.0 for all, for answers without log-probabilities"
    )


def run(args: argparse.Namespace) -> int:
    """Write gt_vs_pred_scored.jsonl; returns the process exit code."""
    from coordexp.eval.predictions.confidence import Scoring, score_directory

    failures = score_directory(args.run, Scoring(args.desc_fusion, args.constant))
    for reason, count in sorted(failures.items()):
        print(f"left out {count} predictions without a score: {reason}")
    print(f"scored {args.run}; next: coordexp eval --run {args.run}")
    return EXIT_OK
