"""`coordexp model export-prefix`: the latent vectors of one prompt, for inference."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_OK


def add_prefix_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `model export-prefix`."""
    parser = commands.add_parser(
        "export-prefix",
        help="write the latent vectors of one prompt, on their own or as rows of a whole checkpoint",
        description="Write the vectors by which a model of variant latent_prefix reads a prompt. `coordexp infer "
        "--prompt-latents FOLDER` takes them. With --bake they become rows of a whole checkpoint, whose prompt is its "
        "latent tokens: vLLM and servers read it as any other, and stage 2 trains from it.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of variant latent_prefix")
    parser.add_argument(
        "--latents", type=Path, metavar="FOLDER", help="where the prefix is (default: CHECKPOINT)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="user message (default: as trained)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names for the place of {classes} in it")
    parser.add_argument(
        "--keep-prob", type=float, metavar="P", help="of the vectors (default: as trained at last)"
    )
    parser.add_argument("--bake", action="store_true", help="write a whole checkpoint")
    parser.add_argument("--base", help="base model of a LoRA checkpoint (default: the one it names)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder")


def run_export_prefix(args: argparse.Namespace) -> int:
    """Write the folder; returns the process exit code."""
    from coordexp.inference.latents import export_prefix

    text = export_prefix(
        args.checkpoint, args.out, latents=args.latents, user=args.prompt, classes=args.classes,
        keep_prob=args.keep_prob, bake=args.bake, base=args.base,
    )  # fmt: skip
    shown = text if len(text) <= 60 else text[:57] + "..."
    how = (
        f"use it as any checkpoint: coordexp infer --model {args.out}"
        if args.bake
        else (f"use it: coordexp infer --model {args.checkpoint} --prompt-latents {args.out}")
    )
    print(f"wrote {args.out} (of {shown!r}); {how}")
    return EXIT_OK
