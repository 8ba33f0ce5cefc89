"""`coordexp data ...`: make or convert data sets in the package's JSONL contract."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` and its subcommands."""
    parser = subparsers.add_parser("data", help="make or convert data sets (JSONL)")
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_shapes_parser(commands)
    _add_import_parser(commands, "from-coco", "COCO annotations (instances) -> JSONL")
    lvis = _add_import_parser(commands, "from-lvis", "LVIS v1 annotations -> JSONL")
    lvis.add_argument(
        "--names", choices=("name", "synonyms"), default="name",
        help="describe objects by the category's name, or by one of its synonyms",
    )  # fmt: skip
    lvis.add_argument("--seed", type=int, default=0, help="of the choice among synonyms (default 0)")
    _add_export_parser(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen `data` subcommand; returns the process exit code."""
    commands = {
        "shapes": _run_shapes,
        "from-coco": _run_import,
        "from-lvis": _run_import,
        "to-coco": _run_export,
    }
    return commands[args.data_command](args)


def _add_shapes_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "shapes",
        help="synthetic scenes of coloured shapes, with train and val splits",
        description="Write train.jsonl, val.jsonl and PNG images of coloured shapes. The same arguments give "
        "the same bytes; the two splits share no scene.",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training scenes (default 4000)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="validation scenes (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--preset", choices=("demo", "medium", "hard"), default="demo", help="difficulty (default demo)"
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
    scene.add_argument("--plain-background", action="store_true", help="one flat background colour")


def _add_import_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}. Boxes become bins; objects are sorted; crowd regions and boxes without extent are "
        "left out; a table says how many.",
    )
    parser.add_argument("--annotations", type=Path, required=True, metavar="JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR",
        help="where file names start; each file is checked (default: unchecked, names relative to the JSONL file)",
    )  # fmt: skip
    parser.add_argument(
        "--missing-images", choices=("error", "skip", "keep"), default="error",
        help="what to do about an image that is not in --image-root (default error); they are counted",
    )  # fmt: skip
    parser.add_argument(
        "--bad-images", choices=("error", "skip"), default="error",
        help="what to do about a picture that cannot be decoded, is of another size than annotated or none that the "
        "model's processor takes (default error)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-outside", action="store_true", help="follow file names that lead out of --image-root"
    )
    parser.add_argument(
        "--polygons", action="store_true", help="outlines of one part become `poly`, others stay boxes"
    )
    parser.add_argument(
        "--max-poly-points", type=positive_int, metavar="N", help="outlines of more points stay boxes"
    )
    parser.add_argument("--max-objects", type=positive_int, metavar="N", help="of an image")
    parser.add_argument(
        "--over-max", choices=("drop-image", "keep-largest"), default="drop-image",
        help="what to do about an image with more (default drop-image: labels cut short teach to stop early)",
    )  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="kept as `metadata.dataset` of every record")
    parser.add_argument("--drop-empty", action="store_true", help="leave out images without objects")
    return parser


def _add_export_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "to-coco", help="JSONL -> COCO annotations", description="JSONL -> COCO annotations, boxes in pixels."
    )
    parser.add_argument("--data", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    parser.add_argument(
        "--categories", type=Path, metavar="JSON",
        help="COCO or LVIS file whose category ids to use (default: descriptions by name, from 1)",
    )  # fmt: skip


def _run_import(args: argparse.Namespace) -> int:
    from coordexp.cli.console import progress
    from coordexp.data.formats.coco import import_coco
    from coordexp.data.formats.lvis import import_lvis
    from coordexp.data.formats.options import ImportOptions

    options = ImportOptions(
        image_root=args.image_root,
        allow_outside=args.allow_outside,
        missing=args.missing_images,
        bad=args.bad_images,
        polygons=args.polygons,
        max_poly_points=args.max_poly_points,
        max_objects=args.max_objects,
        over_max=args.over_max,
        drop_empty=args.drop_empty,
        dataset=args.dataset,
    )
    with progress("pictures") as on_picture:
        if args.data_command == "from-coco":
            converted = import_coco(args.annotations, args.output, options, on_picture=on_picture)
        else:
            converted = import_lvis(
                args.annotations,
                args.output,
                options,
                name_by=args.names,
                seed=args.seed,
                on_picture=on_picture,
            )
    for finding in converted.findings:
        print(f"{finding.level}: {finding}")
    return _show_counts(converted.counts, args.output)


def _run_export(args: argparse.Namespace) -> int:
    from coordexp.data.formats.coco_export import export_coco

    return _show_counts(export_coco(args.data, args.output, categories=args.categories), args.output)


def _show_counts(counts: Counter[str], output: Path) -> int:
    from coordexp.cli.console import show_table

    rows = [(name.replace("_", " "), str(count)) for name, count in counts.items()]
    show_table(str(output), ("", "count"), rows)
    print(f"wrote {output}")
    return EXIT_OK


def _run_shapes(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from coordexp.data.shapes import PRESETS, generate_shapes, with_overrides

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
            "varied_background": False if args.plain_background else None,
        },
    )
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("drawing scenes", total=args.train + args.val)
        written = generate_shapes(
            args.output,
            config,
            num_train=args.train,
            num_val=args.val,
            seed=args.seed,
            force=args.force,
            on_scene=lambda: progress.advance(task),
        )
    state = "wrote" if written else "up to date:"
    print(f"{state} {args.train} train and {args.val} val scenes in {args.output}")
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
