"""`coordexp data ...`: make, check and convert data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coordexp.cli.assets import data_formats
from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` and its subcommands."""
    parser = subparsers.add_parser("data", help="make, check or convert data sets")
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    data_formats.add_parsers(commands)
    _add_shapes_parser(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen `data` subcommand; returns the process exit code."""
    return _run_shapes(args) if args.data_command == "shapes" else data_formats.run(args)


def _add_shapes_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "shapes",
        help="synthetic scenes of coloured shapes, with train and val splits",
        description="Write train.jsonl, val.jsonl and PNG images of coloured shapes. The same arguments give "
        "the same bytes; the two splits share no scene.",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument(
        "--train", type=int, metavar="N", help="training scenes (default 4000; 500 of --preset few)"
    )
    parser.add_argument("--val", type=int, default=200, metavar="N", help="validation scenes (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--preset",
        choices=("demo", "few", "crowded", "partial", "long_tail", "asked", "pixels", "medium", "hard"),
        default="demo",
        help="pixels, medium, hard: on whole pixels; the others between them, with soft edges (default demo)",
    )
    parser.add_argument("--force", action="store_true", help="replace scenes made from other parameters")
    scene = parser.add_argument_group("scene (each overrides the preset)")
    scene.add_argument("--image-size", type=_image_size, metavar="N|WxH", help="pixels, such as 64 or 96x64")
    scene.add_argument("--min-objects", type=int, metavar="N")
    scene.add_argument("--max-objects", type=int, metavar="N")
    scene.add_argument("--min-side", type=int, metavar="PX", help="smallest object side")
    scene.add_argument("--max-side", type=int, metavar="PX", help="largest object side")
    scene.add_argument(
        "--kinds", type=_names, metavar="A,B", help="box,circle,ellipse,triangle,diamond,cross"
    )
    scene.add_argument("--colors", type=_names, metavar="A,B", help="red,green,blue,yellow,purple,...")
    scene.add_argument("--max-overlap", type=float, metavar="X", help="share of an object others may hide")
    scene.add_argument("--empty-fraction", type=float, metavar="X", help="share of scenes without objects")
    scene.add_argument(
        "--unlabelled", type=float, metavar="X", help="share of objects without training label"
    )
    scene.add_argument(
        "--name-skew", type=float, metavar="X", help="how rare the rarest names are; 0: all alike"
    )
    scene.add_argument(
        "--asked-colors", type=int, metavar="N",
        help="every record names the classes it is asked for, in N of the colours, and holds their objects alone",
    )  # fmt: skip
    scene.add_argument("--lists", type=int, metavar="N", help="of such classes; 0: one for every picture")
    scene.add_argument("--plain-background", action="store_true", help="one flat background colour")


def _run_shapes(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from coordexp.data.scene_config import NUM_TRAIN, PRESETS, with_overrides
    from coordexp.data.shapes import generate_shapes

    num_train = NUM_TRAIN.get(args.preset, 4000) if args.train is None else args.train
    width, height = args.image_size or (None, None)
    config = with_overrides(
        PRESETS[args.preset],
        {
            "width": width,
            "height": height,
            "min_objects": args.min_objects,
            "max_objects": args.max_objects,
            "min_side": args.min_side,
            "max_side": args.max_side,
            "kinds": args.kinds,
            "colors": args.colors,
            "max_overlap": args.max_overlap,
            "empty_fraction": args.empty_fraction,
            "unlabelled": args.unlabelled,
            "name_skew": args.name_skew,
            "asked_colors": args.asked_colors,
            "num_lists": args.lists,
            "varied_background": False if args.plain_background else None,
        },
    )
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("drawing scenes", total=num_train + args.val)
        written = generate_shapes(
            args.output,
            config,
            num_train=num_train,
            num_val=args.val,
            seed=args.seed,
            force=args.force,
            on_scene=lambda: progress.advance(task),
        )
    state = "wrote" if written else "up to date:"
    print(f"{state} {num_train} train and {args.val} val scenes in {args.output}")
    return EXIT_OK


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a number of pixels or WIDTHxHEIGHT, such as 96x64"
        )
    return int(sides[0]), int(sides[-1])
