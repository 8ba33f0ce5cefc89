"""`coordexp infer`: a checkpoint and a JSONL file in, predictions and their token trace out."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK, ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `infer`."""
    parser = subparsers.add_parser("infer", help="write a checkpoint's detections for a JSONL file")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with images and ground truth")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for gt_vs_pred.jsonl and the token trace"
    )
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--prompt", help="user prompt (default: the one training uses)")
    parser.add_argument(
        "--object-field-order", choices=("desc_first", "geometry_first"), default="desc_first"
    )


def run(args: argparse.Namespace) -> int:
    """Greedy decoding with transformers; returns the process exit code."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: expected 1 or more.")
    from coordexp.cli.console import progress
    from coordexp.cli.inference import infer_file

    with progress("images") as advance:
        lines = infer_file(
            args.model, args.data, args.output, limit=args.limit, batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens, prompt=args.prompt, field_order=args.object_field_order,
            on_images=advance,
        )  # fmt: skip
    print(f"wrote {len(lines)} images to {args.output}; next: coordexp score --run {args.output}")
    return EXIT_OK
