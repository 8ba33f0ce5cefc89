"""`coordexp verify-best RUN`: is the best checkpoint complete, and does it score again what the log says?"""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_FAILURE, EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `verify-best`."""
    parser = subparsers.add_parser(
        "verify-best",
        help="load the best checkpoint of a run in a fresh process and score it again",
        description="Looks for every file the checkpoint needs, evaluates it with the data, prompt and decoding of its "
        "run, and compares the number that picked it with the logged one. Writes verify_best.json into the run folder. "
        "Run it where the training was started: paths of a run file are relative to there. Exit code 0: equal, 1: it "
        "is not, or a file is missing, 2: no such run.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--backend",
        nargs="+",
        default=["hf"],
        choices=("hf", "vllm"),
        help="who answers, one after another (default hf)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference that counts as none (default 1e-4)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; returns the process exit code."""
    from coordexp.stages.verify import verify_best

    verdict = verify_best(args.run_dir, backends=args.backend, tolerance=args.tolerance)
    for backend, score in verdict.scored.items():
        print(
            f"{verdict.checkpoint}: {verdict.metric} logged {verdict.logged:.6g}, loaded again ({backend}) "
            f"{'none' if score is None else format(score, '.6g')}"
        )
    for fault in verdict.faults:
        print(fault)
    print(f"{args.run_dir}: {'verified' if verdict.passed else 'NOT verified'}")
    return EXIT_OK if verdict.passed else EXIT_FAILURE
