"""`coordexp infer`: a checkpoint and a JSONL file in, predictions and their token trace out."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `infer`."""
    parser = subparsers.add_parser("infer", help="write a checkpoint's detections for a JSONL file")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with images and ground truth")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for gt_vs_pred.jsonl and the token trace"
    )
    parser.add_argument("--limit", type=positive_int, help="only the first N images")
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024)
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    trained = "default: what the checkpoint's run was trained with"
    parser.add_argument("--prompt", help=f"user prompt ({trained})")
    parser.add_argument("--object-field-order", choices=("desc_first", "geometry_first"), help=trained)


def run(args: argparse.Namespace) -> int:
    """Greedy decoding with transformers; returns the process exit code."""
    from coordexp.cli.console import progress
    from coordexp.cli.inference import infer_file

    with progress("images") as advance:
        lines = infer_file(
            args.model,
            args.data,
            args.output,
            limit=args.limit,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            torch_dtype=args.torch_dtype,
            prompt=args.prompt,
            field_order=args.object_field_order,
            on_images=advance,
        )
    print(f"wrote {len(lines)} images to {args.output}; next: coordexp score --run {args.output}")
    return EXIT_OK
