"""`coordexp eval`: F1 and COCO average precision of a scored run, or of any detector's COCO files."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK, ConfigError

_COCO_ROWS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_LVIS_ROWS = ("APr", "APc", "APf")
_RECALL_SIZES = ("AR_small", "AR_medium", "AR_large")
_F1_ROWS = (
    "f1_at_50", "f1_at_95", "f1_50_95", "box_f1_at_50", "box_f1_50_95", "precision_at_50", "recall_at_50",
)  # fmt: skip
_OTHER_ROWS = ("class_averaged_f1_50_95", "duplicate_rate_mean", "duplicate_rate_p99")
_CALIBRATION_ROWS = ("ece_at_50", "ece_isotonic_at_50", "ece_at_75", "ece_isotonic_at_75")
_TABLE = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP75", "AP75"),
    ("AR", "AR"),
    ("AP, all\nscores 1", "AP_const"),
    ("F1\n.50:.95", "f1_50_95"),
    ("F1\n@.50", "f1_at_50"),
    ("boxes\nper s", "boxes_per_second"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="F1 and COCO AP of scored predictions",
        description="Evaluate a run of `coordexp infer` and `coordexp score` (--run), or plain COCO files "
        "(--format coco --gt --pred --output). Writes metrics.json, per_image.json, per_class.csv, "
        "desc_mapping.json, coco_gt.json and coco_preds.json.",
    )
    parser.add_argument("--format", choices=("run", "coco"), default="run", help="what is read (default run)")
    parser.add_argument(
        "--run", type=Path, help="folder that `coordexp score` has been run on, or a scored file"
    )
    parser.add_argument("--gt", type=Path, metavar="JSON", help="COCO ground truth (--format coco)")
    parser.add_argument("--pred", type=Path, metavar="JSON", help="COCO results (--format coco)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: the run's folder)"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN|JSON",
        help="the untuned model on the same images, as first row: a run, or results with --format coco",
    )  # fmt: skip
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where image names start; missing files are counted"
    )
    coco = parser.add_argument_group("average precision")
    coco.add_argument(
        "--engine",
        choices=("hotcoco", "faster-coco-eval", "pycocotools"),
        default="hotcoco",
        help="what computes it; all give the same numbers (default hotcoco, the fastest)",
    )
    coco.add_argument(
        "--iou-type", choices=("bbox", "segm"), default="bbox", help="boxes or masks (default bbox)"
    )
    coco.add_argument(
        "--max-dets", type=positive_int, nargs="+", metavar="N",
        help="detections per image and class (default 1 10 100); AP takes the last",
    )  # fmt: skip
    coco.add_argument(
        "--lvis", action=argparse.BooleanOptionalAction, default=None,
        help="by the rules of LVIS: classes an image was not checked for do not count, 300 detections per image of all "
        "classes, and AP of rare, common and frequent classes (default: where the data says what that needs)",
    )  # fmt: skip
    f1 = parser.add_argument_group("F1")
    f1.add_argument(
        "--iou-thresholds", type=float, nargs="+", default=[], metavar="IOU",
        help="further thresholds, beside 0.50:0.05:0.95",
    )  # fmt: skip
    f1.add_argument(
        "--scope", choices=("all", "annotated"), default="all",
        help="annotated: leave out predictions of classes that the image's ground truth does not hold",
    )  # fmt: skip
    desc = parser.add_argument_group("descriptions that are no class name")
    desc.add_argument("--desc-match", choices=("exact", "semantic"), default="exact")
    desc.add_argument(
        "--semantic-model", metavar="DIR", help="sentence-transformers model (default: the packaged one)"
    )
    desc.add_argument("--semantic-threshold", type=float, default=0.6, metavar="COS", help="default 0.6")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the files and print the headline numbers; returns the process exit code."""
    _check_arguments(args)
    from coordexp.eval.desc_mapping import DescEmbedder
    from coordexp.eval.evaluate import (
        EvalSettings,
        check_baseline,
        evaluate,
        from_coco_files,
        from_run,
        with_baseline,
        write_evaluation,
    )
    from coordexp.eval.predictions.scored import recorded_image_root

    settings = EvalSettings(
        engine=args.engine,
        iou_type=args.iou_type,
        iou_thresholds=tuple(args.iou_thresholds),
        scope=args.scope,
        max_dets=tuple(args.max_dets) if args.max_dets else None,
        lvis=args.lvis,
        desc_match=args.desc_match,
        semantic_model=args.semantic_model,
        semantic_threshold=args.semantic_threshold,
    )
    embed = DescEmbedder(args.semantic_model) if args.desc_match == "semantic" else None
    if args.format == "run":
        output, image_root = (
            args.output or _folder(args.run),
            args.image_root or recorded_image_root(args.run),
        )
        paths, load = [args.run, args.baseline], from_run
    else:
        output, image_root = args.output, args.image_root
        paths, load = [args.pred, args.baseline], partial(from_coco_files, args.gt, iou_type=args.iou_type)

    gc.disable()  # millions of small values and no cycles: looking for some takes longer than the evaluation
    detections = [load(path) for path in paths if path is not None]
    evaluation = evaluate(detections[0], settings, embed=embed, image_root=image_root)
    if args.baseline is not None:
        check_baseline(*detections)
        evaluation = with_baseline(evaluation, evaluate(detections[1], settings, embed=embed))
    write_evaluation(evaluation, output)
    _print(evaluation.metrics, output)
    return EXIT_OK


def _check_arguments(args: argparse.Namespace) -> None:
    if args.format == "run":
        if args.run is None or args.gt is not None or args.pred is not None:
            raise ConfigError("give --run RUN, or --format coco with --gt, --pred and --output.")
        return
    missing = [f"--{name}" for name in ("gt", "pred", "output") if getattr(args, name) is None]
    if missing or args.run is not None:
        found = f"{', '.join(missing)} missing" if missing else "--run belongs to a run"
        raise ConfigError(f"--format coco takes --gt, --pred and --output: {found}.")


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _print(metrics: dict[str, Any], output: Path) -> None:
    from coordexp.cli.console import show_table
    from coordexp.eval.evaluate import headline

    rows = {"baseline": metrics.get("baseline"), "this run": headline(metrics)}
    show_table(
        f"{output}: {metrics['num_images']} images, {metrics['num_gt']} objects, {metrics['num_pred']} predictions",
        ("", *(title for title, _ in _TABLE)),
        [(name, *(_cell(row[key], key) for _, key in _TABLE)) for name, row in rows.items() if row],
    )
    recalls = [f"AR{most}" for most in metrics["settings"]["max_dets"]]
    is_lvis = metrics["settings"]["lvis"]
    if is_lvis:
        print("average precision by the rules of LVIS")
    for names in (
        (*_COCO_ROWS, *(_LVIS_ROWS if is_lvis else ())),
        (*recalls, *_RECALL_SIZES),
        _F1_ROWS,
        _OTHER_ROWS,
        _CALIBRATION_ROWS,
    ):
        print("  ".join(f"{name} {_cell(metrics[name], name)}" for name in names))
    _print_notes(metrics)
    print(f"wrote {output / 'metrics.json'}")


def _print_notes(metrics: dict[str, Any]) -> None:
    if metrics["decoding"] is not None:
        print(
            "decoding: " + ", ".join(f"{name} {_shown(value)}" for name, value in metrics["decoding"].items())
        )
    notes: Sequence[tuple[int | None, str]] = (
        (metrics["num_crowd"], "crowd regions, neither hits nor misses"),
        (metrics["mapped_desc"], "predictions mapped to a class of another name (desc_mapping.json)"),
        (
            metrics["dropped_unknown_desc"],
            "predictions of no known class, left out of AP (desc_mapping.json)",
        ),
        (metrics["num_images_missing"], "image files missing"),
        (
            metrics["num_bad_pictures"],
            "images whose picture inference could not use (--bad-images skip): they stay in without predictions, their "
            f"{metrics['num_gt_of_bad_pictures']} objects count as missed",
        ),
    )
    for count, what in notes:
        if count:
            print(f"{count} {what}")
    if metrics["drop_reasons"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in metrics["drop_reasons"].items())
        print(f"dropped before evaluation: {counts}")


def _shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _cell(value: float | None, key: str) -> str:
    if value is None or value < 0:  # not known, or no ground truth to measure on
        return "-"
    return f"{value:.1f}" if key == "boxes_per_second" else f"{value:.3f}"
