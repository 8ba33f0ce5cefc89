"""`coordexp score`: give every prediction of an inference run a confidence."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK, ConfigError

FORWARD_FLAGS = ("model", "data", "batch_size", "torch_dtype")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `score`."""
    parser = subparsers.add_parser(
        "score",
        help="add confidences from token log-probabilities",
        description="Score = exp(mean log-probability of an object's coordinate tokens), or the expected IoU of its "
        "box under the distributions its coordinates were read from, times the probability of its description. "
        "Predictions that cannot be scored are left out, counted by reason.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder written by `coordexp infer`")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--method",
        choices=("logprob", "expected_iou"),
        help="default: expected_iou where the answers are boxes whose distributions are on record, else logprob",
    )
    kind.add_argument(
        "--constant",
        dest="method",
        action="store_const",
        const="constant",
        help="score 1.0 for all, for answers without log-probabilities",
    )
    parser.add_argument(
        "--desc-fusion",
        type=float,
        nargs="?",
        const=0.5,
        default=0.0,
        metavar="WEIGHT",
        help="let the tokens of the description count with this weight in [0, 1] (0.5 when none is given)",
    )
    forward = parser.add_argument_group(
        "expected_iou for answers of vllm or a server",
        "Their backends do not show the distributions; one forward over each answer finds them. Stopped, it goes on.",
    )
    forward.add_argument("--model", type=Path, help="the checkpoint, where it is not where it was")
    forward.add_argument("--data", type=Path, help="the data file, where it is not where it was")
    forward.add_argument("--batch-size", type=positive_int, help="answers at a time (default 8)")
    forward.add_argument("--torch-dtype", choices=("float32", "bfloat16", "float16"))


def run(args: argparse.Namespace) -> int:
    """Write gt_vs_pred_scored.jsonl; returns the process exit code."""
    from coordexp.eval.predictions.confidence import Scoring, score_directory, usual_scoring

    _check_forward_flags(args)
    if args.method is not None or args.desc_fusion:
        scoring = Scoring(args.method or "logprob", args.desc_fusion)
    else:
        scoring = usual_scoring(args.run)
    if scoring.method == "expected_iou":
        _find_distributions(args)
    failures = score_directory(args.run, scoring)
    for reason, count in sorted(failures.items()):
        print(f"left out {count} predictions without a score: {reason}")
    print(f"scored {args.run} by {scoring.method}; next: coordexp eval --run {args.run}")
    return EXIT_OK


def _check_forward_flags(args: argparse.Namespace) -> None:
    given = [name for name in FORWARD_FLAGS if getattr(args, name) is not None]
    if given and args.method != "expected_iou":
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: only `--method expected_iou` asks a model. Leave them out, or choose that method."
        )


def _find_distributions(args: argparse.Namespace) -> None:
    """A forward over the answers, where nothing says yet what their coordinates were read from."""
    from coordexp.cli.console import progress
    from coordexp.inference.teacher_forced import needs_distributions, record_distributions

    if not needs_distributions(args.run):
        return
    with progress("images") as advance:
        record_distributions(
            args.run,
            model=args.model,
            data=args.data,
            batch_size=args.batch_size or 8,
            torch_dtype=args.torch_dtype or "float32",
            on_images=advance,
        )
