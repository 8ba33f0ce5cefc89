"""`coordexp sweep`: one checkpoint, one set of images, many ways to decode, one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK, ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `sweep`."""
    parser = subparsers.add_parser(
        "sweep",
        help="compare ways to decode: temperatures, penalties, readouts, guided or not",
        description="Every combination is inferred, scored and evaluated in a folder of its own; the model is loaded "
        "once. The same command again goes on where a stopped sweep was. Writes sweep.json and sweep.md.",
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="model, data and question of a folder of `coordexp infer`"
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder (in place of --run)")
    parser.add_argument(
        "--data", type=Path, help="JSONL file with images and ground truth (in place of --run)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--overwrite", action="store_true", help="start anew whatever the folder holds")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")
    ways = parser.add_argument_group("what is compared: every combination")
    ways.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0], metavar="T", help="0 is greedy (default 0)"
    )
    ways.add_argument(
        "--repetition-penalty",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="P",
        help="1 is none (default 1)",
    )
    ways.add_argument(
        "--readout", choices=("argmax", "median", "expectation"), nargs="+", default=["median"],
        help="how coordinates are read (default median; answers of numbers have argmax alone)",
    )  # fmt: skip
    ways.add_argument(
        "--guided", choices=("off", "on"), nargs="+", default=["off"],
        help="whether only whole answers can be written (default off)",
    )  # fmt: skip
    ways.add_argument(
        "--k", type=positive_int, default=1, metavar="K",
        help="sampled answers to each image at temperatures above 0: what they find together, and what of it the "
        "greedy answer does not say",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    how.add_argument("--batch-size", type=positive_int, default=16, help="answers at a time (default 16)")
    how.add_argument(
        "--max-new-tokens", type=positive_int, help="of an answer (default: as for `coordexp infer`)"
    )
    how.add_argument(
        "--max-model-len", type=positive_int, help="vllm: longest prompt and answer (default: the model's)"
    )
    how.add_argument("--torch-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    how.add_argument(
        "--score", choices=("logprob", "constant"), default="logprob", help="confidences (default logprob)"
    )
    how.add_argument("--bad-images", choices=("error", "skip"), default="error")


def run(args: argparse.Namespace) -> int:
    """Answer what is missing, then show the table; returns the process exit code."""
    from coordexp.cli.console import progress, show_table
    from coordexp.eval.predictions.confidence import Scoring
    from coordexp.eval.sweep import TABLE, oracle_table, way_table
    from coordexp.inference.settings import InferSettings
    from coordexp.inference.sweep import Sweep, SweepPlan

    model, data, question = _asked(args)
    settings = InferSettings(
        **question,
        backend=args.backend,
        batch_size=args.batch_size,
        torch_dtype=args.torch_dtype,
        max_model_len=args.max_model_len,
        bad_images=args.bad_images,
    )
    plan = SweepPlan(
        temperatures=args.temperature,
        repetition_penalties=args.repetition_penalty,
        readouts=args.readout,
        guided=[value == "on" for value in args.guided],
        k=args.k,
    )
    sweep = Sweep(model, data, args.out, plan, settings, Scoring(args.score))
    with progress("images", f"{len(plan.ways)} ways") as advance:
        found = sweep.run(overwrite=args.overwrite, on_images=advance)
    show_table(f"{args.out}: {found['num_images']} images", *way_table(found, brief=True))
    if found["oracle"]:
        show_table(f"recall at IoU 0.5, K = {found['k']}", *oracle_table(found))
    print(f"wrote {args.out / TABLE}; next: coordexp report {args.out} --output sweep.html")
    return EXIT_OK


def _asked(args: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Model, data and the settings of the question."""
    if (args.run is None) == (args.model is None and args.data is None):
        raise ConfigError("give either --run RUN, or --model and --data.")
    if args.run is None:
        if args.model is None or args.data is None:
            raise ConfigError("--model and --data belong together; or give --run RUN.")
        return args.model, args.data, {"limit": args.limit, "max_new_tokens": args.max_new_tokens}
    from coordexp.inference.recorded import recorded_run

    recorded = recorded_run(args.run)
    given = {"limit": args.limit, "max_new_tokens": args.max_new_tokens}
    return (
        recorded.model,
        recorded.data,
        recorded.question | {k: v for k, v in given.items() if v is not None},
    )
