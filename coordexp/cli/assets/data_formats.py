"""`coordexp data check`, `view`, `convert`, `from-coco`, `from-lvis` and `to-coco`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordexp.cli.arguments import count, positive_int
from coordexp.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, ConfigError

if TYPE_CHECKING:
    from coordexp.data.augment.augmenter import Augmenter
    from coordexp.data.check.findings import Finding
    from coordexp.data.check.run import CheckReport
    from coordexp.data.check.source import Source
    from coordexp.data.formats.options import ImportOptions

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

FORMATS = ("jsonl", "coco", "lvis", "yolo", "voc", "labelme", "cvat")
TARGETS = ("jsonl", "coco", "yolo", "voc", "labelme", "cvat")
_SWIFT_SEED = 42  # of ms-swift, where a run says none
_MAX_CLASSES = 20


def add_parsers(commands: Commands) -> None:
    """Register the subcommands."""
    _add_check_parser(commands)
    _add_view_parser(commands)
    _add_convert_parser(commands)
    _add_import_parser(commands, "from-coco", "COCO annotations (instances) -> JSONL")
    lvis = _add_import_parser(commands, "from-lvis", "LVIS v1 annotations -> JSONL")
    lvis.add_argument(
        "--names", choices=("name", "synonyms"), default="name",
        help="describe objects by the category's name, or by one of its synonyms",
    )  # fmt: skip
    lvis.add_argument("--seed", type=int, default=0, help="of the choice among synonyms (default 0)")
    export = commands.add_parser(
        "to-coco", help="JSONL -> COCO annotations", description="JSONL -> COCO annotations, boxes in pixels."
    )
    export.add_argument("--data", type=Path, required=True, metavar="JSONL")
    export.add_argument("--output", type=Path, required=True, metavar="JSON")
    _add_categories(export)


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; returns the process exit code."""
    commands = {
        "check": _run_check,
        "view": _run_view,
        "convert": _run_convert,
        "from-coco": _run_import,
        "from-lvis": _run_import,
        "to-coco": _run_export,
    }
    return commands[args.data_command](args)


def _add_check_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="look at every box and picture of a data set, and say what is wrong or suspicious",
        description="Read annotations of any known format, decode every picture with all cores, print counts and what "
        "is wrong or suspicious, and write a page with drawn samples. Several sources are compared with each other: "
        "the same picture in two of them is leakage. Exit status 0: nothing found; 1: suspicious; 2: errors, which "
        "import and training refuse.",
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE",
        help="file or folder: our JSONL, COCO, LVIS, YOLO, Pascal VOC, Labelme or CVAT",
    )  # fmt: skip
    _add_source_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("data_check.html"), metavar="HTML",
        help="the page to write (default data_check.html)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=count, default=24, metavar="N", help="drawn pictures of each source (default 24)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (default 0)")
    parser.add_argument(
        "--augment", type=count, default=0, metavar="N",
        help="also draw N samples of each source as custom.augmentation of a run changes them (--config)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="YAML", help="the run file for --augment")


def _add_view_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "view",
        help="a page with every picture of a data set and its objects, by description, size and number",
        description="Write a page of all images with their boxes and outlines, which filters them and asks nothing of "
        "a network. A source of several splits gives a page for each.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, as for `data check`")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data_view"),
        metavar="DIR",
        help="where to write (default data_view)",
    )
    parser.add_argument("--images", type=positive_int, metavar="N", help="the first N images only")
    _add_source_arguments(parser)


def _run_view(args: argparse.Namespace) -> int:
    from coordexp.data.formats.options import ImportOptions
    from coordexp.data.formats.readers.sources import read_sources
    from coordexp.data.view.gallery import write_view

    options = ImportOptions(image_root=args.image_root, find_pictures=True, allow_outside=args.allow_outside)
    for source in read_sources(args.source, options, format_name=args.format):
        output = args.out / f"{source.split or source.path.stem}.html"
        gallery = write_view(source, output, most=args.images)
        missing = f", {gallery.num_missing} pictures could not be read" if gallery.num_missing else ""
        print(f"wrote {output}: {len(gallery.cards)} images{missing}")
    return EXIT_OK


def _add_convert_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="annotations of any known format -> JSONL, or another format",
        description="Read annotations of any known format and write the package's JSONL (pixels become bins, objects "
        "are sorted), or with --to another format. Everything left out or changed is counted; what `data check` calls "
        "an error is refused.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, as for `data check`")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT",
        help="JSONL file (`{split}` in its name stands for each split), COCO JSON file, or a new folder",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=TARGETS, help="what to write (default: jsonl, or coco for OUTPUT.json)"
    )
    parser.add_argument("--split", metavar="NAME", help="the one to take of several, such as train or val")
    _add_source_arguments(parser)
    _add_import_arguments(parser)
    parser.add_argument(
        "--pictures", choices=("link", "copy", "none"), default="link",
        help="how a new folder gets its pictures (default link: symbolic links)",
    )  # fmt: skip
    _add_categories(parser)


def _add_import_parser(commands: Commands, name: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}. Boxes become bins; objects are sorted; crowd regions and boxes without extent are "
        "left out; a table says how many. What `data check` calls an error is refused.",
    )
    parser.add_argument("--annotations", type=Path, required=True, metavar="JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR",
        help="where file names start; each picture is decoded (default: unchecked, names relative to the JSONL file)",
    )  # fmt: skip
    _add_allow_outside(parser)
    _add_import_arguments(parser)
    return parser


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, help="of SOURCE (default: recognised)")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR",
        help="where file names start (default: where the format has its pictures, or near the annotation file)",
    )  # fmt: skip
    _add_allow_outside(parser)


def _add_allow_outside(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="follow file names that lead out of the folder of pictures",
    )


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--missing-images", choices=("error", "skip", "keep"), default="error",
        help="what to do about a picture that is not there (default error); they are counted",
    )  # fmt: skip
    parser.add_argument(
        "--bad-images", choices=("error", "skip"), default="error",
        help="what to do about a picture that cannot be decoded, is of another size than annotated, or is none that "
        "the model's processor takes (default error)",
    )  # fmt: skip
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


def _add_categories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--categories", type=Path, metavar="FILE",
        help="COCO or LVIS file whose category ids to use, or for YOLO a data.yaml or list of names (default: "
        "descriptions by name)",
    )  # fmt: skip


def _run_check(args: argparse.Namespace) -> int:
    from coordexp.cli.console import progress
    from coordexp.data.check.findings import Level
    from coordexp.data.check.page import write_page
    from coordexp.data.check.run import check_sources
    from coordexp.data.formats.options import ImportOptions
    from coordexp.data.formats.readers.builder import Faults
    from coordexp.data.formats.readers.sources import read_sources

    augmenter = _augmenter(args)
    options = ImportOptions(image_root=args.image_root, find_pictures=True, allow_outside=args.allow_outside)
    sources = [
        source
        for path in args.sources
        for source in read_sources(path, options, format_name=args.format, faults=Faults(collect=True))
    ]
    with progress("pictures") as on_picture:
        report = check_sources(sources, on_picture=on_picture)
    augmented = []
    if augmenter is not None:
        from coordexp.data.check.augmented import augmented_samples

        augmented = [augmented_samples(source, augmenter, args.augment, args.seed) for source in sources]
    write_page(report, args.output, num_samples=args.samples, seed=args.seed, augmented=augmented)
    _print_check(report)
    print(f"wrote {args.output}")
    if report.count(Level.ERROR):
        return EXIT_BAD_INPUT
    return EXIT_FAILURE if report.count(Level.WARNING) else EXIT_OK


def _augmenter(args: argparse.Namespace) -> Augmenter | None:
    """What changes the samples of `--augment`: that of the run file, with its seed."""
    if not args.augment and args.config is None:
        return None
    if not (args.augment and args.config):
        raise ConfigError(
            "--augment N and --config YAML go together: how many samples, and the run that changes them."
        )
    from coordexp.config.run.load import load_run_config
    from coordexp.data.augment.augmenter import Augmenter

    run = load_run_config(args.config, world_size=1, refuse_not_built=False)
    settings = run.sections.custom.augmentation
    if not settings.enabled:
        raise ConfigError(
            f"{args.config}: custom.augmentation is off, so training changes nothing. Set enabled: true."
        )
    seeds = (run.swift.get("data_seed"), run.swift.get("seed"), _SWIFT_SEED)
    return Augmenter(settings, next(seed for seed in seeds if seed is not None))


def _print_check(report: CheckReport) -> None:
    from coordexp.cli.console import show_table
    from coordexp.data.check.findings import Level, numbered
    from coordexp.data.check.tables import class_rows, overview

    header = ("", "images", "without\nobjects", "objects", "crowds", "classes")
    rows = [overview(source) for source in report.sources]
    show_table("data sets", header, [(row.name, *map(str, row[1:])) for row in rows])
    columns = ("class", "objects", "images", "small", "medium", "large", "median width", "median height")
    for source in report.sources:
        classes = class_rows(source)
        more = f" (the {_MAX_CLASSES} most frequent of {len(classes)})" if len(classes) > _MAX_CLASSES else ""
        show_table(
            f"{source.name}: classes{more}",
            columns,
            [(row.name, *(f"{value:.6g}" for value in row[1:])) for row in classes[:_MAX_CLASSES]],
        )
    print()
    for source, findings in zip(report.sources, report.findings, strict=True):
        _print_findings(findings, f"{source.name}: " if len(report.sources) > 1 else "")
    _print_findings(report.shared)
    print(
        numbered("{count} [kind|kinds] of error, ", report.count(Level.ERROR))
        + numbered("{count} of warning", report.count(Level.WARNING))
    )


def _print_findings(findings: Iterable[Finding], prefix: str = "") -> None:
    for finding in findings:
        print(f"{finding.level}: {prefix}{finding}")


def _run_convert(args: argparse.Namespace) -> int:
    from coordexp.data.formats.readers.sources import read_sources

    target = args.to or ("coco" if args.output.suffix == ".json" else "jsonl")
    if args.to is None and args.output.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{args.output} is neither .jsonl nor .json: say what to write there (--to).")
    options = _import_options(args, find_pictures=True)
    sources = read_sources(args.source, options, format_name=args.format)
    sources = [source for source in sources if args.split in (None, source.split) or not source.split]
    if target != "jsonl":
        return _show_counts(_export(sources, target, args), args.output)
    return _convert_to_jsonl(sources, options, args)


def _convert_to_jsonl(sources: Sequence[Source], options: ImportOptions, args: argparse.Namespace) -> int:
    from coordexp.cli.console import progress
    from coordexp.data.formats.convert import convert
    from coordexp.data.formats.readers.sources import extras_of

    if len(sources) > 1 and "{split}" not in args.output.name:
        names = ", ".join(source.split or str(source.path) for source in sources)
        raise ConfigError(
            f"{args.source} holds several sets ({names}): take one (--split), or write each ({{split}} in OUTPUT)."
        )
    for source in sources:
        output = args.output.with_name(args.output.name.replace("{split}", source.split or source.path.stem))
        with progress("pictures") as on_picture:
            converted = convert(source, output, options, extras_of(source), on_picture=on_picture)
        _print_findings(converted.findings)
        _show_counts(converted.counts, output)
    return EXIT_OK


def _export(sources: Sequence[Source], target: str, args: argparse.Namespace) -> Counter[str]:
    from coordexp.data.formats.exports.coco import export_coco, export_source
    from coordexp.data.formats.exports.labelme import export_labelme
    from coordexp.data.formats.exports.xml import export_cvat, export_voc
    from coordexp.data.formats.exports.yolo import export_yolo
    from coordexp.data.formats.readers.yolo import read_class_names

    if target == "coco":
        if len(sources) != 1:
            raise ConfigError(f"{args.source} holds {len(sources)} sets: take one (--split).")
        if sources[0].kind == "jsonl":
            return export_coco(args.source, args.output, categories=args.categories)
        return export_source(sources[0], args.output)
    if target == "yolo":
        names = None if args.categories is None else read_class_names(args.categories)
        return export_yolo(sources, args.output, names=names, polygons=args.polygons, pictures=args.pictures)
    exports = {"voc": export_voc, "labelme": export_labelme, "cvat": export_cvat}
    return exports[target](sources, args.output, pictures=args.pictures)


def _run_import(args: argparse.Namespace) -> int:
    from coordexp.cli.console import progress
    from coordexp.data.formats.readers.coco import import_coco
    from coordexp.data.formats.readers.lvis import import_lvis

    options = _import_options(args)
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
    _print_findings(converted.findings)
    return _show_counts(converted.counts, args.output)


def _import_options(args: argparse.Namespace, *, find_pictures: bool = False) -> ImportOptions:
    from coordexp.data.formats.options import ImportOptions

    return ImportOptions(
        image_root=args.image_root,
        find_pictures=find_pictures,
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


def _run_export(args: argparse.Namespace) -> int:
    from coordexp.data.formats.exports.coco import export_coco

    return _show_counts(export_coco(args.data, args.output, categories=args.categories), args.output)


def _show_counts(counts: Counter[str], output: Path) -> int:
    from coordexp.cli.console import show_table

    rows = [(name.replace("_", " "), str(number)) for name, number in counts.items()]
    show_table(str(output), ("", "count"), rows)
    print(f"wrote {output}")
    return EXIT_OK
