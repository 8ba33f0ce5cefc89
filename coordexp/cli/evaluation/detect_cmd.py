"""`coordexp detect`: a checkpoint and pictures in; pictures with boxes, tables and annotation files out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK, ConfigError, RecordError

if TYPE_CHECKING:
    from coordexp.inference.detect.job import DetectJob, Found
    from coordexp.inference.detect.kept_answers import KeptAnswers
    from coordexp.inference.detections import Detections

CONSOLE = "-"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `detect`."""
    parser = subparsers.add_parser(
        "detect",
        help="find the objects on one's own pictures",
        description="Pictures that cannot be used are named and left out. With --save, the same command again asks "
        "about new and changed pictures only.",
    )
    parser.add_argument(
        "pictures", nargs="+", metavar="IMAGE|FOLDER|GLOB",
        help="files, folders (with the folders in them), or patterns in quotes, such as 'frames/*.jpg'",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, or a model's id on the Hugging Face hub"
    )
    parser.add_argument(
        "--save", default=CONSOLE, metavar="DIR",
        help="folder for the pictures with their boxes and for the detections; - (default): a table on the console",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("json", "coco", "yolo", "labelme"),
        help="of the detections (with --save: default json; without: json writes a line of JSON for each picture "
        "instead of the table)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="ask about all pictures anew")
    parser.add_argument(
        "--classes", metavar="A,B", type=_names, help="ask for these classes and leave out other answers"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="user message (default: as trained); {classes} in it is where the names go",
    )
    parser.add_argument(
        "--readout", choices=("argmax", "median", "expectation"),
        help="how a coordinate is read from its distribution (default: median, where there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--guided", action=argparse.BooleanOptionalAction,
        help="only whole answers in the checkpoint's form can be written (default: yes, where they can be guided)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive_int, default=16, help="answers at a time (default 16)")
    parser.add_argument("--max-new-tokens", type=positive_int, help="of an answer (default 1024)")
    parser.add_argument(
        "--max-pixels", type=positive_int, metavar="N", help="larger pictures are made smaller"
    )
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    parser.add_argument(
        "--backend", choices=("hf", "vllm", "openai"), default="hf", help="as of `coordexp infer`"
    )
    parser.add_argument("--base-url", help="openai: address of the server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--served-model", help="openai: the name the server knows the model by")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="openai: environment variable that holds the key"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    """Check everything, answer what is new, write; returns the process exit code."""
    from coordexp.inference.detect.written import write_detections, write_drawn

    folder = None if args.save == CONSOLE else Path(args.save)
    if folder is None and args.format not in (None, "json"):
        raise ConfigError(f"--format {args.format} writes files: say where with --save DIR.")
    if folder is None and args.overwrite:
        raise ConfigError("--overwrite belongs to --save DIR: without it nothing is kept.")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--save {folder} is a file: expected a folder, or a new name.")
    job = _job(args, folder)

    def draw(found: Detections) -> None:
        if folder is not None:
            write_drawn(folder, found)

    with _kept(args, folder, job) as kept:
        found = _answer(job, kept, draw, as_lines=folder is None and args.format == "json")
        for picture, why in found.left_out:
            print(f"left out {picture.path}: {why}", file=sys.stderr)
        if not found.detections:
            raise RecordError(f"none of the {len(job.pictures)} pictures can be used.")
        if folder is None:
            _show(found, as_lines=args.format == "json")
        else:
            written = write_detections(folder, found, args.format or "json")
            _say_what_was_written(found, folder, written)
    if found.num_cut:
        print(
            f"{found.num_cut} answers were cut at the limit of {job.settings.longest_answer} tokens; a higher "
            "--max-new-tokens lets them end, unless they repeat themselves",
            file=sys.stderr,
        )
    if found.left_out:
        print(f"{len(found.left_out)} of {len(job.pictures)} pictures were left out", file=sys.stderr)
    return EXIT_OK


def _job(args: argparse.Namespace, folder: Path | None) -> DetectJob:
    from coordexp.inference.detect.found_pictures import find_pictures
    from coordexp.inference.detect.job import DetectJob
    from coordexp.inference.detector import model_folder
    from coordexp.inference.settings import InferSettings

    pictures = find_pictures(args.pictures, leave_out=folder)
    settings = InferSettings(
        backend=args.backend,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        torch_dtype=args.torch_dtype,
        max_pixels=args.max_pixels,
        trust_remote_code=args.trust_remote_code,
        base_url=args.base_url,
        served_model=args.served_model,
        api_key_env=args.api_key_env,
    )
    return DetectJob.prepare(
        model_folder(args.model), pictures, settings,
        prompt=args.prompt, classes=args.classes, readout=args.readout, guided=args.guided,
    )  # fmt: skip


def _kept(
    args: argparse.Namespace, folder: Path | None, job: DetectJob
) -> AbstractContextManager[KeptAnswers]:
    from coordexp.inference.detect.kept_answers import KeptAnswers

    if folder is None:
        return nullcontext(KeptAnswers())
    notes = {"model": str(job.checked.model.resolve())}
    return KeptAnswers.open(folder, job.decisive(), overwrite=args.overwrite, notes=notes)


def _answer(
    job: DetectJob, kept: KeptAnswers, draw: Callable[[Detections], None], *, as_lines: bool
) -> Found:
    from coordexp.cli.console import progress

    with progress("pictures", to_stderr=as_lines) as advance:
        return job.run(kept, on_pictures=advance, on_found=draw)


def _show(found: Found, *, as_lines: bool) -> None:
    """A table, or a line of JSON for each picture."""
    if as_lines:
        for one in found.detections:
            print(one.to_json())
        return
    from coordexp.cli.console import show_table

    rows = [
        (one.name, label, f"{score:.3f}", *(f"{value:.1f}" for value in box))
        for one in found.detections
        for label, score, box in zip(one.labels, one.scores.tolist(), one.xyxy.tolist(), strict=True)
    ]
    nothing = [one.name for one in found.detections if not len(one)]
    show_table("detections", ("picture", "label", "score", "x1", "y1", "x2", "y2"), rows)
    if nothing:
        print(f"nothing on {', '.join(nothing)}")


def _say_what_was_written(found: Found, folder: Path, written: Path) -> None:
    num_objects, num_kept = sum(map(len, found.detections)), len(found.detections) - found.num_asked
    kept = f" ({num_kept} answered before)" if num_kept else ""
    print(f"{num_objects} objects on {len(found.detections)} pictures{kept}")
    print(f"wrote {written} and the pictures with their boxes to {folder / 'drawn'}")
